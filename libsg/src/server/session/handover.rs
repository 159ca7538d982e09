//! What comes from an intermediary that leaves.

use super::Session;
use crate::error::Result;
use crate::ids::{Epoch, VolumeId};
use crate::server::store::Noted;
use crate::wire::entry::{decode_table, encode_table};
use crate::wire::handover::Inheritance;
use crate::wire::run::{decode_runs, encode_runs};
use crate::wire::{Header, Kind, Status};

impl Session<'_> {
    /// Stores pages in the place of who leaves: all of a batch, or none. Checksums are not compared, as with copies.
    pub(super) fn take_pages(&mut self, header: &Header) -> Result<()> {
        let status = match header.kind {
            Kind::HandCopies => self.take_batch(header, |of| Noted::HandedCopies(of))?,
            _ => self.take_batch(header, |_| Noted::Handed)?,
        };
        let mut answer = Vec::new();
        let runs = match status {
            Status::Ok => encode_runs(self.buffers.placements.iter().copied(), &mut answer),
            _ => 0,
        };
        self.reply(header, Kind::HandReply, status, runs as u16, &answer)
    }

    pub(super) fn take_index(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        decode_runs(&self.buffers.body, header.count.into(), &mut self.buffers.index)?;
        let taken = self.store.take_index(header.volume, header.epoch, &self.buffers.index);
        self.reply(header, Kind::HandIndexReply, super::done(taken), 0, &[])
    }

    pub(super) fn moved(&mut self, header: &Header) -> Result<()> {
        self.read_body(header)?;
        let (mut moved, mut unknown) = (Vec::new(), Vec::new());
        decode_table(&self.buffers.body, header.count.into(), &mut moved)?;
        let status = super::done(self.store.moved(header.volume, header.epoch, &moved, &mut unknown));
        let mut answer = Vec::new();
        if status == Status::Ok {
            encode_table(unknown.iter().map(|moved| moved.page), &mut answer);
        }
        let count = answer.len() / size_of::<u32>();
        self.reply(header, Kind::MovedReply, status, count as u16, &answer)
    }

    pub(super) fn inherit(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        said: &Inheritance,
    ) -> Result<(), Status> {
        let Some(blob) = said.blob else {
            return self.store.inherit(volume, epoch, said, None);
        };
        self.keep_blob(blob, |store, blob| store.inherit(volume, epoch, said, Some(blob)))
    }
}
