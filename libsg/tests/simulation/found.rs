//! What the simulation has found, as scenarios that stay what they are when those of the seeds change.

use std::time::Duration;

use libsg::migrate::{Mode, RoundOptions};
use libsg::page::InstallUnit;

use crate::content::Content;
use crate::net::Weather;
use crate::run::Run;
use crate::scenario::{After, Event, Plan, Role, SOURCE, Scenario, What};

/// A small VM, intermediaries of 4 MiB, a fast network on which nothing happens but these events.
fn holds(intermediaries: usize, events: Vec<Event>) {
    let scenario = Scenario {
        seed: 0,
        vms: vec![Plan {
            memory: vec![Content::Version(1); 200],
            regions: vec![(200, InstallUnit::Page)],
            logs_units: false,
            mode: Mode::ScatterGather,
            rounds: RoundOptions::default(),
        }],
        intermediaries: vec![4 << 20; intermediaries],
        weather: Weather { delay: Duration::from_micros(50), jitter: Duration::ZERO, port_rate: 0 },
        gather_limit: 1_000_000,
        scatter_limit: 4_000_000,
        grace: Duration::from_secs(1),
        think: Duration::from_millis(1),
        events,
        sharing: false,
        replicas: 1,
    };
    let outcome = Run::new(&scenario, None).run();
    assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
}

/// The index there was asked for ever, and the guest waited as long.
#[test]
fn an_index_server_that_is_stopped_is_given_up() {
    let after = |after, delay, what| Event { after, delay: Duration::from_millis(delay), what };
    for delay in [0, 5, 20] {
        let stopped = What::Freeze(Role::Intermediary(0), Duration::from_secs(60));
        let events =
            vec![after(After::Running, 0, stopped), after(After::Commit, delay, What::Kill(SOURCE, None))];
        holds(2, events);
    }
}

/// Those that are left kept the list that it was in, and so other numbers than everybody else.
#[test]
fn an_intermediary_that_is_lost_before_it_has_the_volume_changes_the_numbers() {
    for delay in (0..600).step_by(10) {
        let what = What::Break(SOURCE, Role::Intermediary(0));
        holds(3, vec![Event { after: After::Start, delay: Duration::from_micros(delay), what }]);
    }
}
