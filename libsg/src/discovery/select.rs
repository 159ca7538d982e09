//! Which intermediaries take a VM's memory: a pure core. It is given what was announced and what the VM needs, and
//! says whom to take, why each of the others was left, whether it fits and how long it takes.
//!
//! Nodes are added until all of this holds, counting no node for more than [`SPREAD`]th of it (so that no death costs
//! more, and those who choose at the same time meet in little):
//!
//! - their memory holds the VM with its copies, each copy of a page in another zone;
//! - what they take in keeps the source's link busy, with copies as many times as there are copies;
//! - what they give out is what the source could send to the destination, or what that takes, if less.
//!
//! A node is counted for what it has free beyond head-room that stays with its own VMs ([`LINK_HEADROOM`],
//! [`MEMORY_HEADROOM`]): taken to the brim, it would have to evict VMs next. Whoever is short of it, or a source, or
//! pressed for memory, is left.
//!
//! **Many at once**: all who decide within one announcement period see the same free nodes. So nobody takes the best:
//! two are drawn by seed, and the one with less load is taken (more choices bring the herd back, one leaves load as
//! uneven as it was). The seed is the volume's, so that the same need over the same announcements is the same choice.
//!
//! **Static**: a migration asks once. Only a node that dies is replaced, by [`replacement`].

mod plan;
#[cfg(test)]
mod test;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::ids::NodeId;
use crate::limits;
use crate::wire::announcement::{Announcement, Duty, Transports};

use plan::{Draw, Plan, Want};

/// No node is counted for more than this part of what is needed, so that at least so many are taken where there are
/// so many.
pub const SPREAD: u64 = 8;

/// The part of a link that stays with the host's own VMs: a fifth.
pub const LINK_HEADROOM: u64 = 5;

/// The part of a host's memory that stays free: an eighth.
pub const MEMORY_HEADROOM: u64 = 8;

/// A node with less idle processor time, in thousandths, is left.
pub const CPU_HEADROOM_PERMILLE: u16 = 100;

/// Of how many nodes drawn the least loaded is taken.
pub const CHOICES: u8 = 2;

/// What a VM that moves needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Bytes of its pages that are not zero.
    pub bytes: u64,
    /// Copies of each page; at least one.
    pub copies: u8,
    /// What the source's link sends, in bytes a second.
    pub source_bytes_per_s: u64,
    /// What the destination takes in, in bytes a second; zero where it takes nothing, or is not known yet.
    pub destination_bytes_per_s: u64,
    /// The zone that the VM leaves.
    pub source_zone: Option<String>,
    /// The zone that the VM goes to.
    pub destination_zone: Option<String>,
    /// What zones are worth.
    pub zones: ZoneRule,
    /// Hosts of the migration itself: no node there is taken. Loopback addresses, under which every host is the
    /// same one, are not looked at.
    pub never: Vec<IpAddr>,
    /// How the source and the destination reach nodes.
    pub transports: Transports,
    /// What the draws come from. Each migration has its own.
    pub seed: u64,
    /// Of how many nodes drawn the least loaded is taken; see [`CHOICES`].
    pub choices: u8,
}

impl Need {
    /// One copy of so many bytes, over TCP, the destination's zone preferred.
    #[must_use]
    pub fn new(bytes: u64, source_bytes_per_s: u64, destination_bytes_per_s: u64, seed: u64) -> Self {
        Self {
            bytes,
            copies: 1,
            source_bytes_per_s,
            destination_bytes_per_s,
            source_zone: None,
            destination_zone: None,
            zones: ZoneRule::Prefer,
            never: Vec::new(),
            transports: Transports::TCP,
            seed,
            choices: CHOICES,
        }
    }

    fn copies(&self) -> u64 {
        u64::from(self.copies.max(1))
    }

    /// What the source could send to the destination.
    fn direct_bytes_per_s(&self) -> u64 {
        self.source_bytes_per_s.min(self.destination_bytes_per_s)
    }
}

/// What zones are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneRule {
    /// Nodes in the destination's zone first, then the others.
    Prefer,
    /// A rack is evacuated: only the destination's zone, with further copies in any but the source's. Where the
    /// destination's is not known, any but the source's.
    Evacuate,
}

/// What became of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Taken, and counted for so much.
    Taken {
        /// Of its memory.
        memory_bytes: u64,
        /// Of what it can take in.
        in_bytes_per_s: u64,
        /// Of what it can give out.
        out_bytes_per_s: u64,
    },
    /// It could be, and is not needed: others were drawn, or the copies of its zone are complete.
    Spare,
    /// It cannot be.
    Left(Reason),
}

/// Why a node cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its host is the migration's own source or destination.
    Own,
    /// VMs are leaving its host.
    Source,
    /// Its host is short of memory itself.
    Pressed,
    /// It is about to go.
    Leaves,
    /// It speaks none of the migration's transports.
    Transport,
    /// It lends no more memory.
    Full,
    /// What its host has available is the head-room of its own VMs.
    MemoryHeadroom,
    /// What its link has free is the head-room of its own VMs.
    LinkHeadroom,
    /// Its processors have nothing to spare.
    Cpu,
    /// It takes no more connections or volumes.
    Busy,
    /// A rack is evacuated, and it is not in the destination's zone, or does not say in which.
    Zone,
    /// A rack is evacuated, and it is in it.
    Evacuated,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "the migration's own host",
            Self::Source => "VMs are leaving its host",
            Self::Pressed => "its host is short of memory",
            Self::Leaves => "it is about to go",
            Self::Transport => "no transport in common",
            Self::Full => "lends no more memory",
            Self::MemoryHeadroom => "no memory beyond the head-room of its own VMs",
            Self::LinkHeadroom => "no bandwidth beyond the head-room of its own VMs",
            Self::Cpu => "its processors are busy",
            Self::Busy => "takes no more connections or volumes",
            Self::Zone => "not in the destination's zone",
            Self::Evacuated => "in the zone that is evacuated",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken { memory_bytes, in_bytes_per_s, out_bytes_per_s } => write!(
                f,
                "taken for {}, {} in, {} out",
                Memory(*memory_bytes),
                Bits(*in_bytes_per_s),
                Bits(*out_bytes_per_s)
            ),
            Self::Spare => f.write_str("not needed"),
            Self::Left(reason) => reason.fmt(f),
        }
    }
}

/// Bytes, for people.
struct Memory(u64);

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} GiB", self.0 as f64 / (1_u64 << 30) as f64)
    }
}

/// Bytes a second as bits, for people.
struct Bits(u64);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} Mb/s", self.0 as f64 * 8e-6)
    }
}

/// What all taken nodes together lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// So many bytes of the VM have no room, or not in enough zones.
    Memory(u64),
    /// So many bytes a second of the source's link stay idle, but for what goes directly.
    In(u64),
    /// So many bytes a second of what the destination could take are not there.
    Out(u64),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(bytes) => write!(f, "no room for {} of its copies", Memory(*bytes)),
            Self::In(rate) => write!(f, "nodes for {} of what leaves the source are missing", Bits(*rate)),
            Self::Out(rate) => write!(f, "nodes give {} less than the destination could take", Bits(*rate)),
        }
    }
}

/// Who was taken, and what that means.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Positions of the taken nodes in the list, in the order in which they were taken.
    pub members: Vec<usize>,
    /// What became of each node of the list.
    pub verdicts: Vec<Verdict>,
    /// What they lack; empty where everything is met. Without [`Lack::Memory`] the VM fits.
    pub lacks: Vec<Lack>,
    /// How long the source takes to be empty. `None` where it never is: there is no room, and no destination.
    pub eviction: Option<Duration>,
    /// How long until the destination holds everything; `None` where it takes nothing.
    pub total: Option<Duration>,
}

impl Selection {
    /// Whether the VM with its copies has room there.
    #[must_use]
    pub fn fits(&self) -> bool {
        !self.lacks.iter().any(|lack| matches!(lack, Lack::Memory(_)))
    }
}

/// Chooses intermediaries for a VM among those that announced themselves.
///
/// Never more than [`limits::MEMBERS_MAX`]. The same arguments give the same answer.
#[must_use]
pub fn select(nodes: &[Announcement], need: &Need) -> Selection {
    let busy = Busy::of(nodes);
    let mut verdicts = vec![Verdict::Spare; nodes.len()];
    let mut tiers = [Vec::new(), Vec::new()];
    for (at, node) in nodes.iter().enumerate() {
        match usable(node, need, &busy) {
            Ok(tier) => tiers[tier].push(at as u32),
            Err(reason) => verdicts[at] = Verdict::Left(reason),
        }
    }
    let (mut plan, mut draw) = (Plan::new(need), Draw::new(need.seed));
    for want in [Want::Memory, Want::Bandwidth] {
        for tier in &mut tiers {
            let mut aside = Vec::new();
            while plan.lacks(want) && plan.members.len() < limits::MEMBERS_MAX {
                let Some(at) = draw.next(tier, &mut aside, nodes, &plan, Some(want)) else { break };
                verdicts[at] = plan.take(at, &nodes[at]);
            }
            tier.append(&mut aside);
        }
    }
    let (lacks, eviction, total) = (plan.remaining(), plan.eviction(), plan.total());
    Selection { members: plan.members, verdicts, lacks, eviction, total }
}

/// Who takes the place of a node that died: a position in the list, or `None` where nobody can.
///
/// `members` are those that live. Whoever helps where their loss left a gap comes first, in the destination's zone
/// before others; the dead one is not taken again, one that restarted under its name may be. The draw comes from the
/// need's seed and the dead one's incarnation: many who lose the same node do not all turn to the same other.
#[must_use]
pub fn replacement(nodes: &[Announcement], need: &Need, members: &[NodeId], dead: &NodeId) -> Option<usize> {
    if members.len() >= limits::MEMBERS_MAX {
        return None;
    }
    let busy = Busy::of(nodes);
    let mut plan = Plan::new(need);
    let mut tiers = [Vec::new(), Vec::new()];
    for (at, node) in nodes.iter().enumerate() {
        if members.contains(&node.node) {
            plan.take(at, node);
        } else if node.node != *dead
            && let Ok(tier) = usable(node, need, &busy)
        {
            tiers[tier].push(at as u32);
        }
    }
    let mut draw = Draw::new(need.seed ^ dead.incarnation);
    let wants = [Want::Memory, Want::Bandwidth].into_iter().filter(|want| plan.lacks(*want)).map(Some);
    for want in wants.chain([None]) {
        for tier in &mut tiers {
            let mut aside = Vec::new();
            let found = draw.next(tier, &mut aside, nodes, &plan, want);
            if found.is_some() {
                return found;
            }
            tier.append(&mut aside);
        }
    }
    None
}

/// Hosts that say of themselves that nothing shall come there, in the order of their addresses.
struct Busy(Vec<(IpAddr, Reason)>);

impl Busy {
    fn of(nodes: &[Announcement]) -> Self {
        let mut hosts: Vec<_> = nodes
            .iter()
            .filter_map(|node| Some((node.address.ip(), duty(node)?)))
            .filter(|(host, reason)| *reason != Reason::Leaves && !host.is_loopback())
            .collect();
        hosts.sort_unstable_by_key(|(host, _)| *host);
        Self(hosts)
    }

    fn reason(&self, host: IpAddr) -> Option<Reason> {
        if self.0.is_empty() {
            return None;
        }
        let at = self.0.binary_search_by_key(&host, |(host, _)| *host).ok()?;
        Some(self.0[at].1)
    }
}

fn duty(node: &Announcement) -> Option<Reason> {
    match node.duty {
        Duty::Lends => None,
        Duty::Source => Some(Reason::Source),
        Duty::Pressed => Some(Reason::Pressed),
        Duty::Leaves => Some(Reason::Leaves),
    }
}

/// In which tier a node can be taken: 0 in the destination's zone, else 1.
fn usable(node: &Announcement, need: &Need, busy: &Busy) -> Result<usize, Reason> {
    let host = node.address.ip();
    if need.never.contains(&host) && !host.is_loopback() {
        return Err(Reason::Own);
    }
    if let Some(reason) = duty(node).or_else(|| busy.reason(host)) {
        return Err(reason);
    }
    if !node.transports.meets(need.transports) {
        return Err(Reason::Transport);
    }
    if node.memory.limit_bytes <= node.memory.used_bytes {
        return Err(Reason::Full);
    }
    if memory_offer(node) == 0 {
        return Err(Reason::MemoryHeadroom);
    }
    if link_offer(node).0 == 0 || link_offer(node).1 == 0 {
        return Err(Reason::LinkHeadroom);
    }
    if node.cpu_idle_permille < CPU_HEADROOM_PERMILLE {
        return Err(Reason::Cpu);
    }
    // A source and a destination, each with a connection for bulk and one for what is urgent.
    if node.connections_free < 4 || node.volumes_free == 0 {
        return Err(Reason::Busy);
    }
    let zone = node.zone.as_deref();
    let there = zone.is_some() && zone == need.destination_zone.as_deref();
    if need.zones == ZoneRule::Evacuate {
        if zone.is_some() && zone == need.source_zone.as_deref() {
            return Err(Reason::Evacuated);
        }
        // One that names no zone may stand in the rack.
        if !there && (zone.is_none() || (need.copies() == 1 && need.destination_zone.is_some())) {
            return Err(Reason::Zone);
        }
    }
    Ok(usize::from(!there))
}

/// Memory that a node can give without touching its head-room.
#[must_use]
pub fn memory_offer(node: &Announcement) -> u64 {
    let memory = &node.memory;
    let available = memory.available_bytes.saturating_sub(memory.host_bytes / MEMORY_HEADROOM);
    memory.limit_bytes.saturating_sub(memory.used_bytes).min(available)
}

/// What a node can take in and give out without touching its head-room, in bytes a second.
fn link_offer(node: &Announcement) -> (u64, u64) {
    let headroom = node.link.bytes_per_s / LINK_HEADROOM;
    let beyond = |free: u64| free.saturating_sub(headroom);
    (beyond(node.link.free_in_bytes_per_s), beyond(node.link.free_out_bytes_per_s))
}
