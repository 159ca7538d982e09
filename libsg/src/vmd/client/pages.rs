//! Pages of a volume on their way to members, in as many copies as are wanted, and back from whoever has one.

use std::sync::atomic::Ordering;

use super::mismatch;
use super::volume::{ClientVolume, elsewhere};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement};
use crate::limits;
use crate::memory::PageSlice;
use crate::page::PageRange;
use crate::vmd::device::Fetched;
use crate::vmd::link::{Reply, Request};
use crate::wire::{Encoding, GetEntry, IndexEntry, Missing, PageEntry};

impl ClientVolume {
    /// Stores entries, each with its slice, at the members in turn: what does not fit at one goes to the
    /// next. Those that no member stored come back as `None`, with the error of the last that had one.
    pub(super) fn store(
        &self,
        entries: &[PageEntry],
        slices: &[PageSlice],
        copies: u8,
    ) -> Result<(Vec<Option<Placement>>, Option<Error>)> {
        let mut turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut placed = vec![None; entries.len()];
        let (mut failed, mut without) = (None, MemberSet::NONE);
        loop {
            let open: Vec<usize> = (0..entries.len()).filter(|at| placed[*at].is_none()).collect();
            let living = self.peers.living();
            let able: Vec<_> = living.iter().copied().filter(|member| !without.contains(*member)).collect();
            // With fewer alive than copies are wanted, as many as there are.
            let wanted = usize::from(copies).min(living.len());
            if open.is_empty() || able.is_empty() || able.len() < wanted {
                break;
            }
            let nth = |n: usize| able[(turn + n) % able.len()];
            let (first, holders) = (nth(0), (0..wanted).map(nth).collect::<MemberSet>());
            let some: Vec<PageEntry> = open.iter().map(|at| entries[*at]).collect();
            let bytes: Vec<PageSlice> = open.iter().map(|at| slices[*at].clone()).collect();
            let holders = if copies > 1 { holders } else { MemberSet::NONE };
            match self.put_at(first, &some, &bytes, holders) {
                Ok((stored, Missing::NONE)) => {
                    if stored.iter().any(Option::is_none) {
                        without = without.with(first);
                    }
                    open.iter().zip(stored).for_each(|(at, place)| placed[*at] = place);
                }
                Ok((stored, missing)) => {
                    // Others are to have it: what there is of it is given back.
                    without = without.or(missing.all());
                    self.take_back(holders, &some, &stored);
                }
                Err(error) if elsewhere(error.kind) => {
                    without = without.with(first);
                    failed = Some(error);
                }
                Err(error) => return Err(error),
            }
            turn += 1;
        }
        if self.peers.living().is_empty() {
            failed = Some(Error::new(ErrorKind::Unreachable, "no intermediary of the volume is left"));
        }
        Ok((placed, failed))
    }

    fn put_at(
        &self,
        member: MemberIndex,
        entries: &[PageEntry],
        slices: &[PageSlice],
        copies: MemberSet,
    ) -> Result<(Vec<Option<Placement>>, Missing)> {
        self.peers.ask(member, Request::Put { entries, slices, copies }, |reply| match reply {
            Reply::Stored { placements, missing }
                if placements.iter().flatten().all(|place| place.member == member) =>
            {
                Ok((placements.to_vec(), missing))
            }
            _ => Err(mismatch()),
        })
    }

    /// Gives back what was stored at some of those that were to hold it. Whoever is gone has given back everything.
    fn take_back(&self, holders: MemberSet, entries: &[PageEntry], stored: &[Option<Placement>]) {
        let stored = entries.iter().zip(stored);
        let gone: Vec<GetEntry> =
            stored.filter_map(|(page, at)| Some(GetEntry { page: page.page, placement: (*at)? })).collect();
        for member in holders.iter().filter(|_| !gone.is_empty()) {
            let _ = self.peers.ask(member, Request::Drop(&gone), |_| Ok(()));
        }
    }

    /// Fetches entries of one member. What cannot be had stays lost.
    pub(super) fn fetch(
        &self,
        member: MemberIndex,
        wanted: &[(usize, GetEntry, Checksum)],
        out: &mut [Fetched],
    ) -> Result<()> {
        for batch in wanted.chunks(limits::BATCH_PAGES) {
            let entries: Vec<GetEntry> = batch.iter().map(|(_, entry, _)| *entry).collect();
            let got = self.peers.ask(member, Request::Get(&entries), |reply| {
                let Reply::Pages { entries, mut bytes } = reply else { return Err(mismatch()) };
                for (entry, (at, _, checksum)) in entries.iter().zip(batch) {
                    let (page, rest) =
                        bytes.split_at_checked(entry.encoded_bytes.into()).ok_or_else(mismatch)?;
                    bytes = rest;
                    if entry.encoding == Encoding::Raw && self.matches(page, *checksum) {
                        out[*at] = Fetched::Bytes(page.into());
                    }
                }
                Ok(())
            });
            match got {
                Err(error) if matches!(error.kind, ErrorKind::Fenced | ErrorKind::Volume) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::warn!(error = error.chain(), "pages cannot be had from an intermediary");
                    return Ok(());
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Looks for copies of what was lost at its first holder, at whoever is left.
    pub(super) fn fetch_copies(&self, entries: &[IndexEntry], out: &mut [Fetched]) -> Result<()> {
        for (at, entry) in entries.iter().enumerate() {
            for member in self.peers.living() {
                if out[at] != Fetched::Lost {
                    break;
                }
                let found = match self.locate_at(member, PageRange::new(entry.page, 1)) {
                    Err(error) if error.kind == ErrorKind::Fenced => return Err(error),
                    found => found.unwrap_or_default(),
                };
                let same = |copy: &&IndexEntry| {
                    (copy.round, copy.checksum) == (entry.round, entry.checksum)
                        && copy.placement != entry.placement
                };
                let copy = found.iter().find(same).and_then(|copy| copy.placement);
                let Some(placement) = copy.filter(|place| place.member == member) else { continue };
                let get = GetEntry { page: entry.page, placement };
                self.fetch(member, &[(at, get, entry.checksum)], out)?;
            }
        }
        Ok(())
    }
}
