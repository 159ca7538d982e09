//! Pages of which nobody knows where they are: what to ask for, of whom, and what is lost.

use super::{SEARCH_PAGES_MAX, Tracker};
use crate::gather::books::{Kind, State};
use crate::page::{PageIndex, PageRange};

/// Ranges of lost pages that a report names.
const LOST_RANGES_MAX: usize = 64 << 10;

impl Tracker {
    /// The next run of pages from `from` on of which nobody knows where they are and of which the
    /// index was not asked, of at most `pages_max`. `Err` says how far it looked without finding any.
    ///
    /// # Errors
    /// Where to look on; the number of pages when that was all.
    pub fn next_unknown(&self, from: PageIndex, pages_max: u32) -> Result<PageRange, PageIndex> {
        let end = self.states.len().min(from.as_usize() + SEARCH_PAGES_MAX);
        let open = |page: usize| {
            matches!(self.kind(page), Kind::Missing | Kind::Suspect)
                && !self.states[page].is_installing()
                && !self.states[page].no_index()
        };
        let Some(first) = (from.as_usize()..end).find(|page| open(*page)) else {
            return Err(PageIndex(end as u32));
        };
        let last = (first + pages_max as usize).min(self.states.len());
        let pages = (first..last).take_while(|page| open(*page)).count();
        Ok(PageRange::new(PageIndex(first as u32), pages as u32))
    }

    /// Every index that could know was asked for these pages: what is not known now is in none.
    pub fn not_indexed(&mut self, range: PageRange) {
        self.change(range, |state| state.set_no_index(true));
    }

    /// The source says that it has the page no more.
    pub fn source_has_not(&mut self, page: PageIndex) {
        if let Some(unit) = self.unit(page) {
            self.change(unit, |state| state.set_no_source(true));
        }
    }

    /// What was not known is asked for again, of the indices and, where `source` says so, of the source:
    /// something may have changed.
    pub fn ask_again(&mut self, source: bool) {
        for state in &mut self.states {
            state.set_no_index(false);
            if source {
                state.set_no_source(false);
            }
        }
    }

    /// Appends pages that only the source could still have: no index knows them, and it was not asked,
    /// or not answered. From `from` on, at most `units_max` units; returns where to go on.
    pub fn only_source(&self, from: PageIndex, units_max: usize, out: &mut Vec<PageIndex>) -> PageIndex {
        let end = self.states.len().min(from.as_usize() + SEARCH_PAGES_MAX);
        let mut page = from.as_usize();
        while page < end && out.len() < units_max {
            let state = self.states[page];
            let open = matches!(self.kind(page), Kind::Missing | Kind::Suspect) && !state.is_installing();
            if open
                && state.no_index()
                && !state.no_source()
                && let Some(unit) = self.unit(PageIndex(page as u32))
            {
                out.push(unit.first);
                page = unit.positions().end;
            } else {
                page += 1;
            }
        }
        PageIndex(page as u32)
    }

    /// The pages from `from` on that no way leads to any more: no index knows them, and the source
    /// has them not, or is away for good. They are lost, by whole units, and whoever asked poisons them and
    /// says so ([`Self::poisoned`]). Returns where to go on.
    pub fn lose(&mut self, from: PageIndex, source_away: bool, out: &mut Vec<PageIndex>) -> PageIndex {
        let end = self.states.len().min(from.as_usize() + SEARCH_PAGES_MAX);
        let mut page = from.as_usize();
        while page < end {
            let state = self.states[page];
            let unknown = matches!(self.kind(page), Kind::Missing | Kind::Suspect) && !state.is_installing();
            let hopeless = unknown && state.no_index() && (source_away || state.no_source());
            let Some(unit) = self.unit(PageIndex(page as u32)).filter(|_| hopeless) else {
                page += 1;
                continue;
            };
            self.change(unit, State::lose);
            self.unpoisoned += u64::from(unit.pages);
            self.waiting.forget(unit);
            out.extend(unit.iter());
            page = unit.positions().end;
        }
        PageIndex(page as u32)
    }

    /// Lost pages were poisoned: nobody takes them for zero ones any more.
    pub fn poisoned(&mut self, pages: u64) {
        self.unpoisoned = self.unpoisoned.saturating_sub(pages);
    }

    /// Appends the ranges that are lost, the first 65536 of them.
    pub fn lost_ranges(&self, out: &mut Vec<PageRange>) {
        let lost = |page: usize| self.states[page].kind() == Kind::Lost;
        let mut page = 0;
        while page < self.states.len() && out.len() < LOST_RANGES_MAX {
            let run = (page..self.states.len()).take_while(|page| lost(*page)).count();
            if run > 0 {
                out.push(PageRange::new(PageIndex(page as u32), run as u32));
            }
            page += run.max(1);
        }
    }

    /// Appends the ranges that are held, from `from` on, at most `ranges_max`; returns where to go on, and
    /// the number of pages at the end.
    pub fn holdings(&self, from: PageIndex, ranges_max: usize, out: &mut Vec<PageRange>) -> PageIndex {
        let held = |page: usize| match self.states[page].kind() {
            Kind::Installed | Kind::Removed => true,
            Kind::Zero => !self.outlived,
            _ => false,
        };
        let mut page = from.as_usize();
        let end = self.states.len().min(page + SEARCH_PAGES_MAX);
        while page < end && out.len() < ranges_max {
            let run = (page..end).take_while(|page| held(*page)).count();
            if run > 0 {
                out.push(PageRange::new(PageIndex(page as u32), run as u32));
            }
            page += run;
            page += (page..end).take_while(|page| !held(*page)).count();
        }
        PageIndex(page as u32)
    }
}
