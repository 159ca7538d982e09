//! Memory that clients reach by themselves: what they are given, and what is taken back from whom.
//!
//! Domains, open chunks and seats are locked last, each for a look or a change only: the backend is called without.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{Store, check_inside};
use crate::content::Sharing;
use crate::error::{Error, ErrorKind};
#[cfg(feature = "simulation")]
use crate::host;
use crate::ids::{Epoch, Placement, VolumeId};
use crate::server::backend::{Attached, Backend, ChunkMemory, Domain, Opened, Reader, Reading, Rights};
use crate::server::seats::{Held, Seat, Withdrawn, chunks_of};
use crate::server::slots::{CHUNK_SLOTS, ChunkNumber, SlotRun};
use crate::server::transit::Filling;
use crate::server::volumes::Access;
use crate::wire::access::{Endpoint, KeyEntry};
use crate::wire::{GetEntry, PageEntry, Status};

/// Who is in a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Circle {
    Volume(VolumeId),
    Sharing(Sharing),
}

/// A chunk that readers reach; its domain lives as long.
#[derive(Debug)]
struct Readable {
    opened: Arc<Opened>,
    _domain: Arc<dyn Domain>,
}

/// What clients reach by themselves.
#[derive(Debug, Default)]
pub(super) struct Reached {
    backend: Option<Arc<dyn Backend>>,
    domains: Mutex<Vec<(Circle, Weak<dyn Domain>)>>,
    /// Until the chunk's memory goes back to the system.
    readable: Mutex<HashMap<ChunkNumber, Readable>>,
    seats: Mutex<Vec<Arc<Seat>>>,
}

impl Reached {
    pub(super) fn new(backend: Option<Arc<dyn Backend>>) -> Self {
        Self { backend, ..Self::default() }
    }

    /// Nobody reads in the chunk any more.
    pub(super) fn close(&self, chunk: ChunkNumber) {
        let closed = self.readable.lock().remove(&chunk);
        drop(closed);
    }
}

/// A session's seat; dropped, its client has nothing any more.
pub(in crate::server) struct Seated<'s> {
    store: &'s Store,
    seat: Arc<Seat>,
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        self.store.reached.seats.lock().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
        self.store.finish_withdrawal(self.seat.clear());
    }
}

/// Chunks that were pinned and opened for a writer, until it has them.
struct Opening<'s> {
    store: &'s Store,
    opened: Vec<(ChunkNumber, Opened)>,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        for (chunk, opened) in self.opened.drain(..) {
            drop(opened);
            self.store.unpin(&[chunk]);
        }
    }
}

impl Store {
    /// Lets a client in.
    pub(in crate::server) fn attach(
        &self,
        of: (VolumeId, Epoch),
        peer: &Endpoint,
    ) -> Result<(Seated<'_>, Endpoint), Status> {
        let domain = self.domain_of(of)?;
        let attached = domain.attach(peer).map_err(|error| not_reached(&error))?;
        self.seat(of, (attached, Rights::Write), domain)
    }

    /// An end here that reads copies where they lie.
    pub(in crate::server) fn draw(
        &self,
        of: (VolumeId, Epoch),
    ) -> Result<(Seated<'_>, Box<dyn Reader>, Endpoint), Status> {
        let domain = self.domain_of(of)?;
        let Reading { attached, reader } = domain.reader().map_err(|error| not_reached(&error))?;
        let (seated, endpoint) = self.seat(of, (attached, Rights::Fill), domain)?;
        Ok((seated, reader, endpoint))
    }

    /// Whether others may read here, or this one there.
    pub(in crate::server) fn is_reached(&self) -> bool {
        self.reached.backend.is_some()
    }

    fn domain_of(&self, (volume, epoch): (VolumeId, Epoch)) -> Result<Arc<dyn Domain>, Status> {
        let backend = self.reached.backend.as_ref().ok_or(Status::NotReached)?;
        let sharing = self.volumes.lock().admit(volume, epoch, Access::Read)?.manifest.sharing.clone();
        self.domain(&**backend, sharing.map_or(Circle::Volume(volume), Circle::Sharing))
    }

    fn seat(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        (attached, fills): (Attached, Rights),
        domain: Arc<dyn Domain>,
    ) -> Result<(Seated<'_>, Endpoint), Status> {
        let endpoint = attached.endpoint;
        let seat = Arc::new(Seat::new((volume, epoch), (attached, fills), domain));
        let seated = Seated { store: self, seat: Arc::clone(&seat) };
        // Whoever fences it from now on finds it.
        let volumes = self.volumes.lock();
        let admitted =
            volumes.admit(volume, epoch, Access::Read).map(|_| self.reached.seats.lock().push(seat));
        drop(volumes);
        admitted.map(|()| (seated, endpoint))
    }

    fn domain(&self, backend: &dyn Backend, circle: Circle) -> Result<Arc<dyn Domain>, Status> {
        let known = |domains: &mut Vec<(Circle, Weak<dyn Domain>)>| {
            domains.retain(|(_, domain)| domain.strong_count() > 0);
            domains.iter().find(|(of, _)| *of == circle).and_then(|(_, domain)| domain.upgrade())
        };
        if let Some(domain) = known(&mut self.reached.domains.lock()) {
            return Ok(domain);
        }
        let fresh = backend.domain().map_err(|error| not_reached(&error))?;
        let mut domains = self.reached.domains.lock();
        if let Some(domain) = known(&mut domains) {
            return Ok(domain);
        }
        domains.push((circle, Arc::downgrade(&fresh)));
        Ok(fresh)
    }

    /// Takes slots for pages that the client has, as many as there is room for, and lets it write them: where each goes,
    /// and what reaches that.
    pub(in crate::server) fn lease(
        &self,
        seated: &Seated<'_>,
        (number, pages): (u64, usize),
        placements: &mut Vec<Option<Placement>>,
        keys: &mut Vec<KeyEntry>,
    ) -> Result<(), Status> {
        let seat = &*seated.seat;
        let of = (seat.volume, seat.epoch);
        self.with_held(seat, Access::Write, |held| held.check_room(number, pages))?;
        keys.clear();
        let filling = self.take_slots(of, pages, placements)?;
        if filling.slots() == 0 {
            return Ok(());
        }
        let chunks = chunks_of(filling.runs());
        let (domain, fills, closed) = self.with_held(seat, Access::Write, |held| {
            Ok((Arc::clone(&held.domain), held.fills, held.closed_of(&chunks)))
        })?;
        let mut opening = Opening { store: self, opened: Vec::new() };
        for chunk in closed {
            self.slots.lock().pin(chunk);
            match self.open(&*domain, chunk, fills) {
                Ok(opened) => opening.opened.push((chunk, opened)),
                Err(status) => {
                    self.unpin(&[chunk]);
                    return Err(status);
                }
            }
        }
        self.with_held(seat, Access::Write, |held| {
            held.lease(number, filling.into_runs(), std::mem::take(&mut opening.opened));
            let key = |chunk: &ChunkNumber| held.key_of(*chunk).map(|opened| key_entry(*chunk, opened));
            keys.extend(chunks.iter().filter_map(key));
            Ok(())
        })
    }

    fn take_slots(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        pages: usize,
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<Filling<'_>, Status> {
        let volumes = self.volumes.lock();
        let known = volumes.admit(volume, epoch, Access::Write)?;
        if self.is_leaving() {
            return Err(Status::Full);
        }
        let member = self.me(&known.members).ok_or(Status::State)?;
        let mut runs = Vec::new();
        let taken = self.allocate(volumes, (volume, pages), &mut runs)?;
        let slots = self.slots.lock();
        placements.clear();
        placements.extend(
            runs.iter()
                .flat_map(|run| run.iter())
                .map(|slot| slots.generation(slot).map(|generation| Placement { member, slot, generation })),
        );
        placements.resize(pages, None);
        drop(slots);
        // Its hasher is looked for when it is settled.
        Ok(Filling::new(self, (volume, None), runs, taken))
    }

    /// The slots of a lease, which hold these pages, if there is such a lease. The client may write their chunks until
    /// it is withdrawn.
    pub(in crate::server) fn settle(
        &self,
        seated: &Seated<'_>,
        (number, entries): (u64, &[PageEntry]),
    ) -> Result<Option<Filling<'_>>, Status> {
        let seat = &*seated.seat;
        let volumes = self.volumes.lock();
        let known = volumes.admit(seat.volume, seat.epoch, Access::Write)?;
        check_inside(entries.iter().map(PageEntry::range), known.manifest.pages().into())?;
        let hasher = known.payload.hasher.clone();
        let ended = seat.held.lock().as_mut().ok_or(Status::State)?.end_lease(number);
        drop(volumes);
        Ok(ended.map(|runs| {
            let slots = runs.iter().map(|run| run.slots as usize).sum();
            Filling::new(self, (seat.volume, hasher), runs, slots)
        }))
    }

    /// What was filled there is full perhaps: then nobody writes it any more.
    pub(in crate::server) fn close_full(&self, seated: &Seated<'_>, runs: &[SlotRun]) {
        let mut full = chunks_of(runs);
        let slots = self.slots.lock();
        full.retain(|chunk| !slots.has_free(*chunk));
        drop(slots);
        let closed = seated.seat.held.lock().as_mut().map(|held| held.close_idle(&full));
        self.finish_withdrawal(closed.unwrap_or_default());
    }

    /// Keeps pages where they are until the client releases them: what is there of them, and what reaches it.
    pub(in crate::server) fn reach(
        &self,
        seated: &Seated<'_>,
        (number, wanted): (u64, &[GetEntry]),
        (entries, runs): (&mut Vec<PageEntry>, &mut Vec<SlotRun>),
        keys: &mut Vec<KeyEntry>,
    ) -> Result<(), Status> {
        let seat = &*seated.seat;
        let domain = self.with_held(seat, Access::Read, |held| {
            held.check_room(number, 0).map(|()| Arc::clone(&held.domain))
        })?;
        let pinned = self.pin((seat.volume, seat.epoch), wanted, entries, runs)?;
        self.open_to_read(&domain, runs, keys)?;
        self.with_held(seat, Access::Read, |held| {
            held.reach(number, pinned.into_chunks());
            Ok(())
        })
    }

    /// What reaches these slots, for a member that reads copies from them. Their chunks are pinned.
    pub(in crate::server) fn keys_of(
        &self,
        seated: &Seated<'_>,
        runs: &[SlotRun],
        keys: &mut Vec<KeyEntry>,
    ) -> Result<(), Status> {
        let domain = self.with_held(&seated.seat, Access::Read, |held| Ok(Arc::clone(&held.domain)))?;
        self.open_to_read(&domain, runs, keys)
    }

    fn open_to_read(
        &self,
        domain: &Arc<dyn Domain>,
        runs: &[SlotRun],
        keys: &mut Vec<KeyEntry>,
    ) -> Result<(), Status> {
        keys.clear();
        for chunk in chunks_of(runs) {
            keys.push(key_entry(chunk, &*self.readable(domain, chunk)?));
        }
        Ok(())
    }

    /// Slots of leases that clients have, and have not settled.
    pub(super) fn leased_slots(&self) -> u64 {
        let seats = self.reached.seats.lock().clone();
        seats.iter().filter_map(|seat| seat.held.lock().as_ref().map(Held::leased_slots)).sum::<usize>()
            as u64
    }

    /// The client is done with these. What it does not have, or has no more, is left alone.
    pub(in crate::server) fn release(&self, seated: &Seated<'_>, numbers: &[u64]) {
        let (mut ended, mut withdrawn) = (Vec::new(), Withdrawn::default());
        if let Some(held) = seated.seat.held.lock().as_mut() {
            for number in numbers {
                ended.extend(held.end_lease(*number).into_iter().flatten());
                withdrawn.unpin.extend(held.end_reach(*number).into_iter().flatten());
            }
        }
        self.free(&ended);
        self.finish_withdrawal(withdrawn);
        self.close_full(seated, &ended);
    }

    /// The volume has changed: takes back what its clients may not reach any more, and returns when nothing that they
    /// sent gets there.
    pub(super) fn withdraw(&self, volume: VolumeId) {
        let seats: Vec<Arc<Seat>> =
            self.reached.seats.lock().iter().filter(|seat| seat.volume == volume).cloned().collect();
        for seat in seats {
            let volumes = self.volumes.lock();
            let may = |access| volumes.admit(volume, seat.epoch, access).is_ok();
            let (reads, writes) = (may(Access::Read), may(Access::Write));
            drop(volumes);
            let withdrawn = match (reads, writes) {
                (true, true) => continue,
                (true, false) => seat.held.lock().as_mut().map(Held::withdraw_writer).unwrap_or_default(),
                (false, _) => seat.clear(),
            };
            self.finish_withdrawal(withdrawn);
        }
    }

    /// The order is what nothing late gets through.
    fn finish_withdrawal(&self, withdrawn: Withdrawn) {
        let Withdrawn { ways, closed, unpin, free } = withdrawn;
        #[cfg(feature = "simulation")]
        let (ways, closed) = if host::has_bug(host::Bug::WayLeftOpen) {
            std::mem::forget((ways, closed));
            Default::default()
        } else {
            (ways, closed)
        };
        drop(ways);
        drop(closed);
        if !free.is_empty() {
            self.free(&free);
        }
        if !unpin.is_empty() {
            self.unpin(&unpin);
        }
    }

    /// Looks at, or changes, what a client has, if it still may. Whoever fences it does so before or behind this.
    fn with_held<T>(
        &self,
        seat: &Seat,
        access: Access,
        act: impl FnOnce(&mut Held) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let volumes = self.volumes.lock();
        volumes.admit(seat.volume, seat.epoch, access)?;
        act(seat.held.lock().as_mut().ok_or(Status::State)?)
    }

    /// The chunk, open to readers. It is pinned.
    fn readable(&self, domain: &Arc<dyn Domain>, chunk: ChunkNumber) -> Result<Arc<Opened>, Status> {
        if let Some(readable) = self.reached.readable.lock().get(&chunk) {
            return Ok(Arc::clone(&readable.opened));
        }
        let opened = Arc::new(self.open(&**domain, chunk, Rights::Read)?);
        let fresh = || Readable { opened, _domain: Arc::clone(domain) };
        Ok(Arc::clone(&self.reached.readable.lock().entry(chunk).or_insert_with(fresh).opened))
    }

    fn open(&self, domain: &dyn Domain, chunk: ChunkNumber, rights: Rights) -> Result<Opened, Status> {
        let memory = ChunkMemory::new(&self.arena, chunk);
        memory.and_then(|memory| domain.open(memory, rights)).map_err(|error| not_reached(&error))
    }
}

fn key_entry(chunk: ChunkNumber, opened: &Opened) -> KeyEntry {
    KeyEntry { first: chunk.first_slot(), slots: CHUNK_SLOTS as u16, key: opened.key }
}

/// The client is told to take its connection instead, and the operator why.
fn not_reached(error: &Error) -> Status {
    tracing::warn!(
        error = error.chain(),
        "a client does not reach memory by itself; its pages come over its connection"
    );
    if error.kind == ErrorKind::Protocol { Status::Malformed } else { Status::NotReached }
}
