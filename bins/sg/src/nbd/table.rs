//! Where each page of a volume of one's own lies: a pure core, 12 bytes a page, and none for what was never written.

use libsg::ids::{Checksum, MemberIndex, Placement};
use libsg::page::{PageIndex, PageRange};

/// Pages of a block, which is there once one of them is not zero.
const BLOCK_PAGES: usize = 512;

/// In place of a placement: all zero.
const ZERO: u64 = 0;

/// In place of a placement: nobody knows where. No placement has a generation of zero.
const LOST: u64 = 1;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is zero.
    Zero,
    /// Its bytes are there.
    At(Placement, Checksum),
    /// Its bytes, or where they are, went with an intermediary.
    Lost,
}

struct Block {
    places: [u64; BLOCK_PAGES],
    checksums: [u32; BLOCK_PAGES],
}

/// Every page of a volume.
pub struct Table {
    pages: u32,
    blocks: Vec<Option<Box<Block>>>,
    /// Pages whose bytes lie at each member.
    held: Vec<u64>,
}

impl Table {
    /// So many pages, all zero, at so many members.
    pub fn new(pages: u32, members: usize) -> Self {
        let blocks = (pages as usize).div_ceil(BLOCK_PAGES);
        Self { pages, blocks: (0..blocks).map(|_| None).collect(), held: vec![0; members] }
    }

    /// How many pages there are.
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// Pages whose bytes lie at a member.
    pub fn held_by(&self, member: MemberIndex) -> u64 {
        self.held.get(member.as_usize()).copied().unwrap_or(0)
    }

    /// What is known of a page.
    pub fn get(&self, page: PageIndex) -> Known {
        let (block, at) = place(page);
        let Some(Some(block)) = self.blocks.get(block) else { return Known::Zero };
        match block.places[at] {
            ZERO => Known::Zero,
            bits => Placement::from_bits(bits)
                .map_or(Known::Lost, |placement| Known::At(placement, Checksum(block.checksums[at]))),
        }
    }

    /// Notes what is known of a page from now on. Returns what was known before.
    pub fn set(&mut self, page: PageIndex, known: Known) -> Known {
        let before = self.get(page);
        let (number, at) = place(page);
        let Some(slot) = self.blocks.get_mut(number) else { return before };
        if slot.is_none() && known == Known::Zero {
            return before;
        }
        let block = slot.get_or_insert_with(|| {
            Box::new(Block { places: [ZERO; BLOCK_PAGES], checksums: [0; BLOCK_PAGES] })
        });
        (block.places[at], block.checksums[at]) = match known {
            Known::Zero => (ZERO, 0),
            Known::Lost => (LOST, 0),
            Known::At(placement, checksum) => (placement.to_bits(), checksum.0),
        };
        self.count(before, false);
        self.count(known, true);
        before
    }

    fn count(&mut self, known: Known, more: bool) {
        if let Known::At(placement, _) = known
            && let Some(held) = self.held.get_mut(placement.member.as_usize())
        {
            *held = if more { *held + 1 } else { held.saturating_sub(1) };
        }
    }

    /// The pages of a range that are not zero, with what is known of them.
    pub fn filled(&self, range: PageRange) -> impl Iterator<Item = (PageIndex, Known)> {
        let end = u64::from(range.first.0) + u64::from(range.pages);
        let mut at = u64::from(range.first.0);
        std::iter::from_fn(move || {
            while at < end {
                let page = PageIndex(at as u32);
                let (block, within) = place(page);
                if matches!(self.blocks.get(block), Some(Some(_))) {
                    at += 1;
                    match self.get(page) {
                        Known::Zero => {}
                        known => return Some((page, known)),
                    }
                } else {
                    at += (BLOCK_PAGES - within) as u64;
                }
            }
            None
        })
    }

    /// Gives a block's memory back when all of its pages are zero.
    pub fn tidy(&mut self, range: PageRange) {
        let first = range.first.as_usize() / BLOCK_PAGES;
        let last = (range.positions().end.saturating_sub(1)) / BLOCK_PAGES;
        for block in self.blocks.iter_mut().take(last + 1).skip(first) {
            if block.as_ref().is_some_and(|block| block.places.iter().all(|bits| *bits == ZERO)) {
                *block = None;
            }
        }
    }
}

const fn place(page: PageIndex) -> (usize, usize) {
    (page.as_usize() / BLOCK_PAGES, page.as_usize() % BLOCK_PAGES)
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use libsg::ids::{Generation, SlotIndex};
    use proptest::prelude::*;

    use super::*;

    fn known() -> impl Strategy<Value = Known> {
        let at = (0..3_u16, any::<u32>(), 1..u16::MAX).prop_map(|(member, slot, generation)| {
            let member = MemberIndex(member);
            let placement = Placement { member, slot: SlotIndex(slot), generation: Generation(generation) };
            Known::At(placement, Checksum(slot ^ 5))
        });
        prop_oneof![2 => at, 1 => Just(Known::Zero), 1 => Just(Known::Lost)]
    }

    proptest! {
        #[test]
        fn it_is_a_map(
            ops in prop::collection::vec((0..1500_u32, known(), any::<bool>()), 1..200), first in 0..1400_u32, pages in 1..100_u32,
        ) {
            let (mut table, mut model) = (Table::new(1500, 3), BTreeMap::new());
            for (page, known, tidies) in ops {
                let before = model.insert(page, known).unwrap_or(Known::Zero);
                prop_assert_eq!(table.set(PageIndex(page), known), before);
                if tidies {
                    table.tidy(PageRange::new(PageIndex(page), 1));
                }
            }
            for page in 0..1500 {
                prop_assert_eq!(table.get(PageIndex(page)), model.get(&page).copied().unwrap_or(Known::Zero));
            }
            for member in 0..3 {
                let at = |known: &&Known| matches!(known, Known::At(placement, _) if placement.member.0 == member);
                prop_assert_eq!(table.held_by(MemberIndex(member)), model.values().filter(at).count() as u64);
            }
            let filled: Vec<_> = table.filled(PageRange::new(PageIndex(first), pages)).collect();
            let expected: Vec<_> = model
                .range(first..first + pages)
                .filter(|(_, known)| **known != Known::Zero)
                .map(|(page, known)| (PageIndex(*page), *known))
                .collect();
            prop_assert_eq!(filled, expected);
        }
    }

    #[test]
    fn zeros_cost_nothing() {
        let mut table = Table::new(u32::MAX, 1);
        table.set(PageIndex(u32::MAX - 1), Known::Zero);
        assert!(table.blocks.iter().all(Option::is_none));
        table.set(PageIndex(7), Known::Lost);
        table.set(PageIndex(7), Known::Zero);
        table.tidy(PageRange::new(PageIndex(0), 4096));
        assert!(table.blocks.iter().all(Option::is_none));
        assert_eq!(table.filled(PageRange::new(PageIndex(0), u32::MAX)).next(), None);
    }
}
