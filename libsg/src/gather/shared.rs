//! What the workers of one gather share: the books, the sink, the pacer, and who waits for whom.
//!
//! Nothing here is held locked across input or output.

mod members;
mod rounds;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::desk::MemberDesk;
use super::tracker::{Counts, Tracker, Word};
use crate::content::ContentHasher;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observer};
use crate::host;
use crate::ids::{Checksum, Epoch, MemberIndex, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::pace::SharedPacer;
use crate::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use crate::sink::{InstallOutcome, PageSink};
use crate::transport::{Channel, Waker};
use crate::vmd::Connector;
use crate::wire::IndexEntry;
use crate::wire::message::{Member, Rounds};

/// Pages that wait to be asked from the source; what does not fit is found again by the next search.
const WISHES_MAX: usize = 256;

/// A direct path on which nothing came for this long leaves its bandwidth to prepaging, before the
/// source has evicted.
const DIRECT_IDLE: Duration = Duration::from_millis(50);

/// Instead of the time at which something came last: it is still at work.
const DIRECT_WORKS: u64 = u64::MAX;

/// How long an installation that the kernel puts off waits until it is tried again: for the fault
/// thread to read the event that stands in its way.
const RETRY_AFTER: Duration = Duration::from_micros(50);

/// What a gather is made of.
pub(crate) struct Setup {
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub manifest: Manifest,
    pub members: Vec<Member>,
    pub sink: Arc<dyn PageSink>,
    pub connector: Arc<dyn Connector>,
    /// Bytes/s; 0 is unlimited.
    pub gather_limit: u64,
    /// How long pages that only the source could have wait for it to come back.
    pub source_grace: Duration,
    /// How long pages that only a member could have wait for it to answer again.
    pub member_grace: Duration,
    pub observer: Observer,
    /// Another process may go on with what is in place.
    pub outlived: bool,
    /// What happens before the VM is paused.
    pub rounds: Rounds,
    /// Woken when something happened that whoever leads the conversation should look at.
    pub conductor: Waker,
}

/// Bytes by path, as they come.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Page bytes from the source.
    pub direct: AtomicU64,
    /// Page bytes from intermediaries.
    pub gathered: AtomicU64,
    /// All bytes read from and written to sockets of the source's direct and urgent connections, and
    /// of links.
    pub wire: AtomicU64,
    /// Copies whose bytes did not match their checksum, or were gone.
    pub copies_lost: AtomicU64,
}

/// Where the source stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourceState {
    /// It holds nothing that anyone needs.
    pub evicted: bool,
    /// Since when its control connection is lost; `None` while it is there.
    pub away_since: Option<Instant>,
}

pub(crate) struct Shared {
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub tracker: Mutex<Tracker>,
    pub sink: Arc<dyn PageSink>,
    pub pacer: SharedPacer,
    pub connector: Arc<dyn Connector>,
    /// Of the pages, where they are shared.
    hasher: Option<ContentHasher>,
    pub counters: Counters,
    pub observer: Observer,
    /// Another process may go on with what is in place: nothing else counts as held by the source.
    pub outlived: bool,
    pub source_grace: Duration,
    pub member_grace: Duration,
    /// Bytes of the largest frame that the source must be able to send: a whole unit.
    pub unit_pages: u32,
    members: RwLock<Vec<Arc<MemberDesk>>>,
    /// Members of whom an intermediary knows, and the source has not told.
    found_members: Mutex<Option<Vec<Member>>>,
    source: Mutex<SourceState>,
    rounds: Rounds,
    /// What goes to intermediaries in rounds is gathered meanwhile: the sink gives back what comes too early.
    gathers_early: bool,
    /// What may be installed is known: nothing that is announced is replaced any more.
    is_final: AtomicBool,
    final_at: Mutex<Option<Instant>>,
    running: AtomicBool,
    stopping: AtomicBool,
    dissolving: AtomicBool,
    failure: Mutex<Option<Arc<Error>>>,
    lost: Mutex<Vec<PageRange>>,
    /// Pages that the fault thread shall ask from the source though no guest waits.
    wishes: Mutex<Vec<PageIndex>>,
    /// Faults that were read while an installation was tried again.
    later: Mutex<Vec<PageIndex>>,
    relook: AtomicBool,
    started: Instant,
    direct_at_us: AtomicU64,
    pub direct: Mutex<Option<Channel>>,
    pub urgent: Mutex<Option<Channel>>,
    pub wake_fault: Waker,
    pub wake_direct: Waker,
    pub wake_index: Waker,
    conductor: Waker,
}

impl Shared {
    pub fn new(setup: Setup) -> Result<Self> {
        let now = host::now();
        let mut tracker = Tracker::new(&setup.manifest);
        tracker.set_members(setup.members.len());
        tracker.set_replaces(setup.rounds == Rounds::Installed);
        let gathers_early = setup.rounds == Rounds::Staged && setup.sink.can_replace();
        if gathers_early {
            tracker.install_early();
        }
        if setup.outlived {
            tracker.outlive();
        }
        let huge = setup.manifest.regions.iter().any(|region| region.unit == InstallUnit::Huge2M);
        let unit = if huge { InstallUnit::Huge2M } else { InstallUnit::Page };
        let shared = Self {
            volume: setup.volume,
            epoch: setup.epoch,
            tracker: Mutex::new(tracker),
            sink: setup.sink,
            pacer: SharedPacer::new(now, setup.gather_limit),
            hasher: setup.manifest.sharing.as_ref().map(|sharing| setup.connector.hasher(sharing)),
            connector: setup.connector,
            counters: Counters::default(),
            observer: setup.observer,
            outlived: setup.outlived,
            source_grace: setup.source_grace,
            member_grace: setup.member_grace,
            unit_pages: unit.pages(),
            members: RwLock::new(Vec::new()),
            found_members: Mutex::new(None),
            source: Mutex::new(SourceState { evicted: false, away_since: None }),
            rounds: setup.rounds,
            gathers_early,
            is_final: AtomicBool::new(setup.rounds == Rounds::None),
            final_at: Mutex::new(None),
            running: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            dissolving: AtomicBool::new(false),
            failure: Mutex::new(None),
            lost: Mutex::new(Vec::new()),
            wishes: Mutex::new(Vec::new()),
            later: Mutex::new(Vec::new()),
            relook: AtomicBool::new(false),
            started: now,
            direct_at_us: AtomicU64::new(0),
            direct: Mutex::new(None),
            urgent: Mutex::new(None),
            wake_fault: Waker::new()?,
            wake_direct: Waker::new()?,
            wake_index: Waker::new()?,
            conductor: setup.conductor,
        };
        shared.add_members(&setup.members)?;
        shared.sink.in_place(&mut |range| shared.tracker.lock().in_place(range));
        Ok(shared)
    }

    /// Whether bytes that an intermediary gave are the page of this checksum, or were referred to by its seal.
    pub fn matches(&self, bytes: &[u8], checksum: Checksum) -> bool {
        match &self.hasher {
            Some(hasher) => hasher.matches(bytes, checksum),
            None => Checksum::of(bytes) == checksum,
        }
    }

    /// Takes what somebody says about where pages are.
    pub fn announce(&self, entries: &[IndexEntry], word: Word) -> Result<()> {
        let mut wanted = false;
        if self.waits_for_all() {
            entries.iter().try_for_each(|entry| self.zero_over(entry))?;
        }
        let mut told = [false; limits::MEMBERS_MAX];
        {
            let mut tracker = self.tracker.lock();
            for entry in entries {
                wanted |= tracker.announce(entry, word)?;
                if let Some(placement) = entry.placement
                    && let Some(told) = told.get_mut(placement.member.as_usize())
                {
                    *told = true;
                }
            }
        }
        for desk in self.members.read().iter().zip(told).filter_map(|(desk, told)| told.then_some(desk)) {
            desk.waker.wake();
        }
        if wanted {
            self.look_again();
        }
        self.progressed();
        Ok(())
    }

    /// Something was learned about a page that somebody waits for.
    pub fn look_again(&self) {
        self.relook.store(true, Ordering::Release);
        self.wake_fault.wake();
    }

    pub fn take_relook(&self) -> bool {
        self.relook.swap(false, Ordering::AcqRel)
    }

    /// Asks the source for a page that nobody waits for.
    pub fn wish(&self, page: PageIndex) {
        let mut wishes = self.wishes.lock();
        if wishes.len() < WISHES_MAX && !wishes.contains(&page) {
            wishes.push(page);
            self.wake_fault.wake();
        }
    }

    pub fn take_wishes(&self, out: &mut Vec<PageIndex>) {
        out.clear();
        out.append(&mut self.wishes.lock());
    }

    pub fn fault_for_later(&self, page: PageIndex) {
        self.later.lock().push(page);
        self.wake_fault.wake();
    }

    pub fn take_later(&self) -> Vec<PageIndex> {
        std::mem::take(&mut *self.later.lock())
    }

    pub fn counts(&self) -> Counts {
        self.tracker.lock().counts()
    }

    /// Tells the conductor when nothing is left to come, or nobody installs any more, as it wanted.
    pub fn progressed(&self) {
        let (counts, still) = {
            let tracker = self.tracker.lock();
            (tracker.counts(), tracker.is_still())
        };
        if still || counts.held + counts.lost == counts.total {
            self.conductor.wake();
        }
    }

    pub fn source(&self) -> SourceState {
        *self.source.lock()
    }

    pub fn set_evicted(&self) {
        self.source.lock().evicted = true;
        self.tracker.lock().evicted();
        self.wake_all();
    }

    /// The source's control connection is lost since then, or is there again.
    pub fn set_source_away(&self, since: Option<Instant>) {
        let before = std::mem::replace(&mut self.source.lock().away_since, since);
        if before.is_some() && since.is_none() {
            self.tracker.lock().ask_again(true);
        }
        self.wake_all();
        self.look_again();
    }

    /// A frame came on the direct path, and is at work until [`Self::direct_idles`].
    pub fn direct_works(&self) {
        self.direct_at_us.store(DIRECT_WORKS, Ordering::Relaxed);
    }

    /// Nothing of the direct path is at work from `now` on.
    pub fn direct_idles(&self, now: Instant) {
        let us = now.saturating_duration_since(self.started).as_micros() as u64;
        self.direct_at_us.store(us + 1, Ordering::Relaxed);
    }

    /// Whether prepaging waits for the direct path: until the source has evicted it takes only what
    /// direct leaves, and direct that does not use all of its credit is limited at the source, whose way here may be
    /// the same as the intermediaries'.
    pub fn direct_first(&self, now: Instant) -> bool {
        let source = self.source();
        if source.evicted || source.away_since.is_some() {
            return false;
        }
        let last = self.direct_at_us.load(Ordering::Relaxed);
        let us = now.saturating_duration_since(self.started).as_micros() as u64;
        // A destination that swaps is at one frame for longer than a network leaves between two.
        last == DIRECT_WORKS || (last > 0 && us.saturating_sub(last - 1) < DIRECT_IDLE.as_micros() as u64)
    }

    pub fn tell(&self, event: &Event) {
        (self.observer)(event);
    }

    /// A copy was not what it should be.
    pub fn copy_was_lost(&self, pages: &[PageIndex], member: MemberIndex) {
        self.counters.copies_lost.fetch_add(pages.len() as u64, Ordering::Relaxed);
        let name = self.member(member).map_or_else(String::new, |desk| desk.member.node.to_string());
        let ranges = PageRange::from_pages(pages.to_vec());
        let text: Vec<String> = ranges.iter().take(8).map(ToString::to_string).collect();
        tracing::error!(
            node = name,
            pages = text.join(","),
            "copies are gone or do not match their checksums"
        );
        let message = format!("{name}: lost copies of pages {}: trying other ways", text.join(","));
        self.tell(&Event::Warning { message });
        for page in pages {
            self.wish(*page);
        }
        self.wake_index.wake();
    }

    /// Pages are lost for good: who waits for them gets an error now.
    pub fn lose(&self, pages: Vec<PageIndex>) -> Result<()> {
        let count = pages.len() as u64;
        let ranges = PageRange::from_pages(pages);
        for range in &ranges {
            let mut first = range.first.0;
            let end = first + range.pages;
            while first < end {
                let mut pages = (end - first).min(limits::BATCH_PAGES_MAX as u32);
                {
                    // One call never crosses a region.
                    let tracker = self.tracker.lock();
                    while pages > 1 && !tracker.same_region(PageIndex(first), PageIndex(first + pages - 1)) {
                        pages -= 1;
                    }
                }
                self.sink.poison(PageRange::new(PageIndex(first), pages))?;
                first += pages;
            }
        }
        self.lost.lock().extend(ranges);
        // Only now may the memory be let go, and the end be told.
        self.tracker.lock().poisoned(count);
        self.conductor.wake();
        Ok(())
    }

    pub fn take_lost(&self) -> Vec<PageRange> {
        std::mem::take(&mut *self.lost.lock())
    }

    /// Installs bytes, however often the kernel puts it off. `between` runs between the tries.
    pub fn install(
        &self,
        range: PageRange,
        bytes: Option<&[u8]>,
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut rest = range;
        loop {
            let outcome: InstallOutcome = match bytes {
                Some(bytes) => {
                    let skip = (rest.first.0 - range.first.0) as usize * PAGE_BYTES;
                    self.sink.install(rest.first, &bytes[skip..])?
                }
                None => self.sink.install_zero(rest)?,
            };
            if outcome.is_pending() {
                let message = "this sink only takes pages over: gather acknowledges what is installed";
                return Err(Error::new(ErrorKind::Input, message).about([range]));
            }
            if self.replaces() {
                for run in outcome.already_present() {
                    self.replace(run, range.first, bytes)?;
                }
            }
            match outcome.retry() {
                None => return Ok(()),
                Some(left) => rest = left,
            }
            between()?;
        }
    }

    /// What threads that do not read the sink's events do between two tries.
    pub fn let_events_be_read(&self) -> Result<()> {
        self.wake_fault.wake();
        host::thread::sleep(RETRY_AFTER);
        if self.is_stopping() {
            return Err(Error::new(ErrorKind::Cancelled, "gather ends"));
        }
        Ok(())
    }

    /// COMMIT was given. Before that nothing can be lost: the VM is the source's.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    pub fn set_running(&self) {
        self.tracker.lock().set_replaces(false);
        self.running.store(true, Ordering::Release);
        self.wake_index.wake();
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Ends every worker.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake_all();
    }

    pub fn is_dissolving(&self) -> bool {
        self.dissolving.load(Ordering::Acquire)
    }

    /// Every page is here: the threads of the members give the volume's memory back and end.
    pub fn dissolve(&self) {
        self.dissolving.store(true, Ordering::Release);
        self.wake_all();
    }

    pub fn wake_all(&self) {
        self.wake_fault.wake();
        self.wake_direct.wake();
        self.wake_index.wake();
        for desk in self.members.read().iter() {
            desk.waker.wake();
        }
    }

    pub fn wake_conductor(&self) {
        self.conductor.wake();
    }

    /// The first failure stops everything.
    pub fn fail(&self, error: Error) {
        {
            let mut failure = self.failure.lock();
            if failure.is_none() && !(self.is_stopping() && error.kind == ErrorKind::Cancelled) {
                tracing::error!(error = error.chain(), "gather failed");
                *failure = Some(Arc::new(error));
            }
        }
        self.stop();
        self.conductor.wake();
    }

    pub fn failure(&self) -> Option<Arc<Error>> {
        self.failure.lock().clone()
    }
}
