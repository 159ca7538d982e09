//! What must hold, whatever happens: looked at after every step.

use std::time::Duration;

use crate::run::{Run, all};

/// No fault waits longer when nothing happens.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// What must hold.
pub struct Contracts {
    found: Option<String>,
}

impl Contracts {
    pub fn new(_: &Run) -> Self {
        Self { found: None }
    }

    pub fn check(&mut self, _: &Run) {}

    pub fn check_end(&mut self, run: &Run) {
        if !run.scenario.events.is_empty() {
            return;
        }
        let memory = &run.destination.memory;
        let missing = all(&run.vm).iter().find(|page| !memory.has(*page));
        let lost = memory.poisoned();
        let (waits, longest) = memory.waits();
        if missing.is_some() || !lost.is_empty() || waits.is_some() || longest > WAIT_MAX {
            let what =
                format!("missing {missing:?}, lost {lost:?}, waits {waits:?}, longest wait {longest:?}");
            self.found = Some(format!("nothing happened, and the VM did not arrive whole: {what}"));
        }
    }

    pub fn is_broken(&self, run: &Run) -> bool {
        self.breach(run).is_some()
    }

    pub fn breach(&self, run: &Run) -> Option<String> {
        self.found.clone().or_else(|| run.vm.breaches().first().cloned())
    }
}
