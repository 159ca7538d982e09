//! One rate shared over the links of a host. Pure: what each link carried comes in, what each may
//! carry comes out.
//!
//! A thread that wakes late cannot keep a link busy; the kernel's timers can. So a sender's threads fill
//! their sockets some milliseconds ahead, and the kernel spreads each socket's bytes over time at the
//! share given here. The shares add up to the rate: the queue at the bottleneck stays as empty as if
//! one thread, never late, had paced them all.

use std::time::Duration;

use super::shared::Class;

/// Over what time it is learned what a link carries that goes before others: they give way that fast.
const CARRIES_TIME_FIRST: Duration = Duration::from_millis(24);

/// The same of bulk links: a thread that was late for once has no slow link.
const CARRIES_TIME_BULK: Duration = Duration::from_millis(100);

/// How much more than it carried a link may carry next that something else held back: it may grow, but
/// not flood the others.
const GROWTH: f64 = 1.35;

/// A link that carries less than this of its share is held back by something else: what it does not take
/// goes to others.
const USED: f64 = 0.75;

/// Over what time it is learned how much a peer takes of what it says that it takes: longer than the pieces in which a
/// kernel sends at a low pace are apart.
const FOLLOWS_TIME: Duration = Duration::from_millis(100);

/// The share of the rate that direct may carry at least, to grow from nothing.
pub(super) const LEAST: f64 = 0.02;

/// The same for all bulk links together. It is part of the sum: beside a destination that takes all, 2 % for each link
/// were rate that nobody had found, and stood as a queue in front of faults. And what goes to intermediaries by it, though
/// the destination would take it, comes there when the source has evicted, and so makes a migration longer.
pub(super) const LEAST_BULK: f64 = 0.005;

/// One link, as far as sharing goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub class: Class,
    /// Bytes/s carried lately.
    pub carries: f64,
    /// Bytes/s that it may carry.
    pub share: f64,
    /// Bytes/s that the peer says it takes now, where it says so.
    pub takes: Option<f64>,
    /// Of bulk: how much of what is shared is its part, beside the others' weights.
    pub weight: f64,
    /// The means of what was carried and of what the peer said meanwhile.
    followed: (f64, f64),
}

impl Flow {
    pub fn new(class: Class) -> Self {
        Self { class, carries: 0.0, share: f64::MAX, takes: None, weight: 1.0, followed: (0.0, 0.0) }
    }

    /// Whether something else holds it back, and it gets no more than `each` if it grows.
    fn is_content(&self, each: f64, least: f64) -> bool {
        self.share < f64::MAX && self.carries < self.share * USED && self.grown(least) <= each
    }

    fn grown(&self, least: f64) -> f64 {
        if self.share == f64::MAX { f64::MAX } else { (self.carries * GROWTH).max(least) }
    }

    /// Takes what was carried in the last `elapsed`.
    pub fn carried(&mut self, bytes: u64, elapsed: Duration) {
        let time = if self.class == Class::Bulk { CARRIES_TIME_BULK } else { CARRIES_TIME_FIRST };
        let (elapsed, time) = (elapsed.as_secs_f64(), time.as_secs_f64());
        if elapsed <= 0.0 {
            return;
        }
        let now = bytes as f64 / elapsed;
        // The first word on a link is all there is to go by.
        let weight = if self.carries == 0.0 { 1.0 } else { elapsed / (elapsed + time) };
        self.carries += (now - self.carries) * weight;
        if let Some(takes) = self.takes {
            let weight = elapsed / (elapsed + FOLLOWS_TIME.as_secs_f64());
            self.followed.0 += (now - self.followed.0) * weight;
            self.followed.1 += (takes - self.followed.1) * weight;
        }
    }

    /// Bytes/s that it is about to carry: what the peer says it takes, as far as that held lately. `None` where nothing
    /// is said, or it does not hold.
    fn about_to_carry(&self) -> Option<f64> {
        let (carried, said) = self.followed;
        let held = (carried / said).min(1.0);
        self.takes.filter(|_| held >= USED).map(|takes| takes * held)
    }
}

/// Gives each flow its share of `rate` bytes/s: urgent ones take what they need, direct goes before
/// bulk, and may have at once what nobody carries, and what its peer says it takes; bulk is shared by weight among those
/// that take it. So much of the rate is kept for bulk to grow ([`LEAST_BULK`]).
pub(super) fn share(rate: f64, kept: f64, flows: &mut [Flow]) {
    let (least, kept) = (rate * LEAST, rate * kept);
    let weights: f64 = flows.iter().filter(|flow| flow.class == Class::Bulk).map(|flow| flow.weight).sum();
    let (kept, least_bulk) = if weights > 0.0 { (kept, kept / weights) } else { (0.0, kept) };
    let mut left = rate - kept;
    for flow in flows.iter_mut().filter(|flow| flow.class == Class::Urgent) {
        left -= flow.carries;
        flow.share = f64::MAX;
    }
    let bulk: f64 = flows.iter().filter(|flow| flow.class == Class::Bulk).map(|flow| flow.carries).sum();
    for flow in flows.iter_mut().filter(|flow| flow.class == Class::Direct) {
        let soon = flow.about_to_carry();
        // Who takes what it said has no need to grow from what it carried while it took less.
        let takes = flow.takes.filter(|_| soon.is_some()).unwrap_or(0.0);
        flow.share = flow.grown(least).max(left + kept - bulk).max(takes).min(left.max(least));
        left -= soon.unwrap_or(flow.carries).min(flow.share);
    }
    share_alike(left + kept, least_bulk, flows);
}

/// Shares `left` among bulk flows: those that something else holds back leave what they do not carry to the
/// others, who get by their weights. `least` is kept for a weight of one.
fn share_alike(left: f64, least: f64, flows: &mut [Flow]) {
    // What a weight of one gets.
    let mut each = f64::MAX;
    // Falls with each flow that would take more than its fair part, until none is left that would.
    loop {
        let (mut carried, mut weights) = (0.0, 0.0);
        for flow in flows.iter().filter(|flow| flow.class == Class::Bulk) {
            if flow.is_content(each * flow.weight, least * flow.weight) {
                carried += flow.carries;
            } else {
                weights += flow.weight;
            }
        }
        if weights == 0.0 {
            return let_grow(left, least, flows);
        }
        let next = (left - carried).max(0.0) / weights;
        if next >= each {
            break;
        }
        each = next;
    }
    for flow in flows.iter_mut().filter(|flow| flow.class == Class::Bulk) {
        let (part, least) = (each.max(least) * flow.weight, least * flow.weight);
        flow.share = if flow.is_content(part, least) { flow.grown(least) } else { part };
    }
}

/// Shares `left` among bulk flows that are all held back by something else: what nobody takes is theirs to grow.
fn let_grow(left: f64, least: f64, flows: &mut [Flow]) {
    let bulk = || flows.iter().filter(|flow| flow.class == Class::Bulk);
    let weights: f64 = bulk().map(|flow| flow.weight).sum();
    let grown: f64 = bulk().map(|flow| flow.grown(least * flow.weight)).sum();
    for flow in flows.iter_mut().filter(|flow| flow.class == Class::Bulk) {
        let least = least * flow.weight;
        let own = flow.grown(least);
        flow.share = if grown <= left {
            own + (left - grown) * flow.weight / weights
        } else {
            (own * left / grown).max(least)
        };
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const RATE: f64 = 100e6;
    const TICK: Duration = Duration::from_millis(4);

    /// Lets flows, each with what it would carry if it could, run until their shares settle.
    fn settle(wants: &[(Class, f64)]) -> Vec<Flow> {
        let mut flows: Vec<Flow> = wants.iter().map(|(class, _)| Flow::new(*class)).collect();
        for _ in 0..1_000 {
            share(RATE, LEAST_BULK, &mut flows);
            for (flow, (_, wants)) in flows.iter_mut().zip(wants) {
                let carries = flow.share.min(*wants).min(2.0 * RATE);
                flow.carried((carries * TICK.as_secs_f64()) as u64, TICK);
            }
        }
        flows
    }

    fn near(got: f64, want: f64) -> bool {
        (got - want).abs() < RATE / 100.0
    }

    #[test]
    fn bulk_is_shared_alike_and_adds_up() {
        let flows = settle(&[(Class::Bulk, f64::MAX), (Class::Bulk, f64::MAX), (Class::Urgent, 10e6)]);
        assert!(near(flows[0].share, 45e6) && near(flows[1].share, 45e6), "{flows:?}");
    }

    #[test]
    fn direct_goes_first_and_bulk_takes_what_it_leaves() {
        let flows = settle(&[(Class::Direct, 30e6), (Class::Bulk, f64::MAX), (Class::Bulk, f64::MAX)]);
        assert!(near(flows[0].carries, 30e6), "{flows:?}");
        assert!(near(flows[1].carries, 35e6) && near(flows[2].carries, 35e6), "{flows:?}");
        let flows = settle(&[(Class::Direct, f64::MAX), (Class::Bulk, f64::MAX)]);
        assert!(flows[0].carries > 0.97 * RATE, "{flows:?}");
    }

    #[test]
    fn what_is_kept_for_growth_is_part_of_the_sum() {
        for bulk in 1..8 {
            let mut wants = vec![(Class::Direct, f64::MAX), (Class::Urgent, 5e6)];
            wants.extend((0..bulk).map(|_| (Class::Bulk, f64::MAX)));
            let flows = settle(&wants);
            let carried: f64 = flows.iter().map(|flow| flow.carries).sum();
            assert!(carried < 1.002 * RATE, "{bulk} intermediaries: {carried}, {flows:?}");
            assert!(flows[0].carries > 0.92 * RATE, "{flows:?}");
            assert!(flows[2..].iter().all(|flow| flow.share > 0.0), "{flows:?}");
        }
    }

    #[test]
    fn direct_takes_up_at_once_what_faults_leave() {
        // Of a paced connection with a short round trip the kernel sends so much at once (`tcp_tso_rtt_log`): at a low
        // share one piece in many readings, by which a share does not grow.
        const PIECE_BYTES: f64 = 65_536.0;
        const SLOW: f64 = RATE / 4.0;
        let mut flows = [Flow::new(Class::Direct), Flow::new(Class::Urgent)];
        let mut gathered = 0.0;
        let mut run = |urgent: f64, ticks: u32| {
            for _ in 0..ticks {
                share(SLOW, LEAST_BULK, &mut flows);
                gathered += flows[0].share * TICK.as_secs_f64();
                let pieces = (gathered / PIECE_BYTES).floor() * PIECE_BYTES;
                gathered -= pieces;
                flows[0].carried(pieces as u64, TICK);
                flows[1].carried((urgent * TICK.as_secs_f64()) as u64, TICK);
            }
            flows[0].share
        };
        let beside = run(SLOW, 1000);
        assert!(beside < SLOW / 20.0, "{beside}");
        let after = run(0.4 * SLOW, 50);
        assert!(after > 0.55 * SLOW, "{after}");
    }

    /// A peer whose port faults fill and leave by turns, beside intermediaries that take all: what is carried of a port, and
    /// the largest sum of shares that are used.
    fn in_waves(told: bool) -> (f64, f64) {
        const PORT: f64 = RATE / 4.0;
        let mut flows = [Flow::new(Class::Direct), Flow::new(Class::Bulk), Flow::new(Class::Bulk)];
        let (mut carried, mut left, mut most) = (0.0, 0.0, 0.0f64);
        for tick in 0..2_000 {
            // 100 ms each: so that growing by a third in 24 ms is too late.
            let takes = if tick / 25 % 2 == 0 { PORT } else { PORT / 10.0 };
            flows[0].takes = told.then_some(takes);
            share(RATE, LEAST_BULK, &mut flows);
            let used = [flows[0].share.min(takes), flows[1].share, flows[2].share];
            for (flow, used) in flows.iter_mut().zip(used) {
                flow.carried((used.min(2.0 * RATE) * TICK.as_secs_f64()) as u64, TICK);
            }
            if tick >= 500 {
                (carried, left) = (carried + used[0], left + takes);
                most = most.max(used.iter().sum());
            }
        }
        (carried / left, most)
    }

    #[test]
    fn direct_takes_up_what_its_peer_says_it_takes() {
        let (carried, most) = in_waves(true);
        assert!(carried > 0.99 && most < 1.01 * RATE, "{carried} of what the peer takes, {most}");
        let (untold, _) = in_waves(false);
        assert!(untold < carried - 0.1, "{untold}: this test shows nothing");
    }

    #[test]
    fn a_peer_that_takes_less_than_it_says_leaves_the_rest_to_others() {
        let mut flows = [Flow::new(Class::Direct), Flow::new(Class::Bulk)];
        for stalls in [false, true] {
            for _ in 0..500 {
                flows[0].takes = Some(RATE / 2.0);
                share(RATE, LEAST_BULK, &mut flows);
                let direct = if stalls { 0.0 } else { flows[0].share.min(RATE / 2.0) };
                let used = [direct, flows[1].share];
                for (flow, used) in flows.iter_mut().zip(used) {
                    flow.carried((used.min(2.0 * RATE) * TICK.as_secs_f64()) as u64, TICK);
                }
            }
            let bulk = if stalls { RATE } else { RATE / 2.0 };
            assert!(near(flows[1].share, bulk), "{flows:?}");
        }
    }

    #[test]
    fn nothing_of_the_rate_is_lost_at_the_start() {
        // Before there are shares all links have what they can get beside each other. Who finds the rate takes a link that
        // is not used for one that has no more.
        for port in [RATE / 10.0, RATE / 4.0, RATE] {
            let mut flows = [Flow::new(Class::Direct), Flow::new(Class::Bulk), Flow::new(Class::Bulk)];
            for (flow, part) in flows.iter_mut().zip([0.1, 0.45, 0.45]) {
                flow.carried((part * RATE * TICK.as_secs_f64()) as u64, TICK);
            }
            for tick in 0..100 {
                share(RATE, LEAST_BULK, &mut flows);
                let used = [flows[0].share.min(port), flows[1].share, flows[2].share];
                let sum: f64 = used.iter().sum();
                assert!(sum > 0.97 * RATE, "{tick}: {sum}, port {port}");
                for (flow, used) in flows.iter_mut().zip(used) {
                    flow.carried((used.min(2.0 * RATE) * TICK.as_secs_f64()) as u64, TICK);
                }
            }
            assert!(flows[0].carries > 0.97 * port, "port {port}: {flows:?}");
        }
    }

    #[test]
    fn what_a_slow_path_leaves_goes_to_the_others() {
        let flows = settle(&[(Class::Bulk, 10e6), (Class::Bulk, f64::MAX), (Class::Bulk, f64::MAX)]);
        assert!(near(flows[0].carries, 10e6), "{flows:?}");
        assert!(near(flows[1].carries, 45e6) && near(flows[2].carries, 45e6), "{flows:?}");
    }

    #[test]
    fn a_path_that_recovers_gets_its_share_back() {
        let mut flows = settle(&[(Class::Bulk, 5e6), (Class::Bulk, f64::MAX)]);
        for _ in 0..1_000 {
            share(RATE, LEAST_BULK, &mut flows);
            for flow in &mut flows {
                flow.carried((flow.share * TICK.as_secs_f64()) as u64, TICK);
            }
        }
        assert!(near(flows[0].share, 50e6), "{flows:?}");
    }

    #[test]
    fn a_late_word_is_not_a_slow_path() {
        let mut flows = settle(&[(Class::Bulk, f64::MAX), (Class::Bulk, f64::MAX)]);
        let late = 8 * TICK;
        let bytes = (flows[0].share * late.as_secs_f64()) as u64;
        flows[0].carried(bytes, late);
        share(RATE, LEAST_BULK, &mut flows);
        assert!(near(flows[0].share, 50e6), "{flows:?}");
    }

    proptest! {
        /// Whatever each path takes: what they carry adds up to the rate, or to all that they take.
        #[test]
        fn nothing_is_wasted_and_nothing_flooded(
            direct in 0.0f64..150e6,
            bulk in proptest::collection::vec(0.1e6f64..150e6, 1..8),
        ) {
            let mut wants = vec![(Class::Direct, direct)];
            wants.extend(bulk.iter().map(|wants| (Class::Bulk, *wants)));
            let carried: f64 = settle(&wants).iter().map(|flow| flow.carries).sum();
            let most = RATE.min(direct + bulk.iter().sum::<f64>());
            prop_assert!(carried > 0.74 * most && carried < 1.25 * most, "{carried} of {most}");
        }
    }
}
