//! Whole migrations by seed, as in libsg, whose hosts, guests and contracts these are: over devices that move pages between
//! clients and intermediaries, on the world's clock. By seed some hosts have none, devices register no more memory, and
//! queue pairs fail.

#[path = "../../../libsg/tests/simulation/clock.rs"]
mod clock;
#[path = "../../../libsg/tests/simulation/content.rs"]
mod content;
#[path = "../../../libsg/tests/simulation/continued.rs"]
mod continued;
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
use seeds::number;
use side::SideNetwork;

fn side_network(seed: u64, weather: &Weather) -> Option<Box<dyn SideNetwork>> {
    Some(Box::new(devices::Devices::of(seed, weather)))
}

/// A quarter as many as over connections.
fn seeds_asked() -> Range<u64> {
    let (first, count) = (number("SG_SIM_FIRST", 0), number("SG_SIM_SEEDS", 400) / 4);
    first..first + count
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    seeds::repeat_themselves(0..10);
}

#[test]
fn whatever_happens_the_contracts_hold() {
    let sum = seeds::hold(seeds_asked());
    assert!(sum.moved_bytes > 0, "devices move pages: {sum}");
}

/// As the test of that name in libsg.
#[test]
fn one_seed() {
    shrink::one_seed();
}
