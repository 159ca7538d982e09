//! Whole migrations by seed: source, destination and intermediaries are the product's own threads, cores and
//! wire format, on a simulated clock, scheduler and network. DESIGN.md says what is real and what is modelled.

mod clock;
mod contracts;
mod destination;
mod guest;
mod intermediary;
mod net;
mod random;
mod run;
mod scenario;
mod source;

use run::{Outcome, Run};
use scenario::Scenario;

fn run(scenario: &Scenario) -> Outcome {
    Run::new(scenario, None).run()
}

/// What many runs were, for whoever reads the output of the test.
#[derive(Debug, Default)]
struct Sum {
    runs: u64,
    turns: u64,
    evicted: u64,
    with_losses: u64,
    carried_bytes: u64,
}

impl Sum {
    fn add(&mut self, outcome: &Outcome) {
        self.runs += 1;
        self.turns += outcome.turns;
        self.evicted += u64::from(outcome.evicted);
        self.with_losses += u64::from(outcome.lost_pages > 0);
        self.carried_bytes += outcome.carried_bytes;
    }
}

#[test]
fn undisturbed_migrations_end_well() {
    let mut sum = Sum::default();
    for seed in 0..50 {
        let mut scenario = Scenario::of(seed);
        scenario.events.clear();
        let outcome = run(&scenario);
        sum.add(&outcome);
        assert_eq!(outcome.breach, None, "seed {seed}, {:?}: {:#?}", outcome.time, outcome.lines);
    }
    println!("{sum:?}");
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in 0..10 {
        let scenario = Scenario::of(seed);
        assert_eq!(run(&scenario).trace, run(&scenario).trace, "seed {seed}");
    }
}
