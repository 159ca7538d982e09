//! Which index server gets which entries, and what waits to be sent there.
//!
//! The owner of a page's entry is the member whose turn its range is; a member that is dead, or has
//! not answered for a while, is passed over for the next in rotation. Whoever looks a page up asks in
//! the same order.
//!
//! Of pages that lie at several members, each holder says where; of zero pages nobody does but the index. So where pages
//! have copies, the entries of zero pages go to as many index servers, one after the other: each acknowledges before
//! the next is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::Mutex;

use super::roster::Roster;
use crate::ids::{MemberIndex, MemberSet};
use crate::page::PageIndex;
use crate::transport::Waker;
use crate::wire::IndexEntry;
use crate::wire::placement::{index_owners, index_range, index_turn};

const ALIVE: u8 = 0;
const SUSPECT: u8 = 1;
const DEAD: u8 = 2;

/// Entries that may wait for one index server before its member sinks stop taking batches: 1.5 MB.
const BACKLOG_MAX: usize = 64 << 10;

/// An entry on its way to index servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// What they are told.
    pub entry: IndexEntry,
    /// Those who have acknowledged it.
    done: MemberSet,
}

impl Pending {
    /// Whether some have acknowledged it.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        !self.done.is_empty()
    }
}

impl From<IndexEntry> for Pending {
    fn from(entry: IndexEntry) -> Self {
        Self { entry, done: MemberSet::NONE }
    }
}

#[derive(Debug)]
struct Post {
    state: AtomicU8,
    pending: Mutex<Vec<Pending>>,
    waker: Arc<Waker>,
}

/// Routes index entries to members.
#[derive(Debug)]
pub struct IndexRouter {
    posts: Roster<Post>,
    /// How many shall have an entry of zero pages.
    copies: usize,
    rerouted: AtomicBool,
    /// Some entries are at fewer than they were to be: no more answer.
    fewer: AtomicBool,
}

impl Post {
    fn new(state: u8, waker: Arc<Waker>) -> Self {
        Self { state: AtomicU8::new(state), pending: Mutex::new(Vec::new()), waker }
    }
}

impl IndexRouter {
    /// A router over members that all live, each with the waker of its sink. So many shall have an entry of zero pages.
    #[must_use]
    pub fn new(wakers: impl IntoIterator<Item = Arc<Waker>>, copies: usize) -> Self {
        let posts = Roster::new(wakers.into_iter().map(|waker| Post::new(ALIVE, waker)));
        Self { posts, copies, rerouted: AtomicBool::new(false), fewer: AtomicBool::new(false) }
    }

    /// One more member, which is relied on once it has answered. Owners change with it: where entries are is no longer sure.
    pub fn add(&self, waker: Arc<Waker>) {
        self.rerouted.store(true, Ordering::Relaxed);
        let _ = self.posts.add(Post::new(SUSPECT, waker));
    }

    /// Another process routed entries before: where they are is not sure.
    pub fn follow(&self) {
        self.rerouted.store(true, Ordering::Relaxed);
    }

    /// Hands entries to those who are to have them next. Those that need go nowhere else are appended to `finished`.
    /// `false` when there is no member left to take the others.
    #[must_use]
    pub fn route<E: Copy + Into<Pending>>(&self, entries: &[E], finished: &mut Vec<IndexEntry>) -> bool {
        let living = self.living();
        let goes_on = |pending: &Pending| self.goes_on(pending, living);
        let together = |a: Pending, b: Pending| {
            index_range(a.entry.page) == index_range(b.entry.page)
                && goes_on(&a) == goes_on(&b)
                && a.done == b.done
        };
        for run in entries.chunk_by(|a, b| together((*a).into(), (*b).into())) {
            let pendings = || run.iter().map(|entry| (*entry).into());
            let Some(first): Option<Pending> = pendings().next() else { continue };
            let next = if goes_on(&first) { self.next(&first) } else { None };
            let Some(owner) = next else {
                if first.done.is_empty() {
                    return false;
                }
                if goes_on(&first) {
                    self.fewer.store(true, Ordering::Relaxed);
                }
                finished.extend(pendings().map(|pending| pending.entry));
                continue;
            };
            let post = &self.posts[owner];
            let mut pending = post.pending.lock();
            // Who was woken for some looks again by itself: entries are held back for a while, to travel together.
            let was_empty = pending.is_empty();
            pending.extend(pendings());
            drop(pending);
            if was_empty {
                post.waker.wake();
            }
        }
        true
    }

    /// A member acknowledged entries: they go on to the next, or are finished. The planner's books are locked
    /// meanwhile: a member that dies is told to them behind that, or is known here to be dead.
    #[must_use]
    pub fn acknowledged(
        &self,
        member: MemberIndex,
        entries: &mut [Pending],
        finished: &mut Vec<IndexEntry>,
    ) -> bool {
        entries.iter_mut().for_each(|pending| pending.done = pending.done.with(member));
        self.route(entries, finished)
    }

    /// Whether an entry is to be at more members of those that live.
    fn goes_on(&self, pending: &Pending, living: MemberSet) -> bool {
        let copies = if pending.entry.placement.is_none() { self.copies } else { 1 };
        pending.done.and(living).len() < copies
    }

    /// Takes up to `max` entries that wait for a member.
    pub fn take(&self, member: MemberIndex, max: usize, out: &mut Vec<Pending>) {
        out.clear();
        let mut pending = self.posts[member].pending.lock();
        let keep = pending.len().saturating_sub(max);
        out.extend(pending.drain(keep..));
    }

    /// Whether some index server is so far behind that no more pages should be stored.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.posts.iter().any(|post| post.pending.lock().len() > BACKLOG_MAX)
    }

    /// A member did not acknowledge entries in time: new ones go to the next in rotation until it
    /// answers again. Returns what waited for it, to be routed again.
    pub fn suspect(&self, member: MemberIndex) -> Vec<Pending> {
        self.leave(member, SUSPECT)
    }

    /// A suspected member answered.
    pub fn answered(&self, member: MemberIndex) {
        let state = &self.posts[member].state;
        let _ = state.compare_exchange(SUSPECT, ALIVE, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A member is gone for good. Returns what waited for it, to be routed again.
    pub fn dead(&self, member: MemberIndex) -> Vec<Pending> {
        self.leave(member, DEAD)
    }

    fn leave(&self, member: MemberIndex, state: u8) -> Vec<Pending> {
        let post = &self.posts[member];
        post.state.fetch_max(state, Ordering::Relaxed);
        self.rerouted.store(true, Ordering::Relaxed);
        std::mem::take(&mut *post.pending.lock())
    }

    /// Whether the entry of this page may be with that member.
    #[must_use]
    pub fn may_be_with(&self, page: PageIndex, member: MemberIndex) -> bool {
        let turn = |step| index_turn(page, step, self.posts.len()) == Some(member);
        self.rerouted.load(Ordering::Relaxed) || (0..self.copies).any(turn)
    }

    /// Whether entries are at fewer members than they were to be.
    #[must_use]
    pub fn has_fewer(&self) -> bool {
        self.fewer.load(Ordering::Relaxed)
    }

    /// The same, and from now on it is not so: they are told to more.
    #[must_use]
    pub fn take_fewer(&self) -> bool {
        self.fewer.swap(false, Ordering::Relaxed)
    }

    /// Members that are not dead.
    #[must_use]
    pub fn living(&self) -> MemberSet {
        (0..self.posts.len())
            .map(|at| MemberIndex(at as u16))
            .filter(|member| !self.is_dead(*member))
            .collect()
    }

    /// Whether some member answers, as far as is known.
    #[must_use]
    pub fn anyone_answers(&self) -> bool {
        self.posts.iter().any(|post| post.state.load(Ordering::Relaxed) == ALIVE)
    }

    /// Members that are not dead.
    #[must_use]
    pub fn alive(&self) -> usize {
        self.posts.iter().filter(|post| post.state.load(Ordering::Relaxed) != DEAD).count()
    }

    /// Whether the member is dead.
    #[must_use]
    pub fn is_dead(&self, member: MemberIndex) -> bool {
        self.posts.get(member).is_none_or(|post| post.state.load(Ordering::Relaxed) == DEAD)
    }

    /// Who is to have an entry next: as long as nobody has it one that was silent will do, too.
    fn next(&self, pending: &Pending) -> Option<MemberIndex> {
        let at_most = |worst: u8| {
            let fits = |m: MemberIndex| {
                !pending.done.contains(m) && self.posts[m].state.load(Ordering::Relaxed) <= worst
            };
            index_owners(pending.entry.page, self.posts.len(), fits).next()
        };
        let silent = || if pending.done.is_empty() { at_most(SUSPECT) } else { None };
        at_most(ALIVE).or_else(silent)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::Round;
    use crate::limits::INDEX_RANGE_PAGES;

    fn router(members: usize) -> IndexRouter {
        with_copies(members, 1)
    }

    fn with_copies(members: usize, copies: usize) -> IndexRouter {
        IndexRouter::new((0..members).map(|_| Arc::new(Waker::new().expect("eventfd"))), copies)
    }

    fn entries(ranges: &[u32]) -> Vec<Pending> {
        let zero = |range: &u32| IndexEntry::zero(PageIndex(range * INDEX_RANGE_PAGES), 1, Round(0));
        ranges.iter().map(|range| Pending::from(zero(range))).collect()
    }

    fn route(router: &IndexRouter, entries: &[Pending]) -> bool {
        router.route(entries, &mut Vec::new())
    }

    fn taken(router: &IndexRouter, member: u16) -> Vec<u32> {
        let mut out = Vec::new();
        router.take(MemberIndex(member), usize::MAX, &mut out);
        out.iter().map(|pending| index_range(pending.entry.page)).collect()
    }

    #[test]
    fn ranges_take_turns_and_the_dead_are_passed_over() {
        let router = router(3);
        assert!(route(&router, &entries(&[0, 1, 2, 3])));
        assert_eq!((taken(&router, 0), taken(&router, 1), taken(&router, 2)), (vec![0, 3], vec![1], vec![2]));
        assert!(router.may_be_with(PageIndex(0), MemberIndex(0)));
        assert!(!router.may_be_with(PageIndex(0), MemberIndex(1)));
        assert!(route(&router, &entries(&[1])));
        let moved = router.suspect(MemberIndex(1));
        assert!(route(&router, &moved));
        assert_eq!(taken(&router, 2), [1]);
        assert!(router.may_be_with(PageIndex(0), MemberIndex(1)), "once routed elsewhere, nothing is sure");
        router.answered(MemberIndex(1));
        assert!(route(&router, &entries(&[1])));
        assert_eq!(taken(&router, 1), [1]);
        for member in 0..3 {
            router.dead(MemberIndex(member));
        }
        router.answered(MemberIndex(1));
        assert!(!route(&router, &entries(&[1])));
        assert_eq!(router.alive(), 0);
    }

    #[test]
    fn one_more_is_relied_on_once_it_answers() {
        let router = router(2);
        router.add(Arc::new(Waker::new().expect("eventfd")));
        assert!(router.may_be_with(PageIndex(0), MemberIndex(1)), "owners have changed");
        assert!(route(&router, &entries(&[2])));
        assert_eq!((taken(&router, 2), taken(&router, 0)), (vec![], vec![2]));
        router.answered(MemberIndex(2));
        assert!(route(&router, &entries(&[2])));
        assert_eq!(taken(&router, 2), [2]);
        assert_eq!(router.alive(), 3);
    }

    /// Takes what waits for a member, which acknowledges it; what is finished by that.
    fn acknowledge(router: &IndexRouter, member: u16) -> (usize, usize) {
        let (mut out, mut finished) = (Vec::new(), Vec::new());
        router.take(MemberIndex(member), usize::MAX, &mut out);
        assert!(router.acknowledged(MemberIndex(member), &mut out, &mut finished));
        (out.len(), finished.len())
    }

    #[test]
    fn zero_pages_are_told_to_as_many_as_copies_are_wanted() {
        let router = with_copies(3, 2);
        let place = crate::ids::Placement {
            member: MemberIndex(2),
            slot: crate::ids::SlotIndex(1),
            generation: crate::ids::Generation(1),
        };
        let placed = IndexEntry::at(PageIndex(1), Round(0), place, crate::ids::Checksum(1));
        let mut all = entries(&[0]);
        all.push(placed.into());
        assert!(route(&router, &all));
        assert_eq!(acknowledge(&router, 0), (2, 1), "each holder says where a page lies");
        assert_eq!(acknowledge(&router, 1), (1, 1));
        assert_eq!(acknowledge(&router, 2), (0, 0));
        // One that has it and dies has it no more.
        assert!(route(&router, &entries(&[0])));
        assert_eq!(acknowledge(&router, 0), (1, 0));
        router.dead(MemberIndex(0));
        assert_eq!(acknowledge(&router, 1), (1, 0));
        assert_eq!(acknowledge(&router, 2), (1, 1));
        // Who is silent is not waited for, as long as somebody has it.
        assert!(route(&router, &entries(&[1])));
        assert_eq!(acknowledge(&router, 1), (1, 0));
        assert!(!router.has_fewer());
        let mut finished = Vec::new();
        let waited = router.suspect(MemberIndex(2));
        assert!(router.route(&waited, &mut finished));
        assert_eq!((waited.len(), finished.len()), (1, 1));
        assert!(router.has_fewer());
        // The last one is enough.
        router.dead(MemberIndex(2));
        assert!(route(&router, &entries(&[2])));
        assert_eq!(acknowledge(&router, 1), (1, 1));
    }
}
