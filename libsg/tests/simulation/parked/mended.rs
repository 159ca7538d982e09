//! A VM that is parked with several copies of each page, whose intermediaries die one after the other: what went with one lies
//! at the others again before the next one dies, or, where too few are left, at some that were no members. One may die while
//! the VM is being parked, in whose place another comes.

use std::time::Duration;

use libsg::host::simulation::Bug;
use libsg::migrate::Mode;
use libsg::page::InstallUnit;

use super::run::Run;
use super::{After, At, Kind, Parking, What, Who};
use crate::content::Content;
use crate::random::Random;
use crate::run::Outcome;

/// Between two deaths: who is silent has to be found out, and what it had has to be sent.
const APART: Duration = Duration::from_secs(30);

fn after(after: After, seconds: f64, what: What) -> At<What> {
    At { after, delay: Duration::from_secs_f64(seconds), what }
}

fn dies(nth: usize, seconds: f64) -> At<What> {
    after(After::Evicted, seconds, What::Kill(Who::Intermediary(nth), None))
}

/// A VM at so many intermediaries, each page at so many of them, which is claimed when all that is to happen has.
fn parking(seed: u64, intermediaries: usize, replicas: u8, events: Vec<At<What>>) -> Parking {
    let mut parking = Parking::of(seed);
    parking.base.intermediaries = vec![16 << 20; intermediaries];
    parking.base.replicas = replicas;
    let last = events.iter().map(|event| event.delay).max().unwrap_or_default();
    parking.claims = vec![At { after: After::Evicted, delay: last + Duration::from_secs(1), what: () }];
    parking.events = events;
    parking
}

/// The one of a seed: all intermediaries but one die, or all of those that it began with, and sometimes something else
/// happens meanwhile.
fn of(seed: u64) -> Parking {
    let mut random = Random::new(seed).fork(70);
    let replicas = random.pick(&[2, 2, 3]);
    let intermediaries = usize::from(replicas) + random.pick(&[1, 1, 2]);
    let mut others = Random::new(seed).fork(71);
    let spares = if others.one_in(2) { others.within(1, intermediaries as u64 - 1) as usize } else { 0 };
    let dies_before = spares > 0 && intermediaries - spares > 1 && others.one_in(2);
    // As many as leave one.
    let mut order: Vec<usize> = (0..intermediaries).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    let deaths = random.within(2, intermediaries as u64 - 1) as usize;
    let mut first = random.pick(&[0.0, 0.5, 3.0]);
    if dies_before || intermediaries - spares < usize::from(replicas) {
        // It may be parked with fewer copies: then these are made first.
        first = APART.as_secs_f64();
    }
    let mut events: Vec<_> = order[..deaths]
        .iter()
        .zip(0..)
        .map(|(nth, before)| dies(*nth, first + f64::from(before) * APART.as_secs_f64()))
        .collect();
    if dies_before {
        let dies = What::Kill(Who::Intermediary(order[0]), None);
        let times = (others.pick(&[After::Start, After::Commit]), others.pick(&[0.0, 0.001, 0.01, 0.1, 1.0]));
        events[0] = after(times.0, times.1, dies);
    }
    let survivor = order[deaths];
    if random.one_in(2) {
        let at = first + random.pick(&[0.1, 2.0, 5.0, 6.0, 7.0]);
        let other = Who::Intermediary(random.pick(&order));
        let time = Duration::from_millis(random.pick(&[1, 600, 5000]));
        let what = random.pick(&[
            What::Freeze(Who::Intermediary(survivor), time),
            What::Break(Who::Intermediary(survivor), other),
            What::Cut(Who::Intermediary(survivor), other, time),
        ]);
        events.push(after(After::Evicted, at, what));
    }
    let mut parking = parking(seed, intermediaries, replicas, events);
    parking.base.spares = spares;
    if random.one_in(4) {
        let huge = InstallUnit::Huge2M;
        let plan = &mut parking.base.vms[0];
        plan.memory.resize(2 * huge.pages() as usize, Content::Version(1));
        plan.memory.truncate(2 * huge.pages() as usize);
        plan.regions = vec![(plan.memory.len() as u64, huge)];
        // Each holder may be asked for a unit twice at once, over the slowest port.
        parking.base.grace = Duration::from_secs(2);
    }
    parking
}

/// Whoever claimed it last has all of it.
fn run(parking: &Parking, bug: Option<Bug>) -> Outcome {
    let mut outcome = Run::new(parking, bug).run();
    let said = |what: &str| outcome.lines.iter().any(|line| line.contains(what));
    if outcome.evicted && outcome.breach.is_none() {
        if said(": Lost {") {
            outcome.breach = Some("a death is an event: pages are lost of which there were copies".into());
        } else if !said(": Gathered") {
            outcome.breach = Some("a death is an event: the VM cannot be had".into());
        }
    }
    outcome
}

const MENDED: Kind = Kind { name: "parked::mended", of, run };

fn nothing_is_lost(parking: &Parking) {
    let outcome = run(parking, None);
    assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
    assert!(outcome.evicted, "{:#?}", outcome.lines);
}

#[test]
fn all_but_one_die_one_after_the_other() {
    let apart = APART.as_secs_f64();
    for (first, second) in [(1, 2), (2, 1), (0, 1), (0, 2), (2, 0)] {
        nothing_is_lost(&parking(0, 3, 2, vec![dies(first, 0.0), dies(second, apart)]));
    }
    nothing_is_lost(&parking(0, 4, 3, vec![dies(3, 0.0), dies(1, apart), dies(2, 2.0 * apart)]));
    // Two at once, then one more.
    nothing_is_lost(&parking(
        0,
        5,
        3,
        vec![dies(4, 0.0), dies(1, 0.1), dies(2, apart), dies(3, apart + 0.1)],
    ));
}

/// Those that it began with die, or it began with too few: others take copies that were no members.
#[test]
fn where_too_few_are_left_others_become_members() {
    let apart = APART.as_secs_f64();
    for (members, others, deaths) in [
        (2, 1, vec![0, 1]),
        (2, 1, vec![1, 0]),
        (2, 2, vec![0, 1, 3]),
        (3, 2, vec![2, 0, 1]),
        (1, 1, vec![0]),
    ] {
        let events = deaths.iter().zip(1..).map(|(nth, at)| dies(*nth, f64::from(at) * apart)).collect();
        let mut parking = parking(0, members + others, 2, events);
        parking.base.spares = others;
        nothing_is_lost(&parking);
    }
}

/// Those that are left have no room for one copy more of each page.
#[test]
fn where_nobody_has_room_others_become_members() {
    let events = vec![dies(0, 0.0), dies(1, APART.as_secs_f64()), dies(2, 2.0 * APART.as_secs_f64())];
    // Of a source that keeps what is safe: of one that forgets it, some pages find no place over devices, where what comes
    // free in a chunk that is written is nobody's.
    let mut parking = parking(1, 5, 2, events);
    parking.base.vms[0].memory = vec![Content::Version(1); 1400];
    parking.base.vms[0].regions = vec![(1400, InstallUnit::Page)];
    // Together they hold the VM twice, and hardly more.
    parking.base.intermediaries = vec![4 << 20, 4 << 20, 4 << 20, 16 << 20, 16 << 20];
    parking.base.spares = 2;
    nothing_is_lost(&parking);
}

/// Who is only silent for a moment is not dead, and who comes back has what it had.
#[test]
fn one_that_is_stopped_meanwhile_comes_back() {
    for seconds in [2, 20] {
        let stops = What::Freeze(Who::Intermediary(2), Duration::from_secs(seconds));
        nothing_is_lost(&parking(0, 3, 2, vec![after(After::Evicted, 0.0, stops), dies(1, 40.0)]));
    }
}

#[test]
fn one_seed() {
    MENDED.one_seed();
}

#[test]
fn whatever_happens_in_between_nothing_is_lost() {
    MENDED.whatever_happens();
}

#[test]
fn copies_are_made_again() {
    MENDED.finds(Bug::MendsNothing, &["a death is an event"]);
}

/// Who dies while a VM is being parked is replaced by one that stands by, be it the only one, in the rounds or behind them.
#[test]
fn another_takes_the_place_of_one_that_dies_while_the_vm_is_parked() {
    for (members, replicas, mode) in [
        (2, 1, Mode::ScatterGather),
        (1, 1, Mode::ScatterGather),
        (2, 1, Mode::Hybrid),
        (2, 2, Mode::ScatterGather),
        (3, 2, Mode::Hybrid),
    ] {
        for ms in [50, 300, 1000] {
            let delay = Duration::from_millis(ms);
            let dies =
                At { after: After::Start, delay, what: What::Kill(Who::Intermediary(members - 1), None) };
            let mut parking = parking(0, members + 1, replicas, vec![dies]);
            parking.base.spares = 1;
            parking.base.weather.port_rate = 4_000_000;
            let plan = &mut parking.base.vms[0];
            plan.memory = vec![Content::Version(1); 1200];
            (plan.regions, plan.mode) = (vec![(1200, InstallUnit::Page)], mode);
            let outcome = run(&parking, None);
            assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
            let replaced = outcome.lines.iter().any(|line| line.contains("NodeReplaced"));
            assert!(outcome.evicted && replaced, "{members} {replicas} {mode:?} {ms}: {:#?}", outcome.lines);
        }
    }
}
