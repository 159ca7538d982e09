//! Members that come, and that go, while pages are sent.

use super::index_router::Pending;
use super::shared::Scatter;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::host;
use crate::ids::{MemberIndex, MemberSet};
use crate::wire::message::Member;

impl Scatter {
    /// One more member, in the place of one that died: the volume was created there. No index entry goes there before it
    /// runs. `None` where there is no room for it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] when the kernel gives no event descriptor.
    pub fn add_member(&self, member: Member) -> Result<Option<MemberIndex>> {
        let Some(added) = self.members.add(member)? else { return Ok(None) };
        // Before it counts as one that lives.
        self.copies.add();
        self.index.add(self.members.books()[added].waker.clone());
        // Everybody who knows the members is told of it.
        self.wake_all();
        Ok(Some(added))
    }

    /// Whether what lies at a member can be found again without the source, be it that all but one die of as many as hold
    /// each page.
    #[must_use]
    pub fn is_known(&self, member: MemberIndex) -> bool {
        self.members.is_known(member, self.copies.holders(), |other| self.index.is_dead(other))
    }

    /// The same of all members that live. At one that was never open nothing lies: who is left has to know of it only for
    /// whoever is to have it dissolved there.
    #[must_use]
    pub fn are_known(&self) -> bool {
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::MemberUnknown) {
            return true;
        }
        let counted = self.copies.counted(MemberSet::ALL);
        let asked_least = |member| if counted.contains(member) { self.copies.holders() } else { 1 };
        self.members.are_known(asked_least, |member| self.index.is_dead(member))
    }

    /// A member takes pages from now on. Where it came in the place of one that died, what lies at too few is sent again, and
    /// what too few index servers know is told to more.
    pub(super) fn open(&self, member: MemberIndex) {
        let mut reindexed = Vec::new();
        {
            // In one step: nobody is to count it as open, and what it has no copy of as safe.
            let mut planner = self.planner.lock();
            if self.copies.open(member, host::now()) && self.copies.holders() > 1 && !self.has_told_done() {
                #[cfg(feature = "simulation")]
                if host::has_bug(host::Bug::JoinedInVain) {
                    return;
                }
                self.index.answered(member);
                let others = (self.copies.counted(self.index.living()), self.copies.holders());
                let has_fewer = self.index.take_fewer();
                planner.member_opened(others, has_fewer, |entry| reindexed.push(entry));
            }
        }
        self.route(&reindexed);
        if self.copies.holders() > 1 {
            self.wake_all();
            self.check_progress();
        }
    }

    /// A member is lost: what lay there is sent again, its index is put elsewhere.
    pub fn member_lost(&self, member: MemberIndex, error: &Error) {
        let node = &self.members.books()[member].member.node;
        (self.observer)(&Event::NodeLost { message: format!("intermediary {node}: {}", error.chain()) });
        self.offers_lost(member);
        let mut moved = Vec::new();
        let pending = {
            // In one step: nobody is to count it as dead, and what lay there as safe.
            let mut planner = self.planner.lock();
            let pending = self.index.dead(member);
            #[cfg(feature = "simulation")]
            if host::has_bug(host::Bug::DeathForgotten) {
                return;
            }
            let others = (self.copies.counted(self.index.living()), self.copies.holders());
            planner.member_lost(
                member,
                others,
                |page| self.index.may_be_with(page, member),
                |e| moved.push(e),
            );
            pending
        };
        if self.index.alive() == 0 && !self.stopping() {
            let message = "no intermediary is left: pages go to the destination only".into();
            (self.observer)(&Event::Warning { message });
            self.planner.lock().members_gone();
        } else {
            // What lay at the dead member is sent again and indexed anew.
            let of_others = |e: &Pending| e.entry.placement.is_none_or(|at| at.member != member);
            self.route(&pending.into_iter().filter(of_others).collect::<Vec<_>>());
            self.route(&moved);
        }
        self.wake_all();
        self.check_progress();
    }
}
