//! What a planner is told that goes on where one of another process ended: what is safe already.
//!
//! Only what is of the round that is sent counts: of an older copy it is not known here whether the page was written since.

use super::{Planner, unit_of};
use crate::ids::{MemberSet, Round};
use crate::page::{InstallUnit, PageIndex, PageRange};
use crate::scatter::table::{PageState, Place, Way};
use crate::wire::IndexEntry;

impl Planner {
    /// It is this round that is sent, the last one.
    #[must_use]
    pub fn in_round(mut self, round: Round) -> Self {
        if round > Round(0) {
            self.table.keep_rounds();
        }
        self.round = round;
        self
    }

    /// Whether some of these pages are not known to be anywhere.
    #[must_use]
    pub fn lacks_some(&self, range: PageRange) -> bool {
        range.iter().any(|page| self.table.state(page) == PageState::Waiting)
    }

    /// An index server says where pages lie that nobody has said anything of yet. Whether that is news.
    pub fn found(&mut self, entry: &IndexEntry) -> bool {
        let pages = self.table.pages();
        let mut is_news = false;
        for page in entry.range().iter().take_while(|page| page.0 < pages) {
            if entry.round != self.round || self.table.state(page) != PageState::Waiting {
                continue;
            }
            is_news = true;
            self.table.set_round(page, entry.round);
            let Some(first) = entry.placement else {
                self.table.set(page, PageState::Zero);
                self.table.set_way(page, Way::Zero);
                continue;
            };
            self.table.place(page, Place { first, copies: MemberSet::NONE }, entry.checksum);
            self.table.set(page, PageState::Staged);
            self.table.set_way(page, Way::Staged);
        }
        is_news
    }

    /// Of install units of several pages counts only what lies as a whole at one member: a unit is sent by one path.
    pub fn forget_parts_of_units(&mut self) {
        let spans: Vec<_> =
            self.spans.iter().filter(|span| span.unit != InstallUnit::Page).copied().collect();
        for span in spans {
            let end = span.pages.first.0 + span.pages.pages;
            let mut at = span.pages.first;
            while at.0 < end {
                let unit = unit_of(span, at);
                if !self.is_whole(unit) {
                    unit.iter().for_each(|page| self.forget(page));
                }
                at = PageIndex(unit.first.0 + unit.pages);
            }
        }
    }

    /// Zero pages of a unit have entries of their own.
    fn is_whole(&self, unit: PageRange) -> bool {
        let mut holders = unit.iter().filter_map(|page| self.table.placement(page)).map(|(at, _)| at.member);
        let first = holders.next();
        unit.iter().all(|page| self.table.state(page).is_safe())
            && holders.all(|member| Some(member) == first)
    }

    fn forget(&mut self, page: PageIndex) {
        self.table.displace(page);
        self.table.set(page, PageState::Waiting);
        self.table.set_way(page, Way::None);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Checksum, Generation, MemberIndex, Placement, SlotIndex};
    use crate::manifest::{Manifest, Region};
    use crate::scatter::planner::Sink;

    fn planner(unit: InstallUnit, pages: u64) -> Planner {
        let region = Region { name: "ram".into(), guest_address: None, length_bytes: pages << 12, unit };
        let manifest =
            Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
        Planner::new(&manifest, true).with_outcomes()
    }

    fn at(page: u32, round: u16, member: u16) -> IndexEntry {
        let place =
            Placement { member: MemberIndex(member), slot: SlotIndex(page), generation: Generation(1) };
        IndexEntry::at(PageIndex(page), Round(round), place, Checksum(page))
    }

    fn safe(planner: &mut Planner) -> Vec<PageRange> {
        let (mut safe, mut lost) = (Vec::new(), Vec::new());
        planner.take_outcomes(&mut safe, &mut lost);
        assert!(lost.is_empty(), "{lost:?}");
        safe
    }

    #[test]
    fn what_lies_somewhere_is_told_as_safe_and_sent_again_when_that_dies() {
        let mut planner = planner(InstallUnit::Page, 10).in_round(Round(1));
        assert!(planner.found(&at(1, 1, 0)) && planner.found(&at(2, 1, 1)));
        assert!(!planner.found(&at(1, 1, 1)), "who is asked first is believed");
        assert!(!planner.found(&at(3, 0, 0)), "it may have been written since");
        assert!(planner.found(&IndexEntry::zero(PageIndex(5), 90, Round(1))), "no more than there are");
        planner.forget_parts_of_units();
        let all = PageRange::new(PageIndex(0), 10);
        assert!(planner.lacks_some(all) && !planner.lacks_some(PageRange::new(PageIndex(5), 5)));
        planner.held(PageRange::new(PageIndex(0), 2));
        assert_eq!(planner.progress(), (8, 10));
        assert_eq!(safe(&mut planner), [PageRange::new(PageIndex(0), 3), PageRange::new(PageIndex(5), 5)]);
        planner.available(all);
        let others = (MemberSet::of(MemberIndex(0)), 1);
        planner.member_lost(MemberIndex(1), others, |_| false, |_| {});
        let (mut safe, mut lost) = (Vec::new(), Vec::new());
        planner.take_outcomes(&mut safe, &mut lost);
        assert_eq!(lost, [PageRange::new(PageIndex(2), 1)]);
        assert!(planner.next(Sink::Direct, std::time::Instant::now(), std::time::Duration::MAX).is_some());
    }

    /// Whom it lies at dies before the source heard that it is safe: the source has yet to give it.
    #[test]
    fn what_was_found_and_is_lost_at_once_waits_for_the_source() {
        let mut planner = planner(InstallUnit::Page, 2);
        assert!(planner.found(&at(0, 0, 0)) && planner.found(&at(1, 0, 1)));
        let next = |planner: &mut Planner| {
            planner.next(Sink::Direct, std::time::Instant::now(), std::time::Duration::MAX)
        };
        planner.member_lost(MemberIndex(1), (MemberSet::of(MemberIndex(0)), 1), |_| false, |_| {});
        assert_eq!(next(&mut planner), None, "nobody has it");
        assert_eq!(safe(&mut planner), [PageRange::new(PageIndex(0), 1)]);
        planner.available(PageRange::new(PageIndex(1), 1));
        assert!(next(&mut planner).is_some());
    }

    #[test]
    fn half_a_unit_is_none() {
        let mut planner = planner(InstallUnit::Huge2M, 3 * 512);
        (0..512).chain(512..800).for_each(|page| assert!(planner.found(&at(page, 0, 0))));
        (1024..1536).for_each(|page| assert!(planner.found(&at(page, 0, (page % 2) as u16))));
        planner.forget_parts_of_units();
        assert_eq!(planner.progress().0, 512);
        assert_eq!(safe(&mut planner), [PageRange::new(PageIndex(0), 512)]);
    }
}
