//! One volume whose copies are made again.

use std::collections::BTreeMap;
use std::time::Duration;

use super::before;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{MemberIndex, NodeId, VolumeId};
use crate::limits::INDEX_ENTRIES_MAX;
use crate::manifest::Units;
use crate::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use crate::server::drain::Around;
use crate::server::drain::heirs::Heirs;
use crate::server::drain::look::Holdings;
use crate::server::drain::plan::{Group, Plan};
use crate::server::slots::Held;
use crate::server::store::Portrait;
use crate::wire::placement::{index_owners, owner_runs};
use crate::wire::run::encode_runs;
use crate::wire::{IndexEntry, Kind};

/// Pages of which others are asked at once: 4 bytes for each of them and member, at most 4 MiB.
const PAGES_AT_ONCE: u32 = 16 << 10;

/// Where somebody reads here, one batch is sent, and then nothing for so many times as long.
const REST_BESIDE: u32 = 15;
const REST_MAX: Duration = Duration::from_millis(500);

/// A page that lies at several is left to the first of them for so many tries, then to the next.
const TRIES_EACH: u32 = 3;

/// Others are asked from this try on: whoever was only silent for a moment is back by then.
const ASKS_FROM: u32 = 1;

/// What is left when it was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// Copies that are missing, of what lies here.
    pub missing: u64,
    /// Those of them that somebody who was met could have.
    pub to_do: u64,
    /// Of those to be seen to here, copies for which nobody who was met has room.
    homeless: u64,
    /// With the members that are there, so many copies cannot be.
    pub lacks_members: bool,
    /// Somebody was not met who was there a moment ago.
    pub missed: bool,
}

/// Makes what copies it can of what lies here, and of what the index here knows of zero pages, but at those that are `away`.
/// Where those that are there have no room for them, or are too few, others become members.
///
/// # Errors
/// Why it was not looked at as a whole.
pub(super) fn mend(around: &Around<'_>, volume: VolumeId, mut away: Vec<NodeId>, tries: u32) -> Result<Left> {
    let store = around.store;
    let Some(mut portrait) = store.portrait(volume) else { return Ok(Left::default()) };
    let mut heirs = Heirs::meet_again(around, (volume, &portrait), &mut away)?;
    if store.portrait(volume).is_none_or(|now| now.said.members != portrait.said.members) {
        return Err(Error::new(ErrorKind::Volume, "it has more members than were known"));
    }
    let mut held = store.held(volume);
    // Of a page that lies here twice the newest, once.
    held.sort_unstable_by_key(|held| (held.page, std::cmp::Reverse(held.round)));
    held.dedup_by_key(|held| held.page);
    let mut made = 0;
    let left = loop {
        let there = heirs.set();
        tracing::debug!(%volume, me = ?portrait.me, ?there, ?away, held = held.len(), "copies are looked at");
        let units = Units::new(&portrait.said.manifest);
        let left = Left::default();
        let mut mending =
            Mending { around, volume, portrait: &portrait, units, heirs: &mut heirs, tries, left, made };
        mending.all(&held)?;
        made = mending.made;
        let left = mending.left_over();
        if !left.lacks_members || left.missed || tries < ASKS_FROM {
            break left;
        }
        if let Err(error) = heirs.add(around, &mut portrait) {
            tracing::info!(%volume, error = error.chain(), "nobody else takes copies");
            break left;
        }
    };
    if made > 0 || left.missing > 0 {
        let made_bytes = made * PAGE_BYTES_U64;
        tracing::info!(%volume, made, made_bytes, missing = left.missing, "copies of pages were made again");
    }
    Ok(left)
}

struct Mending<'a, 's> {
    around: &'a Around<'s>,
    volume: VolumeId,
    portrait: &'a Portrait,
    units: Units,
    heirs: &'a mut Heirs<'s>,
    tries: u32,
    left: Left,
    made: u64,
}

impl Mending<'_, '_> {
    fn all(&mut self, held: &[Held]) -> Result<()> {
        let pages = self.portrait.said.manifest.pages();
        let mut rest = held;
        for first in (0..pages).step_by(PAGES_AT_ONCE as usize) {
            if !self.around.store.is_tended(self.volume) {
                return Err(Error::new(ErrorKind::Cancelled, "it is not to be looked after any more"));
            }
            let range = PageRange::new(PageIndex(first), PAGES_AT_ONCE.min(pages - first));
            let here = rest.partition_point(|held| held.page.0 < first + range.pages);
            let (some, others) = rest.split_at(here);
            rest = others;
            let zeros = self.zeros(range);
            if some.is_empty() && zeros.is_empty() {
                continue;
            }
            self.around.store.note_own(self.volume, self.portrait.me, some);
            self.give_all(range, some, &zeros);
        }
        Ok(())
    }

    /// What is left. Of members that are too few the first that is there sees to it that there are more: what others hold is
    /// seen to by these.
    fn left_over(&self) -> Left {
        let (me, there) = (self.portrait.me, self.heirs.set());
        let is_first = before(there, me) == 0;
        let are_few = there.with(me).len() < self.copies();
        let lacks_members = self.left.homeless > 0 || (are_few && is_first);
        Left { missed: self.heirs.missed(), lacks_members, ..self.left }
    }

    /// Gives what is missing of a range. What somebody was given who is lost goes to others.
    fn give_all(&mut self, range: PageRange, held: &[Held], zeros: &[IndexEntry]) {
        let before = self.left;
        loop {
            self.left = before;
            let has = match Holdings::ask(self.heirs, range) {
                Ok(has) => has,
                Err((member, error)) => {
                    self.heirs.lose(member, &error);
                    continue;
                }
            };
            let there = self.heirs.all();
            self.give_pages(held, &has);
            self.give_zeros(zeros, &has);
            if self.heirs.all() == there {
                return;
            }
        }
    }

    fn copies(&self) -> usize {
        usize::from(self.portrait.said.copies)
    }

    /// Gives pages to those that have them not, until as many have them as should.
    fn give_pages(&mut self, held: &[Held], has: &Holdings) {
        let mut plan = Plan::default();
        plan.refresh(held.to_vec());
        let units = &self.units;
        let unit_of = |page| units.of(page).unwrap_or(PageRange::new(page, 1));
        let groups = plan.groups(&unit_of, &|held| has.of(held));
        for group in groups {
            let (holders, pages) = (group.has.with(self.portrait.me), plan.pages(&group));
            let missing = self.copies().saturating_sub(holders.len());
            let able = missing.min(self.heirs.set().but(holders).len());
            self.left.missing += (missing * pages.len()) as u64;
            self.left.to_do += (able * pages.len()) as u64;
            if self.tries < TRIES_EACH * before(holders, self.portrait.me) {
                continue;
            }
            self.left.homeless += (missing * pages.len()) as u64;
            let mut wanted = group;
            for _ in 0..able {
                let Some(to) = self.heirs.choose(&wanted, None) else { break };
                wanted.has = wanted.has.with(to);
                self.give(to, group, &pages);
            }
        }
        for member in self.heirs.all().iter() {
            self.settle(member);
        }
    }

    /// Sends pages of a group behind what is under way to a member.
    fn give(&mut self, to: MemberIndex, group: Group, pages: &[Held]) {
        self.settle(to);
        let (store, begun) = (self.around.store, host::now());
        if !store.is_tended(self.volume) {
            return;
        }
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::MendsNothing) {
            return;
        }
        let mut taken = Vec::new();
        let parcel = store.parcel(self.volume, (self.portrait.me, pages), true, &mut taken);
        let Some(parcel) = parcel.filter(|parcel| !parcel.entries.is_empty()) else { return };
        let Some(heir) = self.heirs.get(to) else { return };
        if let Err(error) = heir.line.hand(Kind::HandCopies, &parcel, (group, taken)) {
            return self.heirs.lose(to, &error);
        }
        drop(parcel);
        if self.around.is_read() {
            self.settle(to);
            host::thread::sleep((host::elapsed(begun) * REST_BESIDE).min(REST_MAX));
        }
    }

    /// Waits for what a member has to answer.
    fn settle(&mut self, member: MemberIndex) {
        let Some(heir) = self.heirs.get(member) else { return };
        let settled = heir.line.settle(0);
        for heard in heir.line.take_heard() {
            match heard.placed {
                Some(placed) => {
                    let pages = heard.taken.len() as u64;
                    self.made += placed.len() as u64;
                    self.left.missing -= pages;
                    self.left.to_do -= pages;
                    self.left.homeless -= pages;
                }
                None => heir.full = true,
            }
        }
        if let Err(error) = settled {
            self.heirs.lose(member, &error);
        }
    }

    /// What the index here knows of zero pages.
    fn zeros(&self, range: PageRange) -> Vec<IndexEntry> {
        let (mut zeros, end) = (Vec::new(), range.first.0 + range.pages);
        let mut from = range.first;
        while from.0 < end {
            let (entries, next) =
                self.around.store.index_entries(self.volume, (from, end), INDEX_ENTRIES_MAX);
            from = next;
            let entries = entries.into_iter().filter(|entry| entry.placement.is_none());
            zeros.extend(entries.flat_map(|entry| {
                owner_runs(entry.range()).map(move |of| IndexEntry {
                    page: of.first,
                    run_pages: of.pages,
                    ..entry
                })
            }));
        }
        zeros
    }

    /// Tells as many index servers of zero pages as pages have copies, as whoever wrote the volume did.
    fn give_zeros(&mut self, zeros: &[IndexEntry], has: &Holdings) {
        let (me, members) = (self.portrait.me, self.portrait.said.members.len());
        let living = self.heirs.set().with(me);
        let mut by_owner: BTreeMap<MemberIndex, Vec<IndexEntry>> = BTreeMap::new();
        for entry in zeros {
            let owners = index_owners(entry.page, members, |member| living.contains(member));
            for owner in owners.take(self.copies()).filter(|owner| *owner != me) {
                if !has.knows_zero(owner, entry) {
                    by_owner.entry(owner).or_default().push(*entry);
                }
            }
        }
        for (owner, entries) in by_owner {
            for entries in entries.chunks(INDEX_ENTRIES_MAX) {
                if let Err(error) = self.tell(owner, entries) {
                    let pages: u64 = entries.iter().map(|entry| u64::from(entry.run_pages)).sum();
                    self.left.missing += pages;
                    self.left.to_do += pages;
                    if error.kind != ErrorKind::Full {
                        self.heirs.lose(owner, &error);
                    }
                }
            }
        }
    }

    fn tell(&mut self, owner: MemberIndex, entries: &[IndexEntry]) -> Result<()> {
        let mut table = Vec::new();
        let runs = encode_runs(entries.iter().copied(), &mut table);
        let lost = || Error::new(ErrorKind::Unreachable, "it was lost meanwhile");
        let heir = self.heirs.get(owner).ok_or_else(lost)?;
        heir.line.tell(Kind::HandIndex, (runs, &table)).map(|_| ())
    }
}
