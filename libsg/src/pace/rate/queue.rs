//! A queue in front of the bottleneck, as readings show it.

use std::time::{Duration, Instant};

/// A queue that stands, from the first reading that shows it to the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub from: (Instant, u64),
    pub last: (Instant, u64),
    pub readings: u32,
    /// Readings at which less was sent than allowed: what was delivered says little then.
    pub limited: u32,
    pub delay: Duration,
    /// The rate under which it arose; `None` is unpaced.
    pub paced: Option<f64>,
    pub cruising: bool,
    /// The rate as it was when draining began: the end of the queue is seen late, and then counts too much.
    pub measured: Option<f64>,
}

impl Queue {
    pub fn time(&self) -> Duration {
        self.last.0.saturating_duration_since(self.from.0)
    }

    /// Bytes/s delivered while it stood, if that was long enough to say.
    pub fn rate(&self, at_least: Duration) -> Option<f64> {
        if self.measured.is_some() {
            return self.measured;
        }
        let time = self.time();
        let rate = (self.last.1 - self.from.1) as f64 / time.as_secs_f64();
        (time >= at_least && rate > 0.0).then(|| rate.min(self.paced.unwrap_or(f64::MAX)))
    }
}
