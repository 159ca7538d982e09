//! Where the pages of one volume lie: a pure core, without lock or clock.
//!
//! Pages are kept in extents of 512-page blocks. A block whose pages differ is dense: 15 bytes a
//! page. Consecutive blocks that are zero throughout are one extent, however many they are, so that an
//! empty VM of a tebibyte costs a few dozen bytes.

mod handed;

use std::collections::BTreeMap;

pub use handed::MOVE_BYTES;

use crate::ids::{Checksum, Placement, Round};
use crate::page::{PageIndex, PageRange};
use crate::wire::{Encoding, IndexEntry, Status};

/// Pages of a block.
const BLOCK_PAGES: u32 = 512;

/// What a dense block costs in memory.
pub const BLOCK_BYTES: usize = size_of::<Block>();

const _: () = assert!(BLOCK_BYTES / BLOCK_PAGES as usize <= 24);

/// No more memory may be taken: the entries before the one that needed it are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// When a connection was opened: those that came later have greater numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Opened(pub u64);

/// `known` of a page that the index knows nothing of.
const UNKNOWN: u8 = 0;

/// 512 pages one by one.
#[derive(Clone, PartialEq, Eq)]
struct Block {
    placements: [u64; BLOCK_PAGES as usize],
    checksums: [u32; BLOCK_PAGES as usize],
    rounds: [u16; BLOCK_PAGES as usize],
    /// The [`Encoding`], or [`UNKNOWN`].
    known: [u8; BLOCK_PAGES as usize],
    pages: u32,
}

enum Extent {
    Dense(Box<Block>),
    /// So many whole blocks of zero pages of this round.
    Zeros {
        blocks: u32,
        round: u16,
    },
}

impl Extent {
    fn blocks(&self) -> u32 {
        match self {
            Self::Dense(_) => 1,
            Self::Zeros { blocks, .. } => *blocks,
        }
    }
}

/// Whether a test wants older rounds taken for newer ones.
fn takes_older() -> bool {
    #[cfg(feature = "simulation")]
    return crate::host::has_bug(crate::host::Bug::OlderRoundIndexed);
    #[cfg(not(feature = "simulation"))]
    false
}

impl Block {
    fn boxed(zero_round: Option<u16>) -> Box<Self> {
        Box::new(Self {
            placements: [0; BLOCK_PAGES as usize],
            checksums: [0; BLOCK_PAGES as usize],
            rounds: [zero_round.unwrap_or(0); BLOCK_PAGES as usize],
            known: [zero_round.map_or(UNKNOWN, |_| Encoding::Zero as u8); BLOCK_PAGES as usize],
            pages: zero_round.map_or(0, |_| BLOCK_PAGES),
        })
    }

    /// Takes what the entry says of the page, unless it is older than what is known.
    fn set(&mut self, at: usize, entry: &IndexEntry) {
        if self.known[at] == UNKNOWN {
            self.pages += 1;
        } else if entry.round.0 < self.rounds[at] && !takes_older() {
            return;
        }
        self.placements[at] = entry.placement.map_or(0, Placement::to_bits);
        self.checksums[at] = entry.checksum.0;
        self.rounds[at] = entry.round.0;
        self.known[at] = entry.encoding as u8;
    }

    fn discard(&mut self, at: usize, below: Round) {
        if self.known[at] != UNKNOWN && self.rounds[at] < below.0 {
            self.known[at] = UNKNOWN;
            self.placements[at] = 0;
            self.pages -= 1;
        }
    }

    fn entry(&self, at: usize, page: u32) -> Option<IndexEntry> {
        let round = Round(self.rounds[at]);
        match self.known[at] {
            UNKNOWN => None,
            known if known == Encoding::Zero as u8 => Some(IndexEntry::zero(PageIndex(page), 1, round)),
            _ => Placement::from_bits(self.placements[at])
                .map(|place| IndexEntry::at(PageIndex(page), round, place, Checksum(self.checksums[at]))),
        }
    }

    /// The round, when all pages are zero pages of one round.
    fn zero_round(&self) -> Option<u16> {
        let round = self.rounds[0];
        let same = self.known.iter().all(|known| *known == Encoding::Zero as u8)
            && self.rounds.iter().all(|other| *other == round);
        same.then_some(round)
    }
}

/// What one intermediary knows of where a volume's pages lie.
#[derive(Default)]
pub struct Index {
    /// By first block; they do not overlap.
    extents: BTreeMap<u32, Extent>,
    dense: usize,
    zero_pages: u64,
    /// Of pages that others took over, by page and where it lay: where it lies.
    moves: BTreeMap<(u32, u64), Placement>,
    /// What comes over connections that were opened before this one is a dead writer's.
    fence: Opened,
}

impl Index {
    /// Whoever put entries over a connection opened before this one puts none any more.
    pub fn fence(&mut self, by: Opened) {
        self.fence = self.fence.max(by);
    }

    /// # Errors
    /// [`Status::Fenced`] for entries that come over a connection of a writer in whose place another is: of one round the
    /// later entry holds, and these are late.
    pub fn check_fence(&self, over: Opened) -> Result<(), Status> {
        #[cfg(feature = "simulation")]
        let over = if crate::host::has_bug(crate::host::Bug::FenceIgnored) { self.fence } else { over };
        if over < self.fence { Err(Status::Fenced) } else { Ok(()) }
    }

    /// Dense blocks, of [`BLOCK_BYTES`] each.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.dense
    }

    /// Pages that are known.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let dense = self.extents.values().map(|extent| match extent {
            Extent::Dense(block) => u64::from(block.pages),
            Extent::Zeros { .. } => 0,
        });
        dense.sum::<u64>() + self.zero_pages
    }

    /// Takes entries in their order. One replaces what is known of its pages unless that is of a newer
    /// round; of the same round the later one holds, since a page that was lost with one intermediary is put
    /// again at another. `more` is asked before each dense block is made.
    ///
    /// # Errors
    /// [`Full`] when `more` says no.
    pub fn put(&mut self, entries: &[IndexEntry], more: &mut dyn FnMut() -> bool) -> Result<(), Full> {
        entries.iter().try_for_each(|entry| self.put_one(entry, more))
    }

    fn put_one(&mut self, entry: &IndexEntry, more: &mut dyn FnMut() -> bool) -> Result<(), Full> {
        let entry = &self.current(entry);
        let (first, end) = bounds(entry.range());
        let (inner, inner_end) = (first.div_ceil(u64::from(BLOCK_PAGES)), end / u64::from(BLOCK_PAGES));
        if inner >= inner_end {
            return self.put_pages(first, end, entry, more);
        }
        let (inner_first, inner_last) = (inner * u64::from(BLOCK_PAGES), inner_end * u64::from(BLOCK_PAGES));
        self.put_pages(first, inner_first, entry, more)?;
        self.put_zero_blocks(inner as u32, inner_end as u32, entry);
        self.put_pages(inner_last, end, entry, more)
    }

    /// Single pages, in at most two blocks.
    fn put_pages(
        &mut self,
        first: u64,
        end: u64,
        entry: &IndexEntry,
        more: &mut dyn FnMut() -> bool,
    ) -> Result<(), Full> {
        let mut page = first;
        while page < end {
            let number = (page / u64::from(BLOCK_PAGES)) as u32;
            let stop = end.min((u64::from(number) + 1) * u64::from(BLOCK_PAGES));
            if !self.zeros_already(number, entry) {
                let block = self.dense_block(number, more)?;
                for page in page..stop {
                    block.set((page % u64::from(BLOCK_PAGES)) as usize, entry);
                }
            }
            page = stop;
        }
        Ok(())
    }

    /// Whether the block lies in an extent of zeros that the entry changes nothing of.
    fn zeros_already(&self, number: u32, entry: &IndexEntry) -> bool {
        match self.extent_at(number) {
            Some((_, Extent::Zeros { round, .. })) => {
                entry.round.0 < *round || (entry.round.0 == *round && entry.encoding == Encoding::Zero)
            }
            _ => false,
        }
    }

    /// Whole blocks of zeros: merged into dense blocks, laid over older zeros, and into the gaps.
    fn put_zero_blocks(&mut self, first: u32, end: u32, entry: &IndexEntry) {
        self.split_at(first);
        self.split_at(end);
        let inside: Vec<u32> = self.extents.range(first..end).map(|(at, _)| *at).collect();
        for at in inside {
            let gone = match self.extents.get_mut(&at) {
                Some(Extent::Dense(block)) => {
                    (0..BLOCK_PAGES as usize).for_each(|page| block.set(page, entry));
                    block.zero_round() == Some(entry.round.0)
                }
                Some(Extent::Zeros { round, .. }) => *round <= entry.round.0,
                None => false,
            };
            if gone {
                self.remove(at);
            }
        }
        let mut at = first;
        while at < end {
            let next = self.extents.range(at..end).next().map(|(next, extent)| (*next, extent.blocks()));
            let (stop, skip) = next.unwrap_or((end, 0));
            if stop > at {
                self.insert_zeros(at, stop - at, entry.round.0);
            }
            at = stop + skip;
        }
        self.merge_around(first, end);
    }

    /// Everything known of pages of `range` below the round is forgotten.
    pub fn discard(&mut self, range: PageRange, below: Round) {
        let (first, end) = bounds(range);
        let mut number = (first / u64::from(BLOCK_PAGES)) as u32;
        let last = (end - 1) / u64::from(BLOCK_PAGES);
        loop {
            let at = match self.extent_at(number) {
                Some((at, _)) => at,
                None => match self.extents.range(number..).next() {
                    Some((at, _)) => *at,
                    None => return,
                },
            };
            if u64::from(at) > last {
                return;
            }
            let blocks = self.extents.get(&at).map_or(1, Extent::blocks);
            self.discard_extent(at, first, end, below);
            match at.checked_add(blocks) {
                Some(next) => number = next,
                None => return,
            }
        }
    }

    fn discard_extent(&mut self, at: u32, first: u64, end: u64, below: Round) {
        match self.extents.get(&at) {
            Some(Extent::Zeros { blocks, round }) if *round < below.0 => {
                let (start, stop) = (at, at + *blocks);
                let whole_first = first.div_ceil(u64::from(BLOCK_PAGES)).max(u64::from(start)) as u32;
                let whole_end = (end / u64::from(BLOCK_PAGES)).min(u64::from(stop)) as u32;
                if whole_first < whole_end {
                    self.split_at(whole_first);
                    self.split_at(whole_end);
                    self.remove(whole_first);
                }
                // What is left of the range lies in the blocks at its two ends.
                for number in [first / u64::from(BLOCK_PAGES), (end - 1) / u64::from(BLOCK_PAGES)] {
                    if (u64::from(start)..u64::from(stop)).contains(&number)
                        && self.extent_at(number as u32).is_some()
                    {
                        self.discard_block(number as u32, first, end, below);
                    }
                }
            }
            Some(Extent::Dense(_)) => self.discard_block(at, first, end, below),
            _ => {}
        }
    }

    fn discard_block(&mut self, number: u32, first: u64, end: u64, below: Round) {
        let start = u64::from(number) * u64::from(BLOCK_PAGES);
        let Ok(block) = self.dense_block(number, &mut || true) else { return };
        for page in first.max(start)..end.min(start + u64::from(BLOCK_PAGES)) {
            block.discard((page - start) as usize, below);
        }
        if block.pages == 0 {
            self.remove(number);
        }
    }

    /// What is known of the pages of `range`, ascending, runs of zeros as one entry: appended to `out` until it
    /// holds `entries_max`.
    pub fn locate(&self, range: PageRange, entries_max: usize, out: &mut Vec<IndexEntry>) {
        let (first, end) = bounds(range);
        let from = (first / u64::from(BLOCK_PAGES)) as u32;
        let from = self.extent_at(from).map_or(from, |(at, _)| at);
        for (at, extent) in self.extents.range(from..) {
            let start = u64::from(*at) * u64::from(BLOCK_PAGES);
            if start >= end {
                return;
            }
            let stop = start + u64::from(extent.blocks()) * u64::from(BLOCK_PAGES);
            let (first, stop) = (first.max(start), end.min(stop));
            let room = match extent {
                Extent::Zeros { round, .. } => {
                    let run = IndexEntry::zero(PageIndex(first as u32), (stop - first) as u32, Round(*round));
                    push(out, run, entries_max)
                }
                Extent::Dense(block) => (first..stop).all(|page| {
                    let entry = block.entry((page - start) as usize, page as u32);
                    entry.is_none_or(|entry| push(out, entry, entries_max))
                }),
            };
            if !room {
                return;
            }
        }
    }

    fn extent_at(&self, number: u32) -> Option<(u32, &Extent)> {
        let (at, extent) = self.extents.range(..=number).next_back()?;
        (number - at < extent.blocks()).then_some((*at, extent))
    }

    /// The block as a dense one, made if need be.
    fn dense_block(&mut self, number: u32, more: &mut dyn FnMut() -> bool) -> Result<&mut Block, Full> {
        let zero_round = match self.extent_at(number) {
            Some((_, Extent::Dense(_))) => None,
            found => {
                let round = found.and_then(|(_, extent)| match extent {
                    Extent::Zeros { round, .. } => Some(*round),
                    Extent::Dense(_) => None,
                });
                if !more() {
                    return Err(Full);
                }
                Some(round)
            }
        };
        if let Some(round) = zero_round {
            if round.is_some() {
                self.split_at(number);
                self.split_at(number + 1);
                self.remove(number);
            }
            self.extents.insert(number, Extent::Dense(Block::boxed(round)));
            self.dense += 1;
        }
        match self.extents.get_mut(&number) {
            Some(Extent::Dense(block)) => Ok(block),
            _ => Err(Full),
        }
    }

    /// Makes an extent of zeros that goes over this block's beginning two.
    fn split_at(&mut self, number: u32) {
        let Some((at, Extent::Zeros { blocks, round })) = self.extent_at(number) else { return };
        let (blocks, round, ahead) = (*blocks, *round, number - at);
        if ahead > 0 {
            self.extents.insert(at, Extent::Zeros { blocks: ahead, round });
            self.extents.insert(number, Extent::Zeros { blocks: blocks - ahead, round });
        }
    }

    fn insert_zeros(&mut self, at: u32, blocks: u32, round: u16) {
        self.zero_pages += u64::from(blocks) * u64::from(BLOCK_PAGES);
        self.extents.insert(at, Extent::Zeros { blocks, round });
    }

    fn remove(&mut self, at: u32) {
        match self.extents.remove(&at) {
            Some(Extent::Dense(_)) => self.dense -= 1,
            Some(Extent::Zeros { blocks, .. }) => {
                self.zero_pages -= u64::from(blocks) * u64::from(BLOCK_PAGES);
            }
            None => {}
        }
    }

    /// Joins extents of zeros of one round that touch, in and beside these blocks.
    fn merge_around(&mut self, first: u32, end: u32) {
        let from = self.extents.range(..first).next_back().map_or(first, |(at, _)| *at);
        let starts: Vec<u32> = self.extents.range(from..=end).map(|(at, _)| *at).collect();
        let mut last: Option<(u32, u32, u16)> = None;
        for at in starts {
            let Some(Extent::Zeros { blocks, round }) = self.extents.get(&at) else {
                last = None;
                continue;
            };
            let (blocks, round) = (*blocks, *round);
            last = match last {
                Some((start, before, same)) if start + before == at && same == round => {
                    self.extents.remove(&at);
                    self.extents.insert(start, Extent::Zeros { blocks: before + blocks, round });
                    Some((start, before + blocks, round))
                }
                _ => Some((at, blocks, round)),
            };
        }
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages in {} extents", self.pages(), self.extents.len())
    }
}

fn bounds(range: PageRange) -> (u64, u64) {
    let first = u64::from(range.first.0);
    (first, first + u64::from(range.pages))
}

/// Appends an entry, or lengthens the last one; whether there was room.
fn push(out: &mut Vec<IndexEntry>, entry: IndexEntry, entries_max: usize) -> bool {
    if let Some(last) = out.last_mut() {
        let adjoins = last.page.0.checked_add(last.run_pages) == Some(entry.page.0);
        let zeros = last.encoding == Encoding::Zero && entry.encoding == Encoding::Zero;
        if adjoins && zeros && last.round == entry.round {
            last.run_pages += entry.run_pages;
            return true;
        }
    }
    if out.len() >= entries_max {
        return false;
    }
    out.push(entry);
    true
}

#[cfg(test)]
mod test;
