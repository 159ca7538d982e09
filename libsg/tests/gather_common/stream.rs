//! A source of pages in the place of one that died.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsg::Result;
use libsg::manifest::Manifest;
use libsg::memory::{Backing, GuestMemory, PageSlice, PresenceMap};
use libsg::page::{PageIndex, PageRange};
use libsg::source::{Outcome, PageSource, Repeat, Supply};
use parking_lot::Mutex;

use super::content;

/// A source whose stream broke off: it gives what it was not told is safe, once it goes on.
pub struct Stream {
    pages: u32,
    pub memory: GuestMemory,
    /// What it was told before it went on.
    safe: Mutex<PresenceMap>,
    pub flows: AtomicBool,
    is_named: AtomicBool,
}

impl Stream {
    /// Of a VM's memory, but for what `is_zero`.
    pub fn new(manifest: &Manifest, is_zero: impl Fn(u32) -> bool) -> Arc<Self> {
        let memory = GuestMemory::allocate(manifest, Backing::Memfd).unwrap();
        for page in (0..manifest.pages()).filter(|page| !is_zero(*page)) {
            memory.copy_in(PageRange::new(PageIndex(page), 1), &content(page)).unwrap();
        }
        Arc::new(Self {
            pages: manifest.pages(),
            memory,
            safe: Mutex::new(PresenceMap::new(manifest.pages())),
            flows: AtomicBool::default(),
            is_named: AtomicBool::default(),
        })
    }

    pub fn safe(&self) -> Vec<PageRange> {
        self.safe.lock().runs().collect()
    }
}

impl PageSource for Stream {
    fn repeat(&self) -> Repeat {
        Repeat::ByRecovery
    }

    fn presence(&self) -> Result<PresenceMap> {
        let mut all = PresenceMap::new(self.pages);
        all.insert(PageRange::new(PageIndex(0), self.pages));
        Ok(all)
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        if !self.flows.load(Ordering::SeqCst) {
            return Ok(Supply::More);
        }
        if !self.is_named.swap(true, Ordering::SeqCst) {
            out.extend(self.safe.lock().absent_runs());
        }
        Ok(Supply::Complete)
    }

    fn want(&self, _page: PageIndex) -> Result<()> {
        Ok(())
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        PageSlice::guest(&self.memory, range)
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        assert_eq!(outcome, Outcome::Safe, "{range}");
        if !self.flows.load(Ordering::SeqCst) {
            self.safe.lock().insert(range);
        }
    }
}
