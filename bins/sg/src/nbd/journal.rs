//! What the index servers are still to be told of a volume of one's own, and which slots may be given back once they
//! were: a pure core.
//!
//! Entries of one index server are put in the order in which they came, a batch at a time: of one page's entries the
//! last holds. Everything has a number in the order of coming; what is below the least number that is not acknowledged
//! is safe.

use std::collections::{BTreeSet, VecDeque};

use libsg::ids::{MemberIndex, Placement};
use libsg::page::PageIndex;
use libsg::wire::{GetEntry, IndexEntry};

/// Entries that wait, of all index servers: further writes wait for room.
const ENTRIES_MAX: usize = 64 << 10;

/// The number of entries that are told anew: they are as old as can be, whatever came since.
const ANEW: u64 = 0;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    entry: IndexEntry,
}

/// Of one index server.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// The batch that it was sent.
    sent: Vec<Waiting>,
}

/// What is to be told.
#[derive(Debug)]
pub struct Journal {
    queues: Vec<Queue>,
    /// Index ranges that are to be told anew, from the table.
    anew: BTreeSet<u32>,
    /// Entries of such that are not acknowledged.
    anew_entries: usize,
    /// Slots that nothing points to once what came before the number is safe.
    retired: VecDeque<(u64, GetEntry)>,
    next: u64,
}

impl Journal {
    /// For so many index servers.
    pub fn new(members: usize) -> Self {
        let queues = (0..members).map(|_| Queue::default()).collect();
        Self { queues, anew: BTreeSet::new(), anew_entries: 0, retired: VecDeque::new(), next: 1 }
    }

    /// Whether more may be written.
    pub fn has_room(&self) -> bool {
        self.waiting() < ENTRIES_MAX && self.retired.len() < ENTRIES_MAX
    }

    fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.waiting.len()).sum()
    }

    /// An entry for this owner.
    pub fn push(&mut self, owner: MemberIndex, entry: IndexEntry) {
        let number = self.next;
        self.next += 1;
        if let Some(queue) = self.queues.get_mut(owner.as_usize()) {
            queue.waiting.push_back(Waiting { number, entry });
        }
    }

    /// An entry of a range that is told anew, for this owner.
    pub fn push_anew(&mut self, owner: MemberIndex, entry: IndexEntry) {
        if let Some(queue) = self.queues.get_mut(owner.as_usize()) {
            queue.waiting.push_back(Waiting { number: ANEW, entry });
            self.anew_entries += 1;
        }
    }

    /// A slot that nothing points to any more when the entries that were pushed until now are safe.
    pub fn retire(&mut self, page: PageIndex, placement: Placement) {
        self.retired.push_back((self.next, GetEntry { page, placement }));
    }

    /// What is pushed from now on is not below this.
    pub const fn now(&self) -> u64 {
        self.next
    }

    /// Everything below this is safe.
    pub fn safe_below(&self) -> u64 {
        if !self.anew.is_empty() || self.anew_entries > 0 {
            return ANEW;
        }
        let first =
            |queue: &Queue| queue.sent.first().or(queue.waiting.front()).map(|waiting| waiting.number);
        self.queues.iter().filter_map(first).min().unwrap_or(self.next)
    }

    /// The batch that a server is to be sent now, of at most so many entries: nothing while it has one.
    pub fn send(&mut self, owner: MemberIndex, entries_max: usize, out: &mut Vec<IndexEntry>) {
        out.clear();
        let Some(queue) = self.queues.get_mut(owner.as_usize()) else { return };
        if queue.sent.is_empty() {
            let entries = queue.waiting.len().min(entries_max);
            queue.sent.extend(queue.waiting.drain(..entries));
            out.extend(queue.sent.iter().map(|waiting| waiting.entry));
        }
    }

    /// A server has the batch that it was sent.
    pub fn acknowledged(&mut self, owner: MemberIndex) {
        if let Some(queue) = self.queues.get_mut(owner.as_usize()) {
            self.anew_entries -= anew_of(&queue.sent);
            queue.sent.clear();
        }
    }

    /// A server did not take its batch: that goes first the next time.
    pub fn refused(&mut self, owner: MemberIndex) {
        if let Some(queue) = self.queues.get_mut(owner.as_usize()) {
            for waiting in queue.sent.drain(..).rev() {
                queue.waiting.push_front(waiting);
            }
        }
    }

    /// A server is gone: what it knew, others are told anew.
    pub fn gone(&mut self, owner: MemberIndex, ranges: impl IntoIterator<Item = u32>) {
        if let Some(queue) = self.queues.get_mut(owner.as_usize()) {
            self.anew_entries -= anew_of(&queue.sent) + anew_of(&queue.waiting);
            *queue = Queue::default();
        }
        self.anew.extend(ranges);
    }

    /// The next index range that is to be told anew, as soon as there is room for it.
    pub fn next_anew(&self) -> Option<u32> {
        // Slots that wait to be given back do so for just this.
        if self.waiting() < ENTRIES_MAX { self.anew.first().copied() } else { None }
    }

    /// What a range's entries are is pushed.
    pub fn told_anew(&mut self, range: u32) {
        self.anew.remove(&range);
    }

    /// Slots that may be given back: nothing points to them.
    pub fn unused(&mut self, out: &mut Vec<GetEntry>) {
        let safe = self.safe_below();
        while let Some((number, slot)) = self.retired.front()
            && *number <= safe
        {
            out.push(*slot);
            self.retired.pop_front();
        }
    }
}

fn anew_of<'w>(waiting: impl IntoIterator<Item = &'w Waiting>) -> usize {
    waiting.into_iter().filter(|waiting| waiting.number == ANEW).count()
}

#[cfg(test)]
mod test {
    use libsg::ids::{Generation, Round, SlotIndex};

    use super::*;

    const A: MemberIndex = MemberIndex(0);
    const B: MemberIndex = MemberIndex(1);

    fn zero(page: u32) -> IndexEntry {
        IndexEntry::zero(PageIndex(page), 1, Round(1))
    }

    fn slot(number: u32) -> Placement {
        Placement { member: A, slot: SlotIndex(number), generation: Generation(1) }
    }

    fn sent(journal: &mut Journal, owner: MemberIndex) -> Vec<u32> {
        let mut out = Vec::new();
        journal.send(owner, 2, &mut out);
        out.iter().map(|entry| entry.page.0).collect()
    }

    fn unused(journal: &mut Journal) -> usize {
        let mut out = Vec::new();
        journal.unused(&mut out);
        out.len()
    }

    #[test]
    fn safe_is_what_every_server_has() {
        let mut journal = Journal::new(2);
        assert_eq!(journal.safe_below(), journal.now());
        for page in [1, 2, 3] {
            journal.push(A, zero(page));
        }
        journal.push(B, zero(9));
        let all = journal.now();
        assert_eq!(sent(&mut journal, A), [1, 2]);
        assert_eq!(sent(&mut journal, A), [0_u32; 0], "one batch at a time");
        assert_eq!(sent(&mut journal, B), [9]);
        journal.acknowledged(B);
        assert!(journal.safe_below() < all);
        journal.acknowledged(A);
        assert!(journal.safe_below() < all, "one waits");
        assert_eq!(sent(&mut journal, A), [3]);
        assert!(journal.safe_below() < all, "one is under way");
        journal.acknowledged(A);
        assert_eq!(journal.safe_below(), all);
    }

    #[test]
    fn a_slot_is_given_back_when_what_replaced_it_is_safe() {
        let mut journal = Journal::new(2);
        journal.push(B, zero(1));
        journal.retire(PageIndex(1), slot(1));
        journal.push(A, zero(2));
        assert_eq!(unused(&mut journal), 0);
        sent(&mut journal, A);
        journal.acknowledged(A);
        assert_eq!(unused(&mut journal), 0, "another one's entry says nothing");
        sent(&mut journal, B);
        journal.acknowledged(B);
        assert_eq!((unused(&mut journal), unused(&mut journal)), (1, 0));
    }

    #[test]
    fn what_is_refused_goes_first_again_in_its_order() {
        let mut journal = Journal::new(1);
        for page in [1, 2, 3] {
            journal.push(A, zero(page));
        }
        assert_eq!(sent(&mut journal, A), [1, 2]);
        journal.refused(A);
        assert_eq!(sent(&mut journal, A), [1, 2]);
        journal.acknowledged(A);
        assert_eq!(sent(&mut journal, A), [3]);
    }

    #[test]
    fn nothing_is_safe_until_others_know_what_a_dead_server_knew() {
        let mut journal = Journal::new(2);
        journal.push(A, zero(1));
        let all = journal.now();
        sent(&mut journal, A);
        journal.gone(A, [0, 5]);
        journal.retire(PageIndex(1), slot(1));
        assert_eq!((journal.safe_below(), unused(&mut journal)), (0, 0));
        assert_eq!(journal.next_anew(), Some(0));
        journal.push_anew(B, zero(1));
        journal.told_anew(0);
        assert_eq!((journal.safe_below(), journal.next_anew()), (0, Some(5)));
        journal.told_anew(5);
        assert_eq!(unused(&mut journal), 0);
        sent(&mut journal, B);
        journal.acknowledged(B);
        assert_eq!(journal.safe_below(), all);
        assert_eq!(unused(&mut journal), 1);
    }

    #[test]
    fn it_is_bounded() {
        let mut journal = Journal::new(1);
        for page in 0..ENTRIES_MAX as u32 {
            assert!(journal.has_room());
            journal.push(A, zero(page));
        }
        assert!(!journal.has_room());
        journal.anew.insert(3);
        assert_eq!(journal.next_anew(), None);
        journal.gone(A, []);
        (0..ENTRIES_MAX as u32).for_each(|page| journal.retire(PageIndex(page), slot(page)));
        assert!(!journal.has_room());
        assert_eq!(journal.next_anew(), Some(3), "slots wait for it");
    }
}
