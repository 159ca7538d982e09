//! The userfaultfd requests, each once: what the crate `userfaultfd` has by way of it, what it lacks
//! by hand. Every outcome is turned into a [`Step`] here, signs and partial counts included.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::{FeatureFlags, RegisterMode, Uffd as Descriptor, UffdBuilder};

use super::steps::Step;
use crate::memory::GuestSlice;

/// `UFFD_FEATURE_POISON`, kernel 6.6; the crate does not name it.
const FEATURE_POISON: FeatureFlags = FeatureFlags::from_bits_retain(1 << 14);

/// `UFFD_FEATURE_MINOR_SHMEM`, kernel 5.14; the crate does not name it either.
const FEATURE_MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);

/// Write-protection of shared memory and huge pages, kernel 5.19.
const FEATURE_WP_SHARED: FeatureFlags = FeatureFlags::from_bits_retain(1 << 12);
/// Write-protection of what is not there yet, kernel 6.4.
const FEATURE_WP_UNPOPULATED: FeatureFlags = FeatureFlags::from_bits_retain(1 << 13);
/// Writers are noted and not held up, kernel 6.7.
const FEATURE_WP_ASYNC: FeatureFlags = FeatureFlags::from_bits_retain(1 << 15);

/// What it takes to hear of writers that wait for it; of shared memory too.
pub(super) const WAITING_WRITERS: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP.union(FEATURE_WP_SHARED);
/// The same for private memory only, kernel 5.7.
pub(super) const WAITING_PRIVATE_WRITERS: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;
/// What it takes to have writers noted by the kernel.
pub(super) const NOTED_WRITERS: FeatureFlags =
    WAITING_WRITERS.union(FEATURE_WP_UNPOPULATED).union(FEATURE_WP_ASYNC);

/// `_IOWR(0xaa, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
/// `_IOWR(0xaa, 0x07, struct uffdio_continue)`.
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;
/// `_IOWR(0xaa, 0x08, struct uffdio_poison)`.
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;

/// `struct uffdio_zeropage`, `struct uffdio_continue` and `struct uffdio_poison`.
#[repr(C)]
struct RangeRequest {
    start: u64,
    bytes: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<RangeRequest>() == 32 && size_of::<ApiRequest>() == 24);

/// Opens a userfaultfd that also sees faults from inside the kernel (vCPUs fault there), does not
/// block and is closed on exec, with `features`, and with poison where the kernel has it.
pub(super) fn open(features: FeatureFlags) -> io::Result<Descriptor> {
    match open_with(features | FEATURE_POISON) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open_with(features),
        opened => opened,
    }
}

/// The same for memory whose pages are mapped by [`map`]. Only with poison: by which pages the file has it cannot be told
/// there what never came.
pub(super) fn open_for_mapping(features: FeatureFlags) -> io::Result<Descriptor> {
    open_with(features | FEATURE_MINOR_SHMEM | FEATURE_POISON)
}

fn open_with(features: FeatureFlags) -> io::Result<Descriptor> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(false).require_features(features);
    match builder.create() {
        // The crate asks /dev/userfaultfd only, if there is one, even when it may not be opened
        // while vm.unprivileged_userfaultfd allows the system call.
        Err(userfaultfd::Error::OpenDevUserfaultfd(_)) => open_by_call(features),
        opened => opened.map_err(io_error),
    }
}

fn open_by_call(features: FeatureFlags) -> io::Result<Descriptor> {
    // SAFETY: the call takes flags only, and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: just opened, owned by nobody else.
    let descriptor = unsafe { Descriptor::from_raw_fd(fd) };
    let mut api = ApiRequest { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the request reads and writes the struct that it is given.
    if unsafe { libc::ioctl(fd, UFFDIO_API, &raw mut api) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(descriptor)
}

/// Takes over a userfaultfd that another process opened and registered its memory with.
pub(super) fn adopt(fd: OwnedFd) -> io::Result<Descriptor> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    // SAFETY: the descriptor's owner gives it up here.
    Ok(unsafe { Descriptor::from_raw_fd(fd.into_raw_fd()) })
}

pub(super) fn register(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    descriptor.register_with_mode(pointer(start), bytes, RegisterMode::MISSING).map(drop).map_err(io_error)
}

/// Registers memory for pages that its file lacks, and for those that it has and the mapping has not.
pub(super) fn register_mapped(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    let mode = RegisterMode::MISSING | RegisterMode::MINOR;
    descriptor.register_with_mode(pointer(start), bytes, mode).map(drop).map_err(io_error)
}

/// Registers memory for write-protection, and with `missing` for its missing pages as well.
pub(super) fn register_writes(
    descriptor: &Descriptor,
    start: u64,
    bytes: usize,
    missing: bool,
) -> io::Result<()> {
    let missing = if missing { RegisterMode::MISSING } else { RegisterMode::empty() };
    let mode = RegisterMode::WRITE_PROTECT | missing;
    descriptor.register_with_mode(pointer(start), bytes, mode).map(drop).map_err(io_error)
}

/// From now on, whoever writes there is held up, or noted where the mode is asynchronous.
pub(super) fn protect(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    descriptor.write_protect(pointer(start), bytes).map_err(io_error)
}

/// Lets writers write there again, and wakes those that wait.
pub(super) fn unprotect(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    descriptor.remove_write_protection(pointer(start), bytes, true).map_err(io_error)
}

pub(super) fn unregister(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    descriptor.unregister(pointer(start), bytes).map_err(io_error)
}

pub(super) fn wake(descriptor: &Descriptor, start: u64, bytes: usize) -> io::Result<()> {
    descriptor.wake(pointer(start), bytes).map_err(io_error)
}

/// Copies to missing pages from `start` on, and wakes who waits for them.
pub(super) fn copy(descriptor: &Descriptor, start: u64, bytes: Bytes<'_>) -> Step {
    let (from, len) = match bytes {
        Bytes::Own(bytes) => (bytes.as_ptr(), bytes.len()),
        Bytes::Guest(slice) => (slice.as_ptr(), slice.len()),
    };
    // SAFETY: the kernel reads `len` bytes from memory that is borrowed. It writes to missing pages
    // only, and only of memory that was registered for it; whose content no Rust reference assumes.
    match unsafe { descriptor.copy(from.cast(), pointer(start), len, true) } {
        Ok(done) => Step::Done(done),
        // The crate passes on the kernel's signed count as it is: a negative one is no count.
        Err(userfaultfd::Error::PartiallyCopied(done)) if done > 0 && done <= len => Step::Done(done),
        Err(userfaultfd::Error::PartiallyCopied(_)) => Step::Again,
        Err(error) => Step::from_error(io_error(error)),
    }
}

/// What is copied into the guest.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// Received and checked.
    Own(&'a [u8]),
    /// Memory that nobody writes to: a unit of zeros.
    Guest(GuestSlice<'a>),
}

/// Puts zeros to missing pages from `start` on, and wakes who waits for them.
pub(super) fn zero(descriptor: &Descriptor, start: u64, bytes: usize) -> Step {
    range_request(descriptor, UFFDIO_ZEROPAGE, start, bytes)
}

/// Poisons missing pages from `start` on, and wakes who waits for them. `EINVAL` before kernel 6.6.
pub(super) fn poison(descriptor: &Descriptor, start: u64, bytes: usize) -> Step {
    range_request(descriptor, UFFDIO_POISON, start, bytes)
}

/// Maps pages that the file behind the memory has, from `start` on, and wakes who waits for them.
pub(super) fn map(descriptor: &Descriptor, start: u64, bytes: usize) -> Step {
    match range_request(descriptor, UFFDIO_CONTINUE, start, bytes) {
        // The file has it no more: it was given up meanwhile.
        Step::Failed(error) if error.raw_os_error() == Some(libc::EFAULT) => Step::Again,
        step => step,
    }
}

fn range_request(descriptor: &Descriptor, request: libc::c_ulong, start: u64, bytes: usize) -> Step {
    let mut argument = RangeRequest { start, bytes: bytes as u64, mode: 0, done: 0 };
    // SAFETY: the request reads and writes the struct that it is given, and changes missing pages
    // only, of memory that was registered for it.
    if unsafe { libc::ioctl(descriptor.as_raw_fd(), request, &raw mut argument) } == 0 {
        return Step::Done(bytes);
    }
    let error = io::Error::last_os_error();
    match usize::try_from(argument.done) {
        // A part was done, and the kernel says so by EAGAIN and a positive count.
        Ok(done) if done > 0 && error.raw_os_error() == Some(libc::EAGAIN) => Step::Done(done),
        _ => Step::from_error(error),
    }
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// The system's error behind one of the crate's.
pub(super) fn io_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::CopyFailed(errno)
        | userfaultfd::Error::ZeropageFailed(errno)
        | userfaultfd::Error::SystemError(errno) => io::Error::from_raw_os_error(errno as i32),
        userfaultfd::Error::OpenDevUserfaultfd(error) => error,
        other => io::Error::other(other),
    }
}
