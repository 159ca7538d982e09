//! Finds a bottleneck's rate by queueing delay rather than loss.
//!
//! While a queue stands in front of the bottleneck, what is delivered *is* the bottleneck's rate. So each
//! queue that shows itself is used twice: it says "too fast", and until it is drained it says how fast is right.
//!
//! ```text
//!  Startup --queue--> Measure --long enough--> Drain --empty--> Cruise --calm--> Probe
//!  unpaced              ^                                          |               |
//!                       +-------------------- queue ---------------+---------------+
//! ```
//!
//! Two mistakes would be costly and are guarded against. *Spiralling down*: a late reading looks like a
//! queue, a stalled core like a slow link. So a queue must last to count, an estimate is the largest of the
//! last few measurements, and older ones are dropped only when a second queue shows that they are too large.
//! *Believing a base that moved* (a new route, somebody else's standing queue): a delay that does not
//! shrink although we send less than is delivered is not ours, and becomes the new zero.

mod queue;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use self::queue::Queue;
use super::bucket::{SLICE_TIME, slice_bytes, time_of};

/// Delay beyond a slice's own time that counts as a queue.
const QUEUE_DELAY: Duration = Duration::from_micros(150);

/// The same while unpaced: windows bound the queue there, and a path without a bottleneck (loopback) shows
/// delays of this order from copying alone.
const QUEUE_DELAY_STARTUP: Duration = Duration::from_micros(600);

/// How long a delay lasts, without one low reading in between, and how many readings show it at least,
/// before it is a queue. Where one is to be expected: unpaced, or while probing.
const DETECT: (Duration, u32) = (Duration::from_millis(8), 3);

/// The same at cruising speed. The queue of a rate that is 1 % too high grows by no more than half a
/// millisecond in this time; on a host whose cores are all busy, late readings come many in a row, but not
/// for as long, and each one that is believed would cost 1.5 % of the rate.
const DETECT_CRUISING: (Duration, u32) = (Duration::from_millis(50), 6);

/// A delay of more than this is believed soon, cruising or not: somebody else took a share of the link.
const DELAY_EXCESSIVE: Duration = Duration::from_millis(3);

/// How long a queue is kept to measure by: with acknowledgements in lumps of 64 KiB, 1 % at 1 Gb/s.
const MEASURE_TIME: Duration = Duration::from_millis(40);

/// The least time over which a measurement is used.
const MEASURE_TIME_MIN: Duration = Duration::from_millis(25);

/// A queue longer than this is drained at once, measured or not: draining it takes long enough to measure.
const QUEUE_DELAY_MAX: Duration = Duration::from_millis(2);

/// Drain rates as shares of the measured rate: between these, the longer the queue the lower.
const DRAIN_SHARE: (f64, f64) = (0.6, 0.9);

/// The delay that is drained at the lower of the two.
const DRAIN_DELAY: Duration = Duration::from_millis(20);

/// A drain that moves nothing for this long does not drain our queue.
const DRAIN_STUCK_TIME: Duration = Duration::from_millis(100);

/// The longest drain, whatever moves: windows and send buffers of the unpaced start are drained by then.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

/// Share of the capacity that is used between probes.
const CRUISE_SHARE: f64 = 0.985;

/// Calm time before probing.
const CRUISE_TIME: Duration = Duration::from_millis(250);

/// Time between two steps up.
const PROBE_STEP_TIME: Duration = Duration::from_millis(100);

/// The first step up, what each further one is multiplied by, and the largest: twice the rate is found
/// after about twelve.
const PROBE_STEP: (f64, f64, f64) = (0.006, 1.5, 0.25);

/// Share of the rate that must be delivered for calm to mean anything.
const USED_SHARE: f64 = 0.9;

/// Steps without use after which probing ends.
const PROBE_UNUSED_STEPS: u32 = 5;

/// Measurements of which the largest is the estimate.
const ESTIMATES: usize = 3;

/// Two queues at cruising speed within this time: the estimate is too large.
const REPEAT_TIME: Duration = Duration::from_millis(1_500);

/// What is left of the estimate at least when that happens: a stalled core looks like a slow link too.
const FALL_SHARE_MIN: f64 = 0.8;

/// Share of what was sent that counts as all of it: acknowledgements come in lumps.
const ALL_DELIVERED: f64 = 0.99;

/// What is left of the rate when a queue stands again and again although all is delivered.
const STEP_BACK: f64 = 0.998;

/// A queue with more than one in so many readings limited by the sender is not measured by.
const LIMITED_PARTS: u32 = 5;

/// Weight of one reading in the usual delay of calm times, and how much of it is allowed for.
const USUAL_DELAY: (f64, f64) = (1.0 / 64.0, 2.0);

/// The most that is allowed for: as much of a queue of our own may stand unseen in front of faults. Simulated on a
/// host whose readings are 0.3 ms late on average, 0.2 ms cost 1.8 % of the rate, 0.4 ms 0.5 %, 0.6 ms 0.1 %.
const USUAL_DELAY_MAX: Duration = Duration::from_micros(500);

/// Time over which the delivered rate is taken for everything but capacity, and its longest memory.
const HISTORY_TIME: Duration = Duration::from_millis(500);

/// How many more slices each time covers where a slice of one page takes longer than usual.
const SLICES_PER_TIME: u32 = 20;

/// The lowest rate ever set, in bytes/s: 1 Mb/s. Slower than this nothing could be learned any more.
const RATE_MIN: f64 = 125_000.0;

/// What is measured at one instant of a link, or of several as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes delivered since the beginning.
    pub delivered: u64,
    /// Queueing delay now; `None` when unknown. From the kernel's round trip or from a probe of one's own.
    pub queue_delay: Option<Duration>,
    /// The least round trip: nothing that is changed shows any sooner. Zero when unknown.
    pub base_rtt: Duration,
    /// Less was sent than pacing allowed, for lack of data or because a peer's window was closed.
    pub app_limited: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Startup,
    Measure,
    Drain { since: Instant, stuck: Duration, least: Duration },
    Cruise { since: Instant },
    Probe { step: u32, unused: u32, next_at: Instant },
}

/// Turns readings, one every few milliseconds, into the rate to pace at. Pure: time is an argument.
#[derive(Debug)]
pub struct RateFinder {
    phase: Phase,
    rate: Option<f64>,
    limit: Option<u64>,
    estimates: VecDeque<f64>,
    queue: Option<Queue>,
    /// Since when this cruise is calm, but for queues that went away by themselves.
    calm_since: Option<Instant>,
    /// When a queue last showed at cruising speed.
    cruise_queue_at: Option<Instant>,
    /// Delay that is not ours.
    floor: Duration,
    /// Delay in calm times, in seconds: the time a busy host takes to see an acknowledgement.
    usual_delay: f64,
    base_rtt: Duration,
    history: VecDeque<(Instant, u64)>,
}

impl Default for RateFinder {
    fn default() -> Self {
        Self::new()
    }
}

impl RateFinder {
    /// Knows nothing yet: unpaced until a queue shows.
    #[must_use]
    pub fn new() -> Self {
        Self {
            phase: Phase::Startup,
            rate: None,
            limit: None,
            estimates: VecDeque::with_capacity(ESTIMATES),
            queue: None,
            calm_since: None,
            cruise_queue_at: None,
            floor: Duration::ZERO,
            usual_delay: 0.0,
            base_rtt: Duration::ZERO,
            history: VecDeque::new(),
        }
    }

    /// Bounds the rate to `bytes_per_s` from now on; 0 takes the bound away.
    pub fn set_limit(&mut self, bytes_per_s: u64) {
        self.limit = (bytes_per_s > 0).then_some(bytes_per_s);
    }

    /// The rate to pace at in bytes/s; `None` is unpaced.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        let found = self.rate.map(|rate| rate as u64);
        match (found, self.limit) {
            (Some(found), Some(limit)) => Some(found.min(limit)),
            (found, limit) => found.or(limit),
        }
    }

    /// What the bottleneck is believed to carry in bytes/s, once a queue has shown it.
    #[must_use]
    pub fn capacity(&self) -> Option<u64> {
        self.estimate().map(|rate| rate as u64)
    }

    /// Takes what was measured at `now`; returns the rate to pace at from now on.
    pub fn tick(&mut self, now: Instant, reading: Reading) -> Option<u64> {
        let before = self.history.back().copied().unwrap_or((now, reading.delivered));
        self.remember(now, reading.delivered);
        // The kernel repeats its last round trip while nothing moves; that says nothing about now.
        if reading.delivered > before.1 {
            self.base_rtt = reading.base_rtt;
            if let Some(delay) = reading.queue_delay {
                self.see((now, reading.delivered), delay);
            }
            if let (true, Some(queue)) = (reading.app_limited, &mut self.queue) {
                queue.limited += 1;
            }
        } else if self.delivered_rate(now, self.paced_time(PROBE_STEP_TIME)) == 0.0 {
            self.queue = None;
        }
        match self.phase {
            Phase::Startup => self.startup(),
            Phase::Measure => self.measure(now),
            Phase::Drain { .. } => self.drain(now, now.saturating_duration_since(before.0)),
            Phase::Cruise { since } => self.cruise(now, since),
            Phase::Probe { .. } => self.probe(now),
        }
        self.rate()
    }

    fn startup(&mut self) {
        if self.queue_stands() {
            self.phase = Phase::Measure;
        }
    }

    fn measure(&mut self, now: Instant) {
        let Some(queue) = self.queue else {
            self.start_cruise(now);
            // Gone by itself: no reason to wait again before probing.
            if let (Some(calm_since), Phase::Cruise { since }) = (self.calm_since, &mut self.phase) {
                *since = calm_since;
            }
            return;
        };
        let pace = queue.paced.is_some();
        if queue.time() >= self.paced_time(MEASURE_TIME) || (pace && queue.delay > QUEUE_DELAY_MAX) {
            let measured = queue.rate(self.paced_time(MEASURE_TIME_MIN));
            self.queue = Some(Queue { measured, ..queue });
            self.phase = Phase::Drain { since: now, stuck: Duration::ZERO, least: Duration::MAX };
            return self.drain(now, Duration::ZERO);
        }
        // Keeps the queue as it is: neither longer, for the sake of faults, nor gone before it has told its rate.
        if let (true, Some(rate)) = (pace, queue.rate(self.paced_time(MEASURE_TIME_MIN))) {
            self.set_rate(rate);
        }
    }

    fn drain(&mut self, now: Instant, elapsed: Duration) {
        let Phase::Drain { since, mut stuck, mut least } = self.phase else { return };
        let Some(queue) = self.queue else { return self.start_cruise(now) };
        let measured = queue.rate(self.paced_time(MEASURE_TIME_MIN) / 2);
        let rate = measured.or(queue.paced).or(self.estimate()).unwrap_or(RATE_MIN);
        let share = 1.0 - queue.delay.as_secs_f64() / DRAIN_DELAY.as_secs_f64();
        self.set_rate(rate * share.clamp(DRAIN_SHARE.0, DRAIN_SHARE.1));
        // More is delivered than sent exactly when a queue of ours gets shorter.
        let delivered = self.delivered_rate(now, self.paced_time(MEASURE_TIME));
        if delivered <= self.rate.unwrap_or(f64::MAX) * 1.05 {
            stuck += elapsed;
            least = least.min(queue.delay);
        }
        self.phase = Phase::Drain { since, stuck, least };
        let too_long = now.saturating_duration_since(since) > DRAIN_TIME_MAX + 10 * self.base_rtt;
        if too_long || stuck > self.paced_time(DRAIN_STUCK_TIME) {
            self.floor += if least == Duration::MAX { queue.delay } else { least };
            self.queue_is_over(queue);
            self.start_cruise(now);
        }
    }

    fn cruise(&mut self, now: Instant, since: Instant) {
        self.calm_since = Some(since);
        if self.queue_stands() {
            self.phase = Phase::Measure;
        } else if !self.is_used(now) {
            self.phase = Phase::Cruise { since: now };
        } else if now.saturating_duration_since(since) >= self.paced_time(CRUISE_TIME) {
            self.phase = Phase::Probe { step: 0, unused: 0, next_at: now };
        }
    }

    fn probe(&mut self, now: Instant) {
        let Phase::Probe { step, unused, next_at } = self.phase else { return };
        self.calm_since = None;
        if self.queue_stands() {
            self.phase = Phase::Measure;
            return;
        }
        if now < next_at || self.queue.is_some() {
            return;
        }
        let next_at = now + self.paced_time(PROBE_STEP_TIME);
        if self.is_used(now) {
            let up = (PROBE_STEP.0 * PROBE_STEP.1.powi(step as i32)).min(PROBE_STEP.2);
            if let Some(rate) = self.rate {
                self.set_rate(rate * (1.0 + up));
            }
            self.phase = Phase::Probe { step: step + 1, unused: 0, next_at };
        } else if unused + 1 < PROBE_UNUSED_STEPS {
            self.phase = Phase::Probe { step, unused: unused + 1, next_at };
        } else {
            // Something else is the bound now. What went through without a queue is kept.
            self.raise_estimate(self.delivered_rate(now, HISTORY_TIME));
            self.start_cruise(now);
        }
    }

    fn see(&mut self, present: (Instant, u64), delay: Duration) {
        self.floor = self.floor.min(delay);
        let delay = delay - self.floor;
        let high = self.queue_delay();
        if matches!(self.phase, Phase::Cruise { .. }) {
            let sample = delay.min(high).as_secs_f64();
            self.usual_delay += (sample - self.usual_delay) * USUAL_DELAY.0;
        }
        match &mut self.queue {
            Some(queue) if delay > high / 2 => {
                queue.last = present;
                queue.readings += 1;
                queue.delay = delay;
            }
            Some(queue) => {
                let queue = *queue;
                self.queue_is_over(queue);
            }
            None if delay > high => {
                self.queue = Some(Queue {
                    from: present,
                    last: present,
                    readings: 1,
                    limited: 0,
                    delay,
                    paced: self.rate,
                    cruising: matches!(self.phase, Phase::Cruise { .. }),
                    measured: None,
                });
            }
            None => {}
        }
    }

    /// Takes from a queue that is gone what it has to say.
    fn queue_is_over(&mut self, queue: Queue) {
        self.queue = None;
        match (self.phase, queue.paced) {
            // It went away although we sent on at the same rate: a lump of ours after a late wake-up, or
            // somebody else's. So the link carries more than this rate.
            (Phase::Measure, Some(paced)) if queue.time() < self.paced_time(MEASURE_TIME_MIN) => {
                self.raise_estimate(paced);
            }
            (Phase::Measure | Phase::Drain { .. }, _) => self.learn(&queue),
            _ => {}
        }
    }

    fn learn(&mut self, queue: &Queue) {
        let again = self.cruised_into_queue(queue);
        let Some(mut rate) = queue.rate(self.paced_time(MEASURE_TIME_MIN)) else { return };
        if queue.paced.is_some() && queue.limited * LIMITED_PARTS > queue.readings {
            return;
        }
        // All that was sent was delivered: either the rate is right to within what can be measured, or the
        // queue was none (a busy host sees acknowledgements late). Neither is a reason to fall by a margin.
        if let Some(paced) = queue.paced.filter(|paced| queue.cruising && rate >= *paced * ALL_DELIVERED) {
            let kept = paced / CRUISE_SHARE;
            self.add_estimate(if again { kept * STEP_BACK } else { kept });
            return;
        }
        if again {
            rate = rate.max(self.estimate().unwrap_or(0.0) * FALL_SHARE_MIN);
            // What the earlier of the two queues said is kept: both must be low, not one stalled core.
            self.estimates.drain(..self.estimates.len().saturating_sub(1));
        }
        self.add_estimate(rate);
    }

    /// Whether this queue arose at cruising speed soon after another that did.
    fn cruised_into_queue(&mut self, queue: &Queue) -> bool {
        if !queue.cruising {
            return false;
        }
        let earlier = self.cruise_queue_at.replace(queue.last.0);
        earlier.is_some_and(|at| queue.from.0.saturating_duration_since(at) < self.paced_time(REPEAT_TIME))
    }

    fn start_cruise(&mut self, now: Instant) {
        match self.estimate() {
            Some(estimate) => {
                self.set_rate(estimate * CRUISE_SHARE);
                self.phase = Phase::Cruise { since: now };
            }
            None => {
                self.rate = None;
                self.phase = Phase::Startup;
            }
        }
    }

    fn estimate(&self) -> Option<f64> {
        self.estimates.iter().copied().reduce(f64::max)
    }

    /// Takes a rate that went through without a queue: the estimate is no less.
    fn raise_estimate(&mut self, rate: f64) {
        if self.estimate().is_some_and(|estimate| rate > estimate) {
            self.add_estimate(rate);
        }
    }

    fn add_estimate(&mut self, rate: f64) {
        if self.estimates.len() == ESTIMATES {
            self.estimates.pop_front();
        }
        self.estimates.push_back(rate);
    }

    fn set_rate(&mut self, rate: f64) {
        self.rate = Some(rate.max(RATE_MIN));
    }

    fn queue_stands(&self) -> bool {
        self.queue.is_some_and(|queue| {
            let patient = queue.cruising && queue.delay < DELAY_EXCESSIVE;
            let (time, readings) = if patient { DETECT_CRUISING } else { DETECT };
            queue.readings >= readings && queue.time() >= time + self.base_rtt
        })
    }

    /// The delay from which on a queue is one: beyond what a slice of ours takes by itself.
    fn queue_delay(&self) -> Duration {
        let Some(rate) = self.rate() else { return QUEUE_DELAY_STARTUP + self.base_rtt / 32 };
        let usual = Duration::from_secs_f64(self.usual_delay * USUAL_DELAY.1).min(USUAL_DELAY_MAX);
        QUEUE_DELAY + usual + time_of(slice_bytes(Some(rate)) as f64, rate) + self.base_rtt / 32
    }

    /// A time for short and fast paths, stretched to one on which each change takes a round trip to show, or
    /// each slice so long that few of them would be counted.
    fn paced_time(&self, time: Duration) -> Duration {
        let slice = self.rate().map_or(Duration::ZERO, |rate| time_of(slice_bytes(Some(rate)) as f64, rate));
        time + 4 * self.base_rtt + SLICES_PER_TIME * slice.saturating_sub(SLICE_TIME)
    }

    fn is_used(&self, now: Instant) -> bool {
        let delivered = self.delivered_rate(now, self.paced_time(PROBE_STEP_TIME));
        self.rate.is_some_and(|rate| delivered >= rate * USED_SHARE)
    }

    /// Bytes/s delivered over the last `time`.
    fn delivered_rate(&self, now: Instant, time: Duration) -> f64 {
        let Some(&(_, newest)) = self.history.back() else { return 0.0 };
        let since = self.history.iter().find(|(at, _)| now.saturating_duration_since(*at) <= time);
        match since {
            Some(&(at, bytes)) if at < now => {
                (newest - bytes) as f64 / now.saturating_duration_since(at).as_secs_f64()
            }
            _ => 0.0,
        }
    }

    fn remember(&mut self, now: Instant, delivered: u64) {
        let newest = self.history.back().map_or(0, |(_, bytes)| *bytes);
        self.history.push_back((now, delivered.max(newest)));
        while let Some((at, _)) = self.history.front()
            && now.saturating_duration_since(*at) > self.paced_time(HISTORY_TIME)
        {
            self.history.pop_front();
        }
    }
}
