//! Rounds against a guest that writes while it is sent, and against made-up sinks: what the final set lets count is
//! right, and everything is safe in the end.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::spans::zero_entries;
use super::*;
use crate::ids::{Generation, SlotIndex};
use crate::manifest::Region;
use crate::wire::GetEntry;

const HEDGE_AFTER: Duration = Duration::from_millis(100);
const MEMBERS: u16 = 3;
const SMALL: u32 = 300;
const PAGES: u32 = SMALL + 512;

/// What a page holds: zero, or a version of its data.
type Version = u32;

struct World {
    planner: Planner,
    memory: Vec<Version>,
    dirty: BTreeSet<u32>,
    slots: BTreeMap<u64, (PageIndex, Version)>,
    next_slot: u32,
    /// All entries that any index was ever given, acknowledged or not.
    index: Vec<IndexEntry>,
    unindexed: Vec<IndexEntry>,
    /// What the destination has of each page, with its round.
    installed: BTreeMap<u32, (Round, Version)>,
    open: Vec<Open>,
    now: Instant,
}

/// Work whose bytes were read: by whom, in which round it was, what it holds.
struct Open {
    sink: Sink,
    work: Work,
    round: Round,
    read: Vec<(PageIndex, Version)>,
}

impl World {
    fn new() -> Self {
        let region = |name: &str, length_bytes, unit| Region {
            name: name.into(),
            guest_address: None,
            length_bytes,
            unit,
        };
        let regions = vec![
            region("ram", u64::from(SMALL) * 4096, InstallUnit::Page),
            region("huge", 1 << 21, InstallUnit::Huge2M),
        ];
        let manifest = Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None };
        let mut planner = Planner::new(&manifest, true).with_rounds();
        planner.available(PageRange::new(PageIndex(0), 200));
        planner.absent(PageRange::new(PageIndex(200), 50));
        planner.available(PageRange::new(PageIndex(250), PAGES - 250));
        let memory = (0..PAGES).map(|page| u32::from(!(200..250).contains(&page))).collect();
        Self {
            planner,
            memory,
            dirty: BTreeSet::new(),
            slots: BTreeMap::new(),
            next_slot: 1,
            index: Vec::new(),
            unindexed: Vec::new(),
            installed: BTreeMap::new(),
            open: Vec::new(),
            now: Instant::now(),
        }
    }

    fn pull(&mut self, sink: Sink) -> bool {
        let Some(work) = self.planner.next(sink, self.now, HEDGE_AFTER) else { return false };
        let round = self.planner.round();
        let mut read = Vec::new();
        if let Work::Pages(id, batch) = work {
            read.extend(batch.iter().map(|page| (page, self.memory[page.as_usize()])));
            if let Sink::Member(_) = sink {
                // Units of several pages are zero as a whole or not at all; here they never are.
                let is_zero = |(page, version): &(PageIndex, Version)| page.0 < SMALL && *version == 0;
                let zeros: Vec<_> = read.extract_if(.., |read| is_zero(read)).map(|(page, _)| page).collect();
                if !self.planner.found_zero(id, zeros.iter().copied()) {
                    return true;
                }
                for page in zeros {
                    self.tell([IndexEntry::zero(page, 1, round)]);
                }
            }
        }
        self.open.push(Open { sink, work, round, read });
        true
    }

    fn tell(&mut self, entries: impl IntoIterator<Item = IndexEntry>) {
        for entry in entries {
            self.index.push(entry);
            self.unindexed.push(entry);
        }
    }

    /// Whoever has this answers; one page in seven goes wrong where `honest` is not set.
    fn answer(&mut self, at: usize, honest: bool, live: bool) {
        let Open { sink, work, round, read } = self.open.swap_remove(at);
        match (sink, work) {
            (Sink::Member(_), Work::Zeros(id, range)) => {
                if self.planner.zeros_told(id) {
                    self.tell(zero_entries(range, round));
                }
            }
            (Sink::Member(member), Work::Pages(id, _)) => {
                let mut answer = Vec::new();
                for (page, version) in read {
                    let fits = honest || !page.0.is_multiple_of(7);
                    let slot = SlotIndex(self.next_slot);
                    self.next_slot += 1;
                    let placement = Placement { member, slot, generation: Generation(1) };
                    if fits {
                        self.slots.insert(placement.to_bits(), (page, version));
                    }
                    answer.push((page, Checksum(version), fits.then_some(placement)));
                }
                let (mut entries, mut losers) = (Vec::new(), Vec::new());
                self.planner.stored((id, MemberSet::NONE), answer, &mut entries, &mut losers);
                self.drop_slots(losers.iter().map(Loser::entry).collect());
                self.tell(entries);
            }
            (_, Work::Zeros(id, range)) => {
                range.iter().for_each(|page| self.install(page, round, 0));
                self.planner.installed(id, &[]);
            }
            (_, Work::Pages(id, _)) => {
                let torn = |page: PageIndex| !honest && page.0.is_multiple_of(7);
                let failed: Vec<_> = read.iter().map(|(page, _)| *page).filter(|page| torn(*page)).collect();
                for (page, version) in read.into_iter().filter(|(page, _)| !torn(*page)) {
                    self.install(page, round, version);
                }
                if live {
                    self.planner.installed_live(id, &failed);
                } else {
                    self.planner.installed(id, &failed);
                }
            }
        }
    }

    /// As the destination does it: a newer round replaces an older one, never the reverse.
    fn install(&mut self, page: PageIndex, round: Round, version: Version) {
        let held = self.installed.entry(page.0).or_insert((round, version));
        if round >= held.0 {
            *held = (round, version);
        }
    }

    fn drop_slots(&mut self, slots: Vec<GetEntry>) {
        for slot in slots {
            let gone = self.slots.remove(&slot.placement.to_bits());
            assert_eq!(gone.map(|(page, _)| page), Some(slot.page), "given back once");
        }
    }

    fn begin_round(&mut self, room: usize) {
        let dirty: Vec<_> = std::mem::take(&mut self.dirty).into_iter().map(PageIndex).collect();
        let mut slots = Vec::new();
        self.planner.begin_round(&PageRange::from_pages(dirty), &mut |slot| {
            let fits = slots.len() < room;
            if fits {
                slots.push(slot.entry());
            }
            fits
        });
        self.drop_slots(slots);
    }

    fn lose(&mut self, member: MemberIndex) {
        self.open.retain(|open| open.sink != Sink::Member(member));
        self.unindexed.retain(|entry| entry.placement.is_none_or(|at| at.member != member));
        self.slots.retain(|at, _| Placement::from_bits(*at).is_some_and(|at| at.member != member));
        let mut moved = Vec::new();
        let alone = (MemberSet::ALL, 1);
        self.planner.member_lost(member, alone, |page| page.0 % 3 == u32::from(member.0), |e| moved.push(e));
        self.tell(moved);
    }

    /// Everybody answers until nothing is left.
    fn settle(&mut self, live: bool) {
        for turn in 0..10_000 {
            while !self.open.is_empty() {
                self.answer(0, true, live);
            }
            let entries = std::mem::take(&mut self.unindexed);
            self.planner.indexed(&entries);
            let sink = if turn % 4 == 3 { Sink::Direct } else { Sink::Member(MemberIndex(turn % 4)) };
            if !self.pull(sink) && self.open.is_empty() && self.unindexed.is_empty() {
                break;
            }
        }
    }

    /// Whoever looks for a page by the index or holds it finds what it is, whatever else is lying about.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut least = vec![0; PAGES as usize];
        for (run, round) in self.planner.rounds() {
            run.positions().for_each(|page| least[page] = round.0);
        }
        for entry in &self.index {
            for page in entry.range().iter().filter(|page| entry.round.0 >= least[page.as_usize()]) {
                let truth = self.memory[page.as_usize()];
                match entry.placement {
                    None => prop_assert_eq!(truth, 0, "{:?} is told to be zero", page),
                    Some(at) => {
                        if let Some((of, version)) = self.slots.get(&at.to_bits()) {
                            prop_assert_eq!((*of, *version), (page, truth), "{:?}", entry);
                        }
                    }
                }
            }
        }
        for (page, (round, version)) in &self.installed {
            if round.0 >= least[*page as usize] {
                prop_assert_eq!(*version, self.memory[*page as usize], "page {} is installed", page);
            }
        }
        Ok(())
    }

    /// A page that is safe can be had without the source.
    fn check_safe(&self) -> Result<(), TestCaseError> {
        prop_assert!(self.planner.is_done());
        for page in (0..PAGES).map(PageIndex) {
            let held = match self.planner.table.state(page) {
                PageState::Installed => true,
                PageState::Zero => self.memory[page.as_usize()] == 0,
                _ => {
                    let at = self.planner.table.placement(page).map(|(at, _)| at.to_bits());
                    at.is_some_and(|at| self.slots.contains_key(&at))
                }
            };
            prop_assert!(held, "{:?} cannot be had: {:?}", page, self.planner.table.state(page));
        }
        // Nothing is kept but one slot for each page that lies at a member, and what a dead one had.
        let kept = (0..PAGES).filter(|page| self.planner.table.placement(PageIndex(*page)).is_some()).count();
        prop_assert_eq!(self.slots.len(), kept);
        Ok(())
    }
}

proptest! {
    #[test]
    fn what_the_final_set_lets_count_is_right(steps in proptest::collection::vec((0u8..16, 0u16..MEMBERS, any::<u16>()), 0..250)) {
        let mut world = World::new();
        let mut version = 1;
        for (what, n, pick) in steps {
            world.now += Duration::from_millis(20);
            let sink = if pick % 3 == 0 { Sink::Direct } else { Sink::Member(MemberIndex(n)) };
            match what {
                0..=4 => {
                    world.pull(sink);
                }
                5..=7 if !world.open.is_empty() => {
                    let at = usize::from(pick) % world.open.len();
                    world.answer(at, pick % 5 > 0, true);
                }
                8..=10 => {
                    // Sometimes what is written is zero.
                    version += 1;
                    let page = u32::from(pick) % PAGES;
                    world.memory[page as usize] = if pick % 4 == 0 { 0 } else { version };
                    world.dirty.insert(page);
                }
                11 => {
                    let entries = std::mem::take(&mut world.unindexed);
                    world.planner.indexed(&entries);
                }
                12 => world.lose(MemberIndex(n)),
                13 => {
                    world.planner.sink_lost(Sink::Direct);
                    world.open.retain(|open| open.sink != Sink::Direct);
                }
                14 => {
                    world.settle(true);
                    prop_assert!(world.planner.is_round_over());
                    world.begin_round(usize::from(pick % 300));
                }
                _ => world.begin_round(usize::from(pick % 300)),
            }
        }
        // The VM is paused: from here on nothing is written.
        world.begin_round(usize::MAX);
        world.check()?;
        world.settle(false);
        world.check()?;
        world.check_safe()?;
        prop_assert_eq!(world.planner.tally().direct + world.planner.tally().staged + world.planner.tally().zero
            + u64::from(world.planner.absent_pages()), u64::from(PAGES));
    }
}

#[test]
fn what_is_torn_waits_for_the_next_round() {
    let mut world = World::new();
    while world.pull(Sink::Direct) {
        world.answer(0, false, true);
    }
    assert!(world.planner.is_round_over() && !world.planner.is_done());
    let torn = world.planner.torn_pages();
    assert!(torn > 0);
    // The log names none of them, and they are sent again all the same: units as a whole.
    world.begin_round(usize::MAX);
    assert_eq!((world.planner.torn_pages(), world.planner.round()), (0, Round(1)));
    world.settle(false);
    assert!(world.planner.is_done());
    let named: u32 = world.planner.rounds().map(|(run, _)| run.pages).sum();
    assert!(named >= torn, "{named} pages are named, {torn} were torn");
}
