//! What a volume has here, slot by slot: for an intermediary that leaves.

use super::{CHUNK_SLOTS, Entry, Slots};
use crate::ids::{Generation, Round, SlotIndex, VolumeId};
use crate::page::PageIndex;

/// A page that lies here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// Which page.
    pub page: PageIndex,
    /// In which slot.
    pub slot: SlotIndex,
    /// Under which generation.
    pub generation: Generation,
    /// Of which round.
    pub round: Round,
}

impl Slots {
    /// Appends the pages that were written for the volume, of its `nth` chunk: called for each chunk, it lets others have
    /// their turn in between.
    pub fn held_in(&self, volume: VolumeId, nth: usize, out: &mut Vec<Held>) {
        let Some(&number) = self.leases.get(&volume).and_then(|lease| lease.chunks.get(nth)) else { return };
        let Entry::Leased(chunk) = &self.entries[number as usize] else { return };
        out.extend(chunk.owned.iter().map(|at| {
            let held = &chunk.slots[at];
            Held {
                page: PageIndex(held.page),
                slot: SlotIndex(number * CHUNK_SLOTS as u32 + at as u32),
                generation: Generation(held.generation),
                round: Round(held.round),
            }
        }));
    }

    /// Appends the pages of the volume that lie in slots that were written for others, in their order.
    pub fn held_by_reference(&self, volume: VolumeId, out: &mut Vec<Held>) {
        let Some(lease) = self.leases.get(&volume) else { return };
        let before = out.len();
        out.extend(lease.refs.iter().filter_map(|((page, slot), reference)| {
            let at = *slot as usize;
            let Entry::Leased(chunk) = self.entries.get(at / CHUNK_SLOTS)? else { return None };
            let generation = Generation(chunk.slots[at % CHUNK_SLOTS].generation);
            let round = Round(reference.round);
            Some(Held { page: PageIndex(*page), slot: SlotIndex(*slot), generation, round })
        }));
        out[before..].sort_unstable_by_key(|held| (held.page, held.slot));
    }
}
