//! A whole destination whose source, intermediaries or threads fail.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gather_common::*;
use libsg::ids::Round;
use libsg::migrate::Event;
use libsg::migrate::destination::ArrivalPhase;
use libsg::page::{PageIndex, PageRange};
use libsg::report::Status;
use libsg::transport::Conversation;
use libsg::wire::IndexEntry;
use libsg::wire::handshake::Purpose;
use libsg::wire::message::{Talk, VmdRequest};
use libsg::{ErrorKind, Result};

/// A while in which something that must not happen would have happened.
const A_WHILE: Duration = Duration::from_millis(400);

fn failed(scene: &Scene) -> libsg::Error {
    scene.incoming.wait_gathered(LONG).expect_err("it failed")
}

fn ranges(pages: impl IntoIterator<Item = u32>) -> Vec<PageRange> {
    PageRange::from_pages(pages.into_iter().map(PageIndex).collect())
}

fn merged(some: &[PageRange]) -> Vec<PageRange> {
    PageRange::from_pages(some.iter().flat_map(|range| range.iter()).collect())
}

#[test]
fn the_index_is_enough_when_the_source_is_gone() {
    let scene = Scene::new(Plan { pages: 5000, nodes: 3, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Silent);
    let mut entries = vec![IndexEntry::zero(PageIndex(4990), 10, Round(0))];
    for node in 0..3_u32 {
        entries.extend(scene.stage(node as usize, (0..4990).filter(|page| page / 64 % 3 == node)));
    }
    scene.index_at_owners(&entries);
    // Some of it was announced, some sent, before the source lost power.
    source.announce(&entries[1..500]);
    source.direct.as_mut().unwrap().pages(2000..2100, 64);
    source.direct.as_mut().unwrap().settle();
    source.die();
    let memory = scene.seen.memory();
    for page in [4321, 17, 3000] {
        assert!(read(&memory, page) == content(page), "page {page}");
    }
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(report.status, Status::Ok);
    scene.check(|page| page >= 4990, |_| false);
    assert!(scene.seen.has(|event| matches!(event, Event::NodeLost { .. })));
    scene.incoming.wait_dissolved(LONG).unwrap();
    scene.nothing_staged();
}

#[test]
fn a_lost_copy_is_recovered_from_the_source() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    let entries = scene.stage(0, 0..300);
    scene.nodes[0].corrupt();
    source.announce(&entries);
    // More than are asked for at once: the others are searched for when the source has no more to say.
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(report.pages.direct, Some(300));
    scene.check(|_| false, |_| false);
    assert!(scene.seen.has(|event| matches!(event, Event::Warning { .. })));
}

#[test]
fn a_lost_copy_that_nobody_else_has_is_lost_and_reported() {
    let scene = Scene::new(Plan { nodes: 2, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Gone);
    let bad = scene.stage(0, 10..20);
    scene.nodes[0].corrupt();
    let good = scene.stage(1, (0..10).chain(20..300));
    let all: Vec<_> = good.into_iter().chain(bad).collect();
    scene.index_at_owners(&all);
    source.announce(&all);
    source.say(&Talk::Evicted);
    // They may be told in parts.
    let mut told = Vec::new();
    while told.len() < 10 {
        let Talk::Lost(some) = source.hear(|talk| matches!(talk, Talk::Lost(_))) else { unreachable!() };
        told.extend(some.iter().flat_map(|range| range.iter()));
    }
    assert_eq!(PageRange::from_pages(told), ranges(10..20));
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    match &report.status {
        Status::Failed(failure) => {
            assert_eq!((failure.kind, &failure.lost), (ErrorKind::Lost, &ranges(10..20)));
        }
        Status::Ok => panic!("{report:?}"),
    }
    assert_eq!(merged(&scene.seen.lost.lock()), ranges(10..20));
    assert_eq!(merged(&scene.seen.poisoned.lock()), ranges(10..20));
    assert!(scene.seen.has(|event| matches!(event, Event::Lost { .. })));
    scene.check(|_| false, |page| (10..20).contains(&page));
}

#[test]
fn what_no_index_knows_waits_for_the_source_and_is_then_lost() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let source = Source::start(&scene, |_| Answer::Silent);
    let entries = scene.stage(0, 0..290);
    scene.index(0, &entries);
    source.die();
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert!(matches!(report.status, Status::Failed(_)));
    assert_eq!(merged(&scene.seen.lost.lock()), ranges(290..300));
    scene.check(|_| false, |page| page >= 290);
}

#[test]
fn an_intermediary_dies_while_the_source_has_the_pages() {
    let scene = Scene::new(Plan { pages: 2000, nodes: 2, gather_limit: 4096, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    source.announce(&scene.stage(0, 0..1000));
    let other = scene.stage(1, 1000..2000);
    source.announce(&other);
    let memory = scene.seen.memory();
    assert!(read(&memory, 5) == content(5));
    scene.nodes[0].kill();
    // The source hears of it by itself, and sends them again another way; faults do not wait for that.
    assert!(read(&memory, 500) == content(500));
    scene.incoming.set_gather_limit(0);
    source.announce(&scene.stage(1, 0..700));
    source.direct.as_mut().unwrap().pages(700..1000, 64);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    scene.incoming.wait_gathered(LONG).unwrap();
    scene.check(|_| false, |_| false);
    assert!(scene.seen.has(|event| matches!(event, Event::NodeLost { .. })));
}

#[test]
fn an_intermediary_that_was_restarted_has_lost_what_it_held() {
    let scene = Scene::new(Plan { nodes: 2, gather_limit: 4096, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Silent);
    let kept = scene.stage(1, 100..300);
    let gone = scene.stage(0, 0..100);
    let all: Vec<_> = kept.into_iter().chain(gone).collect();
    scene.index(1, &all);
    source.announce(&all);
    scene.nodes[0].restart().unwrap();
    until("its loss is noticed", || scene.seen.has(|event| matches!(event, Event::NodeLost { .. })));
    source.say(&Talk::Evicted);
    source.die();
    scene.incoming.set_gather_limit(0);
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert!(matches!(report.status, Status::Failed(_)));
    let lost: u32 = scene.seen.lost.lock().iter().map(|range| range.pages).sum();
    assert!((1..=100).contains(&lost), "{lost}");
    scene.check(|_| false, |page| page < 100);
}

#[test]
fn without_commit_it_never_runs() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let mut source = Source::offer(&scene);
    source.connect(&scene, |_| Answer::Page);
    source.send_state();
    source.die();
    std::thread::sleep(A_WHILE);
    assert!(!scene.seen.running.load(Ordering::SeqCst) && !scene.seen.abandoned.load(Ordering::SeqCst));
    assert_eq!(scene.incoming.progress().phase, ArrivalPhase::Ready);
    scene.incoming.cancel().unwrap();
    assert_eq!(failed(&scene).kind, ErrorKind::Cancelled);
    assert_eq!(scene.incoming.wait_running(LONG).expect_err("never").kind, ErrorKind::Cancelled);
    assert!(scene.seen.abandoned.load(Ordering::SeqCst) && !scene.seen.running.load(Ordering::SeqCst));
}

#[test]
fn commit_in_the_volume_is_enough() {
    let scene = Scene::new(Plan { nodes: 2, ..Plan::default() });
    let mut source = Source::offer(&scene);
    source.connect(&scene, |_| Answer::Page);
    source.send_state();
    let entries = scene.stage(0, 0..300);
    scene.index_at_owners(&entries);
    scene.control(&scene.nodes[1], &VmdRequest::Commit);
    // RUN was not said, and never will be.
    source.die();
    scene.incoming.wait_running(LONG).unwrap();
    assert!(scene.seen.running.load(Ordering::SeqCst));
    assert_eq!(scene.incoming.cancel().expect_err("too late").kind, ErrorKind::Input);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(|_| false, |_| false);
}

#[test]
fn the_source_gives_up_before_commit() {
    // For its own reason, or because somebody wants so: who waits here is told which.
    for kind in [ErrorKind::Cancelled, ErrorKind::Vm] {
        let scene = Scene::new(Plan::default());
        let mut source = Source::offer(&scene);
        source.say(&Talk::Abort { kind, reason: "changed its mind".into() });
        assert_eq!(failed(&scene).kind, kind);
        assert!(scene.seen.abandoned.load(Ordering::SeqCst) && !scene.seen.running.load(Ordering::SeqCst));
    }
}

#[test]
fn a_source_that_is_lost_before_ready_is_not_waited_for() {
    let scene = Scene::new(Plan::default());
    Source::offer(&scene).die();
    assert_eq!(failed(&scene).kind, ErrorKind::Unreachable);
    assert!(scene.seen.abandoned.load(Ordering::SeqCst));
}

#[test]
fn a_source_that_is_lost_while_the_state_loads_leaves_nothing_that_hangs() {
    let scene = Scene::new(Plan { touch: vec![5], ..Plan::default() });
    let mut source = Source::offer(&scene);
    source.connect(&scene, |_| Answer::Silent);
    source.control.send_state(&blob(b"state"), soon()).unwrap();
    until("loading waits for its page", || source.faults.load(Ordering::SeqCst) > 0);
    source.die();
    assert_eq!(failed(&scene).kind, ErrorKind::Unreachable);
    assert!(scene.seen.abandoned.load(Ordering::SeqCst) && !scene.seen.running.load(Ordering::SeqCst));
}

#[test]
fn a_state_that_loads_before_the_other_connections_are_there_waits_for_them() {
    let scene = Scene::new(Plan { touch: vec![5, 299], ..Plan::default() });
    let mut source = Source::offer(&scene);
    source.control.send_state(&blob(b"state"), soon()).unwrap();
    std::thread::sleep(A_WHILE);
    source.connect(&scene, |_| Answer::Page);
    source.hear(|talk| *talk == Talk::Ready);
}

#[test]
fn before_commit_nothing_is_lost_however_long_the_source_is_away() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let mut source = Source::offer(&scene);
    source.connect(&scene, |_| Answer::Page);
    source.send_state();
    source.die();
    // Several times the grace that pages have after COMMIT.
    std::thread::sleep(3 * A_WHILE);
    let entries = scene.stage(0, 0..300);
    scene.index(0, &entries);
    scene.control(&scene.nodes[0], &VmdRequest::Commit);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(|_| false, |_| false);
}

#[test]
fn a_source_that_only_intermediaries_reach_goes_on_scattering() {
    let scene = Scene::new(Plan { nodes: 1, grace: 12 * A_WHILE, ..Plan::default() });
    Source::start(&scene, |_| Answer::Silent).die();
    // Each part comes long before the grace is over, the last long after it.
    for first in (0..300).step_by(15) {
        let entries = scene.stage(0, first..first + 15);
        scene.index(0, &entries);
        until("it is found", || scene.incoming.progress().pages.held >= u64::from(first) + 15);
        std::thread::sleep(A_WHILE);
    }
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
}

#[test]
fn cancelling_after_ready_asks_the_source() {
    for commits in [false, true] {
        let scene = Scene::new(Plan::default());
        let mut source = Source::offer(&scene);
        source.connect(&scene, |_| Answer::Page);
        source.send_state();
        std::thread::scope(|scope| {
            let cancel = scope.spawn(|| scene.incoming.cancel());
            source.hear(|talk| matches!(talk, Talk::Abort { .. }));
            assert!(!scene.seen.abandoned.load(Ordering::SeqCst));
            if commits {
                source.say(&Talk::Run);
                source.hear(|talk| *talk == Talk::Running);
                assert_eq!(cancel.join().unwrap().expect_err("too late").kind, ErrorKind::Input);
            } else {
                source.say(&Talk::Abort { kind: ErrorKind::Cancelled, reason: "as you wish".into() });
                cancel.join().unwrap().unwrap();
            }
        });
        assert_eq!(scene.seen.running.load(Ordering::SeqCst), commits);
        assert_eq!(scene.seen.abandoned.load(Ordering::SeqCst), !commits);
    }
}

#[test]
fn connections_break_and_are_made_again() {
    let scene = Scene::new(Plan { grace: LONG, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    source.direct.as_mut().unwrap().pages((0..100).chain(200..210), 64);
    source.direct.as_mut().unwrap().settle();
    source.cut_data();
    let (control, held, running) = scene.rejoin();
    assert!(running);
    assert_eq!(held, ranges((0..100).chain(200..210)));
    source.control = control;
    // A guest that faults while there is no other way waits for the source.
    let memory = scene.seen.memory();
    let guest = std::thread::spawn(move || read(&memory, 250) == content(250));
    source.connect(&scene, |_| Answer::Page);
    assert!(guest.join().unwrap());
    source.direct.as_mut().unwrap().pages((100..200).chain(210..300), 64);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(|_| false, |_| false);
}

#[test]
fn a_silent_source_is_not_waited_for_when_the_index_knows() {
    let scene = Scene::new(Plan { nodes: 2, gather_limit: 4096, ..Plan::default() });
    let mut source = Source::start(&scene, |page| if page == 7 { Answer::Page } else { Answer::Silent });
    let memory = scene.seen.memory();
    // Nobody else has it: from then on the source can be asked.
    assert!(read(&memory, 7) == content(7));
    scene.index_at_owners(&scene.stage(1, 0..300));
    assert!(read(&memory, 123) == content(123));
    until("the source was asked", || source.faults.load(Ordering::SeqCst) > 1);
    scene.incoming.set_gather_limit(0);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    scene.incoming.wait_gathered(LONG).unwrap();
    scene.check(|_| false, |_| false);
}

#[test]
fn a_panicking_thread_ends_it_with_an_error_everywhere() {
    for committed in [false, true] {
        let scene = Scene::new(Plan::default());
        let mut source = Source::offer(&scene);
        source.connect(&scene, |_| Answer::Page);
        if committed {
            source.run();
        }
        scene.seen.panic.store(true, Ordering::SeqCst);
        source.direct.as_mut().unwrap().pages(0..8, 8);
        assert_eq!(failed(&scene).kind, ErrorKind::Poisoned);
        let told = source.hear(|talk| matches!(talk, Talk::Failed { .. } | Talk::Abort { .. }));
        assert_eq!(matches!(told, Talk::Failed { .. }), committed, "{told:?}");
        assert_eq!(scene.seen.abandoned.load(Ordering::SeqCst), !committed);
        assert_eq!(scene.incoming.wait_running(LONG).is_ok(), committed);
    }
}

#[test]
fn dropping_the_handle_before_commit_gives_the_vm_up_and_after_it_does_not() {
    let scene = Scene::new(Plan::default());
    let mut source = Source::offer(&scene);
    let Scene { incoming, seen, .. } = scene;
    drop(incoming);
    assert!(matches!(source.hear(|talk| matches!(talk, Talk::Abort { .. })), Talk::Abort { .. }));
    until("it is abandoned", || seen.abandoned.load(Ordering::SeqCst));

    let scene = Scene::new(Plan::default());
    let mut source = Source::start(&scene, |_| Answer::Page);
    let Scene { incoming, seen, .. } = scene;
    drop(incoming);
    source.direct.as_mut().unwrap().pages(0..300, 64);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    until("it is gathered", || seen.has(|event| *event == Event::Gathered));
}

#[test]
fn strangers_do_not_get_in_and_do_no_harm() {
    let scene = Scene::new(Plan::default());
    let mut half_open: Vec<TcpStream> = Vec::new();
    for n in 0..100_usize {
        let mut stream = TcpStream::connect(scene.address).unwrap();
        match n % 4 {
            0 => drop(stream.write_all(&[0xff; 300])),
            1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n")),
            _ => {}
        }
        half_open.push(stream);
    }
    drop(half_open);
    let source = connect_when_let(&scene);
    let mut source = source;
    source.connect(&scene, |_| Answer::Page);
    source.run();
    // Another volume, an older epoch, a second offer: nobody listens to them.
    let other = Scene { volume: libsg::ids::VolumeId::random().unwrap(), ..scene };
    let mut direct = Direct::new(other.dial(Purpose::MigrationDirect));
    until("it is closed", || direct.hear(Duration::from_millis(5)).is_err());
    let mut control = Conversation::new(other.dial(Purpose::MigrationControl));
    control.send_talk(&Talk::Rejoin, soon()).unwrap();
    assert!(matches!(control.recv_talk(soon()), Ok(Talk::Abort { .. }) | Err(_)));
    source.direct.as_mut().unwrap().pages(0..300, 64);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    other.incoming.wait_gathered(LONG).unwrap();
}

/// While strangers hold every place in the hall, whoever comes is told to come again.
fn connect_when_let(scene: &Scene) -> Source {
    let try_once = || -> Result<()> {
        let secret = secret();
        let probe = libsg::transport::dial(
            scene.address,
            Purpose::MigrationDirect,
            scene.volume,
            EPOCH,
            &secret,
            LONG,
        )?;
        drop(probe);
        Ok(())
    };
    until("there is a place", || try_once().is_ok());
    Source::offer(scene)
}

#[test]
fn hostile_bytes_from_a_peer_with_the_secret_do_no_harm() {
    let scene = Scene::new(Plan { nodes: 1, grace: LONG, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    // Pages outside of the volume, announced and sent.
    let mut direct = source.direct.take().unwrap();
    direct.send(&[raw(299), raw(300)], &[content(299), content(300)]);
    until("it is closed", || direct.hear(Duration::from_millis(5)).is_err());
    source.direct = Some(Direct::new(scene.dial(Purpose::MigrationDirect)));
    source.control.send_talk(&Talk::Accepted, soon()).unwrap();
    until("it is closed", || source.try_hear(|_| false).is_err());
    let (control, _, running) = scene.rejoin();
    assert!(running);
    source.control = control;
    source.direct.as_mut().unwrap().pages(0..300, 64);
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    scene.incoming.wait_gathered(LONG).unwrap();
    scene.check(|_| false, |_| false);
}
