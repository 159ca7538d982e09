//! Both ends of a migration in one process, over TCP, with intermediaries in memory.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::io::Read as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gather_common::*;
use libsg::Result;
use libsg::content::Sharing;
use libsg::ids::{Checksum, Epoch, Round, VolumeId};
use libsg::manifest::Manifest;
use libsg::memory::{Backing, GuestMemory, PageSlice};
use libsg::migrate::source::{Outgoing, SourceOptions, start};
use libsg::migrate::{Event, Mode, OutgoingVm, RoundOptions};
use libsg::page::{InstallUnit, PageIndex, PageRange};
use libsg::report::Status;
use libsg::source::MemorySource;
use libsg::vmd::{PagePut, Vmd, VmdClient};
use parking_lot::Mutex;

type Events = Arc<Mutex<Vec<Event>>>;

struct Leaving {
    runs: Arc<AtomicBool>,
}

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.runs.store(false, Ordering::SeqCst);
        Ok(b"state of the vCPUs".to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn committed(&mut self) {}
}

/// Pages of zeros, some of them never touched.
fn is_zero(page: u32) -> bool {
    (512..1024).contains(&page) || page % 97 == 5 && page < 512
}

fn leave(scene: &Scene, backing: Backing, mode: Mode) -> (Outgoing, Arc<AtomicBool>, Events) {
    leave_as(scene, backing, mode, scene.manifest.clone())
}

fn leave_as(
    scene: &Scene,
    backing: Backing,
    mode: Mode,
    manifest: Manifest,
) -> (Outgoing, Arc<AtomicBool>, Events) {
    leave_in_copies(scene, backing, (mode, 1), manifest).unwrap()
}

fn leave_in_copies(
    scene: &Scene,
    backing: Backing,
    (mode, replicas): (Mode, u8),
    manifest: Manifest,
) -> Result<(Outgoing, Arc<AtomicBool>, Events)> {
    let memory = GuestMemory::allocate(&scene.manifest, backing).unwrap();
    for page in (0..scene.manifest.pages()).filter(|page| !is_zero(*page)) {
        memory.copy_in(PageRange::new(PageIndex(page), 1), &content(page)).unwrap();
    }
    let runs = Arc::new(AtomicBool::new(true));
    let events = Events::default();
    let watch = Arc::clone(&events);
    let options = SourceOptions {
        to: scene.address.into(),
        intermediaries: scene.members().iter().map(|member| member.address).collect(),
        replacements: None,
        replicas,
        mode,
        rounds: RoundOptions::default(),
        secret: secret(),
        connector: Arc::new(scene.connector.clone()),
        // At a pace at which questions are answered in time: links in memory take everything at once.
        scatter_limit_bytes_per_s: if manifest.sharing.is_some() { 20_000_000 } else { 0 },
        ready_timeout: LONG,
        observer: Arc::new(move |event| watch.lock().push(event.clone())),
    };
    let vm = Box::new(Leaving { runs: Arc::clone(&runs) });
    let source = Arc::new(MemorySource::new(memory));
    Ok((start(vm, source, manifest, options)?, runs, events))
}

fn migrate(plan: Plan, mode: Mode) {
    let (backing, limited) = (plan.backing, plan.gather_limit > 0 && plan.nodes > 0);
    let scene = Scene::new(plan);
    let (outgoing, runs, events) = leave(&scene, backing, mode);
    scene.incoming.wait_running(LONG).unwrap();
    let memory = scene.seen.memory();
    let pages = scene.manifest.pages();
    // Of few and large units, each fault brings a good part of the memory.
    let faults = if scene.manifest.regions[0].unit == InstallUnit::Page { 200 } else { 2 };
    for page in (0..faults).map(|step| step * 7919 % pages) {
        let want = if is_zero(page) { vec![0; 4096] } else { content(page) };
        assert!(read(&memory, page) == want, "page {page}");
    }
    outgoing.wait_evicted(LONG).unwrap();
    if limited {
        assert!(scene.incoming.progress().pages.held < u64::from(pages), "the source left first");
        scene.incoming.set_gather_limit(0);
    }
    let report = scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(report.status, Status::Ok);
    scene.check(is_zero, |_| false);
    assert!(!runs.load(Ordering::SeqCst));
    assert!(report.faults.count > Some(0));
    if limited {
        assert!(report.pages.staged > Some(0), "{report:?}");
    }
    scene.incoming.wait_dissolved(LONG).unwrap();
    scene.nothing_staged();
    outgoing.wait_gathered(LONG).unwrap();
    // Both ends close their connections now, in whatever order, and that is no loss to anybody.
    let events: Vec<Event> =
        [events.lock(), scene.seen.events.lock()].into_iter().flat_map(|e| e.clone()).collect();
    let alarm = |event: &Event| matches!(event, Event::NodeLost { .. } | Event::Warning { .. });
    assert!(!events.iter().any(alarm), "{events:?}");
}

#[test]
fn scatter_gather_over_both_kinds_of_memory() {
    for (backing, by) in KINDS {
        migrate(Plan { pages: 6000, nodes: 2, backing, by, ..Plan::default() }, Mode::ScatterGather);
    }
}

#[test]
fn a_source_leaves_before_a_slow_destination_has_its_pages() {
    let plan = Plan { pages: 6000, nodes: 3, gather_limit: 200_000, ..Plan::default() };
    migrate(plan, Mode::ScatterGather);
}

#[test]
fn what_intermediaries_hold_is_not_sent_and_stays_when_its_sender_goes() {
    let scene = Scene::new(Plan { pages: 4000, nodes: 2, gather_limit: 1_000_000, ..Plan::default() });
    let manifest = Manifest { sharing: Some(Sharing::default()), ..scene.manifest.clone() };
    let vmd = VmdClient::new(Arc::new(scene.connector.clone()), LONG);
    let members: Vec<_> = scene.members().iter().map(|member| member.address).collect();
    let neighbour = vmd.create(VolumeId::random().unwrap(), Epoch::FIRST, &manifest, &members).unwrap();
    let put = |page| {
        let bytes = content(page);
        let (page, checksum) = (PageIndex(page), Checksum::of(&bytes));
        PagePut { page, round: Round(0), checksum, bytes: PageSlice::owned(bytes.into()) }
    };
    let puts: Vec<_> = (0..4000).filter(|page| !is_zero(*page)).map(put).collect();
    neighbour.put(&puts, 1).unwrap();
    let (outgoing, _, _) = leave_as(&scene, Backing::Anon, Mode::ScatterGather, manifest);
    outgoing.wait_evicted(LONG).unwrap();
    let report = outgoing.report();
    // Each page is asked for at one of two members; whoever put it left no hint for the other. How many are asked for in
    // time is the machine's affair: who answers late is not waited for.
    assert!(report.pages.referenced > Some(0), "{report:?}");
    assert_eq!(report.bytes.dedup_saved, report.pages.referenced.map(|pages| pages * 4096));
    neighbour.dissolve().unwrap();
    scene.incoming.set_gather_limit(0);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
    scene.incoming.wait_dissolved(LONG).unwrap();
    scene.nothing_staged();
}

#[test]
fn copies_that_went_bad_when_the_source_has_left_are_read_from_another_holder() {
    let scene = Scene::new(Plan { pages: 1000, nodes: 2, gather_limit: 500_000, ..Plan::default() });
    let twice = (Mode::ScatterGather, 2);
    let (outgoing, ..) = leave_in_copies(&scene, Backing::Anon, twice, scene.manifest.clone()).unwrap();
    let report = outgoing.wait_evicted(LONG).unwrap();
    // What was sent two ways may not have been answered yet.
    let (staged, replicated) = (report.bytes.staged.unwrap(), report.bytes.replicated.unwrap());
    assert!(replicated > 0 && replicated <= staged, "{report:?}");
    drop(outgoing);
    scene.nodes[0].corrupt();
    scene.incoming.set_gather_limit(0);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

#[test]
fn a_number_of_replicas_out_of_bounds_is_refused_before_anything_happens() {
    let scene = Scene::new(Plan { pages: 10, nodes: 1, ..Plan::default() });
    for replicas in [0, 9] {
        let how = (Mode::ScatterGather, replicas);
        let started = leave_in_copies(&scene, Backing::Anon, how, scene.manifest.clone());
        let error = started.map(|_| ()).unwrap_err();
        assert_eq!(error.kind, libsg::ErrorKind::Input);
        assert!(error.message.contains("not 1 to 8"), "{}", error.message);
    }
    scene.incoming.cancel().unwrap();
}

#[test]
fn post_copy() {
    // Both ends are through at the same moment: whoever closes first.
    for _ in 0..5 {
        migrate(Plan { pages: 2000, gather_limit: 40_000_000, ..Plan::default() }, Mode::PostCopy);
    }
}

#[test]
fn huge_units() {
    let plan = Plan {
        pages: 10 * 512,
        nodes: 2,
        unit: InstallUnit::Huge2M,
        backing: Backing::Hugetlb2M,
        gather_limit: 400_000,
        ..Plan::default()
    };
    migrate(plan, Mode::ScatterGather);
}

#[test]
fn a_port_full_of_strangers_is_tried_again() {
    let scene = Scene::new(Plan { pages: 3000, nodes: 1, ..Plan::default() });
    // As many as the destination greets at once, and one that is told so.
    let full = |strangers: &[TcpStream]| {
        let mut last = strangers.last().unwrap();
        last.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        last.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 0)
    };
    let mut strangers: Vec<TcpStream> = Vec::new();
    while strangers.is_empty() || !full(&strangers) {
        strangers.push(TcpStream::connect(scene.address).unwrap());
    }
    let (outgoing, ..) = leave(&scene, Backing::Anon, Mode::ScatterGather);
    // It has been refused by now, or is late: it comes in all the same.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!scene.seen.running.load(Ordering::SeqCst));
    drop(strangers);
    outgoing.wait_evicted(LONG).unwrap();
    scene.incoming.wait_gathered(LONG).unwrap();
    scene.check(is_zero, |_| false);
}

#[test]
fn cancelled_at_the_destination_it_runs_on_at_the_source() {
    let scene = Scene::new(Plan { pages: 3000, nodes: 1, ..Plan::default() });
    scene.incoming.cancel().unwrap();
    let (outgoing, runs, _) = leave(&scene, Backing::Anon, Mode::ScatterGather);
    assert!(outgoing.wait_evicted(LONG).is_err());
    assert!(runs.load(Ordering::SeqCst));
    assert!(!scene.seen.running.load(Ordering::SeqCst));
}
