//! Time that two processes can compare.
//!
//! `CLOCK_MONOTONIC` counts from the host's start, so that source and destination on one host read
//! the same clock, and the gap between the guest's last operation before the switch and its first
//! one after it is measured exactly. Between two hosts only `CLOCK_REALTIME` can be compared: then
//! the gap is as exact as the hosts' clocks are synchronised. The host's boot id tells which it is.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

fn nanoseconds(id: ClockId) -> u64 {
    let now = clock_gettime(id);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// One instant on both clocks, and the host whose monotonic clock it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Instants {
    monotonic_ns: u64,
    realtime_ns: u64,
    boot_id: String,
}

impl Instants {
    /// Now, here.
    #[must_use]
    pub fn now() -> Self {
        Self {
            monotonic_ns: monotonic_ns(),
            realtime_ns: nanoseconds(ClockId::Realtime),
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        }
    }

    /// Translates a monotonic time of the host where `self` was taken to this host's.
    #[must_use]
    pub fn translate(&self, their_ns: u64) -> u64 {
        let here = Self::now();
        if here.boot_id == self.boot_id && !here.boot_id.is_empty() {
            return their_ns;
        }
        let age = self.monotonic_ns.saturating_sub(their_ns);
        let since = here.realtime_ns.saturating_sub(self.realtime_ns);
        here.monotonic_ns.saturating_sub(age.saturating_add(since))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn another_hosts_clock_is_translated() {
        let here = Instants::now();
        assert_eq!(here.translate(5), 5);
        let there = Instants { monotonic_ns: 1_000_000, boot_id: "other".into(), ..here };
        let translated = there.translate(400_000);
        let age = monotonic_ns() - translated;
        assert!((600_000..5_000_000_000).contains(&age), "{age}");
    }
}
