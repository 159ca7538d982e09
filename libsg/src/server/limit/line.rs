//! Who is next, of the connections that wait for bytes of one limit: pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::pace::{self, TokenBucket};

/// Urgent slices in a row while bulk waits. Behind them bulk has one: who asks for everything as if a guest waited for it
/// stops nobody else.
const URGENT_RUN: u32 = 15;

/// The least slice of what is urgent: a page with all that is about it goes in one piece.
const URGENT_SLICE_BYTES: u64 = 16 << 10;

/// What bytes are for; the order is the priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::server) enum Class {
    /// A page that a guest waits for, and answers that carry no pages.
    Urgent,
    /// Pages that nobody waits for.
    Bulk,
    /// What is handed to others before we go: behind all that others read.
    HandedOver,
}

/// How many classes there are.
const CLASSES: usize = 3;

/// Connections that share a limit. Of each class those that wait have as many bytes each, whenever and in what pieces they
/// ask: a connection's next slice begins where its last one ended, and the one with the earliest beginning is next
/// (start-time fair queueing). Who did not wait saves nothing up.
#[derive(Debug)]
pub(super) struct Line {
    bucket: TokenBucket,
    seats: BTreeMap<u64, Seat>,
    /// Class, beginning, number: the first is next.
    waiting: BTreeSet<(Class, u64, u64)>,
    /// Where the slice began that was given out last, of each class.
    clocks: [u64; CLASSES],
    urgent_run: u32,
    moved: u64,
    next: u64,
}

/// A connection.
#[derive(Debug)]
struct Seat {
    /// Where its last slice ended, of each class.
    ends: [u64; CLASSES],
    class: Class,
    wanted: u64,
    granted: u64,
}

impl Line {
    /// With so many bytes a second for all; `None` is no limit.
    pub(super) fn new(now: Instant, rate: Option<u64>) -> Self {
        Self {
            bucket: TokenBucket::new(now, rate),
            seats: BTreeMap::new(),
            waiting: BTreeSet::new(),
            clocks: [0; CLASSES],
            urgent_run: 0,
            moved: 0,
            next: 0,
        }
    }

    /// One more connection; its number.
    pub(super) fn join(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.seats.insert(number, Seat { ends: [0; CLASSES], class: Class::Bulk, wanted: 0, granted: 0 });
        number
    }

    /// It is gone, and what it did not take is the others'.
    pub(super) fn leave(&mut self, number: u64) {
        self.waiting.retain(|(_, _, other)| *other != number);
        if let Some(seat) = self.seats.remove(&number) {
            self.bucket.give_back(seat.granted);
        }
    }

    /// Whether there is no limit: then so many bytes move at once, and nobody need ask.
    pub(super) fn passes(&mut self, bytes: u64) -> bool {
        let unlimited = self.bucket.rate().is_none();
        self.moved += if unlimited { bytes } else { 0 };
        unlimited
    }

    /// A connection asks for some of so many bytes. One that waits, or has what it asked for before, goes on with that.
    pub(super) fn ask(&mut self, number: u64, class: Class, bytes: u64) {
        let Some(seat) = self.seats.get_mut(&number) else { return };
        if seat.wanted > 0 || seat.granted > 0 {
            return;
        }
        (seat.class, seat.wanted) = (class, bytes);
        let begins = seat.ends[class as usize].max(self.clocks[class as usize]);
        self.waiting.insert((class, begins, number));
    }

    /// Gives out what there is now, and names who has it.
    pub(super) fn serve(&mut self, now: Instant, mut served: impl FnMut(u64)) {
        while !self.waiting.is_empty() && self.bucket.wait(now).is_zero() {
            let Some(first) = self.pick() else { return };
            let (class, begins, number) = first;
            self.waiting.remove(&first);
            let slice =
                if class == Class::Urgent { self.slice().max(URGENT_SLICE_BYTES) } else { self.slice() };
            let Some(seat) = self.seats.get_mut(&number) else { continue };
            seat.granted = seat.wanted.min(slice);
            seat.wanted = 0;
            self.bucket.charge(now, seat.granted);
            seat.ends[class as usize] = begins + seat.granted;
            self.clocks[class as usize] = begins;
            served(number);
        }
    }

    fn pick(&mut self) -> Option<(Class, u64, u64)> {
        let first = *self.waiting.first()?;
        let bulk = self.waiting.range((Class::Bulk, 0, 0)..).next().copied();
        match bulk {
            Some(bulk) if first.0 == Class::Urgent && self.urgent_run >= URGENT_RUN => {
                self.urgent_run = 0;
                Some(bulk)
            }
            Some(_) if first.0 == Class::Urgent => {
                self.urgent_run += 1;
                Some(first)
            }
            _ => {
                self.urgent_run = 0;
                Some(first)
            }
        }
    }

    fn slice(&self) -> u64 {
        self.bucket.rate().map_or(u64::MAX, |rate| pace::slice_bytes(Some(rate)))
    }

    /// What a connection was given, once.
    pub(super) fn take(&mut self, number: u64) -> Option<u64> {
        let seat = self.seats.get_mut(&number)?;
        self.moved += seat.granted;
        (seat.granted > 0).then(|| std::mem::take(&mut seat.granted))
    }

    /// What all together were given, and did not give back.
    pub(super) const fn moved(&self) -> u64 {
        self.moved
    }

    /// How long until a connection that waits is next, if nobody comes who goes before it.
    pub(super) fn wait(&mut self, number: u64, now: Instant) -> Duration {
        let ahead = self.waiting.iter().take_while(|(_, _, other)| *other != number).count() as u64;
        let wait = self.bucket.wait(now);
        let slice = self.slice();
        wait + self.bucket.rate().map_or(Duration::ZERO, |rate| pace::time_of((ahead * slice) as f64, rate))
    }

    /// Of what a connection took, so many bytes did not move.
    pub(super) fn give_back(&mut self, number: u64, bytes: u64) {
        self.bucket.give_back(bytes);
        self.moved = self.moved.saturating_sub(bytes);
        if let Some(seat) = self.seats.get_mut(&number) {
            let end = &mut seat.ends[seat.class as usize];
            *end = end.saturating_sub(bytes);
        }
    }

    /// How fast it is, `None` where nobody waits.
    pub(super) fn rate(&self) -> Option<u64> {
        self.bucket.rate()
    }

    /// Another rate from now on, `None` for none.
    pub(super) fn set_rate(&mut self, now: Instant, rate: Option<u64>) {
        self.bucket.set_rate(now, rate);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that fails shall say where")]
mod test {
    use proptest::prelude::*;

    use super::*;

    const RATE: u64 = 50_000_000;

    /// Serves for as long as `bytes` take; what each of `count` connections had. Each asks again the moment that it was
    /// served, for what `wants` says, and gives `unused` of it back.
    fn served(line: &mut Line, asks: &[(Class, u64, u64)], bytes: u64) -> Vec<u64> {
        let numbers: Vec<u64> = asks.iter().map(|_| line.join()).collect();
        let (mut now, mut had) = (Instant::now(), vec![0; asks.len()]);
        let mut left = bytes;
        while left > 0 {
            for (number, (class, wants, _)) in numbers.iter().zip(asks) {
                line.ask(*number, *class, *wants);
            }
            line.serve(now, |_| {});
            for ((number, (.., unused)), had) in numbers.iter().zip(asks).zip(&mut had) {
                let Some(got) = line.take(*number) else { continue };
                let unused = (*unused).min(got - 1);
                line.give_back(*number, unused);
                *had += got - unused;
                left = left.saturating_sub(got - unused);
            }
            now += Duration::from_micros(20);
        }
        had
    }

    /// Without the burst that a bucket begins with, of which each has what it asks for.
    fn line() -> Line {
        let mut line = Line::new(Instant::now(), Some(RATE));
        let burst = line.bucket.level(Instant::now());
        line.bucket.charge(Instant::now(), burst);
        line
    }

    #[test]
    fn who_came_late_is_served_like_the_others_and_not_before() {
        let mut line = line();
        let first = served(&mut line, &[(Class::Bulk, 1 << 20, 0)], 1 << 20);
        assert!(first[0] >= 1 << 20);
        let had = served(&mut line, &[(Class::Bulk, 1 << 20, 0); 2], 1 << 20);
        assert!(had[0].abs_diff(had[1]) <= 2 * pace::slice_bytes(Some(RATE)), "{had:?}");
    }

    #[test]
    fn urgent_bytes_go_first_and_bulk_does_not_stand_still() {
        let asks = [(Class::Bulk, 1 << 20, 0), (Class::Bulk, 1 << 20, 0), (Class::Urgent, 1 << 20, 0)];
        let had = served(&mut line(), &asks, 8 << 20);
        assert!(had[2] > 7 * (had[0] + had[1]), "{had:?}");
        assert!(had[2] < 40 * (had[0] + had[1]) && had[0].abs_diff(had[1]) <= 1 << 16, "{had:?}");
    }

    #[test]
    fn what_is_handed_over_has_what_others_leave() {
        let slow = (Class::HandedOver, 1 << 20, 0);
        let had = served(&mut line(), &[(Class::Bulk, 1 << 20, 0), slow], 4 << 20);
        assert!(had[0] > 0 && had[1] <= pace::slice_bytes(Some(RATE)), "{had:?}");
        assert!(served(&mut line(), &[slow], 4 << 20)[0] >= 4 << 20);
    }

    #[test]
    fn who_leaves_holds_nobody_up() {
        let mut line = line();
        let now = Instant::now();
        let numbers: Vec<u64> = (0..3).map(|_| line.join()).collect();
        numbers.iter().for_each(|number| line.ask(*number, Class::Bulk, 1 << 20));
        // The first has what it asked for and did not take it, the second waits.
        line.bucket.charge(now, 1 << 20);
        line.leave(numbers[1]);
        let mut served = Vec::new();
        line.serve(now + Duration::from_secs(1), |number| served.push(number));
        assert_eq!(served, [numbers[0], numbers[2]]);
        line.leave(numbers[0]);
        assert_eq!(line.take(numbers[0]), None);
        assert_eq!(line.take(numbers[2]), Some(pace::slice_bytes(Some(RATE))));
        assert!(line.waiting.is_empty() && line.seats.len() == 1);
    }

    #[test]
    fn without_a_limit_all_is_there_at_once() {
        let mut line = Line::new(Instant::now(), Some(1));
        let now = Instant::now();
        let numbers: Vec<u64> = (0..9).map(|_| line.join()).collect();
        numbers.iter().for_each(|number| line.ask(*number, Class::Bulk, 1 << 20));
        line.serve(now, |_| {});
        line.set_rate(now, None);
        line.serve(now, |_| {});
        let had: u64 = numbers.iter().filter_map(|number| line.take(*number)).sum();
        assert!(had > 7 << 20, "two had a burst: {had}");
    }

    proptest! {
        /// In whatever pieces connections ask, and whatever part of it they use, each has as much as any other.
        #[test]
        fn everybody_has_as_much(
            asks in proptest::collection::vec((5_000u64..400_000, 0u64..4_000), 2..12),
        ) {
            let slice = pace::slice_bytes(Some(RATE));
            let asks: Vec<_> = asks.into_iter().map(|(wants, unused)| (Class::Bulk, wants, unused)).collect();
            let had = served(&mut line(), &asks, 4 << 20);
            let (least, most) = (had.iter().min().unwrap(), had.iter().max().unwrap());
            prop_assert!(most - least <= 2 * slice, "{had:?}");
        }

        /// Together no more than the rate, one burst and one slice beyond it, whoever is in line.
        #[test]
        fn the_limit_holds(count in 1usize..20, steps in proptest::collection::vec(0u64..3_000, 1..200)) {
            let start = Instant::now();
            let mut line = Line::new(start, Some(RATE));
            let numbers: Vec<u64> = (0..count).map(|_| line.join()).collect();
            let (mut now, mut had) = (start, 0);
            for step in steps {
                now += Duration::from_micros(step);
                numbers.iter().for_each(|number| line.ask(*number, Class::Bulk, 1 << 20));
                line.serve(now, |_| {});
                had += numbers.iter().filter_map(|number| line.take(*number)).sum::<u64>();
                let burst = RATE as f64 * 0.003 + 2.0 * pace::slice_bytes(Some(RATE)) as f64;
                let most = RATE as f64 * (now - start).as_secs_f64() + burst;
                prop_assert!(had as f64 <= most, "{had} > {most}");
            }
        }
    }
}
