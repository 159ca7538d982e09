//! The hosts of an experiment: network namespaces with shaped links between them, a memory limit for
//! the destination, and a directory for its files; or, without shaping, just loopback addresses.
//!
//! Whatever a lab creates it removes when it is dropped; what a killed run left behind the next one
//! removes ([`clean_up`]).

pub mod memory;
pub mod names;
pub mod net;
pub mod node;
pub mod reserve;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::{fs, iter};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

pub use memory::MemoryLimit;
pub use names::Prefix;
pub use net::{CongestionControl, Link, Queue};
pub use node::Node;
pub use reserve::Reserve;

use libsg::units::{Rate, Size};

/// What to build.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// How many intermediaries.
    pub intermediaries: u8,
    /// Every link's rate, but for:
    pub link_rate: Rate,
    /// The destination's.
    pub destination_rate: Rate,
    /// The intermediaries'.
    pub intermediary_rate: Rate,
    /// What stands in front of each link.
    pub queue: Queue,
    /// In every namespace.
    pub cc: CongestionControl,
    /// False: no namespaces, everything on loopback.
    pub shape: bool,
    /// Hosts that VMs start on.
    pub sources: u8,
    /// A further host, whose link has no limit, for the clients of co-tenants.
    pub client: bool,
    /// The destination's memory limit, with the size of the swap file behind it.
    pub destination_memory: Option<(Size, Size)>,
}

/// The hosts, ready.
pub struct Lab {
    prefix: Prefix,
    directory: PathBuf,
    shape: bool,
    nodes: Vec<Node>,
    memory: Option<MemoryLimit>,
}

impl Lab {
    /// Builds the hosts.
    ///
    /// # Errors
    /// When the system refuses a namespace, a link, a cgroup or swap (root is needed); everything
    /// built up to then is removed.
    pub fn create(spec: &LabSpec) -> Result<Self> {
        clean_up();
        Self::create_as(Prefix::next(), spec)
    }

    fn create_as(prefix: Prefix, spec: &LabSpec) -> Result<Self> {
        let directory = prefix.directory();
        fs::create_dir(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let nodes: Vec<Node> = [Node::Source]
            .into_iter()
            .chain((2..=spec.sources).map(Node::FurtherSource))
            .chain(spec.sinks())
            .chain(spec.client.then_some(Node::Client))
            .collect();
        let links: Vec<Link> =
            nodes.iter().map(|node| Link { node: *node, rate: spec.rate_of(*node) }).collect();
        let mut lab = Self { prefix, directory, shape: spec.shape, nodes, memory: None };
        // From here on a failure drops the lab, which removes what was built.
        if spec.shape {
            net::create(&lab.prefix, &links, spec.queue, spec.cc).context(
                "cannot build the network (root and iproute2 are needed; --shape off goes without)",
            )?;
        }
        if let Some((limit, swap)) = spec.destination_memory {
            lab.memory = Some(MemoryLimit::create(&lab.prefix, &lab.directory, limit, swap)?);
        }
        Ok(lab)
    }

    /// The directory for the run's files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Every host.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A host's address.
    pub fn address(&self, node: Node) -> IpAddr {
        if self.shape {
            return net::address(node).into();
        }
        let [a, b, c] = self.prefix.loopback_network();
        Ipv4Addr::new(a, b, c, node.host_number()).into()
    }

    /// Runs `work` on a host; what it spawns is born there.
    pub fn on<T: Send>(&self, node: Node, work: impl FnOnce() -> T + Send) -> Result<T> {
        if self.shape { net::inside(&self.prefix.name(node), work) } else { Ok(work()) }
    }

    /// A host's network namespace; `None` without shaping.
    pub fn namespace(&self, node: Node) -> Option<String> {
        self.shape.then(|| self.prefix.name(node))
    }

    /// Takes the limits off all links.
    pub fn lift(&self) -> Result<()> {
        match self.shape {
            true => self.nodes.iter().try_for_each(|node| net::lift(&self.prefix, *node)),
            false => Ok(()),
        }
    }

    /// The destination's memory limit.
    pub fn memory(&self) -> Option<&MemoryLimit> {
        self.memory.as_ref()
    }

    /// Remembers a process of the run, so that the next run can end it if this one is killed.
    pub fn remember(&self, pid: u32) -> Result<()> {
        use std::io::Write as _;
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.directory.join(PIDS))?;
        writeln!(file, "{pid} {}", start_time(pid).unwrap_or_default())?;
        Ok(())
    }
}

impl LabSpec {
    /// The rate of a host's link.
    pub fn rate_of(&self, node: Node) -> Rate {
        match node {
            Node::Source | Node::FurtherSource(_) => self.link_rate,
            Node::Destination => self.destination_rate,
            Node::Intermediary(_) => self.intermediary_rate,
            Node::Client => Rate::UNLIMITED,
        }
    }

    /// Bits a second of a host's link; of one without a limit, the most.
    pub fn speed(&self, node: Node) -> u64 {
        match self.rate_of(node) {
            Rate::UNLIMITED => u64::MAX,
            Rate(bits_per_s) => bits_per_s,
        }
    }

    /// Hosts that pages go to.
    pub fn sinks(&self) -> impl Iterator<Item = Node> {
        iter::once(Node::Destination).chain((1..=self.intermediaries).map(Node::Intermediary))
    }

    /// Of these, one that has the fastest link.
    pub fn best_sink(&self) -> Node {
        let faster = |best, node| if self.speed(node) > self.speed(best) { node } else { best };
        self.sinks().fold(Node::Destination, faster)
    }

    /// What the way from the source to the best sink is set to; `None` where nothing limits it.
    pub fn nominal(&self) -> Option<Rate> {
        let speed = self.speed(Node::Source).min(self.speed(self.best_sink()));
        (self.shape && speed < u64::MAX).then_some(Rate(speed))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove_all_of(&self.prefix);
    }
}

/// File in the run's directory: a line `pid start-time` for each process.
const PIDS: &str = "pids";

/// Removes what runs left behind whose process is gone.
pub fn clean_up() {
    let directories = fs::read_dir(std::env::temp_dir()).into_iter().flatten().filter_map(|entry| {
        let name = entry.ok()?.file_name();
        Prefix::parse(name.to_str()?).filter(|prefix| *name == *prefix.to_string())
    });
    let mut left: Vec<Prefix> = directories
        .chain(net::ours().into_iter().map(|(prefix, _)| prefix))
        .chain(memory::ours().into_iter().map(|(prefix, _)| prefix))
        .filter(Prefix::is_orphaned)
        .collect();
    left.sort_by_key(Prefix::to_string);
    left.dedup();
    for prefix in left {
        tracing::warn!("removing what the dead run {prefix} left behind");
        remove_all_of(&prefix);
    }
}

fn remove_all_of(prefix: &Prefix) {
    let directory = prefix.directory();
    kill_remembered(&directory.join(PIDS));
    for (_, group) in memory::ours().iter().filter(|(owner, _)| owner == prefix) {
        memory::remove_group(group);
    }
    memory::remove_swap(&directory.join("swap"));
    for (_, namespace) in net::ours().iter().filter(|(owner, _)| owner == prefix) {
        if let Err(error) = net::remove(namespace) {
            tracing::warn!("{error:#}");
        }
    }
    if let Err(error) = fs::remove_dir_all(&directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {error}", directory.display());
    }
}

/// Kills the processes of a run that are still there: same pid *and* same start time.
fn kill_remembered(pids: &Path) {
    let Ok(text) = fs::read_to_string(pids) else {
        return;
    };
    for line in text.lines() {
        let Some((pid, started)) = line.split_once(' ') else { continue };
        let Ok(pid) = pid.parse::<u32>() else { continue };
        if start_time(pid).as_deref() == Some(started)
            && let Some(pid) = Pid::from_raw(pid.cast_signed())
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// When a process started, in clock ticks since boot: with its pid, a name that is never reused.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything; the start time is field 22.
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(19).map(str::to_owned)
}

#[cfg(test)]
mod test;
