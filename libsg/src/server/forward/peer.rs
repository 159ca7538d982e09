//! A connection to another member, for copies: dialled by a thread of its own, moved by the session.

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
use crate::page::PAGE_BYTES;
use crate::server::limit::Turn;
use crate::server::slots::SlotRun;
use crate::server::store::{Store, Target};
use crate::server::transit::Pinned;
use crate::transport::{Channel, Inbox, Waker, dial, refusal};
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

/// A frame that is being sent.
struct Outgoing<'s> {
    head: Vec<u8>,
    batch: Arc<Batch<'s>>,
    written: usize,
}

/// A connection to another member.
pub(super) struct Peer<'s> {
    index: MemberIndex,
    node: NodeId,
    state: State,
    dialler: Option<JoinHandle<()>>,
    waker: Waker,
    inbox: Inbox,
    queue: VecDeque<Outgoing<'s>>,
    /// Sent and not answered: number and bytes, in the order of their sequence numbers.
    asked: VecDeque<(u64, usize)>,
    first: u64,
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
            queue: VecDeque::new(),
            asked: VecDeque::new(),
            first: 1,
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
        self.queue.push_back(Outgoing { head: Vec::new(), batch, written: 0 });
    }

    /// Moves what moves, and takes answers.
    ///
    /// # Errors
    /// The member has none of what is under way.
    pub(super) fn progress(&mut self, store: &Store, now: Instant, heard: &mut Vec<Heard>) -> Result<()> {
        self.open()?;
        self.write(store, now)?;
        self.read(now, heard)?;
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
        while let Some(first) = self.queue.front_mut() {
            if first.head.is_empty() {
                let sequence = Sequence(self.first + self.asked.len() as u64);
                first.head = head(channel, &first.batch, sequence);
            }
            let total = first.head.len() + first.batch.bytes();
            let allowed = self.turn.poll(total - first.written);
            if allowed == 0 {
                self.held_back = true;
                return Ok(());
            }
            let sent = match first.send(store, channel, allowed) {
                Ok(sent) => sent,
                Err(error) => {
                    self.turn.give_back(allowed);
                    return if error.kind() == std::io::ErrorKind::WouldBlock {
                        Ok(())
                    } else {
                        Err(error.into())
                    };
                }
            };
            self.turn.give_back(allowed - sent);
            first.written += sent;
            self.last_sign = now;
            if first.written < total {
                continue;
            }
            store.bytes_out.fetch_add(first.batch.bytes() as u64, Ordering::Relaxed);
            store.touch(first.batch.bytes());
            self.asked.push_back((first.batch.number, first.batch.bytes()));
            self.queue.pop_front();
        }
        Ok(())
    }

    fn read(&mut self, now: Instant, heard: &mut Vec<Heard>) -> Result<()> {
        let State::Open(channel) = &self.state else { return Ok(()) };
        while let Some(frame) = self.inbox.poll(channel)? {
            let Header { kind, status, sequence, volume, .. } = frame.header;
            if kind == Kind::Refused {
                return Err(refusal(status));
            }
            let next = self.asked.front().copied().filter(|_| {
                // It answers in the order in which it was asked.
                kind == Kind::CopyReply && sequence.0 == self.first && volume == channel.greeting().volume
            });
            let Some((number, bytes)) = next else {
                return Err(Error::new(ErrorKind::Protocol, "an answer to no copy that was sent"));
            };
            self.asked.pop_front();
            self.first += 1;
            self.last_sign = now;
            let result = match status {
                Status::Ok => Ok(()),
                Status::Full => Err(No::Full),
                _ => Err(No::Lost),
            };
            heard.push(Heard { number, member: self.index, result, bytes });
        }
        Ok(())
    }

    /// Nothing of what is under way arrives, as far as is known.
    pub(super) fn give_up(self, heard: &mut Vec<Heard>) {
        let queued = self.queue.iter().map(|frame| (frame.batch.number, frame.batch.bytes()));
        for (number, bytes) in self.asked.iter().copied().chain(queued) {
            heard.push(Heard { number, member: self.index, result: Err(No::Lost), bytes });
        }
    }

    /// What to wait for.
    pub(super) fn awaited(&self) -> (Option<BorrowedFd<'_>>, bool) {
        match &self.state {
            State::Dialling(_) => (Some(self.waker.as_fd()), false),
            State::Open(channel) => (Some(channel.as_fd()), !self.queue.is_empty() && !self.held_back),
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

impl Outgoing<'_> {
    /// Writes what the socket takes of so many bytes.
    fn send(&self, store: &Store, channel: &Channel, bytes_max: usize) -> std::io::Result<usize> {
        let mut parts = [IoPart::Bytes(&[]); IO_PARTS_MAX];
        let (mut count, mut skip, mut left) = (0, self.written, bytes_max);
        let slots =
            self.batch.slots.iter().map(|run| store.arena().slots(*run).map(|slots| slots.readable()));
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

/// Header and table of a batch.
fn head(channel: &Channel, batch: &Batch<'_>, sequence: Sequence) -> Vec<u8> {
    let mut head = vec![0; HEADER_BYTES];
    let runs = encode_runs(batch.entries.iter().copied(), &mut head);
    let header = Header { sequence, count: runs as u16, ..channel.header(Kind::Copy) }
        .with_body(&head[HEADER_BYTES..], batch.entries.len() * PAGE_BYTES);
    head[..HEADER_BYTES].copy_from_slice(&header.encode());
    head
}
