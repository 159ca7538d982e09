//! A link to a node of this process. Requests wait in a queue as they would on a socket, so that
//! pacing and windows work over it; a request is done when all of its bytes were "written".

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::copies::spread;
use super::{Asker, Nodes, State};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, MemberSet, Placement, Round, VolumeId};
use crate::limits;
use crate::memory::PageSlice;
use crate::page::{PAGE_BYTES, PageRange};
use crate::transport::refusal;
use crate::vmd::link::{Completion, Link, PathSample, Reply, Request, Ticket};
use crate::wire::entry::Entry;
use crate::wire::message::{Member, VmdReply, VmdRequest};
use crate::wire::run::table_bytes;
use crate::wire::{
    GetEntry, HEADER_BYTES, HintEntry, IndexEntry, Missing, PageEntry, ReferEntry, Referral, Status,
};

/// A link to a [`super::MemoryNode`].
#[derive(Debug)]
pub struct MemoryLink {
    member: Member,
    state: Arc<Mutex<State>>,
    /// Those who get copies.
    nodes: Nodes,
    asker: Asker,
    next: u64,
    queue: VecDeque<Queued>,
    queued_bytes: usize,
    done: VecDeque<(Ticket, Result<Answer, Status>, usize)>,
    /// The answer that was given out last.
    current: Answer,
    outstanding_bytes: usize,
    sample: PathSample,
}

#[derive(Debug)]
struct Queued {
    ticket: Ticket,
    request: Owned,
    /// Bytes still to be "written".
    left: usize,
    /// Bytes that count as outstanding.
    bytes: usize,
}

/// A request, with copies of its tables.
#[derive(Debug)]
enum Owned {
    Put(Vec<PageEntry>, Vec<PageSlice>, MemberSet),
    Refer(Vec<ReferEntry>),
    Spread(Vec<IndexEntry>, MemberSet),
    Hint(Vec<HintEntry>),
    PutIndex(Vec<IndexEntry>),
    Get(Vec<GetEntry>),
    Locate(PageRange),
    Discard(PageRange, Round),
    Drop(Vec<GetEntry>),
    Control(VmdRequest),
    PutState(Vec<u8>),
    GetState,
    PutPiece(u32, Vec<u8>),
    GetPiece(u32),
}

#[derive(Debug)]
enum Answer {
    Stored(Vec<Option<Placement>>, Missing),
    Referred(Vec<Referral>),
    Indexed,
    Pages(Vec<PageEntry>, Vec<u8>),
    Located(Vec<IndexEntry>),
    Done,
    Control(VmdReply),
    State(Vec<u8>),
}

impl MemoryLink {
    pub(super) fn new(
        member: Member,
        (state, nodes): (Arc<Mutex<State>>, Nodes),
        volume: VolumeId,
        epoch: Epoch,
    ) -> Self {
        let opened = state.lock().opened();
        Self {
            member,
            state,
            nodes,
            asker: Asker { volume, epoch, opened },
            next: 1,
            queue: VecDeque::new(),
            queued_bytes: 0,
            done: VecDeque::new(),
            current: Answer::Done,
            outstanding_bytes: 0,
            sample: PathSample::default(),
        }
    }

    /// A node that died, or came back as somebody else, is not this link's any more.
    fn check_alive(&self) -> Result<()> {
        let state = self.state.lock();
        if state.alive && state.node == self.member.node {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unreachable, "the intermediary is gone").at(&self.member.node))
    }

    /// Stores a batch here, and then at those who get copies: one lock at a time.
    fn put(&self, entries: &[PageEntry], slices: &[PageSlice], holders: MemberSet) -> Result<Answer, Status> {
        let asker = self.asker;
        let mut bytes = vec![0; slices.iter().map(PageSlice::len).sum()];
        let mut rest = &mut bytes[..];
        for slice in slices {
            let (to, after) = rest.split_at_mut(slice.len());
            slice.copy_to(to);
            rest = after;
        }
        if holders.is_empty() {
            let placements = self.state.lock().put(asker, entries, &bytes)?;
            return Ok(Answer::Stored(placements, Missing::NONE));
        }
        let (placements, targets) = self.state.lock().put_copies(asker, (entries, &bytes), holders)?;
        let pages = entries.iter().zip(&placements).zip(bytes.chunks_exact(PAGE_BYTES));
        let (stored, bytes): (Vec<IndexEntry>, Vec<&[u8]>) = pages
            .filter_map(|((page, at), bytes)| {
                Some((IndexEntry::at(page.page, page.round, (*at)?, page.checksum), bytes))
            })
            .unzip();
        let missing = match stored.is_empty() {
            true => Missing::NONE,
            false => spread(&self.nodes, asker, targets, &stored, &bytes.concat()),
        };
        Ok(Answer::Stored(placements, missing))
    }

    /// Has others store what lies here.
    fn spread(&self, entries: &[IndexEntry], holders: MemberSet) -> Result<Answer, Status> {
        let (placements, targets, bytes) = self.state.lock().keep_first(self.asker, entries, holders)?;
        let here = entries.iter().zip(&placements).filter_map(|(entry, at)| at.map(|_| *entry));
        let here: Vec<IndexEntry> = here.collect();
        let missing = match here.is_empty() {
            true => Missing::NONE,
            false => spread(&self.nodes, self.asker, targets, &here, &bytes),
        };
        Ok(Answer::Stored(placements, missing))
    }

    fn execute(&self, request: Owned) -> Result<Answer, Status> {
        match &request {
            Owned::Put(entries, slices, holders) => return self.put(entries, slices, *holders),
            Owned::Spread(entries, holders) => return self.spread(entries, *holders),
            _ => {}
        }
        let (mut state, asker) = (self.state.lock(), self.asker);
        match request {
            Owned::Put(..) | Owned::Spread(..) => Err(Status::Internal),
            Owned::Refer(offers) => state.refer(asker, &offers).map(Answer::Referred),
            Owned::Hint(hints) => state.hint(asker, &hints).map(|()| Answer::Done),
            Owned::PutIndex(entries) => state.put_index(asker, &entries).map(|()| Answer::Indexed),
            Owned::Get(entries) => {
                state.get(asker, &entries).map(|(pages, bytes)| Answer::Pages(pages, bytes))
            }
            Owned::Locate(range) => state.locate(asker, range).map(Answer::Located),
            Owned::Discard(range, below) => state.discard(asker, range, below).map(|()| Answer::Done),
            Owned::Drop(entries) => state.give_back(asker, &entries).map(|()| Answer::Done),
            Owned::Control(request) => state.control(asker, &request).map(Answer::Control),
            Owned::PutState(bytes) => state.put_state(asker, bytes).map(|()| Answer::Done),
            Owned::GetState => state.get_state(asker).map(Answer::State),
            Owned::PutPiece(number, bytes) => state.put_piece(asker, number, bytes).map(|()| Answer::Done),
            Owned::GetPiece(number) => state.get_piece(asker, number).map(Answer::State),
        }
    }
}

/// The request with copies of its tables, the bytes it would be on a wire, and those that count as
/// outstanding.
fn own(request: Request<'_>) -> Result<(Owned, usize, usize)> {
    request.check()?;
    let mut reply = 0;
    let (owned, bytes) = match request {
        Request::Put { entries, slices, copies } => {
            let pages: usize = slices.iter().map(PageSlice::len).sum();
            (Owned::Put(entries.to_vec(), slices.to_vec(), copies), table_bytes(entries) + pages)
        }
        Request::Refer(offers) => (Owned::Refer(offers.to_vec()), offers.len() * ReferEntry::BYTES),
        Request::Spread { entries, copies } => {
            (Owned::Spread(entries.to_vec(), copies), MemberSet::BYTES + table_bytes(entries))
        }
        Request::Hint(hints) => (Owned::Hint(hints.to_vec()), hints.len() * HintEntry::BYTES),
        Request::PutIndex(entries) => (Owned::PutIndex(entries.to_vec()), table_bytes(entries)),
        Request::Get(entries) | Request::GetKnown { wanted: entries, .. } => {
            reply = entries.len() * PAGE_BYTES;
            (Owned::Get(entries.to_vec()), table_bytes(entries))
        }
        Request::Locate(range) => (Owned::Locate(range), PageRange::BYTES),
        Request::Discard { range, below } => (Owned::Discard(range, below), 16),
        Request::Drop(entries) => (Owned::Drop(entries.to_vec()), table_bytes(entries)),
        Request::Control(request) => (Owned::Control(request.clone()), 0),
        Request::PutState(state) | Request::PutPiece(_, state) if state.len() > limits::STATE_BYTES_MAX => {
            return Err(Error::new(ErrorKind::Input, format!("{} bytes of state are too many", state.len())));
        }
        Request::PutPiece(number, piece) => (Owned::PutPiece(number, piece.to_vec()), piece.len()),
        Request::GetPiece(number) => (Owned::GetPiece(number), 0),
        Request::PutState(state) => (Owned::PutState(state.to_vec()), state.len()),
        Request::GetState => (Owned::GetState, 0),
    };
    Ok((owned, HEADER_BYTES + bytes, bytes + reply))
}

impl Link for MemoryLink {
    fn member(&self) -> &Member {
        &self.member
    }

    fn submit(&mut self, request: Request<'_>) -> Result<Ticket> {
        self.check_alive()?;
        let (request, left, bytes) = own(request)?;
        let ticket = Ticket(self.next);
        self.next += 1;
        self.queued_bytes += left;
        self.outstanding_bytes += bytes;
        self.queue.push_back(Queued { ticket, request, left, bytes });
        Ok(ticket)
    }

    fn progress(&mut self, write_bytes_max: usize) -> Result<usize> {
        self.check_alive()?;
        let mut written = 0;
        while let Some(first) = self.queue.front_mut() {
            let step = first.left.min(write_bytes_max - written);
            first.left -= step;
            written += step;
            if first.left > 0 {
                break;
            }
            let Some(Queued { ticket, request, bytes, .. }) = self.queue.pop_front() else { break };
            let answer = self.execute(request);
            if let Ok(Answer::Pages(_, bytes)) = &answer {
                self.sample.received_bytes += bytes.len() as u64;
            }
            self.done.push_back((ticket, answer, bytes));
        }
        self.queued_bytes -= written;
        self.sample.delivered_bytes += written as u64;
        Ok(written)
    }

    fn completion(&mut self) -> Option<Completion<'_>> {
        let (ticket, answer, bytes) = self.done.pop_front()?;
        self.outstanding_bytes -= bytes;
        let result = match answer {
            Ok(answer) => {
                self.current = answer;
                Ok(match &mut self.current {
                    Answer::Stored(placements, missing) => Reply::Stored { placements, missing: *missing },
                    Answer::Referred(referrals) => Reply::Referred(referrals),
                    Answer::Indexed => Reply::Indexed,
                    Answer::Pages(entries, bytes) => Reply::Pages { entries, bytes },
                    Answer::Located(entries) => Reply::Located(entries),
                    Answer::Done => Reply::Done,
                    Answer::Control(reply) => Reply::Control(reply.clone()),
                    Answer::State(state) => Reply::State(std::mem::take(state)),
                })
            }
            Err(status) => Err(refusal(status).at(&self.member.node)),
        };
        Some(Completion { ticket, result })
    }

    fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    fn outstanding_bytes(&self) -> usize {
        self.outstanding_bytes
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn path(&self) -> PathSample {
        self.sample
    }
}
