//! The requests that are under way: how much of each is still open, what failed, and which wait until what they wrote
//! is safe. Pure.

use std::time::{Duration, Instant};

use super::buffers::{Buffer, Buffers};
use super::wire::{Command, Extent, Fault, Request, flag};

/// Requests of one connection that are under way; further ones wait in the socket.
const JOBS_MAX: usize = 256;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// As the protocol numbers it.
    pub fault: Fault,
    /// In words.
    pub why: String,
}

impl Failure {
    /// A failure.
    pub fn new(fault: Fault, why: impl Into<String>) -> Self {
        Self { fault, why: why.into() }
    }
}

/// What a request is answered with.
pub enum Answer {
    /// That it is done.
    Done,
    /// Bytes.
    Bytes(Buffer),
    /// That all its bytes are zero.
    Zeros,
    /// Extents.
    Extents(Vec<Extent>),
}

/// A request that came to its end.
pub struct Finished {
    /// Which.
    pub request: Request,
    /// How.
    pub result: Result<Answer, Failure>,
}

/// Which of the requests under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobId(usize);

/// A request that is under way.
pub struct Job {
    /// What was asked.
    pub request: Request,
    /// The bytes that came with it, or that it is to be answered with.
    pub buffer: Option<Buffer>,
    /// Nothing but zeros was read.
    pub zero: bool,
    /// What was found out about extents.
    pub extents: Vec<Extent>,
    /// When it came.
    pub begun: Instant,
    /// What is below this is to be safe before it is answered.
    settle_at: Option<u64>,
    open: u64,
    failed: Option<Failure>,
}

impl Job {
    /// One that just came. It has one open part: its beginning.
    pub fn new(request: Request, buffer: Option<Buffer>) -> Self {
        Self {
            request,
            buffer,
            zero: true,
            extents: Vec::new(),
            begun: Instant::now(),
            settle_at: None,
            open: 1,
            failed: None,
        }
    }

    fn is_settled_first(&self) -> bool {
        let command = self.request.command;
        let fua = self.request.flags & flag::FUA != 0 && command != Command::Read;
        self.failed.is_none() && (fua || command == Command::Flush)
    }
}

/// How safe what was written is.
#[derive(Clone, Copy, Debug)]
pub struct Safety {
    /// Everything below this is.
    pub safe_below: u64,
    /// What is written from now on is not below this.
    pub now: u64,
    /// Something that was written was lost, and the client was not told.
    pub lost: bool,
}

/// The requests that are under way.
#[derive(Default)]
pub struct Jobs {
    slots: Vec<Option<Job>>,
    free: Vec<usize>,
    under_way: usize,
    /// Nothing of them is open.
    ready: Vec<JobId>,
    /// They wait until something is safe.
    settling: Vec<JobId>,
    /// They can be answered.
    done: Vec<JobId>,
}

impl Jobs {
    /// Whether another may begin.
    pub const fn has_room(&self) -> bool {
        self.under_way < JOBS_MAX
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.under_way == 0
    }

    /// Another.
    pub fn add(&mut self, job: Job) -> JobId {
        self.under_way += 1;
        match self.free.pop() {
            Some(at) => {
                self.slots[at] = Some(job);
                JobId(at)
            }
            None => {
                self.slots.push(Some(job));
                JobId(self.slots.len() - 1)
            }
        }
    }

    /// One of them.
    pub fn get(&mut self, id: JobId) -> Option<&mut Job> {
        self.slots.get_mut(id.0)?.as_mut()
    }

    /// So many more parts of it are open.
    pub fn expect(&mut self, id: JobId, parts: usize) {
        if let Some(job) = self.get(id) {
            job.open += parts as u64;
        }
    }

    /// So many parts of it are through.
    pub fn through(&mut self, id: JobId, parts: usize) {
        let Some(job) = self.get(id) else { return };
        let before = job.open;
        job.open = before.saturating_sub(parts as u64);
        if before > 0 && job.open == 0 {
            self.ready.push(id);
        }
    }

    /// So many parts of it failed. What failed first is what is told.
    pub fn fail(&mut self, id: JobId, parts: usize, failure: Failure) {
        if let Some(job) = self.get(id) {
            job.failed.get_or_insert(failure);
        }
        self.through(id, parts);
    }

    /// Whether nothing more needs to be done for it.
    pub fn has_failed(&mut self, id: JobId) -> bool {
        self.get(id).is_none_or(|job| job.failed.is_some())
    }

    /// What is below the number is to be safe before it is answered.
    pub fn settle_at(&mut self, id: JobId, number: u64) {
        if let Some(job) = self.get(id) {
            job.settle_at = Some(number);
        }
    }

    /// Whether any waits until something is safe, or will.
    pub fn is_settling(&self) -> bool {
        let first =
            |id: &JobId| self.slots.get(id.0).and_then(Option::as_ref).is_some_and(Job::is_settled_first);
        !self.settling.is_empty() || self.ready.iter().any(first)
    }

    /// Those whose parts are all through can be answered, some of them once what they wrote is safe. Returns whether
    /// one was told of a loss.
    pub fn settle(&mut self, safety: Safety, timeout: Duration) -> bool {
        for id in std::mem::take(&mut self.ready) {
            let Some(job) = self.get(id) else { continue };
            if job.is_settled_first() {
                job.settle_at.get_or_insert(safety.now);
                self.settling.push(id);
            } else {
                self.done.push(id);
            }
        }
        let mut told = false;
        for id in std::mem::take(&mut self.settling) {
            let Some(job) = self.get(id) else { continue };
            let safe = job.settle_at.is_none_or(|number| number <= safety.safe_below);
            let late = job.begun.elapsed() >= timeout;
            if safe && safety.lost {
                let why = "an intermediary went with what was written: see the log of sg nbd";
                job.failed = Some(Failure::new(Fault::Io, why));
                told = true;
            } else if !safe && late {
                let why = "the index servers do not take what they are told";
                job.failed = Some(Failure::new(Fault::Io, why));
            } else if !safe {
                self.settling.push(id);
                continue;
            }
            self.done.push(id);
        }
        told
    }

    /// All of them fail: the volume is of no further use.
    pub fn abandon(&mut self) {
        (self.ready, self.settling, self.done) = Default::default();
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if let Some(job) = slot {
                let why = "the volume is of no further use: see the log of sg nbd";
                job.failed = Some(Failure::new(Fault::Shutdown, why));
                self.done.push(JobId(at));
            }
        }
    }

    /// Takes those that can be answered.
    pub fn finished(&mut self, buffers: &mut Buffers) -> Vec<Finished> {
        let mut finished = Vec::with_capacity(self.done.len());
        for id in std::mem::take(&mut self.done) {
            let Some(job) = self.slots.get_mut(id.0).and_then(Option::take) else { continue };
            self.free.push(id.0);
            self.under_way -= 1;
            let command = job.request.command;
            let (answer, unused) = match (job.failed, job.buffer) {
                (Some(failure), buffer) => (Err(failure), buffer),
                (None, Some(buffer)) if command == Command::Read && !job.zero => {
                    (Ok(Answer::Bytes(buffer)), None)
                }
                (None, buffer) if command == Command::Read => (Ok(Answer::Zeros), buffer),
                (None, buffer) if command == Command::BlockStatus => {
                    (Ok(Answer::Extents(job.extents)), buffer)
                }
                (None, buffer) => (Ok(Answer::Done), buffer),
            };
            unused.into_iter().for_each(|buffer| buffers.give(buffer));
            finished.push(Finished { request: job.request, result: answer });
        }
        finished
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn request(command: Command, flags: u16) -> Request {
        Request { command, flags, cookie: 1, offset: 0, length: 4096 }
    }

    fn safety(safe_below: u64, now: u64, lost: bool) -> Safety {
        Safety { safe_below, now, lost }
    }

    fn finished(jobs: &mut Jobs) -> Vec<Result<(), Fault>> {
        let all = jobs.finished(&mut Buffers::default()).into_iter();
        all.map(|one| one.result.map(drop).map_err(|failure| failure.fault)).collect()
    }

    #[test]
    fn a_request_ends_with_its_last_part() {
        let mut jobs = Jobs::default();
        let job = jobs.add(Job::new(request(Command::Write, 0), None));
        jobs.expect(job, 2);
        jobs.through(job, 1);
        jobs.fail(job, 1, Failure::new(Fault::NoSpace, "full"));
        jobs.fail(job, 0, Failure::new(Fault::Io, "later"));
        jobs.settle(safety(0, 0, false), PATIENCE);
        assert_eq!(finished(&mut jobs), []);
        jobs.through(job, 1);
        jobs.settle(safety(0, 0, false), PATIENCE);
        assert_eq!(finished(&mut jobs), [Err(Fault::NoSpace)], "the first failure");
        assert!(jobs.is_empty());
    }

    #[test]
    fn flush_and_fua_wait_for_the_index() {
        let mut jobs = Jobs::default();
        let write = jobs.add(Job::new(request(Command::Write, flag::FUA), None));
        let flush = jobs.add(Job::new(request(Command::Flush, 0), None));
        jobs.settle_at(flush, 5);
        jobs.through(flush, 1);
        jobs.settle(safety(4, 7, false), PATIENCE);
        assert_eq!(finished(&mut jobs), []);
        jobs.through(write, 1);
        jobs.settle(safety(5, 8, false), PATIENCE);
        assert_eq!(finished(&mut jobs), [Ok(())], "the flush waits for what was before it");
        jobs.settle(safety(7, 9, false), PATIENCE);
        assert_eq!(finished(&mut jobs), [], "the write waits for itself");
        jobs.settle(safety(8, 9, false), PATIENCE);
        assert_eq!(finished(&mut jobs), [Ok(())]);
    }

    #[test]
    fn a_loss_is_told_by_a_flush_and_the_index_is_not_waited_for_without_end() {
        let mut jobs = Jobs::default();
        for lost in [true, false] {
            let flush = jobs.add(Job::new(request(Command::Flush, 0), None));
            jobs.settle_at(flush, 5);
            jobs.through(flush, 1);
            assert_eq!(jobs.settle(safety(5, 5, lost), PATIENCE), lost);
            assert_eq!(finished(&mut jobs), [if lost { Err(Fault::Io) } else { Ok(()) }]);
        }
        let flush = jobs.add(Job::new(request(Command::Flush, 0), None));
        jobs.settle_at(flush, 5);
        jobs.through(flush, 1);
        jobs.settle(safety(4, 5, false), Duration::ZERO);
        assert_eq!(finished(&mut jobs), [Err(Fault::Io)]);
        let (_one, two) = (
            jobs.add(Job::new(request(Command::Read, 0), None)),
            jobs.add(Job::new(request(Command::Flush, 0), None)),
        );
        jobs.through(two, 1);
        jobs.settle(safety(0, 5, false), PATIENCE);
        jobs.abandon();
        assert_eq!(finished(&mut jobs), [Err(Fault::Shutdown), Err(Fault::Shutdown)]);
    }
}
