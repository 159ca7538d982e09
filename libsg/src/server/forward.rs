//! The copies that a session makes: what was put here goes on to other members, over connections of the session's
//! own, and its answer waits for them. The session goes on meanwhile; nothing here waits.
//!
//! Whoever gets a copy only stores it. So no two servers ever wait for each other.

mod peer;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::peer::{Batch, Heard, Peer};
use super::limit::{Limit, Turn};
use super::slots::SlotRun;
use super::store::{Store, Target};
use super::transit::Pinned;
use crate::host;
use crate::ids::{MemberIndex, MemberSet};
use crate::page::PAGE_BYTES;
use crate::wire::entry::Entry;
use crate::wire::{HEADER_BYTES, Header, IndexEntry, Kind, Missing};

/// Bytes of copies that wait or are under way, of one session. With more the session takes nothing from its client: a
/// client's largest window, so that it is the client's that counts where all is well.
const WINDOW_BYTES: usize = 4 << 20;

/// A member to which a connection broke is not tried again for so long; what is to go there has no copy there.
const REST: Duration = Duration::from_millis(200);

/// How often time is looked at while something is under way.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What one client's copies are made with.
pub(super) struct Forwards<'s> {
    store: &'s Store,
    limit_out: &'s Limit,
    peers: Vec<Peer<'s>>,
    /// Members that had none of it lately, and until when they are left alone.
    resting: Vec<(MemberIndex, Instant)>,
    waiting: Vec<Waiting>,
    /// Numbers batches.
    next: u64,
    under_way_bytes: usize,
    /// Frames for the client, one behind the other.
    ready: Vec<u8>,
    heard: Vec<Heard>,
}

/// An answer that waits for copies.
struct Waiting {
    number: u64,
    header: Header,
    /// The placements here: so many runs.
    placements: Vec<u8>,
    runs: u16,
    left: MemberSet,
    missing: Missing,
}

/// A batch that lies here.
pub(super) struct Stored<'s> {
    /// Of the request.
    pub header: Header,
    /// The pages, where they lie here.
    pub entries: Vec<IndexEntry>,
    /// The same slots, in their order.
    pub slots: Vec<SlotRun>,
    /// Keeps them as they are.
    pub pinned: Pinned<'s>,
    /// The answer's table, and its runs.
    pub placements: (Vec<u8>, u16),
}

impl<'s> Forwards<'s> {
    pub(super) fn new(store: &'s Store, limit_out: &'s Limit) -> Self {
        Self {
            store,
            limit_out,
            peers: Vec::new(),
            resting: Vec::new(),
            waiting: Vec::new(),
            next: 1,
            under_way_bytes: 0,
            ready: Vec::new(),
            heard: Vec::new(),
        }
    }

    /// Whether anything is under way, or to be told.
    pub(super) fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || !self.ready.is_empty()
    }

    /// Whether so many bytes more fit, to each of so many members.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.under_way_bytes == 0 || self.under_way_bytes + bytes <= WINDOW_BYTES
    }

    /// Sends copies of a batch to these members. Its answer is among [`Self::ready`] when all have it, or will not.
    pub(super) fn copy(&mut self, stored: Stored<'s>, targets: &[Target]) {
        let Stored { header, entries, slots, pinned, placements: (placements, runs) } = stored;
        let number = self.next;
        self.next += 1;
        let left = targets.iter().map(|target| target.index).collect();
        self.waiting.push(Waiting { number, header, placements, runs, left, missing: Missing::NONE });
        let batch = Arc::new(Batch { number, entries, slots, _pinned: pinned });
        for target in targets {
            self.under_way_bytes += batch.bytes();
            if let Err(no) = self.send(&batch, target, &header) {
                self.heard.push(Heard {
                    number,
                    member: target.index,
                    result: Err(no),
                    bytes: batch.bytes(),
                });
            }
        }
        self.take_heard();
    }

    /// Queues a batch at a member.
    fn send(&mut self, batch: &Arc<Batch<'s>>, target: &Target, header: &Header) -> Result<(), No> {
        let now = host::now();
        self.resting.retain(|(_, until)| now < *until);
        if self.resting.iter().any(|(member, _)| *member == target.index) {
            return Err(No::Lost);
        }
        let at = match self.peers.iter().position(|peer| peer.index() == target.index) {
            Some(at) => at,
            None => {
                let (of, turn) = ((header.volume, header.epoch), Turn::new(self.limit_out));
                let peer = Peer::dial(self.store, target, of, (turn, now)).ok_or(No::Lost)?;
                self.peers.push(peer);
                self.peers.len() - 1
            }
        };
        self.peers[at].push(Arc::clone(batch), now);
        Ok(())
    }

    /// Moves bytes and takes answers, without waiting.
    pub(super) fn progress(&mut self) {
        let now = host::now();
        let mut at = 0;
        while at < self.peers.len() {
            let moved = self.peers[at].progress(self.store, now, &mut self.heard);
            match moved {
                Ok(()) => at += 1,
                Err(error) => {
                    let peer = self.peers.swap_remove(at);
                    tracing::warn!(member = %peer.node(), error = error.chain(), "copies cannot be made there");
                    self.resting.push((peer.index(), now + REST));
                    peer.give_up(&mut self.heard);
                }
            }
        }
        self.take_heard();
    }

    fn take_heard(&mut self) {
        for heard in self.heard.drain(..) {
            self.under_way_bytes -= heard.bytes;
            let Some(at) = self.waiting.iter().position(|waiting| waiting.number == heard.number) else {
                continue;
            };
            let waiting = &mut self.waiting[at];
            waiting.left = waiting.left.without(heard.member);
            match heard.result {
                Ok(()) => {}
                Err(No::Full) => waiting.missing.full = waiting.missing.full.with(heard.member),
                Err(No::Lost) => waiting.missing.lost = waiting.missing.lost.with(heard.member),
            }
            if waiting.left.is_empty() {
                let Waiting { header, placements, runs, missing, .. } = self.waiting.swap_remove(at);
                push_answer(&mut self.ready, &header, missing, (&placements, runs));
            }
        }
    }

    /// Frames that are the client's, which are taken with it.
    pub(super) fn take_ready(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.ready)
    }

    /// What to wait for: appended to `on`. Says for how long at most.
    pub(super) fn awaited<'a>(&'a self, on: &mut Vec<(Option<BorrowedFd<'a>>, bool)>) -> Duration {
        for peer in &self.peers {
            on.push(peer.awaited());
        }
        // Held back by the operator's limit, a queue moves with time.
        let limited = self.peers.iter().any(Peer::is_held_back);
        if limited { Duration::from_millis(1) } else { LOOK_EVERY }
    }
}

/// Why a member has no copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum No {
    /// It has no room.
    Full,
    /// It cannot be reached, did not answer, or will not have it.
    Lost,
}

/// Appends the answer to a batch with copies.
pub(super) fn push_answer(
    out: &mut Vec<u8>,
    to: &Header,
    missing: Missing,
    (placements, runs): (&[u8], u16),
) {
    let kind = match to.kind {
        Kind::Spread => Kind::SpreadReply,
        Kind::Settle => Kind::SettleReply,
        _ => Kind::PutCopiesReply,
    };
    let begin = out.len();
    out.resize(begin + HEADER_BYTES + Missing::BYTES, 0);
    missing.encode(&mut out[begin + HEADER_BYTES..]);
    out.extend_from_slice(placements);
    let header = Header { count: runs, ..to.answer(kind) }.with_body(&out[begin + HEADER_BYTES..], 0);
    out[begin..begin + HEADER_BYTES].copy_from_slice(&header.encode());
}

impl Batch<'_> {
    fn bytes(&self) -> usize {
        self.entries.len() * PAGE_BYTES
    }
}
