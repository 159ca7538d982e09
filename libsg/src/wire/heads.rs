//! The heads of runs, of each kind of entry.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Malformed;
use super::entry::{Encoding, GetEntry, IndexEntry, PageEntry, check_run};
use super::run::{CHECKSUM_BYTES, Head, RunEntry};
use crate::ids::{Checksum, Placement, Round, SlotIndex};
use crate::limits;
use crate::page::{PAGE_BYTES, PageIndex, PageRange};

/// Pages that are encoded in the same way. Zero pages that follow one another are one entry; of others there is
/// one for each.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHead {
    page: U32,
    pages: U16,
    round: U16,
    encoding: u8,
    /// 1 where a mask follows, else 0.
    gaps: u8,
    /// Of each page.
    encoded_bytes: U16,
}

const _: () = assert!(size_of::<PageHead>() == 12);
const _: () = assert!(limits::BATCH_PAGES_MAX <= u16::MAX as usize);

impl PageEntry {
    /// What an entry takes in a table at most: the head of a run of its own, and a checksum.
    pub const BYTES_MAX: usize = Self::HEAD_BYTES + CHECKSUM_BYTES;
}

impl RunEntry for PageEntry {
    const HEAD_BYTES: usize = size_of::<PageHead>();
    const ENTRIES_MAX: usize = limits::BATCH_PAGES_MAX;

    fn further(&self, pages: u32, _before: u32) -> Option<Self> {
        Some(Self { page: self.page.checked_add(pages)?, ..*self })
    }

    fn range(&self) -> Option<PageRange> {
        Some(self.range())
    }

    fn joined(&self, pages: u32) -> Option<Self> {
        let run_pages = u16::try_from(pages).ok()?;
        (self.encoding == Encoding::Zero).then_some(Self { run_pages, ..*self })
    }

    fn encode_head(&self, pages: u32, gaps: bool, table: &mut Vec<u8>) {
        let head = PageHead {
            page: self.page.0.into(),
            pages: (pages as u16).into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            gaps: gaps.into(),
            encoded_bytes: self.encoded_bytes.into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<Head<Self>, Malformed> {
        let head: &PageHead = head(bytes)?;
        let encoding = Encoding::decode(head.encoding)?;
        let encoded_bytes = match encoding {
            Encoding::Raw => PAGE_BYTES,
            Encoding::Zero | Encoding::Gone => 0,
        };
        if usize::from(head.encoded_bytes.get()) != encoded_bytes {
            return Err(Malformed::Bounds("encoded length"));
        }
        let (page, pages, gaps) = run(head.page, head.pages.get().into(), head.gaps.into())?;
        let first = Self {
            page,
            run_pages: 1,
            round: Round(head.round.get()),
            encoding,
            encoded_bytes: encoded_bytes as u16,
            checksum: Checksum(0),
        };
        Ok(Head { first, pages, gaps })
    }

    fn checksum(&self) -> Option<Checksum> {
        (self.encoding == Encoding::Raw).then_some(self.checksum)
    }

    fn set_checksum(&mut self, checksum: Checksum) {
        self.checksum = checksum;
    }
}

/// Pages of one round in consecutive slots of one member under one generation, whatever gaps there are between
/// the pages; or zero pages, of which those that follow one another are one entry.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IndexHead {
    page: U32,
    pages: U32,
    /// Of the first page; zero for zero pages.
    placement: U64,
    round: U16,
    encoding: u8,
    /// 1 where a mask follows, else 0.
    gaps: u8,
}

const _: () = assert!(size_of::<IndexHead>() == 20);

impl RunEntry for IndexEntry {
    const HEAD_BYTES: usize = size_of::<IndexHead>();
    const ENTRIES_MAX: usize = limits::INDEX_ENTRIES_MAX;

    fn further(&self, pages: u32, before: u32) -> Option<Self> {
        let placement = match self.placement {
            None => None,
            Some(first) => Some(further(first, before)?),
        };
        Some(Self { page: self.page.checked_add(pages)?, placement, ..*self })
    }

    fn range(&self) -> Option<PageRange> {
        Some(self.range())
    }

    fn joined(&self, pages: u32) -> Option<Self> {
        self.placement.is_none().then_some(Self { run_pages: pages, ..*self })
    }

    fn encode_head(&self, pages: u32, gaps: bool, table: &mut Vec<u8>) {
        let head = IndexHead {
            page: self.page.0.into(),
            pages: pages.into(),
            placement: self.placement.map_or(0, Placement::to_bits).into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            gaps: gaps.into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<Head<Self>, Malformed> {
        let head: &IndexHead = head(bytes)?;
        let encoding = Encoding::decode(head.encoding)?;
        let (page, pages, gaps) = run(head.page, head.pages.get(), head.gaps.into())?;
        let placement = placement(head.placement)?;
        match (encoding, placement) {
            (Encoding::Raw, Some(_)) | (Encoding::Zero, None) => {}
            (Encoding::Raw | Encoding::Zero, _) => return Err(Malformed::Bounds("placement")),
            (Encoding::Gone, _) => {
                return Err(Malformed::Bounds("encoding of an index entry"));
            }
        }
        let round = Round(head.round.get());
        let first = Self { page, run_pages: 1, round, encoding, placement, checksum: Checksum(0) };
        Ok(Head { first, pages, gaps })
    }

    fn checksum(&self) -> Option<Checksum> {
        self.placement.is_some().then_some(self.checksum)
    }

    fn set_checksum(&mut self, checksum: Checksum) {
        self.checksum = checksum;
    }
}

/// The placement in the slot `n` further on.
fn further(first: Placement, n: u32) -> Option<Placement> {
    Some(Placement { slot: SlotIndex(first.slot.0.checked_add(n)?), ..first })
}

fn head<H: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> Result<&H, Malformed> {
    H::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)
}

/// First page and pages of a run, and whether a mask follows: `gaps` is one of two values, and a mask has 64 bits.
fn run(first: U32, pages: u32, gaps: u16) -> Result<(PageIndex, u32, bool), Malformed> {
    let first = PageIndex(first.get());
    check_run(first, pages)?;
    match gaps {
        0 => Ok((first, pages, false)),
        1 if pages <= u64::BITS => Ok((first, pages, true)),
        1 => Err(Malformed::Bounds("mask of a run")),
        _ => Err(Malformed::Reserved),
    }
}

/// A placement; zero is none.
fn placement(bits: U64) -> Result<Option<Placement>, Malformed> {
    match Placement::from_bits(bits.get()) {
        None if bits.get() != 0 => Err(Malformed::Bounds("placement")),
        placement => Ok(placement),
    }
}

/// Pages in consecutive slots of one member under one generation.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GetHead {
    page: U32,
    pages: U16,
    /// 1 where a mask follows, else 0.
    gaps: U16,
    placement: U64,
}

const _: () = assert!(size_of::<GetHead>() == 16);

impl RunEntry for GetEntry {
    const HEAD_BYTES: usize = size_of::<GetHead>();
    const ENTRIES_MAX: usize = limits::BATCH_PAGES_MAX;

    fn further(&self, pages: u32, before: u32) -> Option<Self> {
        Some(Self { page: self.page.checked_add(pages)?, placement: further(self.placement, before)? })
    }

    fn range(&self) -> Option<PageRange> {
        Some(PageRange::new(self.page, 1))
    }

    fn joined(&self, _pages: u32) -> Option<Self> {
        None
    }

    fn encode_head(&self, pages: u32, gaps: bool, table: &mut Vec<u8>) {
        let head = GetHead {
            page: self.page.0.into(),
            pages: (pages as u16).into(),
            gaps: u16::from(gaps).into(),
            placement: self.placement.to_bits().into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<Head<Self>, Malformed> {
        let head: &GetHead = head(bytes)?;
        let (page, pages, gaps) = run(head.page, head.pages.get().into(), head.gaps.get())?;
        let placement = placement(head.placement)?.ok_or(Malformed::Bounds("placement"))?;
        Ok(Head { first: Self { page, placement }, pages, gaps })
    }
}

/// Consecutive slots of an answer to `Put`, or all zero for pages that were not stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoredHead {
    placement: U64,
    pages: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<StoredHead>() == 12);

/// A placement in an answer to `Put`: `None` where the page was not stored.
impl RunEntry for Option<Placement> {
    const HEAD_BYTES: usize = size_of::<StoredHead>();
    const ENTRIES_MAX: usize = limits::BATCH_PAGES_MAX;

    fn further(&self, _pages: u32, before: u32) -> Option<Self> {
        match self {
            None => Some(None),
            Some(first) => further(*first, before).map(Some),
        }
    }

    /// Of which pages is for the one to say who asked.
    fn range(&self) -> Option<PageRange> {
        None
    }

    fn joined(&self, _pages: u32) -> Option<Self> {
        None
    }

    fn encode_head(&self, pages: u32, _gaps: bool, table: &mut Vec<u8>) {
        let head = StoredHead {
            placement: self.map_or(0, Placement::to_bits).into(),
            pages: (pages as u16).into(),
            reserved: 0.into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<Head<Self>, Malformed> {
        let head: &StoredHead = head(bytes)?;
        if head.reserved.get() != 0 {
            return Err(Malformed::Reserved);
        }
        let pages = u32::from(head.pages.get());
        if pages == 0 {
            return Err(Malformed::Bounds("run of slots"));
        }
        Ok(Head { first: placement(head.placement)?, pages, gaps: false })
    }
}
