//! Pages that are written to the file behind the memory, and then mapped where the guest waits for them
//! (`UFFDIO_CONTINUE`), instead of copied there by the kernel.
//!
//! Where a file has large folios, a page of it is in the page cache as soon as any page beside it is. So being there says
//! nothing of having come, and the memory is registered for both kinds of faults: of pages that the file lacks, and of
//! pages that it has and the guest's mapping has not. What maps a page is the request alone.
//!
//! `UFFDIO_COPY` leaves a page alone that is in place, a write does not. That a page which the guest may have changed is
//! never written again is kept by a [`Book`]: whoever writes has taken the page before, and nobody takes what is there.

use std::fs;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use super::steps::Step;
use super::{Uffd, raw};
use crate::memory::{GuestMemory, MemoryRegion};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};

/// What the kernel says of large folios in memory files.
const LARGE_FOLIOS: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const SWAPS: &str = "/proc/swaps";

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// How pages get into memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallBy {
    /// `UFFDIO_COPY`, whatever the memory is.
    Copy,
    /// Through the file behind each region of 4 KiB pages that has one, and `UFFDIO_CONTINUE`. Kernel 6.6, which can
    /// poison pages; elsewhere, and for other regions, [`Self::Copy`].
    File,
}

impl InstallBy {
    /// What costs less on this host: the file where the kernel gives memory files large folios, a third of a copy then.
    /// With 4 KiB folios it costs an eighth more. Where there is swap it is the copy: what is swapped out comes back
    /// through us in the other mode, and would stand before the pages that are waited for.
    #[must_use]
    pub fn best() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        if has_large_folios(&read(LARGE_FOLIOS)) && !has_swap(&read(SWAPS)) { Self::File } else { Self::Copy }
    }
}

fn has_large_folios(enabled: &str) -> bool {
    ["[always]", "[within_size]", "[force]"].iter().any(|on| enabled.contains(on))
}

/// A line for each behind the head.
fn has_swap(swaps: &str) -> bool {
    swaps.lines().nth(1).is_some()
}

/// Which pages of a region are in place, and which somebody is at: two bits a page, no lock.
pub(super) struct Book {
    pages: PageRange,
    /// Somebody writes it, or it is there.
    taken: Box<[AtomicU64]>,
    /// It was mapped.
    there: Box<[AtomicU64]>,
}

/// The answer to [`Book::take`].
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    /// So many pages, from the first on, are the caller's: to be settled, or given back.
    Run(u32),
    /// The first is in place.
    There,
    /// Somebody is at the first.
    Busy,
}

impl Book {
    fn new(pages: PageRange) -> Self {
        let bits = || (0..pages.pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { pages, taken: bits(), there: bits() }
    }

    /// The words of a range, and which bits of them. What is outside is left out.
    fn words(&self, range: PageRange) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = range.positions().end.min(self.pages.positions().end) - self.pages.first.as_usize();
        let mut at = range.first.as_usize() - self.pages.first.as_usize();
        std::iter::from_fn(move || {
            let count = end.checked_sub(at).filter(|left| *left > 0)?.min(64 - at % 64);
            let word = (at / 64, (u64::MAX >> (64 - count)) << (at % 64));
            at += count;
            Some(word)
        })
    }

    fn take(&self, range: PageRange) -> Taken {
        let mut run = 0;
        for (word, mask) in self.words(range) {
            let before = self.taken[word].fetch_or(mask, Ordering::AcqRel);
            let held = before & mask;
            if held == 0 {
                run += mask.count_ones();
                continue;
            }
            // Those up to the first that is held; what was free behind it is given back.
            let mine = mask & ((1 << held.trailing_zeros()) - 1);
            self.taken[word].fetch_and(!(mask & !before & !mine), Ordering::AcqRel);
            run += mine.count_ones();
            break;
        }
        match run {
            0 if self.is_there(range.first) => Taken::There,
            0 => Taken::Busy,
            run => Taken::Run(run),
        }
    }

    fn settle(&self, range: PageRange) {
        for (word, mask) in self.words(range) {
            self.there[word].fetch_or(mask, Ordering::AcqRel);
        }
    }

    fn give_back(&self, range: PageRange) {
        for (word, mask) in self.words(range) {
            self.taken[word].fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// The pages are out of place again. Who is at one of them keeps it: it is taken by nobody else meanwhile.
    fn forget(&self, range: PageRange) {
        for (word, mask) in self.words(range) {
            let gone = self.there[word].fetch_and(!mask, Ordering::AcqRel) & mask;
            self.taken[word].fetch_and(!gone, Ordering::AcqRel);
        }
    }

    fn is_there(&self, page: PageIndex) -> bool {
        let mut words = self.words(PageRange::new(page, 1));
        words.next().is_some_and(|(word, mask)| self.there[word].load(Ordering::Acquire) & mask != 0)
    }

    /// Settles, or gives back, what a step with taken pages did.
    fn after(&self, range: PageRange, step: &Step) {
        let done = match step {
            Step::Done(bytes) => ((bytes / PAGE_BYTES) as u32).min(range.pages),
            // Mapped by somebody who has another descriptor of this memory.
            Step::Present => 1,
            Step::Again | Step::Failed(_) => 0,
        };
        self.settle(PageRange::new(range.first, done));
        self.give_back(PageRange::new(PageIndex(range.first.0 + done), range.pages - done));
    }
}

/// Which regions take pages through their files.
#[derive(Default)]
pub(super) struct Landing(Vec<Book>);

impl Landing {
    /// Of no region.
    pub(super) const fn none() -> Self {
        Self(Vec::new())
    }

    pub(super) fn add(&mut self, region: &MemoryRegion) {
        self.0.push(Book::new(region.pages()));
    }

    pub(super) fn is_used(&self) -> bool {
        !self.0.is_empty()
    }

    /// The book of a page's region, where there is one.
    pub(super) fn of(&self, page: PageIndex) -> Option<&Book> {
        let after = self.0.partition_point(|book| book.pages.first <= page);
        let book = self.0.get(after.checked_sub(1)?)?;
        book.pages.positions().contains(&page.as_usize()).then_some(book)
    }

    /// These pages are out of place. A range lies in one region.
    pub(super) fn forget(&self, range: PageRange) {
        if let Some(book) = self.of(range.first) {
            book.forget(range);
        }
    }

    /// A page that is in place is not mapped: the kernel took the mapping away, and kept the page. True: it was mapped
    /// again, or whoever waits for it looks again.
    pub(super) fn maps_again(&self, descriptor: &userfaultfd::Uffd, page: PageIndex, address: u64) -> bool {
        if !self.of(page).is_some_and(|book| book.is_there(page)) {
            return false;
        }
        let step = raw::map(descriptor, address, PAGE_BYTES);
        if !matches!(step, Step::Done(_))
            && let Err(error) = raw::wake(descriptor, address, PAGE_BYTES)
        {
            tracing::error!(%page, %error, ?step, "a page that is there cannot be mapped");
        }
        true
    }
}

/// Whether a region has a file of 4 KiB pages. That it can be written to is sure: it was emptied by way of it.
pub(super) fn has_file(region: &MemoryRegion) -> bool {
    !region.mapping().is_huge() && region.mapping().file().is_some()
}

/// Says once why pages are copied though they were to go through files.
pub(super) fn say_refused(cause: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::debug!(%cause, "the kernel maps no pages of memory files by request: they are copied");
    });
}

impl Uffd {
    /// Writes as many pages as are nobody's to the file, and maps them.
    pub(super) fn land(&self, book: &Book, range: PageRange, address: u64, bytes: &[u8]) -> Step {
        self.with_taken(book, range, |memory, mine| {
            write_and_map(&self.descriptor, memory, mine, address, bytes)
        })
    }

    /// The same with zeros: a page that the file lacks is made by the kernel, one that it has may be of what was given up.
    pub(super) fn land_zeros(&self, book: &Book, range: PageRange, address: u64) -> Step {
        self.with_taken(book, range, |memory, mine| {
            match raw::zero(&self.descriptor, address, mine.pages as usize * PAGE_BYTES) {
                Step::Present => {
                    write_and_map(&self.descriptor, memory, PageRange::new(mine.first, 1), address, &ZEROS)
                }
                step => step,
            }
        })
    }

    fn with_taken(
        &self,
        book: &Book,
        range: PageRange,
        work: impl FnOnce(&GuestMemory, PageRange) -> Step,
    ) -> Step {
        let Some(memory) = &self.memory else { return Step::Again };
        let mine = match book.take(range) {
            Taken::Run(pages) => PageRange::new(range.first, pages),
            Taken::There => return Step::Present,
            Taken::Busy => return Step::Again,
        };
        let step = work(memory, mine);
        book.after(mine, &step);
        step
    }
}

fn write_and_map(
    descriptor: &userfaultfd::Uffd,
    memory: &GuestMemory,
    range: PageRange,
    address: u64,
    bytes: &[u8],
) -> Step {
    let len = range.pages as usize * PAGE_BYTES;
    match bytes.get(..len).map(|bytes| memory.write_file(range, bytes)) {
        Some(Ok(())) => raw::map(descriptor, address, len),
        Some(Err(error)) => Step::Failed(error),
        None => Step::Failed(io::ErrorKind::InvalidInput.into()),
    }
}

#[cfg(test)]
mod test;
