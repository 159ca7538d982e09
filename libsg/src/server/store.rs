//! All that an intermediary holds, behind locks that are never kept over input or output.
//!
//! Order of the locks: a volume's index, its copies, then the volumes, then the slots. A claim takes index, volumes and
//! slots, so that what the replaced writer had under way is either done before it or refused after it.

mod access;
mod copies;
mod handover;
mod mending;
mod offers;
mod parked;
mod report;
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use self::access::Reached;
pub(super) use self::access::Seated;
pub(super) use self::copies::{Noted, Target};
pub(super) use self::handover::{Handed, Parcel, Portrait, Writing};
pub(super) use self::mending::{Mended, Tended};
pub use self::report::Holding;
use super::Config;
use super::arena::Arena;
use super::budget::Budget;
use super::copies::{BLOCK_BYTES as COPIES_BLOCK_BYTES, Copies};
use super::index::{BLOCK_BYTES, Index, MOVE_BYTES, Opened};
use super::slots::{ChunkNumber, NoVolume, SlotRun, Slots};
use super::transit::{Filling, Pinned};
use super::volumes::{Access, Volumes};
use crate::content::{ContentHasher, Sharing};
use crate::error::Result;
use crate::host::{self, Condvar};
use crate::ids::{Epoch, MemberIndex, NodeId, Round, VolumeId};
use crate::manifest::Manifest;
use crate::page::PageRange;
use crate::transport::PoolSecret;
use crate::wire::message::Member;
use crate::wire::{Encoding, GetEntry, IndexEntry, PageEntry, Status};

/// Chunks whose memory is touched ahead of the writers: what a 10 Gb/s link fills in 13 ms.
const CHUNKS_AHEAD: usize = 8;

/// Memory that was touched for nobody goes back after this long without a write.
const AHEAD_FOR: Duration = Duration::from_secs(1);

/// Index and states may take this part of the memory limit beside the pages, and [`BOOKS_BYTES_MIN`].
const BOOKS_SHARE: u64 = 8;
const BOOKS_BYTES_MIN: u64 = 128 << 20;

/// How a volume gets another owner.
pub(super) type HandOver = fn(&mut Volumes<Arc<Books>>, VolumeId, Epoch) -> Result<(), Status>;

/// What a volume has beside its pages.
#[derive(Debug)]
pub(super) struct Books {
    index: Mutex<Index>,
    /// What lies here, where the volume has copies.
    copies: Mutex<Copies>,
    /// Connections on which it is written.
    writers: AtomicUsize,
    /// How its copies were when they were last looked at. Locked last.
    mended: Mutex<Mended>,
    budget: Arc<Budget>,
    /// Of its pages, where it shares them.
    hasher: Option<ContentHasher>,
}

impl Drop for Books {
    fn drop(&mut self) {
        let index = self.index.get_mut();
        let index_bytes = index.blocks() * BLOCK_BYTES + index.moves() * MOVE_BYTES;
        self.budget.give((index_bytes + self.copies.get_mut().blocks() * COPIES_BLOCK_BYTES) as u64);
    }
}

/// All that an intermediary holds.
#[derive(Debug)]
pub(super) struct Store {
    node: NodeId,
    zone: Option<String>,
    limit_bytes: u64,
    secret: PoolSecret,
    arena: Arc<Arena>,
    reached: Reached,
    slots: Mutex<Slots>,
    /// Slots were taken, chunks are leaving, or the server closes.
    stirred: Condvar,
    /// There may be volumes whose copies are to be looked after; told when there are, and when the server closes.
    has_copies: Mutex<bool>,
    tends: Condvar,
    closing: AtomicBool,
    /// It leaves, and takes nothing in.
    leaving: AtomicBool,
    /// Connections so far.
    opened: AtomicU64,
    /// It has looked for the last time whether there is anything to hand over: what came now would go with it.
    shut: AtomicBool,
    /// How far it is with each volume. Locked last.
    handed: Mutex<BTreeMap<VolumeId, Handed>>,
    volumes: Mutex<Volumes<Arc<Books>>>,
    budget: Arc<Budget>,
    /// Other intermediaries that have pages which this one is asked about. Locked last.
    holders: Mutex<Vec<NodeId>>,
    /// Connections to other intermediaries, for copies.
    peers: AtomicUsize,
    stored_ever: AtomicU64,
    canary_flip: Option<u64>,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    /// Requests for pages.
    pub(super) reads: AtomicU64,
    touched_bytes: AtomicU64,
}

impl Store {
    pub(super) fn new(node: NodeId, config: &Config) -> Result<Self> {
        let limit_bytes = config.memory_bytes;
        let slots = Slots::new(limit_bytes);
        Ok(Self {
            node,
            zone: config.zone.clone(),
            limit_bytes,
            secret: config.secret.clone(),
            arena: Arc::new(Arena::new(slots.numbers_max())?),
            reached: Reached::new(config.backend.clone()),
            slots: Mutex::new(slots),
            stirred: Condvar::new(),
            has_copies: Mutex::new(false),
            tends: Condvar::new(),
            closing: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            opened: AtomicU64::new(0),
            shut: AtomicBool::new(false),
            handed: Mutex::default(),
            volumes: Mutex::new(Volumes::new(config.volumes_max)),
            budget: Arc::new(Budget::new(limit_bytes / BOOKS_SHARE + BOOKS_BYTES_MIN)),
            holders: Mutex::default(),
            peers: AtomicUsize::new(0),
            stored_ever: AtomicU64::new(0),
            canary_flip: config.canary_flip_slot,
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            touched_bytes: AtomicU64::new(0),
        })
    }

    pub(super) fn node(&self) -> &NodeId {
        &self.node
    }

    pub(super) fn secret(&self) -> &PoolSecret {
        &self.secret
    }

    pub(super) fn peers(&self) -> &AtomicUsize {
        &self.peers
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }

    pub(super) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    fn me(&self, members: &[Member]) -> Option<MemberIndex> {
        members.iter().position(|member| member.node == self.node).map(|at| MemberIndex(at as u16))
    }

    /// Slots to receive the raw ones of `entries` into, or for as many of them as there is room. They are free again
    /// when the value is dropped unfinished.
    pub(super) fn fill(
        &self,
        volume: VolumeId,
        (epoch, access): (Epoch, Access),
        entries: &[PageEntry],
        mut runs: Vec<SlotRun>,
    ) -> Result<Filling<'_>, Status> {
        runs.clear();
        let volumes = self.volumes.lock();
        let known = volumes.admit(volume, epoch, access)?;
        if self.is_leaving() {
            return Err(Status::Full);
        }
        let (pages, hasher) = (u64::from(known.manifest.pages()), known.payload.hasher.clone());
        check_inside(entries.iter().map(PageEntry::range), pages)?;
        let raw = entries.iter().filter(|entry| entry.encoding == Encoding::Raw).count();
        let slots = self.allocate(volumes, (volume, raw), &mut runs)?;
        Ok(Filling::new(self, (volume, hasher), runs, slots))
    }

    /// Takes slots for a volume that admits it, or as many as there are.
    fn allocate(
        &self,
        volumes: MutexGuard<'_, Volumes<Arc<Books>>>,
        (volume, count): (VolumeId, usize),
        runs: &mut Vec<SlotRun>,
    ) -> Result<usize, Status> {
        let mut slots = self.slots.lock();
        drop(volumes);
        let taken = slots.allocate(volume, count, runs);
        let stir = slots.ready_chunks() < CHUNKS_AHEAD;
        drop(slots);
        if stir {
            self.stirred.notify_one();
        }
        taken.map_err(|NoVolume| Status::NoVolume)
    }

    /// Finds pages and keeps them where they are until the value is dropped: one of `entries` for each of
    /// `wanted`, and `runs` with the bytes of those that are here, in order.
    pub(super) fn pin(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        wanted: &[GetEntry],
        entries: &mut Vec<PageEntry>,
        runs: &mut Vec<SlotRun>,
    ) -> Result<Pinned<'_>, Status> {
        entries.clear();
        runs.clear();
        #[cfg(feature = "simulation")]
        let volume = self.mixed_up(volume);
        let volumes = self.volumes.lock();
        let me = self.me(&volumes.admit(volume, epoch, Access::Read)?.members);
        let mut slots = self.slots.lock();
        drop(volumes);
        for get in wanted {
            let place = get.placement;
            let owner = slots
                .read(volume, get.page, place.slot, place.generation)
                .filter(|_| me == Some(place.member));
            let Some(owner) = owner else {
                entries.push(PageEntry::gone(get.page));
                continue;
            };
            entries.push(PageEntry::raw(get.page, owner.round, owner.checksum));
            SlotRun::append(place.slot, runs);
        }
        Ok(Pinned::new(self, slots.pin_all(runs)))
    }

    /// Slots that were taken hold nothing.
    pub(super) fn free(&self, runs: &[SlotRun]) {
        let mut slots = self.slots.lock();
        runs.iter().flat_map(|run| run.iter()).for_each(|slot| slots.free(slot));
        drop(slots);
        self.stirred.notify_one();
    }

    pub(super) fn unpin(&self, chunks: &[ChunkNumber]) {
        let mut slots = self.slots.lock();
        let stir = chunks.iter().any(|chunk| slots.condemned(*chunk));
        chunks.iter().for_each(|chunk| slots.unpin(*chunk));
        drop(slots);
        if stir {
            self.stirred.notify_one();
        }
    }

    pub(super) fn condemned(&self, chunks: &[ChunkNumber]) -> bool {
        let slots = self.slots.lock();
        chunks.iter().any(|chunk| slots.condemned(*chunk))
    }

    pub(super) fn create(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        manifest: Manifest,
        members: Vec<Member>,
    ) -> Result<(), Status> {
        // Whoever is not among a volume's members keeps none of it.
        self.me(&members).ok_or(Status::State)?;
        let sharing = manifest.sharing.clone();
        let books = Arc::new(self.fresh_books(sharing.as_ref()));
        let vm = manifest.vm.clone();
        let mut volumes = self.volumes.lock();
        if self.is_leaving() {
            return Err(Status::Busy);
        }
        if volumes.create(volume, epoch, (manifest, members), books, host::now())? {
            self.slots.lock().open(volume, sharing.as_ref());
            tracing::info!(%volume, vm, epoch = epoch.0, "volume created");
        }
        Ok(())
    }

    fn fresh_books(&self, sharing: Option<&Sharing>) -> Books {
        Books {
            index: Mutex::default(),
            copies: Mutex::default(),
            writers: AtomicUsize::new(0),
            mended: Mutex::default(),
            budget: Arc::clone(&self.budget),
            hasher: sharing.map(|sharing| self.secret.hasher(sharing)),
        }
    }

    pub(super) fn set_members(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        members: Vec<Member>,
    ) -> Result<(), Status> {
        self.volumes.lock().set_members(volume, epoch, members)
    }

    pub(super) fn commit(&self, volume: VolumeId, epoch: Epoch) -> Result<(), Status> {
        self.volumes.lock().commit(volume, epoch)?;
        tracing::info!(%volume, "committed: the VM never runs at its source again");
        Ok(())
    }

    pub(super) fn seal(&self, volume: VolumeId, epoch: Epoch) -> Result<(), Status> {
        self.volumes.lock().seal(volume, epoch)?;
        self.withdraw(volume);
        tracing::info!(%volume, "sealed");
        Ok(())
    }

    pub(super) fn dissolve(&self, volume: VolumeId, epoch: Epoch) -> Result<(), Status> {
        let mut volumes = self.volumes.lock();
        let gone = volumes.dissolve(volume, epoch)?;
        let pages = self.slots.lock().dissolve(volume);
        drop(volumes);
        self.withdraw(volume);
        self.stirred.notify_one();
        if let Some(gone) = gone {
            let state_bytes = gone.blob.iter().chain(&gone.pieces).map(|blob| blob.bytes.len() as u64).sum();
            self.budget.give(state_bytes);
            tracing::info!(%volume, vm = gone.manifest.vm, pages, "volume dissolved");
        }
        Ok(())
    }

    pub(super) fn put_index(
        &self,
        (volume, epoch, over): (VolumeId, Epoch, Opened),
        entries: &[IndexEntry],
    ) -> Result<(), Status> {
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::IndexNotKept) {
            return Ok(());
        }
        self.with_index(volume, epoch, Access::Write, |index, pages| {
            check_inside(entries.iter().map(IndexEntry::range), pages)?;
            self.is_open()?;
            index.check_fence(over)?;
            // Before COMMIT nothing of it is handed over.
            if self.is_leaving() && self.volumes.lock().get(volume)?.committed {
                // Its client gives them to the next.
                return Err(Status::Full);
            }
            self.change_index(index, |index, more| index.put(entries, more))
        })
    }

    pub(super) fn discard(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        range: PageRange,
        below: Round,
    ) -> Result<(), Status> {
        self.with_index(volume, epoch, Access::Discard, |index, _| {
            let before = index.blocks();
            index.discard(range, below);
            let after = index.blocks();
            // The ends of the range may cut a run of zeros: two blocks that are counted, not asked for.
            self.budget.take_anyway((after.saturating_sub(before) * BLOCK_BYTES) as u64);
            self.budget.give((before.saturating_sub(after) * BLOCK_BYTES) as u64);
            Ok(())
        })?;
        let chunks = self.slots.lock().chunks_of(volume);
        for nth in (0..chunks).rev() {
            self.slots.lock().discard_in(volume, nth, range, below);
        }
        self.slots.lock().discard_references(volume, range, below);
        self.forget_copies(volume, range);
        self.stirred.notify_one();
        Ok(())
    }

    /// Lets go of the slots that hold these pages, and of the copies that were made of them; what is not there is left
    /// alone.
    pub(super) fn drop_slots(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        entries: &[GetEntry],
    ) -> Result<(), Status> {
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let mut copies = books.copies.lock();
        let volumes = self.volumes.lock();
        let me = self.me(&volumes.admit(volume, epoch, Access::Discard)?.members);
        let mut slots = self.slots.lock();
        drop(volumes);
        let before = copies.blocks();
        for GetEntry { page, placement } in entries {
            let copy = copies.remove(*page, *placement);
            if me == Some(placement.member) {
                slots.release(volume, *page, placement.slot, placement.generation);
            } else if let Some(copy) = copy {
                slots.release(volume, *page, copy.slot, copy.generation);
            }
        }
        drop(slots);
        self.budget.give(((before - copies.blocks()) * COPIES_BLOCK_BYTES) as u64);
        self.stirred.notify_one();
        Ok(())
    }

    fn with_index<T>(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        access: Access,
        act: impl FnOnce(&mut Index, u64) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let mut index = books.index.lock();
        let pages = self.volumes.lock().admit(volume, epoch, access)?.manifest.pages();
        act(&mut index, u64::from(pages))
    }

    /// The work of the thread that touches memory ahead of the writers and gives it back behind
    /// them. Returns once [`Self::close`] was called.
    pub(super) fn tend_memory(&self) {
        let mut slots = self.slots.lock();
        let mut written = false;
        loop {
            while let Some(chunk) = slots.next_leaving() {
                MutexGuard::unlocked(&mut slots, || {
                    self.reached.close(chunk);
                    self.arena.give_back(chunk);
                });
                slots.given_back(chunk);
            }
            if self.closing.load(Ordering::Acquire) {
                return;
            }
            while written && slots.ready_chunks() < CHUNKS_AHEAD {
                let Some(chunk) = slots.prepare() else { break };
                let touched = MutexGuard::unlocked(&mut slots, || self.arena.touch(chunk));
                slots.prepared(chunk);
                if let Err(error) = touched {
                    tracing::warn!(error = error.chain(), "memory cannot be touched ahead of need");
                    break;
                }
            }
            let before = slots.leases();
            let waited = self.stirred.wait_for(&mut slots, AHEAD_FOR);
            written = slots.leases() != before || (written && !waited.timed_out());
            if waited.timed_out() && !written {
                slots.drop_ready();
            }
        }
    }

    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.stirred.notify_all();
        self.tends.notify_all();
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// The bug that a simulation must find: of several volumes, the first is meant whichever is asked for.
    #[cfg(feature = "simulation")]
    fn mixed_up(&self, volume: VolumeId) -> VolumeId {
        let first = || self.volumes.lock().iter().next().map(|(id, _)| id);
        let mixed = host::has_bug(host::Bug::VolumesMixed);
        mixed.then(first).flatten().unwrap_or(volume)
    }
}

/// Whether the volume has the pages that are spoken of.
fn check_inside(mut ranges: impl Iterator<Item = PageRange>, pages: u64) -> Result<(), Status> {
    if ranges.all(|range| range.positions().end as u64 <= pages) { Ok(()) } else { Err(Status::Malformed) }
}
