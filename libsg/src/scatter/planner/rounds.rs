//! Rounds: what the VM wrote while it was sent is sent again.
//!
//! A copy of round r was read after the dirty log was collected for the last time before r, and the log names every
//! page that is written after that. So a copy that is torn, or old, is of a page that a later round has: it is
//! replaced. Of a page that no later round has, the copy is right.
//!
//! Nothing that is said of an older round counts for a page that was written since: batches in flight are forgotten
//! when a round begins (what is stored of them is given back), entries of pages that were written again are not
//! waited for.

use super::{Planner, unit_of};
#[cfg(feature = "simulation")]
use crate::host;
use crate::ids::Round;
use crate::page::{PageIndex, PageRange};
use crate::scatter::table::{Loser, PageState, Way};

impl Planner {
    /// There will be rounds: keeps the one of each page, 2 bytes a page.
    #[must_use]
    pub fn with_rounds(mut self) -> Self {
        self.table.keep_rounds();
        self
    }

    /// Begins the next round, in which the `dirty` pages are sent again, as whole install units, and those
    /// that were torn. Whatever is not safe yet goes on in it. The slots of older copies are offered to `give_up`; one
    /// that it has no room for is kept until the page has another.
    ///
    /// Pages of a batch that was refused as torn are sent again too ([`Self::installed_live`]).
    pub fn begin_round(&mut self, dirty: &[PageRange], give_up: &mut dyn FnMut(Loser) -> bool) {
        while let Some(flight) = self.in_flight.pop() {
            self.take_back(&flight);
        }
        self.near_fault = None;
        self.end_offers();
        let before = self.round;
        self.round = Round(before.0.saturating_add(1));
        for page in dirty.iter().flat_map(|run| run.iter()) {
            #[cfg(feature = "simulation")]
            if host::has_bug(host::Bug::TornKept) && before.0 > 0 && self.table.round(page) == before {
                continue;
            }
            self.unit_written(page, give_up);
        }
        if self.table.torn() > 0 {
            for page in (0..self.table.pages()).map(PageIndex) {
                if self.table.state(page) == PageState::Torn {
                    self.unit_written(page, give_up);
                }
            }
        }
    }

    fn unit_written(&mut self, page: PageIndex, give_up: &mut dyn FnMut(Loser) -> bool) {
        let Some(span) = self.span(page) else { return };
        let unit = unit_of(span, page);
        // Of a unit that several dirty pages lie in, the first finds all of it in an older round.
        if unit.pages == 1 || self.table.round(unit.first) < self.round {
            unit.iter().for_each(|page| self.written(page, give_up));
        }
    }

    fn written(&mut self, page: PageIndex, give_up: &mut dyn FnMut(Loser) -> bool) {
        let told_absent = matches!(
            self.table.state(page),
            PageState::Absent | PageState::ZeroTold | PageState::Zero | PageState::Installed
        );
        if told_absent && self.table.way(page) == Way::None {
            self.absent_pages = self.absent_pages.saturating_sub(1);
        }
        if let Some((place, _)) = self.table.placed(page)
            && give_up(Loser { page, place })
        {
            self.table.displace(page);
        }
        // One that the source has not given yet it gives as it is by then.
        if self.table.state(page) != PageState::Waiting {
            self.unsend(page);
        }
        self.table.set_round(page, self.round);
    }

    /// As [`Self::installed`], while the VM runs: a page that failed was most likely written on its way, and
    /// may be written for ever. It waits for the next round, whatever the log says of it.
    pub fn installed_live(&mut self, id: super::BatchId, failed: &[PageIndex]) {
        self.installed(id, failed);
        for page in failed {
            if self.table.state(*page) == PageState::Unsent {
                self.table.set(*page, PageState::Torn);
            }
        }
    }

    /// The VM is paused, and the source cannot give these pages before it names them again.
    pub fn withdrawn(&mut self, range: PageRange) {
        for page in range.iter() {
            if self.table.state(page) == PageState::Unsent {
                self.table.set(page, PageState::Waiting);
            }
        }
    }

    /// Whether nothing of this round is left to send or to wait for.
    #[must_use]
    pub fn is_round_over(&self) -> bool {
        self.table.safe() + self.table.torn() == self.table.pages()
    }

    /// The pages that the source has not given, if nothing else of this round is left to send or to wait for.
    #[must_use]
    pub fn is_over_but_for(&self) -> Option<u32> {
        let left = self.table.pages() - self.table.safe() - self.table.torn();
        (left == self.table.waiting()).then_some(left)
    }

    /// Pages that are sent again in the next round because they were torn.
    #[must_use]
    pub const fn torn_pages(&self) -> u32 {
        self.table.torn()
    }

    /// The pages that were written while they were sent, each with the round of its last copy, the only one
    /// that is right: ascending runs, for rounds from 1 on. With [`Self::begin_round`] after the pause, this is the
    /// final set.
    pub fn rounds(&self) -> impl Iterator<Item = (PageRange, Round)> {
        let (rounds, mut at) = (self.table.rounds(), 0);
        std::iter::from_fn(move || {
            let first = at + rounds[at..].iter().position(|round| *round > 0)?;
            let of = rounds[first];
            at = first + rounds[first..].iter().take_while(|round| **round == of).count();
            Some((PageRange::new(PageIndex(first as u32), (at - first) as u32), Round(of)))
        })
    }
}
