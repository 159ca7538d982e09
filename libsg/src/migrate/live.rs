//! Rounds at the source, while the VM runs: what it writes while it is sent is sent again, until little is left, or
//! as often as was asked for. Nothing is decided in here: before COMMIT any failure leaves the VM running.

mod ears;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use self::ears::Ears;
use super::handover::{Lead, Lines};
use super::members::{self, Members, Seat};
use super::rounds::{Convergence, Rule};
use super::{Event, Mode, OutgoingVm};
use crate::dirty::DirtyLog;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::MemberIndex;
use crate::page::{PAGE_BYTES_U64, PageRange};
use crate::report::{Ended, Round};
use crate::scatter::offers;
use crate::scatter::session::converse;
use crate::scatter::shared::{PoisonsOnPanic, Stage};
use crate::scatter::telling::Feed;
use crate::scatter::{MemberSink, Scatter};
use crate::source::Supply;
use crate::transport::wait;
use crate::wire::message;

/// Rounds end when nobody has taken a page for so long: four tries of an intermediary that has no room.
const STALL: Duration = Duration::from_secs(2);

/// A destination that has gathered nothing for so long has what there is of a round: it tells ten times a second how
/// far it is.
const GATHERS: Duration = Duration::from_millis(300);

/// How often it is looked whether everything is safe, where there is no destination.
const TICK: Duration = Duration::from_millis(5);

/// What the rounds need, and what became of them.
pub(super) struct Rounds {
    log: Box<dyn DirtyLog>,
    /// Written since the last round began.
    dirty: Vec<PageRange>,
    pub told: Vec<Round>,
    pub ended: Option<Ended>,
}

impl Rounds {
    /// The log of a VM that is to be sent in rounds; `None` where there are to be none.
    ///
    /// # Errors
    /// Pre-copy of a VM that has no log: there is nothing to fall back to.
    pub fn prepare(lead: &Lead<'_>, vm: &mut dyn OutgoingVm, members: &Members) -> Result<Option<Self>> {
        let options = lead.options;
        let most = options.rounds.most(options.mode);
        if most == 0 || (options.mode == Mode::Hybrid && members.is_empty()) {
            return Ok(None);
        }
        match vm.dirty_log() {
            Ok(log) => Ok(Some(Self { log, dirty: Vec::new(), told: Vec::new(), ended: None })),
            Err(error) if options.mode == Mode::Hybrid => {
                let message = format!("no rounds, it is scattered from the switch on: {}", error.chain());
                (options.observer)(&Event::Warning { message });
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// What the destination is told of them.
    pub const fn kind(rounds: Option<&Self>, mode: Mode) -> message::Rounds {
        match (rounds, mode) {
            (None, _) | (_, Mode::ScatterGather | Mode::PostCopy) => message::Rounds::None,
            (Some(_), Mode::Hybrid) => message::Rounds::Staged,
            (Some(_), Mode::PreCopy) => message::Rounds::Installed,
        }
    }

    /// Sends rounds until the VM is to be paused.
    ///
    /// # Errors
    /// The log's, the source's of pages, the destination's; a cancel.
    pub fn run(
        &mut self,
        lead: &Lead<'_>,
        mut lines: Option<&mut Lines<'_>>,
        members: &mut Members,
    ) -> Result<()> {
        let scatter = lead.scatter;
        members::seat_all(scatter, members);
        scatter.set_stage(Stage::Rounds);
        // From here on every write is logged: what is read behind it is right, or sent again.
        self.log.start()?;
        scatter.take_stock()?;
        let options = lead.options;
        let (present, total) = {
            let planner = scatter.planner.lock();
            (planner.progress().1 - planner.absent_pages(), planner.progress().1)
        };
        let rule =
            Rule { rounds_max: options.rounds.most(options.mode), downtime: options.rounds.downtime_limit };
        let mut leg = Leg::begin(lead, Convergence::new(rule), 0, present.into());
        if total > 0 {
            let what = With { members: true, ready: false, offers: true };
            with_sinks(lead, lines.as_deref_mut(), members, what, &mut || leg.step(self))?;
        }
        match lines.filter(|_| options.mode == Mode::Hybrid) {
            Some(lines) => lead.tell_written(lines.control, &self.dirty),
            None => Ok(()),
        }
    }

    /// The VM is paused: nothing is written any more. The last round begins, and with it the final set stands.
    ///
    /// # Errors
    /// The log's.
    pub fn paused(&mut self, lead: &Lead<'_>) -> Result<()> {
        self.log.collect(&mut self.dirty)?;
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::WriteMissed) {
            self.dirty.clear();
        }
        lead.scatter.begin_round(&self.dirty);
        lead.scatter.take_withdrawn();
        self.dirty = Vec::new();
        let is_last = lead.options.mode == Mode::Hybrid;
        lead.scatter.set_stage(if is_last { Stage::Last } else { Stage::Handover });
        Ok(())
    }

    /// Pre-copy, with the VM paused: sends what is left to the destination, until that says READY, as it has every
    /// page in its last version.
    ///
    /// # Errors
    /// As [`Self::run`]; [`ErrorKind::Timeout`] when nothing moves for as long as READY may take.
    pub fn finish(lead: &Lead<'_>, lines: &mut Lines<'_>, members: &mut Members) -> Result<()> {
        let scatter = lead.scatter;
        let mut moved = (0, host::now());
        let what = With { members: false, ready: true, offers: false };
        with_sinks(lead, Some(lines), members, what, &mut || {
            lead.look()?;
            let sent = lead.control.heard_pages() + u64::from(scatter.planner.lock().progress().0);
            let now = host::now();
            if sent != moved.0 {
                moved = (sent, now);
            }
            if now.saturating_duration_since(moved.1) > lead.options.ready_timeout {
                return Err(Error::new(ErrorKind::Timeout, "the destination takes no pages any more"));
            }
            Ok(false)
        })?;
        // It has said that it holds them all; what it had no time to acknowledge is there.
        scatter.all_held();
        Ok(())
    }

    /// Nobody needs the log any more.
    pub fn stop(&mut self) {
        if let Err(error) = self.log.stop() {
            tracing::warn!(error = error.chain(), "the VM's writes are logged on");
        }
    }
}

/// The round that is under way.
struct Leg<'a> {
    lead: &'a Lead<'a>,
    convergence: Convergence,
    number: u16,
    pages: u64,
    since: Instant,
    /// Page bytes sent before it.
    before: u64,
    /// Pages that were through, those that the destination said it holds, and when that last changed.
    through: (u32, u64, Instant),
    feed: Feed,
}

impl<'a> Leg<'a> {
    fn begin(lead: &'a Lead<'a>, convergence: Convergence, number: u16, pages: u64) -> Self {
        (lead.options.observer)(&Event::Round { round: number, pages });
        let now = host::now();
        let before = sent_bytes(lead.scatter);
        Self {
            lead,
            convergence,
            number,
            pages,
            since: now,
            before,
            through: (0, 0, now),
            feed: Feed::default(),
        }
    }

    /// Looks whether the round is over, and begins the next one. Whether the VM is to be paused.
    fn step(&mut self, rounds: &mut Rounds) -> Result<bool> {
        let scatter = self.lead.scatter;
        self.lead.look()?;
        let supply = self.feed.turn(scatter)?;
        let (over, through, missing) = {
            let planner = scatter.planner.lock();
            let missing = if supply == Supply::AfterPause { planner.is_over_but_for() } else { None };
            let over = planner.is_round_over() || missing.is_some();
            (over, planner.progress().0 + planner.torn_pages(), missing.unwrap_or(0))
        };
        let now = host::now();
        // Hybrid does not wait for what the destination gathers.
        let gathers = self.lead.options.mode == Mode::PreCopy;
        let held = if gathers { self.lead.control.heard_pages() } else { 0 };
        if (through, held) != (self.through.0, self.through.1) {
            self.through = (through, held, now);
        }
        let idle = now.saturating_duration_since(self.through.2);
        let stalled = idle >= STALL;
        if over && idle < GATHERS && self.lags(held, now) {
            return Ok(false);
        }
        if !over {
            let hybrid = self.lead.options.mode == Mode::Hybrid;
            let alone = hybrid && scatter.index.alive() == 0;
            let stalled = hybrid && stalled;
            if !hybrid && idle >= self.lead.options.ready_timeout {
                return Err(Error::new(ErrorKind::Timeout, "the destination takes no pages any more"));
            }
            if alone || stalled {
                self.close(rounds, now, 0);
                rounds.ended = Some(Ended::NoRoom);
                let message = "no intermediary takes pages: the rest is sent from the switch on".into();
                (self.lead.options.observer)(&Event::Warning { message });
            }
            return Ok(alone || stalled);
        }
        rounds.log.collect(&mut rounds.dirty)?;
        let torn = u64::from(scatter.planner.lock().torn_pages());
        let written = rounds.dirty.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        let left = written + torn + u64::from(missing);
        let took = self.close(rounds, now, left);
        let sent = sent_bytes(scatter) - self.before;
        rounds.ended = self.convergence.round_over(sent, took, left * PAGE_BYTES_U64);
        if rounds.ended.is_some() {
            return Ok(true);
        }
        scatter.begin_round(&rounds.dirty);
        rounds.dirty.clear();
        (self.number, self.pages, self.since) = (self.number + 1, left, host::now());
        (self.before, self.through) = (sent_bytes(scatter), (0, 0, self.since));
        (self.lead.options.observer)(&Event::Round { round: self.number, pages: left });
        Ok(false)
    }

    /// Whether the destination has yet to gather more from intermediaries than fits the downtime limit: until it has, a
    /// paused VM would wait for that.
    fn lags(&self, held: u64, now: Instant) -> bool {
        let options = self.lead.options;
        if options.mode != Mode::PreCopy || self.lead.scatter.members.books().is_empty() {
            return false;
        }
        let total = u64::from(self.lead.scatter.planner.lock().progress().1);
        let left = total.saturating_sub(held) * PAGE_BYTES_U64;
        let sent = sent_bytes(self.lead.scatter) - self.before;
        let took = now.saturating_duration_since(self.since).as_secs_f64();
        left as f64 * took > sent as f64 * options.rounds.downtime_limit.as_secs_f64()
    }

    fn close(&self, rounds: &mut Rounds, now: Instant, dirty_after: u64) -> Duration {
        let took = now.saturating_duration_since(self.since);
        rounds.told.push(Round { pages: self.pages, s: took.as_secs_f64(), dirty_after });
        took
    }
}

fn sent_bytes(scatter: &Scatter) -> u64 {
    scatter.counters.direct.load(Ordering::Relaxed) + scatter.counters.staged.load(Ordering::Relaxed)
}

/// Which sinks run, and until when.
#[derive(Clone, Copy)]
pub(super) struct With {
    /// Those of intermediaries.
    pub members: bool,
    /// Until READY, too.
    pub ready: bool,
    /// Pages are offered ahead of the sinks, where they are shared.
    pub offers: bool,
}

/// Runs the sinks while the conversation with the destination goes on, if there is one, until `over` says so. The sinks
/// then stop where they are, and may go on later. Members that are lost are taken out.
pub(super) fn with_sinks(
    lead: &Lead<'_>,
    lines: Option<&mut Lines<'_>>,
    members: &mut Members,
    what: With,
    over: &mut dyn FnMut() -> Result<bool>,
) -> Result<()> {
    let scatter = lead.scatter;
    let ears = Ears::new(lead, what.ready);
    let over_now = AtomicBool::new(false);
    let (mut lost, mut joined) = (Vec::new(), Vec::new());
    let ran = std::thread::scope(|scope| {
        let ends = Ends(&over_now, scatter);
        let ended = || over_now.load(Ordering::Acquire) || scatter.stopping();
        let ears = &ears;
        let mut threads = Vec::new();
        for (at, seat) in members.iter_mut().enumerate().filter(|_| what.members) {
            let Some(sink) = seat.as_mut().and_then(Seat::sink) else { continue };
            let member = MemberIndex(at as u16);
            let thread = host::thread::Builder::new().name(format!("sg-scatter-{member}"));
            threads.push((at, thread.spawn_scoped(scope, move || run_sink(scatter, member, sink, ended))?));
        }
        let mut others = Vec::new();
        if what.offers && scatter.offers.get().is_some() {
            let thread = host::thread::Builder::new().name("sg-scatter-offers".into());
            others.push(thread.spawn_scoped(scope, move || offers::keep(scatter, ended))?);
        }
        let (control, sinks) =
            lines.map(|Lines { control, direct, urgent }| (control, (direct, urgent))).unzip();
        if let Some((direct, urgent)) = sinks.filter(|_| lead.options.mode == Mode::PreCopy) {
            let thread = |name: &str| host::thread::Builder::new().name(name.into());
            others.push(thread("sg-scatter-direct").spawn_scoped(scope, move || {
                let _poisons = PoisonsOnPanic(scatter.clone());
                ears.note(direct.run(ended));
            })?);
            others.push(thread("sg-scatter-urgent").spawn_scoped(scope, move || {
                let _poisons = PoisonsOnPanic(scatter.clone());
                ears.note(urgent.run(ended));
            })?);
        }
        let mut stepped = Ok(());
        let mut recruits = Vec::new();
        let mut step = || {
            let heard = ears.check();
            if what.members && heard.is_ok() {
                recruits.extend(start_recruit(lead, scope, ended));
            }
            let is_over = heard.and_then(|ready| Ok(over()? || ready));
            is_over.unwrap_or_else(|error| {
                stepped = Err(error);
                true
            })
        };
        let talked = match control {
            Some(control) => converse(scatter, control, ears, &mut step),
            None => look_on(scatter, &mut step),
        };
        drop(ends);
        // Whoever panicked has poisoned the scatter.
        others.into_iter().for_each(|thread| drop(thread.join()));
        for (at, thread) in threads {
            if !thread.join().unwrap_or(false) {
                lost.push(at);
            }
        }
        let seat = |thread: Recruited<'_>| thread.join().unwrap_or(None);
        joined.extend(recruits.into_iter().map(|thread| thread.and_then(seat)));
        ears.why(stepped.and(talked))
    });
    lost.into_iter().for_each(|at| members[at] = None);
    members.extend(joined);
    if scatter.is_poisoned() { Err(scatter.failure()) } else { ran }
}

/// The thread of a member's sink: whether it is not lost.
fn run_sink(
    scatter: &Arc<Scatter>,
    member: MemberIndex,
    sink: &mut MemberSink,
    ended: impl Fn() -> bool,
) -> bool {
    let _poisons = PoisonsOnPanic(scatter.clone());
    let ran = sink.run(ended);
    if let Err(error) = &ran
        && !scatter.is_poisoned()
    {
        scatter.member_lost(member, error);
    }
    ran.is_ok()
}

/// Without a destination there is nothing to say: looks on until `over` says so.
fn look_on(scatter: &Scatter, over: &mut dyn FnMut() -> bool) -> Result<()> {
    while !over() {
        wait(&[(Some(scatter.control_waker().as_fd()), false)], TICK)?;
        scatter.control_waker().drain();
    }
    Ok(())
}

/// Starts the thread of one who has become a member, if somebody has: one who could not be is a member all the same.
fn start_recruit<'scope>(
    lead: &Lead<'scope>,
    scope: &'scope std::thread::Scope<'scope, '_>,
    ended: impl Fn() -> bool + Send + 'scope,
) -> Option<Option<Recruited<'scope>>> {
    let scatter = lead.scatter;
    let (member, seat) = lead.recruiter.lock().look(scatter, false)?;
    let thread = host::thread::Builder::new().name(format!("sg-scatter-{member}"));
    let started = thread.spawn_scoped(scope, move || run_recruit(scatter, member, seat, ended));
    Some(started.map_err(|error| scatter.member_lost(member, &error.into())).ok())
}

/// A thread that gives its seat back.
type Recruited<'scope> = host::thread::ScopedJoinHandle<'scope, Option<Seat>>;

/// The thread of one who became a member meanwhile: its seat, unless it was lost.
fn run_recruit(
    scatter: &Arc<Scatter>,
    member: MemberIndex,
    mut seat: Seat,
    ended: impl Fn() -> bool,
) -> Option<Seat> {
    let _poisons = PoisonsOnPanic(scatter.clone());
    let ready = seat.wait_until_ready(scatter, member, &ended);
    if matches!(ready, Ok(true)) {
        seat = seat.seat(scatter, member);
    }
    let ran = ready.and_then(|_| seat.sink().map_or(Ok(()), |sink| sink.run(ended)));
    match ran {
        Ok(()) => Some(seat),
        Err(error) => {
            if !scatter.is_poisoned() {
                scatter.member_lost(member, &error);
            }
            None
        }
    }
}

/// Lets the sinks end, whatever way they are left.
struct Ends<'a>(&'a AtomicBool, &'a Scatter);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        self.1.wake_all();
    }
}
