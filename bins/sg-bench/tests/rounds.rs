//! VMs that are sent in rounds while they run, with real processes: no page is wrong, whoever is killed.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use serde_json::{Value, json};
use world::{Vmm, World};

/// A VM that starts to leave in rounds through two intermediaries, which take bytes at the same rate as the
/// destination.
fn leaving(what: &str, rate: &str, how: Value) -> (World, Vmm, Vmm) {
    let world = World::new(2, &["--limit-in", rate]);
    let source = world.vm("source", what);
    let destination = world.incoming("destination", &format!("--gather-limit {rate}"));
    leave(&source, &destination, &world, how);
    (world, source, destination)
}

/// Starts to leave in rounds.
fn leave(source: &Vmm, destination: &Vmm, world: &World, how: Value) {
    let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    let to = destination.address.to_string();
    let mut request = json!({"do": "start", "to": to, "intermediaries": members});
    for (key, value) in how.as_object().expect("an object") {
        request[key] = value.clone();
    }
    let answer = source.ask(&request);
    assert_eq!(answer["ok"], true, "{answer}");
}

fn hybrid() -> Value {
    json!({"mode": "hybrid", "rounds": 2, "downtime_limit_ms": 1})
}

fn pre_copy(via: &str) -> Value {
    json!({"mode": "pre-copy", "rounds": 4, "downtime_limit_ms": 20, "via": via})
}

/// Gone, and told so with its report.
fn evicted(source: &Vmm) -> Value {
    source.process.wait("evicted")["report"].clone()
}

#[test]
fn a_busy_vm_leaves_in_rounds_over_every_kind_of_memory() {
    for (what, how) in [
        ("--common 0.3 --zero-fraction 0.3", hybrid()),
        ("--backing memfd --vcpus 2", hybrid()),
        ("--common 0.3 --zero-fraction 0.3", pre_copy("direct")),
        ("--backing memfd --vcpus 2", pre_copy("vmd")),
    ] {
        let (_world, source, destination) = leaving(what, "400mbit", how);
        let report = evicted(&source);
        assert!(!report["rounds"].as_array().expect("rounds").is_empty(), "{report}");
        assert!(report["rounds_ended"].is_string(), "{report}");
        destination.arrived(32);
        source.quit(0);
        destination.quit(0);
    }
}

#[test]
fn the_source_is_killed_when_it_has_evicted() {
    for how in [hybrid(), pre_copy("direct")] {
        let (_world, source, destination) = leaving("", "400mbit", how);
        source.process.wait("evicted");
        source.process.kill();
        destination.arrived(32);
        destination.quit(0);
    }
}

#[test]
fn an_intermediary_is_killed_in_a_round() {
    for how in [hybrid(), pre_copy("vmd")] {
        let (world, source, destination) = leaving("", "100mbit", how);
        source.process.wait("round");
        world.intermediaries[0].process.kill();
        source.process.wait("evicted");
        destination.arrived(32);
        assert!(source.process.has_told("node-lost", "i1"));
    }
}

#[test]
fn the_destination_is_killed_in_a_round_and_the_vm_runs_on() {
    for how in [hybrid(), pre_copy("direct")] {
        let (_world, source, destination) = leaving("", "100mbit", how);
        source.process.wait("round");
        destination.process.kill();
        source.process.wait("failed");
        source.goes_on();
        source.verify(32);
        source.quit(0);
    }
}

#[test]
fn called_off_in_a_round_the_vm_runs_on() {
    let (_world, source, destination) = leaving("", "100mbit", hybrid());
    source.process.wait("round");
    assert_eq!(source.ask(&json!({"do": "cancel"}))["ok"], true);
    source.process.wait("failed");
    source.goes_on();
    source.verify(32);
    assert!(!destination.process.has_told("resumed", ""));
}
