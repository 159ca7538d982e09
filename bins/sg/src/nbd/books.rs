//! What a volume of one's own consists of now, and what its index servers are still to be told: a pure core. All
//! connections share it under one lock, which nobody holds while he waits.

use libsg::ids::{MemberIndex, Round};
use libsg::limits::INDEX_RANGE_PAGES;
use libsg::page::{PageIndex, PageRange};
use libsg::vmd::placement::{index_owners, owner_runs};
use libsg::wire::IndexEntry;

use super::journal::Journal;
use super::table::{Known, Table};

/// The rounds of a volume are used up: each opening and each death of a member takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worn;

/// The books of a volume.
pub struct Books {
    /// Where pages are.
    pub table: Table,
    /// What is to be told.
    pub journal: Journal,
    alive: Vec<bool>,
    /// Above that of every entry which a member that was lost may still have, should it come back: an older entry
    /// never holds.
    round: Round,
    losses: u64,
}

impl Books {
    /// Of a volume whose members are alive or not, that is written in this round.
    pub fn new(table: Table, alive: Vec<bool>, round: Round) -> Self {
        let journal = Journal::new(alive.len());
        Self { table, journal, alive, round, losses: 0 }
    }

    /// The round in which pages are put now.
    pub const fn round(&self) -> Round {
        self.round
    }

    /// How often pages were lost with a member.
    pub const fn losses(&self) -> u64 {
        self.losses
    }

    /// Which members are alive.
    pub fn alive(&self) -> &[bool] {
        &self.alive
    }

    fn owner(&self, page: PageIndex) -> Option<MemberIndex> {
        index_owners(page, self.alive.len(), |member| self.alive[member.as_usize()]).next()
    }

    /// A page is this from now on; but not when it is to follow from what it was, and that is no longer so: `false`.
    pub fn write(&mut self, page: PageIndex, base: Option<Known>, known: Known) -> bool {
        if base.is_some_and(|base| base != self.table.get(page)) {
            return false;
        }
        let before = self.table.set(page, known);
        if known == Known::Zero && before == Known::Zero {
            return true;
        }
        if let (Some(owner), Some(entry)) = (self.owner(page), self.entry(page, known)) {
            self.journal.push(owner, entry);
        }
        self.retire(page, before);
        true
    }

    /// Pages are zero from now on.
    pub fn zero(&mut self, range: PageRange) {
        for run in owner_runs(range) {
            let filled: Vec<(PageIndex, Known)> = self.table.filled(run).collect();
            if filled.is_empty() {
                continue;
            }
            if let Some(owner) = self.owner(run.first) {
                self.journal.push(owner, IndexEntry::zero(run.first, run.pages, self.round));
            }
            for (page, known) in filled {
                self.table.set(page, Known::Zero);
                self.retire(page, known);
            }
            self.table.tidy(run);
        }
    }

    fn retire(&mut self, page: PageIndex, known: Known) {
        if let Known::At(placement, _) = known {
            self.journal.retire(page, placement);
        }
    }

    fn entry(&self, page: PageIndex, known: Known) -> Option<IndexEntry> {
        match known {
            Known::Zero => Some(IndexEntry::zero(page, 1, self.round)),
            Known::At(placement, checksum) => Some(IndexEntry::at(page, self.round, placement, checksum)),
            Known::Lost => None,
        }
    }

    /// Everything is told anew: of a volume that nobody knows anything of.
    pub fn tell_all(&mut self) {
        self.journal.gone(MemberIndex(u16::MAX), 0..ranges(self.table.pages()));
    }

    /// What a member owns in the index is told to who stands in for it, when the volume was opened without it.
    pub fn tell_of(&mut self, member: MemberIndex) {
        let members = self.alive.len();
        let of = |range: &u32| {
            let mut owners = index_owners(first_page(*range), members, |_| true);
            owners.next() == Some(member)
        };
        let ranges: Vec<u32> = (0..ranges(self.table.pages())).filter(of).collect();
        self.journal.gone(member, ranges);
    }

    /// A member is gone. How many pages went with it; `None` when that was known.
    ///
    /// # Errors
    /// [`Worn`].
    pub fn gone(&mut self, member: MemberIndex) -> Result<Option<u64>, Worn> {
        if self.alive.get(member.as_usize()) != Some(&true) {
            return Ok(None);
        }
        self.round = Round(self.round.0.checked_add(1).ok_or(Worn)?);
        let owned = |range: &u32| self.owner(first_page(*range)) == Some(member);
        let ranges: Vec<u32> = (0..ranges(self.table.pages())).filter(owned).collect();
        self.alive[member.as_usize()] = false;
        self.journal.gone(member, ranges);
        let lost = self.table.held_by(member);
        self.losses += u64::from(lost > 0);
        Ok(Some(lost))
    }

    /// Tells one range anew. `false` when none is to be, or there is no room for it.
    pub fn tell_anew(&mut self) -> bool {
        let Some(range) = self.journal.next_anew() else { return false };
        let first = first_page(range).0;
        let end = u64::from(first) + u64::from(INDEX_RANGE_PAGES);
        let end = end.min(u64::from(self.table.pages())) as u32;
        let filled: Vec<(PageIndex, Known)> =
            self.table.filled(PageRange::new(PageIndex(first), end - first)).collect();
        let mut at = first;
        for (page, known) in filled {
            self.tell_zeros(at, page.0);
            if let (Some(owner), Some(entry)) = (self.owner(page), self.entry(page, known)) {
                self.journal.push_anew(owner, entry);
            }
            at = page.0 + 1;
        }
        self.tell_zeros(at, end);
        self.journal.told_anew(range);
        true
    }

    fn tell_zeros(&mut self, first: u32, end: u32) {
        let first = PageIndex(first);
        if let Some(owner) = self.owner(first).filter(|_| first.0 < end) {
            self.journal.push_anew(owner, IndexEntry::zero(first, end - first.0, self.round));
        }
    }
}

const fn ranges(pages: u32) -> u32 {
    pages.div_ceil(INDEX_RANGE_PAGES)
}

const fn first_page(range: u32) -> PageIndex {
    PageIndex(range * INDEX_RANGE_PAGES)
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use libsg::ids::{Checksum, Generation, Placement, SlotIndex};
    use libsg::wire::GetEntry;
    use proptest::prelude::*;

    use super::*;

    const PAGES: u32 = 3000;

    fn at(member: u16, slot: u32) -> Known {
        let placement =
            Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(1) };
        Known::At(placement, Checksum(slot))
    }

    fn books() -> Books {
        Books::new(Table::new(PAGES, 3), vec![true; 3], Round(1))
    }

    #[test]
    fn what_follows_from_an_older_page_is_not_written() {
        let mut books = books();
        assert!(books.write(PageIndex(5), Some(Known::Zero), at(0, 1)));
        assert!(!books.write(PageIndex(5), Some(Known::Zero), at(1, 2)));
        assert!(books.write(PageIndex(5), Some(at(0, 1)), at(1, 2)));
        assert!(books.write(PageIndex(5), None, Known::Zero));
        assert_eq!(books.table.get(PageIndex(5)), Known::Zero);
    }

    /// Index servers: what each was told, newest round first, the later of one round.
    #[derive(Default)]
    struct Told(BTreeMap<(u16, u32), IndexEntry>);

    impl Told {
        fn take(&mut self, books: &mut Books, member: u16) {
            let (owner, mut batch) = (MemberIndex(member), Vec::new());
            books.journal.send(owner, 7, &mut batch);
            for entry in &batch {
                for page in entry.range().iter() {
                    let known = self.0.entry((member, page.0)).or_insert(*entry);
                    if known.round <= entry.round {
                        *known = *entry;
                    }
                }
            }
            books.journal.acknowledged(owner);
        }

        /// What whoever asks all members comes to, those included that were lost and are back.
        fn of(&self, page: u32) -> Option<IndexEntry> {
            let all = (0..3).filter_map(|member| self.0.get(&(member, page)));
            all.max_by_key(|entry| entry.round).copied()
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write { page: u32, member: u16 },
        Zero { first: u32, pages: u32 },
        Gone(u16),
        Take(u16),
        Anew,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0..PAGES, 0..3_u16).prop_map(|(page, member)| Op::Write { page, member }),
            2 => (0..PAGES, 1..1500_u32).prop_map(|(first, pages)| Op::Zero { first, pages: pages.min(PAGES - first) }),
            1 => (0..3_u16).prop_map(Op::Gone),
            6 => (0..3_u16).prop_map(Op::Take),
            3 => Just(Op::Anew),
        ]
    }

    proptest! {
        /// Once all is safe, whoever reads the index finds what was written last, and nothing that it points to was
        /// given back.
        #[test]
        fn the_index_comes_to_what_was_written(ops in prop::collection::vec(op(), 1..120)) {
            let (mut books, mut told, mut slots) = (books(), Told::default(), 0);
            let mut unused: Vec<GetEntry> = Vec::new();
            books.tell_all();
            for op in ops {
                match op {
                    Op::Write { page, member } => {
                        slots += 1;
                        books.write(PageIndex(page), None, at(member, slots));
                    }
                    Op::Zero { first, pages } => books.zero(PageRange::new(PageIndex(first), pages)),
                    // One stays.
                    Op::Gone(member) if books.alive().iter().filter(|alive| **alive).count() > 1 => {
                        let alive = books.alive()[usize::from(member)];
                        prop_assert_eq!(books.gone(MemberIndex(member)).map(|lost| lost.is_some()), Ok(alive));
                    }
                    Op::Gone(_) => {}
                    Op::Take(member) if books.alive()[usize::from(member)] => told.take(&mut books, member),
                    Op::Take(_) => {}
                    Op::Anew => { books.tell_anew(); }
                }
                books.journal.unused(&mut unused);
                for slot in &unused {
                    let points = |entry: &IndexEntry| entry.placement == Some(slot.placement);
                    prop_assert!(!told.of(slot.page.0).as_ref().is_some_and(points), "{slot:?} is pointed to");
                }
                unused.clear();
            }
            while books.journal.safe_below() < books.journal.now() {
                books.tell_anew();
                (0..3).filter(|at| books.alive[usize::from(*at)]).collect::<Vec<_>>().into_iter()
                    .for_each(|member| told.take(&mut books, member));
            }
            for page in 0..PAGES {
                let entry = told.of(page).expect("everything is told");
                let known = entry.placement.map_or(Known::Zero, |place| Known::At(place, entry.checksum));
                prop_assert_eq!(known, books.table.get(PageIndex(page)), "page {}", page);
            }
        }
    }

    #[test]
    fn rounds_end() {
        let mut books = Books::new(Table::new(10, 1), vec![true], Round(u16::MAX));
        assert_eq!(books.gone(MemberIndex(0)), Err(Worn));
    }
}
