//! Who says which destination may have a parked volume.
//!
//! A pool that has an engine for such decisions (etcd) implements [`Arbiter`] over it. Where there is none the volume's
//! one keeper decides, an intermediary that was named when it was parked ([`KeeperArbiter`]). There is no
//! election: of a keeper that cannot be reached nobody knows what it granted, and only an operator may know better.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::link::{Class, Connector, Reply, Request, ask};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, VolumeId};
use crate::wire::message::{Member, VmdReply, VmdRequest, VolumeInfo};
use crate::wire::parking::{Claim, Parking, Verdict};

/// Finds the engine that a parked volume names ([`Parking::arbiter`](crate::wire::parking::Parking::arbiter)).
///
/// # Errors
/// [`ErrorKind::Input`] for one that it does not know.
pub type Engines = Arc<dyn Fn(&str) -> Result<Arc<dyn Arbiter>> + Send + Sync>;

/// Says who may have a parked volume.
///
/// # Contract
/// - Of all claims of a volume, the one that was granted last counts. Its epoch is above those before.
/// - Once [`Self::run`] was done under an epoch, no claim of the volume is granted any more, to anybody but its owner, who may
///   have it again under a newer epoch.
/// - `run` fails for whoever was replaced.
pub trait Arbiter: Send + Sync {
    /// Asks for a volume. The same claim may be made again, whether its answer was lost or to say that the claimant is
    /// still at it: whoever does not, and does not run the VM, is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] or [`ErrorKind::Timeout`] when nobody can be asked: the claim may have been granted;
    /// [`ErrorKind::Volume`] when there is no such volume any more.
    fn claim(&self, parked: &VolumeInfo, claim: &Claim) -> Result<Verdict>;

    /// The VM runs at the claimant: to be called before its vCPUs do. Done again it changes nothing.
    ///
    /// # Errors
    /// As [`Self::claim`], where the first two leave open whether it was written down: the claimant asks again, and
    /// neither runs the VM nor takes it for somebody else's until it knows. [`ErrorKind::Fenced`] and
    /// [`ErrorKind::Volume`] when it is no longer the claimant's.
    fn run(&self, parked: &VolumeInfo, claim: &Claim) -> Result<()>;
}

/// How often it is asked who the keeper is, where that is away.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The volume's keeper decides. Where it cannot be reached, or was never told that the volume is parked, and the claim is
/// forced, all other intermediaries of the volume that can be reached do: two who force it at once, each reaching others, both get it. That is for
/// operators who know that nobody else does.
pub struct KeeperArbiter {
    connector: Arc<dyn Connector>,
    timeout: Duration,
}

impl KeeperArbiter {
    /// Each intermediary has `timeout` for each question.
    #[must_use]
    pub fn new(connector: Arc<dyn Connector>, timeout: Duration) -> Self {
        Self { connector, timeout }
    }

    /// What the keeper says. One that is away may have left, and named another: the members are asked who, for a while,
    /// since between the two nobody decides.
    fn at_keeper<T>(
        &self,
        parked: &VolumeInfo,
        (epoch, request): (Epoch, &VmdRequest),
        take: impl Fn(VmdReply) -> Option<T>,
    ) -> Result<T> {
        let mut parking = parked.parking.clone().ok_or_else(not_parked)?;
        let mut members = parked.members.clone();
        let deadline = host::now() + self.timeout;
        loop {
            let keeper = members.iter().find(|member| member.node == parking.keeper);
            let keeper = keeper.ok_or_else(|| Error::new(ErrorKind::Unreachable, "it is no member"))?;
            let of = (parked.volume, epoch);
            let away = match visit(&*self.connector, keeper, of, request, self.timeout, &take) {
                Err(error) if is_away(&error) => error,
                decided => return decided,
            };
            match self.newest(parked.volume, &members) {
                Some((newer, list)) if newer.term > parking.term => (parking, members) = (newer, list),
                _ if host::now() >= deadline => return Err(away),
                _ => host::thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// Who the keeper is, as far as those know who can be reached; with the members that this one knows.
    fn newest(&self, volume: VolumeId, members: &[Member]) -> Option<(Parking, Vec<Member>)> {
        let of = (volume, Epoch(u64::MAX));
        let described = visit_all(
            &*self.connector,
            members,
            of,
            &VmdRequest::Describe,
            self.timeout,
            |reply| match reply {
                VmdReply::Volume(info) => info.parking.clone().map(|parking| (parking, info.members)),
                _ => None,
            },
        );
        described.into_iter().flatten().max_by_key(|(parking, members)| (parking.term, members.len()))
    }

    /// What those say who are not the keeper.
    fn at_others<T: Send>(
        &self,
        parked: &VolumeInfo,
        (epoch, request): (Epoch, &VmdRequest),
        take: impl Fn(VmdReply) -> Option<T> + Sync,
    ) -> Vec<Result<T>> {
        let is_keeper = |member: &&Member| parked.parking.as_ref().is_some_and(|p| p.keeper == member.node);
        let others: Vec<Member> = parked.members.iter().filter(|m| !is_keeper(m)).cloned().collect();
        visit_all(&*self.connector, &others, (parked.volume, epoch), request, self.timeout, take)
    }
}

impl Arbiter for KeeperArbiter {
    fn claim(&self, parked: &VolumeInfo, claim: &Claim) -> Result<Verdict> {
        let asked = (claim.epoch, &VmdRequest::ClaimParked(claim.clone()));
        match self.at_keeper(parked, asked, verdict) {
            Ok(Verdict::NotParked) if claim.force => {}
            Err(error) if is_away(&error) && claim.force => {}
            Err(error) if is_away(&error) => return Err(without_keeper(parked).because(error)),
            decided => return decided,
        }
        let mut granted = Err(nobody(parked));
        for answer in self.at_others(parked, asked, verdict) {
            match answer {
                Ok(Verdict::Granted) => granted = Ok(Verdict::Granted),
                Ok(Verdict::NotParked) => {}
                // Whoever knows better is believed.
                Ok(other) => return Ok(other),
                Err(error) if is_away(&error) => {}
                Err(error) => return Err(error),
            }
        }
        granted
    }

    fn run(&self, parked: &VolumeInfo, claim: &Claim) -> Result<()> {
        let asked = (claim.epoch, &VmdRequest::Run);
        match self.at_keeper(parked, asked, done) {
            Err(error) if is_away(&error) && !claim.force => {
                return Err(without_keeper(parked).because(error));
            }
            // One that was not told of the claim knows nothing.
            Err(error) if claim.force && (is_away(&error) || error.kind == ErrorKind::Volume) => {}
            decided => return decided,
        }
        let mut ran = Err(nobody(parked));
        for answer in self.at_others(parked, asked, done) {
            match answer {
                Ok(()) => ran = Ok(()),
                Err(error) if is_away(&error) || error.kind == ErrorKind::Volume => {}
                Err(error) => return Err(error),
            }
        }
        ran
    }
}

/// Takes a verdict.
pub(crate) fn verdict(reply: VmdReply) -> Option<Verdict> {
    match reply {
        VmdReply::Verdict(verdict) => Some(verdict),
        _ => None,
    }
}

/// Takes what is answered to a request that was done.
pub(crate) fn done(reply: VmdReply) -> Option<()> {
    matches!(reply, VmdReply::Done).then_some(())
}

/// Whether nothing is known of what was asked.
pub(crate) fn is_away(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Timeout)
}

/// Asks one intermediary, who is who it was when it became a member, over a connection of its own.
pub(crate) fn visit<T>(
    connector: &dyn Connector,
    member: &Member,
    (volume, epoch): (VolumeId, Epoch),
    request: &VmdRequest,
    timeout: Duration,
    take: impl FnOnce(VmdReply) -> Option<T>,
) -> Result<T> {
    let mut link = connector.connect(member.address, volume, epoch, Class::Bulk, timeout)?;
    if link.member().node != member.node {
        let message = format!(
            "it was restarted, as {}, and has forgotten the volume and who claimed it",
            link.member().node
        );
        return Err(Error::new(ErrorKind::Unreachable, message).at(&member.node));
    }
    ask(&mut *link, Request::Control(request), timeout, |reply| match reply {
        Reply::Control(reply) => {
            take(reply).ok_or_else(|| Error::new(ErrorKind::Protocol, "an answer to another question"))
        }
        _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
    })
    .map_err(|error| error.at(&member.node))
}

/// Asks several at once; their answers in the same order.
pub(crate) fn visit_all<T: Send>(
    connector: &dyn Connector,
    members: &[Member],
    of: (VolumeId, Epoch),
    request: &VmdRequest,
    timeout: Duration,
    take: impl Fn(VmdReply) -> Option<T> + Sync,
) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let take = &take;
        let ask = |member| move || visit(connector, member, of, request, timeout, take);
        let start = |member| host::thread::Builder::new().spawn_scoped(scope, ask(member));
        let threads: Vec<_> = members.iter().map(start).collect();
        let lost = || Error::new(ErrorKind::Poisoned, "a thread that asked an intermediary panicked");
        threads.into_iter().map(|thread| thread?.join().unwrap_or_else(|_| Err(lost()))).collect()
    })
}

fn name_of(parked: &VolumeInfo) -> &str {
    parked.parking.as_ref().map_or("", |parking| &parking.name)
}

fn not_parked() -> Error {
    Error::new(ErrorKind::Volume, "the volume was not parked: its source has not evicted it")
}

fn without_keeper(parked: &VolumeInfo) -> Error {
    let keeper = parked.parking.as_ref().map(|parking| parking.keeper.to_string()).unwrap_or_default();
    let at: Option<SocketAddr> = parked
        .members
        .iter()
        .find(|member| parked.parking.as_ref().is_some_and(|parking| parking.keeper == member.node))
        .map(|member| member.address);
    let at = at.map(|at| format!(" at {at}")).unwrap_or_default();
    let message = format!(
        "the keeper {keeper}{at} of the parked VM {:?} cannot be asked, and only it knows whether another host has claimed \
         it: bring it back, or, if you know that the VM runs nowhere, claim it with --force",
        name_of(parked)
    );
    Error::new(ErrorKind::Unreachable, message)
}

fn nobody(parked: &VolumeInfo) -> Error {
    let message = format!("no intermediary of the parked VM {:?} can be reached", name_of(parked));
    Error::new(ErrorKind::Unreachable, message)
}
