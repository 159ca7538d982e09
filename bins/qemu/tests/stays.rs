//! Whatever fails before COMMIT, the VM of a real QEMU runs on at its source, as it was: its heart beats on from where it stopped,
//! its memory is what it wrote, and capabilities and parameters of its migrations are as before.

mod machine;
mod process;
mod world;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use libsg::dirty::DirtyLog;
use libsg::migrate::source::{Outgoing, SourceOptions, Unscattered};
use libsg::migrate::{Event, Mode, OutgoingVm};
use libsg::report::Status;
use libsg::{ErrorKind, Result};
use machine::{Host, Machine, one_heart};
use parking_lot::Mutex;
use process::{PATIENCE, await_paused, settings};
use qemu::{Departure, LeavingQemu, Qmp};
use serde_json::{Value, json};
use world::World;

fn status(qmp: &mut Qmp) -> String {
    let told = qmp.execute("query-status", &json!({})).expect("answers");
    told["status"].as_str().expect("a status").to_owned()
}

/// The source, with its settings before anything was done.
struct Source {
    host: Host,
    before: [Value; 2],
}

impl Source {
    fn start(machine: &Machine, more: &[&str]) -> Self {
        let mut host = machine.start("from", more);
        host.await_beat("the guest does not start", |beat| beat.passes >= 1);
        let before = settings(&mut host.qemu.connect());
        Self { host, before }
    }

    fn begin(&self) -> Departure {
        Departure::begin(self.host.qemu.connect(), "vm").expect("begins")
    }

    /// It was not moved, and it is as if nobody had tried.
    fn stays(&mut self, what: &str, departure: Departure) {
        departure.give_up().unwrap_or_else(|error| panic!("{what}: {}", error.chain()));
        let mut qmp = self.host.qemu.connect();
        assert_eq!(status(&mut qmp), "running", "{what}");
        assert_eq!(settings(&mut qmp), self.before, "{what}");
        drop(qmp);
        self.host.await_passes();
        one_heart(&self.host.console, Path::new("/dev/null"));
    }
}

/// A migration that is refused, for this reason.
fn is_refused(what: &str, outgoing: Outgoing, kind: ErrorKind) {
    let refused = outgoing.wait_evicted(PATIENCE).expect_err(what);
    assert_eq!(refused.kind, kind, "{what}: {}", refused.chain());
    assert!(!outgoing.progress().committed, "{what}");
}

/// Whoever follows the migration stands still at that event until it was called off, when some of the memory is out.
fn cancel_at(
    event: impl Fn(&Event) -> bool + Send + Sync + 'static,
    leave: impl FnOnce(&mut dyn FnMut(&mut SourceOptions)) -> Outgoing,
    until: impl Fn(&Outgoing) -> bool,
) -> Outgoing {
    let (comes, came) = sync_channel(1);
    let (goes, go_on) = sync_channel::<()>(1);
    let go_on = Mutex::new(go_on);
    let mut observer: Option<libsg::migrate::Observer> = Some(Arc::new(move |told| {
        if event(told) {
            comes.send(()).expect("somebody waits");
            go_on.lock().recv().expect("somebody goes on");
        }
    }));
    let outgoing = leave(&mut |options| options.observer = observer.take().expect("asked once"));
    came.recv_timeout(PATIENCE).expect("it comes so far");
    let begun = Instant::now();
    let mut goes = Some(goes);
    while !until(&outgoing) {
        // What is waited for comes when it goes on.
        goes.take().inspect(|goes| goes.send(()).expect("it stands still"));
        assert!(begun.elapsed() < PATIENCE && !outgoing.is_over(), "{:?}", outgoing.progress());
        std::thread::sleep(Duration::from_millis(5));
    }
    outgoing.cancel().expect("called off");
    goes.take().inspect(|goes| goes.send(()).expect("it stands still"));
    outgoing
}

/// The VM of a source, whose destination QEMU dies when it has stopped, and before its state is there.
struct Bereft {
    vm: LeavingQemu,
    there: Option<Host>,
}

impl OutgoingVm for Bereft {
    fn pause(&mut self) -> Result<Vec<u8>> {
        let state = self.vm.pause()?;
        drop(self.there.take());
        Ok(state)
    }

    fn resume(&mut self) -> Result<()> {
        self.vm.resume()
    }

    fn note(&mut self, unscattered: &Unscattered) -> Result<()> {
        self.vm.note(unscattered)
    }

    fn committed(&mut self) {
        self.vm.committed();
    }

    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        self.vm.dirty_log()
    }
}

/// Called off in a round, with its memory under way; its destination dies while it is paused; and called off when that is
/// READY. Then it moves all the same.
#[test]
fn a_vm_that_is_called_off_or_refused_runs_on() {
    let machine = Machine::new("q35", 1, &[]);
    let mut from = Source::start(&machine, &[]);
    let waits = |name: &str| machine.start(name, &["-incoming", "defer"]);
    let world = World::new(1);

    let there = waits("round");
    let (incoming, to) = world.arrive(there.qemu.connect(), 0);
    let departure = from.begin();
    let outgoing = cancel_at(
        |event| matches!(event, Event::Round { .. }),
        |observe| {
            world.leave_as(&departure, to, |options| {
                (options.mode, options.scatter_limit_bytes_per_s) = (Mode::Hybrid, 4 << 20);
                observe(options);
            })
        },
        |outgoing| outgoing.progress().staged_bytes > 2 << 20,
    );
    is_refused("called off in a round", outgoing, ErrorKind::Cancelled);
    from.stays("called off in a round", departure);
    incoming.wait_running(PATIENCE).expect_err("it does not run there");
    drop((incoming, there));

    let there = waits("dies");
    let (incoming, to) = world.arrive(there.qemu.connect(), 0);
    let departure = from.begin();
    let vm = Bereft { vm: departure.vm(), there: Some(there) };
    let outgoing = world.leave_by(Box::new(vm), &departure, to, |_| {});
    is_refused("its destination dies", outgoing, ErrorKind::Vm);
    from.stays("its destination dies", departure);
    incoming.wait_running(PATIENCE).expect_err("it does not run there");
    drop(incoming);

    let there = waits("ready");
    let (incoming, to) = world.arrive(there.qemu.connect(), 0);
    let departure = from.begin();
    let outgoing = cancel_at(
        |event| matches!(event, Event::Ready),
        |observe| world.leave_as(&departure, to, |options| observe(options)),
        |_| true,
    );
    is_refused("called off at READY", outgoing, ErrorKind::Cancelled);
    from.stays("called off at READY", departure);
    incoming.wait_running(PATIENCE).expect_err("it does not run there");
    drop((incoming, there));

    let mut there = waits("there");
    let (incoming, to) = world.arrive(there.qemu.connect(), 0);
    let departure = from.begin();
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    outgoing.wait_evicted(PATIENCE).expect("is out");
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.host.qemu.has_ended_well(), "{}", from.host.qemu.said());
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    there.await_passes();
    one_heart(&from.host.console, &there.console);
}

/// The source's stream breaks while its VM is paused: QEMU waits to be resumed then, and called off it would wait for ever.
#[test]
fn a_vm_whose_stream_breaks_before_commit_runs_on() {
    let machine = Machine::new("pc", 1, &[]);
    let second = machine.directory.path().join("second.qmp");
    let mut from =
        Source::start(&machine, &["-qmp", &format!("unix:{},server=on,wait=off", second.display())]);
    let mut second = Qmp::connect(&second).expect("greets");
    for (parks, resumes) in [(false, true), (false, false), (true, true), (true, false)] {
        let departure = from.begin();
        // One that is parked sends all of its memory before COMMIT.
        let mut vm = if parks { departure.vm_to_park() } else { departure.vm() };
        vm.pause().expect("paused");
        departure.pages().hang_up();
        await_paused(&mut second);
        // Who leads the migration, or, where that has not come to it, who gives it up.
        if resumes {
            vm.resume().unwrap_or_else(|error| panic!("{}", error.chain()));
            assert_eq!(status(&mut second), "running");
        }
        drop(vm);
        from.stays("its stream broke", departure);
    }
}
