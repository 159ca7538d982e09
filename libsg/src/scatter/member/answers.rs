//! What is made of a member's answers to batches: with copies, pages count only where all that were to hold them do.

use std::sync::atomic::Ordering;
use std::time::Instant;

#[cfg(feature = "simulation")]
use crate::host;
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement};
use crate::page::{PAGE_BYTES, PageIndex};
use crate::scatter::planner::BatchId;
use crate::scatter::shared::Scatter;
use crate::scatter::table::{Loser, Place};
use crate::wire::{IndexEntry, Missing};

/// A batch that was sent to a member, or of pages that lay there and that others were to hold, too.
pub(super) struct Sent<'a> {
    pub scatter: &'a Scatter,
    pub member: MemberIndex,
    pub batch: BatchId,
    pub holders: MemberSet,
    /// When.
    pub at: Instant,
}

/// What it comes to: entries to be told, and slots to be given back.
type Outcome<'a> = (&'a mut Vec<IndexEntry>, &'a mut Vec<Loser>);

impl Sent<'_> {
    /// Pages that were sent were stored, or had no room; others have none of them.
    pub fn stored(
        &self,
        pages: &[(PageIndex, Checksum)],
        (placements, missing): (&[Option<Placement>], Missing),
        now: Instant,
        (entries, losers): Outcome<'_>,
    ) {
        let bytes = self.answered(pages.len(), missing, now);
        let placed = pages.iter().zip(placements).map(|((page, sum), at)| (*page, *sum, self.here(*at)));
        let copies = self.holders.without(self.member);
        entries.clear();
        let mut planner = self.scatter.planner.lock();
        if self.counts(missing) {
            planner.stored((self.batch, copies), placed, entries, losers);
            self.count_copies(bytes);
        } else {
            // It lies at fewer than it is to: others get it, and what there is of it is given back.
            planner.not_stored((self.batch, copies), placed, losers);
        }
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::IndexNotAwaited) {
            planner.indexed(entries);
        }
        drop(planner);
        self.scatter.note_stored(entries.iter().map(|entry| entry.page), self.member);
        self.scatter.route(entries);
        self.scatter.announce(entries);
    }

    /// Pages that lay there: where they do, and who has none; `None` where it was refused.
    pub fn spread(
        &self,
        pages: &[IndexEntry],
        stored: Option<(&[Option<Placement>], Missing)>,
        now: Instant,
        (entries, losers): Outcome<'_>,
    ) {
        let Some((placements, missing)) = stored else {
            self.scatter.copies.landed(self.member, self.holders, (pages.len() * PAGE_BYTES) as u64);
            let first = pages.iter().filter_map(|entry| Some((entry.page, entry.placement?)));
            let copies = MemberSet::NONE;
            losers.extend(first.map(|(page, first)| Loser { page, place: Place { first, copies } }));
            return self.scatter.planner.lock().not_referenced(self.batch);
        };
        let bytes = self.answered(pages.len(), missing, now);
        let copies = self.holders.without(self.member);
        let placed =
            pages.iter().zip(placements).map(|(entry, at)| (entry.page, entry.checksum, self.here(*at)));
        entries.clear();
        let mut planner = self.scatter.planner.lock();
        if self.counts(missing) {
            planner.referenced((self.batch, copies), placed, entries, losers);
            self.count_copies(bytes);
        } else {
            let there = placed.filter_map(|(page, _, at)| Some((page, at?)));
            losers.extend(there.map(|(page, first)| Loser { page, place: Place { first, copies } }));
            planner.not_referenced(self.batch);
        }
        drop(planner);
        self.scatter.route(entries);
        self.scatter.announce(entries);
    }

    /// It is under way no more, and who has no copy is left alone for a while; its bytes.
    fn answered(&self, pages: usize, missing: Missing, now: Instant) -> u64 {
        let bytes = (pages * PAGE_BYTES) as u64;
        self.scatter.copies.landed(self.member, self.holders, bytes);
        self.scatter.copies.answered(self.member, self.holders, missing, now);
        bytes
    }

    /// A server knows its slots, not which member of this volume it is.
    fn here(&self, at: Option<Placement>) -> Option<Placement> {
        at.map(|at| Placement { member: self.member, ..at })
    }

    /// Whether it lies at as many as it is to. With the planner's books locked: whoever died since is known to be dead here,
    /// or is told to them behind this, and so is who came.
    fn counts(&self, missing: Missing) -> bool {
        let has_died = self.holders.but(self.scatter.index.living());
        missing.is_none() && has_died.is_empty() && !self.scatter.copies.is_outdated(self.holders, self.at)
    }

    fn count_copies(&self, bytes: u64) {
        let copies = self.holders.without(self.member).len() as u64;
        self.scatter.counters.replicated.fetch_add(bytes * copies, Ordering::Relaxed);
    }
}
