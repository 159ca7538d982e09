//! The direct path: batches to the destination, within the credit that it grants.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use super::load::Loaded;
use super::planner::{BatchId, Sink, Work};
use super::shared::{Counters, Scatter, Stage};
use super::window::{AckTime, nap};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::Sequence;
use crate::pace::{self, Class, LinkId, LinkReading, Trickle};
use crate::page::{PAGE_BYTES, PageIndex};
use crate::transport::{Channel, Frame, Inbox, Outbox, TcpPath, wait, wait_writable};
use crate::wire::entry::decode_table;
use crate::wire::run::encode_runs;
use crate::wire::{Credit, Header, Kind, Malformed, PageEntry};

/// Bytes of batches that wait to be written, before another is taken: two of 64 pages.
const QUEUE_BYTES: usize = 512 << 10;

struct Sent {
    sequence: Sequence,
    batch: BatchId,
    at: Instant,
}

/// The sink of the destination's direct connection.
pub struct DirectSink {
    scatter: Arc<Scatter>,
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    path: TcpPath,
    sent: VecDeque<Sent>,
    next: u64,
    /// Bytes that may be written in all, as the destination last said.
    credit: u64,
    /// Bytes/s of the destination's port: credit that has gathered is no reason for a queue there.
    pace: Option<u64>,
    /// Bytes/s that our own link has for this path.
    share: Option<u64>,
    /// What of a low pace the kernel does not keep.
    trickle: Trickle,
    loaded: Loaded,
    table: Vec<u8>,
    ack_time: AckTime,
}

impl DirectSink {
    /// A sink over an open connection.
    #[must_use]
    pub fn new(scatter: Arc<Scatter>, channel: Channel) -> Self {
        Self {
            scatter,
            channel,
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            path: TcpPath::new(),
            sent: VecDeque::new(),
            next: 1,
            credit: 0,
            pace: None,
            share: None,
            trickle: Trickle::new(host::now()),
            loaded: Loaded::default(),
            table: Vec::new(),
            ack_time: AckTime::default(),
        }
    }

    /// Runs until the connection breaks, or `ended` says so.
    ///
    /// # Errors
    /// The connection's end, or a source that gives no pages.
    pub fn run(&mut self, ended: impl Fn() -> bool) -> Result<()> {
        let _ = crate::pace::precise_timers();
        let link = self.scatter.pacer.add_link(Class::Direct);
        let scatter = self.scatter.clone();
        let result = (|| {
            while !ended() {
                self.step(link)?;
            }
            Ok(())
        })();
        scatter.pacer.remove_link(link);
        result
    }

    fn step(&mut self, link: LinkId) -> Result<()> {
        let now = host::now();
        self.read(link, now)?;
        self.pull(now)?;
        let mut again = self.write(now)?;
        if again.is_some() {
            // All went: what may follow it does so at once, and where there is nothing, credit is waited for.
            self.pull(now)?;
            again = self.write(now)?;
        }
        let info = self.path.refresh(&self.channel, now);
        let reading = LinkReading::from(info);
        // Held back by our share, that is: what the destination's port holds back says nothing of ours, and two ends
        // that each learn from what the other lets through talk each other down.
        let ours = self.pace.is_none_or(|pace| self.share.is_some_and(|share| share <= pace));
        let waits = reading.backlogged || self.allowed() > 0;
        let reading = LinkReading { backlogged: waits && ours, ..reading };
        self.share = self.scatter.pacer.report(link, reading, now);
        if host::has_tcp() {
            let pace = self.share.into_iter().chain(self.pace).min();
            self.path.pace(&self.channel, pace)?;
            self.trickle.set(now, pace);
        }
        // With nothing on its way, and credit waited for, there is nothing to be read of the path.
        let idle = nap(waits || self.path.is_carrying());
        let left = again.unwrap_or(now + idle).saturating_duration_since(host::now());
        let writing = again.is_none() && self.allowed() > 0;
        let waker = self.scatter.direct_waker();
        if writing {
            // Acknowledgements and credit may wait until it is awake anyway: each would cost a wake of its own.
            wait_writable(&self.channel, left)?;
        } else {
            wait(&[(Some(self.channel.as_fd()), false), (Some(waker.as_fd()), false)], left)?;
        }
        waker.drain();
        Ok(())
    }

    /// Bytes that are queued and within the credit.
    fn allowed(&self) -> u64 {
        let left = self.credit.saturating_sub(self.outbox.written_bytes());
        left.min(self.outbox.queued_bytes() as u64)
    }

    fn write(&mut self, now: Instant) -> Result<Option<Instant>> {
        let allowed = self.allowed();
        if allowed == 0 {
            return Ok(None);
        }
        let allowed = match self.trickle.allows(now) {
            Ok(most) => allowed.min(most),
            Err(at) => return Ok(Some(at)),
        };
        let written = self.outbox.flush(&self.channel, allowed as usize)?;
        self.path.wrote(written);
        self.trickle.wrote(now, written);
        Counters::add(&self.scatter.counters.wire, written);
        Ok((written as u64 == allowed).then_some(now))
    }

    fn read(&mut self, link: LinkId, now: Instant) -> Result<()> {
        let mut acked = false;
        while let Some(frame) = self.inbox.poll(&self.channel)? {
            match frame.header.kind {
                Kind::Credit => {
                    let credit = Credit::decode(frame.body)?;
                    self.credit = self.credit.max(credit.limit);
                    self.pace = credit.pace;
                    self.scatter.pacer.takes(link, credit.pace);
                }
                Kind::PagesAck => {
                    let failed = failed_pages(&frame)?;
                    let Some(at) = self.sent.iter().position(|sent| sent.sequence == frame.header.sequence)
                    else {
                        return Err(Malformed::Bounds("acknowledged batch").into());
                    };
                    let Some(sent) = self.sent.remove(at) else { continue };
                    self.ack_time.took(now.saturating_duration_since(sent.at));
                    let mut planner = self.scatter.planner.lock();
                    if self.scatter.is_at(Stage::Rounds) {
                        planner.installed_live(sent.batch, &failed);
                    } else {
                        planner.installed(sent.batch, &failed);
                    }
                    drop(planner);
                    acked = true;
                }
                other => return Err(unexpected(other)),
            }
        }
        if acked {
            self.scatter.check_progress();
        }
        Ok(())
    }

    /// Takes the next batches as long as credit goes beyond what is queued. No more than the next few: what
    /// waits here is on nobody else's way.
    fn pull(&mut self, now: Instant) -> Result<()> {
        while self.outbox.queued_bytes() < QUEUE_BYTES
            && self.outbox.written_bytes() + (self.outbox.queued_bytes() as u64) < self.credit
        {
            let late = self.ack_time.late();
            let (work, round) = {
                let mut planner = self.scatter.planner.lock();
                (planner.next(Sink::Direct, now, late), planner.round())
            };
            let (batch, runs) = match work {
                None => break,
                Some(Work::Zeros(id, range)) => {
                    let entry = PageEntry::zero(range.first, range.pages as u16, round);
                    self.table.clear();
                    self.loaded.slices.clear();
                    (id, encode_runs([entry], &mut self.table))
                }
                Some(Work::Pages(id, batch)) => {
                    self.scatter.given(self.loaded.load(&*self.scatter.source, &batch, round))?;
                    if !self.loaded.zeros.is_empty() || self.scatter.forgets {
                        self.scatter.planner.lock().sent_as_zero(id, self.loaded.zeros.iter().copied());
                    }
                    Counters::add(&self.scatter.counters.direct, self.loaded.entries.len() * PAGE_BYTES);
                    (id, self.loaded.encode(round, &mut self.table))
                }
            };
            let sequence = Sequence(self.next);
            self.next += 1;
            let mut header = pages_header(&self.channel, sequence, runs, self.path.delay_us());
            // The queue that all paths from here share is ours: the destination can do nothing about it.
            let beyond = pace::own_delay(self.path.info().queue_delay(), self.scatter.pacer.shared_delay());
            header.delay_us = beyond.map(Header::delay_us_of);
            self.outbox.push_frame(header, &self.table, self.loaded.slices.drain(..))?;
            self.sent.push_back(Sent { sequence, batch, at: now });
        }
        Ok(())
    }
}

/// The header of a `Pages` frame with a table of so many runs.
pub(super) fn pages_header(
    channel: &Channel,
    sequence: Sequence,
    runs: usize,
    delay_us: Option<u32>,
) -> Header {
    Header { sequence, count: runs as u16, delay_us, ..channel.header(Kind::Pages) }
}

/// The pages of a `PagesAck` that were not installed.
pub(super) fn failed_pages(frame: &Frame<'_>) -> Result<Vec<PageIndex>> {
    let mut failed = Vec::new();
    decode_table(frame.body, usize::from(frame.header.count), &mut failed)?;
    Ok(failed)
}

pub(super) fn unexpected(kind: Kind) -> Error {
    Error::new(ErrorKind::Protocol, format!("the destination sent a {kind:?} frame where none belongs"))
}
