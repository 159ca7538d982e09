//! A VMM in one file: a "VM" that is one thread working on guest memory, and that migrates itself, while it
//! works, through an intermediary. Source, destination and intermediary are all in this process:
//! `cargo run --example tiny_vmm`.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory};
use libsg::migrate::destination::{Destination, DestinationOptions};
use libsg::migrate::source::{SourceOptions, start};
use libsg::migrate::{IncomingVm, Mode, OutgoingVm, RoundOptions};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::report::Report;
use libsg::server::{Config, Server};
use libsg::sink::PageSink;
use libsg::source::MemorySource;
use libsg::transport::PoolSecret;
use libsg::uffd::Uffd;
use libsg::vmd::TcpConnector;
use parking_lot::Mutex;

const PATIENCE: Duration = Duration::from_secs(60);

/// The VM. Its vCPU is a thread whose only register is how many steps it took; each step takes a page,
/// checks what is there, and writes the next version of it.
#[derive(Clone)]
struct Vm {
    memory: GuestMemory,
    vcpu: Arc<Mutex<Vcpu>>,
    stop: Arc<AtomicBool>,
}

type Vcpu = (u64, Option<JoinHandle<u64>>);

/// What page `page` holds after it was written `version` times; never written, it is zero.
fn content(page: u32, version: u64) -> Vec<u8> {
    let seed = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(page) << 40;
    let word = |at: u64| if version == 0 { 0 } else { version.wrapping_add(at.wrapping_mul(seed)) };
    (0..PAGE_BYTES as u64 / 8).flat_map(|at| word(at).to_le_bytes()).collect()
}

impl Vm {
    /// The version of a page, all of whose bytes are checked. Waits for a page that is not here yet.
    fn version(&self, page: u32) -> u64 {
        let mut bytes = [0; PAGE_BYTES];
        self.memory.copy_out(PageRange::new(PageIndex(page), 1), &mut bytes).expect("a page of this VM");
        let version = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        assert!(bytes[..] == content(page, version)[..], "page {page} is not what was written");
        version
    }

    fn step(&self, step: u64) {
        // Three quarters of the pages are used; the others stay zero.
        let used = u64::from(self.memory.pages()) * 3 / 4;
        let page = (step.wrapping_mul(2_862_933_555_777_941_757) >> 20) % used;
        let next = content(page as u32, self.version(page as u32) + 1);
        self.memory.copy_in(PageRange::new(PageIndex(page as u32), 1), &next).expect("a page of this VM");
    }

    fn run(&self) {
        self.stop.store(false, Ordering::Release);
        let (vm, mut steps) = (self.clone(), self.vcpu.lock().0);
        self.vcpu.lock().1 = Some(std::thread::spawn(move || {
            while !vm.stop.load(Ordering::Acquire) {
                vm.step(steps);
                steps += 1;
            }
            steps
        }));
    }

    fn pause(&self) -> u64 {
        self.stop.store(true, Ordering::Release);
        let mut vcpu = self.vcpu.lock();
        if let Some(thread) = vcpu.1.take() {
            vcpu.0 = thread.join().expect("the guest found its memory right");
        }
        vcpu.0
    }

    /// Every page is right, and no step was lost: each of them raised one page's version by one.
    fn verify(&self) {
        let steps = self.pause();
        let written: u64 = (0..self.memory.pages()).map(|page| self.version(page)).sum();
        assert_eq!(written, steps, "of the memory, of the vCPU");
    }
}

impl OutgoingVm for Vm {
    fn pause(&mut self) -> libsg::Result<Vec<u8>> {
        Ok(Vm::pause(self).to_le_bytes().into())
    }

    fn resume(&mut self) -> libsg::Result<()> {
        self.run();
        Ok(())
    }

    fn committed(&mut self) {}
}

/// Where the VM that comes is built.
#[derive(Clone, Default)]
struct Berth(Arc<Mutex<Option<Vm>>>);

impl IncomingVm for Berth {
    fn prepare(&mut self, manifest: &Manifest) -> libsg::Result<Arc<dyn PageSink>> {
        let memory = GuestMemory::allocate(manifest, Backing::Anon)?;
        let sink = Uffd::register(&memory)?;
        *self.0.lock() = Some(Vm { memory, vcpu: Arc::default(), stop: Arc::default() });
        Ok(Arc::new(sink))
    }

    fn load(&mut self, state: &[u8]) -> libsg::Result<()> {
        let wrong = |_| libsg::Error::new(libsg::ErrorKind::Input, "the state is not of this VMM");
        self.0.lock().as_ref().expect("prepared").vcpu.lock().0 =
            u64::from_le_bytes(state.try_into().map_err(wrong)?);
        Ok(())
    }

    fn run(&mut self) -> libsg::Result<()> {
        self.0.lock().as_ref().expect("prepared").run();
        Ok(())
    }

    fn abandon(&mut self) {
        *self.0.lock() = None;
    }

    fn lost(&mut self, pages: &[PageRange]) {
        panic!("lost for good: {pages:?}");
    }
}

fn migrate(memory_bytes: u64) -> Result<Report, Box<dyn Error>> {
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let secret = PoolSecret::from_bytes(b"known to everybody in this process")?;
    let connector = Arc::new(TcpConnector::new(secret.clone()));

    // What `sg serve` runs.
    let server = Server::bind(Config::new(anywhere, "i1", 2 * memory_bytes, secret.clone()))?.spawn()?;

    // The destination waits for a VM, and lets memory in slowly at first.
    let mut options = DestinationOptions::new(anywhere, secret.clone(), connector.clone());
    options.gather_limit = memory_bytes / 4;
    let destination = Destination::listen(options)?;
    let (to, berth) = (destination.address(), Berth::default());
    let incoming = destination.accept(Box::new(berth.clone()))?;

    // The source: a VM that works.
    let (name, unit) = ("ram".into(), InstallUnit::Page);
    let ram = Region { name, guest_address: Some(0), length_bytes: memory_bytes, unit };
    let manifest = Manifest { vm: "tiny".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None };
    let memory = GuestMemory::allocate(&manifest, Backing::Anon)?;
    let vm = Vm { memory, vcpu: Arc::default(), stop: Arc::default() };
    vm.run();
    std::thread::sleep(Duration::from_millis(200));
    let options = SourceOptions {
        to: to.into(),
        intermediaries: vec![server.address()],
        replacements: None,
        replicas: 1,
        mode: Mode::ScatterGather,
        rounds: RoundOptions::default(),
        secret,
        connector,
        scatter_limit_bytes_per_s: 0,
        ready_timeout: PATIENCE,
        observer: Arc::new(|event| println!("source: {event:?}")),
    };
    let pages = Arc::new(MemorySource::new(vm.memory.clone()));
    let outgoing = start(Box::new(vm), pages, manifest, options)?;

    // "Evicted" may come long before "gathered": the host could be switched off in between.
    let source = outgoing.wait_evicted(PATIENCE)?;
    drop(outgoing);
    incoming.wait_running(PATIENCE)?;
    incoming.set_gather_limit(0);
    let arrived = incoming.wait_gathered(PATIENCE)?;
    let vm = berth.0.lock().take().expect("arrived");
    vm.verify();
    Ok(Report::merged(Some(&source), Some(&arrived)))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string_pretty(&migrate(64 << 20)?)?);
    Ok(())
}

#[test]
fn a_tiny_vm_moves_and_works_on() {
    let report = migrate(16 << 20).expect("moved");
    assert_eq!(report.status, libsg::report::Status::Ok);
    assert_eq!(report.pages.total, Some(4096));
    assert!(report.pages.staged > Some(0), "a destination that holds back leaves pages to the intermediary");
}
