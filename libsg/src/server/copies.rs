//! Which pages of a volume lie here, by their number, where it has copies: whoever holds a page finds it without
//! an index server. A pure core, without lock or clock.
//!
//! Each is noted beside the placement that it was made for: a page's own slot at its first holder, that slot there
//! at all others. Whoever gives a page's copies back names that placement, and so means just these, whatever came
//! for the page since. 16 bytes a page.

use std::collections::BTreeMap;

use super::index::Full;
use crate::ids::{Generation, Placement, SlotIndex};
use crate::page::{PageIndex, PageRange};

/// Pages of a block.
const BLOCK_PAGES: u32 = 512;

/// What a block costs in memory.
pub const BLOCK_BYTES: usize = size_of::<Block>();

const COPY: u64 = 1 << 48;

/// Where a page lies here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// In which slot.
    pub slot: SlotIndex,
    /// Under which generation.
    pub generation: Generation,
    /// Whether somebody else is its first holder.
    pub is_copy: bool,
}

impl Here {
    fn to_bits(self) -> u64 {
        u64::from(self.slot.0) | u64::from(self.generation.0) << 32 | if self.is_copy { COPY } else { 0 }
    }

    /// `None` for a generation of zero.
    fn from_bits(bits: u64) -> Option<Self> {
        let generation = Generation((bits >> 32) as u16);
        let here = Self { slot: SlotIndex(bits as u32), generation, is_copy: bits & COPY != 0 };
        (generation.0 != 0).then_some(here)
    }
}

struct Block {
    /// Zero where nothing is.
    here: [u64; BLOCK_PAGES as usize],
    of: [u64; BLOCK_PAGES as usize],
    pages: u32,
}

impl Block {
    fn take(&mut self, at: usize) -> Option<Here> {
        let here = Here::from_bits(std::mem::take(&mut self.here[at]))?;
        self.pages -= 1;
        Some(here)
    }

    fn set(&mut self, at: usize, here: u64, of: u64) {
        (self.here[at], self.of[at]) = (here, of);
        self.pages += 1;
    }
}

/// What lies here of one volume.
#[derive(Default)]
pub struct Copies {
    blocks: BTreeMap<u32, Box<Block>>,
    /// Of pages that are here more than once, those beyond the first: by page and what they were made for. They are
    /// few, and for a while: of a page that is sent two ways, or anew, one is given back.
    more: BTreeMap<(u32, u64), u64>,
    copied: u64,
}

fn split(page: PageIndex) -> (u32, usize) {
    (page.0 / BLOCK_PAGES, (page.0 % BLOCK_PAGES) as usize)
}

impl Copies {
    /// Blocks, of [`BLOCK_BYTES`] each.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Copies of pages whose first holder is somebody else.
    #[must_use]
    pub const fn copied(&self) -> u64 {
        self.copied
    }

    /// A page lies here, made for `of`. Returns what was noted for just that before, and is no more. `more` is asked
    /// before each block is made.
    ///
    /// # Errors
    /// [`Full`] when it says no.
    pub fn put(
        &mut self,
        page: PageIndex,
        here: Here,
        of: Placement,
        more: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Here>, Full> {
        let (number, at) = split(page);
        if !self.blocks.contains_key(&number) && !more() {
            return Err(Full);
        }
        let before = self.remove(page, of);
        self.copied += u64::from(here.is_copy);
        let none = || Block { here: [0; BLOCK_PAGES as usize], of: [0; BLOCK_PAGES as usize], pages: 0 };
        let block = self.blocks.entry(number).or_insert_with(|| Box::new(none()));
        if block.here[at] == 0 {
            block.set(at, here.to_bits(), of.to_bits());
        } else {
            self.more.insert((page.0, of.to_bits()), here.to_bits());
        }
        Ok(before)
    }

    /// Whether something lies here that was made for `of`.
    #[must_use]
    pub fn contains(&self, page: PageIndex, of: Placement) -> bool {
        let (number, at) = split(page);
        let first =
            self.blocks.get(&number).is_some_and(|block| block.here[at] != 0 && block.of[at] == of.to_bits());
        first || self.more.contains_key(&(page.0, of.to_bits()))
    }

    /// What was made for `of` is no more. Returns where it lay.
    pub fn remove(&mut self, page: PageIndex, of: Placement) -> Option<Here> {
        let (number, at) = split(page);
        let block = self.blocks.get_mut(&number)?;
        let gone = if block.here[at] != 0 && block.of[at] == of.to_bits() {
            let gone = block.take(at);
            let next =
                self.more.range((page.0, 0)..=(page.0, u64::MAX)).next().map(|(key, here)| (*key, *here));
            if let Some((key, here)) = next {
                self.more.remove(&key);
                block.set(at, here, key.1);
            }
            if block.pages == 0 {
                self.blocks.remove(&number);
            }
            gone
        } else {
            self.more.remove(&(page.0, of.to_bits())).and_then(Here::from_bits)
        }?;
        self.copied -= u64::from(gone.is_copy);
        Some(gone)
    }

    /// What a page that lies here was made for.
    #[must_use]
    pub fn of(&self, page: PageIndex, slot: SlotIndex, generation: Generation) -> Option<Placement> {
        let (number, at) = split(page);
        let block = self.blocks.get(&number)?;
        let is_it = |bits: u64| {
            Here::from_bits(bits).is_some_and(|here| (here.slot, here.generation) == (slot, generation))
        };
        if is_it(block.here[at]) {
            return Placement::from_bits(block.of[at]);
        }
        let mut others = self.more.range((page.0, 0)..=(page.0, u64::MAX));
        let found = others.find_map(|((_, of), here)| is_it(*here).then_some(*of))?;
        Placement::from_bits(found)
    }

    /// Shows the pages of `range` that lie here, ascending, until `visit` has seen enough: a page that is here more
    /// than once is shown as often.
    pub fn visit(&self, range: PageRange, visit: &mut dyn FnMut(PageIndex, Here) -> bool) {
        let end = u64::from(range.first.0) + u64::from(range.pages);
        for (number, block) in self.blocks.range(range.first.0 / BLOCK_PAGES..) {
            let start = number * BLOCK_PAGES;
            if u64::from(start) >= end {
                return;
            }
            for (at, here) in block.here.iter().enumerate() {
                let page = start + at as u32;
                let Some(here) = Here::from_bits(*here) else { continue };
                if page < range.first.0 || u64::from(page) >= end {
                    continue;
                }
                let others = self.more.range((page, 0)..=(page, u64::MAX));
                let others = others.filter_map(|(_, here)| Here::from_bits(*here));
                if !std::iter::once(here).chain(others).all(|here| visit(PageIndex(page), here)) {
                    return;
                }
            }
        }
    }

    /// What of `range` lies here no more, as `is_there` says, is forgotten.
    pub fn retain(&mut self, range: PageRange, is_there: &mut dyn FnMut(PageIndex, Here) -> bool) {
        let mut gone = Vec::new();
        let end = u64::from(range.first.0) + u64::from(range.pages);
        for (number, block) in self.blocks.range(range.first.0 / BLOCK_PAGES..) {
            let start = number * BLOCK_PAGES;
            if u64::from(start) >= end {
                break;
            }
            let pages = (0..BLOCK_PAGES).map(|at| start + at);
            for page in pages.filter(|page| *page >= range.first.0 && u64::from(*page) < end) {
                let (_, at) = split(PageIndex(page));
                let first = Here::from_bits(block.here[at]).map(|here| (here, block.of[at]));
                let others = self.more.range((page, 0)..=(page, u64::MAX));
                let others = others.filter_map(|((_, of), here)| Some((Here::from_bits(*here)?, *of)));
                for (here, of) in first.into_iter().chain(others) {
                    if !is_there(PageIndex(page), here) {
                        gone.push((PageIndex(page), of));
                    }
                }
            }
        }
        for (page, of) in gone {
            if let Some(of) = Placement::from_bits(of) {
                self.remove(page, of);
            }
        }
    }
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} blocks, {} copies of others' pages", self.blocks.len(), self.copied)
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::MemberIndex;

    fn of(member: u16, slot: u32) -> Placement {
        Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(1) }
    }

    fn here(slot: u32, is_copy: bool) -> Here {
        Here { slot: SlotIndex(slot), generation: Generation(3), is_copy }
    }

    fn slots_of(copies: &Copies, page: u32) -> Vec<u32> {
        let mut found = Vec::new();
        copies.visit(PageRange::new(PageIndex(page), 1), &mut |_, here| {
            found.push(here.slot.0);
            true
        });
        found.sort_unstable();
        found
    }

    #[test]
    fn what_is_given_back_is_just_what_was_made_for_it() {
        let mut copies = Copies::default();
        let page = PageIndex(700);
        copies.put(page, here(5, true), of(1, 9), &mut || true).unwrap();
        copies.put(page, here(6, true), of(2, 9), &mut || true).unwrap();
        assert_eq!(slots_of(&copies, 700), [5, 6]);
        let made_for = |slot, generation| copies.of(page, SlotIndex(slot), Generation(generation));
        assert_eq!((made_for(5, 3), made_for(6, 3), made_for(6, 2)), (Some(of(1, 9)), Some(of(2, 9)), None));
        assert_eq!(copies.remove(page, of(1, 8)), None);
        assert_eq!(copies.remove(page, of(1, 9)), Some(here(5, true)));
        assert_eq!((slots_of(&copies, 700), copies.copied()), (vec![6], 1));
        assert_eq!(copies.remove(page, of(2, 9)), Some(here(6, true)));
        assert!(copies.is_empty() && copies.copied() == 0);
        assert_eq!(copies.put(page, here(5, true), of(1, 9), &mut || false), Err(Full));
    }

    proptest! {
        /// Against a list.
        #[test]
        fn it_says_what_a_list_says(ops in prop::collection::vec((0..3_u8, 0..4_u32, 0..3_u16, 0..3_u32), 1..200)) {
            let mut copies = Copies::default();
            let mut list: Vec<(u32, Placement, Here)> = Vec::new();
            for (n, (op, page, member, slot)) in ops.into_iter().enumerate() {
                // Neighbours across the border of a block.
                let (page, of, now) = (510 + page, of(member, slot), here(n as u32, member > 0));
                let known = list.iter().position(|(p, o, _)| (*p, *o) == (page, of));
                prop_assert_eq!(copies.contains(PageIndex(page), of), known.is_some());
                let before = known.map(|at| list.remove(at).2);
                if op < 2 {
                    prop_assert_eq!(copies.put(PageIndex(page), now, of, &mut || true), Ok(before));
                    list.push((page, of, now));
                } else {
                    prop_assert_eq!(copies.remove(PageIndex(page), of), before);
                }
                if op == 1 {
                    let even = |here: &Here| here.slot.0.is_multiple_of(2);
                    copies.retain(PageRange::new(PageIndex(511), 2), &mut |_, here| even(&here));
                    list.retain(|(page, _, here)| !(511..513).contains(page) || even(here));
                }
                for page in 510..514 {
                    let mut slots: Vec<_> = list.iter().filter(|(p, ..)| *p == page).map(|(.., h)| h.slot.0).collect();
                    slots.sort_unstable();
                    prop_assert_eq!(slots_of(&copies, page), slots);
                }
                prop_assert_eq!(copies.copied(), list.iter().filter(|(.., here)| here.is_copy).count() as u64);
            }
            for (page, of, here) in list {
                prop_assert_eq!(copies.remove(PageIndex(page), of), Some(here));
            }
            prop_assert!(copies.is_empty());
        }
    }
}
