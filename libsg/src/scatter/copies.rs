//! Where the copies of a batch go: to members that live and have room, in zones of which none has it yet where there are
//! such, and of these to those that have the least under way, and so take them at their own pace. A pure core, [`choose`], and the books that it reads.
//!
//! A copy that a member did not take is a matter between the two: the batch goes elsewhere, and the first holder tries
//! that member again after a while. When that has failed a few times, it counts as one that is not there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ids::{MemberIndex, MemberSet};
use crate::wire::Missing;

/// After the first copy that failed, a member is tried again after so long, then after twice as long, and so on.
const REST_FIRST: Duration = Duration::from_millis(250);
const REST_MAX: Duration = Duration::from_secs(8);

/// Who is to rest for so long counts as one that is not there: it failed for the third time, each time for as long as
/// a first holder waits. Before that, batches wait for it.
const OUT_FROM: Duration = Duration::from_secs(1);

/// A member without room is asked again after so long.
const FULL_REST: Duration = Duration::from_millis(500);

/// How a member stands to the first holder of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// It is not asked before.
    rests_until: Option<Instant>,
    /// How long it rests when a copy fails again; `None` while none does.
    rest: Option<Duration>,
    /// Batches of this first holder under way to it.
    batches: u32,
}

/// Who may get a copy, as the first holder of a batch sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Whether it lives, as far as is known.
    pub alive: bool,
    /// Whether it has the VM's state, and may have pages.
    pub open: bool,
    /// The number of its zone; one that names none is a zone of its own.
    pub zone: Option<u16>,
    /// Bytes of copies under way to it, from everybody.
    pub under_way: u64,
    /// How it stands to the first holder.
    pub standing: Standing,
}

impl Candidate {
    /// Whether it is left alone now.
    fn rests(&self, now: Instant) -> bool {
        self.standing.rests_until.is_some_and(|until| now < until)
    }

    /// Whether copies failed there again and again, and it rests, or is just tried again.
    fn is_out(&self, now: Instant) -> bool {
        let failed = self.standing.rest.is_some_and(|rest| rest >= OUT_FROM);
        failed && (self.rests(now) || self.standing.batches > 0)
    }
}

/// Who gets copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// These, beside the first holder; with fewer than are wanted, no more are alive.
    Take(MemberSet),
    /// Nobody now: the batch waits.
    Wait,
}

/// Who gets the copies of a batch that `first` gets, of so many members, which `of` tells. `holders` are wanted in all,
/// `first` among them, or as many as live.
#[must_use]
pub fn choose(
    first: MemberIndex,
    holders: usize,
    members: usize,
    of: impl Fn(MemberIndex) -> Candidate,
    now: Instant,
) -> Choice {
    let others = MemberSet::first(members).without(first);
    let living: MemberSet = others.iter().filter(|at| of(*at).alive && !of(*at).is_out(now)).collect();
    let mut able: MemberSet = living.iter().filter(|at| of(*at).open && !of(*at).rests(now)).collect();
    let wanted = holders.saturating_sub(1).min(living.len());
    let mut taken = MemberSet::of(first);
    while taken.len() <= wanted {
        let shares_a_zone = |at: MemberIndex| {
            of(at).zone.is_some_and(|zone| taken.iter().any(|holder| of(holder).zone == Some(zone)))
        };
        // Of those that have as much under way, the next in turn.
        let turn = |at: MemberIndex| (at.as_usize() + members - first.as_usize()) % members;
        let next = able.iter().min_by_key(|at| (shares_a_zone(*at), of(*at).under_way, turn(*at)));
        let Some(next) = next else { return Choice::Wait };
        able = able.without(next);
        taken = taken.with(next);
    }
    Choice::Take(taken.without(first))
}

/// The books of all members.
#[derive(Debug)]
pub struct CopyDesk {
    holders: usize,
    books: Mutex<Books>,
    told: AtomicBool,
}

#[derive(Debug, Default)]
struct Books {
    open: MemberSet,
    /// Those that came later and were never open: nothing lies there.
    joining: MemberSet,
    /// When the last one that came later was opened.
    opened: Option<Instant>,
    under_way: Vec<u64>,
    /// By member: a position in `zone_names`.
    zones: Vec<Option<u16>>,
    zone_names: Vec<String>,
    /// By first holder, then by member.
    standings: Vec<Vec<Standing>>,
}

impl Books {
    fn add(&mut self) {
        self.under_way.push(0);
        self.zones.push(None);
        let members = self.under_way.len();
        self.standings.push(Vec::new());
        self.standings.iter_mut().for_each(|row| row.resize(members, Standing::default()));
    }
}

impl CopyDesk {
    /// For pages that each lie at so many of so many members.
    #[must_use]
    pub fn new(holders: usize, members: usize) -> Self {
        let mut books = Books::default();
        (0..members).for_each(|_| books.add());
        Self { holders, books: Mutex::new(books), told: AtomicBool::new(false) }
    }

    /// One more member, in the place of one that died: until it is open it counts as one that is not there.
    pub fn add(&self) {
        let mut books = self.books.lock();
        let member = MemberIndex(books.under_way.len() as u16);
        books.joining = books.joining.with(member);
        books.add();
    }

    /// A member is in this zone.
    pub fn set_zone(&self, member: MemberIndex, name: &str) {
        let mut books = self.books.lock();
        let known = books.zone_names.iter().position(|known| known == name);
        let zone = known.unwrap_or(books.zone_names.len());
        if known.is_none() {
            books.zone_names.push(name.into());
        }
        if let Some(of) = books.zones.get_mut(member.as_usize()) {
            *of = Some(zone as u16);
        }
    }

    /// How many members shall hold each page.
    #[must_use]
    pub const fn holders(&self) -> usize {
        self.holders
    }

    /// A member has all that it was sent beside pages, and may have these. Whether it is one that came later, and was never
    /// open before: what lies at too few may have one copy more.
    pub fn open(&self, member: MemberIndex, now: Instant) -> bool {
        let mut books = self.books.lock();
        books.open = books.open.with(member);
        let is_new = books.joining.contains(member);
        if is_new {
            books.joining = books.joining.without(member);
            books.opened = Some(now);
            self.told.store(false, Ordering::Relaxed);
        }
        is_new
    }

    /// Those of the living that are counted on: all but those that came later and were never open.
    #[must_use]
    pub fn counted(&self, living: MemberSet) -> MemberSet {
        living.but(self.books.lock().joining)
    }

    /// Whether a batch that was sent then to these holders could have had more of them by now.
    #[must_use]
    pub fn is_outdated(&self, holders: MemberSet, sent: Instant) -> bool {
        holders.len() < self.holders && self.books.lock().opened.is_some_and(|opened| sent <= opened)
    }

    /// All of them are to have something before pages: the VM's state.
    pub fn close_all(&self) {
        self.books.lock().open = MemberSet::NONE;
    }

    /// Whether as many of those that live are open as are to hold each page: so many have the VM's state.
    #[must_use]
    pub fn are_open(&self, alive: MemberSet) -> bool {
        let books = self.books.lock();
        let counted = alive.but(books.joining);
        self.holders < 2 || books.open.and(counted).len() >= self.holders.min(counted.len())
    }

    /// Who gets the copies of a batch that `first` gets: those that hold it in all, none where there is to be one
    /// holder only. `None` when nobody can have them now.
    pub fn choose(&self, first: MemberIndex, alive: MemberSet, now: Instant) -> Option<MemberSet> {
        if self.holders < 2 {
            return Some(MemberSet::NONE);
        }
        let books = self.books.lock();
        let counted = alive.but(books.joining);
        let of = |member: MemberIndex| Candidate {
            alive: counted.contains(member),
            open: books.open.contains(member),
            zone: books.zones[member.as_usize()],
            under_way: books.under_way[member.as_usize()],
            standing: books.standings[first.as_usize()][member.as_usize()],
        };
        match choose(first, self.holders, books.under_way.len(), of, now) {
            Choice::Take(copies) => Some(copies.with(first)),
            Choice::Wait => None,
        }
    }

    /// Whether it was not told yet that pages have fewer holders than are wanted. It is now.
    #[must_use]
    pub fn is_news(&self) -> bool {
        self.holders > 1 && !self.told.swap(true, Ordering::Relaxed)
    }

    /// A batch of so many bytes goes to these holders.
    pub fn sent(&self, first: MemberIndex, holders: MemberSet, bytes: u64) {
        self.change(first, holders, |under_way, standing| {
            *under_way += bytes;
            standing.batches += 1;
        });
    }

    /// A batch is under way no more, whatever came of it.
    pub fn landed(&self, first: MemberIndex, holders: MemberSet, bytes: u64) {
        self.change(first, holders, |under_way, standing| {
            *under_way = under_way.saturating_sub(bytes);
            standing.batches = standing.batches.saturating_sub(1);
        });
    }

    /// A batch was answered: who has no copy is left alone for a while, who has one stands well.
    pub fn answered(&self, first: MemberIndex, holders: MemberSet, missing: Missing, now: Instant) {
        self.change(first, holders.but(missing.all()), |_, standing| {
            (standing.rests_until, standing.rest) = (None, None);
        });
        self.change(first, missing.full, |_, standing| standing.rests_until = Some(now + FULL_REST));
        self.change(first, missing.lost, |_, standing| {
            // Those that were under way at once fail at once.
            if standing.rests_until.is_none_or(|until| until <= now) {
                let rest = standing.rest.map_or(REST_FIRST, |rest| (2 * rest).min(REST_MAX));
                (standing.rests_until, standing.rest) = (Some(now + rest), Some(rest));
            }
        });
    }

    fn change(&self, first: MemberIndex, of: MemberSet, change: impl Fn(&mut u64, &mut Standing)) {
        if self.holders < 2 {
            return;
        }
        let mut books = self.books.lock();
        let Books { under_way, standings, .. } = &mut *books;
        let members = under_way.len();
        for at in of.without(first).iter().map(MemberIndex::as_usize).filter(|at| *at < members) {
            change(&mut under_way[at], &mut standings[first.as_usize()][at]);
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const A: MemberIndex = MemberIndex(0);

    fn all(desk: &CopyDesk, members: u16, now: Instant) -> Option<MemberSet> {
        desk.choose(A, (0..members).map(MemberIndex).collect(), now)
    }

    fn desk(holders: usize, members: u16) -> CopyDesk {
        let desk = CopyDesk::new(holders, members.into());
        (0..members).for_each(|member| assert!(!desk.open(MemberIndex(member), Instant::now())));
        desk
    }

    #[test]
    fn the_one_with_the_least_under_way_gets_the_next() {
        let (desk, now) = (desk(2, 3), Instant::now());
        assert_eq!(all(&desk, 3, now), Some(MemberSet(0b011)));
        desk.sent(A, MemberSet(0b011), 100);
        assert_eq!(all(&desk, 3, now), Some(MemberSet(0b101)));
        desk.sent(A, MemberSet(0b101), 200);
        assert_eq!(all(&desk, 3, now), Some(MemberSet(0b011)));
        desk.landed(A, MemberSet(0b101), 200);
        assert_eq!(all(&desk, 3, now), Some(MemberSet(0b101)));
        assert_eq!(all(&CopyDesk::new(1, 3), 3, now), Some(MemberSet::NONE));
    }

    #[test]
    fn copies_lie_in_different_zones_where_they_can() {
        let (desk, now) = (desk(2, 4), Instant::now());
        for (member, zone) in [(0, "one"), (1, "one"), (2, "other")] {
            desk.set_zone(MemberIndex(member), zone);
        }
        desk.sent(A, MemberSet(0b0101), 100);
        assert_eq!(all(&desk, 4, now), Some(MemberSet(0b1001)), "who names none is in none of the others'");
        desk.sent(A, MemberSet(0b1001), 200);
        assert_eq!(all(&desk, 4, now), Some(MemberSet(0b0101)), "though there is one with nothing under way");
        let alone = desk.choose(A, MemberSet(0b0011), now);
        assert_eq!(alone, Some(MemberSet(0b0011)), "a copy in the same zone is better than none");
        // Of three, two may be in one.
        let three = CopyDesk { holders: 3, ..desk };
        assert_eq!(three.choose(A, MemberSet(0b0111), now), Some(MemberSet(0b0111)));
        assert_eq!(three.choose(MemberIndex(1), MemberSet(0b1111), now), Some(MemberSet(0b1110)));
    }

    #[test]
    fn the_state_is_to_be_at_as_many_as_each_page() {
        let (desk, now) = (desk(2, 3), Instant::now());
        assert!(desk.are_open(MemberSet(0b111)));
        desk.close_all();
        assert_eq!(all(&desk, 3, now), None);
        desk.open(MemberIndex(2), now);
        assert!(!desk.are_open(MemberSet(0b111)) && desk.are_open(MemberSet(0b100)));
        assert_eq!(all(&desk, 3, now), Some(MemberSet(0b101)));
        desk.open(A, now);
        assert!(desk.are_open(MemberSet(0b111)) && !desk.are_open(MemberSet(0b110)));
        assert!(CopyDesk::new(1, 3).are_open(MemberSet(0b111)));
    }

    #[test]
    fn one_that_came_later_counts_once_it_is_open() {
        let (desk, now) = (desk(2, 2), Instant::now());
        let sent = Instant::now();
        desk.add();
        let (new, left) = (MemberIndex(2), MemberSet(0b101));
        assert_eq!(desk.choose(A, left, now), Some(MemberSet(0b001)), "it is not waited for");
        assert!(desk.are_open(left) && desk.is_news());
        assert_eq!(desk.counted(left), MemberSet(0b001));
        assert!(!desk.is_outdated(MemberSet(0b001), sent));
        let opened = sent + REST_FIRST;
        assert!(desk.open(new, opened) && !desk.open(new, opened));
        assert!(desk.is_outdated(MemberSet(0b001), sent) && !desk.is_outdated(left, sent));
        assert!(!desk.is_outdated(MemberSet(0b001), opened + REST_FIRST), "it could have been taken");
        assert_eq!((desk.choose(A, left, now), desk.counted(left)), (Some(left), left));
        assert!(desk.is_news(), "what is told once is told once more");
        desk.sent(A, left, 100);
        assert_eq!(desk.choose(A, MemberSet(0b111), now), Some(MemberSet(0b011)));
        desk.close_all();
        assert!(!desk.are_open(left), "it has a state to take, like all others");
        assert_eq!(desk.choose(new, left, now), None);
    }

    #[test]
    fn who_is_full_is_waited_for_and_who_does_not_answer_is_not() {
        let (desk, now) = (desk(2, 2), Instant::now());
        let both = MemberSet(0b11);
        let full = Missing { full: MemberSet(0b10), ..Missing::NONE };
        desk.answered(A, both, full, now);
        assert_eq!(all(&desk, 2, now), None, "two live, and one has room");
        assert_eq!(all(&desk, 2, now + FULL_REST), Some(both));
        let lost = Missing { lost: MemberSet(0b10), ..Missing::NONE };
        let mut at = now + FULL_REST;
        for rest in [REST_FIRST, 2 * REST_FIRST] {
            desk.answered(A, both, lost, at);
            assert_eq!(all(&desk, 2, at), None, "once or twice is waited for");
            at += rest;
            assert_eq!(all(&desk, 2, at), Some(both), "tried again");
        }
        for rest in [OUT_FROM, 2 * OUT_FROM] {
            desk.answered(A, both, lost, at);
            let alone = all(&desk, 2, at).expect("the other counts as dead");
            assert_eq!(alone, MemberSet(0b01));
            assert_eq!(desk.is_news(), rest == OUT_FROM, "it is told once");
            at += rest;
            assert_eq!(all(&desk, 2, at), Some(both), "tried again");
            desk.sent(A, both, 1);
            assert_eq!(all(&desk, 2, at), Some(MemberSet(0b01)), "by one batch");
            desk.landed(A, both, 1);
        }
        desk.answered(A, both, Missing::NONE, at);
        assert_eq!(all(&desk, 2, at), Some(both));
        // What A does not get through to, others may.
        let other = desk.choose(MemberIndex(1), both, now);
        desk.answered(A, both, lost, at);
        assert_eq!(desk.choose(MemberIndex(1), both, at), other);
    }

    proptest! {
        #[test]
        fn as_many_as_are_wanted_or_live(
            holders in 1..6_usize, first in 0..8_u16,
            members in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), 0..5_u64), 8),
            zones in prop::collection::vec(prop::option::of(0..4_u16), 8),
        ) {
            let now = Instant::now();
            let rested = Standing { rests_until: Some(now + REST_MAX), ..Standing::default() };
            let of = |((alive, open, rests, under_way), zone): (&(bool, bool, bool, u64), &Option<u16>)| Candidate {
                alive: *alive, open: *open, zone: *zone, under_way: *under_way,
                standing: if *rests { rested } else { Standing::default() },
            };
            let candidates: Vec<Candidate> = members.iter().zip(&zones).map(of).collect();
            let others: Vec<usize> = (0..8).filter(|at| *at != usize::from(first)).collect();
            let living = others.iter().filter(|at| candidates[**at].alive).count();
            let able = |at: usize| candidates[at].alive && candidates[at].open && !members[at].2;
            let count = others.iter().filter(|at| able(**at)).count();
            let wanted = (holders - 1).min(living);
            match choose(MemberIndex(first), holders, 8, |at| candidates[at.as_usize()], now) {
                Choice::Wait => prop_assert!(count < wanted),
                Choice::Take(taken) => {
                    prop_assert_eq!(taken.len(), wanted);
                    prop_assert!(!taken.contains(MemberIndex(first)));
                    prop_assert!(taken.iter().all(|member| able(member.as_usize())));
                    let left = others.iter().filter(|at| able(**at) && !taken.contains(MemberIndex(**at as u16)));
                    // None that is left has less under way than one that was taken and its zone, or is in a zone without a
                    // holder while two of those are in one.
                    let holders = || taken.iter().map(MemberIndex::as_usize).chain([usize::from(first)]);
                    let is_in = |zone: Option<u16>| holders().filter(|at| zone.is_some() && zones[*at] == zone).count();
                    for at in left {
                        for member in taken.iter().map(MemberIndex::as_usize).filter(|at| is_in(zones[*at]) > 1) {
                            prop_assert!(is_in(zones[*at]) > 0, "{at} is in a zone of its own, {member} is not");
                        }
                        let same = taken.iter().map(MemberIndex::as_usize).filter(|member| zones[*member] == zones[*at]);
                        for member in same {
                            prop_assert!(members[member].3 <= members[*at].3);
                        }
                    }
                }
            }
        }
    }
}
