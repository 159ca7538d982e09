//! What this intermediary gives to others when it leaves, and what it takes over of others that do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{BLOCK_BYTES, Books, Noted, Store, check_inside};
use crate::host;
use crate::ids::{Epoch, MemberIndex, Placement, VolumeId};
use crate::page::{PageIndex, PageRange};
use crate::server::index::Opened;
use crate::server::index::{Full, Index, MOVE_BYTES};
use crate::server::slots::{Held, SlotRun};
use crate::server::transit::Pinned;
use crate::server::volumes::{Access, StateBlob};
use crate::wire::handover::Inheritance;
use crate::wire::message::Member;
use crate::wire::parking::Parking;
use crate::wire::{IndexEntry, MovedEntry, Status};

/// What is known here of a volume, for those who take it over.
pub(in crate::server) struct Portrait {
    pub epoch: Epoch,
    /// Without the VM's state.
    pub said: Inheritance,
    pub blob: Option<StateBlob>,
    /// Pieces of the final set, ahead of it.
    pub pieces: Vec<StateBlob>,
    pub me: MemberIndex,
    /// Whether holders note what they have: then each page is to lie at several.
    pub noted: bool,
    /// Whether somebody who writes it is connected.
    pub is_written: bool,
    /// Pages that the index here knows.
    pub indexed_pages: u64,
}

/// How far one that leaves is with a volume.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) struct Handed {
    /// Pages that others have taken over.
    pub pages: u64,
    /// Pages that nobody else was given yet.
    pub left_pages: u64,
    /// All of it that is here is elsewhere as well.
    pub all: bool,
}

/// A connection on which a volume is written.
pub(in crate::server) struct Writing(Arc<Books>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.writers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Pages on their way to who takes them over.
pub(in crate::server) struct Parcel<'s> {
    /// The pages: where they lie here, or what they were made for.
    pub entries: Vec<IndexEntry>,
    /// Their slots, in their order.
    pub slots: Vec<SlotRun>,
    /// Keeps them as they are.
    pub _pinned: Pinned<'s>,
}

impl Store {
    /// Whether it leaves: then it takes nothing in. What was begun before either is in when this returns, or is refused.
    pub(in crate::server) fn set_leaving(&self, leaves: bool) {
        self.leaving.store(leaves, Ordering::SeqCst);
        self.set_shut(false);
        drop(self.volumes.lock());
        self.handed.lock().clear();
    }

    /// Whether it takes neither index entries nor state any more. What was begun before is found by whoever looks at a volume
    /// after this returned: it is in, or is refused.
    pub(in crate::server) fn set_shut(&self, shut: bool) {
        self.shut.store(shut, Ordering::SeqCst);
    }

    /// # Errors
    /// [`Status::Full`] where nobody looks any more whether there is something to hand over: its client gives it to the next.
    /// Asked under the lock of what is changed.
    pub(super) fn is_open(&self) -> Result<(), Status> {
        if self.shut.load(Ordering::SeqCst) { Err(Status::Full) } else { Ok(()) }
    }

    /// How far it is with a volume.
    pub(in crate::server) fn set_handed(&self, volume: VolumeId, handed: Handed) {
        self.handed.lock().insert(volume, handed);
    }

    pub(in crate::server) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst)
    }

    /// Notes that a connection writes a volume, for as long as the value lives.
    pub(in crate::server) fn writing(&self, volume: VolumeId) -> Option<Writing> {
        let books = Arc::clone(&self.volumes.lock().get(volume).ok()?.payload);
        books.writers.fetch_add(1, Ordering::Relaxed);
        Some(Writing(books))
    }

    /// A connection is opened.
    pub(in crate::server) fn opened(&self) -> Opened {
        Opened(self.opened.fetch_add(1, Ordering::Relaxed))
    }

    /// Who wrote a volume over connections opened before this one is dead: what of its entries is in the index when this
    /// returns is all that ever is.
    pub(in crate::server) fn fence(
        &self,
        (volume, epoch, by): (VolumeId, Epoch, Opened),
    ) -> Result<(), Status> {
        self.with_index(volume, epoch, Access::Write, |index, _| {
            index.fence(by);
            Ok(())
        })
    }

    /// The volumes there are.
    pub(in crate::server) fn volumes(&self) -> Vec<VolumeId> {
        self.volumes.lock().iter().map(|(id, _)| id).collect()
    }

    /// `None` for a volume that is no more.
    pub(in crate::server) fn portrait(&self, volume: VolumeId) -> Option<Portrait> {
        let books = Arc::clone(&self.volumes.lock().get(volume).ok()?.payload);
        let indexed_pages = books.index.lock().pages();
        let noted = !books.copies.lock().is_empty();
        let volumes = self.volumes.lock();
        let known = volumes.get(volume).ok()?;
        let said = Inheritance {
            manifest: known.manifest.clone(),
            members: known.members.clone(),
            committed: known.committed,
            state: known.state,
            parking: known.parking.clone(),
            owner: known.claim.as_ref().map(|claim| claim.by.clone()),
            blob: None,
            copies: known.copies,
        };
        Some(Portrait {
            epoch: known.epoch,
            said,
            blob: known.blob.clone(),
            pieces: known.pieces.clone(),
            me: self.me(&known.members)?,
            noted,
            is_written: books.writers.load(Ordering::Relaxed) > 0,
            indexed_pages,
        })
    }

    /// The pages of a volume that lie here, ascending.
    pub(in crate::server) fn held(&self, volume: VolumeId) -> Vec<Held> {
        let mut held = Vec::new();
        let chunks = self.slots.lock().chunks_of(volume);
        for nth in (0..chunks).rev() {
            self.slots.lock().held_in(volume, nth, &mut held);
        }
        self.slots.lock().held_by_reference(volume, &mut held);
        held.sort_unstable();
        held.dedup();
        held
    }

    /// Those of these pages that are still here, ready to be sent; `taken` says which. `None` for a volume that is no more.
    pub(in crate::server) fn parcel(
        &self,
        volume: VolumeId,
        (me, pages): (MemberIndex, &[Held]),
        noted: bool,
        taken: &mut Vec<bool>,
    ) -> Option<Parcel<'_>> {
        taken.clear();
        let books = Arc::clone(&self.volumes.lock().get(volume).ok()?.payload);
        let copies = books.copies.lock();
        let mut slots = self.slots.lock();
        let (mut entries, mut runs) = (Vec::new(), Vec::new());
        for held in pages {
            let Held { page, slot, generation, round } = *held;
            let owner = slots.read(volume, page, slot, generation);
            taken.push(owner.is_some());
            let Some(owner) = owner else { continue };
            let here = Placement { member: me, slot, generation };
            let at = if noted { copies.of(page, slot, generation).unwrap_or(here) } else { here };
            entries.push(IndexEntry::at(page, round, at, owner.checksum));
            SlotRun::append(slot, &mut runs);
        }
        let pinned = slots.pin_all(&runs);
        Some(Parcel { entries, slots: runs, _pinned: Pinned::new(self, pinned) })
    }

    /// What the index here knows of pages, from one on, as far as one answer goes; with where to go on.
    pub(in crate::server) fn index_entries(
        &self,
        volume: VolumeId,
        (first, pages): (PageIndex, u32),
        entries_max: usize,
    ) -> (Vec<IndexEntry>, PageIndex) {
        let mut entries = Vec::new();
        if let Some(books) = self.books(volume) {
            let range = PageRange::new(first, pages.saturating_sub(first.0));
            books.index.lock().locate(range, entries_max, &mut entries);
        }
        let next = match entries.last().filter(|_| entries.len() >= entries_max) {
            Some(last) => last.page.0 + last.run_pages,
            None => pages,
        };
        (entries, PageIndex(next))
    }

    /// Index entries of pages that lie here, as lying where they were moved.
    pub(in crate::server) fn stand_ins(
        &self,
        volume: VolumeId,
        me: MemberIndex,
        moved: &[MovedEntry],
    ) -> Vec<IndexEntry> {
        let slots = self.slots.lock();
        let here = moved.iter().filter(|moved| moved.from.member == me);
        let entry = |MovedEntry { page, from, to }: &MovedEntry| {
            let held = slots.read(volume, *page, from.slot, from.generation)?;
            Some(IndexEntry::at(*page, held.round, *to, held.checksum))
        };
        // Of several moves of a page the last holds.
        let last: BTreeMap<PageIndex, IndexEntry> =
            here.filter_map(entry).map(|entry| (entry.page, entry)).collect();
        last.into_values().collect()
    }

    /// Stops granting claims of a volume, or begins again.
    pub(in crate::server) fn set_stopped(&self, volume: VolumeId, stopped: bool) {
        self.volumes.lock().set_stopped(volume, stopped);
    }

    /// Another grants them.
    pub(in crate::server) fn set_keeper(&self, volume: VolumeId, parking: Parking) -> Result<(), Status> {
        tracing::info!(%volume, keeper = %parking.keeper, "another intermediary grants claims");
        self.volumes.lock().set_keeper(volume, parking)
    }

    /// The volume has more members.
    pub(in crate::server) fn add_members(
        &self,
        volume: VolumeId,
        members: Vec<Member>,
    ) -> Result<(), Status> {
        self.volumes.lock().set_members(volume, Epoch(u64::MAX), members)
    }

    /// One that leaves says what it knows of a volume.
    pub(in crate::server) fn inherit(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        said: &Inheritance,
        blob: Option<StateBlob>,
    ) -> Result<(), Status> {
        if self.is_leaving() {
            return Err(Status::Full);
        }
        self.me(&said.members).ok_or(Status::State)?;
        let sharing = said.manifest.sharing.clone();
        let books = Arc::new(self.fresh_books(sharing.as_ref()));
        let blob_bytes = blob.as_ref().map_or(0, |blob| blob.bytes.len() as u64);
        let mut volumes = self.volumes.lock();
        let had_blob = volumes.get(volume).is_ok_and(|known| known.blob.is_some());
        if volumes.inherit(volume, epoch, (said, blob), books, host::now())? {
            self.slots.lock().open(volume, sharing.as_ref());
            tracing::info!(%volume, vm = said.manifest.vm, epoch = epoch.0, "volume taken over");
        }
        drop(volumes);
        if had_blob {
            self.budget.give(blob_bytes);
        }
        // It may have a newer owner, or be sealed: so it was where it comes from.
        self.withdraw(volume);
        if said.copies > 1 {
            self.tend();
        }
        Ok(())
    }

    /// One that leaves gives a piece of the final set.
    pub(in crate::server) fn inherit_piece(
        &self,
        volume: VolumeId,
        (number, piece): (u32, StateBlob),
    ) -> Result<(), Status> {
        let needless = self.volumes.lock().inherit_piece(volume, number, piece)?;
        self.budget.give(needless.map_or(0, |piece| piece.bytes.len() as u64));
        Ok(())
    }

    /// One that leaves says what it knows of the index.
    pub(in crate::server) fn take_index(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        entries: &[IndexEntry],
    ) -> Result<(), Status> {
        if self.is_leaving() {
            return Err(Status::Full);
        }
        self.with_index(volume, epoch, Access::Inherit, |index, pages| {
            check_inside(entries.iter().map(IndexEntry::range), pages)?;
            self.change_index(index, |index, more| index.take_over(entries, more))
        })
    }

    /// Pages that lay here lie elsewhere now: the index here, which is read until this one goes, and handed over again where
    /// who has it is lost, says so of those that it knows.
    pub(in crate::server) fn moved_away(&self, volume: VolumeId, moved: &[MovedEntry]) {
        let Some(books) = self.books(volume) else { return };
        let mut index = books.index.lock();
        for moved in moved {
            // Nothing is remembered: no entry comes any more.
            let _ = index.moved(moved, &mut || false);
        }
    }

    /// Pages lie elsewhere now. Appends those of which that was not known here, or of which others may have been told what
    /// was known, since this one leaves: they are to be told as well.
    pub(in crate::server) fn moved(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        moved: &[MovedEntry],
        unknown: &mut Vec<MovedEntry>,
    ) -> Result<(), Status> {
        self.with_index(volume, epoch, Access::Inherit, |index, pages| {
            if !moved.iter().all(|moved| u64::from(moved.page.0) < pages) {
                return Err(Status::Malformed);
            }
            let leaves = self.is_leaving();
            for moved in moved {
                let more = &mut || !leaves && self.budget.take(MOVE_BYTES as u64);
                match index.moved(moved, more) {
                    Ok(true) if !leaves => {}
                    Err(Full) if !leaves => return Err(Status::Full),
                    _ => unknown.push(*moved),
                }
            }
            Ok(())
        })
    }

    /// Changes an index within the budget.
    pub(super) fn change_index(
        &self,
        index: &mut Index,
        change: impl FnOnce(&mut Index, &mut dyn FnMut() -> bool) -> Result<(), Full>,
    ) -> Result<(), Status> {
        let before = index.blocks();
        let mut reserved = 0;
        let changed = change(index, &mut || {
            let granted = self.budget.take(BLOCK_BYTES as u64);
            reserved += usize::from(granted);
            granted
        });
        // Blocks that became runs of zeros are gone again.
        self.budget.give(((before + reserved - index.blocks()) * BLOCK_BYTES) as u64);
        changed.map_err(|_| Status::Full)
    }
}

impl Noted<'_> {
    /// What storing pages so is.
    pub(in crate::server) const fn access(self) -> Access {
        match self {
            Self::No | Self::First | Self::CopiesOf(_) => Access::Write,
            Self::Handed | Self::HandedCopies(_) => Access::Inherit,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Checksum, Round};
    use crate::server::transit::test::{EPOCH, VOLUME, store};

    fn give(store: &Store) -> [Result<(), Status>; 3] {
        let blob = || StateBlob { bytes: vec![7; 8].into(), checksum: Checksum::of(&[7; 8]) };
        let entry = IndexEntry::zero(PageIndex(0), 16, Round(0));
        [
            store.put_index((VOLUME, EPOCH, store.opened()), &[entry]),
            store.put_piece(VOLUME, EPOCH, (0, blob())),
            store.put_state(VOLUME, EPOCH, blob()),
        ]
    }

    #[test]
    fn behind_the_last_look_nothing_comes_that_would_be_lost() {
        let store = store();
        store.set_leaving(true);
        store.set_shut(true);
        assert_eq!(give(&store), [Err(Status::Full); 3]);
        let portrait = store.portrait(VOLUME).unwrap();
        assert!(portrait.indexed_pages == 0 && portrait.blob.is_none() && portrait.pieces.is_empty());
        // It was not the last.
        store.set_shut(false);
        assert_eq!(give(&store), [Ok(()); 3]);
        let portrait = store.portrait(VOLUME).unwrap();
        assert!(portrait.indexed_pages == 16 && portrait.blob.is_some() && portrait.pieces.len() == 1);
    }

    #[test]
    fn one_that_stays_takes_everything_again() {
        let store = store();
        store.set_leaving(true);
        store.set_shut(true);
        store.set_leaving(false);
        assert_eq!(give(&store), [Ok(()); 3]);
    }
}
