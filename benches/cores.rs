//! The pure cores, over a VM of 256 MiB: the planner at the source, the tracker at the destination, slots and
//! index at an intermediary. What is told is the time, and so the rate, of each page.

mod short;

use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use libsg::gather::{Claim, Path, Read, Tracker, Word};
use libsg::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex};
use libsg::limits::BATCH_PAGES;
use libsg::page::{PageIndex, PageRange};
use libsg::scatter::Planner;
use libsg::scatter::planner::{Sink, Work};
use libsg::server::index::Index;
use libsg::wire::IndexEntry;

const PAGES: u32 = 64 << 10;
const LATE: Duration = Duration::from_secs(1);

fn placement(page: PageIndex) -> Placement {
    Placement { member: MemberIndex(0), slot: SlotIndex(page.0), generation: Generation(1) }
}

fn entries() -> Vec<IndexEntry> {
    let entry = |page| IndexEntry::at(page, Round(0), placement(page), Checksum(page.0));
    PageRange::new(PageIndex(0), PAGES).iter().map(entry).collect()
}

/// Every page goes to one intermediary, is stored and indexed.
fn plan(mut planner: Planner) -> Planner {
    let now = Instant::now();
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    while let Some(Work::Pages(id, batch)) = planner.next(Sink::Member(MemberIndex(0)), now, LATE) {
        entries.clear();
        let stored = batch.iter().map(|page| (page, Checksum(page.0), Some(placement(page))));
        planner.stored(id, stored, &mut entries, &mut losers);
        planner.indexed(&entries);
    }
    assert!(planner.is_done());
    planner
}

fn planner(criterion: &mut Criterion) {
    let fresh = || {
        let mut planner = Planner::new(&sg_benches::manifest(PAGES), true);
        planner.available(PageRange::new(PageIndex(0), PAGES));
        planner
    };
    let mut group = criterion.benchmark_group("planner");
    group.throughput(Throughput::Elements(PAGES.into()));
    group.bench_function("all pages through an intermediary", |b| {
        b.iter_batched(fresh, plan, BatchSize::PerIteration);
    });
    group.finish();
}

/// Every page is announced, read, claimed and installed.
fn track(mut tracker: Tracker, entries: &[IndexEntry]) -> Tracker {
    let now = Instant::now();
    for entry in entries {
        tracker.announce(entry, Word::Source).expect("within bounds");
    }
    let mut reads: Vec<Read> = Vec::new();
    loop {
        tracker.next_batch(MemberIndex(0), BATCH_PAGES, &mut reads);
        if reads.is_empty() {
            break;
        }
        for read in &reads {
            if let Claim::Install(unit) = tracker.claim(read.page, read.round) {
                tracker.installed(unit, Path::Staged, now);
            }
        }
    }
    assert_eq!(tracker.counts().held, u64::from(PAGES));
    tracker
}

fn tracker(criterion: &mut Criterion) {
    let entries = entries();
    let fresh = || {
        let mut tracker = Tracker::new(&sg_benches::manifest(PAGES));
        tracker.set_members(1);
        tracker
    };
    let mut group = criterion.benchmark_group("tracker");
    group.throughput(Throughput::Elements(PAGES.into()));
    group.bench_function("all pages announced, read, installed", |b| {
        b.iter_batched(fresh, |tracker| track(tracker, &entries), BatchSize::PerIteration);
    });
    group.finish();
}

fn index(criterion: &mut Criterion) {
    let entries = entries();
    let mut group = criterion.benchmark_group("index");
    group.throughput(Throughput::Elements(PAGES.into()));
    let fill = |mut index: Index| {
        for batch in entries.chunks(BATCH_PAGES) {
            index.put(batch, &mut || true).expect("room");
        }
        index
    };
    group.bench_function("put", |b| b.iter_batched(Index::default, fill, BatchSize::PerIteration));
    let full = fill(Index::default());
    let mut found = Vec::new();
    group.bench_function("locate", |b| {
        b.iter(|| {
            for first in (0..PAGES).step_by(1024) {
                found.clear();
                full.locate(PageRange::new(PageIndex(first), 1024), 1024, &mut found);
            }
        });
    });
    group.finish();
}

criterion_group!(name = benches; config = short::short(); targets = planner, tracker, index);
criterion_main!(benches);
