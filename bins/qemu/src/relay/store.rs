//! Where the bytes of pages lie that have come and are not safe yet: slots of memory that is used again.
//!
//! ```text
//! reader --Writer--> | chunk 0 | chunk 1 | chunk 2 | ...    slots of 4 KiB, 256 a chunk
//!                      52 kept   being     free
//!                                written
//! ```
//!
//! What comes is written into one slot after the other, wherever in the VM its page is: what came together is sent as one piece. A
//! chunk is used again when none of its pages is kept and nobody has a slice of it, the one that was free last first. So a relay
//! takes as much memory as it holds pages, in pieces, and memory that it has is warm: pages of which each had a place of its
//! own took 0.9 s of processor time a GiB for page faults and for giving the memory back. A slot is never written while it may be read:
//! the bytes of a page that comes again are in another.

use std::sync::Arc;

use libsg::manifest::Region;
use libsg::memory::{GuestMemory, Mapping, PageSlice};
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::{Error, ErrorKind, Result};

/// Slots of a chunk.
pub(super) const CHUNK_SLOTS: u32 = 256;

/// Slots of zeros, which nobody writes: as many as one slice has of pages of zeros.
const ZERO_SLOTS: u32 = 64;

/// Where a page's bytes are. A page of zeros has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(u32);

impl Slot {
    /// No bytes.
    pub const ZERO: Self = Self(u32::MAX);

    /// The slot of a page behind one whose slot this is, where they came together.
    #[must_use]
    pub const fn next(self, pages: u32) -> Self {
        if self.0 == Self::ZERO.0 { self } else { Self(self.0 + pages) }
    }
}

/// Slots that are written together, and are free together.
#[derive(Debug, Default)]
struct Chunk {
    /// Lives as long as somebody has a slice of it.
    pin: Arc<()>,
    /// Slots that are kept for a page, or for who writes what comes.
    kept_slots: u32,
}

/// The slots, and which of them are kept.
#[derive(Debug)]
pub(crate) struct Store {
    memory: GuestMemory,
    /// The slot of each page.
    slots: Vec<Slot>,
    /// Those that were used before.
    chunks: Vec<Chunk>,
    free: Vec<u32>,
    /// None of their pages is kept, and somebody may have a slice.
    pinned: Vec<u32>,
    chunks_max: u32,
}

/// Who writes what comes: it has a chunk for itself.
#[derive(Debug)]
pub(crate) struct Writer {
    memory: GuestMemory,
    at: u32,
    end: u32,
}

impl Writer {
    /// Whether it needs another chunk first.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.at == self.end
    }

    /// Writes a page into the next slot.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when it is full, or for bytes that are not a page.
    pub fn write(&mut self, bytes: &[u8]) -> Result<Slot> {
        if self.is_full() {
            return Err(Error::new(ErrorKind::Input, "a page without a place"));
        }
        self.memory.copy_in(PageRange::new(PageIndex(self.at), 1), bytes)?;
        self.at += 1;
        Ok(Slot(self.at - 1))
    }
}

impl Store {
    /// For a VM of so many pages, of which about so many are held at once. Nothing takes memory yet.
    ///
    /// # Errors
    /// The kernel's, when it has no room for them.
    pub fn new(pages: u32, window_pages: u32) -> Result<Self> {
        // Each page comes once, but for those that come again: as many more that are kept in pieces.
        let slots = u64::from(pages) * 2 + u64::from(window_pages) + u64::from(2 * CHUNK_SLOTS);
        let chunks_max =
            (slots / u64::from(CHUNK_SLOTS)).min(u64::from((u32::MAX - ZERO_SLOTS) / CHUNK_SLOTS)) as u32;
        let region = |name: &str, slots: u32| {
            let length_bytes = u64::from(slots) * PAGE_BYTES_U64;
            let region =
                Region { name: name.into(), guest_address: None, length_bytes, unit: InstallUnit::Page };
            Ok((region, Mapping::anonymous(length_bytes as usize)?.with_huge_pages()))
        };
        let parts = [region("slots", chunks_max * CHUNK_SLOTS), region("zeros", ZERO_SLOTS)];
        let memory = GuestMemory::from_mappings(parts.into_iter().collect::<Result<_>>()?)?;
        let slots = vec![Slot::ZERO; pages as usize];
        Ok(Self { memory, slots, chunks: Vec::new(), free: Vec::new(), pinned: Vec::new(), chunks_max })
    }

    /// Has memory for so many pages now, of which none has come. A host takes its time to clear memory, in pieces of 2 MiB: a guest's page that came behind
    /// the first of a piece would wait for that.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for more than there is room for.
    pub fn warm(&mut self, pages: u32) -> Result<()> {
        let chunks = pages.div_ceil(CHUNK_SLOTS).min(self.chunks_max);
        let mut writer = Writer { at: 0, end: chunks * CHUNK_SLOTS, ..self.writer() };
        while !writer.is_full() {
            writer.write(&[0; PAGE_BYTES])?;
        }
        self.chunks.resize_with(chunks as usize, Chunk::default);
        self.free.extend((0..chunks).rev());
        Ok(())
    }

    /// Who writes into it.
    #[must_use]
    pub fn writer(&self) -> Writer {
        Writer { memory: self.memory.clone(), at: 0, end: 0 }
    }

    /// Gives a writer that is full another chunk. Each slot of it is [kept](Self::keep) for a page once it was written, or
    /// [given back](Self::give_back).
    ///
    /// # Errors
    /// [`ErrorKind::System`] when all of them have pages that are kept.
    pub fn refill(&mut self, writer: &mut Writer) -> Result<()> {
        self.tidy();
        let next = match self.free.pop() {
            Some(free) => free,
            None if self.chunks.len() < self.chunks_max as usize => {
                self.chunks.push(Chunk::default());
                self.chunks.len() as u32 - 1
            }
            None => {
                let message = "there is no room for what comes: all memory has pages that are not safe";
                return Err(Error::new(ErrorKind::System, message));
            }
        };
        if let Some(chunk) = self.chunks.get_mut(next as usize) {
            chunk.kept_slots = CHUNK_SLOTS;
        }
        (writer.at, writer.end) = (next * CHUNK_SLOTS, (next + 1) * CHUNK_SLOTS);
        Ok(())
    }

    /// A page's bytes are these, and are kept. Those that it had are so no more.
    pub fn keep(&mut self, page: PageIndex, slot: Slot) {
        self.drop(page);
        match self.slots.get_mut(page.as_usize()) {
            Some(of) => *of = slot,
            None => self.give_back(slot),
        }
    }

    /// A page's bytes are not needed any more.
    pub fn drop(&mut self, page: PageIndex) {
        let Some(of) = self.slots.get_mut(page.as_usize()) else { return };
        let slot = std::mem::replace(of, Slot::ZERO);
        self.give_back(slot);
    }

    /// What was written into a slot is not needed.
    pub fn give_back(&mut self, slot: Slot) {
        let at = slot.0 / CHUNK_SLOTS;
        let Some(chunk) = self.chunks.get_mut(at as usize) else { return };
        chunk.kept_slots -= 1;
        if chunk.kept_slots > 0 {
            return;
        }
        if Arc::get_mut(&mut chunk.pin).is_some() { self.free.push(at) } else { self.pinned.push(at) }
    }

    /// Looks which chunks nobody has a slice of any more.
    pub fn tidy(&mut self) {
        let Self { chunks, pinned, free, .. } = self;
        free.extend(pinned.extract_if(.., |at| {
            chunks.get_mut(*at as usize).is_some_and(|chunk| Arc::get_mut(&mut chunk.pin).is_some())
        }));
    }

    /// Slots of chunks of which any is kept. Others are free as soon as nobody has a slice of them.
    #[must_use]
    pub fn used_slots(&self) -> u32 {
        (self.chunks.len() - self.free.len() - self.pinned.len()) as u32 * CHUNK_SLOTS
    }

    /// The bytes of pages that are kept, from the first on: as many as lie together.
    pub fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let absent = || Error::new(ErrorKind::Input, "a page that is not here").about([range]);
        let slots = self.slots.get(range.positions()).ok_or_else(absent)?;
        let first = *slots.first().ok_or_else(absent)?;
        let together =
            (1..).zip(&slots[1..]).take_while(|(at, slot)| **slot == first.next(*at)).count() as u32 + 1;
        if first == Slot::ZERO {
            let zeros = PageIndex(self.chunks_max * CHUNK_SLOTS);
            return PageSlice::guest(&self.memory, PageRange::new(zeros, together.min(ZERO_SLOTS)));
        }
        let chunk = self.chunks.get((first.0 / CHUNK_SLOTS) as usize).ok_or_else(absent)?;
        let in_chunk = CHUNK_SLOTS - first.0 % CHUNK_SLOTS;
        let run = PageRange::new(PageIndex(first.0), together.min(in_chunk));
        PageSlice::guest_pinned(&self.memory, run, Arc::<()>::clone(&chunk.pin))
    }
}

/// A run of pages that came together: of zeros all of them, or with one slot after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Came {
    pub pages: PageRange,
    pub slot: Slot,
}

impl Came {
    /// Each page, and its slot.
    pub fn iter(self) -> impl Iterator<Item = (PageIndex, Slot)> {
        (0..).zip(self.pages.iter()).map(move |(at, page)| (page, self.slot.next(at)))
    }

    /// So many of the first pages, and the rest.
    #[must_use]
    pub const fn split(self, pages: u32) -> (Self, Self) {
        let (first, rest) = (self.pages.first, self.pages.pages - pages);
        let before = Self { pages: PageRange::new(first, pages), slot: self.slot };
        (
            before,
            Self { pages: PageRange::new(PageIndex(first.0 + pages), rest), slot: self.slot.next(pages) },
        )
    }

    /// Takes one more page in, if it came together with these.
    pub fn join(&mut self, page: PageIndex, slot: Slot) -> bool {
        let joins =
            self.pages.first.0 + self.pages.pages == page.0 && slot == self.slot.next(self.pages.pages);
        self.pages.pages += u32::from(joins);
        joins
    }
}

/// Writes pages as they come.
#[cfg(test)]
pub(super) fn write(store: &mut Store, writer: &mut Writer, byte: u8) -> Slot {
    if writer.is_full() {
        store.refill(writer).expect("there is room");
    }
    writer.write(&[byte; libsg::page::PAGE_BYTES]).expect("not full")
}

#[cfg(test)]
mod test {
    use super::*;

    fn bytes(slice: &PageSlice) -> Vec<u8> {
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes);
        bytes.chunks(PAGE_BYTES).map(|page| page[0]).collect()
    }

    #[test]
    fn what_came_together_is_one_piece() {
        let mut store = Store::new(1000, 100).expect("memory");
        let mut writer = store.writer();
        for page in 10..14 {
            let slot = write(&mut store, &mut writer, page as u8);
            store.keep(PageIndex(page), slot);
        }
        let slot = write(&mut store, &mut writer, 9);
        store.keep(PageIndex(15), slot);
        let of = |first, pages| bytes(&store.slice(PageRange::new(PageIndex(first), pages)).expect("here"));
        assert_eq!(of(10, 6), [10, 11, 12, 13]);
        assert_eq!(of(11, 2), [11, 12]);
        assert_eq!(of(14, 2), [0]);
        assert_eq!(of(100, 100), [0; 64]);
        assert!(store.slice(PageRange::new(PageIndex(999), 2)).is_err());
    }

    #[test]
    fn memory_that_is_warm_is_used_first() {
        let mut store = Store::new(1000, 100).expect("memory");
        store.warm(CHUNK_SLOTS + 1).expect("there is room");
        assert_eq!((store.used_slots(), store.chunks.len()), (0, 2));
        let mut writer = store.writer();
        let slots: Vec<u32> = (0..3 * CHUNK_SLOTS).map(|_| write(&mut store, &mut writer, 1).0).collect();
        assert_eq!(slots, (0..3 * CHUNK_SLOTS).collect::<Vec<_>>());
        Store::new(1000, 100).expect("memory").warm(u32::MAX).expect("all that there is");
    }

    #[test]
    fn a_chunk_is_used_again_when_nobody_needs_it() {
        let mut store = Store::new(2000, 100).expect("memory");
        let mut writer = store.writer();
        let fill = |store: &mut Store, writer: &mut Writer, first: u32| {
            for page in first..first + CHUNK_SLOTS {
                let slot = write(store, writer, (page % 255) as u8);
                store.keep(PageIndex(page), slot);
            }
        };
        fill(&mut store, &mut writer, 0);
        let slice = store.slice(PageRange::new(PageIndex(7), 3)).expect("here");
        (0..CHUNK_SLOTS).for_each(|page| store.drop(PageIndex(page)));
        fill(&mut store, &mut writer, 256);
        // It was read still when another was needed.
        assert_eq!((store.chunks.len(), bytes(&slice)), (2, vec![7, 8, 9]));
        drop(slice);
        fill(&mut store, &mut writer, 512);
        assert_eq!((store.used_slots(), store.chunks.len()), (2 * CHUNK_SLOTS, 2));
        // A page that comes again is in another slot, and the one before is free.
        fill(&mut store, &mut writer, 256);
        fill(&mut store, &mut writer, 256);
        assert_eq!(store.used_slots(), 2 * CHUNK_SLOTS);
        assert_eq!(bytes(&store.slice(PageRange::new(PageIndex(511), 2)).expect("here"))[0], 1);
    }

    #[test]
    fn pages_that_came_together_are_told_apart_again() {
        let mut came = Came { pages: PageRange::new(PageIndex(5), 1), slot: Slot(40) };
        assert!(came.join(PageIndex(6), Slot(41)) && !came.join(PageIndex(7), Slot(43)));
        assert!(!came.join(PageIndex(7), Slot::ZERO) && !came.join(PageIndex(8), Slot(42)));
        let (before, behind) = came.split(1);
        assert_eq!(before.iter().collect::<Vec<_>>(), [(PageIndex(5), Slot(40))]);
        assert_eq!(behind.iter().collect::<Vec<_>>(), [(PageIndex(6), Slot(41))]);
        let mut zeros = Came { pages: PageRange::new(PageIndex(5), 1), slot: Slot::ZERO };
        assert!(zeros.join(PageIndex(6), Slot::ZERO) && !zeros.join(PageIndex(7), Slot(0)));
    }
}
