//! The command line.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use libsg::ids::VolumeId;
use libsg::transport::PoolSecret;
use libsg::units::{Rate, Size};

/// The port an intermediary listens on.
const PORT: u16 = 7701;

/// Arguments that cannot be used together, or name what there is not: exit code 2.
#[derive(Debug)]
pub struct WrongArguments(pub String);

impl std::fmt::Display for WrongArguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongArguments {}

/// Scatter-gather live migration for operators.
///
/// Hosts with spare memory run `sg serve`: they are the intermediaries that hold pages of a VM
/// between the host that it leaves and the host that it runs on.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Examples:
  head -c 32 /dev/urandom | base64 > pool.secret && chmod 600 pool.secret
  sg serve --memory 16G --secret pool.secret                  on each host with memory to spare
  sg status --intermediary 10.0.0.3 --intermediary 10.0.0.4 --secret pool.secret
  sg ls --pool static:/etc/sg/pool --secret pool.secret       whose pages lie there

Sizes are powers of two (512M, 1G), rates powers of ten (256mbit, 1gbit; 0 is unlimited).
Exit codes: 0 done, 1 failed and nothing lost, 2 wrong arguments, 3 something was lost."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lend this host's memory: hold pages of VMs that migrate, and say where they are
    Serve(ServeArgs),
    /// Who the intermediaries are, how full, and with whose pages
    Status(PoolArgs),
    /// Volumes that the intermediaries hold: one line for each VM
    Ls(PoolArgs),
    /// Give a volume's memory back at every intermediary; its pages are gone
    Dissolve(DissolveArgs),
}

/// How pages reach an intermediary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// The best there is
    Auto,
    /// TCP
    Tcp,
}

/// How logs are written, to standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Arguments of `sg serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg serve --memory 16G --secret pool.secret
  sg serve --memory 16G --secret pool.secret --limit-in 4gbit --zone rack7
  sg serve --memory 512M --listen 127.0.0.1:7701              for a test, on this host alone

Memory is taken as pages come, and given back when a migration is done. Once it listens, one line is
written to standard output: {\"event\":\"listening\",\"address\":\"...\",\"node\":\"...\"}.

On SIGTERM or SIGINT it goes at once when nobody needs what it holds. While it holds pages of a live
volume it stays, and logs whose they are; a second signal makes it go, and it reports what was lost
(exit code 3). Logs are filtered by RUST_LOG (info).")]
pub struct ServeArgs {
    /// The most memory to give to pages; books about them may take an eighth of it more
    #[arg(long, value_name = "SIZE")]
    pub memory: Size,
    /// Where to listen; port 0 picks a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7701")]
    pub listen: SocketAddr,
    /// What this intermediary is called [default: the host's name]
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// The zone (rack, power feed) it is in, for those who spread copies
    #[arg(long, value_name = "Z")]
    pub zone: Option<String>,
    /// The most page bytes to take, over all connections
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub limit_in: Rate,
    /// The most page bytes to give out, over all connections
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub limit_out: Rate,
    /// File with the pool's secret; without one only loopback addresses are listened on
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// Listen beyond loopback without a secret: whoever reaches the port reads every page
    #[arg(long, conflicts_with = "secret")]
    pub insecure: bool,
    /// How pages reach it
    #[arg(long, value_enum, default_value = "auto")]
    pub transport: Transport,
    /// How logs are written, to standard error
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Go at the first signal, also with pages of live volumes
    #[arg(long)]
    pub force: bool,
    /// How ready the kernel is to kill this process when memory runs out (-1000 never, 1000 first)
    #[arg(long, value_name = "N", default_value_t = -500, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: i16,
    /// TEST CANARY: flips one byte of the N-th page that is stored, which the destination must
    /// report as a lost copy. Never use it with a VM that you need
    #[arg(long, value_name = "N")]
    pub canary_flip_slot: Option<u64>,
}

/// Which intermediaries are asked.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// An intermediary; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub intermediary: Vec<String>,
    /// Where to find intermediaries: static:FILE has one HOST:PORT a line
    #[arg(long, value_name = "WHERE")]
    pub pool: Option<String>,
    /// File with the pool's secret
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `sg dissolve`.
#[derive(Debug, Args)]
pub struct DissolveArgs {
    /// The volume, as `sg ls` shows it
    #[arg(value_name = "VOLUME")]
    pub volume: VolumeId,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Which intermediaries.
    #[command(flatten)]
    pub pool: PoolArgs,
}

/// The secret in the file, or none.
pub fn secret(path: Option<&Path>) -> Result<PoolSecret> {
    Ok(match path {
        Some(path) => PoolSecret::from_file(path).map_err(|e| WrongArguments(e.chain()))?,
        None => PoolSecret::open(),
    })
}

impl PoolArgs {
    /// The intermediaries' addresses.
    pub fn addresses(&self) -> Result<Vec<SocketAddr>> {
        let mut names = self.intermediary.clone();
        if let Some(pool) = &self.pool {
            let Some(path) = pool.strip_prefix("static:") else {
                return Err(WrongArguments(format!("--pool {pool}: write static:FILE")).into());
            };
            let text = std::fs::read_to_string(path)
                .map_err(|e| WrongArguments(format!("--pool: {path} cannot be read: {e}")))?;
            let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
            names.extend(lines.filter(|line| !line.is_empty()).map(str::to_owned));
        }
        if names.is_empty() {
            let what = "name the intermediaries: --intermediary HOST:PORT, or --pool static:FILE";
            return Err(WrongArguments(what.into()).into());
        }
        names.iter().map(|name| resolve(name)).collect()
    }
}

/// The address of `HOST`, `HOST:PORT`, or `[HOST]:PORT`.
fn resolve(name: &str) -> Result<SocketAddr> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok((address, PORT).into());
    }
    let found = if name.contains(':') { name.to_socket_addrs() } else { (name, PORT).to_socket_addrs() };
    let mut found = found.with_context(|| format!("{name} is no HOST:PORT that can be found"))?;
    found.next().with_context(|| format!("{name} has no address"))
}

#[cfg(test)]
mod test {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["sg", "serve", "--memory", "2G", "--limit-in", "1gbit"]).expect("good");
        let Command::Serve(args) = cli.command else { panic!("serve") };
        assert_eq!((args.memory, args.limit_in), (Size(2 << 30), Rate(1_000_000_000)));
        assert_eq!((args.listen.port(), args.oom_score_adj), (PORT, -500));
        assert!(Cli::try_parse_from(["sg", "serve", "--memory", "lots"]).is_err());
        assert!(Cli::try_parse_from(["sg", "serve"]).is_err());
    }

    #[test]
    fn intermediaries_come_from_flags_and_files() {
        let file = std::env::temp_dir().join(format!("sg-pool-{}", std::process::id()));
        std::fs::write(&file, "# rack 7\n127.0.0.2\n\n127.0.0.3:99 # spare\n").expect("written");
        let mut pool = PoolArgs {
            intermediary: vec!["127.0.0.1:5".into(), "::1".into()],
            pool: Some(format!("static:{}", file.display())),
            secret: None,
            json: false,
        };
        let found = pool.addresses().expect("good");
        std::fs::remove_file(&file).expect("removed");
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.1:5", "[::1]:7701", "127.0.0.2:7701", "127.0.0.3:99"]);
        pool.pool = Some("etcd://x".into());
        assert!(pool.addresses().is_err());
        pool = PoolArgs { intermediary: vec![], pool: None, secret: None, json: false };
        assert!(pool.addresses().expect_err("nobody").downcast_ref::<WrongArguments>().is_some());
    }
}
