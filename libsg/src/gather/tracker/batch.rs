//! What is read next from a member in the background.

use super::{Read, SEARCH_PAGES_MAX, Tracker, Wanted};
use crate::gather::books::State;
use crate::ids::{MemberIndex, Placement};
use crate::limits;
use crate::page::{PageIndex, PageRange};

/// Pages behind a fault that are prepaged before the sweep goes on; a gap of so many ends it.
const NEAR_PAGES: usize = 256;

impl Tracker {
    /// The next pages to read from a member in the background: near the last fault first, then on
    /// in a sweep. At most `pages_max`, or one whole unit. Marks them in flight.
    pub fn next_batch(&mut self, member: MemberIndex, pages_max: usize, out: &mut Vec<Read>) {
        out.clear();
        let Some(&book) = self.members.get(member.as_usize()) else { return };
        if book.lost || book.announced == book.in_flight || self.states.is_empty() {
            return;
        }
        let mut unit_reads = Vec::new();
        if let Some(near) = book.near {
            let next = self.collect(member, near as usize, NEAR_PAGES, pages_max, out, &mut unit_reads);
            self.members[member.as_usize()].near = (!out.is_empty()).then_some(next as u32);
            self.fly(out);
        }
        // What is near is few pages where a guest goes here and there: the batch is filled up.
        let near = out.len();
        if near < pages_max {
            let from = book.cursor as usize;
            let next = self.collect(member, from, SEARCH_PAGES_MAX, pages_max, out, &mut unit_reads);
            self.members[member.as_usize()].cursor = if next >= self.states.len() { 0 } else { next as u32 };
        }
        self.fly(&out[near..]);
    }

    fn fly(&mut self, reads: &[Read]) {
        for read in reads {
            self.change(PageRange::new(read.page, 1), State::fly);
        }
    }

    /// Collects what can be read from `member` among `search` pages from `from` on; returns where it
    /// stopped.
    fn collect(
        &self,
        member: MemberIndex,
        from: usize,
        search: usize,
        pages_max: usize,
        out: &mut Vec<Read>,
        unit_reads: &mut Vec<Read>,
    ) -> usize {
        let end = (from + search).min(self.states.len());
        let mut page = from;
        while page < end && out.len() < pages_max {
            let state = self.states[page];
            let Some(unit) = self.units.of(PageIndex(page as u32)) else { return end };
            if unit.pages == 1 {
                if state.is_idle_announced()
                    && let Some(placement) = Placement::from_bits(self.placements[page])
                    && placement.member == member
                {
                    out.push(self.read(page, placement));
                }
                page += 1;
                continue;
            }
            let idle = unit.positions().all(|page| !self.states[page].is_in_flight());
            if idle && self.look(unit, unit_reads) == Wanted::Read(member) {
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

    /// Pages announced at a member that are neither held nor on their way.
    #[must_use]
    pub fn left_at(&self, member: MemberIndex) -> u64 {
        self.members.get(member.as_usize()).map_or(0, |book| book.announced - book.in_flight)
    }
}
