//! The pure cores, over a VM of 256 MiB: the planner at the source, the tracker at the destination, slots and
//! index at an intermediary. What is told is the time, and so the rate, of each page.

mod short;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use libsg::ids::VolumeId;
use libsg::page::PAGE_BYTES_U64;
use libsg::server::index::Index;
use libsg::server::slots::Slots;
use sg_benches::pure;

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(pure::PAGES.into()));
    group
}

fn planner(criterion: &mut Criterion) {
    let mut group = group(criterion, "planner");
    group.bench_function("all pages through an intermediary", |b| {
        b.iter_batched_ref(pure::planner, pure::plan, BatchSize::PerIteration);
    });
}

fn tracker(criterion: &mut Criterion) {
    let entries = pure::entries();
    let mut group = group(criterion, "tracker");
    group.bench_function("all pages announced, read, installed", |b| {
        b.iter_batched_ref(pure::tracker, |tracker| pure::track(tracker, &entries), BatchSize::PerIteration);
    });
}

fn index(criterion: &mut Criterion) {
    let entries = pure::entries();
    let mut group = group(criterion, "index");
    group.bench_function("put", |b| {
        let fill = |index: &mut Index| pure::fill(index, &entries);
        b.iter_batched_ref(Index::default, fill, BatchSize::PerIteration);
    });
    let (mut full, mut found) = (Index::default(), Vec::new());
    pure::fill(&mut full, &entries);
    group.bench_function("locate", |b| b.iter(|| pure::locate(&full, &mut found)));
}

fn slots(criterion: &mut Criterion) {
    let volume = VolumeId(1);
    let fresh = || {
        let mut slots = Slots::new(u64::from(pure::PAGES) * PAGE_BYTES_U64);
        slots.open(volume, None);
        slots
    };
    let mut group = group(criterion, "slots");
    group.bench_function("all taken, stored, freed", |b| {
        b.iter_batched_ref(fresh, |slots| pure::take_and_free(slots, volume), BatchSize::PerIteration);
    });
}

criterion_group!(name = benches; config = short::short(); targets = planner, tracker, index, slots);
criterion_main!(benches);
