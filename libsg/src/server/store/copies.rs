//! Filled slots become pages, and pages are found: by the index here, and by what lies here itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Books, COPIES_BLOCK_BYTES, Store};
use crate::content::ContentHash;
use crate::ids::{Epoch, MemberIndex, MemberSet, Placement, SlotIndex, VolumeId};
use crate::limits;
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::server::copies::{Copies, Here};
use crate::server::index::Index;
use crate::server::slots::{Owner, SlotRun, Slots};
use crate::server::transit::Pinned;
use crate::server::volumes::Access;
use crate::wire::message::Member;
use crate::wire::{Encoding, IndexEntry, PageEntry, Status};

/// How pages that are stored are noted beside the index.
#[derive(Clone, Copy)]
pub(in crate::server) enum Noted<'a> {
    /// Not at all: an index server alone knows where they are.
    No,
    /// They are this intermediary's, and others get copies of them.
    First,
    /// They are copies of what lies there, page by page.
    CopiesOf(&'a [IndexEntry]),
    /// Not at all: another gave them that leaves.
    Handed,
    /// Another gave them that leaves, and they are copies of what lies, or lay, there.
    HandedCopies(&'a [IndexEntry]),
}

/// Another member, which gets copies.
pub(in crate::server) struct Target {
    pub index: MemberIndex,
    pub member: Member,
}

impl Store {
    /// Slots were filled: their pages can be read from now on. Gives a placement for each entry. `hashes` are those
    /// of the slots, of a volume that shares. Where others get copies of them, the slots stay as they are until what
    /// is returned is dropped.
    pub(in crate::server) fn keep(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        runs: &[SlotRun],
        (entries, noted): (&[PageEntry], Noted<'_>),
        hashes: &[ContentHash],
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<Option<Pinned<'_>>, Status> {
        placements.clear();
        let filled = || runs.iter().flat_map(|run| run.iter());
        filled().for_each(|slot| self.canary(slot));
        let books = match noted {
            Noted::No | Noted::Handed => None,
            Noted::First | Noted::CopiesOf(_) | Noted::HandedCopies(_) => {
                Some(Arc::clone(&self.volumes.lock().get(volume)?.payload))
            }
        };
        let mut copies = books.as_ref().map(|books| books.copies.lock());
        // The volumes stay locked: whoever was fenced meanwhile stores nothing.
        let volumes = self.volumes.lock();
        let known = volumes.admit(volume, epoch, noted.access())?;
        if self.is_leaving() {
            return Err(Status::Full);
        }
        let member = self.me(&known.members).ok_or(Status::State)?;
        let mut slots = self.slots.lock();
        let mut hashes = hashes.iter();
        let mut free = filled().map(|slot| (slot, hashes.next()));
        for (at, entry) in entries.iter().enumerate() {
            let slot = if entry.encoding == Encoding::Raw { free.next() } else { None };
            let placement = slot.and_then(|(slot, hash)| {
                let owner = Owner { page: entry.page, checksum: entry.checksum, round: entry.round };
                // Who has it sent it whether or not its bytes were here.
                let shares = !matches!(noted, Noted::No | Noted::First);
                let there = hash.filter(|_| shares).and_then(|hash| slots.share(volume, owner, hash));
                if there.is_some() {
                    slots.free(slot);
                }
                let (slot, generation) = match there {
                    Some(there) => there,
                    None => (slot, slots.store(slot, owner, hash)?),
                };
                Some(Placement { member, slot, generation })
            });
            let of = match noted {
                Noted::CopiesOf(others) | Noted::HandedCopies(others) => {
                    others.get(at).and_then(|other| other.placement)
                }
                Noted::No | Noted::First | Noted::Handed => placement,
            };
            placements.push(match (&mut copies, placement, of) {
                (Some(copies), Some(placement), Some(of)) => {
                    self.note(copies, &mut slots, (volume, entry.page), placement, of).then_some(placement)
                }
                _ => placement,
            });
        }
        Ok(match noted {
            Noted::First => Some(Pinned::new(self, slots.pin_all(runs))),
            _ => None,
        })
    }

    /// For the test canary: damages the n-th page that was ever stored.
    fn canary(&self, slot: SlotIndex) {
        let Some(nth) = self.canary_flip else { return };
        if self.stored_ever.fetch_add(1, Ordering::Relaxed) + 1 != nth {
            return;
        }
        if let Ok(memory) = self.arena.slots(SlotRun { first: slot, slots: 1 }) {
            let byte = memory.skip(PAGE_BYTES / 2).take(1);
            let mut value = [0];
            byte.readable().copy_to(&mut value);
            byte.copy_from(&[!value[0]]);
            tracing::warn!(slot = slot.0, "test canary: flipped a byte of a stored page");
        }
    }

    /// Notes a page that was stored. `false` where the books are full: it is not stored then.
    fn note(
        &self,
        copies: &mut Copies,
        slots: &mut Slots,
        (volume, page): (VolumeId, PageIndex),
        at: Placement,
        of: Placement,
    ) -> bool {
        let here = Here { slot: at.slot, generation: at.generation, is_copy: of.member != at.member };
        let noted = copies.put(page, here, of, &mut || self.budget.take(COPIES_BLOCK_BYTES as u64));
        let gone = match noted {
            Ok(None) => return true,
            Ok(Some(before)) => before,
            Err(_) => here,
        };
        slots.release(volume, page, gone.slot, gone.generation);
        noted.is_ok()
    }

    /// Pages that belong together were stored, all of them; else those that were are free again, since there was no room.
    pub(in crate::server) fn all_or_none(
        &self,
        volume: VolumeId,
        of: &[IndexEntry],
        placements: &[Option<Placement>],
    ) -> Status {
        if placements.iter().all(Option::is_some) {
            return Status::Ok;
        }
        self.unkeep(volume, of, placements);
        Status::Full
    }

    fn unkeep(&self, volume: VolumeId, of: &[IndexEntry], placements: &[Option<Placement>]) {
        let Some(books) = self.books(volume) else { return };
        let mut copies = books.copies.lock();
        let mut slots = self.slots.lock();
        let before = copies.blocks();
        for (entry, at) in of.iter().zip(placements) {
            if let (Some(at), Some(of)) = (at, entry.placement) {
                copies.remove(entry.page, of);
                slots.release(volume, entry.page, at.slot, at.generation);
            }
        }
        drop(slots);
        self.budget.give(((before - copies.blocks()) * COPIES_BLOCK_BYTES) as u64);
    }

    pub(super) fn books(&self, volume: VolumeId) -> Option<Arc<Books>> {
        self.volumes.lock().get(volume).ok().map(|known| Arc::clone(&known.payload))
    }

    /// The members beside this one that get copies of what is put here.
    pub(in crate::server) fn targets(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        holders: MemberSet,
        out: &mut Vec<Target>,
    ) -> Result<(), Status> {
        out.clear();
        if holders.len() > limits::COPIES_MAX {
            return Err(Status::Copies);
        }
        let volumes = self.volumes.lock();
        let members = &volumes.admit(volume, epoch, Access::Write)?.members;
        let me = self.me(members).ok_or(Status::State)?;
        if !holders.contains(me) {
            return Err(Status::Malformed);
        }
        for index in holders.without(me).iter() {
            let member = members.get(index.as_usize()).ok_or(Status::Malformed)?.clone();
            out.push(Target { index, member });
        }
        Ok(())
    }

    pub(in crate::server) fn locate(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        ranges: &[PageRange],
        entries_max: usize,
        out: &mut Vec<IndexEntry>,
    ) -> Result<(), Status> {
        out.clear();
        #[cfg(feature = "simulation")]
        let volume = self.mixed_up(volume);
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let index = books.index.lock();
        let copies = books.copies.lock();
        let volumes = self.volumes.lock();
        let me = self.me(&volumes.admit(volume, epoch, Access::Read)?.members);
        let Some(me) = me.filter(|_| !copies.is_empty()) else {
            drop(volumes);
            ranges.iter().for_each(|range| index.locate(*range, entries_max, out));
            return Ok(());
        };
        let slots = self.slots.lock();
        drop(volumes);
        let own = Own { volume, me, copies: &copies, slots: &slots };
        ranges.iter().for_each(|range| own.locate(&index, *range, entries_max, out));
        Ok(())
    }

    /// Pages that were stored by reference lie here, and others get copies of them: they are noted as this one's, under
    /// the checksums that the entries say, and their slots stay as they are until what is returned is dropped. Gives a
    /// placement for each that is here. One that is noted already has copies that are named by the same placement: what
    /// it holds twice it holds once from then on, and there is no placement for it.
    pub(in crate::server) fn keep_first(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        entries: &[IndexEntry],
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<Pinned<'_>, Status> {
        placements.clear();
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let mut copies = books.copies.lock();
        let volumes = self.volumes.lock();
        let me = self.me(&volumes.admit(volume, epoch, Access::Write)?.members).ok_or(Status::State)?;
        let mut slots = self.slots.lock();
        drop(volumes);
        let mut runs: Vec<SlotRun> = Vec::new();
        for entry in entries {
            let here = entry.placement.filter(|at| {
                at.member == me && slots.read(volume, entry.page, at.slot, at.generation).is_some()
            });
            let placement = here.filter(|at| {
                if copies.contains(entry.page, *at) {
                    slots.release(volume, entry.page, at.slot, at.generation);
                    return false;
                }
                slots.seal(volume, entry.page, at.slot, entry.checksum);
                self.note(&mut copies, &mut slots, (volume, entry.page), *at, *at)
            });
            runs.extend(placement.map(|at| SlotRun { first: at.slot, slots: 1 }));
            placements.push(placement);
        }
        Ok(Pinned::new(self, slots.pin_all(&runs)))
    }

    /// What of the pages is no more is noted no more.
    pub(super) fn forget_copies(&self, volume: VolumeId, range: PageRange) {
        let Some(books) = self.books(volume) else { return };
        let mut copies = books.copies.lock();
        let before = copies.blocks();
        let slots = self.slots.lock();
        copies
            .retain(range, &mut |page, here| slots.read(volume, page, here.slot, here.generation).is_some());
        drop(slots);
        self.budget.give(((before - copies.blocks()) * COPIES_BLOCK_BYTES) as u64);
    }
}

/// What lies here itself, beside an index.
struct Own<'a> {
    volume: VolumeId,
    me: MemberIndex,
    copies: &'a Copies,
    slots: &'a Slots,
}

impl Own<'_> {
    /// What index and own pages say of a range: of a page the newest round, of one round what lies here, since it is
    /// there.
    fn locate(&self, index: &Index, range: PageRange, entries_max: usize, out: &mut Vec<IndexEntry>) {
        let mut indexed = Vec::new();
        index.locate(range, entries_max, &mut indexed);
        // Where the index has more to say, it is asked for that first.
        let end = match indexed.last().filter(|_| indexed.len() >= entries_max) {
            Some(last) => u64::from(last.page.0) + u64::from(last.run_pages),
            None => u64::from(range.first.0) + u64::from(range.pages),
        };
        let range = PageRange::new(range.first, (end - u64::from(range.first.0)) as u32);
        let mut own: Vec<IndexEntry> = Vec::new();
        self.copies.visit(range, &mut |page, here| {
            if let Some(held) = self.slots.read(self.volume, page, here.slot, here.generation) {
                let Here { slot, generation, .. } = here;
                let at = Placement { member: self.me, slot, generation };
                let entry = IndexEntry::at(page, held.round, at, held.checksum);
                match own.last_mut().filter(|last| last.page == page) {
                    Some(last) if last.round < entry.round => *last = entry,
                    Some(_) => {}
                    None => own.push(entry),
                }
            }
            own.len() <= entries_max
        });
        merge(&indexed, &own, entries_max, out);
    }
}

/// Joins two ascending lists, up to so many entries.
fn merge(indexed: &[IndexEntry], own: &[IndexEntry], entries_max: usize, out: &mut Vec<IndexEntry>) {
    let mut own = own.iter().peekable();
    let push = |out: &mut Vec<IndexEntry>, entry: IndexEntry| {
        if out.len() < entries_max && entry.run_pages > 0 {
            out.push(entry);
        }
    };
    for entry in indexed {
        let end = entry.page.0 + entry.run_pages;
        let mut rest = *entry;
        while let Some(mine) = own.next_if(|mine| mine.page.0 < end) {
            if mine.page < entry.page {
                push(out, *mine);
                continue;
            }
            let wins = match entry.placement {
                Some(_) => mine.round >= entry.round,
                // Of one round, what is said to be zero was found to be so later, or is the same.
                None => mine.round > entry.round,
            };
            if wins {
                push(out, IndexEntry { run_pages: mine.page.0 - rest.page.0, ..rest });
                push(out, *mine);
                let next = mine.page.0 + 1;
                rest = IndexEntry { page: crate::page::PageIndex(next), run_pages: end - next, ..rest };
            }
        }
        push(out, rest);
    }
    own.for_each(|mine| push(out, *mine));
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Checksum, Generation, Round, SlotIndex};
    use crate::page::PageIndex;

    fn at(page: u32, round: u16, member: u16) -> IndexEntry {
        let place =
            Placement { member: MemberIndex(member), slot: SlotIndex(page), generation: Generation(1) };
        IndexEntry::at(PageIndex(page), Round(round), place, Checksum(7))
    }

    fn by_page(entries: &[IndexEntry]) -> BTreeMap<u32, (u16, Option<Placement>)> {
        let pages = |entry: &IndexEntry| entry.range().iter().map(|page| page.0).collect::<Vec<_>>();
        let all =
            entries.iter().flat_map(|e| pages(e).into_iter().map(|page| (page, (e.round.0, e.placement))));
        all.collect()
    }

    proptest! {
        #[test]
        fn the_newest_round_is_named_and_what_lies_here(
            indexed in prop::collection::vec((0..3_u32, 1..6_u32, 0..3_u16, any::<bool>()), 0..12),
            own in prop::collection::btree_map(0..60_u32, 0..3_u16, 0..20),
            most in 1..40_usize,
        ) {
            let (mut from, mut list) = (0, Vec::new());
            for (gap, pages, round, zero) in indexed {
                from += gap;
                list.push(if zero { IndexEntry::zero(PageIndex(from), pages, Round(round)) } else { at(from, round, 0) });
                from += if zero { pages } else { 1 };
            }
            let own: Vec<_> = own.into_iter().map(|(page, round)| at(page, round, 1)).collect();
            let mut out = Vec::new();
            merge(&list, &own, usize::MAX, &mut out);
            let mut end = 0;
            for entry in &out {
                prop_assert!(entry.page.0 >= end, "ascending, without overlap");
                end = entry.page.0 + entry.run_pages;
            }
            let (mut expected, mine) = (by_page(&list), by_page(&own));
            for (page, (round, place)) in mine {
                let known = expected.entry(page).or_insert((round, place));
                if round > known.0 || (round == known.0 && known.1.is_some()) {
                    *known = (round, place);
                }
            }
            prop_assert_eq!(by_page(&out), expected);
            let mut some = Vec::new();
            merge(&list, &own, most, &mut some);
            prop_assert_eq!(&some[..], &out[..out.len().min(most)]);
        }
    }
}
