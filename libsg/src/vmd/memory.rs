//! The in-memory backend: intermediaries that are values in this process. The model of what an
//! intermediary does, written to be obviously right; every other backend is compared with it by
//! the conformance suite.

mod control;
mod copies;
mod link;
mod sharing;
mod volume;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::link::{Class, Connector, Link};
use crate::content::{ContentHash, ContentHasher, Sharing};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{
    Checksum, Epoch, Generation, MemberIndex, NodeId, Placement, Round, SlotIndex, VolumeId, random_bytes,
};
use crate::page::{PageIndex, PageRange};
use crate::transport::PoolSecret;
use crate::wire::message::{Member, VolumeState};
use crate::wire::{Encoding, GetEntry, IndexEntry, PageEntry, Status};
pub use link::MemoryLink;
use volume::Volume;

/// An intermediary in this process. Clones are the same.
#[derive(Clone, Debug)]
pub struct MemoryNode {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    node: NodeId,
    alive: bool,
    limit_pages: u64,
    volumes: HashMap<VolumeId, Volume>,
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    /// Until when others wait for who sends a page.
    grants: HashMap<Known, Instant>,
    /// Who else has bytes, as was said here.
    hints: HashMap<Known, NodeId>,
    bytes_in: u64,
    bytes_out: u64,
    /// Links so far.
    opened: u64,
}

#[derive(Debug)]
struct Slot {
    generation: Generation,
    content: Option<Content>,
}

#[derive(Debug)]
struct Content {
    /// The pages that lie here: of one volume, or of all that share.
    holders: Vec<Holder>,
    checksum: Checksum,
    bytes: Box<[u8]>,
    /// By what it is found, where it is shared.
    known: Option<Known>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    volume: VolumeId,
    page: PageIndex,
    round: Round,
    checksum: Checksum,
}

/// Bytes, among those who share.
type Known = (Sharing, ContentHash);

impl MemoryNode {
    /// An intermediary that gives at most `limit_pages` pages.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no random bytes.
    pub fn new(name: &str, address: SocketAddr, limit_pages: u64) -> Result<Self> {
        let node = NodeId { name: name.into(), incarnation: u64::from_le_bytes(random_bytes()?) };
        let state = State::new(node, limit_pages);
        Ok(Self { address, state: Arc::new(Mutex::new(state)) })
    }

    /// Who it is now, and where.
    #[must_use]
    pub fn member(&self) -> Member {
        Member { node: self.state.lock().node.clone(), address: self.address }
    }

    /// It dies: every link to it fails, and whatever it held is lost.
    pub fn kill(&self) {
        let mut state = self.state.lock();
        let mut dead = State::new(state.node.clone(), state.limit_pages);
        dead.alive = false;
        *state = dead;
    }

    /// It comes back under its name and address, as somebody else, empty.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no random bytes.
    pub fn restart(&self) -> Result<()> {
        let incarnation = u64::from_le_bytes(random_bytes()?);
        let mut state = self.state.lock();
        let node = NodeId { name: state.node.name.clone(), incarnation };
        *state = State::new(node, state.limit_pages);
        Ok(())
    }

    /// Flips a byte of every page it holds: what a checksum must notice.
    pub fn corrupt(&self) {
        for slot in &mut self.state.lock().slots {
            if let Some(content) = &mut slot.content {
                content.bytes[100] ^= 1;
            }
        }
    }
}

/// Makes links to nodes of this process, by their addresses.
#[derive(Clone, Debug, Default)]
pub struct MemoryConnector {
    nodes: Nodes,
}

/// Nodes of this process, by their addresses.
type Nodes = Arc<Mutex<HashMap<SocketAddr, MemoryNode>>>;

impl MemoryConnector {
    /// Without any nodes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a node reachable.
    pub fn add(&self, node: &MemoryNode) {
        self.nodes.lock().insert(node.address, node.clone());
    }

    /// A new node of this name at the next free address, reachable at once.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no random bytes.
    pub fn node(&self, name: &str, limit_pages: u64) -> Result<MemoryNode> {
        let mut nodes = self.nodes.lock();
        // 192.0.2.0/24 is set aside for documentation: nobody listens there.
        let port = 1 + nodes.len() as u16;
        let node = MemoryNode::new(name, SocketAddr::from(([192, 0, 2, 1], port)), limit_pages)?;
        nodes.insert(node.address, node.clone());
        Ok(node)
    }
}

impl Connector for MemoryConnector {
    /// As in a pool without a secret.
    fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        PoolSecret::open().hasher(sharing)
    }

    fn connect(
        &self,
        address: SocketAddr,
        volume: VolumeId,
        epoch: Epoch,
        _class: Class,
        _timeout: Duration,
    ) -> Result<Box<dyn Link>> {
        let nodes = Arc::clone(&self.nodes);
        let node = nodes.lock().get(&address).cloned();
        let unreachable =
            || Error::new(ErrorKind::Unreachable, format!("connecting to {address}: nobody is there"));
        let node = node.ok_or_else(unreachable)?;
        if !node.state.lock().alive {
            return Err(unreachable());
        }
        Ok(Box::new(MemoryLink::new(node.member(), (node.state, nodes), volume, epoch)))
    }
}

/// The volume and epoch of whoever asks.
#[derive(Clone, Copy, Debug)]
struct Asker {
    volume: VolumeId,
    epoch: Epoch,
    /// Its link: those that came later have greater numbers.
    opened: u64,
}

impl State {
    /// A link is opened.
    const fn opened(&mut self) -> u64 {
        self.opened += 1;
        self.opened
    }

    fn new(node: NodeId, limit_pages: u64) -> Self {
        Self {
            node,
            alive: true,
            limit_pages,
            volumes: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            grants: HashMap::new(),
            hints: HashMap::new(),
            bytes_in: 0,
            bytes_out: 0,
            opened: 0,
        }
    }

    fn used_pages(&self) -> u64 {
        (self.slots.len() - self.free.len()) as u64
    }

    /// The volume, for somebody whose epoch is not older than its own.
    fn volume(&mut self, asker: Asker) -> Result<&mut Volume, Status> {
        let volume = self.volumes.get_mut(&asker.volume).ok_or(Status::NoVolume)?;
        if asker.epoch < volume.epoch {
            return Err(Status::Fenced);
        }
        match volume.state {
            VolumeState::Dissolved => Err(Status::State),
            _ => Ok(volume),
        }
    }

    /// The volume, for its writer: under its own epoch, while it is open.
    fn writable(&mut self, asker: Asker) -> Result<&mut Volume, Status> {
        let volume = self.volume(asker)?;
        let open = matches!(volume.state, VolumeState::Open | VolumeState::Parked);
        if open && volume.epoch == asker.epoch {
            return Ok(volume);
        }
        Err(Status::State)
    }

    /// The volume, for somebody who drops pages of it.
    fn droppable(&mut self, asker: Asker) -> Result<&mut Volume, Status> {
        let volume = self.volume(asker)?;
        match volume.state {
            VolumeState::Sealed => Err(Status::State),
            VolumeState::Parked if volume.epoch != asker.epoch => Err(Status::State),
            _ => Ok(volume),
        }
    }

    /// The volume, for its owner, whatever state it is in.
    fn owned(&mut self, asker: Asker) -> Result<&mut Volume, Status> {
        let volume = self.volume(asker)?;
        if volume.epoch == asker.epoch { Ok(volume) } else { Err(Status::State) }
    }

    fn put(
        &mut self,
        asker: Asker,
        entries: &[PageEntry],
        bytes: &[u8],
    ) -> Result<Vec<Option<Placement>>, Status> {
        let node = self.node.clone();
        let volume = self.writable(asker)?;
        let pages = u64::from(volume.manifest.pages());
        if entries.iter().any(|entry| u64::from(entry.page.0) + u64::from(entry.run_pages) > pages) {
            return Err(Status::Malformed);
        }
        let member = volume.member(&node).ok_or(Status::State)?;
        let sharing = volume.manifest.sharing.clone();
        let mut placements = Vec::with_capacity(entries.len());
        let mut rest = bytes;
        for entry in entries {
            let (page, after) = rest.split_at_checked(entry.encoded_bytes.into()).ok_or(Status::Malformed)?;
            rest = after;
            placements.push(self.store((asker.volume, member), sharing.as_ref(), entry, page));
        }
        Ok(placements)
    }

    /// Stores a page in a slot of its own. `None` without room, or without bytes.
    fn store(
        &mut self,
        (volume, member): (VolumeId, MemberIndex),
        sharing: Option<&Sharing>,
        entry: &PageEntry,
        bytes: &[u8],
    ) -> Option<Placement> {
        if entry.encoding != Encoding::Raw || self.used_pages() >= self.limit_pages {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: Generation(0), content: None });
            SlotIndex(self.slots.len() as u32 - 1)
        });
        self.bytes_in += bytes.len() as u64;
        let at = &mut self.slots[slot.0 as usize];
        at.generation = Generation(at.generation.0.checked_add(1).unwrap_or(1));
        let PageEntry { page, round, checksum, .. } = *entry;
        let known = sharing.map(|sharing| (sharing.clone(), PoolSecret::open().hasher(sharing).hash(bytes)));
        if let Some(known) = &known {
            self.grants.remove(known);
        }
        let holders = vec![Holder { volume, page, round, checksum }];
        at.content = Some(Content { holders, checksum, bytes: bytes.into(), known });
        Some(Placement { member, slot, generation: at.generation })
    }

    /// Pages are gone; slots that hold no other are free.
    fn free_slots(&mut self, gone: impl Fn(&Holder) -> bool) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let Some(content) = &mut slot.content else { continue };
            content.holders.retain(|holder| !gone(holder));
            if content.holders.is_empty() {
                slot.content = None;
                self.free.push(SlotIndex(number as u32));
            }
        }
    }

    fn get(&mut self, asker: Asker, entries: &[GetEntry]) -> Result<(Vec<PageEntry>, Vec<u8>), Status> {
        let node = self.node.clone();
        let member = self.volume(asker)?.member(&node);
        let (mut out, mut bytes) = (Vec::new(), Vec::new());
        for entry in entries {
            match self.content(asker.volume, member, entry) {
                Some((holder, content)) => {
                    out.push(PageEntry::raw(entry.page, holder.round, holder.checksum));
                    bytes.extend_from_slice(&content.bytes);
                }
                None => out.push(PageEntry::gone(entry.page)),
            }
        }
        self.bytes_out += bytes.len() as u64;
        Ok((out, bytes))
    }

    /// What lies under a placement, if it is that page of that volume.
    fn content(
        &self,
        volume: VolumeId,
        member: Option<MemberIndex>,
        at: &GetEntry,
    ) -> Option<(Holder, &Content)> {
        let GetEntry { page, placement } = at;
        let slot = self.slots.get(placement.slot.0 as usize)?;
        if slot.generation != placement.generation || member != Some(placement.member) {
            return None;
        }
        let content = slot.content.as_ref()?;
        let held = content.holders.iter().find(|held| held.volume == volume && held.page == *page);
        held.map(|holder| (*holder, content))
    }

    /// Takes these pages out of their slots, each once.
    fn give_back(&mut self, asker: Asker, entries: &[GetEntry]) -> Result<(), Status> {
        let node = self.node.clone();
        let member = self.droppable(asker)?.member(&node);
        for entry in entries {
            let copy = self.forget_copy(asker.volume, entry);
            self.give_back_one(asker.volume, member, &copy.unwrap_or(*entry));
        }
        Ok(())
    }

    fn give_back_one(&mut self, volume: VolumeId, member: Option<MemberIndex>, entry: &GetEntry) {
        let Some((holder, _)) = self.content(volume, member, entry) else { return };
        let slot = &mut self.slots[entry.placement.slot.0 as usize];
        let Some(content) = &mut slot.content else { return };
        if let Some(at) = content.holders.iter().position(|held| *held == holder) {
            content.holders.swap_remove(at);
        }
        if content.holders.is_empty() {
            slot.content = None;
            self.free.push(entry.placement.slot);
        }
    }

    fn put_index(&mut self, asker: Asker, entries: &[IndexEntry]) -> Result<(), Status> {
        let volume = self.writable(asker)?;
        if asker.opened < volume.fenced {
            return Err(Status::Fenced);
        }
        let pages = u64::from(volume.manifest.pages());
        if entries.iter().any(|entry| u64::from(entry.page.0) + u64::from(entry.run_pages) > pages) {
            return Err(Status::Malformed);
        }
        entries.iter().for_each(|entry| volume.index(entry));
        Ok(())
    }

    fn locate(&mut self, asker: Asker, range: PageRange) -> Result<Vec<IndexEntry>, Status> {
        self.volume(asker)?;
        let own = self.own(asker.volume, range);
        Ok(self.volume(asker)?.locate(range, &own))
    }

    fn discard(&mut self, asker: Asker, range: PageRange, below: Round) -> Result<(), Status> {
        let volume = self.droppable(asker)?;
        volume.discard(range, below);
        let positions = range.positions();
        self.free_slots(|held| {
            held.volume == asker.volume && positions.contains(&held.page.as_usize()) && held.round < below
        });
        self.forget_gone(asker.volume);
        Ok(())
    }

    fn put_state(&mut self, asker: Asker, state: Vec<u8>) -> Result<(), Status> {
        self.writable(asker)?.blob = Some(state);
        Ok(())
    }

    fn get_state(&mut self, asker: Asker) -> Result<Vec<u8>, Status> {
        // Whoever may read the volume may read its state, whatever epoch it believes in.
        let volume = self.volume(Asker { epoch: Epoch(u64::MAX), ..asker })?;
        volume.blob.clone().ok_or(Status::State)
    }

    fn put_piece(&mut self, asker: Asker, number: u32, piece: Vec<u8>) -> Result<(), Status> {
        let pieces = &mut self.writable(asker)?.pieces;
        if number as usize > pieces.len() || number >= crate::limits::FINAL_PIECES_MAX {
            return Err(Status::State);
        }
        pieces.truncate(number as usize);
        pieces.push(piece);
        Ok(())
    }

    fn get_piece(&mut self, asker: Asker, number: u32) -> Result<Vec<u8>, Status> {
        let volume = self.volume(Asker { epoch: Epoch(u64::MAX), ..asker })?;
        volume.pieces.get(number as usize).cloned().ok_or(Status::State)
    }
}
