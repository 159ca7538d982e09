//! The urgent path: pages that the guest waits for, on a connection of their own.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::direct::{failed_pages, pages_header, unexpected};
use super::load::Loaded;
use super::planner::{BatchId, FaultAnswer};
use super::shared::{Counters, Scatter};
use crate::error::Result;
use crate::host;
use crate::ids::Sequence;
use crate::limits::BATCH_PAGES_MAX;
use crate::pace::{Class, LinkId, LinkReading};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::transport::{Channel, Inbox, Outbox, wait};
use crate::wire::entry::decode_table;
use crate::wire::run::encode_runs;
use crate::wire::{Header, Kind, PageEntry};

/// How often a page that the source has not got yet is looked for by itself: a source that gets it wakes who waits.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The longest sleep with nothing to do.
const IDLE: Duration = Duration::from_millis(50);

/// Answers faults from the source's memory.
pub struct UrgentSink {
    scatter: Arc<Scatter>,
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    /// Batches that answered a request and are not acknowledged, oldest first, with its sequence.
    sent: VecDeque<(Sequence, BatchId)>,
    /// Faults on pages that the source has not got yet.
    waiting: VecDeque<(Sequence, PageIndex)>,
    asked: Vec<PageIndex>,
    supply: Vec<PageRange>,
    loaded: Loaded,
    table: Vec<u8>,
}

impl UrgentSink {
    /// A sink over an open connection.
    #[must_use]
    pub fn new(scatter: Arc<Scatter>, channel: Channel) -> Self {
        Self {
            scatter,
            channel,
            inbox: Inbox::patient(),
            outbox: Outbox::new(),
            sent: VecDeque::new(),
            waiting: VecDeque::new(),
            asked: Vec::new(),
            supply: Vec::new(),
            loaded: Loaded::default(),
            table: Vec::new(),
        }
    }

    /// Runs until the connection breaks, or `ended` says so.
    ///
    /// # Errors
    /// The connection's end, or a source that gives no pages.
    pub fn run(&mut self, ended: impl Fn() -> bool) -> Result<()> {
        let _ = crate::pace::precise_timers();
        let link = self.scatter.pacer.add_link(Class::Urgent);
        let result = self.serve(link, ended);
        self.scatter.pacer.remove_link(link);
        result
    }

    fn serve(&mut self, link: LinkId, ended: impl Fn() -> bool) -> Result<()> {
        while !ended() {
            let now = host::now();
            self.answer_waiting(now)?;
            self.read(now)?;
            let written = self.outbox.flush(&self.channel, usize::MAX)?;
            // What faults carry is part of the link's sum; how long it waits says nothing about bulk's queue. What was
            // sent is there soon: asking the kernel about each page would cost more than it tells.
            let delivered = self.outbox.written_bytes();
            self.scatter.pacer.observe(link, LinkReading { delivered, ..LinkReading::default() }, now);
            self.scatter.pacer.charge(Class::Urgent, written as u64, now);
            Counters::add(&self.scatter.counters.wire, written);
            let timeout = if self.waiting.is_empty() { IDLE } else { LOOK_AGAIN };
            let waker = self.scatter.urgent_waker();
            let writing = self.outbox.queued_bytes() > 0;
            wait(&[(Some(self.channel.as_fd()), writing), (Some(waker.as_fd()), false)], timeout)?;
            waker.drain();
        }
        Ok(())
    }

    fn read(&mut self, now: Instant) -> Result<()> {
        let mut acked = false;
        loop {
            let Some(frame) = self.inbox.poll(&self.channel)? else { break };
            let sequence = frame.header.sequence;
            match frame.header.kind {
                Kind::Fault => {
                    decode_table(frame.body, usize::from(frame.header.count), &mut self.asked)?;
                    for at in 0..self.asked.len() {
                        self.answer(sequence, self.asked[at], now)?;
                    }
                }
                Kind::PagesAck => {
                    let failed = failed_pages(&frame)?;
                    let at = self.sent.iter().position(|(of, _)| *of == sequence);
                    if let Some((_, batch)) = at.and_then(|at| self.sent.remove(at)) {
                        self.scatter.planner.lock().installed(batch, &failed);
                        acked = true;
                    }
                }
                other => return Err(unexpected(other)),
            }
        }
        if acked {
            self.scatter.check_progress();
        }
        Ok(())
    }

    fn answer_waiting(&mut self, now: Instant) -> Result<()> {
        if !self.waiting.is_empty() {
            // Whoever leads the migration may wait for the destination, which waits for this page.
            self.scatter.take_supply(&mut self.supply)?;
        }
        // What is not there yet is queued again, behind those that are looked at now.
        for _ in 0..self.waiting.len() {
            let Some((sequence, page)) = self.waiting.pop_front() else { break };
            self.answer(sequence, page, now)?;
        }
        Ok(())
    }

    fn answer(&mut self, sequence: Sequence, page: PageIndex, now: Instant) -> Result<()> {
        let (answer, round) = {
            let mut planner = self.scatter.planner.lock();
            (planner.fault(page, now), planner.round())
        };
        self.table.clear();
        self.loaded.slices.clear();
        let runs = match answer {
            FaultAnswer::Unknown => encode_runs([PageEntry::gone(page)], &mut self.table),
            FaultAnswer::Elsewhere(range) => return self.push_places(sequence, range),
            FaultAnswer::NotYet => {
                self.scatter.given(self.scatter.source.want(page))?;
                if self.waiting.len() < BATCH_PAGES_MAX {
                    self.waiting.push_back((sequence, page));
                }
                return Ok(());
            }
            FaultAnswer::Zero(id, range) => {
                self.sent.push_back((sequence, id));
                encode_runs([PageEntry::zero(range.first, range.pages as u16, round)], &mut self.table)
            }
            FaultAnswer::Send(id, range) => {
                let runs = self.load(range, round)?;
                if self.scatter.forgets {
                    self.scatter.planner.lock().loaded(id);
                }
                self.sent.push_back((sequence, id));
                runs
            }
        };
        self.push(sequence, runs)
    }

    fn load(&mut self, range: PageRange, round: crate::ids::Round) -> Result<usize> {
        let mut batch = Batch::empty(range.first);
        range.iter().for_each(|page| batch.insert(page));
        self.scatter.given(self.loaded.load(&*self.scatter.source, &batch, round))?;
        Counters::add(&self.scatter.counters.direct, self.loaded.entries.len() * PAGE_BYTES);
        Ok(self.loaded.encode(round, &mut self.table))
    }

    /// Says where pages lie that are not here any more.
    fn push_places(&mut self, sequence: Sequence, range: PageRange) -> Result<()> {
        let runs = encode_runs(self.scatter.planner.lock().entries(range), &mut self.table);
        let header = Header { sequence, count: runs as u16, ..self.channel.header(Kind::Announce) };
        self.push_frame(header)
    }

    fn push(&mut self, sequence: Sequence, runs: usize) -> Result<()> {
        self.push_frame(pages_header(&self.channel, sequence, runs, None))
    }

    fn push_frame(&mut self, header: Header) -> Result<()> {
        self.outbox.push_frame(header, &self.table, self.loaded.slices.drain(..))?;
        self.outbox.flush(&self.channel, usize::MAX).map(|written| {
            self.scatter.pacer.charge(Class::Urgent, written as u64, host::now());
            Counters::add(&self.scatter.counters.wire, written);
        })
    }
}
