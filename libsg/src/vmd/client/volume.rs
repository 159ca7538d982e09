//! A volume as one client sees it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::peers::{Peers, control};
use super::{meet, mismatch};
use crate::content::ContentHasher;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Checksum, Epoch, MemberIndex, Placement, Round, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::memory::PageSlice;
use crate::page::{PageIndex, PageRange};
use crate::vmd::device::{Fetched, PagePut, PageReference, Shared, Volume};
use crate::vmd::link::{Class, Link, Reply, Request};
use crate::wire::message::{Member, VmdReply, VmdRequest, VolumeInfo};
use crate::wire::placement::{index_owners, index_range, owner_runs};
use crate::wire::{GetEntry, IndexEntry, PageEntry, ReferEntry, Referral};

pub(super) struct ClientVolume {
    pub(super) peers: Peers,
    manifest: Manifest,
    hasher: Option<ContentHasher>,
    writer: bool,
    /// Whose turn it is to store.
    pub(super) turn: AtomicUsize,
    /// The most copies that were asked for.
    copies: AtomicU8,
}

impl ClientVolume {
    pub const fn new(peers: Peers, manifest: Manifest, hasher: Option<ContentHasher>, writer: bool) -> Self {
        Self { peers, manifest, hasher, writer, turn: AtomicUsize::new(0), copies: AtomicU8::new(1) }
    }

    /// Takes for dead who is not among these.
    pub fn keep_only(&self, members: &[Member]) {
        self.peers.keep_only(members);
    }

    fn check_writer(&self) -> Result<()> {
        if self.writer {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Input, "the volume was opened for reading only"))
    }

    /// Puts entries of one owner into the index, at the first in rotation that takes them.
    fn index_at_owner(&self, entries: &[IndexEntry]) -> Result<()> {
        let Some(first) = entries.first() else { return Ok(()) };
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary of the volume is left");
        let alive = self.peers.alive();
        for member in index_owners(first.page, alive.len(), |member| alive[member.as_usize()]) {
            match self.peers.ask(member, Request::PutIndex(entries), |_| Ok(())) {
                Ok(()) => return Ok(()),
                Err(error) if elsewhere(error.kind) => failed = error,
                Err(error) => return Err(error),
            }
        }
        Err(failed)
    }

    /// Everything that one member knows of a range.
    pub(super) fn locate_at(&self, member: MemberIndex, range: PageRange) -> Result<Vec<IndexEntry>> {
        let mut found: Vec<IndexEntry> = Vec::new();
        let mut rest = range;
        while rest.pages > 0 {
            let before = found.len();
            self.peers.ask(member, Request::Locate(rest), |reply| match reply {
                Reply::Located(entries) => {
                    found.extend_from_slice(entries);
                    Ok(())
                }
                _ => Err(mismatch()),
            })?;
            let Some(last) = found.last() else { break };
            if found.len() - before < limits::INDEX_ENTRIES_MAX {
                break;
            }
            let next = last.page.0 + last.run_pages;
            rest = PageRange::new(PageIndex(next), range.first.0 + range.pages - next);
        }
        Ok(found)
    }

    /// What these members know, all together.
    fn locate_among(&self, members: &[MemberIndex], range: PageRange) -> Result<Vec<IndexEntry>> {
        let mut asked = 0;
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary of the volume is left");
        let mut best: BTreeMap<u32, IndexEntry> = BTreeMap::new();
        for &member in members {
            let found = match self.locate_at(member, range) {
                Ok(found) => found,
                Err(error) if matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Timeout) => {
                    failed = error;
                    continue;
                }
                Err(error) => return Err(error),
            };
            asked += 1;
            let alive = self.peers.alive();
            for entry in found {
                merge(&mut best, entry, &alive);
            }
        }
        if asked == 0 { Err(failed) } else { Ok(join(best)) }
    }

    /// Whether bytes are the page of this checksum, or were referred to by its seal.
    pub(super) fn matches(&self, bytes: &[u8], checksum: Checksum) -> bool {
        match &self.hasher {
            Some(hasher) => hasher.matches(bytes, checksum),
            None => Checksum::of(bytes) == checksum,
        }
    }

    /// Offers pages by their hashes to each member in turn, until one has them. What nobody has, and no other is about
    /// to send, is to be put.
    fn refer(&self, pages: &[PageReference]) -> Result<Vec<Referral>> {
        let mut referred = vec![Referral::Send; pages.len()];
        for member in self.peers.living() {
            let open: Vec<usize> =
                (0..pages.len()).filter(|at| !matches!(referred[*at], Referral::Have(_))).collect();
            if open.is_empty() {
                break;
            }
            let offer = |at: &usize| {
                let PageReference { page, round, hash, .. } = pages[*at];
                ReferEntry { page, round, hash }
            };
            let offers: Vec<ReferEntry> = open.iter().map(offer).collect();
            let answers = self.peers.ask(member, Request::Refer(&offers), |reply| match reply {
                Reply::Referred(referrals) => Ok(referrals.to_vec()),
                _ => Err(mismatch()),
            });
            match answers {
                Ok(answers) => {
                    for (at, answer) in open.into_iter().zip(answers) {
                        match answer {
                            Referral::Have(place) if place.member != member => return Err(mismatch()),
                            // All are asked.
                            Referral::Send | Referral::At(_) => {}
                            answer => referred[at] = answer,
                        }
                    }
                }
                Err(error) if elsewhere(error.kind) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(referred)
    }

    /// The entry of `placements` for each page, which are then put into the index.
    fn index_stored(
        &self,
        pages: impl Iterator<Item = (PageIndex, Round, Checksum)>,
        placements: Vec<Option<Placement>>,
    ) -> Result<Vec<Option<IndexEntry>>> {
        let stored: Vec<Option<IndexEntry>> = pages
            .zip(placements)
            .map(|((page, round, checksum), place)| Some(IndexEntry::at(page, round, place?, checksum)))
            .collect();
        let entries: Vec<IndexEntry> = stored.iter().flatten().copied().collect();
        self.index(&entries)?;
        Ok(stored)
    }
}

/// Whether another intermediary may do what this one did not.
pub(super) const fn elsewhere(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unreachable | ErrorKind::Timeout | ErrorKind::Full)
}

impl Volume for ClientVolume {
    fn id(&self) -> VolumeId {
        self.peers.volume()
    }

    fn epoch(&self) -> Epoch {
        self.peers.epoch()
    }

    fn members(&self) -> Vec<Member> {
        self.peers.members()
    }

    fn alive(&self) -> Vec<bool> {
        self.peers.alive()
    }

    fn grow(&self, intermediaries: &[SocketAddr]) -> Result<()> {
        self.check_writer()?;
        let present = self.peers.members();
        let mut new = meet(&self.peers, intermediaries)?;
        new.retain(|member| present.iter().all(|known| known.node != member.node));
        let members: Vec<Member> = present.iter().chain(&new).cloned().collect();
        let create = VmdRequest::Create { manifest: self.manifest.clone(), members: members.clone() };
        let added = new.len();
        self.peers.extend(new)?;
        for at in present.len()..present.len() + added {
            control(&self.peers, MemberIndex(at as u16), &create, |reply| {
                matches!(reply, VmdReply::Done).then_some(())
            })?;
        }
        if !present.is_empty() && added > 0 {
            self.peers.control_all(&VmdRequest::Members(members))?;
        }
        Ok(())
    }

    fn link(&self, member: MemberIndex, class: Class) -> Result<Box<dyn Link>> {
        self.peers.link(member, class)
    }

    fn put(&self, pages: &[PagePut], copies: u8) -> Result<Vec<IndexEntry>> {
        self.check_writer()?;
        self.copies.fetch_max(copies, Ordering::Relaxed);
        let mut stored = Vec::with_capacity(pages.len());
        for batch in pages.chunks(limits::BATCH_PAGES) {
            let entries: Vec<PageEntry> =
                batch.iter().map(|put| PageEntry::raw(put.page, put.round, put.checksum)).collect();
            let slices: Vec<PageSlice> = batch.iter().map(|put| put.bytes.clone()).collect();
            let (placements, failed) = self.store(&entries, &slices, copies)?;
            if placements.iter().any(Option::is_none) {
                let full = || Error::new(ErrorKind::Full, "no intermediary of the volume has room left");
                return Err(failed.filter(|_| self.peers.living().is_empty()).unwrap_or_else(full));
            }
            let about = batch.iter().map(|put| (put.page, put.round, put.checksum));
            let indexed = self.index_stored(about, placements)?;
            stored.extend(indexed.into_iter().flatten());
        }
        Ok(stored)
    }

    fn put_by_reference(&self, pages: &[PageReference]) -> Result<Vec<Shared>> {
        self.check_writer()?;
        let mut stored = Vec::with_capacity(pages.len());
        for batch in pages.chunks(limits::BATCH_PAGES) {
            let referred = self.refer(batch)?;
            let place = |referral: &Referral| match referral {
                Referral::Have(placement) => Some(*placement),
                Referral::Send | Referral::Pending | Referral::At(_) => None,
            };
            let about = batch.iter().map(|put| (put.page, put.round, put.hash.seal(put.checksum)));
            let indexed = self.index_stored(about, referred.iter().map(place).collect())?;
            stored.extend(indexed.into_iter().zip(referred).map(|(entry, referral)| {
                match (entry, referral) {
                    (Some(entry), _) => Shared::Have(entry),
                    (None, Referral::Pending) => Shared::Pending,
                    (None, _) => Shared::Send,
                }
            }));
        }
        Ok(stored)
    }

    fn index(&self, entries: &[IndexEntry]) -> Result<()> {
        self.check_writer()?;
        // By the first page of the owner's run, in the order given: what comes later holds.
        let mut runs: BTreeMap<u32, Vec<IndexEntry>> = BTreeMap::new();
        for entry in entries {
            for piece in owner_runs(entry.range()) {
                let run = runs.entry(index_range(piece.first)).or_default();
                run.push(IndexEntry { page: piece.first, run_pages: piece.pages, ..*entry });
            }
        }
        runs.values()
            .flat_map(|run| run.chunks(limits::INDEX_ENTRIES_MAX))
            .try_for_each(|run| self.index_at_owner(run))
    }

    fn get(&self, entries: &[IndexEntry]) -> Result<Vec<Fetched>> {
        let mut out = vec![Fetched::Lost; entries.len()];
        let mut by_member: BTreeMap<MemberIndex, Vec<(usize, GetEntry, Checksum)>> = BTreeMap::new();
        for (at, entry) in entries.iter().enumerate() {
            match entry.placement {
                None => out[at] = Fetched::Zero,
                Some(placement) => by_member.entry(placement.member).or_default().push((
                    at,
                    GetEntry { page: entry.page, placement },
                    entry.checksum,
                )),
            }
        }
        for (member, wanted) in by_member {
            self.fetch(member, &wanted, &mut out)?;
        }
        self.fetch_copies(entries, &mut out)?;
        Ok(out)
    }

    fn locate(&self, range: PageRange) -> Result<Vec<IndexEntry>> {
        loop {
            let living = self.peers.living();
            let found = self.locate_among(&living, range);
            // Who dies while it is asked was taken for a holder by those asked before: copies elsewhere were passed over.
            if self.peers.living().len() == living.len() {
                return found;
            }
        }
    }

    fn scan(&self, visit: &mut dyn FnMut(&IndexEntry) -> Result<()>) -> Result<()> {
        // So many pages at a time that what is merged stays small.
        let step = (limits::INDEX_ENTRIES_MAX * 16) as u32;
        let pages = self.manifest.pages();
        let mut first = 0;
        while first < pages {
            let range = PageRange::new(PageIndex(first), step.min(pages - first));
            self.locate(range)?.iter().try_for_each(&mut *visit)?;
            first += range.pages;
        }
        Ok(())
    }

    fn discard(&self, range: PageRange, below: Round) -> Result<()> {
        self.check_writer()?;
        self.peers.ask_all(Request::Discard { range, below }).map(|_| ())
    }

    fn drop_slots(&self, entries: &[GetEntry]) -> Result<()> {
        self.check_writer()?;
        // Each member may have copies of what lies at another.
        for member in self.peers.living() {
            for batch in entries.chunks(limits::BATCH_PAGES_MAX) {
                match self.peers.ask(member, Request::Drop(batch), |_| Ok(())) {
                    // Whoever is gone has given back everything.
                    Err(error) if !elsewhere(error.kind) => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn put_state(&self, state: &[u8]) -> Result<usize> {
        self.check_writer()?;
        self.peers.ask_all(Request::PutState(state))
    }

    fn get_state(&self) -> Result<Vec<u8>> {
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary of the volume is left");
        for member in self.peers.living() {
            match self.peers.ask(member, Request::GetState, |reply| match reply {
                Reply::State(state) => Ok(state),
                _ => Err(mismatch()),
            }) {
                Ok(state) => return Ok(state),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn commit(&self) -> Result<usize> {
        self.check_writer()?;
        let copies = self.copies.load(Ordering::Relaxed);
        if copies > 1 {
            self.peers.control_all(&VmdRequest::Copies(copies))?;
        }
        self.peers.control_all(&VmdRequest::Commit)
    }

    fn seal(&self) -> Result<usize> {
        self.check_writer()?;
        self.peers.control_all(&VmdRequest::Seal)
    }

    fn claim(&self, epoch: Epoch) -> Result<usize> {
        let claimed = self.peers.control_all(&VmdRequest::Claim { epoch })?;
        self.peers.set_epoch(epoch);
        Ok(claimed)
    }

    fn succeed(&self, epoch: Epoch) -> Result<usize> {
        self.check_writer()?;
        let succeeded = self.peers.control_all(&VmdRequest::Succeed { epoch })?;
        self.peers.set_epoch(epoch);
        Ok(succeeded)
    }

    fn dissolve(&self) -> Result<usize> {
        self.peers.control_all(&VmdRequest::Dissolve)
    }

    fn describe(&self) -> Vec<Result<VolumeInfo>> {
        let describe = |at| {
            control(&self.peers, MemberIndex(at as u16), &VmdRequest::Describe, |reply| match reply {
                VmdReply::Volume(info) => Some(*info),
                _ => None,
            })
        };
        (0..self.peers.members().len()).map(describe).collect()
    }
}

/// Takes what an entry says of each of its pages where it is better than what is known.
fn merge(best: &mut BTreeMap<u32, IndexEntry>, entry: IndexEntry, alive: &[bool]) {
    let there = |entry: &IndexEntry| {
        entry.placement.is_none_or(|place| alive.get(place.member.as_usize()) == Some(&true))
    };
    for page in entry.range().iter() {
        let one = IndexEntry { page, run_pages: 1, ..entry };
        let known = best.entry(page.0).or_insert(one);
        if (known.round, there(known)) < (one.round, there(&one)) {
            *known = one;
        }
    }
}

/// Entries in order, neighbouring zero pages of one round as one.
fn join(pages: BTreeMap<u32, IndexEntry>) -> Vec<IndexEntry> {
    let mut out: Vec<IndexEntry> = Vec::new();
    for entry in pages.into_values() {
        match out.last_mut() {
            Some(last)
                if last.placement.is_none()
                    && entry.placement.is_none()
                    && last.round == entry.round
                    && last.page.0 + last.run_pages == entry.page.0 =>
            {
                last.run_pages += 1;
            }
            _ => out.push(entry),
        }
    }
    out
}
