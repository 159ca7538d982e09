//! VMs of real QEMUs move: through intermediaries, with the source QEMU gone before the destination has half of them; and stay
//! where they are when they cannot.

mod filled;
mod process;
mod world;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use filled::{FILLED, filled, filling, source, source_of};
use libsg::ErrorKind;
use libsg::migrate::destination::Incoming;
use libsg::page::InstallUnit;
use libsg::report::Status;
use process::{PATIENCE, Qemu, settings};
use qemu::{Departure, Qmp};
use serde_json::json;
use test_support::{free_huge_pages, skipped};
use world::World;

/// Rates in bytes a second: what is filled takes six seconds, time to look at how far it is; and so little of it goes to the
/// destination.
const SLOWLY: u64 = 2 << 20;
const NEXT_TO_NOTHING: u64 = 16 << 10;

/// The smallest window of a relay, in bytes.
const WINDOW: u64 = 8 << 20;

fn destination(directory: &Path, machine: &str) -> Qemu {
    Qemu::start(directory, "destination", &["-machine", machine, "-m", "64M", "-incoming", "defer"])
}

fn status(qmp: &mut Qmp) -> String {
    let told = qmp.execute("query-status", &json!({})).expect("answers");
    told["status"].as_str().expect("a status").to_owned()
}

/// It is out, most of it at intermediaries, and its source QEMU completes, and ends.
fn leaves(world: &World, departure: Departure, to: SocketAddr) {
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let left = outgoing.wait_evicted(PATIENCE).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(left.pages.staged > Some(1000), "{left:?}");
    departure.complete(true).expect("the source QEMU completes");
}

/// All of it comes, and its memory has these bytes where it was filled.
fn has_arrived(incoming: Incoming, there: &Qemu, (directory, bytes): (&Path, &[u8])) {
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    incoming.wait_dissolved(PATIENCE).expect("nothing is left at the intermediaries");
    drop(incoming);
    let mut qmp = there.connect();
    assert_eq!(status(&mut qmp), "running");
    assert_eq!(qmp.migration().expect("answers"), "completed");
    assert!(filled(&mut qmp, directory)[..bytes.len()] == *bytes, "the memory is not what it was");
}

/// The source QEMU has ended by itself before the destination has half of the memory; then the rest comes.
#[test]
fn a_vm_moves_through_intermediaries_and_its_source_is_gone_meanwhile() {
    let directory = tempfile::tempdir().expect("creates");
    let ((mut from, bytes), there) = (source(directory.path()), destination(directory.path(), "q35"));
    let world = World::new(2);
    let (incoming, to) = world.arrive(there.connect(), NEXT_TO_NOTHING);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    assert_eq!(departure.manifest().vm, "source");
    leaves(&world, departure, to);
    assert!(from.has_ended_well(), "{}", from.said());

    incoming.wait_running(PATIENCE).expect("runs");
    // Pages of zeros are known to be, and need not come.
    let pages = incoming.progress().pages;
    assert!(pages.direct + pages.staged < 1500, "{pages:?}");
    incoming.set_gather_limit(0);
    has_arrived(incoming, &there, (directory.path(), &bytes));
}

/// Huge pages of 2 MiB move as wholes, a part of each zeros, and run at their destination before all of them are there.
#[test]
fn a_vm_in_huge_pages_moves() {
    const ENDS_MIB: u64 = 32;
    let lack = format!("fewer than {ENDS_MIB} huge pages of 2 MiB are free, for {ENDS_MIB} MiB at both ends");
    if free_huge_pages() < ENDS_MIB {
        return skipped("a QEMU in huge pages", lack);
    }
    let directory = tempfile::tempdir().expect("creates");
    let memory = format!("memory-backend-memfd,id=ram,size={ENDS_MIB}M,hugetlb=on,hugetlbsize=2M");
    let size = format!("{ENDS_MIB}M");
    let machine = ["-object", &memory, "-machine", "q35,memory-backend=ram", "-m", &size];
    // Below what the firmware writes at the memory's end.
    let bytes = &filling()[..FILLED / 2];
    let mut from = source_of(directory.path(), &machine, bytes);
    let there =
        Qemu::start(directory.path(), "destination", &[&machine[..], &["-incoming", "defer"]].concat());
    let world = World::new(2);
    let (incoming, to) = world.arrive(there.connect(), 1 << 20);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let huge = departure.manifest().regions.iter().filter(|region| region.unit == InstallUnit::Huge2M);
    assert_eq!(huge.map(|region| region.length_bytes).collect::<Vec<_>>(), [ENDS_MIB << 20]);
    leaves(&world, departure, to);
    assert!(from.has_ended_well(), "{}", from.said());
    incoming.wait_running(PATIENCE).expect("runs");
    let pages = incoming.progress().pages;
    assert!(pages.held < pages.total, "it ran on before all was there: {pages:?}");
    incoming.set_gather_limit(0);
    has_arrived(incoming, &there, (directory.path(), bytes));
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

/// A destination QEMU of another user, which sees none of our files, is given its connection.
#[test]
fn a_vm_moves_to_a_qemu_of_somebody_else() {
    let directory = tempfile::tempdir().expect("creates");
    let (from, bytes) = source(directory.path());
    let arguments = ["-machine", "q35", "-m", "64M", "-incoming", "defer"];
    let there = Qemu::start_as_nobody(",+sys_ptrace", directory.path(), "destination", &arguments);
    let Some(there) = there else { return };
    let world = World::new(1);
    let (incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    outgoing.wait_evicted(PATIENCE).unwrap_or_else(|error| panic!("{}", error.chain()));
    departure.complete(false).expect("the source QEMU completes");
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    drop(incoming);
    assert!(filled(&mut there.connect(), directory.path()) == bytes, "the memory is not what it was");
}

/// One that was told on its command line where its VM comes from, which some say only when they are told again.
#[test]
fn a_destination_that_does_not_wait_for_us_is_said() {
    let directory = tempfile::tempdir().expect("creates");
    let machine = ["-machine", "q35", "-m", "64M"];
    let from = Qemu::start(directory.path(), "source", &machine);
    let listens = [&machine[..], &["-incoming", "tcp:127.0.0.1:0"]].concat();
    let there = Qemu::start(directory.path(), "destination", &listens);
    let world = World::new(1);
    let (_incoming, to) = world.arrive(there.connect(), 0);
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("it listens already").chain();
    assert!(refused.contains("-incoming defer") && refused.contains("already been started"), "{refused}");
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
