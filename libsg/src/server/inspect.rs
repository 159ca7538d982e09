//! What a simulation looks at in an intermediary from outside, between two steps of its threads, and the
//! damage that it does there.

use super::ServerHandle;
use super::slots::SlotRun;
use crate::ids::{Epoch, Placement, VolumeId};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::wire::{GetEntry, IndexEntry};

impl ServerHandle {
    /// What the index here knows of pages.
    #[must_use]
    pub fn index_entries(&self, volume: VolumeId, epoch: Epoch, range: PageRange) -> Vec<IndexEntry> {
        let mut found = Vec::new();
        // Who does not know the volume knows none of its pages.
        let _ = self.shared.store().locate(volume, epoch, &[range], range.pages as usize, &mut found);
        found
    }

    /// The bytes that lie at a placement.
    #[must_use]
    pub fn page_at(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        page: PageIndex,
        placement: Placement,
    ) -> Option<Vec<u8>> {
        self.with_slot((volume, epoch), page, placement, |slot| {
            let mut bytes = vec![0; PAGE_BYTES];
            slot.readable().copy_to(&mut bytes);
            bytes
        })
    }

    /// Flips a bit of what lies at a placement. `false` when nothing does.
    pub fn damage(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        page: PageIndex,
        placement: Placement,
        byte: usize,
    ) -> bool {
        self.with_slot((volume, epoch), page, placement, |slot| {
            let slot = slot.skip(byte % PAGE_BYTES).take(1);
            let mut value = [0];
            slot.readable().copy_to(&mut value);
            slot.copy_from(&[value[0] ^ 0x10]);
        })
        .is_some()
    }

    /// Whether COMMIT was given for a volume, as far as is known here.
    #[must_use]
    pub fn knows_commit(&self, volume: VolumeId) -> bool {
        self.shared.store().describe(volume).is_ok_and(|volume| volume.committed)
    }

    /// How many members a volume has, as far as is known here.
    #[must_use]
    pub fn members_known(&self, volume: VolumeId) -> usize {
        self.shared.store().describe(volume).map_or(0, |volume| volume.members.len())
    }

    fn with_slot<T>(
        &self,
        of: (VolumeId, Epoch),
        page: PageIndex,
        placement: Placement,
        look: impl FnOnce(crate::memory::SlotSlice<'_>) -> T,
    ) -> Option<T> {
        let store = self.shared.store();
        let (mut entries, mut runs) = (Vec::new(), Vec::new());
        let _pinned = store.pin(of, &[GetEntry { page, placement }], &mut entries, &mut runs).ok()?;
        let first = runs.first()?.first;
        Some(look(store.arena().slots(SlotRun { first, slots: 1 }).ok()?))
    }
}
