//! The thread `sg-source` where there is no destination: until everything is safe and parked.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use super::manager::Manager;
use crate::error::Result;
use crate::host;
use crate::migrate::Event;
use crate::migrate::handover::Lead;
use crate::migrate::members::Members;
use crate::migrate::parking::Parking;
use crate::migrate::recruit::Recruiter;
use crate::scatter::Scatter;
use crate::scatter::shared::panicked;

impl Manager {
    /// Everything to the intermediaries, COMMIT, parked: evicted.
    pub(super) fn park(
        mut self,
        scatter: &Arc<Scatter>,
        recruiter: &Mutex<Recruiter>,
        mut members: Members,
    ) -> Result<()> {
        scatter.members.park();
        let (control, options) = (&*self.control, &self.options);
        let parking = Parking::new(Lead { control, options, scatter, recruiter });
        let mut rounds = None;
        // Before COMMIT nothing may leave the VM paused, not even a source of pages that panics.
        let safe =
            catch_unwind(AssertUnwindSafe(|| parking.until_safe(&mut *self.vm, &mut members, &mut rounds)));
        let safe = safe.unwrap_or_else(|_| Err(panicked("sg-source"))).and_then(|()| self.decide(scatter));
        if let Err(error) = safe {
            // Who called it off is told so, whatever else went wrong meanwhile.
            let error = self.control.check_cancelled().err().unwrap_or(error);
            return Err(parking.lead.give_up(&mut *self.vm, &mut members, rounds, error, |_| ()));
        }
        self.vm.committed();
        if let Some(rounds) = &mut rounds {
            rounds.stop();
        }
        (self.options.observer)(&Event::Commit);
        let parked = parking.park(&mut members);
        recruiter.lock().end();
        parked?;
        self.evicted(scatter, host::now(), (rounds.as_ref(), None));
        Ok(())
    }
}
