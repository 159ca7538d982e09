//! Finds a parked volume by its name, and what its intermediaries know of it.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{ANSWER_MAX, ClaimOptions, none};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, VolumeId};
use crate::vmd::link::ask;
use crate::vmd::{Class, Connector, Reply, Request, Vmd, VmdClient};
use crate::wire::message::{VmdReply, VmdRequest, VolumeInfo};

/// All that is known of a volume by those that were asked: each of its members, and who its keeper is.
pub(super) fn newest(all: &[VolumeInfo]) -> Option<VolumeInfo> {
    let parking = all.iter().filter_map(|info| info.parking.as_ref()).max_by_key(|parking| parking.term);
    let members = all.iter().map(|info| &info.members).max_by_key(|members| members.len())?;
    let last = all.iter().max_by_key(|info| info.epoch)?;
    Some(VolumeInfo { members: members.clone(), parking: parking.cloned(), ..last.clone() })
}

/// The volume of that name, or id.
pub(super) fn search(vmd: &VmdClient, options: &ClaimOptions) -> Result<VolumeId> {
    let mut found: Vec<VolumeId> = Vec::new();
    let mut failed = None;
    for address in &options.intermediaries {
        match vmd.statistics(*address) {
            Ok(node) => {
                let is_it = |parked_as: &str, volume: VolumeId| {
                    parked_as == options.name || volume.to_string() == options.name
                };
                let parked = node.volumes.iter().filter_map(|v| Some((v.parked_as.as_deref()?, v.volume)));
                found.extend(parked.filter(|(name, volume)| is_it(name, *volume)).map(|(_, volume)| volume));
            }
            Err(error) => {
                tracing::warn!(%address, error = error.chain(), "cannot be asked for the parked VM");
                failed = Some(error);
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    match (&found[..], failed) {
        ([volume], _) => Ok(*volume),
        ([], None) => Err(none(&options.name)),
        ([], Some(error)) => {
            let message =
                format!("none of the intermediaries that answer knows a parked VM {:?}", options.name);
            Err(Error::new(ErrorKind::Unreachable, message).because(error))
        }
        (several, _) => {
            let ids: Vec<_> = several.iter().map(ToString::to_string).collect();
            let message = format!(
                "{} VMs are parked as {:?}: claim one by its volume, {}",
                several.len(),
                options.name,
                ids.join(" or ")
            );
            Err(Error::new(ErrorKind::Volume, message))
        }
    }
}

/// What its members, of those who answer, know of a volume.
pub(super) fn describe_all(connector: &Arc<dyn Connector>, volume: &VolumeInfo) -> Vec<VolumeInfo> {
    let addresses: Vec<_> = volume.members.iter().map(|member| member.address).collect();
    describe(connector, volume.volume, &addresses)
}

/// What those who answer know of a volume.
pub(super) fn describe(
    connector: &Arc<dyn Connector>,
    volume: VolumeId,
    at: &[SocketAddr],
) -> Vec<VolumeInfo> {
    let ask_one = |address: &SocketAddr| -> Result<VolumeInfo> {
        let newest = Epoch(u64::MAX);
        let mut link = connector.connect(*address, volume, newest, Class::Bulk, ANSWER_MAX)?;
        ask(&mut *link, Request::Control(&VmdRequest::Describe), ANSWER_MAX, |reply| match reply {
            Reply::Control(VmdReply::Volume(info)) => Ok(*info),
            _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
        })
    };
    let known = std::thread::scope(|scope| {
        let start = |address| host::thread::Builder::new().spawn_scoped(scope, move || ask_one(address));
        let threads: Vec<_> = at.iter().map(start).collect();
        threads.into_iter().filter_map(|thread| thread.ok()?.join().ok()?.ok()).collect::<Vec<_>>()
    });
    known.into_iter().filter(|info| info.volume == volume && info.parking.is_some()).collect()
}
