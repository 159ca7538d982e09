//! The planner against made-up sinks: every page ends up safe, whatever fails on the way.

use proptest::prelude::*;

use super::super::spans::zero_entries;
use super::*;
use crate::ids::{Generation, SlotIndex};
use crate::manifest::Region;

const HEDGE_AFTER: Duration = Duration::from_millis(100);
const MEMBERS: u16 = 3;

/// Pages lie at one member each.
const ALONE: (MemberSet, usize) = (MemberSet::ALL, 1);

fn manifest(small_pages: u64, huge_units: u64) -> Manifest {
    let region = |name: &str, length_bytes, unit| Region {
        name: name.into(),
        guest_address: None,
        length_bytes,
        unit,
    };
    let mut regions = vec![region("ram", small_pages * 4096, InstallUnit::Page)];
    if huge_units > 0 {
        regions.push(region("huge", huge_units << 21, InstallUnit::Huge2M));
    }
    Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None }
}

fn all(planner: &Planner) -> PageRange {
    PageRange::new(PageIndex(0), planner.progress().1)
}

fn member(n: u16) -> Sink {
    Sink::Member(MemberIndex(n))
}

fn place(member: u16, slot: u32) -> Placement {
    Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(1) }
}

/// An honest answer of an intermediary, and the index's.
fn store(planner: &mut Planner, n: u16, id: BatchId, batch: Batch) -> usize {
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    let answer = batch.iter().map(|page| (page, Checksum(page.0), Some(place(n, page.0))));
    planner.stored((id, MemberSet::NONE), answer.collect::<Vec<_>>(), &mut entries, &mut losers);
    planner.indexed(&entries);
    losers.len()
}

#[test]
fn a_unit_lies_in_one_place_or_in_none() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(1, 1), true);
    planner.available(PageRange::new(PageIndex(1), 512));
    let pages = |work: Option<Work>| match work {
        Some(Work::Pages(id, batch)) if batch.pages() == 512 => (id, batch),
        other => panic!("{other:?}"),
    };
    let (full, batch) = pages(planner.next(member(0), now, HEDGE_AFTER));
    let (roomy, hedged) = pages(planner.next(member(1), now + HEDGE_AFTER, HEDGE_AFTER));
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    let answer = batch.iter().map(|page| (page, Checksum(0), (page.0 < 400).then(|| place(0, page.0))));
    planner.stored((full, MemberSet::NONE), answer.collect::<Vec<_>>(), &mut entries, &mut losers);
    assert_eq!((entries.len(), losers.len()), (0, 399));
    assert_eq!(store(&mut planner, 1, roomy, hedged), 0);
    assert_eq!(planner.progress().0, 512);
    let places = batch.iter().map(|page| planner.table.placement(page).map(|(at, _)| at.member));
    assert!(places.into_iter().all(|at| at == Some(MemberIndex(1))));
}

#[test]
fn sinks_pull_disjoint_batches_and_everything_becomes_safe() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(200, 2), true);
    planner.available(all(&planner));
    let mut seen = 0;
    for n in (0..MEMBERS).cycle() {
        let Some(Work::Pages(id, batch)) = planner.next(member(n), now, HEDGE_AFTER) else { break };
        seen += batch.pages();
        assert_eq!(store(&mut planner, n, id, batch), 0);
    }
    assert_eq!(seen, 200 + 1024);
    assert!(planner.is_done());
    assert_eq!(planner.tally(), Tally { staged: 1224, ..Tally::default() });
}

#[test]
fn late_batches_go_elsewhere_and_the_first_answer_wins() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(64, 0), true);
    planner.available(all(&planner));
    let Some(Work::Pages(slow, batch)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("work") };
    assert_eq!(planner.next(member(1), now, HEDGE_AFTER), None);
    let later = now + HEDGE_AFTER;
    assert_eq!(planner.next(member(0), later, HEDGE_AFTER), None, "not to the one that is late");
    let Some(Work::Pages(fast, again)) = planner.next(member(1), later, HEDGE_AFTER) else {
        panic!("hedged")
    };
    assert_eq!(again, batch);
    assert_eq!(store(&mut planner, 1, fast, again), 0);
    assert!(planner.is_done());
    assert_eq!(store(&mut planner, 0, slow, batch), 64, "the loser's slots are not needed");
    assert_eq!(planner.tally().hedged, 64);
    assert_eq!(planner.tally().staged, 64);
}

#[test]
fn a_dead_member_costs_what_lay_there_and_what_its_index_held() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(128, 0), true);
    planner.available(all(&planner));
    for n in 0..2 {
        let Some(Work::Pages(id, batch)) = planner.next(member(n), now, HEDGE_AFTER) else { panic!("work") };
        store(&mut planner, n, id, batch);
    }
    assert!(planner.is_done());
    let mut moved = Vec::new();
    planner.member_lost(MemberIndex(0), ALONE, |_| true, |entry| moved.push(entry));
    assert_eq!(moved.len(), 64, "the other's pages need a new index");
    assert_eq!(planner.progress().0, 0);
    planner.indexed(&moved);
    assert_eq!(planner.progress().0, 64);
    let Some(Work::Pages(id, batch)) = planner.next(member(1), now, HEDGE_AFTER) else {
        panic!("sent again")
    };
    store(&mut planner, 1, id, batch);
    assert!(planner.is_done());
}

/// Pages at one member and, as copies, at another: what a death takes of them is sent again where somebody else can have
/// it, and what lay elsewhere of it is given back once it has.
#[test]
fn a_copy_that_is_lost_is_made_again_while_others_can_have_it() {
    let now = Instant::now();
    let held =
        |first: u16, others: &[u16]| (first, others.iter().map(|n| MemberIndex(*n)).collect::<MemberSet>());
    for (alive, goes_again) in [(vec![0, 2], true), (vec![0], false)] {
        let mut planner = Planner::new(&manifest(192, 0), true);
        planner.available(all(&planner));
        for (first, copies) in [held(0, &[1]), held(1, &[0]), held(0, &[2])] {
            let Some(Work::Pages(id, batch)) = planner.next(member(first), now, HEDGE_AFTER) else {
                panic!("work")
            };
            let (mut entries, mut losers) = (Vec::new(), Vec::new());
            let answer: Vec<_> =
                batch.iter().map(|page| (page, Checksum(page.0), Some(place(first, page.0)))).collect();
            planner.stored((id, copies), answer, &mut entries, &mut losers);
            planner.indexed(&entries);
            assert!(losers.is_empty());
        }
        assert!(planner.is_done());
        let living: MemberSet = alive.into_iter().map(MemberIndex).collect();
        planner.member_lost(MemberIndex(1), (living, 2), |_| false, |_| panic!("nobody asked"));
        // Those whose first holder it was are sent again in any case.
        let left = 64 * (1 + u32::from(!goes_again));
        assert_eq!(planner.progress().0, left, "{living:?}");
        while let Some(Work::Pages(id, batch)) = planner.next(member(0), now, HEDGE_AFTER) {
            let (mut entries, mut losers) = (Vec::new(), Vec::new());
            let answer: Vec<_> =
                batch.iter().map(|page| (page, Checksum(page.0), Some(place(0, 1000 + page.0)))).collect();
            planner.stored((id, MemberSet(0b100)), answer, &mut entries, &mut losers);
            planner.indexed(&entries);
            assert_eq!(losers.len(), 64, "what is left of them elsewhere");
            assert!(losers.iter().all(|loser| loser.place.holders() == MemberSet(0b011)));
        }
        assert!(planner.is_done());
    }
}

/// One of two died, and what it held lies at the other alone, until another takes pages: then that is sent again, and nothing
/// that lies at two.
#[test]
fn one_that_comes_later_gets_copies_of_what_lies_at_too_few() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(192, 0), true);
    planner.available(PageRange::new(PageIndex(0), 128));
    planner.absent(PageRange::new(PageIndex(128), 64));
    let send = |planner: &mut Planner, copies: MemberSet, round: u32| {
        let Some(Work::Pages(id, batch)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("work") };
        let (mut entries, mut losers) = (Vec::new(), Vec::new());
        let at = |page: PageIndex| (page, Checksum(page.0), Some(place(0, 1000 * round + page.0)));
        planner.stored((id, copies), batch.iter().map(at).collect::<Vec<_>>(), &mut entries, &mut losers);
        planner.indexed(&entries);
        (batch, losers)
    };
    let (alone, _) = send(&mut planner, MemberSet::of(MemberIndex(1)), 0);
    send(&mut planner, MemberSet::of(MemberIndex(2)), 0);
    let Some(Work::Zeros(id, zeros)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("zeros") };
    assert!(planner.zeros_told(id));
    planner.indexed(&zero_entries(zeros, Round(0)).collect::<Vec<_>>());
    planner.member_lost(MemberIndex(1), (MemberSet(0b001), 2), |_| false, |_| panic!("nobody asked"));
    assert!(planner.is_done(), "nobody else can have it");
    let living = MemberSet(0b1101);
    for (has_fewer, told_again) in [(false, 0), (true, 64)] {
        let mut again = Vec::new();
        planner.member_opened((living, 2), has_fewer, |entry| again.push(entry));
        assert_eq!((again.len(), planner.progress().0), (told_again, 128 - told_again as u32));
        planner.indexed(&again);
    }
    let (batch, losers) = send(&mut planner, MemberSet::of(MemberIndex(3)), 1);
    assert_eq!((batch, losers.len()), (alone, 64), "what was made before is given back");
    assert!(planner.is_done());
    planner.member_opened((living, 2), false, |_| panic!("they know"));
    assert!(planner.is_done(), "it lies at two");
}

#[test]
fn zero_pages_need_an_index_entry_only() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(2048, 0), true);
    planner.absent(PageRange::new(PageIndex(0), 2047));
    planner.available(PageRange::new(PageIndex(2047), 1));
    let Some(Work::Zeros(id, range)) = planner.next(member(0), now, HEDGE_AFTER) else {
        panic!("zeros first")
    };
    assert_eq!(range, PageRange::new(PageIndex(0), 2047));
    planner.zeros_told(id);
    let entries: Vec<_> = zero_entries(range, Round(0)).collect();
    assert_eq!(entries.iter().map(|e| e.run_pages).collect::<Vec<_>>(), [1024, 1023]);
    planner.indexed(&entries);
    let Some(Work::Pages(id, batch)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("page") };
    assert!(planner.found_zero(id, batch.iter()));
    planner.indexed(&[IndexEntry::zero(PageIndex(2047), 1, Round(0))]);
    assert!(planner.is_done());
    assert_eq!(planner.tally().zero, 1);
}

#[test]
fn faults_are_answered_whatever_the_state() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(64, 1), true);
    assert_eq!(planner.fault(PageIndex(3), now), FaultAnswer::NotYet);
    assert_eq!(planner.fault(PageIndex(9999), now), FaultAnswer::Unknown);
    planner.available(all(&planner));
    let FaultAnswer::Send(small, range) = planner.fault(PageIndex(3), now) else { panic!("sent") };
    assert_eq!(range, PageRange::new(PageIndex(3), 1));
    let FaultAnswer::Send(huge, range) = planner.fault(PageIndex(64 + 17), now) else { panic!("sent") };
    assert_eq!(range, PageRange::new(PageIndex(64), 512));
    let Some(Work::Pages(_, batch)) = planner.next(Sink::Direct, now, HEDGE_AFTER) else { panic!("work") };
    assert!(!batch.contains(PageIndex(3)) && batch.pages() == 63);
    planner.installed(small, &[]);
    planner.installed(huge, &[]);
    assert_eq!(planner.progress().0, 513);
}

proptest! {
    /// Random sinks answer, refuse, are lost and come back; in the end honest ones finish it.
    #[test]
    fn nothing_is_ever_forgotten(steps in proptest::collection::vec((0u8..10, 0u16..MEMBERS, any::<u16>()), 0..300)) {
        let start = Instant::now();
        let mut planner = Planner::new(&manifest(700, 2), true);
        planner.available(PageRange::new(PageIndex(0), 300));
        planner.absent(PageRange::new(PageIndex(300), 100));
        planner.available(PageRange::new(PageIndex(400), 300 + 1024));
        let mut open: Vec<(Sink, Work)> = Vec::new();
        let mut unindexed: Vec<IndexEntry> = Vec::new();
        for (at, (what, n, pick)) in steps.into_iter().enumerate() {
            let now = start + Duration::from_millis(20 * at as u64);
            let sink = if pick % 3 == 0 { Sink::Direct } else { member(n) };
            match what {
                0..=3 => open.extend(planner.next(sink, now, HEDGE_AFTER).map(|work| (sink, work))),
                4 => {
                    let page = PageIndex(u32::from(pick) % 1800);
                    match planner.fault(page, now) {
                        FaultAnswer::Send(id, range) => {
                            let mut batch = Batch::empty(range.first);
                            range.iter().for_each(|page| batch.insert(page));
                            open.push((Sink::Urgent, Work::Pages(id, batch)));
                        }
                        FaultAnswer::Zero(id, range) => open.push((Sink::Urgent, Work::Zeros(id, range))),
                        FaultAnswer::Elsewhere(_) | FaultAnswer::NotYet | FaultAnswer::Unknown => {}
                    }
                }
                5 => planner.indexed(&std::mem::take(&mut unindexed)),
                6 => {
                    planner.sink_lost(sink);
                    open.retain(|(of, _)| *of != sink);
                }
                7 => {
                    open.retain(|(of, _)| *of != member(n));
                    unindexed.retain(|entry| entry.placement.is_none_or(|p| p.member != MemberIndex(n)));
                    planner.member_lost(MemberIndex(n), ALONE, |page| page.0 % 3 == u32::from(n), |e| unindexed.push(e));
                }
                8 if pick % 4 == 0 => {
                    planner.member_opened((MemberSet::ALL, 2), pick % 8 == 0, |entry| unindexed.push(entry));
                }
                _ if open.is_empty() => {}
                _ => {
                    let (sink, work) = open.swap_remove(usize::from(pick) % open.len());
                    answer(&mut planner, sink, work, pick, &mut unindexed);
                }
            }
        }
        finish(&mut planner, open, unindexed, start + Duration::from_secs(60));
        let left: Vec<_> = all(&planner).iter().map(|p| (p, planner.table.state(p))).filter(|(_, s)| !s.is_safe()).collect();
        prop_assert!(planner.is_done(), "left over: {:?} {:?}", &left[..left.len().min(3)], planner.in_flight);
    }
}

fn answer(planner: &mut Planner, sink: Sink, work: Work, pick: u16, unindexed: &mut Vec<IndexEntry>) {
    match (sink, work) {
        (Sink::Member(_), Work::Zeros(id, range)) => {
            planner.zeros_told(id);
            unindexed.extend(zero_entries(range, Round(0)));
        }
        (Sink::Member(MemberIndex(n)), Work::Pages(id, batch)) => {
            // One page in seven finds no room.
            let fits = |page: PageIndex| !(page.0 + u32::from(pick)).is_multiple_of(7);
            let answer = batch.iter().map(|p| (p, Checksum(1), fits(p).then(|| place(n, p.0))));
            planner.stored((id, MemberSet::NONE), answer.collect::<Vec<_>>(), unindexed, &mut Vec::new());
        }
        (_, Work::Zeros(id, _)) => planner.installed(id, &[]),
        (_, Work::Pages(id, batch)) => planner.installed(id, &batch.iter().take(1).collect::<Vec<_>>()),
    }
}

fn finish(planner: &mut Planner, open: Vec<(Sink, Work)>, unindexed: Vec<IndexEntry>, now: Instant) {
    for (_, work) in open {
        let (Work::Pages(id, _) | Work::Zeros(id, _)) = work;
        planner.failed(id);
    }
    planner.indexed(&unindexed);
    for _ in 0..10_000 {
        let Some(work) = planner.next(Sink::Direct, now, HEDGE_AFTER) else { break };
        let (Work::Pages(id, _) | Work::Zeros(id, _)) = work;
        planner.installed(id, &[]);
    }
}

#[test]
fn entries_that_no_index_takes_leave_their_pages_unsafe_and_sent_again() {
    let now = Instant::now();
    let mut planner = Planner::new(&manifest(64, 0), true);
    planner.available(PageRange::new(PageIndex(0), 32));
    planner.absent(PageRange::new(PageIndex(32), 32));
    let Some(Work::Pages(id, batch)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("pages") };
    let (mut entries, mut losers) = (Vec::new(), Vec::new());
    let answer: Vec<_> = batch.iter().map(|page| (page, Checksum(1), Some(place(0, page.0)))).collect();
    planner.stored((id, MemberSet::NONE), answer, &mut entries, &mut losers);
    let Some(Work::Zeros(id, zeros)) = planner.next(member(0), now, HEDGE_AFTER) else { panic!("zeros") };
    planner.zeros_told(id);
    entries.extend(zero_entries(zeros, planner.round()));
    planner.not_indexed(&entries);
    assert_eq!(planner.tally().staged, 0);
    // The destination gets them instead.
    while let Some(Work::Pages(id, _) | Work::Zeros(id, _)) = planner.next(Sink::Direct, now, HEDGE_AFTER) {
        planner.installed(id, &[]);
    }
    assert!(planner.is_done());
    // The index server comes round: what it says is of no interest any more.
    planner.indexed(&entries);
    assert!(planner.is_done());
}

#[test]
fn a_late_batch_is_doubled_by_others_only_and_again_when_they_fail() {
    let (start, late) = (Instant::now(), Instant::now() + 2 * HEDGE_AFTER);
    let mut planner = Planner::new(&manifest(64, 0), true);
    planner.available(all(&planner));
    assert!(planner.next(Sink::Direct, start, HEDGE_AFTER).is_some());
    assert_eq!(planner.next(Sink::Direct, late, HEDGE_AFTER), None, "it has it already");
    for _ in 0..5 {
        let Some(Work::Pages(id, _)) = planner.next(member(0), late, HEDGE_AFTER) else { panic!("a hedge") };
        assert_eq!(planner.next(member(0), late + 2 * HEDGE_AFTER, HEDGE_AFTER), None, "it has it already");
        planner.failed(id);
    }
    let Some(Work::Pages(id, batch)) = planner.next(member(1), late, HEDGE_AFTER) else { panic!("a hedge") };
    store(&mut planner, 1, id, batch);
    assert!(planner.is_done());
}

#[test]
fn a_late_batch_without_anything_left_to_send_hides_none_behind_it() {
    let (start, late) = (Instant::now(), Instant::now() + 2 * HEDGE_AFTER);
    let mut planner = Planner::new(&manifest(128, 0), true);
    planner.available(all(&planner));
    let Some(Work::Pages(id, batch)) = planner.next(member(0), start, HEDGE_AFTER) else { panic!("pages") };
    store(&mut planner, 0, id, batch);
    for page in 0..40 {
        planner.fault(PageIndex(page), start);
    }
    assert!(planner.next(Sink::Direct, start, HEDGE_AFTER).is_some());
    assert!(planner.next(member(0), late, HEDGE_AFTER).is_some(), "what is still on its way");
}
