//! One volume that is handed over, as often as it takes.

mod keeping;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Around;
use super::heirs::Heirs;
use super::line::Heard;
use super::look::Holdings;
use super::plan::{Group, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{MemberIndex, MemberSet, NodeId, VolumeId};
use crate::limits::{BATCH_PAGES, INDEX_ENTRIES_MAX};
use crate::manifest::Units;
use crate::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use crate::server::slots::Held;
use crate::server::store::{Handed, Portrait, Store};
use crate::wire::entry::{Entry, decode_table, encode_table};
use crate::wire::message::Member;
use crate::wire::placement::{index_owners, owner_runs};
use crate::wire::run::encode_runs;
use crate::wire::{IndexEntry, Kind, MovedEntry};

/// Bytes that are under way to each of those who take over; and where somebody reads here meanwhile.
const WINDOW_BYTES: usize = 1 << 20;
const WINDOW_BYTES_BESIDE: usize = BATCH_PAGES * PAGE_BYTES;

/// Moves that index servers are told of at once.
const MOVES_AT_ONCE: usize = 512;

/// How often it says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

const _: () = assert!(2 * MOVES_AT_ONCE <= INDEX_ENTRIES_MAX);

/// What a pass over a volume came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// All is where it is to be.
    Clean,
    /// All was handed over that was not.
    Worked,
    /// It begins anew: another list of members is known, or somebody is lost.
    Again,
}

/// A volume that leaves.
pub(super) struct Handing {
    volume: VolumeId,
    plan: Plan,
    /// Members that were told parts of the index.
    index_at: MemberSet,
    /// Named as who grants claims from now on, and not known to have heard of it.
    keeper: Option<Member>,
    /// What index servers are to be told.
    untold: Vec<MovedEntry>,
    /// Members at whose place is somebody else.
    gone: Vec<NodeId>,
    handed: u64,
    was_here: bool,
    /// It has members of whom those that read it may not have heard.
    grew: bool,
    /// The last pass was in vain.
    has_failed: bool,
    told_at: Option<Instant>,
}

impl Handing {
    pub(super) fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            plan: Plan::default(),
            index_at: MemberSet::NONE,
            keeper: None,
            untold: Vec::new(),
            gone: Vec::new(),
            handed: 0,
            was_here: false,
            grew: false,
            has_failed: false,
            told_at: None,
        }
    }

    /// How far it is.
    pub(super) fn so_far(&self, all: bool) -> Handed {
        Handed { pages: self.handed, left_pages: self.plan.left() as u64, all }
    }

    /// Whether there was anything to hand over.
    pub(super) const fn was_here(&self) -> bool {
        self.was_here
    }

    /// Whether it has new members.
    pub(super) const fn grew(&self) -> bool {
        self.grew
    }

    /// It could not be handed over.
    pub(super) const fn failed(&mut self) {
        self.has_failed = true;
    }

    /// Whether it cannot be handed over since all members that are there leave, and this one is the first of them: if it stays,
    /// it takes what the others have.
    pub(super) fn is_to_stay(&mut self, around: &Around<'_>) -> bool {
        let Some(portrait) = around.store.portrait(self.volume).filter(|_| self.has_failed) else {
            return false;
        };
        let Ok(mut heirs) = Heirs::meet_again(around, (self.volume, &portrait), &mut self.gone) else {
            return false;
        };
        let is_first = heirs.iter().all(|heir| portrait.me < heir.index);
        is_first && heirs.iter().next().is_some() && heirs.iter_mut().all(|heir| heir.leaves())
    }

    /// This intermediary stays: it decides again who gets the volume, unless somebody else may.
    pub(super) fn stay(&self, store: &Store) {
        let Some(portrait) = store.portrait(self.volume) else { return };
        if self.keeper.is_none() && is_keeper(store, &portrait) {
            store.set_stopped(self.volume, false);
        }
    }

    /// Hands over what is here.
    ///
    /// # Errors
    /// Why not all of it could be: the next pass tries again.
    pub(super) fn pass(&mut self, around: &Around<'_>) -> Result<Pass> {
        let store = around.store;
        self.has_failed = false;
        let Some(mut portrait) = store.portrait(self.volume) else {
            self.plan = Plan::default();
            return Ok(Pass::Clean);
        };
        self.plan.refresh(store.held(self.volume));
        let is_keeper = is_keeper(store, &portrait) || self.keeper.is_some();
        let has_books = portrait.indexed_pages > 0 || portrait.blob.is_some() || is_keeper;
        if self.plan.is_empty() && !has_books {
            return Ok(Pass::Clean);
        }
        self.was_here = true;
        if portrait.is_written && !portrait.said.committed {
            let message = "who writes it has not given COMMIT: it is waited for";
            return Err(Error::new(ErrorKind::Volume, message));
        }
        let mut heirs = Heirs::meet(around, (self.volume, &portrait), &mut self.gone)?;
        if store.portrait(self.volume).is_some_and(|now| now.said.members != portrait.said.members) {
            return Ok(Pass::Again);
        }
        for lost in self.plan.holders().iter().filter(|member| !heirs.set().contains(*member)) {
            self.plan.lost(lost);
        }
        if !self.index_at.iter().all(|member| heirs.set().contains(member)) {
            self.index_at = MemberSet::NONE;
        }
        let mut worked = false;
        if heirs.is_empty() {
            heirs.add(around, &mut portrait)?;
            (worked, self.grew) = (true, true);
        }
        // Behind it those who have the index are told of each page that moves: they may have known of it before.
        if portrait.indexed_pages > 0 && self.index_at.is_empty() {
            worked = true;
            // Where nobody has room for it, or is left, there may be others.
            while self.hand_index(around, &portrait, &mut heirs).is_err() {
                heirs.add(around, &mut portrait)?;
                self.grew = true;
            }
        }
        if self.plan.left() > 0 || !self.untold.is_empty() {
            worked = true;
            self.hand_all_pages(around, &mut portrait, &mut heirs)?;
        }
        if is_keeper {
            worked = true;
            self.hand_keeping(around, &portrait, &mut heirs)?;
        }
        if self.plan.left() > 0 {
            // Somebody was lost since who had some.
            return Ok(Pass::Again);
        }
        Ok(if worked { Pass::Worked } else { Pass::Clean })
    }

    /// To those that are members, then to others.
    fn hand_all_pages<'s>(
        &mut self,
        around: &Around<'s>,
        portrait: &mut Portrait,
        heirs: &mut Heirs<'s>,
    ) -> Result<()> {
        loop {
            self.hand_pages(around, portrait, heirs, false)?;
            if self.plan.left() == 0 {
                return Ok(());
            }
            let Err(error) = heirs.add(around, portrait) else {
                self.grew = true;
                continue;
            };
            let left = self.plan.left();
            self.hand_pages(around, portrait, heirs, true)?;
            if self.plan.left() == 0 {
                tracing::warn!(volume = %self.volume, pages = left, error = error.chain(), "there is one copy less of these");
                return Ok(());
            }
            let message = format!("{} pages have no place elsewhere", self.plan.left());
            return Err(Error::new(error.kind, message).because(error));
        }
    }

    /// To those that take over, as far as they have room. What others have anyway is done with if this is the `last` try.
    fn hand_pages(
        &mut self,
        around: &Around<'_>,
        portrait: &Portrait,
        heirs: &mut Heirs<'_>,
        last: bool,
    ) -> Result<()> {
        let units = Units::new(&portrait.said.manifest);
        let unit_of = |page| units.of(page).unwrap_or(PageRange::new(page, 1));
        let all = PageRange::new(PageIndex(0), portrait.said.manifest.pages());
        let has =
            if portrait.noted { Some(Holdings::ask(heirs, all).map_err(|(_, error)| error)?) } else { None };
        let has = |held: &Held| has.as_ref().map_or(MemberSet::NONE, |has| has.of(held));
        loop {
            let groups = self.plan.groups(&unit_of, &has);
            let mut before = None;
            for group in groups {
                let Some(to) = heirs.choose(&group, before) else {
                    if last && !group.has.is_empty() {
                        self.plan.settled(&group);
                    }
                    continue;
                };
                before = Some((group.unit, to));
                self.hand_group(around, (portrait, group), heirs, to);
                self.hear(portrait.me, heirs);
                if self.untold.len() >= MOVES_AT_ONCE {
                    self.tell_moves(around, portrait, heirs)?;
                }
                self.tell_progress(around.store);
            }
            #[cfg(feature = "simulation")]
            if host::has_bug(host::Bug::LeavesEarly) {
                self.plan.groups(&unit_of, &has).iter().for_each(|group| self.plan.settled(group));
                return Ok(());
            }
            self.settle_all(heirs);
            self.hear(portrait.me, heirs);
            self.tell_moves(around, portrait, heirs)?;
            self.plan.join_units(&unit_of);
            if before.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn hand_group(
        &mut self,
        around: &Around<'_>,
        (portrait, group): (&Portrait, Group),
        heirs: &mut Heirs<'_>,
        to: MemberIndex,
    ) {
        let mut taken = Vec::new();
        let pages = self.plan.pages(&group);
        let parcel = around.store.parcel(self.volume, (portrait.me, &pages), portrait.noted, &mut taken);
        let Some(parcel) = parcel.filter(|parcel| !parcel.entries.is_empty()) else {
            self.plan.settled(&group);
            return;
        };
        let kind = if portrait.noted { Kind::HandCopies } else { Kind::HandPages };
        let window = if around.is_read() { WINDOW_BYTES_BESIDE } else { WINDOW_BYTES };
        let Some(heir) = heirs.get(to) else { return };
        let room = window.saturating_sub(parcel.entries.len() * PAGE_BYTES);
        let sent = heir.line.settle(room).and_then(|()| heir.line.hand(kind, &parcel, (group, taken)));
        if let Err(error) = sent {
            self.lose(heirs, to, &error);
        }
    }

    fn lose(&mut self, heirs: &mut Heirs<'_>, member: MemberIndex, error: &Error) {
        heirs.lose(member, error);
        self.plan.lost(member);
        if self.index_at.contains(member) {
            self.index_at = MemberSet::NONE;
        }
    }

    /// Waits for every answer.
    fn settle_all(&mut self, heirs: &mut Heirs<'_>) {
        for member in heirs.all().iter() {
            if let Some(Err(error)) = heirs.get(member).map(|heir| heir.line.settle(0)) {
                self.lose(heirs, member, &error);
            }
        }
    }

    /// Takes what was answered.
    fn hear(&mut self, me: MemberIndex, heirs: &mut Heirs<'_>) {
        for heir in heirs.iter_mut() {
            for Heard { group, taken, placed } in heir.line.take_heard() {
                match placed {
                    Some(placed) => {
                        self.handed += placed.len() as u64;
                        self.plan.handed((&group, &taken), (me, heir.index), &placed, &mut self.untold);
                    }
                    None => heir.full = true,
                }
            }
        }
    }

    fn tell_progress(&mut self, store: &Store) {
        let now = host::now();
        if self.told_at.is_none_or(|at| now.saturating_duration_since(at) >= TELL_EVERY) {
            self.told_at = Some(now);
            let so_far = self.so_far(false);
            store.set_handed(self.volume, so_far);
            let left_bytes = so_far.left_pages * PAGE_BYTES_U64;
            tracing::info!(volume = %self.volume, handed_pages = self.handed, left_bytes, "handing over");
        }
    }

    /// Index servers hear where pages are now: the owner of each, and, where that does not know it where it was, all
    /// others, who remember it for an entry that is under way. What none of them knows is told the owner as if it were put,
    /// older than anything.
    fn tell_moves(&mut self, around: &Around<'_>, portrait: &Portrait, heirs: &mut Heirs<'_>) -> Result<()> {
        if self.untold.is_empty() {
            return Ok(());
        }
        around.store.moved_away(self.volume, &self.untold);
        let members = portrait.said.members.len();
        let mut by_owner: BTreeMap<MemberIndex, Vec<MovedEntry>> = BTreeMap::new();
        let living = heirs.set();
        for entry in &self.untold {
            let owner = index_owners(entry.page, members, |member| living.contains(member)).next();
            by_owner.entry(owner.ok_or_else(nobody)?).or_default().push(*entry);
        }
        for (owner, mut unknown) in by_owner {
            let others = heirs.all().without(owner);
            for member in std::iter::once(owner).chain(others.iter()) {
                if let Some(pages) = self.tell_moves_to(heirs, member, &unknown) {
                    unknown.retain(|entry| pages.binary_search(&entry.page).is_ok());
                }
                if unknown.is_empty() {
                    break;
                }
            }
            // Who should know may only be away. Without COMMIT there may be later bytes of the same round.
            if portrait.said.committed {
                let entries = around.store.stand_ins(self.volume, portrait.me, &unknown);
                self.put_entries(heirs, members, entries)?;
            }
        }
        if heirs.is_empty() {
            return Err(nobody());
        }
        self.untold.clear();
        Ok(())
    }

    /// The pages that a member did not know there; `None` where it is lost.
    fn tell_moves_to(
        &mut self,
        heirs: &mut Heirs<'_>,
        to: MemberIndex,
        moved: &[MovedEntry],
    ) -> Option<Vec<PageIndex>> {
        let heir = heirs.get(to)?;
        let mut pages = Vec::new();
        for moved in moved.chunks(INDEX_ENTRIES_MAX) {
            let mut table = Vec::with_capacity(moved.len() * MovedEntry::BYTES);
            encode_table(moved.iter().copied(), &mut table);
            let told = heir.line.tell(Kind::Moved, (moved.len(), &table)).and_then(|(header, body)| {
                let mut unknown: Vec<PageIndex> = Vec::new();
                decode_table(&body, header.count.into(), &mut unknown)?;
                Ok(unknown)
            });
            match told {
                Ok(unknown) => pages.extend(unknown),
                Err(error) => {
                    self.lose(heirs, to, &error);
                    return None;
                }
            }
        }
        pages.sort_unstable();
        Some(pages)
    }

    /// What the index here knows goes to who is asked next for it.
    fn hand_index(&mut self, around: &Around<'_>, portrait: &Portrait, heirs: &mut Heirs<'_>) -> Result<()> {
        let (members, pages) = (portrait.said.members.len(), portrait.said.manifest.pages());
        let mut from = PageIndex(0);
        let mut at = MemberSet::NONE;
        while from.0 < pages {
            let (entries, next) = around.store.index_entries(self.volume, (from, pages), INDEX_ENTRIES_MAX);
            from = next;
            let runs = entries.into_iter().flat_map(|entry| {
                let piece = move |of: PageRange| IndexEntry { page: of.first, run_pages: of.pages, ..entry };
                owner_runs(entry.range()).map(piece)
            });
            at = at.or(self.put_entries(heirs, members, runs.collect())?);
        }
        self.index_at = at;
        Ok(())
    }

    /// Gives entries to who is asked first for them, or who comes next of those that take them; who has some.
    fn put_entries(
        &mut self,
        heirs: &mut Heirs<'_>,
        members: usize,
        mut left: Vec<IndexEntry>,
    ) -> Result<MemberSet> {
        let (mut at, mut refused, mut failed) = (MemberSet::NONE, MemberSet::NONE, None);
        while !left.is_empty() {
            let able = heirs.set().but(refused);
            let mut by_owner: BTreeMap<MemberIndex, Vec<IndexEntry>> = BTreeMap::new();
            for entry in left.drain(..) {
                match index_owners(entry.page, members, |member| able.contains(member)).next() {
                    Some(owner) => by_owner.entry(owner).or_default().push(entry),
                    None => return Err(failed.unwrap_or_else(nobody)),
                }
            }
            for (owner, entries) in by_owner {
                match self.tell_index(heirs, owner, &entries) {
                    Ok(()) => at = at.with(owner),
                    Err(error) => {
                        (refused, failed) = (refused.with(owner), Some(error));
                        left.extend(entries);
                    }
                }
            }
        }
        Ok(at)
    }

    fn tell_index(&mut self, heirs: &mut Heirs<'_>, to: MemberIndex, entries: &[IndexEntry]) -> Result<()> {
        for entries in entries.chunks(INDEX_ENTRIES_MAX) {
            let mut table = Vec::new();
            let runs = encode_runs(entries.iter().copied(), &mut table);
            let heir = heirs.get(to).ok_or_else(nobody)?;
            if let Err(error) = heir.line.tell(Kind::HandIndex, (runs, &table)) {
                if error.kind != ErrorKind::Full {
                    self.lose(heirs, to, &error);
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

fn is_keeper(store: &Store, portrait: &Portrait) -> bool {
    portrait.said.parking.as_ref().is_some_and(|parking| parking.keeper == *store.node())
}

fn nobody() -> Error {
    Error::new(ErrorKind::Unreachable, "nobody is left to take it over")
}
