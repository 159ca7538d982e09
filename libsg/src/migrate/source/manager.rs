//! The thread `sg-source`: from the first connection to "evicted".

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Control, Ends, Outgoing, Phase, SourceOptions, To, Unscattered};
use crate::error::Result;
use crate::host;
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::manifest::Manifest;
use crate::migrate::handover::{Handover, Lead};
use crate::migrate::live::Rounds;
use crate::migrate::members::{self, Members, Seat};
use crate::migrate::recruit::Recruiter;
use crate::migrate::{Event, Mode, OutgoingVm, Via};
use crate::page::PAGE_BYTES_U64;
use crate::report::{Intermediary, SourceReport};
use crate::scatter::offers::{self, OfferDesk};
use crate::scatter::session::{self, Destination, Session};
use crate::scatter::shared::{PoisonsOnPanic, Stage, panicked};
use crate::scatter::telling::Feed;
use crate::scatter::{Planner, Scatter};
use crate::source::{PageSource, Supply};
use crate::usage::{self, Cpu};

pub(super) struct Manager {
    pub(super) control: Arc<Control>,
    pub(super) vm: Box<dyn OutgoingVm>,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) manifest: Manifest,
    pub(super) options: SourceOptions,
}

/// What a manager works with.
pub(super) type Work = (Box<dyn OutgoingVm>, Arc<dyn PageSource>, Manifest, SourceOptions);

/// Starts the manager's thread, which leads it so.
pub(super) fn spawn(
    control: Arc<Control>,
    lead: impl FnOnce(Manager) -> Result<()> + Send + 'static,
    (vm, source, manifest, options): Work,
) -> Result<Outgoing> {
    (options.observer)(&Event::Started);
    let shared = control.clone();
    host::thread::Builder::new().name("sg-source".into()).spawn(move || {
        let observer = options.observer.clone();
        let guard = Ends(shared.clone());
        if let Err(error) = lead(Manager { control: shared, vm, source, manifest, options }) {
            observer(&Event::Failed { kind: error.kind, message: error.chain() });
            guard.0.fail(&error);
        }
    })?;
    Ok(Outgoing { control })
}

impl Manager {
    pub(super) fn run(mut self) -> Result<()> {
        let volume = VolumeId::random()?;
        let epoch = Epoch::FIRST;
        let mut members = match self.options.mode {
            Mode::PostCopy => Members::new(),
            Mode::PreCopy if self.options.rounds.via == Via::Direct => Members::new(),
            Mode::PreCopy | Mode::Hybrid | Mode::ScatterGather => {
                members::connect(&self.options, volume, epoch, &self.manifest)
            }
        };
        self.control.check_cancelled()?;
        let planner = Planner::new(&self.manifest, !members.is_empty());
        let has_rounds = self.options.rounds.most(self.options.mode) > 0;
        let scatter = Arc::new(Scatter::new(
            (volume, epoch),
            self.source.clone(),
            members::list(&members),
            if has_rounds { planner.with_rounds() } else { planner },
            (self.options.replicas.into(), self.options.scatter_limit_bytes_per_s),
            self.options.observer.clone(),
        )?);
        let numbered = (0..).map(MemberIndex).zip(members.iter().flatten());
        numbered.for_each(|(member, seat)| seat.tell_zone(&scatter, member));
        if let Some(sharing) = self.manifest.sharing.as_ref().filter(|_| !members.is_empty()) {
            let desk = OfferDesk::new(self.options.connector.hasher(sharing), &scatter.members.list())?;
            let _ = scatter.offers.set(desk);
        }
        {
            let mut state = self.control.state.lock();
            let limit = self.control.limit_bytes_per_s.load(Ordering::Relaxed);
            scatter.pacer.set_limit(limit, host::now());
            state.scatter = Some(scatter.clone());
        }
        let recruiter = Mutex::new(Recruiter::new(&self.options, &self.manifest, (volume, epoch)));
        let address = match &self.options.to {
            To::Destination(address) => *address,
            To::Parked { .. } => return self.park(&scatter, &recruiter, members),
        };
        let destination = Destination { address, secret: self.options.secret.clone(), volume, epoch };
        let (control, options) = (&*self.control, &self.options);
        let handover = Handover {
            lead: Lead { control, options, scatter: &scatter, recruiter: &recruiter },
            manifest: &self.manifest,
            destination: &destination,
            started: self.control.started,
        };
        // Before COMMIT nothing may leave the VM paused, not even a source of pages that panics.
        let (mut open, mut rounds) = (None, None);
        let ready = catch_unwind(AssertUnwindSafe(|| {
            handover.until_ready(&mut *self.vm, &mut members, &mut rounds, &mut open)
        }));
        let (session, paused_at) = match ready.unwrap_or_else(|_| Err(panicked("sg-source"))) {
            Ok(ready) => ready,
            Err(error) => {
                // Who called it off is told so, whatever else went wrong meanwhile.
                let error = self.control.check_cancelled().err().unwrap_or(error);
                return Err(handover.give_up(&mut *self.vm, &mut members, rounds, open, error));
            }
        };
        let unscattered = Unscattered::of(&scatter, (&self.options, &self.manifest));
        if let Err(error) = self.vm.note(&unscattered).and_then(|()| self.decide(&scatter)) {
            return Err(handover.give_up(&mut *self.vm, &mut members, rounds, Some(session.control), error));
        }
        self.vm.committed();
        let (session, downtime) = handover.commit(session, &mut members, paused_at);
        if let Some(rounds) = &mut rounds {
            rounds.stop();
        }
        #[cfg(feature = "simulation")]
        if session.is_none() && host::has_bug(host::Bug::ResumesAfterCommit) {
            self.vm.resume()?;
        }
        let left = Left { session, members, recruiter: &recruiter, rounds: rounds.as_ref(), downtime };
        self.scatter(&scatter, &destination, left)
    }

    /// The point of no return: after it, a cancel is refused.
    pub(super) fn decide(&self, scatter: &Scatter) -> Result<()> {
        let mut state = self.control.state.lock();
        self.control.check_cancelled()?;
        if scatter.is_poisoned() {
            return Err(scatter.failure());
        }
        (state.phase, state.committed) = (Phase::Committed, true);
        Ok(())
    }

    pub(super) fn scatter(
        &self,
        scatter: &Arc<Scatter>,
        destination: &Destination,
        left: Left<'_>,
    ) -> Result<()> {
        // What was sent before COMMIT may have been all.
        scatter.copies.close_all();
        scatter.set_stage(Stage::Last);
        scatter.check_progress();
        let recruiter = left.recruiter;
        let scattered = std::thread::scope(|scope| {
            let _stops = Stops(scatter);
            let mut threads = Vec::new();
            for (at, seat) in left.members.into_iter().enumerate() {
                let member = MemberIndex(at as u16);
                let Some(seat) = seat else { continue };
                threads.push(start_sink(scope, scatter, member, seat)?);
            }
            if scatter.offers.get().is_some() {
                let name = "sg-scatter-offers";
                let thread = host::thread::Builder::new().name(name.into());
                let over = || scatter.stopping() || scatter.done_at().is_some();
                threads.push((name.into(), thread.spawn_scoped(scope, move || offers::keep(scatter, over))?));
            }
            let (control, session) = (&*self.control, left.session);
            let name = "sg-scatter-control";
            let keeper = host::thread::Builder::new()
                .name(name.into())
                .spawn_scoped(scope, move || session::keep(scatter, destination, session, control))?;
            let mut feed = Feed::default();
            let done_at = loop {
                let supply = feed.turn(scatter)?;
                if let Some(at) = scatter.tell_done() {
                    break Some(at);
                }
                if keeper.is_finished() || scatter.stopping() {
                    break None;
                }
                if let Some((member, seat)) = recruiter.lock().look(scatter, true) {
                    match start_sink(scope, scatter, member, seat) {
                        Ok(thread) => threads.push(thread),
                        Err(error) => scatter.member_lost(member, &error),
                    }
                }
                scatter.wait_done(Duration::from_millis(if supply == Supply::Complete { 100 } else { 5 }));
            };
            if let Some(at) = done_at {
                self.evicted(scatter, at, (left.rounds, left.downtime));
                recruiter.lock().end();
                self.linger(scatter, &keeper);
            }
            scatter.stop();
            for (name, thread) in threads {
                thread.join().map_err(|_| panicked(&name))?;
            }
            keeper.join().map_err(|_| panicked(name))??;
            if scatter.is_poisoned() { Err(scatter.failure()) } else { Ok(()) }
        });
        recruiter.lock().end();
        scattered
    }

    /// Nothing is left here since then: tells it, first of all.
    pub(super) fn evicted(
        &self,
        scatter: &Scatter,
        at: Instant,
        (rounds, downtime): (Option<&Rounds>, Option<Duration>),
    ) {
        let eviction_s = at.duration_since(self.control.started).as_secs_f64();
        let mut report = report(scatter, self.options.mode, Some(eviction_s), downtime);
        report.rounds = rounds.map(|rounds| rounds.told.clone()).unwrap_or_default();
        report.rounds_ended = rounds.and_then(|rounds| rounds.ended);
        let used = Cpu::now().since(self.control.used);
        report.cpu_s = Some(used.process.as_secs_f64());
        report.migration_cpu_s = Some(used.migration.as_secs_f64());
        (self.options.observer)(&Event::Evicted);
        let mut state = self.control.state.lock();
        state.evicted.get_or_insert(Ok(Box::new(report)));
        state.phase = Phase::Evicted;
        drop(state);
        self.control.changed.notify_all();
    }

    /// Stays reachable until the destination has everything or nobody holds the handle.
    fn linger<T>(&self, scatter: &Scatter, keeper: &host::thread::ScopedJoinHandle<'_, T>) {
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

/// What the handover leaves to the scatter.
pub(super) struct Left<'a> {
    pub session: Option<Session>,
    pub members: Members,
    pub recruiter: &'a Mutex<Recruiter>,
    pub rounds: Option<&'a Rounds>,
    pub downtime: Option<Duration>,
}

type Named<'scope> = (String, host::thread::ScopedJoinHandle<'scope, ()>);

fn start_sink<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    scatter: &'scope Arc<Scatter>,
    member: MemberIndex,
    seat: Seat,
) -> Result<Named<'scope>> {
    let name = format!("sg-scatter-{member}");
    let thread = host::thread::Builder::new().name(name.clone());
    Ok((name, thread.spawn_scoped(scope, move || sink(scatter, member, seat))?))
}

/// The thread of a member: no page goes there before state and COMMIT are there.
fn sink(scatter: &Arc<Scatter>, member: MemberIndex, seat: Seat) {
    let _poisons = PoisonsOnPanic(scatter.clone());
    let over = || scatter.stopping();
    let ran = seat.settle(scatter, member, over).and_then(|sink| match sink {
        Some(mut sink) => sink.run(over),
        None => Ok(()),
    });
    if let Err(error) = ran
        && !scatter.is_poisoned()
    {
        scatter.member_lost(member, &error);
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
    report.pages.referenced = Some(tally.referenced);
    report.pages.hedged = Some(tally.hedged);
    report.pages.resent = Some(tally.resent);
    report.bytes.direct = Some(direct);
    report.bytes.staged = Some(staged);
    report.bytes.replicated = Some(counters.replicated.load(Ordering::Relaxed));
    report.bytes.dedup_saved = Some(tally.referenced * PAGE_BYTES_U64);
    report.bytes.overhead = Some(wire.saturating_sub(direct + staged));
    report.bytes.wire_total = Some(wire);
    report.intermediaries = scatter
        .members
        .books()
        .iter()
        .map(|books| Intermediary {
            id: books.member.node.name.clone(),
            bytes_in: Some(books.staged.load(Ordering::Relaxed)),
            ..Intermediary::default()
        })
        .collect();
    report.bookkeeping_bytes_per_page = Some(bytes as f64 / f64::from(total.max(1)));
    report.peak_rss_bytes = usage::peak_rss_bytes();
    report
}
