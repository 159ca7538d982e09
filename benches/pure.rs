//! Work for the pure cores, over a VM of 256 MiB: what the benches time, and what `instructions` counts.

use std::time::{Duration, Instant};

use libsg::gather::{Claim, Path, Read, Tracker, Word};
use libsg::ids::{Checksum, Generation, MemberIndex, MemberSet, Placement, Round, SlotIndex, VolumeId};
use libsg::latency::LatencyHistogram;
use libsg::limits::BATCH_PAGES;
use libsg::pace::{RateFinder, Reading};
use libsg::page::{PageIndex, PageRange};
use libsg::scatter::Planner;
use libsg::scatter::planner::{Sink, Work};
use libsg::server::index::Index;
use libsg::server::slots::{Owner, SlotRun, Slots};
use libsg::wire::IndexEntry;

/// Pages of the VM.
pub const PAGES: u32 = 64 << 10;

const LATE: Duration = Duration::from_secs(1);

fn placement(page: PageIndex) -> Placement {
    Placement { member: MemberIndex(0), slot: SlotIndex(page.0), generation: Generation(1) }
}

/// The index entries of all pages.
#[must_use]
pub fn entries() -> Vec<IndexEntry> {
    let entry = |page| IndexEntry::at(page, Round(0), placement(page), Checksum(page.0));
    PageRange::new(PageIndex(0), PAGES).iter().map(entry).collect()
}

/// A planner that has everything before it.
#[must_use]
pub fn planner() -> Planner {
    let mut planner = Planner::new(&crate::manifest(PAGES), true);
    planner.available(PageRange::new(PageIndex(0), PAGES));
    planner
}

/// Every page goes to one intermediary, is stored and indexed.
pub fn plan(planner: &mut Planner) {
    let now = Instant::now();
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    while let Some(Work::Pages(id, batch)) = planner.next(Sink::Member(MemberIndex(0)), now, LATE) {
        entries.clear();
        let stored = batch.iter().map(|page| (page, Checksum(page.0), Some(placement(page))));
        planner.stored((id, MemberSet::NONE), stored, &mut entries, &mut losers);
        planner.indexed(&entries);
    }
    assert!(planner.is_done());
}

/// A tracker that knows of nothing.
#[must_use]
pub fn tracker() -> Tracker {
    let mut tracker = Tracker::new(&crate::manifest(PAGES));
    tracker.set_members(1);
    tracker
}

/// Every page is announced, read, claimed and installed.
///
/// # Panics
/// Never: the entries are about the VM's pages.
pub fn track(tracker: &mut Tracker, entries: &[IndexEntry]) {
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
}

/// Every entry is put, a batch at a time.
///
/// # Panics
/// Never: there is room.
pub fn fill(index: &mut Index, entries: &[IndexEntry]) {
    for batch in entries.chunks(BATCH_PAGES) {
        index.put(batch, &mut || true).expect("room");
    }
}

/// Every entry is asked for, an index server's range at a time.
pub fn locate(index: &Index, found: &mut Vec<IndexEntry>) {
    const RANGE: u32 = 1024;
    for first in (0..PAGES).step_by(RANGE as usize) {
        found.clear();
        index.locate(PageRange::new(PageIndex(first), RANGE), RANGE as usize, found);
    }
}

/// Slots for every page are taken, a batch at a time, hold it, and are given back.
///
/// # Panics
/// Never: the volume is known.
pub fn take_and_free(slots: &mut Slots, volume: VolumeId) {
    let (mut runs, mut held): (Vec<SlotRun>, Vec<(PageIndex, SlotIndex, Generation)>) = Default::default();
    for first in (0..PAGES).step_by(BATCH_PAGES) {
        let before = runs.len();
        let taken = slots.allocate(volume, BATCH_PAGES, &mut runs).expect("a volume");
        assert_eq!(taken, BATCH_PAGES);
        let taken = runs[before..].iter().flat_map(|run| run.iter());
        for (slot, page) in taken.zip(first..) {
            let owner = Owner { page: PageIndex(page), checksum: Checksum(page), round: Round(0) };
            let generation = slots.store(slot, owner, None).expect("a volume");
            held.push((owner.page, slot, generation));
        }
    }
    for (page, slot, generation) in held {
        slots.release(volume, page, slot, generation);
    }
}

/// 1,000 readings of a link of 1 Gb/s, one each 4 ms, on which a queue shows when more is sent than it carries.
pub fn find_rate(finder: &mut RateFinder) {
    const EVERY: Duration = Duration::from_millis(4);
    const CARRIES: f64 = 125e6;
    let (mut now, mut delivered, mut queued) = (Instant::now(), 0.0, 0.0_f64);
    for _ in 0..1000 {
        now += EVERY;
        let sent = finder.rate().map_or(2.0 * CARRIES, |rate| rate as f64) * EVERY.as_secs_f64();
        let carried = (queued + sent).min(CARRIES * EVERY.as_secs_f64());
        queued = (queued + sent - carried).min(1e6);
        delivered += carried;
        let queue_delay = Some(Duration::from_secs_f64(queued / CARRIES));
        let base_rtt = Duration::from_micros(50);
        finder.tick(now, Reading { delivered: delivered as u64, queue_delay, base_rtt, app_limited: false });
    }
}

/// As many latencies as the VM has pages, from 1 µs up, and the percentiles of a report.
pub fn record(histogram: &mut LatencyHistogram) {
    (1..=PAGES).for_each(|us| histogram.record(Duration::from_micros(us.into())));
    assert!([50.0, 90.0, 99.0].iter().all(|percent| histogram.percentile_us(*percent).is_some()));
}
