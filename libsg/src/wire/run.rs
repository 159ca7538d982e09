//! Tables of runs: pages that follow one another travel as one head and a checksum each.
//!
//! A table has three parts: the heads of its runs, of a fixed size, as many as the header counts; the
//! checksums of all pages that have bytes, 4 bytes each, in the order of the pages; and in page frames the bytes.
//! The first part says how long the second is, and both how long the third is, so that nothing is read, or made
//! room for, that was not bounded before. In memory there is an entry for each page: encoding joins what follows
//! one another, decoding spreads it out again, into a buffer of at most [`RunEntry::ENTRIES_MAX`].

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Malformed;
use super::entry::{CONTENT_HASH_BYTES, Encoding, GetEntry, IndexEntry, PageEntry, check_run, page_bytes};
use crate::ids::{Checksum, Placement, Round, SlotIndex};
use crate::limits;
use crate::page::{PAGE_BYTES, PageIndex};

/// Bytes of one checksum in a table.
pub const CHECKSUM_BYTES: usize = size_of::<u32>();

/// An entry that travels in runs.
pub trait RunEntry: Copy + PartialEq {
    /// Bytes of the head of a run.
    const HEAD_BYTES: usize;

    /// Entries of one table, spread out.
    const ENTRIES_MAX: usize;

    /// The entry `n` further on in a run that begins with this one, but with this one's checksum. `None` where
    /// there is none: past the last number, or as this one stands for many pages itself.
    fn nth(&self, n: u32) -> Option<Self>;

    /// Appends the head of a run of `entries` that begins with this one.
    fn encode_head(&self, entries: u32, table: &mut Vec<u8>);

    /// The first entry of a run, its checksum zero, and how many entries the run has: at least one, all of
    /// which [`Self::nth`] gives.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    fn decode_head(bytes: &[u8]) -> Result<(Self, u32), Malformed>;

    /// The checksum that travels behind the heads; `None` for an entry that has none.
    fn checksum(&self) -> Option<Checksum> {
        None
    }

    /// Sets the checksum of an entry that has one.
    fn set_checksum(&mut self, _checksum: Checksum) {}
}

/// Appends `entries` to `table`, as few runs as they are. Returns how many: the count in the frame's header.
pub fn encode_runs<E: RunEntry>(entries: impl IntoIterator<Item = E> + Clone, table: &mut Vec<u8>) -> usize {
    let mut runs = 0;
    for (first, count) in runs_of(entries.clone()) {
        first.encode_head(count, table);
        runs += 1;
    }
    for sum in entries.into_iter().filter_map(|entry| entry.checksum()) {
        table.extend_from_slice(&sum.0.to_le_bytes());
    }
    runs
}

/// Bytes of the table of these entries.
#[must_use]
pub fn table_bytes<E: RunEntry>(entries: &[E]) -> usize {
    runs_of(entries.iter().copied()).count() * E::HEAD_BYTES + checksum_bytes(entries)
}

/// The first entry of each run, and how many follow one another from it on, itself included.
fn runs_of<E: RunEntry>(entries: impl IntoIterator<Item = E>) -> impl Iterator<Item = (E, u32)> {
    let mut ahead = entries.into_iter().peekable();
    std::iter::from_fn(move || {
        let first = ahead.next()?;
        let mut count = 1;
        while count < E::ENTRIES_MAX as u32 && ahead.next_if(|next| follows(&first, count, next)).is_some() {
            count += 1;
        }
        Some((first, count))
    })
}

/// Whether `next` is the `n`-th entry of a run that begins with `first`, whatever its checksum.
fn follows<E: RunEntry>(first: &E, n: u32, next: &E) -> bool {
    let Some(mut expected) = first.nth(n) else { return false };
    if let Some(sum) = next.checksum() {
        expected.set_checksum(sum);
    }
    expected == *next
}

/// Decodes the heads of `count` runs into `out`, which is cleared first: an entry for each page, without
/// its checksum.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_heads<E: RunEntry>(bytes: &[u8], count: usize, out: &mut Vec<E>) -> Result<(), Malformed> {
    out.clear();
    match bytes.len().cmp(&count.saturating_mul(E::HEAD_BYTES)) {
        std::cmp::Ordering::Less => return Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => return Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => {}
    }
    for head in bytes.chunks_exact(E::HEAD_BYTES) {
        let (first, entries) = E::decode_head(head)?;
        if entries as usize > E::ENTRIES_MAX - out.len() {
            return Err(Malformed::Bounds("entries of a table"));
        }
        for n in 0..entries {
            out.push(first.nth(n).ok_or(Malformed::Bounds("run of pages"))?);
        }
    }
    Ok(())
}

/// Bytes of the checksums that follow the heads of these entries.
#[must_use]
pub fn checksum_bytes<E: RunEntry>(entries: &[E]) -> usize {
    entries.iter().filter(|entry| entry.checksum().is_some()).count() * CHECKSUM_BYTES
}

/// Gives decoded entries their checksums, of which there are exactly [`checksum_bytes`].
///
/// # Errors
/// There are fewer or more.
pub fn decode_checksums<E: RunEntry>(bytes: &[u8], entries: &mut [E]) -> Result<(), Malformed> {
    let mut sums = bytes.chunks_exact(CHECKSUM_BYTES);
    for entry in entries.iter_mut().filter(|entry| entry.checksum().is_some()) {
        let bytes = sums.next().and_then(|bytes| bytes.try_into().ok()).ok_or(Malformed::Truncated)?;
        entry.set_checksum(Checksum(u32::from_le_bytes(bytes)));
    }
    if sums.next().is_some() || !sums.remainder().is_empty() {
        return Err(Malformed::Trailing);
    }
    Ok(())
}

/// Decodes a table of exactly `count` runs into `out`, which is cleared first: an entry for each page.
///
/// # Errors
/// What is wrong with the bytes; what `out` then holds means nothing.
pub fn decode_runs<E: RunEntry>(bytes: &[u8], count: usize, out: &mut Vec<E>) -> Result<(), Malformed> {
    decode_checksums(heads_then(bytes, count, out)?, out)
}

/// Decodes the heads, and gives what follows them.
fn heads_then<'a, E: RunEntry>(
    bytes: &'a [u8],
    count: usize,
    out: &mut Vec<E>,
) -> Result<&'a [u8], Malformed> {
    let heads = count.saturating_mul(E::HEAD_BYTES);
    let (heads, rest) = bytes.split_at_checked(heads).ok_or(Malformed::Truncated)?;
    decode_heads(heads, count, out)?;
    Ok(rest)
}

/// Decodes the body of a page frame (`Put`, `GetReply`, `Pages`): `count` runs into `out`, and the page
/// bytes behind them, which are exactly as many as the entries say.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_pages<'a>(
    body: &'a [u8],
    count: usize,
    out: &mut Vec<PageEntry>,
) -> Result<&'a [u8], Malformed> {
    let rest = heads_then(body, count, out)?;
    let (sums, bytes) = rest.split_at_checked(checksum_bytes(out)).ok_or(Malformed::Truncated)?;
    decode_checksums(sums, out)?;
    match bytes.len().cmp(&page_bytes(out)) {
        std::cmp::Ordering::Less => Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => Ok(bytes),
    }
}

/// Pages that are encoded in the same way. A run of zero pages is one entry; of others there is one for each.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHead {
    page: U32,
    pages: U16,
    round: U16,
    encoding: u8,
    reserved: u8,
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

    fn nth(&self, n: u32) -> Option<Self> {
        let many = self.encoding == Encoding::Zero && n > 0;
        let page = self.page.checked_add(n).filter(|_| !many)?;
        Some(Self { page, ..*self })
    }

    fn encode_head(&self, entries: u32, table: &mut Vec<u8>) {
        let pages = if self.encoding == Encoding::Zero { self.run_pages } else { entries as u16 };
        let head = PageHead {
            page: self.page.0.into(),
            pages: pages.into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            reserved: 0,
            encoded_bytes: self.encoded_bytes.into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<(Self, u32), Malformed> {
        let head = PageHead::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if head.reserved != 0 {
            return Err(Malformed::Reserved);
        }
        let encoding = Encoding::decode(head.encoding)?;
        let encoded_bytes = match encoding {
            Encoding::Raw => PAGE_BYTES,
            Encoding::Reference => CONTENT_HASH_BYTES,
            Encoding::Zero | Encoding::Gone => 0,
        };
        if usize::from(head.encoded_bytes.get()) != encoded_bytes {
            return Err(Malformed::Bounds("encoded length"));
        }
        let (page, pages) = (PageIndex(head.page.get()), head.pages.get());
        check_run(page, pages.into())?;
        let (run_pages, entries) = if encoding == Encoding::Zero { (pages, 1) } else { (1, pages) };
        let first = Self {
            page,
            run_pages,
            round: Round(head.round.get()),
            encoding,
            encoded_bytes: encoded_bytes as u16,
            checksum: Checksum(0),
        };
        Ok((first, entries.into()))
    }

    fn checksum(&self) -> Option<Checksum> {
        matches!(self.encoding, Encoding::Raw | Encoding::Reference).then_some(self.checksum)
    }

    fn set_checksum(&mut self, checksum: Checksum) {
        self.checksum = checksum;
    }
}

/// Pages of one round in consecutive slots of one member under one generation, or a run of zero pages, which is
/// one entry.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IndexHead {
    page: U32,
    pages: U32,
    /// Of the first page; zero for zero pages.
    placement: U64,
    round: U16,
    encoding: u8,
    reserved: u8,
}

const _: () = assert!(size_of::<IndexHead>() == 20);

impl RunEntry for IndexEntry {
    const HEAD_BYTES: usize = size_of::<IndexHead>();
    const ENTRIES_MAX: usize = limits::INDEX_ENTRIES_MAX;

    fn nth(&self, n: u32) -> Option<Self> {
        match self.placement {
            None => (n == 0).then_some(*self),
            Some(first) => {
                let page = self.page.checked_add(n)?;
                Some(Self { page, placement: Some(further(first, n)?), ..*self })
            }
        }
    }

    fn encode_head(&self, entries: u32, table: &mut Vec<u8>) {
        let head = IndexHead {
            page: self.page.0.into(),
            pages: if self.placement.is_none() { self.run_pages } else { entries }.into(),
            placement: self.placement.map_or(0, Placement::to_bits).into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            reserved: 0,
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<(Self, u32), Malformed> {
        let head = IndexHead::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if head.reserved != 0 {
            return Err(Malformed::Reserved);
        }
        let encoding = Encoding::decode(head.encoding)?;
        let (page, pages, bits) = (PageIndex(head.page.get()), head.pages.get(), head.placement.get());
        check_run(page, pages)?;
        let placement = Placement::from_bits(bits);
        let (run_pages, entries) = match (encoding, placement) {
            (Encoding::Raw, Some(first)) => {
                check_slots(first, pages)?;
                (1, pages)
            }
            (Encoding::Zero, None) if bits == 0 => (pages, 1),
            (Encoding::Raw | Encoding::Zero, _) => return Err(Malformed::Bounds("placement")),
            (Encoding::Reference | Encoding::Gone, _) => {
                return Err(Malformed::Bounds("encoding of an index entry"));
            }
        };
        let round = Round(head.round.get());
        Ok((Self { page, run_pages, round, encoding, placement, checksum: Checksum(0) }, entries))
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

/// A run of slots ends at one that has a number.
fn check_slots(first: Placement, pages: u32) -> Result<(), Malformed> {
    match pages.checked_sub(1).and_then(|last| further(first, last)) {
        Some(_) => Ok(()),
        None => Err(Malformed::Bounds("run of slots")),
    }
}

/// Pages in consecutive slots of one member under one generation.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GetHead {
    page: U32,
    pages: U16,
    reserved: U16,
    placement: U64,
}

const _: () = assert!(size_of::<GetHead>() == 16);

impl RunEntry for GetEntry {
    const HEAD_BYTES: usize = size_of::<GetHead>();
    const ENTRIES_MAX: usize = limits::BATCH_PAGES_MAX;

    fn nth(&self, n: u32) -> Option<Self> {
        Some(Self { page: self.page.checked_add(n)?, placement: further(self.placement, n)? })
    }

    fn encode_head(&self, entries: u32, table: &mut Vec<u8>) {
        let head = GetHead {
            page: self.page.0.into(),
            pages: (entries as u16).into(),
            reserved: 0.into(),
            placement: self.placement.to_bits().into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<(Self, u32), Malformed> {
        let head = GetHead::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if head.reserved.get() != 0 {
            return Err(Malformed::Reserved);
        }
        let (page, pages) = (PageIndex(head.page.get()), u32::from(head.pages.get()));
        check_run(page, pages)?;
        let placement = Placement::from_bits(head.placement.get()).ok_or(Malformed::Bounds("placement"))?;
        check_slots(placement, pages)?;
        Ok((Self { page, placement }, pages))
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

    fn nth(&self, n: u32) -> Option<Self> {
        match self {
            None => Some(None),
            Some(first) => further(*first, n).map(Some),
        }
    }

    fn encode_head(&self, entries: u32, table: &mut Vec<u8>) {
        let head = StoredHead {
            placement: self.map_or(0, Placement::to_bits).into(),
            pages: (entries as u16).into(),
            reserved: 0.into(),
        };
        table.extend_from_slice(head.as_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Result<(Self, u32), Malformed> {
        let head = StoredHead::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if head.reserved.get() != 0 {
            return Err(Malformed::Reserved);
        }
        let (bits, pages) = (head.placement.get(), u32::from(head.pages.get()));
        if pages == 0 {
            return Err(Malformed::Bounds("run of slots"));
        }
        match Placement::from_bits(bits) {
            None if bits == 0 => Ok((None, pages)),
            None => Err(Malformed::Bounds("placement")),
            Some(first) => check_slots(first, pages).map(|()| (Some(first), pages)),
        }
    }
}

#[cfg(test)]
#[path = "run_test.rs"]
mod test;
