//! Sources whose process dies while it parks a VM, of which the memory outlives it: another process parks it, or has it run on,
//! and it is one owner's whatever else happens.

use std::time::Duration;

use libsg::host::simulation::Bug;

use super::{After, At, Kind, Parking, What, Who};
use crate::random::Random;
use crate::run::Outcome;

const CONTINUED: Kind = Kind { name: "parked::continued", of, run };

/// That of a seed, whose source is followed by another process, and that perhaps by a third.
fn of(seed: u64) -> Parking {
    let mut parking = Parking::of(seed);
    let mut random = Random::new(seed).fork(80);
    parking.events.retain(|event| event.what != What::Kill(Who::Source, None));
    for _ in 0..random.pick(&[1, 1, 2]) {
        let after = random.pick(&[After::Start, After::Start, After::Commit, After::Commit, After::Evicted]);
        let most = random.pick(&[300, 3000, 30_000, 600_000]);
        let delay = Duration::from_micros(random.within(0, most));
        let what = What::Succeed(Duration::from_millis(random.pick(&[1, 20, 150, 5000])));
        parking.events.push(At { after, delay, what });
    }
    parking
}

fn run(parking: &Parking, bug: Option<Bug>) -> Outcome {
    super::run::Run::new(parking, bug).run()
}

#[test]
fn one_seed() {
    CONTINUED.one_seed();
}

#[test]
fn whoever_goes_on_the_contracts_hold() {
    CONTINUED.whatever_happens();
}

/// Both happen: that it is parked by the second, and that it runs on.
#[test]
fn it_is_parked_or_runs_on() {
    let (mut parked, mut stays) = (0, 0);
    for seed in 0..100 {
        let lines = run(&of(seed), None).lines;
        let Some(dies) = lines.iter().position(|line| line.contains("Succeed(")) else { continue };
        let later = |what: &str| lines[dies..].iter().any(|line| line.contains(what));
        parked += u32::from(later("source: Evicted"));
        stays += u32::from(later("source: Failed"));
    }
    assert!(parked > 10 && stays > 0, "{parked} {stays}");
}
