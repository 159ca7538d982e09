//! Batches that lie at several members.

use super::volume::Own;
use super::{Asker, Nodes, State};
use crate::ids::{MemberIndex, MemberSet, Placement, VolumeId};
use crate::limits;
use crate::page::PageRange;
use crate::wire::message::Member;
use crate::wire::{GetEntry, IndexEntry, Missing, PageEntry, Status};

/// Those who get copies, by their index.
type Targets = Vec<(MemberIndex, Member)>;

/// Where pages lie, those that do.
type Placements = Vec<Option<Placement>>;

impl State {
    /// Stores a batch whose holders are these members, this one among them. Says where, and who gets copies of what.
    pub(super) fn put_copies(
        &mut self,
        asker: Asker,
        (entries, bytes): (&[PageEntry], &[u8]),
        holders: MemberSet,
    ) -> Result<(Placements, Targets), Status> {
        let targets = self.targets(asker, holders)?;
        let placements = self.put(asker, entries, bytes)?;
        let stored = entries.iter().zip(&placements).filter_map(|(entry, at)| Some((entry.page, (*at)?)));
        let own = stored.map(|(page, here)| Own { page, here, of: here });
        self.volume(asker)?.own.extend(own);
        Ok((placements, targets))
    }

    /// Those of the holders that are not this one.
    fn targets(&mut self, asker: Asker, holders: MemberSet) -> Result<Targets, Status> {
        let node = self.node.clone();
        let volume = self.writable(asker)?;
        let me = volume.member(&node).ok_or(Status::State)?;
        if holders.len() > limits::COPIES_MAX {
            return Err(Status::Copies);
        }
        if !holders.contains(me) {
            return Err(Status::Malformed);
        }
        let member = |at: MemberIndex| volume.members().get(at.as_usize()).map(|member| (at, member.clone()));
        let targets: Option<Targets> = holders.without(me).iter().map(member).collect();
        targets.ok_or(Status::Malformed)
    }

    /// Pages that were stored by reference lie here, under these checksums, and others get copies of them. Says which,
    /// who, and the bytes of those that do. Of one that is noted already one hold is given back.
    pub(super) fn keep_first(
        &mut self,
        asker: Asker,
        entries: &[IndexEntry],
        holders: MemberSet,
    ) -> Result<(Placements, Targets, Vec<u8>), Status> {
        let targets = self.targets(asker, holders)?;
        let node = self.node.clone();
        let me = self.volume(asker)?.member(&node);
        let (mut placements, mut bytes) = (Vec::new(), Vec::new());
        for entry in entries {
            let IndexEntry { page, placement: Some(here), checksum, .. } = *entry else {
                return Err(Status::Malformed);
            };
            let at = GetEntry { page, placement: here };
            let mine = Own { page, here, of: here };
            let noted = self.volume(asker)?.own.contains(&mine);
            let found = self.content(asker.volume, me, &at).map(|(_, content)| content.bytes.clone());
            if noted {
                self.give_back_one(asker.volume, me, &at);
            }
            let found = found.filter(|_| !noted);
            if let Some(found) = &found {
                bytes.extend_from_slice(found);
                self.volume(asker)?.own.push(mine);
                self.seal(asker.volume, &at, checksum);
            }
            placements.push(found.map(|_| here));
        }
        Ok((placements, targets, bytes))
    }

    /// Stores copies of pages that lie there at their first holder: all of them, or none.
    pub(super) fn take_copies(
        &mut self,
        asker: Asker,
        of: &[IndexEntry],
        bytes: &[u8],
    ) -> Result<(), Status> {
        let raw = |entry: &IndexEntry| PageEntry::raw(entry.page, entry.round, entry.checksum);
        let entries: Vec<PageEntry> = of.iter().map(raw).collect();
        let placements = self.put(asker, &entries, bytes)?;
        let stored = of.iter().zip(placements).filter_map(|(entry, here)| Some((entry, self.merge(here?))));
        let own: Vec<Own> = stored
            .filter_map(|(entry, here)| Some(Own { page: entry.page, here, of: entry.placement? }))
            .collect();
        if own.len() < of.len() {
            for Own { page, here, .. } in own {
                self.give_back_one(asker.volume, Some(here.member), &GetEntry { page, placement: here });
            }
            return Err(Status::Full);
        }
        self.volume(asker)?.own.extend(own);
        Ok(())
    }

    /// What is not there any more is found no more.
    pub(super) fn forget_gone(&mut self, volume: VolumeId) {
        let Some(known) = self.volumes.get_mut(&volume) else { return };
        let mut own = std::mem::take(&mut known.own);
        own.retain(|Own { page, here, .. }| {
            let at = GetEntry { page: *page, placement: *here };
            self.content(volume, Some(here.member), &at).is_some()
        });
        self.volumes.entry(volume).and_modify(|known| known.own = own);
    }

    /// A copy is found no more that was made for this placement. Where it lies.
    pub(super) fn forget_copy(&mut self, volume: VolumeId, entry: &GetEntry) -> Option<GetEntry> {
        let own = &mut self.volumes.get_mut(&volume)?.own;
        let at = own.iter().position(|own| own.page == entry.page && own.of == entry.placement)?;
        let Own { page, here, .. } = own.swap_remove(at);
        Some(GetEntry { page, placement: here })
    }

    /// The pages of a range that lie here, of each the newest, as far as the volume has copies.
    pub(super) fn own(&self, volume: VolumeId, range: PageRange) -> Vec<IndexEntry> {
        let Some(known) = self.volumes.get(&volume) else { return Vec::new() };
        let inside = known.own.iter().filter(|own| range.positions().contains(&own.page.as_usize()));
        let entry = |Own { page, here, .. }: &Own| {
            let at = GetEntry { page: *page, placement: *here };
            let (holder, _) = self.content(volume, Some(here.member), &at)?;
            Some(IndexEntry::at(*page, holder.round, *here, holder.checksum))
        };
        let mut found: Vec<IndexEntry> = inside.filter_map(entry).collect();
        found.sort_by_key(|entry| (entry.page, entry.round));
        found
    }

    pub(super) fn copied_pages(&self, volume: VolumeId) -> u64 {
        let Some(known) = self.volumes.get(&volume) else { return 0 };
        let there = |own: &&Own| {
            let at = GetEntry { page: own.page, placement: own.here };
            own.of.member != own.here.member && self.content(volume, Some(own.here.member), &at).is_some()
        };
        known.own.iter().filter(there).count() as u64
    }
}

/// Has others store copies of what lies at its first holder. Who has none.
pub(super) fn spread(
    nodes: &Nodes,
    asker: Asker,
    targets: Targets,
    stored: &[IndexEntry],
    bytes: &[u8],
) -> Missing {
    let mut missing = Missing::NONE;
    for (index, member) in targets {
        let node = nodes.lock().get(&member.address).cloned();
        let taken = node.map_or(Err(Status::Going), |node| {
            let mut state = node.state.lock();
            let there = state.alive && state.node == member.node;
            if there { state.take_copies(asker, stored, bytes) } else { Err(Status::Going) }
        });
        match taken {
            Ok(()) => {}
            Err(Status::Full) => missing.full = missing.full.with(index),
            Err(_) => missing.lost = missing.lost.with(index),
        }
    }
    missing
}
