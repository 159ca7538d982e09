//! userfaultfd: memory whose missing pages we install, and whose faults we hear of.
//!
//! The one place that knows what the kernel's answers mean: `EEXIST` (somebody else installed the
//! page first: skip it, and wake its waiters), `EAGAIN` (a part was done, or somebody waits for an
//! event to be read), counts that are negative, and that a closed descriptor leaves missing pages
//! reading as zero.
//!
//! [`WriteLog`] uses the other half of it: which pages are written.
//!
//! Kernel 5.11 or newer is needed. Poisoned pages (6.6) have a fallback on older kernels, see
//! [`PageSink::poison`] of [`Uffd`].

mod landing;
mod raw;
mod steps;
mod window;
mod withdraw;
mod writes;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use userfaultfd::{Event, EventBuffer, FaultKind, FeatureFlags, ReadWrite};

pub use self::landing::InstallBy;
use self::landing::Landing;
use self::steps::Step;
pub use self::window::Window;
use self::window::check;
pub use self::writes::{WriteLog, WriteLogMethod};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Mapping};
use crate::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use crate::sink::{InstallOutcome, PageSink, SinkEvent};

/// Events read from the kernel at once.
const EVENTS_AT_ONCE: usize = 64;

/// What every userfaultfd of ours can do.
const FEATURES: FeatureFlags = FeatureFlags::EVENT_REMOVE
    .union(FeatureFlags::THREAD_ID)
    .union(FeatureFlags::MISSING_SHMEM)
    .union(FeatureFlags::MISSING_HUGETLBFS);

/// Guest memory registered with a userfaultfd: a [`PageSink`].
///
/// Dropped before [`PageSink::finish`], it poisons what was not installed: a VM that goes on without
/// us must not take a page that never came for one of zeros.
pub struct Uffd {
    descriptor: userfaultfd::Uffd,
    /// Sorted by page; neither pages nor addresses overlap.
    windows: Vec<Window>,
    /// The memory, kept mapped; `None` when it is another process's.
    memory: Option<GuestMemory>,
    landing: Landing,
    buffer: Mutex<EventBuffer>,
    zeros: OnceLock<Mapping>,
    finished: AtomicBool,
}

impl Uffd {
    /// Empties memory of this process and registers it. From now on, whoever touches a page of it
    /// waits until it is installed, vCPUs included.
    ///
    /// What a VMM put there before (firmware, a kernel) is part of what arrives, so that it is
    /// dropped here: a page that stayed would win over the one that comes.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses; the message names what grants it.
    pub fn register(memory: &GuestMemory) -> Result<Self> {
        Self::register_by(memory, InstallBy::best())
    }

    /// The same, and says how pages get there. By [`InstallBy::File`] nobody else may write the files before
    /// [`PageSink::finish`]; whoever reads them elsewhere sees zeros, or pages that were checked.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub fn register_by(memory: &GuestMemory, by: InstallBy) -> Result<Self> {
        memory.empty()?;
        if by == InstallBy::File && memory.regions().iter().any(landing::has_file) {
            match raw::open_for_mapping(FEATURES) {
                Ok(descriptor) => return Self::register_with(descriptor, memory, by),
                Err(cause) => landing::say_refused(&cause),
            }
        }
        Self::register_over(memory)
    }

    /// Registers memory of this process and keeps what it holds: every page that is there, be it one
    /// of zeros that was only read, counts as installed. For memory that was filled in rounds, of
    /// which what is out of date was given up ([`GuestMemory::release`]).
    ///
    /// Not for memory that pages were on their way to by [`InstallBy::File`]: there a page is there also when it never
    /// came.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub fn register_over(memory: &GuestMemory) -> Result<Self> {
        Self::register_with(raw::open(FEATURES).map_err(refused)?, memory, InstallBy::Copy)
    }

    fn register_with(descriptor: userfaultfd::Uffd, memory: &GuestMemory, by: InstallBy) -> Result<Self> {
        let mut windows = Vec::with_capacity(memory.regions().len());
        let mut landing = Landing::none();
        for region in memory.regions() {
            let window = Window::of(region);
            let by_file = by == InstallBy::File && landing::has_file(region);
            let registered = if by_file {
                landing.add(region);
                raw::register_mapped(&descriptor, window.address, window.bytes())
            } else {
                raw::register(&descriptor, window.address, window.bytes())
            };
            registered.map_err(|cause| {
                Error::new(ErrorKind::System, "guest memory cannot be registered with userfaultfd")
                    .because(cause)
                    .about([region.pages()])
            })?;
            windows.push(window);
        }
        let mut uffd = Self::over(descriptor, windows, Some(memory.clone()));
        uffd.landing = landing;
        Ok(uffd)
    }

    /// How pages get into this memory, where regions differ into those that have files.
    #[must_use]
    pub fn install_by(&self) -> InstallBy {
        if self.landing.is_used() { InstallBy::File } else { InstallBy::Copy }
    }

    /// Takes over a userfaultfd with which another process registered its memory, and the list of
    /// where its regions lie there. That process opened it for faults from inside the kernel, if it
    /// runs vCPUs, and with removal events, if pages may be given up.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for regions that overlap or are not aligned; [`ErrorKind::System`] when
    /// the descriptor is none.
    pub fn adopt(fd: OwnedFd, mut windows: Vec<Window>) -> Result<Self> {
        windows.sort_by_key(|window| window.first);
        check(&windows)?;
        let descriptor = raw::adopt(fd).map_err(|cause| {
            Error::new(ErrorKind::System, "the userfaultfd that was handed over cannot be used")
                .because(cause)
        })?;
        Ok(Self::over(descriptor, windows, None))
    }

    fn over(descriptor: userfaultfd::Uffd, windows: Vec<Window>, memory: Option<GuestMemory>) -> Self {
        Self {
            descriptor,
            windows,
            memory,
            landing: Landing::none(),
            buffer: Mutex::new(EventBuffer::new(EVENTS_AT_ONCE)),
            zeros: OnceLock::new(),
            finished: AtomicBool::new(false),
        }
    }

    /// Wakes whoever waits for a page of the range. Installing does so by itself; a thread whose page
    /// is still missing faults again.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for pages that there are not; [`ErrorKind::System`] when the kernel
    /// refuses.
    pub fn wake(&self, range: PageRange) -> Result<()> {
        let (_, start) = self.locate(range)?;
        raw::wake(&self.descriptor, start, range.pages as usize * PAGE_BYTES)
            .map_err(|cause| failed(range, cause))
    }

    fn own_memory(&self) -> Result<&GuestMemory> {
        let refused = || Error::new(ErrorKind::Input, "another process's memory takes each page once");
        self.memory.as_ref().ok_or_else(refused)
    }

    /// The window of a range, and its address.
    fn locate(&self, range: PageRange) -> Result<(&Window, u64)> {
        let find = || {
            let after = self.windows.partition_point(|window| window.first <= range.first);
            let window = self.windows.get(after.checked_sub(1)?)?;
            let into = range.first.0 - window.first.0;
            let unit = window.kernel_unit().pages();
            (into.checked_add(range.pages)? <= window.pages
                && into.is_multiple_of(unit)
                && range.pages.is_multiple_of(unit))
            .then(|| (window, window.address + u64::from(into) * PAGE_BYTES_U64))
        };
        find().ok_or_else(|| {
            Error::new(ErrorKind::Input, "no such pages in one region of the memory, or half a huge page")
                .about([range])
        })
    }

    /// Runs `request(address, bytes)` over a range until every page was dealt with, or nothing goes.
    fn step(
        &self,
        range: PageRange,
        request: impl Fn(&Window, u64, u32, u32) -> Step,
    ) -> Result<InstallOutcome> {
        let mut outcome = InstallOutcome::new(range)?;
        let (window, start) = self.locate(range)?;
        let address = |at: u32| start + u64::from(at) * PAGE_BYTES_U64;
        steps::run(
            &mut outcome,
            window.kernel_unit().pages(),
            |at, pages| request(window, address(at), at, pages),
            |at, pages| raw::wake(&self.descriptor, address(at), pages as usize * PAGE_BYTES),
        )
        .map_err(|cause| failed(range, cause))?;
        Ok(outcome)
    }

    /// A unit of zeros to copy from, for memory that cannot share the kernel's page of zeros.
    fn zeros(&self) -> Result<&Mapping> {
        if let Some(zeros) = self.zeros.get() {
            return Ok(zeros);
        }
        let zeros = Mapping::anonymous(InstallUnit::Huge2M.bytes())?;
        Ok(self.zeros.get_or_init(|| zeros))
    }

    /// Poisons what is missing of a range. False: the kernel cannot.
    fn try_poison(&self, range: PageRange) -> Result<bool> {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let done = self.step(range, |_, address, _, pages| {
                raw::poison(&self.descriptor, address, pages as usize * PAGE_BYTES)
            });
            match done {
                Ok(outcome) => rest = outcome.retry(),
                Err(error) if is_unknown_request(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// What is left where pages cannot be poisoned: taking the access to missing ones away.
    ///
    /// Kernels that cannot poison have no `PAGEMAP_SCAN` either, and so count installed pages of
    /// zeros as present.
    fn forbid(&self, range: PageRange) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Err(Error::new(
                ErrorKind::System,
                "pages are lost, and this kernel (before 6.6) cannot tell the VM in another process: end it",
            )
            .about([range]));
        };
        let present = memory.presence()?;
        let missing = range.iter().filter(|page| !present.contains(*page)).collect();
        for run in PageRange::from_pages(missing) {
            memory.forbid(run)?;
            self.wake(run)?;
        }
        Ok(())
    }

    /// Hands the events of one message on. Returns how many there were.
    fn translate(&self, event: &Event, out: &mut Vec<SinkEvent>) -> usize {
        let before = out.len();
        match event {
            Event::Pagefault { kind, rw, addr, thread_id } => {
                let address = addr.addr() as u64;
                match self.windows.iter().find(|w| (w.address..w.end()).contains(&address)) {
                    Some(window) => {
                        let into = ((address - window.address) / PAGE_BYTES_U64) as u32;
                        let at = window.address + u64::from(into) * PAGE_BYTES_U64;
                        if *kind == FaultKind::Minor
                            && self.landing.maps_again(&self.descriptor, PageIndex(window.first.0 + into), at)
                        {
                            return 0;
                        }
                        let page = PageIndex(window.first.0 + into - into % window.unit.pages());
                        let thread = u32::try_from(thread_id.as_raw()).unwrap_or(0);
                        out.push(SinkEvent::Fault { page, write: *rw == ReadWrite::Write, thread });
                    }
                    None => tracing::error!(address, "a fault outside of every region: its thread waits"),
                }
            }
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                let (start, end) = (start.addr() as u64, end.addr() as u64);
                out.extend(self.windows.iter().filter_map(|window| {
                    let from = start.max(window.address) - window.address;
                    let to = end.min(window.end()).checked_sub(window.address)?;
                    let (first, last) = (from / PAGE_BYTES_U64, to / PAGE_BYTES_U64);
                    let first_page = PageIndex(window.first.0 + u32::try_from(first).ok()?);
                    let pages = u32::try_from(last.checked_sub(first)?).ok()?;
                    let range = PageRange::new(first_page, pages);
                    self.landing.forget(range);
                    (pages > 0).then_some(SinkEvent::Removed(range))
                }));
            }
            other => tracing::warn!(?other, "an event that was not asked for"),
        }
        out.len() - before
    }

    /// Poisons every page that is missing.
    fn poison_rest(&self) -> Result<()> {
        const CHUNK: u32 = crate::limits::BATCH_PAGES_MAX as u32;
        for window in &self.windows {
            for at in (0..window.pages).step_by(CHUNK as usize) {
                let left = window.pages - at;
                let first = PageIndex(window.first.0 + at);
                if !self.try_poison(PageRange::new(first, CHUNK.min(left)))? {
                    self.forbid(PageRange::new(first, left))?;
                    break;
                }
            }
        }
        Ok(())
    }
}

impl PageSink for Uffd {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome> {
        let range = PageRange::new(first, u32::try_from(bytes.len() / PAGE_BYTES).unwrap_or(u32::MAX));
        if !bytes.len().is_multiple_of(PAGE_BYTES) {
            return Err(Error::new(ErrorKind::Input, format!("{} bytes are no whole pages", bytes.len()))
                .about([range]));
        }
        let book = self.landing.of(first);
        self.step(range, |_, address, at, pages| {
            let bytes = &bytes[at as usize * PAGE_BYTES..];
            match book {
                Some(book) => self.land(book, PageRange::new(PageIndex(first.0 + at), pages), address, bytes),
                None => raw::copy(&self.descriptor, address, raw::Bytes::Own(bytes)),
            }
        })
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        if self.locate(range)?.0.huge {
            let zeros = self.zeros()?;
            let zeros = zeros
                .slice(0, zeros.len())
                .ok_or_else(|| Error::new(ErrorKind::System, "a mapping does not contain itself"))?;
            return self.step(range, |_, address, _, _| {
                raw::copy(&self.descriptor, address, raw::Bytes::Guest(zeros))
            });
        }
        let book = self.landing.of(range.first);
        self.step(range, |_, address, at, pages| match book {
            Some(book) => {
                self.land_zeros(book, PageRange::new(PageIndex(range.first.0 + at), pages), address)
            }
            None => raw::zero(&self.descriptor, address, pages as usize * PAGE_BYTES),
        })
    }

    fn can_replace(&self) -> bool {
        self.memory.is_some()
    }

    /// See the trait. Memory of this process only: it is written through its mapping, or by its file, where a page that
    /// the kernel unmapped would wait for whoever reads the events, who may be calling.
    fn replace(&self, first: PageIndex, bytes: &[u8]) -> Result<()> {
        let range = PageRange::new(first, u32::try_from(bytes.len() / PAGE_BYTES).unwrap_or(u32::MAX));
        let memory = self.own_memory()?;
        match self.landing.of(first) {
            Some(_) => memory.write_file(range, bytes).map_err(|cause| failed(range, cause)),
            None => memory.copy_in(range, bytes),
        }
    }

    /// See the trait. Memory of this process only.
    fn withdraw(&self, runs: &[PageRange]) -> Result<()> {
        self.take_out(self.own_memory()?, runs)?;
        runs.iter().for_each(|run| self.landing.forget(*run));
        Ok(())
    }

    /// See the trait. Kernels before 6.6 cannot poison: there the access to missing pages of this
    /// process's memory is taken away, and who touches them gets `SIGSEGV` or `EFAULT` (`KVM_RUN`
    /// fails); for another process's memory it is an error.
    fn poison(&self, range: PageRange) -> Result<()> {
        if self.try_poison(range)? { Ok(()) } else { self.forbid(range) }
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize> {
        let mut buffer = self.buffer.lock();
        let mut count = 0;
        let events = self.descriptor.read_events(&mut buffer).map_err(|error| {
            Error::new(ErrorKind::System, "the VM's faults cannot be read: its memory is gone")
                .because(raw::io_error(error))
        })?;
        for event in events {
            match event {
                Ok(event) => count += self.translate(&event, out),
                Err(error) => tracing::warn!(%error, "an event of userfaultfd that is not known"),
            }
        }
        Ok(count)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.descriptor.as_fd())
    }

    fn finish(&self) -> Result<()> {
        for window in &self.windows {
            raw::unregister(&self.descriptor, window.address, window.bytes())
                .map_err(|cause| failed(PageRange::new(window.first, window.pages), cause))?;
        }
        self.finished.store(true, Ordering::Release);
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd")
            .field("descriptor", &self.descriptor)
            .field("windows", &self.windows)
            .field("finished", &self.finished)
            .finish_non_exhaustive()
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        if self.finished.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = self.poison_rest() {
            tracing::error!(error = error.chain(), "pages that never came could not be poisoned");
        }
    }
}

fn refused(cause: io::Error) -> Error {
    Error::new(
        ErrorKind::System,
        "userfaultfd is refused: run as root or with CAP_SYS_PTRACE, or give access to /dev/userfaultfd, \
         or set sysctl vm.unprivileged_userfaultfd=1",
    )
    .because(cause)
}

fn failed(range: PageRange, cause: io::Error) -> Error {
    let message = match cause.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => "the memory of the VM is gone: unmapped, or its process ended",
        Some(libc::ENOSPC | libc::ENOMEM) => "no memory is left to install pages of the VM",
        _ => "userfaultfd failed",
    };
    Error::new(ErrorKind::System, message).because(cause).about([range])
}

/// Whether the kernel does not know the request at all.
fn is_unknown_request(error: &Error) -> bool {
    use std::error::Error as _;
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    matches!(cause.and_then(io::Error::raw_os_error), Some(libc::EINVAL | libc::ENOTTY))
}

#[cfg(test)]
mod test;
