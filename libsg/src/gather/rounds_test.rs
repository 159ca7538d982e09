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
    let region = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(PAGES) << 12,
        unit: InstallUnit::Page,
    };
    let mut tracker = Tracker::new(&Manifest {
        vm: "vm".into(),
        regions: vec![region],
        vm_config: Vec::new(),
        sharing: None,
    });
    tracker.set_members(1);
    tracker.set_replaces(replaces);
    tracker
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

proptest! {
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
