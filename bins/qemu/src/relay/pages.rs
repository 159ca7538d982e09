//! The relay's books of a VM's pages: which are still to come, which are here, and which are safe and were let go.
//!
//! A page is here, and can be read, from the moment on in which all of it has come until it is said to be safe. Its bytes are
//! in a slot of the [`Store`], which is used again when nobody has a slice of what lies around it: slices are made under the
//! lock under which pages are let go, and only of pages that are here. So no page is read that was let go.

use std::sync::Arc;

use libsg::Result;
use libsg::memory::{PageSlice, PresenceMap};
use libsg::page::{PageIndex, PageRange};
use qemu_stream::{BlockIndex, Span};

use super::live::Live;
use super::store::{CHUNK_SLOTS, Came, Store, Writer};
use super::stream::unread_pages;
use crate::layout::Layout;

/// How much of the stream is read ahead of what is safe.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Pages that are here and not safe, beyond which nothing is read but what the guest waits for.
    pub window_pages: u32,
    /// Pages that a source may have said and nobody has read ([`super::stream`]), and right after its buffer was made small.
    pub unread_pages: u32,
    pub narrowed_pages: u32,
    /// Pages that are asked for and under way when the stream is nearly through: a source answers all of them ten times a
    /// second.
    pub asked_pages: u32,
    /// The last pages, which are left where they are until all others are safe.
    pub last_pages: u32,
    /// So few of them are left that the source may be through at any moment.
    pub least_pages: u32,
}

impl Limits {
    /// With a window of so many bytes.
    #[must_use]
    pub fn of_window(bytes: u64) -> Self {
        let window_pages = (bytes >> 12).clamp(WINDOW_PAGES_MIN, u64::from(u32::MAX)) as u32;
        let (unread_pages, narrowed_pages) = unread_pages();
        let (asked_pages, last_pages, least_pages) = (8192, 1024, 64);
        Self { window_pages, unread_pages, narrowed_pages, asked_pages, last_pages, least_pages }
    }
}

/// Pages for which there is memory from the beginning: 32 MiB.
const WARM_PAGES_MAX: u32 = 8192;

/// Pages of the smallest window: 8 MiB.
const WINDOW_PAGES_MIN: u64 = 2048;

/// What was lost, as [`Pages::lost`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// It is here still, or comes anyway.
    Here,
    /// The source has to send it again.
    Again,
}

/// The books.
#[derive(Debug)]
pub struct Pages {
    layout: Arc<Layout>,
    /// The bytes of those that are here.
    pub(super) store: Store,
    limits: Limits,
    /// Pages that have come and count.
    pub(super) here: PresenceMap,
    pub(super) here_count: u32,
    /// Of them, those that nobody was told of.
    pub(super) untold: Vec<PageRange>,
    /// Pages that the source has said that it will send.
    pub(super) to_come: PresenceMap,
    to_come_count: u32,
    /// Of them, those that it was asked for.
    asked: PresenceMap,
    asked_count: u32,
    /// Of them, those that the guest waits for.
    wanted: PresenceMap,
    wanted_count: u32,
    /// Where it is to be asked on.
    cursor: PageIndex,
    /// Safe elsewhere, and not here.
    pub(super) safe: PresenceMap,
    /// Where the VM is sent in rounds.
    pub(super) live: Option<Live>,
}

impl Pages {
    /// Nothing has come yet.
    ///
    /// # Errors
    /// The kernel's, when it has no room for what comes.
    pub fn new(layout: Arc<Layout>, limits: Limits) -> Result<Self> {
        let none = PresenceMap::new(layout.pages());
        let store = Store::new(layout.pages(), limits.window_pages)?;
        Ok(Self {
            layout,
            store,
            limits,
            here: none.clone(),
            here_count: 0,
            untold: Vec::new(),
            to_come: none.clone(),
            to_come_count: 0,
            asked: none.clone(),
            asked_count: 0,
            wanted: none.clone(),
            wanted_count: 0,
            cursor: PageIndex(0),
            safe: none,
            live: None,
        })
    }

    /// Of a source that has switched, and whose stream broke off: everything is to come.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn left(layout: Arc<Layout>, limits: Limits) -> Result<Self> {
        let mut pages = Self::new(layout, limits)?;
        pages.discard(PageRange::new(PageIndex(0), pages.to_come.pages()));
        pages.switched();
        Ok(pages)
    }

    /// Has memory for what is to come, while the VM runs at its source: as much as a window takes.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::Input`] for more than there is room for.
    pub fn warm(&mut self) -> Result<()> {
        self.store.warm(self.limits.window_pages.min(WARM_PAGES_MAX))
    }

    /// Who writes what comes.
    #[must_use]
    pub fn writer(&self) -> Writer {
        self.store.writer()
    }

    /// Gives a writer that is full room for more.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::System`] when there is none.
    pub fn refill(&mut self, writer: &mut Writer) -> Result<()> {
        self.store.refill(writer)
    }

    /// Pages are safe elsewhere, and the source does not send them: it was not asked for anything yet.
    pub fn settle(&mut self, range: PageRange) {
        for page in range.iter() {
            self.to_come_count -= u32::from(self.to_come.contains(page));
        }
        self.to_come.remove(range);
        self.safe.insert(range);
    }

    /// What is not to come.
    pub fn settled(&self) -> PresenceMap {
        let mut settled = self.here.clone();
        self.safe.runs().for_each(|run| settled.insert(run));
        settled
    }

    /// How much may be read.
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Pages came that may come again: the VM runs at its source.
    pub fn came_early(&mut self, came: Came) {
        for (page, slot) in came.iter() {
            self.store.keep(page, slot);
            if self.live.is_some() {
                self.came_live(page);
            }
        }
        if self.live.is_none() {
            self.here.insert(came.pages);
        }
    }

    /// Pages are still to come: what came of them before does not count.
    pub fn discard(&mut self, run: PageRange) {
        run.iter().for_each(|page| self.store.drop(page));
        self.here.remove(run);
        self.to_come.insert(run);
        if let Some(live) = &mut self.live {
            live.discard(run);
            self.safe.remove(run);
        }
    }

    /// The source has switched: what is here stays what it is.
    pub fn switched(&mut self) {
        self.here_count = self.here.count();
        self.to_come_count = self.to_come.count();
        if self.live.is_some() {
            self.forget_discarded();
        } else {
            self.untold = self.here.runs().collect();
        }
    }

    /// Pages came. Those that are safe by now are let go again.
    pub fn came(&mut self, came: Came) {
        for (page, slot) in came.iter() {
            let one = PageRange::new(page, 1);
            if self.to_come.contains(page) {
                self.to_come.remove(one);
                self.to_come_count -= 1;
                self.asked_count -= u32::from(self.asked.contains(page));
                self.asked.remove(one);
                self.wanted_count -= u32::from(self.wanted.contains(page));
                self.wanted.remove(one);
            }
            if self.safe.contains(page) || self.here.contains(page) {
                self.store.give_back(slot);
            } else {
                self.store.keep(page, slot);
                self.here.insert(one);
                self.here_count += 1;
                add(&mut self.untold, page);
            }
        }
    }

    /// Pages came of which the rest does not.
    pub fn came_in_vain(&mut self, came: Came) {
        came.iter().for_each(|(_, slot)| self.store.give_back(slot));
    }

    /// No more comes. Pages that never came are zero; those that are safe or here are not among them. The pages of which
    /// `is_filled` says that they had bytes once and that are not here again: there must be none.
    pub fn ended(&mut self, is_filled: impl Fn(PageIndex) -> bool) -> Vec<PageRange> {
        let mut missing = Vec::new();
        let absent: Vec<PageRange> = self.here.absent_runs().collect();
        for page in absent.into_iter().flat_map(PageRange::iter).filter(|page| !self.safe.contains(*page)) {
            if is_filled(page) {
                add(&mut missing, page);
            } else {
                self.here.insert(PageRange::new(page, 1));
                self.here_count += 1;
                add(&mut self.untold, page);
            }
        }
        missing
    }

    /// Whether a page is here of which nobody may have been told.
    pub fn has_untold(&self, page: PageIndex) -> bool {
        self.here.contains(page) && !self.untold.is_empty()
    }

    /// What the guest waits for, as many pages as there are.
    pub const fn wanted_pages(&self) -> u32 {
        self.wanted_count
    }

    /// Takes what nobody was told of.
    pub fn take_untold(&mut self, out: &mut Vec<PageRange>) {
        out.append(&mut self.untold);
    }

    /// The bytes of pages that are here, from the first on: as many as lie together. They stay as long as the slice. `None` for
    /// what is not here.
    pub fn slice(&self, range: PageRange) -> Option<Result<PageSlice>> {
        let run = self.here.next_run(range.first, range.pages).filter(|run| run.first == range.first)?;
        let run = PageRange::new(run.first, run.pages.min(range.pages));
        Some(self.store.slice(run))
    }

    /// Pages are safe elsewhere: they cannot be had here any more, but for those that came again since.
    pub fn safe(&mut self, range: PageRange) {
        if self.live.is_none() {
            return self.forget(range);
        }
        self.not_newer(range).into_iter().for_each(|run| self.forget(run));
    }

    fn forget(&mut self, range: PageRange) {
        for page in range.iter().filter(|page| self.here.contains(*page)) {
            self.here_count -= 1;
            self.store.drop(page);
        }
        self.here.remove(range);
        self.safe.insert(range);
    }

    /// Pages that were safe are so no more.
    pub fn lost(&mut self, range: PageRange) -> Lost {
        let mut lost = Lost::Here;
        for page in range.iter() {
            let one = PageRange::new(page, 1);
            if !self.safe.contains(page) {
                self.name_again(page);
                continue;
            }
            self.safe.remove(one);
            if !self.to_come.contains(page) {
                self.to_come.insert(one);
                self.to_come_count += 1;
                lost = Lost::Again;
            }
        }
        lost
    }

    /// The source sends everything anew that is to come: what it was asked for does not count.
    pub fn broken(&mut self) {
        let pages = self.asked.pages();
        self.asked = PresenceMap::new(pages);
        (self.asked_count, self.cursor) = (0, PageIndex(0));
    }

    /// The bitmap of a block of pages that need not come.
    pub fn received(&self, block: BlockIndex, bytes: usize, out: &mut Vec<u8>) {
        let first = self.layout.page(block, 0);
        let pages = self.layout.blocks().get(block).map_or(0, |block| (block.length_bytes >> 12) as u32);
        let begin = out.len();
        out.resize(begin + bytes, 0);
        for at in (0..pages).filter(|at| !self.to_come.contains(PageIndex(first.0 + at))) {
            if let Some(byte) = out.get_mut(begin + at as usize / 8) {
                *byte |= 1 << (at % 8);
            }
        }
    }

    /// Whether a page is still to come.
    pub fn is_to_come(&self, page: PageIndex) -> bool {
        self.to_come.contains(page)
    }

    /// Whether everything that has come is safe, and nothing was asked for that has not come, but for what the guest waits for:
    /// it may ask for one page after the other.
    pub const fn is_idle(&self) -> bool {
        self.here_count == 0 && self.asked_count == self.wanted_count
    }

    /// Pages that are to come, asked for, wanted and here, for who looks why nothing goes on.
    pub const fn stands(&self) -> (u32, u32, u32, u32) {
        (self.to_come_count, self.asked_count, self.wanted_count, self.here_count)
    }

    /// The pages that are to come.
    pub fn runs_to_come(&self) -> Vec<PageRange> {
        self.to_come.runs().collect()
    }

    /// Pages that are to come.
    pub const fn to_come(&self) -> u32 {
        self.to_come_count
    }

    /// Whether another piece of the stream is to be read, while it flows by itself.
    pub fn has_room(&self) -> bool {
        // In pieces they may take twice as much.
        let slots = 2 * (self.limits.window_pages + CHUNK_SLOTS);
        self.wanted_count > 0
            || (self.here_count < self.limits.window_pages && self.store.used_slots() <= slots)
    }

    /// The guest waits for a page: the unit to be asked for, unless it is here, or was asked for.
    pub fn want(&mut self, page: PageIndex) -> Option<(BlockIndex, Span)> {
        let (block, span) = self.layout.unit(page)?;
        let unit = self.layout.range(block, span);
        if !self.to_come.contains(page) || self.wanted.contains(page) {
            return None;
        }
        self.set_wanted(unit);
        let was_asked = self.asked.contains(page);
        self.set_asked(unit);
        (!was_asked).then_some((block, span))
    }

    fn set_wanted(&mut self, unit: PageRange) {
        for page in unit.iter().filter(|page| self.to_come.contains(*page)) {
            self.wanted_count += u32::from(!self.wanted.contains(page));
            self.wanted.insert(PageRange::new(page, 1));
        }
    }

    fn set_asked(&mut self, range: PageRange) {
        for page in range.iter().filter(|page| self.to_come.contains(*page)) {
            self.asked_count += u32::from(!self.asked.contains(page));
            self.asked.insert(PageRange::new(page, 1));
        }
    }

    /// The pages that come together with one.
    pub(super) fn unit(&self, page: PageIndex) -> PageRange {
        let unit = self.layout.unit(page).map(|(block, span)| self.layout.range(block, span));
        unit.unwrap_or(PageRange::new(page, 1))
    }

    /// What the source is asked for next, which sends next to nothing by itself: as much as there is room for, and the last
    /// pages only if `all`.
    pub fn next_asks(&mut self, all: bool, out: &mut Vec<(BlockIndex, Span)>) {
        let Limits { window_pages, asked_pages, last_pages, .. } = self.limits;
        let kept = if all { 0 } else { last_pages };
        let mut left = self.to_come_count.saturating_sub(self.asked_count).saturating_sub(kept);
        left = left.min(asked_pages.saturating_sub(self.asked_count));
        if !all {
            left = left.min(window_pages.saturating_sub(self.here_count + self.asked_count));
        }
        let mut from = self.cursor;
        while left > 0
            && let Some(run) = self.next_unasked(from).or_else(|| self.next_unasked(PageIndex(0)))
            && let Some((block, offset)) = self.layout.place(run.first)
            && let Some(unit) = self.layout.blocks().get(block)
        {
            let unit_pages = (unit.page_bytes >> 12) as u32;
            let in_block = ((unit.length_bytes - offset) >> 12) as u32;
            // A unit comes as a whole. Where there is no room for it, nothing behind it is taken instead.
            let pages = run.pages.min(left - left % unit_pages).min(in_block);
            if pages == 0 {
                break;
            }
            let start_bytes = offset - offset % unit.page_bytes;
            let end = (offset + (u64::from(pages) << 12)).next_multiple_of(unit.page_bytes);
            let span = Span { start_bytes, length_bytes: end - start_bytes };
            let before = self.asked_count;
            self.set_asked(self.layout.range(block, span));
            left = left.saturating_sub(self.asked_count - before);
            out.push((block, span));
            from = PageIndex(self.layout.page(block, start_bytes).0 + (span.length_bytes >> 12) as u32);
            self.cursor = from;
        }
    }

    /// The next pages to come that were not asked for.
    fn next_unasked(&self, from: PageIndex) -> Option<PageRange> {
        let mut from = from;
        while let Some(run) = self.to_come.next_run(from, self.limits.asked_pages) {
            if !self.asked.contains(run.first) {
                let asked = self.asked.next_run(run.first, 1).map_or(u32::MAX, |asked| asked.first.0);
                return Some(PageRange::new(run.first, run.pages.min(asked - run.first.0)));
            }
            let asked = self.asked.next_run(run.first, u32::MAX)?;
            from = PageIndex(asked.first.0 + asked.pages);
        }
        None
    }

    /// Appends what the guest waits for, to be asked for anew.
    pub fn wanted(&mut self, out: &mut Vec<(BlockIndex, Span)>) {
        let none = PresenceMap::new(self.wanted.pages());
        let wanted = std::mem::replace(&mut self.wanted, none);
        self.wanted_count = 0;
        for page in wanted.runs().flat_map(PageRange::iter) {
            out.extend(self.want(page));
        }
    }
}

/// Appends a page to runs.
pub(super) fn add(runs: &mut Vec<PageRange>, page: PageIndex) {
    match runs.last_mut() {
        Some(run) if run.first.0 + run.pages == page.0 => run.pages += 1,
        _ => runs.push(PageRange::new(page, 1)),
    }
}

#[cfg(test)]
#[path = "pages_test.rs"]
pub mod test;
