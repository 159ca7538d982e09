//! Batches with copies: what a client wants to lie at several members, and what another member sends on.

use super::Session;
use super::table::read_table;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "simulation")]
use crate::host;
use crate::ids::MemberSet;
use crate::memory::vectored::IoPart;
use crate::server::forward::{Stored, push_answer};
use crate::server::limit::Class;
use crate::server::slots::SlotRun;
use crate::server::store::Noted;
use crate::server::transit::Pinned;
use crate::wire::access::{Endpoint, decode_granted};
use crate::wire::copies::copied_bytes;
use crate::wire::entry::{self, Entry};
use crate::wire::handshake::Purpose;
use crate::wire::run::{decode_runs, encode_runs};
use crate::wire::{Encoding, Header, IndexEntry, Kind, Malformed, Missing, PageEntry, Status};

impl<'c> Session<'c> {
    /// Stores a batch here, and sends it on to the other members that the client names. The answer follows when
    /// they have it; the session goes on.
    pub(super) fn put_copies(&mut self, header: &Header) -> Result<()> {
        let Self { store, stream, buffers, targets, .. } = self;
        let before = (header, MemberSet::BYTES);
        let page_bytes = read_table(stream, before, &mut buffers.body, &mut buffers.pages)?;
        let holders = MemberSet::decode(&buffers.body[..MemberSet::BYTES])?;
        if !buffers.pages.iter().all(|entry| entry.encoding == Encoding::Raw) {
            return Err(Malformed::Bounds("encoding of a page that is put").into());
        }
        if entry::page_bytes(&buffers.pages) != page_bytes {
            return Err(Malformed::Bounds("bytes of a batch").into());
        }
        if let Err(status) = store.targets((header.volume, header.epoch), holders, targets) {
            store.touch(page_bytes);
            stream.skip(page_bytes)?;
            return self.reply(header, Kind::PutCopiesReply, status, 0, &[]);
        }
        // A window that is full holds back what the client sends next.
        stream.make_room(page_bytes * targets.len())?;
        let pinned = match self.store_pages(header, page_bytes, Noted::First)? {
            Ok(pinned) => pinned,
            Err(status) => return self.reply(header, Kind::PutCopiesReply, status, 0, &[]),
        };
        let entries = self.stored_entries();
        self.send_on(header, entries, pinned)
    }

    /// The pages of the batch at hand that were stored, where they are.
    pub(super) fn stored_entries(&self) -> Vec<IndexEntry> {
        let stored = self.buffers.pages.iter().zip(&self.buffers.placements);
        let stored = stored
            .filter_map(|(page, at)| Some(IndexEntry::at(page.page, page.round, (*at)?, page.checksum)));
        stored.collect()
    }

    /// Sends pages that were stored here by reference on to the other members that the client names.
    pub(super) fn spread(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let Self { store, stream, buffers, targets, .. } = self;
        let (holders, table) = buffers.body.split_at_checked(MemberSet::BYTES).ok_or(Malformed::Truncated)?;
        let holders = MemberSet::decode(holders)?;
        decode_runs(table, header.count.into(), &mut buffers.index)?;
        let page_bytes = copied_bytes(&buffers.index)?;
        let of = (header.volume, header.epoch);
        if let Err(status) = store.targets(of, holders, targets) {
            return self.reply(header, Kind::SpreadReply, status, 0, &[]);
        }
        stream.make_room(page_bytes * targets.len())?;
        let pinned = match store.keep_first(of, &buffers.index, &mut buffers.placements) {
            Ok(pinned) => pinned,
            Err(status) => return self.reply(header, Kind::SpreadReply, status, 0, &[]),
        };
        let here = self.buffers.index.iter().zip(&self.buffers.placements);
        let entries = here.filter_map(|(entry, at)| at.map(|_| *entry)).collect();
        self.send_on(header, entries, Some(pinned))
    }

    /// Sends pages that lie here, as the placements in the buffers say, to the members at hand, and answers the client
    /// when they have them.
    pub(super) fn send_on(
        &mut self,
        header: &Header,
        entries: Vec<IndexEntry>,
        pinned: Option<Pinned<'c>>,
    ) -> Result<()> {
        let Self { stream, buffers, targets, .. } = self;
        let mut table = Vec::new();
        let runs = encode_runs(buffers.placements.iter().copied(), &mut table) as u16;
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::CopyNotAwaited) {
            let mut answer = Vec::new();
            push_answer(&mut answer, header, Missing::NONE, (&table, runs));
            return stream.write(Class::Urgent, &mut [IoPart::Bytes(&answer)], &|| true);
        }
        match pinned.filter(|_| !entries.is_empty() && !targets.is_empty()) {
            Some(pinned) => {
                let (slots, placements) = (runs_of(&entries), (table, runs));
                stream
                    .forwards()
                    .copy(Stored { header: *header, entries, slots, pinned, placements }, targets);
                stream.move_copies()
            }
            None => {
                let mut answer = Vec::new();
                push_answer(&mut answer, header, Missing::NONE, (&table, runs));
                stream.write(Class::Urgent, &mut [IoPart::Bytes(&answer)], &|| true)
            }
        }
    }

    /// Stores copies that another member sends: all of a batch, or none. Checksums are not compared: pages that a guest
    /// writes while they are sent do not match theirs, and are sent again.
    pub(super) fn take_copies(&mut self, header: &Header) -> Result<()> {
        // Answered in turn.
        self.stream.finish_draws()?;
        let status = self.take_batch(header, |of| Noted::CopiesOf(of))?;
        self.reply(header, Kind::CopyReply, status, 0, &[])
    }

    /// Another intermediary has copies that can be read where they lie.
    pub(super) fn draw(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        self.check_draws()?;
        match self.stream.draws().begin(header) {
            Ok(end) => self.reply(header, Kind::DrawReply, Status::Ok, 0, end.as_bytes()),
            Err(status) => self.reply(header, Kind::DrawReply, status, 0, &[]),
        }
    }

    pub(super) fn draw_from(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        self.check_draws()?;
        let peer = Endpoint::decode(&self.buffers.body)?;
        self.stream.draws().connect(header, &peer);
        self.stream.move_copies()
    }

    /// Reads copies that another member has.
    pub(super) fn draw_copies(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let Self { stream, buffers, .. } = self;
        let mut of = stream.draws().list();
        decode_granted(&buffers.body, header.count.into(), &mut of, &mut buffers.keys)?;
        let bytes = copied_bytes(&of)?;
        stream.make_room_to_draw(of.len())?;
        // Whoever may read does so at once: the operator's limit is kept by beginning later.
        stream.take_turn_in(bytes);
        stream.draws().take(header, of, &buffers.keys)?;
        stream.move_copies()
    }

    /// An operator, or whoever faults, copies nothing.
    fn check_draws(&self) -> Result<()> {
        if self.channel.greeting().purpose == Purpose::VmdBulk {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Protocol, "copies come over a connection for bulk"))
    }

    /// Stores a batch that another intermediary sends, noted as said, of the pages that its table names: all of it, or none.
    pub(super) fn take_batch(
        &mut self,
        header: &Header,
        noted: fn(&[IndexEntry]) -> Noted<'_>,
    ) -> Result<Status> {
        let Self { stream, buffers, .. } = self;
        let mut of = std::mem::take(&mut buffers.index);
        let page_bytes = read_table(stream, (header, 0), &mut buffers.body, &mut of)?;
        if copied_bytes(&of)? != page_bytes {
            return Err(Malformed::Bounds("bytes of a batch").into());
        }
        buffers.pages.clear();
        buffers.pages.extend(of.iter().map(|entry| PageEntry::raw(entry.page, entry.round, entry.checksum)));
        let status = match self.store_pages(header, page_bytes, noted(&of))? {
            Ok(_) => self.store.all_or_none(header.volume, &of, &self.buffers.placements),
            Err(status) => status,
        };
        self.buffers.index = of;
        Ok(status)
    }
}

/// The slots that these pages lie in, in their order, as runs that stay in their chunks.
fn runs_of(entries: &[IndexEntry]) -> Vec<SlotRun> {
    let mut runs = Vec::new();
    for slot in entries.iter().filter_map(|entry| Some(entry.placement?.slot)) {
        SlotRun::append(slot, &mut runs);
    }
    runs
}
