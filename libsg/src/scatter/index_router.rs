//! Which index server gets which entries, and what waits to be sent there.
//!
//! The owner of a page's entry is the member whose turn its range is; a member that is dead, or has
//! not answered for a while, is passed over for the next in rotation. Whoever looks a page up asks in
//! the same order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::Mutex;

use super::roster::Roster;
use crate::ids::MemberIndex;
use crate::page::PageIndex;
use crate::transport::Waker;
use crate::vmd::placement::{index_owners, index_range, index_turn};
use crate::wire::IndexEntry;

const ALIVE: u8 = 0;
const SUSPECT: u8 = 1;
const DEAD: u8 = 2;

/// Entries that may wait for one index server before its member sinks stop taking batches: 1.5 MB.
const BACKLOG_MAX: usize = 64 << 10;

#[derive(Debug)]
struct Post {
    state: AtomicU8,
    pending: Mutex<Vec<IndexEntry>>,
    waker: Arc<Waker>,
}

/// Routes index entries to members.
#[derive(Debug)]
pub struct IndexRouter {
    posts: Roster<Post>,
    rerouted: AtomicBool,
}

impl Post {
    fn new(state: u8, waker: Arc<Waker>) -> Self {
        Self { state: AtomicU8::new(state), pending: Mutex::new(Vec::new()), waker }
    }
}

impl IndexRouter {
    /// A router over members that all live, each with the waker of its sink.
    #[must_use]
    pub fn new(wakers: impl IntoIterator<Item = Arc<Waker>>) -> Self {
        let posts = Roster::new(wakers.into_iter().map(|waker| Post::new(ALIVE, waker)));
        Self { posts, rerouted: AtomicBool::new(false) }
    }

    /// One more member, which is relied on once it has answered. Owners change with it: where entries are is no longer sure.
    pub fn add(&self, waker: Arc<Waker>) {
        self.rerouted.store(true, Ordering::Relaxed);
        let _ = self.posts.add(Post::new(SUSPECT, waker));
    }

    /// Hands entries to their owners. `false` when there is no member left to take them.
    #[must_use]
    pub fn route(&self, entries: &[IndexEntry]) -> bool {
        for run in entries.chunk_by(|a, b| index_range(a.page) == index_range(b.page)) {
            let Some(owner) = run.first().and_then(|entry| self.owner(entry.page)) else { return false };
            let post = &self.posts[owner];
            let mut pending = post.pending.lock();
            // Who was woken for some looks again by itself: entries are held back for a while, to travel together.
            let first = pending.is_empty();
            pending.extend_from_slice(run);
            drop(pending);
            if first {
                post.waker.wake();
            }
        }
        true
    }

    /// Takes up to `max` entries that wait for a member.
    pub fn take(&self, member: MemberIndex, max: usize, out: &mut Vec<IndexEntry>) {
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
    pub fn suspect(&self, member: MemberIndex) -> Vec<IndexEntry> {
        self.leave(member, SUSPECT)
    }

    /// A suspected member answered.
    pub fn answered(&self, member: MemberIndex) {
        let state = &self.posts[member].state;
        let _ = state.compare_exchange(SUSPECT, ALIVE, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A member is gone for good. Returns what waited for it, to be routed again.
    pub fn dead(&self, member: MemberIndex) -> Vec<IndexEntry> {
        self.leave(member, DEAD)
    }

    fn leave(&self, member: MemberIndex, state: u8) -> Vec<IndexEntry> {
        let post = &self.posts[member];
        post.state.fetch_max(state, Ordering::Relaxed);
        self.rerouted.store(true, Ordering::Relaxed);
        std::mem::take(&mut *post.pending.lock())
    }

    /// Whether the entry of this page may be with that member only.
    #[must_use]
    pub fn may_be_with(&self, page: PageIndex, member: MemberIndex) -> bool {
        self.rerouted.load(Ordering::Relaxed) || index_turn(page, 0, self.posts.len()) == Some(member)
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

    fn owner(&self, page: PageIndex) -> Option<MemberIndex> {
        let at_most = |worst: u8| {
            let answers = |m: MemberIndex| self.posts[m].state.load(Ordering::Relaxed) <= worst;
            index_owners(page, self.posts.len(), answers).next()
        };
        at_most(ALIVE).or_else(|| at_most(SUSPECT))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::Round;
    use crate::limits::INDEX_RANGE_PAGES;

    fn router(members: usize) -> IndexRouter {
        IndexRouter::new((0..members).map(|_| Arc::new(Waker::new().expect("eventfd"))))
    }

    fn entries(ranges: &[u32]) -> Vec<IndexEntry> {
        ranges.iter().map(|r| IndexEntry::zero(PageIndex(r * INDEX_RANGE_PAGES), 1, Round(0))).collect()
    }

    fn taken(router: &IndexRouter, member: u16) -> Vec<u32> {
        let mut out = Vec::new();
        router.take(MemberIndex(member), usize::MAX, &mut out);
        out.iter().map(|e| index_range(e.page)).collect()
    }

    #[test]
    fn ranges_take_turns_and_the_dead_are_passed_over() {
        let router = router(3);
        assert!(router.route(&entries(&[0, 1, 2, 3])));
        assert_eq!((taken(&router, 0), taken(&router, 1), taken(&router, 2)), (vec![0, 3], vec![1], vec![2]));
        assert!(router.may_be_with(PageIndex(0), MemberIndex(0)));
        assert!(!router.may_be_with(PageIndex(0), MemberIndex(1)));
        assert!(router.route(&entries(&[1])));
        let moved = router.suspect(MemberIndex(1));
        assert!(router.route(&moved));
        assert_eq!(taken(&router, 2), [1]);
        assert!(router.may_be_with(PageIndex(0), MemberIndex(1)), "once routed elsewhere, nothing is sure");
        router.answered(MemberIndex(1));
        assert!(router.route(&entries(&[1])));
        assert_eq!(taken(&router, 1), [1]);
        for member in 0..3 {
            router.dead(MemberIndex(member));
        }
        router.answered(MemberIndex(1));
        assert!(!router.route(&entries(&[1])));
        assert_eq!(router.alive(), 0);
    }

    #[test]
    fn one_more_is_relied_on_once_it_answers() {
        let router = router(2);
        router.add(Arc::new(Waker::new().expect("eventfd")));
        assert!(router.may_be_with(PageIndex(0), MemberIndex(1)), "owners have changed");
        assert!(router.route(&entries(&[2])));
        assert_eq!((taken(&router, 2), taken(&router, 0)), (vec![], vec![2]));
        router.answered(MemberIndex(2));
        assert!(router.route(&entries(&[2])));
        assert_eq!(taken(&router, 2), [2]);
        assert_eq!(router.alive(), 3);
    }
}
