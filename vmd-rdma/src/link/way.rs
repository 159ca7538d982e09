//! The way over the device: it is opened when the first pages are there, and closed to new ones where it leads nowhere.

use std::sync::Arc;

use libsg::Result;
use libsg::page::PAGE_BYTES;
use libsg::vmd::Class;
use libsg::wire::Encoding;
use libsg::wire::access::{Endpoint, KeyEntry};

use super::job::{Get, Put};
use crate::blob;
use crate::region::{Landing, Windows};
use crate::stream::{Batch, Span, Stream};
use crate::verbs::{Device, Domain, Limits, Operation, Patience, QueuePair};

/// Work requests of a link at once: a window of 4 MiB, were its pages scattered here and there.
const WORKS_MAX: usize = 1024;

/// Windows of guest memory that stay registered though nothing is written from them.
const WINDOWS: usize = 32;

/// Where pages land that nobody waits for: four batches of the largest kind, or what a prepager has under way.
const LANDING_BULK_BYTES: usize = 8 << 20;

/// And those that somebody does: one unit of 2 MiB, or many pages.
const LANDING_URGENT_BYTES: usize = 2 << 20;

/// As far as it is.
#[derive(Debug)]
pub(super) enum Way {
    /// Nobody has put or wanted pages.
    Untried,
    /// The intermediary was asked.
    Asked(Half),
    /// Open to jobs once packets have passed there and back.
    Open(Box<Open>),
    /// Everything goes over the connection.
    Closed,
}

/// A queue pair that has no peer yet.
#[derive(Debug)]
pub(super) struct Half {
    domain: Arc<dyn Domain>,
    pair: Box<dyn QueuePair>,
    limits: Limits,
    works: usize,
}

/// What pages move with. The queue pair goes first.
#[derive(Debug)]
pub(super) struct Open {
    pub stream: Stream,
    pub windows: Windows,
    landing: Option<Landing>,
    domain: Arc<dyn Domain>,
    landing_bytes: usize,
    /// Takes no more jobs; those that it has go on.
    pub shut: bool,
}

impl Half {
    /// This end, and how the other is told of it.
    pub(super) fn new(device: &dyn Device) -> Result<(Self, Endpoint)> {
        let (domain, limits) = (device.domain()?, device.limits());
        let works = limits.works_max.min(WORKS_MAX);
        let pair = Arc::clone(&domain).queue_pair(works)?;
        let endpoint = blob::of_endpoint(&pair.endpoint())?;
        Ok((Self { domain, pair, limits, works }, endpoint))
    }

    /// With the other end.
    pub(super) fn connect(mut self, peer: &Endpoint, class: Class) -> Result<Open> {
        self.pair.connect(&blob::endpoint(peer)?, Patience::default())?;
        Ok(Open {
            stream: Stream::new(self.pair, self.limits, self.works)?,
            windows: Windows::new(Arc::clone(&self.domain), WINDOWS),
            landing: None,
            domain: self.domain,
            landing_bytes: match class {
                Class::Bulk => LANDING_BULK_BYTES,
                Class::Urgent => LANDING_URGENT_BYTES,
            },
            shut: false,
        })
    }
}

impl Open {
    /// Whether it takes jobs.
    pub(super) fn takes_jobs(&self) -> bool {
        !self.shut && self.stream.is_proven()
    }

    /// Where so many pages may land; `None` until others were taken.
    ///
    /// # Errors
    /// The device registers no memory to read into.
    pub(super) fn land(&mut self, pages: usize) -> Result<Option<usize>> {
        let landing = match &mut self.landing {
            Some(landing) => landing,
            none => none.insert(Landing::new(&self.domain, self.landing_bytes)?),
        };
        Ok(landing.take(pages * PAGE_BYTES))
    }

    pub(super) fn give_back(&mut self, area: usize) {
        if let Some(landing) = &mut self.landing {
            landing.give_back(area);
        }
    }

    /// The bytes that landed, all of which the device has written.
    #[allow(unsafe_code)]
    pub(super) fn landed(&self, area: usize, bytes: usize) -> &[u8] {
        // SAFETY: the job that reads there has ended, and its area is given to no other before it is given back, which
        // takes self by a mutable reference: what is returned is gone then.
        self.landing.as_ref().map_or(&[], |landing| unsafe { landing.bytes(area, bytes) })
    }

    /// Queues the writes of a put whose places are known.
    ///
    /// # Errors
    /// The device registers no more memory, or the peer's keys are none: nothing is queued.
    pub(super) fn write(&mut self, number: u64, put: &mut Put, keys: &[KeyEntry]) -> Result<()> {
        let mut spans = self.stream.spans();
        let mut places = put.placements.iter();
        for slice in &put.slices {
            for page in 0..slice.len() / PAGE_BYTES {
                let Some(Some(place)) = places.next() else { continue };
                let page = slice.part(page * PAGE_BYTES, PAGE_BYTES)?;
                let local = self.windows.find(&page)?;
                if put.windows.last() == Some(&local.window) {
                    self.windows.done(local.window);
                } else {
                    put.windows.push(local.window);
                }
                let remote = blob::slot(keys, place.slot)?;
                Span::push(
                    &mut spans,
                    Span { address: local.address, key: local.key, remote, bytes: PAGE_BYTES },
                );
            }
        }
        self.stream.push(Operation::Write, Batch { number, spans });
        Ok(())
    }

    /// What a put was written from is in use no more.
    pub(super) fn written(&mut self, put: &mut Put) {
        put.windows.drain(..).for_each(|window| self.windows.done(window));
    }

    /// Queues the reads of a get of which is known what its pages are, but not whether they are still there.
    ///
    /// # Errors
    /// The peer's keys are none.
    pub(super) fn read_known(&mut self, number: u64, get: &mut Get, keys: &[KeyEntry]) -> Result<()> {
        std::mem::swap(&mut get.entries, &mut get.known);
        let queued = self.read(number, get, keys);
        std::mem::swap(&mut get.entries, &mut get.known);
        queued
    }

    /// Queues the reads of a get whose pages were found, if there are any.
    ///
    /// # Errors
    /// The peer's keys are none.
    pub(super) fn read(&mut self, number: u64, get: &mut Get, keys: &[KeyEntry]) -> Result<()> {
        let there = get.entries.iter().filter(|entry| entry.encoding == Encoding::Raw).count();
        get.bytes = there * PAGE_BYTES;
        let Some(landing) = self.landing.as_ref().filter(|_| there > 0) else { return Ok(()) };
        let (mut address, key) = landing.local(get.area);
        let mut spans = self.stream.spans();
        for (wanted, entry) in get.wanted.iter().zip(&get.entries) {
            if entry.encoding == Encoding::Raw {
                let remote = blob::slot(keys, wanted.placement.slot)?;
                Span::push(&mut spans, Span { address, key, remote, bytes: PAGE_BYTES });
                address += PAGE_BYTES as u64;
            }
        }
        self.stream.push(Operation::Read, Batch { number, spans });
        get.reading = true;
        Ok(())
    }
}
