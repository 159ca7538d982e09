//! Whole migrations by seed: source, destination and intermediaries are the product's own threads, cores and
//! wire format, on a simulated clock, scheduler and network. DESIGN.md says what is real and what is modelled.

mod canaries;
mod clock;
mod content;
mod contracts;
mod destination;
mod found;
mod frames;
mod guest;
mod intermediary;
mod late;
mod memory;
mod moving;
mod net;
mod parked;
mod random;
mod replaced;
mod run;
mod scenario;
mod seeds;
mod shrink;
mod side;
mod source;
mod stranger;
mod successors;
mod writers;

use std::ops::Range;

use net::Weather;
use scenario::Scenario;
use side::SideNetwork;

/// All pages go over connections.
fn side_network(_: u64, _: &Weather) -> Option<Box<dyn SideNetwork>> {
    None
}

/// `SG_SIM_SEEDS` seeds from `SG_SIM_FIRST` on.
fn seeds_asked() -> Range<u64> {
    let (first, count) = (number("SG_SIM_FIRST", 0), number("SG_SIM_SEEDS", 300));
    first..first + count
}

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number")))
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in 0..10 {
        let run = || run::Run::new(&Scenario::of(seed), None).run().trace;
        assert_eq!(run(), run(), "seed {seed}");
    }
}

#[test]
fn whatever_happens_the_contracts_hold() {
    let sum = seeds::run_all(seeds_asked(), None, 20);
    println!("{sum}");
    let broken = sum.broken.first().and_then(|(seed, _)| shrink::shrink(*seed, None));
    assert!(
        sum.broken.is_empty(),
        "{sum}\n{:?}\n{}",
        sum.broken,
        broken.map_or_else(String::new, |f| f.report())
    );
}

/// The seed `SG_SIM_SEED`, with all that is told; with those of its events only that `SG_SIM_EVENTS` names; with the bug
/// `SG_SIM_BUG`; and what libsg logs by `SG_SIM_LOG=libsg=debug` (its times are the real ones).
#[test]
fn one_seed() {
    let (seed, events, bug) = shrink::asked(|seed| Scenario::of(seed).events.len());
    if let Ok(filter) = std::env::var("SG_SIM_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).init();
    }
    let (scenario, outcome) = shrink::run_with(seed, &events, bug);
    for line in &outcome.lines {
        println!("{line}");
    }
    let failure = shrink::Failure { scenario, events, bug, outcome };
    assert!(failure.outcome.breach.is_none(), "{}", failure.report());
}
