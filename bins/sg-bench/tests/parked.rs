//! Evict now, place later, with real processes: a VM is parked, its source dies, and whoever claims it has it, once.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use rustix::process::Signal;
use serde_json::{Value, json};
use world::{Vmm, World};

/// Two intermediaries, and a busy VM of 32 MiB.
fn usual() -> (World, Vmm) {
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let source = world.vm("source", "");
    (world, source)
}

/// Parked, and its source killed at the moment at which it says so. The keeper is the first intermediary.
fn parked(world: &World, source: &Vmm, mode: &str) -> Value {
    source.park("web", mode, &world.members());
    let line = source.process.wait("evicted");
    source.process.kill();
    let volumes: Value = serde_json::from_str(&world.sg(&["ls", "--json"])).expect("JSON");
    let volume = &volumes["volumes"][0];
    assert_eq!((&volume["parked_as"], &volume["owner"]), (&json!("web"), &Value::Null), "{volumes}");
    assert!(volume["at"].as_array().expect("parts").iter().all(|at| at["state"] == "parked"), "{volumes}");
    line
}

#[test]
fn a_parked_vm_is_claimed_once_and_never_again() {
    for mode in ["scatter-gather", "hybrid"] {
        let (world, source) = usual();
        let line = parked(&world, &source, mode);
        assert_eq!(line["report"]["downtime_s"], Value::Null, "{line}");
        assert!(line["report"]["eviction_s"].as_f64() > Some(0.0), "{line}");
        assert!(world.claims_in_vain("stranger", "other", "").contains("no VM is parked as"));
        let claimant = world.claim("claimant", "web", "--gather-limit 20mbit");
        claimant.process.wait("resumed");
        for force in ["", "--force"] {
            let said = world.claims_in_vain("second", "web", force);
            assert!(said.contains("is never run a second time"), "{said}");
        }
        claimant.ask(&json!({"do": "limit", "gather": "0"}));
        claimant.arrived_whole(&world, 32);
    }
}

#[test]
fn who_claimed_and_died_before_it_ran_the_vm_is_replaced() {
    let (world, source) = usual();
    parked(&world, &source, "scatter-gather");
    // Who claims waits for it: between the keeper's grant and the VM there is time to die.
    world.intermediaries[1].process.signal(Signal::STOP);
    let first = world.claim("first", "web", "");
    first.process.wait("claimed");
    first.process.kill();
    world.intermediaries[1].process.signal(Signal::CONT);
    assert!(!first.process.told().iter().any(|line| line["event"] == "resumed"));
    let said = world.claims_in_vain("early", "web", "");
    assert!(said.contains("was claimed by") && said.contains("--force"), "{said}");
    let second = world.claim("second", "web", "--force");
    second.arrived_whole(&world, 32);
}

#[test]
fn a_vm_that_has_no_room_at_the_intermediaries_runs_on() {
    let world = World::new(2, &["--memory", "8M"]);
    let source = world.vm("source", "");
    source.park("web", "scatter-gather", &world.members());
    let line = source.process.wait("failed");
    assert_eq!(line["kind"], "full", "{line}");
    assert!(line["message"].as_str().is_some_and(|message| message.contains("sg serve")), "{line}");
    source.goes_on();
    source.verify(32);
    world.holds_nothing();
    source.quit(0);
}

#[test]
fn without_the_keeper_nobody_knows_who_has_the_vm() {
    let (mut world, source) = usual();
    parked(&world, &source, "scatter-gather");
    world.intermediaries.remove(0).process.kill();
    let said = world.claims_in_vain("claimant", "web", "");
    assert!(said.contains("the keeper i1") && said.contains("--force"), "{said}");
    assert!(world.sg(&["ls"]).contains("web"));
    assert!(world.sg(&["dissolve", "web", "--yes"]).contains("dissolved"));
    world.holds_nothing();
}
