//! Tells one vCPU what to do next, and counts what it has done.
//!
//! A vCPU comes here each time it has completed an order and leaves with the next one: when that is
//! depends on the rate, what it is on the workload and on whether a verification pass is wanted.
//! Orders are the same for vCPUs of KVM and for threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::clock::monotonic_ns;
use crate::config::{VmConfig, Workload};
use crate::counters::VcpuCounters;

/// Bits of an order, as the guest's code knows them.
pub mod order {
    /// Write the page, after checking it.
    pub const WRITE: u32 = 1;
    /// A random page; without it the next one in order.
    pub const RANDOM: u32 = 2;
    /// Check the next pages in order, all of them and not only the working set.
    pub const VERIFY: u32 = 4;
    /// With `VERIFY`: from the first page on.
    pub const RESTART: u32 = 8;
    /// With `VERIFY`: from this bit on, how many pages more than one.
    pub const COUNT_SHIFT: u32 = 8;
}

/// Pages checked by one verify order: few, so that operations go on in between.
const VERIFY_PAGES: u64 = 16;
/// Time between heartbeats of an idle guest.
const HEARTBEAT_NS: u64 = 10_000_000;
/// What a vCPU that fell behind its rate may catch up; the rest is forgotten, so that the end of
/// a pause is no burst.
const CATCH_UP_NS: u64 = 20_000_000;

/// What all vCPUs of a VM share with whoever controls them.
#[derive(Default)]
pub struct Gate {
    stop: AtomicBool,
    wanted_pass: AtomicU64,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    /// Whether vCPUs must come back.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Makes vCPUs come back, or lets them run.
    pub fn set_stopped(&self, stop: bool) {
        let _guard = self.lock.lock();
        self.stop.store(stop, Ordering::Release);
        self.changed.notify_all();
    }

    /// Asks for one more pass over all pages; returns its number.
    pub fn want_pass(&self) -> u64 {
        let _guard = self.lock.lock();
        let pass = self.wanted_pass.fetch_add(1, Ordering::AcqRel) + 1;
        self.changed.notify_all();
        pass
    }

    /// Sleeps until then, or until something changes.
    fn wait_until(&self, deadline_ns: u64) {
        let mut guard = self.lock.lock();
        let now = monotonic_ns();
        if !self.stopped() && now < deadline_ns {
            self.changed.wait_for(&mut guard, Duration::from_nanos(deadline_ns - now));
        }
    }
}

/// The order that the vCPU is working on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Outstanding {
    /// Nothing that counts: fresh, or told to ask again.
    Nothing,
    /// One operation.
    Operation {
        /// That writes its page.
        write: bool,
    },
    /// Checking pages for a verification pass.
    Verify {
        /// So many.
        pages: u64,
    },
}

/// What of a director travels with the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectorState(Outstanding);

/// Gives one vCPU its orders.
pub struct Director {
    gate: Arc<Gate>,
    counters: Arc<VcpuCounters>,
    order: u32,
    interval_ns: u64,
    owned_pages: u64,
    outstanding: Outstanding,
    due_ns: u64,
    pass: u64,
    /// Pages that the current pass has not been told yet; `None` between passes.
    to_verify: Option<u64>,
    after_verify: bool,
}

impl Director {
    /// For a vCPU that owns so many pages.
    #[must_use]
    pub fn new(config: &VmConfig, owned_pages: u64, gate: Arc<Gate>, counters: Arc<VcpuCounters>) -> Self {
        let order = match config.workload {
            Workload::Idle => 0,
            Workload::Sequential => order::WRITE,
            Workload::Random => order::WRITE | order::RANDOM,
            Workload::Reader => order::RANDOM,
        };
        let interval_ns = match (config.workload, config.write_rate) {
            (Workload::Idle, _) => HEARTBEAT_NS,
            (_, 0) => 0,
            (_, rate) => (u64::from(config.vcpus) * 1_000_000_000).div_ceil(rate),
        };
        let pass = counters.passes.load(Ordering::Relaxed);
        Self {
            gate,
            counters,
            order,
            interval_ns,
            owned_pages,
            outstanding: Outstanding::Nothing,
            due_ns: 0,
            pass,
            to_verify: None,
            after_verify: false,
        }
    }

    /// Whether the vCPU must come back.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.gate.stopped()
    }

    /// Whether it must come back, and is between two operations.
    #[must_use]
    pub fn at_rest(&self) -> bool {
        self.stopped() && self.outstanding == Outstanding::Nothing
    }

    fn give(&mut self, outstanding: Outstanding) {
        let write = outstanding == Outstanding::Operation { write: true };
        self.counters.open_writes.store(write.into(), Ordering::Relaxed);
        self.outstanding = outstanding;
    }

    /// The vCPU found a page that is not what it must be.
    pub fn mismatch(&self, page: u64, expected_version: u64, found_version: u64) {
        self.counters.mismatches.fetch_add(1, Ordering::Relaxed);
        tracing::error!(page, expected_version, found_version, "mismatch: the guest found a wrong page");
    }

    /// The last order is completed: counts it, and returns the next one when it is due. While the
    /// VM is being paused that is "nothing", at once.
    pub fn exchange(&mut self) -> u32 {
        let done = self.outstanding;
        self.give(Outstanding::Nothing);
        match done {
            Outstanding::Nothing => {}
            Outstanding::Operation { write } => self.counters.operation(write),
            Outstanding::Verify { pages } => self.verified(pages),
        }
        loop {
            if self.stopped() {
                return 0;
            }
            let now = monotonic_ns();
            let due = now >= self.due_ns;
            if self.begin_pass() && !(due && self.after_verify) {
                return self.verify_order();
            }
            if due {
                self.due_ns = self.due_ns.max(now.saturating_sub(CATCH_UP_NS)) + self.interval_ns;
                self.after_verify = false;
                self.give(Outstanding::Operation { write: self.order & order::WRITE != 0 });
                return self.order;
            }
            self.gate.wait_until(self.due_ns);
        }
    }

    /// Whether there is a pass to work on, a new one perhaps.
    fn begin_pass(&mut self) -> bool {
        if self.to_verify.is_some() {
            return true;
        }
        let wanted = self.gate.wanted_pass.load(Ordering::Acquire);
        if wanted == self.pass {
            return false;
        }
        self.pass = wanted;
        self.counters.verified.store(0, Ordering::Relaxed);
        self.to_verify = Some(self.owned_pages);
        true
    }

    fn verify_order(&mut self) -> u32 {
        let left = self.to_verify.unwrap_or(0);
        let pages = left.min(VERIFY_PAGES);
        let restart = if left == self.owned_pages { order::RESTART } else { 0 };
        self.to_verify = Some(left - pages);
        self.after_verify = true;
        self.give(Outstanding::Verify { pages });
        order::VERIFY | restart | ((pages as u32).saturating_sub(1) << order::COUNT_SHIFT)
    }

    /// Pages were checked. After a migration this may be the end of an order of the source: the pass
    /// it belonged to is not continued.
    fn verified(&mut self, pages: u64) {
        let Some(left) = self.to_verify else { return };
        self.counters.verified.fetch_add(pages, Ordering::Relaxed);
        if left == 0 {
            self.to_verify = None;
            self.counters.passes.store(self.pass, Ordering::Release);
        }
    }

    /// What travels with the VM.
    #[must_use]
    pub fn save(&self) -> DirectorState {
        DirectorState(self.outstanding)
    }

    /// Takes over what travelled.
    pub fn load(&mut self, state: DirectorState) {
        self.give(state.0);
        self.to_verify = None;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::config::{VcpuKind, test::small};

    fn director(workload: Workload, write_rate: u64) -> (Director, Arc<VcpuCounters>, Arc<Gate>) {
        let (gate, counters) = (Arc::new(Gate::default()), Arc::new(VcpuCounters::default()));
        let config = VmConfig { workload, write_rate, vcpus: 1, ..small(VcpuKind::Thread) };
        (Director::new(&config, 40, Arc::clone(&gate), Arc::clone(&counters)), counters, gate)
    }

    #[test]
    fn operations_count_when_completed() {
        let (mut director, counters, gate) = director(Workload::Random, 0);
        assert_eq!(director.exchange(), order::WRITE | order::RANDOM);
        assert_eq!(counters.ops.load(Ordering::Relaxed), 0);
        director.exchange();
        assert_eq!(counters.writes.load(Ordering::Relaxed), 1);
        gate.set_stopped(true);
        assert_eq!(director.exchange(), 0);
        assert_eq!(director.exchange(), 0);
        assert_eq!(counters.ops.load(Ordering::Relaxed), 2, "an order of nothing is no operation");
    }

    #[test]
    fn the_rate_bounds_the_count() {
        let (mut director, counters, _gate) = director(Workload::Sequential, 1000);
        let start = monotonic_ns();
        while counters.ops.load(Ordering::Relaxed) < 100 {
            director.exchange();
        }
        // The first is due at once, and 20 ms may be caught up.
        assert!(monotonic_ns() - start >= 78_000_000);
    }

    #[test]
    fn a_pass_covers_every_page_and_operations_go_on() {
        let (mut director, counters, gate) = director(Workload::Reader, 0);
        assert_eq!(gate.want_pass(), 1);
        let mut orders = Vec::new();
        while counters.passes.load(Ordering::Relaxed) == 0 {
            orders.push(director.exchange());
        }
        let verify = |more: u32| order::VERIFY | more << order::COUNT_SHIFT;
        assert_eq!(
            orders[..5],
            [verify(15) | order::RESTART, order::RANDOM, verify(15), order::RANDOM, verify(7)]
        );
        assert_eq!(counters.verified.load(Ordering::Relaxed), 40);
    }
}
