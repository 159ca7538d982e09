//! Where the destination puts pages: the seam between gather and a VMM.
//!
//! [`PageSink`] is served by in-process memory under userfaultfd, by a userfaultfd that another
//! process handed over (both [`crate::uffd::Uffd`]), and by a stock VMM's incoming stream, which
//! takes each page once and says only later that it has it.

use std::os::fd::BorrowedFd;

use crate::error::{Error, ErrorKind, Result};
use crate::limits::BATCH_PAGES_MAX;
use crate::page::{PageIndex, PageRange};

/// What the VM, or whoever runs it, tells gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkEvent {
    /// The guest waits for a page (for the first page of its install unit).
    Fault {
        /// The page.
        page: PageIndex,
        /// Whether it is to be written.
        write: bool,
        /// The thread that waits, where the kernel tells; zero otherwise.
        thread: u32,
    },
    /// The guest gave these pages up (balloon, `MADV_DONTNEED`): a fault on one of them is to be
    /// answered with zero from now on, whatever it held.
    Removed(PageRange),
    /// Pages that were handed over earlier ([`InstallOutcome::handed_over`]) are in place now.
    Installed(PageRange),
}

/// What an installation did, page by page. At most [`BATCH_PAGES_MAX`] pages, no heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct InstallOutcome {
    range: PageRange,
    handled: u32,
    pending: bool,
    installed: [u64; BATCH_PAGES_MAX / 64],
}

impl InstallOutcome {
    /// Of nothing done yet.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for no pages, or more than [`BATCH_PAGES_MAX`].
    pub fn new(range: PageRange) -> Result<Self> {
        if range.pages == 0 || range.pages as usize > BATCH_PAGES_MAX {
            return Err(Error::new(
                ErrorKind::Input,
                format!("{} pages are not 1 to {BATCH_PAGES_MAX}", range.pages),
            )
            .about([range]));
        }
        Ok(Self { range, handled: 0, pending: false, installed: [0; BATCH_PAGES_MAX / 64] })
    }

    /// Of a sink that took all pages and will say [`SinkEvent::Installed`] later.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn handed_over(range: PageRange) -> Result<Self> {
        Ok(Self { handled: range.pages, pending: true, ..Self::new(range)? })
    }

    /// The next `pages` pages were installed by this call.
    pub fn add_installed(&mut self, pages: u32) {
        for page in self.handled..(self.handled + pages).min(self.range.pages) {
            self.installed[page as usize / 64] |= 1 << (page % 64);
        }
        self.add_present(pages);
    }

    /// The next `pages` pages were there already, and were left as they are.
    pub fn add_present(&mut self, pages: u32) {
        self.handled = (self.handled + pages).min(self.range.pages);
    }

    /// The pages it is about.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// Whether the pages were only handed over: [`SinkEvent::Installed`] comes later.
    #[must_use]
    pub const fn is_pending(&self) -> bool {
        self.pending
    }

    /// The pages with which nothing could be done now: read the events, which something waits for,
    /// then try again. `None` when every page was dealt with.
    #[must_use]
    pub fn retry(&self) -> Option<PageRange> {
        let left = self.range.pages - self.handled;
        (left > 0).then(|| PageRange::new(PageIndex(self.range.first.0 + self.handled), left))
    }

    /// How many pages this call installed.
    #[must_use]
    pub fn installed_pages(&self) -> u32 {
        self.installed.iter().map(|word| word.count_ones()).sum()
    }

    /// The runs that this call installed.
    pub fn installed(&self) -> impl Iterator<Item = PageRange> {
        self.runs(true)
    }

    /// The runs that were there already.
    pub fn already_present(&self) -> impl Iterator<Item = PageRange> {
        self.runs(false)
    }

    fn runs(&self, installed: bool) -> impl Iterator<Item = PageRange> {
        let handled = if self.pending { 0 } else { self.handled };
        let is = move |page: u32| (self.installed[page as usize / 64] >> (page % 64) & 1 != 0) == installed;
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..handled).find(|page| is(*page))?;
            let end = (start..handled).find(|page| !is(*page)).unwrap_or(handled);
            at = end;
            Some(PageRange::new(PageIndex(self.range.first.0 + start), end - start))
        })
    }
}

/// Takes the pages of a VM that arrives. All methods are called from several threads.
///
/// Ranges are of at most [`BATCH_PAGES_MAX`] pages and consist of whole install units. A page is
/// installed once: what comes second is reported as already present, and changes nothing. Only while the VM runs at its
/// source (pre-copy, hybrid) it is then overwritten, or taken out again, by other calls.
pub trait PageSink: Send + Sync {
    /// Installs pages, and wakes who waits for them. `bytes` are theirs, one after the other.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for pages that there are not, or half a unit; [`ErrorKind::System`] when
    /// the memory is gone (its VMM ended).
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome>;

    /// Installs pages of zeros, and wakes who waits for them.
    ///
    /// # Errors
    /// As [`Self::install`].
    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome>;

    /// Whether pages that are in place can be overwritten ([`Self::replace`]) and taken out again ([`Self::withdraw`]):
    /// what pre-copy needs, and hybrid to install pages before the VM is paused.
    fn can_replace(&self) -> bool {
        false
    }

    /// Overwrites pages that are in place with those of a newer round, before the VM runs. Nobody else is at these
    /// pages meanwhile. `bytes` are theirs, one after the other.
    ///
    /// # Errors
    /// As [`Self::install`]; [`ErrorKind::Input`] from a sink that takes each page once, as this default does.
    fn replace(&self, first: PageIndex, bytes: &[u8]) -> Result<()> {
        let range = PageRange::new(first, (bytes.len() / crate::page::PAGE_BYTES) as u32);
        Err(Error::new(ErrorKind::Input, "this VM's memory takes each page once").about([range]))
    }

    /// Takes pages that are in place out again: they are missing, as if they had never come, and nobody is told that they
    /// were given up. Only before the VM loads its state, and while nobody else is at any page.
    ///
    /// # Errors
    /// As [`Self::replace`].
    fn withdraw(&self, runs: &[PageRange]) -> Result<()> {
        Err(Error::new(ErrorKind::Input, "this VM's memory takes each page once").about(runs.iter().copied()))
    }

    /// The pages are lost for good: who waits for one of them, or touches one later, gets an error
    /// (`SIGBUS`, `KVM_RUN` failing) instead of waiting for ever. Pages that are there are left alone.
    ///
    /// # Errors
    /// As [`Self::install`]; also [`ErrorKind::System`] where that is not possible: then the VM is
    /// best ended.
    fn poison(&self, range: PageRange) -> Result<()>;

    /// Appends what has happened since the last call, and says how many events that were. Does not
    /// wait.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the VM is gone.
    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize>;

    /// Says which pages are in place already, before any is installed: of a VM that runs, with which another process began. Whole
    /// install units.
    fn in_place(&self, each: &mut dyn FnMut(PageRange)) {
        let _ = each;
    }

    /// What to `poll` for reading before [`Self::events`]. `None`: there never are any.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Every page is in place: lets the VM's memory be ordinary memory. What was never installed
    /// reads as zero from now on.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses.
    fn finish(&self) -> Result<()>;
}

#[cfg(test)]
mod test {
    use super::*;

    fn range(first: u32, pages: u32) -> PageRange {
        PageRange::new(PageIndex(first), pages)
    }

    #[test]
    fn outcome_tells_runs_apart() {
        let mut outcome = InstallOutcome::new(range(100, 512)).expect("fits");
        outcome.add_installed(70);
        outcome.add_present(3);
        outcome.add_installed(1);
        assert_eq!(outcome.installed().collect::<Vec<_>>(), [range(100, 70), range(173, 1)]);
        assert_eq!(outcome.already_present().collect::<Vec<_>>(), [range(170, 3)]);
        assert_eq!(outcome.installed_pages(), 71);
        assert_eq!(outcome.retry(), Some(range(174, 438)));
        outcome.add_installed(438);
        assert_eq!(outcome.retry(), None);
    }

    #[test]
    fn outcome_bounds() {
        assert!(InstallOutcome::new(range(0, 0)).is_err());
        assert!(InstallOutcome::new(range(0, 513)).is_err());
        let later = InstallOutcome::handed_over(range(7, 9)).expect("fits");
        assert!(later.is_pending() && later.retry().is_none() && later.already_present().next().is_none());
    }
}
