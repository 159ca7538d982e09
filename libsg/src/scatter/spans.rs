//! How memory is cut: into the groups that are swept together, the units that are installed at once, and
//! the ranges that an index server owns.

use crate::ids::Round;
use crate::limits::BATCH_PAGES;
use crate::page::{InstallUnit, PageIndex, PageRange};
use crate::wire::IndexEntry;
use crate::wire::placement::owner_runs;

/// A region as the sweep sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// Its pages.
    pub(super) pages: PageRange,
    /// What is installed at once.
    pub(super) unit: InstallUnit,
}

/// The pages that are swept together with `page`: 64, or a whole install unit.
pub(super) fn group(span: Span, page: PageIndex) -> PageRange {
    let pages = match span.unit {
        InstallUnit::Page => BATCH_PAGES as u32,
        unit @ InstallUnit::Huge2M => unit.pages(),
    };
    let first = page.0 - (page.0 - span.pages.first.0) % pages;
    let end = span.pages.first.0 + span.pages.pages;
    PageRange::new(PageIndex(first), pages.min(end - first))
}

/// The pages that are installed together with `page`.
pub(super) fn unit_of(span: Span, page: PageIndex) -> PageRange {
    let pages = span.unit.pages();
    PageRange::new(PageIndex(page.0 - (page.0 - span.pages.first.0) % pages), pages)
}

/// Cuts a run of zero pages where index ranges end, so that each piece has one owner.
pub fn zero_entries(range: PageRange, round: Round) -> impl Iterator<Item = IndexEntry> {
    owner_runs(range).map(move |run| IndexEntry::zero(run.first, run.pages, round))
}
