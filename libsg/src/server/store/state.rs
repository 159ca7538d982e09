//! The state of a volume's VM, and pieces of its final set.

use super::Store;
use crate::ids::{Epoch, VolumeId};
use crate::server::volumes::StateBlob;
use crate::wire::Status;

impl Store {
    /// Keeps the VM's state; its bytes were taken from the budget, and go back with it.
    pub(in crate::server) fn put_state(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        blob: StateBlob,
    ) -> Result<(), Status> {
        let mut volumes = self.volumes.lock();
        self.is_open()?;
        let replaced = volumes.set_blob(volume, epoch, blob)?;
        drop(volumes);
        if let Some(replaced) = replaced {
            self.budget.give(replaced.bytes.len() as u64);
        }
        Ok(())
    }

    /// Keeps a piece of the final set, in the same way.
    pub(in crate::server) fn put_piece(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        (number, piece): (u32, StateBlob),
    ) -> Result<(), Status> {
        let mut volumes = self.volumes.lock();
        self.is_open()?;
        let replaced = volumes.set_piece(volume, epoch, number, piece)?;
        drop(volumes);
        self.budget.give(replaced.iter().map(|piece| piece.bytes.len() as u64).sum());
        Ok(())
    }

    pub(in crate::server) fn piece(&self, volume: VolumeId, number: u32) -> Result<StateBlob, Status> {
        self.volumes.lock().get(volume)?.pieces.get(number as usize).cloned().ok_or(Status::State)
    }

    pub(in crate::server) fn state(&self, volume: VolumeId) -> Result<StateBlob, Status> {
        self.volumes.lock().get(volume)?.blob.clone().ok_or(Status::State)
    }
}
