//! The tracker while a VM is sent in rounds: a newer round replaces an older one, never the reverse, and what the final
//! set asks for is not taken from an older one, whoever has it.

use std::time::Instant;

use proptest::prelude::*;

use super::tracker::{Claim, Path, Tracker, Wanted, Word};
use crate::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex};
use crate::manifest::{Manifest, Region};
use crate::page::{InstallUnit, PageIndex, PageRange};
use crate::wire::IndexEntry;

const PAGES: u32 = 20;

fn tracker(replaces: bool) -> Tracker {
    let mut tracker = of_regions(&[(PAGES, InstallUnit::Page)]);
    tracker.set_replaces(replaces);
    tracker
}

/// As hybrid gathers: what is in place may be taken out again.
fn early() -> Tracker {
    let mut tracker = of_regions(&[(PAGES, InstallUnit::Page)]);
    tracker.install_early();
    tracker
}

fn of_regions(regions: &[(u32, InstallUnit)]) -> Tracker {
    let region = |(pages, unit): &(u32, InstallUnit)| Region {
        name: format!("{pages} of {unit:?}"),
        guest_address: None,
        length_bytes: u64::from(*pages) << 12,
        unit: *unit,
    };
    let regions = regions.iter().map(region).collect();
    let mut tracker =
        Tracker::new(&Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None });
    tracker.set_members(1);
    tracker
}

/// What is to be taken out, asked for in pieces.
fn withdrawn(tracker: &mut Tracker) -> Vec<PageRange> {
    let (mut from, mut all) = (PageIndex(0), Vec::new());
    while u64::from(from.0) < tracker.counts().total {
        let mut runs = Vec::new();
        from = tracker.withdraw(from, 2, &mut runs);
        all.extend(runs);
    }
    all
}

fn one(page: u32) -> PageRange {
    PageRange::new(PageIndex(page), 1)
}

fn at(page: u32, round: u16) -> IndexEntry {
    let slot = SlotIndex(u32::from(round) << 16 | page);
    let placement = Placement { member: MemberIndex(0), slot, generation: Generation(1) };
    IndexEntry::at(PageIndex(page), Round(round), placement, Checksum(1))
}

fn install(tracker: &mut Tracker, page: u32, round: u16) -> bool {
    let claimed = tracker.claim(PageIndex(page), Round(round)) != Claim::Held;
    if claimed {
        tracker.installed(one(page), Path::Direct, Instant::now());
    }
    claimed
}

#[test]
fn the_final_set_makes_older_copies_no_copies() {
    let mut tracker = tracker(false);
    tracker.announce(&at(1, 0), Word::Source).unwrap();
    tracker.announce(&IndexEntry::zero(PageIndex(2), 3, Round(0)), Word::Source).unwrap();
    tracker.announce(&at(5, 2), Word::Source).unwrap();
    tracker.require(PageRange::new(PageIndex(1), 2), Round(1)).unwrap();
    tracker.require(one(5), Round(2)).unwrap();
    assert!(tracker.require(PageRange::new(PageIndex(PAGES - 1), 2), Round(1)).is_err());
    let mut reads = Vec::new();
    let mut look = |tracker: &Tracker, page| tracker.look(one(page), &mut reads);
    assert_eq!([1, 2].map(|page| look(&tracker, page)), [Wanted::Unknown; 2]);
    assert_eq!(look(&tracker, 3), Wanted::Zero);
    assert_eq!(look(&tracker, 5), Wanted::Read(MemberIndex(0)));
    // An index that is behind, or a copy that was under way.
    tracker.announce(&IndexEntry::zero(PageIndex(1), 1, Round(0)), Word::Index).unwrap();
    tracker.announce(&at(2, 0), Word::Source).unwrap();
    assert_eq!([1, 2].map(|page| look(&tracker, page)), [Wanted::Unknown; 2]);
    assert!(!install(&mut tracker, 1, 0) && install(&mut tracker, 1, 1));
    tracker.announce(&at(2, 1), Word::Index).unwrap();
    assert_eq!(look(&tracker, 2), Wanted::Read(MemberIndex(0)));
}

#[test]
fn what_is_required_while_an_older_one_is_installed_is_missing_when_that_is_through() {
    let mut tracker = tracker(true);
    assert!(tracker.claim(PageIndex(3), Round(1)) != Claim::Held);
    tracker.require(one(3), Round(2)).unwrap();
    tracker.installed(one(3), Path::Direct, Instant::now());
    assert!(!tracker.is_held(PageIndex(3)));
    assert!(!install(&mut tracker, 3, 1) && install(&mut tracker, 3, 2));
    assert!(tracker.is_held(PageIndex(3)));
}

#[test]
fn once_it_runs_nothing_is_installed_again() {
    let mut tracker = tracker(true);
    assert!(install(&mut tracker, 3, 0) && install(&mut tracker, 3, 1) && !install(&mut tracker, 3, 1));
    tracker.set_replaces(false);
    assert!(!install(&mut tracker, 3, 2));
    tracker.announce(&at(3, 3), Word::Source).unwrap();
    assert!(tracker.is_held(PageIndex(3)));
}

#[test]
fn what_is_out_of_date_at_the_switch_is_taken_out() {
    let mut tracker = early();
    assert!([2, 3, 4, 5, 6, 9].into_iter().all(|page| install(&mut tracker, page, 0)));
    // Written again, announced or not; zero by now; in place in its last version.
    tracker.announce(&at(3, 1), Word::Source).unwrap();
    tracker.announce(&IndexEntry::zero(PageIndex(4), 1, Round(1)), Word::Source).unwrap();
    assert!(install(&mut tracker, 6, 1));
    tracker.require(PageRange::new(PageIndex(3), 2), Round(1)).unwrap();
    tracker.require(PageRange::new(PageIndex(6), 1), Round(1)).unwrap();
    tracker.require(one(9), Round(1)).unwrap();
    assert!(tracker.stop_installing());
    assert_eq!(withdrawn(&mut tracker), [PageRange::new(PageIndex(3), 2), one(9)]);
    assert_eq!(withdrawn(&mut tracker), []);
    tracker.settle();
    assert_eq!(tracker.withdrawn(), 3);
    let mut reads = Vec::new();
    let looks = [2, 3, 4, 5, 6, 9].map(|page| tracker.look(one(page), &mut reads));
    let read = Wanted::Read(MemberIndex(0));
    assert_eq!(looks, [Wanted::Held, read, Wanted::Zero, Wanted::Held, Wanted::Held, Wanted::Unknown]);
    assert!(!install(&mut tracker, 9, 0) && install(&mut tracker, 9, 1) && !install(&mut tracker, 2, 1));
}

#[test]
fn nobody_installs_while_it_is_taken_out() {
    let mut tracker = early();
    tracker.announce(&at(1, 0), Word::Source).unwrap();
    tracker.announce(&at(2, 0), Word::Source).unwrap();
    assert!(tracker.claim(PageIndex(1), Round(0)) != Claim::Held);
    tracker.require(one(1), Round(1)).unwrap();
    // One is at it, and has an older one.
    assert!(!tracker.stop_installing() && !tracker.is_still());
    assert!(!install(&mut tracker, 2, 0) && tracker.left_at(MemberIndex(0)) == 0);
    tracker.installed(one(1), Path::Staged, Instant::now());
    assert!(tracker.is_still());
    assert_eq!(withdrawn(&mut tracker), [one(1)]);
    tracker.settle();
    assert!(!tracker.is_held(PageIndex(1)) && tracker.left_at(MemberIndex(0)) == 1);
    assert!(install(&mut tracker, 2, 0));
}

#[test]
fn a_copy_that_did_not_match_in_a_round_is_tried_again_behind_it() {
    let mut tracker = early();
    let (torn, bad) = (at(1, 0), at(2, 0));
    for entry in [torn, bad] {
        tracker.announce(&entry, Word::Source).unwrap();
        assert!(tracker.copy_lost(entry.page, entry.placement.unwrap()));
    }
    tracker.require(one(1), Round(1)).unwrap();
    tracker.stop_installing();
    tracker.settle();
    let mut reads = Vec::new();
    assert_eq!(tracker.look(one(1), &mut reads), Wanted::Unknown);
    assert_eq!(tracker.look(one(2), &mut reads), Wanted::Read(MemberIndex(0)));
    // Now it is lost, and an index that goes on to name it is not believed.
    assert!(tracker.copy_lost(PageIndex(2), bad.placement.unwrap()));
    tracker.announce(&bad, Word::Index).unwrap();
    assert_eq!(tracker.look(one(2), &mut reads), Wanted::Unknown);
}

#[test]
fn what_was_sent_again_is_read_last() {
    let mut tracker = early();
    for page in 0..6 {
        tracker.announce(&at(page, u16::from(page < 3)), Word::Source).unwrap();
    }
    let read = |tracker: &mut Tracker| {
        let mut reads = Vec::new();
        tracker.next_batch(MemberIndex(0), 2, &mut reads);
        reads.into_iter().map(|read| read.page.0).collect::<Vec<_>>()
    };
    assert_eq!(read(&mut tracker), [3, 4]);
    assert_eq!(read(&mut tracker), [5]);
    // Round again.
    assert_eq!(read(&mut tracker), [0, 1]);
    assert_eq!(read(&mut tracker), [2]);
}

#[test]
fn units_are_taken_out_whole_and_installed_of_one_round() {
    let mut tracker =
        of_regions(&[(3, InstallUnit::Page), (1024, InstallUnit::Huge2M), (1, InstallUnit::Page)]);
    tracker.install_early();
    let unit = |nth: u32| PageRange::new(PageIndex(3 + 512 * nth), 512);
    for first in [PageIndex(2), unit(0).first, unit(1).first, PageIndex(1027)] {
        let Claim::Install(whole) = tracker.claim(first, Round(0)) else { panic!("{first} is free") };
        tracker.installed(whole, Path::Staged, Instant::now());
    }
    // The first page of a unit that is sent again is known by now, and the others are not.
    tracker.announce(&at(3, 1), Word::Source).unwrap();
    assert_eq!(tracker.look(unit(0), &mut Vec::new()), Wanted::Unknown);
    for (range, round) in [(one(2), 1), (unit(0), 1), (unit(1), 2), (one(1027), 1)] {
        tracker.require(range, Round(round)).unwrap();
    }
    assert!(tracker.stop_installing());
    assert_eq!(withdrawn(&mut tracker), [one(2), unit(0), unit(1), one(1027)]);
    assert_eq!(tracker.withdrawn(), 1026);
}

proptest! {
    /// Whatever comes in whatever order: at the switch everything that is in place and does not count is taken out, and
    /// nothing else is.
    #[test]
    fn at_the_switch_only_what_counts_is_in_place(
        steps in proptest::collection::vec((0_u8..8, 0..PAGES, 0_u16..4), 0..300),
        last in proptest::collection::vec((0..PAGES, 1_u16..4), 0..20),
    ) {
        let mut tracker = early();
        let mut has = [None::<u16>; PAGES as usize];
        let mut claimed: Vec<(u32, u16)> = Vec::new();
        let mut finish = |tracker: &mut Tracker, (page, round): (u32, u16)| {
            has[page as usize] = Some(round);
            tracker.installed(one(page), Path::Staged, Instant::now());
        };
        for (what, page, round) in steps {
            match what {
                0..=2 if tracker.claim(PageIndex(page), Round(round)) != Claim::Held => claimed.push((page, round)),
                3 | 4 if !claimed.is_empty() => {
                    let done = claimed.swap_remove(page as usize % claimed.len());
                    finish(&mut tracker, done);
                }
                5 | 6 => {
                    let zero = IndexEntry::zero(PageIndex(page), 1, Round(round));
                    let entry = if what == 5 { at(page, round) } else { zero };
                    tracker.announce(&entry, Word::Source).unwrap();
                }
                7 => {
                    tracker.copy_lost(PageIndex(page), at(page, round).placement.unwrap());
                }
                _ => {}
            }
        }
        for (page, round) in &last {
            tracker.require(one(*page), Round(*round)).unwrap();
        }
        prop_assert_eq!(tracker.stop_installing(), claimed.is_empty());
        claimed.into_iter().for_each(|done| finish(&mut tracker, done));
        prop_assert!(tracker.is_still());
        let gone: Vec<PageIndex> = withdrawn(&mut tracker).into_iter().flat_map(PageRange::iter).collect();
        tracker.settle();
        for page in (0..PAGES).map(PageIndex) {
            let there = has[page.as_usize()].filter(|_| !gone.contains(&page));
            prop_assert!(has[page.as_usize()].is_some() || !gone.contains(&page));
            let least = last.iter().filter(|(of, _)| *of == page.0).map(|(_, round)| *round).max();
            prop_assert!(there.is_none_or(|round| Some(round) >= least), "{} is old", page);
            prop_assert_eq!(there.is_some(), tracker.look(one(page.0), &mut Vec::new()) == Wanted::Held);
        }
    }

    /// Whatever comes in whatever order: what is held in the end is of the round that was asked for, or a later one, and
    /// rounds never went back.
    #[test]
    fn rounds_never_go_back(steps in proptest::collection::vec((0_u8..6, 0..PAGES, 0_u16..4), 0..300)) {
        let mut tracker = tracker(true);
        let (mut has, mut least) = ([None::<u16>; PAGES as usize], [0; PAGES as usize]);
        let mut claimed: Vec<(u32, u16)> = Vec::new();
        for (what, page, round) in steps {
            match what {
                0 | 1 if tracker.claim(PageIndex(page), Round(round)) != Claim::Held => {
                    prop_assert!(claimed.iter().all(|(other, _)| *other != page), "claimed twice");
                    claimed.push((page, round));
                }
                2 | 3 if !claimed.is_empty() => {
                    let (page, round) = claimed.swap_remove(page as usize % claimed.len());
                    let before = has[page as usize].replace(round);
                    prop_assert!(before.is_none_or(|before| before < round || before < least[page as usize]));
                    tracker.installed(one(page), Path::Direct, Instant::now());
                }
                4 => {
                    tracker.announce(&at(page, round), Word::Index).unwrap();
                }
                5 => {
                    tracker.require(one(page), Round(round)).unwrap();
                    least[page as usize] = least[page as usize].max(round);
                }
                _ => {}
            }
        }
        for (page, round) in claimed {
            tracker.installed(one(page), Path::Direct, Instant::now());
            has[page as usize] = Some(round);
        }
        for page in 0..PAGES {
            if tracker.is_held(PageIndex(page)) {
                let round = has[page as usize];
                prop_assert!(round.is_some_and(|round| round >= least[page as usize]), "{} holds {:?}", page, round);
            }
        }
    }
}
