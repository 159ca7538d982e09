//! The simulated network itself: all regions and queue pairs of all devices.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::LIMITS;
use super::clock::{Clock, Times};
use super::memory::{Memory, Posted, Registered};
use crate::verbs::{Access, Done, Endpoint, Fault, Patience};
use libsg::{Error, ErrorKind};

/// Bytes of the largest packet of every simulated port.
const MTU_BYTES: u32 = 4096;

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

/// How far a work has come.
#[derive(Debug)]
pub(super) enum Stage {
    Posted,
    /// It is under way, with these bytes; or will never get there.
    Sent(Result<Vec<u8>, Fault>),
    /// It was done, with these bytes on their way back.
    Landed(Result<Vec<u8>, Fault>),
}

#[derive(Debug)]
pub(super) struct Flying {
    pub work: Posted,
    pub stage: Stage,
    /// When it goes on, on a clock.
    pub times: Times,
    /// How often it was sent again since it last got on.
    pub tries: u8,
}

#[derive(Debug)]
pub(super) struct Pair {
    domain: u32,
    pub gid: Ipv6Addr,
    pub peer: Option<(u32, Ipv6Addr)>,
    pub patience: Patience,
    pub failed: bool,
    /// Nobody here has it any more: what is under way gets there, or not.
    pub gone: bool,
    /// Not done: first those that have landed, then those that were sent, then the others.
    pub works: VecDeque<Flying>,
    pub landed: usize,
    pub sent: usize,
    /// Done and not reaped.
    done: VecDeque<Done>,
    event: Arc<OwnedFd>,
    armed: bool,
    /// When the last of its works gets on.
    pub last: Times,
}

impl Pair {
    fn outstanding(&self) -> usize {
        if self.failed { self.done.len() } else { self.works.len() + self.done.len() }
    }

    /// Its owner is told.
    fn complete(&mut self, done: Done) -> bool {
        self.done.push_back(done);
        let wakes = std::mem::take(&mut self.armed);
        if wakes {
            // It can only be readable already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
        wakes
    }
}

/// All regions and queue pairs of a network.
#[derive(Debug)]
pub(super) struct Fabric {
    random: u64,
    numbers: u32,
    regions: HashMap<u32, Registered>,
    regions_max: HashMap<u16, usize>,
    pub(super) pairs: BTreeMap<u32, Pair>,
    cut_off: HashSet<u16>,
    cut: HashSet<(u16, u16)>,
    pub(super) counts: Counts,
    pub(super) clock: Option<Clock>,
}

pub(super) fn host_of(gid: Ipv6Addr) -> u16 {
    gid.segments()[7]
}

impl Fabric {
    pub(super) fn new(seed: u64, clock: Option<Clock>) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            numbers: 0,
            regions: HashMap::new(),
            regions_max: HashMap::new(),
            pairs: BTreeMap::new(),
            cut_off: HashSet::new(),
            cut: HashSet::new(),
            counts: Counts::default(),
            clock,
        }
    }

    /// One of `0..below` (xorshift64*, Vigna 2016: one generator for all that happens here).
    pub(super) fn draw(&mut self, below: u64) -> u64 {
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

    pub(super) fn register(
        &mut self,
        (host, domain): (u16, u32),
        memory: Memory,
        access: Access,
    ) -> Result<u32, Error> {
        let most = self.regions_max.get(&host).copied().unwrap_or(usize::MAX);
        if self.regions.values().filter(|region| region.host == host).count() >= most {
            return Err(Error::new(ErrorKind::Full, "the device registers no more memory"));
        }
        let key = self.number();
        self.regions.insert(key, Registered { host, domain, memory, access });
        Ok(key)
    }

    pub(super) fn withdraw(&mut self, key: u32) {
        self.regions.remove(&key);
    }

    pub(super) fn limit_regions(&mut self, host: u16, most: usize) {
        self.regions_max.insert(host, most);
    }

    pub(super) fn add_pair(&mut self, domain: u32, gid: Ipv6Addr, event: Arc<OwnedFd>) -> Endpoint {
        let number = self.number();
        let pair = Pair {
            domain,
            gid,
            peer: None,
            patience: Patience::default(),
            failed: false,
            gone: false,
            works: VecDeque::new(),
            landed: 0,
            sent: 0,
            done: VecDeque::new(),
            event,
            armed: false,
            last: Times::default(),
        };
        self.pairs.insert(number, pair);
        let packet_sequence = self.draw(1 << 24) as u32;
        Endpoint { number, packet_sequence, gid, lid: 0, mtu_bytes: MTU_BYTES }
    }

    pub(super) fn remove_pair(&mut self, number: u32) {
        if self.clock.is_none() {
            // What was posted and never reaped may have happened, or not: as far as the seed has it.
            let going_on = self.draw(LIMITS.works_max as u64);
            self.go_on(number, going_on);
        }
        self.flush(number);
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.gone = true;
            if pair.works.is_empty() {
                self.pairs.remove(&number);
            }
        }
    }

    /// The host's process is gone, and with it all that it had; nobody tells its peers.
    pub(super) fn remove_host(&mut self, host: u16) {
        self.regions.retain(|_, region| region.host != host);
        let its: Vec<u32> = self
            .pairs
            .iter()
            .filter(|(_, pair)| host_of(pair.gid) == host)
            .map(|(number, _)| *number)
            .collect();
        its.into_iter().for_each(|number| self.remove_pair(number));
    }

    pub(super) fn connect(&mut self, number: u32, peer: &Endpoint, patience: Patience) -> Result<(), Error> {
        let Some(pair) = self.pairs.get_mut(&number) else { return Ok(()) };
        if pair.peer.is_some() || pair.failed {
            return Err(Error::new(ErrorKind::Input, "the queue pair was connected before"));
        }
        pair.peer = Some((peer.number, peer.gid));
        pair.patience = patience;
        Ok(())
    }

    pub(super) fn outstanding(&self, number: u32) -> usize {
        self.pairs.get(&number).map_or(0, Pair::outstanding)
    }

    pub(super) fn post(&mut self, number: u32, work: Posted) -> Result<(), Error> {
        self.counts.works += 1;
        let Some(pair) = self.pairs.get(&number) else { return Ok(()) };
        if pair.peer.is_none() {
            return Err(Error::new(ErrorKind::Input, "posted before the queue pair was connected"));
        }
        let times = self.times(pair.last, work.bytes());
        if let Some(pair) = self.pairs.get_mut(&number) {
            if pair.failed {
                pair.complete(Done { id: work.id, result: Err(Fault::Flushed) });
            } else {
                pair.last = times;
                pair.works.push_back(Flying { work, stage: Stage::Posted, times, tries: 0 });
            }
        }
        Ok(())
    }

    pub(super) fn reap(&mut self, number: u32, most: usize, into: &mut Vec<Done>) {
        if self.clock.is_none() {
            let going_on = self.draw(LIMITS.works_max as u64 / 4);
            self.go_on(number, going_on);
        }
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        let coming = pair.done.len().min(most);
        into.extend(pair.done.drain(..coming));
        // What it was armed for has come. Without a clock it stays readable as long as nothing has: nothing would ever
        // happen else.
        if coming > 0 || self.clock.is_some() {
            let _ = rustix::io::read(&pair.event, &mut [0; 8]);
        }
    }

    /// The owner is to be woken by the next completion.
    pub(super) fn arm(&mut self, number: u32) {
        let is_on_a_clock = self.clock.is_some();
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        pair.armed = is_on_a_clock;
        if !is_on_a_clock && pair.outstanding() > 0 {
            let _ = rustix::io::write(&pair.event, &1u64.to_ne_bytes());
        }
    }

    pub(super) fn fail(&mut self, number: u32) {
        if self.clock.is_none() {
            // Some of it may get there in the moment.
            let going_on = self.draw(4);
            self.go_on(number, going_on);
        }
        self.flush(number);
    }

    /// All queue pairs between two hosts that begin at the first are in the error state from now on.
    pub(super) fn fail_between(&mut self, one: u16, other: u16) {
        let between =
            |pair: &Pair| host_of(pair.gid) == one && pair.peer.is_some_and(|(_, gid)| host_of(gid) == other);
        let failing: Vec<u32> =
            self.pairs.iter().filter(|(_, pair)| between(pair)).map(|(number, _)| *number).collect();
        failing.into_iter().for_each(|number| self.flush(number));
    }

    pub(super) fn cut_off(&mut self, host: u16) {
        self.cut_off.insert(host);
    }

    pub(super) fn restore(&mut self, host: u16) {
        self.cut_off.remove(&host);
    }

    /// Carries nothing between two hosts from now on, or again.
    pub(super) fn cut(&mut self, one: u16, other: u16, cut: bool) {
        let pair = (one.min(other), one.max(other));
        if cut {
            self.cut.insert(pair);
        } else {
            self.cut.remove(&pair);
        }
    }

    pub(super) fn is_cut(&self, one: u16, other: u16) -> bool {
        let is_off = |host| self.cut_off.contains(host);
        is_off(&one) || is_off(&other) || self.cut.contains(&(one.min(other), one.max(other)))
    }

    /// The next `most` works of the pair are done.
    fn go_on(&mut self, number: u32, most: u64) {
        for _ in 0..most {
            let Some(pair) = self.pairs.get_mut(&number) else { return };
            let Some(flying) = pair.works.pop_front() else { return };
            let peer = self.reached(number);
            let result = peer.ok_or(Fault::RetriesExceeded).and_then(|peer| {
                let bytes = self.take(number, &flying.work)?;
                self.land(peer, &flying.work, &bytes)
            });
            self.end(number, &flying.work, result);
        }
    }

    /// The peer of a pair, if packets get there and it takes them.
    pub(super) fn reached(&self, number: u32) -> Option<u32> {
        let pair = self.pairs.get(&number)?;
        let (peer_number, peer_gid) = pair.peer?;
        let peer = self.pairs.get(&peer_number)?;
        let takes = !peer.failed && peer.gid == peer_gid;
        (takes && !self.is_cut(host_of(pair.gid), host_of(peer_gid))).then_some(peer_number)
    }

    /// A work has come to its end.
    pub(super) fn end(&mut self, number: u32, work: &Posted, result: Result<Vec<u8>, Fault>) {
        let result = result.and_then(|bytes| self.fetch(number, work, &bytes));
        if let Err(Fault::RemoteAccess | Fault::LocalProtection) = result {
            self.counts.refused += 1;
        }
        if work.signalled || result.is_err() {
            self.complete(number, Done { id: work.id, result });
        }
        if result.is_err() {
            self.flush(number);
        }
    }

    fn complete(&mut self, number: u32, done: Done) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        if pair.complete(done)
            && let Some(clock) = &mut self.clock
        {
            clock.woken.push(host_of(pair.gid));
        }
    }

    /// To the error state: whatever is outstanding is flushed, signalled or not. What is on its way may still get there.
    pub(super) fn flush(&mut self, number: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        if std::mem::replace(&mut pair.failed, true) {
            return;
        }
        let flushed: Vec<u64> = pair.works.iter().map(|flying| flying.work.id).collect();
        pair.works.retain(|flying| matches!(flying.stage, Stage::Sent(Ok(_))));
        (pair.landed, pair.sent) = (0, pair.works.len());
        for id in flushed {
            self.complete(number, Done { id, result: Err(Fault::Flushed) });
        }
    }

    /// The bytes that a work sends.
    pub(super) fn take(&self, number: u32, work: &Posted) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        if !work.inline.is_empty() {
            return Ok(work.inline.clone());
        }
        for (region, offset, length) in self.near(number, work)? {
            if !work.is_read() {
                region.memory.read(offset, length, &mut bytes);
            }
        }
        Ok(bytes)
    }

    /// Our own memory that a work is about, all of which is looked at before any of it is moved: a device would do so by
    /// piece, and move some.
    fn near(&self, number: u32, work: &Posted) -> Result<Vec<(&Registered, usize, usize)>, Fault> {
        let domain = self.pairs.get(&number).map(|pair| pair.domain);
        let find = |piece: &crate::verbs::Piece| {
            let region = self.regions.get(&piece.key).filter(|region| Some(region.domain) == domain)?;
            let offset = region.memory.find(piece.address, piece.bytes as usize)?;
            (!work.is_read() || region.access.local_write).then_some((region, offset, piece.bytes as usize))
        };
        work.pieces.iter().map(find).collect::<Option<_>>().ok_or(Fault::LocalProtection)
    }

    /// Does at the peer what the work is for; the bytes that it reads there.
    pub(super) fn land(&mut self, peer: u32, work: &Posted, bytes: &[u8]) -> Result<Vec<u8>, Fault> {
        let landed = self.try_land(peer, work, bytes);
        match &landed {
            Ok(_) if work.is_read() => self.counts.read_bytes += work.bytes() as u64,
            Ok(_) => self.counts.written_bytes += work.bytes() as u64,
            // A peer that refuses access is in the error state as well (10.2.6, affiliated asynchronous error).
            Err(_) => self.flush(peer),
        }
        landed
    }

    fn try_land(&self, peer: u32, work: &Posted, bytes: &[u8]) -> Result<Vec<u8>, Fault> {
        let mut read = Vec::new();
        if work.bytes() == 0 && !work.is_read() {
            return Ok(read);
        }
        let domain = self.pairs.get(&peer).map(|peer| peer.domain);
        let far = self.regions.get(&work.remote.key).filter(|region| Some(region.domain) == domain);
        let may = |access: &Access| if work.is_read() { access.remote_read } else { access.remote_write };
        let far = far.filter(|region| may(&region.access)).ok_or(Fault::RemoteAccess)?;
        let offset = far.memory.find(work.remote.address, work.bytes()).ok_or(Fault::RemoteAccess)?;
        if work.is_read() {
            far.memory.read(offset, work.bytes(), &mut read);
        } else {
            far.memory.write(offset, bytes);
        }
        Ok(read)
    }

    /// What was read arrives.
    fn fetch(&self, number: u32, work: &Posted, bytes: &[u8]) -> Result<(), Fault> {
        if work.is_read() {
            let mut left = bytes;
            for (region, offset, length) in self.near(number, work)? {
                let (piece, rest) = left.split_at(length.min(left.len()));
                region.memory.write(offset, piece);
                left = rest;
            }
        }
        Ok(())
    }

    /// How long a peer of this pair may be silent until a packet is sent again.
    pub(super) fn patience(&self, number: u32) -> (Duration, u8) {
        let patience = self.pairs.get(&number).map(|pair| pair.patience).unwrap_or_default();
        (patience.acknowledged_within, patience.retries)
    }
}
