//! What a source hears of pages that it forgets: when they are safe, when they are lost, and what a fault on one is answered.

use std::time::{Duration, Instant};

use super::*;
use crate::ids::{Checksum, Generation, MemberIndex, MemberSet, Placement, SlotIndex};
use crate::manifest::{Manifest, Region};
use crate::page::{InstallUnit, PAGE_BYTES_U64};
use crate::scatter::planner::{BatchId, Sink, Work};

const FIRST: MemberIndex = MemberIndex(0);
const OTHER: MemberIndex = MemberIndex(1);
const LATE: Duration = Duration::from_secs(1);

fn range(first: u32, pages: u32) -> PageRange {
    PageRange::new(PageIndex(first), pages)
}

/// 100 small pages, then two of 2 MiB.
fn planner() -> Planner {
    let region = |name: &str, pages: u64, unit| Region {
        name: name.into(),
        guest_address: None,
        length_bytes: pages * PAGE_BYTES_U64,
        unit,
    };
    let regions = vec![region("a", 100, InstallUnit::Page), region("b", 1024, InstallUnit::Huge2M)];
    let manifest = Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None };
    Planner::new(&manifest, true).with_outcomes()
}

/// What the source hears: what is lost, and what is safe.
fn news(planner: &mut Planner) -> (Vec<PageRange>, Vec<PageRange>) {
    let (mut safe, mut lost) = (Vec::new(), Vec::new());
    planner.take_outcomes(&mut safe, &mut lost);
    (lost, safe)
}

/// The next batch of a sink.
fn next(planner: &mut Planner, sink: Sink) -> (BatchId, Batch) {
    match planner.next(sink, Instant::now(), LATE) {
        Some(Work::Pages(id, batch)) => (id, batch),
        other => panic!("{other:?}"),
    }
}

/// A batch is stored at a member, and its index entries are known.
fn store(planner: &mut Planner, member: MemberIndex, (id, batch): (BatchId, Batch)) {
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    let placed = |page: PageIndex| {
        let placement = Placement { member, slot: SlotIndex(page.0), generation: Generation(1) };
        (page, Checksum(page.0), Some(placement))
    };
    planner.stored((id, MemberSet::NONE), batch.iter().map(placed), &mut entries, &mut losers);
    planner.indexed(&entries);
}

fn lose(planner: &mut Planner, member: MemberIndex) {
    planner.member_lost(member, (MemberSet::of(OTHER), 1), |_| false, |_| ());
}

#[test]
fn a_page_is_told_of_when_it_is_safe_and_nobody_reads_it() {
    let mut planner = planner();
    planner.available(range(0, 10));
    assert_eq!(news(&mut planner), (vec![], vec![]));
    let first = next(&mut planner, Sink::Direct);
    // It is late, and goes to a member as well, who is first.
    let Some(Work::Pages(hedge, batch)) = planner.next(Sink::Member(FIRST), Instant::now() + LATE, LATE)
    else {
        panic!("late batches go a second way")
    };
    store(&mut planner, FIRST, (hedge, batch));
    assert_eq!(news(&mut planner), (vec![], vec![]), "the first sink has not read them yet");
    planner.loaded(first.0);
    assert_eq!(news(&mut planner), (vec![], vec![range(0, 10)]), "though that is under way still");
    assert_eq!(news(&mut planner), (vec![], vec![]), "news are told once");
    planner.installed(first.0, &[]);
    assert_eq!(news(&mut planner), (vec![], vec![]));
}

#[test]
fn a_page_that_is_lost_waits_for_its_source() {
    let mut planner = planner();
    planner.available(range(0, 20));
    let batch = next(&mut planner, Sink::Member(FIRST));
    store(&mut planner, FIRST, batch);
    assert_eq!(news(&mut planner).1, [range(0, 20)]);
    let now = Instant::now();
    assert_eq!(planner.fault(PageIndex(3), now), FaultAnswer::Elsewhere(range(3, 1)));
    let entries: Vec<_> = planner.entries(range(3, 1)).collect();
    assert_eq!(entries[0].placement.map(|at| at.member), Some(FIRST));

    lose(&mut planner, FIRST);
    assert_eq!(planner.progress().0, 0);
    assert_eq!(planner.next(Sink::Direct, now, LATE), None, "nothing is to be read that may be forgotten");
    assert_eq!(planner.fault(PageIndex(3), now), FaultAnswer::NotYet);
    assert_eq!(news(&mut planner), (vec![range(0, 20)], vec![]));
    assert_eq!(news(&mut planner), (vec![], vec![]));

    // It comes again, and is safe again, and lost for good once all was said to be safe.
    planner.available(range(0, 20));
    let batch = next(&mut planner, Sink::Member(OTHER));
    assert_eq!(batch.1.pages(), 20);
    store(&mut planner, OTHER, batch);
    assert_eq!(news(&mut planner), (vec![], vec![range(0, 20)]));
    // Who asks again and again does not find it there.
    assert_eq!(planner.fault(PageIndex(3), now + DOUBT), FaultAnswer::NotYet);
    assert_eq!(news(&mut planner), (vec![range(3, 1)], vec![]));
    planner.held(range(3, 1));
    assert_eq!(planner.fault(PageIndex(4), now), FaultAnswer::Elsewhere(range(4, 1)));
    planner.close();
    assert_eq!(planner.fault(PageIndex(4), now + DOUBT), FaultAnswer::Unknown);
    lose(&mut planner, OTHER);
    assert_eq!(planner.fault(PageIndex(4), now), FaultAnswer::Unknown);
}

#[test]
fn what_was_not_told_is_sent_again_at_once() {
    let mut planner = planner();
    planner.available(range(0, 20));
    let batch = next(&mut planner, Sink::Member(FIRST));
    store(&mut planner, FIRST, batch);
    lose(&mut planner, FIRST);
    assert_eq!(news(&mut planner), (vec![], vec![]));
    assert_eq!(next(&mut planner, Sink::Direct).1.pages(), 20);
}

#[test]
fn a_page_that_was_on_its_way_all_the_same_is_not_lost() {
    let mut planner = planner();
    planner.available(range(0, 1));
    let (direct, _) = next(&mut planner, Sink::Direct);
    planner.loaded(direct);
    let Some(Work::Pages(hedge, batch)) = planner.next(Sink::Member(FIRST), Instant::now() + LATE, LATE)
    else {
        panic!("late batches go a second way")
    };
    store(&mut planner, FIRST, (hedge, batch));
    assert_eq!(news(&mut planner).1, [range(0, 1)]);
    lose(&mut planner, FIRST);
    planner.installed(direct, &[]);
    assert_eq!(news(&mut planner), (vec![], vec![]));
    assert!(planner.is_safe(PageIndex(0)));
}

#[test]
fn a_unit_is_told_of_as_a_whole() {
    let mut planner = planner();
    planner.available(range(100, 1024));
    let (direct, batch) = next(&mut planner, Sink::Direct);
    assert_eq!(batch.pages(), 512);
    planner.loaded(direct);
    // One of its pages does not arrive: it goes again, with all others.
    planner.installed(direct, &[PageIndex(300)]);
    assert_eq!(news(&mut planner), (vec![], vec![]));
    let again = next(&mut planner, Sink::Member(FIRST));
    assert_eq!(again.1.pages(), 512);
    store(&mut planner, FIRST, again);
    assert_eq!(news(&mut planner), (vec![], vec![range(100, 512)]));
    lose(&mut planner, FIRST);
    assert_eq!(news(&mut planner), (vec![range(100, 512)], vec![]), "though the others are installed");
    planner.available(range(100, 512));
    planner.held(range(100, 512));
    assert_eq!(news(&mut planner), (vec![], vec![range(100, 512)]));
}

#[test]
fn a_zero_page_needs_no_source() {
    let mut planner = planner();
    planner.available(range(0, 2));
    let (id, _) = next(&mut planner, Sink::Member(FIRST));
    assert!(planner.found_zero(id, [PageIndex(0), PageIndex(1)]));
    planner.indexed(&[IndexEntry::zero(PageIndex(0), 2, crate::ids::Round(0))]);
    assert_eq!(news(&mut planner).1, [range(0, 2)]);
    planner.members_gone();
    assert_eq!(news(&mut planner), (vec![], vec![]));
    assert!(
        matches!(planner.next(Sink::Direct, Instant::now(), LATE), Some(Work::Zeros(_, zeros)) if zeros == range(0, 2))
    );
}
