//! The command line, and what it means.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use libsg::migrate::PoolSecret;
use libsg::units::{Rate, Size};
use libsg::{Error, ErrorKind, Result};
use transports::TransportArgs;

use crate::config::{BackingKind, VcpuKind, VmConfig, Workload};
use crate::kvm::KvmVm;
use crate::moves::Wanted;
use crate::pool::Membership;

/// How long hosts of a pool have to announce themselves.
const POOL_PATIENCE: Duration = Duration::from_secs(10);

/// A small virtual machine whose guest checks every page of its own memory.
///
/// Start one, then tell it what to do over its control socket, one JSON object a line:
///
///   sg-vmm run --memory 1G --workload random --control /tmp/vm &
///   echo '{"do":"report"}' | socat - UNIX-CONNECT:/tmp/vm
///
/// Leave it at intermediaries, and run it later, on any host, once:
///
///   echo '{"do":"start","park":"web","intermediaries":["10.0.0.3:7701"]}' | socat - UNIX-CONNECT:/tmp/vm
///   sg-vmm run --claim web --intermediary 10.0.0.3:7701 --control /tmp/there
///
/// Exit codes: 0 done; 1 failed, nothing lost; 2 wrong arguments; 3 something was lost (a page was
/// not what it must be); 4 cancelled; 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "sg-vmm", version, verbatim_doc_comment)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM until it is told to quit
    Run(Box<RunArguments>),
}

/// Which kind of vCPU was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VcpuChoice {
    /// Of KVM, or none
    Kvm,
    /// Host threads that do natively what the guest does
    Thread,
    /// Of KVM where it can be used, else threads, with a warning
    Auto,
}

/// Arguments of `sg-vmm run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Guest memory: a multiple of 2M (512M, 1G, ... are powers of two)
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "512M")]
    pub memory: u64,
    /// What the guest does
    #[arg(long, value_enum, default_value = "random")]
    pub workload: Workload,
    /// Page operations a second, of all vCPUs together; 0 = as many as they can
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 0)]
    pub write_rate: u64,
    /// How much of its memory the workload touches; 0 = all
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "0")]
    pub working_set: u64,
    /// Fraction of pages (0 to 1) that are zero at the start; the rest is filled with random bytes
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub zero_fraction: f64,
    /// Fraction of pages (0 to 1) whose content is the same in every VM
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub common: f64,
    /// vCPUs; each has its own pages
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u16,
    /// What runs them
    #[arg(long, value_enum, default_value = "auto")]
    pub vcpu: VcpuChoice,
    /// What guest memory is made of
    #[arg(long, value_enum, default_value = "anon")]
    pub backing: BackingKind,
    /// What page contents and random choices come from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// The VM's name, for operators
    #[arg(long, default_value = "vm")]
    pub name: String,
    /// Wait for a VM to arrive on this address, with everything that it needs to know; what the VM is like
    /// is then none of this command line's business
    #[arg(long, value_name = "ADDR:PORT")]
    pub incoming: Option<SocketAddr>,
    /// Wait, without a VM, to be told over the control socket to claim one
    #[arg(long, requires = "control", conflicts_with_all = ["incoming", "claim"])]
    pub empty: bool,
    /// Claim the VM that was parked under this name (or by its volume), and run it, once of all who claim it. What it is
    /// like is none of this command line's business. Refused, it ends with exit code 1
    #[arg(long, value_name = "NAME", conflicts_with = "incoming")]
    pub claim: Option<String>,
    /// With --claim: an intermediary that may know the parked VM (repeatable); any one that does is enough. With --pool
    /// those that announce themselves need not be named
    #[arg(long, value_name = "HOST:PORT", value_parser = resolve, requires = "claim")]
    pub intermediary: Vec<SocketAddr>,
    /// With --claim: also from a host that has claimed it and does not run it yet; without the keeper of the parked VM,
    /// when it cannot be reached; and with pages that cannot be had. Only if you know that the VM runs nowhere
    #[arg(long, requires = "claim")]
    pub force: bool,
    /// Most that an arriving VM's memory may take of the link in the background: 256mbit, 1gbit (powers
    /// of ten), 0 = unlimited. Pages that the guest waits for are exempt
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub gather_limit: Rate,
    /// File with the pool's secret. Without one, anybody who reaches the port may send a VM here
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// Hear the pool: with {"pool":true}, start chooses intermediaries among the hosts that announce themselves
    /// (multicast:GROUP:PORT@ADDR, where the port 7702, and the interface that the routes say, need not be named, or
    /// etcd://HOST:PORT,HOST:PORT/PREFIX), and, where pages have one copy, another in the place of one
    /// that dies on the way; and while a VM leaves, others do not choose nodes of this host
    #[arg(long, value_name = "WHERE")]
    pub pool: Option<String>,
    /// How pages reach intermediaries.
    #[command(flatten)]
    pub transport: TransportArgs,
    /// The zone (rack, power feed) this host is in
    #[arg(long, value_name = "Z", requires = "pool")]
    pub zone: Option<String>,
    /// What the host's link carries [default: what its interface says, else 1gbit]
    #[arg(long, value_name = "RATE", requires = "pool")]
    pub link: Option<Rate>,
    /// Unix socket to listen on for commands, one JSON object a line: {"do":"start","to":"ADDR:PORT",
    /// "mode":"scatter-gather","intermediaries":["ADDR:PORT"]}, or instead of a list "pool":true, with "evacuate":true where
    /// the whole zone is emptied, and "dry_run":true to be told of the choice and nothing else; with "spares":["ADDR:PORT"] beside a list, others who take the
    /// place of those that die; where "mode" may also be post-copy, hybrid or pre-copy, the
    /// latter two with "rounds" (most while the VM runs), "downtime_limit_ms", "via" (direct or vmd); with "replicas":N
    /// each page that goes to intermediaries lies at N of them; with "scatter":RATE no more leaves in bulk; and with "dedup":{"hash":
    /// "blake3" or "sha1","domain":NAME}, both optional, pages that intermediaries hold for VMs of the same domain are
    /// not sent; with "park":NAME instead of "to" the VM is left at the intermediaries under that name, and this process is
    /// free; describe (its name, its memory and how much of it is there); share ("bytes_per_s" of the host's link
    /// that a VM that leaves may take for "for_ms", from who divides it among several VMs: sg evict); claim ("claim":NAME, "intermediaries", "force") in a process that has no VM (--empty); progress, limit ("gather", "scatter": RATE), cancel,
    /// report, stats, verify ("by": guest or vmm), pause, resume, quit, and as a canary spoil ("page": a page that is made
    /// wrong, which must be reported as exactly one mismatch)
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Where the guest's serial output goes; - = standard output
    #[arg(long, value_name = "PATH")]
    pub serial: Option<PathBuf>,
    /// TEST CANARY: whoever handles the N-th page that leaves here, or arrives here, panics, which both ends must
    /// report as an error. Never use it with a VM that you need
    #[arg(long, value_name = "N")]
    pub canary_panic_at: Option<u64>,
}

impl RunArguments {
    /// The pool's secret.
    ///
    /// # Errors
    /// The file cannot be used, or there is none and strangers could reach the port.
    pub fn secret(&self) -> Result<PoolSecret> {
        match &self.secret {
            Some(path) => PoolSecret::from_file(path),
            None if self.incoming.is_none_or(|address| address.ip().is_loopback()) => Ok(PoolSecret::open()),
            None => Err(Error::new(
                ErrorKind::Input,
                "without --secret only a loopback address can be listened on: anybody could send a VM here",
            )),
        }
    }

    /// The pool to hear, if one is.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for one that cannot be heard.
    pub fn membership(&self) -> Result<Option<Membership>> {
        let Some(pool) = &self.pool else { return Ok(None) };
        let link_bytes_per_s = self.link.filter(|rate| !rate.is_unlimited()).map(Rate::bytes_per_s);
        Ok(Some(Membership { meeting: pool.parse()?, zone: self.zone.clone(), link_bytes_per_s }))
    }

    /// The parked VM that is to be claimed, if one is.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] where nobody is named who may know it; the pool's.
    pub fn wanted(&self, secret: &PoolSecret) -> Result<Option<Wanted>> {
        let Some(claim) = self.claim.clone() else { return Ok(None) };
        let mut intermediaries = self.intermediary.clone();
        if let Some(membership) = self.membership()? {
            let found = membership.meeting.open(secret)?.find(POOL_PATIENCE)?;
            // Other VMMs are there as well.
            intermediaries.extend(found.iter().map(|found| found.address).filter(|at| at.port() != 0));
        }
        if intermediaries.is_empty() {
            let message = "--claim needs to know whom to ask: --intermediary HOST:PORT, or --pool multicast:GROUP or etcd://HOST/PREFIX";
            return Err(Error::new(ErrorKind::Input, message));
        }
        Ok(Some(Wanted { claim, intermediaries, force: self.force }))
    }

    /// The VM that these arguments describe.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for arguments out of bounds, [`ErrorKind::Vm`] when KVM was asked for
    /// and cannot be used.
    pub fn config(&self) -> Result<VmConfig> {
        let config = VmConfig {
            name: self.name.clone(),
            memory_bytes: self.memory,
            backing: self.backing,
            vcpus: self.vcpus,
            vcpu: choose(self.vcpu)?,
            workload: self.workload,
            write_rate: self.write_rate,
            working_set_bytes: self.working_set,
            zero_fraction: self.zero_fraction,
            common: self.common,
            seed: self.seed,
        };
        config.check()?;
        Ok(config)
    }
}

fn choose(choice: VcpuChoice) -> Result<VcpuKind> {
    match choice {
        VcpuChoice::Thread => Ok(VcpuKind::Thread),
        VcpuChoice::Kvm => KvmVm::probe().map(|()| VcpuKind::Kvm),
        VcpuChoice::Auto => Ok(KvmVm::probe().map_or_else(
            |error| {
                let why = error.chain();
                tracing::warn!(why, "no KVM here: vCPUs are threads, which check the same pages natively");
                VcpuKind::Thread
            },
            |()| VcpuKind::Kvm,
        )),
    }
}

/// An intermediary's address.
fn resolve(text: &str) -> Result<SocketAddr> {
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| Error::new(ErrorKind::Input, format!("{text} is no HOST:PORT that can be found")))
}

/// A size in bytes: 4096, 512M, 1G.
fn parse_size(text: &str) -> Result<u64> {
    text.parse::<Size>().map(|size| size.0)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
