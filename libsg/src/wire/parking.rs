//! Parked volumes on the wire: complete, with COMMIT, waiting for whoever claims them, once.
//!
//! ```text
//!            Park                 ClaimParked             Run
//!   open -----------> parked ------------------> claimed -----> running ---> dissolved
//!   (writer's epoch)                 ^              |
//!                                    +--------------+  another claim, under a newer epoch: when the
//!                                                      claimant's time is over, or by force
//! ```
//!
//! Running, its owner may claim it again under a newer epoch: another process of the same host goes on with it.

use serde::{Deserialize, Serialize};

use super::Malformed;
use crate::ids::{Epoch, NodeId};
use crate::limits;

/// What a parked volume is called, and who says who may have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parking {
    /// What operators call it.
    pub name: String,
    /// The intermediary that grants claims: one at a time, since of two there might be two owners. Named before anybody can
    /// claim; one that leaves stops, and names another.
    pub keeper: NodeId,
    /// How often another was named: of two that are said to be the keeper, it is the one with more.
    pub term: u32,
    /// An engine of the pool that decides in the keeper's stead, as whoever claims can find it (`etcd://HOST/PREFIX`): the
    /// keeper then grants nothing but by force.
    pub arbiter: Option<String>,
}

/// Somebody wants to own a parked volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Under which epoch: above the volume's present one.
    pub epoch: Epoch,
    /// Who: the same claim of the same claimant may be made again.
    pub by: NodeId,
    /// Whoever claimed before and does not run it yet has no time left. Said by an operator; and to intermediaries
    /// other than the keeper, once that has granted the claim.
    pub force: bool,
}

/// What becomes of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The volume is the claimant's, under that epoch.
    Granted,
    /// Another has claimed it, and has so long left to run it.
    Claimed {
        /// Who.
        by: NodeId,
        /// Milliseconds until another may have it.
        for_ms: u64,
    },
    /// The VM runs: nobody but who runs it ever gets it.
    Runs {
        /// Where.
        by: NodeId,
    },
    /// Others have claimed it since the claimant looked: it has this epoch.
    Newer(Epoch),
    /// It was not parked: its source has not evicted it.
    NotParked,
    /// The keeper does not decide, but the engine that the parked volume names.
    Elsewhere,
}

impl Parking {
    /// Checks every bound.
    ///
    /// # Errors
    /// What is out of bounds.
    pub fn check(&self) -> Result<(), Malformed> {
        let named = !self.name.is_empty() && self.name.len() <= limits::PARKING_NAME_BYTES_MAX;
        if !named {
            return Err(Malformed::Bounds("name of a parked volume"));
        }
        if self.arbiter.as_ref().is_some_and(|arbiter| arbiter.len() > limits::ARBITER_BYTES_MAX) {
            return Err(Malformed::Bounds("arbiter of a parked volume"));
        }
        check_node(&self.keeper)
    }
}

impl Claim {
    /// Checks every bound.
    ///
    /// # Errors
    /// What is out of bounds.
    pub fn check(&self) -> Result<(), Malformed> {
        check_node(&self.by)
    }
}

impl Verdict {
    /// Checks every bound.
    ///
    /// # Errors
    /// What is out of bounds.
    pub fn check(&self) -> Result<(), Malformed> {
        match self {
            Self::Claimed { by, .. } | Self::Runs { by } => check_node(by),
            Self::Granted | Self::Newer(_) | Self::NotParked | Self::Elsewhere => Ok(()),
        }
    }
}

pub(super) fn check_node(node: &NodeId) -> Result<(), Malformed> {
    let named = node.name.len() <= limits::NODE_NAME_BYTES_MAX;
    if named { Ok(()) } else { Err(Malformed::Bounds("name of a node")) }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::wire::message::{VmdReply, VmdRequest, encode};

    fn node(bytes: usize) -> NodeId {
        NodeId { name: "n".repeat(bytes), incarnation: 7 }
    }

    #[test]
    fn names_are_bounded() {
        let parking = |name: usize, keeper| Parking {
            name: "p".repeat(name),
            keeper: node(keeper),
            term: 1,
            arbiter: None,
        };
        let decoded = |parking| VmdRequest::decode(&encode(&VmdRequest::Park(parking)).expect("encodes"));
        let (most, longest) = (limits::PARKING_NAME_BYTES_MAX, limits::NODE_NAME_BYTES_MAX);
        assert_eq!(decoded(parking(most, longest)), Ok(VmdRequest::Park(parking(most, longest))));
        for (name, keeper) in [(0, 1), (most + 1, 1), (1, longest + 1)] {
            assert!(decoded(parking(name, keeper)).is_err(), "{name} {keeper}");
        }
        let by_engine = |bytes: usize| Parking { arbiter: Some("e".repeat(bytes)), ..parking(1, 1) };
        assert!(decoded(by_engine(limits::ARBITER_BYTES_MAX)).is_ok());
        assert!(decoded(by_engine(limits::ARBITER_BYTES_MAX + 1)).is_err());
        let claim = VmdRequest::ClaimParked(Claim { epoch: Epoch(2), by: node(longest + 1), force: false });
        assert!(VmdRequest::decode(&encode(&claim).expect("encodes")).is_err());
        let verdict = |by| encode(&VmdReply::Verdict(Verdict::Claimed { by, for_ms: 3 })).expect("encodes");
        assert!(VmdReply::decode(&verdict(node(longest))).is_ok());
        assert!(VmdReply::decode(&verdict(node(longest + 1))).is_err());
    }
}
