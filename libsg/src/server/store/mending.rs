//! What is to be known of volumes whose pages lie at several members, to make copies again that went with one.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{COPIES_BLOCK_BYTES, Store};
use crate::ids::{Epoch, MemberIndex, Placement, VolumeId};
use crate::server::copies::Here;
use crate::server::slots::Held;
use crate::wire::Status;
use crate::wire::mending::Mending;
use crate::wire::message::Member;

/// With nothing to look after, whoever does that waits to be told, or for so long.
const IDLE: Duration = Duration::from_secs(3600);

/// A volume whose copies are looked after.
pub(in crate::server) struct Tended {
    pub volume: VolumeId,
    pub members: Vec<Member>,
    /// At so many members each page is to lie.
    pub copies: u8,
    pub me: MemberIndex,
}

/// How a volume's copies were when they were last looked at.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) struct Mended {
    /// Members that were away.
    pub away_members: u16,
    /// Copies of pages here that were missing elsewhere; `None` while they are made.
    pub missing_copies: Option<u64>,
}

impl Default for Mended {
    fn default() -> Self {
        Self { away_members: 0, missing_copies: Some(0) }
    }
}

impl Mended {
    pub(super) const fn of(self, copies: u8) -> Mending {
        Mending { copies, away_members: self.away_members, missing_copies: self.missing_copies }
    }
}

impl Store {
    /// Each page of a volume is to lie at so many members.
    pub(in crate::server) fn set_copies(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        copies: u8,
    ) -> Result<(), Status> {
        self.volumes.lock().set_copies(volume, epoch, copies)?;
        if copies > 1 {
            self.tend();
        }
        Ok(())
    }

    /// There may be a volume whose copies are to be looked after.
    pub(super) fn tend(&self) {
        *self.has_copies.lock() = true;
        self.tends.notify_all();
    }

    /// Waits until it is time to look after copies again, or the server closes.
    pub(in crate::server) fn wait_to_tend(&self, pause: Duration) {
        let mut has_copies = self.has_copies.lock();
        if !self.is_closing() {
            let pause = if *has_copies { pause } else { IDLE };
            self.tends.wait_for(&mut has_copies, pause);
        }
    }

    /// The volumes that nobody writes any more and whose VM is in them, with several copies. An intermediary that leaves has
    /// none: it hands over what it has.
    pub(in crate::server) fn tended(&self) -> Vec<Tended> {
        // First: whoever comes meanwhile says so anew.
        *self.has_copies.lock() = false;
        let volumes = self.volumes.lock();
        let with_copies = || volumes.iter().filter(|(_, known)| known.copies > 1);
        let any = with_copies().next().is_some();
        let is_left = |books: &super::Books| books.writers.load(Ordering::Relaxed) == 0;
        let tended = with_copies()
            .filter(|(_, known)| known.committed && is_left(&known.payload) && !self.is_leaving())
            .filter_map(|(volume, known)| {
                let me = self.me(&known.members)?;
                Some(Tended { volume, members: known.members.clone(), copies: known.copies, me })
            });
        let tended = tended.collect();
        drop(volumes);
        if any {
            *self.has_copies.lock() = true;
        }
        tended
    }

    /// Whether whoever looks after copies of a volume is to go on.
    pub(in crate::server) fn is_tended(&self, volume: VolumeId) -> bool {
        let is_here = self.volumes.lock().get(volume).is_ok();
        is_here && !self.is_leaving() && !self.is_closing()
    }

    /// How a volume's copies are.
    pub(in crate::server) fn set_mended(&self, volume: VolumeId, mended: Mended) {
        if let Some(books) = self.books(volume) {
            *books.mended.lock() = mended;
        }
    }

    /// Pages that lie here are noted, so that others who look for copies find them: those that were stored when nobody else
    /// could have one were not.
    pub(in crate::server) fn note_own(&self, volume: VolumeId, me: MemberIndex, pages: &[Held]) {
        let Some(books) = self.books(volume) else { return };
        let mut copies = books.copies.lock();
        let slots = self.slots.lock();
        for Held { page, slot, generation, .. } in pages {
            let is_here = slots.read(volume, *page, *slot, *generation).is_some();
            if !is_here || copies.of(*page, *slot, *generation).is_some() {
                continue;
            }
            let here = Here { slot: *slot, generation: *generation, is_copy: false };
            let of = Placement { member: me, slot: *slot, generation: *generation };
            // Where the books are full others may make one copy more than there need be.
            let _ = copies.put(*page, here, of, &mut || self.budget.take(COPIES_BLOCK_BYTES as u64));
        }
    }
}
