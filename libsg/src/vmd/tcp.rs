//! The TCP backend: a link is one connection on which any number of requests are outstanding.

mod access;
mod answer;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::link::{Class, Completion, Connector, Link, PathSample, Reply, Request, Ticket};
use crate::content::{ContentHasher, Sharing};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, Placement, Sequence, VolumeId};
use crate::memory::PageSlice;
use crate::page::PAGE_BYTES;
use crate::transport::{
    Channel, Inbox, Outbox, PoolSecret, StateAssembler, TcpPath, dial, push_state, refusal,
};
use crate::wire::access::KeyEntry;
use crate::wire::entry::encode_table;
use crate::wire::handshake::Purpose;
use crate::wire::message::{self, Member, VmdRequest};
use crate::wire::run::encode_runs;
use crate::wire::{DiscardEntry, Header, IndexEntry, Kind, PageEntry, Referral, Status};
pub use access::{AccessReply, AccessRequest, Answered};
use answer::{Answer, Asked, Expected, Outstanding, Tables};

/// Makes TCP links, all with one pool secret.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    secret: PoolSecret,
}

impl TcpConnector {
    /// For a pool with this secret.
    #[must_use]
    pub const fn new(secret: PoolSecret) -> Self {
        Self { secret }
    }

    /// As [`Connector::connect`], for one whose link is a part of another.
    ///
    /// # Errors
    /// As there.
    pub fn link(
        &self,
        address: SocketAddr,
        (volume, epoch): (VolumeId, Epoch),
        class: Class,
        timeout: Duration,
    ) -> Result<TcpLink> {
        let purpose = match class {
            Class::Urgent => Purpose::VmdUrgent,
            Class::Bulk if volume == VolumeId(0) => Purpose::Operator,
            Class::Bulk => Purpose::VmdBulk,
        };
        Ok(TcpLink::new(dial(address, purpose, volume, epoch, &self.secret, timeout)?))
    }
}

impl Connector for TcpConnector {
    fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        self.secret.hasher(sharing)
    }

    fn connect(
        &self,
        address: SocketAddr,
        volume: VolumeId,
        epoch: Epoch,
        class: Class,
        timeout: Duration,
    ) -> Result<Box<dyn Link>> {
        Ok(Box::new(self.link(address, (volume, epoch), class, timeout)?))
    }
}

/// A connection to one intermediary.
#[derive(Debug)]
pub struct TcpLink {
    channel: Channel,
    member: Member,
    inbox: Inbox,
    outbox: Outbox,
    path: TcpPath,
    receive_delay: Option<Duration>,
    /// How fast answers may come.
    answers: Option<NonZeroU32>,
    /// Carries single pages that somebody waits for: what its path is like is not asked.
    urgent: bool,
    outstanding: Outstanding,
    /// Where requests' tables are encoded, used again and again.
    table: Vec<u8>,
    /// Where answers' tables are decoded, used again and again.
    entries: Vec<PageEntry>,
    located: Vec<IndexEntry>,
    stored: Vec<Option<Placement>>,
    referred: Vec<Referral>,
    keys: Vec<KeyEntry>,
    /// Why the link is of no further use, until `progress` has said so.
    failed: Option<Error>,
    /// Whether it was said.
    dead: bool,
}

impl TcpLink {
    /// Over a connection on which nothing but the handshake has happened.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        let member = Member { node: channel.node().clone(), address: channel.peer_address() };
        let urgent = channel.greeting().purpose.is_urgent();
        Self {
            inbox: if urgent { Inbox::patient() } else { Inbox::new() },
            channel,
            member,
            outbox: Outbox::new(),
            path: TcpPath::new(),
            receive_delay: None,
            answers: None,
            urgent,
            outstanding: Outstanding::default(),
            table: Vec::new(),
            entries: Vec::new(),
            located: Vec::new(),
            stored: Vec::new(),
            referred: Vec::new(),
            keys: Vec::new(),
            failed: None,
            dead: false,
        }
    }

    /// The address of this host by which the connection goes, where it goes by one.
    #[must_use]
    pub fn local_address(&self) -> Option<IpAddr> {
        let address = rustix::net::getsockname(&self.channel).ok()?;
        SocketAddr::try_from(address).ok().map(|address| address.ip().to_canonical())
    }

    fn check_alive(&mut self) -> Result<()> {
        match self.failed.take() {
            Some(error) => {
                self.dead = true;
                Err(error)
            }
            None if self.dead => {
                Err(Error::new(ErrorKind::Unreachable, "the link has failed before").at(&self.member.node))
            }
            None => Ok(()),
        }
    }

    fn look_at_path(&mut self) {
        if !self.urgent {
            self.path.refresh(&self.channel, host::now());
        }
    }

    /// Queues a frame whose table is in `self.table`.
    fn push(&mut self, kind: Kind, count: usize, slices: &[PageSlice]) -> Result<()> {
        self.look_at_path();
        let header = Header {
            sequence: Sequence(self.outstanding.next()),
            count: count as u16,
            delay_us: self.path.delay_us(),
            answer_kib_s: self.answers.filter(|_| kind == Kind::Get),
            ..self.channel.header(kind)
        };
        self.outbox.push_frame(header, &self.table, slices.iter().cloned())?;
        Ok(())
    }

    fn push_control(&mut self, request: &VmdRequest) -> Result<()> {
        self.table.clear();
        self.table.extend(message::encode(request)?);
        self.push(Kind::Vmd, 0, &[])
    }

    /// Queues the frames of a request. Returns what its answer must be, and the bytes that it moves there and back.
    fn enqueue(&mut self, request: Request<'_>) -> Result<(Expected, usize)> {
        request.check()?;
        self.table.clear();
        match request {
            Request::Put { entries, slices, copies } => {
                let pages: usize = slices.iter().map(PageSlice::len).sum();
                let (kind, expected) = if copies.is_empty() {
                    (Kind::Put, Expected::Stored(entries.len()))
                } else {
                    encode_table([copies], &mut self.table);
                    (Kind::PutCopies, Expected::Copied(entries.len(), copies))
                };
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(kind, runs, slices)?;
                Ok((expected, self.table.len() + pages))
            }
            Request::Refer(offers) => {
                encode_table(offers.iter().copied(), &mut self.table);
                self.push(Kind::Refer, offers.len(), &[])?;
                Ok((Expected::Referred(offers.len()), self.table.len()))
            }
            Request::Spread { entries, copies } => {
                encode_table([copies], &mut self.table);
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::Spread, runs, &[])?;
                Ok((Expected::Spread(entries.len(), copies), self.table.len()))
            }
            Request::Hint(hints) => {
                encode_table(hints.iter().copied(), &mut self.table);
                self.push(Kind::Hint, hints.len(), &[])?;
                Ok((Expected::Hinted, self.table.len()))
            }
            Request::PutIndex(entries) => {
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::PutIndex, runs, &[])?;
                Ok((Expected::Indexed, self.table.len()))
            }
            Request::Get(entries) | Request::GetKnown { wanted: entries, .. } => {
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::Get, runs, &[])?;
                let mut pages = self.outstanding.page_list();
                pages.extend(entries.iter().map(|entry| entry.page));
                Ok((Expected::Pages(pages), self.table.len() + entries.len() * PAGE_BYTES))
            }
            Request::Locate(range) => {
                encode_table([range], &mut self.table);
                self.push(Kind::Locate, 1, &[])?;
                Ok((Expected::Located(range), self.table.len()))
            }
            Request::Discard { range, below } => {
                encode_table([DiscardEntry { range, below }], &mut self.table);
                self.push(Kind::Discard, 1, &[])?;
                Ok((Expected::Discarded, self.table.len()))
            }
            Request::Drop(entries) => {
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::Drop, runs, &[])?;
                Ok((Expected::Dropped, self.table.len()))
            }
            Request::Control(request) => {
                let expected = Expected::control(request)
                    .ok_or_else(|| Error::new(ErrorKind::Input, "the state blob has requests of its own"))?;
                self.push_control(request)?;
                Ok((expected, self.table.len()))
            }
            Request::PutState(state) => {
                self.push_blob(state, |bytes, checksum| VmdRequest::PutState { bytes, checksum })
            }
            Request::PutPiece(number, piece) => {
                self.push_blob(piece, |bytes, checksum| VmdRequest::PutPiece { number, bytes, checksum })
            }
            Request::GetState => {
                self.push_control(&VmdRequest::GetState)?;
                Ok((Expected::State(StateAssembler::new()), self.table.len()))
            }
            Request::GetPiece(number) => {
                self.push_control(&VmdRequest::GetPiece { number })?;
                Ok((Expected::State(StateAssembler::new()), self.table.len()))
            }
        }
    }

    /// Queues a blob in pieces, and what it is behind them.
    fn push_blob(
        &mut self,
        blob: &[u8],
        what: impl FnOnce(u64, u32) -> VmdRequest,
    ) -> Result<(Expected, usize)> {
        let header =
            Header { sequence: Sequence(self.outstanding.next()), ..self.channel.header(Kind::State) };
        let (bytes, checksum) = push_state(&mut self.outbox, header, blob)?;
        self.push_control(&what(bytes, checksum.0))?;
        Ok((Expected::StateStored, blob.len()))
    }

    /// Looks at frames until one ends a request. `None` when no whole frame is there.
    fn next_answer(&mut self) -> Result<Option<(Ticket, Result<Answer>)>> {
        while let Some(frame) = self.inbox.poll(&self.channel)? {
            let header = frame.header;
            if let Some(delay_us) = header.delay_us {
                self.receive_delay = Some(Duration::from_micros(delay_us.into()));
            }
            if header.kind == Kind::Refused {
                return Err(refusal(header.status));
            }
            let greeting = self.channel.greeting();
            if header.version != greeting.version || header.volume != greeting.volume {
                return Err(Error::new(ErrorKind::Protocol, "an answer about something else than was asked"));
            }
            let sequence = header.sequence.0;
            let asked = self.outstanding.get(sequence).ok_or_else(|| {
                Error::new(ErrorKind::Protocol, "an answer to a request that is not outstanding")
            })?;
            if header.kind == Kind::State {
                asked.expected.take_piece(frame)?;
                continue;
            }
            asked.expected.check_kind(header.kind)?;
            let answer = if header.status == Status::Ok {
                let tables = Tables {
                    entries: &mut self.entries,
                    located: &mut self.located,
                    stored: &mut self.stored,
                    referred: &mut self.referred,
                    keys: &mut self.keys,
                };
                Ok(asked.expected.check(frame, tables)?)
            } else {
                Err(refusal(header.status).at(&self.member.node))
            };
            self.outstanding.finish(sequence);
            return Ok(Some((Ticket(sequence), answer)));
        }
        Ok(None)
    }
}

impl TcpLink {
    fn reply(&self, answer: Answer) -> Reply<'_> {
        match answer {
            Answer::Stored(missing) => Reply::Stored { placements: &self.stored, missing },
            Answer::Referred => Reply::Referred(&self.referred),
            Answer::Indexed => Reply::Indexed,
            Answer::Pages { bytes_at } => {
                Reply::Pages { entries: &self.entries, bytes: &self.inbox.last_body()[bytes_at..] }
            }
            Answer::Located => Reply::Located(&self.located),
            // Whoever asks for memory takes its answers by `answered`, and has them shown.
            Answer::Done | Answer::Attached(_) | Answer::Leased | Answer::Reached { .. } => Reply::Done,
            Answer::Control(reply) => Reply::Control(reply),
            Answer::State(state) => Reply::State(state),
        }
    }
}

impl Link for TcpLink {
    fn member(&self) -> &Member {
        &self.member
    }

    fn submit(&mut self, request: Request<'_>) -> Result<Ticket> {
        self.check_alive()?;
        let (expected, bytes) = self.enqueue(request)?;
        Ok(Ticket(self.outstanding.add(Asked { expected, bytes })))
    }

    fn progress(&mut self, write_bytes_max: usize) -> Result<usize> {
        self.check_alive()?;
        self.look_at_path();
        match self.outbox.flush(&self.channel, write_bytes_max) {
            Ok(written) => Ok(written),
            Err(error) => {
                self.dead = true;
                Err(error.at(&self.member.node))
            }
        }
    }

    fn completion(&mut self) -> Option<Completion<'_>> {
        let (ticket, answered) = self.answered()?;
        Some(Completion { ticket, result: answered.map(|answered| self.reply(answered.0)) })
    }

    fn queued_bytes(&self) -> usize {
        self.outbox.queued_bytes()
    }

    fn outstanding_bytes(&self) -> usize {
        self.outstanding.bytes()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // A failed link is always ready: the caller's next look is told so.
        (self.failed.is_none()).then(|| self.channel.as_fd())
    }

    fn path(&self) -> PathSample {
        let info = self.path.info();
        PathSample {
            delivered_bytes: info.bytes_acked,
            send_delay: info.queue_delay(),
            base_rtt: info.base_rtt().unwrap_or_default(),
            unsent_bytes: info.notsent_bytes.into(),
            receive_delay: self.receive_delay,
            // What lies in the socket has come, too.
            received_bytes: info.bytes_received.max(self.inbox.received_bytes()),
        }
    }

    fn pace(&mut self, bytes_per_s: Option<u64>) -> bool {
        self.path.pace(&self.channel, bytes_per_s).is_ok()
    }

    fn pace_answers(&mut self, bytes_per_s: Option<u64>) {
        self.answers = bytes_per_s.map(Header::kib_s_of);
    }
}
