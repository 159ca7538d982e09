//! A whole post-copy migration in one process: real faults of real vCPUs over userfaultfd, answered
//! from the source's memory page by page.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use libsg::page::{PAGE_BYTES, PageIndex};
use libsg::sink::SinkEvent;

use super::*;
use crate::config::test::small;
use crate::config::{BackingKind, Layout, VcpuKind};
use crate::kvm::KvmVm;
use crate::vm::Verifier;

/// Answers faults from `source`, each with its whole install unit, until told to end.
fn serve(source: &Memory, sink: &dyn PageSink, end: &AtomicBool, faults: &AtomicU32, lost: Option<u32>) {
    let mut events = Vec::new();
    while !end.load(Ordering::Relaxed) {
        if sink.events(&mut events).expect("events") == 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        for event in events.drain(..) {
            let SinkEvent::Fault { page, .. } = event else { panic!("{event:?}") };
            faults.fetch_add(1, Ordering::Relaxed);
            let unit = source.guest().unit(page).expect("a page of the VM");
            if lost == Some(page.0) {
                sink.poison(unit).expect("poisoned");
            } else {
                install(source, sink, unit);
            }
        }
    }
}

fn install(source: &Memory, sink: &dyn PageSink, range: PageRange) {
    let mut bytes = vec![0; range.pages as usize * PAGE_BYTES];
    source.guest().copy_out(range, &mut bytes).expect("pages");
    let done = sink.install(range.first, &bytes).expect("installs");
    assert_eq!(done.retry(), None);
}

fn paused_source(config: &VmConfig) -> (Arc<Vm>, Vec<u8>) {
    let memory = Arc::new(Memory::allocate(config).expect("memory"));
    let source = Arc::new(Vm::new(config.clone(), memory, &Serial::default()).expect("VM"));
    source.fill();
    source.run().expect("runs");
    let mut leaving = Leaving::new(Arc::clone(&source));
    while source.stats().ops < 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let state = leaving.pause().expect("state");
    leaving.committed();
    assert!(leaving.resume().is_err(), "after COMMIT it never runs here again");
    (source, state)
}

fn huge_pages_free() -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let enough = free.ok().and_then(|n| n.trim().parse().ok()).is_some_and(|n: u32| n >= 8);
    if !enough {
        eprintln!("without hugetlb: fewer than 8 huge pages are free");
    }
    enough
}

fn every_kind(mut test: impl FnMut(VmConfig)) {
    let kvm = KvmVm::probe();
    if let Err(error) = &kvm {
        eprintln!("without KVM: {}", error.chain());
    }
    for vcpu in [VcpuKind::Thread, VcpuKind::Kvm] {
        for backing in [BackingKind::Anon, BackingKind::Memfd, BackingKind::Hugetlb] {
            if (vcpu == VcpuKind::Kvm && kvm.is_err())
                || (backing == BackingKind::Hugetlb && !huge_pages_free())
            {
                continue;
            }
            test(VmConfig { backing, memory_bytes: 4 << 20, ..small(vcpu) });
        }
    }
}

#[test]
fn vcpus_fault_their_pages_in() {
    every_kind(|config| {
        let (source, state) = paused_source(&config);
        let berth = Berth::default();
        let mut arriving = Arriving::new(berth.clone(), Serial::default());
        let sink = arriving.prepare(&config.manifest().expect("manifest")).expect("prepared");
        let (end, faults) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| serve(source.memory(), &*sink, &end, &faults, None));
            arriving.load(&state).expect("loads");
            arriving.run().expect("runs");
            let vm = berth.vm().expect("a VM");
            let stats = vm.verify(Verifier::Guest, || false).expect("verified");
            assert_eq!(stats.mismatches, 0, "{config:?}");
            assert_eq!(stats.verified_pages, u64::from(config.manifest().expect("manifest").pages()));
            assert!(stats.ops > source.stats().ops);
            vm.stop().expect("every page is there: it can be paused");
            assert!(vm.writes_add_up());
            end.store(true, Ordering::Relaxed);
        });
        assert!(faults.load(Ordering::Relaxed) > 0);
        sink.finish().expect("finished");
    });
}

#[test]
fn a_lost_page_is_an_error_and_no_hang() {
    if let Err(error) = KvmVm::probe() {
        eprintln!("without KVM: {}", error.chain());
        return;
    }
    let config = VmConfig { vcpus: 1, ..small(VcpuKind::Kvm) };
    let (source, state) = paused_source(&config);
    let lost = Layout::of(&config).workload as u32 + 40;
    let berth = Berth::default();
    let mut arriving = Arriving::new(berth.clone(), Serial::default());
    let sink = arriving.prepare(&config.manifest().expect("manifest")).expect("prepared");
    let (end, faults) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| serve(source.memory(), &*sink, &end, &faults, Some(lost)));
        arriving.load(&state).expect("loads");
        arriving.lost(&[PageRange::new(PageIndex(lost), 1)]);
        arriving.run().expect("runs");
        let vm = berth.vm().expect("a VM");
        let error = vm.verify(Verifier::Guest, || false).expect_err("the guest cannot read it");
        assert_eq!(error.kind, ErrorKind::Vm, "{}", error.chain());
        assert_eq!(vm.lost(), [PageRange::new(PageIndex(lost), 1)]);
        assert_eq!(vm.stats().mismatches, 0, "lost is not wrong");
        end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_manifest_of_another_vmm_is_refused() {
    let mut manifest = small(VcpuKind::Thread).manifest().expect("manifest");
    manifest.vm_config = b"something else".to_vec();
    let mut arriving = Arriving::new(Berth::default(), Serial::default());
    assert!(arriving.prepare(&manifest).is_err());
    assert!(arriving.load(&[]).is_err());
    assert!(arriving.run().is_err());
}
