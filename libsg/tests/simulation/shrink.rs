//! From a seed that fails to the fewest events that make it fail, and how to see it again.

use std::fmt::Write;

use libsg::host::simulation::Bug;

use crate::run::{Outcome, Run};
use crate::scenario::{Plan, Scenario};

/// A failure, as small as it was made.
pub struct Failure {
    pub scenario: Scenario,
    /// Which of the seed's events are left.
    pub events: Vec<usize>,
    pub outcome: Outcome,
}

/// The run of a seed with some of its events only.
pub fn run_with(seed: u64, events: &[usize], bug: Option<Bug>) -> (Scenario, Outcome) {
    let mut scenario = Scenario::of(seed);
    scenario.events = events.iter().filter_map(|nth| scenario.events.get(*nth).copied()).collect();
    let outcome = Run::new(&scenario, bug).run();
    (scenario, outcome)
}

/// Drops what is not needed: first what had not happened yet when the contract was broken, then one event after
/// the other. `None` when the seed does not fail.
pub fn shrink(seed: u64, bug: Option<Bug>) -> Option<Failure> {
    let all: Vec<_> = (0..Scenario::of(seed).events.len()).collect();
    let fails = |events: &[usize]| {
        let (scenario, outcome) = run_with(seed, events, bug);
        outcome.breach.is_some().then(|| Failure { scenario, events: events.to_vec(), outcome })
    };
    let mut least = fails(&all)?;
    let happened = &least.outcome.happened;
    let prefix: Vec<_> =
        all.into_iter().filter(|nth| happened.contains(&least.scenario.events[*nth])).collect();
    if let Some(less) = fails(&prefix) {
        least = less;
    }
    let mut at = 0;
    while at < least.events.len() {
        let mut fewer = least.events.clone();
        fewer.remove(at);
        match fails(&fewer) {
            Some(less) => least = less,
            None => at += 1,
        }
    }
    Some(least)
}

impl Failure {
    /// What is printed about it.
    pub fn report(&self) -> String {
        let Self { scenario, events, outcome } = self;
        let breach = outcome.breach.as_deref().unwrap_or_default();
        let numbers: Vec<_> = events.iter().map(ToString::to_string).collect();
        let mut text = format!("seed {}: {breach}\n", scenario.seed);
        let (turns, time) = (outcome.turns, outcome.time);
        let _ = writeln!(text, "broken after {turns} turns, {time:?}; the fewest events that do it:");
        for event in &scenario.events {
            let _ = writeln!(text, "    {event}");
        }
        let members = &scenario.intermediaries;
        let Scenario { weather, gather_limit, scatter_limit, grace, sharing, replicas, .. } = scenario;
        let _ = writeln!(
            text,
            "with intermediaries of {members:?} bytes, {replicas} holders, sharing: {sharing}, {weather:?},"
        );
        for Plan { regions, mode, rounds, .. } in &scenario.vms {
            let _ = writeln!(text, "a VM of {regions:?} pages, {mode:?}, {rounds:?},");
        }
        let _ =
            writeln!(text, "limits of {gather_limit} and {scatter_limit} bytes/s, grace {grace:?}. Again by");
        let (seed, numbers) = (scenario.seed, numbers.join(","));
        let command = "cargo test -p libsg --test simulation one_seed -- --nocapture";
        let _ = writeln!(text, "    SG_SIM_SEED={seed} SG_SIM_EVENTS={numbers} {command}");
        text
    }
}
