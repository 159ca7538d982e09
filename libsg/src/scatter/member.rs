//! The sink of one intermediary: pulls batches, stores them there, and puts the index entries that are
//! this member's to keep. One thread, one link, never waiting inside the link.

mod answers;
mod beside;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use self::answers::Sent;
use super::batch::Batch;
use super::index_router::Pending;
use super::load::Loaded;
use super::planner::{BatchId, Sink, Work};
use super::shared::{Counters, Scatter};
use super::spans::zero_entries;
use super::table::Loser;
use super::window::{AckTime, Window, nap};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Checksum, MemberIndex, MemberSet, Round};
use crate::limits::BATCH_PAGES;
use crate::pace::{Acquire, Class, LinkReading, Trickle};
use crate::page::{PAGE_BYTES, PageIndex};
use crate::transport::{wait, wait_writable};
use crate::vmd::{Link, Reply, Request, Ticket};
use crate::wire::{GetEntry, IndexEntry, ReferEntry};

/// How long a full intermediary is left alone.
const FULL_PAUSE: Duration = Duration::from_millis(500);

enum What {
    Put(BatchId, Vec<(PageIndex, Checksum)>, MemberSet),
    Index(Vec<Pending>, Rerouted),
    Refer(Vec<ReferEntry>),
    /// Of pages that lie there.
    Spread(BatchId, Vec<IndexEntry>, MemberSet),
    /// So many members.
    Members(usize),
    /// Whether a hint arrives matters to nobody.
    Hint,
}

/// Whether entries that are not acknowledged in time went another way already.
type Rerouted = bool;

struct Asked {
    ticket: Ticket,
    what: What,
    at: Instant,
}

/// The sink of one intermediary.
pub struct MemberSink {
    scatter: Arc<Scatter>,
    member: MemberIndex,
    link: Box<dyn Link>,
    link_paces: bool,
    /// What of a low pace the kernel does not keep.
    trickle: Trickle,
    asked: VecDeque<Asked>,
    loaded: Loaded,
    window: Window,
    ack_time: AckTime,
    full_until: Option<Instant>,
    index_sent: Instant,
    entries: Vec<IndexEntry>,
    losers: Vec<Loser>,
    drops: Vec<GetEntry>,
    spare_pages: Vec<Vec<(PageIndex, Checksum)>>,
    spare_entries: Vec<Vec<Pending>>,
    /// Requests of whoever leads the migration that were not answered.
    owes: Vec<Ticket>,
    /// Of how many members it was told.
    told_members: usize,
}

impl MemberSink {
    /// A sink over an open link.
    #[must_use]
    pub fn new(scatter: Arc<Scatter>, member: MemberIndex, link: Box<dyn Link>) -> Self {
        let now = host::now();
        let told_members = scatter.members.books()[member].knows.load(Ordering::Acquire);
        Self {
            scatter,
            member,
            link,
            link_paces: false,
            trickle: Trickle::new(now),
            asked: VecDeque::new(),
            loaded: Loaded::default(),
            window: Window::new(now),
            ack_time: AckTime::default(),
            full_until: None,
            index_sent: now,
            entries: Vec::new(),
            losers: Vec::new(),
            drops: Vec::new(),
            spare_pages: Vec::new(),
            spare_entries: Vec::new(),
            owes: Vec::new(),
            told_members,
        }
    }

    /// The link.
    #[must_use]
    pub fn link(&self) -> &dyn Link {
        &*self.link
    }

    /// Asks something beside the pages. [`Self::owes`] until it was answered.
    ///
    /// # Errors
    /// As [`Link::submit`].
    pub fn ask(&mut self, request: Request<'_>) -> Result<()> {
        self.owes.push(self.link.submit(request)?);
        Ok(())
    }

    /// Whether something that was asked beside the pages was not answered yet.
    #[must_use]
    pub fn owes(&self) -> bool {
        !self.owes.is_empty()
    }

    /// Moves bytes and takes the answers that came, while it does not run.
    ///
    /// # Errors
    /// The link's end, and a no to what was asked beside the pages.
    pub fn hear(&mut self) -> Result<()> {
        self.link.progress(usize::MAX)?;
        self.reap(host::now())
    }

    /// Runs until `ended` says so, which is asked each 20 ms at least, and whenever the member's waker is woken. What
    /// is under way then may go on later.
    ///
    /// # Errors
    /// The link failed: the member is lost.
    pub fn run(&mut self, ended: impl Fn() -> bool) -> Result<()> {
        let _ = crate::pace::precise_timers();
        let pacer_link = self.scatter.pacer.add_link(Class::Bulk);
        self.scatter.open(self.member);
        let mut ran = Ok(());
        while ran.is_ok() && !ended() {
            ran = self.step(pacer_link);
        }
        self.scatter.pacer.remove_link(pacer_link);
        ran
    }

    fn step(&mut self, pacer_link: crate::pace::LinkId) -> Result<()> {
        let now = host::now();
        let had_nothing = self.link.queued_bytes() == 0;
        let mut again = self.move_bytes(now)?;
        self.reap(now)?;
        self.tell_members(now)?;
        self.offer(now)?;
        self.spread(now)?;
        self.put_index(now)?;
        self.pull(now)?;
        if self.link_paces && (had_nothing || again.is_some()) {
            // The socket is not full, as far as is known: what was taken since follows at once. Where there is
            // nothing more, work is waited for.
            again = self.move_bytes(now)?;
            self.pull(now)?;
            again = again.filter(|_| self.link.queued_bytes() > 0);
        }
        self.look_for_late_entries(now);
        let path = self.link.path();
        let reading = LinkReading {
            delivered: path.delivered_bytes,
            queue_delay: path.send_delay,
            base_rtt: path.base_rtt,
            backlogged: path.unsent_bytes > 0 || self.link.queued_bytes() > 0,
        };
        let share = self.scatter.pacer.report(pacer_link, reading, now);
        self.link_paces = self.link.pace(share);
        self.trickle.set(now, share.filter(|_| self.link_paces));
        let idle = nap(!self.asked.is_empty());
        let until = again.unwrap_or(now + idle);
        let left = until.saturating_duration_since(host::now());
        // While the pacer says no, room in the socket is no news.
        let writing = again.is_none() && self.link.queued_bytes() > 0;
        let waker = self.scatter.member_waker(self.member);
        match self.link.poll_fd() {
            // Answers, and entries to be put, may wait until it is awake anyway: each would cost a wake of its own.
            Some(fd) if writing && self.link_paces && self.has_window() => wait_writable(fd, left)?,
            Some(fd) => wait(&[(Some(fd), writing), (Some(waker.as_fd()), false)], left).map(|_| ())?,
            // What is queued is answered as soon as it is moved; with nothing there, work is waited for.
            None => {
                let left = if writing { Duration::ZERO } else { left };
                wait(&[(Some(waker.as_fd()), false)], left).map(|_| ())?;
            }
        }
        waker.drain();
        Ok(())
    }

    /// Whether another batch may be outstanding.
    fn has_window(&self) -> bool {
        let batch_bytes = BATCH_PAGES * PAGE_BYTES;
        self.link.outstanding_bytes() + batch_bytes <= self.window.bytes().max(2 * batch_bytes)
    }

    /// Writes what the pacer grants, and reads. Returns when the pacer wants to be asked again.
    fn move_bytes(&mut self, now: Instant) -> Result<Option<Instant>> {
        let queued = self.link.queued_bytes();
        if queued == 0 {
            self.link.progress(0)?;
            return Ok(None);
        }
        if self.link_paces {
            let most = match self.trickle.allows(now) {
                Ok(most) => queued.min(most as usize),
                Err(at) => {
                    self.link.progress(0)?;
                    return Ok(Some(at));
                }
            };
            let written = self.link.progress(most)?;
            self.trickle.wrote(now, written);
            Counters::add(&self.scatter.counters.wire, written);
            return Ok((written == most).then_some(now));
        }
        match self.scatter.pacer.acquire(Class::Bulk, queued as u64, now) {
            Acquire::WaitUntil(at) => {
                self.link.progress(0)?;
                Ok(Some(at))
            }
            Acquire::Grant(granted) => {
                let written = self.link.progress(granted as usize)?;
                Counters::add(&self.scatter.counters.wire, written);
                if (written as u64) < granted {
                    self.scatter.pacer.give_back(Class::Bulk, granted - written as u64);
                    return Ok(None);
                }
                Ok((self.link.queued_bytes() > 0).then_some(now))
            }
        }
    }

    fn reap(&mut self, now: Instant) -> Result<()> {
        let mut any = false;
        while let Some(completion) = self.link.completion() {
            let Some(at) = self.asked.iter().position(|asked| asked.ticket == completion.ticket) else {
                if let Some(at) = self.owes.iter().position(|ticket| *ticket == completion.ticket) {
                    completion.result?;
                    self.owes.swap_remove(at);
                }
                continue;
            };
            let Some(asked) = self.asked.remove(at) else { continue };
            any = true;
            self.ack_time.took(now.saturating_duration_since(asked.at));
            match (asked.what, completion.result) {
                (What::Put(batch, pages, holders), Ok(Reply::Stored { placements, missing })) => {
                    self.window.acknowledged(pages.len() * PAGE_BYTES, now);
                    #[cfg(feature = "simulation")]
                    let counted_on = host::has_bug(host::Bug::UnitHalfStored).then(|| counted_on(placements));
                    #[cfg(feature = "simulation")]
                    let placements = counted_on.as_deref().unwrap_or(placements);
                    if placements.iter().any(Option::is_none) {
                        self.full_until = Some(now + FULL_PAUSE);
                    }
                    let sent =
                        Sent { scatter: &self.scatter, member: self.member, batch, holders, at: asked.at };
                    let outcome = (&mut self.entries, &mut self.losers);
                    sent.stored(&pages, (placements, missing), now, outcome);
                    self.spare_pages.push(pages);
                }
                (What::Put(batch, pages, holders), refused) => {
                    self.full_until = Some(now + FULL_PAUSE);
                    self.scatter.copies.landed(self.member, holders, (pages.len() * PAGE_BYTES) as u64);
                    self.scatter.planner.lock().failed(batch);
                    self.spare_pages.push(pages);
                    // One that has the volume no more has lost what it had of it.
                    refused.map(|_| ()).or_else(only_full)?;
                }
                (What::Refer(offers), answered) => {
                    let answers = match &answered {
                        Ok(Reply::Referred(answers)) => Some(*answers),
                        _ => None,
                    };
                    self.scatter.referred(self.member, &offers, answers);
                    answered.map(|_| ()).or_else(only_full)?;
                }
                (What::Spread(batch, pages, holders), answered) => {
                    let stored = match &answered {
                        Ok(Reply::Stored { placements, missing }) => Some((*placements, *missing)),
                        _ => None,
                    };
                    let sent =
                        Sent { scatter: &self.scatter, member: self.member, batch, holders, at: asked.at };
                    sent.spread(&pages, stored, now, (&mut self.entries, &mut self.losers));
                    answered.map(|_| ()).or_else(only_full)?;
                }
                (What::Hint, _) => {}
                (What::Members(members), answered) => {
                    answered?;
                    self.scatter.members.member_knows(self.member, members);
                    self.scatter.check_progress();
                }
                (What::Index(mut entries, _), Ok(_)) => {
                    self.scatter.indexed(self.member, &mut entries, &mut self.entries);
                    entries.clear();
                    self.spare_entries.push(entries);
                }
                (What::Index(entries, rerouted), Err(error)) => {
                    self.full_until = Some(now + FULL_PAUSE);
                    self.scatter.not_indexed(self.member, if rerouted { &[] } else { &entries });
                    only_full(error)?;
                }
            }
        }
        self.give_back();
        if any {
            self.scatter.check_progress();
        }
        Ok(())
    }

    /// After how long without an answer this member is not relied on.
    fn silence(&self) -> Duration {
        self.ack_time.late() * 2
    }

    fn is_silent(&self, now: Instant) -> bool {
        self.asked.iter().any(|asked| now.saturating_duration_since(asked.at) > self.silence())
    }

    /// Who is to hold the next batch; `None` while nobody can. Those that came later are named to it before.
    fn holders(&self, now: Instant) -> Option<MemberSet> {
        let living = self.scatter.index.living();
        let is_told = self.scatter.copies.counted(living).but(MemberSet::first(self.told_members)).is_empty();
        if is_told { self.scatter.copies.choose(self.member, living, now) } else { None }
    }

    /// Takes batches while there is room for them.
    fn pull(&mut self, now: Instant) -> Result<()> {
        let full = self.full_until.is_some_and(|until| now < until);
        if full || self.scatter.index.is_behind() || self.is_silent(now) {
            return Ok(());
        }
        let batch_bytes = BATCH_PAGES * PAGE_BYTES;
        while self.link.queued_bytes() < batch_bytes / 2 && self.has_window() {
            let Some(holders) = self.holders(now) else { break };
            let late = self.ack_time.late();
            let (work, round) = {
                let mut planner = self.scatter.planner.lock();
                (planner.next(Sink::Member(self.member), now, late), planner.round())
            };
            match work {
                None => break,
                Some(Work::Zeros(id, range)) => {
                    if !self.scatter.planner.lock().zeros_told(id) {
                        continue;
                    }
                    self.entries.clear();
                    self.entries.extend(zero_entries(range, round));
                    self.scatter.announce(&self.entries);
                    self.scatter.route(&self.entries);
                }
                Some(Work::Pages(id, batch)) => self.put((id, holders), &batch, round, now)?,
            }
        }
        Ok(())
    }

    fn put(
        &mut self,
        (id, holders): (BatchId, MemberSet),
        batch: &Batch,
        round: Round,
        now: Instant,
    ) -> Result<()> {
        self.scatter.given(self.loaded.load(&*self.scatter.source, batch, round))?;
        // A round that began meanwhile leaves nobody who waits for this.
        if !self.scatter.planner.lock().found_zero(id, self.loaded.zeros.iter().copied()) {
            return Ok(());
        }
        if !self.loaded.zeros.is_empty() {
            self.entries.clear();
            for zero in self.loaded.zero_entries(round) {
                self.entries.extend(zero_entries(zero.range(), round));
            }
            self.scatter.announce(&self.entries);
            self.scatter.route(&self.entries);
        }
        if self.loaded.entries.is_empty() {
            return Ok(());
        }
        let Loaded { entries, slices, .. } = &self.loaded;
        let ticket = self.link.submit(Request::Put { entries, slices, copies: holders })?;
        let mut pages = self.spare_pages.pop().unwrap_or_default();
        pages.clear();
        pages.extend(entries.iter().map(|entry| (entry.page, entry.checksum)));
        let bytes = (pages.len() * PAGE_BYTES) as u64;
        self.scatter.counters.staged.fetch_add(bytes, Ordering::Relaxed);
        self.scatter.members.books()[self.member].staged.fetch_add(bytes, Ordering::Relaxed);
        self.scatter.copies.sent(self.member, holders, bytes);
        if holders.len() < self.scatter.copies.holders() && !holders.is_empty() {
            self.scatter.tell_fewer(holders);
        }
        self.asked.push_back(Asked { ticket, what: What::Put(id, pages, holders), at: now });
        Ok(())
    }
}

impl Drop for MemberSink {
    /// What is under way is so no more.
    fn drop(&mut self) {
        for asked in &self.asked {
            let (pages, holders) = match &asked.what {
                What::Put(_, pages, holders) => (pages.len(), *holders),
                What::Spread(_, pages, holders) => (pages.len(), *holders),
                _ => continue,
            };
            self.scatter.copies.landed(self.member, holders, (pages * PAGE_BYTES) as u64);
        }
    }
}

/// No room is no failure.
fn only_full(error: Error) -> Result<()> {
    if error.kind == ErrorKind::Full { Ok(()) } else { Err(error) }
}

/// The bug that a simulation must find: the slots of an install unit are taken to follow one another.
#[cfg(feature = "simulation")]
fn counted_on(placements: &[Option<crate::ids::Placement>]) -> Vec<Option<crate::ids::Placement>> {
    let mut last = None;
    let next = |last: crate::ids::Placement| {
        let slot = crate::ids::SlotIndex(last.slot.0 + 1);
        crate::ids::Placement { slot, ..last }
    };
    let of_unit = placements.len() > BATCH_PAGES;
    let count = |at: &Option<crate::ids::Placement>| {
        last = at.or_else(|| last.filter(|_| of_unit).map(next));
        last
    };
    placements.iter().map(count).collect()
}

#[cfg(test)]
mod test {
    use std::net::SocketAddr;
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::ids::{Epoch, NodeId, VolumeId};
    use crate::manifest::{Manifest, Region};
    use crate::memory::{Backing, GuestMemory};
    use crate::page::InstallUnit;
    use crate::scatter::Planner;
    use crate::source::MemorySource;
    use crate::vmd::{Completion, PathSample};
    use crate::wire::message::Member;

    /// A link whose socket takes no more than `takes` bytes at a time.
    struct Narrow {
        member: Member,
        queued: usize,
        takes: usize,
    }

    impl Link for Narrow {
        fn member(&self) -> &Member {
            &self.member
        }
        fn submit(&mut self, _: Request<'_>) -> Result<Ticket> {
            Ok(Ticket(1))
        }
        fn progress(&mut self, write_bytes_max: usize) -> Result<usize> {
            let written = self.queued.min(write_bytes_max).min(self.takes);
            self.queued -= written;
            Ok(written)
        }
        fn completion(&mut self) -> Option<Completion<'_>> {
            None
        }
        fn queued_bytes(&self) -> usize {
            self.queued
        }
        fn outstanding_bytes(&self) -> usize {
            self.queued
        }
        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn path(&self) -> PathSample {
            PathSample::default()
        }
    }

    #[test]
    fn what_a_full_socket_took_is_counted() {
        let region =
            Region { name: "ram".into(), guest_address: None, length_bytes: 4096, unit: InstallUnit::Page };
        let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: vec![], sharing: None };
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).expect("memory");
        let node = NodeId { name: "i1".into(), incarnation: 1 };
        let member = Member { node, address: SocketAddr::from(([127, 0, 0, 1], 1)) };
        let scatter = Scatter::new(
            (VolumeId(1), Epoch::FIRST),
            Arc::new(MemorySource::new(memory)),
            vec![member.clone()],
            Planner::new(&manifest, true),
            (1, 0),
            Arc::new(|_| {}),
        );
        let scatter = Arc::new(scatter.expect("a scatter"));
        let queued = 5000;
        let narrow = Narrow { member, queued, takes: 600 };
        let mut sink = MemberSink::new(scatter.clone(), MemberIndex(0), Box::new(narrow));
        let deadline = Instant::now() + Duration::from_secs(10);
        while sink.link.queued_bytes() > 0 {
            sink.move_bytes(Instant::now()).expect("moves");
            let left = sink.link.queued_bytes();
            assert_eq!(scatter.counters.wire.load(Ordering::Relaxed), (queued - left) as u64);
            assert!(Instant::now() < deadline, "{left} bytes are left");
        }
    }
}
