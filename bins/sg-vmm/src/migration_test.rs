//! A whole post-copy migration in one process: real faults of real vCPUs over userfaultfd, answered
//! from the source's memory page by page.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use libsg::page::{PAGE_BYTES, PageIndex};
use libsg::sink::SinkEvent;
use test_support::{free_huge_pages, skipped};

use super::*;
use crate::config::test::small;
use crate::config::{BackingKind, Layout, VcpuKind, Workload};
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

/// Huge pages for both ends of a migration of the small VM, and as many for one beside it.
const HUGE_PAGES: u64 = 8;

fn every_kind(mut test: impl FnMut(VmConfig)) {
    for vcpu in [VcpuKind::Thread, VcpuKind::Kvm] {
        if let (VcpuKind::Kvm, Err(error)) = (vcpu, KvmVm::probe()) {
            skipped("KVM", error.chain());
            continue;
        }
        for backing in [BackingKind::Anon, BackingKind::Memfd, BackingKind::Hugetlb] {
            if backing == BackingKind::Hugetlb && free_huge_pages() < HUGE_PAGES {
                skipped("hugetlb", format!("fewer than {HUGE_PAGES} huge pages are free"));
                continue;
            }
            test(VmConfig { backing, memory_bytes: 4 << 20, ..small(vcpu) });
        }
    }
}

#[test]
fn vcpus_fault_their_pages_in() {
    every_kind(|config| {
        fault_in(&config, InstallBy::Copy);
        if config.backing == BackingKind::Memfd {
            fault_in(&config, InstallBy::File);
        }
    });
}

fn fault_in(config: &VmConfig, install: InstallBy) {
    let (source, state) = paused_source(config);
    let berth = Berth::default();
    let mut arriving = Arriving::new(berth.clone(), Serial::default()).installing_by(install);
    let sink = arriving.prepare(&config.manifest().expect("manifest")).expect("prepared");
    let (end, faults) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| serve(source.memory(), &*sink, &end, &faults, None));
        arriving.load(&state).expect("loads");
        arriving.run().expect("runs");
        let vm = berth.vm().expect("a VM");
        let stats = vm.verify(Verifier::Guest, || false).expect("verified");
        assert_eq!(stats.mismatches, 0, "{config:?} {install:?}");
        assert_eq!(stats.verified_pages, u64::from(config.manifest().expect("manifest").pages()));
        assert!(stats.ops > source.stats().ops);
        vm.stop().expect("every page is there: it can be paused");
        assert!(vm.writes_add_up());
        end.store(true, Ordering::Relaxed);
    });
    assert!(faults.load(Ordering::Relaxed) > 0);
    sink.finish().expect("finished");
}

#[test]
fn a_lost_page_is_an_error_and_no_hang() {
    if let Err(error) = KvmVm::probe() {
        return skipped("KVM", error.chain());
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

/// A writer at random in half of its memory, and how much of it that is.
fn writer(config: VmConfig) -> (VmConfig, Arc<Vm>, Box<dyn DirtyLog>) {
    let working_set_bytes = config.memory_bytes / 2;
    let config = VmConfig { workload: Workload::Random, working_set_bytes, ..config };
    let memory = Arc::new(Memory::allocate(&config).expect("memory"));
    let vm = Arc::new(Vm::new(config.clone(), memory, &Serial::default()).expect("VM"));
    vm.fill();
    let log = Leaving::new(Arc::clone(&vm)).dirty_log().expect("there is one");
    (config, vm, log)
}

fn collected(log: &mut dyn DirtyLog) -> Vec<PageIndex> {
    let mut runs = Vec::new();
    log.collect(&mut runs).expect("collected");
    assert!(runs.windows(2).all(|pair| pair[0].first.0 + pair[0].pages <= pair[1].first.0), "ascending");
    runs.iter().flat_map(|run| run.iter()).collect()
}

fn all_pages(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.bytes() as usize];
    memory.guest().copy_out(PageRange::new(PageIndex(0), memory.guest().pages()), &mut bytes).expect("pages");
    bytes
}

fn run_on(vm: &Vm, ops: u64) {
    let until = vm.stats().ops + ops;
    vm.run().expect("runs");
    while vm.stats().ops < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the guest has noted in its own table: how often it wrote each page. By page of the VM.
fn versions(layout: &Layout, memory: &Memory) -> Vec<(PageIndex, u32)> {
    let version = |page| (PageIndex(page as u32), memory.load32(layout.shadow_offset(page)));
    (layout.workload..layout.pages).map(version).collect()
}

/// Between two collections with the VM paused, all that changed is named, and beside it nothing that nobody writes. How
/// many pages the guest writes until it is paused is up to the machine; which, it notes itself.
#[test]
fn every_page_that_changed_is_named() {
    every_kind(|config| {
        let (config, vm, mut log) = writer(config);
        let layout = Layout::of(&config);
        run_on(&vm, 100);
        // A page that is first read while it is logged may be named, for it comes: read all before.
        all_pages(vm.memory());
        log.start().expect("started");
        vm.stop().expect("stops");
        collected(&mut *log);
        assert_eq!(collected(&mut *log), [], "{config:?}: nothing is written while it is paused");
        for round in 0..6 {
            let before = (all_pages(vm.memory()), versions(&layout, vm.memory()));
            run_on(&vm, 40 + round * 100);
            vm.stop().expect("stops");
            // The VMM writes too: past the working set, where no vCPU does.
            let own = layout.pages - 1 - round;
            vm.spoil(own).expect("written");
            let named = collected(&mut *log);
            let now = all_pages(vm.memory());
            let pages = before.0.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES));
            let changed: Vec<_> = (0..)
                .map(PageIndex)
                .zip(pages)
                .filter(|(_, (was, is))| was != is)
                .map(|(page, _)| page)
                .collect();
            assert!(changed.contains(&PageIndex(own as u32)), "{config:?}: {changed:?}");
            let written: Vec<_> = before
                .1
                .iter()
                .zip(versions(&layout, vm.memory()))
                .filter(|(was, is)| **was != *is)
                .map(|(_, (page, _))| page)
                .collect();
            assert!(vm.writes_add_up(), "{config:?}: the guest's table and what its vCPUs counted differ");
            // A vCPU may be paused between its note and the page.
            let unwritten = written.iter().filter(|page| !changed.contains(page)).count();
            assert!(!written.is_empty() && unwritten <= config.vcpus as usize, "{config:?}: {unwritten}");
            let missed: Vec<_> = changed.iter().filter(|page| !named.contains(page)).collect();
            assert!(missed.is_empty(), "{config:?}: written and not named: {missed:?}");
            if config.backing != BackingKind::Hugetlb || config.vcpu == VcpuKind::Kvm {
                let quiet = layout.workload + layout.working_set..own;
                let excess = named.iter().find(|page| quiet.contains(&u64::from(page.0)));
                assert_eq!(excess, None, "{config:?}: named, and nobody wrote it");
            }
        }
        log.stop().expect("stopped");
        assert!(log.collect(&mut Vec::new()).is_err());
        log.start().expect("again");
        assert_eq!(collected(&mut *log), [], "{config:?}");
    });
}

/// What is collected and copied while the VM runs, and once more when it is paused, is its memory.
#[test]
fn a_copy_kept_by_the_log_is_the_memory() {
    every_kind(|config| {
        let (config, vm, mut log) = writer(config);
        vm.run().expect("runs");
        log.start().expect("started");
        let mut copy = all_pages(vm.memory());
        let mut take = |named: Vec<PageIndex>| {
            for page in &named {
                let to = &mut copy[page.as_usize() * PAGE_BYTES..][..PAGE_BYTES];
                vm.memory().guest().copy_out(PageRange::new(*page, 1), to).expect("a page");
            }
            named.len()
        };
        let mut rounds = 0;
        while rounds < 50 {
            rounds += usize::from(take(collected(&mut *log)) > 0);
            assert_eq!(vm.stats().failure, None);
        }
        vm.pause().expect("pauses");
        take(collected(&mut *log));
        log.stop().expect("stopped");
        assert_eq!(vm.stats().mismatches, 0, "{config:?}: the guest reads its own writes");
        let now = all_pages(vm.memory());
        let wrong = (0..).zip(copy.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES))).find(|(_, (a, b))| a != b);
        assert_eq!(wrong.map(|(page, _): (u32, _)| page), None, "{config:?}: written and not named");
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
