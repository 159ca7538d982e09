//! A source of pages that panics, in every thread that asks it: an error at both ends, and no hang.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory, PageSlice, PresenceMap};
use libsg::migrate::destination::{Destination, DestinationOptions};
use libsg::migrate::source::{SourceOptions, start};
use libsg::migrate::{IncomingVm, Mode, OutgoingVm};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::server::{Config, Server};
use libsg::sink::PageSink;
use libsg::source::{MemorySource, Outcome, PageSource, Repeat, Supply};
use libsg::transport::PoolSecret;
use libsg::uffd::Uffd;
use libsg::vmd::TcpConnector;
use libsg::{ErrorKind, Result};

const PAGES: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// Gives so many slices, then panics: in a sink's thread. Or panics when the VM is just paused.
struct Panics {
    memory: MemorySource,
    slices_left: AtomicU32,
    when_paused: bool,
}

impl PageSource for Panics {
    fn repeat(&self) -> Repeat {
        self.memory.repeat()
    }

    fn presence(&self) -> Result<PresenceMap> {
        assert!(!self.when_paused, "no presence today");
        self.memory.presence()
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        self.memory.available(out)
    }

    fn want(&self, page: PageIndex) -> Result<()> {
        self.memory.want(page)
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let left = self.slices_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        assert!(left.is_ok(), "no page today");
        self.memory.slice(range)
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        self.memory.outcome(range, outcome);
    }
}

#[derive(Clone, Default)]
struct Vm {
    runs: Arc<AtomicBool>,
}

impl OutgoingVm for Vm {
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.runs.store(false, Ordering::SeqCst);
        Ok(vec![7; 64])
    }

    fn resume(&mut self) -> Result<()> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn committed(&mut self) {}
}

impl IncomingVm for Vm {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        Ok(Arc::new(Uffd::register(&GuestMemory::allocate(manifest, Backing::Anon)?)?))
    }

    fn load(&mut self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn abandon(&mut self) {}

    fn lost(&mut self, _pages: &[PageRange]) {}
}

/// Migrates from a source that panics; the kinds of error at the source and at the destination, and
/// whether the VM runs at the source.
fn migrate(slices: u32, when_paused: bool, members: bool) -> (ErrorKind, ErrorKind, bool) {
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let secret = PoolSecret::from_bytes(b"a secret of this test, long enough").unwrap();
    let connector = Arc::new(TcpConnector::new(secret.clone()));
    let server =
        Server::bind(Config::new(anywhere, "i1", 64 << 20, secret.clone())).unwrap().spawn().unwrap();
    let mut options = DestinationOptions::new(anywhere, secret.clone(), connector.clone());
    options.source_grace = Duration::from_secs(1);
    options.member_grace = Duration::from_secs(1);
    let destination = Destination::listen(options).unwrap();
    let (to, there) = (destination.address(), Vm::default());
    let incoming = destination.accept(Box::new(there)).unwrap();

    let region = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(PAGES) * PAGE_BYTES as u64,
        unit: InstallUnit::Page,
    };
    let manifest = Manifest { vm: "panics".into(), regions: vec![region], vm_config: Vec::new() };
    let memory = GuestMemory::allocate(&manifest, Backing::Anon).unwrap();
    for page in 0..PAGES {
        memory.copy_in(PageRange::new(PageIndex(page), 1), &[1 + page as u8 % 100; PAGE_BYTES]).unwrap();
    }
    let source = Panics { memory: MemorySource::new(memory), slices_left: slices.into(), when_paused };
    let vm = Vm { runs: Arc::new(true.into()) };
    let options = SourceOptions {
        to,
        intermediaries: if members { vec![server.address()] } else { Vec::new() },
        mode: if members { Mode::ScatterGather } else { Mode::PostCopy },
        secret,
        connector,
        scatter_limit_bytes_per_s: 0,
        ready_timeout: PATIENCE,
        observer: Arc::new(|_| {}),
    };
    let outgoing = start(Box::new(vm.clone()), Arc::new(source), manifest, options).unwrap();
    let here = outgoing.wait_evicted(PATIENCE).unwrap_err().kind;
    let there = match incoming.wait_gathered(PATIENCE) {
        Err(error) => error.kind,
        Ok(report) => match report.status {
            libsg::report::Status::Failed(failure) => failure.kind,
            libsg::report::Status::Ok => panic!("it arrived, from a source that panicked"),
        },
    };
    (here, there, vm.runs.load(Ordering::SeqCst))
}

#[test]
fn a_sink_that_panics_is_an_error_at_both_ends() {
    for members in [true, false] {
        for slices in [0, 5] {
            let (here, there, runs) = migrate(slices, false, members);
            assert_eq!(here, ErrorKind::Poisoned, "{members} {slices}");
            assert_ne!(there, ErrorKind::Timeout, "{members} {slices}");
            assert!(!runs, "COMMIT was given");
        }
    }
}

#[test]
fn a_panic_before_commit_leaves_the_vm_running() {
    let (here, there, runs) = migrate(0, true, true);
    assert_eq!((here, there), (ErrorKind::Poisoned, ErrorKind::Poisoned));
    assert!(runs);
}
