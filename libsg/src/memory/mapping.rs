//! One mapping of memory: allocated here or borrowed from a VMM, and what the kernel can be asked
//! about it.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

use super::raw::{GuestSlice, SlotSlice};
use crate::error::{Error, ErrorKind, Result};
use crate::page::{InstallUnit, PAGE_BYTES};

/// The file behind a mapping.
#[derive(Debug)]
pub struct BackingFile {
    /// A memfd, or a file of a tmpfs or hugetlbfs.
    pub fd: OwnedFd,
    /// Where in the file the mapping begins.
    pub offset: u64,
}

/// One contiguous mapping of page-aligned memory that others may change.
///
/// Memory that was allocated here is unmapped when it is dropped.
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    huge: bool,
    file: Option<BackingFile>,
    owner: Owner,
}

enum Owner {
    /// Mapped here, unmapped on drop.
    Own,
    /// Somebody else's, who keeps it mapped as long as this value lives.
    Other { _keep: Box<dyn Any + Send + Sync> },
}

// SAFETY: the memory is reached only through GuestSlice and SlotSlice, which may cross threads, and
// through system calls; the pointer is valid in all threads until the value is dropped.
unsafe impl Send for Mapping {}
// SAFETY: as for Send: no method changes the value itself through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private memory of 4 KiB pages, all zero, none of them allocated yet.
    ///
    /// Huge pages are switched off: at a destination one page that is installed would otherwise
    /// bring in 511 others, which the kernel then no longer reports as missing.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] unless `bytes` is a positive number of pages; [`ErrorKind::System`] when
    /// the kernel refuses.
    pub fn anonymous(bytes: usize) -> Result<Self> {
        check_length(bytes, PAGE_BYTES)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel picks; it aliases nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
        }
        .map_err(|errno| refused(bytes, "anonymous memory", errno))?;
        Self::own(start, bytes, false, None)?.without_huge_pages()
    }

    /// Shared memory of 4 KiB pages behind a memfd, all holes.
    ///
    /// # Errors
    /// As [`Self::anonymous`].
    pub fn memfd(name: &str, bytes: usize) -> Result<Self> {
        check_length(bytes, PAGE_BYTES)?;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
            .map_err(|errno| refused(bytes, "a memfd", errno))?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(|errno| refused(bytes, "a memfd", errno))?;
        Self::shared(BackingFile { fd, offset: 0 }, bytes, false)
    }

    /// Shared memory of 2 MiB pages behind a memfd, all holes, with its huge pages reserved.
    ///
    /// # Errors
    /// As [`Self::anonymous`]; the message says how to reserve huge pages.
    pub fn hugetlb(name: &str, bytes: usize) -> Result<Self> {
        check_length(bytes, InstallUnit::Huge2M.bytes())?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let refused =
            |errno| refused(bytes, "2 MiB huge pages (reserve them: sysctl vm.nr_hugepages)", errno);
        let fd = rustix::fs::memfd_create(name, flags).map_err(refused)?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(refused)?;
        Self::shared(BackingFile { fd, offset: 0 }, bytes, true)
    }

    /// Maps part of a file of memory, shared: a second mapping of somebody's memfd.
    ///
    /// `huge` says that the file is of 2 MiB huge pages; these are reserved now, so that touching
    /// them later does not kill the process.
    ///
    /// # Errors
    /// As [`Self::anonymous`].
    pub fn shared(file: BackingFile, bytes: usize, huge: bool) -> Result<Self> {
        let unit = if huge { InstallUnit::Huge2M } else { InstallUnit::Page };
        check_length(bytes, unit.bytes())?;
        let flags = if huge { MapFlags::SHARED } else { MapFlags::SHARED | MapFlags::NORESERVE };
        // SAFETY: a new mapping at an address that the kernel picks; it aliases other mappings of
        // the same file, none of which is ever reached by a Rust reference.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                &file.fd,
                file.offset,
            )
        };
        let what =
            if huge { "2 MiB huge pages (reserve them: sysctl vm.nr_hugepages)" } else { "shared memory" };
        let start = start.map_err(|errno| refused(bytes, what, errno))?;
        let mapping = Self::own(start, bytes, huge, Some(file))?;
        if huge { Ok(mapping) } else { mapping.without_huge_pages() }
    }

    /// Memory that somebody else mapped, such as a VMM's guest memory. It must be private anonymous
    /// memory, or a shared mapping of `file`. `huge` says that it is hugetlb memory of 2 MiB pages.
    ///
    /// `keep` is dropped with the mapping: whatever keeps the memory mapped.
    ///
    /// # Safety
    /// From `start` on, `bytes` bytes are mapped readable and writable, and stay so until `keep` is
    /// dropped; nobody holds a Rust reference to them (guest memory is reached through volatile or
    /// atomic accesses).
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the memory is not aligned to its pages, or empty.
    pub unsafe fn borrowed(
        start: NonNull<u8>,
        bytes: usize,
        huge: bool,
        file: Option<BackingFile>,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let unit = if huge { InstallUnit::Huge2M.bytes() } else { PAGE_BYTES };
        check_length(bytes, unit)?;
        if !start.addr().get().is_multiple_of(unit) {
            return Err(Error::new(
                ErrorKind::Input,
                format!("memory at {start:p} is not aligned to {unit}"),
            ));
        }
        Ok(Self { start, bytes, huge, file, owner: Owner::Other { _keep: keep } })
    }

    fn own(start: *mut c_void, bytes: usize, huge: bool, file: Option<BackingFile>) -> Result<Self> {
        let start = NonNull::new(start.cast())
            .ok_or_else(|| Error::new(ErrorKind::System, "the kernel mapped memory at address zero"))?;
        Ok(Self { start, bytes, huge, file, owner: Owner::Own })
    }

    /// With transparent huge pages, where the kernel has some: for memory on which nobody faults, and which is used again.
    #[must_use]
    pub fn with_huge_pages(self) -> Self {
        // Without them it is memory all the same.
        let _ = self.advise(0, self.bytes, Advice::LinuxHugepage);
        self
    }

    fn without_huge_pages(self) -> Result<Self> {
        match self.advise(0, self.bytes, Advice::LinuxNoHugepage) {
            // A kernel without transparent huge pages does not know the advice, and needs none.
            Err(rustix::io::Errno::INVAL) | Ok(()) => Ok(self),
            Err(errno) => Err(refused(self.bytes, "memory without transparent huge pages", errno)),
        }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Never: no mapping is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where it starts in this process.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Whether it is hugetlb memory of 2 MiB pages.
    #[must_use]
    pub const fn is_huge(&self) -> bool {
        self.huge
    }

    /// The file behind it, and where in the file it begins.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.as_ref().map(|file| (file.fd.as_fd(), file.offset))
    }

    /// A second mapping of the same memory file. `None` for memory without a file.
    ///
    /// # Errors
    /// As [`Self::shared`].
    pub fn again(&self) -> Result<Option<Self>> {
        let Some(file) = &self.file else { return Ok(None) };
        let fd = file.fd.try_clone()?;
        Self::shared(BackingFile { fd, offset: file.offset }, self.bytes, self.huge).map(Some)
    }

    /// `bytes` bytes at `offset`, for reading. `None` outside of the mapping.
    #[must_use]
    pub fn slice(&self, offset: usize, bytes: usize) -> Option<GuestSlice<'_>> {
        self.slot(offset, bytes).map(SlotSlice::readable)
    }

    /// `bytes` bytes at `offset`, for writing. `None` outside of the mapping.
    #[must_use]
    pub fn slot(&self, offset: usize, bytes: usize) -> Option<SlotSlice<'_>> {
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        // SAFETY: the range was checked; the memory stays mapped readable and writable while self
        // is borrowed (`own`: until drop; `borrowed`: the caller's promise).
        Some(unsafe { SlotSlice::new(self.start.add(offset), bytes) })
    }

    /// Writes to the file behind the memory. See [`GuestMemory::write_file`](super::GuestMemory).
    pub(super) fn write_file(&self, offset: usize, mut bytes: &[u8]) -> std::io::Result<()> {
        let file = self.file.as_ref().ok_or(std::io::ErrorKind::Unsupported)?;
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.bytes) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let mut at = file.offset + offset as u64;
        while !bytes.is_empty() {
            match rustix::io::pwrite(&file.fd, bytes, at) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(wrote) => {
                    bytes = bytes.get(wrote..).unwrap_or_default();
                    at += wrote as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Gives memory back to the kernel: the range reads as zero afterwards. Both numbers in bytes,
    /// multiples of the page size (2 MiB for huge pages).
    ///
    /// # Errors
    /// [`ErrorKind::Input`] outside of the mapping; [`ErrorKind::System`] when the kernel refuses.
    pub fn release(&self, offset: usize, bytes: usize) -> Result<()> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(Error::new(ErrorKind::Input, "released memory is outside of the mapping"));
        }
        let released = match &self.file {
            None => self.advise(offset, bytes, Advice::LinuxDontNeed),
            Some(file) => rustix::fs::fallocate(
                &file.fd,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                file.offset + offset as u64,
                bytes as u64,
            ),
        };
        released.map_err(|errno| {
            Error::new(ErrorKind::System, format!("{bytes} bytes of memory could not be given back"))
                .because(std::io::Error::from(errno))
        })
    }

    /// Forgets everything: all of it is missing afterwards, not only zero, and poison is lifted.
    ///
    /// `present` are the parts that have memory, in bytes: huge pages are given back only there,
    /// since giving back a hole would cost its reservation.
    pub(super) fn empty(&self, present: impl Iterator<Item = (usize, usize)>) -> Result<()> {
        if self.huge && self.file.is_some() {
            for (offset, bytes) in present {
                self.release(offset, bytes)?;
            }
        } else {
            self.release(0, self.bytes)?;
        }
        // A file's pages are gone by now; this clears what only the page table holds.
        match self.advise(0, self.bytes, Advice::LinuxDontNeed) {
            // Kernels before 5.18 do not take it for huge pages, and have no poison either.
            Err(rustix::io::Errno::INVAL) | Ok(()) => Ok(()),
            Err(errno) => Err(Error::new(ErrorKind::System, "memory could not be emptied")
                .because(std::io::Error::from(errno))),
        }
    }

    /// Leaves the memory out of core dumps: it is somebody else's.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses.
    pub fn exclude_from_dumps(&self) -> Result<()> {
        self.advise(0, self.bytes, Advice::LinuxDontDump).map_err(|errno| {
            Error::new(ErrorKind::System, "memory could not be left out of core dumps")
                .because(std::io::Error::from(errno))
        })
    }

    /// Lets nobody touch the range any more: whoever does gets `SIGSEGV`, or `EFAULT` from a system
    /// call. What is left on kernels that cannot poison a page.
    pub(crate) fn forbid(&self, offset: usize, bytes: usize) -> Result<()> {
        let slot = self
            .slot(offset, bytes)
            .ok_or_else(|| Error::new(ErrorKind::Input, "forbidden memory is outside of the mapping"))?;
        // SAFETY: the range is inside the mapping. Whoever reads it through a slice afterwards is
        // killed by a signal, which is what the caller asks for: the bytes are lost.
        unsafe { rustix::mm::mprotect(slot.as_mut_ptr().cast(), bytes, MprotectFlags::empty()) }.map_err(
            |errno| {
                Error::new(ErrorKind::System, "memory that was lost could not be made inaccessible")
                    .because(std::io::Error::from(errno))
            },
        )
    }

    /// Asks the kernel to put the memory into swap.
    #[cfg(test)]
    pub(crate) fn page_out(&self) {
        self.advise(0, self.bytes, Advice::LinuxPageOut).expect("advised");
    }

    /// Gives up what is mapped: the file, if there is one, keeps its pages.
    #[cfg(test)]
    pub(crate) fn unmap_pages(&self, offset: usize, bytes: usize) {
        self.advise(offset, bytes, Advice::LinuxDontNeed).expect("advised");
    }

    fn advise(&self, offset: usize, bytes: usize, advice: Advice) -> rustix::io::Result<()> {
        let slot = self.slot(offset, bytes).ok_or(rustix::io::Errno::INVAL)?;
        // SAFETY: the range is inside the mapping. Of the advice given in this file only DontNeed
        // changes what memory holds, to zeros, which is a change like any other from outside.
        unsafe { rustix::mm::madvise(slot.as_mut_ptr().cast(), bytes, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Owner::Own = self.owner {
            // SAFETY: mapped by this value, and every slice of it has ended with its borrow.
            if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) } {
                tracing::error!(%errno, bytes = self.bytes, "memory could not be unmapped");
            }
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (&self.file, self.huge) {
            (None, false) => "anonymous",
            (Some(_), false) => "shared",
            (_, true) => "hugetlb",
        };
        let owner = if matches!(self.owner, Owner::Own) { "" } else { ", borrowed" };
        write!(f, "{} bytes of {kind} memory at {:p}{owner}", self.bytes, self.start)
    }
}

fn check_length(bytes: usize, unit: usize) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(unit) || isize::try_from(bytes).is_err() {
        return Err(Error::new(ErrorKind::Input, format!("{bytes} bytes are no multiple of {unit}")));
    }
    Ok(())
}

fn refused(bytes: usize, what: &str, errno: rustix::io::Errno) -> Error {
    Error::new(ErrorKind::System, format!("the kernel gives no {bytes} bytes of {what}"))
        .because(std::io::Error::from(errno))
}

/// One answer of the `PAGEMAP_SCAN` request: consecutive pages of the same kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScannedRun {
    /// Address of the first byte.
    pub start: u64,
    /// Address behind the last byte.
    pub end: u64,
    categories: u64,
}

/// Argument of the `PAGEMAP_SCAN` request (`struct pm_scan_arg`, kernel 6.7).
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_any_of_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<ScannedRun>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Write-protects what is named, in the same step.
const PM_SCAN_WP_MATCHING: u64 = 1;
/// Fails where memory is not registered for that, instead of passing it over.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// What [`scan_pagemap`] asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scan {
    flags: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    told: u64,
}

impl Scan {
    /// Pages that have memory or lie in swap, those that are the kernel's shared page of zeros left out.
    pub(crate) const PRESENT: Self = Self {
        flags: 0,
        inverted: PAGE_IS_PFNZERO,
        all_of: PAGE_IS_PFNZERO,
        any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        told: PAGE_IS_PRESENT,
    };

    /// The same of huge pages. They are never in swap: what looks like it is a mark that says "write-protected"
    /// where there is no page.
    pub(crate) const PRESENT_HUGE: Self = Self { any_of: PAGE_IS_PRESENT, ..Self::PRESENT };

    /// Pages written since the last such scan; write-protects them anew. The memory is registered with a
    /// userfaultfd in asynchronous write-protect mode. For files of memory: an entry without page and mark is one
    /// that was written and taken away by the kernel since.
    pub(crate) const WRITTEN: Self = Self {
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        inverted: 0,
        all_of: PAGE_IS_WRITTEN,
        any_of: 0,
        told: PAGE_IS_WRITTEN,
    };

    /// The same of private memory, whose written pages are there or in swap: where no page is, none was written,
    /// and no mark is left that would look like a page in swap to whoever asks what is present.
    pub(crate) const WRITTEN_PRIVATE: Self =
        Self { any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, ..Self::WRITTEN };
}

/// Asks for the runs of pages between two addresses that are what `scan` says. Returns how many runs were
/// filled in, and how far the kernel looked.
///
/// Returns the kernel's error: `ENOTTY` before 6.7.
pub(crate) fn scan_pagemap(
    pagemap: BorrowedFd<'_>,
    scan: Scan,
    start: u64,
    end: u64,
    runs: &mut [ScannedRun],
) -> std::io::Result<(usize, u64)> {
    use std::os::fd::AsRawFd;
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags: scan.flags,
        start,
        end,
        walk_end: 0,
        runs: runs.as_mut_ptr().addr() as u64,
        runs_len: runs.len() as u64,
        max_pages: 0,
        category_inverted: scan.inverted,
        category_mask: scan.all_of,
        category_any_of_mask: scan.any_of,
        return_mask: scan.told,
    };
    // SAFETY: the argument has the size that it names and points to `runs_len` writable runs; the
    // request writes to nothing else. Write-protecting changes no byte that anybody reads or writes.
    let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
    match usize::try_from(filled) {
        Ok(filled) => Ok((filled, argument.walk_end)),
        Err(_) => Err(std::io::Error::last_os_error()),
    }
}
