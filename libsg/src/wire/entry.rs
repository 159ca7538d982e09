//! The tables of fixed-size entries that batches consist of.
//!
//! Entries are encoded into, and decoded from, tables without allocation. A table is trusted
//! only once every entry of it has been decoded.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Malformed;
use crate::ids::{Checksum, Placement, Round};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};

/// How a page's bytes travel. Zero is invalid; numbers above these are kept for compressed and
/// sealed (encrypted) pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// As they are: 4096 bytes.
    Raw = 1,
    /// All zero, or never touched: no bytes at all.
    Zero = 2,
    /// By reference to bytes that the receiver may already hold: a content hash travels instead.
    /// A receiver that does not hold them says so by storing nothing, and the page is sent raw.
    Reference = 3,
    /// In answers only: whoever was asked has no bytes for this page.
    Gone = 4,
}

impl Encoding {
    fn decode(value: u8) -> Result<Self, Malformed> {
        match value {
            1 => Ok(Self::Raw),
            2 => Ok(Self::Zero),
            3 => Ok(Self::Reference),
            4 => Ok(Self::Gone),
            _ => Err(Malformed::Unknown("encoding", u32::from(value))),
        }
    }
}

/// Bytes of the content hash of a page that travels by reference.
pub const CONTENT_HASH_BYTES: usize = 32;

/// An entry of a fixed size in a table.
pub trait Entry: Sized + Copy {
    /// Bytes of one entry on the wire.
    const BYTES: usize;

    /// Writes the entry to the start of `out`, which has at least [`Self::BYTES`] bytes.
    fn encode(&self, out: &mut [u8]);

    /// Reads one entry from exactly [`Self::BYTES`] bytes.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    fn decode(bytes: &[u8]) -> Result<Self, Malformed>;
}

/// Appends `entries` to `table`.
pub fn encode_table<E: Entry>(entries: impl IntoIterator<Item = E>, table: &mut Vec<u8>) {
    for entry in entries {
        let at = table.len();
        table.resize(at + E::BYTES, 0);
        entry.encode(&mut table[at..]);
    }
}

/// Decodes a table of exactly `count` entries into `out`, which is cleared first.
///
/// # Errors
/// What is wrong with the bytes; `out` then holds the entries before the bad one.
pub fn decode_table<E: Entry>(bytes: &[u8], count: usize, out: &mut Vec<E>) -> Result<(), Malformed> {
    out.clear();
    match bytes.len().cmp(&count.saturating_mul(E::BYTES)) {
        std::cmp::Ordering::Less => return Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => return Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => {}
    }
    for entry in bytes.chunks_exact(E::BYTES) {
        out.push(E::decode(entry)?);
    }
    Ok(())
}

/// Decodes the body of a page frame (`Put`, `GetReply`, `Pages`): `count` entries into `out`, and
/// the page bytes behind them, which are exactly as many as the entries say.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_pages<'a>(
    body: &'a [u8],
    count: usize,
    out: &mut Vec<PageEntry>,
) -> Result<&'a [u8], Malformed> {
    let (table, bytes) = body.split_at_checked(count * PageEntry::BYTES).ok_or(Malformed::Truncated)?;
    decode_table(table, count, out)?;
    match bytes.len().cmp(&page_bytes(out)) {
        std::cmp::Ordering::Less => Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => Ok(bytes),
    }
}

/// Bytes that follow a table of these entries.
#[must_use]
pub fn page_bytes(entries: &[PageEntry]) -> usize {
    entries.iter().map(|entry| entry.encoded_bytes as usize).sum()
}

/// A page (or a run of zero pages) of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Which page, or the first of a run.
    pub page: PageIndex,
    /// Pages in the run: 1, or more for `Zero`.
    pub run_pages: u16,
    /// How often it was scattered before.
    pub round: Round,
    /// How its bytes travel.
    pub encoding: Encoding,
    /// Bytes of it that follow the table.
    pub encoded_bytes: u16,
    /// Of the page before encoding; zero where there are no bytes.
    pub checksum: Checksum,
}

impl PageEntry {
    /// A page whose 4096 bytes follow.
    #[must_use]
    pub const fn raw(page: PageIndex, round: Round, checksum: Checksum) -> Self {
        Self {
            page,
            run_pages: 1,
            round,
            encoding: Encoding::Raw,
            encoded_bytes: PAGE_BYTES as u16,
            checksum,
        }
    }

    /// A run of zero pages.
    #[must_use]
    pub const fn zero(page: PageIndex, run_pages: u16, round: Round) -> Self {
        Self { page, run_pages, round, encoding: Encoding::Zero, encoded_bytes: 0, checksum: Checksum(0) }
    }

    /// The answer for a page that is not here.
    #[must_use]
    pub const fn gone(page: PageIndex) -> Self {
        Self {
            page,
            run_pages: 1,
            round: Round(0),
            encoding: Encoding::Gone,
            encoded_bytes: 0,
            checksum: Checksum(0),
        }
    }

    /// The pages it is about.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        PageRange::new(self.page, self.run_pages as u32)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPage {
    page: U32,
    checksum: U32,
    round: U16,
    encoding: u8,
    reserved: u8,
    run_pages: U16,
    encoded_bytes: U16,
}

const _: () = assert!(size_of::<RawPage>() == 16);

impl Entry for PageEntry {
    const BYTES: usize = size_of::<RawPage>();

    fn encode(&self, out: &mut [u8]) {
        let raw = RawPage {
            page: self.page.0.into(),
            checksum: self.checksum.0.into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            reserved: 0,
            run_pages: self.run_pages.into(),
            encoded_bytes: self.encoded_bytes.into(),
        };
        out[..Self::BYTES].copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let raw = RawPage::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if raw.reserved != 0 {
            return Err(Malformed::Reserved);
        }
        let entry = Self {
            page: PageIndex(raw.page.get()),
            run_pages: raw.run_pages.get(),
            round: Round(raw.round.get()),
            encoding: Encoding::decode(raw.encoding)?,
            encoded_bytes: raw.encoded_bytes.get(),
            checksum: Checksum(raw.checksum.get()),
        };
        let bytes = match entry.encoding {
            Encoding::Raw => PAGE_BYTES,
            Encoding::Reference => CONTENT_HASH_BYTES,
            Encoding::Zero | Encoding::Gone => 0,
        };
        if usize::from(entry.encoded_bytes) != bytes {
            return Err(Malformed::Bounds("encoded length"));
        }
        check_run(entry.page, u32::from(entry.run_pages), entry.encoding)?;
        Ok(entry)
    }
}

fn check_run(page: PageIndex, run_pages: u32, encoding: Encoding) -> Result<(), Malformed> {
    let single = encoding != Encoding::Zero;
    if run_pages == 0 || (single && run_pages != 1) || page.0.checked_add(run_pages).is_none() {
        return Err(Malformed::Bounds("run of pages"));
    }
    Ok(())
}

/// Where a page (or a run of zero pages) is: what the index holds, and what is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Which page, or the first of a run.
    pub page: PageIndex,
    /// Pages in the run: 1, or more for `Zero`.
    pub run_pages: u32,
    /// How often it was scattered before; an entry replaces one of an older round or the same, never of a
    /// newer one.
    pub round: Round,
    /// How its bytes are kept.
    pub encoding: Encoding,
    /// Where its bytes lie; `None` for `Zero`.
    pub placement: Option<Placement>,
    /// Of the page's bytes; zero where there are none.
    pub checksum: Checksum,
}

impl IndexEntry {
    /// A page whose bytes lie at `placement`.
    #[must_use]
    pub const fn at(page: PageIndex, round: Round, placement: Placement, checksum: Checksum) -> Self {
        Self { page, run_pages: 1, round, encoding: Encoding::Raw, placement: Some(placement), checksum }
    }

    /// A run of zero pages.
    #[must_use]
    pub const fn zero(page: PageIndex, run_pages: u32, round: Round) -> Self {
        Self { page, run_pages, round, encoding: Encoding::Zero, placement: None, checksum: Checksum(0) }
    }

    /// The pages it is about.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        PageRange::new(self.page, self.run_pages)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIndex {
    page: U32,
    checksum: U32,
    placement: U64,
    round: U16,
    encoding: u8,
    reserved: u8,
    run_pages: U32,
}

const _: () = assert!(size_of::<RawIndex>() == 24);

impl Entry for IndexEntry {
    const BYTES: usize = size_of::<RawIndex>();

    fn encode(&self, out: &mut [u8]) {
        let raw = RawIndex {
            page: self.page.0.into(),
            checksum: self.checksum.0.into(),
            placement: self.placement.map_or(0, Placement::to_bits).into(),
            round: self.round.0.into(),
            encoding: self.encoding as u8,
            reserved: 0,
            run_pages: self.run_pages.into(),
        };
        out[..Self::BYTES].copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let raw = RawIndex::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if raw.reserved != 0 {
            return Err(Malformed::Reserved);
        }
        let entry = Self {
            page: PageIndex(raw.page.get()),
            run_pages: raw.run_pages.get(),
            round: Round(raw.round.get()),
            encoding: Encoding::decode(raw.encoding)?,
            placement: Placement::from_bits(raw.placement.get()),
            checksum: Checksum(raw.checksum.get()),
        };
        let placed = match entry.encoding {
            Encoding::Raw => true,
            Encoding::Zero => false,
            Encoding::Reference | Encoding::Gone => {
                return Err(Malformed::Bounds("encoding of an index entry"));
            }
        };
        if entry.placement.is_some() != placed || (!placed && raw.placement.get() != 0) {
            return Err(Malformed::Bounds("placement"));
        }
        check_run(entry.page, entry.run_pages, entry.encoding)?;
        Ok(entry)
    }
}

/// A page that is asked for at the place where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetEntry {
    /// Which page.
    pub page: PageIndex,
    /// Where its bytes lie.
    pub placement: Placement,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGet {
    page: U32,
    reserved: U32,
    placement: U64,
}

const _: () = assert!(size_of::<RawGet>() == 16);

impl Entry for GetEntry {
    const BYTES: usize = size_of::<RawGet>();

    fn encode(&self, out: &mut [u8]) {
        let raw = RawGet {
            page: self.page.0.into(),
            reserved: 0.into(),
            placement: self.placement.to_bits().into(),
        };
        out[..Self::BYTES].copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let raw = RawGet::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if raw.reserved.get() != 0 {
            return Err(Malformed::Reserved);
        }
        let placement = Placement::from_bits(raw.placement.get()).ok_or(Malformed::Bounds("placement"))?;
        Ok(Self { page: PageIndex(raw.page.get()), placement })
    }
}

/// Pages of a range that are to be dropped where they are of an older round: the body of `Discard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardEntry {
    /// Which pages.
    pub range: PageRange,
    /// Those of this round and above stay.
    pub below: Round,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDiscard {
    first: U32,
    pages: U32,
    below: U16,
    reserved: [u8; 6],
}

const _: () = assert!(size_of::<RawDiscard>() == 16);

impl Entry for DiscardEntry {
    const BYTES: usize = size_of::<RawDiscard>();

    fn encode(&self, out: &mut [u8]) {
        let raw = RawDiscard {
            first: self.range.first.0.into(),
            pages: self.range.pages.into(),
            below: self.below.0.into(),
            reserved: [0; 6],
        };
        out[..Self::BYTES].copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let raw = RawDiscard::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if raw.reserved != [0; 6] {
            return Err(Malformed::Reserved);
        }
        let range = PageRange::new(PageIndex(raw.first.get()), raw.pages.get());
        check_run(range.first, range.pages, Encoding::Zero)?;
        Ok(Self { range, below: Round(raw.below.get()) })
    }
}

impl Entry for PageRange {
    const BYTES: usize = 8;

    fn encode(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&self.first.0.to_le_bytes());
        out[4..8].copy_from_slice(&self.pages.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let word = |at: usize| -> Result<u32, Malformed> {
            let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_le_bytes).ok_or(Malformed::Truncated)
        };
        let (first, pages) = (word(0)?, word(4)?);
        check_run(PageIndex(first), pages, Encoding::Zero)?;
        Ok(Self::new(PageIndex(first), pages))
    }
}

impl Entry for PageIndex {
    const BYTES: usize = 4;

    fn encode(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&self.0.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        bytes.try_into().map(|b| Self(u32::from_le_bytes(b))).map_err(|_| Malformed::Truncated)
    }
}

/// A placement in an answer to `Put`: `None` where the page was not stored.
impl Entry for Option<Placement> {
    const BYTES: usize = 8;

    fn encode(&self, out: &mut [u8]) {
        out[..8].copy_from_slice(&self.map_or(0, Placement::to_bits).to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bits = bytes.try_into().map(u64::from_le_bytes).map_err(|_| Malformed::Truncated)?;
        match (bits, Placement::from_bits(bits)) {
            (0, _) => Ok(None),
            (_, Some(placement)) => Ok(Some(placement)),
            (_, None) => Err(Malformed::Bounds("placement")),
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Generation, MemberIndex, SlotIndex};

    fn placements() -> impl Strategy<Value = Placement> {
        (any::<u16>(), any::<u32>(), 1..=u16::MAX).prop_map(|(member, slot, generation)| Placement {
            member: MemberIndex(member),
            slot: SlotIndex(slot),
            generation: Generation(generation),
        })
    }

    fn round_trip<E: Entry + PartialEq + std::fmt::Debug>(entry: E) {
        let mut table = Vec::new();
        encode_table([entry, entry], &mut table);
        let mut back = Vec::<E>::new();
        decode_table(&table, 2, &mut back).expect("own bytes decode");
        assert_eq!(back, [entry, entry]);
        assert_eq!(decode_table(&table, 3, &mut back), Err(Malformed::Truncated));
        assert_eq!(decode_table(&table, 1, &mut back), Err(Malformed::Trailing));
    }

    proptest! {
        #[test]
        fn entries_round_trip(page in 0..u32::MAX - 70_000, round: u16, sum: u32, place in placements(), run in 1..=u16::MAX) {
            let page = PageIndex(page);
            round_trip(PageEntry::raw(page, Round(round), Checksum(sum)));
            round_trip(PageEntry::zero(page, run, Round(round)));
            round_trip(PageEntry::gone(page));
            round_trip(IndexEntry::at(page, Round(round), place, Checksum(sum)));
            round_trip(IndexEntry::zero(page, run.into(), Round(round)));
            round_trip(GetEntry { page, placement: place });
            round_trip(PageRange::new(page, run.into()));
            round_trip(DiscardEntry { range: PageRange::new(page, run.into()), below: Round(round) });
            round_trip(page);
            round_trip(Some(place));
            round_trip(None::<Placement>);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0usize..20) {
            let _ = decode_pages(&bytes, count, &mut Vec::new());
            let _ = decode_table::<IndexEntry>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<GetEntry>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<PageRange>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<DiscardEntry>(&bytes, count, &mut Vec::new());
        }
    }

    #[test]
    fn page_frames_have_exactly_the_bytes_they_say() {
        let entries =
            [PageEntry::raw(PageIndex(1), Round(0), Checksum(2)), PageEntry::zero(PageIndex(2), 9, Round(0))];
        let mut body = Vec::new();
        encode_table(entries, &mut body);
        body.extend([7; PAGE_BYTES]);
        let mut out = Vec::new();
        assert_eq!(decode_pages(&body, 2, &mut out), Ok(&[7; PAGE_BYTES][..]));
        assert_eq!(out, entries);
        body.pop();
        assert_eq!(decode_pages(&body, 2, &mut out), Err(Malformed::Truncated));
        body.extend([0, 0]);
        assert_eq!(decode_pages(&body, 2, &mut out), Err(Malformed::Trailing));
    }
}
