//! VMs of real QEMUs of which pages are lost for good: it is said which, and they stand still, or end.

mod filled;
mod machine;
mod process;
mod world;

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use filled::source;
use libsg::ErrorKind;
use libsg::migrate::destination::Incoming;
use libsg::migrate::{Event, Observer};
use libsg::page::PageRange;
use libsg::report::Status;
use machine::Machine;
use parking_lot::Mutex;
use process::{PATIENCE, Qemu, await_paused};
use qemu::{Departure, OnLost, Qmp};
use serde_json::json;
use world::World;

/// Bytes a second, of which the memory has more than a minute's worth.
const SLOWLY: u64 = 256 << 10;

/// What was told of pages that are lost.
type Told = Arc<Mutex<Vec<PageRange>>>;

/// A QEMU waits for a VM, and whoever follows that notes what is lost.
fn arrive(world: &World, there: &Qemu, on_lost: OnLost) -> (Incoming, SocketAddr, Told) {
    let told = Told::default();
    let notes = Arc::clone(&told);
    let (incoming, to) = world.arrive_as(there.connect(), on_lost, |options| {
        options.gather_limit = SLOWLY;
        options.observer = Arc::new(move |event| {
            if let Event::Lost { pages } = event {
                notes.lock().extend_from_slice(pages);
            }
        });
    });
    (incoming, to, told)
}

/// The arrival ends: report and events name the same pages, which are those that are not there.
fn names_what_is_lost(incoming: &Incoming, told: &Told) {
    let report = incoming.wait_gathered(PATIENCE).unwrap_or_else(|error| panic!("{}", error.chain()));
    let Status::Failed(failure) = &report.status else { panic!("{report:?}") };
    assert_eq!(failure.kind, ErrorKind::Lost, "{}", failure.message);
    let pages = |ranges: &[PageRange]| {
        let mut pages: Vec<u32> = ranges.iter().flat_map(|range| range.iter()).map(|page| page.0).collect();
        pages.sort_unstable();
        pages
    };
    let lost = pages(&failure.lost);
    assert!(!lost.is_empty() && lost == pages(&told.lock()), "{failure:?}, {:?}", told.lock());
    let counts = incoming.progress().pages;
    assert_eq!(counts.total - counts.held, lost.len() as u64, "{counts:?}");
    let said = serde_json::to_value(&report).expect("JSON");
    let ranges = said["status"]["lost"].as_array().expect("ranges");
    assert_eq!((ranges.len(), &said["status"]["kind"]), (failure.lost.len(), &json!("lost")), "{said}");
}

/// An intermediary dies behind the eviction, with the only copy: a VM none of whose vCPUs waits for that is paused, and can be
/// looked at.
#[test]
fn a_vm_that_has_lost_pages_is_paused() {
    let directory = tempfile::tempdir().expect("creates");
    let (mut from, _) = source(directory.path());
    let second = directory.path().join("second.qmp");
    let asked = format!("unix:{},server=on,wait=off", second.display());
    let arguments = ["-machine", "q35", "-m", "64M", "-incoming", "defer", "-qmp", &asked];
    let mut there = Qemu::start(directory.path(), "destination", &arguments);
    let mut world = World::new(1);
    // It makes all of its sockets before it answers at any.
    let (incoming, to, told) = arrive(&world, &there, OnLost::Pause);
    let mut second = Qmp::connect(&second).expect("greets");
    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    outgoing.wait_evicted(PATIENCE).expect("is out");
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.has_ended_well(), "{}", from.said());
    drop(outgoing);
    incoming.wait_running(PATIENCE).expect("runs");
    // Firmware that found nothing to boot, and waits for a key.
    let (mut faults, mut same, begun) = (0, 0, Instant::now());
    while same < 50 {
        let now = incoming.progress().pages.faults;
        same = if now == faults { same + 1 } else { 0 };
        faults = now;
        assert!(begun.elapsed() < PATIENCE, "it waits for one page after the other");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(second.execute("query-status", &json!({})).expect("answers")["status"], "running");
    world.servers.clear();
    names_what_is_lost(&incoming, &told);
    drop(incoming);
    assert_eq!(second.execute("query-status", &json!({})).expect("answers")["status"], "paused");
    await_paused(&mut second);
    assert!(there.is_alive());
}

/// The same with a vCPU that waits for a page that is lost, and for which QEMU waits when it is to stop: all of it stands still,
/// but it may not answer any more. Its process is for the operator to end.
#[test]
fn a_vm_that_waits_for_a_page_that_is_lost_stands_still() {
    let machine = Machine::new("pc", 2, &[]);
    let mut from = machine.start("from", &[]);
    from.await_beat("the guest does not start", |beat| beat.passes >= 1);
    let second = machine.directory.path().join("second.qmp");
    let asked = format!("unix:{},server=on,wait=off", second.display());
    let mut there = machine.start("there", &["-incoming", "defer", "-qmp", &asked]);
    let mut world = World::new(1);
    let (incoming, to, told) = arrive(&world, &there.qemu, OnLost::Pause);
    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    outgoing.wait_evicted(PATIENCE).expect("is out");
    departure.complete(true).expect("the source QEMU completes");
    drop(outgoing);
    let last = from.said().beats.last().map_or(0, |beat| beat.number);
    there.await_beat("its heart stands still", |beat| beat.number > last);
    world.servers.clear();
    names_what_is_lost(&incoming, &told);
    drop(incoming);
    let beats = there.said().beats.len();
    // Many beats' time.
    std::thread::sleep(Duration::from_millis(500));
    let said = there.said();
    assert!(said.beats.len() == beats && said.complaints.is_empty(), "it goes on: {said:?}");
    assert!(there.qemu.is_alive());
    let connection = UnixStream::connect(&second).expect("listens");
    match Qmp::over(connection, &second, Duration::from_secs(1)) {
        Ok(mut qmp) => {
            let status = qmp.execute("query-status", &json!({})).expect("answers");
            assert_eq!(status["status"], "paused");
        }
        Err(error) => assert_eq!(error.kind, ErrorKind::Timeout, "{}", error.chain()),
    }
}

/// The source QEMU dies behind COMMIT: both ends say so, and nobody waits.
#[test]
fn a_source_that_dies_loses_what_it_had_and_nobody_waits() {
    let mut there = loses(OnLost::Pause);
    // Its devices read pages that there are not: it waits for them, or ends when its feeder does. It runs nothing.
    let said = there.said();
    assert!(there.is_alive() || said.contains("load of migration failed"), "{said}");
}

#[test]
fn a_vm_that_has_lost_pages_ends_where_that_was_wished() {
    let mut there = loses(OnLost::Kill);
    assert!(!there.has_ended_well() && !there.is_alive());
}

/// The destination QEMU of a source that has died.
fn loses(on_lost: OnLost) -> Qemu {
    let directory = tempfile::tempdir().expect("creates");
    let (from, _) = source(directory.path());
    let arguments = ["-machine", "q35", "-m", "64M", "-incoming", "defer"];
    let there = Qemu::start(directory.path(), "destination", &arguments);
    let world = World::new(1);
    let (incoming, to, told) = arrive(&world, &there, on_lost);
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
    names_what_is_lost(&incoming, &told);
    there
}
