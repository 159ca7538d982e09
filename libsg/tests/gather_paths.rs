//! A whole destination and a scripted source: every way by which pages come.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gather_common::*;
use libsg::ids::{Checksum, Round};
use libsg::memory::Backing;
use libsg::migrate::Event;
use libsg::migrate::destination::ArrivalPhase;
use libsg::page::{InstallUnit, PageIndex, PageRange};
use libsg::report::Status;
use libsg::wire::message::{Rounds, Talk};
use libsg::wire::{IndexEntry, PageEntry, final_set};

fn finish(scene: &Scene, mut source: Source) -> libsg::report::DestinationReport {
    source.say(&Talk::Evicted);
    source.hear(|talk| *talk == Talk::Gathered);
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(report.status, Status::Ok);
    assert_eq!(report.pages.total, Some(scene.manifest.pages().into()));
    assert!(scene.seen.has(|event| *event == Event::Gathered));
    assert_eq!(scene.incoming.progress().phase, ArrivalPhase::Gathered);
    scene.incoming.wait_dissolved(LONG).unwrap();
    assert!(scene.seen.has(|event| *event == Event::Dissolved));
    report
}

#[test]
fn directly_over_both_kinds_of_memory() {
    for (backing, by) in KINDS {
        let scene = Scene::new(Plan { pages: 1500, backing, by, touch: vec![3, 1499], ..Plan::default() });
        let mut source = Source::start(&scene, |_| Answer::Page);
        assert_eq!(*scene.seen.state.lock(), b"state of the vCPUs");
        scene.incoming.wait_running(LONG).unwrap();
        assert!(scene.seen.running.load(Ordering::SeqCst));
        let direct = source.direct.as_mut().unwrap();
        let zero = |page: u32| (100..200).contains(&page);
        direct.pages(0..100, 64);
        direct.send(&[PageEntry::zero(PageIndex(100), 100, Round(0))], &[]);
        direct.pages(200..1500, 64);
        direct.settle();
        let report = finish(&scene, source);
        scene.check(zero, |_| false);
        assert_eq!(report.pages.direct, Some(1400));
        assert!(report.faults.count >= Some(2));
        assert!(report.bookkeeping_bytes_per_page < Some(16.5), "{report:?}");
        assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 1400);
    }
}

#[test]
fn announced_only_and_dissolved() {
    let scene = Scene::new(Plan { pages: 3000, nodes: 3, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Silent);
    for node in 0..3_u32 {
        let pages = (0..3000).filter(|page| page / 64 % 3 == node && *page >= 64);
        source.announce(&scene.stage(node as usize, pages));
    }
    source.announce(&[IndexEntry::zero(PageIndex(0), 64, Round(0))]);
    let report = finish(&scene, source);
    scene.check(|page| page < 64, |_| false);
    assert_eq!(report.pages.staged, Some(2936));
    assert_eq!(report.bytes.gathered, Some(2936 * 4096));
    assert_eq!(report.intermediaries.len(), 3);
    scene.nothing_staged();
}

#[test]
fn faults_go_every_way_while_the_background_trickles() {
    // 4 KiB/s: in the background nothing that matters comes.
    let scene = Scene::new(Plan { pages: 2000, nodes: 2, gather_limit: 4096, ..Plan::default() });
    let told = scene.stage(1, 700..800);
    let mut source = Source::start(&scene, move |page| match page {
        500..600 => Answer::Zero,
        700..800 => Answer::At(told[page as usize - 700]),
        _ => Answer::Page,
    });
    source.announce(&scene.stage(0, 1000..2000));
    let memory = scene.seen.memory();
    for page in [1, 1500, 42, 1901, 750, 1999, 700, 3] {
        assert!(read(&memory, page) == content(page), "page {page}");
    }
    assert_eq!(read(&memory, 555), vec![0; 4096]);
    until("the faults are counted", || scene.incoming.progress().pages.faults >= 9);
    assert!(scene.incoming.progress().pages.held < 1000);
    assert_eq!(scene.incoming.progress().longest_wait, None);
    scene.incoming.set_gather_limit(0);
    let direct = source.direct.as_mut().unwrap();
    direct.pages((0..500).chain(600..700), 64);
    direct.send(&[PageEntry::zero(PageIndex(500), 100, Round(0))], &[]);
    direct.pages(800..1000, 64);
    source.announce(&scene.stage(1, 701..800));
    source.announce(&scene.stage(0, [700]));
    let report = finish(&scene, source);
    scene.check(|page| (500..600).contains(&page), |_| false);
    assert!(report.faults.count >= Some(9) && report.faults.p50_us.is_some());
    assert_eq!(report.faults_while_scattering.count, report.faults.count);
}

#[test]
fn many_threads_fault_at_once() {
    let scene = Scene::new(Plan { pages: 800, nodes: 1, gather_limit: 4096, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    source.announce(&scene.stage(0, 400..800));
    let memory = scene.seen.memory();
    std::thread::scope(|scope| {
        for thread in 0..8_u32 {
            let memory = &memory;
            scope.spawn(move || {
                for step in 0..100 {
                    let page = (thread * 37 + step * 61) % 800;
                    assert!(read(memory, page) == content(page), "page {page}");
                }
            });
        }
    });
    scene.incoming.set_gather_limit(0);
    source.direct.as_mut().unwrap().pages(0..400, 64);
    finish(&scene, source);
    scene.check(|_| false, |_| false);
    assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 800);
}

#[test]
fn huge_units_come_whole_by_every_path() {
    let pages = 4 * 512;
    let plan =
        Plan { pages, unit: InstallUnit::Huge2M, backing: Backing::Hugetlb2M, nodes: 1, ..Plan::default() };
    let scene = Scene::new(plan);
    let mut source = Source::start(&scene, |page| if page < 1536 { Answer::Page } else { Answer::Zero });
    let memory = scene.seen.memory();
    // Unit 0 by a fault, 1 directly, 2 from an intermediary with some zero pages, 3 zero.
    assert!(read(&memory, 77) == content(77));
    source.direct.as_mut().unwrap().pages(512..1024, 512);
    source.announce(&scene.stage(0, (1024..1536).filter(|page| *page % 2 == 0)));
    source.announce(&[IndexEntry::zero(PageIndex(1536), 512, Round(0))]);
    // While there is more to come: afterwards nothing has to be installed for it.
    assert_eq!(read(&memory, 2000), vec![0; 4096]);
    let odd = (1024..1536).filter(|page| page % 2 == 1);
    source.announce(&odd.map(|page| IndexEntry::zero(PageIndex(page), 1, Round(0))).collect::<Vec<_>>());
    finish(&scene, source);
    scene.check(|page| page >= 1536 || (page >= 1024 && page % 2 == 1), |_| false);
    assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 2048);
}

#[test]
fn a_zero_page_that_is_being_installed_is_waited_for() {
    let scene = Scene::new(Plan { pages: 64, nodes: 1, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Silent);
    scene.seen.hold_zeros.store(true, Ordering::SeqCst);
    source.announce(&[IndexEntry::zero(PageIndex(0), 32, Round(0))]);
    let memory = scene.seen.memory();
    let guest = std::thread::spawn(move || read(&memory, 7));
    until("the page is being installed", || scene.seen.held_zeros.load(Ordering::SeqCst) > 0);
    source.direct.as_mut().unwrap().pages(32..64, 32);
    until("all pages are held", || scene.incoming.progress().pages.held == 64);
    // The memory is not let go under the hands of who installs the page.
    std::thread::sleep(std::time::Duration::from_millis(250));
    assert_eq!(scene.incoming.progress().phase, ArrivalPhase::Running);
    scene.seen.hold_zeros.store(false, Ordering::SeqCst);
    finish(&scene, source);
    assert_eq!(guest.join().unwrap(), vec![0; 4096]);
    assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 33);
}

#[test]
fn what_does_not_match_its_checksum_is_refused_and_sent_again() {
    let scene = Scene::new(Plan::default());
    let mut source = Source::start(&scene, |_| Answer::Page);
    let direct = source.direct.as_mut().unwrap();
    let bad = PageEntry { checksum: Checksum(7), ..raw(8) };
    let number = direct.send(&[raw(7), bad, raw(9)], &[content(7), content(8), content(9)]);
    until("it is acknowledged", || {
        direct.hear(std::time::Duration::from_millis(5)).unwrap();
        direct.acks.contains_key(&number)
    });
    assert_eq!(direct.acks.remove(&number), Some(vec![PageIndex(8)]));
    direct.pages((0..300).filter(|page| *page != 7 && *page != 9), 64);
    finish(&scene, source);
    scene.check(|_| false, |_| false);
}

#[test]
fn credit_bounds_what_a_source_may_send() {
    // 1 MB/s: the first credit and little more.
    let scene = Scene::new(Plan { pages: 600, gather_limit: 1_000_000, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    let direct = source.direct.as_mut().unwrap();
    until("there is credit", || {
        direct.hear(std::time::Duration::from_millis(5)).unwrap();
        direct.credit > 0
    });
    assert!(direct.credit < 300 << 10, "{}", direct.credit);
    direct.pages(0..600, 8);
    direct.settle();
    finish(&scene, source);
    scene.check(|_| false, |_| false);
}

#[test]
fn pages_that_the_guest_gives_up_read_as_zero() {
    let scene = Scene::new(Plan { gather_limit: 4096, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    let memory = scene.seen.memory();
    assert!(read(&memory, 5) == content(5));
    memory.regions()[0].mapping().release(4 * 4096, 3 * 4096).unwrap();
    for page in [4, 5, 6] {
        assert_eq!(read(&memory, page), vec![0; 4096], "page {page}");
    }
    scene.incoming.set_gather_limit(0);
    source.direct.as_mut().unwrap().pages(0..300, 64);
    finish(&scene, source);
    scene.check(|page| (4..7).contains(&page), |_| false);
}

#[test]
fn a_guest_that_runs_sees_only_right_pages() {
    let scene = Scene::new(Plan { pages: 4000, nodes: 2, gather_limit: 20_000_000, ..Plan::default() });
    let mut source = Source::start(&scene, |_| Answer::Page);
    let (memory, stop) = (scene.seen.memory(), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let guest = std::thread::spawn(move || {
        let mut page = 1_u32;
        while !stopped.load(Ordering::SeqCst) {
            page = page.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let page = page % 4000;
            assert!(read(&memory, page) == content(page), "page {page}");
        }
    });
    for batch in (0..4000).step_by(64) {
        let pages = batch..(batch + 64).min(4000);
        match batch / 64 % 3 {
            0 => source.direct.as_mut().unwrap().pages(pages, 16),
            node => {
                let entries = scene.stage(node as usize - 1, pages);
                source.announce(&entries);
            }
        }
    }
    let report = finish(&scene, source);
    stop.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    scene.check(|_| false, |_| false);
    assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 4000);
    assert!(report.pages.direct > Some(0) && report.pages.staged > Some(0));
}

fn run(first: u32, pages: u32) -> PageRange {
    PageRange::new(PageIndex(first), pages)
}

fn written(runs: &[PageRange], last: bool) -> Talk {
    Talk::Written { round: Round(1), runs: runs.to_vec(), last }
}

#[test]
fn what_came_in_a_round_and_was_written_is_taken_out() {
    let scene = Scene::new(Plan { nodes: 1, touch: vec![10, 40, 50], ..Plan::default() });
    let mut source = Source::offer_in(&scene, Rounds::Staged);
    let last = [run(10, 10), run(30, 1), run(40, 1), run(299, 1)];
    let again = scene.stage(0, last.into_iter().flat_map(PageRange::iter).map(|page| page.0));
    let again: Vec<_> = again.into_iter().map(|entry| IndexEntry { round: Round(1), ..entry }).collect();
    let places = again.clone();
    source.connect(&scene, move |page| {
        places.iter().find(|entry| entry.page.0 == page).map_or(Answer::Silent, |entry| Answer::At(*entry))
    });
    source.announce(&scene.stage(0, 0..300));
    until("all is installed", || scene.seen.installed.load(Ordering::SeqCst) == 300);
    source.say(&written(&[run(10, 10), run(30, 1)], false));
    source.say(&written(&[run(299, 1)], true));
    source.hear(|talk| *talk == Talk::Cleared);
    assert_eq!(scene.seen.withdrawn.load(Ordering::SeqCst), 12);
    // One more is written until the pause.
    let state = final_set::encode(last.into_iter().map(|run| (run, Round(1))), b"state of the vCPUs");
    source.control.send_state(&state, soon()).unwrap();
    // What loading touches of it is asked for anew.
    source.hear(|talk| *talk == Talk::Ready);
    assert_eq!(scene.seen.withdrawn.load(Ordering::SeqCst), 13);
    assert!(source.faults.load(Ordering::SeqCst) >= 2);
    source.say(&Talk::Run);
    source.hear(|talk| *talk == Talk::Running);
    source.announce(&again);
    let report = finish(&scene, source);
    scene.check(|_| false, |_| false);
    assert_eq!(report.pages.withdrawn, Some(13));
    assert_eq!(scene.seen.installed.load(Ordering::SeqCst), 313);
}

#[test]
fn what_cannot_be_written_is_a_protocol_error() {
    for (rounds, runs, state_first) in [
        (Rounds::None, run(3, 1), false),
        (Rounds::Installed, run(3, 1), false),
        (Rounds::Staged, run(299, 2), false),
        (Rounds::Staged, run(3, 1), true),
    ] {
        let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
        let mut source = Source::offer_in(&scene, rounds);
        if state_first {
            source.send_state();
        }
        source.say(&written(&[runs], true));
        assert!(source.try_hear(|talk| *talk == Talk::Cleared).is_err(), "{rounds:?} {runs}");
        assert!(!scene.seen.running.load(Ordering::SeqCst));
    }
}
