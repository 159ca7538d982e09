//! Whole migrations by seed, as in libsg, whose hosts, guests and contracts these are: over devices that move pages between
//! clients and intermediaries, on the world's clock. By seed some hosts have none, devices register no more memory, and
//! queue pairs fail.

#[path = "../../../libsg/tests/simulation/clock.rs"]
mod clock;
#[path = "../../../libsg/tests/simulation/content.rs"]
mod content;
#[path = "../../../libsg/tests/simulation/contracts.rs"]
mod contracts;
#[path = "../../../libsg/tests/simulation/destination.rs"]
mod destination;
#[path = "../../../libsg/tests/simulation/found.rs"]
mod found;
#[path = "../../../libsg/tests/simulation/frames.rs"]
mod frames;
#[path = "../../../libsg/tests/simulation/guest.rs"]
mod guest;
#[path = "../../../libsg/tests/simulation/intermediary.rs"]
mod intermediary;
#[path = "../../../libsg/tests/simulation/late.rs"]
mod late;
#[path = "../../../libsg/tests/simulation/memory.rs"]
mod memory;
#[path = "../../../libsg/tests/simulation/moving.rs"]
mod moving;
#[path = "../../../libsg/tests/simulation/net.rs"]
mod net;
#[path = "../../../libsg/tests/simulation/parked/mod.rs"]
mod parked;
#[path = "../../../libsg/tests/simulation/random.rs"]
mod random;
#[path = "../../../libsg/tests/simulation/run.rs"]
mod run;
#[path = "../../../libsg/tests/simulation/scenario.rs"]
mod scenario;
#[path = "../../../libsg/tests/simulation/seeds.rs"]
mod seeds;
#[path = "../../../libsg/tests/simulation/shrink.rs"]
mod shrink;
#[path = "../../../libsg/tests/simulation/side.rs"]
mod side;
#[path = "../../../libsg/tests/simulation/source.rs"]
mod source;
#[path = "../../../libsg/tests/simulation/stranger.rs"]
mod stranger;
#[path = "../../../libsg/tests/simulation/successors.rs"]
mod successors;
#[path = "../../../libsg/tests/simulation/writers.rs"]
mod writers;
mod canaries;
mod devices;

use std::ops::Range;

use net::Weather;
use scenario::Scenario;
use side::SideNetwork;

fn side_network(seed: u64, weather: &Weather) -> Option<Box<dyn SideNetwork>> {
    Some(Box::new(devices::Devices::of(seed, weather)))
}

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number")))
}

/// A quarter as many as over connections.
fn seeds_asked() -> Range<u64> {
    let (first, count) = (number("SG_SIM_FIRST", 0), number("SG_SIM_SEEDS", 400) / 4);
    first..first + count
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
    let report = broken.map_or_else(String::new, |failure| failure.report());
    assert!(sum.broken.is_empty(), "{sum}\n{:?}\n{report}", sum.broken);
    assert!(sum.moved_bytes > 0, "devices move pages: {sum}");
}

/// As the test of that name in libsg.
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
