//! What an intermediary that leaves says to those that take over what it has of a volume.
//!
//! ```text
//!   leaves                                        takes over
//!     State frames, Inherit ------------------------>  is a member, and knows what the one that leaves knows
//!     HandPages, HandCopies ------------------------>  has the pages
//!     <------------------------------------ HandReply  where they lie
//!     Moved ---------------------------------------->  (index servers) name them there
//!     HandIndex ------------------------------------>  knows where others' pages lie
//!     Inherit, with another keeper ----------------->  grants claims from now on
//! ```

use serde::{Deserialize, Serialize};

use super::Malformed;
use super::entry::Entry;
use super::message::{Member, VolumeState, check_copies, check_manifest, check_members};
use super::parking::{Parking, check_node};
use crate::ids::{NodeId, Placement};
use crate::limits;
use crate::manifest::Manifest;
use crate::page::PageIndex;

/// A page lies elsewhere now, with the same bytes: the body of `Moved` consists of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedEntry {
    /// Which page.
    pub page: PageIndex,
    /// Where it lay. Whoever knows it at another place knows better.
    pub from: Placement,
    /// Where it lies.
    pub to: Placement,
}

impl Entry for MovedEntry {
    const BYTES: usize = 20;

    fn encode(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&self.page.0.to_le_bytes());
        out[4..12].copy_from_slice(&self.from.to_bits().to_le_bytes());
        out[12..20].copy_from_slice(&self.to.to_bits().to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (page, rest) = bytes.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (from, to) = rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        let to = to.try_into().map_err(|_| Malformed::Truncated)?;
        let place = |bits: [u8; 8]| {
            let place = Placement::from_bits(u64::from_le_bytes(bits));
            let place = place.filter(|place| place.member.as_usize() < limits::MEMBERS_MAX);
            place.ok_or(Malformed::Bounds("place of a page that was moved"))
        };
        let page = PageIndex(u32::from_le_bytes(*page));
        if page.0 == u32::MAX {
            return Err(Malformed::Bounds("page that was moved"));
        }
        Ok(Self { page, from: place(*from)?, to: place(to)? })
    }
}

/// All that is known of a volume, its pages and its index apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inheritance {
    /// What it consists of.
    pub manifest: Manifest,
    /// Its intermediaries, whoever takes over among them.
    pub members: Vec<Member>,
    /// Whether COMMIT was given.
    pub committed: bool,
    /// Where it stands, under the header's epoch.
    pub state: VolumeState,
    /// Where it was parked. The intermediary that this names as the keeper grants claims from now on; whoever was the
    /// keeper before has stopped.
    pub parking: Option<Parking>,
    /// Who has claimed it.
    pub owner: Option<NodeId>,
    /// Whether the VM's state came before this on this connection: its bytes, and the CRC32C over all of them.
    pub blob: Option<(u64, u32)>,
    /// At how many members each page is to lie.
    pub copies: u8,
}

impl Inheritance {
    /// Checks every bound.
    ///
    /// # Errors
    /// What is out of bounds.
    pub fn check(&self) -> Result<(), Malformed> {
        check_manifest(&self.manifest)?;
        check_members(&self.members)?;
        self.parking.as_ref().map_or(Ok(()), Parking::check)?;
        self.owner.as_ref().map_or(Ok(()), check_node)?;
        check_copies(self.copies)?;
        match self.blob {
            Some((bytes, _)) if bytes > limits::STATE_BYTES_MAX as u64 => Err(Malformed::Bounds("state")),
            _ => Ok(()),
        }
    }
}

/// How far an intermediary is that leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Pages that others have taken over.
    pub handed_pages: u64,
    /// Pages that nobody else was given yet.
    pub left_pages: u64,
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Generation, MemberIndex, SlotIndex};
    use crate::wire::entry::{decode_table, encode_table};

    fn at(member: u16) -> Placement {
        Placement { member: MemberIndex(member), slot: SlotIndex(7), generation: Generation(2) }
    }

    #[test]
    fn a_move_round_trips_and_names_places_that_there_may_be() {
        let moved = MovedEntry { page: PageIndex(9), from: at(1), to: at(63) };
        let mut table = Vec::new();
        encode_table([moved, moved], &mut table);
        let mut back: Vec<MovedEntry> = Vec::new();
        decode_table(&table, 2, &mut back).expect("own bytes decode");
        assert_eq!(back, [moved, moved]);
        let mut bytes = [0; MovedEntry::BYTES];
        let bad = Err(Malformed::Bounds("place of a page that was moved"));
        assert_eq!(MovedEntry::decode(&bytes), bad, "no placement");
        MovedEntry { to: at(64), ..moved }.encode(&mut bytes);
        assert_eq!(MovedEntry::decode(&bytes), bad, "no member");
        assert_eq!(MovedEntry::decode(&bytes[1..]), Err(Malformed::Truncated));
        MovedEntry { page: PageIndex(u32::MAX), ..moved }.encode(&mut bytes);
        assert_eq!(MovedEntry::decode(&bytes), Err(Malformed::Bounds("page that was moved")));
    }
}
