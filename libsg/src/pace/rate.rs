//! Finds a bottleneck's rate by queueing delay rather than loss.
//!
//! While a queue stands in front of the bottleneck, what is delivered *is* the bottleneck's rate. So each
//! queue that shows itself is used twice: it says "too fast", and until it is drained it says how fast is right.
//!
//! ```text
//!  Startup --queue--> Measure --long enough--> Drain --unseen--> Settle --empty--> Cruise --calm--> Probe
//!  unpaced              ^                                                            |               |
//!                       +----------------------------- queue ------------------------+---------------+
//! ```
//!
//! Two mistakes would be costly and are guarded against. *Spiralling down*: a late reading looks like a
//! queue, a stalled core like a slow link. So a queue must last to count, an estimate is the largest of the
//! last few measurements, and older ones are dropped only when a second queue shows that they are too large.
//! *Believing a base that moved* (a new route, somebody else's standing queue): a delay that does not
//! shrink although we send less than is delivered is not ours, and becomes the new zero.

mod constants;
mod queue;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use self::constants::*;
use self::queue::Queue;
use super::bucket::{SLICE_TIME, slice_bytes, time_of};

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
    Measure {
        /// The step of the probe that a queue ended: if it goes away by itself, the probe goes on.
        probed: Option<u32>,
    },
    Drain {
        since: Instant,
        stuck: Duration,
        least: Duration,
    },
    /// The rest of the queue, too short to be told from late readings, goes too: at cruising speed, which is just under
    /// the bottleneck's, it would stand in front of faults for most of the time to the next probe.
    Settle {
        until: Instant,
    },
    Cruise {
        since: Instant,
    },
    Probe {
        step: u32,
        unused: u32,
        next_at: Instant,
    },
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
    /// No queue of a paced sender has been measured yet.
    young: bool,
    /// Probes in turn that found what was known.
    confirmed: u32,
    /// Whether less was sent lately than allowed, 0 to 1.
    limited: f64,
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
            young: true,
            confirmed: 0,
            limited: 0.0,
            history: VecDeque::new(),
        }
    }

    /// Knows from somebody else what the link carried: goes on from there, and soon looks whether it carries more.
    #[must_use]
    pub fn begin_at(bytes_per_s: u64, now: Instant) -> Self {
        let mut finder = Self::new();
        finder.add_estimate(bytes_per_s as f64 / CRUISE_SHARE);
        finder.start_cruise(now);
        finder
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
        let delivered = reading.delivered.max(before.1);
        self.remember(now, delivered);
        // The kernel repeats its last round trip while nothing moves; that says nothing about now.
        if delivered > before.1 {
            self.base_rtt = reading.base_rtt;
            if let Some(delay) = reading.queue_delay {
                self.see((now, delivered), delay);
            }
            if let (true, Some(queue)) = (reading.app_limited, &mut self.queue) {
                queue.limited += 1;
            }
        } else if self.delivered_rate(now, self.paced_time(PROBE_STEP_TIME)) == 0.0 {
            self.queue = None;
        }
        self.forget_silent(now);
        self.limited += (f64::from(u8::from(reading.app_limited)) - self.limited) * LIMITED.0;
        match self.phase {
            Phase::Startup => self.startup(),
            Phase::Measure { probed } => self.measure(now, probed),
            Phase::Drain { .. } => self.drain(now, now.saturating_duration_since(before.0)),
            Phase::Settle { until } if now < until => {}
            Phase::Settle { .. } => self.start_cruise(now),
            Phase::Cruise { since } => self.cruise(now, since),
            Phase::Probe { .. } => self.probe(now),
        }
        self.rate()
    }

    fn startup(&mut self) {
        if self.queue_stands() {
            self.phase = Phase::Measure { probed: None };
        }
    }

    fn measure(&mut self, now: Instant, probed: Option<u32>) {
        let Some(queue) = self.queue else {
            if let Some(step) = probed {
                let next_at = now + self.paced_time(PROBE_STEP_TIME);
                self.phase = Phase::Probe { step, unused: 0, next_at };
                return;
            }
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
            self.queue.iter_mut().for_each(|queue| queue.measured = measured);
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
        let Some(queue) = self.queue else { return self.settle(now) };
        // Whoever told of it sends no more, and others took its place: at this rate it is gone by now.
        let gone = queue.delay.div_f64(1.0 - DRAIN_SHARE.1) + self.base_rtt;
        if now.saturating_duration_since(queue.last.0) > gone.max(self.paced_time(MEASURE_TIME_MIN)) {
            self.queue_is_over(queue, now);
            return self.start_cruise(now);
        }
        let measured = queue.rate(self.paced_time(MEASURE_TIME_MIN) / 2);
        let rate = measured.or(queue.paced).or(self.estimate()).unwrap_or(RATE_MIN);
        // Little was delivered because a host stalled, more often than because the link became slow.
        let rate = rate.max(self.estimate().unwrap_or(0.0) * FALL_SHARE_MIN);
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
            self.queue_is_over(queue, now);
            self.start_cruise(now);
        }
    }

    fn settle(&mut self, now: Instant) {
        let Some(estimate) = self.estimate() else { return self.start_cruise(now) };
        let unseen = self.calm_delay();
        self.set_rate(estimate * DRAIN_SHARE.1);
        self.phase = Phase::Settle { until: now + unseen.div_f64(1.0 - DRAIN_SHARE.1) };
    }

    fn cruise(&mut self, now: Instant, since: Instant) {
        self.calm_since = Some(since);
        self.keep_what_was_carried(now);
        if self.queue_stands() {
            self.phase = Phase::Measure { probed: None };
        } else if !self.is_used(now) {
            self.look_below_floor(now);
            self.phase = Phase::Cruise { since: now };
        } else {
            let (time, step) = if self.young { YOUNG } else { (CRUISE_TIME * 2u32.pow(self.confirmed), 0) };
            if now.saturating_duration_since(since) >= self.paced_time(time) {
                self.phase = Phase::Probe { step, unused: 0, next_at: now };
            }
        }
    }

    /// A link that carried more, for long, carries more than was believed: what is urgent is not held to the rate.
    fn keep_what_was_carried(&mut self, now: Instant) {
        let since = self.history.front().map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at));
        if since >= HISTORY_TIME {
            let carried = self.delivered_rate(now, self.paced_time(HISTORY_TIME));
            if self.estimate().is_some_and(|estimate| carried > estimate * CARRIED_MORE) {
                self.raise_estimate(carried);
                self.set_rate(self.rate.unwrap_or(0.0).max(carried * CRUISE_SHARE));
            }
        }
    }

    /// The rate cannot be reached, though there is enough to send: the delay that was taken for somebody else's is a
    /// queue of ours, which windows keep from growing.
    fn look_below_floor(&mut self, now: Instant) {
        let delivered = self.delivered_rate(now, self.paced_time(PROBE_STEP_TIME));
        let stuck = self.rate.is_some_and(|rate| delivered < rate * STUCK_SHARE);
        if stuck && self.limited < LIMITED.1 {
            self.floor = Duration::ZERO;
        }
    }

    fn probe(&mut self, now: Instant) {
        let Phase::Probe { step, unused, next_at } = self.phase else { return };
        self.calm_since = None;
        self.keep_what_was_carried(now);
        if self.queue_stands() {
            self.phase = Phase::Measure { probed: Some(step) };
            return;
        }
        if now < next_at || self.queue.is_some() {
            return;
        }
        let next_at = now + self.paced_time(PROBE_STEP_TIME);
        self.look_below_floor(now);
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
        let calm = self.calm_delay();
        // What stood before it was last heard of need not be what stands now, nor was it there in between.
        self.queue = self.queue.filter(|queue| !self.is_silent(queue, present.0));
        match &mut self.queue {
            Some(queue) if delay > calm => queue.stands(present, delay),
            Some(queue) => {
                let queue = *queue;
                self.queue_is_over(queue, present.0);
            }
            None if delay > high => {
                let cruising = matches!(self.phase, Phase::Cruise { .. });
                self.queue = Some(Queue::new(present, delay, self.rate, cruising));
            }
            None => {}
        }
    }

    fn is_silent(&self, queue: &Queue, now: Instant) -> bool {
        now.saturating_duration_since(queue.last.0) > self.paced_time(MEASURE_TIME_MIN)
    }

    /// Whoever told of a queue sends no more, and what is urgent goes on without a word of delays: what stood need not
    /// stand, and is not waited for. A drain looks after its own.
    fn forget_silent(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Drain { .. }) {
            self.queue = self.queue.filter(|queue| !self.is_silent(queue, now));
        }
    }

    /// Takes from a queue that is gone what it has to say.
    fn queue_is_over(&mut self, queue: Queue, now: Instant) {
        self.queue = None;
        match (self.phase, queue.paced) {
            // It went away although we sent on at the same rate: a lump of ours after a late wake-up, or
            // somebody else's. So the link carries more than this rate, as far as this rate was carried: what a
            // bottleneck lets through at once hides the first of a probe's excess.
            (Phase::Measure { .. }, Some(paced)) if queue.time() < self.paced_time(MEASURE_TIME_MIN) => {
                self.raise_estimate(paced.min(self.delivered_rate(now, HISTORY_TIME / 2)));
            }
            (Phase::Measure { .. }, _) => {
                self.phase = Phase::Measure { probed: None };
                self.learn(&queue);
            }
            (Phase::Drain { .. }, _) => self.learn(&queue),
            _ => {}
        }
    }

    fn learn(&mut self, queue: &Queue) {
        self.young &= queue.paced.is_none();
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
        let near = self.estimate().is_some_and(|estimate| (rate / estimate - 1.0).abs() < CONFIRMED.0);
        self.confirmed = if near && !queue.cruising { (self.confirmed + 1).min(CONFIRMED.1) } else { 0 };
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

    /// The delay down to which it is still there: half of that, but more than calm times show. A sender's piece may take
    /// half a millisecond of a slow port by itself, and waiting for less would drain for ever.
    fn calm_delay(&self) -> Duration {
        let usual = Duration::from_secs_f64(self.usual_delay).min(USUAL_DELAY_MAX) + QUEUE_DELAY / 2;
        let high = self.queue_delay();
        usual.clamp(high / 2, high)
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
        self.history.push_back((now, delivered));
        while let Some((at, _)) = self.history.front()
            && now.saturating_duration_since(*at) > self.paced_time(HISTORY_TIME)
        {
            self.history.pop_front();
        }
    }
}
