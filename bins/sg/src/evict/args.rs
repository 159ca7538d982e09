//! What `sg evict`, `sg gather`, `sg cancel` and `sg limit` are told.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use libsg::limits::NAME_BYTES_MAX;
use libsg::units::{Rate, Size};
use pools::Meeting;
use transports::TransportArgs;

use super::sockets::Sockets;
use crate::cli::{Intermediaries, PORT as INTERMEDIARY_PORT, WrongArguments, resolve_at};

/// Where no engine says who may have a parked VM.
const KEEPER: &str = "keeper";

/// The port of a destination.
const PORT: u16 = 7700;

/// How the memory leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// VMs to their destinations at once, memory there and to intermediaries
    ScatterGather,
    /// First a round to intermediaries while they run
    Hybrid,
    /// VMs and memory to their destinations only
    PostCopy,
    /// Rounds while they run, until little is left
    PreCopy,
}

impl From<Mode> for libsg::migrate::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::ScatterGather => Self::ScatterGather,
            Mode::Hybrid => Self::Hybrid,
            Mode::PostCopy => Self::PostCopy,
            Mode::PreCopy => Self::PreCopy,
        }
    }
}

/// Arguments of `sg evict`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg evict --all --to 10.0.0.2:7700 --to 10.0.0.2:7710 --pool multicast:239.83.71.1 --secret pool.secret
  sg evict /run/libsg/web.sock --to 10.0.0.2 --intermediary 10.0.0.3 --secret pool.secret
  sg evict --all --park --pool static:/etc/sg/pool --secret pool.secret        place them later: sg gather --claim
  sg evict --all --park --pool multicast:239.83.71.1 --secret pool.secret --deadline 120s --explain --dry-run
  sg evict --all /run/vms --to 10.0.0.2 --weight db=3
  sg evict --all --to 10.0.0.2 --intermediary 10.0.0.3 --spare 10.0.0.4 --spare 10.0.0.5       in the place of one that dies
  sg evict --all --park --pool static:/etc/sg/pool --dedup tenant7 --dedup db=tenant8     what is alike is sent once
  sg evict --qmp src.qmp --to 10.0.0.2 --intermediary 10.0.0.3 --secret pool.secret --quit    a stock QEMU's VM
  sg evict --qmp src.qmp --to 10.0.0.2 --intermediary 10.0.0.3 --secret pool.secret --mode hybrid --quit
  sg evict --qmp src.qmp --park web --intermediary 10.0.0.3 --secret pool.secret --quit
  sg evict --qmp src.qmp --resume --quit                       the sg evict before died: goes on where that was
  sg evict --all /run/qemu --to 10.0.0.2:7700 --to 10.0.0.2:7710 --intermediary 10.0.0.3 --secret pool.secret --quit    all QEMUs of a host
  sg evict --qmp web.qmp --qmp db.qmp --park rack7 --pool static:/etc/sg/pool --secret pool.secret --deadline 120s --weight db=3

The VMs of one `sg evict` share the host's link: by what each has left, so that all are out together, or by --weight. Pages
that guests wait for go before the bulk of all of them. When `sg evict` itself dies, VMs that have begun go on, and each looks for
its rate alone; another `sg evict` with the same sockets takes them over.

Of the sockets in a directory (--all) those are QEMUs' where QMP greets; the others are asked as VMMs are. One that says nothing is
told after a second: a QEMU serves one QMP client at a time, and where libvirt has that it needs a second -qmp. A QEMU that waits for a
VM, or has given its own away, is left out, and so is one with a VM that cannot leave (a device, a capability, a disk of this host):
why is said, nothing of it is changed, and the others leave. A VM's name is that of -name, or of its socket.

A VM of a stock QEMU leaves through this process: all that is said here holds for it, but that there is no pre-copy of it, that one that
is parked is sent once, by scatter-gather where others go by hybrid, and that it does not go on by itself when this process dies. Each
--to takes one, where a `sg gather --qmp` waits. When it dies behind COMMIT, QEMU waits, with all that is not safe. What another
needs to go on is in a small file, QMP_SOCKET.evict.json or --state-file, from the beginning until the VM is out, or stays.
`sg evict --qmp … --resume`, of one QEMU at a time, reads it, asks intermediaries and destination what they have, and scatters the
rest. Where nobody was told of COMMIT, it has the VM run on here; but one that was being parked, and whose state was stored, it goes on to
park: until that is done nobody can claim it, and where it cannot be done, or on ^C, it runs on here. One that was parked already, and
claimed perhaps, never runs here again: that is said, and QEMU is through. It does nothing, and says why, when another process is at
it, and when nothing is to be resumed. The destination waits --source-grace for it.

^C (or SIGTERM) calls off what is not committed: those VMs run on here. Those that are committed go on to be evicted, and are
followed; a second ^C ends this process at once and leaves them alone, those of QEMUs for --resume, committed or not.

With --json: schema, status, host (eviction_s from the first start to the last evicted, bytes), plan (mode, why, eviction_s, deadline_s,
fits, link_bytes_per_s), and vms[]: each VM's report, with vm (its name), socket, to, parked_as, fits, intermediary_addresses,
spare_addresses, domain (of --dedup), and of a QEMU resumed: how often its stream was resumed, to have pages again that were lost;
left_out[]: socket, why. Events of QEMUs are lines of JSON on standard output, before the report where that goes there, with vm and
socket. Of one --qmp alone the report is that VM's, with plan in it, and events do not say whose they are. Logs, on standard error, are
filtered by RUST_LOG (warn).

Exit codes: 0 all are out; 1 some are not, and are where they were, or recoverable; 2 wrong arguments; 3 something was lost; 4 cancelled
by somebody else; 130 interrupted.")]
pub struct EvictArgs {
    /// Which VMMs.
    #[command(flatten)]
    pub vmms: Sockets,
    /// Where a destination waits for a VM (sg-vmm run --incoming, sg gather --qmp); several take VMs in turn, by --qmp, by what is
    /// named, and by the names of sockets. The port 7700 need not be
    /// named. One that has a VM already refuses another, which then stays here
    #[arg(long, value_name = "HOST:PORT")]
    pub to: Vec<String>,
    /// No destination yet: each VM is parked at the intermediaries under its name, with PREFIX before it where one is named
    /// (a VM alone then has that name itself). Two of one name are told apart by their sockets'
    #[arg(long, value_name = "PREFIX", num_args = 0..=1, default_missing_value = "", conflicts_with = "to")]
    pub park: Option<String>,
    /// With --park: the etcd that says who may have the VMs, etcd://HOST/PREFIX, which goes on when intermediaries are lost; or
    /// "keeper": an intermediary does [default: the etcd of --pool, else a keeper]
    #[arg(long, value_name = "ETCD", requires = "park", value_parser = arbiter)]
    pub arbiter: Option<String>,
    /// How the memory leaves [default: by the deadline; scatter-gather without one, post-copy without intermediaries]. Of a
    /// QEMU hybrid is one round of all but QEMU's last pages, and there is no pre-copy
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// An intermediary that takes the place of one that dies on the way, in this order (repeatable). Of a pool, where
    /// hosts announce themselves, those that are not chosen at the start are such already. With --replicas above 1 nobody is
    /// replaced: those that are left take what it had
    #[arg(long, value_name = "HOST:PORT")]
    pub spare: Vec<String>,
    /// Pages that intermediaries hold already for VMs of the same domain are not sent there again: DOMAIN for all VMs, or
    /// VM=DOMAIN for one (repeatable). A guest may learn by timing what others of its domain hold: give tenants domains of
    /// their own
    #[arg(long, value_name = "[VM=]DOMAIN", value_parser = domain)]
    pub dedup: Vec<(Option<String>, String)>,
    /// How many intermediaries hold each page
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub replicas: u8,
    /// VM by name, and how much of the link it gets beside the others, which have 1 (repeatable). Without any, VMs share
    /// by what they have left
    #[arg(long, value_name = "VM=N", value_parser = weight)]
    pub weight: Vec<(String, f64)>,
    /// When the host is gone (120s, 2m): says at once whether all are out by then, and which are not; picks the mode; and
    /// lets those that will be leave first
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub deadline: Option<Duration>,
    /// With --deadline: do nothing unless all are out in time (exit code 1)
    #[arg(long, requires = "deadline")]
    pub strict: bool,
    /// Most that each VM may send in bulk, from the start on; `sg limit` changes it for VMMs
    #[arg(long, value_name = "RATE")]
    pub scatter: Option<Rate>,
    /// What the host's link carries [default: what its interface says, else 1gbit]
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// The zone this host is in
    #[arg(long, value_name = "Z")]
    pub zone: Option<String>,
    /// The whole zone is emptied: nothing goes to its nodes
    #[arg(long)]
    pub evacuate: bool,
    /// Also say why each node is taken or left, and why this mode
    #[arg(long)]
    pub explain: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Write the report as JSON; - = standard output
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// The VM of a stock QEMU (7.2 or newer), by its QMP socket (repeatable): to a --to where `sg gather --qmp` waits, or to be parked.
    /// --all finds them, too
    #[arg(long, value_name = "QMP_SOCKET")]
    pub qmp: Vec<PathBuf>,
    /// QEMUs end when they are evicted
    #[arg(long)]
    pub quit: bool,
    /// Writable disks of QEMUs are where the destination finds them too, whatever file system they are on
    #[arg(long)]
    pub shared_disks: bool,
    /// Memory that the VM of a QEMU takes here a second time, at most, while it leaves: pages that are not safe yet
    /// [default: 256M]
    #[arg(long, value_name = "SIZE")]
    pub window: Option<Size>,
    /// With one --qmp: goes on with the VM whose `sg evict` died; QEMU keeps what is not safe, "postcopy-paused". Whither, how, and the
    /// secret are those of before, where no other secret is named
    #[arg(long, requires = "qmp", conflicts_with_all = [
        "sockets", "all", "to", "park", "mode", "spare", "dedup", "weight", "deadline", "zone", "evacuate", "window", "shared_disks",
    ])]
    pub resume: bool,
    /// With one --qmp: where it is written down what --resume needs [default: QMP_SOCKET.evict.json, of each]
    #[arg(long, value_name = "PATH", requires = "qmp", conflicts_with_all = ["sockets", "all"])]
    pub state_file: Option<PathBuf>,
    /// How pages of QEMUs' VMs leave for intermediaries (VMMs have been told at their start).
    #[command(flatten)]
    pub transport: TransportArgs,
    /// Which intermediaries.
    #[command(flatten)]
    pub at: Intermediaries,
}

impl EvictArgs {
    /// The VM of one QEMU alone is meant: what is told is that VM's.
    pub fn only_qemu(&self) -> Option<&Path> {
        let [one] = &self.qmp[..] else { return None };
        (self.vmms.sockets.is_empty() && self.vmms.all.is_none()).then_some(one)
    }

    /// Where it is written down what another process would need.
    pub fn state_file(&self, socket: &Path) -> PathBuf {
        self.state_file.clone().unwrap_or_else(|| evict_file(socket))
    }

    /// What is said of QEMUs is said of some, and what is said of one of one.
    ///
    /// # Errors
    /// [`WrongArguments`].
    pub fn check(&self) -> Result<()> {
        let of_one = [(self.resume, "--resume"), (self.state_file.is_some(), "--state-file")];
        let of_some = [
            (self.quit, "--quit"),
            (self.shared_disks, "--shared-disks"),
            (self.window.is_some(), "--window"),
        ];
        let said = |of: &[(bool, &'static str)]| of.iter().find(|(said, _)| *said).map(|(_, name)| *name);
        let what = match (said(&of_one), said(&of_some)) {
            (Some(name), _) if self.qmp.len() > 1 => {
                format!("{name} is about one QEMU: name one --qmp, and the others by calls of their own")
            }
            (_, Some(name)) if self.qmp.is_empty() && self.vmms.all.is_none() => {
                format!("{name} is about stock QEMUs: name them by --qmp, or --all")
            }
            _ => return Ok(()),
        };
        Err(WrongArguments(what).into())
    }

    /// Where destinations wait.
    pub fn destinations(&self) -> Result<Vec<SocketAddr>> {
        self.to.iter().map(|name| resolve_at(name, PORT)).collect()
    }

    /// The engine that says who may have VMs that are parked.
    pub fn arbiter(&self) -> Option<String> {
        match self.arbiter.as_deref() {
            Some(KEEPER) => None,
            Some(named) => Some(named.to_owned()),
            None => self.at.pool.as_deref().and_then(pools::arbiter_of),
        }
    }

    /// Who takes the place of those that die.
    pub fn spares(&self) -> Result<Vec<SocketAddr>> {
        self.spare.iter().map(|name| resolve_at(name, INTERMEDIARY_PORT)).collect()
    }

    /// The domain in which a VM's pages are shared; its own before that of all.
    pub fn domain_of(&self, vm: &str) -> Option<&str> {
        let of = |whom: Option<&str>| self.dedup.iter().rev().find(|(name, _)| name.as_deref() == whom);
        of(Some(vm)).or_else(|| of(None)).map(|(_, domain)| domain.as_str())
    }

    /// How much a VM matters beside others; nothing where none is preferred to another.
    pub fn weight_of(&self, vm: &str) -> Option<f64> {
        let said = self.weight.iter().rev().find(|(name, _)| name == vm).map(|(_, weight)| *weight);
        (!self.weight.is_empty()).then(|| said.unwrap_or(1.0))
    }
}

/// Arguments of `sg gather`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg gather /run/libsg/there.sock                              follows the VM that arrives there
  sg gather /run/libsg/there.sock --claim web --intermediary 10.0.0.3 --secret pool.secret
  sg gather --qmp dst.qmp --listen 10.0.0.2:7700 --secret pool.secret --gather-limit 256mbit     a stock QEMU takes a VM
  sg gather --qmp dst.qmp --claim web --intermediary 10.0.0.3 --secret pool.secret
  sg gather --qmp dst.qmp --resume                             the sg gather before died: goes on where that was
  sg gather /run/libsg/a.sock /run/libsg/b.sock --claim web --claim db --pool static:/etc/sg/pool --secret pool.secret

Ends when the VMs hold all of their memory. ^C leaves them as they are: they go on.

A VM of a stock QEMU comes through this process: when it dies, or loses QEMU, the VM stops at the next page that is not there, and
waits. What another needs to go on is in a small file, QMP_SOCKET.gather.json or --state-file, from before the VM runs until all of
it is here. `sg gather --qmp … --resume` reads it, asks QEMU which pages it has, and gathers the others: from the intermediaries,
and from the source if that has not evicted, which dials the address of before (--listen, where another). It does nothing, and
says why, when the VM was claimed elsewhere since, when another process feeds it, and when nothing is to be resumed. With QEMU 7.2 do
not end it before it says that it resumed: a break while QEMU says which pages it has is the VM's end.

Logs, on standard error, are filtered by RUST_LOG (warn).
Exit codes: 0 gathered; 1 failed, nothing lost (a claim that was refused, say); 2 wrong arguments; 3 something was lost;
130 interrupted.")]
pub struct GatherArgs {
    /// Which VMMs: that wait for a VM, have one that arrives, or, to claim one, have none (sg-vmm run --empty)
    #[command(flatten)]
    pub vmms: Sockets,
    /// The name of the parked VM that the VMM is to run, one for each VMM in their order
    #[arg(long, value_name = "NAME")]
    pub claim: Vec<String>,
    /// With --claim: whatever stands against it, you know that the VM runs nowhere
    #[arg(long, requires = "claim")]
    pub force: bool,
    /// Most that arrives in the background, of each VM; 0 = unlimited
    #[arg(long, value_name = "RATE", visible_alias = "gather-limit")]
    pub limit: Option<Rate>,
    /// A stock QEMU (7.2 or newer; -incoming defer), by its QMP socket: it takes one VM, from `sg evict --qmp` (--listen) or one
    /// that it has parked (--claim)
    #[arg(long, value_name = "QMP_SOCKET", conflicts_with_all = ["sockets", "all"])]
    pub qmp: Option<PathBuf>,
    /// With --qmp: where the source connects to; port 0 picks a free one, and the line "listening" says which
    #[arg(long, value_name = "ADDR:PORT", requires = "qmp")]
    pub listen: Option<SocketAddr>,
    /// With --qmp: goes on with the VM whose `sg gather` died; QEMU keeps it, "postcopy-paused". Pool, secret and address are those
    /// of before, where no others are named
    #[arg(long, requires = "qmp", conflicts_with = "claim")]
    pub resume: bool,
    /// With --qmp: where it is written down what --resume needs [default: QMP_SOCKET.gather.json]
    #[arg(long, value_name = "PATH", requires = "qmp")]
    pub state_file: Option<PathBuf>,
    /// With --qmp: how long a source that cannot be reached may come again (`sg evict --resume`), before pages that nobody else
    /// has are lost
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time, requires = "qmp")]
    pub source_grace: Duration,
    /// With --qmp: what becomes of the VM when pages of it are lost for good
    #[arg(long, value_enum, default_value = "pause", requires = "qmp")]
    pub on_lost: OnLost,
    /// Write the report as JSON; - = standard output
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// With --qmp: how pages come from intermediaries (VMMs have been told at their start).
    #[command(flatten)]
    pub transport: TransportArgs,
    /// Which intermediaries.
    #[command(flatten)]
    pub at: Intermediaries,
}

impl GatherArgs {
    /// Where it is written down what another process would need.
    pub fn state_file(&self, socket: &Path) -> PathBuf {
        self.state_file.clone().unwrap_or_else(|| beside(socket, ".gather.json"))
    }
}

/// Where it is written down what another `sg evict` would need of the VM of a QEMU, unless it is said.
pub fn evict_file(socket: &Path) -> PathBuf {
    beside(socket, ".evict.json")
}

fn beside(socket: &Path, what: &str) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(what);
    path.into()
}

/// What becomes of a VM of which pages are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLost {
    /// It is paused, for somebody to look at (where a vCPU waits for such a page already, QEMU does not answer any more)
    Pause,
    /// Its QEMU is ended
    Kill,
}

impl From<OnLost> for qemu::OnLost {
    fn from(on_lost: OnLost) -> Self {
        match on_lost {
            OnLost::Pause => Self::Pause,
            OnLost::Kill => Self::Kill,
        }
    }
}

/// Arguments of `sg cancel`.
#[derive(Debug, Args)]
#[command(after_help = "\
A migration is called off before COMMIT: the VM runs on where it was. After it there is no way back, and it is refused.
Exit codes: 0 called off; 1 some were not; 2 wrong arguments.")]
pub struct CancelArgs {
    /// Which VMMs.
    #[command(flatten)]
    pub vmms: Sockets,
}

/// Arguments of `sg limit`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg limit /run/libsg/web.sock --scatter 500mbit
  sg limit --all --gather 0                                    all at full speed

Exit codes: 0 done; 1 some VMM refused (nothing leaves, or arrives, there); 2 wrong arguments.")]
pub struct LimitArgs {
    /// Which VMMs.
    #[command(flatten)]
    pub vmms: Sockets,
    /// Most that each VM that leaves may send in bulk; 0 = unlimited. Pages that a guest waits for are exempt
    #[arg(long, value_name = "RATE", required_unless_present = "gather")]
    pub scatter: Option<Rate>,
    /// Most that may arrive in the background, of each VM; 0 = unlimited
    #[arg(long, value_name = "RATE")]
    pub gather: Option<Rate>,
}

fn arbiter(text: &str) -> Result<String> {
    let is_etcd = || pools::arbiter_of(text).is_some() && text.parse::<Meeting>().is_ok();
    anyhow::ensure!(text == KEEPER || is_etcd(), "write etcd://HOST[:PORT][,HOST…]/PREFIX, or keeper");
    Ok(text.to_owned())
}

fn weight(text: &str) -> Result<(String, f64)> {
    let (vm, weight) = text.split_once('=').context("write VM=N")?;
    let weight: f64 = weight.parse().context("write VM=N, N being a number")?;
    anyhow::ensure!((0.01..=1000.0).contains(&weight), "a weight is from 0.01 to 1000");
    Ok((vm.to_owned(), weight))
}

fn domain(text: &str) -> Result<(Option<String>, String)> {
    let (vm, domain) = text.split_once('=').map_or((None, text), |(vm, domain)| (Some(vm), domain));
    anyhow::ensure!((1..=NAME_BYTES_MAX).contains(&domain.len()), "a domain has 1 to {NAME_BYTES_MAX} bytes");
    Ok((vm.map(str::to_owned), domain.to_owned()))
}

fn time(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => anyhow::bail!("a time is like 120s, 2m or 1500ms"),
    };
    let number: f64 = digits.parse().context("a time is like 120s, 2m or 1500ms")?;
    Duration::try_from_secs_f64(number * seconds).context("a time is not negative, and ends")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn times_and_weights() {
        assert_eq!(time("120s").expect("good"), Duration::from_secs(120));
        assert_eq!(time("2m").expect("good"), time("120").expect("good"));
        assert_eq!(time("1.5h").expect("good"), time("5400000ms").expect("good"));
        for wrong in ["", "s", "-1s", "2d", "1e300h", "nans"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
        assert_eq!(weight("db=3").expect("good"), ("db".to_owned(), 3.0));
        for wrong in ["db", "db=", "db=x", "db=0", "db=-1", "db=NaN"] {
            assert!(weight(wrong).is_err(), "{wrong}");
        }
    }
}
