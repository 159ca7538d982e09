//! Whole migrations by seed: source, destination and intermediaries are the product's own threads, cores and
//! wire format, on a simulated clock, scheduler and network. DESIGN.md says what is real and what is modelled.

mod canaries;
mod clock;
mod content;
mod continued;
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
use seeds::number;
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

#[test]
fn a_seed_is_the_same_run_each_time() {
    seeds::repeat_themselves(0..50);
}

#[test]
fn whatever_happens_the_contracts_hold() {
    seeds::hold(seeds_asked());
}

#[test]
fn one_seed() {
    shrink::one_seed();
}
