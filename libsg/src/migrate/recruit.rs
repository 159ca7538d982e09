//! Others in the place of intermediaries that die: named by who knows the pool, reached, and given the volume by a thread of
//! its own (`sg-scatter-recruit`), while the scatter goes on.
//!
//! ```text
//!  a member dies --> Replacements: who? --> connect, Create with the longer list     2 s each, in the background
//!                                              |
//!       the manager: it is a member now  <-----+     the VM's state, once there is one, and COMMIT go there first
//!         all living members and the destination are told of it
//!       its sink runs once it has answered, and somebody who outlives the source knows of it
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::members::{MEMBER_TIME, Seat, copies, dissolve_anew, put_state, zone};
use super::source::SourceOptions;
use super::{Event, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::JoinHandle};
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::limits::{MEMBERS_MAX, REPLACEMENTS_MAX};
use crate::manifest::Manifest;
use crate::scatter::Scatter;
use crate::scatter::shared::PoisonsOnPanic;
use crate::vmd::link::ask;
use crate::vmd::{Class, Connector, Request};
use crate::wire::final_set::Blobs;
use crate::wire::message::{Member, VmdRequest};

/// How many that are named for one place are tried.
const TRIES: usize = 3;

/// A place that a dead intermediary has left.
#[derive(Clone, Copy, Debug)]
pub struct Vacancy<'a> {
    /// Who died.
    pub dead: &'a Member,
    /// The volume's members that live.
    pub living: &'a [Member],
    /// Those that died, this one and others before it.
    pub gone: &'a [Member],
    /// Who was named for this place, and could not be had.
    pub tried: &'a [SocketAddr],
}

/// Knows of other intermediaries. Asked on a thread of its own, once for each that dies, and once more for each that was
/// named and could not be had.
pub trait Replacements: Send + Sync {
    /// Where another intermediary listens that may take the place; `None` where nobody can.
    fn replacement(&self, vacancy: &Vacancy<'_>) -> Option<SocketAddr>;
}

/// What a search needs; nothing of it changes.
struct Job {
    replacements: Arc<dyn Replacements>,
    connector: Arc<dyn Connector>,
    observer: Observer,
    manifest: Manifest,
    volume: VolumeId,
    epoch: Epoch,
    /// At how many members each page is to lie.
    replicas: u8,
}

/// A search for one place.
struct Search {
    thread: JoinHandle<()>,
    /// Nobody needs what it finds.
    over: Arc<AtomicBool>,
    /// Set when it has ended.
    found: Arc<Mutex<Option<Option<Recruit>>>>,
}

/// One who took the volume, and is no member yet.
pub(super) struct Recruit {
    seat: Seat,
    /// In whose place.
    dead: Member,
}

/// Looks for others in the place of members that die, one at a time.
pub(super) struct Recruiter {
    /// `None` where nobody is replaced.
    job: Option<Arc<Job>>,
    /// Members whose place was looked after.
    seen: [bool; MEMBERS_MAX],
    searches: usize,
    search: Option<Search>,
    /// The VM's state, as it was put to the volume; kept for those who come later.
    state: Option<Blobs>,
}

impl Recruiter {
    /// Nobody died yet.
    pub fn new(options: &SourceOptions, manifest: &Manifest, (volume, epoch): (VolumeId, Epoch)) -> Self {
        let job = options.replacements.clone().map(|replacements| {
            Arc::new(Job {
                replacements,
                connector: Arc::clone(&options.connector),
                observer: Arc::clone(&options.observer),
                manifest: manifest.clone(),
                volume,
                epoch,
                replicas: options.replicas,
            })
        });
        Self { job, seen: [false; MEMBERS_MAX], searches: 0, search: None, state: None }
    }

    /// Keeps what was put to the volume as its state, if somebody may need it.
    pub fn keep_state(&mut self, state: Blobs) {
        self.state = self.job.is_some().then_some(state);
    }

    /// Looks whether somebody died, and whether somebody was found. Who was found is a member from now on, told to all;
    /// once there is a state it was asked to take that, and after COMMIT, COMMIT. `None` where there is nobody new.
    pub fn look(&mut self, scatter: &Arc<Scatter>, committed: bool) -> Option<(MemberIndex, Seat)> {
        self.job.as_ref()?;
        if self.search.as_ref().is_some_and(|search| search.found.lock().is_some()) {
            let recruit = self.end_search()?;
            return self.join(scatter, recruit, committed);
        }
        if self.search.is_none() && !scatter.stopping() {
            self.search = self.begin(scatter).unwrap_or_else(|error| {
                // It goes on without: that is no reason to fail, least of all behind COMMIT.
                tracing::warn!(
                    error = error.chain(),
                    "nobody is looked for in the place of a dead intermediary"
                );
                None
            });
        }
        None
    }

    /// Whether somebody may yet be found.
    pub const fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// Begins to search for the next place that is empty.
    fn begin(&mut self, scatter: &Arc<Scatter>) -> Result<Option<Search>> {
        let members = scatter.members.list();
        let empty = |at: &usize| !self.seen[*at] && scatter.index.is_dead(MemberIndex(*at as u16));
        let Some(at) = (0..members.len()).find(empty) else { return Ok(None) };
        self.seen[at] = true;
        let Some(job) = self.job.clone() else { return Ok(None) };
        if self.searches >= REPLACEMENTS_MAX || members.len() >= MEMBERS_MAX {
            let message = format!("nobody takes the place of {}: too many have died", members[at].node);
            (job.observer)(&Event::Warning { message });
            return Ok(None);
        }
        self.searches += 1;
        let (dead, found) = (members[at].clone(), Arc::new(Mutex::new(None)));
        let (scatter, told) = (Arc::clone(scatter), Arc::clone(&found));
        let over = Arc::new(AtomicBool::new(false));
        let over_there = Arc::clone(&over);
        let thread = host::thread::Builder::new().name("sg-scatter-recruit".into()).spawn(move || {
            let _poisons = PoisonsOnPanic(Arc::clone(&scatter));
            let is_over = || scatter.stopping() || over_there.load(Ordering::Acquire);
            let recruit = job.search(&scatter, &members, dead, is_over);
            *told.lock() = Some(recruit);
            // Whoever leads looks again.
            scatter.control_waker().wake();
        })?;
        Ok(Some(Search { thread, over, found }))
    }

    /// What a search found, when it is over.
    fn end_search(&mut self) -> Option<Recruit> {
        let Search { thread, over, found } = self.search.take()?;
        over.store(true, Ordering::Release);
        // Whoever panicked has poisoned the scatter.
        let _ = thread.join();
        found.lock().take().flatten()
    }

    fn join(
        &self,
        scatter: &Arc<Scatter>,
        Recruit { mut seat, dead }: Recruit,
        committed: bool,
    ) -> Option<(MemberIndex, Seat)> {
        let new = seat.member().clone();
        let Some(member) = scatter.add_member(new.clone()).unwrap_or_else(|error| {
            tracing::warn!(error = error.chain(), "an intermediary that was found is not taken");
            None
        }) else {
            drop(seat);
            self.job.iter().for_each(|job| job.undo(&new));
            return None;
        };
        seat.tell_zone(scatter, member);
        let message = format!("intermediary {} takes the place of {}", new.node, dead.node);
        (scatter.observer)(&Event::NodeReplaced { message });
        if let Some(state) = &self.state {
            let commit = committed.then_some(Request::Control(&VmdRequest::Commit));
            let mut all = put_state(state).chain(commit);
            if let Err(error) = all.try_for_each(|request| seat.ask(request)) {
                scatter.member_lost(member, &error);
                return None;
            }
        }
        Some((member, seat))
    }

    /// Nobody is needed any more. Who took the volume and did not become a member has it dissolved.
    pub fn end(&mut self) {
        let recruit = self.end_search();
        if let (Some(Recruit { seat, .. }), Some(job)) = (recruit, self.job.take()) {
            let member = seat.member().clone();
            drop(seat);
            job.undo(&member);
        }
        (self.job, self.state) = (None, None);
    }
}

impl Job {
    /// Looks for one in the place of `dead` who takes the volume.
    fn search(
        &self,
        scatter: &Scatter,
        members: &[Member],
        dead: Member,
        is_over: impl Fn() -> bool,
    ) -> Option<Recruit> {
        let (mut living, mut gone) = (Vec::new(), Vec::new());
        for (at, member) in members.iter().enumerate() {
            let is_dead = scatter.index.is_dead(MemberIndex(at as u16));
            let side = if is_dead { &mut gone } else { &mut living };
            side.push(member.clone());
        }
        let mut tried = Vec::new();
        let mut why = String::from("nobody is named");
        while tried.len() < TRIES && !is_over() {
            let vacancy = Vacancy { dead: &dead, living: &living, gone: &gone, tried: &tried };
            let Some(address) = self.replacements.replacement(&vacancy) else { break };
            match self.recruit(address, members) {
                Ok(seat) => return Some(Recruit { seat, dead }),
                Err(error) => why = format!("{address}: {}", error.chain()),
            }
            tried.push(address);
        }
        if is_over() {
            return None;
        }
        let message = format!("nobody takes the place of intermediary {}: {why}", dead.node);
        (self.observer)(&Event::Warning { message });
        None
    }

    /// Creates the volume at one more, with all members and itself.
    fn recruit(&self, address: SocketAddr, members: &[Member]) -> Result<Seat> {
        let mut link = self.connector.connect(address, self.volume, self.epoch, Class::Bulk, MEMBER_TIME)?;
        let member = link.member().clone();
        if members.contains(&member) {
            return Err(Error::new(ErrorKind::Input, "it is, or was, a member already").at(&member.node));
        }
        let zone = zone(&mut *link, self.replicas)?;
        let list = members.iter().cloned().chain([member.clone()]).collect();
        let create = VmdRequest::Create { manifest: self.manifest.clone(), members: list };
        let copies = copies(self.replicas);
        let mut all = std::iter::once(&create).chain(copies.as_ref());
        match all.try_for_each(|request| ask(&mut *link, Request::Control(request), MEMBER_TIME, |_| Ok(())))
        {
            Ok(()) => Ok(Seat::new(link, zone)),
            Err(error) => {
                drop(link);
                // Its answer may be what was lost.
                self.undo(&member);
                Err(error)
            }
        }
    }

    /// One who is no member gives the volume back.
    fn undo(&self, member: &Member) {
        if let Err(error) = dissolve_anew(&*self.connector, (self.volume, self.epoch), member) {
            let (node, volume) = (&member.node, self.volume);
            let message =
                format!("{node} may still know of the volume: sg dissolve {volume} ({})", error.chain());
            (self.observer)(&Event::Warning { message });
        }
    }
}
