//! One pacer for all worker threads of a host, which keep to one sum together.
//!
//! At the source links report and get their share of the rate, which their kernel keeps. At the destination what
//! is paced leaves elsewhere, so there they ask before they ask for bytes: credit of the direct path ahead of its
//! time, and with what that leaves reads from intermediaries.
//!
//! Where several such sums share one link (VMs that leave one host), somebody may divide it ([`super::LinkDivision`]): what
//! is granted then takes the place of the rate found here, for as long as the word holds.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::bucket::{SLICE_BYTES_MAX, TokenBucket, bytes_in, slice_bytes, time_of};
use super::delay::{Aggregate, LinkReading, aggregate};
use super::rate::{RateFinder, Reading};
use super::share::{Flow, LEAST, LEAST_BULK, share};

/// Readings closer together than this are taken as one.
const TICK_TIME: Duration = Duration::from_millis(4);

/// How long a link is taken to carry on as before without a word: whoever reads from it sleeps until much is there.
const NOT_TOLD_TIME: Duration = Duration::from_millis(12);

/// How long a link that moved data still has a say in what all links see: one thread that came late must not
/// make another link's own queue look like the shared one's.
const ACTIVE_TIME: Duration = Duration::from_millis(50);

/// How late a thread that waited for the operator's limit asks again, on a busy host.
const LIMITED_TIME: Duration = Duration::from_millis(10);

/// More than one in so many bytes not sent although they might have been is less than pacing allows.
const LOST_PARTS: u64 = 50;

/// The least weight and the largest.
const WEIGHTS: (f64, f64) = (1e-9, 1e15);

/// Waiting threads that are given different times to come back at.
const TURNS_MAX: u32 = 4;

/// Who sends; the order is the priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A page that a guest waits for: never waits, exempt from the operator's limit, but charged to the link.
    Urgent,
    /// The direct path from source to destination.
    Direct,
    /// Intermediaries: only what direct leaves.
    Bulk,
}

/// The answer to [`SharedPacer::acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquire {
    /// Send so many bytes now. At most what was asked for, at least one byte.
    Grant(u64),
    /// Ask again then.
    WaitUntil(Instant),
}

/// A link that reports to a [`SharedPacer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkId(usize);

/// What a pacer tells who divides the host's link among several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// All of its links as one, but for the urgent ones.
    pub paced: LinkReading,
    /// Bytes of the urgent ones that arrived.
    pub urgent_bytes: u64,
}

/// Somebody else's word on what may be sent.
#[derive(Clone, Copy, Debug)]
struct Granted {
    /// Beside what is urgent; `None` while nobody has found it yet.
    bytes_per_s: Option<u64>,
    until: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    earlier: LinkReading,
    present: LinkReading,
    reported_at: Option<Instant>,
    /// When it last moved data.
    active_at: Option<Instant>,
}

#[derive(Debug)]
struct Inner {
    finder: RateFinder,
    /// At the rate found; charged with everything.
    link: TokenBucket,
    /// At the operator's limit; charged with everything but urgent.
    limit: TokenBucket,
    /// Until then somebody waits for the operator's limit.
    limited_until: Instant,
    /// The latest time that was given to a waiting thread.
    promised: Instant,
    links: Vec<Option<Link>>,
    /// One for each of `links`; whoever is gone has none to carry.
    flows: Vec<Flow>,
    /// What of the rate is kept for those that are to grow.
    kept: f64,
    delivered: u64,
    /// Of that, what was urgent.
    delivered_urgent: u64,
    shared: Aggregate,
    /// What was told last: what is told never goes back.
    told: Told,
    granted: Option<Granted>,
    ticked_at: Instant,
    /// Since the last tick somebody asked: threads keep the pace, not the kernel.
    asked: bool,
}

/// Paces the sum of what a host's worker threads send or receive. Cheap to ask: one short lock, never held
/// across input or output.
#[derive(Debug)]
pub struct SharedPacer {
    inner: Mutex<Inner>,
}

impl SharedPacer {
    /// Unpaced until readings show a queue; `limit` in bytes/s holds from the start, 0 is none.
    #[must_use]
    pub fn new(now: Instant, limit: u64) -> Self {
        let limit = (limit > 0).then_some(limit);
        Self {
            inner: Mutex::new(Inner {
                finder: RateFinder::new(),
                link: TokenBucket::new(now, None),
                limit: TokenBucket::new(now, limit),
                limited_until: now,
                promised: now,
                links: Vec::new(),
                flows: Vec::new(),
                kept: LEAST_BULK,
                delivered: 0,
                delivered_urgent: 0,
                shared: Aggregate::default(),
                told: Told::default(),
                granted: None,
                ticked_at: now,
                asked: false,
            }),
        }
    }

    /// The same, with so much of the rate kept for links that are to grow.
    pub(super) fn keeping(now: Instant, kept: f64) -> Self {
        let pacer = Self::new(now, 0);
        pacer.inner.lock().kept = kept;
        pacer
    }

    /// Asks to send `bytes` at `now`. What is granted is charged; what is then not sent is given back by
    /// [`give_back`](Self::give_back), what was sent beyond it is added by [`charge`](Self::charge).
    pub fn acquire(&self, class: Class, bytes: u64, now: Instant) -> Acquire {
        self.inner.lock().acquire(class, bytes, now)
    }

    /// Asks for all of `bytes`, to have them sent by somebody elsewhere who paces itself, up to `ahead` before their
    /// time: whoever asks comes late, and the sender is to have enough until then. Who asks further ahead goes first.
    pub fn acquire_ahead(&self, bytes: u64, ahead: Duration, now: Instant) -> Acquire {
        let mut inner = self.inner.lock();
        inner.asked = true;
        let wait = inner.wait(now).saturating_sub(ahead);
        if wait > Duration::ZERO {
            return Acquire::WaitUntil(now + wait);
        }
        inner.charge(Class::Direct, bytes, now);
        Acquire::Grant(bytes)
    }

    /// Charges bytes that were sent without asking.
    pub fn charge(&self, class: Class, bytes: u64, now: Instant) {
        self.inner.lock().charge(class, bytes, now);
    }

    /// Gives back what was granted and not sent.
    pub fn give_back(&self, class: Class, bytes: u64) {
        let mut inner = self.inner.lock();
        inner.link.give_back(bytes);
        if class != Class::Urgent {
            inner.limit.give_back(bytes);
        }
    }

    /// Bounds direct and bulk, together, to `bytes_per_s` from `now` on; 0 takes the bound away.
    pub fn set_limit(&self, bytes_per_s: u64, now: Instant) {
        self.inner.lock().limit.set_rate(now, (bytes_per_s > 0).then_some(bytes_per_s));
    }

    /// Grants `bytes_per_s` for direct and bulk together, beside what is urgent, until then: it takes the place of the
    /// rate found here, and nothing is looked for meanwhile. `None` is any rate. After that the rate is found here
    /// again, from what was granted on.
    pub fn grant(&self, bytes_per_s: Option<u64>, until: Instant) {
        self.inner.lock().granted = Some(Granted { bytes_per_s, until });
    }

    /// What was measured up to `now`, for who grants.
    #[must_use]
    pub fn tell(&self, now: Instant) -> Told {
        self.inner.lock().tell(now)
    }

    /// How much of what bulk links share is this one's part, beside the others' weights; one where nobody says.
    pub fn set_weight(&self, id: LinkId, weight: f64) {
        if let Some(flow) = self.inner.lock().flows.get_mut(id.0) {
            flow.weight = weight.clamp(WEIGHTS.0, WEIGHTS.1);
        }
    }

    /// Adds a link that will report. Urgent connections are links too: what they carry is part of the sum, and
    /// a sum without it looks like a slower bottleneck. They report no delay: their round trips are too few.
    #[must_use]
    pub fn add_link(&self, class: Class) -> LinkId {
        let mut inner = self.inner.lock();
        let Inner { links, flows, .. } = &mut *inner;
        let free = links.iter().position(Option::is_none).unwrap_or_else(|| {
            links.push(None);
            flows.push(Flow::new(class));
            links.len() - 1
        });
        links[free] = Some(Link::default());
        flows[free] = Flow::new(class);
        LinkId(free)
    }

    /// Forgets a link that was closed.
    pub fn remove_link(&self, id: LinkId) {
        let mut inner = self.inner.lock();
        inner.links[id.0] = None;
        inner.flows[id.0] = Flow::new(Class::Urgent);
    }

    /// Takes what was measured on a link at `now`; a link that carries data reports every 2 to 5 ms. Returns the
    /// link's share in bytes/s, for a sender whose kernel paces; `None` is unpaced.
    pub fn report(&self, id: LinkId, reading: LinkReading, now: Instant) -> Option<u64> {
        self.inner.lock().report(id, reading, now)
    }

    /// The same for a link that has no share: what comes is the peer's to pace, and what is urgent overtakes.
    pub fn observe(&self, id: LinkId, reading: LinkReading, now: Instant) {
        self.inner.lock().report(id, reading, now);
    }

    /// The peer of a link says what it takes now, in bytes/s; `None`: as much as comes.
    pub fn takes(&self, id: LinkId, bytes_per_s: Option<u64>) {
        if let Some(flow) = self.inner.lock().flows.get_mut(id.0) {
            flow.takes = bytes_per_s.map(|rate| rate as f64);
        }
    }

    /// The rate in force in bytes/s, the lower of found and limit; `None` is unpaced.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.inner.lock().rate()
    }

    /// The pace in bytes/s at which to use what is granted up to `ahead` of its time: what urgent links leave of the
    /// rate found, and what was not used yet within `ahead` again. `None` is unpaced.
    #[must_use]
    pub fn pace_ahead(&self, ahead: Duration, now: Instant) -> Option<u64> {
        let mut inner = self.inner.lock();
        let rate = inner.link.rate()? as f64;
        let urgent = inner.flows.iter().filter(|flow| flow.class == Class::Urgent);
        let left = rate - urgent.map(|flow| flow.carries).sum::<f64>();
        let unused = ahead.saturating_sub(inner.link.debt(now)).as_secs_f64() / ahead.as_secs_f64();
        Some((left.max(rate * LEAST) + rate * unused).min(rate) as u64)
    }

    /// What the bottleneck is believed to carry in bytes/s, once it has shown itself.
    #[must_use]
    pub fn capacity(&self) -> Option<u64> {
        self.inner.lock().finder.capacity()
    }

    /// The shared bottleneck's queueing delay as last measured; what a link shows beyond it is
    /// [its own](super::own_delay).
    #[must_use]
    pub fn shared_delay(&self) -> Option<Duration> {
        self.inner.lock().shared.queue_delay
    }
}

impl Inner {
    fn rate(&self) -> Option<u64> {
        match (self.link.rate(), self.limit.rate()) {
            (Some(found), Some(limit)) => Some(found.min(limit)),
            (found, limit) => found.or(limit),
        }
    }

    fn acquire(&mut self, class: Class, bytes: u64, now: Instant) -> Acquire {
        if class == Class::Urgent {
            self.charge(class, bytes, now);
            return Acquire::Grant(bytes);
        }
        self.asked = true;
        let Some(rate) = self.rate() else { return Acquire::Grant(bytes) };
        let slice = slice_bytes(Some(rate));
        let wait = self.wait(now);
        if wait > Duration::ZERO {
            let at = self.turn(now + wait, time_of(slice as f64, rate));
            return Acquire::WaitUntil(at);
        }
        // Whoever comes late finds what gathered meanwhile, and takes it in one call.
        let gathered = self.link.level(now).min(self.limit.level(now)).min(SLICE_BYTES_MAX);
        let granted = bytes.min(slice.max(gathered));
        self.charge(class, granted, now);
        Acquire::Grant(granted)
    }

    /// How long whoever asks has to wait.
    fn wait(&mut self, now: Instant) -> Duration {
        let (link, limit) = (self.link.wait(now), self.limit.wait(now));
        if limit > link {
            self.limited_until = now + limit;
        }
        link.max(limit)
    }

    fn charge(&mut self, class: Class, bytes: u64, now: Instant) {
        self.link.charge(now, bytes);
        if class != Class::Urgent {
            self.limit.charge(now, bytes);
        }
    }

    /// Threads that wait for the same tokens come back one slice apart, not all at once.
    fn turn(&mut self, ready: Instant, slice: Duration) -> Instant {
        let at = ready.max(self.promised).min(ready + TURNS_MAX * slice);
        self.promised = at + slice;
        at
    }

    fn report(&mut self, id: LinkId, reading: LinkReading, now: Instant) -> Option<u64> {
        let link = self.links.get_mut(id.0)?.as_mut()?;
        let moved = reading.delivered.saturating_sub(link.present.delivered);
        link.present = reading;
        match link.reported_at {
            None => {
                link.reported_at = Some(now);
                link.earlier = reading;
            }
            // Over its own time: what a thread that is late has not told is not what the link did not carry.
            Some(at) if moved > 0 || now.saturating_duration_since(at) >= TICK_TIME => {
                self.flows[id.0].carried(moved, now.saturating_duration_since(at));
                link.reported_at = Some(now);
            }
            Some(_) => {}
        }
        if now.saturating_duration_since(self.ticked_at) >= TICK_TIME {
            self.tick(now);
        }
        let share = self.flows[id.0].share;
        (share < f64::MAX).then_some(share as u64)
    }

    /// What links carried since they last told, by what they carried lately. Each tells in its own time, a tick or
    /// three before this one or just now: by what they told alone, 40 ms at one rate look like 36 or 44. Urgent ones
    /// apart, and the others.
    fn not_told(&self, now: Instant) -> (u64, u64) {
        let told = self.links.iter().map(|link| link.and_then(|link| link.reported_at));
        let (mut urgent, mut others) = (0.0, 0.0);
        for (told, flow) in told.zip(&self.flows) {
            let Some(told) = told else { continue };
            let since = now.saturating_duration_since(told).min(NOT_TOLD_TIME);
            let sum = if flow.class == Class::Urgent { &mut urgent } else { &mut others };
            *sum += flow.carries * since.as_secs_f64();
        }
        (urgent as u64, others as u64)
    }

    fn tell(&mut self, now: Instant) -> Told {
        let (urgent, others) = self.not_told(now);
        // No more than may leave: a burst into empty sockets, carried on, would be more than comes in seconds.
        let most = self.link.rate().map_or(0, |rate| bytes_in(rate, NOT_TOLD_TIME));
        let (urgent, others) = (urgent.min(most), others.min(most));
        let paced = self.delivered - self.delivered_urgent + others;
        self.told = Told {
            paced: LinkReading {
                delivered: paced.max(self.told.paced.delivered),
                queue_delay: self.shared.queue_delay,
                base_rtt: self.shared.base_rtt,
                backlogged: self.is_backlogged(),
            },
            urgent_bytes: (self.delivered_urgent + urgent).max(self.told.urgent_bytes),
        };
        self.told
    }

    fn is_backlogged(&self) -> bool {
        self.links.iter().flatten().any(|link| link.present.backlogged)
    }

    /// The rate that was granted, with what is urgent beside it; and the outer `None` where nobody's word holds. When the
    /// last one is over, the rate is found here, from there on.
    fn granted(&mut self, now: Instant) -> Option<Option<u64>> {
        let granted = self.granted?;
        let urgent = self.flows.iter().filter(|flow| flow.class == Class::Urgent);
        let urgent = urgent.map(|flow| flow.carries).sum::<f64>() as u64;
        let rate = granted.bytes_per_s.map(|paced| paced.saturating_add(urgent));
        if now < granted.until {
            return Some(rate);
        }
        self.granted = None;
        self.finder = rate.map_or_else(RateFinder::new, |rate| RateFinder::begin_at(rate, now));
        None
    }

    fn tick(&mut self, now: Instant) {
        self.shared = aggregate(self.links.iter().flatten().map(|link| (link.earlier, link.present)));
        for (link, flow) in self.links.iter_mut().zip(&mut self.flows) {
            let Some(link) = link else { continue };
            if flow.class == Class::Urgent {
                let moved = link.present.delivered.saturating_sub(link.earlier.delivered);
                self.delivered_urgent += moved;
            }
            // A receiver tells of what came, and nothing where nothing does.
            if link.reported_at.is_some_and(|at| now.saturating_duration_since(at) >= ACTIVE_TIME) {
                flow.carried(0, now.saturating_duration_since(self.ticked_at));
            }
            if link.present.delivered > link.earlier.delivered {
                link.active_at = Some(now);
            } else if link.active_at.is_some_and(|at| now.saturating_duration_since(at) < ACTIVE_TIME)
                && let (Some(least), Some(delay)) = (self.shared.queue_delay, link.present.queue_delay)
            {
                self.shared.queue_delay = Some(least.min(delay));
            }
            link.earlier = link.present;
        }
        self.delivered += self.shared.moved;
        // The link's tokens ran over: nobody had data, or came too late, or the operator's limit is the lower.
        let lost = self.link.take_lost(now) > self.shared.moved / LOST_PARTS;
        let app_limited = if self.asked { lost } else { !self.is_backlogged() };
        // The limit is what paces: a delay is not the doing of what we send, and what is delivered says nothing of
        // the link. A finder that measured by it would take the limit, and then less and less, for the link.
        let limited = if self.asked {
            now < self.limited_until + LIMITED_TIME
        } else {
            self.limit.rate().is_some_and(|limit| self.link.rate().is_none_or(|found| limit < found))
        };
        self.asked = false;
        let queue_delay = self.shared.queue_delay.map(|delay| if limited { Duration::ZERO } else { delay });
        let (urgent, others) = self.not_told(now);
        let delivered = self.delivered + urgent + others;
        let reading = Reading {
            delivered,
            queue_delay,
            base_rtt: self.shared.base_rtt,
            app_limited: app_limited || limited,
        };
        let rate = self.granted(now).unwrap_or_else(|| self.finder.tick(now, reading));
        self.ticked_at = now;
        tracing::trace!(
            moved = self.shared.moved,
            delivered,
            delay = ?self.shared.queue_delay,
            rate,
            capacity = self.finder.capacity(),
            "pace"
        );
        self.link.set_rate(now, rate);
        match self.rate() {
            Some(rate) => share(rate as f64, self.kept, &mut self.flows),
            None => self.flows.iter_mut().for_each(|flow| flow.share = f64::MAX),
        }
    }
}

#[cfg(test)]
mod test;
