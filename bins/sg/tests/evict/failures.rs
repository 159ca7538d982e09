//! Who dies, or changes their mind, while a host is emptied.

use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::world::{World, json, until};

const VMS: [&str; 3] = ["a", "b", "c"];

/// Three VMs that take some seconds to be parked.
fn slow() -> World {
    let mut world = World::new(2);
    world.vms(&VMS);
    world
}

fn park(world: &World) -> Command {
    let mut command = world.evict(&["--park", "--scatter", "32mbit"]);
    command.args(world.named());
    command
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_vmm_that_dies_takes_nobody_with_it() {
    let mut world = slow();
    let evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    world.vmms[1].0.kill().unwrap();
    let output = evicting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = json(&output);
    let statuses: Vec<_> = report["vms"].as_array().unwrap().iter().map(|vm| &vm["status"]).collect();
    assert_eq!((statuses[0], statuses[2]), (&"ok".into(), &"ok".into()), "{report}");
    assert_eq!(statuses[1]["kind"], "unreachable", "{report}");
    assert!(report["host"]["eviction_s"].is_null(), "not all are out: {report}");
}

#[test]
fn a_spare_takes_the_place_of_an_intermediary_that_dies() {
    let mut world = World::new(3);
    world.vms(&["a"]);
    let to = world.incoming("a", "1mbit");
    let addresses: Vec<String> = world.intermediaries.iter().map(|(_, address)| address.clone()).collect();
    let mut evict = world.evict(&["--to", &to, "--scatter", "24mbit", "--spare", &addresses[2]]);
    let evicting =
        evict.args(["--intermediary", &addresses[0], "--intermediary", &addresses[1]]).spawn().unwrap();
    world.until_begun(&["a"]);
    world.intermediaries[0].0.0.kill().unwrap();
    let output = evicting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    let vm = &report["vms"][0];
    assert_eq!(vm["spare_addresses"], serde_json::json!([addresses[2]]), "{report}");
    let took = vm["intermediaries"].as_array().unwrap().iter().find(|node| node["id"] == "i2");
    assert!(took.is_some_and(|node| node["bytes_in"].as_u64() > Some(0)), "{report}");
    let gathers = world.sg(&["limit", "--gather", "0"]).arg(world.path("there").join("a.sock")).status();
    assert!(gathers.unwrap().success());
    until("it is whole there", || world.is_whole("there", "a"));
}

#[test]
fn one_that_is_stopped_holds_nobody_up() {
    let world = slow();
    let evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    signal(&world.vmms[0].0, Signal::STOP);
    until("the others are out", || ["b", "c"].iter().all(|name| world.state("here", name) == "left"));
    signal(&world.vmms[0].0, Signal::CONT);
    let output = evicting.wait_with_output().unwrap();
    let report = json(&output);
    assert!(report["vms"][1]["status"] == "ok" && report["vms"][2]["status"] == "ok", "{report}");
    // Intermediaries may have given it up meanwhile: then it runs on here, whole.
    until("it is decided", || world.state("here", "a") != "leaving");
    if world.state("here", "a") == "here" {
        assert!(output.status.code() == Some(1) && world.is_whole("here", "a"), "{report}");
    }
}

#[test]
fn vms_go_on_when_nobody_divides_the_link_any_more_and_another_takes_them_over() {
    let world = slow();
    let mut evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    signal(&evicting, Signal::KILL);
    evicting.wait().unwrap();
    assert!(VMS.iter().any(|name| world.state("here", name) == "leaving"), "it was killed too late");
    let again = park(&world).output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    // Those that were out by then were left alone.
    let taken_over = json(&again)["vms"].as_array().unwrap().len();
    assert!((1..=VMS.len()).contains(&taken_over), "{again:?}");
    assert!(VMS.iter().all(|name| world.state("here", name) == "left"));
}

#[test]
fn vms_evict_alone_when_who_divides_the_link_is_killed() {
    let world = slow();
    let mut evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    signal(&evicting, Signal::KILL);
    evicting.wait().unwrap();
    until("all are out", || VMS.iter().all(|name| world.state("here", name) == "left"));
}

#[test]
fn an_interrupt_calls_off_what_is_not_committed() {
    let world = slow();
    let evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    signal(&evicting, Signal::INT);
    let output = evicting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let report = json(&output);
    for (vm, name) in report["vms"].as_array().unwrap().iter().zip(VMS) {
        // A VM is parked, and so committed, at the very end.
        assert_eq!(vm["status"]["kind"], "cancelled", "{report}");
        until("it is here", || world.state("here", name) == "here");
        assert!(world.is_whole("here", name));
    }
    // They leave when they are told again.
    let again = park(&world).output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{again:?}");
}

#[test]
fn others_cancel_and_limit_vms_that_leave() {
    let world = slow();
    let evicting = park(&world).spawn().unwrap();
    world.until_begun(&VMS);
    let one = |arguments: &[&str], name: &str| {
        let mut command = world.sg(arguments);
        command.arg(world.path("here").join(format!("{name}.sock"))).output().unwrap()
    };
    assert!(one(&["limit", "--scatter", "8mbit"], "a").status.success());
    assert!(one(&["cancel"], "b").status.success());
    until("the others' link is theirs", || world.state("here", "c") == "left");
    std::thread::sleep(Duration::from_millis(100));
    assert!(one(&["limit", "--scatter", "0"], "a").status.success());
    let output = evicting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4), "one was called off: {output:?}");
    assert_eq!(world.state("here", "b"), "here");
}
