//! Pages that the client moves itself: what it asks for that, and what it says that it did.

use std::sync::atomic::Ordering;

use super::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::page::PAGE_BYTES;
use crate::server::limit::Class;
use crate::server::store::Noted;
use crate::wire::access::{Endpoint, Settled, decode_settle};
use crate::wire::entry::{decode_table, encode_table, page_bytes};
use crate::wire::handshake::Purpose;
use crate::wire::run::{decode_runs, encode_runs};
use crate::wire::{Header, Kind, Malformed, Status};

impl Session<'_> {
    pub(super) fn access(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        match header.kind {
            Kind::Attach => self.attach(header),
            Kind::Lease => self.lease(header),
            Kind::Settle => self.settle(header),
            Kind::Reach => self.reach(header),
            _ => self.release(header),
        }
    }

    fn attach(&mut self, header: &Header) -> Result<()> {
        if self.channel.greeting().purpose == Purpose::Operator {
            return Err(Error::new(ErrorKind::Protocol, "an operator's connection reaches no pages"));
        }
        let peer = Endpoint::decode(&self.buffers.body)?;
        // Said again, what it had before is gone first.
        self.seat = None;
        match self.store.attach((header.volume, header.epoch), &peer) {
            Ok((seat, endpoint)) => {
                self.seat = Some(seat);
                self.reply(header, Kind::AttachReply, Status::Ok, 0, endpoint.as_bytes())
            }
            Err(status) => self.reply(header, Kind::AttachReply, status, 0, &[]),
        }
    }

    fn lease(&mut self, header: &Header) -> Result<()> {
        let pages = usize::from(header.count);
        if pages == 0 || pages > limits::BATCH_PAGES_MAX {
            return Err(Malformed::Bounds("pages of a lease").into());
        }
        let Self { store, stream, seat, buffers, .. } = self;
        let seat = seat.as_ref().ok_or_else(not_attached)?;
        let (placements, keys) = (&mut buffers.placements, &mut buffers.keys);
        if let Err(status) = store.lease(seat, (header.sequence.0, pages), placements, keys) {
            return self.reply(header, Kind::LeaseReply, status, 0, &[]);
        }
        // Whoever may write does so at once: the operator's limit is kept by letting it later.
        stream.take_turn_in(placements.iter().flatten().count() * PAGE_BYTES);
        let mut answer = std::mem::take(&mut buffers.answer);
        answer.clear();
        let runs = encode_runs(placements.iter().copied(), &mut answer);
        encode_table(keys.iter().copied(), &mut answer);
        let replied = self.reply(header, Kind::LeaseReply, Status::Ok, runs as u16, &answer);
        self.buffers.answer = answer;
        replied
    }

    /// The slots of a lease hold these pages: from here on it is as if they had been put.
    fn settle(&mut self, header: &Header) -> Result<()> {
        let Self { store, stream, seat, buffers, targets, .. } = self;
        let Settled { lease, copies } =
            decode_settle(&buffers.body, header.count.into(), &mut buffers.pages)?;
        let seat = seat.as_ref().ok_or_else(not_attached)?;
        targets.clear();
        if !copies.is_empty() {
            if let Err(status) = store.targets((header.volume, header.epoch), copies, targets) {
                return self.reply(header, Kind::SettleReply, status, 0, &[]);
            }
            stream.make_room(page_bytes(&buffers.pages) * targets.len())?;
        }
        let filling = match store.settle(seat, (lease, &buffers.pages)) {
            Ok(filling) => filling.ok_or(Malformed::Bounds("number of a lease"))?,
            Err(status) => return self.reply(header, Kind::SettleReply, status, 0, &[]),
        };
        if filling.slots() != buffers.pages.len() {
            return Err(Malformed::Bounds("pages of a lease").into());
        }
        let noted = if copies.is_empty() { Noted::No } else { Noted::First };
        let pinned = match self.finish_filling(filling, header.epoch, noted)? {
            Ok(pinned) => pinned,
            Err(status) => return self.reply(header, Kind::SettleReply, status, 0, &[]),
        };
        if let Some(seat) = &self.seat {
            self.store.close_full(seat, &self.buffers.runs);
        }
        let entries = if copies.is_empty() { Vec::new() } else { self.stored_entries() };
        self.send_on(header, entries, pinned)
    }

    fn reach(&mut self, header: &Header) -> Result<()> {
        let Self { store, stream, seat, buffers, channel, .. } = self;
        decode_runs(&buffers.body, header.count.into(), &mut buffers.wanted)?;
        let seat = seat.as_ref().ok_or_else(not_attached)?;
        store.reads.fetch_add(1, Ordering::Relaxed);
        let asked = (header.sequence.0, &buffers.wanted[..]);
        let found = (&mut buffers.pages, &mut buffers.runs);
        if let Err(status) = store.reach(seat, asked, found, &mut buffers.keys) {
            return self.reply(header, Kind::ReachReply, status, 0, &[]);
        }
        let bytes = page_bytes(&buffers.pages);
        let class = match channel.greeting().purpose {
            Purpose::VmdUrgent => Class::Urgent,
            _ => Class::Bulk,
        };
        stream.take_turn_out(class, bytes);
        store.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
        let mut answer = std::mem::take(&mut buffers.answer);
        answer.clear();
        let runs = encode_runs(buffers.pages.iter().copied(), &mut answer);
        encode_table(buffers.keys.iter().copied(), &mut answer);
        let limit = self.stream.limit_out().map(Header::kib_s_of);
        let head = Header { count: runs as u16, answer_kib_s: limit, ..header.answer(Kind::ReachReply) };
        let replied = self.send(&head.with_body(&answer, 0), &answer);
        self.buffers.answer = answer;
        replied
    }

    fn release(&mut self, header: &Header) -> Result<()> {
        let mut numbers: Vec<u64> = Vec::new();
        decode_table(&self.buffers.body, header.count.into(), &mut numbers)?;
        let seat = self.seat.as_ref().ok_or_else(not_attached)?;
        self.store.release(seat, &numbers);
        Ok(())
    }
}

fn not_attached() -> Error {
    Error::new(ErrorKind::Protocol, "a request for memory before the client was let in")
}
