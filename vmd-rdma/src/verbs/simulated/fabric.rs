//! The simulated network itself: all regions and queue pairs of all devices.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::Ipv6Addr;
use std::ptr::NonNull;

use super::LIMITS;
use crate::verbs::{Access, Done, Endpoint, Fault, Operation, Piece, Remote, Work};
use libsg::memory::{GuestSlice, SlotSlice};
use libsg::{Error, ErrorKind};

/// Bytes of the largest packet of every simulated port.
const MTU_BYTES: u32 = 4096;

/// Bytes that go from one region to another at once.
const COPY_BYTES: usize = 4096;

/// What a network did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times that somebody posted: doorbells, had it been a device, as far as each post had a work.
    pub works: u64,
    /// Bytes that were written to peers.
    pub written_bytes: u64,
    /// Bytes that were read from peers.
    pub read_bytes: u64,
    /// Works that were refused for what they wanted of memory.
    pub refused: u64,
}

/// Memory of some host, as long as it is registered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is only reached through slices of memory that others may change, whose accesses are fit for any thread.
unsafe impl Send for Memory {}

impl Memory {
    /// # Safety
    /// As [`crate::verbs::Domain::register`].
    pub(super) unsafe fn new(start: NonNull<u8>, bytes: usize) -> Self {
        Self { start, bytes }
    }

    /// Where in it `bytes` bytes from this address are, if all of them are.
    fn find(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.start.as_ptr() as u64)?).ok()?;
        (offset.checked_add(bytes)? <= self.bytes).then_some(offset)
    }

    fn readable(&self, offset: usize, bytes: usize) -> GuestSlice<'_> {
        // SAFETY: it is mapped, by the promise of `new`, while it is registered, and nobody has a reference to it.
        unsafe { GuestSlice::new(self.start, self.bytes) }.skip(offset).take(bytes)
    }

    fn writable(&self, offset: usize, bytes: usize) -> SlotSlice<'_> {
        // SAFETY: as for `readable`; that it may be written was said when it was registered.
        unsafe { SlotSlice::new(self.start, self.bytes) }.skip(offset).take(bytes)
    }
}

#[derive(Debug)]
struct Registered {
    domain: u32,
    memory: Memory,
    access: Access,
}

/// A work request that was posted.
#[derive(Debug)]
pub(super) struct Posted {
    id: u64,
    operation: Operation,
    pieces: Vec<Piece>,
    inline: Vec<u8>,
    remote: Remote,
    signalled: bool,
}

impl Posted {
    /// As a device takes it over.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] where it exceeds the limits.
    pub(super) fn checked(work: &Work<'_>) -> Result<Self, Error> {
        let bytes: usize = work.pieces.iter().map(|piece| piece.bytes as usize).sum();
        let inline = work.operation == Operation::WriteInline;
        let bytes_max = if inline { LIMITS.inline_bytes_max } else { LIMITS.message_bytes_max };
        if work.pieces.len() > LIMITS.pieces_max || bytes > bytes_max {
            let what =
                format!("{bytes} bytes in {} pieces are more than the device takes", work.pieces.len());
            return Err(Error::new(ErrorKind::Input, what));
        }
        let mut taken = Vec::new();
        if inline {
            for piece in work.pieces {
                let start = NonNull::new(piece.address as *mut u8)
                    .ok_or_else(|| Error::new(ErrorKind::Input, "a piece at address zero"))?;
                let from = taken.len();
                taken.resize(from + piece.bytes as usize, 0);
                // SAFETY: whoever posts says that these bytes are there, as to a device; they are read once, now.
                unsafe { GuestSlice::new(start, piece.bytes as usize) }.copy_to(&mut taken[from..]);
            }
        }
        Ok(Self {
            id: work.id,
            operation: work.operation,
            pieces: work.pieces.to_vec(),
            inline: taken,
            remote: work.remote,
            signalled: work.signalled,
        })
    }

    fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes as usize).sum()
    }
}

#[derive(Debug)]
struct Pair {
    domain: u32,
    gid: Ipv6Addr,
    peer: Option<(u32, Ipv6Addr)>,
    failed: bool,
    /// Not done.
    queue: VecDeque<Posted>,
    /// Done and not reaped.
    done: VecDeque<Done>,
}

/// All regions and queue pairs of a network.
#[derive(Debug)]
pub(super) struct Fabric {
    random: u64,
    numbers: u32,
    regions: HashMap<u32, Registered>,
    pairs: HashMap<u32, Pair>,
    cut_off: HashSet<u16>,
    counts: Counts,
}

fn host_of(gid: Ipv6Addr) -> u16 {
    gid.segments()[7]
}

impl Fabric {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            numbers: 0,
            regions: HashMap::new(),
            pairs: HashMap::new(),
            cut_off: HashSet::new(),
            counts: Counts::default(),
        }
    }

    /// One of `0..below` (xorshift64*, Vigna 2016: one generator for all that happens here).
    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below.max(1)
    }

    /// A number that nothing else ever had: a key that was withdrawn is nobody's again.
    pub(super) fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    pub(super) fn register(&mut self, domain: u32, memory: Memory, access: Access) -> u32 {
        let key = self.number();
        self.regions.insert(key, Registered { domain, memory, access });
        key
    }

    pub(super) fn withdraw(&mut self, key: u32) {
        self.regions.remove(&key);
    }

    pub(super) fn add_pair(&mut self, domain: u32, gid: Ipv6Addr) -> Endpoint {
        let number = self.number();
        let (queue, done) = (VecDeque::new(), VecDeque::new());
        self.pairs.insert(number, Pair { domain, gid, peer: None, failed: false, queue, done });
        let packet_sequence = self.draw(1 << 24) as u32;
        Endpoint { number, packet_sequence, gid, lid: 0, mtu_bytes: MTU_BYTES }
    }

    pub(super) fn remove_pair(&mut self, number: u32) {
        // What was posted and never reaped may have happened, or not: as far as the seed has it.
        let going_on = self.draw(LIMITS.works_max as u64);
        self.go_on(number, going_on);
        self.pairs.remove(&number);
    }

    pub(super) fn connect(&mut self, number: u32, peer: &Endpoint) -> Result<(), Error> {
        let Some(pair) = self.pairs.get_mut(&number) else { return Ok(()) };
        if pair.peer.is_some() || pair.failed {
            return Err(Error::new(ErrorKind::Input, "the queue pair was connected before"));
        }
        pair.peer = Some((peer.number, peer.gid));
        Ok(())
    }

    pub(super) fn outstanding(&self, number: u32) -> usize {
        self.pairs.get(&number).map_or(0, |pair| pair.queue.len() + pair.done.len())
    }

    pub(super) fn post(&mut self, number: u32, work: Posted) -> Result<(), Error> {
        self.counts.works += 1;
        let Some(pair) = self.pairs.get_mut(&number) else { return Ok(()) };
        if pair.peer.is_none() {
            return Err(Error::new(ErrorKind::Input, "posted before the queue pair was connected"));
        }
        pair.queue.push_back(work);
        Ok(())
    }

    pub(super) fn reap(&mut self, number: u32, most: usize, into: &mut Vec<Done>) {
        let going_on = self.draw(LIMITS.works_max as u64 / 4);
        self.go_on(number, going_on);
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        let coming = pair.done.len().min(most);
        into.extend(pair.done.drain(..coming));
    }

    pub(super) fn fail(&mut self, number: u32) {
        // Some of it may get there in the moment.
        let going_on = self.draw(4);
        self.go_on(number, going_on);
        self.flush(number);
    }

    pub(super) fn cut_off(&mut self, host: u16) {
        self.cut_off.insert(host);
    }

    pub(super) fn restore(&mut self, host: u16) {
        self.cut_off.remove(&host);
    }

    /// The next `most` works of the pair are done.
    fn go_on(&mut self, number: u32, most: u64) {
        for _ in 0..most {
            let Some(pair) = self.pairs.get_mut(&number) else { return };
            if pair.failed {
                return;
            }
            let (domain, gid, peer) = (pair.domain, pair.gid, pair.peer);
            let Some(work) = pair.queue.pop_front() else { return };
            let result = self.carry(domain, gid, peer, &work);
            if let Err(Fault::RemoteAccess | Fault::LocalProtection) = result {
                self.counts.refused += 1;
            }
            if let Some(pair) = self.pairs.get_mut(&number)
                && (work.signalled || result.is_err())
            {
                pair.done.push_back(Done { id: work.id, result });
            }
            match result {
                Ok(()) => {}
                Err(fault) => {
                    // A peer that refuses access is in the error state as well (10.2.6, affiliated asynchronous error).
                    if fault == Fault::RemoteAccess
                        && let Some((peer, _)) = peer
                    {
                        self.flush(peer);
                    }
                    self.flush(number);
                }
            }
        }
    }

    /// To the error state: whatever is outstanding is flushed, signalled or not.
    fn flush(&mut self, number: u32) {
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.failed = true;
            let flushed = pair.queue.drain(..).map(|work| Done { id: work.id, result: Err(Fault::Flushed) });
            pair.done.extend(flushed);
        }
    }

    fn carry(
        &mut self,
        domain: u32,
        gid: Ipv6Addr,
        peer: Option<(u32, Ipv6Addr)>,
        work: &Posted,
    ) -> Result<(), Fault> {
        let (peer_number, peer_gid) = peer.ok_or(Fault::RetriesExceeded)?;
        let reached = !self.cut_off.contains(&host_of(gid)) && !self.cut_off.contains(&host_of(peer_gid));
        let peer =
            self.pairs.get(&peer_number).filter(|peer| reached && !peer.failed && peer.gid == peer_gid);
        let peer = peer.ok_or(Fault::RetriesExceeded)?;
        let bytes = work.bytes();
        if bytes == 0 && work.operation != Operation::Read {
            return Ok(());
        }
        let far = self.regions.get(&work.remote.key).filter(|region| region.domain == peer.domain);
        let may = |access: &Access| match work.operation {
            Operation::Read => access.remote_read,
            Operation::Write | Operation::WriteInline => access.remote_write,
        };
        let far = far.filter(|region| may(&region.access)).ok_or(Fault::RemoteAccess)?;
        let mut far_offset = far.memory.find(work.remote.address, bytes).ok_or(Fault::RemoteAccess)?;
        if work.operation == Operation::WriteInline {
            far.memory.writable(far_offset, bytes).copy_from(&work.inline);
        } else {
            // All of it is looked at before any of it is moved: a device would do so by piece, and move some.
            let near = |piece: &Piece| {
                let region = self.regions.get(&piece.key).filter(|region| region.domain == domain)?;
                let writes = work.operation != Operation::Read || region.access.local_write;
                let offset = region.memory.find(piece.address, piece.bytes as usize)?;
                writes.then_some((region.memory, offset, piece.bytes as usize))
            };
            let pieces: Option<Vec<_>> = work.pieces.iter().map(near).collect();
            for (memory, offset, bytes) in pieces.ok_or(Fault::LocalProtection)? {
                if work.operation == Operation::Read {
                    copy(far.memory.readable(far_offset, bytes), memory.writable(offset, bytes));
                } else {
                    copy(memory.readable(offset, bytes), far.memory.writable(far_offset, bytes));
                }
                far_offset += bytes;
            }
        }
        match work.operation {
            Operation::Read => self.counts.read_bytes += bytes as u64,
            Operation::Write | Operation::WriteInline => self.counts.written_bytes += bytes as u64,
        }
        Ok(())
    }
}

fn copy(mut from: GuestSlice<'_>, mut to: SlotSlice<'_>) {
    let mut through = [0; COPY_BYTES];
    while !from.is_empty() {
        let bytes = from.len().min(COPY_BYTES);
        from.take(bytes).copy_to(&mut through[..bytes]);
        to.take(bytes).copy_from(&through[..bytes]);
        (from, to) = (from.skip(bytes), to.skip(bytes));
    }
}
