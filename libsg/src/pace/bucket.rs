//! A token bucket with debt: what is taken may exceed what is there, and is paid back by waiting.

use std::time::{Duration, Instant};

/// Time that one slice occupies the link: what an urgent page waits at most behind our own traffic when
/// the queue is empty. Shorter costs more system calls than it gains.
pub(crate) const SLICE_TIME: Duration = Duration::from_micros(150);

/// Least slice: one page.
const SLICE_BYTES_MIN: u64 = 4 << 10;

/// Largest slice: the 64 pages of one batch.
pub(crate) const SLICE_BYTES_MAX: u64 = 256 << 10;

/// How long unused tokens are kept. A thread on a busy core wakes late, by up to about this; without the
/// allowance each late wake-up would be lost rate, with more of it the catching up would fill the queue.
const BURST_TIME: Duration = Duration::from_micros(3000);

/// The bytes that a sender at `rate` bytes/s (`None`: unlimited) puts on the wire at once.
#[must_use]
pub fn slice_bytes(rate: Option<u64>) -> u64 {
    match rate {
        Some(rate) => bytes_in(rate, SLICE_TIME).clamp(SLICE_BYTES_MIN, SLICE_BYTES_MAX),
        None => SLICE_BYTES_MAX,
    }
}

/// The bytes that `rate` bytes/s carries in `time`.
pub(crate) fn bytes_in(rate: u64, time: Duration) -> u64 {
    (rate as f64 * time.as_secs_f64()) as u64
}

/// Whether one pace is as good as the other, `None` being none: less than one in so many `parts` apart.
pub(crate) fn is_near(pace: Option<u64>, told: Option<u64>, parts: u64) -> bool {
    pace == told || pace.zip(told).is_some_and(|(pace, told)| pace.abs_diff(told) <= told / parts)
}

/// The time that `bytes` take at `rate` bytes/s; an hour at most.
pub(crate) fn time_of(bytes: f64, rate: u64) -> Duration {
    Duration::from_secs_f64((bytes / rate.max(1) as f64).clamp(0.0, 3600.0))
}

/// Tokens are bytes. The level may go below zero: whoever finds it above zero takes all it asked for,
/// and the next one waits until it is above zero again.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: Option<u64>,
    level: f64,
    lost: f64,
    filled_at: Instant,
}

impl TokenBucket {
    /// A full bucket at `rate` bytes/s; `None` is unlimited.
    #[must_use]
    pub fn new(now: Instant, rate: Option<u64>) -> Self {
        let mut bucket = Self { rate, level: 0.0, lost: 0.0, filled_at: now };
        bucket.level = bucket.burst();
        bucket
    }

    /// The rate in bytes/s; `None` is unlimited.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// Changes the rate from `now` on. Debt stays: it was sent. Debt of a slower rate is shortened to
    /// what `rate` carries in a tenth of a second, so that nobody waits for a past that is over.
    pub fn set_rate(&mut self, now: Instant, rate: Option<u64>) {
        if rate == self.rate {
            return;
        }
        self.refill(now);
        self.rate = rate;
        let debt = rate.map_or(0.0, |rate| rate as f64 / 10.0);
        self.level = self.level.clamp(-debt, self.burst());
    }

    /// Takes `bytes` if there is no debt.
    ///
    /// # Errors
    /// How long to wait before it is worth asking again; nothing was taken.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let wait = self.wait(now);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(now, bytes);
        Ok(())
    }

    /// Takes `bytes` whatever the level is: they are on the wire already, or must not wait.
    pub fn charge(&mut self, now: Instant, bytes: u64) {
        if self.rate.is_some() {
            self.refill(now);
            self.level -= bytes as f64;
        }
    }

    /// Gives `bytes` back that were taken and not used.
    pub fn give_back(&mut self, bytes: u64) {
        self.level = (self.level + bytes as f64).min(self.burst());
    }

    /// How long until [`take`](Self::take) succeeds; zero if it would now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        self.refill(now);
        if self.level > 0.0 {
            return Duration::ZERO;
        }
        // One byte beyond the debt, and never zero: zero means "now".
        time_of(1.0 - self.level, rate).max(Duration::from_nanos(100))
    }

    /// How long the debt takes to be paid.
    pub(crate) fn debt(&mut self, now: Instant) -> Duration {
        self.refill(now);
        self.rate.map_or(Duration::ZERO, |rate| time_of(-self.level, rate))
    }

    /// Bytes that could have been taken since the last call and were not: the bucket was full.
    pub(crate) fn take_lost(&mut self, now: Instant) -> u64 {
        self.refill(now);
        std::mem::take(&mut self.lost) as u64
    }

    /// Bytes that can be taken now without debt; `u64::MAX` when unlimited.
    pub(crate) fn level(&mut self, now: Instant) -> u64 {
        self.refill(now);
        self.rate.map_or(u64::MAX, |_| self.level as u64)
    }

    fn burst(&self) -> f64 {
        self.rate.map_or(0.0, |rate| bytes_in(rate, BURST_TIME).max(2 * slice_bytes(Some(rate))) as f64)
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        if let Some(rate) = self.rate {
            let level = self.level + rate as f64 * elapsed.as_secs_f64();
            self.level = level.min(self.burst());
            self.lost += level - self.level;
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unlimited_never_waits() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now, None);
        for _ in 0..1000 {
            assert_eq!(bucket.take(now, u64::MAX / 4), Ok(()));
        }
    }

    #[test]
    fn a_slice_larger_than_the_bucket_is_paid_by_waiting() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, Some(1_000_000));
        assert_eq!(bucket.take(start, 1_000_000), Ok(()));
        let wait = bucket.take(start, 1).unwrap_err();
        assert!(wait > Duration::from_millis(980) && wait < Duration::from_millis(1001), "{wait:?}");
        assert_eq!(bucket.take(start + wait, 1), Ok(()));
    }

    #[test]
    fn a_new_rate_holds_at_once_and_forgives_old_debt() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, Some(1_000_000));
        bucket.charge(start, 10_000_000);
        bucket.set_rate(start, Some(1_000_000_000));
        assert!(bucket.wait(start) <= Duration::from_millis(11));
        bucket.set_rate(start, Some(1_000));
        assert!(bucket.wait(start) <= Duration::from_millis(101));
        bucket.set_rate(start, None);
        assert_eq!(bucket.wait(start), Duration::ZERO);
    }

    proptest! {
        /// Whatever is asked for and when, no more goes out than the rate plus one burst plus one slice.
        #[test]
        fn never_more_than_rate_and_burst(
            rate in 1_000_000u64..5_000_000_000,
            steps in proptest::collection::vec((1u64..300_000, 0u64..3_000), 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(start, Some(rate));
            let (mut now, mut sent, mut largest) = (start, 0u64, 0u64);
            for (bytes, pause_us) in steps {
                now += Duration::from_micros(pause_us);
                if bucket.take(now, bytes).is_ok() {
                    sent += bytes;
                    largest = largest.max(bytes);
                }
                let most = bytes_in(rate, now - start) as f64 + bucket.burst() + largest as f64 + 1.0;
                prop_assert!(sent as f64 <= most, "{sent} > {most}");
            }
        }
    }
}
