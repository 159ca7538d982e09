//! The tracker against a naive model, and the cases that the model does not have.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::tracker::*;
use crate::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex};
use crate::manifest::{Manifest, Region};
use crate::page::{InstallUnit, PageIndex, PageRange};
use crate::wire::IndexEntry;

const PAGES: u32 = 48;
const MEMBERS: u16 = 3;

fn region(pages: u64, unit: InstallUnit) -> Region {
    Region { name: "ram".into(), guest_address: None, length_bytes: pages * 4096, unit }
}

fn tracker(regions: Vec<Region>) -> Tracker {
    let mut tracker =
        Tracker::new(&Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None });
    tracker.set_members(MEMBERS.into());
    tracker
}

fn place(member: u16, slot: u32) -> Placement {
    Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(1) }
}

fn at(page: u32, round: u16, member: u16) -> IndexEntry {
    IndexEntry::at(PageIndex(page), Round(round), place(member, page), Checksum(page))
}

fn one(page: u32) -> PageRange {
    PageRange::new(PageIndex(page), 1)
}

#[derive(Clone, Debug)]
enum Op {
    Announce { page: u32, round: u16, member: u16, source: bool },
    Zero { page: u32, run: u32, round: u16, source: bool },
    Fault(u32),
    Claim { page: u32, round: u16 },
    ClaimZero(u32),
    Finish { which: usize, ok: bool },
    Removed { page: u32, run: u32 },
    Batch { member: u16, pages: usize },
    GiveBack,
    CopyLost { page: u32, member: u16 },
    Member { member: u16, lost: bool },
    NotIndexed(u32),
    SourceHasNot(u32),
    Lose { away: bool },
}

fn ops() -> impl Strategy<Value = Op> {
    let (page, member, round) = (0..PAGES, 0..MEMBERS, 0..3_u16);
    let run = 1..8_u32;
    prop_oneof![
        6 => (page.clone(), round.clone(), member.clone(), any::<bool>())
            .prop_map(|(page, round, member, source)| Op::Announce { page, round, member, source }),
        2 => (page.clone(), run.clone(), round.clone(), any::<bool>())
            .prop_map(|(page, run, round, source)| Op::Zero { page, run, round, source }),
        3 => page.clone().prop_map(Op::Fault),
        4 => (page.clone(), round).prop_map(|(page, round)| Op::Claim { page, round }),
        2 => page.clone().prop_map(Op::ClaimZero),
        5 => (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(which, ok)| Op::Finish { which, ok }),
        1 => (page.clone(), run).prop_map(|(page, run)| Op::Removed { page, run }),
        4 => (member.clone(), 1..9_usize).prop_map(|(member, pages)| Op::Batch { member, pages }),
        1 => Just(Op::GiveBack),
        2 => (page.clone(), member.clone()).prop_map(|(page, member)| Op::CopyLost { page, member }),
        1 => (member, any::<bool>()).prop_map(|(member, lost)| Op::Member { member, lost }),
        2 => page.clone().prop_map(Op::NotIndexed),
        2 => page.prop_map(Op::SourceHasNot),
        1 => any::<bool>().prop_map(|away| Op::Lose { away }),
    ]
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Know {
    #[default]
    Missing,
    At(Placement),
    Zero,
    Installed,
    Lost,
    Removed,
    Suspect,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    know: Know,
    last: Option<Placement>,
    round: u16,
    installing: bool,
    flying: bool,
    no_index: bool,
    no_source: bool,
    installs: u32,
}

#[derive(Default)]
struct Model {
    pages: Vec<Page>,
    lost: [bool; MEMBERS as usize],
    bad: Vec<(usize, Placement)>,
}

impl Model {
    fn know(&self, page: usize) -> Know {
        match self.pages[page].know {
            Know::At(place) if self.lost[place.member.as_usize()] => Know::Suspect,
            know => know,
        }
    }

    fn learn(&mut self, page: usize, round: u16, place: Option<Placement>, source: bool) {
        let old = self.pages[page];
        let know = self.know(page);
        let settled = matches!(know, Know::Installed | Know::Removed | Know::Lost);
        let other = place.is_none() || place != old.last;
        let bad = place.is_some_and(|place| self.bad.contains(&(page, place)));
        let alive = place.is_none_or(|place| !self.lost[place.member.as_usize()]);
        let takes = know == Know::Missing
            || round > old.round
            || round == old.round && (source || know == Know::Suspect && other && alive && !bad);
        if !settled && !old.installing && takes {
            self.pages[page] = Page {
                know: place.map_or(Know::Zero, Know::At),
                last: place.or(old.last),
                round,
                installing: false,
                flying: false,
                no_index: false,
                no_source: false,
                ..old
            };
        }
    }

    fn wanted(&self, page: usize) -> Wanted {
        match self.know(page) {
            _ if self.pages[page].installing => Wanted::Held,
            Know::Installed => Wanted::Held,
            Know::Lost => Wanted::Lost,
            Know::Zero | Know::Removed => Wanted::Zero,
            Know::At(place) => Wanted::Read(place.member),
            Know::Missing | Know::Suspect => Wanted::Unknown,
        }
    }
}

/// Tracker and model side by side.
struct Play {
    tracker: Tracker,
    model: Model,
    claims: Vec<(u32, Path)>,
    flights: Vec<Read>,
}

impl Play {
    /// Plays one step on both, and compares what they answer.
    fn step(&mut self, op: &Op) {
        let word = |source| if source { Word::Source } else { Word::Index };
        match *op {
            Op::Announce { page, round, member, source } => {
                self.tracker.announce(&at(page, round, member), word(source)).expect("in the volume");
                self.model.learn(page as usize, round, Some(place(member, page)), source);
            }
            Op::Zero { page, run, round, source } => {
                let run = run.min(PAGES - page);
                let entry = IndexEntry::zero(PageIndex(page), run, Round(round));
                self.tracker.announce(&entry, word(source)).expect("in the volume");
                (page..page + run).for_each(|page| self.model.learn(page as usize, round, None, source));
            }
            Op::Fault(page) => self.fault(page),
            Op::Claim { page, round } => self.claim(page, round),
            Op::ClaimZero(page) => self.claim_zero(page),
            Op::Finish { which, ok } => self.finish(which, ok),
            Op::Removed { page, run } => self.removed(page, run.min(PAGES - page)),
            Op::Batch { member, pages } => self.batch(member, pages),
            Op::GiveBack => {
                self.tracker.give_back(&self.flights);
                for read in self.flights.drain(..) {
                    self.model.pages[read.page.as_usize()].flying = false;
                }
            }
            Op::CopyLost { page, member } => self.copy_lost(page, place(member, page)),
            Op::Member { member, lost } => {
                self.tracker.set_member_lost(MemberIndex(member), lost);
                self.model.lost[usize::from(member)] = lost;
            }
            Op::NotIndexed(page) => {
                self.tracker.not_indexed(one(page));
                self.model.pages[page as usize].no_index = true;
            }
            Op::SourceHasNot(page) => {
                self.tracker.source_has_not(PageIndex(page));
                self.model.pages[page as usize].no_source = true;
            }
            Op::Lose { away } => self.lose(away),
        }
    }

    fn fault(&mut self, page: u32) {
        let (mut reads, known) = (Vec::new(), self.model.pages[page as usize]);
        let wanted = self.tracker.fault(PageIndex(page), Instant::now(), &mut reads);
        assert_eq!(wanted, self.model.wanted(page as usize));
        if let Know::At(placement) = self.model.know(page as usize)
            && !known.installing
        {
            let (checksum, round) = (Checksum(page), Round(known.round));
            assert_eq!(reads, [Read { page: PageIndex(page), placement, checksum, round }]);
        }
    }

    fn claim(&mut self, page: u32, round: u16) {
        let p = &mut self.model.pages[page as usize];
        let stale = match p.know {
            Know::Missing => false,
            Know::Zero => round <= p.round,
            _ => round < p.round,
        };
        let held = p.installing || stale || matches!(p.know, Know::Installed | Know::Removed | Know::Lost);
        let want = if held { Claim::Held } else { Claim::Install(one(page)) };
        assert_eq!(self.tracker.claim(PageIndex(page), Round(round)), want);
        if !held {
            p.installing = true;
            self.claims.push((page, Path::Direct));
        }
    }

    fn claim_zero(&mut self, page: u32) {
        let p = &mut self.model.pages[page as usize];
        let may = !p.installing && matches!(p.know, Know::Zero | Know::Removed);
        let want = if may { Claim::Install(one(page)) } else { Claim::Held };
        assert_eq!(self.tracker.claim_zero(PageIndex(page)), want);
        if may {
            *p = Page { know: Know::Zero, installing: true, flying: false, ..*p };
            (p.no_index, p.no_source) = (false, false);
            self.claims.push((page, Path::Zero));
        }
    }

    /// One of those that install is done, or could not.
    fn finish(&mut self, which: usize, ok: bool) {
        if self.claims.is_empty() {
            return;
        }
        let (page, path) = self.claims.swap_remove(which % self.claims.len());
        let p = &mut self.model.pages[page as usize];
        p.installing = false;
        if !ok {
            return self.tracker.unclaim(one(page));
        }
        self.tracker.installed(one(page), path, Instant::now());
        if p.know != Know::Removed {
            (p.know, p.installs) = (Know::Installed, p.installs + 1);
        }
        (p.flying, p.no_index, p.no_source) = (false, false, false);
    }

    fn removed(&mut self, page: u32, run: u32) {
        self.tracker.removed(PageRange::new(PageIndex(page), run));
        for p in &mut self.model.pages[page as usize..(page + run) as usize] {
            if p.know != Know::Lost {
                (p.know, p.installs) = (Know::Removed, 0);
            }
        }
    }

    fn batch(&mut self, member: u16, pages: usize) {
        let mut reads = Vec::new();
        self.tracker.next_batch(MemberIndex(member), pages, &mut reads);
        assert!(reads.len() <= pages);
        if reads.is_empty() {
            // Nothing near the last fault may be a reason; the sweep then finds what is left.
            self.tracker.next_batch(MemberIndex(member), pages, &mut reads);
        }
        let idle = |p: &Page| {
            !p.installing && !p.flying && matches!(p.know, Know::At(place) if place.member.0 == member)
        };
        for read in &reads {
            let p = &mut self.model.pages[read.page.as_usize()];
            assert!(idle(p) && p.know == Know::At(read.placement), "{read:?} {p:?}");
            p.flying = true;
        }
        self.flights.extend_from_slice(&reads);
    }

    fn copy_lost(&mut self, page: u32, at: Placement) {
        let p = &mut self.model.pages[page as usize];
        let known = p.know == Know::At(at) && !p.installing;
        assert_eq!(self.tracker.copy_lost(PageIndex(page), at), known);
        if known {
            self.model.bad.push((page as usize, at));
            let p = &mut self.model.pages[page as usize];
            *p = Page { know: Know::Suspect, flying: false, no_index: false, no_source: false, ..*p };
        }
    }

    fn lose(&mut self, away: bool) {
        let (mut lost, model) = (Vec::new(), &mut self.model);
        self.tracker.lose(PageIndex(0), away, &mut lost);
        let hopeless = |page: &usize| {
            let p = model.pages[*page];
            let unknown = matches!(model.know(*page), Know::Missing | Know::Suspect) && !p.installing;
            unknown && p.no_index && (away || p.no_source)
        };
        let want: Vec<_> = (0..model.pages.len()).filter(hopeless).collect();
        assert_eq!(lost.iter().map(|page| page.as_usize()).collect::<Vec<_>>(), want);
        for page in want {
            model.pages[page] = Page { know: Know::Lost, ..Page::default() };
        }
    }
}

fn compare(tracker: &Tracker, model: &Model) {
    let count = |is: fn(Know) -> bool| (0..PAGES as usize).filter(|p| is(model.know(*p))).count() as u64;
    let counts = tracker.counts();
    assert_eq!(counts.held, count(|k| matches!(k, Know::Installed | Know::Zero | Know::Removed)));
    assert_eq!(counts.lost, count(|k| k == Know::Lost));
    assert_eq!(counts.unknown, count(|k| matches!(k, Know::Missing | Know::Suspect)));
    let mut holdings = Vec::new();
    tracker.holdings(PageIndex(0), usize::MAX, &mut holdings);
    let held: Vec<_> = holdings.iter().flat_map(|range| range.iter()).collect();
    assert_eq!(held.len() as u64, counts.held);
    assert!(held.iter().all(|page| tracker.is_held(*page)));
    for page in model.pages.iter() {
        assert!(page.installs <= 1, "installed twice: {page:?}");
    }
}

proptest! {
    #[test]
    fn agrees_with_the_model(ops in prop::collection::vec(ops(), 1..300)) {
        // Two regions: a run of pages may not cross them, the numbers go on.
        let tracker = tracker(vec![region(40, InstallUnit::Page), region(8, InstallUnit::Page)]);
        let model = Model { pages: vec![Page::default(); PAGES as usize], ..Model::default() };
        let mut play = Play { tracker, model, claims: Vec::new(), flights: Vec::new() };
        for op in &ops {
            play.step(op);
            compare(&play.tracker, &play.model);
        }
    }

    /// Whatever is announced where, prepaging all members to the end leaves every page installed once.
    #[test]
    fn prepaging_ends(members in prop::collection::vec(0..=MEMBERS, PAGES as usize), near in 0..PAGES, batch in 1..70_usize) {
        let mut tracker = tracker(vec![region(u64::from(PAGES), InstallUnit::Page)]);
        for (page, member) in (0..PAGES).zip(&members) {
            let zero = IndexEntry::zero(PageIndex(page), 1, Round(0));
            let entry = if *member == MEMBERS { zero } else { at(page, 0, *member) };
            tracker.announce(&entry, Word::Source).expect("in the volume");
        }
        let mut reads = Vec::new();
        tracker.fault(PageIndex(near), Instant::now(), &mut reads);
        let mut installed = 0;
        while (0..MEMBERS).any(|member| tracker.left_at(MemberIndex(member)) > 0) {
            for member in 0..MEMBERS {
                tracker.next_batch(MemberIndex(member), batch, &mut reads);
                for read in &reads {
                    prop_assert_eq!(tracker.claim(read.page, Round(0)), Claim::Install(one(read.page.0)));
                    tracker.installed(one(read.page.0), Path::Staged, Instant::now());
                    installed += 1;
                }
            }
        }
        prop_assert_eq!(tracker.counts().held, u64::from(PAGES));
        prop_assert_eq!(installed, members.iter().filter(|member| **member != MEMBERS).count());
    }
}

#[test]
fn what_is_near_a_fault_comes_first() {
    let mut tracker = tracker(vec![region(10_000, InstallUnit::Page)]);
    for page in 0..10_000 {
        tracker.announce(&at(page, 0, 1), Word::Source).expect("in the volume");
    }
    let mut reads = Vec::new();
    tracker.fault(PageIndex(5_000), Instant::now(), &mut reads);
    tracker.next_batch(MemberIndex(1), 64, &mut reads);
    // But for those that it has come to until they are here.
    assert_eq!((reads[0].page, reads[63].page), (PageIndex(5_032), PageIndex(5_095)));
    tracker.next_batch(MemberIndex(1), 64, &mut reads);
    assert_eq!(reads[0].page, PageIndex(5_096));
    // At the end there is nothing behind it.
    tracker.fault(PageIndex(9_999), Instant::now(), &mut reads);
    tracker.next_batch(MemberIndex(1), 64, &mut reads);
    assert_eq!(reads[0].page, PageIndex(0));
    tracker.next_batch(MemberIndex(0), 64, &mut reads);
    assert!(reads.is_empty());
}

#[test]
fn a_huge_unit_is_read_and_installed_as_one() {
    let mut tracker = tracker(vec![region(4, InstallUnit::Page), region(1024, InstallUnit::Huge2M)]);
    let (now, mut reads) = (Instant::now(), Vec::new());
    for page in 4..515 {
        tracker.announce(&at(page, 0, 0), Word::Source).expect("in the volume");
    }
    assert_eq!(tracker.fault(PageIndex(300), now, &mut reads), Wanted::Unknown);
    tracker.next_batch(MemberIndex(0), 64, &mut reads);
    assert!(reads.is_empty(), "one page of the unit is not known");
    let wanted = tracker.announce(&IndexEntry::zero(PageIndex(515), 1, Round(0)), Word::Source);
    assert!(wanted.expect("in the volume"), "somebody waits for the unit");
    tracker.next_batch(MemberIndex(0), 64, &mut reads);
    assert_eq!(reads.len(), 511);
    let unit = PageRange::new(PageIndex(4), 512);
    assert_eq!(tracker.claim(PageIndex(77), Round(0)), Claim::Install(unit));
    assert_eq!(tracker.claim(PageIndex(78), Round(0)), Claim::Held);
    tracker.installed(unit, Path::Staged, now + Duration::from_micros(50));
    assert_eq!(tracker.latencies().0.max_us(), Some(50.0));
    assert_eq!(tracker.counts().held, 512);

    // A unit of zeros, and one that is given up.
    tracker.announce(&IndexEntry::zero(PageIndex(516), 512, Round(0)), Word::Source).expect("in the volume");
    assert_eq!(tracker.fault(PageIndex(600), now, &mut reads), Wanted::Zero);
    assert_eq!(tracker.claim_zero(PageIndex(600)), Claim::Install(PageRange::new(PageIndex(516), 512)));
    tracker.removed(PageRange::new(PageIndex(4), 511));
    assert_eq!(tracker.fault(PageIndex(4), now, &mut reads), Wanted::Held, "part of a unit");
    tracker.removed(unit);
    assert_eq!(tracker.fault(PageIndex(4), now, &mut reads), Wanted::Zero);
}

#[test]
fn the_books_close_when_nobody_is_at_any_page() {
    let mut tracker = tracker(vec![region(4, InstallUnit::Page)]);
    let (now, mut reads) = (Instant::now(), Vec::new());
    tracker.announce(&IndexEntry::zero(PageIndex(0), 3, Round(0)), Word::Source).expect("in the volume");
    assert!(!tracker.close(), "page 3 is missing");
    assert_eq!(tracker.claim_zero(PageIndex(1)), Claim::Install(one(1)));
    tracker.not_indexed(one(3));
    let mut lost = Vec::new();
    tracker.lose(PageIndex(0), true, &mut lost);
    assert_eq!(lost, [PageIndex(3)]);
    assert_eq!((tracker.counts().held, tracker.counts().lost), (3, 1));
    assert!(!tracker.close(), "a zero page is being installed");
    tracker.installed(one(1), Path::Zero, now);
    assert!(!tracker.close(), "the lost page would read as zero");
    tracker.poisoned(1);
    assert!(tracker.close());
    // Who asks now is answered by the memory itself.
    assert_eq!(tracker.fault(PageIndex(0), now, &mut reads), Wanted::Held);
    assert_eq!(tracker.fault(PageIndex(3), now, &mut reads), Wanted::Held);
    assert_eq!((tracker.claim_zero(PageIndex(0)), tracker.longest_wait(now)), (Claim::Held, None));
    assert!(tracker.close());
}

#[test]
fn a_unit_with_one_bad_copy_is_looked_for_elsewhere_as_a_whole() {
    let mut tracker = tracker(vec![region(512, InstallUnit::Huge2M)]);
    let unit = PageRange::new(PageIndex(0), 512);
    let announce = |tracker: &mut Tracker, member, word| {
        for page in unit.iter() {
            tracker.announce(&at(page.0, 0, member), word).expect("inside");
        }
    };
    let mut reads = Vec::new();
    announce(&mut tracker, 0, Word::Source);
    assert_eq!(tracker.look(unit, &mut reads), Wanted::Read(MemberIndex(0)));
    assert!(tracker.copy_lost(PageIndex(7), place(0, 7)));
    assert_eq!(tracker.look(unit, &mut reads), Wanted::Unknown);
    announce(&mut tracker, 0, Word::Index);
    assert_eq!(tracker.look(unit, &mut reads), Wanted::Unknown, "it is not to be had there");
    announce(&mut tracker, 1, Word::Index);
    assert_eq!(tracker.look(unit, &mut reads), Wanted::Read(MemberIndex(1)));
    assert_eq!(reads.len(), 512);
    // One that is bad is not taken for another that is: it has an end.
    assert!(tracker.copy_lost(PageIndex(9), place(1, 9)));
    announce(&mut tracker, 0, Word::Index);
    announce(&mut tracker, 1, Word::Index);
    assert_eq!(tracker.look(unit, &mut reads), Wanted::Unknown);
}

#[test]
fn a_copy_elsewhere_is_taken_instead_of_one_that_does_not_come() {
    let mut tracker = tracker(vec![region(4, InstallUnit::Page)]);
    let mut reads = Vec::new();
    let mut says = |tracker: &mut Tracker, entry: IndexEntry, word| {
        tracker.announce(&entry, word).expect("inside");
        tracker.look(one(entry.page.0), &mut reads)
    };
    let (first, second) = (Wanted::Read(MemberIndex(0)), Wanted::Read(MemberIndex(1)));
    assert_eq!(says(&mut tracker, at(0, 1, 0), Word::Source), first);
    assert_eq!(says(&mut tracker, at(0, 1, 1), Word::Index), first);
    assert_eq!(says(&mut tracker, at(0, 1, 1), Word::Instead(MemberIndex(2))), first, "another is silent");
    assert_eq!(says(&mut tracker, at(0, 0, 1), Word::Instead(MemberIndex(0))), first, "older");
    assert_eq!(says(&mut tracker, at(0, 1, 1), Word::Instead(MemberIndex(0))), second);
    tracker.set_member_lost(MemberIndex(0), true);
    assert_eq!(says(&mut tracker, at(0, 1, 0), Word::Instead(MemberIndex(1))), second, "it is lost");
}

#[test]
fn a_unit_over_two_members_is_unknown() {
    let mut tracker = tracker(vec![region(512, InstallUnit::Huge2M)]);
    for page in 0..512 {
        tracker.announce(&at(page, 0, u16::from(page == 9)), Word::Source).expect("in the volume");
    }
    assert_eq!(tracker.fault(PageIndex(0), Instant::now(), &mut Vec::new()), Wanted::Unknown);
}

#[test]
fn what_a_peer_may_not_say_is_refused() {
    let mut tracker = tracker(vec![region(8, InstallUnit::Page)]);
    for entry in [at(8, 0, 0), at(0, 0, MEMBERS), IndexEntry::zero(PageIndex(1), 8, Round(0))] {
        assert!(tracker.announce(&entry, Word::Source).is_err());
    }
    assert_eq!(tracker.counts().unknown, 8);
}

#[test]
fn the_books_fit_in_sixteen_bytes_a_page() {
    let mut tracker = tracker(vec![region(1 << 18, InstallUnit::Page)]);
    tracker.install_early();
    assert!(tracker.allocated_bytes() <= 16 << 18, "{}", tracker.allocated_bytes());
}

#[test]
fn faults_after_eviction_are_not_while_scattering() {
    let mut tracker = tracker(vec![region(2, InstallUnit::Page)]);
    let (now, mut reads) = (Instant::now(), Vec::new());
    for page in [0, 1] {
        assert_eq!(tracker.fault(PageIndex(page), now, &mut reads), Wanted::Unknown);
        assert_eq!(tracker.longest_wait(now), Some(Duration::ZERO));
        assert_eq!(tracker.claim(PageIndex(page), Round(0)), Claim::Install(one(page)));
        tracker.installed(one(page), Path::Direct, now);
        tracker.evicted();
    }
    let (total, scattering) = tracker.latencies();
    assert_eq!((total.count(), scattering.count()), (2, 1));
    assert_eq!(tracker.longest_wait(now), None);
}
