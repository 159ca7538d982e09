//! The source's half of a migration: connect, hand over, scatter, evicted.
//!
//! [`start`] returns an [`Outgoing`] at once; a thread of its own (`sg-source`) does the rest.

mod manager;
mod parked;
mod parked_on;
mod resumed;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::manager::{Manager, spawn};
pub use self::resumed::{Unscattered, resume};
use super::{Mode, Observer, OutgoingVm, Replacements, RoundOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, Condvar};
use crate::limits;
use crate::manifest::Manifest;
use crate::pace::Told;
use crate::page::{PAGE_BYTES_U64, PageRange};
use crate::report::{SourceReport, Status};
use crate::scatter::Scatter;
use crate::scatter::session::Listener;
use crate::scatter::shared::panicked;
use crate::source::PageSource;
use crate::transport::PoolSecret;
use crate::usage::Cpu;
use crate::vmd::Connector;
use crate::wire::message::Talk;

/// Where a VM goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum To {
    /// To the destination that listens there.
    Destination(SocketAddr),
    /// To nobody yet: it is parked at the intermediaries, until a destination claims it
    /// ([`claim`](super::destination::claim())). It is paused until all of it is safe there, and only then COMMIT is given: where
    /// the intermediaries have no room it runs on here.
    Parked {
        /// What operators call it: at most [`limits::PARKING_NAME_BYTES_MAX`] bytes.
        name: String,
        /// The engine of the pool that says who may have it, as whoever claims it finds it ([`Engines`](crate::vmd::Engines));
        /// at most [`limits::ARBITER_BYTES_MAX`] bytes. `None` is an intermediary, its keeper, without which nobody gets the
        /// VM but by force.
        arbiter: Option<String>,
    },
}

impl From<SocketAddr> for To {
    fn from(address: SocketAddr) -> Self {
        Self::Destination(address)
    }
}

impl To {
    /// Parked under this name, with a keeper.
    pub fn parked(name: impl Into<String>) -> Self {
        Self::Parked { name: name.into(), arbiter: None }
    }

    fn check(&self, options: &SourceOptions) -> Result<()> {
        let Self::Parked { name, arbiter } = self else { return Ok(()) };
        let refuse = |what: String| Err(Error::new(ErrorKind::Input, what));
        let most = limits::PARKING_NAME_BYTES_MAX;
        if name.is_empty() || name.len() > most {
            return refuse(format!("the name of a parked VM has 1 to {most} bytes"));
        }
        let longest = limits::ARBITER_BYTES_MAX;
        if arbiter.as_ref().is_some_and(|arbiter| arbiter.len() > longest) {
            return refuse(format!("what a parked VM says of its arbiter has {longest} bytes at most"));
        }
        if !matches!(options.mode, Mode::ScatterGather | Mode::Hybrid) {
            return refuse(format!(
                "{} needs a destination: a VM is parked by scatter-gather or hybrid",
                options.mode.name()
            ));
        }
        if options.intermediaries.is_empty() {
            return refuse("a VM is parked at intermediaries: name some".into());
        }
        Ok(())
    }
}

/// How a migration is to go.
#[derive(Clone)]
pub struct SourceOptions {
    /// Where it goes.
    pub to: To,
    /// Intermediaries that may take pages. Those that cannot be reached are left out, with a warning.
    pub intermediaries: Vec<SocketAddr>,
    /// Names others in the place of those that die on the way; where there is none, nobody is replaced.
    pub replacements: Option<Arc<dyn Replacements>>,
    /// How many intermediaries hold each page that goes to any: all of them but one may die. From 1 to
    /// [`limits::COPIES_MAX`]. The source sends each page once; they send it on. With fewer intermediaries alive than
    /// that, as many as there are, with a warning.
    pub replicas: u8,
    /// How the memory leaves.
    pub mode: Mode,
    /// How rounds go, in the modes that have them.
    pub rounds: RoundOptions,
    /// The pool's secret.
    pub secret: PoolSecret,
    /// Makes links to the intermediaries.
    pub connector: Arc<dyn Connector>,
    /// The most that direct path and intermediaries together may send, bytes a second; 0 is no limit.
    /// Faults are exempt.
    pub scatter_limit_bytes_per_s: u64,
    /// How long the destination has to build and load the VM, before it stays here.
    pub ready_timeout: Duration,
    /// Is told of every event.
    pub observer: Observer,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceProgress {
    /// Pages that are safe outside of the source.
    pub safe_pages: u64,
    /// Pages in all.
    pub total_pages: u64,
    /// Page bytes sent to the destination.
    pub direct_bytes: u64,
    /// Page bytes sent to intermediaries.
    pub staged_bytes: u64,
    /// Faults that the destination has answered, as it last said.
    pub faults: u64,
    /// Pages that the destination holds, as it last said.
    pub held_pages: u64,
    /// Page bytes that the destination got from intermediaries, as it last said.
    pub gathered_bytes: u64,
    /// Whether COMMIT was given.
    pub committed: bool,
    /// Whether nothing is left here.
    pub evicted: bool,
}

/// What a source tells who divides the host's link between several VMs ([`Outgoing::backlog`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// What it has sent, and what its links show.
    pub told: Told,
    /// What it has left to send, about.
    pub left_bytes: u64,
}

/// A VM that is leaving.
///
/// Dropped before COMMIT, the migration is cancelled and the VM runs on here: without waiting for it, its log of written
/// pages is stopped, the intermediaries get their memory back, and VM and memory are let go. Dropped after COMMIT, it goes
/// on in the background until the pages are safe: only ending the process ends it before.
pub struct Outgoing {
    control: Arc<Control>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// COMMIT was given, however it ended.
    committed: bool,
    scatter: Option<Arc<Scatter>>,
    evicted: Option<std::result::Result<Box<SourceReport>, Failure>>,
    gathered_s: Option<f64>,
    heard: SourceProgress,
    finished: bool,
}

/// An error that every waiter is told.
#[derive(Clone)]
struct Failure {
    kind: ErrorKind,
    message: String,
    pages: Vec<PageRange>,
}

impl From<&Failure> for Error {
    fn from(failure: &Failure) -> Self {
        Self::new(failure.kind, failure.message.clone()).about(failure.pages.iter().copied())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Connecting,
    Committed,
    Evicted,
    Ended,
}

/// What manager, listeners and waiters share.
pub(super) struct Control {
    started: Instant,
    /// What was used before.
    used: Cpu,
    state: Mutex<State>,
    changed: Condvar,
    /// As it was last set, whether anything is sent yet or not.
    limit_bytes_per_s: AtomicU64,
    cancelled: AtomicBool,
    left: AtomicBool,
    paused: AtomicBool,
}

/// Starts a migration.
///
/// # Errors
/// [`ErrorKind::Input`] for a manifest or options out of bounds. Whatever happens later is told by the
/// handle.
pub fn start(
    vm: Box<dyn OutgoingVm>,
    source: Arc<dyn PageSource>,
    manifest: Manifest,
    options: SourceOptions,
) -> Result<Outgoing> {
    options.to.check(&options)?;
    check(&manifest, options.intermediaries.len(), options.replicas)?;
    spawn(Control::new(&options), Manager::run, (vm, source, manifest, options))
}

/// Whether these are within bounds.
fn check(manifest: &Manifest, members: usize, replicas: u8) -> Result<()> {
    manifest.check()?;
    if members > limits::MEMBERS_MAX {
        let message = format!("{members} intermediaries, more than {}", limits::MEMBERS_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    if !(1..=limits::COPIES_MAX).contains(&usize::from(replicas)) {
        let message = format!("{replicas} replicas of a page, not 1 to {}", limits::COPIES_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    Ok(())
}

/// However the manager's thread ends, who waits is told.
struct Ends(Arc<Control>);

impl Drop for Ends {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&panicked("sg-source"));
        }
        let mut state = self.0.state.lock();
        if let Some(scatter) = &state.scatter {
            scatter.stop();
        }
        state.finished = true;
        state.phase = Phase::Ended;
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Control {
    fn new(options: &SourceOptions) -> Arc<Self> {
        Arc::new(Self {
            started: host::now(),
            used: Cpu::now(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            limit_bytes_per_s: options.scatter_limit_bytes_per_s.into(),
            cancelled: false.into(),
            left: false.into(),
            paused: false.into(),
        })
    }

    fn fail(&self, error: &Error) {
        let failure = Failure { kind: error.kind, message: error.chain(), pages: error.pages.clone() };
        self.state.lock().evicted.get_or_insert(Err(failure));
        self.changed.notify_all();
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Cancelled, "the migration was cancelled; the VM stays here"));
        }
        Ok(())
    }

    /// There is no way back.
    fn set_committed(&self) {
        let mut state = self.state.lock();
        (state.phase, state.committed) = (Phase::Committed, true);
    }

    pub(super) fn is_committed(&self) -> bool {
        self.state.lock().phase != Phase::Connecting
    }

    pub(super) fn mark_paused(&self) {
        self.paused.store(true, Ordering::Release);
    }

    pub(super) fn was_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Pages that the destination holds, as it last said.
    pub(super) fn heard_pages(&self) -> u64 {
        self.state.lock().heard.held_pages
    }

    fn elapsed_s(&self) -> f64 {
        host::elapsed(self.started).as_secs_f64()
    }
}

impl Outgoing {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        let state = self.control.state.lock();
        let mut progress = state.heard;
        progress.committed = state.committed;
        progress.evicted = matches!(state.evicted, Some(Ok(_)));
        if let Some(scatter) = &state.scatter {
            let (safe, total) = scatter.planner.lock().progress();
            progress.safe_pages = safe.into();
            progress.total_pages = total.into();
            progress.direct_bytes = scatter.counters.direct.load(Ordering::Relaxed);
            progress.staged_bytes = scatter.counters.staged.load(Ordering::Relaxed);
        }
        progress
    }

    /// Bounds what direct path and intermediaries together send, from now on; 0 takes the bound away.
    pub fn set_scatter_limit(&self, bytes_per_s: u64) {
        let state = self.control.state.lock();
        self.control.limit_bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
        if let Some(scatter) = &state.scatter {
            scatter.pacer.set_limit(bytes_per_s, host::now());
            scatter.wake_all();
        }
    }

    /// Grants `bytes_per_s` of the host's link for so long, beside what is urgent, as a
    /// [`LinkDivision`](crate::pace::LinkDivision) says; `None` is any rate. Until then the source looks for no rate of its
    /// own, after it, it does again.
    pub fn grant(&self, bytes_per_s: Option<u64>, valid: Duration) {
        if let Some(scatter) = &self.control.state.lock().scatter {
            scatter.pacer.grant(bytes_per_s, host::now() + valid);
        }
    }

    /// What it has sent and has left, for who divides the host's link.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        let Some(scatter) = self.control.state.lock().scatter.clone() else { return Backlog::default() };
        let (safe, total) = scatter.planner.lock().progress();
        let sent =
            scatter.counters.direct.load(Ordering::Relaxed) + scatter.counters.staged.load(Ordering::Relaxed);
        Backlog { told: scatter.pacer.tell(host::now()), left_bytes: left_bytes(safe, total, sent) }
    }

    /// Calls it off. The VM runs on here.
    ///
    /// # Errors
    /// [`ErrorKind::Volume`] after COMMIT: the VM is the destination's, and there is no way back; or when the
    /// migration has ended already.
    pub fn cancel(&self) -> Result<()> {
        let state = self.control.state.lock();
        if state.phase == Phase::Ended {
            return Err(Error::new(ErrorKind::Volume, "the migration has ended: there is nothing to cancel"));
        }
        if state.phase != Phase::Connecting {
            let message = "COMMIT was given: the VM is the destination's, or whoever's who claims it, and does not come back";
            return Err(Error::new(ErrorKind::Volume, message));
        }
        self.control.cancelled.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits until nothing is left here that anyone needs: the process may be killed.
    ///
    /// # Errors
    /// Why it failed; [`ErrorKind::Timeout`] when it is not so far yet.
    pub fn wait_evicted(&self, timeout: Duration) -> Result<SourceReport> {
        let deadline = host::now() + timeout;
        let mut state = self.control.state.lock();
        loop {
            match &state.evicted {
                Some(Ok(report)) => {
                    let mut report = (**report).clone();
                    report.total_migration_s = state.gathered_s;
                    return Ok(report);
                }
                Some(Err(failure)) => return Err(failure.into()),
                None => {}
            }
            if self.control.changed.wait_until(&mut state, deadline).timed_out() {
                return Err(Error::new(ErrorKind::Timeout, "pages are still being scattered"));
            }
        }
    }

    /// Waits until the destination has said that it holds every page. The source need not live that long.
    ///
    /// # Errors
    /// As [`Self::wait_evicted`]; [`ErrorKind::Timeout`] at once for a VM that was parked.
    pub fn wait_gathered(&self, timeout: Duration) -> Result<SourceReport> {
        let deadline = host::now() + timeout;
        self.wait_evicted(timeout)?;
        let mut state = self.control.state.lock();
        while state.gathered_s.is_none() {
            if let Some(Err(failure)) = &state.evicted {
                return Err(failure.into());
            }
            if state.finished || self.control.changed.wait_until(&mut state, deadline).timed_out() {
                return Err(Error::new(ErrorKind::Timeout, "the destination is still gathering"));
            }
        }
        drop(state);
        self.wait_evicted(Duration::ZERO)
    }

    /// What its threads share, for a simulation that looks at them between two steps.
    #[cfg(feature = "simulation")]
    #[must_use]
    pub fn scatter(&self) -> Option<Arc<Scatter>> {
        self.control.state.lock().scatter.clone()
    }

    /// Whether it has come to its end: everything safe, or failed.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let state = self.control.state.lock();
        state.finished || state.evicted.is_some()
    }

    /// What is known by now, for a report of a migration that did not end well.
    #[must_use]
    pub fn report(&self) -> SourceReport {
        match self.wait_evicted(Duration::ZERO) {
            Ok(report) => report,
            Err(error) => SourceReport { status: Status::from(&error), ..SourceReport::default() },
        }
    }
}

/// What is left to send, by what pages have cost so far: many may be zero, or stored by others already.
fn left_bytes(safe: u32, total: u32, sent_bytes: u64) -> u64 {
    /// Pages by which it can be told.
    const PAGES: u32 = 4096;
    let left = u64::from(total.saturating_sub(safe)) * PAGE_BYTES_U64;
    let cost = sent_bytes as f64 / (f64::from(safe.max(1)) * PAGE_BYTES_U64 as f64);
    if safe < PAGES { left } else { (left as f64 * cost.clamp(0.01, 1.0)) as u64 }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let _ = self.cancel();
        self.control.left.store(true, Ordering::Release);
        self.control.changed.notify_all();
    }
}

/// Hears the destination on behalf of the waiters.
impl Listener for Control {
    fn has_gathered(&self) -> bool {
        self.state.lock().gathered_s.is_some()
    }

    fn heard(&self, talk: Talk) {
        let elapsed_s = self.elapsed_s();
        let mut state = self.state.lock();
        match talk {
            Talk::Progress { held_pages, faults, gathered_bytes, .. } => {
                state.heard = SourceProgress { held_pages, faults, gathered_bytes, ..state.heard };
            }
            Talk::Gathered => {
                state.gathered_s.get_or_insert(elapsed_s);
                self.changed.notify_all();
            }
            Talk::Failed { reason } | Talk::Abort { reason, .. } => {
                let message = format!("the destination failed: {reason}");
                let failure = Failure { kind: ErrorKind::Vm, message, pages: Vec::new() };
                // What is safe stays safe; the failure is told to who still waits.
                state.evicted.get_or_insert(Err(failure));
                if let Some(scatter) = &state.scatter {
                    scatter.stop();
                }
                self.changed.notify_all();
            }
            _ => {}
        }
    }
}
