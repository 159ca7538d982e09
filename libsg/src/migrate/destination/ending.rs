//! How an arrival ends: every page here and the volume dissolved, or not.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::conductor::Conductor;
use super::volume::dissolve_others;
use super::{ArrivalPhase, Told, progress_of};
use crate::error::{Error, ErrorKind, Result};
use crate::gather::Shared;
use crate::host;
use crate::migrate::Event;
use crate::report::{Bytes, DestinationReport, Faults, Intermediary, Pages, Status};
use crate::usage::{self, Cpu};
use crate::wire::message::Talk;

/// A source that was told that every page is here, and has not evicted yet, may still be writing to
/// the volume: it has so long to say that it is done.
const LAST_WORD: Duration = Duration::from_secs(2);

/// How long the members' threads may take to give the volume's memory back.
const DISSOLVE_MAX: Duration = Duration::from_secs(20);

/// How long a source that is not connected any more has to come again, to be told.
const REJOIN_MAX: Duration = Duration::from_secs(2);

/// How long the last words may take.
const LINGER: Duration = Duration::from_millis(400);

impl Conductor {
    /// Every page is here, or known to be lost.
    pub(super) fn end_well(&mut self) -> Result<()> {
        let Some(gather) = &self.gather else { return Ok(()) };
        let shared = std::sync::Arc::clone(gather.shared());
        shared.sink.finish()?;
        let held_at = host::now();
        self.report_lost()?;
        self.tell_progress();
        let counts = shared.counts();
        let report = self.report(&shared, held_at);
        self.phase = ArrivalPhase::Gathered;
        // Whoever hears of the event may ask for the report at once.
        self.desk.change(|stage| {
            (stage.phase, stage.gathered) = (ArrivalPhase::Gathered, Some(Ok(Box::new(report))));
        });
        if counts.lost == 0 {
            self.tell(&Event::Gathered);
            self.say(&Talk::Gathered);
        } else {
            let reason = format!("{} pages are lost", counts.lost);
            self.say(&Talk::Failed { reason: reason.clone() });
            self.tell(&Event::Failed { kind: ErrorKind::Lost, message: reason });
        }
        let gave_back = self.hear_last_word(held_at).and_then(|()| self.dissolve(&shared));
        if let Err(error) = &gave_back {
            tracing::warn!(error = error.chain(), "the volume could not be dissolved everywhere");
        }
        if let Some(gather) = self.gather.take() {
            gather.stop();
        }
        let last = progress_of(ArrivalPhase::Gathered, &shared);
        self.desk.change(|stage| {
            // The books are of no further use.
            (stage.gather, stage.last) = (None, Some(last));
            stage.dissolved = Some(gave_back.map_err(|error| Told::from(&error)));
        });
        Ok(())
    }

    /// Until the source has evicted, or is gone. One whose connection broke as the last page came is waited for as well:
    /// told again when it has rejoined, it has nobody else to hear it from.
    fn hear_last_word(&mut self, held_at: Instant) -> Result<()> {
        while host::elapsed(held_at) < LAST_WORD {
            if self.gather.as_ref().is_none_or(|gather| gather.shared().source().evicted) {
                // Whoever goes on from here, should this process die as it gives the memory back, need not wait for it either.
                self.keep_notes();
                return Ok(());
            }
            self.rest()?;
            self.waker.drain();
            self.arrivals();
            self.hear_openings()?;
            self.hear_control()?;
        }
        Ok(())
    }

    fn dissolve(&mut self, shared: &Shared) -> Result<()> {
        shared.dissolve();
        let deadline = host::now() + DISSOLVE_MAX;
        loop {
            self.waker.drain();
            let members = shared.members();
            let answers: Vec<_> = members.iter().map(|desk| *desk.state.lock()).collect();
            let ended = answers.iter().all(|state| state.dissolved.is_some());
            if ended || host::now() >= deadline || shared.failure().is_some() {
                let left: Vec<String> = members
                    .iter()
                    .zip(&answers)
                    .filter(|(_, state)| !state.gone && state.dissolved != Some(true))
                    .map(|(desk, _)| desk.member.node.to_string())
                    .collect();
                let left: Vec<String> = left.into_iter().chain(dissolve_others(shared)).collect();
                if left.is_empty() {
                    self.tell(&Event::Dissolved);
                    return Ok(());
                }
                let message = format!("{} may still hold pages of the volume: sg dissolve", left.join(", "));
                return Err(Error::new(ErrorKind::Unreachable, message));
            }
            self.rest()?;
            self.hear_control()?;
        }
    }

    fn report(&self, shared: &Shared, held_at: Instant) -> DestinationReport {
        // When one that another process began was started, is not known here.
        let total_migration_s = self.offer.as_ref().filter(|_| !self.notes.is_resumed).map(|offer| {
            offer.elapsed_us as f64 / 1e6 + held_at.saturating_duration_since(offer.at).as_secs_f64()
        });
        let used = self.offer.as_ref().map(|offer| Cpu::now().since(offer.used));
        let tracker = shared.tracker.lock();
        let counts = tracker.counts();
        let (faults, while_scattering) = tracker.latencies();
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &shared.counters;
        let (direct, gathered, wire) =
            (count(&counters.direct), count(&counters.gathered), count(&counters.wire));
        let status = if counts.lost == 0 {
            Status::Ok
        } else {
            let mut ranges = Vec::new();
            tracker.lost_ranges(&mut ranges);
            Status::from(
                &Error::new(ErrorKind::Lost, format!("{} pages are lost", counts.lost)).about(ranges),
            )
        };
        DestinationReport {
            status,
            total_migration_s,
            pages: Pages {
                total: Some(counts.total),
                direct: Some(counts.direct),
                staged: Some(counts.staged),
                withdrawn: Some(tracker.withdrawn()),
                faulted: Some(counts.faults),
                ..Pages::default()
            },
            bytes: Bytes {
                direct: Some(direct),
                gathered: Some(gathered),
                overhead: Some(wire.saturating_sub(direct + gathered)),
                wire_total: Some(wire),
                ..Bytes::default()
            },
            faults: Faults::from(faults),
            faults_while_scattering: Faults::from(while_scattering),
            intermediaries: shared
                .members()
                .iter()
                .map(|desk| Intermediary {
                    id: desk.member.node.name.clone(),
                    bytes_out: Some(count(&desk.bytes_out)),
                    ..Intermediary::default()
                })
                .collect(),
            bookkeeping_bytes_per_page: Some(tracker.allocated_bytes() as f64 / counts.total.max(1) as f64),
            cpu_s: used.map(|used| used.process.as_secs_f64()),
            migration_cpu_s: used.map(|used| used.migration.as_secs_f64()),
            peak_rss_bytes: usage::peak_rss_bytes(),
        }
    }

    /// It failed: the source is told, the VM is abandoned if COMMIT was not given, and everybody who waits
    /// hears of it.
    pub(super) fn end_badly(&mut self, error: &Error) {
        let committed = self.desk.stage.lock().committed;
        tracing::error!(error = error.chain(), committed, "the arrival failed");
        let reason = error.chain();
        let last_word = if committed {
            Talk::Failed { reason: reason.clone() }
        } else {
            Talk::Abort { kind: error.kind, reason: reason.clone() }
        };
        // Where another process can go on, it is not over: the source keeps what it has, and dials again.
        let goes_on = committed && self.notes.are_kept();
        match self.control.take_if(|_| goes_on) {
            Some(line) => line.channel.shut_down(),
            None => self.say(&last_word),
        }
        if let Some(gather) = self.gather.take() {
            gather.stop();
            if !committed {
                // The VM is thrown away: whatever waits for a page of it may go on with zeros.
                if let Err(error) = gather.shared().sink.finish() {
                    tracing::warn!(error = error.chain(), "the VM's memory could not be let go");
                }
                self.end_loading();
            }
        }
        if let Some(vm) = self.vm.as_mut().filter(|_| !committed) {
            vm.abandon();
        }
        self.tell(&Event::Failed { kind: error.kind, message: reason });
        let told = Told::from(error);
        self.desk.change(|stage| {
            stage.phase = ArrivalPhase::Failed;
            stage.gather = None;
            stage.running.get_or_insert_with(|| Err(told.clone()));
            stage.gathered.get_or_insert(Err(told.clone()));
            stage.dissolved.get_or_insert(Err(told));
        });
        self.linger();
        if committed && !goes_on && self.control.is_none() {
            self.await_rejoin(&last_word);
            self.linger();
        }
    }

    /// What failed may have broken the source's connections before it was told: it dials again, and would for ever.
    fn await_rejoin(&mut self, last_word: &Talk) {
        let until = host::now() + REJOIN_MAX;
        while self.control.is_none() && host::now() < until {
            self.arrivals();
            for mut line in std::mem::take(&mut self.openings) {
                let ours = self.is_ours(line.channel.greeting());
                match line.inbox.poll(&line.channel) {
                    Ok(None) if host::elapsed(line.since) < REJOIN_MAX => self.openings.push(line),
                    Ok(Some(_)) if ours => {
                        line.say(last_word);
                        self.control = Some(line);
                    }
                    _ => {}
                }
            }
            host::thread::sleep(LINGER / 20);
        }
    }

    /// Lets the last words reach a source that is still sending: closing a connection on which something is
    /// unread throws away what is queued on it.
    fn linger(&mut self) {
        let until = host::now() + LINGER;
        while self.control.is_some() && host::now() < until {
            if self.control.as_mut().is_some_and(|line| line.discard().is_err()) {
                self.control = None;
                return;
            }
            host::thread::sleep(LINGER / 20);
        }
    }
}
