//! Writes that the kernel notes: a write to a write-protected page takes the protection away, and
//! `PAGEMAP_SCAN` names the pages without it and protects them again, in one step.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use userfaultfd::Uffd as Descriptor;

use super::super::{Window, raw};
use super::{append, failed, is_private, open_failed, register_failed};
use crate::error::Result;
use crate::memory::{GuestMemory, Scan, ScannedRun, scan_pagemap};
use crate::page::{PAGE_BYTES_U64, PageIndex, PageRange};

/// Runs that one request may name.
const RUNS_AT_ONCE: usize = 1024;

/// One region.
struct Watched {
    window: Window,
    /// Private memory of small pages. All other is protected as a whole at the start, by marks where no page is,
    /// since the kernel may take pages of a file out of the page table, and would forget what was noted there.
    /// Private pages stay, and marks would look like pages in swap to whoever asks what is present.
    private: bool,
}

/// The log while it runs.
pub(super) struct Scanning {
    descriptor: Descriptor,
    pagemap: File,
    watched: Vec<Watched>,
    runs: Box<[ScannedRun]>,
    /// Keeps it mapped.
    _memory: GuestMemory,
}

impl Scanning {
    /// Starts it. `None`: the kernel cannot.
    pub(super) fn start(memory: &GuestMemory) -> Result<Option<Self>> {
        let descriptor = match raw::open(raw::NOTED_WRITERS) {
            Ok(descriptor) => descriptor,
            Err(cause) => return open_failed(cause).map_or(Ok(None), Err),
        };
        let watched = memory
            .regions()
            .iter()
            .map(|region| Watched { window: Window::of(region), private: is_private(region) });
        let mut scanning = Self {
            descriptor,
            pagemap: File::open("/proc/self/pagemap")?,
            watched: watched.collect(),
            runs: vec![ScannedRun::default(); RUNS_AT_ONCE].into(),
            _memory: memory.clone(),
        };
        if !scanning.has_request() {
            return Ok(None);
        }
        scanning.protect()?;
        Ok(Some(scanning))
    }

    /// Whether the request is there: some sandboxes do not pass it on.
    fn has_request(&mut self) -> bool {
        scan_pagemap(self.pagemap.as_fd(), Scan::PRESENT, 0, PAGE_BYTES_U64, &mut self.runs).is_ok()
    }

    /// Protects all of it, present or not.
    fn protect(&mut self) -> Result<()> {
        for Watched { window, .. } in &self.watched {
            raw::register_writes(&self.descriptor, window.address, window.bytes(), false)
                .map_err(|cause| register_failed(window, cause))?;
        }
        for Watched { window, private } in &self.watched {
            if *private {
                scan(&self.pagemap, window, *private, &mut self.runs, |_| {})
            } else {
                raw::protect(&self.descriptor, window.address, window.bytes())
            }
            .map_err(|cause| failed(window, cause))?;
        }
        Ok(())
    }

    /// See [`crate::dirty::DirtyLog::collect`].
    pub(super) fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        for Watched { window, private } in &self.watched {
            let since = out.len();
            scan(&self.pagemap, window, *private, &mut self.runs, |run| append(out, since, run))
                .map_err(|cause| failed(window, cause))?;
        }
        Ok(())
    }

    /// See [`crate::dirty::DirtyLog::stop`].
    pub(super) fn stop(self) -> Result<()> {
        super::unregister(&self.descriptor, self.watched.iter().map(|watched| &watched.window))
    }
}

/// Names the written pages of a region, and protects them.
fn scan(
    pagemap: &File,
    window: &Window,
    private: bool,
    runs: &mut [ScannedRun],
    mut name: impl FnMut(PageRange),
) -> io::Result<()> {
    let what = if private { Scan::WRITTEN_PRIVATE } else { Scan::WRITTEN };
    let page = |address: u64| ((address - window.address) / PAGE_BYTES_U64) as u32;
    let mut at = window.address;
    while at < window.end() {
        let (filled, looked) = scan_pagemap(pagemap.as_fd(), what, at, window.end(), runs)?;
        for run in &runs[..filled] {
            let (first, end) = (page(run.start), page(run.end));
            name(PageRange::new(PageIndex(window.first.0 + first), end - first));
        }
        // With room left it has come to the end. How far it looked, it says of the last part only that it could not
        // finish; what it named behind that is done all the same, and may have been written again since.
        at = match runs[..filled].last() {
            Some(last) if filled == runs.len() => looked.max(last.end),
            _ => window.end(),
        };
    }
    Ok(())
}
