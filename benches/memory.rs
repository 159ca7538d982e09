//! Guest memory: the zero check and the checksum at the source, the install at the destination.

mod short;

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::memory::GuestMemory;
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::sink::PageSink as _;
use libsg::uffd::{InstallBy, Uffd};

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

/// Runs of 4 KiB, 64 KiB, of a batch, and of 2 MiB, into memory that was never touched: private memory, and memory files
/// by both ways. `SG_MEMORY_DIR` says where the files are instead of in memfds: in a tmpfs with large folios, say.
fn install(criterion: &mut Criterion) {
    let directory = std::env::var_os("SG_MEMORY_DIR").map(PathBuf::from);
    let anonymous = || sg_benches::fresh(INSTALL_PAGES);
    let file = || sg_benches::fresh_file(INSTALL_PAGES, directory.as_deref());
    install_into(criterion, "install", anonymous, InstallBy::Copy);
    install_into(criterion, "install into a file, copied", file, InstallBy::Copy);
    install_into(criterion, "install into a file, by file", file, InstallBy::File);
}

fn install_into(
    criterion: &mut Criterion,
    name: &str,
    memory: impl Fn() -> libsg::Result<GuestMemory>,
    by: InstallBy,
) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(u64::from(INSTALL_PAGES) * PAGE_BYTES_U64));
    for run_pages in [1, 16, 64, 512] {
        let bytes = vec![0xa5; run_pages as usize * PAGE_BYTES];
        let fresh = || {
            let sink = Uffd::register_by(&memory().expect("memory"), by);
            let sink = sink.expect("userfaultfd is allowed: run as root");
            assert_eq!(sink.install_by(), by, "this kernel maps no pages of files by request");
            sink
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
