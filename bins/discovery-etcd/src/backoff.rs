//! How soon somebody who does not answer is asked again: later each time, and not all who ask at the same moment.

use std::time::Duration;

use libsg::discovery::book::jittered;

/// After the first failure.
const FIRST: Duration = Duration::from_millis(250);

/// Never later than that: a host's word is due more often than its lease runs out.
const MOST: Duration = Duration::from_secs(4);

/// Counts what failed in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// It failed: when to try again, by that random number. Whether that is news.
    pub fn failed(&mut self, random: u64) -> (Duration, bool) {
        let is_news = self.failures == 0;
        let wait = (FIRST * 2_u32.pow(self.failures.min(10))).min(MOST);
        self.failures = self.failures.saturating_add(1);
        (jittered(wait, random), is_news)
    }

    /// It worked. Whether that is news.
    pub fn worked(&mut self) -> bool {
        std::mem::take(&mut self.failures) > 0
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn it_waits_longer_each_time_and_says_so_once() {
        let mut backoff = Backoff::default();
        assert!(!backoff.worked());
        let waits: Vec<_> = (0..8).map(|_| backoff.failed(0)).collect();
        let of = |ms, is_news| (Duration::from_millis(ms), is_news);
        assert_eq!(waits[..4], [of(250, true), of(500, false), of(1000, false), of(2000, false)]);
        assert_eq!(waits[4..], [of(4000, false); 4]);
        backoff.failures = u32::MAX;
        assert_eq!(backoff.failed(255), of(3000, false));
        assert!(backoff.worked() && !backoff.worked());
        assert_eq!(backoff.failed(0), of(250, true));
    }
}
