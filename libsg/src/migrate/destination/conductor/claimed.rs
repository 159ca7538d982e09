//! A VM that was parked: there is no source to talk to, and COMMIT was given long ago. What stands between it and running
//! here is the claim.
//!
//! ```text
//!           find, claim, fence            load             Run written down
//!  Waiting --------------------> Accepted -----> Ready -------------------------> Running --> Gathered
//!                                   |              |  (asked until it is known)
//!                                   +--------------+----> given up: it stays parked
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::ArrivalPhase;
use super::super::claim::{ClaimOptions, Claimant};
use super::{Conductor, Offer};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::migrate::Event;
use crate::page::PageRange;
use crate::usage::Cpu;
use crate::wire::message::Rounds;

impl Conductor {
    /// Claims the VM, builds it, and begins to load it. Its memory is gathered from now on.
    pub(super) fn claim(&mut self, wanted: &ClaimOptions) -> Result<()> {
        let (at, used) = (host::now(), Cpu::now());
        let connector = Arc::clone(&self.options.connector);
        let mut claimant = Claimant::find(connector, &self.options.name, wanted)?;
        self.check_given_up()?;
        claimant.begin()?;
        let (volume, epoch, name) =
            (claimant.parked.volume, claimant.claim.epoch, claimant.name().to_owned());
        tracing::info!(%volume, name, epoch = epoch.0, "claimed");
        self.tell(&Event::Claimed { volume: volume.to_string(), name, epoch });
        let reached = claimant.fence()?;
        let blobs = claimant.state(&reached)?;
        self.check_given_up()?;
        let (manifest, members) = (claimant.parked.manifest.clone(), claimant.parked.members.clone());
        self.claim = Some(claimant);
        let offer = Offer { volume, epoch, members, elapsed_us: 0, at, used, rounds: Rounds::None };
        self.build(offer, &manifest)?;
        for blob in blobs.pieces.into_iter().chain([blobs.state]) {
            self.unloaded = self.take_final_set(blob)?;
        }
        if let Some(gather) = &self.gather {
            let shared = gather.shared();
            // There is nobody to be asked but intermediaries, and the VM is nobody else's.
            shared.set_evicted();
            shared.set_source_away(Some(host::now()));
            shared.set_running();
        }
        self.load()
    }

    fn check_given_up(&self) -> Result<()> {
        if self.desk.cancel.load(Ordering::Acquire) {
            let message = "given up before it ran: the VM stays parked, and can be claimed";
            return Err(Error::new(ErrorKind::Cancelled, message));
        }
        Ok(())
    }

    /// Until the VM runs: the claim is renewed, and once the state is loaded it is written down that it runs. From then
    /// on it does, whoever wants to give it up: it may be written down, and be nobody's otherwise.
    pub(super) fn check_claim(&mut self) -> Result<()> {
        let Some(mut claimant) = self.claim.take_if(|_| self.phase < ArrivalPhase::Running) else {
            return Ok(());
        };
        if claimant.asked_to_run.is_none() {
            self.check_given_up()?;
        }
        let observer = Arc::clone(&self.options.observer);
        let warn = |message| observer(&Event::Warning { message });
        let runs = match self.phase {
            ArrivalPhase::Ready => claimant.run(warn)?,
            _ => claimant.renew().map(|()| false)?,
        };
        if runs {
            self.run_vm()?;
            claimant.spread();
        }
        self.claim = Some(claimant);
        Ok(())
    }

    /// Before the VM runs, nothing is lost for good: an intermediary may come back, and the VM be claimed again.
    pub(super) fn may_lose(&self, pages: &[PageRange]) -> Result<()> {
        match &self.claim {
            Some(claimant) if self.phase < ArrivalPhase::Running && !claimant.claim.force => {
                let message = "pages of the parked VM cannot be had: it is not run, and can be claimed again when who holds \
                               them is back; with --force it runs without them";
                Err(Error::new(ErrorKind::Lost, message).about(pages.iter().copied()))
            }
            _ => Ok(()),
        }
    }
}
