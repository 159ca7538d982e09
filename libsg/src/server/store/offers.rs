//! Pages that are stored by what is in them.

use super::Store;
use crate::content::{ContentHash, ContentHasher};
use crate::host;
use crate::ids::{Epoch, Placement, VolumeId};
use crate::page::PAGE_BYTES;
use crate::server::slots::{Referred, SlotRun};
use crate::server::volumes::Access;
use crate::wire::{ReferEntry, Referral, Status};

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
        let pages = known.manifest.pages();
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
            });
        }
        Ok(())
    }
}
