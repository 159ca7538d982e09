//! The memory that pages are kept in: one range of addresses, of which only the chunks that hold
//! something have memory.
//!
//! It is left out of core dumps, since it holds other tenants' pages, and uses huge pages: a chunk is one. Never
//! backed by a file.
#![allow(unsafe_code)]

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

use super::slots::{CHUNK_BYTES, ChunkNumber, SlotRun};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::SlotSlice;
use crate::page::PAGE_BYTES;

/// Addresses for all chunks that there may ever be; memory only behind those in use.
pub struct Arena {
    start: NonNull<u8>,
    /// The first chunk: `start` rounded up to a huge page.
    first: NonNull<u8>,
    mapped_bytes: usize,
    /// Whether a chunk may be accessed. Once it may, it may until the arena is dropped: memory that was given
    /// back reads as zeros.
    open: Vec<AtomicBool>,
}

// SAFETY: the memory is reached through SlotSlice and system calls only, which may cross threads; the
// pointers are valid in all threads until the arena is dropped.
unsafe impl Send for Arena {}
// SAFETY: as for Send; what changes through a shared reference is atomic.
unsafe impl Sync for Arena {}

impl Arena {
    /// Addresses for so many chunks. Takes no memory.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses.
    pub fn new(chunks: u32) -> Result<Self> {
        let mapped_bytes = (chunks as usize + 1)
            .checked_mul(CHUNK_BYTES)
            .ok_or_else(|| Error::new(ErrorKind::Input, "the memory limit exceeds what can be addressed"))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel picks; it aliases nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped_bytes, ProtFlags::empty(), flags)
        }
        .map_err(|errno| {
            let what = format!("the kernel gives no {mapped_bytes} bytes of addresses for pages");
            Error::new(ErrorKind::System, what).because(std::io::Error::from(errno))
        })?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| Error::new(ErrorKind::System, "the kernel mapped the arena at zero"))?;
        let ahead = start.as_ptr().align_offset(CHUNK_BYTES);
        // SAFETY: less than one chunk ahead, and one chunk more is mapped than asked for.
        let first = unsafe { start.add(ahead) };
        let open = (0..chunks).map(|_| AtomicBool::new(false)).collect();
        let arena = Self { start, first, mapped_bytes, open };
        // SAFETY: these advices change nothing that could be read.
        unsafe {
            rustix::mm::madvise(start.as_ptr().cast(), mapped_bytes, Advice::LinuxDontDump)?;
            // Kernels without huge pages refuse this, and are only slower.
            let _ = rustix::mm::madvise(start.as_ptr().cast(), mapped_bytes, Advice::LinuxHugepage);
        }
        Ok(arena)
    }

    /// The memory of a run of slots. It is the caller's by what [`super::slots::Slots`] says: nothing here knows
    /// who may write it.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel has no memory for the chunk.
    pub fn slots(&self, run: SlotRun) -> Result<SlotSlice<'_>> {
        let chunk = ChunkNumber::of(run.first);
        self.open_chunk(chunk)?;
        let within = (run.first.0 - chunk.first_slot().0) as usize * PAGE_BYTES;
        let bytes = run.slots as usize * PAGE_BYTES;
        if within + bytes > CHUNK_BYTES {
            return Err(Error::new(ErrorKind::Input, "a run of slots that leaves its chunk"));
        }
        // SAFETY: inside the chunk, as just checked, which is inside the mapping and was made readable
        // and writable by `open_chunk`; it stays so until the arena, which the slice borrows, is dropped.
        // No Rust reference to it is ever made.
        Ok(unsafe { SlotSlice::new(self.address(chunk).add(within), bytes) })
    }

    /// Makes the chunk's memory present, so that the first bytes into it need not wait for the kernel.
    ///
    /// # Errors
    /// As [`Self::slots`].
    pub fn touch(&self, chunk: ChunkNumber) -> Result<()> {
        self.open_chunk(chunk)?;
        let start = self.address(chunk).as_ptr();
        // SAFETY: it only makes pages present; their content does not change.
        let populated = unsafe { rustix::mm::madvise(start.cast(), CHUNK_BYTES, Advice::LinuxPopulateWrite) };
        if populated.is_err() {
            // Before Linux 5.14: one write a page does the same. Nobody else uses the chunk yet.
            for page in 0..CHUNK_BYTES / PAGE_BYTES {
                // SAFETY: inside the chunk, which is open.
                unsafe { start.add(page * PAGE_BYTES).write_volatile(0) };
            }
        }
        Ok(())
    }

    /// Gives the chunk's memory back to the system; what was in it is gone.
    pub fn give_back(&self, chunk: ChunkNumber) {
        if !self.is_open(chunk) {
            return;
        }
        let start = self.address(chunk).as_ptr();
        // SAFETY: inside the mapping, which is private and anonymous: what is read there later is zero. Slices
        // of it stay valid, and memory that others may change is what they are for.
        let given = unsafe { rustix::mm::madvise(start.cast(), CHUNK_BYTES, Advice::LinuxDontNeed) };
        if let Err(errno) = given {
            tracing::error!(%errno, chunk = chunk.0, "the kernel does not take memory back");
        }
    }

    fn is_open(&self, chunk: ChunkNumber) -> bool {
        self.open.get(chunk.0 as usize).is_some_and(|open| open.load(Ordering::Acquire))
    }

    fn open_chunk(&self, chunk: ChunkNumber) -> Result<()> {
        if self.is_open(chunk) {
            return Ok(());
        }
        let open = self
            .open
            .get(chunk.0 as usize)
            .ok_or_else(|| Error::new(ErrorKind::Input, "a slot beyond the arena"))?;
        // SAFETY: the chunk is inside the mapping: its number was just looked up. Two threads may do it
        // at once, to the same end.
        unsafe {
            let start = self.address(chunk).as_ptr().cast();
            rustix::mm::mprotect(start, CHUNK_BYTES, MprotectFlags::READ | MprotectFlags::WRITE)
        }
        .map_err(|errno| {
            let what = "the kernel has no memory for another chunk of pages";
            Error::new(ErrorKind::System, what).because(std::io::Error::from(errno))
        })?;
        open.store(true, Ordering::Release);
        Ok(())
    }

    fn address(&self, chunk: ChunkNumber) -> NonNull<u8> {
        let chunk = (chunk.0 as usize).min(self.open.len());
        // SAFETY: at most the end of the last chunk, and `first` is less than one chunk behind the start of a
        // mapping of one chunk more.
        unsafe { self.first.add(chunk * CHUNK_BYTES) }
    }
}

/// A chunk's memory, which stays mapped as long as the value lives. What is in it belongs to whom the server says.
#[derive(Clone)]
pub struct ChunkMemory {
    arena: Arc<Arena>,
    chunk: ChunkNumber,
}

impl ChunkMemory {
    /// The memory of this chunk.
    ///
    /// # Errors
    /// As [`Arena::slots`].
    pub(super) fn new(arena: &Arc<Arena>, chunk: ChunkNumber) -> Result<Self> {
        arena.open_chunk(chunk)?;
        Ok(Self { arena: Arc::clone(arena), chunk })
    }

    /// All of it, to be registered with a device. Others read and write it meanwhile.
    #[must_use]
    pub fn bytes(&self) -> SlotSlice<'_> {
        // SAFETY: inside the mapping and opened by `new`, as for `Arena::slots`; the arena lives as long as the value,
        // which the slice borrows. No Rust reference to it is ever made.
        unsafe { SlotSlice::new(self.arena.address(self.chunk), CHUNK_BYTES) }
    }
}

impl fmt::Debug for ChunkMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of chunk {}", self.chunk.0)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; every slice borrows the arena, so there is none left.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped_bytes) } {
            tracing::error!(%errno, "the arena could not be unmapped");
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "arena of {} chunks at {:p}", self.open.len(), self.first)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::SlotIndex;

    fn run(first: u32, slots: u32) -> SlotRun {
        SlotRun { first: SlotIndex(first), slots }
    }

    #[test]
    fn chunks_hold_what_is_written_until_given_back() {
        let arena = Arena::new(3).expect("addresses");
        arena.touch(ChunkNumber(1)).expect("memory");
        for slot in [0, 511, 512, 1535] {
            arena.slots(run(slot, 1)).expect("slot").copy_from(&[slot as u8 | 1; PAGE_BYTES]);
        }
        let read = |slot| {
            let mut page = [0; PAGE_BYTES];
            arena.slots(run(slot, 1)).expect("slot").readable().copy_to(&mut page);
            page[PAGE_BYTES - 1]
        };
        assert_eq!([0, 511, 512, 1535].map(read), [1, 255, 1, 255]);
        arena.give_back(ChunkNumber(1));
        assert_eq!([0, 511, 512, 1535].map(read), [1, 255, 0, 255]);
        assert!(arena.slots(run(511, 2)).is_err());
        assert!(arena.slots(run(1536, 1)).is_err());
        assert_eq!(arena.slots(run(0, 1)).expect("slot").as_mut_ptr().align_offset(CHUNK_BYTES), 0);
    }
}
