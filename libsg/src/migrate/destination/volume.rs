//! What the destination asks a volume's intermediaries about COMMIT, when the source is not there to say.

use std::time::Duration;

use crate::error::{ErrorKind, Result};
use crate::gather::Shared;
use crate::ids::{Epoch, VolumeId};
use crate::vmd::{Connector, visit, visit_all};
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

/// Of members that came when an intermediary left, those know that were there: the new ones give the volume's memory back
/// as well. Names those that could not be told.
pub(super) fn dissolve_others(shared: &Shared) -> Vec<String> {
    let of = (shared.volume, shared.epoch);
    let desks = shared.members();
    let living = desks.iter().filter(|desk| !desk.state.lock().gone);
    let living: Vec<Member> = living.map(|desk| desk.member.clone()).collect();
    let lists =
        visit_all(&*shared.connector, &living, of, &VmdRequest::Describe, ANSWER_MAX, |reply| match reply {
            VmdReply::Volume(info) => Some(info.members),
            _ => None,
        });
    let longest = lists.into_iter().flatten().max_by_key(Vec::len).unwrap_or_default();
    let others = longest.get(desks.len()..).unwrap_or_default();
    let told = visit_all(&*shared.connector, others, of, &VmdRequest::Dissolve, ANSWER_MAX, |_| Some(()));
    let failed = |(member, told): (&Member, Result<()>)| match told {
        Ok(()) => None,
        Err(error) if error.kind == ErrorKind::Volume => None,
        Err(_) => Some(member.node.to_string()),
    };
    others.iter().zip(told).filter_map(failed).collect()
}
