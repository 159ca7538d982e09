//! Which slot of the arena holds which page: a pure core, without memory, lock or clock.
//!
//! Slots come in chunks of 512 (2 MiB). A chunk is leased to one volume at a time, so that a volume
//! that is dissolved gives whole chunks back. A slot is written once: an overwrite takes a new slot,
//! and a slot is given out again only under a new generation, also after its chunk was away. While
//! somebody sends from a chunk it is pinned: what is freed in it meanwhile waits until it is not.
//!
//! A volume may share pages with others of its domain: then a slot is found by the hash of its bytes, and
//! stays as long as anyone holds it, the page that it was written for or pages that refer to it. Whose chunk it is in
//! does not matter for that: a chunk whose volume was dissolved while others hold some of it becomes one of theirs.

mod chunks;
mod held;
mod hints;
mod pins;
mod sharing;
mod table;

use std::collections::{HashMap, VecDeque};

pub use held::Held;
pub use sharing::{GRANT_TIME, Holder, Referred};

use self::sharing::{Contents, Domain, DomainId, Refs};
use super::bits::Bits;
use crate::content::{ContentHash, Sharing};
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
    /// Appends a slot to runs: to the last of them where it follows that in its chunk.
    pub fn append(slot: SlotIndex, runs: &mut Vec<Self>) {
        match runs.last_mut() {
            Some(run)
                if run.first.0 + run.slots == slot.0
                    && ChunkNumber::of(run.first) == ChunkNumber::of(slot) =>
            {
                run.slots += 1;
            }
            _ => runs.push(Self { first: slot, slots: 1 }),
        }
    }

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

const _: () = assert!((size_of::<Chunk>() + size_of::<Contents>()) / CHUNK_SLOTS <= 40);

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
    /// What can be read.
    stored: Bits,
    /// Those of them that hold the page of the chunk's volume that they were written for.
    owned: Bits,
    /// What lies here, of a volume that shares.
    contents: Option<Box<Contents>>,
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
    /// Pages that refer to slots, each as often as it does. Those that own theirs are counted by the chunks.
    referring: u64,
    domain: Option<DomainId>,
    refs: Refs,
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
    domains: HashMap<DomainId, Domain>,
    domains_ever: u32,
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
            domains: HashMap::new(),
            domains_ever: 0,
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

    /// Slots that hold pages.
    #[must_use]
    pub fn stored_pages(&self) -> u64 {
        self.stored
    }

    /// Pages stored of one volume.
    #[must_use]
    pub fn stored_pages_of(&self, volume: VolumeId) -> u64 {
        self.leases.get(&volume).map_or(0, |lease| self.pages_of(lease))
    }

    fn pages_of(&self, lease: &Lease) -> u64 {
        let owned = |number: &u32| match &self.entries[*number as usize] {
            Entry::Leased(chunk) => u64::from(chunk.owned.len()),
            Entry::Vacant { .. } | Entry::Idle { .. } => 0,
        };
        lease.referring + lease.chunks.iter().map(owned).sum::<u64>()
    }

    /// Lets slots be given to the volume from now on, and shared as it says.
    pub fn open(&mut self, volume: VolumeId, sharing: Option<&Sharing>) {
        if !self.leases.contains_key(&volume) {
            let domain = sharing.map(|sharing| self.enter_domain(sharing));
            self.leases.insert(volume, Lease { domain, ..Lease::default() });
        }
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
        #[cfg(feature = "simulation")]
        let kept = crate::host::has_bug(crate::host::Bug::GenerationKept);
        #[cfg(not(feature = "simulation"))]
        let kept = false;
        for at in first..first + slots {
            chunk.free.remove(at);
            let slot = &mut chunk.slots[at];
            slot.generation = if kept { slot.generation.max(1) } else { slot.generation + 1 };
        }
        chunk.taken += slots as u32;
        let first = SlotIndex(number * CHUNK_SLOTS as u32 + first as u32);
        Ok(Some(SlotRun { first, slots: slots as u32 }))
    }

    /// A slot that was taken holds this page from now on, and is found by its hash where it shares. Its generation, or
    /// `None` when the volume was dissolved meanwhile: then the slot is free again.
    pub fn store(&mut self, slot: SlotIndex, owner: Owner, hash: Option<&ContentHash>) -> Option<Generation> {
        let (chunk, at) = self.chunk_mut(slot)?;
        if chunk.condemned {
            self.free(slot);
            return None;
        }
        debug_assert!(!chunk.free.contains(at) && !chunk.stored.contains(at));
        chunk.stored.insert(at);
        chunk.owned.insert(at);
        let generation = chunk.slots[at].generation;
        chunk.slots[at] =
            Slot { page: owner.page.0, checksum: owner.checksum.0, round: owner.round.0, generation };
        self.stored += 1;
        if let Some(hash) = hash {
            self.note_content(slot, *hash);
        }
        Some(Generation(generation))
    }

    /// A slot that was taken and not stored is free again.
    pub fn free(&mut self, slot: SlotIndex) {
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        if chunk.free.contains(at) || chunk.limbo.contains(at) || chunk.stored.contains(at) {
            return;
        }
        chunk.taken -= 1;
        chunk.limbo.insert(at);
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
        let (chunk, at) = self.chunk(slot)?;
        let held = &chunk.slots[at];
        if !chunk.stored.contains(at) || held.generation != generation.0 {
            return None;
        }
        let own = chunk.owns(volume, page, at).then_some((held.checksum, held.round));
        let referring = self.reference(chunk, at, (volume, page, slot));
        let referring = referring.map(|referring| (referring.checksum, referring.round));
        // Of a page that holds it twice, for two rounds that found the same bytes, the newer counts.
        let both = [referring, own].into_iter().flatten();
        let (checksum, round) = both.max_by_key(|(_, round)| *round)?;
        Some(Owner { page, checksum: Checksum(checksum), round: Round(round) })
    }

    /// Frees all that the volume alone holds. Slots that are being filled, and pinned chunks, follow by themselves.
    /// Returns the pages that it had.
    pub fn dissolve(&mut self, volume: VolumeId) -> u64 {
        let Some(mut lease) = self.leases.remove(&volume) else { return 0 };
        let pages = self.pages_of(&lease);
        self.drop_references(std::mem::take(&mut lease.refs));
        for number in std::mem::take(&mut lease.chunks) {
            self.leave_chunk(number);
        }
        if let Some(domain) = lease.domain {
            self.leave_domain(domain);
        }
        pages
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
        for at in chunk.owned.iter() {
            let slot = &chunk.slots[at];
            if positions.contains(&(slot.page as usize)) && slot.round < below.0 {
                doomed.insert(at);
            }
        }
        for at in doomed.iter() {
            let slot = SlotIndex(number * CHUNK_SLOTS as u32 + at as u32);
            if let Some((chunk, at)) = self.chunk_mut(slot) {
                chunk.owned.remove(at);
                self.let_go(slot);
            }
        }
    }

    fn chunk(&self, slot: SlotIndex) -> Option<(&Chunk, usize)> {
        match self.entries.get(ChunkNumber::of(slot).0 as usize)? {
            Entry::Leased(chunk) => Some((chunk, slot.0 as usize % CHUNK_SLOTS)),
            _ => None,
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
        let domain = chunk.contents.as_ref().map(|contents| contents.domain);
        self.entries[number.0 as usize] = Entry::Idle { spent };
        if let Some(domain) = domain {
            self.leave_domain(domain);
        }
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
mod sharing_test;
#[cfg(test)]
mod test;
