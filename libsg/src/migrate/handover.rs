//! From the first connection to COMMIT and RUN, at the source. Until COMMIT every failure leaves the VM
//! running here; after it, nothing here ever runs it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::live::Rounds;
use super::members::{self, Members, Patience, ask_all, dissolve};
use super::recruit::Recruiter;
use super::source::{Control, SourceOptions};
use super::{Event, Mode, OutgoingVm};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::Round;
use crate::limits;
use crate::manifest::Manifest;
use crate::page::PageRange;
use crate::scatter::session::{Destination, Session, serve_while};
use crate::scatter::{DirectSink, Scatter, UrgentSink};
use crate::transport::{Channel, Conversation, wait};
use crate::vmd::Request;
use crate::wire::final_set::{self, Blobs};
use crate::wire::handshake::Purpose;
use crate::wire::message::{Talk, VmdRequest};

/// How often a wait looks whether the migration was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// A port at which others hold all places is tried again for so long, and so often. Who has not proven to know the secret
/// holds one for half of that.
const BUSY_MAX: Duration = Duration::from_secs(10);
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// A destination has so long to take out what was written since it came, before the VM is paused all the same.
const CLEARS: Duration = Duration::from_millis(300);

/// The connections to the destination, before COMMIT.
pub(super) struct Lines<'a> {
    pub(super) control: &'a mut Conversation,
    pub(super) direct: &'a mut DirectSink,
    pub(super) urgent: &'a mut UrgentSink,
}

/// What whoever leads the migration works with, wherever the VM goes.
pub(super) struct Lead<'a> {
    pub(super) control: &'a Control,
    pub(super) options: &'a SourceOptions,
    pub(super) scatter: &'a Arc<Scatter>,
    pub(super) recruiter: &'a Mutex<Recruiter>,
}

impl Lead<'_> {
    /// Whether it was called off, or the source of pages has failed.
    pub(super) fn look(&self) -> Result<()> {
        self.control.check_cancelled()?;
        if self.scatter.is_poisoned() { Err(self.scatter.failure()) } else { Ok(()) }
    }

    /// Tells the destination what was written since it was last sent, if anything: it takes out what it has of that while
    /// the VM still runs, and not while it is paused, and installs nothing more before it is. One that is slow to do so is not waited for: the final set says it again.
    pub(super) fn tell_written(&self, control: &mut Conversation, runs: &[PageRange]) -> Result<()> {
        // The one that begins when the VM is paused.
        let round = Round(self.scatter.planner.lock().round().0.saturating_add(1));
        let mut rest = runs;
        loop {
            let (some, behind) = rest.split_at(rest.len().min(limits::INDEX_ENTRIES_MAX));
            rest = behind;
            let written = Talk::Written { round, runs: some.to_vec(), last: rest.is_empty() };
            control.send_talk(&written, host::now() + self.options.ready_timeout)?;
            if rest.is_empty() {
                break;
            }
        }
        match self.expect(control, &Talk::Cleared, host::now() + CLEARS) {
            Err(error) if error.kind != ErrorKind::Timeout => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for one message, looking for a cancel in between.
    pub(super) fn expect(&self, control: &mut Conversation, wanted: &Talk, deadline: Instant) -> Result<()> {
        loop {
            self.look()?;
            match control.recv_talk(deadline.min(host::now() + LOOK)) {
                Ok(talk) if talk == *wanted => return Ok(()),
                // The last may be late: the destination was not waited for.
                Ok(Talk::Progress { .. } | Talk::Cleared) => {}
                Ok(other) => return Err(refused(other, &format!("where {wanted:?} belongs"))),
                Err(error) if error.kind == ErrorKind::Timeout && host::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The state as it travels, with the final set in front of it.
    pub(super) fn with_final_set(&self, state: &[u8]) -> Result<Blobs> {
        #[cfg(feature = "simulation")]
        let unnamed = host::has_bug(host::Bug::FinalSetUnnamed);
        #[cfg(not(feature = "simulation"))]
        let unnamed = false;
        let planner = self.scatter.planner.lock();
        let runs = planner.rounds().filter(|_| !unnamed);
        let piece_bytes = self.options.rounds.final_piece_bytes;
        let limits = final_set::Limits { runs_bytes: piece_bytes, ..final_set::Limits::default() };
        final_set::encode_within(limits, runs, state).ok_or_else(too_scattered)
    }

    /// Before COMMIT: the VM runs on here, and nothing logs what it writes; then `tell` tells the destination, if there is
    /// one, and the intermediaries are told. What `tell` gives is kept as long as that takes.
    pub(super) fn give_up<T>(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        rounds: Option<Rounds>,
        error: Error,
        tell: impl FnOnce(&Error) -> T,
    ) -> Error {
        self.scatter.stop();
        #[cfg(feature = "simulation")]
        let left = host::has_bug(host::Bug::LeftPaused);
        #[cfg(not(feature = "simulation"))]
        let left = false;
        let resumed = if self.control.was_paused() && !left { vm.resume() } else { Ok(()) };
        // What is told below may take seconds, in which the VM would be slow.
        if let Some(mut rounds) = rounds {
            rounds.stop();
        }
        let told = tell(&error);
        let of = (self.scatter.volume, self.scatter.epoch);
        self.recruiter.lock().end();
        dissolve(self.options, of, &self.scatter.members.list(), members);
        drop(told);
        match resumed {
            Ok(()) => error,
            Err(resume) => {
                let message = format!("{}; and the VM could not be run again", error.chain());
                Error::new(ErrorKind::Vm, message).because(resume)
            }
        }
    }
}

/// What the handover works with.
pub(super) struct Handover<'a> {
    pub(super) lead: Lead<'a>,
    pub(super) manifest: &'a Manifest,
    pub(super) destination: &'a Destination,
    pub(super) started: Instant,
}

impl Handover<'_> {
    /// Everything up to READY. The VM is paused as late, and for as short, as can be: connections,
    /// the destination's memory and the volume are there before. On failure the connection is left in
    /// `open`, if it was made.
    pub(super) fn until_ready(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        rounds: &mut Option<Rounds>,
        open: &mut Option<Conversation>,
    ) -> Result<(Session, Instant)> {
        *rounds = Rounds::prepare(&self.lead, vm, members)?;
        let control = open.insert(Conversation::new(self.dial(Purpose::MigrationControl)?));
        let offer = Talk::Offer {
            manifest: self.manifest.clone(),
            members: self.lead.scatter.members.list(),
            elapsed_us: host::elapsed(self.started).as_micros() as u64,
            rounds: Rounds::kind(rounds.as_ref(), self.lead.options.mode),
        };
        let deadline = host::now() + self.lead.options.ready_timeout;
        control.send_talk(&offer, deadline)?;
        #[cfg(feature = "simulation")]
        if rounds.is_none() && host::has_bug(host::Bug::StockBeforePause) {
            self.lead.scatter.take_stock()?;
        }
        self.lead.expect(control, &Talk::Accepted, deadline)?;
        let direct = self.dial(Purpose::MigrationDirect)?;
        let mut direct = DirectSink::new(self.lead.scatter.clone(), direct);
        let urgent = self.dial(Purpose::MigrationUrgent)?;
        let mut urgent = UrgentSink::new(self.lead.scatter.clone(), urgent);
        self.lead.control.check_cancelled()?;
        let mut lines = Lines { control, direct: &mut direct, urgent: &mut urgent };
        if let Some(rounds) = rounds {
            rounds.run(&self.lead, Some(&mut lines), members)?;
            self.lead.control.check_cancelled()?;
        }
        let paused_at = self.hand_over(vm, members, rounds.as_mut(), &mut lines)?;
        (self.lead.options.observer)(&Event::Ready);
        let control = open.take().ok_or_else(|| Error::new(ErrorKind::Unreachable, "no connection"))?;
        Ok((Session { control, direct, urgent }, paused_at))
    }

    /// A connection to the destination, which may have strangers at its port.
    fn dial(&self, purpose: Purpose) -> Result<Channel> {
        let began = host::now();
        loop {
            match self.destination.dial(purpose) {
                Err(error) if error.kind == ErrorKind::Full && host::elapsed(began) < BUSY_MAX => {
                    self.lead.look()?;
                    wait(&[], BUSY_PAUSE)?;
                }
                made => return made,
            }
        }
    }

    /// Pauses the VM, gives its state, with the final set in front of it, to the destination and the volume, and waits
    /// for READY. Returns when it was paused.
    fn hand_over(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        rounds: Option<&mut Rounds>,
        lines: &mut Lines<'_>,
    ) -> Result<Instant> {
        let paused_at = host::now();
        let state = vm.pause()?;
        self.lead.control.mark_paused();
        let deadline = host::now() + self.lead.options.ready_timeout;
        let live = rounds.is_some();
        if let Some(rounds) = rounds {
            rounds.paused(&self.lead)?;
        }
        let blobs = self.lead.with_final_set(&state)?;
        for blob in blobs.pieces.iter().chain([&blobs.state]) {
            lines.control.send_state(blob, deadline)?;
        }
        for request in members::put_state(&blobs) {
            ask_all(
                members,
                || request,
                Patience::Paused,
                |member, error| {
                    self.lead.scatter.member_lost(member, &error);
                },
            );
        }
        self.lead.recruiter.lock().keep_state(blobs);
        if live && self.lead.options.mode == Mode::PreCopy {
            Rounds::finish(&self.lead, lines, members)?;
            return Ok(paused_at);
        }
        #[cfg(feature = "simulation")]
        let live = live || host::has_bug(host::Bug::StockBeforePause);
        if !live {
            self.lead.scatter.take_stock()?;
        }
        // Loading the state may touch guest memory: faults are answered from here on.
        serve_while(self.lead.scatter, (lines.control, lines.urgent), |control| {
            self.lead.expect(control, &Talk::Ready, deadline)
        })?;
        Ok(paused_at)
    }

    /// COMMIT is written to the volume, then the destination is told to run. Whatever fails from here
    /// on, the VM is the destination's. An intermediary that is slow to take COMMIT is not waited for: nobody but
    /// this end decides, RUN needs no copy of it, and nothing is safe there before it has it. Returns the
    /// connections, unless they broke, and the downtime.
    pub(super) fn commit(
        &self,
        mut session: Session,
        members: &mut Members,
        paused_at: Instant,
    ) -> (Option<Session>, Option<Duration>) {
        (self.lead.options.observer)(&Event::Commit);
        ask_all(
            members,
            || Request::Control(&VmdRequest::Commit),
            Patience::Paused,
            |member, error| {
                self.lead.scatter.member_lost(member, &error);
            },
        );
        let deadline = host::now() + self.lead.options.ready_timeout;
        let run = session.control.send_talk(&Talk::Run, deadline);
        let ran = run.and_then(|()| {
            let Session { control, urgent, .. } = &mut session;
            serve_while(self.lead.scatter, (control, urgent), |control| {
                self.lead.expect(control, &Talk::Running, deadline)
            })
        });
        match ran {
            Ok(()) => {
                let downtime = host::elapsed(paused_at);
                (self.lead.options.observer)(&Event::Resumed);
                (Some(session), Some(downtime))
            }
            Err(error) => {
                let message =
                    format!("after COMMIT, destination {}: {}", self.destination.address, error.chain());
                (self.lead.options.observer)(&Event::NodeLost { message });
                // Faults that were answered on the connection that broke will not be acknowledged.
                self.lead.scatter.destination_lost();
                (None, None)
            }
        }
    }

    /// Before COMMIT: the VM stays. `open` is the connection to the destination, if there is one.
    pub(super) fn give_up(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        rounds: Option<Rounds>,
        open: Option<Conversation>,
        error: Error,
    ) -> Error {
        self.lead.give_up(vm, members, rounds, error, |error| self.say_abort(open, error))
    }

    /// Tells the destination that the VM stays, on the open connection, or, where that is of no use, on a new one.
    /// Returns the one that it was said on, to be kept for as long as there is something else to do.
    fn say_abort(&self, open: Option<Conversation>, error: &Error) -> Option<Conversation> {
        let abort = Talk::Abort { kind: error.kind, reason: error.chain() };
        let say = |mut line: Conversation| {
            line.send_talk(&abort, host::now() + LOOK * 10).ok()?;
            // Closing a connection on which something is unread throws away what is on its way.
            while line.recv_talk(host::now()).is_ok() {}
            Some(line)
        };
        let alive = open.filter(|_| !matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Protocol));
        let anew = || Some(Conversation::new(self.destination.dial(Purpose::MigrationControl).ok()?));
        alive.and_then(say).or_else(|| say(anew()?))
    }
}

fn too_scattered() -> Error {
    let message = format!(
        "the VM's state takes more than {} MiB, or the list of the pages that were sent again more than {} pieces: it \
         writes to too many places for rounds; use scatter-gather, or hybrid with none",
        limits::STATE_BYTES_MAX >> 20,
        limits::FINAL_PIECES_MAX
    );
    Error::new(ErrorKind::Input, message)
}

/// The error that a word of the destination is where it does not belong.
pub(super) fn refused(talk: Talk, place: &str) -> Error {
    match talk {
        Talk::Abort { kind: ErrorKind::Cancelled, reason } => {
            Error::new(ErrorKind::Cancelled, format!("the destination gave the VM up: {reason}"))
        }
        Talk::Abort { reason, .. } | Talk::Failed { reason } => {
            Error::new(ErrorKind::Vm, format!("the destination cannot take the VM: {reason}"))
        }
        other => Error::new(ErrorKind::Protocol, format!("the destination said {other:?} {place}")),
    }
}
