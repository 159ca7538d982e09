//! What it costs to know which pages are written: naming them, and what their writer pays.

mod short;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::dirty::DirtyLog as _;
use libsg::memory::{Backing, GuestMemory};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::uffd::{WriteLog, WriteLogMethod};

/// 1 GiB.
const PAGES: u32 = 256 << 10;
/// One page in a hundred.
const DIRTY: u32 = PAGES / 100;

const METHODS: [WriteLogMethod; 2] = [WriteLogMethod::Scan, WriteLogMethod::Handler];

/// Writes a word of every hundredth page.
fn write(memory: &GuestMemory, word: u64) {
    for page in 0..DIRTY {
        let slot = memory.slot(PageRange::new(PageIndex(page * 100), 1)).expect("a page");
        slot.take(8).copy_from(&word.to_ne_bytes());
    }
}

fn collect(log: &mut WriteLog, out: &mut Vec<PageRange>) {
    out.clear();
    log.collect(out).expect("collected");
}

fn dirty(criterion: &mut Criterion) {
    assert!(PAGE_BYTES as u64 * u64::from(PAGES) == 1 << 30);
    for backing in [Backing::Anon, Backing::Memfd] {
        let memory = sg_benches::filled_of(PAGES, backing).expect("memory");
        let mut out = Vec::new();
        let mut group = criterion.benchmark_group(format!("dirty {backing:?}"));
        group.throughput(Throughput::Elements(DIRTY.into()));
        group.bench_function("write, not logged", |b| b.iter(|| write(&memory, 1)));
        for method in METHODS {
            let mut log = WriteLog::by(&memory, method);
            log.start().expect("userfaultfd is allowed: run as root");
            write(&memory, 1);
            collect(&mut log, &mut out);
            assert_eq!(out.len(), DIRTY as usize, "each page is a run of its own");
            group.bench_function(BenchmarkId::new("write, logged", format!("{method:?}")), |b| {
                let protect = || collect(&mut log, &mut out);
                b.iter_batched(protect, |()| write(&memory, 2), BatchSize::PerIteration);
            });
            group.bench_function(BenchmarkId::new("collect 1 % of 1 GiB", format!("{method:?}")), |b| {
                let dirty = || write(&memory, 3);
                b.iter_batched(dirty, |()| collect(&mut log, &mut out), BatchSize::PerIteration);
            });
            log.stop().expect("stopped");
        }
        group.finish();
    }
}

criterion_group!(name = benches; config = short::short(); targets = dirty);
criterion_main!(benches);
