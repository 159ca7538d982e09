//! What the simulation has found, as scenarios that stay what they are when those of the seeds change.

use std::time::Duration;

use crate::run::{Outcome, Run};
use crate::scenario::{After, DESTINATION, Event, Role, SOURCE, Scenario, What};

/// A small VM, intermediaries of 4 MiB, a fast network on which nothing happens but these events.
fn holds(intermediaries: usize, events: Vec<Event>) -> Outcome {
    let scenario = Scenario::plain(200, vec![4 << 20; intermediaries], events);
    let outcome = Run::new(&scenario, None).run();
    assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
    outcome
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

/// It said that it waits for another VM, and was taken for the destination that fails: the source stopped, and never evicted.
#[test]
fn a_process_that_takes_the_destinations_place_does_not_end_the_scatter() {
    for delay in (0..60).step_by(5) {
        let what = What::Kill(DESTINATION, Some(Duration::from_millis(1)));
        let dies = Event { after: After::Commit, delay: Duration::from_millis(delay), what };
        let outcome = holds(2, vec![dies]);
        assert!(outcome.evicted, "{:#?}", outcome.lines);
    }
}
