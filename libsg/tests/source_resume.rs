//! A VM whose source died with its process behind COMMIT: another goes on with what is left, and only where it may.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gather_common::stream::Stream;
use gather_common::*;
use libsg::ids::{Epoch, Round};
use libsg::migrate::source::{Outgoing, SourceOptions, Unscattered, resume, start};
use libsg::migrate::{Mode, OutgoingVm, RoundOptions};
use libsg::page::{PageIndex, PageRange};
use libsg::report::Status;
use libsg::source::MemorySource;
use libsg::vmd::Request;
use libsg::wire::IndexEntry;
use libsg::wire::message::VmdRequest;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

const PAGES: u32 = 3000;

/// What the first has left behind: at the destination, at intermediaries, and known there to be zero.
const HELD: PageRange = PageRange::new(PageIndex(100), 900);
const STAGED: PageRange = PageRange::new(PageIndex(1000), 1000);
const ZERO: PageRange = PageRange::new(PageIndex(2900), 100);

fn is_zero(page: u32) -> bool {
    ZERO.positions().contains(&(page as usize))
}

struct Vm(Arc<Stream>);

impl OutgoingVm for Vm {
    fn pause(&mut self) -> Result<Vec<u8>> {
        panic!("it does not run here");
    }

    fn resume(&mut self) -> Result<()> {
        panic!("it never runs here again");
    }

    fn committed(&mut self) {
        self.0.flows.store(true, Ordering::SeqCst);
    }
}

fn options(scene: &Scene) -> SourceOptions {
    SourceOptions {
        to: scene.address.into(),
        intermediaries: scene.members().iter().map(|member| member.address).collect(),
        replacements: None,
        replicas: 1,
        mode: Mode::ScatterGather,
        rounds: RoundOptions::default(),
        secret: secret(),
        connector: Arc::new(scene.connector.clone()),
        scatter_limit_bytes_per_s: 0,
        ready_timeout: LONG,
        observer: Arc::new(|_| {}),
    }
}

fn unscattered(scene: &Scene) -> Unscattered {
    Unscattered {
        volume: scene.volume,
        epoch: EPOCH,
        to: scene.address.into(),
        keeper: None,
        mode: Mode::ScatterGather,
        round: Round(0),
        replicas: 1,
        members: scene.members(),
        manifest: scene.manifest.clone(),
    }
}

/// A destination that has what the first gave it, and intermediaries that have the rest of that; the first is dead.
fn left_behind(runs: bool) -> Scene {
    let scene = Scene::new(Plan { pages: PAGES.into(), nodes: 2, grace: LONG, ..Plan::default() });
    for node in &scene.nodes {
        scene.ask(node, Request::PutState(&blob(b"state of the vCPUs")), |_| Ok(()));
    }
    let mut entries = vec![IndexEntry::zero(ZERO.first, ZERO.pages, Round(0))];
    for node in 0..2_u32 {
        let here = STAGED.iter().map(|page| page.0).filter(|page| page / 64 % 2 == node);
        entries.extend(scene.stage(node as usize, here));
    }
    scene.index_at_owners(&entries);
    let mut first = Source::offer(&scene);
    first.connect(&scene, |_| Answer::Silent);
    if runs {
        scene.nodes.iter().for_each(|node| scene.control(node, &VmdRequest::Commit));
        first.run();
        let direct = first.direct.as_mut().unwrap();
        direct.pages(HELD.iter().map(|page| page.0), 64);
        direct.settle();
    } else {
        first.send_state();
    }
    first.die();
    scene
}

fn go_on(scene: &Scene, of: Unscattered) -> (Outgoing, Arc<Stream>) {
    let stream = Stream::new(&scene.manifest, is_zero);
    (resume(Box::new(Vm(Arc::clone(&stream))), Arc::clone(&stream) as _, of, options(scene)).unwrap(), stream)
}

#[test]
fn what_is_safe_is_not_sent_again_and_the_rest_is() {
    let scene = left_behind(true);
    let (outgoing, stream) = go_on(&scene, unscattered(&scene));
    let report = outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(stream.safe(), [PageRange::new(HELD.first, 1900), ZERO]);
    assert!(outgoing.cancel().is_err(), "there is no way back");
    let report = (report.pages.direct.unwrap(), report.pages.staged.unwrap());
    assert!(report.0 + report.1 >= u64::from(PAGES - HELD.pages - ZERO.pages), "{report:?}");
    // Nobody needs it any more.
    drop(outgoing);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
    scene.incoming.wait_dissolved(LONG).unwrap();
    scene.nothing_staged();
}

/// The first died right behind READY, when it had written down what another needs, and nobody was told of COMMIT.
#[test]
fn a_destination_that_waits_for_commit_runs() {
    let scene = left_behind(false);
    assert!(!scene.seen.running.load(Ordering::SeqCst));
    let (outgoing, stream) = go_on(&scene, unscattered(&scene));
    outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(stream.safe(), [STAGED, ZERO]);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

/// What lay there alone is sent again; what another's index knew of it is no reason not to.
#[test]
fn an_intermediary_that_died_meanwhile_has_taken_nothing_along() {
    let scene = left_behind(true);
    scene.nodes[1].kill();
    let (outgoing, stream) = go_on(&scene, unscattered(&scene));
    outgoing.wait_evicted(LONG).unwrap();
    let safe: u32 = stream.safe().iter().map(|run| run.pages).sum();
    // What the destination gathered meanwhile is there.
    assert!((HELD.pages..=HELD.pages + STAGED.pages + ZERO.pages).contains(&safe), "{safe}");
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

/// Where pages have copies, no index tells who has them.
#[test]
fn what_has_copies_is_sent_again() {
    let scene = left_behind(true);
    let (outgoing, _) = go_on(&scene, Unscattered { replicas: 2, ..unscattered(&scene) });
    outgoing.wait_evicted(LONG).unwrap();
    drop(outgoing);
    scene.nodes[0].kill();
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

/// One that came later is known by the others, and what lies there counts.
#[test]
fn a_member_that_was_not_written_down_is_found() {
    let scene = left_behind(true);
    let of = Unscattered { members: scene.members()[..1].to_vec(), ..unscattered(&scene) };
    let (outgoing, stream) = go_on(&scene, of);
    outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(stream.safe(), [PageRange::new(HELD.first, 1900), ZERO]);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

/// Eviction does not wait for a destination; it finds the rest by the index.
#[test]
fn a_destination_that_cannot_be_reached_is_not_waited_for() {
    let scene = left_behind(true);
    let nobody: SocketAddr = ([127, 0, 0, 1], 1).into();
    let (outgoing, stream) = go_on(&scene, Unscattered { to: nobody.into(), ..unscattered(&scene) });
    outgoing.wait_evicted(LONG).unwrap();
    // What it gathered meanwhile is there twice.
    assert_eq!(stream.safe(), [STAGED, ZERO]);
    drop(outgoing);
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

/// Of pages that may have been written since, older copies do not count.
#[test]
fn what_lies_there_of_a_round_before_is_sent_again() {
    let scene = left_behind(true);
    let (outgoing, stream) = go_on(&scene, Unscattered { round: Round(1), ..unscattered(&scene) });
    outgoing.wait_evicted(LONG).unwrap();
    assert!(stream.safe().iter().any(|run| run.first == HELD.first && run.pages >= HELD.pages));
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(is_zero, |_| false);
}

#[test]
fn nothing_is_begun_where_the_volume_is_somebody_elses_or_gone() {
    for (request, kind) in [
        (VmdRequest::Claim { epoch: Epoch(2) }, ErrorKind::Fenced),
        (VmdRequest::Dissolve, ErrorKind::Volume),
    ] {
        let scene = left_behind(true);
        scene.nodes.iter().for_each(|node| scene.control(node, &request));
        let (outgoing, stream) = go_on(&scene, unscattered(&scene));
        let refused = outgoing.wait_evicted(LONG).unwrap_err();
        assert_eq!(refused.kind, kind, "{refused}");
        until("it is over", || outgoing.is_over());
        assert!(outgoing.progress().committed, "nobody is to run the VM here for that");
        assert!(!stream.flows.load(Ordering::SeqCst) && stream.safe().is_empty());
        scene.incoming.cancel().unwrap_err();
    }
    let scene = Scene::new(Plan { pages: PAGES.into(), ..Plan::default() });
    let stream = Stream::new(&scene.manifest, is_zero);
    let of = Unscattered { replicas: 0, ..unscattered(&scene) };
    let refused = resume(Box::new(Vm(Arc::clone(&stream))), stream, of, options(&scene));
    assert_eq!(refused.map(|_| ()).unwrap_err().kind, ErrorKind::Input);
    scene.incoming.cancel().unwrap();
}

/// A VM of which it is written down what another needs, or is not, for want of a disk.
struct Notes {
    noted: Arc<Mutex<Vec<Unscattered>>>,
    fails: bool,
    runs: Arc<AtomicBool>,
}

impl OutgoingVm for Notes {
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.runs.store(false, Ordering::SeqCst);
        Ok(b"state of the vCPUs".to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn note(&mut self, unscattered: &Unscattered) -> Result<()> {
        self.noted.lock().push(unscattered.clone());
        if self.fails { Err(Error::new(ErrorKind::System, "the disk is full")) } else { Ok(()) }
    }

    fn committed(&mut self) {
        assert_eq!(self.noted.lock().len(), 1, "written down before");
    }
}

#[test]
fn it_is_written_down_before_commit_and_without_that_the_vm_stays() {
    for fails in [false, true] {
        let scene = Scene::new(Plan { pages: PAGES.into(), nodes: 2, grace: LONG, ..Plan::default() });
        let memory = MemorySource::new(Stream::new(&scene.manifest, is_zero).memory.clone());
        let (noted, runs) = (Arc::<Mutex<_>>::default(), Arc::new(AtomicBool::new(true)));
        let vm = Notes { noted: Arc::clone(&noted), fails, runs: Arc::clone(&runs) };
        let manifest = scene.manifest.clone();
        let outgoing = start(Box::new(vm), Arc::new(memory), manifest, options(&scene)).unwrap();
        let evicted = outgoing.wait_evicted(LONG);
        assert_eq!((evicted.is_err(), runs.load(Ordering::SeqCst)), (fails, fails), "{evicted:?}");
        let of = noted.lock()[0].clone();
        assert_eq!(Unscattered { volume: scene.volume, ..of.clone() }, unscattered(&scene));
        if fails {
            assert_eq!(scene.incoming.wait_running(LONG).unwrap_err().kind, ErrorKind::System);
            scene.nothing_staged();
        } else {
            assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
        }
    }
}
