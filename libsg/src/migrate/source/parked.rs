//! The thread `sg-source` where there is no destination: until everything is safe and parked.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use super::manager::Manager;
use crate::error::Result;
use crate::host;
use crate::migrate::handover::Lead;
use crate::migrate::live::Rounds;
use crate::migrate::members::Members;
use crate::migrate::parking::Parking;
use crate::migrate::recruit::Recruiter;
use crate::migrate::{Event, OutgoingVm};
use crate::scatter::Scatter;
use crate::scatter::shared::panicked;

impl Manager {
    /// Everything to the intermediaries, COMMIT, parked: evicted.
    pub(super) fn park(
        self,
        scatter: &Arc<Scatter>,
        recruiter: &Mutex<Recruiter>,
        members: Members,
    ) -> Result<()> {
        self.parks(scatter, recruiter, members, |parking, vm, members, rounds| {
            parking.until_safe(vm, members, rounds)?;
            parking.keeper(members)
        })
    }

    /// The same, once it is `safe` at the intermediaries; with the one of them that is to grant claims.
    pub(super) fn parks(
        mut self,
        scatter: &Arc<Scatter>,
        recruiter: &Mutex<Recruiter>,
        mut members: Members,
        safe: impl FnOnce(&Parking<'_>, &mut dyn OutgoingVm, &mut Members, &mut Option<Rounds>) -> Result<usize>,
    ) -> Result<()> {
        scatter.members.park();
        let (control, options) = (&*self.control, &self.options);
        let parking = Parking::new(Lead { control, options, scatter, recruiter }, &self.manifest);
        let mut rounds = None;
        // Before COMMIT nothing may leave the VM paused, not even a source of pages that panics.
        let ready = catch_unwind(AssertUnwindSafe(|| {
            let keeper_at = safe(&parking, &mut *self.vm, &mut members, &mut rounds)?;
            parking.note_commit(&mut *self.vm, keeper_at)?;
            Ok(keeper_at)
        }));
        let ready = ready
            .unwrap_or_else(|_| Err(panicked("sg-source")))
            .and_then(|keeper_at| self.decide(scatter).map(|()| keeper_at));
        let keeper_at = match ready {
            Ok(keeper_at) => keeper_at,
            // Who went before gave COMMIT, or it cannot run here any more.
            Err(error) if self.control.is_committed() => return Err(error),
            Err(error) => {
                // Who called it off is told so, whatever else went wrong meanwhile.
                let error = self.control.check_cancelled().err().unwrap_or(error);
                return Err(parking.lead.give_up(&mut *self.vm, &mut members, rounds, error, |_| ()));
            }
        };
        self.vm.committed();
        if let Some(rounds) = &mut rounds {
            rounds.stop();
        }
        (self.options.observer)(&Event::Commit);
        let parked = parking.park(&mut members, keeper_at);
        recruiter.lock().end();
        parked?;
        self.evicted(scatter, host::now(), (rounds.as_ref(), None));
        Ok(())
    }
}
