//! Which pages of this process's memory are written: [`DirtyLog`] without a hypervisor.
//!
//! Two ways, both by write-protecting pages in this process's page table. The kernel may note writers itself
//! ([`scan`], Linux 6.7), or tell us of each while it waits ([`handler`], Linux 5.7; 5.19 for shared and huge
//! pages). Either sees whoever writes through this mapping, in system calls as well, and vCPUs whose
//! hypervisor uses it; nobody who writes the same memory file through another mapping.

mod handler;
mod scan;

use std::io;

use self::handler::Handling;
use self::scan::Scanning;
use super::{Window, raw, refused};
use crate::dirty::DirtyLog;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestMemory, MemoryRegion};
use crate::page::PageRange;

/// How [`WriteLog`] gets to know of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteLogMethod {
    /// The kernel notes them in the page table, which is scanned (`PAGEMAP_SCAN`, Linux 6.7). The first write
    /// to a page after each `collect` costs one short fault.
    Scan,
    /// Each first write after a `collect` waits for a thread of ours (`sg-dirty`) that notes it. 1 bit a page.
    Handler,
}

/// The log of what is written to memory of this process: a [`DirtyLog`].
///
/// Huge pages are named whole. Of private memory, a page that was never there and is only read may be named as well.
/// Memory that is registered with another userfaultfd (its VM is still arriving) cannot be logged.
pub struct WriteLog {
    memory: GuestMemory,
    wanted: Option<WriteLogMethod>,
    running: Option<Running>,
}

enum Running {
    Scan(Scanning),
    Handler(Handling),
}

impl WriteLog {
    /// A log of this memory, by the best way that the kernel has.
    #[must_use]
    pub fn new(memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), wanted: None, running: None }
    }

    /// The same, by this way or not at all.
    #[must_use]
    pub fn by(memory: &GuestMemory, method: WriteLogMethod) -> Self {
        Self { wanted: Some(method), ..Self::new(memory) }
    }

    /// How it is done. `None` when it was not started.
    #[must_use]
    pub fn method(&self) -> Option<WriteLogMethod> {
        self.running.as_ref().map(|running| match running {
            Running::Scan(_) => WriteLogMethod::Scan,
            Running::Handler(_) => WriteLogMethod::Handler,
        })
    }

    fn begin(&self) -> Result<Running> {
        if self.wanted != Some(WriteLogMethod::Handler) {
            if let Some(scanning) = Scanning::start(&self.memory)? {
                return Ok(Running::Scan(scanning));
            }
            if self.wanted.is_some() {
                let why = "this kernel does not note which pages are written: Linux 6.7 does";
                return Err(Error::new(ErrorKind::System, why));
            }
            tracing::info!(
                "this kernel does not note which pages are written (Linux 6.7 does): writers wait"
            );
        }
        Handling::start(&self.memory).map(Running::Handler)
    }
}

impl DirtyLog for WriteLog {
    fn start(&mut self) -> Result<()> {
        if self.running.is_none() {
            self.running = Some(self.begin()?);
        }
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        match &mut self.running {
            Some(Running::Scan(scanning)) => scanning.collect(out),
            Some(Running::Handler(handling)) => handling.collect(out),
            None => Err(Error::new(ErrorKind::Input, "the log of written pages was not started")),
        }
    }

    fn stop(&mut self) -> Result<()> {
        match self.running.take() {
            Some(Running::Scan(scanning)) => scanning.stop(),
            Some(Running::Handler(handling)) => handling.stop(),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteLog").field("method", &self.method()).finish_non_exhaustive()
    }
}

/// Private memory of small pages, which the kernel treats in its own way.
fn is_private(region: &MemoryRegion) -> bool {
    region.mapping().file().is_none() && !region.mapping().is_huge()
}

/// Takes the protection away everywhere, whatever fails.
fn unregister<'w>(descriptor: &userfaultfd::Uffd, windows: impl Iterator<Item = &'w Window>) -> Result<()> {
    let mut result = Ok(());
    for window in windows {
        let done = raw::unregister(descriptor, window.address, window.bytes());
        result = result.and(done.map_err(|cause| failed(window, cause)));
    }
    result
}

/// Appends a run, joined with the last one of the same collection (from `since` on) where it continues that.
fn append(out: &mut Vec<PageRange>, since: usize, run: PageRange) {
    match out[since..].last_mut() {
        Some(last) if last.first.0 + last.pages == run.first.0 => last.pages += run.pages,
        _ => out.push(run),
    }
}

/// What opening failed with; `None` when the kernel does not know the features.
fn open_failed(cause: io::Error) -> Option<Error> {
    (cause.raw_os_error() != Some(libc::EINVAL)).then(|| refused(cause))
}

fn register_failed(window: &Window, cause: io::Error) -> Error {
    let message = match cause.raw_os_error() {
        Some(libc::EBUSY) => {
            "the VM's memory is still arriving: what it writes can be logged once it is there"
        }
        _ => "what is written to the VM's memory cannot be logged",
    };
    Error::new(ErrorKind::System, message).because(cause).about([PageRange::new(window.first, window.pages)])
}

fn failed(window: &Window, cause: io::Error) -> Error {
    Error::new(ErrorKind::System, "the log of written pages failed")
        .because(cause)
        .about([PageRange::new(window.first, window.pages)])
}

#[cfg(test)]
mod test;
