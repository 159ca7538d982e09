//! What a session's client may reach by itself. It lies with the session's seat, where whoever fences the client finds it:
//! a client that only writes memory never asks whether it still may.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::backend::{Attached, Domain, Opened, Rights};
use super::slots::{ChunkNumber, SlotRun};
use crate::ids::{Epoch, VolumeId};
use crate::limits;
use crate::wire::Status;

/// Chunks that stay open to a client beside those it has leases in: it goes on filling them.
const OPEN_MAX: usize = 8;

/// Of a session.
#[derive(Debug)]
pub(super) struct Seat {
    pub volume: VolumeId,
    pub epoch: Epoch,
    /// Nothing any more, once the client was fenced.
    pub held: Mutex<Option<Held>>,
}

/// What a client has.
#[derive(Debug)]
pub(super) struct Held {
    /// Its way in.
    attached: Attached,
    pub domain: Arc<dyn Domain>,
    /// How it writes.
    pub fills: Rights,
    /// Chunks that it may write. Each is pinned: what is freed in it is nobody else's as long as it may.
    open: BTreeMap<ChunkNumber, Open>,
    leases: BTreeMap<u64, Vec<SlotRun>>,
    leased_slots: usize,
    /// Pinned chunks, by the request that asked for what is in them.
    reached: BTreeMap<u64, Vec<ChunkNumber>>,
}

#[derive(Debug)]
struct Open {
    opened: Opened,
    /// That have slots in it.
    leases: u32,
}

/// What a client has no more: first dropped is what it was reached by. Then the chunks are to be unpinned and the slots
/// freed.
#[derive(Debug, Default)]
pub(super) struct Withdrawn {
    pub ways: Vec<Attached>,
    pub closed: Vec<Opened>,
    pub unpin: Vec<ChunkNumber>,
    pub free: Vec<SlotRun>,
}

/// Chunks that slots are in, each once.
pub(super) fn chunks_of(runs: &[SlotRun]) -> Vec<ChunkNumber> {
    let mut chunks: Vec<ChunkNumber> = runs.iter().map(|run| ChunkNumber::of(run.first)).collect();
    chunks.sort_unstable();
    chunks.dedup();
    chunks
}

impl Seat {
    /// For a client that was let in, which fills slots with such rights.
    pub fn new(
        (volume, epoch): (VolumeId, Epoch),
        (attached, fills): (Attached, Rights),
        domain: Arc<dyn Domain>,
    ) -> Self {
        let held = Held {
            attached,
            domain,
            fills,
            open: BTreeMap::new(),
            leases: BTreeMap::new(),
            leased_slots: 0,
            reached: BTreeMap::new(),
        };
        Self { volume, epoch, held: Mutex::new(Some(held)) }
    }

    /// All of it is taken away.
    pub fn clear(&self) -> Withdrawn {
        let Some(mut held) = self.held.lock().take() else { return Withdrawn::default() };
        let mut withdrawn = held.withdraw_writer();
        withdrawn.unpin.extend(held.reached.into_values().flatten());
        withdrawn.ways.push(held.attached);
        withdrawn
    }
}

impl Held {
    /// Whether one more request, and so many slots, are within bounds, under a number that is not taken.
    pub fn check_room(&self, number: u64, slots: usize) -> Result<(), Status> {
        if self.leases.contains_key(&number) || self.reached.contains_key(&number) {
            return Err(Status::Malformed);
        }
        let full = self.leases.len() + self.reached.len() >= limits::GRANTS_MAX
            || self.leased_slots + slots > limits::LEASED_SLOTS_MAX;
        if full { Err(Status::Busy) } else { Ok(()) }
    }

    /// Slots that it may write.
    pub fn leased_slots(&self) -> usize {
        self.leased_slots
    }

    /// Those of these chunks that it may not write yet.
    pub fn closed_of(&self, chunks: &[ChunkNumber]) -> Vec<ChunkNumber> {
        chunks.iter().copied().filter(|chunk| !self.open.contains_key(chunk)).collect()
    }

    /// What reaches a chunk that it may write.
    pub fn key_of(&self, chunk: ChunkNumber) -> Option<&Opened> {
        self.open.get(&chunk).map(|open| &open.opened)
    }

    /// It has these slots from now on, and chunks that were opened and pinned for it.
    pub fn lease(&mut self, number: u64, runs: Vec<SlotRun>, opened: Vec<(ChunkNumber, Opened)>) {
        for (chunk, opened) in opened {
            self.open.insert(chunk, Open { opened, leases: 0 });
        }
        for chunk in chunks_of(&runs) {
            if let Some(open) = self.open.get_mut(&chunk) {
                open.leases += 1;
            }
        }
        self.leased_slots += slots_of(&runs);
        self.leases.insert(number, runs);
    }

    /// The slots of a lease, which it has no more.
    pub fn end_lease(&mut self, number: u64) -> Option<Vec<SlotRun>> {
        let runs = self.leases.remove(&number)?;
        for chunk in chunks_of(&runs) {
            if let Some(open) = self.open.get_mut(&chunk) {
                open.leases -= 1;
            }
        }
        self.leased_slots -= slots_of(&runs);
        Some(runs)
    }

    /// Pages in these chunks, which are pinned, are read.
    pub fn reach(&mut self, number: u64, pinned: Vec<ChunkNumber>) {
        self.reached.insert(number, pinned);
    }

    /// They were read: the chunks are to be unpinned.
    pub fn end_reach(&mut self, number: u64) -> Option<Vec<ChunkNumber>> {
        self.reached.remove(&number)
    }

    /// Closes what it has no leases in and cannot fill: those of these chunks that are full, and what is beyond its bound.
    pub fn close_idle(&mut self, full: &[ChunkNumber]) -> Withdrawn {
        let idle = self.open.iter().filter(|(_, open)| open.leases == 0).map(|(chunk, _)| *chunk);
        let idle: Vec<ChunkNumber> = idle.collect();
        let beyond = idle.len().saturating_sub(OPEN_MAX);
        let mut withdrawn = Withdrawn::default();
        for (at, chunk) in idle.into_iter().enumerate() {
            if (at < beyond || full.contains(&chunk))
                && let Some(open) = self.open.remove(&chunk)
            {
                withdrawn.closed.push(open.opened);
                withdrawn.unpin.push(chunk);
            }
        }
        withdrawn
    }

    /// It writes no more; what it reads it still does.
    pub fn withdraw_writer(&mut self) -> Withdrawn {
        self.leased_slots = 0;
        let free = std::mem::take(&mut self.leases).into_values().flatten().collect();
        let mut withdrawn = Withdrawn { free, ..Withdrawn::default() };
        for (chunk, open) in std::mem::take(&mut self.open) {
            withdrawn.closed.push(open.opened);
            withdrawn.unpin.push(chunk);
        }
        withdrawn
    }
}

fn slots_of(runs: &[SlotRun]) -> usize {
    runs.iter().map(|run| run.slots as usize).sum()
}
