//! What may fail at the source: its pages, any of its threads, an intermediary while the VM is paused, the migration
//! before COMMIT. An error at both ends, and no hang.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use gather_common::*;
use libsg::content::{ContentHasher, Sharing};
use libsg::ids::{Epoch, VolumeId};
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::source::{Outgoing, SourceOptions, start};
use libsg::migrate::{Event, Mode, OutgoingVm, RoundOptions};
use libsg::page::{PageIndex, PageRange};
use libsg::report::{SourceReport, Status};
use libsg::source::MemorySource;
use libsg::vmd::link::{Completion, PathSample};
use libsg::vmd::{Class, Connector, Link, MemoryConnector, Reply, Request, Ticket};
use libsg::wire::message::{Member, VmdReply, VmdRequest, VolumeSummary};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

/// Intermediaries that, once they have the volume, are silent for as long as this is set.
#[derive(Clone)]
struct Silences(MemoryConnector, Arc<AtomicBool>);

impl Connector for Silences {
    fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        self.0.hasher(sharing)
    }

    fn connect(
        &self,
        address: SocketAddr,
        volume: VolumeId,
        epoch: Epoch,
        class: Class,
        timeout: Duration,
    ) -> Result<Box<dyn Link>> {
        let link = self.0.connect(address, volume, epoch, class, timeout)?;
        Ok(Box::new(Silent { link, has_volume: false, silent: Arc::clone(&self.1) }))
    }
}

struct Silent {
    link: Box<dyn Link>,
    has_volume: bool,
    silent: Arc<AtomicBool>,
}

impl Silent {
    fn is_silent(&self) -> bool {
        self.has_volume && self.silent.load(Ordering::SeqCst)
    }
}

impl Link for Silent {
    fn member(&self) -> &Member {
        self.link.member()
    }

    fn submit(&mut self, request: Request<'_>) -> Result<Ticket> {
        self.has_volume |= matches!(request, Request::PutState(_));
        self.link.submit(request)
    }

    fn progress(&mut self, write_bytes_max: usize) -> Result<usize> {
        if self.is_silent() { Ok(0) } else { self.link.progress(write_bytes_max) }
    }

    fn completion(&mut self) -> Option<Completion<'_>> {
        if self.is_silent() { None } else { self.link.completion() }
    }

    fn queued_bytes(&self) -> usize {
        self.link.queued_bytes()
    }

    fn outstanding_bytes(&self) -> usize {
        self.link.outstanding_bytes()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.poll_fd()
    }

    fn path(&self) -> PathSample {
        self.link.path()
    }
}

/// Carries connections on, and counts them.
fn proxy(to: SocketAddr) -> (SocketAddr, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicU32::new(0)));
    let counts = Arc::clone(&count);
    let pump = |mut from: TcpStream, mut to: TcpStream| {
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                if to.write_all(&bytes[..n]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    };
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            counts.fetch_add(1, Ordering::SeqCst);
            let Ok(far) = TcpStream::connect(to) else { continue };
            pump(near.try_clone().unwrap(), far.try_clone().unwrap());
            pump(far, near);
        }
    });
    (address, count)
}

#[derive(Default)]
struct Here {
    runs: AtomicBool,
    silent: Arc<AtomicBool>,
    cannot_pause: bool,
    events: Mutex<Vec<Event>>,
}

struct Vm(Arc<Here>);

impl OutgoingVm for Vm {
    fn pause(&mut self) -> Result<Vec<u8>> {
        if self.0.cannot_pause {
            return Err(Error::new(ErrorKind::Vm, "a vCPU does not stop"));
        }
        self.0.runs.store(false, Ordering::SeqCst);
        Ok(b"state of the vCPUs".to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.0.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn committed(&mut self) {}
}

/// A source whose pages never end.
const ALL: (u32, End) = (u32::MAX, End::Fails);

fn leave(scene: &Scene, to: SocketAddr, pages: (u32, End), here: Here) -> (Outgoing, Arc<Here>) {
    let memory = GuestMemory::allocate(&scene.manifest, Backing::Anon).unwrap();
    for page in 0..scene.manifest.pages() {
        memory.copy_in(PageRange::new(PageIndex(page), 1), &content(page)).unwrap();
    }
    here.runs.store(true, Ordering::SeqCst);
    let here = Arc::new(here);
    let watch = Arc::clone(&here);
    let options = SourceOptions {
        to: to.into(),
        intermediaries: scene.members().iter().map(|member| member.address).collect(),
        replacements: None,
        replicas: 1,
        mode: if scene.nodes.is_empty() { Mode::PostCopy } else { Mode::ScatterGather },
        rounds: RoundOptions::default(),
        secret: secret(),
        connector: Arc::new(Silences(scene.connector.clone(), Arc::clone(&here.silent))),
        scatter_limit_bytes_per_s: 0,
        ready_timeout: LONG,
        observer: Arc::new(move |event| watch.events.lock().push(event.clone())),
    };
    let source = Limited { memory: MemorySource::new(memory), slices_left: pages.0.into(), end: pages.1 };
    let vm = Box::new(Vm(Arc::clone(&here)));
    (start(vm, Arc::new(source), scene.manifest.clone(), options).unwrap(), here)
}

#[test]
fn a_source_without_pages_after_commit_fails_the_migration_and_blames_no_peer() {
    for nodes in [0, 2] {
        for (slices, end) in [(0, End::Fails), (5, End::Fails), (0, End::Panics), (5, End::Panics)] {
            let scene = Scene::new(Plan { pages: 3000, nodes, ..Plan::default() });
            let (outgoing, here) = leave(&scene, scene.address, (slices, end), Here::default());
            let error = outgoing.wait_evicted(LONG).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Poisoned, "{nodes} {slices} {end:?}: {error}");
            assert!(!here.runs.load(Ordering::SeqCst), "COMMIT was given");
            if end == End::Fails {
                assert!(error.chain().contains("the memory's host is gone"), "{}", error.chain());
                let blames = |event: &Event| matches!(event, Event::NodeLost { .. });
                assert!(!here.events.lock().iter().any(blames), "{:?}", here.events.lock());
            }
            // The destination hears of it, and does not wait for what will never come.
            match scene.incoming.wait_gathered(LONG) {
                Err(error) => assert_ne!(error.kind, ErrorKind::Timeout),
                Ok(report) => assert_ne!(report.status, Status::Ok),
            }
        }
    }
}

#[test]
fn a_panic_before_commit_leaves_the_vm_running() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let (outgoing, here) = leave(&scene, scene.address, (0, End::PanicsWhenPaused), Here::default());
    assert_eq!(outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Poisoned);
    assert!(here.runs.load(Ordering::SeqCst));
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap_err().kind, ErrorKind::Poisoned);
}

#[test]
fn a_vm_that_cannot_be_paused_stays_and_nobody_is_told_of_a_cancel() {
    let scene = Scene::new(Plan { nodes: 1, ..Plan::default() });
    let here = Here { cannot_pause: true, ..Here::default() };
    let (outgoing, here) = leave(&scene, scene.address, ALL, here);
    assert_eq!(outgoing.wait_evicted(LONG).unwrap_err().kind, ErrorKind::Vm);
    assert!(here.runs.load(Ordering::SeqCst));
    // Whoever gives it up there afterwards comes too late to be why.
    until("it is abandoned", || scene.seen.abandoned.load(Ordering::SeqCst));
    scene.incoming.cancel().unwrap();
    assert_eq!(scene.incoming.wait_running(LONG).unwrap_err().kind, ErrorKind::Vm);
}

#[test]
fn a_source_without_pages_before_commit_keeps_its_vm_and_says_so_on_the_open_connection() {
    let scene = Scene::new(Plan { nodes: 1, touch: vec![7], ..Plan::default() });
    let (address, connections) = proxy(scene.address);
    let (outgoing, here) = leave(&scene, address, (0, End::Fails), Here::default());
    let error = outgoing.wait_evicted(LONG).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Poisoned, "{error}");
    assert!(here.runs.load(Ordering::SeqCst));
    assert_eq!(scene.incoming.wait_running(LONG).unwrap_err().kind, ErrorKind::Poisoned);
    until("it is abandoned", || scene.seen.abandoned.load(Ordering::SeqCst));
    assert_eq!(connections.load(Ordering::SeqCst), 3, "control, direct and urgent, and no other to give up");
}

/// A VM whose only intermediary is silent from the pause on, and whose destination takes next to nothing.
fn leave_by_a_silent_one() -> (Scene, Outgoing, Arc<Here>) {
    let scene = Scene::new(Plan { pages: 3000, nodes: 1, gather_limit: 4096, ..Plan::default() });
    let silent = Arc::new(true.into());
    let (outgoing, here) = leave(&scene, scene.address, ALL, Here { silent, ..Here::default() });
    (scene, outgoing, here)
}

fn arrives(scene: &Scene, outgoing: &Outgoing) -> SourceReport {
    scene.incoming.set_gather_limit(0);
    let report = outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(scene.incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    scene.check(|_| false, |_| false);
    report
}

#[test]
fn an_intermediary_that_falls_silent_while_the_vm_is_paused_does_not_hold_it_up() {
    let (scene, outgoing, here) = leave_by_a_silent_one();
    let name = scene.members()[0].node.to_string();
    let place = |is: &dyn Fn(&Event) -> bool| here.events.lock().iter().position(is);
    let lost = |event: &Event| matches!(event, Event::NodeLost { message } if message.contains(&name));
    until("it is counted lost", || place(&lost).is_some());
    assert!(place(&|event| *event == Event::Resumed) < place(&lost), "{:?}", here.events.lock());
    assert_eq!(arrives(&scene, &outgoing).pages.staged, Some(0));
}

#[test]
fn an_intermediary_that_is_slow_to_take_the_state_gets_pages_once_it_has_it() {
    let (scene, outgoing, here) = leave_by_a_silent_one();
    scene.incoming.wait_running(LONG).unwrap();
    assert_eq!(outgoing.progress().staged_bytes, 0);
    here.silent.store(false, Ordering::SeqCst);
    outgoing.wait_evicted(LONG).unwrap();
    scene.ask(&scene.nodes[0], Request::Control(&VmdRequest::Statistics), |reply| match reply {
        Reply::Control(VmdReply::Statistics(stats)) => {
            // Pages are nowhere without COMMIT.
            let committed = |volume: &VolumeSummary| volume.committed && volume.stored_pages > 0;
            assert!(stats.volumes.iter().any(committed), "{stats:?}");
            Ok(())
        }
        other => panic!("{other:?}"),
    });
    assert!(arrives(&scene, &outgoing).pages.staged > Some(0));
}
