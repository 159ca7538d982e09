//! Batches that are late, and whatever will not be acknowledged any more: which pages go another way.

use std::time::{Duration, Instant};

use super::{BatchId, Cargo, InFlight, Planner, Sink, Work};
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement};
use crate::page::PageIndex;
use crate::scatter::batch::Batch;
use crate::scatter::table::{Loser, PageState, Place, Way};
use crate::wire::IndexEntry;

/// Other sinks that a late batch is given to, beyond the first.
const HEDGES_MAX: u8 = 2;

impl Planner {
    /// The oldest batch of another sink that is late, and of which this sink has nothing yet.
    pub(super) fn hedge(&mut self, sink: Sink, now: Instant, hedge_after: Duration) -> Option<Work> {
        let late = |flight: &InFlight| {
            flight.sink != sink
                && flight.hedges < HEDGES_MAX
                && now.saturating_duration_since(flight.since) >= hedge_after
        };
        let mut candidates: Vec<usize> =
            (0..self.in_flight.len()).filter(|at| late(&self.in_flight[*at])).collect();
        candidates.sort_unstable_by_key(|at| self.in_flight[*at].since);
        for at in candidates {
            match self.in_flight[at].batch {
                Cargo::Zeros(range) => {
                    if range.iter().any(|page| self.table.state(page) == PageState::ZeroTold) {
                        self.in_flight[at].hedges += 1;
                        return Some(Work::Zeros(self.launch(sink, Cargo::Zeros(range), now), range));
                    }
                }
                Cargo::Pages(batch) => {
                    let batch = self.worth_hedging(batch, sink);
                    if !batch.is_empty() {
                        self.in_flight[at].hedges += 1;
                        self.hedged += u64::from(batch.pages());
                        return Some(Work::Pages(self.launch(sink, Cargo::Pages(batch), now), batch));
                    }
                }
            }
        }
        None
    }

    /// What of a batch is still on its way, and not on this sink's.
    fn worth_hedging(&self, mut batch: Batch, sink: Sink) -> Batch {
        for page in batch.iter() {
            let here = |flight: &InFlight| flight.sink == sink && flight.batch.contains(page);
            if self.table.state(page) != PageState::Sending || self.in_flight.iter().any(here) {
                batch.remove(page);
            }
        }
        batch
    }

    /// An intermediary stored pages of a batch, and not all that were to hold copies did: it goes elsewhere, and what
    /// there is of it is of use to nobody.
    pub fn not_stored(
        &mut self,
        (id, copies): (BatchId, MemberSet),
        pages: impl IntoIterator<Item = (PageIndex, Checksum, Option<Placement>)>,
        losers: &mut Vec<Loser>,
    ) {
        let stored = pages.into_iter().filter_map(|(page, _, first)| Some((page, first?)));
        losers.extend(stored.map(|(page, first)| Loser { page, place: Place { first, copies } }));
        self.failed(id);
    }

    /// A batch will not be acknowledged: no room, or its connection was lost.
    pub fn failed(&mut self, id: BatchId) {
        if let Some(flight) = self.land(id) {
            self.take_back(&flight);
        }
    }

    /// Everything in flight at this sink will not be acknowledged.
    pub fn sink_lost(&mut self, sink: Sink) {
        while let Some(at) = self.in_flight.iter().position(|flight| flight.sink == sink) {
            let flight = self.in_flight.swap_remove(at);
            self.take_back(&flight);
        }
    }

    /// Another intermediary takes pages, in the place of one that died. Those that lie at fewer of the `alive` ones than can
    /// be, `holders` being wanted, are sent again: one copy more is made of them. What fewer index servers than that know
    /// of zero pages is handed to `reindex`, if there is any.
    pub fn member_opened(
        &mut self,
        (alive, holders): (MemberSet, usize),
        has_fewer: bool,
        mut reindex: impl FnMut(IndexEntry),
    ) {
        for page in (0..self.table.pages()).map(PageIndex) {
            match self.table.state(page) {
                PageState::Stored | PageState::Staged => {
                    let lacks_one = |(place, _): &(Place, Checksum)| {
                        place.holders().and(alive).len() < holders.min(alive.len())
                    };
                    if self.table.placed(page).as_ref().is_some_and(lacks_one) {
                        self.resent += 1;
                        self.unsend(page);
                    }
                }
                PageState::Zero | PageState::ZeroTold if has_fewer => {
                    self.table.set(page, PageState::ZeroTold);
                    reindex(IndexEntry::zero(page, 1, self.table.round(page)));
                }
                _ => {}
            }
        }
    }

    /// An intermediary died. Pages that lay there are sent again, and those of which it had a copy where others can
    /// have one: those are `alive`, and `holders` are wanted for each page. Entries of other pages, which its index
    /// held, are to be put elsewhere: they are handed to `reindex`, run by run.
    pub fn member_lost(
        &mut self,
        member: MemberIndex,
        (alive, holders): (MemberSet, usize),
        was_owner: impl Fn(PageIndex) -> bool,
        mut reindex: impl FnMut(IndexEntry),
    ) {
        self.sink_lost(Sink::Member(member));
        for page in (0..self.table.pages()).map(PageIndex) {
            let state = self.table.state(page);
            let place = self.table.placed(page).map(|(place, _)| place);
            let was_first = place.is_some_and(|place| place.first.member == member);
            // Copies of it are given back when it lies elsewhere.
            if was_first && place.is_some_and(|place| place.copies.and(alive).is_empty()) {
                self.table.displace(page);
            }
            let lacks_one = |place: Place| {
                place.copies.contains(member) && place.holders().and(alive).len() < holders.min(alive.len())
            };
            let goes_again = was_first || place.is_some_and(lacks_one);
            if goes_again && matches!(state, PageState::Stored | PageState::Staged) {
                self.resent += 1;
                self.unsend(page);
            } else if was_owner(page) {
                match state {
                    PageState::Staged | PageState::Stored => {
                        if let Some((placement, checksum)) = self.table.placement(page) {
                            self.table.set(page, PageState::Stored);
                            reindex(IndexEntry::at(page, self.table.round(page), placement, checksum));
                        }
                    }
                    PageState::Zero | PageState::ZeroTold => {
                        self.table.set(page, PageState::ZeroTold);
                        reindex(IndexEntry::zero(page, 1, self.table.round(page)));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Every intermediary is gone: what only an index could make safe is sent to the destination.
    pub fn members_gone(&mut self) {
        for page in (0..self.table.pages()).map(PageIndex) {
            match self.table.state(page) {
                PageState::Stored | PageState::Staged => self.unsend(page),
                PageState::ZeroTold | PageState::Zero => {
                    self.table.set(page, PageState::Absent);
                    self.cursor = self.cursor.min(page);
                }
                _ => {}
            }
            self.table.displace(page);
        }
    }

    /// A page that has left nowhere yet.
    pub(super) fn unsend(&mut self, page: PageIndex) {
        self.table.set(page, PageState::Unsent);
        self.table.set_way(page, Way::None);
        self.cursor = self.cursor.min(page);
    }

    /// Whatever of a batch that left the air is still on nobody's way becomes unsent again.
    pub(super) fn take_back(&mut self, flight: &InFlight) {
        // A page that is told as zero is not on its way in a batch of bytes, nor the reverse.
        let orphan = |planner: &Self, page: PageIndex, state: PageState| {
            let same = |f: &&InFlight| matches!(f.batch, Cargo::Zeros(_)) == (state == PageState::ZeroTold);
            planner.table.state(page) == state
                && !planner.in_flight.iter().filter(same).any(|f| f.batch.contains(page))
        };
        match flight.batch {
            Cargo::Pages(batch) => {
                for page in batch.iter() {
                    if orphan(self, page, PageState::Sending) {
                        self.table.set(page, PageState::Unsent);
                        self.resent += 1;
                        self.cursor = self.cursor.min(page);
                    } else if self.table.state(page) == PageState::Sending {
                        // One way less: the others may be doubled again.
                        let others = self.in_flight.iter_mut().filter(|f| f.batch.contains(page));
                        others.for_each(|f| f.hedges = 0);
                    }
                }
            }
            Cargo::Zeros(range) => {
                for page in range.iter() {
                    if orphan(self, page, PageState::ZeroTold) {
                        self.table.set(page, PageState::Absent);
                        self.cursor = self.cursor.min(page);
                    }
                }
            }
        }
    }
}
