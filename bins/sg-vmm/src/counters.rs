//! What the guest did: counted by each vCPU's thread, read by anyone, carried along in the state.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::clock::monotonic_ns;

/// One vCPU's counters. Written by the thread that runs it only.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// Operations completed.
    pub ops: AtomicU64,
    /// Of these, those that wrote their page.
    pub writes: AtomicU64,
    /// 1 while a write is ordered and not yet known to be done.
    pub open_writes: AtomicU64,
    /// Mismatches that the guest found.
    pub mismatches: AtomicU64,
    /// Pages verified in the current or last verification pass.
    pub verified: AtomicU64,
    /// The number of the last pass that is complete.
    pub passes: AtomicU64,
    /// `CLOCK_MONOTONIC` of the last completed operation; 0 = none yet.
    pub last_op_ns: AtomicU64,
    /// Longest time between two completed operations in the current window.
    pub longest_gap_ns: AtomicU64,
}

/// The counters that travel with the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedCounters {
    ops: u64,
    writes: u64,
    mismatches: u64,
    last_op_ns: u64,
    longest_gap_ns: u64,
}

impl VcpuCounters {
    /// An operation completed just now.
    pub fn operation(&self, write: bool) {
        let now = monotonic_ns();
        let last = self.last_op_ns.swap(now, Ordering::Relaxed);
        if last != 0 {
            self.longest_gap_ns.fetch_max(now.saturating_sub(last), Ordering::Relaxed);
        }
        self.ops.fetch_add(1, Ordering::Relaxed);
        if write {
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Time since the last completed operation: the gap that is still open.
    #[must_use]
    pub fn open_gap_ns(&self) -> u64 {
        match self.last_op_ns.load(Ordering::Relaxed) {
            0 => 0,
            last => monotonic_ns().saturating_sub(last),
        }
    }

    /// What travels with the VM.
    #[must_use]
    pub fn save(&self) -> SavedCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SavedCounters {
            ops: get(&self.ops),
            writes: get(&self.writes),
            mismatches: get(&self.mismatches),
            last_op_ns: get(&self.last_op_ns),
            longest_gap_ns: get(&self.longest_gap_ns),
        }
    }

    /// Takes over what travelled; `translate` turns the source's monotonic time into ours.
    pub fn load(&self, saved: &SavedCounters, translate: impl Fn(u64) -> u64) {
        let set = |counter: &AtomicU64, value| counter.store(value, Ordering::Relaxed);
        set(&self.ops, saved.ops);
        set(&self.writes, saved.writes);
        set(&self.mismatches, saved.mismatches);
        set(&self.last_op_ns, if saved.last_op_ns == 0 { 0 } else { translate(saved.last_op_ns) });
        set(&self.longest_gap_ns, saved.longest_gap_ns);
    }
}

/// What the guest did, as reports have it (`guest.*`).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GuestStats {
    /// Operations completed since the VM's first start, on whatever host.
    pub ops: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Operations a second since the window began ([`crate::vm::Vm::begin_window`]).
    pub ops_per_s: f64,
    /// Longest gap between completed operations of any vCPU in the window, the one still open included.
    pub longest_pause_ms: f64,
    /// Pages that were not what they must be: found by the guest, or byte by byte by the VMM.
    pub mismatches: u64,
    /// Pages covered by the current or last verification pass.
    pub verified_pages: u64,
    /// Passes over all pages that are complete.
    pub verify_passes: u64,
    /// Pages that were filled before the start.
    pub fill_pages: u64,
    /// Pages of the VM.
    pub pages: u64,
    /// Whether vCPUs run.
    pub running: bool,
    /// Why a vCPU is of no further use, if one is.
    pub failure: Option<String>,
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_gap_spans_a_save_and_load() {
        let source = VcpuCounters::default();
        source.operation(true);
        let saved = source.save();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let destination = VcpuCounters::default();
        destination.load(&saved, |ns| ns);
        destination.operation(false);
        assert!(destination.longest_gap_ns.load(Ordering::Relaxed) >= 20_000_000);
        assert_eq!(destination.ops.load(Ordering::Relaxed), 2);
        assert_eq!(destination.writes.load(Ordering::Relaxed), 1);
    }
}
