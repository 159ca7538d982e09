//! Pages that are stored once, however many pages of however many volumes have their bytes: what each slot's bytes hash
//! to, who refers to it, and who was told to send what nobody has yet.
//!
//! Beside what any slot costs, one of a volume that shares costs 22 bytes for its hash and the count of references, and 5
//! to 12 in the table; a page that refers to another's slot 17 to 34 instead of a slot.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::hints::Hints;
use super::table::SlotTable;
use super::{CHUNK_SLOTS, Chunk, ChunkNumber, Entry, Lease, NoVolume, Owner, Slot, Slots};
use crate::content::{CONTENT_HASH_BYTES, ContentHash, Sharing};
use crate::ids::{Checksum, Generation, Round, SlotIndex, VolumeId};
use crate::page::{PageIndex, PageRange};
use crate::server::bits::Bits;

/// How long one that was told to send a page is waited for by the others: a few times what a page waits at a source
/// whose link is slow. Whoever asks then is told to send it.
pub const GRANT_TIME: Duration = Duration::from_secs(1);

/// Grants of a domain that are remembered: 4 MB. Of more pages at once, some are sent twice.
const GRANTS_MAX: usize = 64 << 10;

/// Those who share with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DomainId(u32);

/// What is known of the pages of those who share with each other.
pub(super) struct Domain {
    sharing: Sharing,
    /// Volumes and chunks of it.
    pub(super) users: u64,
    /// Slots by the hash of their bytes, one for each hash.
    table: SlotTable,
    /// Until when others wait for the one who sends it.
    grants: HashMap<ContentHash, Instant>,
    /// Of hashes that this one is asked about: who may have the bytes.
    hints: Hints,
}

/// Another intermediary, by a number that its user gives it.
pub type Holder = u16;

impl Domain {
    /// Who asks is to send it, unless another was told so.
    fn grant(&mut self, hash: &ContentHash, now: Instant) -> Referred {
        match self.grants.get_mut(hash) {
            Some(until) if now < *until => return Referred::Pending,
            Some(until) => *until = now + GRANT_TIME,
            None => {
                if self.grants.len() >= GRANTS_MAX {
                    self.grants.retain(|_, until| now < *until);
                }
                if self.grants.len() < GRANTS_MAX {
                    self.grants.insert(*hash, now + GRANT_TIME);
                }
            }
        }
        Referred::Send
    }
}

/// What lies in the slots of a chunk.
pub(super) struct Contents {
    pub(super) domain: DomainId,
    hashes: [[u8; CONTENT_HASH_BYTES]; CHUNK_SLOTS],
    /// Of pages other than the one that the slot was written for.
    pub(super) references: [u16; CHUNK_SLOTS],
    /// Who referred to one of them last.
    heir: Option<VolumeId>,
}

/// A page that lies in a slot that was written for another, or once more in its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
    /// The newest round in which it was put.
    pub(super) round: u16,
    times: u16,
    /// Of its bytes, as its writer says: until that is told, the slot's.
    pub(super) checksum: u32,
}

/// The references of a volume, by page and slot.
pub(super) type Refs = HashMap<(u32, u32), Reference>;

/// The answer to a page that was offered by its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Referred {
    /// It is here, and held for the page from now on.
    Have(SlotIndex, Generation),
    /// Nobody has it: whoever asked is the one to send it, for [`GRANT_TIME`].
    Send,
    /// Another was told to send it: come back.
    Pending,
    /// This one may have it.
    At(Holder),
}

impl Contents {
    pub(super) fn boxed(domain: DomainId) -> Box<Self> {
        let hashes = [[0; CONTENT_HASH_BYTES]; CHUNK_SLOTS];
        Box::new(Self { domain, hashes, references: [0; CHUNK_SLOTS], heir: None })
    }
}

/// The hash of what a slot holds; of one that is in the table, there is one.
fn hash_of(entries: &[Entry], slot: u32) -> Option<[u8; CONTENT_HASH_BYTES]> {
    let Entry::Leased(chunk) = entries.get(slot as usize / CHUNK_SLOTS)? else { return None };
    Some(chunk.contents.as_ref()?.hashes[slot as usize % CHUNK_SLOTS])
}

fn word_of(entries: &[Entry], slot: u32) -> u64 {
    hash_of(entries, slot).map_or(0, |hash| ContentHash(hash).word())
}

impl Chunk {
    /// Whether a page holds the slot that was written for it.
    pub(super) fn owns(&self, volume: VolumeId, page: PageIndex, at: usize) -> bool {
        self.volume == volume && self.owned.contains(at) && self.slots[at].page == page.0
    }

    /// Whether anybody holds what is stored there.
    fn is_held(&self, at: usize) -> bool {
        self.owned.contains(at) || self.contents.as_ref().is_some_and(|contents| contents.references[at] > 0)
    }
}

impl Slots {
    /// A page lies in the slot no more; the slot is free when nobody else holds it. Nothing happens unless [`Self::read`]
    /// finds the page there. Of a page that holds its slot twice, one hold goes: the older one, since the bytes are those of the
    /// newer round as well.
    pub fn release(&mut self, volume: VolumeId, page: PageIndex, slot: SlotIndex, generation: Generation) {
        if self.read(volume, page, slot, generation).is_none() {
            return;
        }
        let Some((chunk, at)) = self.chunk(slot) else { return };
        let referring = self.reference(chunk, at, (volume, page, slot));
        let owns_older = |round| chunk.owns(volume, page, at) && chunk.slots[at].round < round;
        if referring.is_some_and(|referring| !owns_older(referring.round)) {
            self.release_reference(volume, page, slot);
            return;
        }
        if let Some((chunk, at)) = self.chunk_mut(slot) {
            chunk.owned.remove(at);
            self.let_go(slot);
        }
    }

    /// How a page refers to a slot, if it does.
    pub(super) fn reference(
        &self,
        chunk: &Chunk,
        at: usize,
        (volume, page, slot): (VolumeId, PageIndex, SlotIndex),
    ) -> Option<&Reference> {
        let contents = chunk.contents.as_ref()?;
        let is_shared = contents.references[at] > 0;
        self.leases.get(&volume).filter(|_| is_shared)?.refs.get(&(page.0, slot.0))
    }

    /// Frees a stored slot that nobody holds any more.
    pub(super) fn let_go(&mut self, slot: SlotIndex) {
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        if chunk.is_held(at) || !chunk.stored.contains(at) {
            return;
        }
        self.forget_content(slot);
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        chunk.stored.remove(at);
        chunk.taken -= 1;
        chunk.limbo.insert(at);
        self.stored -= 1;
        self.settle(ChunkNumber::of(slot));
    }

    /// The chunk's volume is gone: what only it held is free, and the chunk is condemned, unless somebody who holds
    /// some of it takes it over.
    pub(super) fn leave_chunk(&mut self, number: u32) {
        let Entry::Leased(chunk) = &mut self.entries[number as usize] else { return };
        let owned = std::mem::replace(&mut chunk.owned, Bits::NONE);
        chunk.condemned = true;
        if chunk.contents.is_none() {
            chunk.taken -= chunk.stored.len();
            self.stored -= u64::from(chunk.stored.len());
            chunk.limbo.insert_all(&chunk.stored);
            chunk.stored = Bits::NONE;
        } else {
            for at in owned.iter() {
                self.let_go(SlotIndex(number * CHUNK_SLOTS as u32 + at as u32));
            }
            self.inherit(number);
        }
        self.settle(ChunkNumber(number));
    }

    /// One more volume that shares.
    pub(super) fn enter_domain(&mut self, sharing: &Sharing) -> DomainId {
        let known = self.domains.iter_mut().find(|(_, domain)| domain.sharing == *sharing);
        if let Some((id, domain)) = known {
            domain.users += 1;
            return *id;
        }
        let id = DomainId(self.domains_ever);
        self.domains_ever = self.domains_ever.wrapping_add(1);
        let (table, grants, hints) = (SlotTable::new(), HashMap::new(), Hints::new());
        self.domains.insert(id, Domain { sharing: sharing.clone(), users: 1, table, grants, hints });
        id
    }

    /// A volume or a chunk of it less; the domain goes with the last.
    pub(super) fn leave_domain(&mut self, id: DomainId) {
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.users -= 1;
            if domain.users == 0 {
                self.domains.remove(&id);
            }
        }
    }

    /// The slot that is known for these bytes.
    fn find(&self, domain: DomainId, hash: &ContentHash) -> Option<SlotIndex> {
        let same = |slot: &u32| hash_of(&self.entries, *slot) == Some(hash.0);
        self.domains.get(&domain)?.table.find(hash.word(), same).map(SlotIndex)
    }

    /// A slot was stored whose bytes have this hash. One that is known for them stays the one.
    pub(super) fn note_content(&mut self, slot: SlotIndex, hash: ContentHash) {
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        let Some(contents) = &mut chunk.contents else { return };
        contents.hashes[at] = hash.0;
        let id = contents.domain;
        let known = self.find(id, &hash).is_some();
        let entries = &self.entries;
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.grants.remove(&hash);
            if !known {
                domain.table.insert(hash.word(), slot.0, |slot| word_of(entries, slot));
            }
        }
    }

    /// A slot is about to be free.
    pub(super) fn forget_content(&mut self, slot: SlotIndex) {
        let Some((chunk, at)) = self.chunk_mut(slot) else { return };
        let Some(contents) = &chunk.contents else { return };
        let (id, hash) = (contents.domain, ContentHash(contents.hashes[at]));
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.table.remove(hash.word(), slot.0);
        }
    }

    /// A page of the volume is offered by the hash of its bytes. Where they are, it holds them from now on.
    ///
    /// # Errors
    /// No such volume.
    pub fn refer(
        &mut self,
        volume: VolumeId,
        (page, round): (PageIndex, Round),
        hash: &ContentHash,
        now: Instant,
    ) -> Result<Referred, NoVolume> {
        let Some(id) = self.leases.get(&volume).ok_or(NoVolume)?.domain else { return Ok(Referred::Send) };
        if let Some(slot) = self.find(id, hash)
            && let Some(generation) = self.hold(volume, (page, round), slot, None)
        {
            return Ok(Referred::Have(slot, generation));
        }
        let Some(domain) = self.domains.get_mut(&id) else { return Ok(Referred::Send) };
        if let Some(holder) = domain.hints.get(hash.word()) {
            return Ok(Referred::At(holder));
        }
        Ok(domain.grant(hash, now))
    }

    /// As [`Self::refer`], for one who has learned nothing from who is said to have it.
    pub fn grant(&mut self, volume: VolumeId, hash: &ContentHash, now: Instant) -> Referred {
        let id = self.leases.get(&volume).and_then(|lease| lease.domain);
        let domain = id.and_then(|id| self.domains.get_mut(&id));
        domain.map_or(Referred::Send, |domain| domain.grant(hash, now))
    }

    /// Bytes of this hash lie at another intermediary, as somebody says who shares them.
    pub fn hint(&mut self, volume: VolumeId, hash: &ContentHash, holder: Holder) {
        let id = self.leases.get(&volume).and_then(|lease| lease.domain);
        if let Some(domain) = id.and_then(|id| self.domains.get_mut(&id)) {
            domain.grants.remove(hash);
            domain.hints.set(hash.word(), holder);
        }
    }

    /// A copy of these bytes came for a page. Where they lie already, that slot holds it, too: under what generation.
    pub fn share(
        &mut self,
        volume: VolumeId,
        owner: Owner,
        hash: &ContentHash,
    ) -> Option<(SlotIndex, Generation)> {
        let id = self.leases.get(&volume)?.domain?;
        let slot = self.find(id, hash)?;
        let generation = self.hold(volume, (owner.page, owner.round), slot, Some(owner.checksum))?;
        Some((slot, generation))
    }

    /// A page that refers to a slot has this checksum, by its writer's word: [`Self::read`] says so from now on.
    pub fn seal(&mut self, volume: VolumeId, page: PageIndex, slot: SlotIndex, checksum: Checksum) {
        let refs = self.leases.get_mut(&volume).map(|lease| &mut lease.refs);
        if let Some(held) = refs.and_then(|refs| refs.get_mut(&(page.0, slot.0))) {
            held.checksum = checksum.0;
        }
    }

    /// Holds a stored slot for one more page. `None` when too many hold it.
    fn hold(
        &mut self,
        volume: VolumeId,
        (page, round): (PageIndex, Round),
        slot: SlotIndex,
        checksum: Option<Checksum>,
    ) -> Option<Generation> {
        let (chunk, at) = self.chunk_mut(slot)?;
        let Slot { generation, checksum: of_slot, .. } = chunk.slots[at];
        let contents = chunk.contents.as_mut().filter(|contents| contents.references[at] < u16::MAX)?;
        contents.references[at] += 1;
        contents.heir = Some(volume);
        let Lease { refs, referring, .. } = self.leases.get_mut(&volume)?;
        *referring += 1;
        let fresh = Reference { round: round.0, times: 0, checksum: of_slot };
        let held = refs.entry((page.0, slot.0)).or_insert(fresh);
        held.times += 1;
        if held.round <= round.0 {
            // An older round's may be of bytes that the guest wrote to while they were sent: not of these.
            held.round = round.0;
            held.checksum = checksum.map_or(held.checksum, |checksum| checksum.0);
        }
        Some(Generation(generation))
    }

    /// Takes one reference of a page to a slot back; `false` when there is none.
    pub(super) fn release_reference(&mut self, volume: VolumeId, page: PageIndex, slot: SlotIndex) -> bool {
        let Some(lease) = self.leases.get_mut(&volume) else { return false };
        let key = (page.0, slot.0);
        let Some(held) = lease.refs.get_mut(&key) else { return false };
        held.times -= 1;
        if held.times == 0 {
            lease.refs.remove(&key);
        }
        lease.referring -= 1;
        self.unreference(slot, 1);
        true
    }

    fn unreference(&mut self, slot: SlotIndex, times: u16) {
        if let Some((Chunk { contents: Some(contents), .. }, at)) = self.chunk_mut(slot) {
            contents.references[at] -= times;
            self.let_go(slot);
        }
    }

    /// The volume that had these references is gone.
    pub(super) fn drop_references(&mut self, refs: Refs) {
        // Slot by slot: chunks are gone through once, and what comes free does so in an order that no hash decides.
        let mut held: Vec<(u32, u16)> =
            refs.into_iter().map(|((_, slot), held)| (slot, held.times)).collect();
        held.sort_unstable();
        for (slot, times) in held {
            self.unreference(SlotIndex(slot), times);
        }
    }

    /// Takes back the references of the volume's pages of `range` that were put below `below`.
    pub fn discard_references(&mut self, volume: VolumeId, range: PageRange, below: Round) {
        let Some(lease) = self.leases.get_mut(&volume) else { return };
        let positions = range.positions();
        let gone = lease
            .refs
            .extract_if(|(page, _), held| positions.contains(&(*page as usize)) && held.round < below.0)
            .collect::<Refs>();
        lease.referring -= gone.values().map(|held| u64::from(held.times)).sum::<u64>();
        self.drop_references(gone);
    }

    /// A chunk whose volume is gone, in which others hold slots, becomes a chunk of the last of them, which may fill
    /// what is free in it. Not while it is being filled for the one that is gone.
    pub(super) fn inherit(&mut self, number: u32) {
        let Some(Entry::Leased(chunk)) = self.entries.get_mut(number as usize) else { return };
        let survivors = chunk.stored.len();
        let Some(contents) = &chunk.contents else { return };
        let Some(heir) = contents.heir.filter(|_| survivors > 0 && chunk.taken == survivors) else { return };
        let Some(lease) = self.leases.get_mut(&heir).filter(|lease| lease.domain == Some(contents.domain))
        else {
            return;
        };
        (chunk.volume, chunk.condemned) = (heir, false);
        (chunk.at, chunk.listed) = (lease.chunks.len(), false);
        lease.chunks.push(number);
        if !chunk.free.is_empty() {
            chunk.listed = true;
            lease.open.push(number);
        }
        self.settle(ChunkNumber(number));
    }
}
