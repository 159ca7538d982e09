//! Guest memory of this VMM: one mapping that the VMM, its vCPUs and KVM share.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use libsg::{Error, ErrorKind, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::config::BackingKind;

/// A mapping of guest memory. Others (vCPUs, the kernel) change it at any time: it is reached word
/// by word, never as a slice.
pub struct Memory {
    base: *mut c_void,
    bytes: usize,
    _fd: Option<OwnedFd>,
}

// SAFETY: the mapping lives as long as `self` and every access to it is atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps fresh zero memory.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel has none of this kind.
    pub fn new(bytes: u64, backing: BackingKind) -> Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| Error::new(ErrorKind::Input, "too much memory"))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let (fd, shared) = match backing {
            BackingKind::Anon => (None, MapFlags::PRIVATE | MapFlags::NORESERVE),
            BackingKind::Memfd => (Some(MemfdFlags::CLOEXEC), MapFlags::SHARED),
            BackingKind::Hugetlb => {
                (Some(MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB), MapFlags::SHARED)
            }
        };
        let fd = match fd {
            Some(flags) => {
                let fd = memfd_create("guest", flags)?;
                ftruncate(&fd, bytes as u64)?;
                Some(fd)
            }
            None => None,
        };
        let map = || match &fd {
            // SAFETY: a fresh mapping where the kernel likes; nothing existing is replaced.
            Some(fd) => unsafe { mmap(std::ptr::null_mut(), bytes, prot, shared, fd, 0) },
            // SAFETY: as above.
            None => unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, shared) },
        };
        let base = map().map_err(|e| {
            Error::new(ErrorKind::System, format!("cannot map {bytes} bytes of {backing:?} memory"))
                .because(std::io::Error::from(e))
        })?;
        Ok(Self { base, bytes, _fd: fd })
    }

    /// Where the memory begins in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.base as u64
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn at<T>(&self, offset: u64) -> *mut T {
        let end = offset.checked_add(size_of::<T>() as u64);
        assert!(
            end.is_some_and(|end| end <= self.bytes as u64) && offset.is_multiple_of(align_of::<T>() as u64),
            "guest memory has no byte {offset:#x}"
        );
        // SAFETY: just checked to lie inside the mapping.
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
    }

    /// Inverts one byte.
    pub fn flip(&self, offset: u64) {
        // SAFETY: as in `load`.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }.fetch_xor(0xff, Ordering::Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and its last user (a KVM VM holds the memory alive) is gone.
        if let Err(error) = unsafe { munmap(self.base, self.bytes) } {
            tracing::warn!(%error, "guest memory stays mapped");
        }
    }
}
