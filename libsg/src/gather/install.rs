//! From received bytes into memory: check, claim, install in runs, settle. One call a batch; two
//! short locks; nothing is allocated once the buffers have grown to a batch.

use super::shared::Shared;
use super::tracker::{Claim, Path, Read, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Checksum, Round};
use crate::limits::BATCH_PAGES_MAX;
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::wire::{Encoding, IndexEntry, Malformed, PageEntry};

#[derive(Clone, Copy, Debug)]
struct Piece {
    page: PageIndex,
    round: Round,
    offset: usize,
}

/// The buffers of one thread that installs.
#[derive(Debug, Default)]
pub(crate) struct Installer {
    good: Vec<Piece>,
    runs: Vec<(PageRange, usize)>,
    zeros: Vec<PageRange>,
    unit: Vec<u8>,
    /// After [`Self::pages`]: pages that were not installed; after [`Self::reads`]: pages whose copy
    /// is lost.
    pub bad: Vec<PageIndex>,
    /// After [`Self::pages`]: pages that the sender has no more.
    pub gone: Vec<PageIndex>,
}

impl Installer {
    /// Installs a frame of the source. `entries` and `bytes` were decoded and fit together.
    pub fn pages(
        &mut self,
        shared: &Shared,
        entries: &[PageEntry],
        bytes: &[u8],
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.good.clear();
        self.bad.clear();
        self.gone.clear();
        let mut offset = 0;
        let mut zeros = false;
        for entry in entries {
            match entry.encoding {
                Encoding::Raw => {
                    let page = bytes.get(offset..offset + PAGE_BYTES).ok_or(Malformed::Truncated)?;
                    if Checksum::of(page) == entry.checksum {
                        self.good.push(Piece { page: entry.page, round: entry.round, offset });
                    } else {
                        self.bad.push(entry.page);
                    }
                }
                Encoding::Zero => zeros = true,
                Encoding::Gone => self.gone.push(entry.page),
            }
            offset += usize::from(entry.encoded_bytes);
        }
        if zeros {
            let zeros = || {
                let zero =
                    |entry: &PageEntry| IndexEntry::zero(entry.page, u32::from(entry.run_pages), entry.round);
                entries.iter().filter(|entry| entry.encoding == Encoding::Zero).map(zero)
            };
            if shared.waits_for_all() {
                zeros().try_for_each(|zero| shared.zero_over(&zero))?;
            }
            let mut wanted = false;
            let mut tracker = shared.tracker.lock();
            for zero in zeros() {
                wanted |= tracker.announce(&zero, Word::Source)?;
            }
            drop(tracker);
            if wanted {
                shared.look_again();
            }
            if shared.outlived {
                self.place_zeros(shared, zeros().map(|zero| zero.range()), between)?;
            }
        }
        self.place(shared, bytes, Path::Direct, between)
    }

    /// Installs pages that are known to be zero: what the source is told of is in place.
    fn place_zeros(
        &mut self,
        shared: &Shared,
        zeros: impl Iterator<Item = PageRange>,
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.zeros.clear();
        let mut tracker = shared.tracker.lock();
        for range in zeros {
            let mut page = range.first;
            while page.0 < range.first.0 + range.pages {
                let Some(unit) = tracker.unit(page) else { break };
                if tracker.claim_zero(unit.first) == Claim::Held {
                    self.bad.extend(tracker.is_installing(page).then_some(page));
                } else if let Some(run) = self.zeros.last_mut().filter(|run| {
                    run.first.0 + run.pages == unit.first.0
                        && (run.pages + unit.pages) as usize <= BATCH_PAGES_MAX
                        && tracker.same_region(run.first, unit.first)
                }) {
                    run.pages += unit.pages;
                } else {
                    self.zeros.push(unit);
                }
                page = PageIndex(unit.first.0 + unit.pages);
            }
        }
        drop(tracker);
        for run in &self.zeros {
            shared.install(*run, None, between)?;
            shared.tracker.lock().installed(*run, Path::Zero, host::now());
        }
        Ok(())
    }

    /// Installs what an intermediary answered to `reads`.
    pub fn reads(
        &mut self,
        shared: &Shared,
        reads: &[Read],
        entries: &[PageEntry],
        bytes: &[u8],
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.good.clear();
        self.bad.clear();
        if entries.len() != reads.len() {
            return Err(Error::new(ErrorKind::Protocol, "an answer with other pages than were asked for"));
        }
        let mut offset = 0;
        for (read, entry) in reads.iter().zip(entries) {
            let page = match entry.encoding {
                Encoding::Raw => bytes.get(offset..offset + PAGE_BYTES),
                _ => None,
            };
            let is_right = page.is_some_and(|page| shared.matches(page, read.checksum));
            #[cfg(feature = "simulation")]
            let is_right = is_right || (page.is_some() && host::has_bug(host::Bug::ChecksumIgnored));
            if entry.page == read.page && is_right {
                self.good.push(Piece { page: read.page, round: read.round, offset });
            } else {
                self.bad.push(read.page);
            }
            offset += usize::from(entry.encoded_bytes);
        }
        if !self.bad.is_empty() {
            let mut tracker = shared.tracker.lock();
            let bad = &mut self.bad;
            let mut lost = reads.iter().filter(|read| bad.contains(&read.page));
            let known: Vec<PageIndex> =
                lost.by_ref().filter(|r| tracker.copy_lost(r.page, r.placement)).map(|r| r.page).collect();
            *bad = known;
            drop(tracker);
            // In a round, a copy that was torn or given back meanwhile is replaced by the next, or tried again.
            let matters = !shared.replaces() || shared.waits_since().is_some();
            if let (Some(read), true) = (reads.first(), matters && !self.bad.is_empty()) {
                shared.copy_was_lost(&self.bad, read.placement.member);
            }
        }
        self.place(shared, bytes, Path::Staged, between)
    }

    fn place(
        &mut self,
        shared: &Shared,
        bytes: &[u8],
        path: Path,
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.runs.clear();
        let mut tracker = shared.tracker.lock();
        // Looked at before anything is claimed: what is claimed is installed.
        if self.good.iter().any(|piece| tracker.unit(piece.page).is_none()) {
            return Err(Error::new(ErrorKind::Protocol, "a page outside of the volume"));
        }
        let mut at = 0;
        while at < self.good.len() {
            let piece = self.good[at];
            let Some(unit) = tracker.unit(piece.page) else { break };
            if unit.pages > 1 {
                let positions = unit.positions();
                let of_unit = |piece: &&Piece| positions.contains(&piece.page.as_usize());
                let count = self.good[at..].iter().take_while(of_unit).count();
                drop(tracker);
                self.place_unit(shared, unit, at..at + count, bytes, path, between)?;
                tracker = shared.tracker.lock();
                at += count;
                continue;
            }
            let round = piece.round;
            #[cfg(feature = "simulation")]
            let first_wins = shared.replaces() && host::has_bug(host::Bug::OlderRoundWins);
            #[cfg(feature = "simulation")]
            let round = if first_wins { Round(u16::MAX) } else { round };
            let claim = tracker.claim(piece.page, round);
            #[cfg(feature = "simulation")]
            let claim = if host::has_bug(host::Bug::InstalledTwice) { Claim::Install(unit) } else { claim };
            if claim != Claim::Held {
                match self.runs.last_mut() {
                    Some((run, offset))
                        if run.first.0 + run.pages == piece.page.0
                            && *offset + run.pages as usize * PAGE_BYTES == piece.offset
                            && (run.pages as usize) < BATCH_PAGES_MAX
                            && tracker.same_region(run.first, piece.page) =>
                    {
                        run.pages += 1;
                    }
                    _ => self.runs.push((unit, piece.offset)),
                }
            } else if tracker.is_stopped() || shared.outlived && tracker.is_installing(piece.page) {
                // It may not be held by anybody, or not yet: it has to come again.
                self.bad.push(piece.page);
            }
            at += 1;
        }
        drop(tracker);
        for (run, offset) in &self.runs {
            let bytes = bytes.get(*offset..*offset + run.pages as usize * PAGE_BYTES);
            shared.install(*run, Some(bytes.ok_or(Malformed::Truncated)?), between)?;
        }
        let now = host::now();
        let mut tracker = shared.tracker.lock();
        for (run, _) in &self.runs {
            tracker.installed(*run, path, now);
        }
        drop(tracker);
        shared.progressed();
        Ok(())
    }

    /// Installs a unit of many pages, of which some may be zero; all others must be among `pieces`.
    fn place_unit(
        &mut self,
        shared: &Shared,
        unit: PageRange,
        pieces: std::ops::Range<usize>,
        bytes: &[u8],
        path: Path,
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let pieces = &self.good[pieces];
        let round = pieces.iter().map(|piece| piece.round).min().unwrap_or_default();
        {
            let mut tracker = shared.tracker.lock();
            let came = |page: PageIndex| pieces.iter().any(|piece| piece.page == page);
            let complete = pieces.len() == unit.pages as usize
                || unit.iter().all(|page| came(page) || tracker.is_zero(page, round));
            if !complete && !tracker.is_held(unit.first) {
                tracing::warn!(unit = unit.first.0, "part of an install unit came: it is not installed");
                self.bad.extend(pieces.iter().map(|piece| piece.page));
                return Ok(());
            }
            if tracker.claim(unit.first, round) == Claim::Held {
                if tracker.is_stopped() {
                    self.bad.extend(pieces.iter().map(|piece| piece.page));
                }
                return Ok(());
            }
        }
        let unit_bytes = unit.pages as usize * PAGE_BYTES;
        if let Some(whole) = in_one_piece(unit, pieces).and_then(|at| bytes.get(at..at + unit_bytes)) {
            shared.install(unit, Some(whole), between)?;
        } else {
            self.unit.resize(unit_bytes, 0);
            if pieces.len() < unit.pages as usize {
                self.unit.fill(0);
            }
            for piece in pieces {
                let to = (piece.page.0 - unit.first.0) as usize * PAGE_BYTES;
                let from = bytes.get(piece.offset..piece.offset + PAGE_BYTES).ok_or(Malformed::Truncated)?;
                self.unit[to..to + PAGE_BYTES].copy_from_slice(from);
            }
            shared.install(unit, Some(&self.unit), between)?;
        }
        shared.tracker.lock().installed(unit, path, host::now());
        Ok(())
    }
}

/// Where the bytes of a unit begin, if all of its pages lie there in order.
fn in_one_piece(unit: PageRange, pieces: &[Piece]) -> Option<usize> {
    let start = pieces.first()?.offset;
    let in_order = unit
        .iter()
        .zip(pieces)
        .enumerate()
        .all(|(at, (page, piece))| piece.page == page && piece.offset == start + at * PAGE_BYTES);
    (in_order && pieces.len() == unit.pages as usize).then_some(start)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_a_whole_unit_in_order_is_in_one_piece() {
        let unit = PageRange::new(PageIndex(8), 4);
        let piece = |page: u32, at: usize| Piece {
            page: PageIndex(page),
            round: Round(0),
            offset: 64 + at * PAGE_BYTES,
        };
        let of = |places: &[(u32, usize)]| {
            in_one_piece(unit, &places.iter().map(|(page, at)| piece(*page, *at)).collect::<Vec<_>>())
        };
        assert_eq!(of(&[(8, 0), (9, 1), (10, 2), (11, 3)]), Some(64));
        assert_eq!(of(&[(8, 0), (9, 1), (10, 2)]), None, "one is zero");
        assert_eq!(of(&[(8, 0), (10, 1), (9, 2), (11, 3)]), None, "in another order");
        assert_eq!(of(&[(8, 0), (9, 1), (10, 3), (11, 4)]), None, "something between");
        assert_eq!(of(&[(8, 0), (9, 1), (9, 2), (11, 3)]), None, "one comes twice");
        assert_eq!(of(&[]), None);
    }
}
