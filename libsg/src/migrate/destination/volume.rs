//! What the destination asks a volume's intermediaries about COMMIT, when the source is not there to say.

use std::time::Duration;

use crate::error::Result;
use crate::ids::{Epoch, VolumeId};
use crate::vmd::{Connector, visit};
use crate::wire::message::{Member, VmdReply, VmdRequest};

/// How long one intermediary may take.
const ANSWER_MAX: Duration = Duration::from_millis(500);

/// Whether any intermediary knows that COMMIT was given. One that says so is enough: the source writes
/// it only once it will never run the VM again.
pub(super) fn is_committed(
    connector: &dyn Connector,
    members: &[Member],
    volume: VolumeId,
    epoch: Epoch,
) -> bool {
    members.iter().any(|member| match describe(connector, member, volume, epoch) {
        Ok(committed) => committed,
        Err(error) => {
            tracing::info!(member = %member.node, error = error.chain(), "cannot be asked for COMMIT");
            false
        }
    })
}

fn describe(connector: &dyn Connector, member: &Member, volume: VolumeId, epoch: Epoch) -> Result<bool> {
    visit(connector, member, (volume, epoch), &VmdRequest::Describe, ANSWER_MAX, |reply| match reply {
        VmdReply::Volume(info) => Some(info.committed && info.volume == volume),
        _ => None,
    })
}
