//! The same tests over both kinds of vCPU. What KVM's guest does and what the thread does must be
//! the same, down to the bytes.

use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use test_support::skipped;

use super::*;
use crate::config::test::small;
use crate::config::{BackingKind, Workload};
use crate::director::order;
use crate::saved::test::{body, sealed};

/// Both kinds where there is KVM; says so where there is not.
fn kinds() -> Vec<VcpuKind> {
    match KvmVm::probe() {
        Ok(()) => vec![VcpuKind::Thread, VcpuKind::Kvm],
        Err(error) => {
            skipped("KVM", error.chain());
            vec![VcpuKind::Thread]
        }
    }
}

fn started(config: &VmConfig) -> Vm {
    let memory = Memory::allocate(config).expect("memory");
    let vm = Vm::new(config.clone(), Arc::new(memory), &Serial::default()).expect("VM");
    vm.fill();
    vm
}

fn run_for(vm: &Vm, ops: u64) {
    vm.run().expect("runs");
    let began = Instant::now();
    while vm.stats().ops < ops {
        assert!(began.elapsed() < Duration::from_secs(60), "the guest does not get on: {:?}", vm.stats());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn copy_memory(from: &Memory, to: &Memory) {
    for offset in (0..from.bytes()).step_by(8) {
        to.store(offset, from.load(offset));
    }
}

#[test]
fn every_workload_runs_without_mismatch() {
    for vcpu in kinds() {
        for workload in [Workload::Idle, Workload::Sequential, Workload::Random, Workload::Reader] {
            let vm = started(&VmConfig { workload, ..small(vcpu) });
            run_for(&vm, if workload == Workload::Idle { 6 } else { 2000 });
            vm.stop().expect("stops");
            let stats = vm.stats();
            assert_eq!(stats.mismatches, 0, "{vcpu:?} {workload:?}");
            let writer = matches!(workload, Workload::Sequential | Workload::Random);
            assert_eq!(stats.writes, if writer { stats.ops } else { 0 });
            assert!(!stats.running);
        }
    }
}

#[test]
fn guest_and_thread_leave_the_same_memory() {
    if kinds().len() < 2 {
        return;
    }
    for (workload, what) in
        [(Workload::Sequential, order::WRITE), (Workload::Random, order::WRITE | order::RANDOM)]
    {
        let config = VmConfig { vcpus: 1, workload, ..small(VcpuKind::Kvm) };
        let guest = started(&config);
        run_for(&guest, 1500);
        guest.stop().expect("stops");
        // The same number of orders, natively.
        let thread = started(&config);
        let director = Director::new(&config, 1, Arc::default(), Arc::default());
        let memory = Arc::clone(thread.memory());
        let mut vcpu = ThreadVcpu::new(&config, 0, memory, director, Serial::default());
        for _ in 0..guest.stats().ops {
            vcpu.obey(what);
        }
        let differs = |offset: &u64| guest.memory().load(*offset) != thread.memory().load(*offset);
        assert_eq!((0..config.memory_bytes).step_by(8).find(differs), None, "{workload:?}");
    }
}

#[test]
fn a_saved_vm_goes_on_over_copied_memory() {
    for vcpu in kinds() {
        let config = VmConfig { backing: BackingKind::Memfd, ..small(vcpu) };
        let source = started(&config);
        run_for(&source, 3000);
        let state = source.pause().expect("state");
        let ops = source.stats().ops;
        let memory = Memory::allocate(&config).expect("memory");
        let destination = Vm::new(config.clone(), Arc::new(memory), &Serial::default()).expect("VM");
        destination.load(&state).expect("loads");
        copy_memory(source.memory(), destination.memory());
        std::thread::sleep(Duration::from_millis(30));
        run_for(&destination, ops + 3000);
        let stats = destination.verify(Verifier::Guest, || false).expect("verified");
        destination.stop().expect("stops");
        assert_eq!((stats.mismatches, stats.verify_passes), (0, 1), "{vcpu:?}");
        assert_eq!(stats.verified_pages, config.memory_bytes / PAGE_BYTES_U64);
        assert!(stats.longest_pause_ms >= 30.0, "the pause spans the switch: {stats:?}");
        assert!(destination.writes_add_up());
        assert_eq!(stats.fill_pages, source.stats().fill_pages);
        // The source, not having migrated, can go on as well.
        run_for(&source, ops + 100);
        source.stop().expect("stops");
        assert_eq!(source.stats().mismatches, 0);
    }
}

/// What a peer with the pool secret may send as the state of a VM: a real one, changed, under a checksum that is right.
#[test]
fn whatever_state_comes_is_loaded_or_refused() {
    for vcpu in kinds() {
        let config = small(vcpu);
        let source = started(&config);
        run_for(&source, 100);
        let state = source.pause().expect("state");
        let memory = Memory::allocate(&config).expect("memory");
        let destination = Vm::new(config, Arc::new(memory), &Serial::default()).expect("VM");
        let change = (any::<prop::sample::Index>(), any::<u8>());
        let changes = (prop::collection::vec(change, 1..8), prop::option::of(any::<prop::sample::Index>()));
        let mut runner = TestRunner::new(ProptestConfig::with_cases(200));
        let outcome = runner.run(&changes, |(changes, end)| {
            let mut body = body(&state).to_vec();
            changes.iter().for_each(|(at, byte)| *at.get_mut(&mut body) = *byte);
            body.truncate(end.map_or(body.len(), |end| end.index(body.len())));
            match destination.load(&sealed(&body)) {
                Ok(()) if vcpu == VcpuKind::Thread => {
                    destination.run().expect("runs");
                    let _ = destination.stats();
                    destination.stop().expect("stops");
                }
                // What a guest of KVM does with any registers is KVM's matter.
                Ok(()) => {
                    let _ = destination.stats();
                }
                Err(error) => prop_assert_eq!(error.kind, ErrorKind::Vm),
            }
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{vcpu:?}: {error}"));
        destination.load(&state).expect("it is the VM that it was");
    }
}

#[test]
fn a_flipped_byte_anywhere_is_one_mismatch() {
    for vcpu in kinds() {
        let config = VmConfig { workload: Workload::Idle, zero_fraction: 0.5, ..small(vcpu) };
        let layout = Layout::of(&config);
        let page = layout.workload + 17;
        let last = (layout.pages - 1) * PAGE_BYTES_U64;
        let base = page * PAGE_BYTES_U64;
        let offsets = [
            base,
            base + 9,
            base + 20,
            base + 24,
            base + 2000,
            base + PAGE_BYTES as u64 - 1,
            last + 8,
            last + 4000,
            layout.shadow_offset(page),
            layout.shadow_offset(page) + 3,
            layout.shadow_offset(0),
            100,
            layout.code * PAGE_BYTES_U64 + 4000,
            (layout.tables + 1) * PAGE_BYTES_U64 + 64,
        ];
        for (offset, by) in offsets.iter().flat_map(|&o| [(o, Verifier::Guest), (o, Verifier::Vmm)]) {
            let vm = started(&config);
            vm.flip(offset).expect("there is such a byte");
            vm.run().expect("runs");
            assert_eq!(vm.verify(by, || false).expect("a pass").mismatches, 1, "{vcpu:?} {by:?} {offset:#x}");
            vm.stop().expect("stops");
        }
        // What changes is repaired when it is reported: one pass more, by either, finds nothing new.
        let vm = started(&config);
        vm.flip(base + 9).expect("there is such a byte");
        vm.run().expect("runs");
        for by in [Verifier::Vmm, Verifier::Guest, Verifier::Vmm] {
            assert_eq!(vm.verify(by, || false).expect("a pass").mismatches, 1);
        }
        vm.stop().expect("stops");
    }
}

#[test]
fn the_vmm_checks_pages_that_are_being_written() {
    for vcpu in kinds() {
        let vm = started(&VmConfig { working_set_bytes: 16 << 10, ..small(vcpu) });
        vm.run().expect("runs");
        for pass in 1..=5 {
            let stats = vm.verify(Verifier::Vmm, || false).expect("a pass");
            assert_eq!((stats.mismatches, stats.verify_passes, stats.verified_pages), (0, pass, stats.pages));
        }
        vm.stop().expect("stops");
    }
}

#[test]
fn memory_that_is_old_as_a_whole_does_not_add_up() {
    let config = small(VcpuKind::Thread);
    let vm = started(&config);
    let old = Memory::allocate(&config).expect("memory");
    copy_memory(vm.memory(), &old);
    run_for(&vm, 100);
    vm.stop().expect("stops");
    assert!(vm.writes_add_up());
    copy_memory(&old, vm.memory());
    assert!(!vm.writes_add_up());
}

#[test]
fn a_bad_state_is_refused() {
    for vcpu in kinds() {
        let config = small(vcpu);
        let vm = started(&config);
        let state = vm.pause().expect("state");
        for at in [0, 8, 12, 100, state.len() - 1] {
            let mut bad = state.clone();
            bad[at] ^= 1;
            assert_eq!(vm.load(&bad).expect_err("refused").kind, ErrorKind::Vm);
        }
        for length in [0, 5, 12, state.len() - 1] {
            assert!(vm.load(&state[..length]).is_err());
        }
        vm.load(&state).expect("the whole one is good");
        let one = started(&VmConfig { vcpus: 1, ..config });
        assert!(one.load(&state).is_err(), "another number of vCPUs");
    }
}

#[test]
fn pausing_again_and_again_loses_nothing() {
    for vcpu in kinds() {
        let vm = started(&VmConfig { write_rate: 5000, ..small(vcpu) });
        for round in 1..=20 {
            run_for(&vm, round * 20);
            vm.stop().expect("stops");
            vm.stop().expect("stopping twice is nothing");
            assert!(vm.writes_add_up(), "{vcpu:?}");
        }
        assert_eq!(vm.stats().mismatches, 0);
    }
}

#[test]
fn the_guest_prints_and_complains() {
    for vcpu in kinds() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let serial = Serial::open(file.path()).expect("serial");
        let config = VmConfig { workload: Workload::Idle, ..small(vcpu) };
        let memory = Arc::new(Memory::allocate(&config).expect("memory"));
        let vm = Vm::new(config, memory, &serial).expect("VM");
        vm.fill();
        let page = Layout::of(vm.config()).workload + 5;
        vm.flip(page * PAGE_BYTES_U64 + 8).expect("flips");
        vm.run().expect("runs");
        assert_eq!(vm.verify(Verifier::Guest, || false).expect("verified").mismatches, 1);
        vm.stop().expect("stops");
        let text = std::fs::read_to_string(file.path()).expect("text");
        assert!(text.starts_with("sg-vmm guest"), "{text}");
        assert!(text.contains(&format!("mismatch in page 0x{page:08x}\n")), "{text}");
    }
}
