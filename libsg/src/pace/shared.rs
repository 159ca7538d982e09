//! One pacer for all worker threads of a host, which keep to one sum together.
//!
//! At the source links report and get their share of the rate, which their kernel keeps. At the destination what
//! is paced leaves elsewhere, so there they ask before they ask for bytes: credit of the direct path ahead of its
//! time, and with what that leaves reads from intermediaries.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::bucket::{SLICE_BYTES_MAX, TokenBucket, slice_bytes, time_of};
use super::delay::{Aggregate, LinkReading, aggregate};
use super::rate::{RateFinder, Reading};
use super::share::{Flow, share};

/// Readings closer together than this are taken as one.
const TICK_TIME: Duration = Duration::from_millis(4);

/// How long a link that moved data still has a say in what all links see: one thread that came late must not
/// make another link's own queue look like the shared one's.
const ACTIVE_TIME: Duration = Duration::from_millis(50);

/// How late a thread that waited for the operator's limit asks again, on a busy host.
const LIMITED_TIME: Duration = Duration::from_millis(10);

/// More than one in so many bytes not sent although they might have been is less than pacing allows.
const LOST_PARTS: u64 = 50;

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
    delivered: u64,
    shared: Aggregate,
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
                delivered: 0,
                shared: Aggregate::default(),
                ticked_at: now,
                asked: false,
            }),
        }
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

    /// The rate in force in bytes/s, the lower of found and limit; `None` is unpaced.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.inner.lock().rate()
    }

    /// The rate found in bytes/s, whatever the limit; `None` is unpaced.
    #[must_use]
    pub fn link_rate(&self) -> Option<u64> {
        self.inner.lock().link.rate()
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

    fn tick(&mut self, now: Instant) {
        self.shared = aggregate(self.links.iter().flatten().map(|link| (link.earlier, link.present)));
        for (link, flow) in self.links.iter_mut().zip(&mut self.flows) {
            let Some(link) = link else { continue };
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
        let app_limited =
            if self.asked { lost } else { !self.links.iter().flatten().any(|link| link.present.backlogged) };
        // The limit is what paces: a delay is not the doing of what we send, and what is delivered says nothing of
        // the link. A finder that measured by it would take the limit, and then less and less, for the link.
        let limited = if self.asked {
            now < self.limited_until + LIMITED_TIME
        } else {
            self.limit.rate().is_some_and(|limit| self.link.rate().is_none_or(|found| limit < found))
        };
        self.asked = false;
        let queue_delay = self.shared.queue_delay.map(|delay| if limited { Duration::ZERO } else { delay });
        let rate = self.finder.tick(
            now,
            Reading {
                delivered: self.delivered,
                queue_delay,
                base_rtt: self.shared.base_rtt,
                app_limited: app_limited || limited,
            },
        );
        self.ticked_at = now;
        tracing::trace!(
            moved = self.shared.moved,
            delay = ?self.shared.queue_delay,
            rate,
            capacity = self.finder.capacity(),
            "pace"
        );
        self.link.set_rate(now, rate);
        match self.rate() {
            Some(rate) => share(rate as f64, &mut self.flows),
            None => self.flows.iter_mut().for_each(|flow| flow.share = f64::MAX),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const LIMIT: u64 = 100_000_000;

    /// Drives takers for a second of made-up time; returns what each was granted.
    fn run(
        pacer: &SharedPacer,
        start: Instant,
        takers: &[Class],
        busy: impl Fn(Class, Duration) -> bool,
    ) -> Vec<u64> {
        let mut granted = vec![0; takers.len()];
        let mut next = vec![start; takers.len()];
        let mut now = start;
        while now < start + Duration::from_secs(1) {
            for (taker, class) in takers.iter().enumerate() {
                if next[taker] > now || !busy(*class, now - start) {
                    continue;
                }
                match pacer.acquire(*class, 64 << 10, now) {
                    Acquire::Grant(bytes) => granted[taker] += bytes,
                    Acquire::WaitUntil(at) => next[taker] = at,
                }
            }
            now += Duration::from_micros(10);
        }
        granted
    }

    #[test]
    fn those_who_ask_alike_get_alike() {
        let start = Instant::now();
        let pacer = SharedPacer::new(start, LIMIT);
        let got = run(&pacer, start, &[Class::Bulk, Class::Bulk], |_, _| true);
        assert!(got.iter().sum::<u64>() as f64 > 0.98 * LIMIT as f64, "{got:?}");
        assert!(got.iter().sum::<u64>() as f64 <= 1.005 * LIMIT as f64, "{got:?}");
        assert!(got[0].abs_diff(got[1]) < LIMIT / 10, "{got:?}");
    }

    #[test]
    fn credit_ahead_of_its_time_keeps_to_the_rate_however_late_it_is_asked_for() {
        const AHEAD: Duration = Duration::from_millis(16);
        let start = Instant::now();
        let pacer = SharedPacer::new(start, LIMIT);
        let (mut now, mut granted) = (start, 0);
        for step in 0..200 {
            while let Acquire::Grant(bytes) = pacer.acquire_ahead(100_000, AHEAD, now) {
                granted += bytes;
            }
            assert!(matches!(pacer.acquire(Class::Bulk, 4096, now), Acquire::WaitUntil(_)));
            now += Duration::from_millis(1 + step % 15);
        }
        let time = (now - start).as_secs_f64();
        let most = LIMIT as f64 * (time + 0.022);
        assert!(granted as f64 > 0.995 * LIMIT as f64 * time && (granted as f64) < most, "{granted} {time}");
    }

    #[test]
    fn urgent_never_waits_and_is_exempt_from_the_limit() {
        let start = Instant::now();
        let pacer = SharedPacer::new(start, 1_000_000);
        for _ in 0..1_000 {
            assert_eq!(pacer.acquire(Class::Urgent, 4096, start), Acquire::Grant(4096));
        }
        assert_eq!(pacer.acquire(Class::Direct, 4096, start), Acquire::Grant(4096));
    }

    #[test]
    fn whoever_has_nothing_to_tell_leaves_its_share() {
        let start = Instant::now();
        let pacer = SharedPacer::new(start, LIMIT);
        let (direct, bulk) = (pacer.add_link(Class::Direct), pacer.add_link(Class::Bulk));
        let (mut now, mut came, mut share) = (start, [0_u64; 2], None);
        let mut step = |direct_comes: bool| {
            now += Duration::from_millis(4);
            let reading = |delivered| LinkReading { delivered, ..LinkReading::default() };
            if direct_comes {
                came[0] += LIMIT / 250;
                pacer.observe(direct, reading(came[0]), now);
            }
            came[1] += share.unwrap_or(LIMIT).min(LIMIT) / 250;
            share = pacer.report(bulk, reading(came[1]), now);
            share.unwrap_or(u64::MAX)
        };
        let beside = (0..250).map(|_| step(true)).last();
        assert!(beside.is_some_and(|share| share < LIMIT / 20), "{beside:?}");
        let alone = (0..250).map(|_| step(false)).last();
        assert!(alone.is_some_and(|share| share > LIMIT - LIMIT / 20), "{alone:?}");
    }

    #[test]
    fn a_limit_holds_from_now_on_and_can_be_lifted() {
        let start = Instant::now();
        let pacer = SharedPacer::new(start, 0);
        assert_eq!(pacer.acquire(Class::Bulk, 1 << 30, start), Acquire::Grant(1 << 30));
        pacer.set_limit(32_000_000, start);
        assert_eq!(pacer.rate(), Some(32_000_000));
        let got = run(&pacer, start, &[Class::Bulk], |_, _| true);
        assert!(got[0] > 31_500_000 && got[0] < 32_300_000, "{got:?}");
        pacer.set_limit(0, start + Duration::from_secs(1));
        assert_eq!(pacer.rate(), None);
    }

    #[test]
    fn a_queue_that_all_links_see_sets_the_rate_and_one_that_one_sees_does_not() {
        let start = Instant::now();
        let (shared, own) = (SharedPacer::new(start, 0), SharedPacer::new(start, 0));
        for (pacer, second) in [(&shared, 5_000), (&own, 0)] {
            let links = [pacer.add_link(Class::Bulk), pacer.add_link(Class::Bulk)];
            for step in 0..40 {
                let now = start + step as u32 * Duration::from_millis(5);
                for (link, delay_us) in links.iter().zip([5_000, second]) {
                    let reading = LinkReading {
                        delivered: step * 300_000,
                        queue_delay: Some(Duration::from_micros(delay_us)),
                        base_rtt: Duration::from_micros(50),
                        backlogged: true,
                    };
                    pacer.observe(*link, reading, now);
                }
            }
        }
        let rate = shared.rate().unwrap();
        assert!(rate > 50_000_000 && rate < 120_000_000, "{rate}");
        assert_eq!(own.rate(), None);
        assert_eq!(own.shared_delay(), Some(Duration::ZERO));
    }

    #[test]
    fn a_limit_is_not_taken_for_what_the_link_carries() {
        const LOW: u64 = 2_500_000;
        let start = Instant::now();
        let pacer = SharedPacer::new(start, LOW);
        let link = pacer.add_link(Class::Bulk);
        let (mut now, mut next, mut delivered) = (start, start, 0);
        // Half a minute on a busy host: now and then readings are late for a while, whatever is sent.
        for step in 0..15_000_u32 {
            now += Duration::from_millis(2);
            while next <= now {
                match pacer.acquire(Class::Bulk, 4096, now) {
                    Acquire::Grant(bytes) => delivered += bytes,
                    Acquire::WaitUntil(at) => next = at,
                }
            }
            let late = step % 150 < 40;
            let queue_delay = Some(Duration::from_micros(if late { 3_500 } else { 20 }));
            pacer.report(
                link,
                LinkReading { delivered, queue_delay, base_rtt: Duration::from_micros(50), backlogged: true },
                now,
            );
        }
        let carried = (now - start).as_secs_f64() * LOW as f64;
        assert!(delivered as f64 > 0.9 * carried, "{delivered} of {carried}, {:?}", pacer.link_rate());
        pacer.set_limit(0, now);
        assert_eq!(pacer.rate(), None, "nothing but the limit was in the way");
    }

    #[test]
    fn removed_links_are_reused_and_ignored() {
        let now = Instant::now();
        let pacer = SharedPacer::new(now, 0);
        let first = pacer.add_link(Class::Bulk);
        pacer.remove_link(first);
        pacer.observe(first, LinkReading::default(), now);
        assert_eq!(pacer.add_link(Class::Bulk), first);
    }
}
