//! Pages that are offered by their hashes before anyone sends their bytes.
//!
//! Offers run ahead of the intermediaries' sinks, from a place of each VM's own on, so that hosts with like images
//! do not offer the same pages at the same time. What nobody has waits, as it was offered, for a sink to take it. The
//! direct path sweeps as ever. When the offers do not get on, sinks do not wait for them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{BatchId, Planner, Sink, Work};
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement, Round};
use crate::page::{InstallUnit, PageIndex};
use crate::scatter::batch::Batch;
use crate::scatter::planner::Cargo;
use crate::scatter::spans::group;
use crate::scatter::table::{Loser, PageState, Place, Way};
use crate::wire::IndexEntry;

/// Pages that wait for a sink, at most: longer ahead, and who was told to wait for them waits in vain.
const READY_MAX: u32 = 2048;

/// Sinks wait no longer for offers that nobody answers.
const STANDSTILL: Duration = Duration::from_millis(100);

/// How far offers are.
#[derive(Debug)]
pub(super) struct Offers {
    cursor: u32,
    /// Pages that were not looked at yet.
    left: u32,
    /// Pages offered, and not answered for.
    out: u32,
    /// Groups with pages that nobody has, and how many.
    ready: VecDeque<(PageIndex, u32)>,
    ready_pages: u32,
    heard: Instant,
}

impl Planner {
    /// Offers begin, at a place that `seed` says.
    pub fn begin_offers(&mut self, seed: u64, now: Instant) {
        let pages = self.table.pages();
        let cursor = (seed % u64::from(pages.max(1))) as u32;
        let (out, ready, ready_pages, heard) = (0, VecDeque::new(), 0, now);
        self.offers = Some(Offers { cursor, left: pages, out, ready, ready_pages, heard });
    }

    /// Nobody offers pages any more: those that were are to be sent.
    pub fn end_offers(&mut self) {
        if self.offers.take().is_some() {
            for page in (0..self.table.pages()).map(PageIndex) {
                if self.table.state(page) == PageState::Offered {
                    self.unsend(page);
                }
            }
        }
    }

    /// The next pages to offer; none while enough of them wait for a sink. Each is offered once: what was offered in a
    /// round before, and written since, is the VM's own, and for the sinks. Units of many pages are not offered: they go
    /// out whole, by one path.
    pub fn next_offer(&mut self) -> Option<Batch> {
        loop {
            let pages = self.table.pages();
            let Offers { cursor, left, ready_pages, .. } = self.offers.as_ref()?;
            let (cursor, left) = (*cursor, *left);
            if left == 0 || *ready_pages >= READY_MAX {
                return None;
            }
            let span = self.span(PageIndex(cursor))?;
            let group = group(span, PageIndex(cursor));
            let passed = (group.first.0 + group.pages - cursor).min(left);
            let (mut batch, mut again) = (Batch::empty(group.first), Batch::empty(group.first));
            if span.unit == InstallUnit::Page {
                for page in group.iter().filter(|page| self.table.state(*page) == PageState::Unsent) {
                    let of = if self.table.was_offered(page) { &mut again } else { &mut batch };
                    of.insert(page);
                }
            }
            self.send(batch.iter(), PageState::Offered);
            batch.iter().for_each(|page| self.table.set_offered(page));
            self.offers_read = Some(batch);
            again.iter().for_each(|page| self.ready(page));
            let offers = self.offers.as_mut()?;
            offers.cursor = if cursor + passed >= pages { 0 } else { cursor + passed };
            offers.left -= passed;
            offers.out += batch.pages();
            if !batch.is_empty() {
                return Some(batch);
            }
        }
    }

    fn answered(&mut self) {
        if let Some(offers) = &mut self.offers {
            offers.out = offers.out.saturating_sub(1);
        }
    }

    /// An offered page is stored: its bytes were there. It is not needed where the page went another way meanwhile.
    pub fn have(
        &mut self,
        (page, round, seal): (PageIndex, Round, Checksum),
        placement: Placement,
        entries: &mut Vec<IndexEntry>,
        losers: &mut Vec<Loser>,
    ) {
        self.answered();
        let place = Place { first: placement, copies: MemberSet::NONE };
        if self.table.state(page) != PageState::Offered || round != self.round {
            losers.push(Loser { page, place });
            return;
        }
        self.table.set(page, PageState::Stored);
        self.table.set_way(page, Way::Referenced);
        let before = self.table.place(page, place, seal);
        losers.extend(before.map(|place| Loser { page, place }));
        entries.push(IndexEntry::at(page, round, placement, seal));
    }

    /// Offered pages lie at a member, which is to have others hold them, too: those of the first one's group become a
    /// batch in flight there, of these `entries`. Says how many of `had`, which ascends, were looked at; those that
    /// nobody needs are `losers`.
    pub fn spread(
        &mut self,
        member: MemberIndex,
        had: &[IndexEntry],
        now: Instant,
        entries: &mut Vec<IndexEntry>,
        losers: &mut Vec<Loser>,
    ) -> (Option<BatchId>, usize) {
        entries.clear();
        let first = had.first().map_or(PageIndex(0), |entry| entry.page);
        let Some(group) = self.span(first).map(|span| group(span, first)) else { return (None, had.len()) };
        let of = had.iter().take_while(|had| group.positions().contains(&had.page.as_usize())).count();
        let mut batch = Batch::empty(group.first);
        for had in &had[..of] {
            self.answered();
            let waits = self.table.state(had.page) == PageState::Offered && had.round == self.round;
            if waits && !batch.contains(had.page) {
                batch.insert(had.page);
                entries.push(*had);
            } else if let Some(first) = had.placement {
                losers.push(Loser { page: had.page, place: Place { first, copies: MemberSet::NONE } });
            }
        }
        self.send(batch.iter(), PageState::Sending);
        if batch.is_empty() {
            return (None, of);
        }
        let id = self.launch(Sink::Member(member), Cargo::Pages(batch), now);
        // Their bytes are there.
        self.loaded(id);
        (Some(id), of)
    }

    /// As [`Self::stored`], of a batch of [`Self::spread`].
    pub fn referenced(
        &mut self,
        batch: (BatchId, MemberSet),
        pages: impl IntoIterator<Item = (PageIndex, Checksum, Option<Placement>), IntoIter: Clone>,
        entries: &mut Vec<IndexEntry>,
        losers: &mut Vec<Loser>,
    ) {
        let before = entries.len();
        self.stored(batch, pages, entries, losers);
        entries[before..].iter().for_each(|entry| self.table.set_way(entry.page, Way::Referenced));
    }

    /// A batch of [`Self::spread`] lies at fewer members than it is to: sinks may take its pages.
    pub fn not_referenced(&mut self, id: BatchId) {
        let Some(flight) = self.land(id) else { return };
        self.take_back(&flight);
        if let Cargo::Pages(batch) = flight.batch {
            batch.iter().for_each(|page| self.ready(page));
        }
    }

    /// An offered page is zero, and is told to the index as that. `false` when it went another way meanwhile.
    pub fn offered_zero(&mut self, page: PageIndex) -> bool {
        self.answered();
        let waits = self.table.state(page) == PageState::Offered;
        if waits {
            self.table.set(page, PageState::ZeroTold);
            self.table.set_way(page, Way::Zero);
        }
        waits
    }

    /// Nobody has an offered page, or nobody said so in time: a sink may take it.
    pub fn not_there(&mut self, page: PageIndex) {
        self.answered();
        if self.table.state(page) == PageState::Offered {
            self.table.set(page, PageState::Unsent);
            self.ready(page);
        }
    }

    /// A page that is to be sent, though it was offered, is for the next sink.
    fn ready(&mut self, page: PageIndex) {
        if self.table.state(page) != PageState::Unsent {
            return;
        }
        self.cursor = self.cursor.min(page);
        let Some(first) = self.span(page).map(|span| group(span, page).first) else { return };
        if let Some(offers) = &mut self.offers {
            offers.ready_pages += 1;
            match offers.ready.back_mut() {
                Some((last, pages)) if *last == first => *pages += 1,
                _ => offers.ready.push_back((first, 1)),
            }
        }
    }

    /// Somebody answered offers.
    pub fn offers_heard(&mut self, now: Instant) {
        if let Some(offers) = &mut self.offers {
            offers.heard = now;
        }
    }

    /// Whether every page was offered that is to be.
    #[must_use]
    pub fn offers_over(&self) -> bool {
        self.offers.as_ref().is_none_or(|offers| offers.left == 0)
    }

    /// Work for an intermediary from pages that nobody has.
    pub(super) fn sweep_ready(&mut self, sink: Sink, now: Instant) -> Option<Work> {
        loop {
            let offers = self.offers.as_mut()?;
            let (first, pages) = offers.ready.pop_front()?;
            offers.ready_pages = offers.ready_pages.saturating_sub(pages);
            let span = self.span(first)?;
            let mut batch = Batch::empty(first);
            for page in group(span, first).iter() {
                if self.table.state(page) == PageState::Unsent && self.table.was_offered(page) {
                    batch.insert(page);
                }
            }
            if !batch.is_empty() {
                self.send(batch.iter(), PageState::Sending);
                return Some(Work::Pages(self.launch(sink, Cargo::Pages(batch), now), batch));
            }
        }
    }

    /// Whether intermediaries' sinks wait for answers to offers rather than take what was not offered.
    pub(super) fn waits_for_offers(&self, now: Instant) -> bool {
        self.offers.as_ref().is_some_and(|offers| {
            (offers.left > 0 || offers.out > 0) && now.saturating_duration_since(offers.heard) < STANDSTILL
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Generation, MemberIndex, SlotIndex};
    use crate::manifest::{Manifest, Region};
    use crate::page::{PAGE_BYTES_U64, PageRange};

    const LATE: Duration = Duration::from_secs(1);
    const AT_MEMBER: Sink = Sink::Member(MemberIndex(0));

    fn planner(pages: u32, now: Instant) -> Planner {
        let region = Region {
            name: "ram".into(),
            guest_address: None,
            length_bytes: u64::from(pages) * PAGE_BYTES_U64,
            unit: InstallUnit::Page,
        };
        let manifest =
            Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
        let mut planner = Planner::new(&manifest, true);
        planner.available(PageRange::new(PageIndex(0), pages));
        planner.begin_offers(70, now);
        planner
    }

    fn at(slot: u32) -> Placement {
        Placement { member: MemberIndex(0), slot: SlotIndex(slot), generation: Generation(1) }
    }

    #[test]
    fn every_page_is_offered_once_and_goes_one_way() {
        let now = Instant::now();
        let mut planner = planner(200, now);
        let (mut entries, mut losers, mut offered) = (Vec::new(), Vec::new(), Vec::new());
        assert_eq!(planner.next(AT_MEMBER, now, LATE), None, "it waits for an answer");
        while let Some(batch) = planner.next_offer() {
            offered.extend(batch.iter());
        }
        assert_eq!(offered[0], PageIndex(64), "it begins at a place of its own");
        for page in &offered {
            if page.0 % 2 == 0 {
                planner.have((*page, Round(0), Checksum(1)), at(page.0), &mut entries, &mut losers);
            } else {
                planner.not_there(*page);
            }
        }
        offered.sort_unstable();
        assert_eq!(offered, (0..200).map(PageIndex).collect::<Vec<_>>());
        let Some(Work::Pages(_, first)) = planner.next(AT_MEMBER, now, LATE) else { panic!("work") };
        assert_eq!(first.iter().next(), Some(PageIndex(65)));
        let mut sent = first.pages();
        while let Some(Work::Pages(_, batch)) = planner.next(AT_MEMBER, now, LATE) {
            assert!(batch.iter().all(|page| page.0 % 2 == 1));
            sent += batch.pages();
        }
        assert_eq!((sent, entries.len(), losers.len()), (100, 100, 0));
        planner.indexed(&entries);
        assert_eq!((planner.progress().0, planner.tally().referenced), (100, 100));
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for_and_a_late_answer_is_given_back() {
        let now = Instant::now();
        let mut planner = planner(128, now);
        let batch = planner.next_offer().expect("pages");
        assert_eq!(planner.next(AT_MEMBER, now, LATE), None);
        let Some(Work::Pages(_, other)) = planner.next(AT_MEMBER, now + STANDSTILL, LATE) else {
            panic!("work")
        };
        assert!(other.iter().all(|page| !batch.contains(page)));
        let page = batch.iter().next().expect("one");
        planner.held(PageRange::new(page, 1));
        let (mut entries, mut losers) = (Vec::new(), Vec::new());
        planner.have((page, Round(0), Checksum(1)), at(1), &mut entries, &mut losers);
        assert_eq!((entries.len(), losers.len()), (0, 1));
        planner.end_offers();
        let Some(Work::Pages(_, rest)) = planner.next(AT_MEMBER, now, LATE) else { panic!("work") };
        assert_eq!(rest.pages(), batch.pages() - 1, "what was offered in vain");
    }
}
