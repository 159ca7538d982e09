//! Intermediaries that are told to go, with real processes: what they hold goes to others first, and nothing is lost.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use world::{Daemon, PATIENCE, Vmm, World};

/// Many VMs in `ci/soak`.
fn is_soak() -> bool {
    std::env::var_os("SG_SOAK").is_some()
}

/// So many intermediaries that know of each other by a file.
fn pool(intermediaries: usize, arguments: &[&str]) -> World {
    let mut world = World::new(0, &[]);
    for number in 1..=intermediaries {
        serve(&mut world, &format!("i{number}"), arguments);
    }
    world
}

/// One more, which the others hear of.
fn serve(world: &mut World, name: &str, arguments: &[&str]) {
    let file = world.directory.path().join("pool");
    let pool = format!("static:{}", file.display());
    world.serve(name, &[arguments, &["--pool", &pool]].concat());
    write_pool(world);
}

fn write_pool(world: &World) {
    let addresses: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    std::fs::write(world.directory.path().join("pool"), addresses.join("\n")).expect("written");
}

/// It is told to go, and does, with nothing lost.
fn goes(daemon: &Daemon) {
    daemon.process.signal(Signal::TERM);
    assert_eq!(daemon.process.exit_code(), Some(0), "{}", daemon.process.log());
}

/// Waits until this much lies at an intermediary.
fn until_staged(world: &World, bytes: u64) {
    let began = Instant::now();
    while world.staged_bytes() < bytes {
        assert!(began.elapsed() < PATIENCE, "{} bytes staged", world.staged_bytes());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the first is known to have handed something over, and not all.
fn until_half_way(world: &World) {
    let began = Instant::now();
    loop {
        let status: Value = serde_json::from_str(&world.sg(&["status", "--json"])).expect("JSON");
        let leaving = &status["nodes"][0]["leaving"];
        if leaving["handed_pages"].as_u64() > Some(0) {
            assert!(leaving["left_pages"].as_u64() > Some(0), "{status}");
            assert_eq!(status["nodes"][1]["leaving"], Value::Null, "{status}");
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn park(world: &World, name: &str) -> Vmm {
    let source = world.vm(&format!("source-{name}"), "--memory 16M");
    source.park(name, "scatter-gather", &world.members());
    source
}

#[test]
fn a_parked_vm_outlives_every_intermediary_that_it_was_parked_at() {
    let mut world = pool(2, &[]);
    let source = park(&world, "web");
    source.process.wait("evicted");
    source.process.kill();
    // Who is no keeper, then the keeper, to one that was no member.
    goes(&world.intermediaries.remove(1));
    serve(&mut world, "i3", &[]);
    goes(&world.intermediaries.remove(0));
    let claimant = world.claim("claimant", "web", "");
    claimant.arrived_whole(&world, 16);
}

#[test]
fn one_that_goes_between_the_claim_and_its_end_is_missed_by_nobody() {
    let mut world = pool(3, &[]);
    let source = park(&world, "web");
    source.process.wait("evicted");
    source.process.kill();
    let claimant = world.claim("claimant", "web", "--gather-limit 40mbit");
    claimant.process.wait("claimed");
    goes(&world.intermediaries.remove(0));
    claimant.process.wait("resumed");
    goes(&world.intermediaries.remove(0));
    claimant.arrived_whole(&world, 16);
}

#[test]
fn a_destination_that_was_stopped_finds_every_page_elsewhere() {
    let mut world = pool(2, &[]);
    let source = world.vm("source", "");
    let destination = world.incoming("destination", "--gather-limit 50mbit");
    source.leave(destination.address, &world.members());
    source.process.wait("evicted");
    source.process.kill();
    destination.process.signal(Signal::STOP);
    let first = world.intermediaries.remove(0);
    goes(&first);
    // At its place is a new one, which becomes a member: the destination was not told.
    serve(&mut world, "i1", &["--listen", &first.address.to_string()]);
    goes(&world.intermediaries.remove(0));
    destination.process.signal(Signal::CONT);
    destination.arrived_whole(&world, 32);
}

#[test]
fn a_source_that_scatters_goes_on_with_those_that_are_left() {
    for replicas in [1, 2] {
        let mut world = pool(3, &["--limit-in", "200mbit"]);
        let source = world.vm("source", "");
        let destination = world.incoming("destination", "--gather-limit 50mbit");
        let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
        let to = destination.address.to_string();
        let start = json!({"do": "start", "to": to, "intermediaries": members, "replicas": replicas});
        assert_eq!(source.ask(&start)["ok"], true);
        source.process.wait_percent("scattered", 20);
        goes(&world.intermediaries.remove(0));
        source.process.wait("evicted");
        source.process.kill();
        destination.arrived_whole(&world, 32);
    }
}

/// A parked VM of 16 MiB at the first of two intermediaries, which gives out slowly; the other takes what that hands over.
fn at_one(replicas: u8) -> World {
    let mut world = pool(1, &["--limit-out", "16mbit"]);
    if replicas > 1 {
        serve(&mut world, "i2", &[]);
    }
    let source = world.vm("source", "--memory 16M");
    let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    let start = json!({"do": "start", "park": "web", "intermediaries": members, "replicas": replicas});
    assert_eq!(source.ask(&start)["ok"], true);
    source.process.wait("evicted");
    source.process.kill();
    world
}

#[test]
fn whoever_takes_over_is_killed_and_another_does() {
    let mut world = at_one(1);
    serve(&mut world, "i2", &[]);
    let leaves = world.intermediaries.remove(0);
    leaves.process.signal(Signal::TERM);
    until_staged(&world, 1 << 20);
    world.intermediaries.remove(0).process.kill();
    serve(&mut world, "i3", &[]);
    assert_eq!(leaves.process.exit_code(), Some(0), "{}", leaves.process.log());
    let claimant = world.claim("claimant", "web", "");
    claimant.arrived(16);
    claimant.quit(0);
}

#[test]
fn one_that_is_killed_while_it_hands_over_is_a_death_like_any_other() {
    let mut world = at_one(2);
    serve(&mut world, "i3", &[]);
    world.intermediaries[0].process.signal(Signal::TERM);
    until_half_way(&world);
    world.intermediaries.remove(0).process.kill();
    // It was the keeper, and had a copy of every page.
    let said = world.claims_in_vain("early", "web", "");
    assert!(said.contains("the keeper i1"), "{said}");
    let claimant = world.claim("claimant", "web", "--force");
    claimant.arrived(16);
    claimant.quit(0);
}

#[test]
fn where_nobody_has_room_it_stays_and_a_second_signal_says_what_is_lost() {
    let mut world = World::new(0, &[]);
    world.serve("i1", &["--drain-timeout", "0.3"]);
    let source = park(&world, "web");
    source.process.wait("evicted");
    source.process.kill();
    let leaves = &world.intermediaries[0];
    leaves.process.signal(Signal::TERM);
    let began = Instant::now();
    while !leaves.process.log().contains("staying: this volume is needed") {
        assert!(began.elapsed() < PATIENCE, "{}", leaves.process.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(leaves.process.log().contains("name others with --peer or --pool"), "{}", leaves.process.log());
    let claimant = world.claim("claimant", "web", "--gather-limit 1mbit");
    claimant.process.wait("claimed");
    leaves.process.signal(Signal::TERM);
    assert_eq!(leaves.process.exit_code(), Some(3));
    assert_eq!(
        leaves.process.wait("lost")["volumes"][0]["pages"].as_u64().map(|pages| pages > 0),
        Some(true)
    );
}

/// Every intermediary is restarted, one after the other, while VMs are parked there and others move.
#[test]
fn the_whole_pool_is_restarted_and_nothing_is_lost() {
    let (parked, live) = if is_soak() { (10, 2) } else { (3, 1) };
    let mut world = pool(3, &[]);
    let names: Vec<String> = (0..parked).map(|nth| format!("web-{nth}")).collect();
    for source in names.iter().map(|name| park(&world, name)) {
        source.process.wait("evicted");
        source.process.kill();
    }
    let moving: Vec<(Vmm, Vmm)> = (0..live)
        .map(|nth| {
            let source = world.vm(&format!("live-{nth}"), "--memory 16M");
            let destination = world.incoming(&format!("to-{nth}"), "--gather-limit 10mbit");
            source.leave(destination.address, &world.members());
            (source, destination)
        })
        .collect();
    for nth in 1..=3 {
        let leaves = world.intermediaries.remove(0);
        write_pool(&world);
        goes(&leaves);
        serve(&mut world, &format!("i{nth}"), &["--listen", &leaves.address.to_string()]);
    }
    for (source, destination) in &moving {
        source.process.wait("evicted");
        destination.ask(&json!({"do": "limit", "gather": "0"}));
        destination.arrived(16);
        destination.process.wait("dissolved");
        destination.quit(0);
    }
    for name in &names {
        let claimant = world.claim(&format!("claims-{name}"), name, "");
        claimant.arrived(16);
        claimant.process.wait("dissolved");
        claimant.quit(0);
    }
    world.holds_nothing();
}
