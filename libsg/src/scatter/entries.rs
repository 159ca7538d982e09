//! Index entries on their way to index servers, and from one to the next.

use super::index_router::Pending;
use super::shared::Scatter;
use crate::event::Event;
use crate::ids::{MemberIndex, MemberSet};
use crate::wire::IndexEntry;

impl Scatter {
    /// Says, once, that pages lie at fewer members than they were to.
    pub(super) fn tell_fewer(&self, holders: MemberSet) {
        if !self.copies.is_news() {
            return;
        }
        let message = format!(
            "pages lie at fewer intermediaries than the {} that were asked for, some at {}: no more take copies. \
             What they alone have is lost with them",
            self.copies.holders(),
            holders.len().max(1),
        );
        (self.observer)(&Event::Warning { message });
    }

    /// Routes entries to their index servers; with none left, the destination gets the pages.
    pub fn route<E: Copy + Into<Pending>>(&self, entries: &[E]) {
        if entries.is_empty() {
            return;
        }
        // Whether some are finished is looked at under the planner's lock; those that nobody has yet are not.
        let planner = entries.iter().any(|entry| (*entry).into().is_known()).then(|| self.planner.lock());
        let mut finished = Vec::new();
        let routed = self.index.route(entries, &mut finished);
        if routed && finished.is_empty() {
            return;
        }
        let mut planner = planner.unwrap_or_else(|| self.planner.lock());
        planner.indexed(&finished);
        if !routed {
            planner.members_gone();
            self.direct_waker().wake();
        }
        drop(planner);
        if self.index.has_fewer() {
            self.tell_fewer(MemberSet::NONE);
        }
    }

    /// An index server acknowledged entries.
    pub fn indexed(&self, member: MemberIndex, entries: &mut [Pending], finished: &mut Vec<IndexEntry>) {
        finished.clear();
        let mut planner = self.planner.lock();
        if !self.index.acknowledged(member, entries, finished) {
            planner.members_gone();
        }
        planner.indexed(finished);
        drop(planner);
        self.index.answered(member);
        if self.index.has_fewer() {
            self.tell_fewer(MemberSet::of(member));
        }
    }

    /// An index server did not take entries: these, and those that wait for it, go to another.
    pub(super) fn not_indexed(&self, member: MemberIndex, entries: &[Pending]) {
        let mut waiting = self.index.suspect(member);
        waiting.extend_from_slice(entries);
        self.reroute(&waiting);
    }

    /// Entries that an index server did not take go to another; where nobody answers, their pages go
    /// another way. They are never passed around: that would have no end, and no bound.
    pub fn reroute(&self, entries: &[Pending]) {
        if self.index.anyone_answers() {
            self.route(entries);
        } else {
            let entries: Vec<IndexEntry> = entries.iter().map(|pending| pending.entry).collect();
            self.planner.lock().not_indexed(&entries);
            self.wake_all();
        }
    }
}
