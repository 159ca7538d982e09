//! The source's books: what became of each page, in 13 bytes a page.

use crate::ids::{Checksum, MemberIndex, Placement};
use crate::page::{PageIndex, PageRange};

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
}

impl PageState {
    /// Whether losing the source does not lose the page.
    #[must_use]
    pub const fn is_safe(self) -> bool {
        matches!(self, Self::Staged | Self::Zero | Self::Installed)
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Unsent,
            2 => Self::Absent,
            3 => Self::Sending,
            4 => Self::Stored,
            5 => Self::ZeroTold,
            6 => Self::Staged,
            7 => Self::Zero,
            8 => Self::Installed,
            _ => Self::Waiting,
        }
    }
}

/// State, placement and checksum of every page. Placements are kept so that index entries can be
/// given to another index server when theirs dies.
#[derive(Debug)]
pub struct PageTable {
    state: Vec<u8>,
    placement: Vec<u64>,
    checksum: Vec<u32>,
    safe: u32,
}

impl PageTable {
    /// All pages `Waiting`. Without intermediaries there are no placements to keep.
    #[must_use]
    pub fn new(pages: u32, with_placements: bool) -> Self {
        let placed = if with_placements { pages as usize } else { 0 };
        Self {
            state: vec![PageState::Waiting as u8; pages as usize],
            placement: vec![0; placed],
            checksum: vec![0; placed],
            safe: 0,
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

    /// Bytes allocated.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.state.capacity() + self.placement.capacity() * 8 + self.checksum.capacity() * 4
    }

    /// Where a page stands; `Waiting` for one that there is not.
    #[must_use]
    pub fn state(&self, page: PageIndex) -> PageState {
        self.state.get(page.as_usize()).map_or(PageState::Waiting, |byte| PageState::from_byte(*byte))
    }

    /// Moves a page. Nothing happens for one that there is not.
    pub fn set(&mut self, page: PageIndex, to: PageState) {
        if let Some(byte) = self.state.get_mut(page.as_usize()) {
            self.safe -= u32::from(PageState::from_byte(*byte).is_safe());
            self.safe += u32::from(to.is_safe());
            *byte = to as u8;
        }
    }

    /// Notes where a page's bytes lie.
    pub fn place(&mut self, page: PageIndex, placement: Placement, checksum: Checksum) {
        if let (Some(at), Some(sum)) =
            (self.placement.get_mut(page.as_usize()), self.checksum.get_mut(page.as_usize()))
        {
            *at = placement.to_bits();
            *sum = checksum.0;
        }
    }

    /// Where a page's bytes lie, and their checksum.
    #[must_use]
    pub fn placement(&self, page: PageIndex) -> Option<(Placement, Checksum)> {
        let placement = Placement::from_bits(*self.placement.get(page.as_usize())?)?;
        Some((placement, Checksum(*self.checksum.get(page.as_usize())?)))
    }

    /// Whether the page's bytes are believed to lie at this member.
    #[must_use]
    pub fn lies_at(&self, page: PageIndex, member: MemberIndex) -> bool {
        matches!(self.state(page), PageState::Stored | PageState::Staged)
            && self.placement(page).is_some_and(|(placement, _)| placement.member == member)
    }

    /// The first page from `from` on that is `Unsent` or `Absent`.
    #[must_use]
    pub fn next_to_send(&self, from: PageIndex) -> Option<PageIndex> {
        let rest = self.state.get(from.as_usize()..)?;
        let at = rest.iter().position(|s| matches!(*s, 1 | 2))?;
        Some(PageIndex(from.0 + at as u32))
    }

    /// The run of pages from `first` on that are in this state, at most `pages_max`.
    #[must_use]
    pub fn run(&self, first: PageIndex, state: PageState, pages_max: u32) -> PageRange {
        let rest = self.state.get(first.as_usize()..).unwrap_or_default();
        let pages = rest.iter().take(pages_max as usize).take_while(|s| **s == state as u8).count();
        PageRange::new(first, pages as u32)
    }
}
