//! The content store over TCP, from guest memory into slots and back, at several batch sizes, beside a plain
//! `writev` and `read` stream that stores nothing. Each iteration moves 16 MiB.

mod short;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::page::PAGE_BYTES_U64;
use sg_benches::plain::Plain;
use sg_benches::store::Store;

const PAGES: u32 = 4 << 10;
const BATCHES: [u32; 3] = [1, 16, 64];

fn store(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES).expect("memory");
    let mut group = criterion.benchmark_group("store");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    for batch_pages in BATCHES {
        let (mut store, mut placed) = (Store::start(PAGES).expect("serves"), Vec::new());
        group.bench_function(BenchmarkId::new("put and drop", batch_pages), |b| {
            b.iter(|| {
                store.put(&memory, batch_pages, &mut placed).expect("put");
                store.drop_all(&placed).expect("dropped");
            });
        });
        store.put(&memory, batch_pages, &mut placed).expect("put");
        group.bench_function(BenchmarkId::new("get", batch_pages), |b| {
            b.iter(|| store.get(batch_pages, &placed).expect("got"));
        });
    }
    group.finish();
}

fn plain(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES).expect("memory");
    let mut plain = Plain::start(PAGES).expect("loopback");
    let mut group = criterion.benchmark_group("plain stream");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    for batch_pages in BATCHES {
        group.bench_function(BenchmarkId::new("pages a writev", batch_pages), |b| {
            b.iter(|| plain.send(&memory, batch_pages).expect("sent"));
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = short::short(); targets = store, plain);
criterion_main!(benches);
