//! A VM whose gather died with its process: another goes on, from what was written down, and only where it may.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use gather_common::*;
use libsg::ids::{Epoch, NodeId, Round};
use libsg::manifest::Manifest;
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::IncomingVm;
use libsg::migrate::destination::{Destination, DestinationOptions, Incoming, Unfinished, resume};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::report::Status;
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::transport::Waker;
use libsg::uffd::Uffd;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Request};
use libsg::wire::handshake::Purpose;
use libsg::wire::message::{Talk, VmdRequest};
use libsg::wire::parking::{Claim, Parking};
use libsg::wire::{IndexEntry, PageEntry};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

const PAGES: u32 = 3000;

/// What was there when the first process died; the last of the others are zero.
const THERE: PageRange = PageRange::new(PageIndex(100), 900);
const ZERO: PageRange = PageRange::new(PageIndex(2900), 100);

fn is_zero(page: u32) -> bool {
    ZERO.positions().contains(&(page as usize))
}

struct Told {
    memory: Mutex<Option<GuestMemory>>,
    notes: Mutex<Vec<Unfinished>>,
    installed: AtomicU64,
    abandoned: AtomicBool,
    lost: Mutex<Vec<PageRange>>,
    /// The VM's memory is out of reach from now on.
    breaks: AtomicBool,
    waker: Waker,
}

impl Told {
    /// Whether it was told last that no source comes any more.
    fn knows_that_it_is_gone(&self) -> bool {
        self.notes.lock().last().is_some_and(|last| last.source_gone)
    }

    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: Mutex::default(),
            notes: Mutex::default(),
            installed: AtomicU64::default(),
            abandoned: AtomicBool::default(),
            lost: Mutex::default(),
            breaks: AtomicBool::default(),
            waker: Waker::new().unwrap(),
        })
    }
}

/// A VM that runs already, and has some pages: or one that comes, and writes down what another would need, or does not.
struct Vm {
    told: Arc<Told>,
    there: Option<PageRange>,
    notes: bool,
}

impl IncomingVm for Vm {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        let memory = GuestMemory::allocate(manifest, Backing::Memfd)?;
        for page in self.there.into_iter().flat_map(PageRange::iter) {
            let bytes = if is_zero(page.0) { vec![0; PAGE_BYTES] } else { content(page.0) };
            memory.copy_in(PageRange::new(page, 1), &bytes)?;
        }
        let uffd = Uffd::register_over(&memory)?;
        *self.told.memory.lock() = Some(memory);
        Ok(Arc::new(Sink { uffd, told: Arc::clone(&self.told), there: self.there }))
    }

    fn load(&mut self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        assert!(self.there.is_none(), "it runs already");
        Ok(())
    }

    fn note(&mut self, unfinished: &Unfinished) -> Result<bool> {
        self.told.notes.lock().push(unfinished.clone());
        Ok(self.notes)
    }

    fn abandon(&mut self) {
        self.told.abandoned.store(true, Ordering::SeqCst);
    }

    fn lost(&mut self, pages: &[PageRange]) {
        self.told.lost.lock().extend_from_slice(pages);
    }
}

struct Sink {
    uffd: Uffd,
    told: Arc<Told>,
    there: Option<PageRange>,
}

impl Sink {
    fn note(&self, outcome: Result<InstallOutcome>) -> Result<InstallOutcome> {
        let outcome = outcome?;
        assert!(outcome.already_present().next().is_none(), "{:?} is there", outcome.range());
        self.told.installed.fetch_add(outcome.installed_pages().into(), Ordering::SeqCst);
        Ok(outcome)
    }
}

impl PageSink for Sink {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome> {
        self.note(self.uffd.install(first, bytes))
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        self.note(self.uffd.install_zero(range))
    }

    fn poison(&self, range: PageRange) -> Result<()> {
        self.uffd.poison(range)
    }

    fn in_place(&self, each: &mut dyn FnMut(PageRange)) {
        self.there.into_iter().for_each(each);
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize> {
        if self.told.breaks.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Unreachable, "the VM's memory is out of reach"));
        }
        self.uffd.events(out)
    }

    /// Nobody but the test has anything to tell: no guest waits for pages.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.told.waker.as_fd())
    }

    fn finish(&self) -> Result<()> {
        self.uffd.finish()
    }
}

/// Intermediaries that have all pages but those that `are_missing`, with the state and COMMIT.
fn scene(are_missing: impl Fn(u32) -> bool) -> Scene {
    let scene = Scene::new(Plan { pages: PAGES.into(), nodes: 2, ..Plan::default() });
    let mut entries = vec![IndexEntry::zero(ZERO.first, ZERO.pages, Round(0))];
    for node in 0..2_u32 {
        let has = |page: &u32| page / 64 % 2 == node && !is_zero(*page) && !are_missing(*page);
        entries.extend(scene.stage(node as usize, (0..PAGES).filter(has)));
    }
    scene.index_at_owners(&entries);
    for node in &scene.nodes {
        scene.ask(node, Request::PutState(b"the vcpus"), |_| Ok(()));
        scene.control(node, &VmdRequest::Commit);
    }
    scene
}

fn unfinished(scene: &Scene) -> Unfinished {
    Unfinished {
        volume: scene.volume,
        epoch: EPOCH,
        source_gone: true,
        claimant: None,
        members: scene.members(),
        manifest: scene.manifest.clone(),
    }
}

fn options(scene: &Scene, address: SocketAddr) -> DestinationOptions {
    let mut options = DestinationOptions::new(address, secret(), Arc::new(scene.connector.clone()));
    (options.source_grace, options.member_grace) = (Duration::from_millis(400), Duration::from_millis(400));
    options
}

fn go_on(
    scene: &Scene,
    (unfinished, there): (Unfinished, PageRange),
    change: impl FnOnce(&mut DestinationOptions),
) -> (Incoming, Arc<Told>) {
    let told = Told::new();
    let vm = Vm { told: Arc::clone(&told), there: Some(there), notes: true };
    let mut options = options(scene, "127.0.0.1:0".parse().unwrap());
    change(&mut options);
    (resume(Box::new(vm), unfinished, options).unwrap(), told)
}

fn check(told: &Told, is_lost: impl Fn(u32) -> bool) {
    let memory = told.memory.lock().clone().unwrap();
    for page in (0..PAGES).filter(|page| !is_lost(*page)) {
        let wanted = if is_zero(page) { vec![0; PAGE_BYTES] } else { content(page) };
        assert!(read(&memory, page) == wanted, "page {page}");
    }
}

/// Asks an intermediary, as whoever has that epoch.
fn asks(scene: &Scene, epoch: Epoch, request: &VmdRequest) -> Result<()> {
    let at = scene.nodes[0].member().address;
    let mut link = scene.connector.connect(at, scene.volume, epoch, Class::Bulk, LONG)?;
    ask(&mut *link, Request::Control(request), LONG, |_| Ok(()))
}

/// What was there stays, what was not comes from intermediaries alone; and who gathered before can do nothing any more.
#[test]
fn what_is_missing_comes_and_who_was_at_it_before_is_shut_out() {
    let scene = scene(|_| false);
    let (incoming, told) = go_on(&scene, (unfinished(&scene), THERE), |options| options.gather_limit = 4096);
    incoming.wait_running(LONG).unwrap();
    assert_eq!(asks(&scene, EPOCH, &VmdRequest::Dissolve).unwrap_err().kind, ErrorKind::Fenced);
    assert_eq!(told.notes.lock()[0].epoch, Epoch(2), "another that goes on knows of it");
    incoming.set_gather_limit(0);
    let report = incoming.wait_gathered(LONG).unwrap();
    assert_eq!((report.status, report.total_migration_s), (Status::Ok, None));
    incoming.wait_dissolved(LONG).unwrap();
    assert_eq!(told.installed.load(Ordering::SeqCst), u64::from(PAGES - THERE.pages - ZERO.pages));
    check(&told, |_| false);
    scene.nothing_staged();
}

/// The second dies as well; what the first wrote down is out of date then, and what the second wrote is not.
#[test]
fn who_goes_on_is_followed_by_another() {
    let scene = scene(|_| false);
    asks(&scene, EPOCH, &VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    let (incoming, told) = go_on(&scene, (unfinished(&scene), THERE), |_| {});
    let refused = incoming.wait_running(LONG).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Fenced, "{refused}");
    assert!(refused.message.contains("another owner"), "{refused}");
    assert!(told.memory.lock().is_none() && told.notes.lock().is_empty(), "nothing was changed");
    let second = Unfinished { epoch: Epoch(2), ..unfinished(&scene) };
    let (incoming, told) = go_on(&scene, (second, THERE), |_| {});
    assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    check(&told, |_| false);
}

/// A VM that was parked goes on where it was claimed, and nowhere else.
#[test]
fn a_vm_that_was_claimed_elsewhere_is_refused() {
    let scene = scene(|_| false);
    let node = |name: &str| NodeId { name: name.into(), incarnation: 7 };
    let keeper = scene.nodes[0].member().node;
    let parking = Parking { name: "web".into(), keeper, term: 0, arbiter: None };
    for at in &scene.nodes {
        scene.control(at, &VmdRequest::Park(parking.clone()));
        let claim = Claim { epoch: Epoch(2), by: node("here"), force: true };
        scene.control(at, &VmdRequest::ClaimParked(claim));
    }
    asks(&scene, Epoch(2), &VmdRequest::Run).unwrap();
    let of = |by: &str| Unfinished { epoch: Epoch(2), claimant: Some(node(by)), ..unfinished(&scene) };
    let (incoming, told) = go_on(&scene, (of("elsewhere"), THERE), |_| {});
    let refused = incoming.wait_gathered(LONG).unwrap_err();
    assert!(refused.kind == ErrorKind::Fenced && refused.message.contains("here#"), "{refused}");
    assert!(told.memory.lock().is_none() && told.notes.lock().is_empty(), "nothing was changed");
    let (incoming, told) = go_on(&scene, (of("here"), THERE), |_| {});
    assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    assert_eq!(told.notes.lock()[0].epoch, Epoch(3));
    check(&told, |_| false);
}

#[test]
fn without_anybody_who_knows_the_volume_it_waits_unless_it_has_everything() {
    let scene = scene(|_| false);
    scene.nodes.iter().for_each(|node| node.kill());
    let (incoming, told) = go_on(&scene, (unfinished(&scene), THERE), |_| {});
    assert_eq!(incoming.wait_running(LONG).unwrap_err().kind, ErrorKind::Unreachable);
    assert!(told.memory.lock().is_none(), "nothing was changed");
    for dissolved in [false, true] {
        let scene = self::scene(|_| false);
        scene.nodes.iter().filter(|_| dissolved).for_each(|node| scene.control(node, &VmdRequest::Dissolve));
        if dissolved {
            let (incoming, told) = go_on(&scene, (unfinished(&scene), THERE), |_| {});
            assert_eq!(incoming.wait_gathered(LONG).unwrap_err().kind, ErrorKind::Lost);
            assert!(
                told.lost.lock().is_empty() && !told.abandoned.load(Ordering::SeqCst),
                "it stays as it is"
            );
        }
        // Who gathered before came so far, and died before it had said so, or had given the memory back.
        let all = PageRange::new(PageIndex(0), PAGES);
        let (incoming, told) = go_on(&scene, (unfinished(&scene), all), |_| {});
        assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
        incoming.wait_dissolved(LONG).unwrap();
        assert_eq!(told.installed.load(Ordering::SeqCst), 0);
        scene.nothing_staged();
    }
}

/// Pages that only the source has: they come though next to nothing else may.
fn is_left(page: &u32) -> bool {
    page.is_multiple_of(100) && !is_zero(*page) && !THERE.iter().any(|there| there.0 == *page)
}

/// A VM that is gone on with, and whose source may come again.
fn with_a_source(gather_limit: u64) -> (Scene, Incoming, Arc<Told>) {
    let mut scene = scene(|page| is_left(&page));
    scene.address = test_support::free_address();
    let of = Unfinished { source_gone: false, ..unfinished(&scene) };
    let (incoming, told) = go_on(&scene, (of, THERE), |options| {
        (options.address, options.source_grace, options.gather_limit) = (scene.address, LONG, gather_limit);
    });
    (scene, incoming, told)
}

/// A source that has not evicted dials again under its own epoch, hears what is there, and gives the rest.
#[test]
fn a_source_that_is_at_it_still_comes_again() {
    let (scene, incoming, told) = with_a_source(4096);
    incoming.wait_running(LONG).unwrap();
    asks(&scene, EPOCH, &VmdRequest::Commit).expect("the source keeps its epoch");
    let (mut control, held, running) = scene.rejoin();
    assert!(running);
    assert!(THERE.iter().all(|page| held.iter().any(|range| range.iter().any(|held| held == page))));
    let mut direct = Direct::new(scene.dial(Purpose::MigrationDirect));
    direct.pages((0..PAGES).filter(is_left), 64);
    direct.settle();
    let first = told.notes.lock()[0].clone();
    assert!(!first.source_gone && first.epoch == EPOCH, "{first:?}");
    control.send_talk(&Talk::Evicted, soon()).unwrap();
    until("it is written down that the next need not wait for it", || told.knows_that_it_is_gone());
    incoming.set_gather_limit(0);
    assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    incoming.wait_dissolved(LONG).unwrap();
    check(&told, |_| false);
}

/// One that has evicted once every page is here says so to whoever gives the intermediaries' memory back.
#[test]
fn a_source_that_evicts_last_is_not_waited_for_either() {
    until("it is written down, unless its word comes too late", || {
        let (scene, incoming, told) = with_a_source(0);
        incoming.wait_running(LONG).unwrap();
        let (mut control, ..) = scene.rejoin();
        let mut direct = Direct::new(scene.dial(Purpose::MigrationDirect));
        direct.pages((0..PAGES).filter(is_left), 64);
        incoming.wait_gathered(LONG).unwrap();
        control.send_talk(&Talk::Evicted, soon()).unwrap();
        incoming.wait_dissolved(LONG).unwrap();
        told.knows_that_it_is_gone()
    });
}

/// What only the source had is lost when it does not come, and the rest is there.
#[test]
fn a_source_that_does_not_come_again_has_taken_its_pages_along() {
    let is_missing = |page: u32| (2000..2005).contains(&page);
    let scene = scene(is_missing);
    let of = Unfinished { source_gone: false, ..unfinished(&scene) };
    let (incoming, told) = go_on(&scene, (of, THERE), |_| {});
    let report = incoming.wait_gathered(LONG).unwrap();
    assert!(
        matches!(&report.status, Status::Failed(failure) if failure.kind == ErrorKind::Lost),
        "{report:?}"
    );
    assert_eq!(*told.lost.lock(), [PageRange::new(PageIndex(2000), 5)]);
    check(&told, is_missing);
}

/// A VM that is awaited, which writes down what another process would need, or does not.
fn awaiting(notes: bool) -> (Scene, Incoming, Arc<Told>) {
    let mut scene = Scene::new(Plan { pages: PAGES.into(), nodes: 1, ..Plan::default() });
    let told = Told::new();
    let vm = Vm { told: Arc::clone(&told), there: None, notes };
    let destination = Destination::listen(options(&scene, "127.0.0.1:0".parse().unwrap())).unwrap();
    scene.address = destination.address();
    let incoming = destination.accept(Box::new(vm)).unwrap();
    (scene, incoming, told)
}

/// The memory is out of reach behind COMMIT: where another can go on the source is not told that it is over.
#[test]
fn a_failure_that_another_can_mend_is_not_the_sources() {
    for notes in [true, false] {
        let (scene, incoming, told) = awaiting(notes);
        let mut source = Source::start(&scene, |_| Answer::Silent);
        assert_eq!(told.notes.lock()[0], Unfinished { source_gone: false, ..unfinished(&scene) });
        told.breaks.store(true, Ordering::SeqCst);
        told.waker.wake();
        let heard = source.try_hear(|talk| matches!(talk, Talk::Failed { .. }));
        assert_eq!(heard.is_err(), notes, "{heard:?}");
        incoming.wait_gathered(LONG).unwrap_err();
    }
}

/// What the source is told is held is in place, also what is zero: nobody else knows of it when this process dies.
#[test]
fn zero_pages_that_came_directly_are_in_place_when_they_are_acknowledged() {
    for notes in [true, false] {
        let (scene, incoming, told) = awaiting(notes);
        let mut source = Source::start(&scene, |_| Answer::Silent);
        let direct = source.direct.as_mut().unwrap();
        direct.send(&[PageEntry::zero(PageIndex(10), 700, Round(0))], &[]);
        direct.settle();
        assert_eq!(incoming.progress().pages.held, 700);
        assert_eq!(told.installed.load(Ordering::SeqCst), if notes { 700 } else { 0 });
        // What is said to be zero is where that is said, and not here.
        source.announce(&[IndexEntry::zero(PageIndex(1000), 50, Round(0))]);
        until("it is known", || incoming.progress().pages.held == 750);
        let (_control, held, _) = scene.rejoin();
        assert_eq!(held.iter().map(|range| range.pages).sum::<u32>(), if notes { 700 } else { 750 });
    }
}
