//! A content server's store under the pool's hash, in this thread, beside that hash and a copy alone: what slots,
//! table and books cost.

use std::hint::black_box;
use std::time::Instant;

use libsg::content::{ContentHasher, Sharing};
use libsg::ids::{self, Checksum, Placement};
use libsg::limits::BATCH_PAGES;
use libsg::manifest::Manifest;
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::server::Config;
use libsg::server::local::LocalStore;
use libsg::transport::PoolSecret;
use libsg::wire::{GetEntry, PageEntry};
use libsg::{Error, ErrorKind, Result};

/// Beside so many batches is a page that stays, so that no chunk of the store's memory is empty, and goes cold.
const BESIDE: u32 = 4;

/// Bytes of a batch.
const BATCH_BYTES: usize = BATCH_PAGES * PAGE_BYTES;

/// Memory to be stored, a store that has room for it, and as much memory beside it.
pub struct Content {
    store: LocalStore,
    hasher: ContentHasher,
    entries: Vec<PageEntry>,
    from: Vec<u8>,
    to: Vec<u8>,
    placed: Vec<GetEntry>,
    placements: Vec<Option<Placement>>,
}

/// Seconds that each took over all pages.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// The store: put.
    pub put_s: f64,
    /// The store: got, and hashed by whoever reads.
    pub get_s: f64,
    /// Each page copied and hashed.
    pub alone_s: f64,
}

impl Content {
    /// For so many pages, whole batches of them, no two alike. All that is written later was written before.
    ///
    /// # Errors
    /// The kernel gives no memory.
    pub fn start(pages: u32) -> Result<Self> {
        let sharing = Sharing::default();
        let secret = PoolSecret::from_bytes(b"bench")?;
        let bytes = u64::from(pages) * PAGE_BYTES_U64;
        let config = Config::new(([127, 0, 0, 1], 0).into(), "bench", 2 * bytes, secret);
        let manifest = Manifest { sharing: Some(sharing.clone()), ..crate::manifest(pages + pages / BESIDE) };
        let mut store = LocalStore::new(&config, manifest)?;
        let hasher = store.hasher(&sharing);
        let mut from = vec![0xa5; bytes as usize];
        for (number, page) in (0_u32..).zip(from.chunks_exact_mut(PAGE_BYTES)) {
            page[..4].copy_from_slice(&number.to_le_bytes());
        }
        let entry = |page| PageEntry::raw(PageIndex(page), ids::Round(0), Checksum(page));
        let (entries, to): (Vec<_>, _) = ((0..pages).map(entry).collect(), vec![1; bytes as usize]);
        let (mut placed, mut placements) = (Vec::new(), Vec::new());
        let mut beside = pages..;
        for (number, (entries, bytes)) in (1..).zip(batches(&entries, &from)) {
            if number % BESIDE == 0
                && let Some(page) = beside.next()
            {
                store.put(&[entry(page)], &[1; PAGE_BYTES], &mut placements)?;
            }
            put(&mut store, entries, bytes, (&mut placements, &mut placed))?;
        }
        let mut content = Self { store, hasher, entries, from, to, placed, placements };
        content.give_back()?;
        Ok(content)
    }

    /// Stores all pages, in batches.
    ///
    /// # Errors
    /// There was no room: what was put before was not given back.
    pub fn put(&mut self) -> Result<()> {
        let Self { store, entries, from, placed, placements, .. } = self;
        batches(entries, from)
            .try_for_each(|(entries, bytes)| put(store, entries, bytes, (placements, placed)))
    }

    /// Reads all pages that were put, in batches, and hashes each, as its reader does.
    ///
    /// # Errors
    /// Something is not there.
    pub fn get(&mut self) -> Result<()> {
        let Self { store, hasher, to, placed, .. } = self;
        for (wanted, bytes) in placed.chunks(BATCH_PAGES).zip(to.chunks_mut(BATCH_BYTES)) {
            store.get(wanted, bytes)?;
            bytes.chunks(PAGE_BYTES).for_each(|page| {
                black_box(hasher.hash(page));
            });
        }
        Ok(())
    }

    /// Copies all pages, and hashes each where it came to lie, in batches.
    pub fn alone(&mut self) {
        let Self { hasher, from, to, .. } = self;
        for (from, to) in from.chunks(BATCH_BYTES).zip(to.chunks_mut(BATCH_BYTES)) {
            to.copy_from_slice(from);
            to.chunks(PAGE_BYTES).for_each(|page| {
                black_box(hasher.hash(page));
            });
        }
    }

    /// The slots are free again.
    ///
    /// # Errors
    /// None that is known.
    pub fn give_back(&mut self) -> Result<()> {
        let Self { store, placed, .. } = self;
        placed.chunks(BATCH_PAGES).try_for_each(|some| store.give_back(some))?;
        placed.clear();
        Ok(())
    }

    /// Each of them once, in turn.
    ///
    /// # Errors
    /// As of each.
    pub fn round(&mut self) -> Result<Round> {
        let alone_s = timed(|| {
            self.alone();
            Ok(())
        })?;
        let put_s = timed(|| self.put())?;
        let get_s = timed(|| self.get())?;
        self.give_back()?;
        Ok(Round { put_s, get_s, alone_s })
    }
}

fn batches<'a>(
    entries: &'a [PageEntry],
    bytes: &'a [u8],
) -> impl Iterator<Item = (&'a [PageEntry], &'a [u8])> {
    entries.chunks(BATCH_PAGES).zip(bytes.chunks(BATCH_BYTES))
}

fn put(
    store: &mut LocalStore,
    entries: &[PageEntry],
    bytes: &[u8],
    (placements, placed): (&mut Vec<Option<Placement>>, &mut Vec<GetEntry>),
) -> Result<()> {
    store.put(entries, bytes, placements)?;
    for (entry, at) in entries.iter().zip(placements.iter()) {
        let placement = at.ok_or_else(|| Error::new(ErrorKind::Full, "a page found no room"))?;
        placed.push(GetEntry { page: entry.page, placement });
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}
