//! A batch: up to [`BATCH_PAGES_MAX`] pages that lie close together, as a first page and a bit mask.

use crate::limits::BATCH_PAGES_MAX;
use crate::page::{PageIndex, PageRange};

const WORDS: usize = BATCH_PAGES_MAX / 64;

/// Pages of one group of memory: a first page, and which of the pages behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    first: PageIndex,
    mask: [u64; WORDS],
}

impl Batch {
    /// No page yet, of the group that begins at `first`.
    #[must_use]
    pub const fn empty(first: PageIndex) -> Self {
        Self { first, mask: [0; WORDS] }
    }

    /// One page.
    #[must_use]
    pub fn of(page: PageIndex) -> Self {
        let mut batch = Self::empty(page);
        batch.insert(page);
        batch
    }

    /// Adds a page. One that does not belong to the group is left out.
    pub fn insert(&mut self, page: PageIndex) {
        if let Some((word, bit)) = self.at(page) {
            self.mask[word] |= bit;
        }
    }

    /// Takes a page out.
    pub fn remove(&mut self, page: PageIndex) {
        if let Some((word, bit)) = self.at(page) {
            self.mask[word] &= !bit;
        }
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        self.at(page).is_some_and(|(word, bit)| self.mask[word] & bit != 0)
    }

    /// How many pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.mask.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mask == [0; WORDS]
    }

    /// Its pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + Clone + use<> {
        let Self { first, mask } = *self;
        (0..WORDS).flat_map(move |word| {
            let mut bits = mask[word];
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros())?;
                bits &= bits - 1;
                Some(PageIndex(first.0 + word as u32 * 64 + bit))
            })
        })
    }

    /// Its pages as runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + use<> {
        let mut pages = self.iter().peekable();
        std::iter::from_fn(move || {
            let mut run = PageRange::new(pages.next()?, 1);
            while pages.next_if(|page| page.0 == run.first.0 + run.pages).is_some() {
                run.pages += 1;
            }
            Some(run)
        })
    }

    fn at(&self, page: PageIndex) -> Option<(usize, u64)> {
        let offset = page.0.checked_sub(self.first.0)? as usize;
        (offset < BATCH_PAGES_MAX).then(|| (offset / 64, 1 << (offset % 64)))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn holds_what_was_put_in() {
        let mut batch = Batch::empty(PageIndex(100));
        for page in [99, 100, 101, 163, 164, 611, 612] {
            batch.insert(PageIndex(page));
        }
        assert_eq!(batch.iter().map(|p| p.0).collect::<Vec<_>>(), [100, 101, 163, 164, 611]);
        let runs: Vec<_> = batch.runs().map(|run| (run.first.0, run.pages)).collect();
        assert_eq!(runs, [(100, 2), (163, 2), (611, 1)]);
        batch.remove(PageIndex(163));
        assert!(!batch.contains(PageIndex(163)) && batch.contains(PageIndex(164)));
        assert_eq!(batch.pages(), 4);
    }
}
