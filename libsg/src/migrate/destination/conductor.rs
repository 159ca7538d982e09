//! Leads the conversation with the source, and calls the VM: the thread `sg-gather-lead`. It never waits
//! for anything but for everything at once.
//!
//! ```text
//!           Offer              StateEnd          RUN, or COMMIT found in the volume
//!  Waiting ------> Accepted ------------> Ready ------------------------------------> Running --> Gathered
//!                     |                     |  (never by a timeout)                      |
//!                     +------ Abort --------+------> abandoned                           +------> failed
//! ```

mod checks;
mod claimed;
mod resumed;

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use self::resumed::Notes;
use super::claim::{ClaimOptions, Claimant};
use super::line::Line;
use super::listener::Listener;
use super::loading::{Loading, panicked};
use super::{ArrivalPhase, Desk, DestinationOptions, Unfinished};
use crate::error::{Error, ErrorKind, Result};
use crate::gather::{Gather, Setup, Word};
use crate::host::{self, thread::JoinHandle};
use crate::ids::{Checksum, Epoch, VolumeId};
use crate::manifest::Manifest;
use crate::migrate::{Event, IncomingVm};
use crate::transport::{Greeting, StateAssembler, Waker, wait};
use crate::wire::final_set::FinalSet;
use crate::wire::handshake::Purpose;
use crate::wire::message::{Member, Rounds, Talk};
use crate::wire::run::decode_runs;
use crate::wire::{IndexEntry, Kind};

/// How often the conductor looks around, and tells the source how far it is.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// The source is asked for a sign of life this often.
const PING_EVERY: Duration = Duration::from_secs(2);

/// A source that said nothing for this long is away.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// A control connection that has not said what it is about after this long is closed.
const OPENING_MAX: Duration = Duration::from_secs(5);

/// Control connections that have not said yet what they are about.
const OPENINGS_MAX: usize = 4;

/// What was offered.
pub(super) struct Offer {
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub members: Vec<Member>,
    /// Microseconds since the start command, when it was offered.
    pub elapsed_us: u64,
    pub at: Instant,
    /// What happens before the VM is paused.
    rounds: Rounds,
    pub used: crate::usage::Cpu,
}

pub(super) struct Conductor {
    pub options: DestinationOptions,
    /// `None` where no source comes: the volume is claimed.
    listener: Option<Listener>,
    pub waker: Waker,
    pub claim: Option<Claimant>,
    /// The VM; `None` while it loads its state.
    pub vm: Option<Box<dyn IncomingVm>>,
    loading: Option<Loading>,
    pub desk: Arc<Desk>,
    pub phase: ArrivalPhase,
    pub offer: Option<Offer>,
    pub gather: Option<Gather>,
    pub control: Option<Line>,
    pub(super) openings: Vec<Line>,
    state: StateAssembler,
    /// What of it came before.
    final_set: FinalSet,
    /// The source waits until what it named is taken out.
    clears: bool,
    /// A state that is all here, until it is loaded.
    unloaded: Option<Vec<u8>>,
    places: Vec<IndexEntry>,
    away_since: Option<Instant>,
    looked_at: Instant,
    abort_said: bool,
    told_at: Instant,
    pub told_percent: u8,
    pub notes: Notes,
}

/// How a VM comes.
pub(super) enum Way {
    /// A source offers it.
    Offered(Listener),
    /// It is parked.
    Claimed(ClaimOptions),
    /// It runs; a source may come again.
    Resumed(Box<Unfinished>, Option<Listener>),
}

/// Starts the conductor.
pub(super) fn start(
    options: DestinationOptions,
    way: Way,
    vm: Box<dyn IncomingVm>,
    desk: Arc<Desk>,
) -> Result<JoinHandle<()>> {
    let now = host::now();
    type Begin = Box<dyn FnOnce(&mut Conductor) -> Result<()> + Send>;
    let (listener, begin): (_, Begin) = match way {
        Way::Offered(listener) => (Some(listener), Box::new(|_| Ok(()))),
        Way::Claimed(wanted) => (None, Box::new(move |conductor| conductor.claim(&wanted))),
        Way::Resumed(of, listener) => (listener, Box::new(move |conductor| conductor.resume(*of))),
    };
    let mut conductor = Conductor {
        options,
        listener,
        waker: desk.waker.clone(),
        claim: None,
        vm: Some(vm),
        loading: None,
        desk,
        phase: ArrivalPhase::Waiting,
        offer: None,
        gather: None,
        control: None,
        openings: Vec::new(),
        state: StateAssembler::new(),
        final_set: FinalSet::default(),
        clears: false,
        unloaded: None,
        places: Vec::new(),
        away_since: None,
        looked_at: now,
        abort_said: false,
        told_at: now,
        told_percent: 0,
        notes: Notes::default(),
    };
    let run = move || {
        let conduct = || {
            begin(&mut conductor)?;
            conductor.conduct()
        };
        let ended = catch_unwind(AssertUnwindSafe(conduct))
            .unwrap_or_else(|panic| Err(panicked("sg-gather-lead", &*panic)));
        if let Err(error) = ended {
            conductor.end_badly(&error);
        }
    };
    host::thread::Builder::new()
        .name("sg-gather-lead".into())
        .spawn(run)
        .map_err(|cause| Error::new(ErrorKind::System, "a thread could not be started").because(cause))
}

impl Conductor {
    fn conduct(&mut self) -> Result<()> {
        loop {
            self.waker.drain();
            self.arrivals();
            self.hear_openings()?;
            self.hear_control()?;
            self.check()?;
            if self.phase == ArrivalPhase::Gathered {
                return Ok(());
            }
            self.rest()?;
        }
    }

    pub(super) fn rest(&self) -> Result<()> {
        let mut on = vec![(Some(self.waker.as_fd()), false)];
        for line in self.openings.iter().chain(&self.control) {
            on.push((Some(line.channel.as_fd()), line.outbox.queued_bytes() > 0));
        }
        wait(&on, TICK)?;
        Ok(())
    }

    pub(super) fn tell(&self, event: &Event) {
        (self.options.observer)(event);
    }

    pub(super) fn set_phase(&mut self, phase: ArrivalPhase) {
        self.phase = phase;
        self.desk.change(|stage| stage.phase = phase);
    }

    /// Takes connections that are through the handshake.
    pub(super) fn arrivals(&mut self) {
        while let Some(channel) = self.listener.as_ref().and_then(Listener::arrival) {
            let greeting = *channel.greeting();
            if greeting.purpose == Purpose::MigrationControl {
                if self.openings.len() < OPENINGS_MAX {
                    self.openings.push(Line::new(channel));
                }
                continue;
            }
            let ours = self.is_ours(&greeting);
            let Some(gather) = self.gather.as_ref().filter(|_| ours) else {
                tracing::warn!(?greeting, "a connection about a volume that is not taken here");
                continue;
            };
            let shared = gather.shared();
            if greeting.purpose == Purpose::MigrationDirect {
                *shared.direct.lock() = Some(channel);
                shared.wake_direct.wake();
            } else {
                *shared.urgent.lock() = Some(channel);
                shared.wake_fault.wake();
            }
        }
    }

    /// Whether a connection is about the volume that is taken.
    pub(super) fn is_ours(&self, greeting: &Greeting) -> bool {
        self.offer.as_ref().is_some_and(|o| (o.volume, o.epoch) == (greeting.volume, greeting.epoch))
    }

    /// A control connection says first what it is about.
    pub(super) fn hear_openings(&mut self) -> Result<()> {
        for mut line in std::mem::take(&mut self.openings) {
            let first = match line.inbox.poll(&line.channel) {
                Ok(None) if host::elapsed(line.since) < OPENING_MAX => {
                    self.openings.push(line);
                    continue;
                }
                Ok(None) => continue,
                Ok(Some(frame)) if frame.header.kind == Kind::Talk => Talk::decode(frame.body),
                Ok(Some(_)) => Ok(Talk::Abort { kind: ErrorKind::Protocol, reason: "not a message".into() }),
                Err(error) => {
                    tracing::info!(
                        error = error.chain(),
                        "a control connection ended before it said anything"
                    );
                    continue;
                }
            };
            let greeting = *line.channel.greeting();
            let ours = self.is_ours(&greeting);
            match first {
                Ok(Talk::Offer { manifest, members, elapsed_us, rounds }) if self.offer.is_none() => {
                    let (volume, epoch, at) = (greeting.volume, greeting.epoch, host::now());
                    let used = crate::usage::Cpu::now();
                    let offer = Offer { volume, epoch, members, elapsed_us, at, used, rounds };
                    self.offered(line, offer, &manifest)?;
                }
                Ok(Talk::Rejoin) if ours => self.rejoined(line),
                // A source whose connection broke dials once more to say that it gives up.
                Ok(Talk::Abort { kind, reason }) if ours && self.phase < ArrivalPhase::Running => {
                    return Err(given_up(kind, &reason));
                }
                first => {
                    tracing::warn!(?greeting, ?first, "a control connection about something else");
                    let reason = "this destination takes one VM, and this is not it".to_owned();
                    line.say(&Talk::Abort { kind: ErrorKind::Volume, reason });
                }
            }
        }
        Ok(())
    }

    fn offered(&mut self, line: Line, offer: Offer, manifest: &Manifest) -> Result<()> {
        tracing::info!(volume = %offer.volume, vm = manifest.vm, pages = manifest.pages(), "a VM is offered");
        self.control = Some(line);
        self.build(offer, manifest)?;
        self.say(&Talk::Accepted);
        Ok(())
    }

    /// Builds the VM. From now on its faults are answered.
    fn build(&mut self, offer: Offer, manifest: &Manifest) -> Result<()> {
        let (volume, epoch, members, rounds) =
            (offer.volume, offer.epoch, offer.members.clone(), offer.rounds);
        self.offer = Some(offer);
        let sink = self.vm()?.prepare(manifest)?;
        if rounds == Rounds::Installed && !sink.can_replace() {
            let message = "this VM's memory takes each page once: use hybrid, scatter-gather or post-copy";
            return Err(Error::new(ErrorKind::Input, message));
        }
        self.begin_notes(manifest)?;
        let gather = Gather::start(Setup {
            volume,
            epoch,
            manifest: manifest.clone(),
            members,
            sink,
            connector: Arc::clone(&self.options.connector),
            gather_limit: self.desk.limit.load(Ordering::Acquire),
            source_grace: self.options.source_grace,
            member_grace: self.options.member_grace,
            observer: Arc::clone(&self.options.observer),
            outlived: self.notes.are_kept(),
            rounds,
            conductor: self.waker.clone(),
        })?;
        let shared = Arc::clone(gather.shared());
        // A limit that was set between the two lines above is not lost.
        self.desk.change(|stage| stage.gather = Some(Arc::clone(&shared)));
        shared.pacer.set_limit(self.desk.limit.load(Ordering::Acquire), host::now());
        self.gather = Some(gather);
        self.set_phase(ArrivalPhase::Accepted);
        Ok(())
    }

    /// The source is back: it is told what is held here, and nothing is inferred from what was sent.
    fn rejoined(&mut self, mut line: Line) {
        tracing::info!("the source reconnected");
        if let Some(old) = self.control.take() {
            old.channel.shut_down();
        }
        self.state = StateAssembler::new();
        self.abort_said = false;
        if let Some(gather) = &self.gather {
            checks::send_holdings(&mut line, gather);
            gather.shared().set_source_away(None);
        }
        self.away_since = None;
        line.say(&Talk::Rejoined { running: self.phase >= ArrivalPhase::Running });
        if self.phase == ArrivalPhase::Ready {
            line.say(&Talk::Ready);
        }
        line.heard_at = host::now();
        self.control = Some(line);
    }

    pub(super) fn say(&mut self, talk: &Talk) {
        if let Some(line) = &mut self.control {
            line.say(talk);
        }
    }

    pub(super) fn hear_control(&mut self) -> Result<()> {
        let Some(mut line) = self.control.take() else { return Ok(()) };
        let heard = self.hear(&mut line);
        // Whoever was answered meanwhile, was answered through the queue of this line.
        match heard {
            Ok(()) => {
                self.control = Some(line);
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind,
                    ErrorKind::Unreachable | ErrorKind::Protocol | ErrorKind::Version
                ) =>
            {
                line.channel.shut_down();
                self.control_lost(&error);
                Ok(())
            }
            Err(error) => {
                self.control = Some(line);
                Err(error)
            }
        }
    }

    fn hear(&mut self, line: &mut Line) -> Result<()> {
        loop {
            let Some(frame) = line.inbox.poll(&line.channel)? else { break };
            line.heard_at = host::now();
            let header = frame.header;
            match header.kind {
                Kind::Talk => {
                    let talk = Talk::decode(frame.body)?;
                    self.talk(line, talk)?;
                }
                Kind::State => self.state.push(frame)?,
                Kind::Announce => {
                    decode_runs(frame.body, header.count.into(), &mut self.places)?;
                    if let Some(gather) = &self.gather {
                        gather.shared().announce(&self.places, Word::Source)?;
                    }
                }
                Kind::Ping => {
                    line.outbox.push_frame(header.answer(Kind::Pong), &[], [])?;
                }
                Kind::Pong => {}
                kind => {
                    let message = format!("a {kind:?} frame on the control connection");
                    return Err(Error::new(ErrorKind::Protocol, message));
                }
            }
        }
        let now = host::now();
        // Until the VM runs the source has deadlines of its own.
        let running = self.phase >= ArrivalPhase::Running;
        if running && now.saturating_duration_since(line.pinged_at) >= PING_EVERY {
            line.pinged_at = now;
            line.outbox.push_frame(line.channel.header(Kind::Ping), &[], [])?;
        }
        line.outbox.flush(&line.channel, usize::MAX)?;
        if running && now.saturating_duration_since(line.heard_at) > SILENCE_MAX {
            return Err(Error::new(ErrorKind::Unreachable, "the source is silent"));
        }
        Ok(())
    }

    fn talk(&mut self, line: &mut Line, talk: Talk) -> Result<()> {
        match talk {
            Talk::StateEnd { bytes, checksum } if self.phase == ArrivalPhase::Accepted => {
                let state = self.state.finish(bytes, Checksum(checksum))?;
                if let Some(state) = self.take_final_set(state)? {
                    self.unloaded = Some(state);
                    self.load()?;
                }
            }
            Talk::Written { round, runs, last } if self.may_be_written() => {
                self.written(round, &runs, last)?
            }
            Talk::Run if self.phase == ArrivalPhase::Ready => {
                self.run_vm()?;
                line.say(&Talk::Running);
                line.heard_at = host::now();
            }
            Talk::Run if self.phase == ArrivalPhase::Running => line.say(&Talk::Running),
            Talk::Members(members) => {
                if let (Some(gather), Some(offer)) = (&self.gather, &mut self.offer) {
                    gather.set_members(&members)?;
                    offer.members = members;
                }
            }
            Talk::Evicted if self.phase >= ArrivalPhase::Running => {
                if let Some(gather) = &self.gather {
                    gather.shared().set_evicted();
                }
            }
            Talk::Abort { kind, reason } if self.phase < ArrivalPhase::Running => {
                return Err(given_up(kind, &reason));
            }
            Talk::Failed { reason } => {
                let message = format!("the source failed: {reason}");
                return Err(Error::new(ErrorKind::Unreachable, message));
            }
            // It was sent before the source heard what has happened here since.
            Talk::Abort { .. } | Talk::StateEnd { .. } => tracing::warn!(?talk, "comes too late"),
            other => {
                let message = format!("the source says {other:?} while the VM is {:?}", self.phase);
                return Err(Error::new(ErrorKind::Protocol, message));
            }
        }
        Ok(())
    }

    fn vm(&mut self) -> Result<&mut Box<dyn IncomingVm>> {
        self.vm.as_mut().ok_or_else(|| Error::new(ErrorKind::Vm, "the VM loads its state"))
    }

    /// Takes the VM back from a load that will not be of use. Its memory has to be ordinary memory by now, so that
    /// nothing that it touches is waited for.
    pub(super) fn end_loading(&mut self) {
        if let Some((vm, _)) = self.loading.take().and_then(Loading::join) {
            self.vm = Some(vm);
        }
    }

    /// COMMIT was given: there is no way back from here on.
    fn run_vm(&mut self) -> Result<()> {
        self.desk.change(|stage| stage.committed = true);
        self.tell(&Event::Commit);
        self.vm()?.run()?;
        if let Some(gather) = &self.gather {
            gather.shared().set_running();
        }
        self.set_phase(ArrivalPhase::Running);
        self.desk.change(|stage| stage.running = Some(Ok(())));
        self.tell(&Event::Resumed);
        Ok(())
    }

    fn control_lost(&mut self, error: &Error) {
        let now = host::now();
        self.away_since = Some(now);
        // Who is needed no more may go.
        let evicted = self.gather.as_ref().is_some_and(|gather| gather.shared().source().evicted);
        let needed = !evicted && self.phase < ArrivalPhase::Gathered;
        if let Some(gather) = &self.gather {
            gather.shared().set_source_away(Some(now));
        }
        if needed {
            tracing::warn!(error = error.chain(), "the source's connection is lost");
            self.tell(&Event::NodeLost { message: format!("source: {}", error.chain()) });
        }
    }
}

fn given_up(kind: ErrorKind, reason: &str) -> Error {
    Error::new(kind, format!("the source gave up before COMMIT: the VM runs on there ({reason})"))
}
