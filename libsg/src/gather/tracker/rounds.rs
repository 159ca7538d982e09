//! Before the VM runs here: newer rounds over older ones, the final set, which says which copies count, and what is taken
//! out again because it came too early.

use super::{SEARCH_PAGES_MAX, Tracker};
use crate::error::{Error, ErrorKind, Result};
use crate::gather::books::{Kind, State};
use crate::ids::{Placement, Round};
use crate::limits::BATCH_PAGES_MAX;
use crate::page::{PageIndex, PageRange};

/// What is kept while pages are installed of which nobody knows yet whether they are the last.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// A bit for each page that is in place, in whatever round. `None`: pages are not installed early.
    placed: Option<Box<[u64]>>,
    /// Nobody may begin to install.
    stopped: bool,
    withdrawn: u64,
}

impl Early {
    pub(super) fn allocated_bytes(&self) -> usize {
        self.placed.as_ref().map_or(0, |words| size_of_val(&**words))
    }

    /// Pages are in place.
    pub(super) fn note(&mut self, range: PageRange) {
        let Some(placed) = &mut self.placed else { return };
        for page in range.positions() {
            placed[page / 64] |= 1 << (page % 64);
        }
    }
}

impl Tracker {
    /// Whether a newer round replaces what is installed: as long as the VM is sent in rounds and does not run here.
    pub fn set_replaces(&mut self, replaces: bool) {
        self.replaces = replaces;
    }

    /// As [`Self::set_replaces`], until [`Self::settle`]: the VM will run before all is here. Which pages are in place is
    /// noted, so that those that are then out of date can be taken out.
    pub fn install_early(&mut self) {
        self.replaces = true;
        self.early.placed = Some(vec![0; self.states.len().div_ceil(64)].into_boxed_slice());
    }

    /// From now on nobody begins to install, until [`Self::settle`]. Whether nobody is at it any more either.
    pub fn stop_installing(&mut self) -> bool {
        self.early.stopped = true;
        self.is_still()
    }

    /// Whether installing was stopped: what cannot be claimed need not be held then.
    #[must_use]
    pub const fn is_stopped(&self) -> bool {
        self.early.stopped
    }

    /// Whether installing was stopped, and nobody is at it any more.
    #[must_use]
    pub const fn is_still(&self) -> bool {
        self.early.stopped && self.installing == 0
    }

    /// Appends runs of pages that are in place and are not what they have to be, from `from` on, at most `runs_max`;
    /// returns where to go on, and the number of pages at the end. Whoever asks takes them out. Each run is of whole
    /// units, lies in one region and is of at most 512 pages. Behind [`Self::stop_installing`] only.
    pub fn withdraw(&mut self, from: PageIndex, runs_max: usize, out: &mut Vec<PageRange>) -> PageIndex {
        let Some(mut placed) = self.early.placed.take() else { return PageIndex(self.states.len() as u32) };
        let end = self.states.len().min(from.as_usize() + SEARCH_PAGES_MAX);
        let mut page = from.as_usize();
        while page < end && out.len() < runs_max {
            let rest = placed[page / 64] >> (page % 64);
            if rest == 0 {
                page = (page / 64 + 1) * 64;
                continue;
            }
            page += rest.trailing_zeros() as usize;
            let Some(unit) = self.unit(PageIndex(page as u32)) else { break };
            if unit.positions().any(|page| self.states[page].kind() != Kind::Installed) {
                unit.positions().for_each(|page| placed[page / 64] &= !(1 << (page % 64)));
                self.early.withdrawn += u64::from(unit.pages);
                self.append(unit, out);
            }
            page = unit.positions().end;
        }
        self.early.placed = Some(placed);
        PageIndex(page.min(self.states.len()) as u32)
    }

    /// Appends a unit to ascending runs that can be handed to a sink.
    fn append(&self, unit: PageRange, runs: &mut Vec<PageRange>) {
        match runs.last_mut() {
            Some(run)
                if run.first.0 + run.pages == unit.first.0
                    && (run.pages + unit.pages) as usize <= BATCH_PAGES_MAX
                    && self.same_region(run.first, unit.first) =>
            {
                run.pages += unit.pages;
            }
            _ => runs.push(unit),
        }
    }

    /// What is in place is what it has to be, and is not replaced from now on. Copies that did not match are tried again:
    /// one that was torn in a round is of a page that the final set names, and of any other it now is a loss.
    pub fn settle(&mut self) {
        self.early.placed = None;
        self.early.stopped = false;
        self.replaces = false;
        self.bad.clear();
        let mut page = 0;
        while self.kinds[Kind::Suspect as usize] > 0 && page < self.states.len() {
            let is_named = Placement::from_bits(self.placements[page]).is_some();
            if self.states[page].kind() == Kind::Suspect && is_named {
                self.change(PageRange::new(PageIndex(page as u32), 1), |state: &mut State| {
                    state.learn(Kind::Announced);
                });
            }
            page += 1;
        }
    }

    /// Pages that were taken out again.
    #[must_use]
    pub const fn withdrawn(&self) -> u64 {
        self.early.withdrawn
    }

    /// Of these pages, only copies of `round` or of a later one count, whoever has them: what is known of older ones
    /// is forgotten, and what is said of them later is not listened to. Whole units are required.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for pages that there are not.
    pub fn require(&mut self, range: PageRange, round: Round) -> Result<()> {
        if range.positions().end > self.states.len() {
            let message = format!("pages {range} of the final set are outside of the volume");
            return Err(Error::new(ErrorKind::Protocol, message));
        }
        for page in range.iter() {
            let Some(unit) = self.unit(page) else { continue };
            for page in unit.positions() {
                if self.rounds[page] < round.0 {
                    self.tally(page, false);
                    // Whoever installs an older one just now finds it suspect when he is through.
                    let to = if self.states[page].is_installing() { Kind::Suspect } else { Kind::Missing };
                    self.states[page].forget(to);
                    self.rounds[page] = round.0;
                    self.tally(page, true);
                }
            }
        }
        Ok(())
    }
}
