//! Pages that are stored by what is in them.

use super::Store;
use crate::content::{ContentHash, ContentHasher};
use crate::host;
use crate::ids::{Epoch, MemberIndex, Placement, VolumeId};
use crate::page::PAGE_BYTES;
use crate::server::slots::{Holder, Referred, SlotRun};
use crate::server::volumes::Access;
use crate::wire::message::Member;
use crate::wire::{HintEntry, ReferEntry, Referral, Status};

/// Intermediaries that hints may name, since this one started: restarted ones count anew. Of others none is kept.
const HOLDERS_MAX: usize = 4096;

impl Store {
    /// What the bytes of slots that were filled hash to, in order.
    pub(in crate::server) fn hash(
        &self,
        hasher: &ContentHasher,
        runs: &[SlotRun],
        hashes: &mut Vec<ContentHash>,
    ) {
        let mut page = [0; PAGE_BYTES];
        for slot in runs.iter().flat_map(|run| run.iter()) {
            if let Ok(memory) = self.arena.slots(SlotRun { first: slot, slots: 1 }) {
                memory.readable().copy_to(&mut page);
            }
            self.touch(PAGE_BYTES);
            hashes.push(hasher.hash(&page));
        }
    }

    /// Pages are offered by their hashes: what became of each is appended to `out`.
    pub(in crate::server) fn refer(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        offers: &[ReferEntry],
        out: &mut Vec<Referral>,
    ) -> Result<(), Status> {
        out.clear();
        let now = host::now();
        let volumes = self.volumes.lock();
        let known = volumes.admit(volume, epoch, Access::Write)?;
        if self.is_leaving() {
            return Err(Status::Full);
        }
        let (pages, members) = (known.manifest.pages(), known.members.clone());
        if offers.iter().any(|offer| offer.page.0 >= pages) {
            return Err(Status::Malformed);
        }
        let member = self.me(&known.members).ok_or(Status::State)?;
        let mut slots = self.slots.lock();
        drop(volumes);
        for ReferEntry { page, round, hash } in offers {
            let referred = slots.refer(volume, (*page, *round), hash, now).map_err(|_| Status::NoVolume)?;
            out.push(match referred {
                Referred::Have(slot, generation) => Referral::Have(Placement { member, slot, generation }),
                Referred::Send => Referral::Send,
                Referred::Pending => Referral::Pending,
                Referred::At(holder) => match self.holder(holder, &members) {
                    Some(member) => Referral::At(member),
                    // Whoever cannot be asked sends it.
                    None => match slots.grant(volume, hash, now) {
                        Referred::Pending => Referral::Pending,
                        _ => Referral::Send,
                    },
                },
            });
        }
        Ok(())
    }

    /// Somebody says who has the bytes of hashes that this one is asked about.
    pub(in crate::server) fn hint(
        &self,
        (volume, epoch): (VolumeId, Epoch),
        hints: &[HintEntry],
    ) -> Result<(), Status> {
        let members = self.volumes.lock().admit(volume, epoch, Access::Write)?.members.clone();
        for HintEntry { hash, member } in hints {
            let node = &members.get(member.as_usize()).ok_or(Status::Malformed)?.node;
            if *node == self.node {
                continue;
            }
            let number = {
                let mut holders = self.holders.lock();
                match holders.iter().position(|known| known == node) {
                    Some(at) => at,
                    None if holders.len() < HOLDERS_MAX => {
                        holders.push(node.clone());
                        holders.len() - 1
                    }
                    None => continue,
                }
            };
            self.slots.lock().hint(volume, hash, number as Holder);
        }
        Ok(())
    }

    /// Which of the volume's members a holder is.
    fn holder(&self, holder: Holder, members: &[Member]) -> Option<MemberIndex> {
        let holders = self.holders.lock();
        let node = holders.get(usize::from(holder))?;
        let at = members.iter().position(|member| member.node == *node)?;
        Some(MemberIndex(at as u16))
    }
}
