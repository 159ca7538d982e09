//! What all threads of a scatter share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::copies::CopyDesk;
use super::index_router::IndexRouter;
use super::membership::Membership;
use super::offers::OfferDesk;
use super::planner::{Planner, Sink};
use super::table::Loser;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observer};
use crate::host::{self, Condvar};
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::pace::SharedPacer;
use crate::page::{PageIndex, PageRange};
use crate::source::{PageSource, Repeat, Supply};
use crate::transport::Waker;
use crate::wire::message::Member;
use crate::wire::{GetEntry, IndexEntry};

/// Announcements that may wait for a destination that does not take them: 1.5 MB. What does not fit is
/// dropped: they are a short cut, the index knows.
const ANNOUNCEMENTS_MAX: usize = 64 << 10;

/// Slots that may wait to be given back to one member: 1 MB. What does not fit waits in the planner's books.
const GIVEN_UP_MAX: usize = 64 << 10;

/// Bytes sent so far, by path. Relaxed counters: each is right, together they are a moment's view.
#[derive(Debug, Default)]
pub struct Counters {
    /// Page bytes to the destination.
    pub direct: AtomicU64,
    /// Page bytes to intermediaries.
    pub staged: AtomicU64,
    /// Page bytes that intermediaries sent on to others.
    pub replicated: AtomicU64,
    /// Everything written to sockets.
    pub wire: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// How far a scatter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The VM runs, and rounds are sent: what is torn waits for the next one.
    Rounds = 0,
    /// The VM is paused, and the last round is sent before COMMIT.
    Handover = 1,
    /// When all is safe, it has evicted.
    Last = 2,
}

/// Whether anything is left here.
#[derive(Debug, Default)]
struct Done {
    /// When the last page became safe.
    at: Option<Instant>,
    /// It was told: there is no way back.
    is_told: bool,
}

/// What all threads of a scatter share.
pub struct Scatter {
    /// The volume that is scattered.
    pub volume: VolumeId,
    /// The writer's epoch.
    pub epoch: Epoch,
    /// Where pages come from.
    pub source: Arc<dyn PageSource>,
    /// Its intermediaries, dead ones included.
    pub members: Membership,
    /// Which pages go where next. Locked briefly, never across input or output.
    pub planner: Mutex<Planner>,
    /// The source's link: the sum over all sinks.
    pub pacer: SharedPacer,
    /// The source forgets what is safe, and is told.
    pub(super) forgets: bool,
    /// Who gets which index entries.
    pub index: IndexRouter,
    /// Who gets copies of what another gets.
    pub copies: CopyDesk,
    /// Bytes sent.
    pub counters: Counters,
    /// Told of everything that happens.
    pub observer: Observer,
    /// Where pages are offered before they are sent.
    pub offers: OnceLock<OfferDesk>,
    announcements: Mutex<Vec<IndexEntry>>,
    stage: AtomicU8,
    control_waker: Arc<Waker>,
    direct_waker: Arc<Waker>,
    urgent_waker: Arc<Waker>,
    stop: AtomicBool,
    poisoned: AtomicBool,
    failure: Mutex<Option<Arc<Error>>>,
    percent: Mutex<u8>,
    done: Mutex<Done>,
    done_changed: Condvar,
}

impl Scatter {
    /// Everything but the threads. So many members shall hold each page, and so many bytes a second may leave, 0 being
    /// any number.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no event descriptors.
    pub fn new(
        (volume, epoch): (VolumeId, Epoch),
        source: Arc<dyn PageSource>,
        members: Vec<Member>,
        planner: Planner,
        (holders, limit_bytes_per_s): (usize, u64),
        observer: Observer,
    ) -> Result<Self> {
        let members = Membership::new(members)?;
        let forgets = source.repeat() != Repeat::Any;
        let urgent_waker = Arc::new(Waker::new()?);
        let wakes = Arc::clone(&urgent_waker);
        source.wake_for_wanted(Box::new(move || wakes.wake()));
        let planner = if forgets { planner.with_outcomes() } else { planner };
        Ok(Self {
            volume,
            epoch,
            source,
            forgets,
            planner: Mutex::new(planner),
            pacer: SharedPacer::new(host::now(), limit_bytes_per_s),
            index: IndexRouter::new(members.books().iter().map(|books| books.waker.clone()), holders),
            copies: CopyDesk::new(holders, members.first()),
            counters: Counters::default(),
            observer,
            offers: OnceLock::new(),
            members,
            announcements: Mutex::new(Vec::new()),
            stage: AtomicU8::new(Stage::Last as u8),
            control_waker: Arc::new(Waker::new()?),
            direct_waker: Arc::new(Waker::new()?),
            urgent_waker,
            stop: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            failure: Mutex::new(None),
            percent: Mutex::new(0),
            done: Mutex::new(Done::default()),
            done_changed: Condvar::new(),
        })
    }

    /// Takes presence and what is available from the source into the books. Called once the VM is paused.
    ///
    /// # Errors
    /// The source's.
    pub fn take_stock(&self) -> Result<()> {
        let presence = self.source.presence()?;
        let mut runs = Vec::new();
        self.source.available(&mut runs)?;
        let mut planner = self.planner.lock();
        presence.absent_runs().for_each(|run| planner.absent(run));
        runs.drain(..).for_each(|run| planner.available(run));
        drop(planner);
        self.wake_all();
        Ok(())
    }

    /// Takes pages that have become available since, from a source that is a stream.
    ///
    /// # Errors
    /// The source's.
    pub fn take_supply(&self, runs: &mut Vec<crate::page::PageRange>) -> Result<Supply> {
        let supply = self.given(self.source.available(runs))?;
        if !runs.is_empty() {
            let mut planner = self.planner.lock();
            runs.drain(..).for_each(|run| planner.available(run));
            drop(planner);
            self.wake_all();
        }
        Ok(supply)
    }

    /// The waker of a member's sink.
    #[must_use]
    pub fn member_waker(&self, member: MemberIndex) -> &Arc<Waker> {
        &self.members.books()[member].waker
    }

    /// The waker of the control connection's thread.
    #[must_use]
    pub const fn control_waker(&self) -> &Arc<Waker> {
        &self.control_waker
    }

    /// The waker of the direct sink.
    #[must_use]
    pub const fn direct_waker(&self) -> &Arc<Waker> {
        &self.direct_waker
    }

    /// The waker of the thread that answers faults.
    #[must_use]
    pub const fn urgent_waker(&self) -> &Arc<Waker> {
        &self.urgent_waker
    }

    /// Wakes every sink: there may be work.
    pub fn wake_all(&self) {
        self.wake_members();
        self.direct_waker.wake();
        self.control_waker.wake();
        self.urgent_waker.wake();
    }

    /// Wakes the sinks of all members.
    pub fn wake_members(&self) {
        self.members.books().iter().for_each(|books| books.waker.wake());
    }

    /// What the source of pages said. Where it failed, everything here ends: no peer is to blame, and nobody
    /// else has the pages.
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`], because of what the source said.
    pub fn given<T>(&self, said: Result<T>) -> Result<T> {
        said.map_err(|cause| {
            tracing::error!(error = cause.chain(), "the source gives no pages");
            self.failure.lock().get_or_insert_with(|| Arc::new(cause));
            self.poison();
            self.failure()
        })
    }

    /// Why it is poisoned.
    #[must_use]
    pub fn failure(&self) -> Error {
        match &*self.failure.lock() {
            Some(cause) => {
                let message = "the source of pages failed: it cannot give what it holds";
                Error::new(ErrorKind::Poisoned, message).because(Arc::clone(cause))
            }
            None => panicked("of a worker"),
        }
    }

    /// A worker panicked, or the source failed: nothing here can be relied on any more.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
        self.stop();
    }

    /// Whether a worker panicked, or the source failed.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Tells all threads to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake_all();
        self.done_changed.notify_all();
    }

    /// Whether all threads are to end.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Queues entries to be announced to the destination.
    pub fn announce(&self, entries: &[IndexEntry]) {
        let mut waiting = self.announcements.lock();
        let room = ANNOUNCEMENTS_MAX.saturating_sub(waiting.len());
        waiting.extend_from_slice(&entries[..entries.len().min(room)]);
    }

    /// Takes up to `max` announcements.
    pub fn take_announcements(&self, max: usize, out: &mut Vec<IndexEntry>) {
        out.clear();
        let mut waiting = self.announcements.lock();
        let n = waiting.len().min(max);
        out.extend(waiting.drain(..n));
    }

    /// A page's slots are of no use any more: those who live shall have them back. `false` where too many wait for that.
    pub fn give_up(&self, loser: Loser) -> bool {
        let all = self.members.books().iter().enumerate();
        let living = all.filter(|(at, _)| {
            let member = MemberIndex(*at as u16);
            loser.place.holders().contains(member) && !self.index.is_dead(member)
        });
        let mut lists: Vec<_> = living.map(|(_, books)| books.given_up.lock()).collect();
        let fits = lists.iter().all(|slots| slots.len() < GIVEN_UP_MAX);
        if fits {
            lists.iter_mut().for_each(|slots| slots.push(loser.entry()));
        }
        fits
    }

    /// Takes up to `max` slots that a member shall have back.
    pub fn take_given_up(&self, member: MemberIndex, max: usize, out: &mut Vec<GetEntry>) {
        let mut slots = self.members.books()[member].given_up.lock();
        let keep = slots.len().saturating_sub(max);
        out.extend(slots.drain(keep..));
    }

    /// It goes on to another stage.
    pub fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Release);
    }

    /// Whether it is at that stage.
    #[must_use]
    pub fn is_at(&self, stage: Stage) -> bool {
        self.stage.load(Ordering::Acquire) == stage as u8
    }

    /// Begins the next round.
    pub fn begin_round(&self, dirty: &[PageRange]) {
        self.planner.lock().begin_round(dirty, &mut |entry| self.give_up(entry));
        self.wake_all();
    }

    /// The VM is paused: takes what of the last round the source cannot give yet.
    pub fn take_withdrawn(&self) {
        if self.forgets {
            let mut runs = Vec::new();
            self.source.withdrawn(&mut runs);
            let mut planner = self.planner.lock();
            runs.into_iter().for_each(|run| planner.withdrawn(run));
        }
    }

    /// A connection of the destination is lost: what was in flight there is sent again.
    pub fn destination_lost(&self) {
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::FlightForgotten) {
            return;
        }
        let mut planner = self.planner.lock();
        planner.sink_lost(Sink::Direct);
        planner.sink_lost(Sink::Urgent);
        drop(planner);
        self.wake_all();
    }

    /// The destination has every page.
    pub fn all_held(&self) {
        let mut planner = self.planner.lock();
        let (_, total) = planner.progress();
        planner.held(PageRange::new(PageIndex(0), total));
        drop(planner);
        self.check_progress();
    }

    /// Whether it was told that nothing is left here.
    pub(super) fn has_told_done(&self) -> bool {
        self.done.lock().is_told
    }

    /// Looks whether everything is safe, and tells of progress. Called after acknowledgements.
    pub fn check_progress(&self) {
        if !self.is_at(Stage::Last) {
            // Rounds are looked at by who leads them.
            self.control_waker.wake();
            return;
        }
        let ((safe, total), is_done) = {
            let planner = self.planner.lock();
            (planner.progress(), self.is_done(&planner))
        };
        let percent = if total == 0 { 100 } else { (u64::from(safe) * 100 / u64::from(total)) as u8 };
        {
            let mut told = self.percent.lock();
            while *told + 5 <= percent {
                *told += 5;
                (self.observer)(&Event::Scattered { percent: *told });
            }
        }
        if is_done {
            let mut done = self.done.lock();
            if done.at.is_none() {
                done.at = Some(host::now());
                self.done_changed.notify_all();
                // The destination is told, and gathers as fast as it may.
                self.control_waker.wake();
            }
        }
    }

    /// Whether every page is safe, and would be found.
    fn is_done(&self, planner: &Planner) -> bool {
        let (safe, total) = planner.progress();
        #[cfg(feature = "simulation")]
        let total = if host::has_bug(host::Bug::EvictedEarly) { safe.max(total / 20 * 19) } else { total };
        safe == total && self.copies.are_open(self.index.living()) && self.are_known()
    }

    /// When the last page became safe.
    #[must_use]
    pub fn done_at(&self) -> Option<Instant> {
        self.done.lock().at
    }

    /// When the last page became safe, to tell it: from here on it is said. Where a member died since, and what it alone
    /// held is still here, there is nothing to tell yet.
    #[must_use]
    pub fn tell_done(&self) -> Option<Instant> {
        self.done_at()?;
        // With the planner held, a member's death comes before all of this or behind it.
        let mut planner = self.planner.lock();
        let mut done = self.done.lock();
        if !done.is_told && !self.is_done(&planner) {
            done.at = None;
        }
        done.is_told = done.at.is_some();
        if done.is_told {
            planner.close();
        }
        done.at
    }

    /// Waits until every page is safe, `stop` was called or `timeout` is over.
    pub fn wait_done(&self, timeout: Duration) -> Option<Instant> {
        let mut done = self.done.lock();
        if done.at.is_none() && !self.stopping() {
            self.done_changed.wait_for(&mut done, timeout);
        }
        done.at
    }
}

/// Held by a worker: tells everybody when it panics.
pub struct PoisonsOnPanic(pub Arc<Scatter>);

impl Drop for PoisonsOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.poison();
        }
    }
}

/// What a thread that panicked leaves to say.
#[must_use]
pub fn panicked(thread: &str) -> Error {
    Error::new(ErrorKind::Poisoned, format!("the thread {thread} panicked; the log has its message"))
}
