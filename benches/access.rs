//! Pages that a client writes and reads by itself: leases and settlements on the connection, work requests on a simulated
//! device, in batches. The device copies in this process, at no network's speed: what is measured is all around that. Each
//! iteration moves 16 MiB.

mod short;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::page::PAGE_BYTES_U64;
use sg_benches::store::Store;

const PAGES: u32 = 4 << 10;

const BATCHES: [u32; 4] = [1, 16, 64, 256];

fn access(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES).expect("memory");
    let mut group = criterion.benchmark_group("access");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    for batch_pages in BATCHES {
        let (mut store, mut placed) = (Store::start_simulated(PAGES).expect("serves"), Vec::new());
        group.bench_function(BenchmarkId::new("lease, write, settle, and drop", batch_pages), |b| {
            b.iter(|| {
                store.put(&memory, batch_pages, &mut placed).expect("put");
                store.drop_all(&placed).expect("dropped");
            });
        });
        store.put(&memory, batch_pages, &mut placed).expect("put");
        group.bench_function(BenchmarkId::new("reach, read, release", batch_pages), |b| {
            b.iter(|| store.get(batch_pages, &placed).expect("got"));
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = short::short(); targets = access);
criterion_main!(benches);
