//! What tables consist of: entries of a fixed size, one after the other, and the entries that travel as
//! runs ([`super::run`]).
//!
//! Entries are encoded into, and decoded from, tables without allocation. A table is trusted
//! only once every entry of it has been decoded.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Malformed;
use crate::content::{CONTENT_HASH_BYTES, ContentHash};
use crate::ids::{Checksum, MemberIndex, Placement, Round};
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
    /// In answers only: whoever was asked has no bytes for this page.
    Gone = 4,
}

impl Encoding {
    pub(super) fn decode(value: u8) -> Result<Self, Malformed> {
        match value {
            1 => Ok(Self::Raw),
            2 => Ok(Self::Zero),
            4 => Ok(Self::Gone),
            _ => Err(Malformed::Unknown("encoding", u32::from(value))),
        }
    }
}

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

/// A run has pages, and ends at a page that has a number.
pub(super) fn check_run(page: PageIndex, run_pages: u32) -> Result<(), Malformed> {
    if run_pages == 0 || page.0.checked_add(run_pages).is_none() {
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

/// A page that is asked for at the place where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetEntry {
    /// Which page.
    pub page: PageIndex,
    /// Where its bytes lie.
    pub placement: Placement,
}

/// Pages of a range that are to be dropped where they are of an older round: the body of `Discard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardEntry {
    /// Which pages.
    pub range: PageRange,
    /// Those of this round and above stay.
    pub below: Round,
}

/// A page that is offered by the hash of its bytes: the body of `Refer` consists of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReferEntry {
    /// Which page.
    pub page: PageIndex,
    /// How often it was scattered before.
    pub round: Round,
    /// Of its bytes.
    pub hash: ContentHash,
}

impl Entry for ReferEntry {
    const BYTES: usize = 6 + CONTENT_HASH_BYTES;

    fn encode(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&self.page.0.to_le_bytes());
        out[4..6].copy_from_slice(&self.round.0.to_le_bytes());
        out[6..Self::BYTES].copy_from_slice(&self.hash.0);
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (page, rest) = bytes.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (round, hash) = rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        let hash = hash.try_into().map_err(|_| Malformed::Truncated)?;
        let page = PageIndex(u32::from_le_bytes(*page));
        check_run(page, 1)?;
        Ok(Self { page, round: Round(u16::from_le_bytes(*round)), hash: ContentHash(hash) })
    }
}

/// What became of a page that was offered: the body of the answer to `Refer` consists of these, 8 bytes each: a
/// placement or, under a generation of zero, which is none, a number for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Referral {
    /// Its bytes are there, and are its own from now on.
    Have(Placement),
    /// Nobody has them: who asked is the one to send them, for about a second.
    Send,
    /// Another is sending them: come back.
    Pending,
    /// This member of the volume may have them: it is to be asked.
    At(MemberIndex),
}

/// That bytes lie at a member, for the one who is asked about their hash: the body of `Hint` consists of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintEntry {
    /// Of the bytes.
    pub hash: ContentHash,
    /// Who has them.
    pub member: MemberIndex,
}

impl Entry for HintEntry {
    const BYTES: usize = 2 + CONTENT_HASH_BYTES;

    fn encode(&self, out: &mut [u8]) {
        out[..2].copy_from_slice(&self.member.0.to_le_bytes());
        out[2..Self::BYTES].copy_from_slice(&self.hash.0);
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (member, hash) = bytes.split_first_chunk().ok_or(Malformed::Truncated)?;
        let hash = hash.try_into().map_err(|_| Malformed::Truncated)?;
        let member = u16::from_le_bytes(*member);
        if usize::from(member) >= crate::limits::MEMBERS_MAX {
            return Err(Malformed::Bounds("member"));
        }
        Ok(Self { hash: ContentHash(hash), member: MemberIndex(member) })
    }
}

impl Entry for Referral {
    const BYTES: usize = 8;

    fn encode(&self, out: &mut [u8]) {
        let bits = match self {
            Self::Have(placement) => placement.to_bits(),
            Self::Send => 1,
            Self::Pending => 2,
            Self::At(member) => 3 | u64::from(member.0) << 48,
        };
        out[..Self::BYTES].copy_from_slice(&bits.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bits = u64::from_le_bytes(bytes.try_into().map_err(|_| Malformed::Truncated)?);
        match (Placement::from_bits(bits), bits) {
            (Some(placement), _) => Ok(Self::Have(placement)),
            (None, 1) => Ok(Self::Send),
            (None, 2) => Ok(Self::Pending),
            (None, bits) if bits & (u64::MAX >> 16) == 3 => Ok(Self::At(MemberIndex((bits >> 48) as u16))),
            (None, _) => Err(Malformed::Bounds("answer to an offered page")),
        }
    }
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
        check_run(range.first, range.pages)?;
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
        check_run(PageIndex(first), pages)?;
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

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Generation, SlotIndex};

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
        fn entries_round_trip(page in 0..u32::MAX - 70_000, round: u16, run in 1..=u16::MAX) {
            let page = PageIndex(page);
            round_trip(PageRange::new(page, run.into()));
            round_trip(DiscardEntry { range: PageRange::new(page, run.into()), below: Round(round) });
            round_trip(page);
            let hash = ContentHash([page.0 as u8; CONTENT_HASH_BYTES]);
            round_trip(ReferEntry { page, round: Round(round), hash });
            round_trip(HintEntry { hash, member: MemberIndex(run % 64) });
            let at = Placement { member: MemberIndex(run), slot: SlotIndex(page.0), generation: Generation(run) };
            for referral in [Referral::Have(at), Referral::Send, Referral::Pending, Referral::At(at.member)] {
                round_trip(referral);
            }
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0usize..20) {
            let _ = decode_table::<PageIndex>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<PageRange>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<DiscardEntry>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<ReferEntry>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<HintEntry>(&bytes, count, &mut Vec::new());
            let _ = decode_table::<Referral>(&bytes, count, &mut Vec::new());
        }
    }
}
