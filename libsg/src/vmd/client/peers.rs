//! The members of a volume as one client knows them: a link to each, and whether it is dead.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::mismatch;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::limits;
use crate::vmd::link::{Class, Connector, Link, Reply, Request, ask};
use crate::wire::message::{Member, VmdReply, VmdRequest};

/// All members. The list only grows.
pub(super) struct Peers {
    connector: Arc<dyn Connector>,
    volume: VolumeId,
    epoch: Mutex<Epoch>,
    timeout: Duration,
    list: RwLock<Vec<Arc<Mutex<Peer>>>>,
}

struct Peer {
    member: Member,
    link: Option<Box<dyn Link>>,
    dead: bool,
}

impl Peers {
    pub fn new(connector: Arc<dyn Connector>, volume: VolumeId, epoch: Epoch, timeout: Duration) -> Self {
        Self { connector, volume, epoch: Mutex::new(epoch), timeout, list: RwLock::default() }
    }

    pub const fn volume(&self) -> VolumeId {
        self.volume
    }

    pub fn epoch(&self) -> Epoch {
        *self.epoch.lock()
    }

    /// From now on under a newer epoch, on new connections.
    pub fn set_epoch(&self, epoch: Epoch) {
        *self.epoch.lock() = epoch;
        self.list.read().iter().for_each(|peer| peer.lock().link = None);
    }

    pub fn extend(&self, members: Vec<Member>) -> Result<()> {
        let mut list = self.list.write();
        if list.len() + members.len() > limits::MEMBERS_MAX {
            let message = format!("more than {} intermediaries of one volume", limits::MEMBERS_MAX);
            return Err(Error::new(ErrorKind::Input, message));
        }
        list.extend(
            members.into_iter().map(|member| Arc::new(Mutex::new(Peer { member, link: None, dead: false }))),
        );
        Ok(())
    }

    /// Takes for dead who is not among these.
    pub fn keep_only(&self, members: &[Member]) {
        for peer in self.list.read().iter() {
            let mut peer = peer.lock();
            peer.dead |= !members.contains(&peer.member);
        }
    }

    pub fn members(&self) -> Vec<Member> {
        self.list.read().iter().map(|peer| peer.lock().member.clone()).collect()
    }

    pub fn alive(&self) -> Vec<bool> {
        self.list.read().iter().map(|peer| !peer.lock().dead).collect()
    }

    /// The members that are not known to be dead.
    pub fn living(&self) -> Vec<MemberIndex> {
        let alive = self.alive();
        (0..alive.len()).filter(|at| alive[*at]).map(|at| MemberIndex(at as u16)).collect()
    }

    pub fn connect(&self, address: SocketAddr, class: Class) -> Result<Box<dyn Link>> {
        self.connector.connect(address, self.volume, self.epoch(), class, self.timeout)
    }

    fn peer(&self, member: MemberIndex) -> Result<Arc<Mutex<Peer>>> {
        let peer = self.list.read().get(member.as_usize()).map(Arc::clone);
        peer.ok_or_else(|| Error::new(ErrorKind::Input, format!("the volume has no member {member}")))
    }

    /// A new connection to a member, which is who it was.
    pub fn link(&self, member: MemberIndex, class: Class) -> Result<Box<dyn Link>> {
        let known = self.peer(member)?.lock().member.clone();
        let link = self.connect(known.address, class)?;
        if link.member().node != known.node {
            let message = format!("the intermediary restarted as {}: its pages are lost", link.member().node);
            return Err(Error::new(ErrorKind::Unreachable, message).at(&known.node));
        }
        Ok(link)
    }

    /// Asks a member, on the connection that is kept for it. A connection that broke is made anew once;
    /// where that fails the member is dead.
    pub fn ask<T>(
        &self,
        member: MemberIndex,
        request: Request<'_>,
        mut take: impl FnMut(Reply<'_>) -> Result<T>,
    ) -> Result<T> {
        let peer = self.peer(member)?;
        let mut peer = peer.lock();
        if peer.dead {
            return Err(Error::new(ErrorKind::Unreachable, "the intermediary is gone").at(&peer.member.node));
        }
        let mut fresh = false;
        loop {
            let mut link = match peer.link.take() {
                Some(link) => link,
                None => {
                    fresh = true;
                    // `link` looks at the peer's name, which is locked here.
                    let known = peer.member.clone();
                    let found = self.connect(known.address, Class::Bulk);
                    let found =
                        found.and_then(|link| match link.member().node == known.node {
                            true => Ok(link),
                            false => Err(Error::new(ErrorKind::Unreachable, "the intermediary restarted")
                                .at(&known.node)),
                        });
                    if found.as_ref().is_err_and(|error| error.kind == ErrorKind::Unreachable) {
                        peer.dead = true;
                        tracing::warn!(intermediary = %known.node, "an intermediary of the volume is gone");
                    }
                    found?
                }
            };
            match ask(&mut *link, request, self.timeout, &mut take) {
                Err(error) if error.kind == ErrorKind::Unreachable && !fresh => {}
                // An answer may still come for what took too long, or be half read: not on this link.
                Err(error) if matches!(error.kind, ErrorKind::Timeout | ErrorKind::Protocol) => {
                    return Err(error);
                }
                Err(error) if error.kind == ErrorKind::Unreachable => {
                    peer.dead = true;
                    return Err(error);
                }
                result => {
                    peer.link = Some(link);
                    return result;
                }
            }
        }
    }

    /// Asks every living member the same; how many did it.
    ///
    /// # Errors
    /// That of one that says that there is a newer owner; else, when none did it, the last one.
    pub fn ask_all(&self, request: Request<'_>) -> Result<usize> {
        let mut done = 0;
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary of the volume is left");
        for member in self.living() {
            match self.ask(member, request, |_| Ok(())) {
                Ok(()) => done += 1,
                Err(error) if error.kind == ErrorKind::Fenced => return Err(error),
                Err(error) => failed = error,
            }
        }
        if done == 0 { Err(failed) } else { Ok(done) }
    }

    /// As [`Self::ask_all`], for a control request.
    pub fn control_all(&self, request: &VmdRequest) -> Result<usize> {
        self.ask_all(Request::Control(request))
    }
}

/// Asks a member a control request.
pub(super) fn control<T>(
    peers: &Peers,
    member: MemberIndex,
    request: &VmdRequest,
    take: impl Fn(VmdReply) -> Option<T>,
) -> Result<T> {
    peers.ask(member, Request::Control(request), |reply| match reply {
        Reply::Control(reply) => take(reply).ok_or_else(mismatch),
        _ => Err(mismatch()),
    })
}
