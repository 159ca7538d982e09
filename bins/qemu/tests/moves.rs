//! VMs of real QEMUs move: through intermediaries, with the source QEMU gone before the destination has half of them; and stay
//! where they are when they cannot.

mod process;
mod world;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::ErrorKind;
use libsg::migrate::{Event, Observer};
use libsg::report::Status;
use parking_lot::Mutex;
use process::{PATIENCE, Qemu, settings};
use qemu::{Departure, OnLost, Qmp};
use serde_json::json;
use world::World;

/// What is put into the guest's memory, and where.
const FILLED: usize = 16 << 20;
const FILLED_AT: u64 = 16 << 20;

/// Rates in bytes a second: what is filled takes six seconds, time to look at how far it is; and so little of it goes to the
/// destination.
const SLOWLY: u64 = 2 << 20;
const NEXT_TO_NOTHING: u64 = 16 << 10;

/// The smallest window of a relay, in bytes.
const WINDOW: u64 = 8 << 20;

/// Pages that no other is like, every fourth of them zero.
fn filling() -> Vec<u8> {
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(FILLED);
    for page in 0..FILLED / 4096 {
        for _ in 0..512 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.extend(if page % 4 == 3 { [0; 8] } else { word.to_le_bytes() });
        }
    }
    bytes
}

/// A source QEMU whose guest's memory is filled, and the bytes.
fn source(directory: &Path) -> (Qemu, Vec<u8>) {
    let (file, bytes) = (directory.join("filling"), filling());
    std::fs::write(&file, &bytes).expect("written");
    let loader = format!("loader,file={},addr={FILLED_AT:#x},force-raw=on", file.display());
    (Qemu::start(directory, "source", &["-machine", "q35", "-m", "64M", "-device", &loader]), bytes)
}

fn destination(directory: &Path, machine: &str) -> Qemu {
    Qemu::start(directory, "destination", &["-machine", machine, "-m", "64M", "-incoming", "defer"])
}

/// The guest's memory where it was filled.
fn filled(qmp: &mut Qmp, directory: &Path) -> Vec<u8> {
    let file = directory.join("dump");
    let arguments = json!({ "val": FILLED_AT, "size": FILLED, "filename": file });
    qmp.execute("pmemsave", &arguments).expect("saved");
    std::fs::read(&file).expect("a dump")
}

fn status(qmp: &mut Qmp) -> String {
    let told = qmp.execute("query-status", &json!({})).expect("answers");
    told["status"].as_str().expect("a status").to_owned()
}

/// The source QEMU has ended by itself before the destination has half of the memory; then the rest comes.
#[test]
fn a_vm_moves_through_intermediaries_and_its_source_is_gone_meanwhile() {
    let directory = tempfile::tempdir().expect("creates");
    let ((mut from, bytes), there) = (source(directory.path()), destination(directory.path(), "q35"));
    let world = World::new(2);
    let (incoming, to) = world.arrive(there.connect(), 1 << 20);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    assert_eq!(departure.manifest().vm, "source");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let left = outgoing.wait_evicted(PATIENCE).expect("is out");
    assert!(left.pages.staged > Some(1000), "{left:?}");
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.has_ended_well(), "{}", from.said());
    drop(outgoing);

    incoming.wait_running(PATIENCE).expect("runs");
    // Pages of zeros are known to be, and need not come.
    let pages = incoming.progress().pages;
    assert!(pages.direct + pages.staged < 1500, "{pages:?}");
    incoming.set_gather_limit(0);
    let arrived = incoming.wait_gathered(PATIENCE).expect("is there");
    assert_eq!(arrived.status, Status::Ok);
    incoming.wait_dissolved(PATIENCE).expect("nothing is left at the intermediaries");
    drop(incoming);
    let mut qmp = there.connect();
    assert_eq!(status(&mut qmp), "running");
    let migration = qmp.execute("query-migrate", &json!({})).expect("answers");
    assert_eq!(migration["status"], "completed");
    assert!(filled(&mut qmp, directory.path()) == bytes, "the memory is not what it was");
}

/// A destination that cannot be the VM's machine is found out before the pause: the VM runs on at its source, as it was set.
#[test]
fn a_vm_that_its_destination_does_not_take_runs_on() {
    let directory = tempfile::tempdir().expect("creates");
    let ((from, bytes), there) = (source(directory.path()), destination(directory.path(), "pc"));
    let world = World::new(1);
    let before = settings(&mut from.connect());
    let (incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("it is another machine");
    assert_eq!(refused.kind, ErrorKind::Vm, "{}", refused.chain());
    assert!(refused.chain().contains("no pc-q35-"), "{}", refused.chain());
    departure.give_up().expect("put back");
    incoming.wait_running(PATIENCE).expect_err("it does not run there");
    drop((outgoing, incoming));
    assert_eq!(status(&mut there.connect()), "inmigrate");

    let mut qmp = from.connect();
    assert_eq!(status(&mut qmp), "running");
    assert_eq!(settings(&mut qmp), before);
    assert!(filled(&mut qmp, directory.path()) == bytes, "the memory is not what it was");
    drop(qmp);

    // And it can leave all the same, for another.
    let there =
        Qemu::start(directory.path(), "other", &["-machine", "q35", "-m", "64M", "-incoming", "defer"]);
    let (incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    outgoing.wait_evicted(PATIENCE).expect("is out");
    departure.complete(false).expect("the source QEMU completes");
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    drop(incoming);
    assert!(filled(&mut there.connect(), directory.path()) == bytes, "the memory is not what it was");
    let mut qmp = from.connect();
    assert_eq!((status(&mut qmp).as_str(), settings(&mut qmp)), ("postmigrate", before));
}

/// An intermediary dies with pages of which there is no other copy, and which the relay has let go: QEMU sends them again.
#[test]
fn pages_of_an_intermediary_that_dies_are_sent_again() {
    let directory = tempfile::tempdir().expect("creates");
    let ((from, bytes), there) = (source(directory.path()), destination(directory.path(), "q35"));
    let mut world = World::new(1);
    let (incoming, to) = world.arrive(there.connect(), NEXT_TO_NOTHING);
    let departure = Departure::begin_within(from.connect(), "vm", WINDOW).expect("begins");
    let outgoing = world.leave_as(&departure, to, |options| options.scatter_limit_bytes_per_s = SLOWLY);
    let dies = world.servers.pop().expect("one serves");
    let deadline = Instant::now() + PATIENCE;
    // That much it can only have when a part of it is not in the relay's window any more.
    while dies.statistics().used_bytes < WINDOW + WINDOW / 4 {
        assert!(Instant::now() < deadline, "it gets nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(dies);
    incoming.set_gather_limit(0);
    let left = outgoing.wait_evicted(PATIENCE).expect("is out");
    assert!(left.pages.resent > Some(0), "{left:?}");
    assert!(departure.resumed() > 0, "nothing was let go");
    departure.complete(true).expect("the source QEMU completes");
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    drop(incoming);
    assert!(filled(&mut there.connect(), directory.path()) == bytes, "the memory is not what it was");
}

/// Memory and vCPUs that would not fit are named.
#[test]
fn what_a_destination_lacks_is_said() {
    let directory = tempfile::tempdir().expect("creates");
    let more = ["-device", "virtio-rng-pci", "-smp", "2"];
    let machine = [&["-machine", "q35", "-m", "96M"], &more[..]].concat();
    let (from, there) =
        (Qemu::start(directory.path(), "source", &machine), destination(directory.path(), "q35"));
    let world = World::new(1);
    let (_incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("it is another machine").chain();
    for lack in
        ["pc.ram has 64 MiB and not 96 MiB", "1 qemu64-x86_64-cpu and not 2", "0 virtio-rng-pci at 01.0"]
    {
        assert!(refused.contains(lack), "{lack}: {refused}");
    }
    departure.give_up().expect("put back");
    assert_eq!(status(&mut from.connect()), "running");
}

/// A guest uses what it found its vCPU to have.
#[test]
fn a_vcpu_that_can_do_less_is_said() {
    let directory = tempfile::tempdir().expect("creates");
    let machine = |name, more: &[&str]| {
        Qemu::start(directory.path(), name, &[&["-machine", "q35", "-m", "64M"], more].concat())
    };
    let from = machine("source", &[]);
    let there = machine("destination", &["-cpu", "qemu64,-pni", "-incoming", "defer"]);
    let world = World::new(1);
    let (_incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("it is another vCPU").chain();
    assert!(refused.contains("bit 0 of CPUID 1h ECX (-cpu)"), "{refused}");
    departure.give_up().expect("put back");
    assert_eq!(status(&mut from.connect()), "running");
}

/// The source QEMU dies behind COMMIT: both ends say so, and the VM is paused for good rather than run with wrong pages.
#[test]
fn a_source_that_dies_loses_what_it_had_and_nobody_waits() {
    let mut there = loses(OnLost::Pause);
    // It waits for a page that nobody has; its process is for the operator to end.
    assert!(there.is_alive());
}

#[test]
fn a_vm_that_has_lost_pages_ends_where_that_was_wished() {
    let mut there = loses(OnLost::Kill);
    assert!(!there.has_ended_well() && !there.is_alive());
}

/// The destination QEMU of a source that has died.
fn loses(on_lost: OnLost) -> Qemu {
    let directory = tempfile::tempdir().expect("creates");
    let ((from, _), there) = (source(directory.path()), destination(directory.path(), "q35"));
    let world = World::new(1);
    let (incoming, to) = world.arrive_or(there.connect(), 1 << 20, on_lost);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let from = Mutex::new(Some(from));
    let observer: Observer = Arc::new(move |event| {
        if matches!(event, Event::Commit) {
            drop(from.lock().take());
        }
    });
    let outgoing = world.leave(&departure, to, observer);
    let failed = outgoing.wait_evicted(PATIENCE).expect_err("its pages are gone");
    assert!(failed.chain().contains("the source QEMU hung up"), "{}", failed.chain());
    drop((outgoing, departure));
    incoming.set_gather_limit(0);
    match incoming.wait_gathered(PATIENCE) {
        Ok(report) => assert_ne!(report.status, Status::Ok),
        Err(error) => assert_ne!(error.kind, ErrorKind::Timeout, "{}", error.chain()),
    }
    there
}
