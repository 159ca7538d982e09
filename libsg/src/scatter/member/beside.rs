//! What an intermediary is told beside the pages: index entries that are its to keep, slots to give back, offers, and who
//! the members are.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Asked, MemberSink, What};
use crate::error::Result;
use crate::ids::{MemberIndex, MemberSet, Placement};
use crate::limits::{BATCH_PAGES, BATCH_PAGES_MAX, INDEX_ENTRIES_MAX};
use crate::page::PAGE_BYTES;
use crate::scatter::planner::BatchId;
use crate::scatter::shared::Scatter;
use crate::scatter::table::{Loser, Place};
use crate::vmd::Request;
use crate::wire::message::VmdRequest;
use crate::wire::{IndexEntry, Missing};

/// Index entries are held back this long while pages flow, so that they travel many to a frame.
const INDEX_EVERY: Duration = Duration::from_millis(5);

/// Pages that are to lie at others, too, and are not answered for, at most: 2 MiB, half of what a session sends on at
/// once.
const SPREAD_PAGES_MAX: usize = 512;

/// A batch of pages that lay at a member, and that others were to hold, too.
pub(super) struct Spread<'a> {
    pub member: MemberIndex,
    pub batch: BatchId,
    pub pages: &'a [IndexEntry],
    pub holders: MemberSet,
    /// When it was asked.
    pub at: Instant,
}

impl Spread<'_> {
    /// It was answered: where its pages lie, and who has none; `None` where it was refused.
    pub(super) fn answered(
        &self,
        scatter: &Scatter,
        stored: Option<(&[Option<Placement>], Missing)>,
        now: Instant,
        (entries, losers): (&mut Vec<IndexEntry>, &mut Vec<Loser>),
    ) {
        let Self { member, batch, pages, holders, at } = *self;
        let bytes = (pages.len() * PAGE_BYTES) as u64;
        scatter.copies.landed(member, holders, bytes);
        let first = pages.iter().filter_map(|entry| Some((entry.page, entry.placement?)));
        let Some((placements, missing)) = stored else {
            let copies = MemberSet::NONE;
            losers.extend(first.map(|(page, first)| Loser { page, place: Place { first, copies } }));
            return scatter.planner.lock().not_referenced(batch);
        };
        scatter.copies.answered(member, holders, missing, now);
        let copies = holders.without(member);
        entries.clear();
        {
            let mut planner = scatter.planner.lock();
            // As with a batch that is put: whoever died since is known to be dead here, or is told to the planner behind
            // this.
            let has_died = holders.and(MemberSet(!scatter.index.living().0));
            let placed = pages
                .iter()
                .zip(placements)
                .map(|(entry, at)| (entry.page, entry.checksum, at.map(|at| Placement { member, ..at })));
            if missing.is_none() && has_died.is_empty() && !scatter.copies.is_outdated(holders, at) {
                planner.referenced((batch, copies), placed, entries, losers);
                let copied = bytes * copies.len() as u64;
                scatter.counters.replicated.fetch_add(copied, Ordering::Relaxed);
            } else {
                let there = placed.filter_map(|(page, _, at)| Some((page, at?)));
                losers.extend(there.map(|(page, first)| Loser { page, place: Place { first, copies } }));
                planner.not_referenced(batch);
            }
        }
        scatter.route(entries);
        scatter.announce(entries);
    }
}

impl MemberSink {
    /// Slots that are of no use any more are given back; whether that succeeds matters to nobody.
    pub(super) fn give_back(&mut self) {
        for loser in self.losers.drain(..) {
            self.scatter.give_up(loser);
        }
        if self.link.queued_bytes() < BATCH_PAGES * PAGE_BYTES {
            self.scatter.take_given_up(self.member, BATCH_PAGES_MAX, &mut self.drops);
            if !self.drops.is_empty() {
                let _ = self.link.submit(Request::Drop(&self.drops));
                self.drops.clear();
            }
        }
    }

    /// Members that were added are told before anything speaks of them.
    pub(super) fn tell_members(&mut self, now: Instant) -> Result<()> {
        let members = self.scatter.members.books().len();
        if members > self.told_members {
            self.told_members = members;
            let request = VmdRequest::Members(self.scatter.members.list());
            let ticket = self.link.submit(Request::Control(&request))?;
            self.asked.push_back(Asked { ticket, what: What::Members(members), at: now });
        }
        Ok(())
    }

    /// Offers go in front of the pages that are taken after them.
    pub(super) fn offer(&mut self, now: Instant) -> Result<()> {
        let Some(desk) = self.scatter.offers.get() else { return Ok(()) };
        let (mut offers, mut hints) = (Vec::new(), Vec::new());
        desk.take(self.member, BATCH_PAGES_MAX, &mut offers);
        desk.take_hints(self.member, BATCH_PAGES_MAX, &mut hints);
        if !offers.is_empty() {
            let ticket = self.link.submit(Request::Refer(&offers))?;
            self.asked.push_back(Asked { ticket, what: What::Refer(offers), at: now });
        }
        if !hints.is_empty() {
            let ticket = self.link.submit(Request::Hint(&hints))?;
            self.asked.push_back(Asked { ticket, what: What::Hint, at: now });
        }
        Ok(())
    }

    /// Pages that lie here by reference are to lie at others, too.
    pub(super) fn spread(&mut self, now: Instant) -> Result<()> {
        let Some(desk) = self.scatter.offers.get() else { return Ok(()) };
        let pages_of =
            |asked: &Asked| if let What::Spread(_, pages, _) = &asked.what { pages.len() } else { 0 };
        while self.asked.iter().map(pages_of).sum::<usize>() < SPREAD_PAGES_MAX {
            let Some(holders) = self.holders(now) else { return Ok(()) };
            let mut had = Vec::new();
            desk.take_had(self.member, BATCH_PAGES, &mut had);
            if had.is_empty() {
                return Ok(());
            }
            had.sort_unstable_by_key(|entry| entry.page);
            let mut rest = &had[..];
            while !rest.is_empty() {
                let mut pages = Vec::new();
                let (batch, of) =
                    self.scatter.planner.lock().spread(self.member, rest, now, &mut pages, &mut self.losers);
                rest = &rest[of..];
                let Some(batch) = batch else { continue };
                let ticket = self.link.submit(Request::Spread { entries: &pages, copies: holders })?;
                self.scatter.copies.sent(self.member, holders, (pages.len() * PAGE_BYTES) as u64);
                if holders.len() < self.scatter.copies.holders() {
                    self.scatter.tell_fewer(holders);
                }
                self.asked.push_back(Asked { ticket, what: What::Spread(batch, pages, holders), at: now });
            }
        }
        Ok(())
    }

    pub(super) fn put_index(&mut self, now: Instant) -> Result<()> {
        let busy = self.asked.iter().any(|asked| matches!(asked.what, What::Put(..)));
        if busy && now.saturating_duration_since(self.index_sent) < INDEX_EVERY {
            return Ok(());
        }
        let mut entries = self.spare_entries.pop().unwrap_or_default();
        self.scatter.index.take(self.member, INDEX_ENTRIES_MAX, &mut entries);
        if entries.is_empty() {
            self.spare_entries.push(entries);
            return Ok(());
        }
        self.index_sent = now;
        self.entries.clear();
        self.entries.extend(entries.iter().map(|pending| pending.entry));
        let ticket = self.link.submit(Request::PutIndex(&self.entries))?;
        self.asked.push_back(Asked { ticket, what: What::Index(entries, false), at: now });
        Ok(())
    }

    /// Entries that this member does not acknowledge go to the next in rotation as well, once.
    pub(super) fn look_for_late_entries(&mut self, now: Instant) {
        let late = self.silence();
        let mut waiting = Vec::new();
        for asked in &mut self.asked {
            if let What::Index(entries, rerouted @ false) = &mut asked.what
                && now.saturating_duration_since(asked.at) > late
            {
                waiting.extend_from_slice(entries);
                *rerouted = true;
            }
        }
        if !waiting.is_empty() {
            waiting.extend(self.scatter.index.suspect(self.member));
            self.scatter.reroute(&waiting);
        }
    }
}
