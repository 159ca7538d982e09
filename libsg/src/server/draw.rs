//! Copies that a session takes in without their bytes coming on its connection: this intermediary's backend reads them
//! from where they lie at the other. The session goes on meanwhile; nothing here waits.
//!
//! ```text
//!   the first holder                         here
//!     Draw --------------------------------->  an end that will read
//!     <---------------------------- DrawReply  that end
//!     DrawFrom (the end there) ------------->  knocks there
//!     <------------------------ DrawFromReply  it was heard
//!     CopyAt (what, and how it is reached) ->  takes slots, reads into them, stores
//!     <---------------------------- CopyReply  in the order in which it was asked
//! ```
//!
//! Where the way is lost, all that was asked is answered so; the other sends the bytes then.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::backend::Reader;
use super::store::{Noted, Seated, Store};
use super::transit::Filling;
use crate::content::ContentHash;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Placement, SlotIndex};
use crate::limits;
use crate::page::PAGE_BYTES;
use crate::wire::access::{Endpoint, KeyEntry};
use crate::wire::{Header, IndexEntry, Kind, PageEntry, Status};

/// What one session reads.
pub(super) struct Draws<'s> {
    store: &'s Store,
    way: Option<Way<'s>>,
    /// Who asked for the way, until its end was heard.
    connects: Option<Header>,
    /// What was asked for, in that order.
    asked: VecDeque<Asked>,
    /// Numbers batches.
    next: u64,
    reading_pages: usize,
    /// Frames for the other, one behind the other.
    ready: Vec<u8>,
    buffers: Buffers,
}

/// The end here. The reader goes before what it reads into.
struct Way<'s> {
    reader: Box<dyn Reader>,
    seat: Seated<'s>,
}

/// A batch of copies.
struct Asked {
    number: u64,
    header: Header,
    of: Vec<IndexEntry>,
    /// What is answered, once it is known.
    status: Option<Status>,
}

/// Kept from batch to batch.
#[derive(Default)]
struct Buffers {
    ended: Vec<u64>,
    placements: Vec<Option<Placement>>,
    keys: Vec<KeyEntry>,
    slots: Vec<(SlotIndex, SlotIndex)>,
    pages: Vec<PageEntry>,
    hashes: Vec<ContentHash>,
    /// Lists of batches that were answered.
    lists: Vec<Vec<IndexEntry>>,
}

impl<'s> Draws<'s> {
    pub(super) fn new(store: &'s Store) -> Self {
        Self {
            store,
            way: None,
            connects: None,
            asked: VecDeque::new(),
            next: 1,
            reading_pages: 0,
            ready: Vec::new(),
            buffers: Buffers::default(),
        }
    }

    /// Whether anything is under way, or to be told.
    pub(super) fn is_busy(&self) -> bool {
        self.is_reading() || self.connects.is_some() || !self.ready.is_empty()
    }

    /// Whether batches were asked for that are not answered.
    pub(super) fn is_reading(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Whether a batch of so many pages can be taken now.
    pub(super) fn has_room(&self, pages: usize) -> bool {
        self.reading_pages == 0 || self.reading_pages + pages <= limits::LEASED_SLOTS_MAX
    }

    /// An empty list for a batch.
    pub(super) fn list(&mut self) -> Vec<IndexEntry> {
        self.buffers.lists.pop().unwrap_or_default()
    }

    /// Makes an end that reads. What was under way by another before is lost.
    pub(super) fn begin(&mut self, header: &Header) -> Result<Endpoint, Status> {
        self.lose();
        let (seat, reader, endpoint) = self.store.draw((header.volume, header.epoch))?;
        self.way = Some(Way { reader, seat });
        Ok(endpoint)
    }

    /// Connects it; what comes of that is told later.
    pub(super) fn connect(&mut self, header: &Header, peer: &Endpoint) {
        self.connects = Some(*header);
        let connected = match &mut self.way {
            Some(way) => way.reader.connect(peer),
            None => Err(Error::new(ErrorKind::Unreachable, "there is no end here")),
        };
        if let Err(error) = connected {
            tracing::warn!(error = error.chain(), "copies come over a connection");
            self.lose();
        }
    }

    /// Begins to read a batch, which is answered later, whatever comes of it.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where the keys do not reach the pages.
    pub(super) fn take(&mut self, header: &Header, of: Vec<IndexEntry>, keys: &[KeyEntry]) -> Result<()> {
        let number = self.next;
        self.next += 1;
        let begun = self.read(number, &of, keys)?;
        if begun.is_ok() {
            self.reading_pages += of.len();
        }
        self.asked.push_back(Asked { number, header: *header, of, status: begun.err() });
        self.answer();
        Ok(())
    }

    fn read(
        &mut self,
        number: u64,
        of: &[IndexEntry],
        keys: &[KeyEntry],
    ) -> Result<std::result::Result<(), Status>> {
        let Some(way) = self.way.as_mut().filter(|way| way.reader.is_open()) else {
            return Ok(Err(Status::NotReached));
        };
        let buffers = &mut self.buffers;
        let lease = (number, of.len());
        if let Err(status) = self.store.lease(&way.seat, lease, &mut buffers.placements, &mut buffers.keys) {
            return Ok(Err(status));
        }
        let placements = of.iter().map(|entry| entry.placement).zip(&buffers.placements);
        let slots = placements.map_while(|(there, here)| Some((there?.slot, (*here)?.slot)));
        buffers.slots.clear();
        buffers.slots.extend(slots);
        if buffers.slots.len() < of.len() {
            // All of it, or nothing.
            self.store.release(&way.seat, &[number]);
            return Ok(Err(Status::Full));
        }
        match way.reader.read(number, &buffers.slots, (keys, &buffers.keys)) {
            Ok(()) => Ok(Ok(())),
            Err(error) if error.kind == ErrorKind::Protocol => Err(error),
            Err(error) => {
                tracing::warn!(error = error.chain(), "copies come over a connection");
                self.lose();
                Ok(Err(Status::NotReached))
            }
        }
    }

    /// Stores what was read.
    pub(super) fn progress(&mut self) {
        let Some(way) = &mut self.way else { return };
        let mut ended = std::mem::take(&mut self.buffers.ended);
        let moved = way.reader.progress(&mut ended);
        if let Some(header) = self.connects.take_if(|_| way.reader.is_open()) {
            push(&mut self.ready, &header, Kind::DrawFromReply, Status::Ok);
        }
        for number in ended.drain(..) {
            self.ended(number);
        }
        self.buffers.ended = ended;
        if let Err(error) = moved {
            tracing::warn!(error = error.chain(), "copies come over a connection");
            self.lose();
        }
        self.answer();
    }

    /// The pages of a batch are in their slots.
    fn ended(&mut self, number: u64) {
        let is_it = |asked: &&mut Asked| asked.number == number && asked.status.is_none();
        let (Some(way), Some(asked)) = (&self.way, self.asked.iter_mut().find(is_it)) else { return };
        self.reading_pages -= asked.of.len();
        let buffers = &mut self.buffers;
        buffers.pages.clear();
        let raw = |entry: &IndexEntry| PageEntry::raw(entry.page, entry.round, entry.checksum);
        buffers.pages.extend(asked.of.iter().map(raw));
        let stored = match self.store.settle(&way.seat, (number, &buffers.pages)) {
            Ok(Some(filling)) => keep(self.store, filling, asked, buffers, &way.seat),
            Ok(None) => Status::State,
            Err(status) => {
                self.store.release(&way.seat, &[number]);
                status
            }
        };
        asked.status = Some(stored);
    }

    /// The way is no more.
    fn lose(&mut self) {
        self.way = None;
        self.reading_pages = 0;
        if let Some(header) = self.connects.take() {
            push(&mut self.ready, &header, Kind::DrawFromReply, Status::NotReached);
        }
        for asked in &mut self.asked {
            asked.status.get_or_insert(Status::NotReached);
        }
        self.answer();
    }

    /// Answers what can be, in the order in which it was asked.
    fn answer(&mut self) {
        while let Some(Asked { header, status: Some(status), .. }) = self.asked.front() {
            push(&mut self.ready, header, Kind::CopyReply, *status);
            let mut list = self.asked.pop_front().map(|asked| asked.of).unwrap_or_default();
            list.clear();
            self.buffers.lists.push(list);
        }
    }

    /// Frames that are the other's, which are taken with it.
    pub(super) fn take_ready(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.ready)
    }

    /// What to wait for.
    pub(super) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        self.way.as_ref().filter(|_| self.is_busy()).map(|way| way.reader.poll_fd())
    }
}

/// The pages are stored: all of them, or none.
fn keep(
    store: &Store,
    filling: Filling<'_>,
    asked: &Asked,
    buffers: &mut Buffers,
    seat: &Seated<'_>,
) -> Status {
    let Asked { header, of, .. } = asked;
    store.bytes_in.fetch_add((filling.slots() * PAGE_BYTES) as u64, Ordering::Relaxed);
    let pages = (&buffers.pages[..], Noted::CopiesOf(of));
    match filling.finish(header.epoch, pages, &mut buffers.hashes, &mut buffers.placements) {
        Ok((runs, _)) => {
            store.close_full(seat, &runs);
            store.all_or_none(header.volume, of, &buffers.placements)
        }
        Err(status) => status,
    }
}

fn push(out: &mut Vec<u8>, to: &Header, kind: Kind, status: Status) {
    let header = Header { status, ..to.answer(kind) }.with_body(&[], 0);
    out.extend_from_slice(&header.encode());
}
