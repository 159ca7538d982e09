//! Encoding and decoding: the header of each frame, and the tables of a batch of 64 pages.

mod short;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use libsg::ids::{Checksum, Epoch, Generation, MemberIndex, Placement, Round, Sequence, SlotIndex, VolumeId};
use libsg::limits::BATCH_PAGES;
use libsg::page::{PAGE_BYTES, PageIndex};
use libsg::wire::run::{CHECKSUM_BYTES, RunEntry, decode_runs, encode_runs};
use libsg::wire::{Header, IndexEntry, Kind, PageEntry};

fn header(criterion: &mut Criterion) {
    let header = Header {
        volume: VolumeId(7),
        epoch: Epoch::FIRST,
        sequence: Sequence(9),
        count: 1,
        body_bytes: (PageEntry::HEAD_BYTES + BATCH_PAGES * (CHECKSUM_BYTES + PAGE_BYTES)) as u32,
        ..Header::new(Kind::Put)
    };
    let bytes = header.encode();
    criterion.bench_function("header/encode", |b| b.iter(|| black_box(&header).encode()));
    criterion
        .bench_function("header/decode", |b| b.iter(|| Header::decode(black_box(&bytes)).expect("good")));
}

fn table<E: RunEntry>(criterion: &mut Criterion, name: &str, entry: impl Fn(u32) -> E) {
    let entries: Vec<E> = (0..BATCH_PAGES as u32).map(entry).collect();
    let mut group = criterion.benchmark_group(format!("table/{name}"));
    group.throughput(Throughput::Elements(BATCH_PAGES as u64));
    let mut bytes = Vec::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            bytes.clear();
            encode_runs(black_box(&entries).iter().copied(), &mut bytes)
        });
    });
    let mut decoded = Vec::new();
    group.bench_function("decode", |b| {
        b.iter(|| decode_runs::<E>(black_box(&bytes), 1, &mut decoded).expect("good"));
    });
    group.finish();
}

fn tables(criterion: &mut Criterion) {
    table(criterion, "pages", |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(page)));
    table(criterion, "index", |page| {
        let placement =
            Placement { member: MemberIndex(1), slot: SlotIndex(page), generation: Generation(1) };
        IndexEntry::at(PageIndex(page), Round(0), placement, Checksum(page))
    });
}

criterion_group!(name = benches; config = short::short(); targets = header, tables);
criterion_main!(benches);
