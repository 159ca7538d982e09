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
    line: Line,
}

impl Queue {
    /// A queue that shows for the first time.
    pub fn new(present: (Instant, u64), delay: Duration, paced: Option<f64>, cruising: bool) -> Self {
        let line = Line::default();
        Self {
            from: present,
            last: present,
            readings: 1,
            limited: 0,
            delay,
            paced,
            cruising,
            measured: None,
            line,
        }
    }

    /// Takes a further reading that shows it.
    pub fn stands(&mut self, present: (Instant, u64), delay: Duration) {
        self.last = present;
        self.readings += 1;
        self.delay = delay;
        self.line.add(
            present.0.saturating_duration_since(self.from.0).as_secs_f64(),
            present.1.saturating_sub(self.from.1) as f64,
        );
    }

    pub fn time(&self) -> Duration {
        self.last.0.saturating_duration_since(self.from.0)
    }

    /// Bytes/s delivered while it stood, if that was long enough to say.
    pub fn rate(&self, at_least: Duration) -> Option<f64> {
        if self.measured.is_some() {
            return self.measured;
        }
        let time = self.time();
        if time < at_least {
            return None;
        }
        // Unpaced, at the start of everything, threads stall and catch up: both say too much then, each elsewhere.
        let most = self.paced.unwrap_or((self.last.1 - self.from.1) as f64 / time.as_secs_f64());
        self.line.slope().map(|rate| rate.min(most)).filter(|rate| *rate > 0.0)
    }
}

/// The line through what was delivered by when (least squares). What arrives is told in lumps of up to 64 KiB, and
/// a queue's first reading is a late one more often than not: between its ends alone it would look too fast.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    count: f64,
    time: f64,
    bytes: f64,
    time_squared: f64,
    time_bytes: f64,
}

impl Line {
    fn add(&mut self, time: f64, bytes: f64) {
        self.count += 1.0;
        self.time += time;
        self.bytes += bytes;
        self.time_squared += time * time;
        self.time_bytes += time * bytes;
    }

    fn slope(&self) -> Option<f64> {
        let spread = self.count * self.time_squared - self.time * self.time;
        (spread > 0.0).then(|| (self.count * self.time_bytes - self.time * self.bytes) / spread)
    }
}
