//! A content server's store under the pool's hash, in batches of 64 pages, beside that hash and a copy alone: one
//! thread, no connection. Each iteration is over 16 MiB.

mod short;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use libsg::page::PAGE_BYTES_U64;
use sg_benches::content::Content;

const PAGES: u32 = 4 << 10;

fn hashed(criterion: &mut Criterion) {
    let mut content = Content::start(PAGES).expect("memory");
    let mut group = criterion.benchmark_group("hashed");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    group.bench_function("hash and copy alone", |b| b.iter(|| content.alone()));
    group.bench_function("put and drop", |b| {
        b.iter(|| {
            content.put().expect("put");
            content.give_back().expect("given back");
        });
    });
    content.put().expect("put");
    group.bench_function("get", |b| b.iter(|| content.get().expect("got")));
    group.finish();
}

criterion_group!(name = benches; config = short::short(); targets = hashed);
criterion_main!(benches);
