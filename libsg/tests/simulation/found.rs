//! What the simulation has found, as scenarios that stay what they are when those of the seeds change.

use std::time::Duration;

use crate::run::Run;
use crate::scenario::{After, Event, Role, SOURCE, Scenario, What};

/// A small VM, intermediaries of 4 MiB, a fast network on which nothing happens but these events.
fn holds(intermediaries: usize, events: Vec<Event>) {
    let scenario = Scenario::plain(200, vec![4 << 20; intermediaries], events);
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
