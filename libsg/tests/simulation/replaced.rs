//! Intermediaries that die, and others that take their places: what lies there is there when the source is not.

use std::time::Duration;

use libsg::migrate::{Mode, RoundOptions};

use crate::net::Weather;
use crate::run::{Outcome, Run};
use crate::scenario::{After, DESTINATION, Event, Role, SOURCE, Scenario, What};

/// What a VM leaves through, so that it takes a second.
const PORT_RATE: u64 = 4_000_000;

fn intermediary(nth: usize) -> Role {
    Role::Intermediary(nth)
}

fn kill(after: After, delay_ms: u64, role: Role) -> Event {
    Event { after, delay: Duration::from_millis(delay_ms), what: What::Kill(role, None) }
}

fn freeze(after: After, delay_ms: u64, role: Role, seconds: u64) -> Event {
    let what = What::Freeze(role, Duration::from_secs(seconds));
    Event { after, delay: Duration::from_millis(delay_ms), what }
}

/// A VM leaves through so many intermediaries, the last of which stand by.
fn run(mode: Mode, intermediaries: (usize, usize), events: &[Event]) -> Outcome {
    run_in_copies(1, mode, intermediaries, events)
}

/// The same, with so many holders of each page.
fn run_in_copies(replicas: u8, mode: Mode, (all, spares): (usize, usize), events: &[Event]) -> Outcome {
    let mut scenario = Scenario::plain(1200, vec![16 << 20; all], events.to_vec());
    scenario.vms[0].mode = mode;
    scenario.vms[0].rounds = RoundOptions { rounds_max: Some(2), ..RoundOptions::default() };
    (scenario.spares, scenario.replicas) = (spares, replicas);
    scenario.weather = Weather { port_rate: PORT_RATE, ..scenario.weather };
    (scenario.gather_limit, scenario.scatter_limit) = (500_000, 0);
    let outcome = Run::new(&scenario, None).run();
    assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
    assert!(outcome.evicted, "{:#?}", outcome.lines);
    outcome
}

fn replaced(outcome: &Outcome) -> usize {
    outcome.lines.iter().filter(|line| line.contains("NodeReplaced")).count()
}

/// By scatter-gather; the source dies when it has evicted, and nothing is lost. So many were replaced.
fn nothing_is_lost(intermediaries: (usize, usize), events: &[Event], replacements: usize) {
    let source_dies = kill(After::Evicted, 0, SOURCE);
    let outcome = run(Mode::ScatterGather, intermediaries, &[events, &[source_dies]].concat());
    assert_eq!((outcome.lost_pages, replaced(&outcome)), (0, replacements), "{:#?}", outcome.lines);
}

/// What lies with the one that came later is gathered, though the source is dead.
#[test]
fn another_takes_the_place_and_the_source_may_die() {
    for delay in [1, 100, 300] {
        nothing_is_lost((3, 1), &[kill(After::Commit, delay, intermediary(0))], 1);
    }
}

/// The only one is replaced as well: then the destination has to know of the new one before anything is safe there.
#[test]
fn the_only_one_is_replaced() {
    nothing_is_lost((2, 1), &[kill(After::Commit, 200, intermediary(0))], 1);
}

/// The destination hears of it from the others: it is stopped while the new one comes, and the source dies before it
/// goes on.
#[test]
fn a_destination_that_was_not_told_asks_around() {
    let events = [freeze(After::Running, 50, DESTINATION, 5), kill(After::Running, 100, intermediary(0))];
    nothing_is_lost((3, 1), &events, 1);
}

/// Who takes the place dies as well, and is replaced.
#[test]
fn the_one_that_came_later_dies_too() {
    let events = [kill(After::Commit, 50, intermediary(0)), kill(After::Commit, 400, intermediary(3))];
    nothing_is_lost((4, 2), &events, 2);
}

/// While the VM still runs at the source: state and COMMIT reach the new one with those of the others, one of which dies
/// behind the switch.
#[test]
fn one_that_dies_in_the_rounds_is_replaced_in_them() {
    for delay in [50, 400] {
        let events = [kill(After::Start, delay, intermediary(1)), kill(After::Commit, 20, intermediary(0))];
        let outcome = run(Mode::Hybrid, (3, 1), &events);
        let at = |what: &str| outcome.lines.iter().position(|line| line.contains(what));
        assert!(
            at("NodeReplaced") < at("Source: Commit") && at("NodeReplaced").is_some(),
            "{:#?}",
            outcome.lines
        );
        assert_eq!(outcome.lost_pages, 0, "{:#?}", outcome.lines);
    }
}

/// Who stands by cannot be had: it goes on without.
#[test]
fn where_nobody_can_take_the_place_it_goes_on() {
    let events = [kill(After::Start, 0, intermediary(2)), kill(After::Commit, 50, intermediary(0))];
    let outcome = run(Mode::ScatterGather, (3, 1), &events);
    assert_eq!((outcome.lost_pages, replaced(&outcome)), (0, 0), "{:#?}", outcome.lines);
}

/// Whoever is slow to come is not waited for, also when all is over by then.
#[test]
fn one_that_is_slow_to_come_holds_up_nobody() {
    for delay in [100, 500, 900] {
        let dies = kill(After::Commit, delay, intermediary(0));
        let outcome =
            run(Mode::ScatterGather, (3, 1), &[dies, freeze(After::Commit, delay, intermediary(2), 4)]);
        assert_eq!(outcome.lost_pages, 0, "{:#?}", outcome.lines);
    }
}

/// By scatter-gather, with two copies of each page: one of so many dies, another comes in its place, and when all is evicted
/// the source dies, and with it one more of those that were there from the beginning: there are two copies again.
fn there_are_copies_again(intermediaries: (usize, usize), events: &[Event]) {
    let (members, evicted) = (intermediaries.0 - intermediaries.1, After::Evicted);
    for one_more in 1..members {
        let dies = [kill(evicted, 0, SOURCE), kill(evicted, 0, intermediary(one_more))];
        let outcome = run_in_copies(2, Mode::ScatterGather, intermediaries, &[events, &dies].concat());
        assert_eq!((outcome.lost_pages, replaced(&outcome)), (0, 1), "{one_more}: {:#?}", outcome.lines);
    }
}

#[test]
fn where_pages_have_copies_they_have_as_many_again() {
    for delay in [1, 100, 300] {
        there_are_copies_again((4, 1), &[kill(After::Commit, delay, intermediary(0))]);
    }
}

/// One is left, which alone knows of the new one until the destination does: that is waited for.
#[test]
fn of_two_one_is_replaced() {
    for delay in [1, 100, 200] {
        there_are_copies_again((3, 1), &[kill(After::Commit, delay, intermediary(0))]);
    }
}

/// The destination is stopped, and cannot hear of the new one: it is not waited for, and the new one takes no pages.
#[test]
fn a_destination_that_is_stopped_holds_nobody_up_where_one_of_two_dies() {
    let events = [freeze(After::Running, 50, DESTINATION, 20), kill(After::Running, 100, intermediary(0))];
    let outcome = run_in_copies(2, Mode::ScatterGather, (3, 1), &events);
    let at = |what: &str| outcome.lines.iter().position(|line| line.contains(what)).expect(what);
    assert!(at("NodeReplaced") < at("Source: Evicted") && outcome.lost_pages == 0, "{:#?}", outcome.lines);
    assert!(at("Source: Evicted") < at("Destination: Gathered"), "{:#?}", outcome.lines);
}

/// In the rounds, while the VM runs: what was sent before has copies again, and COMMIT is where the state is.
#[test]
fn copies_are_made_again_in_the_rounds() {
    for delay in [50, 400] {
        let events = [
            kill(After::Start, delay, intermediary(0)),
            kill(After::Evicted, 0, intermediary(1)),
            kill(After::Evicted, 0, SOURCE),
        ];
        let outcome = run_in_copies(2, Mode::Hybrid, (4, 1), &events);
        assert_eq!((outcome.lost_pages, replaced(&outcome)), (0, 1), "{:#?}", outcome.lines);
    }
}

/// Who takes the place dies as well, before it has any copies or when it has some.
#[test]
fn one_that_came_for_copies_dies_too() {
    for delay in [210, 300, 500] {
        let events = [
            kill(After::Commit, 200, intermediary(0)),
            kill(After::Commit, delay, intermediary(4)),
            kill(After::Evicted, 0, intermediary(1)),
        ];
        let outcome = run_in_copies(2, Mode::ScatterGather, (5, 2), &events);
        assert_eq!(outcome.lost_pages, 0, "{:#?}", outcome.lines);
        assert!(replaced(&outcome) > 0, "{:#?}", outcome.lines);
    }
}
