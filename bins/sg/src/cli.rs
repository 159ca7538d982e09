//! The command line.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use libsg::discovery::{Found, Pool as _, StaticPool};
use libsg::transport::PoolSecret;
use libsg::units::{Rate, Size};
use pools::Meeting;
use transports::TransportArgs;

/// The port an intermediary listens on.
pub const PORT: u16 = 7701;

/// How long hosts of a pool have to announce themselves to who asks.
const PATIENCE: Duration = Duration::from_secs(10);

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
  sg plan --pool multicast:239.83.71.1 --secret pool.secret --memory 64G   who would take them
  sg evict --all --to 10.0.0.2 --pool multicast:239.83.71.1 --secret pool.secret     this host's VMs leave it
  sg nbd --create scratch --size 1G --pool static:/etc/sg/pool --secret pool.secret    a disk in their memory

Sizes are powers of two (512M, 1G), rates powers of ten (256mbit, 1gbit; 0 is unlimited).
Exit codes: 0 done, 1 failed and nothing lost, 2 wrong arguments, 3 something was lost, 4 cancelled, 130 interrupted."
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
    /// Volumes that the intermediaries hold: one line for each VM, with the name of those that are parked, and who has
    /// claimed them since. A parked VM stays until it is claimed (`sg-vmm run --claim NAME`) or dissolved
    Ls(PoolArgs),
    /// Give a volume's memory back at every intermediary; its pages are gone
    Dissolve(DissolveArgs),
    /// Which intermediaries a VM would go to, and why; whether it fits, and how long it takes. Does nothing
    Plan(PlanArgs),
    /// Empty this host of its VMs, over their VMMs' control sockets: to destinations, or parked
    Evict(crate::evict::EvictArgs),
    /// Follow VMs that arrive here until they hold all of their memory; claim parked ones
    Gather(crate::evict::GatherArgs),
    /// Call migrations off: the VMs run on where they were
    Cancel(crate::evict::CancelArgs),
    /// Change how fast VMs leave, or arrive in the background
    Limit(crate::evict::LimitArgs),
    /// Serve a volume as a block device, to whatever speaks NBD
    Nbd(crate::nbd::NbdArgs),
    /// Look at RDMA devices, and try them with an intermediary
    #[command(subcommand)]
    Rdma(crate::rdma::RdmaCommand),
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
  sg serve --memory 16G --secret pool.secret --local-first eth0 --link 10gbit
  sg serve --memory 16G --secret pool.secret --announce 239.83.71.1@10.0.0.3
  sg serve --memory 16G --secret pool.secret --announce etcd://10.0.0.1,10.0.0.2,10.0.0.5/sg
  sg serve --memory 16G --secret pool.secret --peer 10.0.0.4 --peer 10.0.0.5       who takes over when it goes
  sg serve --memory 512M --listen 127.0.0.1:7701              for a test, on this host alone

Memory is taken as pages come, and given back when a migration is done. Once it listens, one line is
written to standard output: {\"event\":\"listening\",\"address\":\"...\",\"node\":\"...\"}.

On SIGTERM or SIGINT it goes at once when nobody needs what it holds. Pages of live volumes it hands to
other intermediaries first: the volume's own, then those of --peer and --pool; it takes none from then on,
and is read from until it goes. Logs and `sg status` say how far it is. What a VM has here that leaves by
rounds or is being parked, or a disk that `sg nbd` writes, is waited for. Where it gets no further for
--drain-timeout, as nobody has room, it stays, logs whose pages it has and why, and takes pages again.
A second signal makes it go at any time, and it reports what was lost (exit code 3). A service manager must
wait for it (systemd: TimeoutStopSec=infinity). Logs are filtered by RUST_LOG (info).")]
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
    /// The most page bytes to take, over all connections, which share it alike
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub limit_in: Rate,
    /// The most page bytes to give out, over all connections, which share it alike; pages that guests wait for go first
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub limit_out: Rate,
    /// What this host itself sends and receives over the interface (all that is not the intermediary's) goes first: pages
    /// get what it leaves of the link, within --limit-in and --limit-out, a 32nd at least. Up to an eighth of the link
    /// stays free for it to grow into. `sg status` shows what that is at the moment. Needs to know what the link carries:
    /// --link, where the interface does not say it
    #[arg(long, value_name = "INTERFACE")]
    pub local_first: Option<String>,
    /// File with the pool's secret; without one only loopback addresses are listened on
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// Listen beyond loopback without a secret: whoever reaches the port reads every page
    #[arg(long, conflicts_with = "secret")]
    pub insecure: bool,
    /// Announce it, so that others find it without a list. To a multicast group, GROUP:PORT@ADDR: once a second, in
    /// a large pool less often; the interface is the one with the address, else the one the routes say; the port 7702
    /// where none is named. Or by etcd, etcd://HOST:PORT,HOST:PORT/PREFIX: each 5 s, and when much has changed; when it
    /// dies, it is gone after 15 s. Clocks of the pool's hosts may differ by 30 s
    #[arg(long, value_name = "WHERE")]
    pub announce: Option<Meeting>,
    /// What the host's link carries, for --announce and --local-first [default: what its interface says, else 1gbit in
    /// announcements]
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// How pages reach it.
    #[command(flatten)]
    pub transport: TransportArgs,
    /// How logs are written, to standard error
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Go at the first signal, also with pages of live volumes, which are lost
    #[arg(long)]
    pub force: bool,
    /// How long it may get no further, at a signal, with handing to others what is here. Then it stays, and a second
    /// signal goes
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds, conflicts_with = "force")]
    pub drain_timeout: Duration,
    /// Who may take over what volumes' own intermediaries have no room for, when this one goes or copies of pages were
    /// lost with another; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// Where to find others that may: as --pool of the other commands [default: where it announces itself]
    #[arg(long, value_name = "WHERE")]
    pub pool: Option<String>,
    /// How ready the kernel is to kill this process when memory runs out (-1000 never, 1000 first)
    #[arg(long, value_name = "N", default_value_t = -500, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: i16,
    /// TEST CANARY: flips one byte of the N-th page that is stored, which the destination must
    /// report as a lost copy. Never use it with a VM that you need
    #[arg(long, value_name = "N")]
    pub canary_flip_slot: Option<u64>,
}

impl ServeArgs {
    /// What the host's link carries, in bytes a second, where that is said.
    pub fn link_bytes_per_s(&self) -> Option<u64> {
        self.link.filter(|rate| !rate.is_unlimited()).map(Rate::bytes_per_s)
    }
}

/// Which intermediaries are asked.
#[derive(Debug, Args)]
pub struct Intermediaries {
    /// An intermediary; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub intermediary: Vec<String>,
    /// Where to find intermediaries: static:FILE has one HOST:PORT a line; at multicast:GROUP:PORT@ADDR
    /// they announce themselves (port and address of the interface need not be named), and by
    /// etcd://HOST:PORT,HOST:PORT/PREFIX (members of one etcd; the port 2379 need not be named)
    #[arg(long, value_name = "WHERE")]
    pub pool: Option<String>,
    /// File with the pool's secret
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
}

/// Which intermediaries are asked, and how the answer is told.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// Which intermediaries.
    #[command(flatten)]
    pub at: Intermediaries,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `sg dissolve`.
#[derive(Debug, Args)]
pub struct DissolveArgs {
    /// The volume, as `sg ls` shows it, or the name under which a VM is parked
    #[arg(value_name = "NAME|VOLUME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub volume: String,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Which intermediaries.
    #[command(flatten)]
    pub pool: PoolArgs,
}

/// Arguments of `sg plan`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg plan --pool multicast:239.83.71.1 --secret pool.secret --memory 64G
  sg plan --pool etcd://10.0.0.1,10.0.0.2/sg --secret pool.secret --memory 64G
  sg plan --pool multicast:239.83.71.1 --secret pool.secret --memory 64G --link 10gbit --destination-rate 2gbit \\
      --from 10.0.0.7 --to 10.0.1.9 --copies 2 --evacuate

Zones are those that the hosts of --from and --to announce, where they are not named. Which of several equal nodes are
taken is drawn by --seed; a migration draws by its own. Exit code 0: it fits; 1: it does not, or nobody answers.")]
pub struct PlanArgs {
    /// Memory of the VM that is not zero
    #[arg(long, value_name = "SIZE")]
    pub memory: Size,
    /// Copies of each page
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub copies: u8,
    /// What the source's link sends [default: what --from announces, else 1gbit]
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// What the destination takes in [default: what --to announces to be free, else as --link]
    #[arg(long, value_name = "RATE")]
    pub destination_rate: Option<Rate>,
    /// The host that the VM leaves
    #[arg(long, value_name = "IP")]
    pub from: Option<IpAddr>,
    /// The host that it goes to
    #[arg(long, value_name = "IP")]
    pub to: Option<IpAddr>,
    /// The zone that it leaves
    #[arg(long, value_name = "Z")]
    pub from_zone: Option<String>,
    /// The zone that it goes to: nodes there come first
    #[arg(long, value_name = "Z")]
    pub to_zone: Option<String>,
    /// The whole zone that it leaves is emptied: nodes in the destination's zone only, with further copies anywhere but
    /// in the zone that it leaves
    #[arg(long)]
    pub evacuate: bool,
    /// What the choice among equals comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Also those that were left, and why
    #[arg(long)]
    pub explain: bool,
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

impl Intermediaries {
    /// Whether nobody is named.
    pub fn is_empty(&self) -> bool {
        self.intermediary.is_empty() && self.pool.is_none()
    }

    /// Our own address on the way to the pool, where hosts announce themselves in it.
    pub fn own_address(&self) -> Option<IpAddr> {
        self.pool.as_ref()?.parse::<Meeting>().ok()?.own_address().ok()
    }

    /// The intermediaries that are named or found.
    pub fn find(&self, secret: &PoolSecret) -> Result<Vec<Found>> {
        let mut names = self.intermediary.clone();
        let mut found = Vec::new();
        match self.pool.as_deref().map(|pool| (pool, pool.strip_prefix("static:"))) {
            None => {}
            Some((_, Some(path))) => names.extend(listed(path)?),
            Some((pool, None)) => {
                let wrong =
                    |e: libsg::Error| WrongArguments(format!("--pool: {}; or static:FILE", e.chain()));
                let meeting: Meeting = pool.parse().map_err(wrong)?;
                let looked = meeting.open(secret).and_then(|mut pool| pool.find(PATIENCE));
                found = looked.map_err(|e| anyhow::anyhow!("{}", e.chain()))?;
                found.retain(|found| found.address.port() != 0);
                anyhow::ensure!(
                    !found.is_empty() || !names.is_empty(),
                    "nobody announces itself at {meeting}: `sg serve --announce {meeting}` does, with the same --secret"
                );
            }
        }
        if names.is_empty() && found.is_empty() {
            let what = "name the intermediaries: --intermediary HOST:PORT, or --pool static:FILE, multicast:GROUP or etcd://HOST/PREFIX";
            return Err(WrongArguments(what.into()).into());
        }
        let named = names.iter().map(|name| resolve(name)).collect::<Result<Vec<_>>>()?;
        let named = StaticPool(named).find(PATIENCE).map_err(|e| anyhow::anyhow!("{}", e.chain()))?;
        Ok(named.into_iter().chain(found).collect())
    }
}

/// A time.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("{text} is no number of seconds from 0.1 to 3600"))
}

/// What a file of addresses names.
fn listed(path: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| WrongArguments(format!("--pool: {path} cannot be read: {e}")))?;
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    Ok(lines.filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

/// The address of an intermediary.
fn resolve(name: &str) -> Result<SocketAddr> {
    resolve_at(name, PORT)
}

/// The address of `HOST`, `HOST:PORT`, or `[HOST]:PORT`.
pub fn resolve_at(name: &str, port: u16) -> Result<SocketAddr> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok((address, port).into());
    }
    let found = if name.contains(':') { name.to_socket_addrs() } else { (name, port).to_socket_addrs() };
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
        let mut pool = Intermediaries {
            intermediary: vec!["127.0.0.1:5".into(), "::1".into()],
            pool: Some(format!("static:{}", file.display())),
            secret: None,
        };
        let secret = PoolSecret::open();
        let found = pool.find(&secret).expect("good");
        std::fs::remove_file(&file).expect("removed");
        let found: Vec<String> = found.iter().map(|found| found.address.to_string()).collect();
        assert_eq!(found, ["127.0.0.1:5", "[::1]:7701", "127.0.0.2:7701", "127.0.0.3:99"]);
        for wrong in ["etcd://x", "static", "multicast:10.0.0.1", "http://x/y"] {
            pool.pool = Some(wrong.into());
            let error = pool.find(&secret).expect_err("no pool");
            assert!(error.downcast_ref::<WrongArguments>().is_some(), "{error}");
        }
        pool = Intermediaries { intermediary: vec![], pool: None, secret: None };
        assert!(pool.find(&secret).expect_err("nobody").downcast_ref::<WrongArguments>().is_some());
    }
}
