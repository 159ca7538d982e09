//! The books of a VM that runs at its source while its pages come: rounds before the switch.
//!
//! A source sends each page once, and then those that were written since, again. So a page that comes a second time is one that
//! was written, whatever became of what came first: its bytes are kept until who sends rounds has heard of it, also if the older
//! ones are said to be safe meanwhile. At the switch the source says which pages it has not sent as they are: those come yet.
//!
//! What a source has left to send while its VM runs is never read to the end: it would be through, and its devices come as bytes
//! of no known length.

use libsg::memory::PresenceMap;
use libsg::page::{PageIndex, PageRange};

use super::pages::{Pages, add};

/// Pages more than may be unread, which are left where they are all the same: more than the least that is read at once.
const SPARE_PAGES: u32 = 512;

/// What is known beside, from the first round on.
#[derive(Debug)]
pub struct Live {
    /// Pages that have come.
    seen: PresenceMap,
    unseen_count: u32,
    /// Pages that have come again, of which nobody heard.
    written: PresenceMap,
}

impl Live {
    fn new(seen: PresenceMap) -> Self {
        let none = PresenceMap::new(seen.pages());
        Self { unseen_count: seen.pages() - seen.count(), seen, written: none }
    }

    /// Pages are named as written: what there is of them is out of date.
    pub(super) fn discard(&mut self, run: PageRange) {
        self.written.insert(run);
    }
}

impl Pages {
    /// From now on pages are told of while the VM runs.
    pub fn begin_rounds(&mut self) {
        self.live = Some(Live::new(self.here.clone()));
        self.here_count = self.here.count();
        let here: Vec<PageRange> = self.here.runs().collect();
        for page in here.into_iter().flat_map(PageRange::iter) {
            if self.unit(page).first == page {
                self.name_unit(page);
            }
        }
    }

    /// Pages that have not come, but for those that are to be left.
    pub fn unseen(&self) -> u32 {
        self.live.as_ref().map_or(0, |live| live.unseen_count.saturating_sub(SPARE_PAGES))
    }

    /// A page came, while the VM runs.
    pub(super) fn came_live(&mut self, page: PageIndex) {
        let Some(live) = &mut self.live else { return };
        let one = PageRange::new(page, 1);
        if live.seen.contains(page) {
            live.written.insert(one);
            self.safe.remove(one);
        } else {
            live.seen.insert(one);
            live.unseen_count -= 1;
        }
        self.to_come.remove(one);
        if !self.here.contains(page) {
            self.here.insert(one);
            self.here_count += 1;
            self.name_unit(page);
        }
    }

    /// Names the pages of a page's unit, if all of it is here.
    fn name_unit(&mut self, page: PageIndex) {
        let unit = self.unit(page);
        if unit.iter().all(|page| self.here.contains(page)) {
            unit.iter().for_each(|page| add(&mut self.untold, page));
        }
    }

    /// A page that was said to be safe is so no more, and is here: it was kept, since it came again.
    pub(super) fn name_again(&mut self, page: PageIndex) {
        if self.live.is_some() && self.unit(page).first == page {
            self.name_unit(page);
        }
    }

    /// Takes what came again.
    pub fn take_written(&mut self, out: &mut Vec<PageRange>) {
        let Some(live) = &mut self.live else { return };
        out.extend(live.written.runs());
        live.written = PresenceMap::new(live.seen.pages());
    }

    /// What is to come of what was there.
    pub fn withdrawn(&self, out: &mut Vec<PageRange>) {
        if self.live.is_some() {
            out.extend(self.to_come.runs());
        }
    }

    /// The pages of a range whose bytes are no newer than what is said of it.
    pub(super) fn not_newer(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        let is_newer = |page| self.live.as_ref().is_some_and(|live| live.written.contains(page));
        range.iter().filter(|page| !is_newer(*page)).for_each(|page| add(&mut runs, page));
        runs
    }

    /// What was named and is not to be had any more at the switch.
    pub(super) fn forget_discarded(&mut self) {
        for page in std::mem::take(&mut self.untold).into_iter().flat_map(PageRange::iter) {
            if self.here.contains(page) {
                add(&mut self.untold, page);
            }
        }
    }
}

#[cfg(test)]
#[path = "live_test.rs"]
mod test;
