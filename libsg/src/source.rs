//! Where the source takes pages from: the seam between a VMM and scatter.
//!
//! [`PageSource`] is served by in-process memory ([`MemorySource`]) and by a stock VMM's outgoing
//! stream alike. The first can give any page at any time. The second gives each page when it comes,
//! holds it in a bounded store until it hears what became of it, and can be asked to hurry one page.
//!
//! What scatter does: it asks [`PageSource::presence`] once, sends absent pages as zeros, learns from
//! [`PageSource::available`] which others can be had, borrows their bytes by [`PageSource::slice`] in
//! whatever order it likes, as often as it likes, and at last says [`PageSource::outcome`] of each, many at a time: that it
//! is safe, and may be forgotten; and that it is lost again, where whoever had it dies before all are safe.

use parking_lot::Mutex;

use crate::error::Result;
use crate::memory::{GuestMemory, PageSlice, PresenceMap};
use crate::page::{PageIndex, PageRange};

/// Whether a page can be had again after its outcome was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Any page at any time: it is memory that stays where it is.
    Any,
    /// Only if the source is made to go through its recovery: a stock VMM sends a page again when
    /// its stream has broken.
    ByRecovery,
    /// Never.
    Never,
}

/// What became of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// They are safe elsewhere; the source may forget them.
    Safe,
    /// They were safe, and are so no more: whoever had them died. A source that forgot them gets them again, and names
    /// them as available once more.
    Lost,
}

/// Whether more pages will become available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// More will come: ask again.
    More,
    /// More will come, but none while the VM runs: a round ends with what there is.
    AfterPause,
    /// Every present page has been named.
    Complete,
}

/// Wakes who waits for something. It does not wait itself.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// Gives the pages of a VM that leaves. All methods are called from several threads.
pub trait PageSource: Send + Sync {
    /// Whether pages can be had again after [`Outcome::Safe`]: what is not [`Repeat::Any`] is told outcomes.
    fn repeat(&self) -> Repeat;

    /// Which pages have content, or will have had some when the source is through. All others are
    /// zero, now and later, and are never named by [`Self::available`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] when that cannot be found out.
    fn presence(&self) -> Result<PresenceMap>;

    /// Appends runs of pages whose bytes can be had from now on, each page once; and once more when they can be had again,
    /// lost or withdrawn. Does not wait.
    ///
    /// # Errors
    /// When the source is broken: no further pages will come.
    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply>;

    /// Of a VM that was sent in rounds and is paused now: appends runs of pages that were available and are so no more, as
    /// their bytes are out of date, until they are named once more. Each of them is one that the VM's log of writes names
    /// behind the pause. Asked once, between the two. A source that has all of its pages has none of these.
    fn withdrawn(&self, out: &mut Vec<PageRange>) {
        let _ = out;
    }

    /// Somebody waits for this page: the source makes it available as soon as it can. Nothing is to
    /// be done for one that is available.
    ///
    /// # Errors
    /// When the source is broken.
    fn want(&self, page: PageIndex) -> Result<()>;

    /// Is to call this from now on whenever pages that are wanted have become available: nobody would look for them so soon. A
    /// source of which pages can be had at any time has none of these.
    fn wake_for_wanted(&self, wake: Wake) {
        let _ = wake;
    }

    /// The bytes of available pages, from the first of `range` on: as many as lie together, at least
    /// one page, at most the range. They stay what they are until the outcome of the page is told
    /// (in-process memory: as long as the VM is paused).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] for a page that is not available.
    fn slice(&self, range: PageRange) -> Result<PageSlice>;

    /// Tells what became of pages: each that was available is safe some time, after which a source that holds copies drops
    /// them. It is asked for it no more, unless it is lost, and available again. Pages of 2 MiB are told of as a whole.
    ///
    /// A source of which pages can be had at any time is told nothing.
    fn outcome(&self, range: PageRange, outcome: Outcome);
}

/// Guest memory of this process as a source. The VM must not run while its pages are sent, unless
/// older rounds of them are to be replaced later.
#[derive(Debug)]
pub struct MemorySource {
    memory: GuestMemory,
    named: Mutex<bool>,
}

impl MemorySource {
    /// A source that gives all of `memory`.
    #[must_use]
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory, named: Mutex::new(false) }
    }

    /// The memory it gives.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

impl PageSource for MemorySource {
    fn repeat(&self) -> Repeat {
        Repeat::Any
    }

    fn presence(&self) -> Result<PresenceMap> {
        self.memory.presence()
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        let mut named = self.named.lock();
        if !*named {
            out.extend(self.memory.presence()?.runs());
            *named = true;
        }
        Ok(Supply::Complete)
    }

    fn want(&self, _page: PageIndex) -> Result<()> {
        Ok(())
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        // A run that leaves its region is cut there; a page that does not exist is an error.
        let run = self.memory.run(range.first, range.pages).unwrap_or(range);
        PageSlice::guest(&self.memory, run)
    }

    fn outcome(&self, _range: PageRange, _outcome: Outcome) {}
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::manifest::{Manifest, Region};
    use crate::memory::Backing;
    use crate::page::{InstallUnit, PAGE_BYTES};

    #[test]
    fn memory_names_each_present_page_once_and_cuts_at_regions() {
        let region = |name: &str| Region {
            name: name.into(),
            guest_address: None,
            length_bytes: 8 << 12,
            unit: InstallUnit::Page,
        };
        let manifest = Manifest {
            vm: "vm".into(),
            regions: vec![region("a"), region("b")],
            vm_config: Vec::new(),
            sharing: None,
        };
        let memory = GuestMemory::allocate(&manifest, Backing::Memfd).expect("memory");
        for page in [6, 7, 8, 12] {
            memory.copy_in(PageRange::new(PageIndex(page), 1), &[page as u8; PAGE_BYTES]).expect("written");
        }
        let source: Box<dyn PageSource> = Box::new(MemorySource::new(memory));
        let mut runs = Vec::new();
        assert_eq!(source.available(&mut runs).expect("told"), Supply::Complete);
        assert_eq!(runs, [PageRange::new(PageIndex(6), 3), PageRange::new(PageIndex(12), 1)]);
        assert_eq!(source.available(&mut runs).expect("told"), Supply::Complete);
        assert_eq!(runs.len(), 2);
        assert_eq!(source.slice(runs[0]).expect("available").len(), 2 * PAGE_BYTES);
        assert!(!source.slice(runs[1]).expect("available").is_zero_page(0));
        assert!(source.slice(PageRange::new(PageIndex(16), 1)).is_err());
        source.want(PageIndex(6)).expect("nothing to do");
        source.outcome(runs[0], Outcome::Safe);
        assert_eq!(source.repeat(), Repeat::Any);
    }
}
