//! Writes that we are told of: whoever writes to a protected page waits until `sg-dirty` has noted it and taken the
//! protection away.
//!
//! Noting a page and letting its writer go is one step under the lock, as is naming pages and protecting them
//! again: else a page could be named, and then written by a writer who was let go for what is named already.
//! So a page is protected, or noted, or both.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use userfaultfd::{Event, EventBuffer, FaultKind, Uffd as Descriptor};

use super::super::{EVENTS_AT_ONCE, Step, Window, raw};
use super::{append, failed, is_private, open_failed, register_failed};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::memory::{GuestMemory, PresenceMap};
use crate::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};

/// Pages that are protected again under one hold of the lock: for so long a writer may wait.
const PAGES_AT_ONCE: u32 = 4096;

/// Pages between two written ones that are protected with them, though they are: so many cost what one more
/// request does.
const GAP_PAGES_MAX: u32 = 16;

/// The log while it runs.
pub(super) struct Handling {
    shared: Arc<Shared>,
    thread: Option<host::thread::JoinHandle<()>>,
}

struct Shared {
    descriptor: Descriptor,
    windows: Vec<Window>,
    noted: Mutex<PresenceMap>,
    /// Readable when the thread is to end.
    end: OwnedFd,
    /// The thread could not go on: nothing is protected any more.
    broken: AtomicBool,
    /// Keeps it mapped.
    _memory: GuestMemory,
}

impl Handling {
    /// Starts it.
    pub(super) fn start(memory: &GuestMemory) -> Result<Self> {
        let private: Vec<bool> = memory.regions().iter().map(is_private).collect();
        let features = if private.iter().all(|private| *private) {
            raw::WAITING_PRIVATE_WRITERS
        } else {
            raw::WAITING_WRITERS
        };
        let descriptor = raw::open(features).map_err(|cause| {
            let why = "this kernel cannot log which pages are written: Linux 5.7 can for private memory, 5.19 for all";
            open_failed(cause).unwrap_or_else(|| Error::new(ErrorKind::System, why))
        })?;
        let shared = Arc::new(Shared {
            descriptor,
            windows: memory.regions().iter().map(Window::of).collect(),
            noted: Mutex::new(PresenceMap::new(memory.pages())),
            end: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            broken: AtomicBool::new(false),
            _memory: memory.clone(),
        });
        // First who lets writers go, then who holds them up.
        let body = {
            let shared = Arc::clone(&shared);
            move || shared.serve()
        };
        let thread = host::thread::Builder::new().name("sg-dirty".into()).spawn(body)?;
        let handling = Self { shared, thread: Some(thread) };
        for (window, private) in handling.shared.windows.iter().zip(private) {
            // Private memory cannot be protected where no page is, before Linux 6.4: there a page that comes counts as written.
            raw::register_writes(&handling.shared.descriptor, window.address, window.bytes(), private)
                .map_err(|cause| register_failed(window, cause))?;
            raw::protect(&handling.shared.descriptor, window.address, window.bytes())
                .map_err(|cause| failed(window, cause))?;
        }
        Ok(handling)
    }

    /// See [`crate::dirty::DirtyLog::collect`].
    pub(super) fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        for window in &self.shared.windows {
            let since = out.len();
            let end = window.first.0 + window.pages;
            let mut at = window.first;
            while at.0 < end {
                at = self.shared.name(window, at, |run| append(out, since, run))?;
            }
        }
        if self.shared.broken.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::System,
                "the log of written pages broke off: pages are missing in it",
            ));
        }
        Ok(())
    }

    /// See [`crate::dirty::DirtyLog::stop`].
    pub(super) fn stop(mut self) -> Result<()> {
        self.end()
    }

    /// Lets every writer go, then ends the thread.
    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let freed = self.shared.unregister();
        // The counter can only be full, and then it is readable already.
        let _ = rustix::io::write(&self.shared.end, &1_u64.to_ne_bytes());
        let ended =
            thread.join().map_err(|_| Error::new(ErrorKind::Poisoned, "the thread sg-dirty panicked"));
        freed.and(ended)
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = error.chain(), "the log of written pages did not end well");
        }
    }
}

impl Shared {
    /// The thread.
    fn serve(&self) {
        /// Whoever waits for a thread that is gone waits for ever: let go instead, and tell.
        struct Guard<'a>(&'a Shared, bool);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if !self.1 {
                    self.0.broken.store(true, Ordering::Release);
                    let _ = self.0.unregister();
                }
            }
        }
        let mut guard = Guard(self, false);
        let mut buffer = EventBuffer::new(EVENTS_AT_ONCE);
        loop {
            match self.wait().and_then(|go_on| if go_on { self.note_all(&mut buffer) } else { Ok(false) }) {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => {
                    tracing::error!(%cause, "the log of written pages breaks off");
                    return;
                }
            }
        }
        guard.1 = true;
    }

    /// Waits for a writer, or the end: false.
    fn wait(&self) -> io::Result<bool> {
        let mut on = [PollFd::new(&self.descriptor, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
        match rustix::event::poll(&mut on, None) {
            Ok(_) => Ok(on[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Notes what the kernel has to tell.
    fn note_all(&self, buffer: &mut EventBuffer) -> io::Result<bool> {
        for event in self.descriptor.read_events(buffer).map_err(raw::io_error)? {
            match event {
                Ok(Event::Pagefault { kind, addr, .. }) => self.note(addr.addr() as u64, kind)?,
                other => tracing::warn!(?other, "an event that was not asked for"),
            }
        }
        Ok(true)
    }

    /// Notes a page, and lets its writer go.
    fn note(&self, address: u64, kind: FaultKind) -> io::Result<()> {
        let Some(window) = self.windows.iter().find(|w| (w.address..w.end()).contains(&address)) else {
            return Err(io::Error::other("a write outside of every region"));
        };
        let unit = window.kernel_unit();
        let into = (address - window.address) / unit.bytes() as u64 * u64::from(unit.pages());
        let start = window.address + into * PAGE_BYTES_U64;
        let mut noted = self.noted.lock();
        noted.insert(PageRange::new(PageIndex(window.first.0 + into as u32), unit.pages()));
        if kind != FaultKind::Missing {
            return raw::unprotect(&self.descriptor, start, unit.bytes());
        }
        match raw::zero(&self.descriptor, start, unit.bytes()) {
            Step::Done(_) => Ok(()),
            // Somebody else's fault brought it.
            Step::Present | Step::Again => raw::wake(&self.descriptor, start, unit.bytes()),
            Step::Failed(cause) => Err(cause),
        }
    }

    /// Names what is noted of a region from the next such page at or after `at` on, as far as one hold of the lock
    /// goes, and protects it. Returns where to go on.
    fn name(&self, window: &Window, at: PageIndex, mut name: impl FnMut(PageRange)) -> Result<PageIndex> {
        let region_end = window.first.0 + window.pages;
        let mut noted = self.noted.lock();
        let next = |noted: &PresenceMap, from: u32, end: u32| {
            let run = noted.next_run(PageIndex(from), PAGES_AT_ONCE).filter(|run| run.first.0 < end)?;
            Some(PageRange::new(run.first, run.pages.min(end - run.first.0)))
        };
        let Some(first) = next(&noted, at.0, region_end) else { return Ok(PageIndex(region_end)) };
        let end = first.first.0.saturating_add(PAGES_AT_ONCE).min(region_end);
        // What is to be protected by one request.
        let mut piece = first;
        let mut run = Some(first);
        while let Some(some) = run {
            name(some);
            if some.first.0 - (piece.first.0 + piece.pages).min(some.first.0) > GAP_PAGES_MAX {
                self.protect(window, piece)?;
                piece = some;
            }
            piece.pages = some.first.0 + some.pages - piece.first.0;
            run = next(&noted, some.first.0 + some.pages, end);
        }
        self.protect(window, piece)?;
        noted.remove(PageRange::new(first.first, end - first.first.0));
        Ok(PageIndex(end))
    }

    fn protect(&self, window: &Window, range: PageRange) -> Result<()> {
        let start = window.address + u64::from(range.first.0 - window.first.0) * PAGE_BYTES_U64;
        raw::protect(&self.descriptor, start, range.pages as usize * PAGE_BYTES)
            .map_err(|cause| failed(window, cause))
    }

    /// Lets every writer go, now and from now on.
    fn unregister(&self) -> Result<()> {
        super::unregister(&self.descriptor, self.windows.iter())
    }
}
