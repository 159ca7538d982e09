//! From a seed that fails to the fewest events that make it fail, and how to see it again.

use std::fmt::Write;

use libsg::host::simulation::Bug;

use crate::run::{Outcome, Run};
use crate::scenario::{Plan, Scenario};
use crate::seeds::{number, run_each};

/// A failure, as small as it was made.
pub struct Failure {
    pub scenario: Scenario,
    /// Which of the seed's events are left.
    pub events: Vec<usize>,
    /// The bug that was put in on purpose.
    pub bug: Option<Bug>,
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
        outcome.breach.is_some().then(|| Failure { scenario, events: events.to_vec(), bug, outcome })
    };
    let mut least = fails(&all)?;
    let happened = &least.outcome.happened;
    let prefix: Vec<_> =
        all.into_iter().filter(|nth| happened.contains(&least.scenario.events[*nth])).collect();
    if let Some(less) = fails(&prefix) {
        least = less;
    }
    while let Some(less) = without_one(&least.events, fails) {
        least = less;
    }
    Some(least)
}

/// Fails still, without one of these events.
pub fn without_one<T>(events: &[usize], fails: impl Fn(&[usize]) -> Option<T>) -> Option<T> {
    (0..events.len()).find_map(|at| {
        let mut fewer = events.to_vec();
        fewer.remove(at);
        fails(&fewer)
    })
}

/// The command that runs a seed again, with these of its events, in the test of this name.
pub fn again(test: &str, seed: u64, events: &[usize], bug: Option<Bug>) -> String {
    let numbers: Vec<_> = events.iter().map(ToString::to_string).collect();
    let bug = bug.map_or_else(String::new, |bug| format!(" SG_SIM_BUG={bug:?}"));
    let what = format!("SG_SIM_SEED={seed} SG_SIM_EVENTS={}{bug}", numbers.join(","));
    let package = env!("CARGO_PKG_NAME");
    format!("    {what} cargo test -p {package} --test simulation {test} -- --exact --nocapture\n")
}

/// What that command says: a seed, which of its events (all of them, unless it says so), the bug.
pub fn asked(events: impl Fn(u64) -> usize) -> (u64, Vec<usize>, Option<Bug>) {
    let seed = number("SG_SIM_SEED", 0);
    let events = match std::env::var("SG_SIM_EVENTS") {
        Ok(text) => text.split(',').filter_map(|nth| nth.parse().ok()).collect(),
        Err(_) => (0..events(seed)).collect(),
    };
    (seed, events, std::env::var("SG_SIM_BUG").ok().map(|name| bug_named(&name)))
}

/// The seed `SG_SIM_SEED`, with all that is told; with those of its events only that `SG_SIM_EVENTS` names; with the bug
/// `SG_SIM_BUG`; and what libsg logs by `SG_SIM_LOG=libsg=debug` (its times are the real ones).
pub fn one_seed() {
    let (seed, events, bug) = asked(|seed| Scenario::of(seed).events.len());
    if let Ok(filter) = std::env::var("SG_SIM_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).init();
    }
    let (scenario, outcome) = run_with(seed, &events, bug);
    for line in &outcome.lines {
        println!("{line}");
    }
    let failure = Failure { scenario, events, bug, outcome };
    assert!(failure.outcome.breach.is_none(), "{}", failure.report());
}

/// The bug of this name.
pub fn bug_named(name: &str) -> Bug {
    serde_json::from_value(name.into()).unwrap_or_else(|error| panic!("SG_SIM_BUG={name}: {error}"))
}

impl Failure {
    /// What is printed about it.
    pub fn report(&self) -> String {
        let Self { scenario, events, bug, outcome } = self;
        let breach = outcome.breach.as_deref().unwrap_or_default();
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
        text.push_str(&again("one_seed", scenario.seed, events, *bug));
        text
    }
}

/// A seed of several events that a bug breaks.
fn broken_by(bug: Bug) -> u64 {
    let sum = run_each(0..1000, false, 1, |seed| match Scenario::of(seed).events.len() {
        0..3 => Outcome::default(),
        _ => Run::new(&Scenario::of(seed), Some(bug)).run(),
    });
    sum.broken.first().unwrap_or_else(|| panic!("{bug:?} was not found: {sum}")).0
}

#[test]
fn a_failure_is_made_small_and_says_how_it_is_seen_again() {
    for bug in [Bug::DeathForgotten, Bug::EvictedEarly] {
        let seed = broken_by(bug);
        let failure = shrink(seed, Some(bug)).expect("it fails");
        let breach = failure.outcome.breach.as_ref().expect("it fails still");
        assert!(failure.events.len() < Scenario::of(seed).events.len(), "{}", failure.report());
        // None of what is left can go.
        let fails = |events: &[usize]| run_with(seed, events, Some(bug)).1.breach;
        assert_eq!(without_one(&failure.events, fails), None, "{}", failure.report());

        let report = failure.report();
        let word = |name: &str| {
            let (_, behind) = report.split_once(name).unwrap_or_else(|| panic!("no {name} in {report}"));
            behind.split(' ').next().unwrap_or_default().to_owned()
        };
        let events: Vec<usize> =
            word("SG_SIM_EVENTS=").split(',').filter_map(|nth| nth.parse().ok()).collect();
        let again = run_with(
            word("SG_SIM_SEED=").parse().expect("a seed"),
            &events,
            Some(bug_named(&word("SG_SIM_BUG="))),
        );
        assert_eq!(again.1.breach.as_ref(), Some(breach), "{report}");
        assert!(shrink(seed, None).is_none(), "without the bug it holds");
    }
}
