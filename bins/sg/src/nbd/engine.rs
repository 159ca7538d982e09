//! The requests of one connection, from the client's asking to the answer: which pages each needs, what of that is
//! outstanding at which intermediary, and what came of it. Any number of requests is under way at once, and none waits for
//! another.
//!
//! Everything is a [`Work`] that is done when its turn comes, or a [`Part`] that is outstanding on a link and becomes
//! further works. Nothing here waits, except that a connection to an intermediary is opened when it is first needed.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::ids::{Checksum, MemberIndex, Placement};
use libsg::memory::PageSlice;
use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::vmd::Reply;
use libsg::{Error, ErrorKind, Result};

use super::buffers::{Buffer, Buffers};
use super::job::{Failure, Finished, Job, JobId, Jobs, Safety};
use super::links::Links;
use super::lookup::Lookup;
use super::shared::{Kind, Shared, View};
use super::table::Known;
use super::wire::{Command, Fault, Request};

/// Pages in one request to an intermediary.
pub const BATCH_PAGES: usize = libsg::limits::BATCH_PAGES;

/// How long a member that cannot be reached is left alone, in a volume that others write; also how long one that is full
/// is.
pub const LEFT_ALONE: Duration = Duration::from_millis(500);

/// A page that is to be stored.
pub struct Putting {
    pub page: PageIndex,
    pub checksum: Checksum,
    pub bytes: PageSlice,
    /// What it follows from, where only a part of it is written.
    pub base: Option<Known>,
}

/// A page whose bytes are needed: for the client, or to be written in part.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub page: PageIndex,
    pub merge: bool,
    /// How often it was looked for in vain.
    pub tries: u32,
}

/// A page, and where it lies.
#[derive(Clone, Copy, Debug)]
pub struct Getting {
    pub wanted: Wanted,
    pub placement: Placement,
    pub checksum: Checksum,
}

/// What is to be done.
pub enum Work {
    /// Find out where pages are, and get them.
    Look { job: JobId, wanted: Vec<Wanted> },
    /// Get pages of one member.
    Get { job: JobId, getting: Vec<Getting> },
    /// Store pages, not at the members of this set.
    Put { job: JobId, putting: Vec<Putting>, not_at: u64 },
    /// Make pages zero.
    Zero { job: JobId, range: PageRange },
    /// Find out which pages are zero.
    Extents { job: JobId, range: PageRange },
}

/// What is outstanding on a link.
pub enum Part {
    Get { job: JobId, getting: Vec<Getting> },
    Put { job: JobId, putting: Vec<Putting>, not_at: u64 },
    Locate { lookup: u64 },
}

/// The requests of one connection.
pub struct Engine {
    pub shared: Arc<Shared>,
    pub jobs: Jobs,
    pub buffers: Buffers,
    pub links: Links<Part>,
    pub todo: Vec<Work>,
    pub lookups: HashMap<u64, Lookup>,
    pub next_lookup: u64,
    /// Works that wait for a time to come.
    pub later: Vec<(Instant, Work)>,
    /// Works that wait for the index thread.
    stalled: Vec<Work>,
    /// Until when members that cannot be reached are left alone.
    alone: HashMap<MemberIndex, Instant>,
    /// Until when others are asked for room first.
    pub full: HashMap<MemberIndex, Instant>,
    /// Batches, in turn.
    pub turn: usize,
    /// The index thread has something to do.
    pub pushed: bool,
    /// Losses of which the client was told.
    losses: u64,
    /// How often the volume was found anew.
    found: u64,
}

impl Engine {
    /// Without requests.
    pub fn new(shared: Arc<Shared>) -> Self {
        let losses = shared.own().map_or(0, |own| own.books().losses());
        let found = shared.view().map_or(0, View::found);
        let links = Links::new(shared.timeout);
        let buffers = Buffers::new(Arc::clone(&shared.spare));
        Self {
            shared,
            jobs: Jobs::default(),
            buffers,
            links,
            todo: Vec::new(),
            lookups: HashMap::new(),
            next_lookup: 0,
            later: Vec::new(),
            stalled: Vec::new(),
            alone: HashMap::new(),
            full: HashMap::new(),
            turn: 0,
            pushed: false,
            losses,
            found,
        }
    }

    /// Whether another request of so many bytes may begin.
    pub fn has_room(&self, bytes: usize) -> bool {
        let holds = bytes == 0 || self.buffers.has_room(bytes);
        let room = holds && self.jobs.has_room() && self.stalled.is_empty();
        room && self.shared.own().is_none_or(|own| {
            let has_room = || own.books().journal.has_room();
            // Who finds none says that he waits, and looks again: it may have come in between.
            has_room() || {
                own.await_index();
                has_room()
            }
        })
    }

    /// Begins a request that was checked. `payload` is what came with it.
    pub fn begin(&mut self, request: Request, payload: Option<Buffer>) {
        let buffer = match request.command {
            Command::Read => Some(self.buffers.take(request.length as usize)),
            _ => payload,
        };
        let job = self.jobs.add(Job::new(request, buffer));
        match request.command {
            Command::Read => self.begin_read(job, &request),
            Command::Write => self.begin_write(job, &request),
            Command::Trim | Command::WriteZeroes => self.begin_zero(job, &request),
            Command::BlockStatus => self.begin_extents(job, &request),
            Command::Flush => {
                let own = self.shared.own();
                own.into_iter().for_each(|own| self.jobs.settle_at(job, own.books().journal.now()));
            }
            Command::Disconnect | Command::Other => {
                self.jobs.fail(job, 0, Failure::new(Fault::Unsupported, "no such command"));
            }
        }
        // Its beginning is through.
        self.jobs.through(job, 1);
    }

    /// Does what can be done now, and returns what came to its end.
    pub fn progress(&mut self) -> Vec<Finished> {
        if self.shared.has_failed() {
            self.abandon();
            return self.jobs.finished(&mut self.buffers);
        }
        self.look_around();
        loop {
            while let Some(work) = self.todo.pop() {
                self.work(work);
            }
            if !self.links_progress() {
                break;
            }
        }
        self.settle();
        self.jobs.finished(&mut self.buffers)
    }

    /// What became due, and who is gone.
    fn look_around(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.later).into_iter().partition(|(at, _)| *at <= now);
        self.later = later;
        self.todo.extend(Vec::into_iter(due).map(|(_, work)| work));
        self.todo.append(&mut self.stalled);
        self.alone.retain(|_, until| *until > now);
        self.full.retain(|_, until| *until > now);
        let gone: Vec<MemberIndex> = match &self.shared.kind {
            Kind::Own(own) => {
                let books = own.books();
                let alive = |member: &MemberIndex| books.alive().get(member.as_usize()) == Some(&true);
                self.links.open_members().filter(|member| !alive(member)).collect()
            }
            Kind::View(view) => {
                let before = std::mem::replace(&mut self.found, view.found());
                let anew = before != self.found;
                self.links.open_members().filter(|_| anew).collect()
            }
        };
        for member in gone {
            let parts = self.links.close(member);
            parts.into_iter().for_each(|part| self.part_again(part));
        }
    }

    fn work(&mut self, work: Work) {
        match work {
            Work::Look { job, wanted } => self.look(job, wanted),
            Work::Get { job, getting } => self.get(job, getting),
            Work::Put { job, putting, not_at } => self.put(job, putting, not_at),
            Work::Zero { job, range } => self.zero(job, range),
            Work::Extents { job, range } => self.extents(job, range),
        }
    }

    /// A work that cannot be done before the index thread has got on.
    pub fn stall(&mut self, work: Work) {
        self.stalled.push(work);
    }

    /// Returns whether there is more to do.
    fn links_progress(&mut self) -> bool {
        let mut links = std::mem::replace(&mut self.links, Links::new(self.shared.timeout));
        let broken = links.progress(|member, part, result| self.ended(member, part, result));
        self.links = links;
        for broken in broken {
            tracing::warn!(member = %broken.member, error = broken.error.chain(), "a connection to an intermediary broke");
            if broken.gone {
                self.unreachable(broken.member, &broken.error);
            }
            broken.parts.into_iter().for_each(|part| self.part_again(part));
        }
        !self.todo.is_empty()
    }

    fn ended(&mut self, member: MemberIndex, part: Part, result: Result<Reply<'_>>) {
        match part {
            Part::Get { job, getting } => self.got(job, getting, result),
            Part::Put { job, putting, not_at } => self.stored(member, job, putting, not_at, result),
            Part::Locate { lookup } => self.located(lookup, result),
        }
    }

    /// A member cannot be had.
    fn unreachable(&mut self, member: MemberIndex, error: &Error) {
        if self.shared.own().is_some() {
            self.shared.lost(member, error);
        } else {
            tracing::warn!(%member, error = error.chain(), "an intermediary cannot be reached");
            self.alone.insert(member, Instant::now() + LEFT_ALONE);
        }
    }

    /// What was outstanding on a connection that is no more is to be done over another one, or elsewhere.
    pub fn part_again(&mut self, part: Part) {
        match part {
            Part::Get { job, getting } => {
                self.look_again(job, getting.into_iter().map(|getting| getting.wanted))
            }
            Part::Put { job, putting, not_at } => self.todo.push(Work::Put { job, putting, not_at }),
            Part::Locate { lookup } => {
                self.located(lookup, Err(Error::new(ErrorKind::Unreachable, "it broke")))
            }
        }
    }

    /// Sees to a connection to a member.
    pub fn connected(&mut self, member: MemberIndex) -> bool {
        if self.links.has(member) {
            return true;
        }
        if self.alone.contains_key(&member) {
            return false;
        }
        match self.shared.link(member) {
            Ok(link) => {
                self.links.open(member, link);
                true
            }
            Err(error) => {
                self.unreachable(member, &error);
                false
            }
        }
    }

    /// What a request's own error means for the volume. `true` when that is of no further use.
    pub fn is_fatal(&self, error: &Error) -> bool {
        match (&self.shared.kind, error.kind) {
            (Kind::View(view), ErrorKind::Fenced | ErrorKind::Volume) => {
                // It has another owner, whom it does no harm that it is read: it is found again under his epoch. Or
                // it is gone, and who looks for it finds that out.
                view.look();
                false
            }
            (Kind::Own(_), ErrorKind::Fenced | ErrorKind::Volume) => {
                let message = "another writer has taken the volume over, or it was dissolved";
                self.shared.fail(Error::new(error.kind, format!("{message}: {}", error.chain())));
                true
            }
            _ => false,
        }
    }

    /// Requests of which nothing is open are answered, some of them once the index servers know what they wrote.
    fn settle(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut safety = Safety { safe_below: u64::MAX, now: 0, lost: false };
        let mut losses = self.losses;
        if let Some(own) = shared.own() {
            if std::mem::take(&mut self.pushed) {
                own.index.wake();
            }
            if self.jobs.is_settling() {
                own.await_index();
                let books = own.books();
                losses = books.losses();
                safety = Safety {
                    safe_below: books.journal.safe_below(),
                    now: books.journal.now(),
                    lost: losses != self.losses,
                };
            }
        }
        if self.jobs.settle(safety, shared.timeout) {
            self.losses = losses;
        }
    }

    /// Everything that is under way fails.
    fn abandon(&mut self) {
        self.todo.clear();
        self.later.clear();
        self.stalled.clear();
        self.lookups.clear();
        for member in self.links.open_members().collect::<Vec<_>>() {
            drop(self.links.close(member));
        }
        self.jobs.abandon();
    }

    /// When there is something to do though nothing came.
    pub fn next_due(&self) -> Option<Instant> {
        let later = self.later.iter().map(|(at, _)| *at).min();
        // A member's silence, and an index server's, are looked at now and then.
        let looks = (!self.jobs.is_empty()).then(|| Instant::now() + LEFT_ALONE);
        later.into_iter().chain(looks).min()
    }

    /// What to wait for.
    pub fn awaited<'e>(&'e self, on: &mut Vec<(Option<BorrowedFd<'e>>, bool)>) {
        self.links.awaited(on);
    }

    /// The pages that a request touches.
    pub fn pages_of(request: &Request) -> PageRange {
        let first = request.offset / PAGE_BYTES_U64;
        let end = (request.offset + u64::from(request.length)).div_ceil(PAGE_BYTES_U64);
        PageRange::new(PageIndex(first as u32), (end - first) as u32)
    }
}
