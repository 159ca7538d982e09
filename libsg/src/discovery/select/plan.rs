//! What the nodes taken so far come to, and the draws.

use std::time::Duration;

use super::{Lack, Need, SPREAD, Verdict, ZoneRule, link_offer, memory_offer};
use crate::wire::announcement::Announcement;

/// What a node is drawn for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Room for the VM and its copies.
    Memory,
    /// Bandwidth, in and out.
    Bandwidth,
}

/// What nodes offer together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offer {
    memory: u64,
    incoming: u64,
    out: u64,
}

impl Offer {
    fn of(node: &Announcement) -> Self {
        let (incoming, out) = link_offer(node);
        Self { memory: memory_offer(node), incoming, out }
    }

    fn at_most(self, cap: Self) -> Self {
        Self {
            memory: self.memory.min(cap.memory),
            incoming: self.incoming.min(cap.incoming),
            out: self.out.min(cap.out),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            memory: self.memory.saturating_add(other.memory),
            incoming: self.incoming.saturating_add(other.incoming),
            out: self.out.saturating_add(other.out),
        }
    }
}

/// The taken nodes of one zone: what they offer, and what of it counts while others can be found.
#[derive(Debug)]
struct Zone<'n> {
    /// A node that names no zone is one of its own.
    name: Option<&'n str>,
    offered: Offer,
    counted: Offer,
}

/// The nodes taken so far.
#[derive(Debug)]
pub(super) struct Plan<'n> {
    need: &'n Need,
    /// What one copy of the VM takes.
    one: Offer,
    /// What the whole takes.
    all: Offer,
    /// What one node counts for.
    cap: Offer,
    zones: Vec<Zone<'n>>,
    /// Positions, in the order in which they were taken.
    pub members: Vec<usize>,
}

impl<'n> Plan<'n> {
    pub fn new(need: &'n Need) -> Self {
        let copies = need.copies();
        let one = Offer { memory: need.bytes, incoming: need.source_bytes_per_s, out: 0 };
        let all = Offer {
            memory: one.memory.saturating_mul(copies),
            incoming: one.incoming.saturating_mul(copies),
            out: need.direct_bytes_per_s(),
        };
        let cap = Offer {
            memory: all.memory.div_ceil(SPREAD),
            incoming: all.incoming.div_ceil(SPREAD),
            out: all.out.div_ceil(SPREAD),
        };
        Self { need, one, all, cap, zones: Vec::new(), members: Vec::new() }
    }

    /// Takes the node.
    pub fn take(&mut self, at: usize, node: &'n Announcement) -> Verdict {
        let offered = Offer::of(node);
        let counted = offered.at_most(self.cap);
        let name = node.zone.as_deref();
        match self.zones.iter_mut().find(|zone| name.is_some() && zone.name == name) {
            Some(zone) => {
                zone.offered = zone.offered.plus(offered);
                zone.counted = zone.counted.plus(counted);
            }
            None => self.zones.push(Zone { name, offered, counted }),
        }
        self.members.push(at);
        Verdict::Taken {
            memory_bytes: counted.memory,
            in_bytes_per_s: counted.incoming,
            out_bytes_per_s: counted.out,
        }
    }

    /// Of what the zones have, what can be used: a zone holds one copy of each page at most, takes each in once, and
    /// gives each out to whoever asks.
    fn used(&self, of: impl Fn(&Zone<'_>) -> Offer) -> Offer {
        let zones = self.zones.iter().map(of);
        zones.fold(Offer::default(), |sum, zone| sum.plus(self.within_zone(zone)))
    }

    fn within_zone(&self, zone: Offer) -> Offer {
        Offer {
            memory: zone.memory.min(self.one.memory),
            incoming: zone.incoming.min(self.one.incoming),
            out: zone.out,
        }
    }

    /// Whether nodes are to be added for that.
    pub fn lacks(&self, want: Want) -> bool {
        let used = self.used(|zone| zone.counted);
        match want {
            Want::Memory => used.memory < self.all.memory,
            Want::Bandwidth => used.incoming < self.all.incoming || used.out < self.all.out,
        }
    }

    /// Whether the node would bring it nearer.
    fn is_helped_by(&self, node: &Announcement, want: Want) -> bool {
        let more = Offer::of(node).at_most(self.cap);
        let name = node.zone.as_deref();
        let zone = self.zones.iter().find(|zone| name.is_some() && zone.name == name);
        let zone = zone.map_or(Offer::default(), |zone| zone.counted);
        match want {
            Want::Memory => more.memory > 0 && zone.memory < self.one.memory,
            Want::Bandwidth => {
                let used = self.used(|zone| zone.counted);
                let takes_in = more.incoming > 0 && zone.incoming < self.one.incoming;
                (used.incoming < self.all.incoming && takes_in) || (used.out < self.all.out && more.out > 0)
            }
        }
    }

    /// How loaded the node would be: the largest part of its memory and of its link in use.
    fn load_with(&self, node: &Announcement) -> f64 {
        let more = Offer::of(node).at_most(self.cap);
        let (memory, link) = (&node.memory, &node.link);
        let part = |whole: u64, free: u64, more: u64| {
            (whole as f64 - free as f64 + more as f64) / whole.max(1) as f64
        };
        let incoming = part(link.bytes_per_s, link.free_in_bytes_per_s, more.incoming);
        let out = part(link.bytes_per_s, link.free_out_bytes_per_s, more.out);
        part(memory.host_bytes, memory.available_bytes, more.memory).max(incoming).max(out)
    }

    /// What all nodes lack, everything that they offer counted.
    pub fn remaining(&self) -> Vec<Lack> {
        let used = self.used(|zone| zone.offered);
        let mut memory = self.all.memory.saturating_sub(used.memory);
        if let (ZoneRule::Evacuate, Some(there)) = (self.need.zones, &self.need.destination_zone) {
            let zone = self.zones.iter().find(|zone| zone.name == Some(there));
            memory = memory.max(self.one.memory.saturating_sub(zone.map_or(0, |zone| zone.offered.memory)));
        }
        let lacks = [
            Lack::Memory(memory),
            Lack::In(self.all.incoming.saturating_sub(used.incoming)),
            Lack::Out(self.all.out.saturating_sub(used.out)),
        ];
        let is_lack = |lack: &Lack| !matches!(lack, Lack::Memory(0) | Lack::In(0) | Lack::Out(0));
        lacks.into_iter().filter(is_lack).collect()
    }

    /// How long until the source is empty: what goes directly and what nodes take in add up, up to its link.
    pub fn eviction(&self) -> Option<Duration> {
        let used = self.used(|zone| zone.offered);
        let copies = self.need.copies();
        let direct = self.need.direct_bytes_per_s();
        let rate = direct.saturating_add(used.incoming / copies).min(self.need.source_bytes_per_s);
        let beside = self.one.memory.saturating_sub(used.memory / copies);
        let all = seconds(self.one.memory, rate)?;
        Some(all.max(seconds(beside, direct)?))
    }

    /// How long until the destination has everything.
    pub fn total(&self) -> Option<Duration> {
        let eviction = self.eviction()?;
        let used = self.used(|zone| zone.offered);
        let direct = self.need.direct_bytes_per_s();
        let sent = (direct as f64 * eviction.as_secs_f64()) as u64;
        let out = used.out.min(self.need.destination_bytes_per_s);
        (direct > 0).then(|| Some(eviction + seconds(self.one.memory.saturating_sub(sent), out)?)).flatten()
    }
}

/// `None` for what never ends.
fn seconds(bytes: u64, bytes_per_s: u64) -> Option<Duration> {
    match (bytes, bytes_per_s) {
        (0, _) => Some(Duration::ZERO),
        (_, 0) => None,
        (bytes, rate) => Some(Duration::from_secs_f64(bytes as f64 / rate as f64)),
    }
}

/// Draws by seed (splitmix64).
#[derive(Debug)]
pub(super) struct Draw(u64);

impl Draw {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(word ^ (word >> 31)) * bound as u128) >> 64) as usize
    }

    /// The least loaded of some drawn from the tier that help, and takes it out. Those that do not help go aside. With no
    /// want, everybody helps.
    pub fn next(
        &mut self,
        tier: &mut Vec<u32>,
        aside: &mut Vec<u32>,
        nodes: &[Announcement],
        plan: &Plan<'_>,
        want: Option<Want>,
    ) -> Option<usize> {
        let mut best: Option<(f64, u32)> = None;
        let mut drawn = Vec::new();
        while drawn.len() < usize::from(plan.need.choices.max(1)) && !tier.is_empty() {
            let at = tier.swap_remove(self.below(tier.len()));
            let node = &nodes[at as usize];
            if want.is_some_and(|want| !plan.is_helped_by(node, want)) {
                aside.push(at);
                continue;
            }
            drawn.push(at);
            let load = plan.load_with(node);
            if best.is_none_or(|(least, _)| load < least) {
                best = Some((load, at));
            }
        }
        let (_, best) = best?;
        tier.extend(drawn.into_iter().filter(|at| *at != best));
        Some(best as usize)
    }
}
