//! A test canary: whoever handles the n-th page at this end panics, as a worker with a fault in it would.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libsg::Result;
use libsg::memory::{PageSlice, PresenceMap};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::source::{Outcome, PageSource, Repeat, Supply};

/// Counts the pages that are handled at this end.
#[derive(Debug)]
pub struct PanicAt {
    page: u64,
    handled: AtomicU64,
}

impl PanicAt {
    /// Whoever handles the n-th page, counted from one, panics; the others go on.
    #[must_use]
    pub const fn page(page: u64) -> Self {
        Self { page, handled: AtomicU64::new(0) }
    }

    fn count(&self, pages: usize) {
        let before = self.handled.fetch_add(pages as u64, Ordering::Relaxed);
        let is_mine = before < self.page && self.page <= before + pages as u64;
        assert!(!is_mine, "test canary: page {} was to be handled here", self.page);
    }
}

/// A source or a sink of pages under the canary.
#[derive(Debug)]
pub struct Panicking<P: ?Sized>(pub Arc<P>, pub Arc<PanicAt>);

impl PageSource for Panicking<dyn PageSource> {
    fn repeat(&self) -> Repeat {
        self.0.repeat()
    }

    fn presence(&self) -> Result<PresenceMap> {
        self.0.presence()
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        self.0.available(out)
    }

    fn want(&self, page: PageIndex) -> Result<()> {
        self.0.want(page)
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let slice = self.0.slice(range)?;
        self.1.count(slice.len() / PAGE_BYTES);
        Ok(slice)
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        self.0.outcome(range, outcome);
    }
}

impl PageSink for Panicking<dyn PageSink> {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome> {
        self.1.count(bytes.len() / PAGE_BYTES);
        self.0.install(first, bytes)
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        self.1.count(range.pages as usize);
        self.0.install_zero(range)
    }

    fn can_replace(&self) -> bool {
        self.0.can_replace()
    }

    fn replace(&self, first: PageIndex, bytes: &[u8]) -> Result<()> {
        self.1.count(bytes.len() / PAGE_BYTES);
        self.0.replace(first, bytes)
    }

    fn withdraw(&self, runs: &[PageRange]) -> Result<()> {
        self.0.withdraw(runs)
    }

    fn poison(&self, range: PageRange) -> Result<()> {
        self.0.poison(range)
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize> {
        self.0.events(out)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.event_fd()
    }

    fn finish(&self) -> Result<()> {
        self.0.finish()
    }
}
