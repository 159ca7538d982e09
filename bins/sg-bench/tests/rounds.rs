//! VMs that are sent in rounds while they run, with real processes: no page is wrong, whoever is killed.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use world::{PATIENCE, SLOWLY, Vmm, World};

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

/// The same, [`SLOWLY`].
fn leaving_slowly(mut how: Value) -> (World, Vmm, Vmm) {
    how["scatter"] = SLOWLY.into();
    leaving("", "100mbit", how)
}

/// Gone, and told so with its report.
fn evicted(source: &Vmm) -> Value {
    source.process.wait("evicted")["report"].clone()
}

/// Until intermediaries hold so much.
fn until_staged(world: &World, bytes: u64) {
    let began = Instant::now();
    while world.staged_bytes() < bytes {
        assert!(began.elapsed() < PATIENCE, "nothing is staged");
        std::thread::sleep(Duration::from_millis(20));
    }
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
        let (world, source, destination) = leaving_slowly(how);
        source.process.wait("round");
        world.intermediaries[0].process.kill();
        source.process.wait_message("node-lost", "i1");
        source.hurries();
        source.process.wait("evicted");
        destination.arrived(32);
    }
}

#[test]
fn the_destination_is_killed_in_a_round_and_the_vm_runs_on() {
    for (how, is_staged) in [(hybrid(), true), (pre_copy("direct"), false), (pre_copy("vmd"), true)] {
        let (world, source, destination) = leaving_slowly(how);
        source.process.wait("round");
        until_staged(&world, if is_staged { 1 << 20 } else { 0 });
        destination.process.kill();
        source.process.wait("failed");
        source.goes_on();
        source.verify(32);
        world.holds_nothing();
        assert!(!source.process.has_told("warning", "may still hold"));
        source.quit(0);
    }
}

#[test]
fn the_destination_is_killed_in_a_round_and_who_may_hold_pages_is_named() {
    let (world, source, destination) = leaving_slowly(pre_copy("vmd"));
    source.process.wait("round");
    until_staged(&world, 1 << 20);
    world.intermediaries[0].process.signal(Signal::STOP);
    destination.process.kill();
    source.process.wait("failed");
    let told = source.process.wait("warning")["message"].as_str().unwrap_or_default().to_owned();
    assert!(told.starts_with("i1") && told.contains("may still hold"), "{told}");
    source.goes_on();
    source.verify(32);
    world.intermediaries[0].process.signal(Signal::CONT);
    // What the warning says to do. It may find what it was asked in vain, and be done before.
    let words: Vec<&str> = told.split_whitespace().collect();
    let at = words.windows(2).position(|pair| pair == ["sg", "dissolve"]).expect("what to do");
    world.sg(&["dissolve", words[at + 2], "--yes"]);
    world.holds_nothing();
    source.quit(0);
}

#[test]
fn called_off_in_a_round_the_vm_runs_on() {
    let (_world, source, destination) = leaving_slowly(hybrid());
    source.process.wait("round");
    assert_eq!(source.ask(&json!({"do": "cancel"}))["ok"], true);
    source.process.wait("failed");
    source.goes_on();
    source.verify(32);
    assert!(!destination.process.has_told("resumed", ""));
}
