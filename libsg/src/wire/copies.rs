//! What is said of copies: which members hold a page, which have none of a batch, and what a forwarded batch
//! consists of.

use super::Malformed;
use super::entry::{Encoding, Entry, IndexEntry};
use crate::ids::MemberSet;
use crate::limits;
use crate::page::PAGE_BYTES;

impl Entry for MemberSet {
    const BYTES: usize = size_of::<u64>();

    fn encode(&self, out: &mut [u8]) {
        out[..Self::BYTES].copy_from_slice(&self.0.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Ok(Self(u64::from_le_bytes(bytes.try_into().map_err(|_| Malformed::Truncated)?)))
    }
}

/// The members that have none of a batch that they were to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Missing {
    /// They had no room.
    pub full: MemberSet,
    /// They could not be reached, or did not answer.
    pub lost: MemberSet,
}

impl Missing {
    /// Nobody: all of them have it.
    pub const NONE: Self = Self { full: MemberSet::NONE, lost: MemberSet::NONE };

    /// Whether all of them have it.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// All of them, whatever the reason.
    #[must_use]
    pub const fn all(&self) -> MemberSet {
        self.full.or(self.lost)
    }
}

impl Entry for Missing {
    const BYTES: usize = 2 * MemberSet::BYTES;

    fn encode(&self, out: &mut [u8]) {
        self.full.encode(&mut out[..MemberSet::BYTES]);
        self.lost.encode(&mut out[MemberSet::BYTES..Self::BYTES]);
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (full, lost) = bytes.split_at_checked(MemberSet::BYTES).ok_or(Malformed::Truncated)?;
        let missing = Self { full: MemberSet::decode(full)?, lost: MemberSet::decode(lost)? };
        if !missing.full.and(missing.lost).is_empty() {
            return Err(Malformed::Bounds("members that have no copy"));
        }
        Ok(missing)
    }
}

/// Bytes of the pages that follow the table of a forwarded batch.
///
/// # Errors
/// A batch of too many pages, or of such as have no bytes.
pub fn copied_bytes(entries: &[IndexEntry]) -> Result<usize, Malformed> {
    let placed = |entry: &IndexEntry| entry.encoding == Encoding::Raw && entry.placement.is_some();
    if entries.is_empty() || entries.len() > limits::BATCH_PAGES_MAX || !entries.iter().all(placed) {
        return Err(Malformed::Bounds("copies"));
    }
    entries.len().checked_mul(PAGE_BYTES).ok_or(Malformed::Bounds("copies"))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex};
    use crate::page::PageIndex;

    #[test]
    fn sets_travel_as_bits() {
        let set: MemberSet = [MemberIndex(0), MemberIndex(63)].into_iter().collect();
        let mut bytes = [0; 8];
        set.encode(&mut bytes);
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0x80]);
        assert_eq!(MemberSet::decode(&bytes), Ok(set));
        assert_eq!(set.iter().map(|member| member.0).collect::<Vec<_>>(), [0, 63]);
        assert!(!set.contains(MemberIndex(64)) && MemberSet::of(MemberIndex(64)).is_empty());
        assert_eq!(MemberSet::decode(&bytes[1..]), Err(Malformed::Truncated));
    }

    #[test]
    fn nobody_is_missing_for_two_reasons() {
        let missing = Missing { full: MemberSet(6), lost: MemberSet(1) };
        let mut bytes = [0; Missing::BYTES];
        missing.encode(&mut bytes);
        assert_eq!(Missing::decode(&bytes), Ok(missing));
        assert_eq!(missing.all(), MemberSet(7));
        bytes[0] |= 1;
        assert_eq!(Missing::decode(&bytes), Err(Malformed::Bounds("members that have no copy")));
        assert_eq!(Missing::decode(&bytes[..9]), Err(Malformed::Truncated));
    }

    #[test]
    fn a_forwarded_batch_has_bytes_for_each_page() {
        let place = Placement { member: MemberIndex(1), slot: SlotIndex(1), generation: Generation(1) };
        let entry = IndexEntry::at(PageIndex(1), Round(0), place, Checksum(1));
        assert_eq!(copied_bytes(&[entry; 3]), Ok(3 * PAGE_BYTES));
        let bad = Err(Malformed::Bounds("copies"));
        assert_eq!(copied_bytes(&[]), bad);
        assert_eq!(copied_bytes(&vec![entry; limits::BATCH_PAGES_MAX + 1]), bad);
        assert_eq!(copied_bytes(&[entry, IndexEntry::zero(PageIndex(2), 1, Round(0))]), bad);
    }
}
