//! What is read next from a member in the background.

use super::{Read, SEARCH_PAGES_MAX, Tracker, Wanted};
use crate::gather::books::State;
use crate::ids::{MemberIndex, Placement};
use crate::limits;
use crate::page::{PageIndex, PageRange};

/// Pages right behind a fault that are left to faults: a guest that goes on gets through them before a request in the background
/// brings any, asks for each itself, and has it twice. At a destination of 256 Mb/s that was 4 % of all that came, now 1 %.
const PASSED_PAGES: u32 = 32;

/// Pages behind those that are prepaged before the sweep goes on; a gap of so many ends it.
const NEAR_PAGES: usize = 256;

/// Where to look for pages to read.
#[derive(Clone, Copy)]
struct Search {
    from: usize,
    pages: usize,
    /// Only for pages that were sent once.
    first_round: bool,
}

impl Tracker {
    /// The guest waits for a page: what it comes to next is read next.
    pub(super) fn turn_near(&mut self, fault: PageIndex) {
        let near = Some(fault.0.saturating_add(PASSED_PAGES));
        self.members.iter_mut().for_each(|book| book.near = near);
    }

    /// The next pages to read from a member in the background: near the last fault first, then on
    /// in a sweep. At most `pages_max`, or one whole unit. Marks them in flight.
    ///
    /// While rounds replace each other, pages that were sent again come last: what was written once is most likely
    /// written again, and then it was read for nothing.
    pub fn next_batch(&mut self, member: MemberIndex, pages_max: usize, out: &mut Vec<Read>) {
        out.clear();
        let Some(&book) = self.members.get(member.as_usize()) else { return };
        if book.lost || self.left_at(member) == 0 || self.states.is_empty() {
            return;
        }
        let mut unit_reads = Vec::new();
        if let Some(near) = book.near {
            let search = Search { from: near as usize, pages: NEAR_PAGES, first_round: false };
            let next = self.collect(member, search, pages_max, out, &mut unit_reads);
            self.members[member.as_usize()].near = (!out.is_empty()).then_some(next as u32);
            self.fly(out);
        }
        // What is near is few pages where a guest goes here and there: the batch is filled up.
        let near = out.len();
        if near < pages_max {
            let search =
                |first_round| Search { from: book.cursor as usize, pages: SEARCH_PAGES_MAX, first_round };
            let mut next = self.collect(member, search(self.replaces), pages_max, out, &mut unit_reads);
            if self.replaces && out.is_empty() {
                next = self.collect(member, search(false), pages_max, out, &mut unit_reads);
            }
            self.members[member.as_usize()].cursor = if next >= self.states.len() { 0 } else { next as u32 };
        }
        self.fly(&out[near..]);
    }

    fn fly(&mut self, reads: &[Read]) {
        for read in reads {
            self.change(PageRange::new(read.page, 1), State::fly);
        }
    }

    /// Collects what can be read from `member`; returns where it stopped.
    fn collect(
        &self,
        member: MemberIndex,
        search: Search,
        pages_max: usize,
        out: &mut Vec<Read>,
        unit_reads: &mut Vec<Read>,
    ) -> usize {
        let end = (search.from + search.pages).min(self.states.len());
        let is_meant = |page: usize| !search.first_round || self.rounds[page] == 0;
        let mut page = search.from;
        while page < end && out.len() < pages_max {
            let state = self.states[page];
            let Some(unit) = self.units.of(PageIndex(page as u32)) else { return end };
            if unit.pages == 1 {
                if state.is_idle_announced()
                    && is_meant(page)
                    && let Some(placement) = Placement::from_bits(self.placements[page])
                    && placement.member == member
                {
                    out.push(self.read(page, placement));
                }
                page += 1;
                continue;
            }
            let idle = unit.positions().all(|page| !self.states[page].is_in_flight());
            if idle && is_meant(page) && self.look(unit, unit_reads) == Wanted::Read(member) {
                if !out.is_empty() && out.len() + unit_reads.len() > pages_max.max(limits::BATCH_PAGES) {
                    return unit.first.as_usize();
                }
                out.extend_from_slice(unit_reads);
            }
            page = unit.positions().end;
        }
        page
    }

    /// Pages that were in flight will not come.
    pub fn give_back(&mut self, reads: &[Read]) {
        for read in reads {
            self.change(PageRange::new(read.page, 1), State::land);
        }
    }

    /// Pages announced at a member that are neither held nor on their way; none while nobody may install.
    #[must_use]
    pub fn left_at(&self, member: MemberIndex) -> u64 {
        let book = self.members.get(member.as_usize()).filter(|_| !self.is_stopped());
        book.map_or(0, |book| book.announced - book.in_flight)
    }
}
