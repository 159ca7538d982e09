//! VMs that are parked where an etcd says who may have them.

use std::process::Output;

use crate::process::Etcd;
use crate::world::{World, until};

/// A VM in both of two intermediaries.
fn parked(etcd: &Etcd) -> World {
    let mut world = World::new(2);
    world.vms(&["web"]);
    let place = etcd.pool("sg/e2e");
    let mut evict = world.evict(&["--park", "--replicas", "2", "--arbiter", &place]);
    let output = evict.args(world.named()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    world
}

fn gather(world: &World, name: &str, more: &[&str]) -> Output {
    let mut gather = world.sg(&["gather", "--claim", "web"]);
    gather
        .arg(world.path("there").join(format!("{name}.sock")))
        .args(world.named())
        .args(more)
        .output()
        .unwrap()
}

fn says(output: &Output, what: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(what), "{output:?}");
}

#[test]
fn a_dead_keeper_is_missed_by_nobody_and_the_vm_runs_once() {
    let etcd = Etcd::start();
    let mut world = parked(&etcd);
    for name in ["one", "two"] {
        world.vmm("there", name, &["--empty"]);
    }
    drop(world.intermediaries.remove(0));
    let gathered = gather(&world, "one", &["--json", "-"]);
    assert_eq!(gathered.status.code(), Some(0), "{gathered:?}");
    until("it is whole", || world.is_whole("there", "one"));
    // Nothing is left of it but etcd's word.
    assert_eq!(gather(&world, "two", &["--force"]).status.code(), Some(1));
}

#[test]
fn without_etcd_nobody_has_it_but_by_force() {
    let mut etcd = Etcd::start();
    let mut world = parked(&etcd);
    etcd.kill();
    world.vmm("there", "one", &["--empty"]);
    says(&gather(&world, "one", &[]), "says who may have the parked VM");
    assert_eq!(world.state("there", "one"), "empty");
    let gathered = gather(&world, "one", &["--force"]);
    assert_eq!(gathered.status.code(), Some(0), "{gathered:?}");
    until("it is whole", || world.is_whole("there", "one"));
}
