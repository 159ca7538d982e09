//! A connection to another member, for copies: dialled by a thread of its own, moved by the session.
//!
//! Where both ends have a backend, the other reads the copies where they lie here, and is told where that is
//! ([`crate::server::draw`] is its side). Until it can, and where it cannot, their bytes go over the connection.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::No;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::JoinHandle};
use crate::ids::{Epoch, MemberIndex, NodeId, Sequence, VolumeId};
use crate::memory::vectored::{self, IO_PARTS_MAX, IoPart};
use crate::server::limit::Turn;
use crate::server::slots::SlotRun;
use crate::server::store::{Seated, Store, Target};
use crate::server::transit::Pinned;
use crate::transport::{Channel, Inbox, Waker, dial, refusal};
use crate::wire::access::{Endpoint, KeyEntry};
use crate::wire::entry::encode_table;
use crate::wire::handshake::Purpose;
use crate::wire::run::encode_runs;
use crate::wire::{HEADER_BYTES, Header, IndexEntry, Kind, Status};

/// Connections to others, of all sessions of a server. With more, a batch has no copy: the client goes elsewhere.
const PEERS_MAX: usize = 1024;

/// How long a member has for the handshake.
const DIAL_TIME: Duration = Duration::from_secs(1);

/// A member that takes nothing and says nothing for so long has none of what is under way: the client gives the pages
/// to another. Clients hedge a batch sooner.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Pages that lie here, and go to others.
pub(super) struct Batch<'s> {
    pub number: u64,
    pub entries: Vec<IndexEntry>,
    pub slots: Vec<SlotRun>,
    pub _pinned: Pinned<'s>,
}

/// What came of a batch at a member.
pub(super) struct Heard {
    pub number: u64,
    pub member: MemberIndex,
    pub result: std::result::Result<(), No>,
    pub bytes: usize,
}

enum State {
    Dialling(Arc<Mutex<Option<Result<Channel>>>>),
    Open(Channel),
}

/// How the other gets at the pages.
enum Way<'s> {
    /// Nobody has asked it yet.
    Untried,
    /// It was asked whether it reads.
    Asked,
    /// It was told from where; it is let in here.
    Told(Seated<'s>),
    /// It reads.
    Open(Seated<'s>),
    /// All goes over the connection.
    Closed,
}

/// A batch that is being sent.
struct Outgoing<'s> {
    /// Header and table, once its first byte is to be written.
    head: Vec<u8>,
    batch: Arc<Batch<'s>>,
    /// Its pages are read where they lie.
    drawn: bool,
    /// Of those, bytes of pages that the operator's limit has let go.
    let_go: usize,
    written: usize,
}

/// A batch that was sent, and not answered.
struct Asked<'s> {
    batch: Arc<Batch<'s>>,
    drawn: bool,
}

/// A connection to another member.
pub(super) struct Peer<'s> {
    index: MemberIndex,
    node: NodeId,
    state: State,
    dialler: Option<JoinHandle<()>>,
    waker: Waker,
    inbox: Inbox,
    way: Way<'s>,
    /// A frame about the way, and how much of it was written.
    said: (Vec<u8>, usize),
    queue: VecDeque<Outgoing<'s>>,
    /// In the order of their sequence numbers.
    asked: VecDeque<Asked<'s>>,
    first: u64,
    keys: Vec<KeyEntry>,
    last_sign: Instant,
    held_back: bool,
    turn: Turn<'s>,
    _place: Place<'s>,
}

/// One of the connections that there may be.
struct Place<'s>(&'s AtomicUsize);

impl<'s> Place<'s> {
    fn take(count: &'s AtomicUsize) -> Option<Self> {
        let within = |count: usize| (count < PEERS_MAX).then_some(count + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).ok().map(|_| Self(count))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'s> Peer<'s> {
    /// Begins to connect. `None` when there are too many connections, or no thread.
    pub(super) fn dial(
        store: &'s Store,
        target: &Target,
        (volume, epoch): (VolumeId, Epoch),
        (turn, now): (Turn<'s>, Instant),
    ) -> Option<Self> {
        let place = Place::take(store.peers())?;
        let waker = Waker::new().ok()?;
        let dialled: Arc<Mutex<Option<Result<Channel>>>> = Arc::default();
        let (secret, address) = (store.secret().clone(), target.member.address);
        let (told, wakes) = (Arc::clone(&dialled), waker.clone());
        let dials = move || {
            let made = dial(address, Purpose::VmdBulk, volume, epoch, &secret, DIAL_TIME);
            *told.lock() = Some(made);
            wakes.wake();
        };
        let name = format!("sg-copy-{}", target.index);
        let dialler = host::thread::Builder::new().name(name).spawn(dials).ok()?;
        Some(Self {
            index: target.index,
            node: target.member.node.clone(),
            state: State::Dialling(dialled),
            dialler: Some(dialler),
            waker,
            inbox: Inbox::new(),
            way: if store.is_reached() { Way::Untried } else { Way::Closed },
            said: (Vec::new(), 0),
            queue: VecDeque::new(),
            asked: VecDeque::new(),
            first: 1,
            keys: Vec::new(),
            last_sign: now,
            held_back: false,
            turn,
            _place: place,
        })
    }

    pub(super) fn index(&self) -> MemberIndex {
        self.index
    }

    pub(super) fn node(&self) -> &NodeId {
        &self.node
    }

    /// Queues a batch.
    pub(super) fn push(&mut self, batch: Arc<Batch<'s>>, now: Instant) {
        if self.asked.is_empty() && self.queue.is_empty() {
            self.last_sign = now;
        }
        self.queue.push_back(Outgoing::new(batch));
    }

    /// Moves what moves, and takes answers.
    ///
    /// # Errors
    /// The member has none of what is under way.
    pub(super) fn progress(&mut self, store: &'s Store, now: Instant, heard: &mut Vec<Heard>) -> Result<()> {
        self.open()?;
        self.write(store, now)?;
        self.read(store, now, heard)?;
        let waits = !self.asked.is_empty() || !self.queue.is_empty();
        if waits && now.saturating_duration_since(self.last_sign) > SILENCE_MAX && !self.held_back {
            let message = format!("no sign for {} s", SILENCE_MAX.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        Ok(())
    }

    fn open(&mut self) -> Result<()> {
        let State::Dialling(dialled) = &self.state else { return Ok(()) };
        self.waker.drain();
        let Some(made) = dialled.lock().take() else { return Ok(()) };
        self.join();
        let channel = made?;
        if *channel.node() != self.node {
            let message = format!("at its address is {} now", channel.node());
            return Err(Error::new(ErrorKind::Unreachable, message));
        }
        if matches!(self.way, Way::Untried) {
            self.way = Way::Asked;
            say(&mut self.said, &channel, Kind::Draw, &[]);
        }
        self.state = State::Open(channel);
        Ok(())
    }

    fn join(&mut self) {
        if self.dialler.take().is_some_and(|dialler| dialler.join().is_err()) {
            tracing::error!("a thread that dials panicked");
        }
    }

    fn write(&mut self, store: &Store, now: Instant) -> Result<()> {
        let State::Open(channel) = &self.state else { return Ok(()) };
        self.held_back = false;
        loop {
            let is_between = self.queue.front().is_none_or(|first| first.written == 0);
            if is_between && !send_said(&mut self.said, channel)? {
                return Ok(());
            }
            let Some(first) = self.queue.front_mut() else { return Ok(()) };
            if first.head.is_empty() {
                let sequence = Sequence(self.first + self.asked.len() as u64);
                first.drawn = match &self.way {
                    Way::Open(seat) => store.keys_of(seat, &first.batch.slots, &mut self.keys).is_ok(),
                    _ => false,
                };
                first.head = head(channel, &first.batch, sequence, first.drawn.then_some(&self.keys[..]));
            }
            if !first.is_let_go(&self.turn) {
                self.held_back = true;
                return Ok(());
            }
            let total = first.bytes();
            let allowed = if first.drawn { total } else { self.turn.poll(total - first.written) };
            if allowed == 0 {
                self.held_back = true;
                return Ok(());
            }
            let sent = first.send(store, channel, allowed);
            if !first.drawn {
                self.turn.give_back(allowed - sent.as_ref().map_or(0, |sent| *sent));
            }
            match sent {
                Ok(sent) => first.written += sent,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            self.last_sign = now;
            if first.written < total {
                continue;
            }
            let Some(Outgoing { batch, drawn, .. }) = self.queue.pop_front() else { return Ok(()) };
            store.bytes_out.fetch_add(batch.bytes() as u64, Ordering::Relaxed);
            if !drawn {
                store.touch(batch.bytes());
            }
            self.asked.push_back(Asked { batch, drawn });
        }
    }

    fn read(&mut self, store: &'s Store, now: Instant, heard: &mut Vec<Heard>) -> Result<()> {
        let State::Open(channel) = &self.state else { return Ok(()) };
        while let Some(frame) = self.inbox.poll(channel)? {
            let Header { kind, status, sequence, volume, epoch, .. } = frame.header;
            if kind == Kind::Refused {
                return Err(refusal(status));
            }
            if volume != channel.greeting().volume || epoch != channel.greeting().epoch {
                return Err(Error::new(ErrorKind::Protocol, "an answer about another volume"));
            }
            match (kind, std::mem::replace(&mut self.way, Way::Closed)) {
                (Kind::DrawReply, Way::Asked) => {
                    // It has no backend, or no more room there: the connection does.
                    if status == Status::Ok
                        && let Ok((seat, end)) = store.attach((volume, epoch), &Endpoint::decode(frame.body)?)
                    {
                        self.way = Way::Told(seat);
                        say(&mut self.said, channel, Kind::DrawFrom, end.as_bytes());
                    }
                    continue;
                }
                (Kind::DrawFromReply, Way::Told(seat)) => {
                    if status == Status::Ok {
                        self.way = Way::Open(seat);
                    }
                    continue;
                }
                (_, way) => self.way = way,
            }
            // It answers in the order in which it was asked.
            let is_next = kind == Kind::CopyReply && sequence.0 == self.first;
            let answered = if is_next { self.asked.pop_front() } else { None };
            let Some(Asked { batch, drawn }) = answered else {
                return Err(Error::new(ErrorKind::Protocol, "an answer to no copy that was sent"));
            };
            self.first += 1;
            self.last_sign = now;
            if drawn && status == Status::NotReached {
                self.way = Way::Closed;
                self.queue.push_back(Outgoing::new(batch));
                continue;
            }
            let result = match status {
                Status::Ok => Ok(()),
                Status::Full => Err(No::Full),
                _ => Err(No::Lost),
            };
            heard.push(Heard { number: batch.number, member: self.index, result, bytes: batch.bytes() });
        }
        Ok(())
    }

    /// Nothing of what is under way arrives, as far as is known.
    pub(super) fn give_up(self, heard: &mut Vec<Heard>) {
        let asked = self.asked.iter().map(|asked| &asked.batch);
        for batch in asked.chain(self.queue.iter().map(|outgoing| &outgoing.batch)) {
            let (number, bytes) = (batch.number, batch.bytes());
            heard.push(Heard { number, member: self.index, result: Err(No::Lost), bytes });
        }
    }

    /// What to wait for.
    pub(super) fn awaited(&self) -> (Option<BorrowedFd<'_>>, bool) {
        match &self.state {
            State::Dialling(_) => (Some(self.waker.as_fd()), false),
            State::Open(channel) => {
                let writes = !self.queue.is_empty() || !self.said.0.is_empty();
                (Some(channel.as_fd()), writes && !self.held_back)
            }
        }
    }

    /// Whether the operator's limit keeps it from writing.
    pub(super) const fn is_held_back(&self) -> bool {
        self.held_back
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        if let State::Open(channel) = &self.state {
            channel.shut_down();
        }
        self.join();
    }
}

impl<'s> Outgoing<'s> {
    fn new(batch: Arc<Batch<'s>>) -> Self {
        Self { head: Vec::new(), batch, drawn: false, let_go: 0, written: 0 }
    }

    /// Of what is written.
    fn bytes(&self) -> usize {
        self.head.len() + if self.drawn { 0 } else { self.batch.bytes() }
    }

    /// Whether the operator's limit lets pages go that are read from here: all of them, before they may be.
    fn is_let_go(&mut self, turn: &Turn<'_>) -> bool {
        while self.drawn && self.let_go < self.batch.bytes() {
            match turn.poll(self.batch.bytes() - self.let_go) {
                0 => return false,
                bytes => self.let_go += bytes,
            }
        }
        true
    }

    /// Writes what the socket takes of so many bytes.
    fn send(&self, store: &Store, channel: &Channel, bytes_max: usize) -> std::io::Result<usize> {
        let mut parts = [IoPart::Bytes(&[]); IO_PARTS_MAX];
        let (mut count, mut skip, mut left) = (0, self.written, bytes_max);
        let runs = if self.drawn { &[] } else { &self.batch.slots[..] };
        let slots = runs.iter().map(|run| store.arena().slots(*run).map(|slots| slots.readable()));
        let whole =
            std::iter::once(Ok(IoPart::Bytes(&self.head))).chain(slots.map(|slots| slots.map(IoPart::Guest)));
        for (part, whole) in parts.iter_mut().zip(whole) {
            let whole = whole.map_err(std::io::Error::other)?;
            let skipped = skip.min(whole.len());
            skip -= skipped;
            let take = (whole.len() - skipped).min(left);
            left -= take;
            *part = match whole {
                IoPart::Bytes(bytes) => IoPart::Bytes(&bytes[skipped..skipped + take]),
                IoPart::Guest(slots) => IoPart::Guest(slots.skip(skipped).take(take)),
            };
            count += 1;
            if left == 0 {
                break;
            }
        }
        vectored::send(channel, &parts[..count])
    }
}

/// Header and table of a batch: without its bytes where it is read by these keys.
fn head(channel: &Channel, batch: &Batch<'_>, sequence: Sequence, keys: Option<&[KeyEntry]>) -> Vec<u8> {
    let mut head = vec![0; HEADER_BYTES];
    let runs = encode_runs(batch.entries.iter().copied(), &mut head);
    let (kind, bytes) = match keys {
        Some(keys) => {
            encode_table(keys.iter().copied(), &mut head);
            (Kind::CopyAt, 0)
        }
        None => (Kind::Copy, batch.bytes()),
    };
    let header = Header { sequence, count: runs as u16, ..channel.header(kind) }
        .with_body(&head[HEADER_BYTES..], bytes);
    head[..HEADER_BYTES].copy_from_slice(&header.encode());
    head
}

/// A frame about the way is to be written, of which there is one at a time.
fn say(said: &mut (Vec<u8>, usize), channel: &Channel, kind: Kind, body: &[u8]) {
    let header = channel.header(kind).with_body(body, 0);
    *said = ([&header.encode()[..], body].concat(), 0);
}

/// Writes it. Whether all of it was written.
fn send_said((frame, written): &mut (Vec<u8>, usize), channel: &Channel) -> Result<bool> {
    while *written < frame.len() {
        match vectored::send(channel, &[IoPart::Bytes(&frame[*written..])]) {
            Ok(sent) => *written += sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    frame.clear();
    *written = 0;
    Ok(true)
}
