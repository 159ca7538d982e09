//! A link whose pages are written and read by a device, while everything else goes over its connection.
//!
//! ```text
//!   put: Lease -> write -> Settle      get: Reach -> read -> Release
//!                                      or:  read, where it was reached before
//! ```
//!
//! Each arrow is an answer on the connection, or the device's. Any number of puts and gets are under way at once, within
//! what an intermediary leases to one client. Until the intermediary has let the device in, and where it does not, pages go
//! over the connection as well.

mod calls;
mod hear;
mod job;
mod standing;
mod way;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::host;
use libsg::limits::{GRANTS_MAX, LEASED_SLOTS_MAX};
use libsg::transport::Waker;
use libsg::vmd::{AccessRequest, Answered, Class, Link as _, Request, TcpLink, Ticket};
use libsg::wire::Missing;
use libsg::wire::access::KeyEntry;
use libsg::{Error, ErrorKind, Result, ids::Placement, wire::PageEntry};
use rustix::event::epoll::{self, EventData, EventFlags};

use self::job::{Job, Spare};
use self::standing::Standing;
use self::way::{Half, Way};
use crate::connector::Said;
use crate::verbs::Device;

/// Pages that were read are released so many gets at a time, or with the next look.
const RELEASED_MAX: usize = GRANTS_MAX / 2;

/// A peer that nothing was heard of for so long, over the device, is knocked at.
const SILENT_MAX: Duration = Duration::from_secs(1);

/// One client's path to one intermediary.
#[derive(Debug)]
pub struct RdmaLink {
    /// Goes before all that jobs use.
    way: Way,
    control: TcpLink,
    device: Arc<dyn Device>,
    class: Class,
    said: Said,
    /// What its own requests on the connection are about.
    asked: HashMap<Ticket, Asked>,
    jobs: HashMap<u64, Job>,
    spare: Spare,
    next: u64,
    /// Jobs that wait for their turn to be asked for.
    waiting: VecDeque<u64>,
    /// Jobs that the device has ended.
    ended: Vec<u64>,
    /// Gets whose reads have ended.
    read: VecDeque<u64>,
    /// Gets that have ended, and how.
    got: VecDeque<(u64, Result<()>)>,
    standing: Standing,
    /// The end of a request that came over the connection, and was not taken yet.
    heard: Option<End>,
    /// Leases and pages kept at the peer, and slots of the former.
    grants: usize,
    leased: usize,
    /// To be released there.
    releases: Vec<Ticket>,
    /// The area whose bytes were shown last.
    shown: Option<usize>,
    stored: Vec<Option<Placement>>,
    entries: Vec<PageEntry>,
    keys: Vec<KeyEntry>,
    job_bytes: usize,
    /// Gets among the jobs.
    gets: usize,
    /// When the device last ended something.
    heard_at: Instant,
    written_bytes: u64,
    read_bytes: u64,
    poll: OwnedFd,
    poll_writes: bool,
    /// The caller may write nothing for now, and comes again by itself: room on the connection is no news to it.
    held: bool,
    /// Since the last time that anything could be posted there is more to post, or room for it: whoever waits is told once,
    /// as of room in a socket.
    news: bool,
    waker: Waker,
    failed: Option<Error>,
    dead: bool,
}

/// What a request on the connection was for.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Attach,
    Lease(u64),
    Settle(u64),
    Reach(u64),
    /// The same as the job.
    Stands(u64),
    /// Whether what this one keeps may be read on.
    Again(u64),
}

/// The end of a request, whose tables are where their kind has them.
#[derive(Debug)]
enum End {
    /// Of one that went over the connection.
    Plain(Ticket, Result<Answered>),
    Put(u64, Result<Missing>),
    Got(u64, Result<()>),
}

/// The caller's number of a request that went over the connection.
const fn plain(ticket: Ticket) -> Ticket {
    Ticket(ticket.0 * 2)
}

/// And of a job.
const fn own(job: u64) -> Ticket {
    Ticket(job * 2 + 1)
}

impl RdmaLink {
    pub(crate) fn new(control: TcpLink, device: Arc<dyn Device>, class: Class, said: Said) -> Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        if let Some(fd) = control.poll_fd() {
            epoll::add(&poll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        let waker = Waker::new()?;
        epoll::add(&poll, waker.as_fd(), EventData::new_u64(2), EventFlags::IN)?;
        Ok(Self {
            way: Way::Untried,
            control,
            device,
            class,
            said,
            asked: HashMap::new(),
            jobs: HashMap::new(),
            spare: Spare::default(),
            next: 0,
            waiting: VecDeque::new(),
            ended: Vec::new(),
            read: VecDeque::new(),
            got: VecDeque::new(),
            standing: Standing::new(class),
            heard: None,
            grants: 0,
            leased: 0,
            releases: Vec::new(),
            shown: None,
            stored: Vec::new(),
            entries: Vec::new(),
            keys: Vec::new(),
            job_bytes: 0,
            gets: 0,
            heard_at: host::now(),
            written_bytes: 0,
            read_bytes: 0,
            poll,
            poll_writes: false,
            held: false,
            news: false,
            waker,
            failed: None,
            dead: false,
        })
    }

    /// Asks the intermediary to let the device in, once there are pages.
    fn try_way(&mut self) -> Result<()> {
        if !matches!(self.way, Way::Untried) {
            return Ok(());
        }
        match Half::new(&*self.device) {
            Ok((half, endpoint)) => {
                let ticket = self.control.submit_access(AccessRequest::Attach(&endpoint))?;
                self.asked.insert(ticket, Asked::Attach);
                self.way = Way::Asked(half);
            }
            Err(error) => {
                self.way = Way::Closed;
                self.said.not_over_the_device(error)?;
            }
        }
        Ok(())
    }

    /// Whether pages that are put or wanted now go over the device.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(&self.way, Way::Open(open) if open.takes_jobs())
    }

    /// Whether pages wait until the way is open, since they may go no other.
    fn awaits_way(&self) -> bool {
        let may_open = match &self.way {
            Way::Untried | Way::Asked(_) => true,
            Way::Open(open) => !open.shut,
            Way::Closed => false,
        };
        may_open && self.said.is_strict()
    }

    /// Takes a put or get over the device, if that is open, or if it is to wait for it.
    fn take(&mut self, request: Request<'_>) -> Result<Option<Ticket>> {
        if !self.is_open() && !self.awaits_way() {
            return Ok(None);
        }
        request.check()?;
        let job = match request {
            Request::Put { entries, slices, copies } => self.spare.put(entries, slices, copies),
            Request::Get(wanted) => self.spare.get(wanted, &[]),
            Request::GetKnown { wanted, known } => self.spare.get(wanted, known),
            _ => return Ok(None),
        };
        self.next += 1;
        self.job_bytes += job.bytes();
        self.gets += usize::from(matches!(job, Job::Get(_)));
        self.jobs.insert(self.next, job);
        self.waiting.push_back(self.next);
        self.ask()?;
        Ok(Some(own(self.next)))
    }

    /// Asks for what those that wait need, as far as the intermediary's bounds go.
    fn ask(&mut self) -> Result<()> {
        while let Some(&number) = self.waiting.front() {
            let Some(job) = self.jobs.get_mut(&number) else { return Ok(()) };
            let Way::Open(open) = &mut self.way else { return Ok(()) };
            if open.shut {
                self.waiting.pop_front();
                self.stand_in(number)?;
                continue;
            }
            if !open.takes_jobs() {
                return Ok(());
            }
            let may_ask = self.grants < GRANTS_MAX;
            let asked = match job {
                Job::Put(put) => {
                    if !may_ask || self.leased + put.entries.len() > LEASED_SLOTS_MAX {
                        return Ok(());
                    }
                    put.lease = self.control.submit_access(AccessRequest::Lease(put.entries.len()))?;
                    self.leased += put.entries.len();
                    (put.lease, Asked::Lease(number))
                }
                Job::Get(get) => {
                    let is_kept = !get.known.is_empty()
                        && self.standing.reads(&get.wanted, &mut self.keys, &mut get.kept_by);
                    if !is_kept && !may_ask {
                        return Ok(());
                    }
                    match open.land(get.wanted.len()) {
                        Ok(Some(area)) => get.area = area,
                        landed => {
                            self.standing.has_read(&mut get.kept_by, &mut self.releases);
                            let Err(error) = landed else { return Ok(()) };
                            open.shut = true;
                            self.said.not_over_the_device(error)?;
                            continue;
                        }
                    }
                    if is_kept {
                        open.read_known(number, get, &self.keys)?;
                        self.waiting.pop_front();
                        self.ask_again(number)?;
                        continue;
                    }
                    get.reach = self.control.submit_access(AccessRequest::Reach(&get.wanted))?;
                    (get.reach, Asked::Reach(number))
                }
            };
            self.grants += 1;
            self.asked.insert(asked.0, asked.1);
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// What a get is read in without asking is asked for again, now and then.
    fn ask_again(&mut self, number: u64) -> Result<()> {
        let Some(Job::Get(get)) = self.jobs.get(&number) else { return Ok(()) };
        if self.grants < GRANTS_MAX
            && let Some(kept) = self.standing.asks_again(&get.kept_by, host::now())
        {
            let ticket = self.control.submit_access(AccessRequest::Reach(&get.wanted[..1]))?;
            self.asked.insert(ticket, Asked::Again(kept));
            self.grants += 1;
        }
        Ok(())
    }

    /// The job goes over the connection instead.
    fn stand_in(&mut self, number: u64) -> Result<()> {
        if let Some(job) = self.jobs.get(&number) {
            let ticket = self.control.submit(job.request())?;
            self.asked.insert(ticket, Asked::Stands(number));
        }
        Ok(())
    }

    /// The way over the device leads nowhere any more for new pages, and for this job.
    fn shut(&mut self, number: u64, why: Error) -> Result<()> {
        if let Way::Open(open) = &mut self.way {
            open.shut = true;
        }
        self.said.not_over_the_device(why)?;
        self.stand_in(number)
    }

    /// Goes on with all that the device and the peer have said, until something has ended that is the caller's.
    fn advance(&mut self) -> Result<()> {
        self.reap()?;
        self.ask()?;
        while self.heard.is_none() {
            let Some((ticket, answer)) = self.control.answered() else { break };
            self.hear(ticket, answer)?;
            self.ask()?;
        }
        if let Way::Open(open) = &mut self.way {
            // Nobody keeps a pace of what is read: it was asked for at one.
            open.stream.post(0)?;
            if !open.stream.is_busy() && host::elapsed(self.heard_at) >= SILENT_MAX {
                open.stream.knock()?;
            }
        }
        Ok(())
    }

    /// What the device has ended goes on. Whether there was anything.
    fn reap(&mut self) -> Result<bool> {
        let Way::Open(open) = &mut self.way else { return Ok(false) };
        let was_proven = open.stream.is_proven();
        let any = match open.stream.reap(&mut self.ended) {
            Ok(any) => any,
            Err(lost) => {
                let error = lost.at(&self.control.member().node);
                if was_proven {
                    return Err(error);
                }
                // Nothing was ever done over it: no common network, then.
                self.way = Way::Closed;
                self.said.not_over_the_device(error)?;
                return Ok(false);
            }
        };
        if open.stream.is_proven() && !was_proven {
            self.said.over_the_device(self.device.name());
        }
        self.news |= any;
        if any {
            self.heard_at = host::now();
        }
        for number in self.ended.drain(..) {
            match self.jobs.get_mut(&number) {
                Some(Job::Put(put)) => {
                    open.written(put);
                    let entries = &put.granted;
                    let settle = AccessRequest::Settle { lease: put.lease, entries, copies: put.copies };
                    let ticket = self.control.submit_access(settle)?;
                    self.asked.insert(ticket, Asked::Settle(number));
                    self.grants -= 1;
                    self.leased -= put.entries.len();
                    self.written_bytes += put.pages_bytes() as u64;
                }
                Some(Job::Get(get)) => {
                    get.reading = false;
                    self.read.push_back(number);
                }
                None => {}
            }
        }
        while let Some(number) = self.read.pop_front() {
            match self.jobs.get_mut(&number) {
                Some(Job::Get(get)) if !get.kept_by.is_empty() => {
                    self.standing.has_read(&mut get.kept_by, &mut self.releases);
                    self.end_known(number)?;
                }
                _ => self.end_get(number)?,
            }
        }
        if self.releases.len() >= RELEASED_MAX {
            self.release()?;
        }
        Ok(any)
    }

    fn release(&mut self) -> Result<()> {
        if !self.releases.is_empty() {
            self.control.release(&self.releases)?;
            self.grants -= self.releases.len();
            self.releases.clear();
        }
        Ok(())
    }

    /// The job has ended.
    fn forget(&mut self, number: u64) {
        if let Some(mut job) = self.jobs.remove(&number) {
            self.job_bytes -= job.bytes();
            if let Job::Get(get) = &mut job {
                std::mem::swap(&mut self.entries, &mut get.entries);
                self.gets -= 1;
                if self.gets == 0 {
                    self.standing.is_idle(&mut self.releases);
                }
            }
            self.spare.keep(job);
        }
    }

    /// The next end of a request that is the caller's.
    fn next_end(&mut self) -> Result<Option<End>> {
        if let (Some(area), Way::Open(open)) = (self.shown.take(), &mut self.way) {
            open.give_back(area);
        }
        loop {
            self.advance()?;
            if let Some((number, result)) = self.got.pop_front() {
                return Ok(Some(End::Got(number, result)));
            }
            if let Some(end) = self.heard.take() {
                return Ok(Some(end));
            }
            // What comes from here on is seen by who waits.
            if let Way::Open(open) = &mut self.way
                && open.stream.is_busy()
            {
                open.stream.pair().arm()?;
                if self.reap()? {
                    continue;
                }
            }
            self.release()?;
            self.watch()?;
            if let Way::Open(open) = &self.way
                && open.stream.queued_bytes() > 0
                && std::mem::take(&mut self.news)
            {
                self.waker.wake();
            }
            return Ok(None);
        }
    }

    /// The link is of no further use; the device reaches nothing any more.
    fn lose(&mut self, error: Error) {
        self.way = Way::Closed;
        self.failed = Some(error);
    }

    fn check_alive(&mut self) -> Result<()> {
        match self.failed.take() {
            Some(error) => {
                self.dead = true;
                Err(error)
            }
            None if self.dead => {
                let message = "the link has failed before";
                Err(Error::new(ErrorKind::Unreachable, message).at(&self.control.member().node))
            }
            None => Ok(()),
        }
    }

    /// Writes and reads, without waiting.
    fn move_bytes(&mut self, write_bytes_max: usize) -> Result<usize> {
        self.waker.drain();
        self.release()?;
        self.advance()?;
        self.news = false;
        let mut written = 0;
        if let Way::Open(open) = &mut self.way {
            written = open.stream.post(write_bytes_max)?;
            // Whoever may write more writes at once: as to a socket that is not full.
            self.news = written > 0;
        }
        written += self.control.progress(write_bytes_max - written)?;
        self.held = write_bytes_max == 0 && self.control.queued_bytes() > 0;
        self.watch()?;
        Ok(written)
    }

    /// Who waits is woken by room on the connection where something is to be written there, and may be.
    fn watch(&mut self) -> Result<()> {
        let writes = self.control.queued_bytes() > 0 && !self.held;
        if writes != self.poll_writes
            && let Some(fd) = self.control.poll_fd()
        {
            let flags = if writes { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.poll, fd, EventData::new_u64(0), flags)?;
            self.poll_writes = writes;
        }
        Ok(())
    }
}
