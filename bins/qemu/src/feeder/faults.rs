//! Pages that a destination QEMU waits for, as many as it has, however often it asks for one.

use libsg::memory::PresenceMap;
use libsg::page::{PageIndex, PageRange};

/// Those that nobody was told of yet.
pub(super) struct Faults {
    /// In the order in which they were asked for, none twice.
    order: Vec<PageIndex>,
    waiting: PresenceMap,
}

impl Default for Faults {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Faults {
    /// Of a VM with so many pages.
    pub(super) fn new(pages: u32) -> Self {
        Self { order: Vec::new(), waiting: PresenceMap::new(pages) }
    }

    /// It is waited for, if there is such a page.
    pub(super) fn ask(&mut self, page: PageIndex) {
        if page.0 < self.waiting.pages() && !self.waiting.contains(page) {
            self.waiting.insert(PageRange::new(page, 1));
            self.order.push(page);
        }
    }

    /// How many they are.
    pub(super) const fn count(&self) -> usize {
        self.order.len()
    }

    /// Tells of them, once.
    pub(super) fn take(&mut self) -> impl Iterator<Item = PageIndex> {
        let Self { order, waiting } = self;
        order.drain(..).inspect(|page| waiting.remove(PageRange::new(*page, 1)))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn who_asks_for_ever_is_told_of_once_until_somebody_looks() {
        let mut faults = Faults::new(70);
        for _ in 0..2 {
            for _ in 0..100_000 {
                [69, 0, 69, 70, u32::MAX].map(PageIndex).into_iter().for_each(|page| faults.ask(page));
            }
            assert!(faults.order.capacity() <= 70);
            assert_eq!(faults.take().collect::<Vec<_>>(), [69, 0].map(PageIndex));
            assert_eq!(faults.take().count(), 0);
        }
    }
}
