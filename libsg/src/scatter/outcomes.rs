//! What a source of pages is told of them that does not keep what is safe: which were told as safe, which news there are,
//! and which it must get again.
//!
//! A bit a page and one for each 64, written where the planner's books are written anyway: nothing is allocated and nobody
//! is called on the way of a page. Whoever leads the migration takes the news from time to time.

use super::table::PageState;
use crate::memory::PresenceMap;
use crate::page::{PageIndex, PageRange};

/// Pages that are looked at together when something is new.
const BLOCK_PAGES: u32 = 64;

/// The books of it.
#[derive(Debug)]
pub struct Outcomes {
    /// Pages that the source was told are safe: it may have forgotten them.
    told: PresenceMap,
    /// Blocks of which pages have become safe.
    fresh: PresenceMap,
    /// Pages that were told as safe, and whose bytes are needed again.
    lost: PresenceMap,
    has_lost: bool,
    /// Pages that lie elsewhere and that the source never gave: what became of those that another process scattered.
    found: PresenceMap,
    /// Pages that somebody is about to read, as of the moment in which news are taken.
    busy: PresenceMap,
}

impl Outcomes {
    /// Nothing was told yet.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let none = PresenceMap::new(pages);
        Self {
            told: none.clone(),
            fresh: PresenceMap::new(pages.div_ceil(BLOCK_PAGES)),
            lost: none.clone(),
            has_lost: false,
            found: none.clone(),
            busy: none,
        }
    }

    /// A page goes from one state to another. Says to which: one whose bytes the source may have forgotten, or has not given
    /// yet, waits for it.
    pub fn moves(&mut self, page: PageIndex, before: PageState, to: PageState) -> PageState {
        if to.is_safe() && !before.is_safe() {
            self.set_fresh(page);
        }
        if before == PageState::Waiting {
            if to.is_safe() {
                self.found.insert(one(page));
            } else {
                self.found.remove(one(page));
            }
            return to;
        }
        if to != PageState::Unsent {
            return to;
        }
        if !self.told.contains(page) {
            return if self.found.contains(page) { PageState::Waiting } else { to };
        }
        self.told.remove(one(page));
        self.lost.insert(one(page));
        self.has_lost = true;
        PageState::Waiting
    }

    /// Whether the source may have forgotten a page.
    #[must_use]
    pub fn is_told(&self, page: PageIndex) -> bool {
        self.told.contains(page)
    }

    /// The source is told that pages are safe.
    pub fn tell(&mut self, range: PageRange) {
        self.told.insert(range);
    }

    /// What the source was told of a page does not count any more. Where it is safe it is told anew.
    pub fn take_back(&mut self, page: PageIndex) {
        self.told.remove(one(page));
        self.set_fresh(page);
    }

    /// The first page that is lost.
    #[must_use]
    pub fn first_lost(&self) -> Option<PageIndex> {
        if self.has_lost { self.lost.next_run(PageIndex(0), 1).map(|run| run.first) } else { None }
    }

    /// The source hears of these pages that they are lost, or need not.
    pub fn forget_lost(&mut self, range: PageRange) {
        self.lost.remove(range);
        self.has_lost = self.lost.next_run(range.first, 1).is_some();
    }

    /// The next pages, from `from` on, among which some have become safe. They are news no more.
    pub fn take_fresh(&mut self, from: PageIndex) -> Option<PageRange> {
        let block = self.fresh.next_run(PageIndex(from.0.div_ceil(BLOCK_PAGES)), 1)?;
        self.fresh.remove(block);
        let first = block.first.0 * BLOCK_PAGES;
        Some(PageRange::new(PageIndex(first), BLOCK_PAGES.min(self.told.pages() - first)))
    }

    /// A page is looked at again the next time.
    pub fn set_fresh(&mut self, page: PageIndex) {
        self.fresh.insert(one(PageIndex(page.0 / BLOCK_PAGES)));
    }

    /// Somebody is about to read a page, or is so no more.
    pub fn set_busy(&mut self, page: PageIndex, busy: bool) {
        if busy { self.busy.insert(one(page)) } else { self.busy.remove(one(page)) }
    }

    /// Whether somebody is about to read a page.
    #[must_use]
    pub fn is_busy(&self, page: PageIndex) -> bool {
        self.busy.contains(page)
    }

    /// Bytes allocated.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (4 * self.told.pages() as usize + self.fresh.pages() as usize) / 8
    }
}

fn one(page: PageIndex) -> PageRange {
    PageRange::new(page, 1)
}
