//! The command line.

mod stock;
mod values;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::events::{Harm, Injection, When};
use crate::lab::node::{INTERMEDIARIES_MAX, SOURCES_MAX};
use crate::lab::{CongestionControl, LabSpec, Node, Queue};
use libsg::units::{Rate, Size};
pub use stock::{StockArgs, StockMode};
use values::{count, fraction, issue, neighbour_memory, on_off};

/// Migration experiments in network namespaces, acceptance rows and micro-benchmarks
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// One experiment: a VM, or several, from a source to a destination
    Migrate(Box<MigrateArgs>),
    /// A Linux guest of a stock QEMU, by sg evict or by QEMU's own migration
    Qemu(StockArgs),
    /// The same busy VM to a slow destination, by post-copy and by scatter-gather, side by side
    Demo(DemoArgs),
    /// The rows of the acceptance table: `row want got pass|FAIL`, medians of interleaved runs
    Accept(AcceptArgs),
    /// The figures and the table of the scatter-gather paper, measured here and drawn beside the paper's
    Paper(PaperArgs),
    /// What the pieces of the page path cost on this machine
    Micro,
    /// What pages take over an RDMA device, through a link, beside what perftest says of the device
    Rdma(Box<crate::rdma::RdmaArgs>),
    /// The rows of what guests have measured of RDMA (ci/rxe accept)
    #[command(hide = true)]
    RdmaRows(crate::rdma::rows::RowsArgs),
    /// Simulates how thousands of hosts are chosen from by many migrations at once: balance, time a decision
    Select(SelectArgs),
    /// Builds the hosts and measures their links, without any VM
    Link(LabArgs),
    /// What runs beside a migration starts by itself
    #[command(subcommand, hide = true)]
    Beside(Beside),
}

/// Processes that an experiment runs beside the migration.
#[derive(Subcommand)]
pub enum Beside {
    /// Answers requests
    Service {
        /// Where
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Sends requests at a fixed rate, and prints how long each took
    Client {
        /// To whom
        #[arg(long)]
        to: SocketAddr,
        /// Requests a second
        #[arg(long)]
        rate: u32,
    },
    /// Ranks a graph again and again, and prints how long each pass took
    Neighbour {
        /// Of what size
        #[arg(long)]
        memory: Size,
        /// What the graph comes from
        #[arg(long)]
        seed: u64,
        /// The `cgroup.procs` to enter before any memory is taken
        #[arg(long)]
        procs: Option<PathBuf>,
    },
}

/// The hosts and their links.
#[derive(Args, Clone, Debug)]
pub struct LabArgs {
    /// How many intermediaries
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(..=i64::from(INTERMEDIARIES_MAX)))]
    pub intermediaries: u8,
    /// Rate of every link; 0 = unlimited
    #[arg(long, value_name = "RATE", default_value = "1gbit")]
    pub link_rate: Rate,
    /// Rate of the intermediaries' links [default: the link rate]
    #[arg(long, value_name = "RATE")]
    pub intermediary_rate: Option<Rate>,
    /// Rate of the destination's link [default: the link rate]
    #[arg(long, value_name = "RATE")]
    pub destination_rate: Option<Rate>,
    /// How many hosts VMs start on, each with a link of its own: the first VM on the first, and so on in turn
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(SOURCES_MAX)))]
    pub source_hosts: u8,
    /// Congestion control
    #[arg(long, default_value = "cubic")]
    pub cc: CongestionControl,
    /// What stands in front of each link
    #[arg(long, default_value = "prio")]
    pub queue: Queue,
    /// off = no namespaces and no limits: everything on loopback
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = on_off, action = ArgAction::Set)]
    pub shape: bool,
}

impl LabArgs {
    /// The lab to build.
    pub fn spec(&self, destination_memory: Option<(Size, Size)>) -> LabSpec {
        LabSpec {
            intermediaries: self.intermediaries,
            link_rate: self.link_rate,
            destination_rate: self.destination_rate.unwrap_or(self.link_rate),
            intermediary_rate: self.intermediary_rate.unwrap_or(self.link_rate),
            queue: self.queue,
            cc: self.cc,
            shape: self.shape,
            sources: self.source_hosts,
            client: false,
            destination_memory,
        }
    }
}

/// The demo.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value_t = crate::demo::MEMORY)]
    pub memory: Size,
    /// How many intermediaries
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(INTERMEDIARIES_MAX)))]
    pub intermediaries: u8,
}

/// Choosing intermediaries, simulated.
///
/// All migrations decide over the same announcements: none sees what another took. Prints what it comes to with the
/// usual number of choices, and beside it with one (drawn blindly) and with 64 (nearly the best: a herd).
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  sg-bench select
  sg-bench select --nodes 500 --migrations 200 --seed 7 --json")]
pub struct SelectArgs {
    /// Hosts of the pool
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = count)]
    pub nodes: usize,
    /// VMs that leave, ten from each host that is evacuated
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = count)]
    pub migrations: usize,
    /// Of how many nodes drawn the least loaded is taken [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub choices: Option<u8>,
    /// What loads, hosts and draws come from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The acceptance table.
#[derive(Args, Clone, Debug)]
pub struct AcceptArgs {
    /// Only this row (repeatable)
    #[arg(long, value_name = "NAME")]
    pub row: Vec<String>,
    /// Only the rows of this issue [default: 2, 3 and 4; those of 6, about stock QEMUs, when they are named]
    #[arg(long, value_name = "2|3|4|6", value_parser = issue)]
    pub issue: Option<u8>,
    /// Only says which rows there are, and about how long each takes
    #[arg(long)]
    pub list: bool,
    /// Runs of each experiment
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Where rows, invalid runs and the reports of all runs go, - for standard output (the table then goes to
    /// standard error)
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

/// The paper's figures.
///
/// "Scatter-Gather Live Migration of Virtual Machines" (Deshpande, Chan, Chan, Gopalan, Bila; IEEE Transactions on
/// Cloud Computing 6(1)), its experiments with smaller VMs.
///
/// Takes hours: 8 to 12 for everything with six runs of each experiment, up to 2 with one (--list says how
/// long each figure takes). Runs go round and round, so that after the first round every figure has a point
/// everywhere. Each finished run is on disk: after ^C, or to have more runs, the same command again goes on.
///
/// DIR then holds paper.html (one page with everything, to be shown to anybody), paper.json, each figure as SVG and
/// PNG, and in runs/ the whole report of every run.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  sg-bench paper --list
  sg-bench paper --out results --repeat 1            # a first look
  sg-bench paper --out results                       # goes on to six runs
  sg-bench paper --out results --only fig9,table1
  sg-bench paper --out elsewhere -- --cc bbr         # everything with another congestion control")]
pub struct PaperArgs {
    /// Where everything goes, and what is there already is gone on with
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub out: Option<PathBuf>,
    /// Only these: fig9,table1
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Memory of a VM that has 5 GB in the paper; everything else that is memory shrinks with it
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub scale: Size,
    /// Runs of each experiment
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeat: u32,
    /// Only says which figures there are, and how long they take
    #[arg(long)]
    pub list: bool,
    /// Arguments of `sg-bench migrate` that every run gets besides its own
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub besides: Vec<String>,
}

/// One experiment.
#[derive(Args, Clone, Debug)]
pub struct MigrateArgs {
    /// The hosts and their links
    #[command(flatten)]
    pub lab: LabArgs,
    /// The VM
    #[command(flatten)]
    pub vm: VmArgs,
    /// How the memory leaves the source
    #[arg(long, default_value = "scatter-gather")]
    pub mode: Mode,
    /// pre-copy, hybrid: most rounds while the VM runs, the first one included [default: 30, 1]
    #[arg(long, value_name = "N")]
    pub rounds: Option<u16>,
    /// pre-copy: where the rounds go
    #[arg(long, default_value = "direct")]
    pub via: Via,
    /// pre-copy, hybrid: the VM is paused once what it has written can be sent in so many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub downtime_limit: u64,
    /// Intermediaries that hold each page that goes to any: all of them but one may die
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub replicas: u8,
    /// on = pages that intermediaries hold already are not sent there again (those sent direct are)
    #[arg(long, value_name = "on|off", default_value = "off", action = clap::ArgAction::Set, value_parser = on_off)]
    pub dedup: bool,
    /// How pages reach intermediaries. rdma is over this host's device, for all of them, and so without links of their own
    /// (--shape off): a device is in one namespace only, and soft-RoCE's packets pass in the host's alone (Linux 6.1).
    /// Between hosts, emulated: ci/rxe; what a device does: sg-bench rdma
    #[arg(long, value_enum, default_value = "tcp")]
    pub transport: Transport,
    /// No destination until every VM has evicted: they are parked at the intermediaries, and then each is claimed by a
    /// process that gathers it (scatter-gather, hybrid)
    #[arg(long)]
    pub park: bool,
    /// Limits what enters the destination in the background, the direct path included; 0 = unlimited
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub gather_limit: Rate,
    /// Memory of the destination (a cgroup); the rest goes to a swap file
    #[arg(long, value_name = "SIZE")]
    pub destination_memory: Option<Size>,
    /// Memory-hungry neighbours of the destination, under its memory limit: each ranks a graph again and again
    #[arg(long, value_name = "N", default_value_t = 0, requires = "destination_memory", value_parser = clap::value_parser!(u8).range(..=8))]
    pub neighbours: u8,
    /// Memory of each neighbour
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = neighbour_memory)]
    pub neighbour_memory: Size,
    /// A service that shares these hosts, and a client of it on a further host, measured before and during the
    /// migration [default where none is named: destination,i1]
    #[arg(long, value_name = "NODE,…", num_args = 0..=1, value_delimiter = ',')]
    pub cotenant: Option<Vec<Node>>,
    /// Requests a second to each co-tenant, each answered with 4 KiB
    #[arg(long, value_name = "N", default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub cotenant_rate: u32,
    /// So many equal VMs at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub vms: u8,
    /// SIGKILL a node's processes at an event, or some time after it (repeatable)
    #[arg(long, value_name = "NODE@EVENT[+MS]")]
    pub kill: Vec<When>,
    /// SIGSTOP a node's processes (repeatable)
    #[arg(long, value_name = "NODE@EVENT[+MS]")]
    pub stop: Vec<When>,
    /// SIGCONT a node's processes, which were stopped (repeatable)
    #[arg(long = "continue", value_name = "NODE@EVENT[+MS]")]
    pub continued: Vec<When>,
    /// Take a node's link down (repeatable)
    #[arg(long, value_name = "NODE@EVENT[+MS]")]
    pub cut: Vec<When>,
    /// Take a node's link up again (repeatable)
    #[arg(long, value_name = "NODE@EVENT[+MS]")]
    pub mend: Vec<When>,
    /// When the run is over
    #[arg(long, default_value = "gathered")]
    pub until: Until,
    /// Once everything has evicted, lift every limit and link rate, so that the rest is gathered, and verified, at
    /// once: for experiments about eviction alone
    #[arg(long)]
    pub lift_at_evicted: bool,
    /// on = where this machine is a VM whose host takes free memory back, have what the run needs ready before it
    /// starts
    #[arg(long, value_name = "on|off", default_value = "on", action = clap::ArgAction::Set, value_parser = on_off)]
    pub ready_memory: bool,
    /// Do it so many times; the report then has `runs`, `median`, `min` and `max`
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// Where the report goes, - for standard output
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Where events go, a line of JSON each, flushed before they are acted on
    #[arg(long, value_name = "PATH")]
    pub events: Option<PathBuf>,
}

/// A migration's arguments without a command.
#[derive(Parser)]
#[command(args_override_self = true)]
struct Bare {
    #[command(flatten)]
    args: MigrateArgs,
}

/// The VM.
#[derive(Args, Clone, Debug)]
pub struct VmArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub memory: Size,
    /// What the guest does
    #[arg(long, default_value = "random", value_parser = ["idle", "sequential", "random", "reader"])]
    pub workload: String,
    /// Memory that the guest works on [default: all]
    #[arg(long, value_name = "SIZE")]
    pub working_set: Option<Size>,
    /// Guest operations a second; 0 = as many as it can
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 10_000)]
    pub write_rate: u64,
    /// Fraction of pages that are zero at the start
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = fraction)]
    pub zero_fraction: f64,
    /// Fraction of pages whose content every VM has alike
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = fraction)]
    pub common: f64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u16,
    /// How vCPUs are run; auto = kvm where it can be used
    #[arg(long, default_value = "auto", value_parser = ["kvm", "thread", "auto"])]
    pub vcpu: String,
    /// What guest memory is made of
    #[arg(long, default_value = "anon", value_parser = ["anon", "memfd", "hugetlb"])]
    pub backing: String,
    /// What the guest's content and choices come from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// How the memory leaves the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// To the destination as fast as it takes it, the rest to intermediaries
    ScatterGather,
    /// To the destination only
    PostCopy,
    /// In rounds while the VM runs, which is paused when little is left
    PreCopy,
    /// In rounds to intermediaries while the VM runs, then as scatter-gather what it has written meanwhile
    Hybrid,
}

/// How pages travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// By TCP
    Tcp,
    /// To and from intermediaries by RDMA, the rest by TCP
    Rdma,
}

impl Transport {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the rounds of pre-copy go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Via {
    /// To the destination
    Direct,
    /// To the destination as fast as it takes them, the rest to intermediaries, from which it gathers meanwhile
    Vmd,
}

impl Via {
    /// The name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Vmd => "vmd",
        }
    }
}

impl Mode {
    /// The name in reports and requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::ScatterGather => "scatter-gather",
            Self::PostCopy => "post-copy",
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
        }
    }
}

/// When a run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// The source holds nothing that anyone needs
    Evicted,
    /// The destination holds every page, and the guest has verified them all
    Gathered,
}

impl MigrateArgs {
    /// The defaults, as on an empty command line.
    pub fn new() -> Self {
        Bare::parse_from(["sg-bench"]).args
    }

    /// From the words behind `sg-bench migrate`; of two that contradict each other the later one counts.
    ///
    /// # Errors
    /// A word that is no argument of this build.
    pub fn from_words<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self, clap::Error> {
        Ok(Bare::try_parse_from(std::iter::once("sg-bench").chain(words))?.args)
    }

    /// Whether pages can travel so between such hosts, as far as arguments say.
    ///
    /// # Errors
    /// Why not, and what to do instead.
    pub fn check_transport(&self) -> Result<(), &'static str> {
        let can = self.transport == Transport::Tcp || !self.lab.shape;
        can.then_some(()).ok_or(
            "--transport rdma needs --shape off: an RDMA device is in one network namespace only, and hosts are namespaces \
             where their links are shaped (between emulated hosts: ci/rxe)",
        )
    }

    /// The lab to build.
    pub fn lab_spec(&self) -> LabSpec {
        // Everything that does not fit must fit into swap, with room for the processes themselves.
        let neighbours = (self.neighbour_memory.0 + (16 << 20)) * u64::from(self.neighbours);
        let swap = Size(self.vm.memory.0 * u64::from(self.vms) + neighbours + (256 << 20));
        let spec = self.lab.spec(self.destination_memory.map(|limit| (limit, swap)));
        LabSpec { client: self.cotenant.is_some(), ..spec }
    }

    /// Which hosts have a co-tenant.
    pub fn cotenants(&self) -> Vec<Node> {
        match self.cotenant.as_deref() {
            None => Vec::new(),
            Some([]) if self.lab.intermediaries > 0 => vec![Node::Destination, Node::Intermediary(1)],
            Some([]) => vec![Node::Destination],
            Some(nodes) => nodes.to_vec(),
        }
    }

    /// What sources, destinations and intermediaries will take between them, if it is to be ready: all of the memory
    /// each, and some for what is sent twice and for packets.
    pub fn memory_needed(&self) -> Size {
        let memory = self.vm.memory.0 * u64::from(self.vms);
        let each = if self.has_intermediaries() { 3 } else { 2 };
        Size(if self.ready_memory { memory * each + memory / 4 } else { 0 })
    }

    /// Whether any page goes to an intermediary.
    pub fn has_intermediaries(&self) -> bool {
        match self.mode {
            Mode::ScatterGather | Mode::Hybrid => true,
            Mode::PostCopy => false,
            Mode::PreCopy => self.via == Via::Vmd,
        }
    }

    /// What to do to whom when.
    pub fn injections(&self) -> Vec<Injection> {
        let each = |harm, whens: &[When]| -> Vec<Injection> {
            whens.iter().map(|when| Injection { harm, when: when.clone() }).collect()
        };
        [
            each(Harm::Kill, &self.kill),
            each(Harm::Stop, &self.stop),
            each(Harm::Continue, &self.continued),
            each(Harm::Cut, &self.cut),
            each(Harm::Mend, &self.mend),
        ]
        .concat()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_values_are_refused_before_anything_is_built() {
        for wrong in [
            "--workload=x",
            "--zero-fraction=2",
            "--vms=0",
            "--repeat=0",
            "--kill=i1",
            "--memory=1X",
            "--cotenant=client",
            "--neighbours=2",
            "--neighbour-memory=1K",
        ] {
            assert!(Cli::try_parse_from(["sg-bench", "migrate", wrong]).is_err(), "{wrong}");
        }
        let of =
            |words: &str| MigrateArgs::from_words(words.split_whitespace()).expect("taken").check_transport();
        assert!(of("--transport rdma").is_err_and(|why| why.contains("--shape off")));
        assert_eq!((of("--transport rdma --shape off"), of("")), (Ok(()), Ok(())));
        let plain = MigrateArgs::from_words(["--transport", "tcp"].into_iter()).expect("taken");
        assert_eq!(plain.transport, MigrateArgs::new().transport);
        let plain = MigrateArgs::new();
        assert_eq!((plain.vm.memory, plain.lab.intermediaries, plain.vms), (Size(1 << 30), 2, 1));
        assert!(plain.injections().is_empty());
    }

    #[test]
    fn cotenants_are_where_they_are_wanted() {
        let of = |line: &str| {
            let words = ["sg-bench", "migrate"].into_iter().chain(line.split_whitespace());
            let Ok(Cli { command: Command::Migrate(args) }) = Cli::try_parse_from(words) else {
                panic!("{line}")
            };
            (args.cotenants(), args.lab_spec().client)
        };
        assert_eq!(of(""), (vec![], false));
        assert_eq!(of("--cotenant --vms 2"), (vec![Node::Destination, Node::Intermediary(1)], true));
        assert_eq!(of("--cotenant --intermediaries 0"), (vec![Node::Destination], true));
        assert_eq!(of("--cotenant i2,source"), (vec![Node::Intermediary(2), Node::Source], true));
    }

    #[test]
    fn rates_default_to_the_link_rate() {
        let cli = Cli::try_parse_from(["sg-bench", "link", "--link-rate", "2gbit", "--shape", "off"])
            .expect("parses");
        let Command::Link(args) = cli.command else { panic!("another command") };
        let spec = args.spec(None);
        assert_eq!((spec.destination_rate, spec.shape), (Rate::mbit(2000), false));
    }
}
