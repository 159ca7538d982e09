//! The volume's members, as the destination knows them: from the source, and, when that is silent, from each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;

use super::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::gather::desk::{MemberDesk, MemberState};
use crate::ids::MemberIndex;
use crate::limits;
use crate::transport::Waker;
use crate::wire::message::Member;

impl Shared {
    /// The volume's members, of which there are only ever more.
    pub fn members(&self) -> Vec<Arc<MemberDesk>> {
        self.members.read().clone()
    }

    /// How many there are.
    pub fn member_count(&self) -> usize {
        self.members.read().len()
    }

    pub fn member(&self, index: MemberIndex) -> Option<Arc<MemberDesk>> {
        self.members.read().get(index.as_usize()).cloned()
    }

    /// Takes the new list, which begins with the old one; returns the numbers of the new ones.
    pub fn add_members(&self, list: &[Member]) -> Result<Vec<MemberIndex>> {
        let mut members = self.members.write();
        let same = members.iter().zip(list).all(|(desk, member)| desk.member == *member);
        if !same || list.len() < members.len() || list.len() > limits::MEMBERS_MAX {
            return Err(Error::new(
                ErrorKind::Protocol,
                "a list of members that does not begin with the old one",
            ));
        }
        let mut added = Vec::new();
        for member in &list[members.len()..] {
            added.push(MemberIndex(members.len() as u16));
            members.push(Arc::new(MemberDesk {
                member: member.clone(),
                waker: Waker::new()?,
                urgent: Mutex::new(None),
                wants_urgent: AtomicBool::new(true),
                bytes_out: AtomicU64::new(0),
                state: Mutex::new(MemberState::default()),
            }));
        }
        self.tracker.lock().set_members(members.len());
        Ok(added)
    }

    /// An intermediary says who the members are. Where there are more than were known the conductor takes them over.
    pub fn found_members(&self, list: Vec<Member>) {
        let known = self.members();
        let begins_alike =
            known.len() < list.len() && known.iter().zip(&list).all(|(desk, of)| desk.member == *of);
        if !begins_alike || list.len() > limits::MEMBERS_MAX {
            return;
        }
        tracing::info!(members = list.len(), "the volume has members of whom the source has not told");
        *self.found_members.lock() = Some(list);
        self.conductor.wake();
    }

    /// Whether the conductor has yet to take some over: until then not everybody was asked.
    pub fn has_found_members(&self) -> bool {
        self.new_members().is_some()
    }

    /// Members that were found, where there are still more than are known.
    pub fn new_members(&self) -> Option<Vec<Member>> {
        // They stay found until they are added.
        self.found_members.lock().as_ref().filter(|list| list.len() > self.members.read().len()).cloned()
    }
}
