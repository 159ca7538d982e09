//! Bugs put in on purpose in what is new where clients move pages themselves: each must be found within a thousand seeds.

use libsg::host::simulation::Bug;

use crate::seeds::run_all;

/// Seeds within which each bug is found.
const SEEDS: u64 = 1000;

/// Runs seeds with a bug until one breaks a contract, which must be one of those that `says` names.
fn is_found(bug: Bug, says: &[&str]) {
    let sum = run_all(0..SEEDS, Some(bug), 1);
    let (seed, breach) = sum.broken.first().unwrap_or_else(|| panic!("{bug:?} was not found: {sum}"));
    println!("{bug:?}: seed {seed}: {breach}");
    assert!(says.iter().any(|words| breach.contains(words)), "{bug:?} was found as something else: {breach}");
}

#[test]
fn nobody_writes_behind_the_end_of_its_epoch() {
    is_found(Bug::WayLeftOpen, &["epochs"]);
}

#[test]
fn a_page_is_there_before_it_counts() {
    is_found(Bug::SettledEarly, &["evicted means evicted", "a death is an event"]);
}
