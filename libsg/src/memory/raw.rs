//! Pieces of memory that others may change while we look: guest memory, an intermediary's arena.
//!
//! Such memory is never a Rust slice. It is reached through pointer-and-length values, read by relaxed atomic words and
//! copied by an instruction that the compiler knows nothing of, so that a writer elsewhere (a vCPU, a device, a peer's late
//! bytes) can make what is read stale or mixed, but never undefined behaviour.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::crc;
use crate::ids::Checksum;
use crate::page::PAGE_BYTES;

/// Bytes looked at between two decisions of [`GuestSlice::is_zero`]: a page with content is
/// recognised early, a page without is read at the speed of memory.
const ZERO_BLOCK_BYTES: usize = 256;

/// Bytes of a word, the largest unit read or written at once.
const WORD_BYTES: usize = 8;

/// Readable memory that others may change: a pointer and a length, valid for `'m`.
#[derive(Clone, Copy)]
pub struct GuestSlice<'m> {
    start: NonNull<u8>,
    bytes: usize,
    mapping: PhantomData<&'m AtomicU8>,
}

/// Writable memory that others may read or change: a pointer and a length, valid for `'m`.
///
/// Copies of it may be written from several threads: what is read then is a mixture, as with any
/// guest memory, and a checksum tells.
#[derive(Clone, Copy)]
pub struct SlotSlice<'m> {
    start: NonNull<u8>,
    bytes: usize,
    mapping: PhantomData<&'m AtomicU8>,
}

// SAFETY: every access through it is atomic or made by the kernel, and the memory is valid in all
// threads for 'm.
unsafe impl Send for GuestSlice<'_> {}
// SAFETY: as for Send: nothing in it changes through a shared reference.
unsafe impl Sync for GuestSlice<'_> {}
// SAFETY: every access through it is atomic or made by the kernel, and the memory is valid in all
// threads for 'm.
unsafe impl Send for SlotSlice<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for SlotSlice<'_> {}

impl<'m> GuestSlice<'m> {
    /// The `bytes` bytes from `start` on.
    ///
    /// # Safety
    /// For all of `'m` the memory stays mapped readable, and nobody holds a Rust reference to it
    /// through which it could be assumed constant or exclusive.
    #[must_use]
    pub const unsafe fn new(start: NonNull<u8>, bytes: usize) -> Self {
        Self { start, bytes, mapping: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.bytes
    }

    /// Whether the length is zero.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.bytes == 0
    }

    /// Where it starts in this process, for system calls and for registering with a device.
    #[must_use]
    pub const fn as_ptr(self) -> *const u8 {
        self.start.as_ptr()
    }

    /// All but the first `bytes` bytes; empty past the end.
    #[must_use]
    pub fn skip(self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        // SAFETY: at most one past the end of the memory that self covers.
        Self { start: unsafe { self.start.add(bytes) }, bytes: self.bytes - bytes, mapping: PhantomData }
    }

    /// The first `bytes` bytes, or all when there are fewer.
    #[must_use]
    pub fn take(self, bytes: usize) -> Self {
        Self { bytes: bytes.min(self.bytes), ..self }
    }

    /// The pages of it, one by one. A rest shorter than a page is left out.
    pub fn pages(self) -> impl Iterator<Item = GuestSlice<'m>> {
        (0..self.bytes / PAGE_BYTES).map(move |page| self.skip(page * PAGE_BYTES).take(PAGE_BYTES))
    }

    /// Whether every byte is zero. Stops at the first block that is not.
    #[must_use]
    pub fn is_zero(self) -> bool {
        let (head, words, tail) = self.words();
        let bytes_zero = |range: std::ops::Range<usize>| range.into_iter().all(|at| self.byte(at) == 0);
        if !bytes_zero(0..head) || !bytes_zero(tail..self.bytes) {
            return false;
        }
        let mut at = 0;
        while at < words {
            let end = words.min(at + ZERO_BLOCK_BYTES / WORD_BYTES);
            let mut any = 0;
            for word in at..end {
                any |= self.word(head + word * WORD_BYTES);
            }
            if any != 0 {
                return false;
            }
            at = end;
        }
        true
    }

    /// CRC32C of the bytes: from where they lie where it is a page, as guest memory is; else by way of a page-sized buffer
    /// on the stack, that is: of the L1 cache.
    #[must_use]
    pub fn checksum(self) -> Checksum {
        self.page_sum(self).unwrap_or_else(|| self.copied_sum())
    }

    /// The sum of a page, while `next` is fetched from memory. `None` for what is no page, and where the processor has no
    /// instruction for it.
    fn page_sum(self, next: Self) -> Option<Checksum> {
        if self.bytes != PAGE_BYTES {
            return None;
        }
        // SAFETY: a page that is readable for 'm; whoever else accesses it is no Rust reference.
        unsafe { crc::of_page(self.as_ptr(), next.as_ptr()) }.map(Checksum)
    }

    fn copied_sum(self) -> Checksum {
        let mut page = [0; PAGE_BYTES];
        if self.bytes <= PAGE_BYTES {
            let page = &mut page[..self.bytes];
            self.copy_to(page);
            return Checksum::of(page);
        }
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        let mut rest = self;
        while !rest.is_empty() {
            let piece = &mut page[..rest.bytes.min(PAGE_BYTES)];
            rest.take(piece.len()).copy_to(piece);
            digest.update(piece);
            rest = rest.skip(piece.len());
        }
        Checksum(digest.finalize() as u32)
    }

    /// The checksum of the `page`-th page of it, while the one behind it is fetched from memory: the next that
    /// is looked at.
    ///
    /// # Panics
    /// There is no such page in it.
    #[must_use]
    pub fn page_checksum(self, page: usize) -> Checksum {
        let rest = self.skip(page * PAGE_BYTES);
        let (this, next) = (rest.take(PAGE_BYTES), rest.skip(PAGE_BYTES));
        assert_eq!(this.bytes, PAGE_BYTES, "the checksum of a page that is not there");
        let next = if next.is_empty() { this } else { next };
        this.page_sum(next).unwrap_or_else(|| this.copied_sum())
    }

    /// Copies the bytes out.
    ///
    /// # Panics
    /// When `to` has another length.
    pub fn copy_to(self, to: &mut [u8]) {
        assert_eq!(to.len(), self.bytes, "copying to a buffer of another length");
        // SAFETY: as many bytes in both, one memory that is readable for 'm and one that is exclusively ours.
        unsafe { copy(self.start.as_ptr(), to.as_mut_ptr(), self.bytes) }
    }

    /// Bytes before the first aligned word, number of whole words, where the bytes after them begin.
    fn words(self) -> (usize, usize, usize) {
        split_words(self.start, self.bytes)
    }

    fn byte(self, at: usize) -> u8 {
        debug_assert!(at < self.bytes);
        // SAFETY: inside the memory, which is readable for 'm; relaxed loads of a byte are allowed
        // on memory that is mapped read-only; whoever else accesses it is no Rust reference.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(at)) }.load(Ordering::Relaxed)
    }

    fn word(self, at: usize) -> u64 {
        debug_assert!(at + WORD_BYTES <= self.bytes);
        // SAFETY: inside the memory (at + 8 <= bytes), aligned because `words` starts at an aligned
        // address and steps by whole words; else as for `byte`.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(at).cast()) }.load(Ordering::Relaxed)
    }
}

impl<'m> SlotSlice<'m> {
    /// The `bytes` bytes from `start` on.
    ///
    /// # Safety
    /// For all of `'m` the memory stays mapped readable and writable, and nobody holds a Rust
    /// reference to it.
    #[must_use]
    pub const unsafe fn new(start: NonNull<u8>, bytes: usize) -> Self {
        Self { start, bytes, mapping: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.bytes
    }

    /// Whether the length is zero.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.bytes == 0
    }

    /// Where it starts in this process, for system calls and for registering with a device.
    #[must_use]
    pub const fn as_mut_ptr(self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// All but the first `bytes` bytes; empty past the end.
    #[must_use]
    pub fn skip(self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        // SAFETY: at most one past the end of the memory that self covers.
        Self { start: unsafe { self.start.add(bytes) }, bytes: self.bytes - bytes, mapping: PhantomData }
    }

    /// The first `bytes` bytes, or all when there are fewer.
    #[must_use]
    pub fn take(self, bytes: usize) -> Self {
        Self { bytes: bytes.min(self.bytes), ..self }
    }

    /// The same memory for reading: to check it, to send it on.
    #[must_use]
    pub const fn readable(self) -> GuestSlice<'m> {
        GuestSlice { start: self.start, bytes: self.bytes, mapping: PhantomData }
    }

    /// Copies the bytes in.
    ///
    /// # Panics
    /// When `from` has another length.
    pub fn copy_from(self, from: &[u8]) {
        assert_eq!(from.len(), self.bytes, "copying from a buffer of another length");
        // SAFETY: as many bytes in both, one memory of ours and one that is writable for 'm; whoever else accesses that is
        // no Rust reference.
        unsafe { copy(from.as_ptr(), self.start.as_ptr(), self.bytes) }
    }
}

/// Copies bytes of which one side may be changed by others meanwhile. By one instruction, which the compiler takes nothing
/// for granted of: word by word it takes twice as long.
///
/// # Safety
/// `from` is readable and `to` writable for so many bytes, and the two do not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: it reads and writes what the caller answers for, forwards, as the direction flag is clear between
    // functions.
    unsafe {
        std::arch::asm!(
            "rep movsb", inout("rcx") bytes => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// The same, byte by byte.
///
/// # Safety
/// As there.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    for at in 0..bytes {
        // SAFETY: inside of both; relaxed accesses of a byte are allowed whatever others do.
        unsafe {
            let byte = AtomicU8::from_ptr(from.add(at).cast_mut()).load(Ordering::Relaxed);
            AtomicU8::from_ptr(to.add(at)).store(byte, Ordering::Relaxed);
        }
    }
}

fn split_words(start: NonNull<u8>, bytes: usize) -> (usize, usize, usize) {
    let head = start.as_ptr().align_offset(WORD_BYTES).min(bytes);
    let words = (bytes - head) / WORD_BYTES;
    (head, words, head + words * WORD_BYTES)
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of guest memory at {:p}", self.bytes, self.start)
    }
}

impl fmt::Debug for SlotSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} writable bytes at {:p}", self.bytes, self.start)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// Memory for a test, and a slot over all of it.
    fn with_slot<T>(words: &mut [u64], test: impl FnOnce(SlotSlice<'_>) -> T) -> T {
        let bytes = size_of_val(words);
        let start = NonNull::new(words.as_mut_ptr().cast()).expect("not null");
        // SAFETY: the exclusive borrow lasts until the end of this function and is not used in it.
        test(unsafe { SlotSlice::new(start, bytes) })
    }

    proptest! {
        #[test]
        fn any_part_copies_in_and_out(
            content in prop::collection::vec(any::<u8>(), 64), skip in 0_usize..64, take in 0_usize..64,
        ) {
            with_slot(&mut [0; 8], |slot| {
                slot.copy_from(&content);
                let part = slot.readable().skip(skip).take(take);
                let mut out = vec![0; part.len()];
                part.copy_to(&mut out);
                let want = &content[skip..(skip + take).min(64)];
                assert_eq!(out, want);
                assert_eq!(part.checksum(), Checksum::of(want));
                assert_eq!(part.is_zero(), want.iter().all(|byte| *byte == 0));
                slot.skip(skip).take(take).copy_from(&vec![0; part.len()]);
                assert!(part.is_zero());
            });
        }
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        with_slot(&mut [0; 512], |slot| {
            assert!(slot.readable().is_zero());
            for at in (0..PAGE_BYTES).step_by(61).chain([PAGE_BYTES - 1]) {
                slot.skip(at).take(1).copy_from(&[1]);
                assert!(!slot.readable().is_zero(), "byte {at}");
                slot.skip(at).take(1).copy_from(&[0]);
            }
        });
    }

    #[test]
    fn long_checksum_equals_that_of_the_bytes() {
        with_slot(&mut [0; 1300], |slot| {
            let content: Vec<u8> = (0..10400_u32).map(|at| (at * 7 % 251) as u8).collect();
            slot.copy_from(&content);
            assert_eq!(slot.readable().checksum(), Checksum::of(&content));
            assert_eq!(slot.readable().pages().count(), 2);
        });
    }
}
