//! Pages that are stored by what is in them.

use std::time::Duration;

use super::{Asker, Holder, Slot, State};
use crate::ids::{Checksum, MemberIndex, Placement, SlotIndex, VolumeId};
use crate::wire::{GetEntry, HintEntry, ReferEntry, Referral, Status};

/// As long as the others wait for who was told to send a page.
const GRANT_TIME: Duration = Duration::from_secs(1);

impl State {
    /// Pages that are offered by their hashes.
    pub(super) fn refer(&mut self, asker: Asker, offers: &[ReferEntry]) -> Result<Vec<Referral>, Status> {
        let node = self.node.clone();
        let volume = self.writable(asker)?;
        let pages = volume.manifest.pages();
        if offers.iter().any(|offer| offer.page.0 >= pages) {
            return Err(Status::Malformed);
        }
        let member = volume.member(&node).ok_or(Status::State)?;
        let (sharing, members) = (volume.manifest.sharing.clone(), volume.members().to_vec());
        let Some(sharing) = sharing else { return Ok(vec![Referral::Send; offers.len()]) };
        let refer = |offer: &ReferEntry| {
            let known = (sharing.clone(), offer.hash);
            let of = |slot: &Slot| slot.content.as_ref().is_some_and(|c| c.known.as_ref() == Some(&known));
            if let Some(at) = self.slots.iter().position(of) {
                let slot = &mut self.slots[at];
                let (volume, page, round) = (asker.volume, offer.page, offer.round);
                slot.content.iter_mut().for_each(|content| {
                    let checksum = content.checksum;
                    content.holders.push(Holder { volume, page, round, checksum });
                });
                let (slot, generation) = (SlotIndex(at as u32), slot.generation);
                return Referral::Have(Placement { member, slot, generation });
            }
            if let Some(at) =
                self.hints.get(&known).and_then(|node| members.iter().position(|m| m.node == *node))
            {
                return Referral::At(MemberIndex(at as u16));
            }
            let now = crate::host::now();
            if self.grants.get(&known).is_some_and(|until| now < *until) {
                return Referral::Pending;
            }
            self.grants.insert(known, now + GRANT_TIME);
            Referral::Send
        };
        Ok(offers.iter().map(refer).collect())
    }

    /// A page that lies there has this checksum, as its writer says.
    pub(super) fn seal(&mut self, volume: VolumeId, at: &GetEntry, checksum: Checksum) {
        let slot = self.slots.get_mut(at.placement.slot.0 as usize);
        let Some(content) = slot.and_then(|slot| slot.content.as_mut()) else { return };
        let of = |holder: &&mut Holder| holder.volume == volume && holder.page == at.page;
        content.holders.iter_mut().filter(of).for_each(|holder| holder.checksum = checksum);
    }

    /// A copy was stored here: where its bytes lay before, they hold its page, too. Where it lies now.
    pub(super) fn merge(&mut self, here: Placement) -> Placement {
        let at = here.slot.0 as usize;
        let known = |slot: &Slot| slot.content.as_ref().and_then(|content| content.known.clone());
        let Some(mine) = self.slots.get(at).and_then(known) else { return here };
        let same = |(other, slot): (usize, &Slot)| other != at && known(slot).as_ref() == Some(&mine);
        let Some(other) = self.slots.iter().enumerate().position(same) else { return here };
        let Some(merged) = self.slots[at].content.take() else { return here };
        self.free.push(here.slot);
        let slot = &mut self.slots[other];
        slot.content.iter_mut().for_each(|content| content.holders.extend(&merged.holders));
        Placement { slot: SlotIndex(other as u32), generation: slot.generation, ..here }
    }

    /// Who else has bytes, as somebody says.
    pub(super) fn hint(&mut self, asker: Asker, hints: &[HintEntry]) -> Result<(), Status> {
        let node = self.node.clone();
        let volume = self.writable(asker)?;
        let (sharing, members) = (volume.manifest.sharing.clone(), volume.members().to_vec());
        for hint in hints {
            let holder = &members.get(hint.member.as_usize()).ok_or(Status::Malformed)?.node;
            if let Some(sharing) = sharing.as_ref().filter(|_| *holder != node) {
                let known = (sharing.clone(), hint.hash);
                self.grants.remove(&known);
                self.hints.insert(known, holder.clone());
            }
        }
        Ok(())
    }
}
