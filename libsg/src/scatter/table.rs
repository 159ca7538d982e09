//! The source's books: what became of each page, in 13 bytes a page, 15 where the VM runs while rounds are sent; half a
//! byte more where the source forgets what is safe.

use super::outcomes::Outcomes;
use crate::ids::{Checksum, MemberSet, Placement, Round};
use crate::page::{PageIndex, PageRange};
use crate::wire::GetEntry;

/// Where a page stands. The order of the numbers means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// The source has not got it yet (a stock VMM's stream).
    Waiting = 0,
    /// It can be sent.
    Unsent = 1,
    /// Known to be zero, and to be told to an index or to the destination.
    Absent = 2,
    /// On its way; at least one batch in flight has it.
    Sending = 3,
    /// An intermediary holds its bytes; its index entry is on its way.
    Stored = 4,
    /// Zero; its index entry is on its way.
    ZeroTold = 5,
    /// Safe: bytes and index entry are acknowledged.
    Staged = 6,
    /// Safe: the index has it as zero.
    Zero = 7,
    /// Safe: the destination has installed it.
    Installed = 8,
    /// It did not arrive as it was read, as pages do that are written meanwhile: sent again in the next round.
    Torn = 9,
    /// Its hash was sent to whoever may have its bytes.
    Offered = 10,
}

impl PageState {
    /// Whether losing the source does not lose the page.
    #[must_use]
    pub const fn is_safe(self) -> bool {
        matches!(self, Self::Staged | Self::Zero | Self::Installed)
    }

    fn from_byte(byte: u8) -> Self {
        match byte & STATE {
            1 => Self::Unsent,
            2 => Self::Absent,
            3 => Self::Sending,
            4 => Self::Stored,
            5 => Self::ZeroTold,
            6 => Self::Staged,
            7 => Self::Zero,
            8 => Self::Installed,
            9 => Self::Torn,
            10 => Self::Offered,
            _ => Self::Waiting,
        }
    }
}

/// How a page left, as it is counted. One that is written again has left by no way yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Way {
    /// By none, or it is absent.
    None = 0,
    /// To the destination.
    Direct = 1,
    /// To an intermediary.
    Staged = 2,
    /// As a zero page.
    Zero = 3,
    /// Not at all: an intermediary held its bytes.
    Referenced = 4,
}

/// Of a page's byte, the state; the bits above it are the way, and whether it was offered.
const STATE: u8 = 0x0f;
const WAY: u8 = 0x70;
const WAY_SHIFT: u32 = 4;
const OFFERED: u8 = 0x80;

/// Where a page's bytes lie: at its first holder, and who else has copies of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// At its first holder.
    pub first: Placement,
    /// Those who have copies.
    pub copies: MemberSet,
}

impl Place {
    /// Everybody who has it.
    #[must_use]
    pub fn holders(&self) -> MemberSet {
        self.copies.with(self.first.member)
    }
}

/// What nobody needs any more: a page's bytes at a place, the copies included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loser {
    /// Which page's.
    pub page: PageIndex,
    /// Where.
    pub place: Place,
}

impl Loser {
    /// As each holder is asked to drop it.
    #[must_use]
    pub fn entry(&self) -> GetEntry {
        GetEntry { page: self.page, placement: self.place.first }
    }
}

/// Above a placement's bits, of which members need six, is the number of a set: who has copies.
const SET_SHIFT: u32 = 54;
const FIRST: u64 = (1 << SET_SHIFT) - 1;

/// The sets that have a number. Those beyond share the last one, which stands for everybody: who has no copy is asked in
/// vain to give it back, and a page counts as one that lost a copy whoever dies.
const SETS_MAX: usize = (1 << (u64::BITS - SET_SHIFT)) - 1;

const _: () = assert!(crate::limits::MEMBERS_MAX <= 1 << (SET_SHIFT - 48));

/// State, placement and checksum of every page. Placements are kept so that index entries can be
/// given to another index server when theirs dies, and slots back when a page is sent again.
#[derive(Debug)]
pub struct PageTable {
    state: Vec<u8>,
    placement: Vec<u64>,
    /// Who has copies, by number; that of none is zero.
    sets: Vec<MemberSet>,
    /// The number that was looked up last: pages of a batch have one set.
    last_set: usize,
    checksum: Vec<u32>,
    /// Empty where there is but one round.
    round: Vec<u16>,
    /// Where the source forgets what is safe.
    outcomes: Option<Outcomes>,
    safe: u32,
    torn: u32,
    ways: [u32; 5],
}

impl PageTable {
    /// All pages `Waiting`. Without intermediaries there are no placements to keep.
    #[must_use]
    pub fn new(pages: u32, with_placements: bool) -> Self {
        let placed = if with_placements { pages as usize } else { 0 };
        Self {
            state: vec![PageState::Waiting as u8; pages as usize],
            placement: vec![0; placed],
            sets: vec![MemberSet::NONE],
            last_set: 0,
            checksum: vec![0; placed],
            round: Vec::new(),
            outcomes: None,
            safe: 0,
            torn: 0,
            ways: [pages, 0, 0, 0, 0],
        }
    }

    /// Keeps the round of each page from now on.
    pub fn keep_rounds(&mut self) {
        self.round.resize(self.state.len(), 0);
    }

    /// Keeps what the source is told of pages from now on.
    pub fn keep_outcomes(&mut self) {
        self.outcomes = Some(Outcomes::new(self.pages()));
    }

    /// Takes these books out for a moment; none where they are not kept.
    pub(super) const fn take_outcomes(&mut self) -> Option<Outcomes> {
        self.outcomes.take()
    }

    /// Puts them back.
    pub(super) fn put_outcomes(&mut self, outcomes: Outcomes) {
        self.outcomes = Some(outcomes);
    }

    /// Whether these books are kept.
    #[must_use]
    pub const fn keeps_outcomes(&self) -> bool {
        self.outcomes.is_some()
    }

    /// Whether the source was told that a page is safe, and may have forgotten it.
    #[must_use]
    pub fn is_told(&self, page: PageIndex) -> bool {
        self.outcomes.as_ref().is_some_and(|outcomes| outcomes.is_told(page))
    }

    /// The round that a page was last sent in, or is to be.
    #[must_use]
    pub fn round(&self, page: PageIndex) -> Round {
        Round(self.round.get(page.as_usize()).copied().unwrap_or(0))
    }

    /// The round of each page; none where there is but one round.
    #[must_use]
    pub fn rounds(&self) -> &[u16] {
        &self.round
    }

    /// Notes the round of a page, where rounds are kept.
    pub fn set_round(&mut self, page: PageIndex, to: Round) {
        if let Some(round) = self.round.get_mut(page.as_usize()) {
            *round = to.0;
        }
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.state.len() as u32
    }

    /// Pages that are safe.
    #[must_use]
    pub const fn safe(&self) -> u32 {
        self.safe
    }

    /// Pages that are sent again in the next round.
    #[must_use]
    pub const fn torn(&self) -> u32 {
        self.torn
    }

    /// Pages that the source has not got. It looks at all of them.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.state.iter().filter(|byte| **byte & STATE == PageState::Waiting as u8).count() as u32
    }

    /// Pages that left this way.
    #[must_use]
    pub const fn left_by(&self, way: Way) -> u32 {
        self.ways[way as usize]
    }

    /// Bytes allocated.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.state.capacity()
            + self.placement.capacity() * 8
            + self.sets.capacity() * size_of::<MemberSet>()
            + self.checksum.capacity() * 4
            + self.round.capacity() * 2
            + self.outcomes.as_ref().map_or(0, Outcomes::bytes)
    }

    /// Where a page stands; `Waiting` for one that there is not.
    #[must_use]
    pub fn state(&self, page: PageIndex) -> PageState {
        self.state.get(page.as_usize()).map_or(PageState::Waiting, |byte| PageState::from_byte(*byte))
    }

    /// Moves a page; one that is to be sent again and that the source may have forgotten, to `Waiting`. Nothing happens for
    /// one that there is not.
    pub fn set(&mut self, page: PageIndex, to: PageState) {
        if let Some(byte) = self.state.get_mut(page.as_usize()) {
            let before = PageState::from_byte(*byte);
            let to = self.outcomes.as_mut().map_or(to, |outcomes| outcomes.moves(page, before, to));
            self.safe = self.safe + u32::from(to.is_safe()) - u32::from(before.is_safe());
            self.torn = self.torn + u32::from(to == PageState::Torn) - u32::from(before == PageState::Torn);
            *byte = *byte & !STATE | to as u8;
        }
    }

    /// How a page left.
    #[must_use]
    pub fn way(&self, page: PageIndex) -> Way {
        match self.state.get(page.as_usize()).map_or(0, |byte| (byte & WAY) >> WAY_SHIFT) {
            1 => Way::Direct,
            2 => Way::Staged,
            3 => Way::Zero,
            4 => Way::Referenced,
            _ => Way::None,
        }
    }

    /// A page left this way. Nothing happens for one that there is not.
    pub fn set_way(&mut self, page: PageIndex, to: Way) {
        if let Some(byte) = self.state.get_mut(page.as_usize()) {
            self.ways[usize::from((*byte & WAY) >> WAY_SHIFT)] -= 1;
            self.ways[to as usize] += 1;
            *byte = *byte & !WAY | (to as u8) << WAY_SHIFT;
        }
    }

    /// Whether a page was offered, in this round or before.
    #[must_use]
    pub fn was_offered(&self, page: PageIndex) -> bool {
        self.state.get(page.as_usize()).is_some_and(|byte| byte & OFFERED != 0)
    }

    /// Notes that a page was offered.
    pub fn set_offered(&mut self, page: PageIndex) {
        if let Some(byte) = self.state.get_mut(page.as_usize()) {
            *byte |= OFFERED;
        }
    }

    /// Notes where a page's bytes lie. Returns where they lay before.
    pub fn place(&mut self, page: PageIndex, place: Place, checksum: Checksum) -> Option<Place> {
        let set = self.set_number(place.copies);
        let at = self.placement.get_mut(page.as_usize())?;
        let before = std::mem::replace(at, place.first.to_bits() | set << SET_SHIFT);
        *self.checksum.get_mut(page.as_usize())? = checksum.0;
        if before == 0 {
            return None;
        }
        self.decode(before).filter(|before| before.first != place.first)
    }

    fn decode(&self, bits: u64) -> Option<Place> {
        let first = Placement::from_bits(bits & FIRST)?;
        let copies = self.sets.get((bits >> SET_SHIFT) as usize).copied().unwrap_or(MemberSet::ALL);
        Some(Place { first, copies: copies.without(first.member) })
    }

    fn set_number(&mut self, set: MemberSet) -> u64 {
        if self.sets.get(self.last_set) != Some(&set) {
            let known = self.sets.iter().position(|known| *known == set);
            self.last_set = known.unwrap_or(self.sets.len());
            if known.is_none() && self.sets.len() < SETS_MAX {
                self.sets.push(set);
            }
        }
        self.last_set as u64
    }

    /// The page's bytes lie nowhere any more.
    pub fn displace(&mut self, page: PageIndex) {
        if let Some(at) = self.placement.get_mut(page.as_usize()) {
            *at = 0;
        }
    }

    /// Where a page's bytes lie, or lay before it was written again, and their checksum.
    #[must_use]
    pub fn placed(&self, page: PageIndex) -> Option<(Place, Checksum)> {
        let place = self.decode(*self.placement.get(page.as_usize())?)?;
        Some((place, Checksum(*self.checksum.get(page.as_usize())?)))
    }

    /// Where a page's first holder has it, and its checksum.
    #[must_use]
    pub fn placement(&self, page: PageIndex) -> Option<(Placement, Checksum)> {
        let placement = Placement::from_bits(*self.placement.get(page.as_usize())? & FIRST)?;
        Some((placement, Checksum(*self.checksum.get(page.as_usize())?)))
    }

    /// The first page from `from` on that is `Unsent` or `Absent`.
    #[must_use]
    pub fn next_to_send(&self, from: PageIndex) -> Option<PageIndex> {
        let rest = self.state.get(from.as_usize()..)?;
        let at = rest.iter().position(|s| matches!(*s & STATE, 1 | 2))?;
        Some(PageIndex(from.0 + at as u32))
    }

    /// The run of pages from `first` on that are in this state, at most `pages_max`.
    #[must_use]
    pub fn run(&self, first: PageIndex, state: PageState, pages_max: u32) -> PageRange {
        let rest = self.state.get(first.as_usize()..).unwrap_or_default();
        let is = |byte: &&u8| **byte & STATE == state as u8;
        let pages = rest.iter().take(pages_max as usize).take_while(is).count();
        PageRange::new(first, pages as u32)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Generation, MemberIndex, SlotIndex};

    fn first(member: u16, slot: u32) -> Placement {
        Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(u16::MAX) }
    }

    #[test]
    fn who_has_copies_costs_no_byte_and_is_never_forgotten() {
        let pages = 3000;
        let mut table = PageTable::new(pages, true);
        let before = table.bytes();
        let set = |page: u32| MemberSet(u64::from(page) << 1 | 1 << 63);
        for page in 0..pages {
            let place = Place { first: first(0, page), copies: set(page) };
            assert_eq!(table.place(PageIndex(page), place, Checksum(page)), None);
        }
        assert!(table.bytes() - before <= 16 << 10, "the sets, whatever the pages are");
        for page in 0..pages {
            let (place, checksum) = table.placed(PageIndex(page)).expect("placed");
            assert_eq!((place.first, checksum), (first(0, page), Checksum(page)));
            assert_eq!(place.copies.and(set(page)), set(page), "nobody who has a copy is left out");
            let exact = (page as usize) < SETS_MAX - 1;
            assert_eq!(place.copies == set(page), exact, "{page}");
        }
        let moved = Place { first: first(63, 9), copies: MemberSet::NONE };
        let was = table.place(PageIndex(5), moved, Checksum(1)).expect("it lay elsewhere");
        assert_eq!(was, Place { first: first(0, 5), copies: set(5) });
        assert_eq!(table.place(PageIndex(5), moved, Checksum(1)), None);
        assert_eq!(table.placed(PageIndex(5)), Some((moved, Checksum(1))));
    }
}
