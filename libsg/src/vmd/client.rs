//! The VMD client: what is common to all backends, written once above [`Link`]. Stateless: any client
//! that knows one intermediary of a volume finds every page of it.

mod pages;
mod peers;
mod volume;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::device::{Role, Vmd, Volume};
use super::link::{Class, Connector, Reply, Request, ask};
use crate::content::ContentHasher;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::wire::message::{Member, NodeStatistics, VmdReply, VmdRequest, VolumeInfo};
use peers::Peers;
use volume::ClientVolume;

/// The VMD over any backend.
#[derive(Clone)]
pub struct VmdClient {
    connector: Arc<dyn Connector>,
    timeout: Duration,
}

impl VmdClient {
    /// Over this backend. Each intermediary has `timeout` for each request.
    #[must_use]
    pub fn new(connector: Arc<dyn Connector>, timeout: Duration) -> Self {
        Self { connector, timeout }
    }

    /// Hashes the volume's pages, where it shares them.
    fn hasher(&self, manifest: &Manifest) -> Option<ContentHasher> {
        manifest.sharing.as_ref().map(|sharing| self.connector.hasher(sharing))
    }

    fn ask_once<T>(
        &self,
        address: SocketAddr,
        (volume, epoch): (VolumeId, Epoch),
        request: &VmdRequest,
        take: impl FnOnce(VmdReply) -> Option<T>,
    ) -> Result<T> {
        let mut link = self.connector.connect(address, volume, epoch, Class::Bulk, self.timeout)?;
        ask(&mut *link, Request::Control(request), self.timeout, |reply| match reply {
            Reply::Control(reply) => take(reply).ok_or_else(mismatch),
            _ => Err(mismatch()),
        })
    }

    /// Opens a volume of which only these members are there, as the caller knows: no other is asked, or waited for, or
    /// named where one of them holds a copy.
    pub(crate) fn open_among(
        &self,
        volume: VolumeId,
        role: Role,
        members: &[Member],
    ) -> Result<Box<dyn Volume>> {
        let addresses: Vec<SocketAddr> = members.iter().map(|member| member.address).collect();
        let opened = self.opened(volume, role, &addresses)?;
        opened.keep_only(members);
        Ok(Box::new(opened))
    }

    fn opened(&self, volume: VolumeId, role: Role, intermediaries: &[SocketAddr]) -> Result<ClientVolume> {
        let info = self.find(volume, intermediaries)?;
        let epoch = match role {
            Role::Writer(epoch) if epoch < info.epoch => {
                return Err(Error::new(ErrorKind::Fenced, "the volume has a newer owner"));
            }
            Role::Writer(epoch) => epoch,
            Role::Reader => info.epoch,
        };
        let peers = Peers::new(Arc::clone(&self.connector), volume, epoch, self.timeout);
        peers.extend(info.members)?;
        let hasher = self.hasher(&info.manifest);
        Ok(ClientVolume::new(peers, info.manifest, hasher, role != Role::Reader))
    }

    /// What the intermediaries know of a volume: from the one that knows most of its members.
    fn find(&self, volume: VolumeId, intermediaries: &[SocketAddr]) -> Result<VolumeInfo> {
        let mut best: Option<VolumeInfo> = None;
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary to ask for the volume");
        for address in intermediaries {
            let newest = Epoch(u64::MAX);
            let answer =
                self.ask_once(*address, (volume, newest), &VmdRequest::Describe, |reply| match reply {
                    VmdReply::Volume(info) => Some(*info),
                    _ => None,
                });
            match answer {
                Ok(info) => {
                    let rank = |info: &VolumeInfo| (info.epoch, info.members.len());
                    if best.as_ref().is_none_or(|best| rank(best) < rank(&info)) {
                        best = Some(info);
                    }
                }
                // That it is not known here says more than that somebody is out of reach.
                Err(error) if failed.kind != ErrorKind::Volume => failed = error,
                Err(_) => {}
            }
        }
        best.ok_or(failed)
    }
}

impl Vmd for VmdClient {
    fn create(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        manifest: &Manifest,
        intermediaries: &[SocketAddr],
    ) -> Result<Box<dyn Volume>> {
        manifest.check()?;
        let peers = Peers::new(Arc::clone(&self.connector), volume, epoch, self.timeout);
        let created = ClientVolume::new(peers, manifest.clone(), self.hasher(manifest), true);
        created.grow(intermediaries)?;
        Ok(Box::new(created))
    }

    fn open(&self, volume: VolumeId, role: Role, intermediaries: &[SocketAddr]) -> Result<Box<dyn Volume>> {
        Ok(Box::new(self.opened(volume, role, intermediaries)?))
    }

    fn statistics(&self, intermediary: SocketAddr) -> Result<NodeStatistics> {
        let nothing = (VolumeId(0), Epoch(0));
        self.ask_once(intermediary, nothing, &VmdRequest::Statistics, |reply| match reply {
            VmdReply::Statistics(statistics) => Some(statistics),
            _ => None,
        })
    }
}

fn mismatch() -> Error {
    Error::new(ErrorKind::Protocol, "the intermediary answered something else than was asked")
}

/// Finds out who is at these addresses. Those that cannot be reached are left out, with a warning.
fn meet(peers: &Peers, intermediaries: &[SocketAddr]) -> Result<Vec<Member>> {
    if intermediaries.len() > limits::MEMBERS_MAX {
        let message = format!("{} intermediaries, more than {}", intermediaries.len(), limits::MEMBERS_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    let mut members: Vec<Member> = Vec::new();
    let mut failed = Error::new(ErrorKind::Unreachable, "no intermediaries are named");
    for address in intermediaries {
        match peers.connect(*address, Class::Bulk) {
            Ok(link) if members.iter().any(|member| member.node == link.member().node) => {}
            Ok(link) => members.push(Member { node: link.member().node.clone(), address: *address }),
            Err(error) => {
                tracing::warn!(%address, error = error.chain(), "an intermediary is left out");
                failed = error;
            }
        }
    }
    if members.is_empty() { Err(failed) } else { Ok(members) }
}
