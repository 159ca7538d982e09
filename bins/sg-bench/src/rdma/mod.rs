//! `sg-bench rdma`: what pages take over a device, through a link, beside what `perftest` says of the device alone.

mod ours;
mod perftest;
pub mod rows;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use libsg::page::PAGE_BYTES_U64;
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::units::Size;
use libsg::vmd::Class;
use serde::Serialize;
use serde_json::json;
use transports::DeviceArgs;
use vmd_rdma::verbs::Device;
use vmd_rdma::verbs::kernel;
use vmd_rdma::{RdmaBackend, RdmaConnector};

use self::ours::{Messages, Trial};
use self::perftest::Perftest;
use crate::cluster::INTERMEDIARY_PORT;
use crate::error::chained;
use crate::stats;
use crate::ui::Table;

/// Messages of one measurement, at least and at most.
const MESSAGES_MIN: usize = 32;
const MESSAGES_MAX: usize = 1000;

/// The largest message: a batch of the largest kind.
const MESSAGE_BYTES_MAX: u64 = 2 << 20;

/// One-sided RDMA, through libsg's links.
///
/// Pages are put to an intermediary and read back, in messages of so many bytes, so many under way at once. Beside it, in
/// turn, the programs of `perftest` (Debian's package) move messages of the same size and depth between the same two hosts:
/// what the device does with nothing above it. Shown are medians, and the median of the ratios of each round.
///
/// A put is leased, written, and acknowledged with its place; a read is asked for, read, and released. What a source does
/// before (looking at pages, summing them) and a destination behind (comparing sums, installing) is no part of it. The
/// latency of a write is that of a page that is safe; perftest's is half of what two writes take, to memory that polls.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  sg-bench rdma                                                 this host with itself
  sg-bench rdma --to 10.0.0.3 --secret pool.secret --peer-shell 'ssh 10.0.0.3'    with `sg serve` there
  sg-bench rdma --to 10.0.0.3 --secret pool.secret              the same, without perftest beside it
  sg-bench rdma --size 64K --depth 1,4,16,64 --wait events --repeat 3 --json -

perftest runs where it is installed at both ends (apt install perftest), and can be started at the other: by --peer-shell, or
where that is this host. It asks for no secret: its port is open while it runs.
Exit codes: 0 measured; 1 not: no device, nobody there, or what was read was wrong; 2 wrong arguments.")]
pub struct RdmaArgs {
    /// Where an intermediary listens (the port 7701 need not be named) [default: one of its own, on this host]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: Option<String>,
    /// File with the pool's secret
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// Bytes of a message: whole pages, at most 2M
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', default_value = "4K,64K,1M", value_parser = message)]
    pub size: Vec<Size>,
    /// Messages under way at once; latencies are of one at a time
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: Vec<u16>,
    /// How whoever waits for messages does it: always looking, or woken by the completion channel. perftest's writes always
    /// look
    #[arg(long, value_enum, default_value = "poll")]
    pub wait: Wait,
    /// What one measurement moves, in 32 to 1000 messages; twice as much lies at the intermediary
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = moved)]
    pub bytes: Size,
    /// Rounds, in each of which everything is measured once
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// perftest beside it: where it can run, always (else it is an error), or never
    #[arg(long, value_enum, default_value = "auto")]
    pub perftest: Beside,
    /// What runs a command on the intermediary's host, for perftest's server
    #[arg(long, value_name = "COMMAND")]
    pub peer_shell: Option<String>,
    /// perftest's arguments for the device there [default: those of the device here]
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    pub peer_device: Option<String>,
    /// Where perftest's server waits
    #[arg(long, value_name = "PORT", default_value_t = 18515)]
    pub perftest_port: u16,
    /// Where the figures go, - for standard output (the table then goes to standard error)
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Over which device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

fn message(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    let whole = size.0.is_multiple_of(PAGE_BYTES_U64) && (1..=MESSAGE_BYTES_MAX).contains(&size.0);
    if whole { Ok(size) } else { Err("not whole pages of 4K, at most 2M".into()) }
}

fn moved(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    if ((8 << 20)..=(1 << 30)).contains(&size.0) { Ok(size) } else { Err("not from 8M to 1G".into()) }
}

/// How one waits for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Looks again at once
    Poll,
    /// Sleeps until the kernel says that there is something
    Events,
}

/// Whether perftest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Beside {
    /// Where it can
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

/// Which way messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    Write,
    Read,
}

/// What is measured of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Figure {
    /// Bytes a second.
    Bandwidth,
    /// Microseconds, in the median.
    Latency,
}

/// One line of the table. Its values are bytes a second, or microseconds, by round.
#[derive(Debug, Serialize)]
struct Line {
    what: What,
    figure: Figure,
    bytes: u64,
    depth: u16,
    messages: usize,
    /// Through a link.
    values: Vec<f64>,
    median: Option<f64>,
    perftest: Vec<f64>,
    perftest_median: Option<f64>,
    /// The median of those of each round.
    over_perftest: Option<f64>,
}

/// Measures, and tells.
pub fn run(args: &RdmaArgs) -> Result<u8> {
    let table = Table::beside(args.json.as_deref());
    let device = kernel::open(&args.device.choice(None)).map_err(chained)?;
    let secret = match &args.secret {
        Some(file) => PoolSecret::from_file(file).map_err(chained)?,
        None => PoolSecret::open(),
    };
    let (own, address) = match &args.to {
        Some(host) => (None, resolve(host)?),
        None => {
            let server = serve(args, &device, &secret)?;
            let address = server.address();
            (Some(server), address)
        }
    };
    let perftest = perftest(args, address.ip(), own.is_some())?;
    let (perftest, why) = match perftest {
        Ok(perftest) => (Some(perftest), None),
        Err(why) => (None, Some(why)),
    };
    if let Some(why) = why {
        table.say(&format!("without perftest: {why}"));
    }
    let connector = RdmaConnector::new(secret, Arc::clone(&device)).strict();
    let mut trial = Trial::begin(connector, address, usize::try_from(args.bytes.0)?, args.wait)?;
    let mut lines = planned(args);
    let measured = rounds(args, &mut trial, perftest.as_ref(), &mut lines);
    let ended = trial.end();
    measured.and(ended)?;
    lines.iter_mut().for_each(Line::conclude);
    table.say(&format!(
        "{:6} {:9} {:>5} {:>5} {:>16} {:>16} {:>7}",
        "what", "figure", "size", "depth", "link", "perftest", "ratio"
    ));
    lines.iter().for_each(|line| table.say(&line.text()));
    let told = json!({
        "schema": 1, "device": device.name(), "to": address.to_string(), "wait": args.wait, "rounds": args.repeat,
        "without_perftest": why, "lines": lines,
    });
    table.write(&told)?;
    Ok(0)
}

/// An intermediary in this process, at the same device.
fn serve(args: &RdmaArgs, device: &Arc<dyn Device>, secret: &PoolSecret) -> Result<ServerHandle> {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    // What is there to be read, what is written, and what was dropped and is not free yet.
    let mut config = Config::new(listen, "sg-bench", args.bytes.0 * 4 + (64 << 20), secret.clone());
    config.backend = Some(Arc::new(RdmaBackend::new(Arc::clone(device))));
    Server::bind(config).and_then(Server::spawn).map_err(chained)
}

fn resolve(host: &str) -> Result<SocketAddr> {
    let found = host.to_socket_addrs().or_else(|_| (host, INTERMEDIARY_PORT).to_socket_addrs());
    let mut found = found.with_context(|| format!("{host:?} is no HOST[:PORT]"))?;
    found.next().with_context(|| format!("{host} has no address"))
}

/// How perftest is called; or why it is not.
fn perftest(args: &RdmaArgs, host: IpAddr, is_own: bool) -> Result<Result<Perftest, &'static str>> {
    let why = match args.perftest {
        Beside::Off => Some("it was not asked for"),
        _ if !perftest::is_here() => Some("it is not installed here (apt install perftest)"),
        _ if !is_own && args.peer_shell.is_none() => {
            Some("nobody starts it at the other host (--peer-shell 'ssh HOST')")
        }
        _ => None,
    };
    if let Some(why) = why {
        ensure!(args.perftest != Beside::On, "perftest cannot run: {why}");
        return Ok(Err(why));
    }
    let (port, gid) = kernel::picked(&args.device.choice(None)).map_err(chained)?;
    let device = vec![format!("-d{}", port.device), format!("-i{}", port.number), format!("-x{}", gid.index)];
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    Ok(Ok(Perftest {
        host,
        port: args.perftest_port,
        shell: args.peer_shell.as_deref().map(words).unwrap_or_default(),
        peer_device: args.peer_device.as_deref().map_or_else(|| device.clone(), words),
        device,
    }))
}

/// Everything that is to be measured, in its order.
fn planned(args: &RdmaArgs) -> Vec<Line> {
    let mut lines = Vec::new();
    for what in [What::Write, What::Read] {
        for size in &args.size {
            let bandwidths = args.depth.iter().map(|depth| (Figure::Bandwidth, *depth));
            for (figure, depth) in bandwidths.chain([(Figure::Latency, 1)]) {
                let messages = (args.bytes.0 / size.0) as usize;
                let messages = messages.clamp(MESSAGES_MIN, MESSAGES_MAX).max(usize::from(depth));
                let (bytes, values, perftest) = (size.0, Vec::new(), Vec::new());
                let (median, perftest_median, over_perftest) = (None, None, None);
                lines.push(Line {
                    what,
                    figure,
                    bytes,
                    depth,
                    messages,
                    values,
                    median,
                    perftest,
                    perftest_median,
                    over_perftest,
                });
            }
        }
    }
    lines
}

/// Round by round, all of them in turn: what drifts meets all alike.
fn rounds(args: &RdmaArgs, trial: &mut Trial, perftest: Option<&Perftest>, lines: &mut [Line]) -> Result<()> {
    for round in 1..=args.repeat {
        eprintln!("round {round} of {}", args.repeat);
        for line in &mut *lines {
            let messages =
                Messages { bytes: line.bytes as usize, depth: line.depth.into(), count: line.messages };
            line.values.push(line.measure(trial, messages)?);
            if let Some(perftest) = perftest {
                line.perftest.push(perftest.run((line.what, line.figure), messages, args.wait)?);
            }
        }
    }
    Ok(())
}

impl Line {
    fn measure(&self, trial: &mut Trial, messages: Messages) -> Result<f64> {
        let took = match (self.what, self.figure) {
            (What::Write, _) => trial.written(messages)?,
            (What::Read, Figure::Bandwidth) => trial.read(messages, Class::Bulk)?,
            // As a guest waits for it.
            (What::Read, Figure::Latency) => trial.read(messages, Class::Urgent)?,
        };
        let each: Vec<f64> = took.each.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        match self.figure {
            Figure::Bandwidth => {
                Ok((messages.bytes * messages.count) as f64 / took.all.as_secs_f64().max(1e-9))
            }
            Figure::Latency => stats::median(&each).context("no message"),
        }
    }

    fn conclude(&mut self) {
        let ratios: Vec<f64> =
            self.values.iter().zip(&self.perftest).map(|(ours, theirs)| ours / theirs).collect();
        self.median = stats::median(&self.values);
        self.perftest_median = stats::median(&self.perftest);
        self.over_perftest = stats::median(&ratios);
    }

    fn text(&self) -> String {
        let shown = |value: Option<f64>| match (value, self.figure) {
            (None, _) => "-".to_owned(),
            (Some(value), Figure::Bandwidth) => format!("{:.1} MB/s", value / 1e6),
            (Some(value), Figure::Latency) => format!("{value:.1} us"),
        };
        let (what, figure) = match (self.what, self.figure) {
            (What::Write, Figure::Bandwidth) => ("write", "bandwidth"),
            (What::Read, Figure::Bandwidth) => ("read", "bandwidth"),
            (What::Write, Figure::Latency) => ("write", "latency"),
            (What::Read, Figure::Latency) => ("read", "latency"),
        };
        let ratio = self.over_perftest.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        format!(
            "{what:6} {figure:9} {:>5} {:>5} {:>16} {:>16} {ratio:>7}",
            Size(self.bytes).to_string(),
            self.depth,
            shown(self.median),
            shown(self.perftest_median),
        )
    }
}

#[cfg(test)]
mod test {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RdmaArgs,
    }

    fn parse(words: &[&str]) -> Result<RdmaArgs, clap::Error> {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.args)
    }

    #[test]
    fn everything_is_planned_once() {
        let lines = planned(&parse(&[]).expect("good"));
        assert_eq!(lines.len(), 2 * 3 * 4);
        let large = lines.iter().find(|line| line.bytes == 1 << 20 && line.depth == 16).expect("planned");
        assert_eq!(large.messages, MESSAGES_MIN);
        let small = lines.iter().find(|line| line.bytes == 4096).expect("planned");
        assert_eq!(small.messages, MESSAGES_MAX);
        let one = planned(&parse(&["--size", "64K", "--depth", "8", "--bytes", "8M"]).expect("good"));
        let told: Vec<_> =
            one.iter().map(|line| (line.what, line.figure, line.depth, line.messages)).collect();
        let of = |what| [(what, Figure::Bandwidth, 8, 128), (what, Figure::Latency, 1, 128)];
        assert_eq!(told, [of(What::Write), of(What::Read)].concat());
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for wrong in
            [["--size", "4097"], ["--size", "4M"], ["--depth", "0"], ["--bytes", "1M"], ["--wait", "sleep"]]
        {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ratios_are_of_one_round() {
        let mut line = planned(&parse(&[]).expect("good")).remove(0);
        line.values = vec![1e6, 4e6, 9e6];
        line.perftest = vec![2e6, 4e6, 6e6];
        line.conclude();
        assert_eq!((line.median, line.over_perftest), (Some(4e6), Some(1.0)));
        assert!(line.text().contains("4.0 MB/s") && line.text().ends_with("1.000"), "{}", line.text());
        line.perftest.clear();
        line.conclude();
        assert!(line.text().ends_with('-') && line.over_perftest.is_none(), "{}", line.text());
    }
}
