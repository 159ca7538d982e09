//! Who may have a parked VM, where an etcd says so.
//!
//! ```text
//!  PREFIX.claims/VOLUME         the claim that was granted last, and whether the VM was run under it
//!  PREFIX.claims/VOLUME.alive   on a lease: its claimant is at it
//! ```
//!
//! Each change is one transaction that compares at which revision the record was read, and time is the lease's, so that
//! nobody's clock matters. Records stay when the VM has left its volume: they are what keeps it from being run a second time,
//! by whoever finds a part of the volume that was away meanwhile. What etcd says is believed here: whoever may write to it
//! may give VMs away.

use std::sync::Arc;

use libsg::ids::{Epoch, NodeId, VolumeId};
use libsg::limits::CLAIM_LEASE;
use libsg::vmd::Arbiter;
use libsg::wire::message::VolumeInfo;
use libsg::wire::parking::{Claim, Verdict};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::client::{ANSWER, Client, Trouble};
use crate::message::{self, Changed, Leased, Listed};
use crate::place::Place;
use crate::transport::Cut;

/// How often a change is tried again because somebody else was faster.
const TRIES: u32 = 8;

/// Bytes of the longest record, and of its key.
const RECORD_BYTES_MAX: usize = 1024;

/// Says who may have a parked volume: what its etcd does.
pub struct EtcdArbiter {
    place: Place,
    client: Mutex<Client>,
}

/// The claim that was granted last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    epoch: u64,
    by: NodeId,
    runs: bool,
}

/// What is known of a volume.
#[derive(Debug, Default)]
struct Known {
    record: Option<Record>,
    /// At which revision it was written; zero where there is none.
    revision: i64,
    /// The lease on which its claimant is alive.
    lease: Option<i64>,
}

/// What becomes of a claim.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// It is written down, once more where it was before.
    Grant,
    /// Another is at it.
    Claimed(NodeId),
    /// Nothing is changed.
    Say(Verdict),
}

fn decide(record: Option<&Record>, alive: bool, claim: &Claim) -> Decision {
    let Some(known) = record else { return Decision::Grant };
    if known.runs {
        return Decision::Say(Verdict::Runs { by: known.by.clone() });
    }
    if known.by == claim.by && known.epoch == claim.epoch.0 {
        return Decision::Grant;
    }
    if known.by != claim.by && alive && !claim.force {
        return Decision::Claimed(known.by.clone());
    }
    if claim.epoch.0 <= known.epoch {
        return Decision::Say(Verdict::Newer(Epoch(known.epoch)));
    }
    Decision::Grant
}

impl EtcdArbiter {
    /// That of a pool. Nothing is asked yet.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no descriptor.
    pub fn new(place: Place) -> Result<Self> {
        let client = Mutex::new(Client::new(&place, ANSWER, Cut::new()?));
        Ok(Self { place, client })
    }

    /// The one that a parked volume names.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for what is no `etcd://HOST[:PORT][,HOST…]/PREFIX`.
    pub fn named(name: &str) -> Result<Arc<dyn Arbiter>> {
        Ok(Arc::new(Self::new(name.parse()?)?))
    }

    fn key(&self, volume: VolumeId) -> String {
        // Behind no slash, so that it is none of the pool's hosts.
        format!("{}.claims/{volume}", self.place.prefix())
    }

    fn with<T>(
        &self,
        parked: &VolumeInfo,
        ask: impl FnOnce(&mut Client, &str) -> Result<T, Trouble>,
    ) -> Result<T> {
        let asked = ask(&mut self.client.lock(), &self.key(parked.volume));
        asked.map_err(|trouble| {
            let cause = Error::from(trouble);
            let name = parked.parking.as_ref().map_or("", |parking| &parking.name);
            let message = format!("{} says who may have the parked VM {name:?}", self.place);
            Error::new(cause.kind, message).because(cause)
        })
    }
}

impl Arbiter for EtcdArbiter {
    fn claim(&self, parked: &VolumeInfo, claim: &Claim) -> Result<Verdict> {
        self.with(parked, |etcd, key| {
            for _ in 0..TRIES {
                let known = look(etcd, key)?;
                match decide(known.record.as_ref(), known.lease.is_some(), claim) {
                    Decision::Say(verdict) => return Ok(verdict),
                    Decision::Claimed(by) => {
                        return Ok(Verdict::Claimed { by, for_ms: left_ms(etcd, known.lease)? });
                    }
                    Decision::Grant => {
                        let record = Record { epoch: claim.epoch.0, by: claim.by.clone(), runs: false };
                        let lease: Leased =
                            etcd.ask("lease/grant", &message::grant(CLAIM_LEASE.as_secs()))?;
                        if change(etcd, key, known.revision, (&record, Some(lease.id)))? {
                            return Ok(Verdict::Granted);
                        }
                    }
                }
            }
            Err(others_are_faster())
        })
    }

    fn run(&self, parked: &VolumeInfo, claim: &Claim) -> Result<()> {
        self.with(parked, |etcd, key| {
            for _ in 0..TRIES {
                let known = look(etcd, key)?;
                let Some(record) = known.record else {
                    let message = "it knows of no claim: whatever it knew was deleted";
                    return Err(Trouble::Lost(Error::new(ErrorKind::Volume, message)));
                };
                if record.by != claim.by || record.epoch != claim.epoch.0 {
                    let message = format!("it is {}'s since (epoch {})", record.by, record.epoch);
                    return Err(Trouble::Lost(Error::new(ErrorKind::Fenced, message)));
                }
                if record.runs || change(etcd, key, known.revision, (&Record { runs: true, ..record }, None))?
                {
                    return Ok(());
                }
            }
            Err(others_are_faster())
        })
    }
}

fn others_are_faster() -> Trouble {
    Trouble::Lost(Error::new(ErrorKind::Timeout, "others claim it at the same time"))
}

fn alive(key: &str) -> String {
    format!("{key}.alive")
}

fn look(etcd: &mut Client, key: &str) -> Result<Known, Trouble> {
    // '/' is the next after '.'.
    let listed: Listed = etcd.ask("kv/range", &message::list(key, &format!("{key}/"), 0))?;
    let mut known = Known::default();
    for kv in &listed.kvs {
        let name = kv.key.decode(RECORD_BYTES_MAX);
        if name.as_deref() == Some(key.as_bytes()) {
            let record = kv.value.decode(RECORD_BYTES_MAX);
            let record = record.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let Some(record) = record else {
                let message = format!("what lies under {key} is no claim");
                return Err(Trouble::Lost(Error::new(ErrorKind::Protocol, message)));
            };
            (known.record, known.revision) = (Some(record), kv.mod_revision);
        } else if name.as_deref() == Some(alive(key).as_bytes()) {
            known.lease = Some(kv.lease);
        }
    }
    Ok(known)
}

/// Writes it down, unless it was changed since it was read. Whether it was written.
fn change(
    etcd: &mut Client,
    key: &str,
    revision: i64,
    (record, lease): (&Record, Option<i64>),
) -> Result<bool, Trouble> {
    let failed =
        |cause| Trouble::Lost(Error::new(ErrorKind::Input, "a claim cannot be written").because(cause));
    let record = serde_json::to_vec(record).map_err(failed)?;
    let mut puts = vec![message::put(key, &record, 0)];
    puts.extend(lease.map(|lease| message::put(&alive(key), &[], lease)));
    let changed: Changed = etcd.ask("kv/txn", &message::change(key, revision, puts))?;
    Ok(changed.succeeded)
}

/// How long the claimant has left, at least a millisecond.
fn left_ms(etcd: &mut Client, lease: Option<i64>) -> Result<u64, Trouble> {
    let Some(lease) = lease else { return Ok(1) };
    let left: Leased = etcd.ask("lease/timetolive", &message::lease(lease))?;
    Ok(u64::try_from(left.ttl).unwrap_or(0) * 1000 + 1)
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId { name: name.into(), incarnation: 1 }
    }

    fn claim(by: &str, epoch: u64) -> Claim {
        Claim { epoch: Epoch(epoch), by: node(by), force: false }
    }

    #[test]
    fn a_claim_is_for_who_made_it_until_its_time_is_over() {
        let claimed = Record { epoch: 3, by: node("a"), runs: false };
        let decided = |alive, claim: Claim| decide(Some(&claimed), alive, &claim);
        assert_eq!(decide(None, false, &claim("a", 1)), Decision::Grant);
        assert_eq!(decided(true, claim("a", 3)), Decision::Grant);
        assert_eq!(decided(false, claim("a", 3)), Decision::Grant);
        assert_eq!(decided(true, claim("b", 4)), Decision::Claimed(node("a")));
        assert_eq!(decided(false, claim("b", 4)), Decision::Grant);
        assert_eq!(decided(true, Claim { force: true, ..claim("b", 4) }), Decision::Grant);
        for of in [claim("b", 3), claim("b", 2), claim("a", 2)] {
            assert_eq!(decided(false, of), Decision::Say(Verdict::Newer(Epoch(3))));
        }
        let runs = Record { runs: true, ..claimed.clone() };
        for of in [claim("a", 3), Claim { force: true, ..claim("b", 9) }] {
            assert_eq!(decide(Some(&runs), false, &of), Decision::Say(Verdict::Runs { by: node("a") }));
        }
    }

    proptest! {
        /// Whatever is claimed, and run by whom it was granted, with changes that were overtaken thrown away as etcd does:
        /// it is run at one of them at most.
        #[test]
        fn it_runs_once(ops in prop::collection::vec((0..4_u8, 0..3_usize, 1..6_u64, any::<bool>(), any::<bool>()), 1..80)) {
            let (mut record, mut revision): (Option<Record>, u64) = (None, 0);
            // What each has read, and decided by it.
            let mut waiting: Vec<Option<(u64, Record)>> = vec![None; 3];
            let mut granted = vec![Vec::new(); 3];
            let mut runs: Option<(usize, u64)> = None;
            for (op, who, epoch, alive, force) in ops {
                let of = Claim { force, ..claim(&who.to_string(), epoch) };
                match op {
                    0 => {
                        let decided = decide(record.as_ref(), alive, &of);
                        let wanted = Record { epoch, by: of.by, runs: false };
                        waiting[who] = (decided == Decision::Grant).then_some((revision, wanted));
                    }
                    1 | 2 => {
                        let Some((read_at, wanted)) = waiting[who].take() else { continue };
                        if read_at == revision {
                            prop_assert!(runs.is_none(), "granted while it runs");
                            granted[who].push(wanted.epoch);
                            (record, revision) = (Some(wanted), revision + 1);
                        }
                    }
                    _ => {
                        let Some(known) = record.clone().filter(|known| known.by == of.by) else { continue };
                        if granted[who].contains(&epoch) && known.epoch == epoch {
                            prop_assert!(runs.is_none_or(|at| at == (who, epoch)), "{runs:?}, and {who} at {epoch}");
                            runs = Some((who, epoch));
                            (record, revision) = (Some(Record { runs: true, ..known }), revision + 1);
                        }
                    }
                }
            }
        }
    }
}
