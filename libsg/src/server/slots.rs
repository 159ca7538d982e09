//! Which slot of the arena holds which page: a pure core, without memory, lock or clock.
//!
//! Slots come in chunks of 512 (2 MiB). A chunk is leased to one volume at a time, so that a volume
//! that is dissolved gives whole chunks back. A slot is written once: an overwrite takes a new slot,
//! and a slot is given out again only under a new generation, also after its chunk was away. While
//! somebody sends from a chunk it is pinned: what is freed in it meanwhile waits until it is not.
//!
//! Pages shared between volumes will turn a chunk's lease into one of a dedup domain and add a count
//! to the owner: every access goes through the placement already, and nothing outside this file
//! knows that a chunk has one volume.

mod chunks;

use std::collections::{HashMap, VecDeque};

use super::bits::Bits;
use crate::ids::{Checksum, Generation, Round, SlotIndex, VolumeId};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};

/// Slots of a chunk.
pub const CHUNK_SLOTS: usize = 512;

/// Bytes of a chunk: one huge page.
pub const CHUNK_BYTES: usize = CHUNK_SLOTS * PAGE_BYTES;

/// How many times as many numbers there are as chunks at once. A number is used up when its slots
/// had all their generations; the spare ones put that off to years at full speed.
const NUMBERS_PER_CHUNK: u64 = 4;

/// Chunks with free slots that are looked at for a run as long as wanted, before a shorter one is taken.
const CHUNKS_LOOKED_AT: usize = 4;

/// A chunk by its number: its slots are `512 n` to `512 n + 511`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkNumber(pub u32);

impl ChunkNumber {
    /// The chunk that a slot is in.
    #[must_use]
    pub const fn of(slot: SlotIndex) -> Self {
        Self(slot.0 / CHUNK_SLOTS as u32)
    }

    /// The chunk's first slot.
    #[must_use]
    pub const fn first_slot(self) -> SlotIndex {
        SlotIndex(self.0 * CHUNK_SLOTS as u32)
    }
}

/// Consecutive slots of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// The first slot.
    pub first: SlotIndex,
    /// How many.
    pub slots: u32,
}

impl SlotRun {
    /// Every slot of the run.
    pub fn iter(self) -> impl Iterator<Item = SlotIndex> {
        (self.first.0..self.first.0 + self.slots).map(SlotIndex)
    }
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Which page of the chunk's volume.
    pub page: PageIndex,
    /// Of its bytes, as the writer said.
    pub checksum: Checksum,
    /// Of which round.
    pub round: Round,
}

/// The volume is not known here, or was dissolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoVolume;

/// An owner with its generation, in 12 bytes: with three bits a slot, what a page costs here.
#[derive(Clone, Copy)]
struct Slot {
    page: u32,
    checksum: u32,
    round: u16,
    generation: u16,
}

const _: () = assert!(size_of::<Chunk>() / CHUNK_SLOTS <= 32);

struct Chunk {
    volume: VolumeId,
    /// The volume was dissolved: nothing is stored here any more.
    condemned: bool,
    /// Position in the lease's list of chunks.
    at: usize,
    /// Whether the lease lists it as one with free slots.
    listed: bool,
    /// Readers that send from it.
    pins: u32,
    /// Slots given out: being filled, or stored.
    taken: u32,
    free: Bits,
    stored: Bits,
    /// Freed while the chunk was pinned.
    limbo: Bits,
    slots: [Slot; CHUNK_SLOTS],
}

enum Entry {
    /// No memory behind it; its slots had generations up to `spent`.
    Vacant {
        spent: u16,
    },
    /// Memory behind it that nobody leases: being touched ahead of need, or on its way back.
    Idle {
        spent: u16,
    },
    Leased(Box<Chunk>),
}

#[derive(Default)]
struct Lease {
    chunks: Vec<u32>,
    /// Those of them that may have free slots.
    open: Vec<u32>,
    stored: u64,
}

/// The slots of an intermediary.
pub struct Slots {
    entries: Vec<Entry>,
    numbers_max: u32,
    /// Numbers to use again, the longest unused first, so that generations are used up evenly.
    vacant: VecDeque<u32>,
    /// Chunks whose memory is touched already.
    ready: VecDeque<u32>,
    /// Chunks to give back.
    leaving: Vec<ChunkNumber>,
    leases: HashMap<VolumeId, Lease>,
    chunks_max: u64,
    chunks_held: u64,
    leases_ever: u64,
    stored: u64,
}

impl Slots {
    /// Slots for at most `limit_bytes` of memory, rounded down to chunks.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        let numbers_limit = u64::from(u32::MAX) / CHUNK_SLOTS as u64;
        let chunks_max = (limit_bytes / CHUNK_BYTES as u64).min(numbers_limit);
        Self {
            entries: Vec::new(),
            numbers_max: (chunks_max * NUMBERS_PER_CHUNK).min(numbers_limit) as u32,
            vacant: VecDeque::new(),
            ready: VecDeque::new(),
            leaving: Vec::new(),
            leases: HashMap::new(),
            chunks_max,
            chunks_held: 0,
            leases_ever: 0,
            stored: 0,
        }
    }

    /// How many chunk numbers there may ever be.
    #[must_use]
    pub fn numbers_max(&self) -> u32 {
        self.numbers_max
    }

    /// Bytes of memory taken from the system, used or not.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.chunks_held * CHUNK_BYTES as u64
    }

    /// Pages stored, of all volumes.
    #[must_use]
    pub fn stored_pages(&self) -> u64 {
        self.stored
    }

    /// Pages stored of one volume.
    #[must_use]
    pub fn stored_pages_of(&self, volume: VolumeId) -> u64 {
        self.leases.get(&volume).map_or(0, |lease| lease.stored)
    }

    /// Lets slots be given to the volume from now on.
    pub fn open(&mut self, volume: VolumeId) {
        self.leases.entry(volume).or_default();
    }

    /// Takes `count` slots for the volume, or fewer when the limit is reached: in one run where there is one, so
    /// that what is said of them is short, else in few. They are appended to `runs`; each ends in [`Self::store`] or [`Self::free`]. Gives how many there are.
    ///
    /// # Errors
    /// No such volume.
    pub fn allocate(
        &mut self,
        volume: VolumeId,
        count: usize,
        runs: &mut Vec<SlotRun>,
    ) -> Result<usize, NoVolume> {
        let mut taken = 0;
        while taken < count {
            match self.take_run(volume, count - taken)? {
                Some(run) => {
                    taken += run.slots as usize;
                    runs.push(run);
                }
                None if self.lease_chunk(volume) => {}
                None => break,
            }
        }
        Ok(taken)
    }

    /// The best run of the listed chunks that were listed last; `None` when there is no free slot.
    fn take_run(&mut self, volume: VolumeId, wanted: usize) -> Result<Option<SlotRun>, NoVolume> {
        let lease = self.leases.get_mut(&volume).ok_or(NoVolume)?;
        let mut best: Option<(u32, (usize, usize))> = None;
        let mut looked_at = 0;
        while looked_at < CHUNKS_LOOKED_AT && best.is_none_or(|(_, (_, slots))| slots < wanted) {
            let Some(at) = lease.open.len().checked_sub(looked_at + 1) else { break };
            let number = lease.open[at];
            let Entry::Leased(chunk) = &mut self.entries[number as usize] else {
                lease.open.remove(at);
                continue;
            };
            let Some(run) = chunk.free.best_run(wanted) else {
                chunk.listed = false;
                lease.open.remove(at);
                continue;
            };
            if best.is_none_or(|(_, (_, slots))| slots < run.1) {
                best = Some((number, run));
            }
            looked_at += 1;
        }
        let Some((number, (first, slots))) = best else { return Ok(None) };
        let Entry::Leased(chunk) = &mut self.entries[number as usize] else { return Ok(None) };
        for at in first..first + slots {
            chunk.free.remove(at);
            chunk.slots[at].generation += 1;
        }
        chunk.taken += slots as u32;
        let first = SlotIndex(number * CHUNK_SLOTS as u32 + first as u32);
        Ok(Some(SlotRun { first, slots: slots as u32 }))
    }

    /// A slot that was taken holds this page from now on. Its generation, or `None` when the volume
    /// was dissolved meanwhile: then the slot is free again.
    pub fn store(&mut self, slot: SlotIndex, owner: Owner) -> Option<Generation> {
        let (chunk, at) = self.chunk_mut(slot)?;
        if chunk.condemned {
            self.free(slot);
            return None;
        }
        debug_assert!(!chunk.free.contains(at) && !chunk.stored.contains(at));
        chunk.stored.insert(at);
        let generation = chunk.slots[at].generation;
        chunk.slots[at] =
            Slot { page: owner.page.0, checksum: owner.checksum.0, round: owner.round.0, generation };
        let volume = chunk.volume;
        self.count_stored(volume, 1, 0);
        Some(Generation(generation))
    }

    /// A slot that was taken, or holds a page, holds nothing any more.
    pub fn free(&mut self, slot: SlotIndex) {
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        if chunk.free.contains(at) || chunk.limbo.contains(at) {
            return;
        }
        let was_stored = chunk.stored.contains(at);
        chunk.stored.remove(at);
        chunk.taken -= 1;
        chunk.limbo.insert(at);
        let volume = chunk.volume;
        if was_stored {
            self.count_stored(volume, 0, 1);
        }
        self.settle(ChunkNumber::of(slot));
    }

    /// What the slot holds, if that is this volume's page under this generation.
    #[must_use]
    pub fn read(
        &self,
        volume: VolumeId,
        page: PageIndex,
        slot: SlotIndex,
        generation: Generation,
    ) -> Option<Owner> {
        let Entry::Leased(chunk) = self.entries.get(ChunkNumber::of(slot).0 as usize)? else { return None };
        let at = slot.0 as usize % CHUNK_SLOTS;
        let held = &chunk.slots[at];
        let matches = chunk.volume == volume
            && chunk.stored.contains(at)
            && held.page == page.0
            && held.generation == generation.0;
        matches.then_some(Owner { page, checksum: Checksum(held.checksum), round: Round(held.round) })
    }

    /// Keeps a leased chunk and all that is in it as it is until as many [`Self::unpin`].
    pub fn pin(&mut self, number: ChunkNumber) {
        if let Some(Entry::Leased(chunk)) = self.entries.get_mut(number.0 as usize) {
            chunk.pins += 1;
        }
    }

    /// Takes one [`Self::pin`] back.
    pub fn unpin(&mut self, number: ChunkNumber) {
        if let Some(Entry::Leased(chunk)) = self.entries.get_mut(number.0 as usize) {
            chunk.pins -= 1;
            self.settle(number);
        }
    }

    /// Whether the chunk's volume was dissolved and only pins or unfinished slots keep it.
    #[must_use]
    pub fn condemned(&self, number: ChunkNumber) -> bool {
        matches!(self.entries.get(number.0 as usize), Some(Entry::Leased(chunk)) if chunk.condemned)
    }

    /// Frees all the volume holds. Slots that are being filled, and pinned chunks, follow by themselves.
    /// Returns the pages freed.
    pub fn dissolve(&mut self, volume: VolumeId) -> u64 {
        let Some(lease) = self.leases.remove(&volume) else { return 0 };
        self.stored -= lease.stored;
        for number in lease.chunks {
            if let Entry::Leased(chunk) = &mut self.entries[number as usize] {
                chunk.condemned = true;
                chunk.taken -= chunk.stored.len();
                chunk.limbo.insert_all(&chunk.stored);
                chunk.stored = Bits::NONE;
                self.settle(ChunkNumber(number));
            }
        }
        lease.stored
    }

    /// Chunks that the volume has now, for [`Self::discard_in`].
    #[must_use]
    pub fn chunks_of(&self, volume: VolumeId) -> usize {
        self.leases.get(&volume).map_or(0, |lease| lease.chunks.len())
    }

    /// Frees pages of `range` that are below `below` in the volume's `nth` chunk. Called for each
    /// chunk from the last to the first, it reaches all that were there at the start, and lets others have their
    /// turn in between.
    pub fn discard_in(&mut self, volume: VolumeId, nth: usize, range: PageRange, below: Round) {
        let Some(&number) = self.leases.get(&volume).and_then(|lease| lease.chunks.get(nth)) else { return };
        let Entry::Leased(chunk) = &self.entries[number as usize] else { return };
        let positions = range.positions();
        let mut doomed = Bits::NONE;
        for at in chunk.stored.iter() {
            let slot = &chunk.slots[at];
            if positions.contains(&(slot.page as usize)) && slot.round < below.0 {
                doomed.insert(at);
            }
        }
        for at in doomed.iter() {
            self.free(SlotIndex(number * CHUNK_SLOTS as u32 + at as u32));
        }
    }

    fn count_stored(&mut self, volume: VolumeId, more: u64, fewer: u64) {
        self.stored = self.stored + more - fewer;
        if let Some(lease) = self.leases.get_mut(&volume) {
            lease.stored = lease.stored + more - fewer;
        }
    }

    fn chunk_mut(&mut self, slot: SlotIndex) -> Option<(&mut Chunk, usize)> {
        match self.entries.get_mut(ChunkNumber::of(slot).0 as usize)? {
            Entry::Leased(chunk) => Some((chunk, slot.0 as usize % CHUNK_SLOTS)),
            _ => None,
        }
    }

    /// After something was freed or unpinned: makes freed slots usable again, and lets go of a chunk that
    /// holds nothing.
    fn settle(&mut self, number: ChunkNumber) {
        let Entry::Leased(chunk) = &mut self.entries[number.0 as usize] else { return };
        if chunk.pins > 0 {
            return;
        }
        if chunk.taken > 0 {
            if chunk.condemned {
                return;
            }
            // A slot that had all its generations is never given out again.
            let worn: Vec<usize> =
                chunk.limbo.iter().filter(|at| chunk.slots[*at].generation == Generation::LAST).collect();
            worn.into_iter().for_each(|at| chunk.limbo.remove(at));
            chunk.free.insert_all(&chunk.limbo);
            chunk.limbo = Bits::NONE;
            let relist = !chunk.listed && !chunk.free.is_empty();
            chunk.listed |= relist;
            let volume = chunk.volume;
            if relist && let Some(lease) = self.leases.get_mut(&volume) {
                lease.open.push(number.0);
            }
            return;
        }
        let spent = chunk.slots.iter().map(|slot| slot.generation).max().unwrap_or(Generation::LAST);
        let (volume, at, listed, condemned) = (chunk.volume, chunk.at, chunk.listed, chunk.condemned);
        self.entries[number.0 as usize] = Entry::Idle { spent };
        self.leaving.push(number);
        if !condemned && let Some(lease) = self.leases.get_mut(&volume) {
            lease.chunks.swap_remove(at);
            if listed {
                lease.open.retain(|open| *open != number.0);
            }
            if let Some(&moved) = lease.chunks.get(at)
                && let Entry::Leased(moved) = &mut self.entries[moved as usize]
            {
                moved.at = at;
            }
        }
    }
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages in {} chunks of {}", self.stored, self.chunks_held, self.chunks_max)
    }
}

impl Generation {
    /// The last one a slot can have.
    const LAST: u16 = u16::MAX;
}

#[cfg(test)]
mod test;
