//! Guest memory: the zero check and the checksum at the source, the install at the destination.

mod short;

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::sink::PageSink as _;
use libsg::uffd::Uffd;

/// Beyond any cache.
const PAGES: u32 = 64 << 10;
/// What one measurement of installing fills.
const INSTALL_PAGES: u32 = 4 << 10;

fn look(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES).expect("memory");
    let mut group = criterion.benchmark_group("look");
    group.throughput(Throughput::Bytes(PAGE_BYTES_U64));
    let mut page = 0;
    let mut next = move || {
        page = (page + 1) % PAGES;
        PageIndex(page)
    };
    group.bench_function("zero check", |b| b.iter(|| black_box(memory.is_zero(next()))));
    group.bench_function("checksum", |b| b.iter(|| black_box(memory.checksum(next()))));
    group.finish();
}

/// Runs of 4 KiB, 64 KiB, and of a batch, into memory that was never touched.
fn install(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("install");
    group.throughput(Throughput::Bytes(u64::from(INSTALL_PAGES) * PAGE_BYTES_U64));
    for run_pages in [1, 16, 64] {
        let bytes = vec![0xa5; run_pages as usize * PAGE_BYTES];
        let fresh = || {
            let memory = sg_benches::fresh(INSTALL_PAGES).expect("memory");
            Uffd::register(&memory).expect("userfaultfd is allowed: run as root")
        };
        let fill = |sink: Uffd| {
            for first in (0..INSTALL_PAGES).step_by(run_pages as usize) {
                let outcome = sink.install(PageIndex(first), &bytes).expect("installs");
                assert_eq!(outcome.installed_pages(), run_pages);
            }
            sink
        };
        group.bench_function(BenchmarkId::new("pages a run", run_pages), |b| {
            b.iter_batched(fresh, fill, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = short::short(); targets = look, install);
criterion_main!(benches);
