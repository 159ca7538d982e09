//! What the source of pages is told of them, where it keeps none that is safe.
//!
//! A page is told as safe when nobody reads it any more: it is safe, and no batch in flight has it whose bytes were not
//! taken from the source yet. What was taken is kept by its slices. From then on the source is asked for it no more: faults
//! are answered by where it lies, and when that is lost it waits for the source, as one that never was there. Units of
//! several pages are told of as a whole.

use std::time::{Duration, Instant};

use super::{Cargo, FaultAnswer, Planner, unit_of};
use crate::page::{PageIndex, PageRange};
use crate::scatter::batch::Batch;
use crate::scatter::outcomes::Outcomes;
use crate::scatter::table::{PageState, Way};
use crate::wire::IndexEntry;

/// Where a page lies was said so long ago that who asks again has not found it there.
const DOUBT: Duration = Duration::from_millis(500);

/// Pages of which it is known that it was said where they lie.
const DOUBTS_MAX: usize = 64;

impl Planner {
    /// The source forgets what is safe, and is told.
    #[must_use]
    pub fn with_outcomes(mut self) -> Self {
        self.table.keep_outcomes();
        self
    }

    /// Everything is safe, and was said to be: what is lost now is lost for good.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// The bytes of a batch were taken from the source.
    pub fn loaded(&mut self, id: super::BatchId) {
        if let Some(flight) = self.in_flight.iter_mut().find(|flight| flight.id == id) {
            flight.loaded = true;
        }
    }

    /// The bytes of a batch for the destination were taken from the source. These of its pages turned out to be zero, and
    /// travel as that.
    pub fn sent_as_zero(&mut self, id: super::BatchId, pages: impl IntoIterator<Item = PageIndex>) {
        if let Some(flight) = self.in_flight.iter_mut().find(|flight| flight.id == id) {
            flight.loaded = true;
            for page in pages {
                if self.table.way(page) == Way::None {
                    self.table.set_way(page, Way::Zero);
                }
            }
        }
    }

    /// The bytes of pages that were to be offered were taken from the source.
    pub fn offers_loaded(&mut self) {
        self.offers_read = None;
    }

    /// What the source has to hear: runs of pages that are `lost`, which come first, and of pages that are `safe`. Each is
    /// news once.
    pub fn take_outcomes(&mut self, safe: &mut Vec<PageRange>, lost: &mut Vec<PageRange>) {
        safe.clear();
        lost.clear();
        // The books are out of the table meanwhile, so that both can be written.
        let Some(mut outcomes) = self.table.take_outcomes() else { return };
        while let Some(page) = outcomes.first_lost() {
            self.lose(&mut outcomes, page, lost);
        }
        self.set_busy(&mut outcomes, true);
        let mut from = PageIndex(0);
        while let Some(block) = outcomes.take_fresh(from) {
            from = PageIndex(block.first.0 + block.pages);
            self.tell(&mut outcomes, block, safe);
        }
        self.set_busy(&mut outcomes, false);
        self.table.put_outcomes(outcomes);
    }

    fn lose(&mut self, outcomes: &mut Outcomes, page: PageIndex, lost: &mut Vec<PageRange>) {
        let unit = self.unit(page);
        outcomes.forget_lost(unit);
        if unit.iter().all(|page| self.table.state(page).is_safe()) {
            // It was there after all, on its way to the destination.
            return outcomes.tell(unit);
        }
        for page in unit.iter() {
            let held = matches!(self.table.state(page), PageState::Installed | PageState::Waiting);
            if outcomes.is_told(page) && !held {
                self.table.set(page, PageState::Waiting);
            }
            outcomes.take_back(page);
        }
        add(lost, unit);
    }

    fn tell(&mut self, outcomes: &mut Outcomes, block: PageRange, safe: &mut Vec<PageRange>) {
        let end = block.first.0 + block.pages;
        let mut at = block.first.0;
        while at < end {
            let unit = self.unit(PageIndex(at));
            at = unit.first.0 + unit.pages;
            let news = |page: PageIndex| self.table.state(page).is_safe() && !outcomes.is_told(page);
            if !unit.iter().all(news) {
                continue;
            }
            if unit.iter().any(|page| outcomes.is_busy(page)) {
                outcomes.set_fresh(unit.first);
            } else {
                outcomes.tell(unit);
                add(safe, unit);
            }
        }
    }

    fn set_busy(&self, outcomes: &mut Outcomes, busy: bool) {
        let reads = self.in_flight.iter().filter(|flight| !flight.loaded);
        let batches = reads.filter_map(|flight| match flight.batch {
            Cargo::Pages(batch) => Some(batch),
            Cargo::Zeros(_) => None,
        });
        let mut set = |batch: Batch| batch.iter().for_each(|page| outcomes.set_busy(page, busy));
        batches.for_each(&mut set);
        self.offers_read.into_iter().for_each(set);
    }

    /// The pages that are told of together.
    fn unit(&self, page: PageIndex) -> PageRange {
        self.span(page).map_or(PageRange::new(page, 1), |span| unit_of(span, page))
    }

    /// A fault on a unit of pages that the source may have forgotten: where they lie. `None` where it has them.
    ///
    /// Who asks again for the same unit has found nothing there, or nothing that is right: it is had from the source again.
    pub(super) fn fault_elsewhere(&mut self, unit: PageRange, now: Instant) -> Option<FaultAnswer> {
        let state = self.table.state(unit.first);
        if state == PageState::Installed && self.table.keeps_outcomes() {
            // It has it: what it asked for crossed with that. Of a page of zeros there never was anything here.
            return Some(FaultAnswer::Unknown);
        }
        if !self.table.is_told(unit.first) {
            let is_over = self.closed && state == PageState::Waiting;
            return is_over.then_some(FaultAnswer::Unknown);
        }
        match state {
            // There is nothing that could be had again, and whoever asks finds where it lies.
            PageState::Staged | PageState::Stored if self.closed => Some(FaultAnswer::Unknown),
            PageState::Staged | PageState::Stored if self.is_in_doubt(unit.first, now) => {
                // An index has it where it lay until it is safe again, and who goes on where this process dies would count on
                // that: it is not given back.
                unit.iter().for_each(|page| {
                    self.table.displace(page);
                    self.unsend(page);
                });
                Some(FaultAnswer::NotYet)
            }
            PageState::Staged | PageState::Stored => Some(FaultAnswer::Elsewhere(unit)),
            _ => None,
        }
    }

    /// Whether a fault on a page is one too many: it was said before where it lies, and a while ago at that. Of a few pages
    /// it is known, and one of them is given up at a time: all of the stream waits for it.
    fn is_in_doubt(&mut self, page: PageIndex, now: Instant) -> bool {
        if let Some(at) = self.doubts.iter().position(|(of, _)| *of == page) {
            let is_old = now.saturating_duration_since(self.doubts[at].1) >= DOUBT;
            if is_old {
                self.doubts.remove(at);
            }
            return is_old;
        }
        if self.doubts.len() == DOUBTS_MAX {
            self.doubts.remove(0);
        }
        self.doubts.push((page, now));
        false
    }

    /// Where pages lie, as an index has it.
    pub fn entries(&self, range: PageRange) -> impl Iterator<Item = IndexEntry> + Clone {
        let pages = range.first.0..range.first.0.saturating_add(range.pages);
        pages.map(PageIndex).filter_map(|page| {
            let (placement, checksum) = self.table.placement(page)?;
            Some(IndexEntry::at(page, self.table.round(page), placement, checksum))
        })
    }
}

/// Appends pages to runs.
fn add(runs: &mut Vec<PageRange>, range: PageRange) {
    match runs.last_mut() {
        Some(run) if run.first.0 + run.pages == range.first.0 => run.pages += range.pages,
        _ => runs.push(range),
    }
}

#[cfg(test)]
#[path = "told_test.rs"]
mod test;
