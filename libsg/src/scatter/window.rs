//! How many bytes a sink may have unacknowledged: enough to keep its path busy, so few that a peer
//! that stops holds little. Pure; time comes in.

use std::time::{Duration, Instant};

/// The window of a fresh path.
const START_BYTES: usize = 256 << 10;

/// The window of the fastest path: 40 Gb/s at 1 ms.
const MAX_BYTES: usize = 4 << 20;

/// What the window holds of a path's rate. The time between two acknowledgements of a busy peer.
const HOLDS: Duration = Duration::from_millis(40);

/// How often the rate is looked at.
const EVERY: Duration = Duration::from_millis(10);

/// The longest that a sink sleeps with nothing to do: how late it may notice a batch that is late.
const IDLE: Duration = Duration::from_millis(20);

/// The same while pages flow: pacing lives on fresh readings.
const BUSY: Duration = Duration::from_millis(4);

/// The longest that a sink sleeps, with batches under way or without.
#[must_use]
pub const fn nap(under_way: bool) -> Duration {
    if under_way { BUSY } else { IDLE }
}

/// A window that follows the rate at which a path acknowledges.
#[derive(Debug)]
pub struct Window {
    bytes: usize,
    acked: u64,
    since: Instant,
}

impl Window {
    /// The window of a fresh path.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { bytes: START_BYTES, acked: 0, since: now }
    }

    /// So many bytes were acknowledged.
    pub fn acknowledged(&mut self, bytes: usize, now: Instant) {
        self.acked += bytes as u64;
        let time = now.saturating_duration_since(self.since);
        if time < EVERY {
            return;
        }
        let held = (self.acked as f64 / time.as_secs_f64() * HOLDS.as_secs_f64()) as usize;
        // Falls slowly: a pause of the peer is not its rate.
        self.bytes = held.max(self.bytes * 3 / 4).clamp(START_BYTES, MAX_BYTES);
        (self.acked, self.since) = (0, now);
    }

    /// Bytes that may be unacknowledged.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Smoothed time between handing out a batch and its acknowledgement; late is a few of these.
#[derive(Debug, Default)]
pub struct AckTime {
    smoothed: Option<Duration>,
}

/// A batch is not late before this: a peer's thread may wait that long for a processor.
const LATE_MIN: Duration = Duration::from_millis(80);

/// Nor is it on time after this, however slow its path.
const LATE_MAX: Duration = Duration::from_secs(2);

impl AckTime {
    /// An acknowledgement took this long.
    pub fn took(&mut self, time: Duration) {
        self.smoothed = Some(self.smoothed.map_or(time, |before| (before * 7 + time) / 8));
    }

    /// After how long a batch is late.
    #[must_use]
    pub fn late(&self) -> Duration {
        (self.smoothed.unwrap_or(LATE_MIN) * 4).clamp(LATE_MIN, LATE_MAX)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_window_follows_the_path() {
        let start = Instant::now();
        let mut window = Window::new(start);
        assert_eq!(window.bytes(), START_BYTES);
        // 1 Gb/s: 125 kB each ms.
        for ms in 1..=100 {
            window.acknowledged(125_000, start + Duration::from_millis(ms));
        }
        assert!((3_000_000..=MAX_BYTES).contains(&window.bytes()), "{}", window.bytes());
        for ms in 101..=2000 {
            window.acknowledged(1000, start + Duration::from_millis(ms));
        }
        assert_eq!(window.bytes(), START_BYTES);
    }

    #[test]
    fn late_is_a_few_acknowledgement_times_within_bounds() {
        let mut time = AckTime::default();
        assert_eq!(time.late(), LATE_MIN * 4);
        (0..100).for_each(|_| time.took(Duration::from_micros(500)));
        assert_eq!(time.late(), LATE_MIN);
        (0..100).for_each(|_| time.took(Duration::from_millis(50)));
        assert!(time.late() > Duration::from_millis(190));
        (0..100).for_each(|_| time.took(Duration::from_secs(50)));
        assert_eq!(time.late(), LATE_MAX);
    }
}
