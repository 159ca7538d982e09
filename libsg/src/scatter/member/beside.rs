//! What an intermediary is told beside the pages: index entries that are its to keep, slots to give back, offers, and who
//! the members are.

use std::time::{Duration, Instant};

use super::{Asked, MemberSink, What};
use crate::error::Result;
use crate::limits::{BATCH_PAGES, BATCH_PAGES_MAX, INDEX_ENTRIES_MAX};
use crate::page::PAGE_BYTES;
use crate::vmd::Request;
use crate::wire::message::VmdRequest;

/// Index entries are held back this long while pages flow, so that they travel many to a frame.
const INDEX_EVERY: Duration = Duration::from_millis(5);

/// Pages that are to lie at others, too, and are not answered for, at most: 2 MiB, half of what a session sends on at
/// once.
const SPREAD_PAGES_MAX: usize = 512;

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
            self.scatter.not_indexed(self.member, &waiting);
        }
    }
}
