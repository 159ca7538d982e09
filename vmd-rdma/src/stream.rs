//! Batches on a queue pair: each a list of spans of memory here and there, which become work requests as there is room
//! and leave to write. Nothing here knows what a page is.

use std::collections::VecDeque;

use libsg::Result;
use libsg::ids::NodeId;

use crate::verbs::{Done, Fault, Limits, Operation, Piece, QueuePair, Remote, Work};

/// Work requests that are posted with one doorbell.
const DOORBELL: usize = 16;

/// Pieces of memory here in one work request; a device may take fewer.
const PIECES: usize = 16;

/// Completions that are looked for at once.
const REAPED: usize = 32;

/// The number of a work request with which no batch ends, and which says that those before it came to their end: so the
/// queue pair has room again.
const HALFWAY: u64 = u64::MAX;

/// The number of work requests that write nothing, the first of all among them: when one has ended, the peer is there.
const KNOCK: u64 = u64::MAX - 1;

/// Memory here, and as much there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub address: u64,
    /// The local key.
    pub key: u32,
    pub remote: Remote,
    pub bytes: usize,
}

impl Span {
    /// Appends one, joined with what it follows.
    pub(crate) fn push(spans: &mut VecDeque<Self>, span: Self) {
        match spans.back_mut() {
            Some(last) if last.joins(&span) => last.bytes += span.bytes,
            _ => spans.push_back(span),
        }
    }

    /// Whether that one follows here and there: they are one then.
    fn joins(&self, next: &Self) -> bool {
        self.key == next.key && self.address + self.bytes as u64 == next.address && self.gathers(next)
    }

    /// Whether that one follows there: it can be in the same work request.
    fn gathers(&self, next: &Self) -> bool {
        self.remote.key == next.remote.key && self.remote.address + self.bytes as u64 == next.remote.address
    }

    fn skip(&mut self, bytes: usize) {
        self.address += bytes as u64;
        self.remote.address += bytes as u64;
        self.bytes -= bytes;
    }
}

/// Spans that are written or read together; it ends with the last of them.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Comes back when it has ended.
    pub number: u64,
    pub spans: VecDeque<Span>,
}

/// A queue pair with what is to go over it.
#[derive(Debug)]
pub(crate) struct Stream {
    pair: Box<dyn QueuePair>,
    limits: Limits,
    works_max: usize,
    reads: Queue,
    writes: Queue,
    /// Posted since the last one that says when it ends.
    unsignalled: usize,
    /// Batches that have not ended.
    open: usize,
    /// Packets get to the peer and back.
    is_proven: bool,
    /// It has knocked, and was not answered yet.
    knocks: bool,
    /// Lists of spans to use again.
    spare: Vec<VecDeque<Span>>,
    done: Vec<Done>,
}

/// Batches that are not posted, or not as a whole.
#[derive(Debug, Default)]
struct Queue {
    batches: VecDeque<Batch>,
    bytes: usize,
}

/// A work request to be posted.
#[derive(Clone, Copy)]
struct Planned {
    pieces: [Piece; PIECES],
    count: usize,
    remote: Remote,
    bytes: usize,
    /// The batch that it ends.
    ends: Option<u64>,
}

impl Planned {
    const NONE: Self = Self {
        pieces: [Piece { address: 0, bytes: 0, key: 0 }; PIECES],
        count: 0,
        remote: Remote { address: 0, key: 0 },
        bytes: 0,
        ends: None,
    };
}

impl Queue {
    /// The next work requests, of at most `budget` bytes in all. Returns how many.
    fn plan(&self, limits: &Limits, mut budget: usize, plan: &mut [Planned; DOORBELL]) -> usize {
        let mut planned = 0;
        for batch in &self.batches {
            let mut spans = batch.spans.iter().copied();
            let mut next = spans.next();
            while let Some(mut span) = next {
                if planned == DOORBELL || budget == 0 {
                    return planned;
                }
                let work = &mut plan[planned];
                *work = Planned { remote: span.remote, ..Planned::NONE };
                loop {
                    let taken = span.bytes.min(limits.message_bytes_max - work.bytes).min(budget);
                    work.pieces[work.count] =
                        Piece { address: span.address, bytes: taken as u32, key: span.key };
                    (work.count, work.bytes, budget) = (work.count + 1, work.bytes + taken, budget - taken);
                    let before = span;
                    span.skip(taken);
                    next = if span.bytes > 0 { Some(span) } else { spans.next() };
                    let room = work.count < limits.pieces_max.min(PIECES)
                        && work.bytes < limits.message_bytes_max
                        && budget > 0;
                    match next.filter(|next| room && before.gathers(next)) {
                        Some(follows) => span = follows,
                        None => break,
                    }
                }
                work.ends = next.is_none().then_some(batch.number);
                planned += 1;
            }
        }
        planned
    }

    /// A work request of so many bytes was posted.
    fn posted(&mut self, mut bytes: usize, spare: &mut Vec<VecDeque<Span>>) {
        self.bytes -= bytes;
        while let Some(batch) = self.batches.front_mut() {
            while let Some(span) = batch.spans.front_mut().filter(|_| bytes > 0) {
                let taken = span.bytes.min(bytes);
                span.skip(taken);
                bytes -= taken;
                if span.bytes == 0 {
                    batch.spans.pop_front();
                }
            }
            if !batch.spans.is_empty() {
                return;
            }
            spare.extend(self.batches.pop_front().map(|batch| batch.spans));
        }
    }
}

impl Stream {
    /// Over a queue pair that is connected, with room for so many work requests. It knocks at the peer's.
    ///
    /// # Errors
    /// The device refuses it.
    pub(crate) fn new(pair: Box<dyn QueuePair>, limits: Limits, works_max: usize) -> Result<Self> {
        let mut stream = Self {
            pair,
            limits,
            works_max,
            reads: Queue::default(),
            writes: Queue::default(),
            unsignalled: 0,
            open: 0,
            is_proven: false,
            knocks: false,
            spare: Vec::new(),
            done: Vec::new(),
        };
        stream.knock()?;
        Ok(stream)
    }

    /// Finds out whether the peer is there, when nothing else does.
    ///
    /// # Errors
    /// The device refuses it.
    pub(crate) fn knock(&mut self) -> Result<()> {
        let (operation, remote) = (Operation::Write, Remote { address: 0, key: 0 });
        self.knocks =
            self.pair.post(&[Work { id: KNOCK, operation, pieces: &[], remote, signalled: true }])? > 0;
        Ok(())
    }

    /// An empty list.
    pub(crate) fn spans(&mut self) -> VecDeque<Span> {
        self.spare.pop().unwrap_or_default()
    }

    /// Queues a batch, which is not empty.
    pub(crate) fn push(&mut self, operation: Operation, batch: Batch) {
        let queue = if operation == Operation::Read { &mut self.reads } else { &mut self.writes };
        queue.bytes += batch.spans.iter().map(|span| span.bytes).sum::<usize>();
        queue.batches.push_back(batch);
        self.open += 1;
    }

    /// Bytes that are to be written and not posted.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.writes.bytes
    }

    /// Posts what there is room for: reads, and of writes at most `bytes_max`. Returns the bytes of these.
    ///
    /// # Errors
    /// The device refuses what is within its limits.
    pub(crate) fn post(&mut self, bytes_max: usize) -> Result<usize> {
        self.post_some(Operation::Read, usize::MAX)?;
        self.post_some(Operation::Write, bytes_max)
    }

    fn post_some(&mut self, operation: Operation, bytes_max: usize) -> Result<usize> {
        let mut plan = [Planned::NONE; DOORBELL];
        let mut posted_bytes = 0;
        loop {
            let queue = if operation == Operation::Read { &mut self.reads } else { &mut self.writes };
            let planned = queue.plan(&self.limits, bytes_max - posted_bytes, &mut plan);
            if planned == 0 {
                return Ok(posted_bytes);
            }
            let mut unsignalled = self.unsignalled;
            let works: [Work<'_>; DOORBELL] = std::array::from_fn(|at| {
                let work = &plan[at];
                let signalled = work.ends.is_some() || (unsignalled + 1) * 2 >= self.works_max;
                unsignalled = if signalled { 0 } else { unsignalled + 1 };
                let (id, pieces) = (work.ends.unwrap_or(HALFWAY), &work.pieces[..work.count]);
                Work { id, operation, pieces, remote: work.remote, signalled }
            });
            let posted = self.pair.post(&works[..planned])?;
            for (work, planned) in works.iter().zip(&plan).take(posted) {
                self.unsignalled = if work.signalled { 0 } else { self.unsignalled + 1 };
                queue.posted(planned.bytes, &mut self.spare);
                posted_bytes += planned.bytes;
            }
            if posted < planned {
                return Ok(posted_bytes);
            }
        }
    }

    /// Appends the batches that have ended. Whether any work request did.
    ///
    /// # Errors
    /// What the first failed with: nothing goes over the queue pair any more.
    pub(crate) fn reap(&mut self, ended: &mut Vec<u64>) -> Result<bool, Lost> {
        let mut any = false;
        loop {
            self.done.clear();
            self.pair.reap(REAPED, &mut self.done).map_err(Lost::Device)?;
            any |= !self.done.is_empty();
            for done in &self.done {
                done.result.map_err(Lost::Work)?;
                match done.id {
                    HALFWAY => {}
                    KNOCK => (self.is_proven, self.knocks) = (true, false),
                    number => {
                        ended.push(number);
                        self.open -= 1;
                    }
                }
            }
            if self.done.len() < REAPED {
                return Ok(any);
            }
        }
    }

    /// Whether anything is on its way.
    pub(crate) fn is_busy(&self) -> bool {
        self.open > 0 || self.knocks
    }

    /// Whether the peer has acknowledged anything yet. Until then nothing else is to be pushed.
    pub(crate) fn is_proven(&self) -> bool {
        self.is_proven
    }

    pub(crate) fn pair(&mut self) -> &mut dyn QueuePair {
        &mut *self.pair
    }
}

/// Why a queue pair is of no use any more.
#[derive(Debug)]
pub(crate) enum Lost {
    /// A work request failed.
    Work(Fault),
    /// The device is gone.
    Device(libsg::Error),
}

impl Lost {
    /// As an error about the peer.
    pub(crate) fn at(self, peer: &NodeId) -> libsg::Error {
        self.error().at(peer)
    }

    /// As an error.
    pub(crate) fn error(self) -> libsg::Error {
        match self {
            Self::Work(fault) => fault.error(),
            Self::Device(error) => error,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Whatever it was doing, it is over before the memory here is anybody else's.
        self.pair.fail();
    }
}
