//! What time and other threads bring about: READY, a cancel, a source that is away, pages that are lost, the end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::line::Line;
use super::super::loading::Loading;
use super::super::{ArrivalPhase, Told, volume};
use super::{Conductor, TICK};
use crate::error::{Error, ErrorKind, Result};
use crate::gather::Gather;
use crate::host;
use crate::ids::Round;
use crate::limits::INDEX_ENTRIES_MAX;
use crate::migrate::Event;
use crate::page::{PageIndex, PageRange};
use crate::wire::entry::encode_table;
use crate::wire::final_set::Blob;
use crate::wire::message::{Rounds, Talk};
use crate::wire::{Header, Kind};

/// Without COMMIT from the source, the volume is looked into this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Progress is not told to a source that leaves so much unread.
const UNREAD_MAX: usize = 64 << 10;

impl Conductor {
    /// What time and other threads bring about.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(failure) = self.gather.as_ref().and_then(|gather| gather.shared().failure()) {
            return Err(Told::from(&*failure).into());
        }
        self.take_found_members()?;
        self.keep_notes();
        self.clear()?;
        self.load()?;
        self.check_loaded()?;
        let committed = self.phase >= ArrivalPhase::Running;
        if self.desk.cancel.load(Ordering::Acquire) && !committed && self.claim.is_none() {
            self.cancel()?;
        }
        if let Some(away) = self.away_since
            && !committed
        {
            self.without_source(away)?;
        }
        self.report_lost()?;
        self.check_claim()?;
        if host::elapsed(self.told_at) >= TICK {
            self.told_at = host::now();
            self.tell_progress();
        }
        let committed = self.phase >= ArrivalPhase::Running;
        if committed && self.gather.as_ref().is_some_and(|gather| gather.shared().tracker.lock().close()) {
            self.end_well()?;
        }
        Ok(())
    }

    /// The source did not tell of all members, and others did.
    fn take_found_members(&mut self) -> Result<()> {
        let (Some(gather), Some(offer)) = (&self.gather, &mut self.offer) else { return Ok(()) };
        if let Some(members) = gather.shared().new_members() {
            gather.set_members(&members)?;
            offer.members = members;
            gather.shared().wake_index.wake();
        }
        Ok(())
    }

    /// Takes the final set, or a piece of it, off a blob. Behind the last piece is the state, and from there on it is
    /// known which copies count.
    pub(super) fn take_final_set(&mut self, mut blob: Vec<u8>) -> Result<Option<Vec<u8>>> {
        let Some(gather) = &self.gather else { return Ok(Some(blob)) };
        let shared = gather.shared();
        let mut required = Ok(());
        let was = {
            let mut tracker = shared.tracker.lock();
            let pages = tracker.counts().total as u32;
            self.final_set.take(&blob, pages, &mut |run, round| {
                if required.is_ok() {
                    required = tracker.require(run, round);
                }
            })?
        };
        required?;
        let Blob::State(state_at) = was else { return Ok(None) };
        blob.drain(..state_at);
        Ok(Some(blob))
    }

    /// Whether the VM is sent in rounds, and runs at its source.
    pub(super) fn may_be_written(&self) -> bool {
        let staged = self.offer.as_ref().is_some_and(|offer| offer.rounds == Rounds::Staged);
        staged && self.phase == ArrivalPhase::Accepted && self.unloaded.is_none() && self.loading.is_none()
    }

    /// Pages were written since they were sent: a part of the final set, before the VM is paused.
    pub(super) fn written(&mut self, round: Round, runs: &[PageRange], last: bool) -> Result<()> {
        let Some(gather) = &self.gather else { return Ok(()) };
        let mut tracker = gather.shared().tracker.lock();
        runs.iter().try_for_each(|run| tracker.require(*run, round))?;
        self.clears |= last;
        Ok(())
    }

    /// Takes out what was written, and says so, unless the final set is there by now.
    fn clear(&mut self) -> Result<()> {
        self.clears &= self.may_be_written();
        let Some(gather) = self.gather.as_ref().filter(|_| self.clears) else { return Ok(()) };
        if gather.shared().clear()? {
            self.clears = false;
            self.say(&Talk::Cleared);
        }
        Ok(())
    }

    /// Begins to load the state, as soon as what loading may touch is right: where there were rounds there may be older
    /// bytes.
    pub(super) fn load(&mut self) -> Result<()> {
        let Some(gather) = self.gather.as_ref().filter(|_| self.unloaded.is_some()) else { return Ok(()) };
        let shared = gather.shared();
        if !shared.settle()? || shared.waits_for_all() && !shared.tracker.lock().is_complete() {
            return Ok(());
        }
        if let (Some(state), Some(vm)) = (self.unloaded.take(), self.vm.take()) {
            self.loading = Some(Loading::start(vm, state, self.waker.clone())?);
        }
        Ok(())
    }

    /// Once the VM has loaded its state, READY is said.
    fn check_loaded(&mut self) -> Result<()> {
        let Some((vm, loaded)) = self.loading.as_ref().and_then(Loading::done) else { return Ok(()) };
        (self.vm, self.loading) = (Some(vm), None);
        loaded?;
        self.set_phase(ArrivalPhase::Ready);
        self.say(&Talk::Ready);
        self.tell(&Event::Ready);
        Ok(())
    }

    fn cancel(&mut self) -> Result<()> {
        let cancelled =
            || Error::new(ErrorKind::Cancelled, "cancelled here before COMMIT: the VM runs on at the source");
        if self.phase < ArrivalPhase::Ready {
            // Without READY there is no COMMIT.
            return Err(cancelled());
        }
        if self.control.is_none() {
            self.look_for_commit()?;
            return if self.phase < ArrivalPhase::Running { Err(cancelled()) } else { Ok(()) };
        }
        if !self.abort_said {
            self.abort_said = true;
            let reason = "cancelled at the destination".into();
            self.say(&Talk::Abort { kind: ErrorKind::Cancelled, reason });
        }
        Ok(())
    }

    /// Before COMMIT, and the source cannot be heard.
    fn without_source(&mut self, away: Instant) -> Result<()> {
        if self.phase == ArrivalPhase::Ready {
            #[cfg(feature = "simulation")]
            if host::has_bug(host::Bug::RunsWithoutCommit) {
                return self.run_vm();
            }
            if host::elapsed(self.looked_at) >= LOOK_EVERY {
                self.look_for_commit()?;
                self.looked_at = host::now();
            }
            return Ok(());
        }
        if host::elapsed(away) >= self.options.source_grace {
            // READY was never said: the source cannot have given COMMIT.
            return Err(Error::new(
                ErrorKind::Unreachable,
                "the source was lost before READY: the VM runs on there",
            ));
        }
        Ok(())
    }

    fn look_for_commit(&mut self) -> Result<()> {
        let Some(offer) = &self.offer else { return Ok(()) };
        let connector = &*self.options.connector;
        if volume::is_committed(connector, &offer.members, offer.volume, offer.epoch) {
            tracing::info!("COMMIT is in the volume");
            self.run_vm()?;
        }
        Ok(())
    }

    pub(in crate::migrate::destination) fn report_lost(&mut self) -> Result<()> {
        // A VM that loads its state is told later.
        let Some(gather) = self.gather.as_ref().filter(|_| self.vm.is_some()) else { return Ok(()) };
        let pages = gather.shared().take_lost();
        if pages.is_empty() {
            return Ok(());
        }
        self.may_lose(&pages)?;
        let error = Error::new(ErrorKind::Lost, "no copy is left").about(pages.clone());
        tracing::error!(error = error.chain(), "pages are lost");
        self.vm()?.lost(&pages);
        for some in pages.chunks(INDEX_ENTRIES_MAX) {
            self.say(&Talk::Lost(some.to_vec()));
        }
        self.tell(&Event::Lost { pages });
        Ok(())
    }

    pub(in crate::migrate::destination) fn tell_progress(&mut self) {
        let Some(gather) = &self.gather else { return };
        let shared = gather.shared();
        let counts = shared.counts();
        let progress = Talk::Progress {
            held_pages: counts.held,
            faults: counts.faults,
            direct_bytes: shared.counters.direct.load(Ordering::Relaxed),
            gathered_bytes: shared.counters.gathered.load(Ordering::Relaxed),
        };
        if let Some(line) = self.control.as_mut().filter(|line| line.outbox.queued_bytes() < UNREAD_MAX) {
            line.say(&progress);
        }
        let (rate, delay) = (shared.pacer.rate(), shared.pacer.shared_delay());
        tracing::debug!(held = counts.held, rate, ?delay, "progress");
        let percent = (counts.held * 100 / counts.total.max(1)) as u8 / 5 * 5;
        if self.phase >= ArrivalPhase::Running && percent > self.told_percent {
            self.told_percent = percent;
            self.tell(&Event::Gathering { percent });
        }
    }
}

/// Tells a source that is back what is held here.
pub(super) fn send_holdings(line: &mut Line, gather: &Gather) {
    let total = gather.shared().counts().total;
    let (mut from, mut ranges, mut table) = (PageIndex(0), Vec::new(), Vec::new());
    let mut send = |ranges: &[PageRange]| {
        table.clear();
        encode_table(ranges.iter().copied(), &mut table);
        let header = Header { count: ranges.len() as u16, ..line.channel.header(Kind::Holdings) };
        if let Err(error) = line.outbox.push_frame(header, &table, []) {
            tracing::error!(error = error.chain(), "holdings could not be told");
        }
    };
    while u64::from(from.0) < total {
        ranges.clear();
        from = gather.shared().tracker.lock().holdings(from, INDEX_ENTRIES_MAX, &mut ranges);
        if !ranges.is_empty() {
            send(&ranges);
        }
    }
    send(&[]);
}
