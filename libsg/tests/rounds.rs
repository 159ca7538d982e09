//! Modes that send a VM in rounds while it runs, both ends in one process, over TCP, with intermediaries in memory.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gather_common::*;
use libsg::dirty::DirtyLog;
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::source::{Outgoing, SourceOptions, start};
use libsg::migrate::{Event, Mode, Observer, OutgoingVm, RoundOptions, Via};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::report::{Ended, Status};
use libsg::source::MemorySource;
use libsg::uffd::{WriteLog, WriteLogMethod};
use libsg::{ErrorKind, Result};
use parking_lot::Mutex;

/// A VM whose guest writes, and which logs that.
struct Guest {
    memory: GuestMemory,
    /// Held over each write: which pages were written since the log was last collected; `None` while none is.
    /// Then how often each was written.
    state: Mutex<(Option<Vec<bool>>, Vec<u32>)>,
    runs: AtomicBool,
    ended: AtomicBool,
    /// Logs in place of the guest itself.
    logs: Option<WriteLogMethod>,
}

/// What a page holds after so many writes: each fourth makes it zero.
fn version(page: u32, writes: u32) -> Vec<u8> {
    let mut bytes = content(page);
    if writes > 0 {
        bytes[4..8].copy_from_slice(&(writes | 1 << 31).to_le_bytes());
    }
    let is_zero = if writes == 0 { is_zero(page) } else { writes.is_multiple_of(4) };
    if is_zero { vec![0; PAGE_BYTES] } else { bytes }
}

/// Pages of zeros, some of them never touched.
fn is_zero(page: u32) -> bool {
    (512..1024).contains(&page) || page % 97 == 5 && page < 512
}

impl Guest {
    fn new(scene: &Scene, backing: Backing) -> Self {
        let memory = GuestMemory::allocate(&scene.manifest, backing).unwrap();
        let pages = scene.manifest.pages();
        for page in (0..pages).filter(|page| !is_zero(*page)) {
            memory.copy_in(one(page), &version(page, 0)).unwrap();
        }
        let state = Mutex::new((None, vec![0; pages as usize]));
        Self { memory, state, runs: true.into(), ended: false.into(), logs: None }
    }

    /// Writes pages, each 50 µs or so, some of them more often than others.
    fn live(self: &Arc<Self>) -> JoinHandle<()> {
        self.live_by(Duration::from_micros(50))
    }

    fn live_by(self: &Arc<Self>, rest: Duration) -> JoinHandle<()> {
        let guest = Arc::clone(self);
        std::thread::spawn(move || {
            let (mut seed, pages) = (1_u32, guest.state.lock().1.len() as u32);
            while !guest.ended.load(Ordering::SeqCst) {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let of = if seed >> 31 == 0 { 40 } else { pages };
                guest.write((seed >> 8) % of);
                std::thread::sleep(rest);
            }
        })
    }

    fn write(&self, page: u32) {
        let mut state = self.state.lock();
        if self.runs.load(Ordering::SeqCst) {
            let (dirty, writes) = &mut *state;
            writes[page as usize] += 1;
            self.memory.copy_in(one(page), &version(page, writes[page as usize])).unwrap();
            if let Some(dirty) = dirty {
                dirty[page as usize] = true;
            }
        }
    }
}

fn one(page: u32) -> PageRange {
    PageRange::new(PageIndex(page), 1)
}

struct Leaving(Arc<Guest>, Arc<Seen>);

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> Result<Vec<u8>> {
        let _written = self.0.state.lock();
        self.0.runs.store(false, Ordering::SeqCst);
        self.1.installed_before.store(self.1.installed.load(Ordering::SeqCst), Ordering::SeqCst);
        Ok(b"state of the vCPUs".to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.0.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn committed(&mut self) {}

    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        Ok(match self.0.logs {
            Some(method) => Box::new(WriteLog::by(&self.0.memory, method)),
            None => Box::new(Log(Arc::clone(&self.0))),
        })
    }
}

struct Log(Arc<Guest>);

impl DirtyLog for Log {
    fn start(&mut self) -> Result<()> {
        let mut state = self.0.state.lock();
        let pages = state.1.len();
        state.0.get_or_insert_with(|| vec![false; pages]);
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        let mut state = self.0.state.lock();
        let dirty = state.0.as_mut().expect("started");
        for (page, dirty) in dirty.iter_mut().enumerate().filter(|(_, dirty)| **dirty) {
            *dirty = false;
            out.push(one(page as u32));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.0.state.lock().0 = None;
        Ok(())
    }
}

fn options(scene: &Scene, mode: Mode, rounds: RoundOptions, limit: u64, observer: Observer) -> SourceOptions {
    SourceOptions {
        to: scene.address.into(),
        intermediaries: scene.members().iter().map(|member| member.address).collect(),
        replacements: None,
        replicas: 1,
        mode,
        rounds,
        secret: secret(),
        connector: Arc::new(scene.connector.clone()),
        scatter_limit_bytes_per_s: limit,
        ready_timeout: LONG,
        observer,
    }
}

/// A migration under way.
struct Move {
    scene: Scene,
    guest: Arc<Guest>,
    life: JoinHandle<()>,
    outgoing: Outgoing,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Move {
    fn start(plan: Plan, mode: Mode, rounds: RoundOptions, limit: u64) -> Self {
        Self::start_with(plan, mode, rounds, limit, (None, Guest::live))
    }

    fn start_with(
        plan: Plan,
        mode: Mode,
        rounds: RoundOptions,
        limit: u64,
        (logs, live): (Option<WriteLogMethod>, impl FnOnce(&Arc<Guest>) -> JoinHandle<()>),
    ) -> Self {
        let (backing, takes_once) = (plan.backing, plan.takes_once);
        let scene = Scene::new(plan);
        scene.seen.replaces.store(true, Ordering::SeqCst);
        scene.seen.takes_once.store(takes_once, Ordering::SeqCst);
        let guest = Arc::new(Guest { logs, ..Guest::new(&scene, backing) });
        let life = live(&guest);
        let events = Arc::<Mutex<Vec<Event>>>::default();
        let watch = Arc::clone(&events);
        let observer = Arc::new(move |event: &Event| watch.lock().push(event.clone()));
        let options = options(&scene, mode, rounds, limit, observer);
        let source = Arc::new(MemorySource::new(guest.memory.clone()));
        let vm = Box::new(Leaving(Arc::clone(&guest), Arc::clone(&scene.seen)));
        let outgoing = start(vm, source, scene.manifest.clone(), options).unwrap();
        Self { scene, guest, life, outgoing, events }
    }

    fn until_round(&self, round: u16) {
        let begun = |event: &Event| matches!(event, Event::Round { round: of, .. } if *of >= round);
        until("a round begins", || self.events.lock().iter().any(begun));
    }

    /// Until so many pages are there, of a VM that runs at the source.
    fn until_installed(&self, pages: u64) {
        until("it is gathered", || self.scene.seen.installed.load(Ordering::SeqCst) >= pages);
    }

    /// The intermediaries have their memory back, and nothing on the way was a reason to worry.
    fn dissolved_without_alarm(self) {
        self.scene.incoming.wait_dissolved(LONG).unwrap();
        self.scene.nothing_staged();
        let events = self.events.lock().clone();
        let alarm = |event: &Event| matches!(event, Event::NodeLost { .. } | Event::Warning { .. });
        assert!(!events.iter().any(alarm), "{events:?}");
        self.end();
    }

    fn end(self) {
        self.guest.ended.store(true, Ordering::SeqCst);
        self.life.join().unwrap();
    }

    /// Every page reads as it was when the VM was paused.
    fn check(&self) {
        let (memory, writes) = (self.scene.seen.memory(), self.guest.state.lock().1.clone());
        for page in 0..self.scene.manifest.pages() {
            let writes = writes[page as usize];
            assert!(read(&memory, page) == version(page, writes), "page {page}, written {writes} times");
        }
        assert_eq!(*self.scene.seen.state.lock(), b"state of the vCPUs");
    }

    /// The VM runs at the source, and nothing of it is left anywhere else.
    fn runs_on(self) {
        until("it runs on", || self.guest.runs.load(Ordering::SeqCst));
        until("the destination gave it up", || self.scene.seen.abandoned.load(Ordering::SeqCst));
        assert!(!self.scene.seen.running.load(Ordering::SeqCst));
        self.scene.nothing_staged();
        self.end();
    }
}

const ROUNDS: RoundOptions =
    RoundOptions { rounds_max: Some(3), downtime_limit: Duration::ZERO, ..RoundOptions::USUAL };

/// At this rate a round lasts for as long as anything that a test does meanwhile.
const SLOW: u64 = 2_000_000;

/// At this one it lasts for a while.
const FAST: u64 = 80_000_000;

fn hybrid(plan: Plan) {
    let pages = plan.pages;
    let moved = Move::start(plan, Mode::Hybrid, ROUNDS, 0);
    moved.scene.incoming.wait_running(LONG).unwrap();
    moved.check();
    let report = moved.outgoing.wait_evicted(LONG).unwrap();
    assert!((1..=3).contains(&report.rounds.len()), "{report:?}");
    assert!(report.rounds_ended.is_some_and(|why| why != Ended::NoRoom), "{report:?}");
    let there = moved.scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(there.status, Status::Ok);
    // Of few and large units, all may have been written.
    assert!(there.pages.staged > Some(0) || pages < 1 << 12, "{there:?}");
    moved.dissolved_without_alarm();
}

/// A VM whose memory was gathered for a while when it is paused.
fn gathered_early(plan: Plan) -> Move {
    let pages = plan.pages;
    // Large units that are written all the time are torn all the time: of those, the whole VM is sent at one pace.
    let is_small = plan.unit == InstallUnit::Page;
    let (limit, then, rest_us) = if is_small { (SLOW, FAST, 50) } else { (4 * SLOW, 4 * SLOW, 200_000) };
    let rest = Duration::from_micros(rest_us);
    let live = |guest: &Arc<Guest>| guest.live_by(rest);
    let moved = Move::start_with(plan, Mode::Hybrid, ROUNDS, limit, (None, live));
    moved.until_installed(pages / 8);
    moved.outgoing.set_scatter_limit(then);
    moved.scene.incoming.wait_running(LONG).unwrap();
    let early = moved.scene.seen.installed_before.load(Ordering::SeqCst);
    assert!(early >= pages / 8, "{early} pages were installed before it was paused");
    moved
}

#[test]
fn hybrid_gathers_in_its_rounds_and_takes_out_what_was_written() {
    let huge = Plan {
        pages: 4 * 512,
        nodes: 2,
        unit: InstallUnit::Huge2M,
        backing: Backing::Hugetlb2M,
        ..Plan::default()
    };
    let small = KINDS.map(|(backing, by)| Plan { pages: 8000, nodes: 2, backing, by, ..Plan::default() });
    for plan in small.into_iter().chain([huge]) {
        let moved = gathered_early(plan);
        moved.check();
        let report = moved.outgoing.wait_evicted(LONG).unwrap();
        let there = moved.scene.incoming.wait_gathered(LONG).unwrap();
        assert_eq!(there.status, Status::Ok);
        let withdrawn = moved.scene.seen.withdrawn.load(Ordering::SeqCst);
        assert_eq!(there.pages.withdrawn, Some(withdrawn));
        assert!(withdrawn > 0 || report.rounds.iter().all(|round| round.dirty_after == 0), "{report:?}");
        moved.dissolved_without_alarm();
    }
}

#[test]
fn hybrid_into_memory_that_takes_each_page_once_gathers_behind_its_rounds() {
    let plan = Plan { pages: 4000, nodes: 2, takes_once: true, ..Plan::default() };
    let moved = Move::start(plan, Mode::Hybrid, ROUNDS, FAST);
    moved.scene.incoming.wait_running(LONG).unwrap();
    assert_eq!(moved.scene.seen.installed_before.load(Ordering::SeqCst), 0);
    moved.check();
    moved.outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(moved.scene.incoming.wait_gathered(LONG).unwrap().pages.withdrawn, Some(0));
    moved.dissolved_without_alarm();
}

#[test]
fn a_gather_limit_holds_in_the_rounds_of_hybrid() {
    let (plan, limit) = (Plan { pages: 8000, nodes: 2, ..Plan::default() }, 2_000_000);
    let began = Instant::now();
    let moved = Move::start(Plan { gather_limit: limit, ..plan }, Mode::Hybrid, ROUNDS, SLOW);
    moved.until_installed(1);
    moved.outgoing.set_scatter_limit(FAST);
    moved.scene.incoming.wait_running(LONG).unwrap();
    let most = limit as f64 * began.elapsed().as_secs_f64() * 1.1 + f64::from(2 << 20);
    let early = moved.scene.seen.installed_before.load(Ordering::SeqCst);
    assert!(early > 0 && early as f64 * 4096.0 < most, "{early} pages");
    moved.scene.incoming.set_gather_limit(0);
    moved.check();
    moved.outgoing.wait_evicted(LONG).unwrap();
    moved.scene.incoming.wait_gathered(LONG).unwrap();
    moved.dissolved_without_alarm();
}

#[test]
fn hybrid_over_both_kinds_of_memory() {
    for (backing, by) in KINDS {
        hybrid(Plan { pages: 5000, nodes: 2, backing, by, ..Plan::default() });
    }
}

/// At the destination and in the volume, where the destination does not look at it.
#[test]
fn a_final_set_in_pieces() {
    for (mode, via) in [(Mode::Hybrid, Via::Direct), (Mode::PreCopy, Via::Direct), (Mode::PreCopy, Via::Vmd)]
    {
        let plan = Plan { pages: 5000, nodes: 2, ..Plan::default() };
        let rounds = RoundOptions { via, final_piece_bytes: 64, ..ROUNDS };
        let moved = Move::start(plan, mode, rounds, 0);
        moved.scene.incoming.wait_running(LONG).unwrap();
        moved.check();
        moved.outgoing.wait_evicted(LONG).unwrap();
        assert_eq!(moved.scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
        moved.dissolved_without_alarm();
    }
}

/// More pieces than there may be: nothing has happened, and the VM runs on.
#[test]
fn a_final_set_that_is_too_long_leaves_the_vm_here() {
    let plan = Plan { pages: 5000, nodes: 2, ..Plan::default() };
    let rounds = RoundOptions { final_piece_bytes: 1, ..ROUNDS };
    let moved = Move::start(plan, Mode::Hybrid, rounds, FAST);
    let error = moved.outgoing.wait_evicted(LONG).unwrap_err();
    assert!(error.to_string().contains("too many places for rounds"), "{error}");
    moved.runs_on();
}

#[test]
fn hybrid_with_huge_units() {
    hybrid(Plan {
        pages: 6 * 512,
        nodes: 2,
        unit: InstallUnit::Huge2M,
        backing: Backing::Hugetlb2M,
        ..Plan::default()
    });
}

fn pre_copy(plan: Plan, via: Via, limit: u64) {
    let moved = Move::start(plan, Mode::PreCopy, RoundOptions { via, ..ROUNDS }, limit);
    moved.scene.incoming.wait_running(LONG).unwrap();
    // Nothing is missing, but what is known to be zero.
    moved.check();
    let report = moved.outgoing.wait_evicted(LONG).unwrap();
    assert!((1..=3).contains(&report.rounds.len()) && report.rounds_ended.is_some(), "{report:?}");
    assert!(report.pages.staged == Some(0) || via == Via::Vmd, "{report:?}");
    let there = moved.scene.incoming.wait_gathered(LONG).unwrap();
    assert_eq!(there.status, Status::Ok);
    if report.rounds[0].dirty_after > 0 {
        assert!(moved.scene.seen.replaced.load(Ordering::SeqCst) > 0, "written pages are installed again");
    }
    moved.dissolved_without_alarm();
}

#[test]
fn pre_copy_over_all_kinds_of_memory() {
    for (backing, by) in KINDS {
        pre_copy(Plan { pages: 5000, backing, by, ..Plan::default() }, Via::Direct, 0);
        pre_copy(
            Plan { pages: 5000, nodes: 2, gather_limit: 40_000_000, backing, by, ..Plan::default() },
            Via::Vmd,
            0,
        );
    }
    let huge = |nodes| Plan {
        pages: 6 * 512,
        nodes,
        unit: InstallUnit::Huge2M,
        backing: Backing::Hugetlb2M,
        ..Plan::default()
    };
    pre_copy(huge(0), Via::Direct, 0);
    pre_copy(huge(2), Via::Vmd, 0);
}

#[test]
fn a_vm_that_writes_nothing_is_paused_after_the_first_round() {
    let plan = Plan { pages: 2000, touch: vec![6, 1500], ..Plan::default() };
    let rounds = RoundOptions::default();
    let moved = Move::start_with(plan, Mode::PreCopy, rounds, 0, (None, |_| std::thread::spawn(|| {})));
    moved.scene.incoming.wait_running(LONG).unwrap();
    moved.check();
    let report = moved.outgoing.wait_evicted(LONG).unwrap();
    assert_eq!((report.rounds.len(), report.rounds_ended), (1, Some(Ended::Converged)));
    assert_eq!(report.pages.direct.unwrap() + report.pages.zero.unwrap(), report.pages.present.unwrap());
    moved.scene.incoming.wait_gathered(LONG).unwrap();
    moved.end();
}

#[test]
fn pre_copy_of_a_vm_without_a_log_is_refused_and_it_runs_on() {
    let scene = Scene::new(Plan { pages: 100, ..Plan::default() });
    let guest = Guest::new(&scene, Backing::Anon);
    guest.ended.store(true, Ordering::SeqCst);
    let source = Arc::new(MemorySource::new(guest.memory.clone()));
    struct Bare;
    impl OutgoingVm for Bare {
        fn pause(&mut self) -> Result<Vec<u8>> {
            panic!("it is never paused");
        }
        fn resume(&mut self) -> Result<()> {
            Ok(())
        }
        fn committed(&mut self) {}
    }
    let options = options(&scene, Mode::PreCopy, ROUNDS, 0, Arc::new(|_| {}));
    let outgoing = start(Box::new(Bare), source, scene.manifest.clone(), options).unwrap();
    assert_eq!(outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Vm);
}

#[test]
fn hybrid_without_intermediaries_has_no_rounds() {
    let moved = Move::start(Plan { pages: 1000, ..Plan::default() }, Mode::Hybrid, ROUNDS, 0);
    moved.scene.incoming.wait_running(LONG).unwrap();
    moved.check();
    let report = moved.outgoing.wait_evicted(LONG).unwrap();
    assert!(report.rounds.is_empty() && report.rounds_ended.is_none());
    assert!(moved.events.lock().iter().any(|event| matches!(event, Event::Warning { .. })));
    moved.scene.incoming.wait_gathered(LONG).unwrap();
    moved.end();
}

#[test]
fn an_intermediary_that_is_lost_in_a_round_costs_time_only() {
    for mode in [Mode::Hybrid, Mode::PreCopy] {
        let plan = Plan { pages: 4000, nodes: 2, gather_limit: SLOW, ..Plan::default() };
        let moved = Move::start(plan, mode, RoundOptions { via: Via::Vmd, ..ROUNDS }, SLOW);
        moved.until_round(0);
        until("pages are staged", || moved.outgoing.progress().staged_bytes > 1 << 20);
        moved.scene.nodes[1].kill();
        moved.outgoing.set_scatter_limit(0);
        moved.scene.incoming.set_gather_limit(0);
        moved.scene.incoming.wait_running(LONG).unwrap();
        moved.check();
        moved.outgoing.wait_evicted(LONG).unwrap();
        assert_eq!(moved.scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
        moved.end();
    }
}

#[test]
fn without_any_intermediary_left_the_rest_goes_from_the_switch_on() {
    let moved = Move::start(Plan { pages: 4000, nodes: 1, ..Plan::default() }, Mode::Hybrid, ROUNDS, SLOW);
    until("pages are staged", || moved.outgoing.progress().staged_bytes > 1 << 20);
    moved.scene.nodes[0].kill();
    moved.outgoing.set_scatter_limit(0);
    moved.scene.incoming.wait_running(LONG).unwrap();
    moved.check();
    let report = moved.outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(report.rounds_ended, Some(Ended::NoRoom));
    assert_eq!(moved.scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    moved.end();
}

#[test]
fn called_off_in_a_round_it_runs_on() {
    for at_the_source in [true, false] {
        let moved =
            Move::start(Plan { pages: 4000, nodes: 2, ..Plan::default() }, Mode::Hybrid, ROUNDS, SLOW);
        until("pages are staged", || moved.outgoing.progress().staged_bytes > 1 << 20);
        if at_the_source {
            moved.outgoing.cancel().unwrap();
        } else {
            moved.scene.incoming.cancel().unwrap();
        }
        assert_eq!(moved.outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Cancelled);
        moved.runs_on();
    }
}

/// What the docs of both handles promise. Whoever drops one waits for nothing, so that only events tell of the end.
fn dropped_in_a_round(mode: Mode, via: Via, logs: Option<WriteLogMethod>, at_the_source: bool) {
    let case = format!("{mode:?} {via:?} {logs:?}, at the source: {at_the_source}");
    let plan = Plan { pages: 4000, nodes: 2, gather_limit: SLOW, ..Plan::default() };
    let moved = Move::start_with(plan, mode, RoundOptions { via, ..ROUNDS }, SLOW, (logs, Guest::live));
    let sent = || moved.outgoing.progress().staged_bytes + moved.outgoing.progress().direct_bytes;
    until("pages are sent", || sent() > 1 << 20);
    let Move { mut scene, guest, life, outgoing, events } = moved;
    let mut kept = None;
    if at_the_source {
        drop(outgoing);
    } else {
        kept = Some(outgoing);
        drop(std::mem::replace(&mut scene.incoming, Scene::new(Plan::default()).incoming));
    }
    let failed = |event: &Event| matches!(event, Event::Failed { kind: ErrorKind::Cancelled, .. });
    until("the source has given up", || events.lock().iter().any(failed));
    drop(kept);
    until("the destination has given up", || scene.seen.abandoned.load(Ordering::SeqCst));
    assert!(!scene.seen.running.load(Ordering::SeqCst), "{case}");
    scene.nothing_staged();
    // It is held by this test and its own thread.
    until("libsg lets it go", || Arc::strong_count(&guest) == 2);
    assert!(guest.state.lock().0.is_none(), "{case}: it is logged on");
    // Memory that is still protected would belong to another userfaultfd.
    WriteLog::by(&guest.memory, WriteLogMethod::Handler).start().expect("nobody protects it");
    let writes = |guest: &Guest| guest.state.lock().1.iter().map(|writes| u64::from(*writes)).sum::<u64>();
    let before = writes(&guest);
    until("the guest writes on", || writes(&guest) > before);
    guest.ended.store(true, Ordering::SeqCst);
    life.join().unwrap();
    for (page, writes) in (0..).zip(&guest.state.lock().1) {
        assert!(read(&guest.memory, page) == version(page, *writes), "{case}: page {page}");
    }
}

#[test]
fn a_handle_is_dropped_in_a_round_and_the_vm_runs_on() {
    for (mode, via) in [(Mode::Hybrid, Via::Direct), (Mode::PreCopy, Via::Direct), (Mode::PreCopy, Via::Vmd)]
    {
        for at_the_source in [true, false] {
            dropped_in_a_round(mode, via, None, at_the_source);
        }
    }
    let scans = WriteLog::by(&small(), WriteLogMethod::Scan).start().is_ok();
    let methods = [(WriteLogMethod::Handler, true), (WriteLogMethod::Scan, scans)];
    for (method, _) in methods.into_iter().filter(|(_, there)| *there) {
        dropped_in_a_round(Mode::PreCopy, Via::Vmd, Some(method), true);
        dropped_in_a_round(Mode::Hybrid, Via::Direct, Some(method), false);
    }
}

fn small() -> GuestMemory {
    GuestMemory::allocate(&manifest(1, InstallUnit::Page), Backing::Anon).unwrap()
}
