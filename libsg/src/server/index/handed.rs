//! What an index takes over of one that leaves, and what is said of pages that another takes over.

use super::{BLOCK_PAGES, Extent, Full, Index};
use crate::ids::Placement;
use crate::page::{PageIndex, PageRange};
use crate::wire::{Encoding, IndexEntry, MovedEntry};

/// What a move that is remembered costs in memory.
pub const MOVE_BYTES: usize = 64;

/// Entries of its own that are looked at at once.
const LOOKED_AT: usize = 1024;

impl Index {
    /// Moves that are remembered, of [`MOVE_BYTES`] each.
    #[must_use]
    pub fn moves(&self) -> usize {
        self.moves.len()
    }

    /// A page lies elsewhere now. Whether it was known where it is said to have lain, or lies: only then that changes. Else the
    /// move is remembered, if `more` allows it, for an entry that is still under way.
    ///
    /// # Errors
    /// [`Full`] when it does not.
    pub fn moved(&mut self, moved: &MovedEntry, more: &mut dyn FnMut() -> bool) -> Result<bool, Full> {
        let MovedEntry { page, from, to } = *moved;
        for known in self.moves.range_mut((page.0, 0)..=(page.0, u64::MAX)).map(|(_, known)| known) {
            if *known == from {
                *known = to;
            }
        }
        if let Some(Extent::Dense(block)) = self.extents.get_mut(&(page.0 / BLOCK_PAGES)) {
            let at = (page.0 % BLOCK_PAGES) as usize;
            let is_it = [from, to].map(Placement::to_bits).contains(&block.placements[at]);
            if block.known[at] == Encoding::Raw as u8 && is_it {
                block.placements[at] = to.to_bits();
                return Ok(true);
            }
        }
        let key = (page.0, from.to_bits());
        if !self.moves.contains_key(&key) && !more() {
            return Err(Full);
        }
        self.moves.insert(key, to);
        Ok(false)
    }

    /// The entry, with where its page lies now.
    pub(super) fn current(&self, entry: &IndexEntry) -> IndexEntry {
        let moved = |from: Placement| self.moves.get(&(entry.page.0, from.to_bits())).copied();
        match entry.placement {
            Some(from) if !self.moves.is_empty() => {
                IndexEntry { placement: Some(moved(from).unwrap_or(from)), ..*entry }
            }
            _ => *entry,
        }
    }

    /// Takes what another index knew: of a page of which nothing as new is known.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn take_over(&mut self, entries: &[IndexEntry], more: &mut dyn FnMut() -> bool) -> Result<(), Full> {
        let mut known = Vec::new();
        for entry in entries {
            let end = u64::from(entry.page.0) + u64::from(entry.run_pages);
            let mut from = u64::from(entry.page.0);
            while from < end {
                known.clear();
                self.locate(piece(from, end), LOOKED_AT, &mut known);
                let whole = known.len() < LOOKED_AT;
                for known in &known {
                    let first = u64::from(known.page.0);
                    self.put_piece(entry, (from, first), more)?;
                    let behind = first + u64::from(known.run_pages);
                    if known.round < entry.round {
                        self.put_piece(entry, (first, behind), more)?;
                    }
                    from = behind;
                }
                if whole {
                    self.put_piece(entry, (from, end), more)?;
                    from = end;
                }
            }
        }
        Ok(())
    }

    fn put_piece(
        &mut self,
        entry: &IndexEntry,
        (first, end): (u64, u64),
        more: &mut dyn FnMut() -> bool,
    ) -> Result<(), Full> {
        if first >= end {
            return Ok(());
        }
        let PageRange { first: page, pages } = piece(first, end);
        self.put(&[IndexEntry { page, run_pages: pages, ..*entry }], more)
    }
}

fn piece(first: u64, end: u64) -> PageRange {
    PageRange::new(PageIndex(first as u32), (end - first) as u32)
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Checksum, Generation, MemberIndex, Round, SlotIndex};

    fn place(slot: u32) -> Placement {
        Placement { member: MemberIndex(1), slot: SlotIndex(slot), generation: Generation(1) }
    }

    fn at(page: u32, round: u16, slot: u32) -> IndexEntry {
        IndexEntry::at(PageIndex(page), Round(round), place(slot), Checksum(page))
    }

    fn known(index: &Index, pages: u32) -> BTreeMap<u32, (u16, Option<Placement>)> {
        let mut entries = Vec::new();
        index.locate(PageRange::new(PageIndex(0), pages), usize::MAX, &mut entries);
        let of = |entry: IndexEntry| {
            entry.range().iter().map(|page| (page.0, (entry.round.0, entry.placement))).collect::<Vec<_>>()
        };
        entries.into_iter().flat_map(of).collect()
    }

    #[test]
    fn a_move_changes_what_it_names_and_nothing_newer_and_is_remembered_for_what_is_under_way() {
        let mut index = Index::default();
        index.put(&[at(5, 0, 10), at(6, 0, 11)], &mut || true).unwrap();
        let moved = |page, from, to| MovedEntry { page: PageIndex(page), from: place(from), to: place(to) };
        assert_eq!(index.moved(&moved(5, 10, 20), &mut || true), Ok(true));
        assert_eq!(known(&index, 10)[&5], (0, Some(place(20))));
        assert_eq!(index.moved(&moved(5, 10, 20), &mut || true), Ok(true), "said again");
        // It was put again elsewhere meanwhile.
        assert_eq!(index.moved(&moved(6, 10, 21), &mut || true), Ok(false));
        assert_eq!(known(&index, 10)[&6], (0, Some(place(11))));
        // Its entry comes late, and by then it has moved once more.
        assert_eq!(index.moved(&moved(7, 12, 22), &mut || true), Ok(false));
        assert_eq!(index.moved(&moved(7, 22, 23), &mut || true), Ok(false));
        index.put(&[at(7, 0, 12), at(8, 0, 12)], &mut || true).unwrap();
        assert_eq!(known(&index, 10)[&7], (0, Some(place(23))));
        assert_eq!(known(&index, 10)[&8], (0, Some(place(12))), "of another page nothing was said");
        assert_eq!((index.moved(&moved(9, 1, 2), &mut || false), index.moves()), (Err(Full), 3));
    }

    proptest! {
        /// Against a table.
        #[test]
        fn what_is_newer_stays(
            own in prop::collection::vec((0..2500_u32, 1..1200_u32, 0..3_u16, any::<bool>()), 0..12),
            others in prop::collection::vec((0..2500_u32, 1..1200_u32, 0..3_u16, any::<bool>()), 1..12),
        ) {
            let entry = |slot: u32, (page, pages, round, zero): (u32, u32, u16, bool)| match zero {
                true => IndexEntry::zero(PageIndex(page), pages, Round(round)),
                false => at(page, round, slot),
            };
            let own: Vec<_> = own.into_iter().map(|of| entry(1, of)).collect();
            let others: Vec<_> = others.into_iter().map(|of| entry(2, of)).collect();
            let mut index = Index::default();
            index.put(&own, &mut || true).unwrap();
            let mut expected = known(&index, 4000);
            index.take_over(&others, &mut || true).unwrap();
            for entry in others {
                for page in entry.range().iter() {
                    let new = (entry.round.0, entry.placement);
                    let known = expected.entry(page.0).or_insert(new);
                    if known.0 < new.0 {
                        *known = new;
                    }
                }
            }
            prop_assert_eq!(known(&index, 4000), expected);
        }
    }
}
