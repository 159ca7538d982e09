//! Intermediaries that die and others that take their places, with real processes, where each page lies at two: there are two
//! copies again, whether the source makes them or, when it is gone, those that are left.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use world::{PATIENCE, SLOWLY, Vmm, World};

/// Three intermediaries and one that stands by, each of which takes little at once; a VM of 16 MiB.
fn usual() -> (World, Vmm) {
    let world = World::new(4, &["--limit-in", "100mbit"]);
    let source = world.vm("source", "--memory 16M --zero-fraction 0.1");
    (world, source)
}

/// Starts to leave for there through the first of the intermediaries, in two copies; others stand by.
fn leave(source: &Vmm, whereto: (&str, &str), members: usize, world: &World) {
    let (members, spares): (Vec<_>, Vec<_>) =
        world.members().into_iter().enumerate().partition(|(at, _)| *at < members);
    let addresses = |of: Vec<(usize, std::net::SocketAddr)>| -> Vec<String> {
        of.into_iter().map(|(_, address)| address.to_string()).collect()
    };
    let mut start = json!({
        "do": "start", "intermediaries": addresses(members), "spares": addresses(spares), "replicas": 2,
        "scatter": SLOWLY,
    });
    start[whereto.0] = whereto.1.into();
    let answer = source.ask(&start);
    assert_eq!(answer["ok"], true, "{answer}");
}

/// One dies on the way, and another takes its place; then the source has evicted, and is killed, and so is one more of those
/// that were there from the beginning.
fn two_die(world: &mut World, source: &Vmm, (first, second): (usize, usize), percent: u64) {
    source.process.wait_percent("scattered", percent);
    world.intermediaries[first].process.kill();
    let line = source.process.wait("node-replaced");
    assert!(line["message"].as_str().is_some_and(|said| said.contains("takes the place of")), "{line}");
    source.hurries();
    source.process.wait("evicted");
    source.process.kill();
    world.intermediaries[second].process.kill();
    let mut nth = 0;
    world.intermediaries.retain(|_| {
        nth += 1;
        nth - 1 != first && nth - 1 != second
    });
}

#[test]
fn one_dies_and_is_replaced_and_then_another_dies() {
    for (dies, percent) in [((0, 1), 10), ((2, 0), 40), ((1, 2), 60)] {
        let (mut world, source) = usual();
        let destination = world.incoming("destination", "--gather-limit 20mbit");
        leave(&source, ("to", &destination.address.to_string()), 3, &world);
        two_die(&mut world, &source, dies, percent);
        destination.ask(&json!({"do": "limit", "gather": "0"}));
        destination.arrived_whole(&world, 16);
    }
}

/// The other one of two is enough for the new one to be known, as the destination hears of it.
#[test]
fn one_of_two_dies_and_is_replaced_and_then_the_other_dies() {
    let mut world = World::new(3, &["--limit-in", "100mbit"]);
    let source = world.vm("source", "--memory 16M --zero-fraction 0.1");
    let destination = world.incoming("destination", "--gather-limit 20mbit");
    leave(&source, ("to", &destination.address.to_string()), 2, &world);
    two_die(&mut world, &source, (0, 1), 30);
    destination.ask(&json!({"do": "limit", "gather": "0"}));
    destination.arrived_whole(&world, 16);
}

#[test]
fn one_dies_while_the_vm_is_parked_and_is_replaced_and_then_another_dies() {
    for (dies, percent) in [((1, 2), 10), ((2, 1), 60)] {
        let (mut world, source) = usual();
        leave(&source, ("park", "web"), 3, &world);
        two_die(&mut world, &source, dies, percent);
        let claimant = world.claim("claimant", "web", "");
        claimant.arrived_whole(&world, 16);
    }
}

/// Waits until so many intermediaries that live have two copies of the volume between them, and none is missing.
fn until_whole(world: &World, members: usize) {
    let began = Instant::now();
    loop {
        let volumes: Value = serde_json::from_str(&world.sg(&["ls", "--json"])).expect("JSON");
        let at = volumes["volumes"][0]["at"].as_array().cloned().unwrap_or_default();
        if at.len() == members && at.iter().all(|at| at["mending"]["missing_copies"].as_u64() == Some(0)) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{volumes}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Evicted long ago: all that it was parked at die, one after the other, and others of the pool have it.
#[test]
fn a_parked_vm_outlives_all_that_it_was_parked_at() {
    let mut world = World::new(0, &[]);
    let file = world.directory.path().join("pool");
    let pool = format!("static:{}", file.display());
    for name in ["i1", "i2", "i3", "i4"] {
        world.serve(name, &["--pool", &pool]);
    }
    let addresses: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    std::fs::write(&file, addresses.join("\n")).expect("written");
    let source = world.vm("source", "--memory 16M --zero-fraction 0.1");
    let start = json!({"do": "start", "park": "web", "intermediaries": &addresses[..2], "replicas": 2});
    assert_eq!(source.ask(&start)["ok"], true);
    source.process.wait("evicted");
    source.process.kill();
    // Who is no keeper, then the keeper.
    for dies in [1, 0] {
        world.intermediaries.remove(dies).process.kill();
        until_whole(&world, 2);
    }
    let claimant = world.claim("claimant", "web", "--force");
    claimant.arrived_whole(&world, 16);
}
