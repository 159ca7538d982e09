//! VMs of KVM that are sent in rounds while they run, both ends in this process: a guest that verifies itself, with
//! KVM's own log of what it writes, and with the one that takes over where KVM refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use libsg::Result;
use libsg::dirty::DirtyLog;
use libsg::migrate::destination::{Destination, DestinationOptions, Incoming};
use libsg::migrate::source::{SourceOptions, start};
use libsg::migrate::{Mode, OutgoingVm, RoundOptions, Via};
use libsg::page::{PAGE_BYTES_U64, PageRange};
use libsg::report::{SourceReport, Status};
use libsg::source::MemorySource;
use libsg::transport::PoolSecret;
use libsg::uffd::{WriteLog, WriteLogMethod};
use libsg::vmd::{MemoryConnector, MemoryNode};
use sg_vmm::config::{BackingKind, Layout, VcpuKind, VmConfig, Workload};
use sg_vmm::kvm::KvmVm;
use sg_vmm::memory::Memory;
use sg_vmm::migration::{Arriving, Berth, Leaving};
use sg_vmm::serial::Serial;
use sg_vmm::vm::{Verifier, Vm};
use test_support::skipped;

/// Longer than anything takes that happens at all.
const LONG: Duration = Duration::from_secs(120);

/// The VM at the source, watched. Behind each collection the VMM writes to a page that the guest does not, and for the
/// last time when the VM is paused: missed once, the page arrives wrong.
struct Watched {
    leaving: Leaving,
    seen: Arc<Seen>,
}

struct Seen {
    vm: Arc<Vm>,
    /// A byte of the page that the VMM writes.
    own: u64,
    flips: AtomicU64,
    paused: AtomicBool,
    /// Collections while the log of this process's page table was at work.
    by_process: AtomicU64,
    /// All collections.
    collected: AtomicU64,
    /// Pages that were named.
    named: AtomicU64,
    stopped: AtomicBool,
}

impl Seen {
    fn flip(&self) {
        self.vm.flip(self.own).expect("a byte of the VM");
        self.flips.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether a log that write-protects memory of this process is at work: there cannot be two.
    fn is_protected(&self) -> bool {
        WriteLog::by(self.vm.memory().guest(), WriteLogMethod::Handler).start().is_err()
    }
}

impl OutgoingVm for Watched {
    fn pause(&mut self) -> Result<Vec<u8>> {
        let state = self.leaving.pause()?;
        self.seen.paused.store(true, Ordering::SeqCst);
        // As it was at first.
        if self.seen.flips.load(Ordering::SeqCst) % 2 == 1 {
            self.seen.flip();
        }
        Ok(state)
    }

    fn resume(&mut self) -> Result<()> {
        self.leaving.resume()
    }

    fn committed(&mut self) {
        self.leaving.committed();
    }

    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        Ok(Box::new(WatchedLog { log: self.leaving.dirty_log()?, seen: Arc::clone(&self.seen) }))
    }
}

struct WatchedLog {
    log: Box<dyn DirtyLog>,
    seen: Arc<Seen>,
}

impl DirtyLog for WatchedLog {
    fn start(&mut self) -> Result<()> {
        self.log.start()?;
        self.seen.flip();
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        let before = out.len();
        self.log.collect(out)?;
        let named: u32 = out[before..].iter().map(|run| run.pages).sum();
        self.seen.named.fetch_add(named.into(), Ordering::SeqCst);
        self.seen.collected.fetch_add(1, Ordering::SeqCst);
        self.seen.by_process.fetch_add(self.seen.is_protected().into(), Ordering::SeqCst);
        if !self.seen.paused.load(Ordering::SeqCst) {
            self.seen.flip();
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.log.stop()?;
        self.seen.stopped.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// A VM of KVM that writes at random in half of its memory, at work.
fn running(backing: BackingKind) -> (VmConfig, Arc<Vm>) {
    let config = VmConfig {
        name: "rounds".into(),
        memory_bytes: 4 << 20,
        backing,
        vcpus: 2,
        vcpu: VcpuKind::Kvm,
        workload: Workload::Random,
        write_rate: 4000,
        working_set_bytes: 2 << 20,
        zero_fraction: 0.2,
        common: 0.1,
        seed: 7,
    };
    let memory = Arc::new(Memory::allocate(&config).expect("memory"));
    let vm = Arc::new(Vm::new(config.clone(), memory, &Serial::default()).expect("a VM"));
    vm.fill();
    vm.run().expect("runs");
    (config, vm)
}

/// The destination, and its intermediaries.
fn destination(nodes: usize) -> (Incoming, Berth, SourceOptions) {
    let secret = PoolSecret::from_bytes(b"of the tests of rounds").expect("a secret");
    let connector = MemoryConnector::new();
    let node = |n| connector.node(&format!("i{n}"), 64 << 20).expect("an intermediary");
    let nodes: Vec<MemoryNode> = (1..=nodes).map(node).collect();
    let listen = "127.0.0.1:0".parse().expect("an address");
    let options = DestinationOptions::new(listen, secret.clone(), Arc::new(connector.clone()));
    let destination = Destination::listen(options).expect("listens");
    let options = SourceOptions {
        to: destination.address().into(),
        intermediaries: nodes.iter().map(|node| node.member().address).collect(),
        replacements: None,
        replicas: 1,
        mode: Mode::Hybrid,
        rounds: RoundOptions { rounds_max: Some(2), downtime_limit: Duration::ZERO, ..RoundOptions::USUAL },
        secret,
        connector: Arc::new(connector),
        // For rounds to last until some pages are written.
        scatter_limit_bytes_per_s: 5_000_000,
        ready_timeout: LONG,
        observer: Arc::new(|_| {}),
    };
    let berth = Berth::default();
    let incoming = destination.accept(Box::new(Arriving::new(berth.clone(), Serial::default())));
    (incoming.expect("accepts"), berth, options)
}

/// Moves one, with its log refused or not, and has its guest verify itself where it has arrived.
fn moved(backing: BackingKind, mode: Mode, via: Via, refused: bool) -> SourceReport {
    let case = format!("{backing:?} {mode:?} {via:?}, refused: {refused}");
    let (config, vm) = running(backing);
    if refused {
        vm.refuse_kvm_log();
    }
    let seen = Arc::new(Seen {
        own: (Layout::of(&config).pages - 5) * PAGE_BYTES_U64 + 8,
        vm: Arc::clone(&vm),
        flips: AtomicU64::new(0),
        paused: AtomicBool::new(false),
        by_process: AtomicU64::new(0),
        collected: AtomicU64::new(0),
        named: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
    });
    let (incoming, berth, options) = destination(if via == Via::Vmd || mode == Mode::Hybrid { 2 } else { 0 });
    let options = SourceOptions { mode, rounds: RoundOptions { via, ..options.rounds }, ..options };
    let source = Arc::new(MemorySource::new(vm.memory().guest().clone()));
    let watched = Watched { leaving: Leaving::new(Arc::clone(&vm)), seen: Arc::clone(&seen) };
    let manifest = config.manifest().expect("a manifest");
    let outgoing = start(Box::new(watched), source, manifest, options).expect("starts");
    incoming.wait_running(LONG).expect("it runs there");
    let report = outgoing.wait_evicted(LONG).expect("evicted");
    let there = incoming.wait_gathered(LONG).expect("gathered");
    assert_eq!(there.status, Status::Ok, "{case}");
    // Half of the memory is written while it is gathered.
    assert!(mode != Mode::Hybrid || there.pages.withdrawn > Some(0), "{case}: {there:?}");

    let collected = seen.collected.load(Ordering::SeqCst);
    assert_eq!(collected, report.rounds.len() as u64 + 1, "{case}: {report:?}");
    let by_process = seen.by_process.load(Ordering::SeqCst);
    assert_eq!(by_process, if refused { collected } else { 0 }, "{case}");
    assert!(seen.named.load(Ordering::SeqCst) > 0 && seen.flips.load(Ordering::SeqCst) > 1, "{case}");
    assert!(seen.stopped.load(Ordering::SeqCst) && !seen.is_protected(), "{case}: it is logged on");

    let arrived = berth.vm().expect("a VM");
    let stats = arrived.verify(Verifier::Guest, || false).expect("verified");
    assert_eq!(stats.mismatches, 0, "{case}");
    assert_eq!(stats.verified_pages, config.memory_bytes / PAGE_BYTES_U64, "{case}");
    assert!(stats.ops > vm.stats().ops, "{case}: it stands still");
    arrived.stop().expect("every page is there");
    assert!(arrived.writes_add_up(), "{case}: old pages, with a table as old");
    report
}

#[test]
fn rounds_of_a_guest_of_kvm_by_either_log() {
    if let Err(error) = KvmVm::probe() {
        return skipped("KVM", error.chain());
    }
    for refused in [false, true] {
        moved(BackingKind::Anon, Mode::Hybrid, Via::Direct, refused);
        moved(BackingKind::Memfd, Mode::Hybrid, Via::Direct, refused);
        moved(BackingKind::Memfd, Mode::PreCopy, Via::Vmd, refused);
        moved(BackingKind::Anon, Mode::PreCopy, Via::Direct, refused);
    }
}
