//! A histogram of latencies: fixed buckets, so recording never allocates and two of them add up.
//!
//! Values below 64 µs are exact to the microsecond; above, each power of two has 32 buckets, so a
//! percentile is at most 1.6 % from the truth (a bucket answers with its middle).

use std::time::Duration;

/// Buckets per power of two.
const STEPS: usize = 32;
/// Values below this many microseconds have a bucket each.
const EXACT: u64 = 2 * STEPS as u64;
/// Powers of two above [`EXACT`]: the last bucket ends at 2^36 µs (19 hours); what is longer counts there.
const OCTAVES: usize = 30;
const BUCKETS: usize = EXACT as usize + OCTAVES * STEPS;

/// How long something took, how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    buckets: Box<[u64]>,
    count: u64,
    max_us: u64,
}

impl LatencyHistogram {
    /// An empty histogram (8 KiB).
    #[must_use]
    pub fn new() -> Self {
        Self { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, max_us: 0 }
    }

    /// Counts one latency.
    pub fn record(&mut self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get_mut(bucket_of(us)) {
            *bucket += 1;
        }
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// Counts all that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max_us = self.max_us.max(other.max_us);
    }

    /// How many latencies were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest in microseconds, exactly; `None` when nothing was counted.
    #[must_use]
    pub fn max_us(&self) -> Option<f64> {
        (self.count > 0).then_some(self.max_us as f64)
    }

    /// The latency in microseconds that `percent` (0 to 100) of the counted ones do not exceed;
    /// `None` when nothing was counted.
    #[must_use]
    pub fn percentile_us(&self, percent: f64) -> Option<f64> {
        let wanted = ((percent / 100.0 * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (position, in_bucket) in self.buckets.iter().enumerate() {
            seen += in_bucket;
            if seen >= wanted {
                return Some(middle_us(position).min(self.max_us as f64));
            }
        }
        None
    }
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self::new()
    }
}

fn bucket_of(us: u64) -> usize {
    if us < EXACT {
        return us as usize;
    }
    // `us` has its highest bit at `top` >= 6; the five bits below it choose the step.
    let top = 63 - us.leading_zeros() as usize;
    let octave = top - EXACT.trailing_zeros() as usize;
    let step = (us >> (top - 5)) as usize & (STEPS - 1);
    (EXACT as usize + octave * STEPS + step).min(BUCKETS - 1)
}

fn middle_us(bucket: usize) -> f64 {
    let Some(above) = bucket.checked_sub(EXACT as usize) else {
        return bucket as f64;
    };
    let width = (1u64 << (above / STEPS + 1)) as f64;
    width * (STEPS + above % STEPS) as f64 + (width - 1.0) / 2.0
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_bucket_holds_its_middle() {
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(middle_us(bucket) as u64), bucket);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_close() {
        let mut histogram = LatencyHistogram::new();
        assert_eq!(histogram.percentile_us(50.0), None);
        assert_eq!(histogram.max_us(), None);
        for us in 1..=10_000 {
            histogram.record(Duration::from_micros(us));
        }
        for percent in [1.0, 50.0, 90.0, 99.0] {
            let got = histogram.percentile_us(percent).expect("not empty");
            assert!((got / (percent * 100.0) - 1.0).abs() < 0.017, "p{percent}: {got}");
        }
        assert_eq!(histogram.percentile_us(100.0), Some(10_000.0));
        assert_eq!(histogram.max_us(), Some(10_000.0));
    }

    #[test]
    fn merging_is_counting_both() {
        let (mut a, mut b, mut both) =
            (LatencyHistogram::new(), LatencyHistogram::new(), LatencyHistogram::new());
        for us in [0, 3, 63, 64, 1_000_000, 90_000_000_000] {
            a.record(Duration::from_micros(us));
            both.record(Duration::from_micros(us));
            b.record(Duration::from_micros(us * 2));
            both.record(Duration::from_micros(us * 2));
        }
        a.merge(&b);
        assert_eq!(a, both);
    }
}
