//! What another process must know to go on with a VM whose memory is not all there when its destination's process dies.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, NodeId, VolumeId};
use crate::manifest::Manifest;
use crate::wire::message::Member;

/// A VM that runs, or may run at any moment, and has not all of its memory: where the rest of it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// Its pages at the intermediaries.
    pub volume: VolumeId,
    /// Under which they are gathered.
    pub epoch: Epoch,
    /// The source has evicted, or there is none: nobody writes the volume any more.
    pub source_gone: bool,
    /// Who claimed the VM, where it was parked.
    pub claimant: Option<NodeId>,
    /// The intermediaries, as far as they are known.
    pub members: Vec<Member>,
    /// What the VM consists of.
    pub manifest: Manifest,
}
