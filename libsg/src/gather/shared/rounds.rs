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

impl Shared {
    /// Whether what is announced may be read and installed by now.
    pub fn may_install(&self) -> bool {
        self.rounds != Rounds::Staged || self.is_final.load(Ordering::Acquire)
    }

    /// The VM is paused at the source, and the tracker knows which copies count.
    pub fn set_final(&self) {
        *self.final_at.lock() = Some(host::now());
        self.is_final.store(true, Ordering::Release);
        self.wake_all();
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

    /// Whether a newer round replaces what is installed: in pre-copy, until the VM runs.
    pub fn replaces(&self) -> bool {
        self.rounds == Rounds::Installed && !self.is_running()
    }

    /// When the final set came, in pre-copy, before the VM runs.
    pub fn waits_since(&self) -> Option<Instant> {
        self.replaces().then(|| *self.final_at.lock()).flatten()
    }
}
