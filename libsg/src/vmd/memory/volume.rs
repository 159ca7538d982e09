//! What an intermediary knows of a volume, and how the volume moves from state to state.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::ids::{Checksum, Epoch, MemberIndex, NodeId, Placement, Round, VolumeId};
use crate::limits::{self, CLAIM_LEASE};
use crate::manifest::Manifest;
use crate::page::{PageIndex, PageRange};
use crate::wire::mending::Mending;
use crate::wire::message::{Member, VolumeInfo, VolumeState};
use crate::wire::parking::{Claim, Parking, Verdict};
use crate::wire::{Encoding, IndexEntry, Status};

/// A volume at one intermediary.
#[derive(Debug)]
pub(super) struct Volume {
    pub epoch: Epoch,
    pub state: VolumeState,
    pub committed: bool,
    pub manifest: Manifest,
    pub blob: Option<Vec<u8>>,
    /// Of the final set, ahead of the blob.
    pub pieces: Vec<Vec<u8>>,
    /// At how many members each page is to lie. Nobody in memory dies.
    pub copies: u8,
    /// What comes over links that were opened before this one is a dead writer's.
    pub fenced: u64,
    members: Vec<Member>,
    /// Page by page; a zero page has no placement.
    index: BTreeMap<u32, Known>,
    /// What lies here itself, where there are copies.
    pub own: Vec<Own>,
    created: Instant,
    pub parking: Option<Parking>,
    /// Who claimed it where it was parked, and when that was last said.
    claim: Option<(NodeId, Instant)>,
}

/// A page that lies here, and the placement that it was made for: the same at the page's first holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Own {
    pub page: PageIndex,
    pub here: Placement,
    pub of: Placement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    round: Round,
    placement: Option<Placement>,
    checksum: Checksum,
}

impl Volume {
    /// A new one.
    pub fn new(epoch: Epoch, manifest: Manifest, members: Vec<Member>) -> Self {
        Self {
            epoch,
            state: VolumeState::Open,
            committed: false,
            manifest,
            blob: None,
            pieces: Vec::new(),
            copies: 1,
            fenced: 0,
            members,
            index: BTreeMap::new(),
            own: Vec::new(),
            created: Instant::now(),
            parking: None,
            claim: None,
        }
    }

    /// Which of the members an intermediary is.
    pub fn member(&self, node: &NodeId) -> Option<MemberIndex> {
        self.members.iter().position(|member| member.node == *node).map(|at| MemberIndex(at as u16))
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    pub fn age_s(&self) -> u64 {
        self.created.elapsed().as_secs()
    }

    /// Until it has the VM's state, its creator may leave members out that he could not reach.
    pub fn create_again(&mut self, members: &[Member]) -> Result<(), Status> {
        if self.members != members && (self.committed || self.blob.is_some()) {
            return Err(Status::State);
        }
        self.members = members.to_vec();
        Ok(())
    }

    /// The list only grows.
    pub fn set_members(&mut self, members: &[Member]) -> Result<(), Status> {
        if !members.starts_with(&self.members) {
            return Err(Status::State);
        }
        self.members = members.to_vec();
        Ok(())
    }

    pub fn seal(&mut self) -> Result<(), Status> {
        match self.state {
            VolumeState::Open | VolumeState::Sealed => {
                self.state = VolumeState::Sealed;
                Ok(())
            }
            _ => Err(Status::State),
        }
    }

    pub fn park(&mut self, parking: &Parking) -> Result<(), Status> {
        let other = self.parking.as_ref().is_some_and(|known| known != parking);
        if other || self.blob.is_none() {
            return Err(Status::State);
        }
        (self.committed, self.state, self.parking) = (true, VolumeState::Parked, Some(parking.clone()));
        Ok(())
    }

    /// Who owns it.
    pub fn owner(&self) -> Option<NodeId> {
        self.claim.as_ref().map(|(by, _)| by.clone())
    }

    pub fn claim_parked(&mut self, claim: &Claim) -> Verdict {
        let now = Instant::now();
        let by = claim.by.clone();
        match (&self.parking, &self.claim, self.state) {
            (None, ..) => Verdict::NotParked,
            (Some(parking), ..) if parking.arbiter.is_some() && !claim.force => Verdict::Elsewhere,
            (_, Some((owner, _)), VolumeState::Running) if *owner == by && self.epoch < claim.epoch => {
                (self.epoch, self.claim) = (claim.epoch, Some((by, now)));
                Verdict::Granted
            }
            (_, Some((owner, _)), VolumeState::Running) => Verdict::Runs { by: owner.clone() },
            (_, Some((owner, _)), _) if *owner == by && self.epoch == claim.epoch => {
                self.claim = Some((by, now));
                Verdict::Granted
            }
            (_, Some((owner, at)), _) if *owner != by && !claim.force && now < *at + CLAIM_LEASE => {
                let left = (*at + CLAIM_LEASE).saturating_duration_since(now);
                Verdict::Claimed { by: owner.clone(), for_ms: left.as_millis() as u64 + 1 }
            }
            _ if claim.epoch <= self.epoch => Verdict::Newer(self.epoch),
            _ => {
                (self.epoch, self.state, self.claim) = (claim.epoch, VolumeState::Claimed, Some((by, now)));
                Verdict::Granted
            }
        }
    }

    pub fn run(&mut self) -> Result<(), Status> {
        if self.claim.is_none() || !matches!(self.state, VolumeState::Claimed | VolumeState::Running) {
            return Err(Status::State);
        }
        self.state = VolumeState::Running;
        Ok(())
    }

    pub fn claim(&mut self, epoch: Epoch) -> Result<(), Status> {
        if self.parking.is_some() {
            return Err(Status::State);
        }
        if epoch <= self.epoch {
            return Err(Status::Fenced);
        }
        self.epoch = epoch;
        self.state = VolumeState::Claimed;
        Ok(())
    }

    pub fn succeed(&mut self, epoch: Epoch) -> Result<(), Status> {
        if epoch <= self.epoch {
            return Err(Status::Fenced);
        }
        if self.state != VolumeState::Open {
            return Err(Status::State);
        }
        self.epoch = epoch;
        Ok(())
    }

    pub fn dissolve(&mut self) {
        self.state = VolumeState::Dissolved;
        self.blob = None;
        self.index = BTreeMap::new();
        self.own = Vec::new();
    }

    /// Takes what the entry says of its pages, unless that is older than what is known. Of the same
    /// round the later one holds: a page that was lost with an intermediary is put again elsewhere.
    pub fn index(&mut self, entry: &IndexEntry) {
        let IndexEntry { round, placement, checksum, .. } = *entry;
        for page in entry.range().iter() {
            let known = self.index.entry(page.0).or_insert(Known { round, placement, checksum });
            if known.round <= round {
                *known = Known { round, placement, checksum };
            }
        }
    }

    pub fn discard(&mut self, range: PageRange, below: Round) {
        let positions = range.positions();
        self.index.retain(|page, known| !positions.contains(&(*page as usize)) || known.round >= below);
    }

    /// What is known of the range, neighbouring zero pages of one round as one entry. What lies here itself is
    /// `own`: of a page the newest round counts, of one round what lies here.
    pub fn locate(&self, range: PageRange, own: &[IndexEntry]) -> Vec<IndexEntry> {
        let mut out: Vec<IndexEntry> = Vec::new();
        let end = range.first.0.saturating_add(range.pages);
        let mut all: BTreeMap<u32, Known> =
            self.index.range(range.first.0..end).map(|(p, k)| (*p, *k)).collect();
        for IndexEntry { page, round, placement, checksum, .. } in own.iter().copied() {
            let mine = Known { round, placement, checksum };
            let known = all.entry(page.0).or_insert(mine);
            if known.round < round || (known.round == round && known.placement.is_some()) {
                *known = mine;
            }
        }
        for (page, known) in &all {
            let entry = match known.placement {
                Some(placement) => IndexEntry::at(PageIndex(*page), known.round, placement, known.checksum),
                None => IndexEntry::zero(PageIndex(*page), 1, known.round),
            };
            let goes_on = |last: &IndexEntry| {
                (last.encoding, entry.encoding) == (Encoding::Zero, Encoding::Zero)
                    && last.round == entry.round
                    && last.page.0 + last.run_pages == *page
            };
            if out.last().is_some_and(goes_on) {
                out.last_mut().into_iter().for_each(|last| last.run_pages += 1);
            } else if out.len() < limits::INDEX_ENTRIES_MAX {
                out.push(entry);
            } else {
                break;
            }
        }
        out
    }

    pub fn describe(&self, volume: VolumeId, (stored_pages, copied_pages): (u64, u64)) -> VolumeInfo {
        VolumeInfo {
            volume,
            manifest: self.manifest.clone(),
            members: self.members.clone(),
            epoch: self.epoch,
            state: self.state,
            committed: self.committed,
            has_state: self.blob.is_some(),
            stored_pages,
            copied_pages,
            indexed_pages: self.index.len() as u64,
            age_s: self.age_s(),
            parking: self.parking.clone(),
            owner: self.owner(),
            mending: Mending::whole(self.copies),
        }
    }
}
