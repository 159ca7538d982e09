//! Slots while bytes move: being filled from a socket, or sent from. Whatever ends a session frees them.

use super::slots::{ChunkNumber, SlotRun};
use super::store::{Noted, Store};
use crate::content::{ContentHash, ContentHasher};
use crate::ids::{Epoch, Placement, VolumeId};
use crate::wire::{PageEntry, Status};

/// Slots that pages are received into. Dropped unfinished, they are free again.
pub(super) struct Filling<'s> {
    store: &'s Store,
    volume: VolumeId,
    hasher: Option<ContentHasher>,
    runs: Vec<SlotRun>,
    slots: usize,
}

impl<'s> Filling<'s> {
    pub(super) fn new(
        store: &'s Store,
        (volume, hasher): (VolumeId, Option<ContentHasher>),
        runs: Vec<SlotRun>,
        slots: usize,
    ) -> Self {
        Self { store, volume, hasher, runs, slots }
    }

    /// How many slots there are.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// The slots, in the order of the pages.
    pub(super) fn runs(&self) -> &[SlotRun] {
        &self.runs
    }

    /// The slots, which are the caller's to give back from now on.
    pub(super) fn into_runs(mut self) -> Vec<SlotRun> {
        std::mem::take(&mut self.runs)
    }

    /// The bytes are in: from now on any client can read them. Gives the placement of each entry, the vector of
    /// runs for the next batch, and what keeps the slots as they are where copies are to be sent from them.
    ///
    /// # Errors
    /// What became of the volume meanwhile; the slots are free again.
    pub(super) fn finish(
        mut self,
        epoch: Epoch,
        pages: (&[PageEntry], Noted<'_>),
        hashes: &mut Vec<ContentHash>,
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<(Vec<SlotRun>, Option<Pinned<'s>>), Status> {
        hashes.clear();
        if let Some(hasher) = &self.hasher {
            // Nobody is believed who says what bytes hash to that he sent.
            self.store.hash(hasher, &self.runs, hashes);
        }
        let pinned = self.store.keep((self.volume, epoch), &self.runs, pages, hashes, placements)?;
        Ok((std::mem::take(&mut self.runs), pinned))
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

    /// The chunks, which are the caller's to unpin from now on.
    pub(super) fn into_chunks(mut self) -> Vec<ChunkNumber> {
        std::mem::take(&mut self.chunks)
    }

    /// Whether a volume that was dissolved cannot give its memory back because of this.
    pub(super) fn in_the_way(&self) -> bool {
        self.store.condemned(&self.chunks)
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if !self.chunks.is_empty() {
            self.store.unpin(&self.chunks);
        }
    }
}

#[cfg(test)]
pub(super) mod test {
    use std::net::SocketAddr;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::ids::{Checksum, NodeId, Round};
    use crate::manifest::{Manifest, Region};
    use crate::page::{InstallUnit, PageIndex};
    use crate::server::Config;
    use crate::server::volumes::Access;
    use crate::transport::PoolSecret;
    use crate::wire::GetEntry;
    use crate::wire::message::Member;

    pub const VOLUME: VolumeId = VolumeId(1);
    pub const EPOCH: Epoch = Epoch::FIRST;

    /// One with a volume that has nothing yet.
    pub fn store() -> Store {
        let node = NodeId { name: "i1".into(), incarnation: 1 };
        let config = Config::new(([127, 0, 0, 1], 0).into(), "i1", 4 << 20, PoolSecret::open());
        let store = Store::new(node.clone(), &config).unwrap();
        let region = Region {
            name: "ram".into(),
            guest_address: None,
            length_bytes: 1 << 20,
            unit: InstallUnit::Page,
        };
        let manifest =
            Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
        let member = Member { node, address: SocketAddr::from(([127, 0, 0, 1], 1)) };
        store.create(VOLUME, EPOCH, manifest, vec![member]).unwrap();
        store
    }

    fn entries(pages: u32) -> Vec<PageEntry> {
        (0..pages).map(|page| PageEntry::raw(PageIndex(page), Round(0), Checksum(0))).collect()
    }

    #[test]
    fn a_panic_frees_what_was_being_filled_and_what_was_pinned() {
        let store = store();
        let mut placements = Vec::new();
        let filling = store.fill(VOLUME, (EPOCH, Access::Write), &entries(2), Vec::new()).unwrap();
        filling.finish(EPOCH, (&entries(2), Noted::No), &mut Vec::new(), &mut placements).unwrap();
        let wanted = [GetEntry { page: PageIndex(1), placement: placements[1].unwrap() }];
        let session = catch_unwind(AssertUnwindSafe(|| {
            let _filling = store.fill(VOLUME, (EPOCH, Access::Write), &entries(100), Vec::new()).unwrap();
            let _pinned = store.pin((VOLUME, EPOCH), &wanted, &mut Vec::new(), &mut Vec::new()).unwrap();
            panic!("a session's mistake");
        }));
        assert!(session.is_err());
        let mut runs = Vec::new();
        let filling =
            store.fill(VOLUME, (EPOCH, Access::Write), &entries(256), std::mem::take(&mut runs)).unwrap();
        assert_eq!(filling.slots(), 256);
        drop(filling);
        store.dissolve(VOLUME, EPOCH).unwrap();
        store.close();
        store.tend_memory();
        assert_eq!(store.statistics(0).arena_bytes, 0);
    }

    #[test]
    fn what_was_claimed_meanwhile_is_not_stored() {
        let store = store();
        let filling = store.fill(VOLUME, (EPOCH, Access::Write), &entries(5), Vec::new()).unwrap();
        store.hand_over(VOLUME, Epoch(2), crate::server::volumes::Volumes::claim).unwrap();
        assert_eq!(
            filling.finish(EPOCH, (&entries(5), Noted::No), &mut Vec::new(), &mut Vec::new()).err(),
            Some(Status::Fenced)
        );
        assert_eq!(store.statistics(0).used_bytes, 0);
    }
}
