//! A volume that waits for an owner, and who gets it: once, however often and by how many it is claimed.
//!
//! A claim is for a time: until the claimant says that the VM runs, another may replace it when that time is over, or by
//! the operator's word. Whatever the replaced one asks then comes under an older epoch. Once the VM runs nobody replaces
//! its owner, who may go on under a newer epoch in another process.

use std::time::Instant;

use super::{Access, Volume, Volumes};
use crate::ids::{Epoch, NodeId, VolumeId};
use crate::limits::CLAIM_LEASE;
use crate::wire::Status;
use crate::wire::message::VolumeState;
use crate::wire::parking::{Claim, Parking, Verdict};

/// Who claimed a parked volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Who.
    pub by: NodeId,
    /// When that was last said.
    pub at: Instant,
}

impl<P> Volumes<P> {
    /// COMMIT is given and everything is safe: whoever claims the volume may have it. Done again it changes nothing.
    ///
    /// # Errors
    /// As [`Volumes::admit`] for a write; [`Status::State`] without the VM's state, or under another name.
    pub fn park(&mut self, id: VolumeId, epoch: Epoch, parking: Parking) -> Result<(), Status> {
        let volume = self.admit_mut(id, epoch, Access::Write)?;
        let other = volume.parking.as_ref().is_some_and(|known| *known != parking);
        if other || volume.blob.is_none() {
            return Err(Status::State);
        }
        volume.committed = true;
        volume.state = VolumeState::Parked;
        volume.parking = Some(parking);
        Ok(())
    }

    /// Somebody wants the volume. What was granted is granted again to the same claimant under the same epoch, whose
    /// time begins anew.
    ///
    /// # Errors
    /// As [`Volumes::get`]; [`Status::Going`] where another decides: whoever did not hear of it looks for that one. By
    /// force, it is noted here all the same.
    pub fn claim_parked(&mut self, id: VolumeId, claim: &Claim, now: Instant) -> Result<Verdict, Status> {
        let missing = self.missing(id);
        let volume = self.live.get_mut(&id).ok_or(missing)?;
        if volume.stopped && !claim.force {
            return Err(Status::Going);
        }
        Ok(volume.claim(claim, now))
    }

    /// The VM runs at who claimed it under this epoch. Done again it changes nothing.
    ///
    /// # Errors
    /// As [`Volumes::get`]; [`Status::Fenced`] for an older epoch; [`Status::State`] unless it was claimed under this one;
    /// [`Status::Going`] where another decides.
    pub fn run(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), Status> {
        let volume = self.admit_mut(id, epoch, Access::Read)?;
        if volume.stopped {
            return Err(Status::Going);
        }
        let claimed = volume.claim.is_some() && volume.epoch == epoch;
        if !claimed || !matches!(volume.state, VolumeState::Claimed | VolumeState::Running) {
            return Err(Status::State);
        }
        volume.state = VolumeState::Running;
        Ok(())
    }
}

impl<P> Volume<P> {
    fn claim(&mut self, claim: &Claim, now: Instant) -> Verdict {
        let Some(parking) = &self.parking else { return Verdict::NotParked };
        if parking.arbiter.is_some() && !claim.force {
            return Verdict::Elsewhere;
        }
        #[cfg(feature = "simulation")]
        if crate::host::has_bug(crate::host::Bug::ClaimedTwice) {
            self.epoch = self.epoch.max(claim.epoch);
            self.state = VolumeState::Claimed;
            self.claim = Some(Claimed { by: claim.by.clone(), at: now });
            return Verdict::Granted;
        }
        if let Some(claimed) = &mut self.claim {
            let is_again = claimed.by == claim.by && self.epoch == claim.epoch;
            let left = (claimed.at + CLAIM_LEASE).saturating_duration_since(now);
            match self.state {
                // What its process before asks is refused from now on.
                VolumeState::Running if claimed.by == claim.by && claim.epoch > self.epoch => {
                    (self.epoch, claimed.at) = (claim.epoch, now);
                    return Verdict::Granted;
                }
                VolumeState::Running => return Verdict::Runs { by: claimed.by.clone() },
                _ if is_again => {
                    claimed.at = now;
                    return Verdict::Granted;
                }
                _ if claimed.by != claim.by && !claim.force && !left.is_zero() => {
                    let for_ms = left.as_millis() as u64 + 1;
                    return Verdict::Claimed { by: claimed.by.clone(), for_ms };
                }
                _ => {}
            }
        }
        if claim.epoch <= self.epoch {
            return Verdict::Newer(self.epoch);
        }
        self.epoch = claim.epoch;
        self.state = VolumeState::Claimed;
        self.claim = Some(Claimed { by: claim.by.clone(), at: now });
        Verdict::Granted
    }
}

#[cfg(test)]
mod test {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::Checksum;
    use crate::server::volumes::StateBlob;
    use crate::server::volumes::test::create;

    const ID: VolumeId = VolumeId(1);
    const WRITER: Epoch = Epoch(1);

    fn node(name: &str) -> NodeId {
        NodeId { name: name.into(), incarnation: 1 }
    }

    fn parking() -> Parking {
        Parking { name: "web".into(), keeper: node("i1"), term: 0, arbiter: None }
    }

    fn claim(by: &str, epoch: u64) -> Claim {
        Claim { epoch: Epoch(epoch), by: node(by), force: false }
    }

    fn parked() -> Volumes<()> {
        let mut volumes = Volumes::new(2);
        create(&mut volumes, 1, 1).unwrap();
        assert_eq!(volumes.park(ID, WRITER, parking()), Err(Status::State), "without the VM's state");
        let blob = StateBlob { bytes: vec![1].into(), checksum: Checksum(0) };
        volumes.set_blob(ID, WRITER, blob).unwrap();
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), Instant::now()), Ok(Verdict::NotParked));
        volumes.park(ID, WRITER, parking()).unwrap();
        volumes
    }

    #[test]
    fn it_is_parked_once_and_its_writer_may_mend_it_until_it_is_claimed() {
        let mut volumes = parked();
        volumes.park(ID, WRITER, parking()).unwrap();
        let other = Parking { name: "other".into(), ..parking() };
        assert_eq!(volumes.park(ID, WRITER, other), Err(Status::State));
        let elsewhere = Parking { keeper: node("i2"), ..parking() };
        assert_eq!(volumes.park(ID, WRITER, elsewhere), Err(Status::State));
        let state = |volumes: &Volumes<()>| volumes.get(ID).unwrap().state;
        assert!(state(&volumes) == VolumeState::Parked && volumes.get(ID).unwrap().committed);
        let may = |volumes: &Volumes<()>, epoch| volumes.admit(ID, epoch, Access::Write).map(|_| ());
        assert_eq!(may(&volumes, WRITER), Ok(()));
        assert_eq!(may(&volumes, Epoch(2)), Err(Status::State));
        assert_eq!(volumes.admit(ID, Epoch(9), Access::Discard).map(|_| ()), Err(Status::State));
        assert_eq!(volumes.claim(ID, Epoch(2)), Err(Status::State), "nobody gets around who grants it");
        assert_eq!(volumes.seal(ID, WRITER), Err(Status::State));
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), Instant::now()), Ok(Verdict::Granted));
        assert_eq!(may(&volumes, WRITER), Err(Status::Fenced));
        assert_eq!(volumes.park(ID, WRITER, parking()), Err(Status::Fenced));
        assert_eq!(may(&volumes, Epoch(2)), Err(Status::State), "a claimed volume is not written");
    }

    #[test]
    fn of_two_who_claim_at_once_one_has_it_and_the_other_hears_of_whom() {
        let (mut volumes, now) = (parked(), Instant::now());
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), now), Ok(Verdict::Granted));
        let told = Verdict::Claimed { by: node("a"), for_ms: CLAIM_LEASE.as_millis() as u64 + 1 };
        assert_eq!(volumes.claim_parked(ID, &claim("b", 2), now), Ok(told.clone()));
        assert_eq!(volumes.claim_parked(ID, &claim("b", 3), now), Ok(told));
        // Its answer was lost: it asks again.
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), now), Ok(Verdict::Granted));
        assert_eq!(volumes.run(ID, Epoch(3)), Err(Status::State), "not claimed under that epoch");
        volumes.run(ID, Epoch(2)).unwrap();
        volumes.run(ID, Epoch(2)).unwrap();
        let runs = Ok(Verdict::Runs { by: node("a") });
        for force in [false, true] {
            let claim = Claim { force, ..claim("b", 9) };
            assert_eq!(volumes.claim_parked(ID, &claim, now + 1000 * CLAIM_LEASE), runs);
        }
    }

    #[test]
    fn who_runs_it_goes_on_under_a_newer_epoch_and_shuts_its_older_self_out() {
        let (mut volumes, now) = (parked(), Instant::now());
        volumes.claim_parked(ID, &claim("a", 2), now).unwrap();
        volumes.run(ID, Epoch(2)).unwrap();
        let runs = Ok(Verdict::Runs { by: node("a") });
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), now), runs, "that is no newer one");
        assert_eq!(volumes.claim_parked(ID, &claim("a", 3), now), Ok(Verdict::Granted));
        assert_eq!(volumes.get(ID).unwrap().state, VolumeState::Running);
        let reads = |epoch| volumes.admit(ID, epoch, Access::Read).map(|_| ());
        assert_eq!((reads(Epoch(2)), reads(Epoch(3))), (Err(Status::Fenced), Ok(())));
        assert_eq!(volumes.dissolve(ID, Epoch(2)).err(), Some(Status::Fenced));
        assert_eq!(volumes.claim_parked(ID, &Claim { force: true, ..claim("b", 4) }, now), runs);
        volumes.run(ID, Epoch(3)).unwrap();
    }

    #[test]
    fn who_claimed_and_died_is_replaced_and_can_do_nothing_any_more() {
        let (mut volumes, now) = (parked(), Instant::now());
        volumes.claim_parked(ID, &claim("a", 2), now).unwrap();
        // Who is at it says so, and keeps it.
        let renewed = now + CLAIM_LEASE / 2;
        volumes.claim_parked(ID, &claim("a", 2), renewed).unwrap();
        let early = volumes.claim_parked(ID, &claim("b", 3), now + CLAIM_LEASE).unwrap();
        assert!(matches!(early, Verdict::Claimed { for_ms, .. } if for_ms > 1000), "{early:?}");
        let late = renewed + CLAIM_LEASE;
        assert_eq!(volumes.claim_parked(ID, &claim("b", 2), late), Ok(Verdict::Newer(Epoch(2))));
        assert_eq!(volumes.claim_parked(ID, &claim("b", 3), late), Ok(Verdict::Granted));
        assert_eq!(volumes.run(ID, Epoch(2)), Err(Status::Fenced));
        assert_eq!(volumes.dissolve(ID, Epoch(2)).err(), Some(Status::Fenced));
        let again = volumes.claim_parked(ID, &claim("a", 2), late).unwrap();
        assert!(matches!(again, Verdict::Claimed { .. }), "{again:?}");
        // The operator knows that b is dead.
        let forced = Claim { force: true, ..claim("c", 4) };
        assert_eq!(volumes.claim_parked(ID, &forced, late), Ok(Verdict::Granted));
        volumes.run(ID, Epoch(4)).unwrap();
    }

    #[test]
    fn where_an_engine_decides_the_keeper_does_not_but_by_force() {
        let (mut volumes, now) = (Volumes::new(2), Instant::now());
        create(&mut volumes, 1, 1).unwrap();
        volumes.set_blob(ID, WRITER, StateBlob { bytes: vec![1].into(), checksum: Checksum(0) }).unwrap();
        let arbiter = Some("etcd://10.0.0.1:2379/sg".into());
        volumes.park(ID, WRITER, Parking { arbiter, ..parking() }).unwrap();
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), now), Ok(Verdict::Elsewhere));
        // As who was granted it there tells everybody.
        let told = Claim { force: true, ..claim("a", 2) };
        assert_eq!(volumes.claim_parked(ID, &told, now), Ok(Verdict::Granted));
        assert_eq!(volumes.claim_parked(ID, &claim("a", 2), now), Ok(Verdict::Elsewhere));
        volumes.run(ID, Epoch(2)).unwrap();
        let late = Claim { force: true, ..claim("b", 9) };
        assert_eq!(volumes.claim_parked(ID, &late, now), Ok(Verdict::Runs { by: node("a") }));
    }

    proptest! {
        /// Whoever claims, and runs what it was granted, in whatever order: the VM runs at one of them at most.
        #[test]
        fn it_runs_once(ops in prop::collection::vec((0..3_u8, 0..3_usize, 1..6_u64, any::<bool>(), 0..8_u64), 1..80)) {
            let mut volumes = parked();
            let mut now = Instant::now();
            let mut granted = vec![Vec::new(); 3];
            let mut runs: Option<(usize, u64)> = None;
            for (op, who, epoch, force, passes) in ops {
                now += Duration::from_secs(passes);
                match op {
                    0 | 1 => {
                        let claim = Claim { epoch: Epoch(epoch), by: node(&who.to_string()), force };
                        match volumes.claim_parked(ID, &claim, now).unwrap() {
                            Verdict::Granted => {
                                prop_assert!(runs.is_none_or(|at| at.0 == who && at.1 < epoch), "granted while it runs");
                                granted[who].push(epoch);
                            }
                            Verdict::Runs { by } => prop_assert_eq!(by, node(&runs.unwrap().0.to_string())),
                            _ => {}
                        }
                    }
                    _ => {
                        // Nobody runs what it was not granted.
                        let Some(epoch) = granted[who].iter().rev().find(|has| **has == epoch).copied() else { continue };
                        if volumes.run(ID, Epoch(epoch)).is_ok() {
                            prop_assert!(
                                runs.is_none_or(|at| at.0 == who && at.1 <= epoch),
                                "{runs:?}, and {who} at {epoch}"
                            );
                            runs = Some((who, epoch));
                        }
                    }
                }
            }
        }
    }
}
