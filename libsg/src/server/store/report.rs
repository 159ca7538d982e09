//! What an intermediary says of itself and of what it holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Books, Mended, Store};
use crate::host;
use crate::ids::VolumeId;
use crate::page::PAGE_BYTES_U64;
use crate::server::volumes::Volume;
use crate::wire::Status;
use crate::wire::handover::Leaving;
use crate::wire::link_use::LinkUse;
use crate::wire::message::{NodeStatistics, VolumeInfo, VolumeSummary};

/// What would be lost with an intermediary.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holding {
    /// Which volume, and how many of its pages are here.
    pub summary: VolumeSummary,
    /// Pages that the index here knows of.
    pub indexed_pages: u64,
    /// Whether the VM's state is here.
    pub has_state: bool,
}

impl Holding {
    /// Whether anything is here but the volume's name.
    #[must_use]
    pub const fn matters(&self) -> bool {
        self.summary.stored_pages > 0 || self.indexed_pages > 0 || self.has_state
    }
}

impl Store {
    pub(in crate::server) fn describe(&self, volume: VolumeId) -> Result<VolumeInfo, Status> {
        let volumes = self.volumes.lock();
        if let Some(gone) = volumes.dissolved(volume) {
            return Ok(info(volume, gone, (0, 0), 0, Mended::default()));
        }
        let books = Arc::clone(&volumes.get(volume)?.payload);
        drop(volumes);
        let indexed_pages = books.index.lock().pages();
        let copied_pages = books.copies.lock().copied();
        let mended = *books.mended.lock();
        let volumes = self.volumes.lock();
        let stored_pages = self.slots.lock().stored_pages_of(volume);
        Ok(info(volume, volumes.get(volume)?, (stored_pages, copied_pages), indexed_pages, mended))
    }

    /// What would be lost if this server went now.
    pub(in crate::server) fn losses(&self) -> Vec<Holding> {
        let mut holdings = self.holdings();
        let handed = self.handed.lock();
        holdings.retain(|holding| {
            let elsewhere = handed.get(&holding.summary.volume).is_some_and(|handed| handed.all);
            holding.matters() && !elsewhere
        });
        holdings
    }

    /// What is here.
    fn holdings(&self) -> Vec<Holding> {
        let volumes = self.volumes.lock();
        let found: Vec<_> = volumes
            .iter()
            .map(|(id, volume)| {
                let stored_pages = self.slots.lock().stored_pages_of(id);
                let summary = VolumeSummary {
                    volume: id,
                    vm: volume.manifest.vm.clone(),
                    state: volume.state,
                    committed: volume.committed,
                    stored_pages,
                    copied_pages: 0,
                    age_s: host::elapsed(volume.created).as_secs(),
                    parked_as: volume.parking.as_ref().map(|parking| parking.name.clone()),
                    owner: volume.claim.as_ref().map(|claim| claim.by.clone()),
                    mending: volume.payload.mended.lock().of(volume.copies),
                };
                (summary, volume.blob.is_some(), Arc::clone(&volume.payload))
            })
            .collect();
        drop(volumes);
        let holding = |(summary, has_state, books): (VolumeSummary, _, Arc<Books>)| Holding {
            indexed_pages: books.index.lock().pages(),
            summary: VolumeSummary { copied_pages: books.copies.lock().copied(), ..summary },
            has_state,
        };
        found.into_iter().map(holding).collect()
    }

    /// So many bytes of pages pass a processor here: into memory or out of it, or to be hashed.
    pub(in crate::server) fn touch(&self, bytes: usize) {
        self.touched_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(in crate::server) fn statistics(&self, connections: u32) -> NodeStatistics {
        let volumes: Vec<_> = self.holdings().into_iter().map(|holding| holding.summary).collect();
        let leaving = self.is_leaving().then(|| self.how_far(&volumes));
        let leased_slots = self.leased_slots();
        let slots = self.slots.lock();
        NodeStatistics {
            node: self.node.clone(),
            zone: self.zone.clone(),
            limit_bytes: self.limit_bytes,
            used_bytes: slots.stored_pages() * PAGE_BYTES_U64,
            arena_bytes: slots.arena_bytes(),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            touched_bytes: self.touched_bytes.load(Ordering::Relaxed),
            leased_slots,
            link: LinkUse::default(),
            connections,
            volumes,
            leaving,
        }
    }

    /// How far it is with handing over.
    fn how_far(&self, volumes: &[VolumeSummary]) -> Leaving {
        let handed = self.handed.lock();
        let left =
            |of: &VolumeSummary| handed.get(&of.volume).map_or(of.stored_pages, |handed| handed.left_pages);
        Leaving {
            handed_pages: handed.values().map(|handed| handed.pages).sum(),
            left_pages: volumes.iter().map(left).sum(),
        }
    }
}

fn info<P>(
    id: VolumeId,
    volume: &Volume<P>,
    (stored_pages, copied_pages): (u64, u64),
    indexed_pages: u64,
    mended: Mended,
) -> VolumeInfo {
    VolumeInfo {
        volume: id,
        manifest: volume.manifest.clone(),
        members: volume.members.clone(),
        epoch: volume.epoch,
        state: volume.state,
        committed: volume.committed,
        has_state: volume.blob.is_some(),
        stored_pages,
        copied_pages,
        indexed_pages,
        age_s: host::elapsed(volume.created).as_secs(),
        parking: volume.parking.clone(),
        owner: volume.claim.as_ref().map(|claim| claim.by.clone()),
        mending: mended.of(volume.copies),
    }
}
