//! A source QEMU that is played, which is slow, or does not do what it is told.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use libsg::ids::{Epoch, Round, VolumeId};
use libsg::manifest::Region;
use libsg::migrate::Mode;
use libsg::migrate::source::To;
use libsg::page::{InstallUnit, PageIndex};
use libsg::source::{Outcome, PageSource as _};
use qemu_stream::{Block, Blocks, Configuration};
use serde_json::Value;

use super::*;
use crate::layout::Layout;
use crate::qmp::test::{await_next, playing};

/// What it was told, in order.
type Told = Arc<Mutex<Vec<String>>>;

/// A QEMU whose migration is "active" until it is cancelled, and `cancelled` from then on. `answer` says what it says to other
/// commands than those, where it says something of its own.
pub(crate) fn source(
    cancelled: &'static str,
    mut answer: impl FnMut(&str, &UnixStream) -> Option<Value> + Send + 'static,
) -> (tempfile::TempDir, Qmp, Told) {
    let (told, mut status) = (Told::default(), "active");
    let hears = Arc::clone(&told);
    let (directory, socket) = playing(move |command, _, stream| {
        hears.lock().push(command.to_owned());
        answer(command, stream).unwrap_or_else(|| {
            if command == "migrate_cancel" {
                status = cancelled;
            }
            json!({ "return": { "status": status } })
        })
    });
    let qmp = Qmp::connect(&socket).expect("greets");
    (directory, qmp, told)
}

fn manifest() -> Manifest {
    let layout = Layout::new(Blocks::new(vec![Block::new("pc.ram", 64 << 12)]).expect("blocks"));
    let manifest = layout.manifest("web", (&Configuration::new("pc-q35-7.2"), 2), &Devices::default());
    let manifest = manifest.expect("a manifest");
    assert!(matches!(&manifest.regions[..], [Region { unit: InstallUnit::Page, .. }]));
    manifest
}

/// One that leaves, and the other end of its stream.
fn leaves(qmp: Qmp) -> (Departure, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let departure = Departure {
        qmp: Arc::new(Mutex::new(qmp)),
        settings: Settings::default(),
        relay: Relay::start(ours, Limits::of_window(0)).expect("starts"),
        manifest: manifest(),
        window_bytes: 0,
        file: None,
        is_spent: false,
        is_stopped: Arc::default(),
    };
    (departure, theirs)
}

fn ends_with(told: &Told, last: &[&str]) {
    assert!(told.lock().ends_with(&last.iter().map(ToString::to_string).collect::<Vec<_>>()), "{told:?}");
}

/// Longer than whoever waits does; and what the rest is given.
pub(crate) const SHORT: Duration = Duration::from_millis(50);
const STOPS: Duration = Duration::from_secs(3);

/// Its disks take their time: what was begun ends, and the VM runs on.
#[test]
fn a_vm_that_takes_too_long_to_stop_runs_on() {
    let (_directory, mut qmp, told) = source("cancelled", |command, stream| {
        if command == "stop" {
            await_next(stream);
        }
        None
    });
    qmp.hurry(STEP, STOPS);
    let (departure, _stream) = leaves(qmp);
    let error = departure.vm().pause().expect_err("it does not stop in time");
    assert_eq!(error.kind, ErrorKind::Timeout, "{}", error.chain());
    ends_with(&told, &["stop", "query-migrate", "migrate_cancel", "query-migrate", "cont"]);
    departure.give_up().expect("it is as it was");
    assert_eq!(told.lock().iter().filter(|command| *command == "cont").count(), 1, "{told:?}");
}

/// It does not even say whether it has stopped: whoever waits is told, and tries again when it gives up.
#[test]
fn a_vm_that_may_be_paused_is_told_of_and_run_later() {
    let hangs = Arc::new(AtomicBool::new(true));
    let is_silent = Arc::clone(&hangs);
    let (_directory, qmp, told) = source("cancelled", move |command, _| {
        let is_silent = command != "qmp_capabilities" && is_silent.load(Ordering::Relaxed);
        is_silent.then_some(Value::Null)
    });
    let (departure, _stream) = leaves(qmp);
    departure.qmp.lock().hurry(SHORT, SHORT);
    let error = departure.vm().pause().expect_err("it says nothing");
    assert_eq!(error.kind, ErrorKind::Vm);
    for said in ["does not answer", "may be paused", "cont runs it"] {
        assert!(error.chain().contains(said), "{}", error.chain());
    }
    hangs.store(false, Ordering::Relaxed);
    departure.qmp.lock().hurry(STEP, STEP);
    departure.give_up().expect("it answers again");
    assert!(told.lock().contains(&"cont".into()), "{told:?}");
}

/// A stream that breaks when it has stopped; and then it refuses to run on.
#[test]
fn a_vm_that_cannot_be_run_again_is_told_of() {
    for refuses in [false, true] {
        let (_directory, qmp, told) = source("cancelled", move |command, _| {
            let refused = json!({ "error": { "desc": "no lock on its disk" } });
            (refuses && command == "cont").then_some(refused)
        });
        let (departure, stream) = leaves(qmp);
        drop(stream);
        let error = departure.vm().pause().expect_err("nothing comes");
        ends_with(&told, &["cont"]);
        assert!(error.chain().contains("hung up"), "{}", error.chain());
        assert_eq!(error.chain().contains("no lock on its disk"), refuses, "{}", error.chain());
    }
}

/// One that switched while it was cancelled: QEMU 7.2 may take that for a broken network, 10 refuses it. Its end is refused then,
/// by way of a stream that it resumes; and it is never cancelled again.
#[test]
fn one_that_has_switched_is_resumed_and_refused() {
    for refuses in [false, true] {
        let mut asked = 0;
        let (_directory, qmp, told) = source("postcopy-paused", move |command, _| match command {
            "migrate" => Some(json!({ "error": { "desc": "played" } })),
            "migrate_cancel" if refuses => Some(json!({ "error": { "desc": "cannot cancel" } })),
            "query-migrate" if refuses => {
                asked += 1;
                let status = ["active", "postcopy-active", "postcopy-paused"][asked.min(3) - 1];
                Some(json!({ "return": { "status": status } }))
            }
            _ => None,
        });
        let (departure, mut stream) = leaves(qmp);
        for _ in 0..2 {
            let error = call_off(&departure.qmp, Some(&departure.relay), &departure.manifest);
            let error = error.expect_err("nobody resumes it").chain();
            assert!(error.contains("played"), "{error}");
            assert!(told.lock().iter().any(|command| command == "migrate"), "{told:?}");
        }
        assert_eq!(told.lock().iter().filter(|command| *command == "migrate_cancel").count(), 1, "{told:?}");
        if refuses {
            assert_eq!(std::io::Read::read(&mut stream, &mut [0]).expect("broken off"), 0);
        }
    }
}

/// What does not end for another reason is not said to have.
#[test]
fn a_cancel_that_is_refused_is_told() {
    let (_directory, qmp, _) = source("cancelled", |command, _| {
        (command == "migrate_cancel").then(|| json!({ "error": { "desc": "not now" } }))
    });
    let (departure, _stream) = leaves(qmp);
    let error = departure.give_up().expect_err("it goes on");
    assert!(error.chain().contains("not now"), "{}", error.chain());
}

/// What could not be begun, and what could not be put back then, are told together.
#[test]
fn what_is_not_as_it_was_is_told_beside_what_went_wrong() {
    for (refuses, as_it_was) in [("migrate_cancel", false), ("none", true)] {
        let (_directory, qmp, _) = source("cancelled", move |command, _| match command {
            "query-migrate-capabilities" => {
                Some(json!({ "return": [{ "capability": "postcopy-ram", "state": false }] }))
            }
            "query-migrate-parameters" => {
                let told = json!({ "max-bandwidth": 1, "max-postcopy-bandwidth": 1, "downtime-limit": 1 });
                Some(json!({ "return": told }))
            }
            "migrate" => Some(json!({ "error": { "desc": "no stream" } })),
            command => (command == refuses).then(|| json!({ "error": { "desc": "not now" } })),
        });
        let error = Departure::begin(qmp, "web").err().expect("it does not begin").chain();
        assert!(error.contains("no stream"), "{error}");
        for said in ["not now", "query-migrate-parameters"] {
            assert_eq!(error.contains(said), !as_it_was, "{error}");
        }
    }
}

/// A VM that another process was parking, before COMMIT. It is given back, and who comes next finds that; but for one that has
/// said everything, of which nothing is changed.
#[test]
fn a_vm_that_is_gone_on_with_runs_again_unless_all_was_said() {
    for is_spent in [false, true] {
        let (directory, qmp, told) = source("cancelled", |_, _| None);
        let file = DepartedFile::new(&directory.path().join("file"), None);
        let mut departed = Departed::begun(&qmp, (&Settings::default(), &manifest()), 0);
        let unscattered = Unscattered {
            volume: VolumeId(1),
            epoch: Epoch::FIRST,
            to: To::parked("web"),
            keeper: None,
            mode: Mode::ScatterGather,
            round: Round(0),
            replicas: 1,
            members: Vec::new(),
            manifest: manifest(),
        };
        departed.unscattered = Some(unscattered);
        let standing = if is_spent { Standing::Spent } else { Standing::Paused };
        let departure = Departure::go_on(qmp, &departed, file.clone(), standing).expect("goes on");
        let mut vm = departure.vm();
        let is_noted = || file.read().expect("read").is_some_and(|now| now.unscattered.is_some());
        if is_spent {
            departure.pages().outcome(PageRange::new(PageIndex(0), 64), Outcome::Safe);
            assert!(!vm.go_on().expect("nothing is to come"), "it never runs here");
            let refused = vm.resume().expect_err("it hears nothing");
            assert!(refused.message.contains("said everything"), "{refused}");
            departure.give_up().expect_err("it is the same one");
            assert!(is_noted() && !told.lock().contains(&"cont".into()), "{told:?}");
        } else {
            vm.resume().expect("it runs again");
            assert!(!is_noted());
            ends_with(&told, &["migrate_cancel", "query-migrate", "cont"]);
            departure.give_up().expect("it is as it was");
            assert_eq!(file.read().expect("read"), None);
        }
    }
}
