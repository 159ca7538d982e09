//! Pages: the unit on the wire, and how they are numbered.
//!
//! A volume's memory is a list of regions (see [`crate::manifest`]). Its pages are numbered densely
//! over those regions, in their order, by [`PageIndex`].

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes of a page, the unit on the wire: 4 KiB whatever the backing of the memory.
pub const PAGE_BYTES: usize = 4096;

/// [`PAGE_BYTES`] as a wide number, for arithmetic on sizes.
pub const PAGE_BYTES_U64: u64 = PAGE_BYTES as u64;

/// Dense number of a page over the regions of a volume's manifest.
///
/// 32 bits: a volume has at most 2^32 - 1 pages (16 TiB), which keeps the books at source and
/// destination within 16 bytes a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageIndex(pub u32);

impl PageIndex {
    /// The index as a table position.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// The page `pages` further on; `None` past the last number there is.
    #[must_use]
    pub fn checked_add(self, pages: u32) -> Option<Self> {
        self.0.checked_add(pages).map(Self)
    }
}

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A run of consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u32,
}

impl PageRange {
    /// `pages` pages from `first` on.
    #[must_use]
    pub const fn new(first: PageIndex, pages: u32) -> Self {
        Self { first, pages }
    }

    /// The page numbers, as a range of table positions.
    #[must_use]
    pub fn positions(self) -> Range<usize> {
        let first = self.first.as_usize();
        first..first + self.pages as usize
    }

    /// Every page of the run, in order.
    pub fn iter(self) -> impl Iterator<Item = PageIndex> {
        (self.first.0..self.first.0.saturating_add(self.pages)).map(PageIndex)
    }

    /// Gathers sorted or unsorted pages into the fewest runs, sorted.
    #[must_use]
    pub fn from_pages(mut pages: Vec<PageIndex>) -> Vec<Self> {
        pages.sort_unstable();
        pages.dedup();
        let mut runs: Vec<Self> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.first.0 + run.pages == page.0 => run.pages += 1,
                _ => runs.push(Self::new(page, 1)),
            }
        }
        runs
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pages {
            1 => write!(f, "{}", self.first.0),
            n => write!(f, "{}-{}", self.first.0, u64::from(self.first.0) + u64::from(n) - 1),
        }
    }
}

/// What is installed at once at the destination, in pages: 1 (4 KiB), or 512 for 2 MiB hugetlb
/// memory. Never split over paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum InstallUnit {
    /// 4 KiB.
    Page,
    /// 2 MiB: hugetlb memory, which the kernel installs in whole huge pages only.
    Huge2M,
}

impl InstallUnit {
    /// Pages in one unit.
    #[must_use]
    pub const fn pages(self) -> u32 {
        match self {
            Self::Page => 1,
            Self::Huge2M => 512,
        }
    }

    /// Bytes in one unit.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.pages() as usize * PAGE_BYTES
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn runs_are_the_fewest() {
        let pages = [5, 3, 4, 9, 4].map(PageIndex).to_vec();
        let runs = PageRange::from_pages(pages);
        assert_eq!(runs, [PageRange::new(PageIndex(3), 3), PageRange::new(PageIndex(9), 1)]);
        assert_eq!(runs[0].to_string(), "3-5");
        assert_eq!(runs[1].to_string(), "9");
        assert_eq!(runs[0].iter().map(|p| p.0).collect::<Vec<_>>(), [3, 4, 5]);
    }
}
