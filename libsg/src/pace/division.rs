//! One host's link, divided among VMs that leave together: each VM's source paces what it sends, but what the link
//! carries is found once, for all of them. Pure but for a lock: what VMs tell comes in with the time, shares come out.
//!
//! Sources that look for the rate alone disturb each other. Each takes the queue that another's probe makes for its own,
//! gives way, and takes long to grow back when one is done; so the link is idle in between, and all end apart. Here what
//! VMs tell is added up as if they were links of one [`SharedPacer`]: its rate finder is the only one that probes.
//!
//! **What is shared by**: what each VM has left, so that all end together, the host is free soonest, and nobody is alone on
//! the link with a single slow path at the end; or by weights, where somebody prefers some VMs to others. What a VM does
//! not take goes to the others at once, what it takes again it gets back by and by ([`super::share`]). What is urgent is
//! outside of all that: it needs no share, and is taken from what is shared.

use std::time::Instant;

use super::shared::{Class, LinkId, SharedPacer, Told};

/// A VM that has less left than this counts as if it had as much: the last of it is not to wait for a share.
const LEFT_BYTES_MIN: u64 = 1 << 20;

/// What of the rate is kept for VMs that take less than their part: a link of one VM that grows from nothing costs faults a
/// queue, a VM that does not grow back stands still. What it has it divides again, among links that pieces of 64 KiB fill.
const KEPT: f64 = 0.2;

/// One VM's part of a [`LinkDivision`].
#[derive(Debug)]
pub struct Part {
    paced: LinkId,
    urgent: LinkId,
    /// By what it shares; by what is left where nobody says.
    weight: Option<f64>,
}

/// Divides one link. Shared by those who talk with the VMs, one of which each [`Part`] belongs to.
#[derive(Debug)]
pub struct LinkDivision {
    pacer: SharedPacer,
}

impl LinkDivision {
    /// Nobody shares it yet, and what it carries is unknown.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { pacer: SharedPacer::keeping(now, KEPT) }
    }

    /// One more VM. All of them are given weights, or none is: then they share by what they have left.
    #[must_use]
    pub fn add(&self, weight: Option<f64>) -> Part {
        let paced = self.pacer.add_link(Class::Bulk);
        let part = Part { paced, urgent: self.pacer.add_link(Class::Urgent), weight };
        self.pacer.set_weight(part.paced, weight.unwrap_or(LEFT_BYTES_MIN as f64));
        part
    }

    /// A VM has evicted, or died: its part goes to the others.
    pub fn remove(&self, part: Part) {
        let Part { paced, urgent, .. } = part;
        self.pacer.remove_link(paced);
        self.pacer.remove_link(urgent);
    }

    /// Takes what a VM told at `now`, and how many bytes it has left to send. Every 5 ms or so. Returns what it may send
    /// beside what is urgent, in bytes/s; `None` while what the link carries is not known.
    pub fn told(&self, part: &Part, told: &Told, left_bytes: u64, now: Instant) -> Option<u64> {
        let weight = part.weight.unwrap_or(left_bytes.max(LEFT_BYTES_MIN) as f64);
        self.pacer.set_weight(part.paced, weight);
        let urgent = super::LinkReading { delivered: told.urgent_bytes, ..super::LinkReading::default() };
        self.pacer.observe(part.urgent, urgent, now);
        self.pacer.report(part.paced, told.paced, now)
    }

    /// What all may send together in bytes/s; `None` while what the link carries is not known.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.pacer.rate()
    }
}

#[cfg(test)]
mod test;
