//! A whole migration whose pages go over simulated devices, faults included.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::{connector, content, eventually, secret, serve};
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::destination::{Destination, DestinationOptions};
use libsg::migrate::source::{SourceOptions, start};
use libsg::migrate::{IncomingVm, Mode, OutgoingVm, RoundOptions};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::report::Status;
use libsg::sink::PageSink;
use libsg::source::MemorySource;
use libsg::uffd::Uffd;
use parking_lot::Mutex;
use vmd_rdma::verbs::simulated::Network;

const LONG: std::time::Duration = std::time::Duration::from_secs(60);
const PAGES: u32 = 8000;

/// Holds still: its memory is what it was filled with.
struct Vm;

impl OutgoingVm for Vm {
    fn pause(&mut self) -> libsg::Result<Vec<u8>> {
        Ok(b"state".to_vec())
    }

    fn resume(&mut self) -> libsg::Result<()> {
        Ok(())
    }

    fn committed(&mut self) {}
}

#[derive(Clone, Default)]
struct Berth(Arc<Mutex<Option<GuestMemory>>>);

impl IncomingVm for Berth {
    fn prepare(&mut self, manifest: &Manifest) -> libsg::Result<Arc<dyn PageSink>> {
        let memory = GuestMemory::allocate(manifest, Backing::Anon)?;
        let sink = Uffd::register(&memory)?;
        *self.0.lock() = Some(memory);
        Ok(Arc::new(sink))
    }

    fn load(&mut self, state: &[u8]) -> libsg::Result<()> {
        assert_eq!(state, b"state");
        Ok(())
    }

    fn run(&mut self) -> libsg::Result<()> {
        Ok(())
    }

    fn abandon(&mut self) {}

    fn lost(&mut self, pages: &[PageRange]) {
        panic!("lost for good: {pages:?}");
    }
}

/// A third of the pages are zero.
fn filled(page: u32) -> Vec<u8> {
    if page.is_multiple_of(3) { vec![0; PAGE_BYTES] } else { content(page) }
}

fn migrate(seed: u64) {
    let network = Network::new(seed);
    let servers = [serve(&network, 2), serve(&network, 3)];
    let connector = Arc::new(connector(&network).strict());
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut options = DestinationOptions::new(anywhere, secret(), connector.clone());
    // It takes little at first, so that the intermediaries get most.
    options.gather_limit = 2_000_000;
    let destination = Destination::listen(options).unwrap();
    let (to, berth) = (destination.address(), Berth::default());
    let incoming = destination.accept(Box::new(berth.clone())).unwrap();
    let (name, unit) = ("ram".into(), InstallUnit::Page);
    let length_bytes = u64::from(PAGES) * PAGE_BYTES as u64;
    let ram = Region { name, guest_address: Some(0), length_bytes, unit };
    let manifest = Manifest { vm: "vm".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None };
    let memory = GuestMemory::allocate(&manifest, Backing::Anon).unwrap();
    for page in (0..PAGES).filter(|page| !page.is_multiple_of(3)) {
        memory.copy_in(PageRange::new(PageIndex(page), 1), &filled(page)).unwrap();
    }
    let options = SourceOptions {
        to: to.into(),
        intermediaries: servers.iter().map(|server| server.address()).collect(),
        replacements: None,
        replicas: 1,
        mode: Mode::ScatterGather,
        rounds: RoundOptions::default(),
        secret: secret(),
        connector,
        scatter_limit_bytes_per_s: 0,
        ready_timeout: LONG,
        observer: Arc::new(|_| {}),
    };
    let outgoing = start(Box::new(Vm), Arc::new(MemorySource::new(memory)), manifest, options).unwrap();
    let source = outgoing.wait_evicted(LONG).unwrap();
    // What went twice, since it was late, may be on its way still: no more than a chunk on a link.
    let leased = || servers.each_ref().map(|server| server.statistics().leased_slots);
    let unused = leased();
    assert!(unused.iter().all(|slots| *slots <= 512), "leased, and not used: {unused:?}");
    drop(outgoing);
    eventually("nothing is leased any more", || leased() == [0, 0]);
    incoming.wait_running(LONG).unwrap();
    let memory = berth.0.lock().clone().unwrap();
    let right = |page: u32| {
        let mut bytes = vec![0; PAGE_BYTES];
        memory.copy_out(PageRange::new(PageIndex(page), 1), &mut bytes).unwrap();
        assert!(bytes == filled(page), "page {page}");
    };
    // Faults, ahead of the rest.
    (0..100).map(|step| step * 7919 % PAGES).for_each(right);
    incoming.set_gather_limit(0);
    assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
    (0..PAGES).for_each(right);
    incoming.wait_dissolved(LONG).unwrap();
    assert!(servers.iter().all(|server| server.statistics().used_bytes == 0));
    assert!(servers.iter().all(|server| server.statistics().touched_bytes == 0), "by no processor");
    let (counts, staged) = (network.counts(), source.bytes.staged.unwrap());
    eprintln!("seed {seed}: {staged} bytes staged, {counts:?}");
    assert_eq!(counts.refused, 0);
    assert!(staged > 0 && counts.written_bytes * 10 > staged * 9, "{staged} staged, {counts:?}");
    assert!(counts.read_bytes > counts.written_bytes / 2, "{counts:?}");
}

#[test]
fn pages_are_written_and_read_by_devices_only() {
    for seed in 1..=3 {
        migrate(seed);
    }
}
