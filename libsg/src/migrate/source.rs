//! The source's half of a migration: connect, hand over, scatter, evicted.
//!
//! [`start`] returns an [`Outgoing`] at once; a thread of its own (`sg-source`) does the rest.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::handover::{Handover, Members, connect_members};
use super::{Event, Mode, Observer, OutgoingVm};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::page::PageRange;
use crate::report::{Intermediary, SourceReport, Status};
use crate::scatter::session::{self, Destination, Listener, Session};
use crate::scatter::shared::panicked;
use crate::scatter::{MemberSink, Planner, Scatter};
use crate::source::{PageSource, Supply};
use crate::transport::PoolSecret;
use crate::usage;
use crate::vmd::Connector;
use crate::wire::message::Talk;

/// How a migration is to go.
#[derive(Clone)]
pub struct SourceOptions {
    /// Where the destination listens.
    pub to: SocketAddr,
    /// Intermediaries that may take pages. Those that cannot be reached are left out, with a warning.
    pub intermediaries: Vec<SocketAddr>,
    /// How the memory leaves.
    pub mode: Mode,
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

/// A VM that is leaving.
///
/// Dropped before COMMIT, the migration is cancelled and the VM runs on here. Dropped after COMMIT, it goes
/// on in the background until the pages are safe: only ending the process ends it before.
pub struct Outgoing {
    control: Arc<Control>,
}

#[derive(Default)]
struct State {
    phase: Phase,
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
    manifest.check()?;
    if options.intermediaries.len() > limits::MEMBERS_MAX {
        let message =
            format!("{} intermediaries, more than {}", options.intermediaries.len(), limits::MEMBERS_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    let control = Arc::new(Control {
        started: Instant::now(),
        state: Mutex::new(State::default()),
        changed: Condvar::new(),
        limit_bytes_per_s: options.scatter_limit_bytes_per_s.into(),
        cancelled: false.into(),
        left: false.into(),
        paused: false.into(),
    });
    (options.observer)(&Event::Started);
    let shared = control.clone();
    std::thread::Builder::new().name("sg-source".into()).spawn(move || {
        let observer = options.observer.clone();
        let guard = Ends(shared.clone());
        let manager = Manager { control: shared, vm, source, manifest, options };
        if let Err(error) = manager.run() {
            observer(&Event::Failed { kind: error.kind, message: error.chain() });
            guard.0.fail(&error);
        }
    })?;
    Ok(Outgoing { control })
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

    pub(super) fn mark_paused(&self) {
        self.paused.store(true, Ordering::Release);
    }

    pub(super) fn was_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    fn elapsed_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

impl Outgoing {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        let state = self.control.state.lock();
        let mut progress = state.heard;
        progress.committed = matches!(state.phase, Phase::Committed | Phase::Evicted);
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
            scatter.pacer.set_limit(bytes_per_s, Instant::now());
            scatter.wake_all();
        }
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
            let message = "COMMIT was given: the VM runs at the destination and cannot come back this way";
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
        let deadline = Instant::now() + timeout;
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
    /// As [`Self::wait_evicted`].
    pub fn wait_gathered(&self, timeout: Duration) -> Result<SourceReport> {
        let deadline = Instant::now() + timeout;
        self.wait_evicted(timeout)?;
        let mut state = self.control.state.lock();
        while state.gathered_s.is_none() {
            if let Some(Err(failure)) = &state.evicted {
                return Err(failure.into());
            }
            if self.control.changed.wait_until(&mut state, deadline).timed_out() || state.finished {
                return Err(Error::new(ErrorKind::Timeout, "the destination is still gathering"));
            }
        }
        drop(state);
        self.wait_evicted(Duration::ZERO)
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

impl Drop for Outgoing {
    fn drop(&mut self) {
        let _ = self.cancel();
        self.control.left.store(true, Ordering::Release);
        self.control.changed.notify_all();
    }
}

/// Hears the destination on behalf of the waiters.
impl Listener for Control {
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
            Talk::Failed { reason } | Talk::Abort { reason } => {
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

struct Manager {
    control: Arc<Control>,
    vm: Box<dyn OutgoingVm>,
    source: Arc<dyn PageSource>,
    manifest: Manifest,
    options: SourceOptions,
}

impl Manager {
    fn run(mut self) -> Result<()> {
        let volume = VolumeId::random()?;
        let epoch = Epoch::FIRST;
        let links = match self.options.mode {
            Mode::PostCopy => Vec::new(),
            Mode::ScatterGather => connect_members(&self.options, volume, epoch, &self.manifest),
        };
        self.control.check_cancelled()?;
        let destination =
            Destination { address: self.options.to, secret: self.options.secret.clone(), volume, epoch };
        let scatter = Arc::new(Scatter::new(
            (volume, epoch),
            self.source.clone(),
            links.iter().map(|link| link.member().clone()).collect(),
            Planner::new(&self.manifest, !links.is_empty()),
            self.options.scatter_limit_bytes_per_s,
            self.options.observer.clone(),
        )?);
        let mut members: Members = links.into_iter().map(Some).collect();
        {
            let mut state = self.control.state.lock();
            let limit = self.control.limit_bytes_per_s.load(Ordering::Relaxed);
            scatter.pacer.set_limit(limit, Instant::now());
            state.scatter = Some(scatter.clone());
        }
        let handover = Handover {
            control: &self.control,
            options: &self.options,
            manifest: &self.manifest,
            destination: &destination,
            scatter: &scatter,
            started: self.control.started,
        };
        // Before COMMIT nothing may leave the VM paused, not even a source of pages that panics.
        let mut open = None;
        let ready =
            catch_unwind(AssertUnwindSafe(|| handover.until_ready(&mut *self.vm, &mut members, &mut open)));
        let (session, paused_at) = match ready.unwrap_or_else(|_| Err(panicked("sg-source"))) {
            Ok(ready) => ready,
            Err(error) => {
                // Who called it off is told so, whatever else went wrong meanwhile.
                let error = self.control.check_cancelled().err().unwrap_or(error);
                return Err(handover.give_up(&mut *self.vm, &mut members, open, error));
            }
        };
        if let Err(error) = self.decide(&scatter) {
            return Err(handover.give_up(&mut *self.vm, &mut members, Some(session.control), error));
        }
        self.vm.committed();
        let (session, downtime) = handover.commit(session, &mut members, paused_at);
        self.scatter(&scatter, &destination, session, members, downtime)
    }

    /// The point of no return: after it, a cancel is refused.
    fn decide(&self, scatter: &Scatter) -> Result<()> {
        let mut state = self.control.state.lock();
        self.control.check_cancelled()?;
        if scatter.is_poisoned() {
            return Err(scatter.failure());
        }
        state.phase = Phase::Committed;
        Ok(())
    }

    fn scatter(
        &self,
        scatter: &Arc<Scatter>,
        destination: &Destination,
        session: Option<Session>,
        members: Members,
        downtime: Option<Duration>,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let _stops = Stops(scatter);
            let mut threads = Vec::new();
            for (at, link) in members.into_iter().enumerate() {
                let member = crate::ids::MemberIndex(at as u16);
                let Some(link) = link else { continue };
                let sink = MemberSink::new(scatter.clone(), member, link);
                let name = format!("sg-scatter-{member}");
                threads.push((
                    name.clone(),
                    std::thread::Builder::new().name(name).spawn_scoped(scope, || sink.run())?,
                ));
            }
            let control = &*self.control;
            let name = "sg-scatter-control";
            let keeper = std::thread::Builder::new()
                .name(name.into())
                .spawn_scoped(scope, move || session::keep(scatter, destination, session, control))?;
            let mut supply = self.supply(scatter)?;
            while scatter.done_at().is_none() && !scatter.stopping() {
                scatter.wait_done(Duration::from_millis(if supply == Supply::More { 5 } else { 100 }));
                if supply == Supply::More {
                    supply = self.supply(scatter)?;
                }
                if keeper.is_finished() {
                    break;
                }
            }
            if scatter.done_at().is_some() {
                self.evicted(scatter, downtime);
                self.linger(scatter, &keeper);
            }
            scatter.stop();
            for (name, thread) in threads {
                thread.join().map_err(|_| panicked(&name))?;
            }
            keeper.join().map_err(|_| panicked(name))??;
            if scatter.is_poisoned() { Err(scatter.failure()) } else { Ok(()) }
        })
    }

    fn supply(&self, scatter: &Scatter) -> Result<Supply> {
        scatter.take_supply(&mut Vec::new())
    }

    /// Nothing is left here: tells it, first of all.
    fn evicted(&self, scatter: &Scatter, downtime: Option<Duration>) {
        let eviction_s = scatter.done_at().map(|at| at.duration_since(self.control.started).as_secs_f64());
        let report = report(scatter, self.options.mode, eviction_s, downtime);
        (self.options.observer)(&Event::Evicted);
        let mut state = self.control.state.lock();
        state.evicted.get_or_insert(Ok(Box::new(report)));
        state.phase = Phase::Evicted;
        drop(state);
        self.control.changed.notify_all();
    }

    /// Stays reachable until the destination has everything or nobody holds the handle.
    fn linger<T>(&self, scatter: &Scatter, keeper: &std::thread::ScopedJoinHandle<'_, T>) {
        let mut state = self.control.state.lock();
        while state.gathered_s.is_none()
            && !self.control.left.load(Ordering::Acquire)
            && !scatter.stopping()
            && !keeper.is_finished()
        {
            self.control.changed.wait_for(&mut state, Duration::from_millis(100));
        }
    }
}

/// Ends the threads of a scope whatever way it is left.
struct Stops<'a>(&'a Scatter);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn report(
    scatter: &Scatter,
    mode: Mode,
    eviction_s: Option<f64>,
    downtime: Option<Duration>,
) -> SourceReport {
    let (tally, total, bytes, absent) = {
        let planner = scatter.planner.lock();
        (planner.tally(), planner.progress().1, planner.bytes(), planner.absent_pages())
    };
    let counters = &scatter.counters;
    let (direct, staged, wire) = (
        counters.direct.load(Ordering::Relaxed),
        counters.staged.load(Ordering::Relaxed),
        counters.wire.load(Ordering::Relaxed),
    );
    let mut report = SourceReport { mode: Some(mode.name().into()), eviction_s, ..SourceReport::default() };
    report.downtime_s = downtime.map(|time| time.as_secs_f64());
    report.pages.total = Some(total.into());
    report.pages.present = Some(u64::from(total) - u64::from(absent));
    report.pages.zero = Some(tally.zero);
    report.pages.direct = Some(tally.direct);
    report.pages.staged = Some(tally.staged);
    report.pages.referenced = Some(0);
    report.pages.hedged = Some(tally.hedged);
    report.pages.resent = Some(tally.resent);
    report.bytes.direct = Some(direct);
    report.bytes.staged = Some(staged);
    report.bytes.replicated = Some(0);
    report.bytes.dedup_saved = Some(0);
    report.bytes.overhead = Some(wire.saturating_sub(direct + staged));
    report.bytes.wire_total = Some(wire);
    report.intermediaries = scatter
        .members
        .iter()
        .zip(&counters.members)
        .map(|(member, bytes)| Intermediary {
            id: member.node.name.clone(),
            bytes_in: Some(bytes.load(Ordering::Relaxed)),
            ..Intermediary::default()
        })
        .collect();
    report.bookkeeping_bytes_per_page = Some(bytes as f64 / f64::from(total.max(1)));
    report.cpu_s = usage::cpu_s();
    report.peak_rss_bytes = usage::peak_rss_bytes();
    report
}
