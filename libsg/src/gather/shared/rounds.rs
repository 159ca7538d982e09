//! What is different while the VM runs at the source and is sent in rounds.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Shared;
use crate::error::Result;
use crate::gather::tracker::{Claim, Path};
use crate::host;
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::wire::message::Rounds;
use crate::wire::{Encoding, IndexEntry};

/// Runs of pages that are taken out by one call.
const WITHDRAWN_AT_ONCE: usize = 4096;

impl Shared {
    /// Whether what is announced may be read and installed by now.
    pub fn may_install(&self) -> bool {
        self.rounds != Rounds::Staged || self.gathers_early || self.is_final()
    }

    fn is_final(&self) -> bool {
        self.is_final.load(Ordering::Acquire)
    }

    /// The VM is paused at the source, and the tracker knows which copies count: what was installed early and is not one
    /// of them is taken out, so that the VM waits for it as for any page that never came. `false`: somebody is
    /// installing yet; the conductor is woken when he is through.
    pub fn settle(&self) -> Result<bool> {
        if self.is_final() {
            return Ok(true);
        }
        if self.gathers_early && !self.withdraw()? {
            return Ok(false);
        }
        let mut tracker = self.tracker.lock();
        // In one step: a copy that does not match is tried again, or said to be lost.
        self.is_final.store(true, Ordering::Release);
        if self.gathers_early {
            tracker.settle();
        }
        drop(tracker);
        *self.final_at.lock() = Some(host::now());
        self.wake_all();
        Ok(true)
    }

    /// Takes out what is known to be out of date by now, while the VM still runs, and nobody begins to install until
    /// [`Self::settle`]: less is left to do behind the pause, and nobody to wait for. `false` as there.
    pub fn clear(&self) -> Result<bool> {
        if self.is_final() || !self.gathers_early { Ok(true) } else { self.withdraw() }
    }

    /// Takes out what is out of date, once nobody installs any more.
    fn withdraw(&self) -> Result<bool> {
        if !self.tracker.lock().stop_installing() {
            return Ok(false);
        }
        let (began, pages) = (host::now(), self.counts().total);
        let (mut from, mut runs) = (PageIndex(0), Vec::with_capacity(WITHDRAWN_AT_ONCE));
        while u64::from(from.0) < pages {
            runs.clear();
            from = self.tracker.lock().withdraw(from, WITHDRAWN_AT_ONCE, &mut runs);
            #[cfg(feature = "simulation")]
            if host::has_bug(host::Bug::StaleKept) {
                continue;
            }
            if !runs.is_empty() {
                self.sink.withdraw(&runs)?;
            }
        }
        let withdrawn = self.tracker.lock().withdrawn();
        tracing::info!(pages = withdrawn, took = ?host::elapsed(began), "taken out: written since they came");
        Ok(true)
    }

    /// A page that is zero from a later round on may hold older bytes: it is made zero now, since nobody can say
    /// later that it is not what it seems. One of the first round holds nothing yet, and is only known to be zero.
    pub fn zero_over(&self, entry: &IndexEntry) -> Result<()> {
        if entry.encoding != Encoding::Zero || entry.round.0 == 0 {
            return Ok(());
        }
        let range = entry.range().positions();
        if range.end as u64 > self.counts().total {
            // Refused by who takes the announcement.
            return Ok(());
        }
        for page in entry.range().iter() {
            let mut tracker = self.tracker.lock();
            let Some(unit) = tracker.unit(page).filter(|unit| unit.first == page) else { continue };
            if unit.positions().end > range.end || tracker.claim(page, entry.round) == Claim::Held {
                continue;
            }
            drop(tracker);
            self.install(unit, None, &mut || self.let_events_be_read())?;
            self.tracker.lock().installed(unit, Path::Zero, host::now());
        }
        Ok(())
    }

    /// Writes over pages of an older round. Who claimed them is alone with them.
    pub(super) fn replace(&self, run: PageRange, first: PageIndex, bytes: Option<&[u8]>) -> Result<()> {
        let length = run.pages as usize * PAGE_BYTES;
        match bytes {
            Some(bytes) => {
                let at = (run.first.0 - first.0) as usize * PAGE_BYTES;
                self.sink.replace(run.first, &bytes[at..at + length])
            }
            None => self.sink.replace(run.first, &vec![0; length]),
        }
    }

    /// Whether a newer round replaces what is installed: in pre-copy, until the VM runs; in hybrid, until what is out of
    /// date was taken out.
    pub fn replaces(&self) -> bool {
        self.waits_for_all() || self.gathers_early && !self.is_final()
    }

    /// Whether the VM does not run before every page is in place, or zero, in its last version: in pre-copy, until it
    /// runs.
    pub fn waits_for_all(&self) -> bool {
        self.rounds == Rounds::Installed && !self.is_running()
    }

    /// When the final set came, in pre-copy, before the VM runs.
    pub fn waits_since(&self) -> Option<Instant> {
        self.waits_for_all().then(|| *self.final_at.lock()).flatten()
    }
}
