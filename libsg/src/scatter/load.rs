//! Turns a batch of page numbers into what goes on the wire: entries with checksums, and slices of the
//! source's memory. Zero pages are told apart here, on the way, so that nobody scans memory twice.

use super::batch::Batch;
use crate::error::Result;
use crate::ids::{Checksum, Round};
use crate::limits::BATCH_PAGES;
use crate::memory::PageSlice;
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::source::PageSource;
use crate::wire::PageEntry;
use crate::wire::run::encode_runs;

/// A batch, ready for the wire. Its buffers are used again for the next one.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Pages with bytes, ascending.
    pub entries: Vec<PageEntry>,
    /// Their bytes, in order.
    pub slices: Vec<PageSlice>,
    /// Pages that are zero, ascending.
    pub zeros: Vec<PageIndex>,
    /// What the source gave, in pieces as it has them, with the first page of each.
    pieces: Vec<(PageIndex, PageSlice)>,
}

impl Loaded {
    /// Looks at every page of the batch.
    ///
    /// A unit of several pages (2 MiB) is zero as a whole or has all its bytes sent: the
    /// destination puts it together from one path.
    ///
    /// # Errors
    /// The source's.
    pub fn load(&mut self, source: &dyn PageSource, batch: &Batch, round: Round) -> Result<()> {
        self.entries.clear();
        self.slices.clear();
        self.zeros.clear();
        self.pieces.clear();
        for run in batch.runs() {
            let mut rest = run;
            while rest.pages > 0 {
                let slice = source.slice(rest)?;
                let pages = (slice.len() / PAGE_BYTES) as u32;
                self.pieces.push((rest.first, slice));
                rest = PageRange::new(PageIndex(rest.first.0 + pages), rest.pages - pages);
            }
        }
        let is_zero = |slice: &PageSlice| (0..slice.len() / PAGE_BYTES).all(|page| slice.is_zero_page(page));
        let whole_unit = batch.pages() as usize > BATCH_PAGES;
        let zero_counts = !whole_unit || self.pieces.iter().all(|(_, slice)| is_zero(slice));
        let mut pieces = std::mem::take(&mut self.pieces);
        let added =
            pieces.drain(..).try_for_each(|(first, slice)| self.add(first, &slice, round, zero_counts));
        self.pieces = pieces;
        added
    }

    fn add(&mut self, first: PageIndex, slice: &PageSlice, round: Round, zero_counts: bool) -> Result<()> {
        let pages = slice.len() / PAGE_BYTES;
        let mut from = 0;
        for at in 0..pages {
            let page = PageIndex(first.0 + at as u32);
            // It is summed first: then it is in the cache, and its sum tells nearly all pages from zero ones.
            let sum = slice.page_checksum(at);
            if zero_counts && sum == Checksum::OF_ZEROS && slice.is_zero_page(at) {
                self.push(slice, from, at)?;
                from = at + 1;
                self.zeros.push(page);
            } else {
                self.entries.push(PageEntry::raw(page, round, sum));
            }
        }
        self.push(slice, from, pages)
    }

    fn push(&mut self, slice: &PageSlice, from: usize, to: usize) -> Result<()> {
        if to > from {
            self.slices.push(slice.part(from * PAGE_BYTES, (to - from) * PAGE_BYTES)?);
        }
        Ok(())
    }

    /// Writes the table of a page frame with all pages of the batch: those with bytes, then the zero ones.
    /// Returns the count in the frame's header.
    pub fn encode(&self, round: Round, table: &mut Vec<u8>) -> usize {
        table.clear();
        encode_runs(self.entries.iter().copied().chain(self.zero_entries(round)), table)
    }

    /// The zero pages as entries of a page frame.
    pub fn zero_entries(&self, round: Round) -> impl Iterator<Item = PageEntry> + Clone {
        let mut pages = self.zeros.iter().copied().peekable();
        std::iter::from_fn(move || {
            let first = pages.next()?;
            let mut run = 1;
            while pages.next_if(|page| page.0 == first.0 + u32::from(run)).is_some() {
                run += 1;
            }
            Some(PageEntry::zero(first, run, round))
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::manifest::{Manifest, Region};
    use crate::memory::{Backing, GuestMemory};
    use crate::page::InstallUnit;
    use crate::source::MemorySource;
    use crate::wire::run::decode_runs;

    #[test]
    fn zero_pages_are_told_apart_on_the_way() {
        let region = Region {
            name: "ram".into(),
            guest_address: None,
            length_bytes: 8 * PAGE_BYTES as u64,
            unit: InstallUnit::Page,
        };
        let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: vec![], sharing: None };
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).expect("memory");
        for page in [1, 2, 5] {
            let range = PageRange::new(PageIndex(page), 1);
            memory.copy_in(range, &[page as u8; PAGE_BYTES]).expect("inside");
        }
        let source = MemorySource::new(memory);
        let mut batch = Batch::empty(PageIndex(0));
        (0..7).for_each(|page| batch.insert(PageIndex(page)));
        let mut loaded = Loaded::default();
        loaded.load(&source, &batch, Round(0)).expect("loads");
        assert_eq!(loaded.entries.iter().map(|e| e.page.0).collect::<Vec<_>>(), [1, 2, 5]);
        assert_eq!(loaded.entries[2].checksum, Checksum::of(&[5; PAGE_BYTES]));
        assert_eq!(
            loaded.slices.iter().map(PageSlice::len).collect::<Vec<_>>(),
            [2 * PAGE_BYTES, PAGE_BYTES]
        );
        let zeros: Vec<_> = loaded.zero_entries(Round(0)).map(|e| (e.page.0, e.run_pages)).collect();
        assert_eq!(zeros, [(0, 1), (3, 2), (6, 1)]);
        let (mut table, mut back) = (vec![1], Vec::new());
        assert_eq!(loaded.encode(Round(0), &mut table), 2, "pages with bytes, and zero ones");
        decode_runs(&table, 2, &mut back).expect("own bytes decode");
        let pages: Vec<_> = back.iter().map(|e: &PageEntry| e.page.0).collect();
        assert_eq!(pages, [1, 2, 5, 0, 3, 6]);
    }
}
