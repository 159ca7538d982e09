//! Rare requests to an intermediary in memory: volumes and their states, and what it has and holds.

use super::volume::Volume;
use super::{Asker, State};
use crate::ids::{Epoch, VolumeId};
use crate::manifest::Manifest;
use crate::page::PAGE_BYTES_U64;
use crate::wire::Status;
use crate::wire::link_use::LinkUse;
use crate::wire::mending::Mending;
use crate::wire::message::{Member, NodeStatistics, VmdReply, VmdRequest, VolumeState, VolumeSummary};

impl State {
    pub(super) fn control(&mut self, asker: Asker, request: &VmdRequest) -> Result<VmdReply, Status> {
        match request {
            VmdRequest::Create { manifest, members } => self.create(asker, manifest, members)?,
            VmdRequest::Members(members) => self.volume(asker)?.set_members(members)?,
            VmdRequest::Describe => {
                let pages = (self.stored_pages(asker.volume), self.copied_pages(asker.volume));
                let volume = self.volumes.get(&asker.volume).ok_or(Status::NoVolume)?;
                return Ok(VmdReply::Volume(Box::new(volume.describe(asker.volume, pages))));
            }
            VmdRequest::Commit => self.owned(asker)?.committed = true,
            VmdRequest::Copies(copies) => self.writable(asker)?.copies = *copies,
            VmdRequest::Fence => self.writable(asker)?.fenced = asker.opened,
            VmdRequest::Seal => self.owned(asker)?.seal()?,
            VmdRequest::Claim { epoch } => {
                self.volume(Asker { epoch: Epoch(u64::MAX), ..asker })?.claim(*epoch)?
            }
            VmdRequest::Park(parking) => self.writable(asker)?.park(parking)?,
            VmdRequest::ClaimParked(claim) => {
                let volume = self.volume(Asker { epoch: Epoch(u64::MAX), ..asker })?;
                return Ok(VmdReply::Verdict(volume.claim_parked(claim)));
            }
            VmdRequest::Run => self.owned(asker)?.run()?,
            VmdRequest::Succeed { epoch } => {
                self.volume(Asker { epoch: Epoch(u64::MAX), ..asker })?.succeed(*epoch)?
            }
            VmdRequest::Dissolve => self.dissolve(asker)?,
            VmdRequest::Statistics => return Ok(VmdReply::Statistics(self.statistics())),
            VmdRequest::PutState { .. }
            | VmdRequest::GetState
            | VmdRequest::PutPiece { .. }
            | VmdRequest::GetPiece { .. } => return Err(Status::Malformed),
            // Nobody in memory leaves.
            VmdRequest::Inherit(_) | VmdRequest::InheritPiece { .. } => return Err(Status::State),
        }
        Ok(VmdReply::Done)
    }

    fn create(&mut self, asker: Asker, manifest: &Manifest, members: &[Member]) -> Result<(), Status> {
        if asker.volume.0 == 0 || asker.epoch.0 == 0 {
            return Err(Status::Malformed);
        }
        if members.iter().all(|member| member.node != self.node) {
            return Err(Status::State);
        }
        let Some(volume) = self.volumes.get_mut(&asker.volume) else {
            let volume = Volume::new(asker.epoch, manifest.clone(), members.to_vec());
            self.volumes.insert(asker.volume, volume);
            return Ok(());
        };
        let again = volume.epoch == asker.epoch && volume.manifest == *manifest;
        match volume.state {
            VolumeState::Dissolved => Err(Status::State),
            _ if asker.epoch < volume.epoch => Err(Status::Fenced),
            _ if again => volume.create_again(members),
            _ => Err(Status::State),
        }
    }

    fn dissolve(&mut self, asker: Asker) -> Result<(), Status> {
        let volume = self.volumes.get_mut(&asker.volume).ok_or(Status::NoVolume)?;
        if asker.epoch < volume.epoch {
            return Err(Status::Fenced);
        }
        volume.dissolve();
        self.free_slots(|held| held.volume == asker.volume);
        Ok(())
    }

    fn stored_pages(&self, volume: VolumeId) -> u64 {
        let held = self.slots.iter().filter_map(|slot| slot.content.as_ref()).flat_map(|c| &c.holders);
        held.filter(|held| held.volume == volume).count() as u64
    }

    pub(super) fn statistics(&self) -> NodeStatistics {
        let summary = |(id, volume): (&VolumeId, &Volume)| VolumeSummary {
            volume: *id,
            vm: volume.manifest.vm.clone(),
            state: volume.state,
            committed: volume.committed,
            stored_pages: self.stored_pages(*id),
            copied_pages: self.copied_pages(*id),
            age_s: volume.age_s(),
            parked_as: volume.parking.as_ref().map(|parking| parking.name.clone()),
            owner: volume.owner(),
            mending: Mending::whole(volume.copies),
        };
        let live = self.volumes.iter().filter(|(_, volume)| volume.state != VolumeState::Dissolved);
        NodeStatistics {
            node: self.node.clone(),
            zone: None,
            limit_bytes: self.limit_pages * PAGE_BYTES_U64,
            used_bytes: self.used_pages() * PAGE_BYTES_U64,
            arena_bytes: self.slots.len() as u64 * PAGE_BYTES_U64,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            touched_bytes: self.bytes_in + self.bytes_out,
            leased_slots: 0,
            link: LinkUse::default(),
            connections: 0,
            volumes: live.map(summary).collect(),
            leaving: None,
        }
    }
}
