//! Slots while bytes move: being filled from a socket, or sent from. Whatever ends a session frees them.

use super::slots::{ChunkNumber, SlotRun};
use super::store::Store;
use crate::ids::{Epoch, Placement, VolumeId};
use crate::wire::{PageEntry, Status};

/// Slots that pages are received into. Dropped unfinished, they are free again.
pub(super) struct Filling<'s> {
    store: &'s Store,
    volume: VolumeId,
    runs: Vec<SlotRun>,
    slots: usize,
}

impl<'s> Filling<'s> {
    pub(super) fn new(store: &'s Store, volume: VolumeId, runs: Vec<SlotRun>, slots: usize) -> Self {
        Self { store, volume, runs, slots }
    }

    /// How many slots there are.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// The slots, in the order of the pages.
    pub(super) fn runs(&self) -> &[SlotRun] {
        &self.runs
    }

    /// The bytes are in: from now on any client can read them. Gives the placement of each entry, and the vector of
    /// runs for the next batch.
    ///
    /// # Errors
    /// What became of the volume meanwhile; the slots are free again.
    pub(super) fn finish(
        mut self,
        epoch: Epoch,
        entries: &[PageEntry],
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<Vec<SlotRun>, Status> {
        self.store.keep(self.volume, epoch, &self.runs, entries, placements)?;
        Ok(std::mem::take(&mut self.runs))
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        if !self.runs.is_empty() {
            self.store.free(&self.runs);
        }
    }
}

/// Chunks that are being sent from: what is in them stays as it is.
pub(super) struct Pinned<'s> {
    store: &'s Store,
    chunks: Vec<ChunkNumber>,
}

impl<'s> Pinned<'s> {
    pub(super) fn new(store: &'s Store, chunks: Vec<ChunkNumber>) -> Self {
        Self { store, chunks }
    }

    /// Whether a volume that was dissolved cannot give its memory back because of this.
    pub(super) fn in_the_way(&self) -> bool {
        self.store.condemned(&self.chunks)
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.store.unpin(&self.chunks);
    }
}
