//! Local traffic first: what transit may have of one direction of a link, beside what the host itself sends or receives.
//! Pure.
//!
//! What a host's own traffic wants is not seen while transit fills the link, only what it gets. So some of the link is
//! always left free, more of it where there is more local traffic: that grows into it, which is seen, and makes room for
//! more.

use std::time::Duration;

/// The part of a link's rate that its counters can show: preambles and gaps between frames are not counted.
const COUNTED: f64 = 0.98;

/// What a page byte is on the wire, Ethernet's, IP's and TCP's headers included: 66 bytes for each 1448. Where frames are
/// longer, that takes so little more of what is seen for transit's own.
const HEADERS: f64 = 1.047;

/// What a page byte is in the other direction: one acknowledgement of 66 bytes for two segments.
const ACKNOWLEDGEMENTS: f64 = 0.023;

/// Left free where there is no local traffic, as a part of the link: what somebody who begins is seen by.
const FREE_LEAST: f64 = 1.0 / 32.0;

/// Left free at most. As much as the local traffic is, up to this: it doubles with each look, or gets an eighth of the link
/// more.
const FREE_MOST: f64 = 1.0 / 8.0;

/// What transit may have whatever the host does: pages that lie here are somebody's memory, and are waited for.
const FLOOR: f64 = 1.0 / 32.0;

/// Local traffic that stops is forgotten over such a time, so that what comes in bursts keeps its room.
const FORGET: Duration = Duration::from_secs(1);

/// What passed in one direction, over some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// All bytes that the interface counted.
    pub all_bytes: u64,
    /// Transit's, without headers.
    pub transit_bytes: u64,
    /// Transit's in the other direction, which were acknowledged in this one.
    pub back_bytes: u64,
}

/// Limits transit in one direction of a link.
#[derive(Clone, Debug)]
pub struct LocalFirst {
    link: f64,
    most: Option<u64>,
    local: f64,
}

impl LocalFirst {
    /// On a link that carries so many bytes a second, of which transit may have `most`, whatever the host does (zero is no
    /// limit of the operator's).
    #[must_use]
    pub fn new(link_bytes_per_s: u64, most: u64) -> Self {
        Self { link: link_bytes_per_s.max(1) as f64, most: (most > 0).then_some(most), local: 0.0 }
    }

    /// So much passed in the last `time`.
    pub fn passed(&mut self, time: Duration, passed: Passed) {
        if time.is_zero() {
            return;
        }
        let transit = passed.transit_bytes as f64 * HEADERS + passed.back_bytes as f64 * ACKNOWLEDGEMENTS;
        let local = (passed.all_bytes as f64 - transit).max(0.0) / time.as_secs_f64();
        let forgotten = 1.0 - (-time.as_secs_f64() / FORGET.as_secs_f64()).exp();
        self.local = local.max(self.local + (local - self.local) * forgotten);
    }

    /// The host's own traffic lately, in bytes a second.
    #[must_use]
    pub const fn local_bytes_per_s(&self) -> u64 {
        self.local as u64
    }

    /// What transit may have now, in bytes a second without headers; never zero.
    #[must_use]
    pub fn limit_bytes_per_s(&self) -> u64 {
        let free = self.local.clamp(self.link * FREE_LEAST, self.link * FREE_MOST);
        let left = (self.link * COUNTED - self.local - free) / HEADERS;
        let limit = left.max(self.link * FLOOR).max(1.0) as u64;
        self.most.map_or(limit, |most| limit.min(most))
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const EVERY: Duration = Duration::from_millis(100);

    /// A link on which transit takes all that it may, and the host's own traffic, which is one of `flows` where both want
    /// more than there is, and grows by half between two looks at most.
    struct Link {
        bytes_per_s: f64,
        flows: f64,
        local: f64,
        first: LocalFirst,
    }

    impl Link {
        fn new(bytes_per_s: u64, flows: u32) -> Self {
            let first = LocalFirst::new(bytes_per_s, 0);
            Self { bytes_per_s: bytes_per_s as f64, flows: f64::from(flows), local: 0.0, first }
        }

        /// What each has a second in the end, where the host's traffic wants so much.
        fn run(&mut self, wants: f64, looks: u32) -> (f64, f64) {
            let carries = self.bytes_per_s * COUNTED;
            let mut transit = 0.0;
            for _ in 0..looks {
                transit = self.first.limit_bytes_per_s() as f64 * HEADERS;
                let may = (carries - transit).max(carries / self.flows);
                self.local = wants.min(may).min((self.local * 1.5).max(carries / self.flows));
                transit = transit.min(carries - self.local);
                let in_one = |rate: f64| (rate * EVERY.as_secs_f64()) as u64;
                let (all_bytes, transit_bytes) = (in_one(self.local + transit), in_one(transit / HEADERS));
                self.first.passed(EVERY, Passed { all_bytes, transit_bytes, back_bytes: 0 });
            }
            (self.local, transit)
        }
    }

    #[test]
    fn on_an_idle_host_transit_has_the_link_and_the_operator_the_last_word() {
        let (_, transit) = Link::new(125_000_000, 8).run(0.0, 20);
        assert!(transit > 0.94 * 125e6, "{transit}");
        assert_eq!(LocalFirst::new(125_000_000, 5).limit_bytes_per_s(), 5);
        assert!(LocalFirst::new(0, 0).limit_bytes_per_s() > 0);
    }

    #[test]
    fn what_cannot_be_is_not_believed() {
        let mut first = LocalFirst::new(1_000_000, 0);
        let idle = first.limit_bytes_per_s();
        first.passed(Duration::ZERO, Passed { all_bytes: u64::MAX, ..Passed::default() });
        first.passed(EVERY, Passed { transit_bytes: u64::MAX, back_bytes: u64::MAX, ..Passed::default() });
        assert_eq!((first.local_bytes_per_s(), first.limit_bytes_per_s()), (0, idle));
        // Counters that jump: the floor, and all of it again in time.
        first.passed(EVERY, Passed { all_bytes: 1 << 40, ..Passed::default() });
        assert_eq!(first.limit_bytes_per_s(), 31_250);
        (0..300).for_each(|_| first.passed(EVERY, Passed::default()));
        assert!(first.limit_bytes_per_s() >= idle - 1);
    }

    #[test]
    fn bursts_keep_their_room() {
        let mut first = LocalFirst::new(1_000_000, 0);
        for look in 0..40 {
            let all_bytes = if look % 4 == 0 { 50_000 } else { 0 };
            first.passed(EVERY, Passed { all_bytes, ..Passed::default() });
            assert!(first.limit_bytes_per_s() < 600_000, "{look}: {}", first.limit_bytes_per_s());
        }
    }

    proptest! {
        /// The host's traffic has what it wants within two seconds, but for the floor, and transit most of the rest; and
        /// has it all again when that ends.
        #[test]
        fn local_traffic_has_what_it_wants(
            bytes_per_s in 1_000_000u64..10_000_000_000,
            part in 0.0f64..1.2,
            flows in 2u32..64,
        ) {
            let mut link = Link::new(bytes_per_s, flows);
            link.run(0.0, 10);
            let wants = part * link.bytes_per_s;
            let (local, transit) = link.run(wants, 20);
            let most = link.bytes_per_s * (COUNTED - FLOOR * HEADERS);
            prop_assert!(local >= 0.99 * wants.min(most), "{local} of {wants}");
            let rest = link.bytes_per_s * (COUNTED - FREE_MOST) - local;
            prop_assert!(transit >= 0.99 * rest, "{transit} of {rest}");
            let (_, transit) = link.run(0.0, 80);
            prop_assert!(transit > 0.93 * link.bytes_per_s, "{transit}");
        }
    }
}
