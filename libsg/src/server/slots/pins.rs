//! Chunks that stay as they are while somebody sends from them.

use super::{CHUNK_SLOTS, ChunkNumber, Entry, SlotRun, Slots};
use crate::ids::{Generation, SlotIndex};

impl Slots {
    /// Keeps a leased chunk and all that is in it as it is until as many [`Self::unpin`].
    pub fn pin(&mut self, number: ChunkNumber) {
        if let Some(Entry::Leased(chunk)) = self.entries.get_mut(number.0 as usize) {
            chunk.pins += 1;
        }
    }

    /// Pins the chunks that these slots are in, one after the other: which.
    pub fn pin_all(&mut self, runs: &[SlotRun]) -> Vec<ChunkNumber> {
        let mut pinned = Vec::with_capacity(runs.len());
        for chunk in runs.iter().map(|run| ChunkNumber::of(run.first)) {
            if pinned.last() != Some(&chunk) {
                self.pin(chunk);
                pinned.push(chunk);
            }
        }
        pinned
    }

    /// Takes one [`Self::pin`] back.
    pub fn unpin(&mut self, number: ChunkNumber) {
        if let Some(Entry::Leased(chunk)) = self.entries.get_mut(number.0 as usize) {
            chunk.pins -= 1;
            self.settle(number);
        }
    }

    /// Whether a slot of the chunk may still be given out, now that it is as it is.
    #[must_use]
    pub fn has_free(&self, number: ChunkNumber) -> bool {
        matches!(self.entries.get(number.0 as usize), Some(Entry::Leased(chunk)) if !chunk.free.is_empty())
    }

    /// The generation under which a slot was given out last; `None` for one whose chunk nobody leases.
    #[must_use]
    pub fn generation(&self, slot: SlotIndex) -> Option<Generation> {
        let Entry::Leased(chunk) = self.entries.get(ChunkNumber::of(slot).0 as usize)? else { return None };
        Some(Generation(chunk.slots[slot.0 as usize % CHUNK_SLOTS].generation))
    }

    /// Whether the chunk's volume was dissolved and only pins or unfinished slots keep it.
    #[must_use]
    pub fn condemned(&self, number: ChunkNumber) -> bool {
        matches!(self.entries.get(number.0 as usize), Some(Entry::Leased(chunk)) if chunk.condemned)
    }
}
