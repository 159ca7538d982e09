//! One client's connection: requests in, answers out, one after the other.
//!
//! Page bytes go from the socket straight into their slots, and from the slots straight to the socket. No lock is
//! held meanwhile: the slots are the session's until it says that they are filled, and pinned until they are sent.
//! Whatever ends a session, what it held is freed by the values that hold it.

use std::sync::atomic::Ordering;

mod access;
mod copies;
mod handover;
mod table;

use self::table::{read_table, read_whole};
use super::budget::Budget;
use super::index::Opened;
use super::limit::{Class, Limit};
use super::slots::SlotRun;
use super::store::{Noted, Seated, Store, Target, Writing};
use super::stream::Stream;
use super::transit::{Filling, Pinned};
use super::volumes::{StateBlob, Volumes};
use crate::content::ContentHash;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Checksum, Epoch, Placement, VolumeId};
use crate::limits;
use crate::memory::vectored::IoPart;
use crate::page::{PAGE_BYTES, PageRange};
use crate::transport::{Channel, Frame, StateAssembler, TcpPath};
use crate::wire::access::KeyEntry;
use crate::wire::entry::{self, Entry, decode_table, encode_table};
use crate::wire::handshake::Purpose;
use crate::wire::message::{self, VmdReply, VmdRequest};
use crate::wire::run::{decode_runs, encode_runs};
use crate::wire::{
    DiscardEntry, Encoding, GetEntry, HEADER_BYTES, Header, HintEntry, IndexEntry, Kind, Malformed,
    PageEntry, ReferEntry, Referral, Status,
};

/// A client's connection.
pub(super) struct Session<'c> {
    store: &'c Store,
    channel: &'c Channel,
    opened: Opened,
    stream: Stream<'c>,
    path: TcpPath,
    state: StateParts<'c>,
    buffers: Buffers,
    /// Members that get copies of the batch at hand.
    targets: Vec<Target>,
    /// The client writes its volume.
    writing: Option<Writing>,
    /// The client reaches memory by itself.
    seat: Option<Seated<'c>>,
    statistics: &'c (dyn Fn() -> VmdReply + 'c),
}

/// Kept from request to request, so that a batch allocates nothing that grows with its pages.
#[derive(Default)]
struct Buffers {
    body: Vec<u8>,
    answer: Vec<u8>,
    pages: Vec<PageEntry>,
    wanted: Vec<GetEntry>,
    index: Vec<IndexEntry>,
    ranges: Vec<PageRange>,
    placements: Vec<Option<Placement>>,
    offers: Vec<ReferEntry>,
    referrals: Vec<Referral>,
    hints: Vec<HintEntry>,
    hashes: Vec<ContentHash>,
    runs: Vec<SlotRun>,
    keys: Vec<KeyEntry>,
}

/// The pieces of a VM's state that came, and the budget they took.
struct StateParts<'c> {
    budget: &'c Budget,
    assembler: StateAssembler,
    taken: u64,
    refused: bool,
}

impl Drop for StateParts<'_> {
    fn drop(&mut self) {
        self.budget.give(self.taken);
    }
}

impl<'c> Session<'c> {
    pub(super) fn new(
        store: &'c Store,
        channel: &'c Channel,
        limits: (&'c Limit, &'c Limit),
        statistics: &'c (dyn Fn() -> VmdReply + 'c),
    ) -> Self {
        let state =
            StateParts { budget: store.budget(), assembler: StateAssembler::new(), taken: 0, refused: false };
        let stream = Stream::new(store, channel, limits);
        let path = TcpPath::new();
        let (buffers, targets) = (Buffers::default(), Vec::new());
        let (opened, writing, seat) = (store.opened(), None, None);
        Self { store, channel, opened, stream, path, state, buffers, targets, writing, seat, statistics }
    }

    /// Serves the client until it closes the connection.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for bytes that no honest client sends, after which the client is told so and
    /// the connection is of no further use; [`ErrorKind::Unreachable`] when it broke.
    pub(super) fn serve(&mut self) -> Result<()> {
        let served = self.serve_all();
        if let Err(error) = &served
            && error.kind == ErrorKind::Protocol
        {
            let header = Header { status: Status::Malformed, ..Header::new(Kind::Refused) };
            // Whoever sends nonsense may be gone already.
            let _ = self.stream.write(Class::Urgent, &mut [IoPart::Bytes(&header.encode())], &|| false);
        }
        served
    }

    fn serve_all(&mut self) -> Result<()> {
        let purpose = self.channel.greeting().purpose;
        if !matches!(purpose, Purpose::VmdBulk | Purpose::VmdUrgent | Purpose::Operator) {
            return Err(Error::new(ErrorKind::Protocol, "a migration's connection came to an intermediary"));
        }
        let mut bytes = [0; HEADER_BYTES];
        while self.stream.read(&mut bytes)? {
            let header = Header::decode(&bytes)?;
            self.check(&header)?;
            self.stream.move_copies()?;
            self.note_writer(&header);
            match header.kind {
                Kind::Put => self.put(&header)?,
                Kind::PutCopies => self.put_copies(&header)?,
                Kind::Copy => self.take_copies(&header)?,
                Kind::Draw => self.draw(&header)?,
                Kind::DrawFrom => self.draw_from(&header)?,
                Kind::CopyAt => self.draw_copies(&header)?,
                Kind::Spread => self.spread(&header)?,
                Kind::HandPages | Kind::HandCopies => self.take_pages(&header)?,
                Kind::HandIndex => self.take_index(&header)?,
                Kind::Moved => self.moved(&header)?,
                Kind::Get => self.get(&header)?,
                Kind::Refer => self.refer(&header)?,
                Kind::Hint => self.hint(&header)?,
                Kind::PutIndex => self.put_index(&header)?,
                Kind::Locate => self.locate(&header)?,
                Kind::Discard => self.discard(&header)?,
                Kind::Drop => self.drop_slots(&header)?,
                Kind::Attach | Kind::Lease | Kind::Settle | Kind::Reach | Kind::Release => {
                    self.access(&header)?;
                }
                Kind::Vmd => self.vmd(&header)?,
                Kind::State => self.take_state(&header)?,
                Kind::Ping => self.reply(&header, Kind::Pong, Status::Ok, 0, &[])?,
                other => return Err(unexpected(other)),
            }
        }
        Ok(())
    }

    /// A client speaks of the volume, under the epoch and in the version that its handshake named.
    fn check(&self, header: &Header) -> Result<()> {
        let greeting = self.channel.greeting();
        let same = header.volume == greeting.volume && header.epoch == greeting.epoch;
        if header.version != greeting.version || (!same && greeting.purpose != Purpose::Operator) {
            return Err(Error::new(
                ErrorKind::Protocol,
                "a frame about another volume, epoch or version than the connection's",
            ));
        }
        Ok(())
    }

    /// Whoever puts something writes the volume, for as long as the connection lasts.
    fn note_writer(&mut self, header: &Header) {
        use Kind as K;
        let writes = matches!(
            header.kind,
            K::Put | K::PutCopies | K::Lease | K::Settle | K::Spread | K::PutIndex | K::Refer
        );
        if writes && self.writing.is_none() {
            self.writing = self.store.writing(header.volume);
        }
    }

    /// Reads the whole body, of a kind that has no pages.
    fn read_body(&mut self, header: &Header) -> Result<()> {
        self.buffers.body.resize(header.body_bytes as usize, 0);
        read_whole(&mut self.stream, &mut self.buffers.body)?;
        Ok(header.check_body(&self.buffers.body)?)
    }

    fn put(&mut self, header: &Header) -> Result<()> {
        let Self { stream, buffers, .. } = self;
        let page_bytes = read_table(stream, (header, 0), &mut buffers.body, &mut buffers.pages)?;
        let put = |entry: &PageEntry| matches!(entry.encoding, Encoding::Raw | Encoding::Zero);
        if !buffers.pages.iter().all(put) {
            return Err(Malformed::Bounds("encoding of a page that is put").into());
        }
        if entry::page_bytes(&buffers.pages) != page_bytes {
            return Err(Malformed::Bounds("bytes of a batch").into());
        }
        match self.store_pages(header, page_bytes, Noted::No)? {
            Ok(_) => {
                self.buffers.answer.clear();
                let runs = encode_runs(self.buffers.placements.iter().copied(), &mut self.buffers.answer);
                let answer = std::mem::take(&mut self.buffers.answer);
                let replied = self.reply(header, Kind::PutReply, Status::Ok, runs as u16, &answer);
                self.buffers.answer = answer;
                replied
            }
            Err(status) => self.reply(header, Kind::PutReply, status, 0, &[]),
        }
    }

    /// Receives the pages of the batch whose table is in the buffers, into slots of their own.
    fn store_pages(
        &mut self,
        header: &Header,
        page_bytes: usize,
        noted: Noted<'_>,
    ) -> Result<Result<Option<Pinned<'c>>, Status>> {
        let Self { store, stream, buffers, .. } = self;
        let pages = &buffers.pages;
        let runs = std::mem::take(&mut buffers.runs);
        store.touch(page_bytes);
        let filling = match store.fill(header.volume, (header.epoch, noted.access()), pages, runs) {
            Ok(filling) => filling,
            Err(status) => {
                stream.skip(page_bytes)?;
                return Ok(Err(status));
            }
        };
        if filling.slots() == pages.len() {
            for run in filling.runs() {
                stream.read_slots(store.arena().slots(*run)?)?;
            }
        } else {
            let mut free = filling.runs().iter().flat_map(|run| run.iter());
            for entry in pages {
                let slot = if entry.encoding == Encoding::Raw { free.next() } else { None };
                match slot {
                    Some(first) => stream.read_slots(store.arena().slots(SlotRun { first, slots: 1 })?)?,
                    None => stream.skip(usize::from(entry.encoded_bytes))?,
                }
            }
        }
        self.finish_filling(filling, header.epoch, noted)
    }

    /// The slots have their bytes: the pages in the buffers are stored.
    fn finish_filling(
        &mut self,
        filling: Filling<'c>,
        epoch: Epoch,
        noted: Noted<'_>,
    ) -> Result<Result<Option<Pinned<'c>>, Status>> {
        let Self { store, buffers, .. } = self;
        store.bytes_in.fetch_add((filling.slots() * PAGE_BYTES) as u64, Ordering::Relaxed);
        let pages = (&buffers.pages[..], noted);
        match filling.finish(epoch, pages, &mut buffers.hashes, &mut buffers.placements) {
            Ok((runs, pinned)) => {
                buffers.runs = runs;
                Ok(Ok(pinned))
            }
            Err(status) => Ok(Err(status)),
        }
    }

    fn refer(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let Self { store, buffers, .. } = self;
        decode_table(&buffers.body, header.count.into(), &mut buffers.offers)?;
        match store.refer((header.volume, header.epoch), &buffers.offers, &mut buffers.referrals) {
            Ok(()) => {
                let mut answer = std::mem::take(&mut buffers.answer);
                answer.clear();
                encode_table(buffers.referrals.iter().copied(), &mut answer);
                let replied = self.reply(header, Kind::ReferReply, Status::Ok, header.count, &answer);
                self.buffers.answer = answer;
                replied
            }
            Err(status) => self.reply(header, Kind::ReferReply, status, 0, &[]),
        }
    }

    fn hint(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        decode_table(&self.buffers.body, header.count.into(), &mut self.buffers.hints)?;
        let status = done(self.store.hint((header.volume, header.epoch), &self.buffers.hints));
        self.reply(header, Kind::HintReply, status, 0, &[])
    }

    fn get(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let Self { store, channel, stream, path, buffers, .. } = self;
        store.reads.fetch_add(1, Ordering::Relaxed);
        path.refresh(*channel, host::now());
        // Where the kernel does not keep a pace, the answer comes in a burst.
        let _ = path.pace(*channel, header.answer_bytes_per_s());
        decode_runs(&buffers.body, header.count.into(), &mut buffers.wanted)?;
        let of = (header.volume, header.epoch);
        let pinned = match store.pin(of, &buffers.wanted, &mut buffers.pages, &mut buffers.runs) {
            Ok(pinned) => pinned,
            Err(status) => return self.reply(header, Kind::GetReply, status, 0, &[]),
        };
        let page_bytes = entry::page_bytes(&buffers.pages);
        buffers.answer.clear();
        buffers.answer.resize(HEADER_BYTES, 0);
        let runs = encode_runs(buffers.pages.iter().copied(), &mut buffers.answer);
        let answer =
            Header { count: runs as u16, delay_us: path.delay_us(), ..header.answer(Kind::GetReply) }
                .with_body(&buffers.answer[HEADER_BYTES..], page_bytes);
        buffers.answer[..HEADER_BYTES].copy_from_slice(&answer.encode());
        let mut parts = Vec::with_capacity(buffers.runs.len() + 1);
        parts.push(IoPart::Bytes(&buffers.answer));
        for run in &buffers.runs {
            parts.push(IoPart::Guest(store.arena().slots(*run)?.readable()));
        }
        let class = match channel.greeting().purpose {
            Purpose::VmdUrgent => Class::Urgent,
            _ => Class::Bulk,
        };
        stream.write(class, &mut parts, &|| !pinned.in_the_way())?;
        store.bytes_out.fetch_add(page_bytes as u64, Ordering::Relaxed);
        store.touch(page_bytes);
        Ok(())
    }

    fn put_index(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        decode_runs(&self.buffers.body, header.count.into(), &mut self.buffers.index)?;
        let of = (header.volume, header.epoch, self.opened);
        let status = done(self.store.put_index(of, &self.buffers.index));
        self.reply(header, Kind::PutIndexReply, status, 0, &[])
    }

    fn locate(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let Self { store, buffers, .. } = self;
        decode_table(&buffers.body, header.count.into(), &mut buffers.ranges)?;
        let Header { volume, epoch, .. } = *header;
        let (most, index) = (limits::INDEX_ENTRIES_MAX, &mut buffers.index);
        match store.locate(volume, epoch, &buffers.ranges, most, index) {
            Ok(()) => {
                buffers.answer.clear();
                let runs = encode_runs(buffers.index.iter().copied(), &mut buffers.answer);
                let answer = std::mem::take(&mut buffers.answer);
                let replied = self.reply(header, Kind::LocateReply, Status::Ok, runs as u16, &answer);
                self.buffers.answer = answer;
                replied
            }
            Err(status) => self.reply(header, Kind::LocateReply, status, 0, &[]),
        }
    }

    fn discard(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let DiscardEntry { range, below } = DiscardEntry::decode(&self.buffers.body)?;
        let status = done(self.store.discard(header.volume, header.epoch, range, below));
        self.reply(header, Kind::DiscardReply, status, 0, &[])
    }

    fn drop_slots(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        decode_runs(&self.buffers.body, header.count.into(), &mut self.buffers.wanted)?;
        let status = done(self.store.drop_slots(header.volume, header.epoch, &self.buffers.wanted));
        self.reply(header, Kind::DropReply, status, 0, &[])
    }

    fn vmd(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let (volume, epoch) = (header.volume, header.epoch);
        let answer = match VmdRequest::decode(&self.buffers.body)? {
            VmdRequest::GetState => return self.send_blob(header, self.store.state(volume)),
            VmdRequest::GetPiece { number } => {
                return self.send_blob(header, self.store.piece(volume, number));
            }
            VmdRequest::Describe => self.store.describe(volume).map(Box::new).map(VmdReply::Volume),
            VmdRequest::Statistics => Ok((self.statistics)()),
            VmdRequest::ClaimParked(claim) => self.store.claim_parked(volume, &claim).map(VmdReply::Verdict),
            request => self.change(request, volume, epoch).map(|()| VmdReply::Done),
        };
        let (status, reply) = match answer {
            Ok(reply) => (Status::Ok, reply),
            Err(status) => (status, VmdReply::Done),
        };
        self.reply_vmd(header, status, &reply)
    }

    fn change(&mut self, request: VmdRequest, volume: VolumeId, epoch: Epoch) -> Result<(), Status> {
        match request {
            VmdRequest::Create { manifest, members } => self.store.create(volume, epoch, manifest, members),
            VmdRequest::Members(members) => self.store.set_members(volume, epoch, members),
            VmdRequest::PutState { bytes, checksum } => {
                self.keep_blob((bytes, checksum), |store, blob| store.put_state(volume, epoch, blob))
            }
            VmdRequest::PutPiece { number, bytes, checksum } => self
                .keep_blob((bytes, checksum), |store, blob| store.put_piece(volume, epoch, (number, blob))),
            VmdRequest::Commit => self.store.commit(volume, epoch),
            VmdRequest::Copies(copies) => self.store.set_copies(volume, epoch, copies),
            VmdRequest::Fence => self.store.fence((volume, epoch, self.opened)),
            VmdRequest::Seal => self.store.seal(volume, epoch),
            VmdRequest::Claim { epoch } => self.store.hand_over(volume, epoch, Volumes::claim),
            VmdRequest::Succeed { epoch } => self.store.hand_over(volume, epoch, Volumes::succeed),
            VmdRequest::Inherit(said) => self.inherit(volume, epoch, &said),
            VmdRequest::InheritPiece { number, bytes, checksum } => {
                self.keep_blob((bytes, checksum), |store, blob| store.inherit_piece(volume, (number, blob)))
            }
            VmdRequest::Dissolve => self.store.dissolve(volume, epoch),
            VmdRequest::Park(parking) => self.store.park(volume, epoch, parking),
            VmdRequest::Run => self.store.run(volume, epoch),
            VmdRequest::Describe
            | VmdRequest::GetState
            | VmdRequest::GetPiece { .. }
            | VmdRequest::Statistics
            | VmdRequest::ClaimParked(_) => Ok(()),
        }
    }

    /// A piece of the VM's state. What does not fit the budget is dropped, and refused at the end.
    fn take_state(&mut self, header: &Header) -> Result<()> {
        let bytes = u64::from(header.body_bytes);
        if self.state.refused || !self.state.budget.take(bytes) {
            self.state.refused = true;
            return self.stream.skip(header.body_bytes as usize);
        }
        self.state.taken += bytes;
        self.read_body(header)?;
        self.state.assembler.push(Frame { header: *header, body: &self.buffers.body })
    }

    /// What the pieces that came make up is kept.
    fn keep_blob(
        &mut self,
        (bytes, checksum): (u64, u32),
        keep: impl FnOnce(&Store, StateBlob) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let fresh = StateParts {
            budget: self.state.budget,
            assembler: StateAssembler::new(),
            taken: 0,
            refused: false,
        };
        let mut parts = std::mem::replace(&mut self.state, fresh);
        if parts.refused {
            return Err(Status::Full);
        }
        let whole = parts.assembler.finish(bytes, Checksum(checksum)).map_err(|_| Status::Malformed)?;
        let blob = StateBlob { bytes: whole.into(), checksum: Checksum(checksum) };
        keep(self.store, blob)?;
        // The bytes are the volume's from now on.
        parts.taken = 0;
        Ok(())
    }

    fn send_blob(&mut self, header: &Header, blob: Result<StateBlob, Status>) -> Result<()> {
        let blob = match blob {
            Ok(blob) => blob,
            Err(status) => return self.reply_vmd(header, status, &VmdReply::Done),
        };
        let pieces = blob.bytes.len().div_ceil(limits::CONTROL_BYTES_MAX).max(1);
        for piece in 0..pieces {
            let at = piece * limits::CONTROL_BYTES_MAX;
            let bytes = &blob.bytes[at..blob.bytes.len().min(at + limits::CONTROL_BYTES_MAX)];
            let piece = Header { count: u16::from(piece + 1 == pieces), ..header.answer(Kind::State) };
            self.send(&piece.with_body(&[], bytes.len()), bytes)?;
        }
        let end = VmdReply::State { bytes: blob.bytes.len() as u64, checksum: blob.checksum.0 };
        self.reply_vmd(header, Status::Ok, &end)
    }

    fn reply_vmd(&mut self, header: &Header, status: Status, reply: &VmdReply) -> Result<()> {
        let body = message::encode(reply)?;
        self.reply(header, Kind::VmdReply, status, 0, &body)
    }

    fn reply(&mut self, to: &Header, kind: Kind, status: Status, count: u16, body: &[u8]) -> Result<()> {
        self.send(&Header { status, count, ..to.answer(kind) }.with_body(body, 0), body)
    }

    fn send(&mut self, header: &Header, body: &[u8]) -> Result<()> {
        let bytes = header.encode();
        self.stream.write(Class::Urgent, &mut [IoPart::Bytes(&bytes), IoPart::Bytes(body)], &|| true)
    }
}

fn unexpected(kind: Kind) -> Error {
    Error::new(ErrorKind::Protocol, format!("a {kind:?} frame where none belongs"))
}

fn done(result: Result<(), Status>) -> Status {
    result.err().unwrap_or(Status::Ok)
}
