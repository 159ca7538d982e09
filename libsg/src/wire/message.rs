//! Control messages: rare, variable in size, encoded by postcard into the body of a frame whose
//! kind bounds their length. Lists inside are checked against [`crate::limits`] after decoding.

use std::net::SocketAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Malformed;
use super::handover::{Inheritance, Leaving};
use super::link_use::LinkUse;
use super::mending::Mending;
use super::parking::{Claim, Parking, Verdict, check_node};
use crate::error::ErrorKind;
use crate::ids::{Epoch, NodeId, Round, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::page::PageRange;

/// An intermediary as a volume knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who it is. One that restarted is somebody else.
    pub node: NodeId,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What a client asks of an intermediary about the volume named in the header, under the epoch
/// in the header. The epoch is not looked at by requests that say so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmdRequest {
    /// Create the volume, with the header's epoch as its writer's. Asking again under the same
    /// epoch changes nothing.
    Create {
        /// What the volume consists of.
        manifest: Manifest,
        /// All intermediaries of the volume, in the order of their [`crate::ids::MemberIndex`].
        members: Vec<Member>,
    },
    /// The volume gained members: the new list, which begins with the old one.
    Members(Vec<Member>),
    /// What is known of the volume. Needs no epoch.
    Describe,
    /// The pieces of state that came before this request on this connection are the whole state
    /// blob, of this many bytes and this checksum.
    PutState {
        /// Bytes in all.
        bytes: u64,
        /// CRC32C over all of them.
        checksum: u32,
    },
    /// Send the state blob, as `State` frames with this request's sequence. Needs no epoch.
    GetState,
    /// The source never runs the VM again.
    Commit,
    /// No more pages come: the volume is complete.
    Seal,
    /// A new owner: raises the writer's epoch to this; an epoch not above the present is refused.
    Claim {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Give the volume's memory back. Done again, it changes nothing.
    Dissolve,
    /// What the intermediary has and holds. Needs neither volume nor epoch.
    Statistics,
    /// COMMIT, and everything is safe: whoever claims the volume may have it. Its writer, and nobody else, may put again
    /// what is lost with another intermediary, until it is claimed. Done again it changes nothing.
    Park(Parking),
    /// A destination wants to own a parked volume. Answered by a [`Verdict`]. The header's epoch is not looked at.
    ClaimParked(Claim),
    /// The VM runs at whoever claimed the volume under the header's epoch: nobody else ever gets it. Done again it
    /// changes nothing.
    Run,
    /// A new writer of an open volume, which stays open: raises the writer's epoch to this; an epoch not above the
    /// present is refused.
    Succeed {
        /// The new epoch.
        epoch: Epoch,
    },
    /// As `PutState`, of a piece of the final set ([`super::final_set`]), which lies ahead of the state.
    PutPiece {
        /// Which one.
        number: u32,
        /// Bytes in all.
        bytes: u64,
        /// CRC32C over all of them.
        checksum: u32,
    },
    /// As `GetState`, of a piece of the final set.
    GetPiece {
        /// Which one.
        number: u32,
    },
    /// An intermediary that leaves says all that it knows of the volume, to one that is, or becomes, a member. What is
    /// known there and newer stays. Done again it changes nothing. The header's epoch is that of what is said.
    Inherit(Box<Inheritance>),
    /// As `PutPiece`, from one that leaves. Needs no epoch.
    InheritPiece {
        /// Which one.
        number: u32,
        /// Bytes in all.
        bytes: u64,
        /// CRC32C over all of them.
        checksum: u32,
    },
    /// Each page of the volume is to lie at so many members (1 to [`limits::COPIES_MAX`]): once it has COMMIT and nobody writes
    /// it any more, they see to that among themselves. Its writer's own epoch. The last one said holds.
    Copies(u8),
    /// Who wrote the volume over a connection that was opened before this one is dead, and another goes on under the same
    /// epoch: what of the dead one is on its way yet enters no index any more. Its writer's own epoch. Done again it
    /// changes nothing.
    Fence,
}

/// What an intermediary answers. The status is in the header; where that is not `Ok` the body is `Done`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmdReply {
    /// Nothing to say beyond the status.
    Done,
    /// To `Describe`.
    Volume(Box<VolumeInfo>),
    /// To `GetState`, behind the pieces.
    State {
        /// Bytes in all.
        bytes: u64,
        /// CRC32C over all of them.
        checksum: u32,
    },
    /// To `Statistics`.
    Statistics(NodeStatistics),
    /// To `ClaimParked`.
    Verdict(Verdict),
}

/// Where a volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// A source writes it.
    Open,
    /// Complete: nothing is written any more.
    Sealed,
    /// A destination has claimed it.
    Claimed,
    /// Its memory was given back.
    Dissolved,
    /// Complete, with COMMIT, and nobody's: it waits to be claimed.
    Parked,
    /// It was parked, and its VM runs at who claimed it.
    Running,
}

/// What an intermediary knows of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Which one.
    pub volume: VolumeId,
    /// What it consists of.
    pub manifest: Manifest,
    /// Its intermediaries.
    pub members: Vec<Member>,
    /// The writer's epoch.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: VolumeState,
    /// Whether COMMIT was written.
    pub committed: bool,
    /// Whether the state blob is here.
    pub has_state: bool,
    /// Pages whose bytes are here.
    pub stored_pages: u64,
    /// Those of them that are copies of what lies at another.
    pub copied_pages: u64,
    /// Pages that this index knows.
    pub indexed_pages: u64,
    /// Seconds since it was created here.
    pub age_s: u64,
    /// Where it was parked, its name and keeper.
    pub parking: Option<Parking>,
    /// Who claimed it since.
    pub owner: Option<NodeId>,
    /// How many copies its pages are to have, and have.
    pub mending: Mending,
}

/// What an intermediary has and holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatistics {
    /// Who it is.
    pub node: NodeId,
    /// Zone, where the operator gave one.
    pub zone: Option<String>,
    /// The most memory that it gives to pages.
    pub limit_bytes: u64,
    /// Memory that holds pages now.
    pub used_bytes: u64,
    /// Memory taken from the system for pages, used or not.
    pub arena_bytes: u64,
    /// Bytes of pages received since it started.
    pub bytes_in: u64,
    /// Bytes of pages given out since it started.
    pub bytes_out: u64,
    /// Bytes of pages that passed its processors since it started, each time that they did: received, sent, copied, hashed.
    /// What clients write and read by themselves passes none.
    pub touched_bytes: u64,
    /// Slots that clients may write by themselves now, and have not said to be full.
    pub leased_slots: u64,
    /// How fast pages may move there now.
    pub link: LinkUse,
    /// Open connections.
    pub connections: u32,
    /// Volumes it holds anything of: id, VM's name, state, pages, age.
    pub volumes: Vec<VolumeSummary>,
    /// How far it is, where it was told to go and hands over what it has.
    pub leaving: Option<Leaving>,
}

/// One line of `sg status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSummary {
    /// Which one.
    pub volume: VolumeId,
    /// The VM's name, as its source gave it.
    pub vm: String,
    /// Where it stands.
    pub state: VolumeState,
    /// Whether COMMIT was written.
    pub committed: bool,
    /// Pages whose bytes are here.
    pub stored_pages: u64,
    /// Those of them that are copies of what lies at another.
    pub copied_pages: u64,
    /// Seconds since it was created here.
    pub age_s: u64,
    /// What it is called, where it was parked.
    pub parked_as: Option<String>,
    /// Who claimed it since.
    pub owner: Option<NodeId>,
    /// How many copies its pages are to have, and have.
    pub mending: Mending,
}

/// What source and destination say to each other on the control connection.
///
/// ```text
/// source                                   destination
///   Offer ---------------------------------->  build the VM, register its memory
///   <--------------------------------- Accepted
///   (hybrid, after the rounds) Written ----->  take out what is out of date
///   <---------------------------------- Cleared
///   (VM paused) State frames, StateEnd ----->  load it, paused
///   <------------------------------------ Ready
///   (COMMIT written to the volume)
///   Run ------------------------------------>  vCPUs run
///   <---------------------------------- Running
///   Announce frames ------------------------>  pages are at placements
///   Evicted -------------------------------->  nothing is left at the source
///   <--------------------------------- Gathered
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Talk {
    /// Source: a VM is coming. Nothing has happened to it yet.
    Offer {
        /// What it consists of.
        manifest: Manifest,
        /// Intermediaries that may hold pages of it, in the order of their member index.
        members: Vec<Member>,
        /// Microseconds since the start command was accepted at the source.
        elapsed_us: u64,
        /// What happens before it is paused.
        rounds: Rounds,
    },
    /// Destination: memory is there and under userfaultfd.
    Accepted,
    /// Source: the `State` frames before this were the whole state.
    StateEnd {
        /// Bytes in all.
        bytes: u64,
        /// CRC32C over all of them.
        checksum: u32,
    },
    /// Destination: the state is loaded into a paused VM.
    Ready,
    /// Source: COMMIT; run it.
    Run,
    /// Destination: the vCPUs run.
    Running,
    /// Source: the volume gained members: the new list, which begins with the old one.
    Members(Vec<Member>),
    /// Source: it holds nothing that anyone still needs. Every page is announced, in the volume's
    /// index, or installed.
    Evicted,
    /// Destination: it holds every page. The volume may be dissolved, and is, by the destination.
    Gathered,
    /// Source, after the connection broke: it is still the same migration. The destination
    /// answers with its `Holdings`, then `Rejoined`.
    Rejoin,
    /// Destination: the holdings are complete.
    Rejoined {
        /// Whether the vCPUs run already.
        running: bool,
    },
    /// Destination: how far it is, about ten times a second.
    Progress {
        /// Pages it holds, zero ones included.
        held_pages: u64,
        /// Faults that were answered.
        faults: u64,
        /// Application bytes that came from the source.
        direct_bytes: u64,
        /// Application bytes that came from intermediaries.
        gathered_bytes: u64,
    },
    /// Either side: it gives up, before COMMIT. The VM stays at the source.
    Abort {
        /// Why, to match on: whoever hears of it ends with the same.
        kind: ErrorKind,
        /// Why, for the operator.
        reason: String,
    },
    /// Destination: these pages are lost for good.
    Lost(Vec<PageRange>),
    /// Destination, after COMMIT: it failed for good, for this reason.
    Failed {
        /// Why, for the operator.
        reason: String,
    },
    /// Source, in hybrid, before the pause: these pages were written since they were last sent. What the final set will
    /// say of them is known by now: no copy before this round counts.
    Written {
        /// The round that sends them.
        round: Round,
        /// Which. At most [`limits::INDEX_ENTRIES_MAX`] runs.
        runs: Vec<PageRange>,
        /// Whether those were all.
        last: bool,
    },
    /// Destination: nothing of those is in place any more.
    Cleared,
}

/// What happens to a VM's pages while it runs at the source. Until the final set is there (in front of the
/// state, [`super::final_set`]), none of them is final.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rounds {
    /// Nothing: it is paused first.
    #[default]
    None,
    /// They go to intermediaries. The destination may gather them from there, and takes what the final set says is out of
    /// date out again before it loads the state.
    Staged,
    /// They go to the destination, and to intermediaries if there are any. It installs them, a newer round over an
    /// older one, and says READY when it has all of the last ones.
    Installed,
}

/// Encodes a control message, as a frame's body.
///
/// # Errors
/// [`Malformed::Bounds`] when it is longer than [`limits::CONTROL_BYTES_MAX`].
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, Malformed> {
    let bytes = postcard::to_stdvec(message).map_err(|_| Malformed::Message)?;
    if bytes.len() > limits::CONTROL_BYTES_MAX {
        return Err(Malformed::Bounds("control message"));
    }
    Ok(bytes)
}

pub(super) fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(Malformed::Trailing),
        Err(_) => Err(Malformed::Message),
    }
}

pub(super) fn check_members(members: &[Member]) -> Result<(), Malformed> {
    let named = members.iter().all(|m| m.node.name.len() <= limits::NODE_NAME_BYTES_MAX);
    if members.len() > limits::MEMBERS_MAX || !named {
        return Err(Malformed::Bounds("members"));
    }
    Ok(())
}

pub(super) fn check_copies(copies: u8) -> Result<(), Malformed> {
    let may_be = (1..=limits::COPIES_MAX).contains(&usize::from(copies));
    if may_be { Ok(()) } else { Err(Malformed::Bounds("copies")) }
}

pub(super) fn check_manifest(manifest: &Manifest) -> Result<(), Malformed> {
    manifest.check().map_err(|_| Malformed::Bounds("manifest"))
}

impl VmdRequest {
    /// Decodes and checks a request.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let request: Self = decode(bytes)?;
        match &request {
            Self::Create { manifest, members } => {
                check_manifest(manifest)?;
                check_members(members)?;
            }
            Self::Members(members) => check_members(members)?,
            Self::PutState { bytes, .. } if *bytes > limits::STATE_BYTES_MAX as u64 => {
                return Err(Malformed::Bounds("state"));
            }
            Self::Park(parking) => parking.check()?,
            Self::Inherit(inheritance) => inheritance.check()?,
            Self::ClaimParked(claim) => claim.check()?,
            Self::Copies(copies) => check_copies(*copies)?,
            _ => {}
        }
        Ok(request)
    }
}

impl VmdReply {
    /// Decodes and checks an answer.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let reply: Self = decode(bytes)?;
        match &reply {
            Self::Volume(info) => {
                check_manifest(&info.manifest)?;
                check_members(&info.members)?;
                info.parking.as_ref().map_or(Ok(()), Parking::check)?;
                info.owner.as_ref().map_or(Ok(()), check_node)?;
            }
            Self::Verdict(verdict) => verdict.check()?,
            Self::State { bytes, .. } if *bytes > limits::STATE_BYTES_MAX as u64 => {
                return Err(Malformed::Bounds("state"));
            }
            _ => {}
        }
        Ok(reply)
    }
}

impl Talk {
    /// Decodes and checks a message.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let talk: Self = decode(bytes)?;
        match &talk {
            Self::Offer { manifest, members, .. } => {
                check_manifest(manifest)?;
                check_members(members)?;
            }
            Self::Members(members) => check_members(members)?,
            Self::Written { runs, .. } if runs.len() > limits::INDEX_ENTRIES_MAX => {
                return Err(Malformed::Bounds("runs of pages that were written"));
            }
            Self::StateEnd { bytes, .. } if *bytes > limits::STATE_BYTES_MAX as u64 => {
                return Err(Malformed::Bounds("state"));
            }
            _ => {}
        }
        Ok(talk)
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::content::{HashKind, Sharing};
    use crate::manifest::Region;
    use crate::page::InstallUnit;

    fn manifest() -> Manifest {
        Manifest {
            vm: "web-7".into(),
            regions: vec![Region {
                name: "ram".into(),
                guest_address: Some(0),
                length_bytes: 1 << 20,
                unit: InstallUnit::Page,
            }],
            vm_config: vec![1, 2, 3],
            sharing: Some(Sharing { hash: HashKind::Sha1, domain: "tenant 3".into() }),
        }
    }

    fn members(n: usize) -> Vec<Member> {
        let member = |i| Member {
            node: NodeId { name: format!("i{i}"), incarnation: 5 },
            address: SocketAddr::from(([10, 0, 0, 1], 7701)),
        };
        (0..n).map(member).collect()
    }

    #[test]
    fn messages_round_trip() {
        let offer =
            Talk::Offer { manifest: manifest(), members: members(2), elapsed_us: 12, rounds: Rounds::Staged };
        assert_eq!(Talk::decode(&encode(&offer).expect("encodes")), Ok(offer));
        let create = VmdRequest::Create { manifest: manifest(), members: members(3) };
        assert_eq!(VmdRequest::decode(&encode(&create).expect("encodes")), Ok(create));
    }

    #[test]
    fn bounds_hold_after_decoding() {
        let many = encode(&Talk::Members(members(limits::MEMBERS_MAX + 1))).expect("encodes");
        assert_eq!(Talk::decode(&many), Err(Malformed::Bounds("members")));
        let mut empty = manifest();
        empty.regions.clear();
        let offer =
            encode(&Talk::Offer { manifest: empty, members: vec![], elapsed_us: 0, rounds: Rounds::None })
                .expect("encodes");
        assert_eq!(Talk::decode(&offer), Err(Malformed::Bounds("manifest")));
        let mut trailing = encode(&Talk::Ready).expect("encodes");
        trailing.push(0);
        assert_eq!(Talk::decode(&trailing), Err(Malformed::Trailing));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Talk::decode(&bytes);
            let _ = VmdRequest::decode(&bytes);
            let _ = VmdReply::decode(&bytes);
        }
    }
}
