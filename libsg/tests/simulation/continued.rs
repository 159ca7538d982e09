//! Sources whose process dies behind COMMIT, while their VM's memory outlives it: another process goes on, and whatever
//! else dies then, nothing is lost that one of both could have.

use std::time::Duration;

use libsg::host::simulation::Bug;

use crate::net::Weather;
use crate::random::Random;
use crate::run::{Outcome, Run};
use crate::scenario::{After, Event, Role, Scenario, What};
use crate::seeds;

/// Another goes on, and in between and behind that one of two intermediaries dies.
fn run(seed: u64, bug: Option<Bug>) -> Outcome {
    let mut random = Random::new(seed).fork(70);
    let after = |after, delay, what| Event { after, delay: Duration::from_micros(delay), what };
    let dies = What::Kill(Role::Intermediary(random.below(2) as usize), None);
    let dies_at = if random.one_in(2) { random.within(0, 900_000) } else { random.within(400_000, 900_000) };
    let goes_on = What::Succeed(Duration::from_millis(random.pick(&[1, 20, 150])));
    let events =
        vec![after(After::Commit, random.within(0, 600_000), goes_on), after(After::Commit, dies_at, dies)];
    let mut scenario = Scenario::plain(1200, vec![16 << 20; 2 + random.below(2) as usize], events);
    scenario.seed = seed;
    scenario.weather = Weather { port_rate: random.pick(&[0, 4_000_000, 4_000_000]), ..scenario.weather };
    scenario.gather_limit = random.pick(&[500_000, 1_000_000, 4_000_000]);
    scenario.scatter_limit = random.pick(&[0, 4_000_000]);
    scenario.grace = Duration::from_secs(5);
    Run::new(&scenario, bug).run()
}

/// So many seeds.
const SEEDS: u64 = 60;

/// Also what the dead one had sent, and comes late.
#[test]
fn whoever_goes_on_loses_nothing() {
    let mut died_before = 0;
    for seed in 0..seeds::number("SG_SIM_SEEDS", SEEDS) {
        let outcome = run(seed, None);
        let at = |what: &str| outcome.lines.iter().position(|line| line.contains(what));
        let (evicted, died) = (at("Evicted").unwrap_or(usize::MAX), at("Kill(").unwrap_or(usize::MAX));
        died_before += u64::from(died < evicted);
        // What lies at one intermediary only is lost with it, once the source may be gone.
        let lost = if died > evicted { 0 } else { outcome.lost_pages };
        assert!(
            outcome.breach.is_none() && lost == 0 && evicted < usize::MAX,
            "seed {seed}: {:?}, {lost} lost, {:#?}",
            outcome.breach,
            outcome.lines
        );
    }
    assert!(died_before > 0, "nobody died in time");
}

/// Were it not said that the one before is dead.
#[test]
fn entries_of_the_dead_are_refused() {
    let found = (0..SEEDS).filter_map(|seed| run(seed, Some(Bug::FenceIgnored)).breach).next();
    let found = found.expect("not found");
    assert!(found.contains("cannot be had without the source"), "{found}");
}
