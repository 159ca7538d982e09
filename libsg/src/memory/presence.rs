//! Which pages have memory at all. A page that has none is zero, and is not read to find out:
//! reading a hole of a memfd allocates it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::mapping::{Mapping, Scan, ScannedRun, scan_pagemap};
use crate::error::{Error, ErrorKind, Result};
use crate::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};

/// One bit for each page of a volume: set for a page that has memory of its own, in core or in swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceMap {
    words: Vec<u64>,
    pages: u32,
}

impl PresenceMap {
    /// A map of `pages` pages, none of them present.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        Self { words: vec![0; (pages as usize).div_ceil(64)], pages }
    }

    /// How many pages the map covers.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// How many pages are present.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether a page is present. False outside of the map.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[page.as_usize() / 64] >> (page.0 % 64) & 1 != 0
    }

    /// Marks pages as present. What is outside of the map is left out.
    pub fn insert(&mut self, range: PageRange) {
        self.set(range, true);
    }

    /// Marks pages as absent. What is outside of the map is left out.
    pub fn remove(&mut self, range: PageRange) {
        self.set(range, false);
    }

    /// The first run of present pages at or after `from`, of at most `pages_max` pages.
    #[must_use]
    pub fn next_run(&self, from: PageIndex, pages_max: u32) -> Option<PageRange> {
        let first = self.find(from.0, true)?;
        let end = self.find(first, false).unwrap_or(self.pages);
        Some(PageRange::new(PageIndex(first), (end - first).min(pages_max)))
    }

    /// The runs of present pages, each as long as it is.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> {
        let mut at = PageIndex(0);
        std::iter::from_fn(move || {
            let run = self.next_run(at, u32::MAX)?;
            at = PageIndex(run.first.0 + run.pages);
            Some(run)
        })
    }

    /// The runs of pages that are not present, each as long as it is.
    pub fn absent_runs(&self) -> impl Iterator<Item = PageRange> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.find(at, false)?;
            let end = self.find(first, true).unwrap_or(self.pages);
            at = end;
            Some(PageRange::new(PageIndex(first), end - first))
        })
    }

    fn set(&mut self, range: PageRange, present: bool) {
        let end = range.first.0.saturating_add(range.pages).min(self.pages);
        let mut at = range.first.0;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            let word = &mut self.words[at as usize / 64];
            *word = if present { *word | mask } else { *word & !mask };
            at += bits;
        }
    }

    /// The first page at or after `from` that is present, or absent.
    fn find(&self, from: u32, present: bool) -> Option<u32> {
        let mut at = from;
        while at < self.pages {
            let word = self.words[at as usize / 64];
            let word = (if present { word } else { !word }) >> (at % 64);
            if word != 0 {
                return Some(at + word.trailing_zeros()).filter(|page| *page < self.pages);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// Marks which pages of `mapping` are present; its first page has number `first`.
pub(super) fn scan(mapping: &Mapping, first: PageIndex, map: &mut PresenceMap) -> Result<()> {
    let scanned = match mapping.file() {
        Some((file, offset)) if !mapping.is_huge() => scan_file(file, offset, mapping.len(), first, map),
        file => scan_table(mapping, first, map).and_then(|()| match file {
            Some((file, offset)) => scan_unmapped(file, offset, mapping.len(), first, map),
            None => Ok(()),
        }),
    };
    scanned.map_err(|cause| {
        Error::new(ErrorKind::System, "the kernel does not say which pages have memory").because(cause)
    })
}

/// Memory of a tmpfs file: what is no hole, wherever it lies, mapped here or not.
fn scan_file(
    file: BorrowedFd<'_>,
    offset: u64,
    bytes: usize,
    first: PageIndex,
    map: &mut PresenceMap,
) -> io::Result<()> {
    let end = offset + bytes as u64;
    let mut at = offset;
    while at < end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(end);
        map.insert(pages_of(data - offset, hole - offset, first));
        at = hole;
    }
    Ok(())
}

/// Private memory, and huge pages: what this process's page table has.
fn scan_table(mapping: &Mapping, first: PageIndex, map: &mut PresenceMap) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    match scan_table_at_once(&pagemap, mapping, first, map) {
        // Kernels before 6.7 do not know the request; some sandboxes do not pass it on.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL | libc::EPERM)) => {
            scan_table_by_entry(&pagemap, mapping, first, map)
        }
        done => done,
    }
}

/// By the `PAGEMAP_SCAN` request: runs instead of entries, and absent tables are stepped over.
fn scan_table_at_once(
    pagemap: &File,
    mapping: &Mapping,
    first: PageIndex,
    map: &mut PresenceMap,
) -> io::Result<()> {
    let base = mapping.as_ptr().addr() as u64;
    let end = base + mapping.len() as u64;
    let scan = if mapping.is_huge() { Scan::PRESENT_HUGE } else { Scan::PRESENT };
    let mut runs = [ScannedRun::default(); 256];
    let mut at = base;
    while at < end {
        let (filled, looked) = scan_pagemap(pagemap.as_fd(), scan, at, end, &mut runs)?;
        for run in &runs[..filled] {
            map.insert(pages_of(run.start - base, run.end - base, first));
        }
        if looked <= at {
            return Err(io::Error::other("the scan of the page table does not get on"));
        }
        at = looked;
    }
    Ok(())
}

/// By reading the table's entries, 8 bytes a page.
fn scan_table_by_entry(
    pagemap: &File,
    mapping: &Mapping,
    first: PageIndex,
    map: &mut PresenceMap,
) -> io::Result<()> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    let base = mapping.as_ptr().addr() / PAGE_BYTES;
    let pages = mapping.len() / PAGE_BYTES;
    let mut entries = [0; 8 * 1024];
    let mut at = 0;
    while at < pages {
        let some = (pages - at).min(entries.len() / 8);
        pagemap.read_exact_at(&mut entries[..some * 8], (base + at) as u64 * 8)?;
        for (page, entry) in entries[..some * 8].as_chunks::<8>().0.iter().enumerate() {
            if u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0 {
                map.insert(PageRange::new(PageIndex(first.0 + (at + page) as u32), 1));
            }
        }
        at += some;
    }
    Ok(())
}

/// Huge pages that the file has but this process's page table has not, because another mapping made
/// them. A hugetlbfs says nothing of its holes, only how much it holds in all; when that is more
/// than was found, the rest is read by `pread`, which allocates nothing. Absent and zero are the same.
fn scan_unmapped(
    file: BorrowedFd<'_>,
    offset: u64,
    bytes: usize,
    first: PageIndex,
    map: &mut PresenceMap,
) -> io::Result<()> {
    const UNIT: u64 = InstallUnit::Huge2M.bytes() as u64;
    const BLOCK_BYTES: u64 = 512;
    let units = bytes as u64 / UNIT;
    let unit_pages = |unit: u64| pages_of(unit * UNIT, (unit + 1) * UNIT, first);
    let held = rustix::fs::fstat(file)?.st_blocks as u64 * BLOCK_BYTES / UNIT;
    let found = (0..units).filter(|unit| map.contains(unit_pages(*unit).first)).count() as u64;
    if held <= found {
        return Ok(());
    }
    let mut piece = vec![0; 1 << 16];
    for unit in 0..units {
        if map.contains(unit_pages(unit).first) {
            continue;
        }
        for at in (0..UNIT).step_by(piece.len()) {
            let got = rustix::io::pread(file, &mut piece[..], offset + unit * UNIT + at)?;
            if piece[..got].iter().any(|byte| *byte != 0) {
                map.insert(unit_pages(unit));
                break;
            }
        }
    }
    Ok(())
}

/// The pages between two offsets in bytes, the first of which may be inside a page.
fn pages_of(start: u64, end: u64, first: PageIndex) -> PageRange {
    let (start, end) = (start / PAGE_BYTES_U64, end.div_ceil(PAGE_BYTES_U64));
    PageRange::new(PageIndex(first.0 + start as u32), (end - start) as u32)
}

#[cfg(test)]
pub(super) mod test {
    use super::*;
    use crate::memory::GuestMemory;

    /// Presence as a kernel without `PAGEMAP_SCAN` tells it.
    pub(in crate::memory) fn by_entry(memory: &GuestMemory) -> PresenceMap {
        let mut map = PresenceMap::new(memory.pages());
        let pagemap = File::open("/proc/self/pagemap").expect("opened");
        for region in memory.regions() {
            scan_table_by_entry(&pagemap, region.mapping(), region.pages().first, &mut map).expect("read");
        }
        map
    }
}
