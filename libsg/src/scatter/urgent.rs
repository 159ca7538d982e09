//! The urgent path: pages that the guest waits for, on a connection of their own.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::direct::{failed_pages, pages_header, unexpected};
use super::load::Loaded;
use super::planner::{BatchId, FaultAnswer};
use super::shared::{Counters, Scatter};
use crate::error::Result;
use crate::ids::Sequence;
use crate::limits::BATCH_PAGES_MAX;
use crate::pace::{Class, LinkId, LinkReading};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::transport::{Channel, Inbox, Outbox, TcpPath, wait};
use crate::wire::entry::{decode_table, encode_table};
use crate::wire::{Kind, PageEntry};

/// How often a page that the source has not got yet is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The longest sleep with nothing to do.
const IDLE: Duration = Duration::from_millis(50);

/// Answers faults from the source's memory.
pub struct UrgentSink {
    scatter: Arc<Scatter>,
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    path: TcpPath,
    /// Batches that answered a request, oldest first, by its sequence.
    sent: HashMap<Sequence, VecDeque<BatchId>>,
    /// Faults on pages that the source has not got yet.
    waiting: Vec<(Sequence, PageIndex)>,
    asked: Vec<PageIndex>,
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
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            path: TcpPath::new(),
            sent: HashMap::new(),
            waiting: Vec::new(),
            asked: Vec::new(),
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
        let link = self.scatter.pacer.add_link();
        let result = self.serve(link, ended);
        self.scatter.pacer.remove_link(link);
        result
    }

    fn serve(&mut self, link: LinkId, ended: impl Fn() -> bool) -> Result<()> {
        while !ended() {
            let now = Instant::now();
            self.answer_waiting(now)?;
            self.read(now)?;
            // What faults carry is part of the link's sum; how long it waits says nothing about bulk's queue.
            let reading = LinkReading::from(self.path.refresh(&self.channel, now));
            self.scatter.pacer.report(link, LinkReading { queue_delay: None, ..reading }, now);
            let written = self.outbox.flush(&self.channel, usize::MAX)?;
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
                    for page in std::mem::take(&mut self.asked) {
                        self.answer(sequence, page, now)?;
                    }
                }
                Kind::PagesAck => {
                    let failed = failed_pages(&frame)?;
                    let batch = self.sent.get_mut(&sequence).and_then(VecDeque::pop_front);
                    if let Some(batch) = batch {
                        self.scatter.planner.lock().installed(batch, &failed);
                        acked = true;
                    }
                    self.sent.retain(|_, batches| !batches.is_empty());
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
        for (sequence, page) in std::mem::take(&mut self.waiting) {
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
        match answer {
            FaultAnswer::Unknown => {
                encode_table([PageEntry::gone(page)], &mut self.table);
                return self.push(sequence);
            }
            FaultAnswer::NotYet => {
                self.scatter.source.want(page)?;
                if self.waiting.len() < BATCH_PAGES_MAX {
                    self.waiting.push((sequence, page));
                }
                return Ok(());
            }
            FaultAnswer::Zero(id, range) => {
                encode_table([PageEntry::zero(range.first, range.pages as u16, round)], &mut self.table);
                self.sent.entry(sequence).or_default().push_back(id);
            }
            FaultAnswer::Send(id, range) => {
                self.load(range, round)?;
                self.sent.entry(sequence).or_default().push_back(id);
            }
        }
        self.push(sequence)
    }

    fn load(&mut self, range: PageRange, round: crate::ids::Round) -> Result<()> {
        let mut batch = Batch::empty(range.first);
        range.iter().for_each(|page| batch.insert(page));
        self.loaded.load(&*self.scatter.source, &batch, round)?;
        encode_table(self.loaded.entries.iter().copied(), &mut self.table);
        encode_table(self.loaded.zero_entries(round), &mut self.table);
        Counters::add(&self.scatter.counters.direct, self.loaded.entries.len() * PAGE_BYTES);
        Ok(())
    }

    fn push(&mut self, sequence: Sequence) -> Result<()> {
        let header = pages_header(&self.channel, sequence, &self.table, &self.path);
        self.outbox.push_frame(header, &self.table, self.loaded.slices.drain(..))?;
        self.outbox.flush(&self.channel, usize::MAX).map(|written| {
            self.scatter.pacer.charge(Class::Urgent, written as u64, Instant::now());
            Counters::add(&self.scatter.counters.wire, written);
        })
    }
}
