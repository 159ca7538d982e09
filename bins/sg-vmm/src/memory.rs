//! Guest memory word by word, as vCPUs that are threads and the VMM's own checks need it. The
//! memory itself is libsg's [`GuestMemory`].
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use libsg::memory::{Backing, GuestMemory};
use libsg::page::{PAGE_BYTES_U64, PageIndex};
use libsg::{Error, ErrorKind, Result};

use crate::config::{BackingKind, VcpuKind, VmConfig};
use crate::page_format::PAGE_WORDS;

/// The memory of one VM: a single region. Others (vCPUs, the kernel) change it at any time.
pub struct Memory {
    guest: GuestMemory,
    base: *mut u8,
    bytes: u64,
    /// Which pages were written through this value, a bit each, where vCPUs do not write that way: KVM logs
    /// what its vCPUs write, and knows nothing of the VMM's own writes.
    own_writes: Box<[AtomicU64]>,
}

// SAFETY: `base` points into `guest`, which lives as long, and every access through it is atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Fresh zero memory for this VM.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel has none of this kind.
    pub fn allocate(config: &VmConfig) -> Result<Self> {
        let backing = match config.backing {
            BackingKind::Anon => Backing::Anon,
            BackingKind::Memfd => Backing::Memfd,
            BackingKind::Hugetlb => Backing::Hugetlb2M,
        };
        let guest = GuestMemory::allocate(&config.manifest()?, backing)?;
        let [region] = guest.regions() else {
            return Err(Error::new(ErrorKind::Input, "this VM's memory is one region"));
        };
        let bytes = region.mapping().len() as u64;
        let base = guest
            .host_address(PageIndex(0))
            .ok_or_else(|| Error::new(ErrorKind::Input, "this VM has no memory"))?;
        let noted = if config.vcpu == VcpuKind::Kvm { bytes.div_ceil(PAGE_BYTES_U64) } else { 0 };
        let own_writes = (0..noted.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { guest, base, bytes, own_writes })
    }

    /// The same memory as libsg has it.
    #[must_use]
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// Where the memory begins in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.base as u64
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes a page as written. Call it after the bytes are written: noted before, it could be named to a migration
    /// that then reads the old ones.
    fn note(&self, offset: u64) {
        let page = offset / PAGE_BYTES_U64;
        if let Some(word) = self.own_writes.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Adds the pages that the VMM wrote since the last call to a bitmap of pages from `first` on, a multiple of 64,
    /// and forgets them. Nothing for a VM whose vCPUs are threads of the VMM.
    pub fn take_own_writes(&self, first: PageIndex, bitmap: &mut [u64]) {
        let own = self.own_writes.iter().skip(first.as_usize() / 64);
        for (own, to) in own.zip(bitmap) {
            *to |= own.swap(0, Ordering::Acquire);
        }
    }

    fn at<T>(&self, offset: u64) -> *mut T {
        let end = offset.checked_add(size_of::<T>() as u64);
        assert!(
            end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(align_of::<T>() as u64),
            "guest memory has no byte {offset:#x}"
        );
        // SAFETY: just checked to lie inside the one mapping that starts at `base`.
        unsafe { self.base.byte_add(offset as usize).cast() }
    }

    /// A 64-bit word.
    #[must_use]
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: `at` checks bounds and alignment; every access to the mapping is atomic.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }.load(Ordering::Relaxed)
    }

    /// Writes a 64-bit word.
    pub fn store(&self, offset: u64, word: u64) {
        // SAFETY: as in `load`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }.store(word, Ordering::Relaxed);
        self.note(offset);
    }

    /// A 32-bit word.
    #[must_use]
    pub fn load32(&self, offset: u64) -> u32 {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.load(Ordering::Relaxed)
    }

    /// Writes a 32-bit word.
    pub fn store32(&self, offset: u64, word: u32) {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.store(word, Ordering::Relaxed);
        self.note(offset);
    }

    /// A whole page.
    pub fn load_page(&self, page: u64, words: &mut [u64; PAGE_WORDS]) {
        let from = self.at::<[u64; PAGE_WORDS]>(page * PAGE_BYTES_U64).cast::<u64>();
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: `at` checked the whole page; every access to the mapping is atomic.
            *word = unsafe { AtomicU64::from_ptr(from.add(index)) }.load(Ordering::Relaxed);
        }
    }

    /// Writes a whole page.
    pub fn store_page(&self, page: u64, words: &[u64; PAGE_WORDS]) {
        let to = self.at::<[u64; PAGE_WORDS]>(page * PAGE_BYTES_U64).cast::<u64>();
        for (index, word) in words.iter().enumerate() {
            // SAFETY: as in `load_page`.
            unsafe { AtomicU64::from_ptr(to.add(index)) }.store(*word, Ordering::Relaxed);
        }
        self.note(page * PAGE_BYTES_U64);
    }

    /// Inverts one byte.
    pub fn flip(&self, offset: u64) {
        // SAFETY: as in `load`.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }.fetch_xor(0xff, Ordering::Relaxed);
        self.note(offset);
    }
}
