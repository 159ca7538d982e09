//! Which pages go where next: the pure core of scatter.
//!
//! Scatter is a pull. Every sink that has room asks [`Planner::next`] for its next batch, so a slow
//! intermediary takes less and stalls nobody, and bandwidth adds up. The planner sweeps the memory in
//! order; pages that come back (a node died, had no room, or lost a checksum) are swept again. When
//! nothing is left to sweep, batches that are older than a few acknowledgement times go to whoever
//! asks as well: the first acknowledgement wins.
//!
//! No socket, thread, clock or lock in here: events and time come in, work comes out.

mod losses;
mod offers;
mod resumed;
mod rounds;
mod told;

use std::time::{Duration, Instant};

use self::offers::Offers;
use super::batch::Batch;
use super::spans::{Span, group, unit_of};
use super::table::{Loser, PageState, PageTable, Place, Way};
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement, Round};
use crate::manifest::Manifest;
use crate::page::{InstallUnit, PageIndex, PageRange};
use crate::wire::IndexEntry;

/// Pages of zeros told in one go: what one entry of a page frame can say.
const ZERO_RUN_PAGES_MAX: u32 = u16::MAX as u32 & !511;

/// Who takes batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sink {
    /// The destination.
    Direct,
    /// The destination, for pages that the guest waits for.
    Urgent,
    /// An intermediary.
    Member(MemberIndex),
}

/// Names a batch in flight. Never used twice in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchId(u64);

/// What a sink is given to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Send these pages.
    Pages(BatchId, Batch),
    /// These pages are zero: tell the index (or, directly, the destination).
    Zeros(BatchId, PageRange),
}

/// How a fault is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// Send these pages (one, or a whole install unit), and acknowledge the batch.
    Send(BatchId, PageRange),
    /// The pages are zero: say so; nothing is to be read. Acknowledge the batch.
    Zero(BatchId, PageRange),
    /// They are safe, and the source may have forgotten them: [`Planner::entries`] says where they lie.
    Elsewhere(PageRange),
    /// The source has not got it yet.
    NotYet,
    /// There is no such page, or none any more.
    Unknown,
}

/// Pages by what became of them, for progress and report. Distinct pages, each by the way it last left, but for the
/// last two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Installed by the destination as it came from the source.
    pub direct: u64,
    /// Stored at intermediaries.
    pub staged: u64,
    /// Held by intermediaries already, and not sent.
    pub referenced: u64,
    /// Present and zero.
    pub zero: u64,
    /// Sent a second way because the first was late.
    pub hedged: u64,
    /// Sent again because a node or connection was lost, or had no room.
    pub resent: u64,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    id: BatchId,
    sink: Sink,
    batch: Cargo,
    since: Instant,
    hedges: u8,
    /// The source is asked no more for it.
    loaded: bool,
}

#[derive(Clone, Copy, Debug)]
enum Cargo {
    Pages(Batch),
    Zeros(PageRange),
}

impl Cargo {
    fn contains(&self, page: PageIndex) -> bool {
        match self {
            Self::Pages(batch) => batch.contains(page),
            Self::Zeros(range) => range.positions().contains(&page.as_usize()),
        }
    }
}

/// The planner: the state of every page and of every batch in flight.
#[derive(Debug)]
pub struct Planner {
    table: PageTable,
    spans: Vec<Span>,
    in_flight: Vec<InFlight>,
    cursor: PageIndex,
    /// The group of the last fault: direct goes on there, since guests touch neighbours.
    near_fault: Option<PageIndex>,
    next_id: u64,
    hedged: u64,
    resent: u64,
    absent_pages: u32,
    round: Round,
    /// While pages are offered before they are sent.
    offers: Option<Offers>,
    /// Pages that are being read to be offered.
    offers_read: Option<Batch>,
    /// All is safe, and was said to be.
    closed: bool,
    /// Pages of which it was said where they lie, and when.
    doubts: Vec<(PageIndex, Instant)>,
}

impl Planner {
    /// A planner for a volume, with every page still waiting for its source.
    #[must_use]
    pub fn new(manifest: &Manifest, with_members: bool) -> Self {
        let spans = manifest.placed_regions().map(|(first, region)| Span {
            pages: PageRange::new(first, (region.length_bytes / crate::page::PAGE_BYTES_U64) as u32),
            unit: region.unit,
        });
        Self {
            table: PageTable::new(manifest.pages(), with_members),
            spans: spans.collect(),
            in_flight: Vec::with_capacity(256),
            cursor: PageIndex(0),
            near_fault: None,
            next_id: 1,
            hedged: 0,
            resent: 0,
            absent_pages: 0,
            round: Round(0),
            offers: None,
            offers_read: None,
            closed: false,
            doubts: Vec::new(),
        }
    }

    /// These pages can be sent from now on.
    pub fn available(&mut self, range: PageRange) {
        self.enter(range, PageState::Unsent);
    }

    /// These pages are zero and have no memory at the source.
    pub fn absent(&mut self, range: PageRange) {
        self.enter(range, PageState::Absent);
        self.absent_pages += range.pages;
    }

    fn enter(&mut self, range: PageRange, state: PageState) {
        for page in range.iter() {
            if self.table.state(page) == PageState::Waiting {
                self.table.set(page, state);
            }
        }
        self.cursor = self.cursor.min(range.first);
    }

    /// The next work for a sink that has room. `hedge_after` is how long a batch may be in flight
    /// before it is given to another sink too, once there is nothing else to do.
    pub fn next(&mut self, sink: Sink, now: Instant, hedge_after: Duration) -> Option<Work> {
        if matches!(sink, Sink::Member(_)) && self.offers.is_some() {
            if let Some(work) = self.sweep_ready(sink, now) {
                return Some(work);
            }
            if self.waits_for_offers(now) {
                return None;
            }
        }
        if sink == Sink::Direct
            && let Some(near) = self.near_fault.take()
            && let Some(work) = self.sweep_group(sink, near, now)
        {
            self.near_fault = Some(near);
            return Some(work);
        }
        if let Some(page) = self.table.next_to_send(self.cursor) {
            self.cursor = page;
            if let Some(work) = self.sweep_group(sink, page, now) {
                return Some(work);
            }
        } else {
            self.cursor = PageIndex(self.table.pages());
        }
        #[cfg(feature = "simulation")]
        if crate::host::has_bug(crate::host::Bug::LateNotHedged) {
            return None;
        }
        self.hedge(sink, now, hedge_after)
    }

    /// Work from the group that `page` lies in.
    fn sweep_group(&mut self, sink: Sink, page: PageIndex, now: Instant) -> Option<Work> {
        let span = self.span(page)?;
        if self.table.state(page) == PageState::Absent {
            let left = span.pages.first.0 + span.pages.pages - page.0;
            let run = self.table.run(page, PageState::Absent, left.min(ZERO_RUN_PAGES_MAX));
            self.send(run.iter(), PageState::ZeroTold);
            return Some(Work::Zeros(self.launch(sink, Cargo::Zeros(run), now), run));
        }
        let batch = self.unsent_in(group(span, page), span.unit);
        if batch.is_empty() {
            return None;
        }
        self.send(batch.iter(), PageState::Sending);
        Some(Work::Pages(self.launch(sink, Cargo::Pages(batch), now), batch))
    }

    fn send(&mut self, pages: impl Iterator<Item = PageIndex>, state: PageState) {
        for page in pages {
            self.table.set(page, state);
            self.table.set_round(page, self.round);
        }
    }

    fn unsent_in(&self, group: PageRange, unit: InstallUnit) -> Batch {
        let mut batch = Batch::empty(group.first);
        for page in group.iter() {
            if self.table.state(page) == PageState::Unsent {
                batch.insert(page);
            }
        }
        // A unit of several pages goes out whole, by one path.
        if unit != InstallUnit::Page && !batch.is_empty() {
            group.iter().for_each(|page| batch.insert(page));
        }
        batch
    }

    fn launch(&mut self, sink: Sink, batch: Cargo, since: Instant) -> BatchId {
        let id = BatchId(self.next_id);
        self.next_id += 1;
        self.in_flight.push(InFlight { id, sink, batch, since, hedges: 0, loaded: false });
        id
    }

    /// The guest waits for a page that it asked of the source. Whatever became of it, the source
    /// that still has it gives it: that is the shortest way.
    pub fn fault(&mut self, page: PageIndex, now: Instant) -> FaultAnswer {
        let Some(span) = self.span(page) else { return FaultAnswer::Unknown };
        let unit = unit_of(span, page);
        self.near_fault = Some(group(span, page).first);
        if let Some(answer) = self.fault_elsewhere(unit, now) {
            return answer;
        }
        match self.table.state(page) {
            PageState::Waiting => return FaultAnswer::NotYet,
            PageState::Absent | PageState::ZeroTold | PageState::Zero => {
                return FaultAnswer::Zero(self.launch(Sink::Urgent, Cargo::Zeros(unit), now), unit);
            }
            PageState::Unsent => self.send(unit.iter(), PageState::Sending),
            _ => {}
        }
        let mut batch = Batch::empty(unit.first);
        unit.iter().for_each(|page| batch.insert(page));
        FaultAnswer::Send(self.launch(Sink::Urgent, Cargo::Pages(batch), now), unit)
    }

    /// An intermediary answered a batch: which pages it stored, where, and who has copies of them. Appends the index
    /// entries that are to be put, and the placements that nobody needs: the page is safe otherwise, lies elsewhere
    /// from now on, the batch is of a round before, or of an install unit of several pages not all were stored:
    /// a unit lies in one place, or in none.
    pub fn stored(
        &mut self,
        (id, copies): (BatchId, MemberSet),
        pages: impl IntoIterator<Item = (PageIndex, Checksum, Option<Placement>), IntoIter: Clone>,
        entries: &mut Vec<IndexEntry>,
        losers: &mut Vec<Loser>,
    ) {
        let (flight, pages) = (self.land(id), pages.into_iter());
        let first = pages.clone().next().and_then(|(page, ..)| self.span(page));
        let is_unit = first.is_some_and(|span| span.unit != InstallUnit::Page);
        let in_parts = is_unit && pages.clone().any(|(.., placement)| placement.is_none());
        for (page, checksum, placement) in pages {
            let Some(placement) = placement else { continue };
            let place = Place { first: placement, copies };
            if flight.is_some() && !in_parts && self.table.state(page) == PageState::Sending {
                self.table.set(page, PageState::Stored);
                self.table.set_way(page, Way::Staged);
                let before = self.table.place(page, place, checksum);
                losers.extend(before.map(|place| Loser { page, place }));
                entries.push(IndexEntry::at(page, self.round, placement, checksum));
            } else {
                losers.push(Loser { page, place });
            }
        }
        if let Some(flight) = flight {
            self.take_back(&flight);
        }
    }

    /// Pages of a batch turned out to be zero and are told to the index instead. The rest of the
    /// batch goes on. `false` for a batch that nobody waits for any more: nothing is told.
    pub fn found_zero(&mut self, id: BatchId, pages: impl IntoIterator<Item = PageIndex>) -> bool {
        let Some(at) = self.in_flight.iter().position(|flight| flight.id == id) else { return false };
        self.in_flight[at].loaded = true;
        for page in pages {
            if let Cargo::Pages(batch) = &mut self.in_flight[at].batch {
                batch.remove(page);
            }
            if self.table.state(page) == PageState::Sending {
                self.table.set(page, PageState::ZeroTold);
                self.table.set_way(page, Way::Zero);
            }
        }
        if matches!(self.in_flight[at].batch, Cargo::Pages(batch) if batch.is_empty()) {
            self.in_flight.swap_remove(at);
        }
        true
    }

    /// A run of absent pages was handed to the index; its entries answer for it from now on. `false` where nobody
    /// waits for them any more.
    pub fn zeros_told(&mut self, id: BatchId) -> bool {
        self.land(id).is_some()
    }

    /// An index server acknowledged entries. Those of a round before say nothing of a page that was written since.
    pub fn indexed(&mut self, entries: &[IndexEntry]) {
        for entry in entries {
            for page in entry.range().iter() {
                match self.awaits(page, entry) {
                    Some(PageState::ZeroTold) => self.table.set(page, PageState::Zero),
                    Some(_) => self.table.set(page, PageState::Staged),
                    None => {}
                }
            }
        }
    }

    /// No index server takes these entries: their pages go another way, to the destination for one.
    pub fn not_indexed(&mut self, entries: &[IndexEntry]) {
        for entry in entries {
            for page in entry.range().iter() {
                match self.awaits(page, entry) {
                    Some(PageState::ZeroTold) => self.table.set(page, PageState::Absent),
                    Some(_) => {
                        self.table.set(page, PageState::Unsent);
                        self.table.set_way(page, Way::None);
                        self.resent += 1;
                    }
                    None => continue,
                }
                self.cursor = self.cursor.min(page);
            }
        }
    }

    /// What a page is that waits for just this entry to be acknowledged.
    fn awaits(&self, page: PageIndex, entry: &IndexEntry) -> Option<PageState> {
        let state = self.table.state(page);
        let waits = match (state, entry.placement) {
            (PageState::ZeroTold, None) => entry.round == self.table.round(page),
            (PageState::Stored, Some(at)) => self.table.placement(page).is_some_and(|(now, _)| now == at),
            _ => false,
        };
        waits.then_some(state)
    }

    /// The destination acknowledged a direct or urgent batch, without these pages.
    pub fn installed(&mut self, id: BatchId, failed: &[PageIndex]) {
        let Some(flight) = self.land(id) else { return };
        match flight.batch {
            Cargo::Zeros(range) => {
                for page in range.iter().filter(|page| !failed.contains(page)) {
                    self.table.set(page, PageState::Installed);
                }
            }
            Cargo::Pages(batch) => {
                for page in batch.iter().filter(|page| !failed.contains(page)) {
                    self.install(page);
                }
            }
        }
        self.take_back(&flight);
    }

    /// The destination says, after a reconnect, that it holds these pages.
    pub fn held(&mut self, range: PageRange) {
        let pages = self.table.pages();
        for page in range.iter().filter(|page| page.0 < pages) {
            self.install(page);
        }
    }

    fn install(&mut self, page: PageIndex) {
        // Zero pages count as zero, staged ones as staged, however they were acknowledged.
        let sent = matches!(self.table.state(page), PageState::Sending | PageState::Unsent);
        if sent && self.table.way(page) == Way::None {
            self.table.set_way(page, Way::Direct);
        }
        self.table.set(page, PageState::Installed);
    }

    /// Whether a page is safe: no copy at the source is needed any more.
    #[must_use]
    pub fn is_safe(&self, page: PageIndex) -> bool {
        self.table.state(page).is_safe()
    }

    /// Whether every page is safe.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.table.safe() == self.table.pages()
    }

    /// Pages that are safe, and pages in all.
    #[must_use]
    pub fn progress(&self) -> (u32, u32) {
        (self.table.safe(), self.table.pages())
    }

    /// Pages that had no memory at the source.
    #[must_use]
    pub const fn absent_pages(&self) -> u32 {
        self.absent_pages
    }

    /// What became of the pages so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let left = |way| u64::from(self.table.left_by(way));
        Tally {
            direct: left(Way::Direct),
            staged: left(Way::Staged),
            referenced: left(Way::Referenced),
            zero: left(Way::Zero),
            hedged: self.hedged,
            resent: self.resent,
        }
    }

    /// The round that is being scattered.
    #[must_use]
    pub const fn round(&self) -> Round {
        self.round
    }

    /// Bytes allocated for the books.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.in_flight.capacity() * size_of::<InFlight>()
    }

    /// When the oldest batch in flight was handed out.
    #[must_use]
    pub fn oldest_in_flight(&self) -> Option<Instant> {
        self.in_flight.iter().map(|flight| flight.since).min()
    }

    fn land(&mut self, id: BatchId) -> Option<InFlight> {
        let at = self.in_flight.iter().position(|flight| flight.id == id)?;
        Some(self.in_flight.swap_remove(at))
    }

    fn span(&self, page: PageIndex) -> Option<Span> {
        let after = self.spans.partition_point(|span| span.pages.first <= page);
        let span = *self.spans.get(after.checked_sub(1)?)?;
        span.pages.positions().contains(&page.as_usize()).then_some(span)
    }
}

#[cfg(test)]
#[path = "planner_test.rs"]
mod test;
#[cfg(test)]
#[path = "rounds_test.rs"]
mod rounds_test;
