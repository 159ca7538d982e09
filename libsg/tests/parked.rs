//! Evict now, place later, in one process: a VM is parked at intermediaries in memory, and claimed from there.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gather_common::*;
use libsg::content::Sharing;
use libsg::ids::Epoch;
use libsg::manifest::Manifest;
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::destination::{ClaimOptions, DestinationOptions, Incoming, claim};
use libsg::migrate::source::{Outgoing, SourceOptions, To, start};
use libsg::migrate::{Event, Mode, OutgoingVm, RoundOptions};
use libsg::page::{InstallUnit, PageIndex, PageRange};
use libsg::report::Status;
use libsg::source::MemorySource;
use libsg::vmd::{Arbiter, Engines, MemoryConnector, MemoryNode, Vmd, VmdClient};
use libsg::wire::message::VolumeInfo;
use libsg::wire::parking::{Claim, Verdict};
use libsg::{Error, ErrorKind, Result};

/// Pages of the VM; every fifth is zero.
const PAGES: u32 = 3000;

struct Leaving(Arc<AtomicBool>);

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.0.store(false, Ordering::SeqCst);
        Ok(b"state of the vCPUs".to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn committed(&mut self) {}
}

fn is_zero(page: u32) -> bool {
    page % 5 == 2
}

struct Pool {
    connector: MemoryConnector,
    nodes: Vec<MemoryNode>,
    replicas: u8,
    scatter_limit_bytes_per_s: u64,
}

impl Pool {
    fn new(nodes: usize, pages: u64) -> Self {
        let connector = MemoryConnector::new();
        let node = |nth| connector.node(&format!("i{nth}"), pages).unwrap();
        let nodes = (1..=nodes).map(node).collect();
        Self { connector, nodes, replicas: 1, scatter_limit_bytes_per_s: 0 }
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.member().address).collect()
    }

    fn options(&self, to: To, mode: Mode) -> SourceOptions {
        SourceOptions {
            to,
            intermediaries: self.addresses(),
            replacements: None,
            replicas: self.replicas,
            mode,
            rounds: RoundOptions::default(),
            secret: secret(),
            connector: Arc::new(self.connector.clone()),
            scatter_limit_bytes_per_s: self.scatter_limit_bytes_per_s,
            ready_timeout: LONG,
            observer: Arc::new(|_| {}),
        }
    }

    fn park(&self, name: &str, sharing: Option<Sharing>) -> (Outgoing, Arc<AtomicBool>) {
        self.park_to(To::parked(name), sharing)
    }

    fn park_to(&self, to: To, sharing: Option<Sharing>) -> (Outgoing, Arc<AtomicBool>) {
        let manifest = Manifest { sharing, ..manifest(PAGES.into(), InstallUnit::Page) };
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).unwrap();
        for page in (0..PAGES).filter(|page| !is_zero(*page)) {
            memory.copy_in(PageRange::new(PageIndex(page), 1), &content(page)).unwrap();
        }
        let runs = Arc::new(AtomicBool::new(true));
        let options = self.options(to, Mode::ScatterGather);
        let vm = Box::new(Leaving(Arc::clone(&runs)));
        (start(vm, Arc::new(MemorySource::new(memory)), manifest, options).unwrap(), runs)
    }

    fn claim(&self, name: &str, engines: Option<Engines>) -> (Incoming, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let watch = Arc::clone(&seen);
        let nowhere = ([127, 0, 0, 1], 0).into();
        let mut options = DestinationOptions::new(nowhere, secret(), Arc::new(self.connector.clone()));
        options.observer = Arc::new(move |event| watch.events.lock().push(event.clone()));
        let intermediaries = vec![self.nodes[0].member().address];
        let wanted = ClaimOptions { name: name.into(), intermediaries, force: false, engines };
        let vm = arriving(&seen, Backing::Anon, vec![3, 1500, PAGES - 1]);
        (claim(vm, wanted, options).unwrap(), seen)
    }

    fn holds_nothing(&self) {
        let vmd = VmdClient::new(Arc::new(self.connector.clone()), LONG);
        for address in self.addresses() {
            let node = vmd.statistics(address).unwrap();
            assert_eq!((node.used_bytes, node.volumes.len()), (0, 0));
        }
    }
}

fn has_every_page(seen: &Seen) {
    let memory = seen.memory();
    for page in 0..PAGES {
        let want = if is_zero(page) { vec![0; 4096] } else { content(page) };
        assert!(read(&memory, page) == want, "page {page}");
    }
}

#[test]
fn it_arrives_whole_though_its_source_is_gone() {
    let pool = Pool::new(2, 4000);
    let (outgoing, runs) = pool.park("web", None);
    let report = outgoing.wait_evicted(LONG).unwrap();
    assert_eq!((report.status, report.downtime_s, report.bytes.direct), (Status::Ok, None, Some(0)));
    assert!(report.eviction_s > Some(0.0) && !runs.load(Ordering::SeqCst));
    assert_eq!(outgoing.wait_gathered(LONG).unwrap_err().kind, ErrorKind::Timeout, "nobody gathers it");
    drop(outgoing);
    let (incoming, seen) = pool.claim("web", None);
    incoming.wait_running(LONG).unwrap();
    assert_eq!(*seen.state.lock(), b"state of the vCPUs");
    has_every_page(&seen);
    let report = incoming.wait_gathered(LONG).unwrap();
    assert_eq!(report.status, Status::Ok);
    incoming.wait_dissolved(LONG).unwrap();
    assert!(seen.has(|event| matches!(event, Event::Claimed { name, .. } if name == "web")));
    pool.holds_nothing();
    let (late, seen) = pool.claim("web", None);
    let error = late.wait_running(LONG).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Volume, "{error}");
    assert!(!seen.running.load(Ordering::SeqCst));
}

#[test]
fn one_that_lies_twice_is_claimed_though_an_intermediary_is_away() {
    for replicas in [1, 2] {
        let pool = Pool { replicas, ..Pool::new(3, 8000) };
        let (outgoing, _) = pool.park("web", None);
        outgoing.wait_evicted(LONG).unwrap();
        drop(outgoing);
        pool.nodes[2].kill();
        let (incoming, seen) = pool.claim("web", None);
        if replicas == 1 {
            let error = incoming.wait_running(LONG).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Lost, "{error}");
            assert!(!error.pages.is_empty() && !seen.running.load(Ordering::SeqCst), "{error}");
        } else {
            incoming.wait_running(LONG).unwrap();
            incoming.wait_gathered(LONG).unwrap();
            has_every_page(&seen);
        }
    }
}

#[test]
fn without_room_it_runs_on_and_nothing_is_left_behind() {
    let pool = Pool::new(2, 500);
    let (outgoing, runs) = pool.park("web", None);
    let error = outgoing.wait_evicted(LONG).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Full, "{error}");
    assert!(runs.load(Ordering::SeqCst));
    pool.holds_nothing();
    // Called off while it waits for room.
    let (outgoing, runs) = pool.park("web", None);
    until("pages are sent", || outgoing.progress().staged_bytes > 0);
    outgoing.cancel().unwrap();
    assert_eq!(outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Cancelled);
    assert!(runs.load(Ordering::SeqCst));
    pool.holds_nothing();
    for nodes in 0..2 {
        let pool = Pool::new(nodes, 500);
        pool.nodes.iter().for_each(MemoryNode::kill);
        let manifest = manifest(64, InstallUnit::Page);
        let source = MemorySource::new(GuestMemory::allocate(&manifest, Backing::Anon).unwrap());
        let runs = Arc::new(AtomicBool::new(true));
        let options = pool.options(To::parked("web"), Mode::ScatterGather);
        match start(Box::new(Leaving(Arc::clone(&runs))), Arc::new(source), manifest, options) {
            Ok(outgoing) => {
                assert_eq!(outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Unreachable);
            }
            Err(error) => assert_eq!(error.kind, ErrorKind::Input),
        }
        assert!(runs.load(Ordering::SeqCst));
    }
}

#[test]
fn what_cannot_be_parked_is_refused_at_once() {
    let pool = Pool::new(1, 500);
    let long = "x".repeat(libsg::limits::PARKING_NAME_BYTES_MAX + 1);
    for (name, mode) in
        [("web", Mode::PostCopy), ("web", Mode::PreCopy), ("", Mode::Hybrid), (&*long, Mode::Hybrid)]
    {
        let manifest = manifest(64, InstallUnit::Page);
        let source = MemorySource::new(GuestMemory::allocate(&manifest, Backing::Anon).unwrap());
        let vm = Box::new(Leaving(Arc::default()));
        let options = pool.options(To::parked(name), mode);
        let refused = start(vm, Arc::new(source), manifest, options).map(|_| ()).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Input, "{refused}");
    }
}

#[test]
fn a_vm_that_has_much_in_common_with_one_that_is_parked_is_not_sent_again() {
    // Links in memory take everything before anybody can answer whether it is there: on a busy machine, all of it.
    let pool = Pool { scatter_limit_bytes_per_s: 20_000_000, ..Pool::new(2, 4000) };
    let (first, _) = pool.park("one", Some(Sharing::default()));
    first.wait_evicted(LONG).unwrap();
    let (second, _) = pool.park("two", Some(Sharing::default()));
    let report = second.wait_evicted(LONG).unwrap();
    // On a busy machine many questions are answered too late.
    assert!(report.pages.referenced > Some(0), "{report:?}");
    for name in ["one", "two"] {
        let (incoming, seen) = pool.claim(name, None);
        incoming.wait_running(LONG).unwrap();
        has_every_page(&seen);
        incoming.wait_gathered(LONG).unwrap();
        incoming.wait_dissolved(LONG).unwrap();
    }
    pool.holds_nothing();
}

/// An engine of the pool's: it answers as it is told, and counts.
struct Told {
    verdict: Verdict,
    /// The epoch that somebody had who told nobody of it.
    before: u64,
    /// It cannot be reached for so many questions whether the VM may run.
    silent: u32,
    asked: AtomicU32,
}

impl Arbiter for Told {
    fn claim(&self, _: &VolumeInfo, claim: &Claim) -> Result<Verdict> {
        let before = Epoch(self.before);
        Ok(if claim.epoch <= before { Verdict::Newer(before) } else { self.verdict.clone() })
    }

    fn run(&self, parked: &VolumeInfo, claim: &Claim) -> Result<()> {
        assert_eq!((parked.parking.as_ref().unwrap().name.as_str(), claim.epoch.0), ("web", self.before + 1));
        if self.asked.fetch_add(1, Ordering::SeqCst) < self.silent {
            return Err(Error::new(ErrorKind::Unreachable, "it is away"));
        }
        Ok(())
    }
}

#[test]
fn the_engine_that_the_volume_names_decides_and_nothing_runs_before_it_knows() {
    let pool = Pool::new(1, 4000);
    let to = To::Parked { name: "web".into(), arbiter: Some("engine://here".into()) };
    let (outgoing, _) = pool.park_to(to, None);
    outgoing.wait_evicted(LONG).unwrap();
    let told = |verdict, silent| Arc::new(Told { verdict, before: 4, silent, asked: AtomicU32::new(0) });
    let engines = |engine: &Arc<Told>| -> Option<Engines> {
        let engine = Arc::clone(engine);
        Some(Arc::new(move |named: &str| {
            assert_eq!(named, "engine://here");
            Ok(Arc::clone(&engine) as Arc<dyn Arbiter>)
        }))
    };
    // Whoever knows no engine gets nothing: the keeper does not decide.
    let (unable, seen) = pool.claim("web", None);
    let error = unable.wait_running(LONG).unwrap_err();
    assert!(error.message.contains("engine://here") && error.message.contains("--force"), "{error}");
    assert!(!seen.running.load(Ordering::SeqCst));
    let by = libsg::ids::NodeId { name: "other".into(), incarnation: 1 };
    let no = told(Verdict::Claimed { by, for_ms: 7000 }, 0);
    let (refused, seen) = pool.claim("web", engines(&no));
    let error = refused.wait_running(LONG).unwrap_err();
    assert!(error.message.contains("claimed by other") && error.message.contains("7 s"), "{error}");
    assert!(!seen.running.load(Ordering::SeqCst) && no.asked.load(Ordering::SeqCst) == 0);
    let yes = told(Verdict::Granted, 3);
    let (incoming, seen) = pool.claim("web", engines(&yes));
    until("it is asked", || yes.asked.load(Ordering::SeqCst) > 1);
    let runs = seen.running.load(Ordering::SeqCst);
    assert!(!runs || yes.asked.load(Ordering::SeqCst) > 3, "it ran before that was known");
    incoming.wait_running(LONG).unwrap();
    assert_eq!(yes.asked.load(Ordering::SeqCst), 4);
    let warned = |event: &Event| matches!(event, Event::Warning { message } if message.contains("away"));
    assert!(seen.has(warned));
    has_every_page(&seen);
    incoming.wait_dissolved(LONG).unwrap();
    pool.holds_nothing();
}
