//! Names and numbers of things that are not pages. A node is a name plus a random incarnation, so
//! that one that restarted is a new one; a placement says where a page's bytes lie.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::crc;
use crate::error::{Error, ErrorKind};

/// One VM's pages in the VMD. Random, so that two sources never pick the same one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeId(pub u128);

impl VolumeId {
    /// A new random id, never zero (zero on the wire means "no volume").
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no random bytes.
    pub fn random() -> Result<Self, Error> {
        Ok(Self(u128::from_le_bytes(random_bytes()?) | 1))
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {self}")
    }
}

impl FromStr for VolumeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        u128::from_str_radix(text, 16).ok().filter(|id| *id != 0).map(Self).ok_or_else(|| {
            Error::new(ErrorKind::Input, format!("{text:?} is not a volume id (32 hexadecimal digits)"))
        })
    }
}

/// Random bytes from the kernel.
///
/// # Errors
/// [`ErrorKind::System`] when the kernel gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    crate::host::fill_random(&mut bytes)
        .map_err(|cause| Error::new(ErrorKind::System, "the kernel gives no random bytes").because(cause))?;
    Ok(bytes)
}

/// An intermediary: its configured name plus a random number drawn when the process started.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId {
    /// The name the operator gave (`--name`), at most [`crate::limits::NODE_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Random at each start: a restarted intermediary holds nothing of what it held before.
    pub incarnation: u64,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{:08x}", self.name, self.incarnation >> 32)
    }
}

/// Position of an intermediary in a volume's list of members, which only ever grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberIndex(pub u16);

impl MemberIndex {
    /// The index as a table position.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for MemberIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}", self.0 + 1)
    }
}

/// Some of a volume's intermediaries, a bit for each: there are at most [`crate::limits::MEMBERS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MemberSet(pub u64);

impl MemberSet {
    /// None.
    pub const NONE: Self = Self(0);

    /// Every one that there may be.
    pub const ALL: Self = Self(u64::MAX);

    /// Just this one. None for a number that no member has.
    #[must_use]
    pub fn of(member: MemberIndex) -> Self {
        Self(1_u64.checked_shl(member.0.into()).unwrap_or(0))
    }

    /// The first so many members.
    #[must_use]
    pub const fn first(members: usize) -> Self {
        if members >= u64::BITS as usize { Self::ALL } else { Self((1 << members) - 1) }
    }

    /// These and one more.
    #[must_use]
    pub fn with(self, member: MemberIndex) -> Self {
        self.or(Self::of(member))
    }

    /// These but one.
    #[must_use]
    pub fn without(self, member: MemberIndex) -> Self {
        self.but(Self::of(member))
    }

    /// These and those.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These but for those.
    #[must_use]
    pub const fn but(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those that are in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether a member is among them.
    #[must_use]
    pub fn contains(self, member: MemberIndex) -> bool {
        !self.and(Self::of(member)).is_empty()
    }

    /// How many.
    #[must_use]
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Each of them, ascending.
    pub fn iter(self) -> impl Iterator<Item = MemberIndex> {
        (0..u64::BITS as u16).map(MemberIndex).filter(move |member| self.contains(*member))
    }
}

impl FromIterator<MemberIndex> for MemberSet {
    fn from_iter<I: IntoIterator<Item = MemberIndex>>(members: I) -> Self {
        members.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Debug for MemberSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A slot of an intermediary's arena: room for one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotIndex(pub u32);

/// How often a slot was given out. Never zero: a placement of all zeros is no placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation(pub u16);

/// Where a page's bytes lie: intermediary, slot and the slot's generation, in 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// Which member of the volume holds the bytes.
    pub member: MemberIndex,
    /// In which slot.
    pub slot: SlotIndex,
    /// Under which generation of the slot; never zero.
    pub generation: Generation,
}

impl Placement {
    /// The placement as one number, never zero.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        u64::from(self.slot.0) | u64::from(self.generation.0) << 32 | u64::from(self.member.0) << 48
    }

    /// The inverse of [`Self::to_bits`]; `None` for a generation of zero.
    #[must_use]
    pub fn from_bits(bits: u64) -> Option<Self> {
        let generation = Generation((bits >> 32) as u16);
        (generation.0 != 0).then_some(Self {
            member: MemberIndex((bits >> 48) as u16),
            slot: SlotIndex(bits as u32),
            generation,
        })
    }
}

/// Who may write a volume: each claim raises it, an older writer is refused. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a volume's creator.
    pub const FIRST: Self = Self(1);
}

/// How often a page has been scattered in this migration: 0 in post-copy, the round in pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Round(pub u16);

/// CRC32C of a page's bytes before they were encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Checksum(pub u32);

impl Checksum {
    /// That of a page of zeros: one that has it is looked at, to be sure.
    pub(crate) const OF_ZEROS: Self = Self(crc::OF_ZEROS);

    /// That of no bytes.
    pub const OF_NOTHING: Self = Self(0);

    /// The checksum of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc::of(bytes))
    }
}

/// Numbers frames of one connection, from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Sequence(pub u64);

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn placement_round_trips_and_zero_is_none() {
        let placement =
            Placement { member: MemberIndex(3), slot: SlotIndex(0xdead_beef), generation: Generation(7) };
        assert_eq!(Placement::from_bits(placement.to_bits()), Some(placement));
        assert_eq!(Placement::from_bits(0), None);
        assert_eq!(Placement::from_bits(5), None);
    }

    #[test]
    fn volume_id_parses_what_it_prints() {
        let id = VolumeId::random().expect("random bytes");
        assert_eq!(id.to_string().parse::<VolumeId>().expect("parses"), id);
        assert!("0".parse::<VolumeId>().is_err());
        assert!("xyz".parse::<VolumeId>().is_err());
    }

    #[test]
    fn checksum_is_crc32c() {
        // RFC 3720 B.4: 32 bytes of zeros.
        assert_eq!(Checksum::of(&[0; 32]), Checksum(0x8a91_36aa));
    }
}
