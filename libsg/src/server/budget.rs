//! A shared limit in bytes.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that may be taken, by many threads, up to a limit.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    pub(super) const fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0) }
    }

    /// Takes `bytes`; whether there were that many.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let within = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }

    /// Takes `bytes`, beyond the limit if need be.
    pub(super) fn take_anyway(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives bytes back that were taken.
    pub(super) fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_limit_holds() {
        let budget = Budget::new(10);
        assert!(budget.take(7) && !budget.take(4) && budget.take(3));
        assert!(!budget.take(u64::MAX));
        budget.give(10);
        budget.take_anyway(11);
        assert!(!budget.take(0));
        assert_eq!(budget.used(), 11);
    }
}
