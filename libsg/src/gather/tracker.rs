//! What the destination knows of each page, and who may install it: pure, without thread, clock or
//! lock.
//!
//! Every path (direct, prepage, fault) claims an install unit before it installs it and says so
//! afterwards, so that each unit is installed exactly once, whichever path comes first. 15 bytes a
//! page: placement 8, checksum 4, round 2, state 1; of these only the state is ever touched for a
//! page that came directly. And a bit for each as long as hybrid's rounds are installed.

mod batch;
mod claims;
mod rounds;
mod search;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use self::rounds::Early;
use super::books::{Kind, State, Waiting};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Checksum, MemberIndex, Placement, Round};
use crate::latency::LatencyHistogram;
use crate::limits;
use crate::manifest::{Manifest, Units};
use crate::page::{PageIndex, PageRange};
use crate::wire::{Encoding, IndexEntry};

/// Pages that one call looks at when it searches: what keeps the lock around the tracker short.
const SEARCH_PAGES_MAX: usize = 128 << 10;

/// Copies that are remembered as lost: 128 KiB. Of pages of which more are, each that an index names is tried.
const BAD_MAX: usize = 8192;

/// Who said where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The source: what it says last holds.
    Source,
    /// An index server: may be behind what the source said.
    Index,
    /// One of those that were asked because this member does not answer.
    Instead(MemberIndex),
}

/// How a page came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// From the source.
    Direct,
    /// From an intermediary.
    Staged,
    /// Without bytes: it is zero.
    Zero,
}

/// What can be done for a unit that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: it is installed, or somebody is installing it now.
    Held,
    /// It is zero: claim and install it.
    Zero,
    /// It can be read from this member: the reads were filled in.
    Read(MemberIndex),
    /// Nobody said where it is, or where it was said to be it is not.
    Unknown,
    /// No copy is left.
    Lost,
}

/// The answer to [`Tracker::claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Install this unit now, then call [`Tracker::installed`].
    Install(PageRange),
    /// Somebody else has installed it, or is at it, or a newer one is known, or it was given up.
    Held,
}

/// A page that is read where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Which page.
    pub page: PageIndex,
    /// Where it lies.
    pub placement: Placement,
    /// What its bytes must have.
    pub checksum: Checksum,
    /// How often it was scattered before.
    pub round: Round,
}

/// How far it is, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of the volume.
    pub total: u64,
    /// Installed, or known to be zero.
    pub held: u64,
    /// Lost for good.
    pub lost: u64,
    /// Nobody said yet where they are, or where they were said to be they are not.
    pub unknown: u64,
    /// Installed from the source.
    pub direct: u64,
    /// Installed from intermediaries.
    pub staged: u64,
    /// Faults that were answered.
    pub faults: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct MemberBook {
    lost: bool,
    announced: u64,
    in_flight: u64,
    cursor: u32,
    near: Option<u32>,
}

/// The books of one volume at its destination.
#[derive(Debug)]
pub struct Tracker {
    units: Units,
    states: Box<[State]>,
    placements: Box<[u64]>,
    checksums: Box<[u32]>,
    rounds: Box<[u16]>,
    members: Vec<MemberBook>,
    kinds: [u64; Kind::COUNT],
    installing: u64,
    /// Lost pages that are not poisoned yet.
    unpoisoned: u64,
    direct: u64,
    staged: u64,
    waiting: Waiting,
    /// Copies that were lost, by page and placement, which an index may go on to name: one that is bad is not taken
    /// for another that is.
    bad: BTreeSet<(u32, u64)>,
    closed: bool,
    /// The VM does not run yet, and a newer round replaces what is installed.
    replaces: bool,
    early: Early,
    /// Another process may go on with what is in place, and knows nothing of these books.
    outlived: bool,
}

impl Tracker {
    /// Books in which every page is missing.
    #[must_use]
    pub fn new(manifest: &Manifest) -> Self {
        let pages = manifest.pages() as usize;
        let mut kinds = [0; Kind::COUNT];
        kinds[Kind::Missing as usize] = pages as u64;
        Self {
            units: Units::new(manifest),
            // Zeroed memory that the kernel gives page by page, as it is touched.
            states: vec![State::default(); pages].into_boxed_slice(),
            placements: vec![0; pages].into_boxed_slice(),
            checksums: vec![0; pages].into_boxed_slice(),
            rounds: vec![0; pages].into_boxed_slice(),
            members: Vec::new(),
            kinds,
            installing: 0,
            unpoisoned: 0,
            direct: 0,
            staged: 0,
            waiting: Waiting::default(),
            bad: BTreeSet::new(),
            closed: false,
            replaces: false,
            early: Early::default(),
            outlived: false,
        }
    }

    /// Bytes allocated for the books.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.states.len() * (1 + 8 + 4 + 2)
            + self.members.capacity() * size_of::<MemberBook>()
            + self.units.allocated_bytes()
            + self.bad.len() * size_of::<(u32, u64)>()
            + self.early.allocated_bytes()
            + self.waiting.allocated_bytes()
    }

    /// The volume has this many members now; there are never fewer than before.
    pub fn set_members(&mut self, members: usize) {
        let members = members.clamp(self.members.len(), limits::MEMBERS_MAX);
        self.members.resize(members, MemberBook::default());
    }

    /// The unit that a page belongs to; `None` for a page that there is not.
    #[must_use]
    pub fn unit(&self, page: PageIndex) -> Option<PageRange> {
        self.units.of(page)
    }

    /// Whether the two pages may be installed by one call.
    #[must_use]
    pub fn same_region(&self, a: PageIndex, b: PageIndex) -> bool {
        self.units.same_region(a, b)
    }

    /// Somebody says where a page is, or that a run is zero. Returns whether somebody waits for one
    /// of the pages about which something was learned.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for pages or members that there are not.
    pub fn announce(&mut self, entry: &IndexEntry, word: Word) -> Result<bool> {
        let range = entry.range();
        let member = entry.placement.map(|placement| placement.member.as_usize());
        if range.positions().end > self.states.len() || member.is_some_and(|m| m >= self.members.len()) {
            let message = format!("pages {range} were announced outside of the volume, or at no member");
            return Err(Error::new(ErrorKind::Protocol, message).about([range]));
        }
        let mut wanted = false;
        for page in range.positions() {
            if !self.replaces(page, entry, word) {
                continue;
            }
            self.tally(page, false);
            let state = &mut self.states[page];
            state.learn(if entry.encoding == Encoding::Zero { Kind::Zero } else { Kind::Announced });
            wanted |= state.is_waiting();
            if let Some(placement) = entry.placement {
                self.placements[page] = placement.to_bits();
                self.checksums[page] = entry.checksum.0;
            }
            if self.rounds[page] != entry.round.0 {
                self.rounds[page] = entry.round.0;
            }
            self.tally(page, true);
        }
        Ok(wanted)
    }

    fn replaces(&self, page: usize, entry: &IndexEntry, word: Word) -> bool {
        let state = self.states[page];
        if state.is_installing() || matches!(state.kind(), Kind::Removed | Kind::Lost) {
            return false;
        }
        if state.kind() == Kind::Installed {
            return self.replaces && entry.round.0 > self.rounds[page];
        }
        if state.kind() == Kind::Missing {
            // Of a page that was required, older copies are no copies.
            return entry.round.0 >= self.rounds[page];
        }
        match entry.round.0.cmp(&self.rounds[page]) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal if word == Word::Source => true,
            std::cmp::Ordering::Equal => {
                let same = entry.placement.is_some_and(|p| p.to_bits() == self.placements[page]);
                let there = entry.placement.is_none_or(|p| !self.is_lost(p.member));
                let silent = |member| {
                    let other = entry.placement.is_some_and(|p| p.member != member);
                    self.kind(page) == Kind::Announced && self.member_of(page) == Some(member) && other
                };
                let wanted = match word {
                    Word::Instead(member) => silent(member),
                    Word::Source | Word::Index => false,
                };
                let is_bad = |p: Placement| self.bad.contains(&(page as u32, p.to_bits()));
                (self.kind(page) == Kind::Suspect || wanted)
                    && !same
                    && there
                    && !entry.placement.is_some_and(is_bad)
            }
        }
    }

    /// The kind of a page, in which one that lies at a lost member is suspect.
    fn kind(&self, page: usize) -> Kind {
        match self.states[page].kind() {
            Kind::Announced if self.member_of(page).is_none_or(|m| self.is_lost(m)) => Kind::Suspect,
            kind => kind,
        }
    }

    fn member_of(&self, page: usize) -> Option<MemberIndex> {
        Placement::from_bits(self.placements[page]).map(|placement| placement.member)
    }

    fn read(&self, page: usize, placement: Placement) -> Read {
        let (checksum, round) = (Checksum(self.checksums[page]), Round(self.rounds[page]));
        Read { page: PageIndex(page as u32), placement, checksum, round }
    }

    fn is_lost(&self, member: MemberIndex) -> bool {
        self.members.get(member.as_usize()).is_none_or(|book| book.lost)
    }

    /// Takes a page out of the counts, or puts it in: around every change.
    fn tally(&mut self, page: usize, add: bool) {
        let state = self.states[page];
        let count = |count: &mut u64| *count = if add { *count + 1 } else { count.saturating_sub(1) };
        count(&mut self.kinds[state.kind() as usize]);
        if state.is_installing() {
            count(&mut self.installing);
        }
        if state.kind() == Kind::Announced
            && let Some(member) = Placement::from_bits(self.placements[page]).map(|p| p.member.as_usize())
            && let Some(book) = self.members.get_mut(member)
        {
            count(&mut book.announced);
            if state.is_in_flight() {
                count(&mut book.in_flight);
            }
        }
    }

    fn change(&mut self, range: PageRange, change: impl Fn(&mut State)) {
        for page in range.positions() {
            self.tally(page, false);
            change(&mut self.states[page]);
            self.tally(page, true);
        }
    }

    /// The guest waits for a page, from `now` on. Says what can be done; `reads` is filled where it
    /// can be read from a member.
    pub fn fault(&mut self, page: PageIndex, now: Instant, reads: &mut Vec<Read>) -> Wanted {
        let Some(unit) = self.unit(page) else { return Wanted::Held };
        self.turn_near(unit.first);
        let wanted = self.look(unit, reads);
        if wanted != Wanted::Held || self.states[unit.first.as_usize()].is_installing() {
            self.change(unit, State::wait);
            self.waiting.add(unit.first, now);
        }
        wanted
    }

    /// What can be done for a unit now.
    pub fn look(&self, unit: PageRange, reads: &mut Vec<Read>) -> Wanted {
        reads.clear();
        let first = unit.first.as_usize();
        if self.closed || self.states[first].is_installing() {
            return Wanted::Held;
        }
        match self.states[first].kind() {
            Kind::Installed => return Wanted::Held,
            Kind::Lost => return Wanted::Lost,
            _ => {}
        }
        let mut at = None;
        for page in unit.positions() {
            // A unit is sent again as a whole: of one that is at two rounds, not all was announced yet.
            if self.rounds[page] != self.rounds[first] {
                return Wanted::Unknown;
            }
            match self.kind(page) {
                Kind::Zero | Kind::Removed => {}
                Kind::Announced => {
                    let Some(placement) = Placement::from_bits(self.placements[page]) else {
                        return Wanted::Unknown;
                    };
                    // A unit is never split over members: one that is, is not to be had there.
                    if *at.get_or_insert(placement.member) != placement.member {
                        return Wanted::Unknown;
                    }
                    reads.push(self.read(page, placement));
                }
                Kind::Missing | Kind::Suspect | Kind::Installed | Kind::Lost => return Wanted::Unknown,
            }
        }
        at.map_or(Wanted::Zero, Wanted::Read)
    }

    /// Closes the books once nothing is left to come and nobody is at any page; says whether they are closed.
    /// A page that is known to be zero counts as held while somebody installs it for the guest, and may be
    /// asked for at any time; a page is lost before it is poisoned. Behind this call the memory can be let go.
    pub fn close(&mut self) -> bool {
        self.closed |= self.is_complete();
        self.closed
    }

    /// Whether nothing is left to come and nobody is at any page.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let of = |kind: Kind| self.kinds[kind as usize];
        let left = of(Kind::Missing) + of(Kind::Announced) + of(Kind::Suspect);
        left + self.installing + self.unpoisoned == 0
    }

    /// The guest gave pages up: they are zero from now on. Parts of units are left alone.
    pub fn removed(&mut self, range: PageRange) {
        let mut page = range.first;
        let end = (range.positions().end).min(self.states.len());
        while page.as_usize() < end {
            let Some(unit) = self.unit(page) else { return };
            if unit.first == page && unit.positions().end <= end {
                self.change(unit, State::remove);
            }
            page = PageIndex(unit.first.0 + unit.pages);
        }
    }

    /// What lies at a placement is not the page: that copy is lost. Returns whether it was the one known. A unit is read
    /// from one place: all of its pages are looked for elsewhere.
    pub fn copy_lost(&mut self, page: PageIndex, placement: Placement) -> bool {
        let at = page.as_usize();
        let known = self.placements.get(at) == Some(&placement.to_bits())
            && self.states[at].kind() == Kind::Announced
            && !self.states[at].is_installing();
        if known && self.bad.len() < BAD_MAX {
            self.bad.insert((page.0, placement.to_bits()));
        }
        if known && let Some(unit) = self.unit(page) {
            self.change(unit, |state| {
                if state.kind() == Kind::Announced {
                    state.learn(Kind::Suspect);
                }
            });
        }
        known
    }

    /// Whether a member is lost; nothing is read from it then, and what lies there is suspect.
    pub fn set_member_lost(&mut self, member: MemberIndex, lost: bool) {
        if let Some(book) = self.members.get_mut(member.as_usize()) {
            book.lost = lost;
        }
    }

    /// Whether the page is known to be zero in that round or a later one, and not installed.
    #[must_use]
    pub fn is_zero(&self, page: PageIndex, round: Round) -> bool {
        let kind = self.states.get(page.as_usize()).map(|state| state.kind());
        matches!(kind, Some(Kind::Zero | Kind::Removed)) && self.rounds[page.as_usize()] >= round.0
    }

    /// Whether the page is in place or known to be zero.
    #[must_use]
    pub fn is_held(&self, page: PageIndex) -> bool {
        let kind = self.states.get(page.as_usize()).map(|state| state.kind());
        matches!(kind, Some(Kind::Installed | Kind::Removed | Kind::Zero))
    }

    /// How far it is.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let of = |kind: Kind| self.kinds[kind as usize];
        let stranded: u64 = self.members.iter().filter(|book| book.lost).map(|book| book.announced).sum();
        Counts {
            total: self.states.len() as u64,
            held: of(Kind::Installed) + of(Kind::Zero) + of(Kind::Removed),
            lost: of(Kind::Lost),
            unknown: of(Kind::Missing) + of(Kind::Suspect) + stranded,
            direct: self.direct,
            staged: self.staged,
            faults: self.waiting.total.count(),
        }
    }

    /// The source has evicted: faults from now on do not count as answered while scattering.
    pub fn evicted(&mut self) {
        self.waiting.scattering = false;
    }

    /// How long faults took: all of them, and those answered before the source had evicted.
    #[must_use]
    pub fn latencies(&self) -> (&LatencyHistogram, &LatencyHistogram) {
        (&self.waiting.total, &self.waiting.while_scattering)
    }

    /// How long the longest fault that is not answered has waited.
    #[must_use]
    pub fn longest_wait(&self, now: Instant) -> Option<Duration> {
        self.waiting.longest(now)
    }
}
