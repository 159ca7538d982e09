//! A connection to who takes over: whole batches of pages, several under way, and questions behind them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::plan::Group;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, NodeId, Placement, Sequence, VolumeId};
use crate::memory::vectored::{self, IoPart};
use crate::page::PAGE_BYTES;
use crate::server::limit::{Class, Limit, Turn};
use crate::server::store::{Parcel, Store};
use crate::transport::{Conversation, dial, push_state, refusal, wait_writable};
use crate::wire::handshake::Purpose;
use crate::wire::message::{self, VmdReply, VmdRequest};
use crate::wire::run::{decode_runs, encode_runs};
use crate::wire::{HEADER_BYTES, Header, Kind, Status};

/// How long a member has for the handshake.
const DIAL_TIME: Duration = Duration::from_secs(1);

/// One that takes nothing, or answers nothing, for so long is lost.
pub(in crate::server) const SILENCE_MAX: Duration = Duration::from_secs(5);

/// What became of a batch.
pub(in crate::server) struct Heard {
    pub group: Group,
    /// Which of its pages were sent.
    pub taken: Vec<bool>,
    /// Where they lie; `None` where there was no room.
    pub placed: Option<Vec<Placement>>,
}

struct Asked {
    sequence: Sequence,
    group: Group,
    taken: Vec<bool>,
    pages: usize,
}

/// A connection to who takes over.
pub(in crate::server) struct Line<'s> {
    store: &'s Store,
    turn: Turn<'s>,
    talk: Conversation,
    next: u64,
    /// Sent and not answered, in their order.
    asked: VecDeque<Asked>,
    heard: Vec<Heard>,
}

impl<'s> Line<'s> {
    /// Connects to whoever is there. Waits at most a second.
    pub(in crate::server) fn open(
        (store, limit): (&'s Store, &'s Limit),
        address: std::net::SocketAddr,
        (volume, epoch): (VolumeId, Epoch),
    ) -> Result<Self> {
        let channel = dial(address, Purpose::VmdBulk, volume, epoch, store.secret(), DIAL_TIME)?;
        let talk = Conversation::new(channel);
        Ok(Self { store, turn: Turn::new(limit), talk, next: 1, asked: VecDeque::new(), heard: Vec::new() })
    }

    /// Who is there.
    pub(in crate::server) fn node(&self) -> &NodeId {
        self.talk.channel().node()
    }

    /// Bytes of pages sent and not answered.
    pub(in crate::server) fn under_way(&self) -> usize {
        self.asked.iter().map(|asked| asked.pages * PAGE_BYTES).sum()
    }

    /// What was heard of batches.
    pub(in crate::server) fn take_heard(&mut self) -> Vec<Heard> {
        std::mem::take(&mut self.heard)
    }

    fn sequence(&mut self) -> Sequence {
        self.next += 1;
        Sequence(self.next)
    }

    /// Sends a batch, at what the operator's limit leaves, behind what others read here.
    pub(in crate::server) fn hand(
        &mut self,
        kind: Kind,
        parcel: &Parcel<'_>,
        (group, taken): (Group, Vec<bool>),
    ) -> Result<()> {
        let sequence = self.sequence();
        let mut head = vec![0; HEADER_BYTES];
        let runs = encode_runs(parcel.entries.iter().copied(), &mut head);
        let pages = parcel.entries.len();
        let header = Header { sequence, count: runs as u16, ..self.talk.channel().header(kind) }
            .with_body(&head[HEADER_BYTES..], pages * PAGE_BYTES);
        head[..HEADER_BYTES].copy_from_slice(&header.encode());
        let mut parts = Vec::with_capacity(parcel.slots.len() + 1);
        parts.push(IoPart::Bytes(&head));
        for run in &parcel.slots {
            parts.push(IoPart::Guest(self.store.arena().slots(*run)?.readable()));
        }
        self.write(&mut parts)?;
        self.store.bytes_out.fetch_add((pages * PAGE_BYTES) as u64, Ordering::Relaxed);
        self.store.touch(pages * PAGE_BYTES);
        self.asked.push_back(Asked { sequence, group, taken, pages });
        Ok(())
    }

    fn write(&self, parts: &mut [IoPart<'_>]) -> Result<()> {
        let channel = self.talk.channel();
        let mut left: usize = parts.iter().map(IoPart::len).sum();
        let (mut rest, mut last_sign) = (parts, host::now());
        while left > 0 {
            let allowed = self.turn.wait(Class::HandedOver, left);
            let sent = match vectored::send_some(channel, rest, allowed) {
                Ok(sent) => sent,
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => 0,
                Err(cause) => {
                    self.turn.give_back(allowed);
                    return Err(cause.into());
                }
            };
            self.turn.give_back(allowed - sent);
            left -= sent;
            rest = IoPart::advance(rest, sent);
            if sent > 0 {
                last_sign = host::now();
                continue;
            }
            let patience = SILENCE_MAX.saturating_sub(host::elapsed(last_sign));
            if patience.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, "it takes nothing any more"));
            }
            wait_writable(channel, patience)?;
        }
        Ok(())
    }

    /// Waits until no more than so many bytes are under way.
    pub(in crate::server) fn settle(&mut self, bytes: usize) -> Result<()> {
        while self.under_way() > bytes {
            let deadline = host::now() + SILENCE_MAX;
            let frame = self.talk.recv(deadline)?;
            let (header, body) = (frame.header, frame.body.to_vec());
            if !self.take_batch(&header, &body)? {
                return Err(unasked(header.kind));
            }
        }
        Ok(())
    }

    /// Takes the answer to a batch; `false` for another frame.
    fn take_batch(&mut self, header: &Header, body: &[u8]) -> Result<bool> {
        if header.kind == Kind::Refused {
            return Err(refusal(header.status));
        }
        let Some(asked) = self.asked.pop_front_if(|asked| asked.sequence == header.sequence) else {
            return Ok(false);
        };
        if header.kind != Kind::HandReply {
            return Err(unasked(header.kind));
        }
        let placed = match header.status {
            Status::Ok => {
                let mut placed: Vec<Option<Placement>> = Vec::new();
                decode_runs(body, header.count.into(), &mut placed)?;
                let placed: Vec<Placement> = placed.into_iter().flatten().collect();
                if placed.len() != asked.pages {
                    return Err(Error::new(ErrorKind::Protocol, "it says of other pages where they are"));
                }
                Some(placed)
            }
            Status::Full => None,
            status => return Err(refusal(status)),
        };
        self.heard.push(Heard { group: asked.group, taken: asked.taken, placed });
        Ok(true)
    }

    /// Asks, and waits for the answer; those of batches before it are heard on the way.
    pub(in crate::server) fn ask(
        &mut self,
        kind: Kind,
        (count, body): (usize, &[u8]),
        deadline: Instant,
    ) -> Result<(Header, Vec<u8>)> {
        let sequence = self.sequence();
        let header = Header {
            sequence,
            count: count as u16,
            body_bytes: body.len() as u32,
            ..self.talk.channel().header(kind)
        };
        self.talk.send(header, body, deadline)?;
        loop {
            let frame = self.talk.recv(deadline)?;
            let (header, body) = (frame.header, frame.body.to_vec());
            if header.sequence == sequence && header.kind == answer_to(kind) {
                return Ok((header, body));
            }
            if !self.take_batch(&header, &body)? {
                return Err(unasked(header.kind));
            }
        }
    }

    /// Asks what is answered by its status alone, or by a table.
    ///
    /// # Errors
    /// What the status says.
    pub(in crate::server) fn tell(&mut self, kind: Kind, table: (usize, &[u8])) -> Result<(Header, Vec<u8>)> {
        let answer = self.ask(kind, table, host::now() + SILENCE_MAX)?;
        if answer.0.status == Status::Ok { Ok(answer) } else { Err(refusal(answer.0.status)) }
    }

    /// Asks a rare request.
    ///
    /// # Errors
    /// What the status says.
    pub(in crate::server) fn control(&mut self, request: &VmdRequest) -> Result<VmdReply> {
        let body = message::encode(request)?;
        let (_, answer) = self.tell(Kind::Vmd, (0, &body))?;
        Ok(VmdReply::decode(&answer)?)
    }

    /// Queues the VM's state in front of what is asked next; its length and checksum.
    pub(in crate::server) fn push_state(&mut self, state: &[u8]) -> Result<(u64, u32)> {
        let header = self.talk.channel().header(Kind::State);
        let (_, _, outbox) = self.talk.parts();
        let (bytes, checksum) = push_state(outbox, header, state)?;
        Ok((bytes, checksum.0))
    }
}

/// How a question is answered.
const fn answer_to(kind: Kind) -> Kind {
    match kind {
        Kind::HandIndex => Kind::HandIndexReply,
        Kind::Moved => Kind::MovedReply,
        Kind::Locate => Kind::LocateReply,
        _ => Kind::VmdReply,
    }
}

fn unasked(kind: Kind) -> Error {
    Error::new(ErrorKind::Protocol, format!("a {kind:?} frame that answers nothing"))
}
