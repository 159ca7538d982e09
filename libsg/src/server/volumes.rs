//! Which volumes there are and what may be done to them: a pure core, without lock or clock.
//!
//! A volume is open, then sealed, then claimed, and at last dissolved; one that waits for an owner is parked, then
//! claimed, then runs ([`parked`]). Its epoch only rises; who comes with an
//! older one is refused. What is dissolved is remembered for a while, so that a late request
//! does not bring it to life again.

mod inherit;
pub mod parked;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

#[cfg(feature = "simulation")]
use crate::host;
use crate::ids::{Checksum, Epoch, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::wire::Status;
use crate::wire::message::{Member, VolumeState};
use crate::wire::parking::Parking;
use parked::Claimed;

/// Dissolved volumes that are remembered; the oldest is forgotten for the newest.
const DISSOLVED_MAX: usize = 256;

/// What a request does to a volume, as far as epochs and states go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looks at pages or the index: any state but dissolved, any epoch but an older one.
    Read,
    /// Adds pages, index entries or state: the writer's own epoch, until the volume is sealed or claimed.
    Write,
    /// Drops pages: any epoch but an older one, unless the volume is sealed; the writer's own while it is parked.
    Discard,
    /// Takes over what was admitted at an intermediary that leaves: any state, any epoch.
    Inherit,
}

/// A volume's opaque state.
#[derive(Clone, Debug)]
pub struct StateBlob {
    /// The bytes.
    pub bytes: Arc<[u8]>,
    /// Of the bytes.
    pub checksum: Checksum,
}

/// What is known of a volume. `P` is what the server keeps with it.
#[derive(Debug)]
pub struct Volume<P> {
    /// What it consists of.
    pub manifest: Manifest,
    /// Its intermediaries; the list only grows.
    pub members: Vec<Member>,
    /// The writer's epoch.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: VolumeState,
    /// Whether COMMIT was written.
    pub committed: bool,
    /// The VM's state, once it is here.
    pub blob: Option<StateBlob>,
    /// Pieces of the final set, ahead of the state.
    pub pieces: Vec<StateBlob>,
    /// At how many members each page is to lie.
    pub copies: u8,
    /// When it was created here.
    pub created: Instant,
    /// Where it was parked, its name and keeper.
    pub parking: Option<Parking>,
    /// Who claimed it since.
    pub claim: Option<Claimed>,
    /// Another grants claims from now on, or is about to.
    stopped: bool,
    /// The server's own.
    pub payload: P,
}

/// The volumes of an intermediary.
#[derive(Debug)]
pub struct Volumes<P> {
    live: BTreeMap<VolumeId, Volume<P>>,
    dissolved: VecDeque<(VolumeId, Volume<()>)>,
    volumes_max: usize,
}

impl<P> Volumes<P> {
    /// None yet, and at most so many at once.
    #[must_use]
    pub const fn new(volumes_max: usize) -> Self {
        Self { live: BTreeMap::new(), dissolved: VecDeque::new(), volumes_max }
    }

    /// Every volume, by id.
    pub fn iter(&self) -> impl Iterator<Item = (VolumeId, &Volume<P>)> {
        self.live.iter().map(|(id, volume)| (*id, volume))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// The volume, whatever its epoch.
    ///
    /// # Errors
    /// [`Status::State`] for one that was dissolved, else [`Status::NoVolume`].
    pub fn get(&self, id: VolumeId) -> Result<&Volume<P>, Status> {
        self.live.get(&id).ok_or_else(|| self.missing(id))
    }

    /// The volume, for one who comes with this epoch.
    ///
    /// # Errors
    /// As [`Self::get`]; [`Status::Fenced`] for an older epoch; [`Status::State`] for a write that the volume's
    /// state does not allow, or under an epoch that was not claimed here.
    pub fn admit(&self, id: VolumeId, epoch: Epoch, access: Access) -> Result<&Volume<P>, Status> {
        let volume = self.get(id)?;
        volume.admit(epoch, access).map(|()| volume)
    }

    fn admit_mut(&mut self, id: VolumeId, epoch: Epoch, access: Access) -> Result<&mut Volume<P>, Status> {
        let missing = self.missing(id);
        let volume = self.live.get_mut(&id).ok_or(missing)?;
        volume.admit(epoch, access).map(|()| volume)
    }

    fn missing(&self, id: VolumeId) -> Status {
        if self.dissolved(id).is_some() { Status::State } else { Status::NoVolume }
    }

    /// What is remembered of a volume that was dissolved: without the VM's state and configuration.
    pub fn dissolved(&self, id: VolumeId) -> Option<&Volume<()>> {
        self.dissolved.iter().find(|(other, _)| *other == id).map(|(_, volume)| volume)
    }

    /// Creates the volume; whether it is new. Done again under the same epoch, the list of members is the new one
    /// (one of the old ones could not be reached) until the volume has the VM's state; nothing else changes.
    ///
    /// # Errors
    /// [`Status::Malformed`] for an id or epoch of zero, [`Status::Fenced`] for an older epoch than it has,
    /// [`Status::State`] when it was dissolved or has a newer one, [`Status::Busy`] at the limit.
    pub fn create(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        (manifest, members): (Manifest, Vec<Member>),
        payload: P,
        now: Instant,
    ) -> Result<bool, Status> {
        if id.0 == 0 || epoch.0 == 0 {
            return Err(Status::Malformed);
        }
        if let Some(volume) = self.live.get_mut(&id) {
            if epoch < volume.epoch {
                return Err(Status::Fenced);
            }
            let has_begun = volume.blob.is_some() || volume.committed;
            let same =
                volume.manifest == manifest && volume.epoch == epoch && volume.state == VolumeState::Open;
            if !same || (has_begun && volume.members != members) {
                return Err(Status::State);
            }
            volume.members = members;
            return Ok(false);
        }
        if self.dissolved(id).is_some() {
            return Err(Status::State);
        }
        if self.live.len() >= self.volumes_max {
            return Err(Status::Busy);
        }
        let volume = Volume {
            manifest,
            members,
            epoch,
            state: VolumeState::Open,
            committed: false,
            blob: None,
            pieces: Vec::new(),
            copies: 1,
            created: now,
            parking: None,
            claim: None,
            stopped: false,
            payload,
        };
        self.live.insert(id, volume);
        Ok(true)
    }

    /// The volume gained members.
    ///
    /// # Errors
    /// As [`Self::admit`]; [`Status::State`] unless the list begins with the present one,
    /// [`Status::Malformed`] for too many.
    pub fn set_members(&mut self, id: VolumeId, epoch: Epoch, members: Vec<Member>) -> Result<(), Status> {
        let volume = self.admit_mut(id, epoch, Access::Read)?;
        if members.len() > limits::MEMBERS_MAX {
            return Err(Status::Malformed);
        }
        if !members.starts_with(&volume.members) {
            return Err(Status::State);
        }
        volume.members = members;
        Ok(())
    }

    /// Keeps the VM's state, instead of what was kept before, which is returned.
    ///
    /// # Errors
    /// As [`Self::admit`] for a write.
    pub fn set_blob(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        blob: StateBlob,
    ) -> Result<Option<StateBlob>, Status> {
        Ok(self.admit_mut(id, epoch, Access::Write)?.blob.replace(blob))
    }

    /// Keeps a piece of the final set behind those before it, instead of what was kept in its place and behind it, which
    /// is returned.
    ///
    /// # Errors
    /// As [`Self::admit`] for a write; [`Status::State`] for one out of turn, or one too many.
    pub fn set_piece(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        number: u32,
        piece: StateBlob,
    ) -> Result<Vec<StateBlob>, Status> {
        let pieces = &mut self.admit_mut(id, epoch, Access::Write)?.pieces;
        if number as usize > pieces.len() || number >= limits::FINAL_PIECES_MAX {
            return Err(Status::State);
        }
        let replaced = pieces.split_off(number as usize);
        pieces.push(piece);
        Ok(replaced)
    }

    /// Each page is to lie at so many members.
    ///
    /// # Errors
    /// As [`Self::admit`] for a write.
    pub fn set_copies(&mut self, id: VolumeId, epoch: Epoch, copies: u8) -> Result<(), Status> {
        self.admit_mut(id, epoch, Access::Write)?.copies = copies;
        Ok(())
    }

    /// The source never runs the VM again. Done again it changes nothing.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn commit(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), Status> {
        self.admit_mut(id, epoch, Access::Read)?.committed = true;
        Ok(())
    }

    /// No more pages come. Done again it changes nothing.
    ///
    /// # Errors
    /// As [`Self::admit`]; [`Status::State`] when it was parked or claimed.
    pub fn seal(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), Status> {
        let volume = self.admit_mut(id, epoch, Access::Read)?;
        if volume.state == VolumeState::Claimed || volume.parking.is_some() {
            return Err(Status::State);
        }
        volume.state = VolumeState::Sealed;
        Ok(())
    }

    /// A new owner: whoever comes with an older epoch is refused from now on.
    ///
    /// # Errors
    /// As [`Self::get`]; [`Status::Fenced`] unless the epoch is above the present one; [`Status::State`] for one that was
    /// parked, which [`Self::claim_parked`] grants.
    pub fn claim(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), Status> {
        let missing = self.missing(id);
        let volume = self.live.get_mut(&id).ok_or(missing)?;
        if volume.parking.is_some() {
            return Err(Status::State);
        }
        if epoch <= volume.epoch {
            return Err(Status::Fenced);
        }
        volume.epoch = epoch;
        volume.state = VolumeState::Claimed;
        Ok(())
    }

    /// A new writer of an open volume: whoever comes with an older epoch is refused from now on.
    ///
    /// # Errors
    /// As [`Self::get`]; [`Status::State`] unless the volume is open; [`Status::Fenced`] unless the epoch is above
    /// the present one.
    pub fn succeed(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), Status> {
        let missing = self.missing(id);
        let volume = self.live.get_mut(&id).ok_or(missing)?;
        if epoch <= volume.epoch {
            return Err(Status::Fenced);
        }
        if volume.state != VolumeState::Open {
            return Err(Status::State);
        }
        volume.epoch = epoch;
        Ok(())
    }

    /// Forgets the volume, which is returned. `None`: that was done before.
    ///
    /// # Errors
    /// [`Status::NoVolume`], or [`Status::Fenced`] for an older epoch.
    pub fn dissolve(&mut self, id: VolumeId, epoch: Epoch) -> Result<Option<Volume<P>>, Status> {
        if let Some(gone) = self.dissolved(id) {
            return if epoch < gone.epoch { Err(Status::Fenced) } else { Ok(None) };
        }
        self.admit(id, epoch, Access::Read)?;
        let Some(volume) = self.live.remove(&id) else { return Ok(None) };
        if self.dissolved.len() >= DISSOLVED_MAX {
            self.dissolved.pop_front();
        }
        self.dissolved.push_back((id, volume.remembered()));
        Ok(Some(volume))
    }
}

impl<P> Volume<P> {
    fn admit(&self, epoch: Epoch, access: Access) -> Result<(), Status> {
        #[cfg(feature = "simulation")]
        let epoch = if host::has_bug(host::Bug::EpochIgnored) { epoch.max(self.epoch) } else { epoch };
        if epoch < self.epoch && access != Access::Inherit {
            return Err(Status::Fenced);
        }
        let allowed = match access {
            Access::Read | Access::Inherit => true,
            Access::Write => {
                matches!(self.state, VolumeState::Open | VolumeState::Parked) && epoch == self.epoch
            }
            Access::Discard => match self.state {
                VolumeState::Sealed => false,
                VolumeState::Parked => epoch == self.epoch,
                _ => true,
            },
        };
        if allowed { Ok(()) } else { Err(Status::State) }
    }

    fn remembered(&self) -> Volume<()> {
        Volume {
            manifest: Manifest { vm_config: Vec::new(), ..self.manifest.clone() },
            members: self.members.clone(),
            epoch: self.epoch,
            state: VolumeState::Dissolved,
            committed: self.committed,
            blob: None,
            pieces: Vec::new(),
            copies: self.copies,
            created: self.created,
            parking: self.parking.clone(),
            claim: self.claim.clone(),
            stopped: self.stopped,
            payload: (),
        }
    }
}

#[cfg(test)]
mod test {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::NodeId;
    use crate::manifest::Region;
    use crate::page::InstallUnit;

    fn manifest() -> Manifest {
        let region =
            Region { name: "ram".into(), guest_address: None, length_bytes: 8192, unit: InstallUnit::Page };
        Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None }
    }

    fn member(n: u16) -> Member {
        let node = NodeId { name: format!("i{n}"), incarnation: 1 };
        Member { node, address: SocketAddr::from(([127, 0, 0, 1], n)) }
    }

    pub(super) fn create(volumes: &mut Volumes<()>, id: u128, epoch: u64) -> Result<bool, Status> {
        volumes.create(VolumeId(id), Epoch(epoch), (manifest(), vec![member(1)]), (), Instant::now())
    }

    #[test]
    fn create_and_dissolve_may_be_done_again() {
        let mut volumes = Volumes::new(2);
        assert_eq!(create(&mut volumes, 0, 1), Err(Status::Malformed));
        assert_eq!(create(&mut volumes, 1, 2), Ok(true));
        assert_eq!(create(&mut volumes, 1, 2), Ok(false));
        assert_eq!(create(&mut volumes, 1, 1), Err(Status::Fenced));
        assert_eq!(create(&mut volumes, 1, 3), Err(Status::State));
        // Whoever could not be reached is in the list no more, and the others' numbers are other ones.
        let others = |volumes: &mut Volumes<()>, node| {
            volumes.create(VolumeId(1), Epoch(2), (manifest(), vec![member(node)]), (), Instant::now())
        };
        assert_eq!(others(&mut volumes, 2), Ok(false));
        assert_eq!(volumes.get(VolumeId(1)).unwrap().members, [member(2)]);
        assert_eq!(others(&mut volumes, 1), Ok(false));
        assert_eq!(create(&mut volumes, 2, 1), Ok(true));
        assert_eq!(create(&mut volumes, 3, 1), Err(Status::Busy));
        assert_eq!(volumes.dissolve(VolumeId(1), Epoch(1)).err(), Some(Status::Fenced));
        assert!(volumes.dissolve(VolumeId(1), Epoch(2)).unwrap().is_some());
        assert!(volumes.dissolve(VolumeId(1), Epoch(2)).unwrap().is_none());
        assert_eq!(volumes.dissolve(VolumeId(9), Epoch(1)).err(), Some(Status::NoVolume));
        assert_eq!(volumes.dissolved(VolumeId(1)).unwrap().state, VolumeState::Dissolved);
        assert_eq!(create(&mut volumes, 1, 2), Err(Status::State), "it does not come to life again");
        assert_eq!(volumes.get(VolumeId(1)).err(), Some(Status::State));
        assert_eq!(volumes.get(VolumeId(9)).err(), Some(Status::NoVolume));
        assert_eq!(volumes.len(), 1);
    }

    #[test]
    fn a_replaced_writer_is_refused() {
        let mut volumes = Volumes::new(2);
        let (id, old, new) = (VolumeId(1), Epoch(1), Epoch(2));
        create(&mut volumes, 1, 1).unwrap();
        let admit = |volumes: &Volumes<()>, epoch, access| volumes.admit(id, epoch, access).map(|_| ());
        assert_eq!(admit(&volumes, old, Access::Write), Ok(()));
        assert_eq!(admit(&volumes, new, Access::Write), Err(Status::State), "not claimed here");
        volumes.commit(id, old).unwrap();
        volumes.seal(id, old).unwrap();
        volumes.seal(id, old).unwrap();
        assert_eq!(admit(&volumes, old, Access::Write), Err(Status::State));
        assert_eq!(admit(&volumes, old, Access::Read), Ok(()));
        assert_eq!(volumes.claim(id, old), Err(Status::Fenced));
        volumes.claim(id, new).unwrap();
        assert_eq!(volumes.claim(id, new), Err(Status::Fenced), "once");
        assert_eq!(admit(&volumes, old, Access::Read), Err(Status::Fenced));
        assert_eq!(volumes.commit(id, old), Err(Status::Fenced));
        assert_eq!(volumes.seal(id, new), Err(Status::State), "claimed already");
        assert!(volumes.get(id).unwrap().committed);
    }

    #[test]
    fn a_writer_succeeds_another_while_the_volume_is_open() {
        let mut volumes = Volumes::new(2);
        let (id, old, new) = (VolumeId(1), Epoch(1), Epoch(2));
        assert_eq!(volumes.succeed(id, new), Err(Status::NoVolume));
        create(&mut volumes, 1, 1).unwrap();
        assert_eq!(volumes.succeed(id, old), Err(Status::Fenced));
        volumes.succeed(id, new).unwrap();
        assert_eq!(volumes.succeed(id, new), Err(Status::Fenced), "once");
        let admit = |volumes: &Volumes<()>, epoch, access| volumes.admit(id, epoch, access).map(|_| ());
        assert_eq!(admit(&volumes, new, Access::Write), Ok(()));
        assert_eq!(admit(&volumes, old, Access::Write), Err(Status::Fenced));
        assert_eq!(admit(&volumes, old, Access::Read), Err(Status::Fenced));
        volumes.seal(id, new).unwrap();
        assert_eq!(volumes.succeed(id, Epoch(3)), Err(Status::State), "nothing is written any more");
        volumes.claim(id, Epoch(3)).unwrap();
        assert_eq!(volumes.succeed(id, Epoch(4)), Err(Status::State));
    }

    #[test]
    fn members_only_grow() {
        let mut volumes = Volumes::new(2);
        let (id, epoch) = (VolumeId(1), Epoch(1));
        create(&mut volumes, 1, 1).unwrap();
        volumes.set_members(id, epoch, vec![member(1), member(2)]).unwrap();
        assert_eq!(volumes.set_members(id, epoch, vec![member(1)]), Err(Status::State));
        assert_eq!(volumes.set_members(id, epoch, vec![member(2), member(1)]), Err(Status::State));
        assert_eq!(volumes.get(id).unwrap().members.len(), 2);
    }

    proptest! {
        #[test]
        fn epochs_and_states_only_go_forward(ops in prop::collection::vec((0..7_u8, 1..3_u128, 1..5_u64), 1..60)) {
            let mut volumes = Volumes::new(2);
            let rank = |state| match state {
                VolumeState::Open => 0,
                VolumeState::Sealed => 1,
                VolumeState::Claimed => 2,
                VolumeState::Dissolved => 3,
                VolumeState::Parked | VolumeState::Running => unreachable!("nothing is parked here"),
            };
            let mut last: BTreeMap<u128, (u64, u8, bool)> = BTreeMap::new();
            for (op, id, epoch) in ops {
                let (volume, at) = (VolumeId(id), Epoch(epoch));
                let _ = match op {
                    0 => create(&mut volumes, id, epoch).map(|_| ()),
                    1 => volumes.commit(volume, at),
                    2 => volumes.seal(volume, at),
                    3 => volumes.claim(volume, at),
                    4 => volumes.dissolve(volume, at).map(|_| ()),
                    5 => volumes.succeed(volume, at),
                    _ => volumes.set_members(volume, at, vec![member(1)]),
                };
                let now = match volumes.get(volume) {
                    Ok(known) => (known.epoch.0, rank(known.state), known.committed),
                    Err(Status::State) => (u64::MAX, 3, true),
                    Err(_) => continue,
                };
                let before = last.insert(id, now).unwrap_or_default();
                prop_assert!(now.0 >= before.0 && now.1 >= before.1 && now.2 >= before.2, "{before:?} {now:?}");
            }
        }
    }
}
