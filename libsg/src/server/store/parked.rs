//! Parked volumes, and who claims them.

use std::sync::Arc;

use super::{HandOver, Store};
use crate::host;
use crate::ids::{Epoch, VolumeId};
use crate::wire::Status;
use crate::wire::parking::{Claim, Parking, Verdict};

impl Store {
    /// A new owner, or writer. Under the index's lock: what the older one has begun is over before.
    pub(in crate::server) fn hand_over(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        to: HandOver,
    ) -> Result<(), Status> {
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let index = books.index.lock();
        to(&mut self.volumes.lock(), volume, epoch)?;
        drop(index);
        self.withdraw(volume);
        tracing::info!(%volume, epoch = epoch.0, "a new owner");
        Ok(())
    }

    pub(in crate::server) fn park(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        parking: Parking,
    ) -> Result<(), Status> {
        let Parking { name, keeper, .. } = parking.clone();
        self.volumes.lock().park(volume, epoch, parking)?;
        tracing::info!(%volume, name, %keeper, "parked: it waits to be claimed");
        Ok(())
    }

    /// What the replaced owner has under way is either done before it or refused after it.
    pub(in crate::server) fn claim_parked(&self, volume: VolumeId, claim: &Claim) -> Result<Verdict, Status> {
        let books = Arc::clone(&self.volumes.lock().get(volume)?.payload);
        let index = books.index.lock();
        let verdict = self.volumes.lock().claim_parked(volume, claim, host::now())?;
        drop(index);
        self.withdraw(volume);
        tracing::info!(%volume, by = %claim.by, epoch = claim.epoch.0, force = claim.force, ?verdict, "claimed");
        Ok(verdict)
    }

    pub(in crate::server) fn run(&self, volume: VolumeId, epoch: Epoch) -> Result<(), Status> {
        self.volumes.lock().run(volume, epoch)?;
        tracing::info!(%volume, epoch = epoch.0, "its VM runs");
        Ok(())
    }
}
