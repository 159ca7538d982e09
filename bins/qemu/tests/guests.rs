//! Guests with an operating system move: their memory is what they wrote, and their hearts go on where they stopped.

mod machine;
mod process;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::Work;
use libsg::ErrorKind;
use libsg::migrate::Mode;
use libsg::migrate::source::SourceOptions;
use libsg::migrate::{Event, Observer};
use libsg::report::{SourceReport, Status};
use libsg::server::ServerHandle;
use machine::{FILLED_MIB, Host, Machine, one_heart};
use parking_lot::Mutex;
use process::{PATIENCE, Qemu, settings};
use qemu::Departure;
use world::World;

/// The guest runs at its destination while most of its memory is elsewhere still, with its source gone.
fn moves(machine: &Machine) {
    let world = World::new(2);
    moves_through(machine, &world, Arc::new(|_| {}));
}

/// What the source says of it.
fn moves_through(machine: &Machine, world: &World, observer: Observer) -> SourceReport {
    moves_as(machine, world, |options| options.observer = observer).0
}

/// With other options than the usual ones; and how often QEMU's stream was resumed.
fn moves_as(
    machine: &Machine,
    world: &World,
    change: impl FnOnce(&mut SourceOptions),
) -> (SourceReport, u32) {
    let mut from = machine.start("from", &[]);
    from.await_beat("the guest does not start", |beat| beat.passes >= 1);
    let mut there = machine.start("there", &["-incoming", "defer"]);
    let (incoming, to) = world.arrive(there.qemu.connect(), 1 << 20);
    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    let outgoing = world.leave_as(&departure, to, change);
    let left = outgoing.wait_evicted(PATIENCE).expect("is out");
    assert!(left.pages.staged > Some(1000), "{left:?}");
    let resumed = departure.resumed();
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
    drop(outgoing);

    incoming.wait_running(PATIENCE).expect("runs");
    let last = from.said().beats.last().map_or(0, |beat| beat.number);
    there.await_beat("its heart stands still", |beat| beat.number > last + 3);
    let pages = incoming.progress().pages;
    assert!(pages.held < pages.total, "it ran on before all was there: {pages:?}");
    incoming.set_gather_limit(0);
    let arrived = incoming.wait_gathered(PATIENCE).expect("is there");
    assert_eq!(arrived.status, Status::Ok);
    incoming.wait_dissolved(PATIENCE).expect("nothing is left at the intermediaries");
    there.await_passes();
    one_heart(&from.console, &there.console);
    (left, resumed)
}

#[test]
fn a_pc_with_one_vcpu() {
    moves(&Machine::new("pc", 1, &[]));
}

#[test]
fn a_pc_with_two_vcpus() {
    moves(&Machine::new("pc", 2, &[]));
}

#[test]
fn a_q35_with_one_vcpu() {
    moves(&Machine::new("q35", 1, &[]));
}

/// Devices have memory of their own, which moves as well.
#[test]
fn a_q35_with_two_vcpus_and_devices() {
    let devices = ["-device", "VGA", "-device", "virtio-net-pci", "-device", "virtio-rng-pci"];
    moves(&Machine::new("q35", 2, &[&devices[..], &["-device", "virtio-balloon-pci"]].concat()));
}

/// More pages than the relay's window, the sockets and the last ones together, by either way.
#[test]
#[ignore = "takes minutes: ci/soak runs it"]
fn a_vm_of_a_gibibyte() {
    let work = Work { filled_mib: 800, writes_per_s: 3000, checks_per_s: 40_000, threads: 2 };
    for mode in [Mode::ScatterGather, Mode::Hybrid] {
        let world = World::with_room(2, 1 << 30);
        let (left, _) = moves_as(&Machine::of("q35", "1G", work, &[]), &world, |options| options.mode = mode);
        assert!(left.pages.total > Some(1 << 18), "{left:?}");
    }
}

/// Most of it goes while it runs; what it wrote since, and the last pages, when it was paused.
#[test]
fn a_vm_is_sent_while_it_runs_first() {
    let work = Work { filled_mib: 160, writes_per_s: 3000, checks_per_s: 20_000, threads: 1 };
    let machine = Machine::of("q35", "256M", work, &[]);
    let (left, _) = moves_as(&machine, &World::new(2), |options| options.mode = Mode::Hybrid);
    assert_eq!(left.rounds.len(), 1, "{left:?}");
    let total = left.pages.total.expect("it is known");
    assert!(left.rounds[0].dirty_after < total / 4, "{left:?}");
}

/// With pages that have no other copy there, acknowledged: none is lost, since the source lives.
#[test]
fn an_intermediary_dies_while_the_source_lives() {
    let mut world = World::new(2);
    let dies = Mutex::new(world.servers.pop());
    world.others = dies.lock().iter().map(ServerHandle::address).collect();
    let observer: Observer = Arc::new(move |event| {
        if matches!(event, Event::Scattered { percent } if *percent >= 50) {
            drop(dies.lock().take());
        }
    });
    let left = moves_through(&Machine::new("pc", 1, &[]), &world, observer);
    assert!(left.pages.resent > Some(0), "{left:?}");
}

/// In a round, with pages that the relay has let go: what is missing is sent again behind the switch.
#[test]
fn an_intermediary_dies_in_a_round() {
    let mut world = World::new(2);
    let dies = world.servers.pop().expect("two serve");
    world.others = vec![dies.address()];
    let dies = Arc::new(Mutex::new(Some(dies)));
    let (kills, round) = (Arc::clone(&dies), Arc::new(AtomicBool::new(false)));
    let begins = Arc::clone(&round);
    let killer = std::thread::spawn(move || {
        let begun = Instant::now();
        // So much that it has pages which are safe there.
        while !(round.load(Ordering::Acquire)
            && kills.lock().as_ref().is_some_and(|dies| dies.statistics().used_bytes > 8 << 20))
        {
            assert!(begun.elapsed() < PATIENCE, "it gets nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(kills.lock().take());
    });
    let switched = Arc::new(Mutex::new(None));
    let notes = Arc::clone(&switched);
    let work = Work { filled_mib: 100, writes_per_s: 1000, checks_per_s: 20_000, threads: 1 };
    let (left, resumed) = moves_as(&Machine::of("q35", "192M", work, &[]), &world, move |options| {
        options.mode = Mode::Hybrid;
        options.scatter_limit_bytes_per_s = 24 << 20;
        options.observer = Arc::new(move |event| match event {
            Event::Round { .. } => begins.store(true, Ordering::Release),
            // It was paused: whether the intermediary was dead by then.
            Event::Ready => *notes.lock() = Some(dies.lock().is_none()),
            _ => {}
        });
    });
    killer.join().expect("killed");
    assert_eq!(*switched.lock(), Some(true), "it died behind the round");
    assert!(left.pages.resent > Some(0) && resumed > 0, "{resumed}: {left:?}");
}

/// Parked, its source gone, it waits for nobody, and goes on where it stopped when it is claimed.
#[test]
fn a_vm_is_parked_and_claimed() {
    let machine = Machine::new("q35", 1, &[]);
    let mut from = machine.start("from", &[]);
    from.await_beat("the guest does not start", |beat| beat.passes >= 1);
    let world = World::new(2);
    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    let outgoing = world.park(&departure, "web", 0);
    let left = outgoing.wait_evicted(PATIENCE).expect("is parked");
    assert!(left.pages.staged > Some(u64::from(FILLED_MIB) * 200), "{left:?}");
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
    drop(outgoing);

    // Another machine cannot be it: both wait on.
    let other = Qemu::start(
        machine.directory.path(),
        "other",
        &["-machine", "pc", "-m", "64M", "-incoming", "defer"],
    );
    let refused =
        world.claim(other.connect(), "web", false).wait_running(PATIENCE).expect_err("another machine");
    assert!(refused.chain().contains("no pc-q35-"), "{}", refused.chain());

    let mut there = machine.start("there", &["-incoming", "defer"]);
    // By who knows that the other does not run it; otherwise after 10 s.
    let incoming = world.claim(there.qemu.connect(), "web", true);
    incoming.wait_running(PATIENCE).expect("runs");
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    incoming.wait_dissolved(PATIENCE).expect("nothing is left at the intermediaries");
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// No room for it, and a cancel with its memory under way: it runs on, settings as before, and can be parked all the same.
#[test]
fn a_vm_that_cannot_be_parked_runs_on() {
    let machine = Machine::new("pc", 1, &[]);
    let mut from = machine.start("from", &[]);
    from.await_beat("the guest does not start", |beat| beat.passes >= 1);
    let before = settings(&mut from.qemu.connect());
    let runs_on = |from: &mut Host, departure: Departure| {
        departure.give_up().expect("put back");
        assert_eq!(settings(&mut from.qemu.connect()), before);
        from.await_passes();
    };

    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    let small = World::with_room(1, 16 << 20);
    let outgoing = small.park(&departure, "web", 0);
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("there is no room");
    assert_eq!(refused.kind, ErrorKind::Full, "{}", refused.chain());
    runs_on(&mut from, departure);

    let world = World::new(1);
    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    let outgoing = world.park(&departure, "web", 4 << 20);
    let begun = Instant::now();
    while outgoing.progress().safe_pages < 500 {
        assert!(begun.elapsed() < PATIENCE && !outgoing.is_over(), "{:?}", outgoing.progress());
        std::thread::sleep(Duration::from_millis(10));
    }
    outgoing.cancel().expect("called off");
    let refused = outgoing.wait_evicted(PATIENCE).expect_err("it was called off");
    assert_eq!(refused.kind, ErrorKind::Cancelled, "{}", refused.chain());
    runs_on(&mut from, departure);

    let departure = Departure::begin(from.qemu.connect(), "vm").expect("begins");
    world.park(&departure, "web", 0).wait_evicted(PATIENCE).expect("is parked");
    departure.complete(false).expect("the source QEMU completes");
    let mut there = machine.start("there", &["-incoming", "defer"]);
    let incoming = world.claim(there.qemu.connect(), "web", false);
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    there.await_passes();
    one_heart(&from.console, &there.console);
}
