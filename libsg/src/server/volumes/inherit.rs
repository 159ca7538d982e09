//! What a volume is told by an intermediary that leaves, and when that stops to decide who owns it.

use std::cmp::Ordering;
use std::time::Instant;

use super::parked::Claimed;
use super::{StateBlob, Volume, Volumes};
use crate::ids::{Epoch, VolumeId};
use crate::limits;
use crate::wire::Status;
use crate::wire::handover::Inheritance;
use crate::wire::message::VolumeState;
use crate::wire::parking::Parking;

impl<P> Volumes<P> {
    /// Somebody who leaves says what it knows of a volume, which is created if it is not known here; whether it is new.
    /// What is known here and newer stays. A claim's time begins anew. Done again it changes nothing. One that the source
    /// asked whether it would become a member, and then to forget it, may become one when COMMIT was given elsewhere.
    ///
    /// # Errors
    /// [`Status::Malformed`] for an id or epoch of zero, [`Status::State`] when it was dissolved, is another volume or has
    /// members of whom only one of the two knows, [`Status::Busy`] at the limit.
    pub fn inherit(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        (said, blob): (&Inheritance, Option<StateBlob>),
        payload: P,
        now: Instant,
    ) -> Result<bool, Status> {
        self.dissolved.retain(|(other, gone)| *other != id || gone.committed || !said.committed);
        let is_new = !self.live.contains_key(&id);
        if is_new {
            self.create(id, epoch, (said.manifest.clone(), said.members.clone()), payload, now)?;
        }
        let missing = self.missing(id);
        let volume = self.live.get_mut(&id).ok_or(missing)?;
        volume.inherit(epoch, said, blob, now).map(|()| is_new)
    }

    /// Somebody who leaves gives a piece of the final set, each behind those before it. One that is here already comes back.
    ///
    /// # Errors
    /// As [`Self::get`]; [`Status::State`] for one out of turn, or one too many.
    pub fn inherit_piece(
        &mut self,
        id: VolumeId,
        number: u32,
        piece: StateBlob,
    ) -> Result<Option<StateBlob>, Status> {
        let missing = self.missing(id);
        let pieces = &mut self.live.get_mut(&id).ok_or(missing)?.pieces;
        match (number as usize).cmp(&pieces.len()) {
            Ordering::Less => Ok(Some(piece)),
            Ordering::Equal if number < limits::FINAL_PIECES_MAX => {
                pieces.push(piece);
                Ok(None)
            }
            _ => Err(Status::State),
        }
    }

    /// Whether whoever claims the volume here hears that another decides. One that leaves stops before it names another.
    pub fn set_stopped(&mut self, id: VolumeId, stopped: bool) {
        if let Some(volume) = self.live.get_mut(&id) {
            volume.stopped = stopped;
        }
    }

    /// Another grants claims.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn set_keeper(&mut self, id: VolumeId, parking: Parking) -> Result<(), Status> {
        let missing = self.missing(id);
        self.live.get_mut(&id).ok_or(missing)?.parking = Some(parking);
        Ok(())
    }
}

impl<P> Volume<P> {
    fn inherit(
        &mut self,
        epoch: Epoch,
        said: &Inheritance,
        blob: Option<StateBlob>,
        now: Instant,
    ) -> Result<(), Status> {
        if self.manifest != said.manifest || said.members.len() > limits::MEMBERS_MAX {
            return Err(Status::State);
        }
        if said.members.starts_with(&self.members) {
            self.members.clone_from(&said.members);
        } else if !self.members.starts_with(&said.members) {
            return Err(Status::State);
        }
        self.committed |= said.committed;
        self.copies = self.copies.max(said.copies);
        if self.blob.is_none() {
            self.blob = blob;
        }
        let newer = |said: &Parking| self.parking.as_ref().is_none_or(|known| known.term < said.term);
        if let Some(parking) = said.parking.as_ref().filter(|parking| newer(parking)) {
            self.parking = Some(parking.clone());
            // Said by who was the keeper: if it names this one, that decides from now on.
            self.stopped = false;
        }
        if (epoch, how_far(said.state)) > (self.epoch, how_far(self.state)) {
            (self.epoch, self.state) = (epoch, said.state);
            self.claim = said.owner.clone().map(|by| Claimed { by, at: now });
        }
        Ok(())
    }
}

/// Of one epoch, what is further holds.
const fn how_far(state: VolumeState) -> u8 {
    match state {
        VolumeState::Open => 0,
        VolumeState::Sealed => 1,
        VolumeState::Parked => 2,
        VolumeState::Claimed => 3,
        VolumeState::Running => 4,
        VolumeState::Dissolved => 5,
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Checksum, NodeId};
    use crate::server::volumes::test::create;
    use crate::wire::parking::{Claim, Verdict};

    const ID: VolumeId = VolumeId(1);

    fn node(name: &str) -> NodeId {
        NodeId { name: name.into(), incarnation: 1 }
    }

    fn blob() -> StateBlob {
        StateBlob { bytes: vec![1].into(), checksum: Checksum(0) }
    }

    fn parking(keeper: usize, term: u32) -> Parking {
        Parking { name: "web".into(), keeper: node(&keeper.to_string()), term, arbiter: None }
    }

    /// What one of them knows.
    fn said(volumes: &Volumes<()>, parking: Parking) -> (Epoch, Inheritance) {
        let known = volumes.get(ID).unwrap();
        let said = Inheritance {
            manifest: known.manifest.clone(),
            members: known.members.clone(),
            committed: known.committed,
            state: known.state,
            parking: Some(parking),
            owner: known.claim.as_ref().map(|claim| claim.by.clone()),
            blob: None,
            copies: known.copies,
        };
        (known.epoch, said)
    }

    #[test]
    fn what_is_newer_stays() {
        let now = Instant::now();
        let mut volumes: Volumes<()> = Volumes::new(2);
        create(&mut volumes, 1, 1).unwrap();
        let (epoch, mut old) = said(&volumes, parking(0, 0));
        old.state = VolumeState::Parked;
        let mut inherit = |epoch, said: &Inheritance, blob| volumes.inherit(ID, epoch, (said, blob), (), now);
        assert_eq!(inherit(epoch, &old, Some(blob())), Ok(false));
        let claimed = Inheritance {
            state: VolumeState::Claimed,
            owner: Some(node("a")),
            parking: Some(parking(1, 1)),
            ..old.clone()
        };
        assert_eq!(inherit(Epoch(5), &claimed, None), Ok(false));
        // Who was slow says what it knew.
        assert_eq!(inherit(epoch, &old, Some(blob())), Ok(false));
        let other = Inheritance { members: Vec::new(), ..old.clone() };
        assert_eq!(inherit(epoch, &other, None), Ok(false), "fewer members are known there");
        assert_eq!(volumes.inherit_piece(ID, 1, blob()).err(), Some(Status::State), "out of turn");
        assert!(volumes.inherit_piece(ID, 0, blob()).unwrap().is_none());
        assert!(volumes.inherit_piece(ID, 0, blob()).unwrap().is_some(), "it is there");
        assert!(volumes.inherit_piece(ID, 1, blob()).unwrap().is_none());
        let known = volumes.get(ID).unwrap();
        assert_eq!(known.pieces.len(), 2);
        assert_eq!((known.epoch, known.state, known.members.len()), (Epoch(5), VolumeState::Claimed, 1));
        assert_eq!(known.parking, Some(parking(1, 1)));
        assert_eq!(known.claim.as_ref().map(|claim| claim.by.clone()), Some(node("a")));
        assert!(known.blob.is_some());
    }

    #[test]
    fn who_was_asked_in_vain_before_commit_may_take_it_behind_it() {
        let now = Instant::now();
        for (was_committed, is_committed, taken) in
            [(false, true, Ok(true)), (false, false, Err(Status::State)), (true, true, Err(Status::State))]
        {
            let mut volumes: Volumes<()> = Volumes::new(2);
            create(&mut volumes, 1, 1).unwrap();
            let (epoch, mut said) = said(&volumes, parking(0, 0));
            said.committed = is_committed;
            if was_committed {
                volumes.set_blob(ID, epoch, blob()).unwrap();
                volumes.park(ID, epoch, parking(0, 0)).unwrap();
            }
            volumes.dissolve(ID, epoch).unwrap();
            assert_eq!(volumes.inherit(ID, epoch, (&said, None), (), now), taken);
        }
    }

    proptest! {
        /// Keepership goes from one to the next, its answers are lost, and those that claim ask whoever was the keeper once:
        /// the VM runs at one of them at most.
        #[test]
        fn it_runs_once_whoever_decides(ops in prop::collection::vec((0..6_u8, 0..3_usize, 0..3_usize, 1..6_u64), 1..100)) {
            let now = Instant::now();
            let mut all: Vec<Volumes<()>> = (0..3).map(|_| Volumes::new(2)).collect();
            for volumes in &mut all {
                create(volumes, 1, 1).unwrap();
                volumes.set_blob(ID, Epoch(1), blob()).unwrap();
                volumes.park(ID, Epoch(1), parking(0, 0)).unwrap();
            }
            // Who decides, as far as anybody was told; who was to be told last; and who has ever decided.
            let (mut keeper, mut term, mut next) = (0, 0, None::<(usize, Epoch, Inheritance)>);
            let mut known = vec![0];
            let mut granted = vec![Vec::new(); 3];
            let mut runs: Option<(usize, u64)> = None;
            for (op, who, at, epoch) in ops {
                let asked = known[at % known.len()];
                match op {
                    0 | 1 => {
                        let claim = Claim { epoch: Epoch(epoch), by: node(&format!("c{who}")), force: false };
                        if all[asked].claim_parked(ID, &claim, now) == Ok(Verdict::Granted) {
                            prop_assert!(runs.is_none_or(|is| is.0 == who && is.1 < epoch), "granted while it runs");
                            granted[who].push(epoch);
                        }
                    }
                    2 | 3 => {
                        let Some(epoch) = granted[who].iter().rev().find(|has| **has == epoch).copied() else { continue };
                        if all[asked].run(ID, Epoch(epoch)).is_ok() {
                            prop_assert!(
                                runs.is_none_or(|is| is.0 == who && is.1 <= epoch),
                                "{runs:?}, and {who} at {epoch}"
                            );
                            runs = Some((who, epoch));
                        }
                    }
                    // It stops, and names another.
                    4 if next.is_none() && at != keeper => {
                        all[keeper].set_stopped(ID, true);
                        term += 1;
                        let (epoch, said) = said(&all[keeper], parking(at, term));
                        next = Some((at, epoch, said));
                    }
                    // Which hears of it; the answer is lost, or not.
                    _ => {
                        let Some((to, epoch, said)) = next.clone() else { continue };
                        all[to].inherit(ID, epoch, (&said, None), (), now).unwrap();
                        known.push(to);
                        if at == 0 {
                            all[keeper].set_keeper(ID, parking(to, term)).unwrap();
                            (keeper, next) = (to, None);
                        }
                    }
                }
            }
        }
    }
}
