//! Who takes a volume over: its members that live, else others.

use super::Around;
use super::line::Line;
use super::plan::Group;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, MemberIndex, MemberSet, NodeId, VolumeId};
use crate::limits;
use crate::page::PageIndex;
use crate::server::store::Portrait;
use crate::wire::handover::Inheritance;
use crate::wire::message::{Member, VmdReply, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::parking::Parking;

/// One that takes over.
pub(in crate::server) struct Heir<'s> {
    pub index: MemberIndex,
    pub member: Member,
    pub line: Line<'s>,
    /// It takes over. Others only hear where pages are: they leave as well.
    pub takes: bool,
    /// It has no room for pages.
    pub full: bool,
}

impl Heir<'_> {
    /// Whether it leaves as well.
    pub(super) fn leaves(&mut self) -> bool {
        matches!(
            self.line.control(&VmdRequest::Statistics),
            Ok(VmdReply::Statistics(said)) if said.leaving.is_some()
        )
    }
}

/// Those that take a volume over, and those that hear of it, by their numbers.
pub(in crate::server) struct Heirs<'s> {
    volume: VolumeId,
    epoch: Epoch,
    list: Vec<Heir<'s>>,
    /// Somebody was not met who may be another time.
    missed: bool,
}

impl<'s> Heirs<'s> {
    /// The members that live and know the volume, or do now. Of those in `gone` there is another node at their place.
    pub(in crate::server) fn meet(
        around: &Around<'s>,
        (volume, portrait): (VolumeId, &Portrait),
        gone: &mut Vec<NodeId>,
    ) -> Result<Self> {
        Self::meet_those(around, (volume, portrait), gone, Whom::Everybody)
    }

    /// The members that live and know the volume. Where one knows that it was dissolved, there are none.
    pub(in crate::server) fn meet_again(
        around: &Around<'s>,
        (volume, portrait): (VolumeId, &Portrait),
        gone: &mut Vec<NodeId>,
    ) -> Result<Self> {
        Self::meet_those(around, (volume, portrait), gone, Whom::WhoKnowsIt)
    }

    fn meet_those(
        around: &Around<'s>,
        (volume, portrait): (VolumeId, &Portrait),
        gone: &mut Vec<NodeId>,
        whom: Whom,
    ) -> Result<Self> {
        let mut heirs = Self { volume, epoch: portrait.epoch, list: Vec::new(), missed: false };
        for (at, member) in portrait.said.members.iter().enumerate() {
            let index = MemberIndex(at as u16);
            if index == portrait.me || gone.contains(&member.node) {
                continue;
            }
            let mut line = match heirs.open(around, member.address) {
                Ok(line) if *line.node() == member.node => line,
                Ok(_) => {
                    gone.push(member.node.clone());
                    continue;
                }
                Err(error) => {
                    tracing::debug!(member = %member.node, error = error.chain(), "a member is away");
                    heirs.missed = true;
                    continue;
                }
            };
            match bring_up(around, &mut line, (volume, portrait), whom) {
                Ok(Brought::Up { takes }) => {
                    heirs.list.push(Heir { index, member: member.clone(), line, takes, full: !takes });
                }
                Ok(Brought::Dissolved) if whom == Whom::WhoKnowsIt => {
                    heirs.list.clear();
                    break;
                }
                Ok(Brought::Dissolved | Brought::Nothing) => {}
                Err(error) => {
                    tracing::info!(member = %member.node, error = error.chain(), "a member takes nothing over");
                    heirs.missed = true;
                }
            }
        }
        Ok(heirs)
    }

    fn open(&self, around: &Around<'s>, address: std::net::SocketAddr) -> Result<Line<'s>> {
        Line::open((around.store, around.limit_out), address, (self.volume, self.epoch))
    }

    /// Whether somebody was not met, or is lost, who may be there another time.
    pub(in crate::server) fn missed(&self) -> bool {
        self.missed
    }

    /// Whether nobody takes over.
    pub(in crate::server) fn is_empty(&self) -> bool {
        self.set().is_empty()
    }

    /// Those that take over.
    pub(in crate::server) fn set(&self) -> MemberSet {
        self.list.iter().filter(|heir| heir.takes).map(|heir| heir.index).collect()
    }

    /// All that hear of it.
    pub(in crate::server) fn all(&self) -> MemberSet {
        self.list.iter().map(|heir| heir.index).collect()
    }

    pub(in crate::server) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Heir<'s>> {
        self.list.iter_mut()
    }

    pub(in crate::server) fn iter(&self) -> impl Iterator<Item = &Heir<'s>> {
        self.list.iter()
    }

    pub(in crate::server) fn get(&mut self, index: MemberIndex) -> Option<&mut Heir<'s>> {
        self.list.iter_mut().find(|heir| heir.index == index)
    }

    /// Who gets a group: who has least under way, of those that have room and have it not; one member for all of a unit, so
    /// that where `before` says who got the last one, of the same unit, it is that one.
    pub(in crate::server) fn choose(
        &self,
        group: &Group,
        before: Option<(PageIndex, MemberIndex)>,
    ) -> Option<MemberIndex> {
        let same = before.filter(|(unit, _)| *unit == group.unit).map(|(_, to)| to);
        let least = |index: MemberIndex, under_way| (Some(index) != same, under_way, index);
        let may = self.iter().filter(|heir| !heir.full && !group.has.contains(heir.index));
        may.min_by_key(|heir| least(heir.index, heir.line.under_way())).map(|heir| heir.index)
    }

    /// It cannot be relied on.
    pub(in crate::server) fn lose(&mut self, index: MemberIndex, error: &Error) {
        if let Some(at) = self.list.iter().position(|heir| heir.index == index) {
            let heir = self.list.remove(at);
            self.missed = true;
            tracing::warn!(member = %heir.member.node, error = error.chain(), "who took pages over is lost");
        }
    }

    /// Another intermediary becomes a member, the first that can. Of those that are members, this one included, the first
    /// that does not leave hears of it before the others: two who add members at once do not end with two lists.
    pub(in crate::server) fn add(&mut self, around: &Around<'s>, portrait: &mut Portrait) -> Result<()> {
        if portrait.is_written {
            let message = "its source is at work, and adds members itself: it is waited for";
            return Err(Error::new(ErrorKind::Volume, message));
        }
        if portrait.said.members.len() >= limits::MEMBERS_MAX {
            return Err(Error::new(ErrorKind::Full, "it has had as many intermediaries as it can have"));
        }
        let none =
            "no intermediary of it has room, and no other one is known: name others with --peer or --pool";
        let mut failed = Error::new(ErrorKind::Full, none);
        for address in (around.others)() {
            match self.add_one(around, portrait, address) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// `false` for one that is a member, or was tried.
    fn add_one(
        &mut self,
        around: &Around<'s>,
        portrait: &mut Portrait,
        address: std::net::SocketAddr,
    ) -> Result<bool> {
        let mut line = self.open(around, address)?;
        let node = line.node().clone();
        if portrait.said.members.iter().any(|member| member.node == node) {
            return Ok(false);
        }
        let member = Member { node, address };
        let index = MemberIndex(portrait.said.members.len() as u16);
        let mut said = portrait.said.clone();
        said.members.push(member.clone());
        // First, since a member that takes nothing would be one for ever.
        inherit(&mut line, portrait, said.clone())?;
        let told = VmdRequest::Inherit(Box::new(said.clone()));
        let is_first =
            !around.store.is_leaving() && self.list.first().is_none_or(|heir| portrait.me < heir.index);
        let before = self.list.first_mut().filter(|_| !is_first);
        let first = before.map_or(Ok(()), |first| first.line.control(&told).map(|_| ()));
        let added = first.and_then(|()| {
            around.store.add_members(self.volume, said.members.clone()).map_err(crate::transport::refusal)
        });
        if let Err(error) = added {
            // Somebody else has just become one, as far as is known, or the volume is no more: then this one is none.
            if let Err(error) = line.control(&VmdRequest::Dissolve) {
                tracing::warn!(node = %member.node, error = error.chain(), "may keep a volume of which it is no member");
            }
            return Err(error);
        }
        for heir in self.list.iter_mut().skip((!is_first).into()) {
            if let Err(error) = heir.line.control(&told) {
                tracing::warn!(member = %heir.member.node, error = error.chain(), "cannot be told of a new member");
            }
        }
        tracing::info!(volume = %self.volume, node = %member.node, "takes over, as a new member");
        portrait.said = said;
        self.list.push(Heir { index, member, line, takes: true, full: false });
        Ok(true)
    }

    /// Says who grants claims to all who do not know.
    pub(in crate::server) fn name_keeper(&mut self, portrait: &Portrait, parking: &Parking) {
        let said = Inheritance { parking: Some(parking.clone()), ..portrait.said.clone() };
        let told = VmdRequest::Inherit(Box::new(said));
        for heir in self.list.iter_mut().filter(|heir| heir.member.node != parking.keeper) {
            // Whoever claims the volume asks all of them, the keeper among them.
            if let Err(error) = heir.line.control(&told) {
                tracing::info!(member = %heir.member.node, error = error.chain(), "does not know who grants claims");
            }
        }
    }
}

/// Which members are met.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whom {
    /// All: one that does not know the volume does then.
    Everybody,
    /// A volume that nobody knows any more is not made anew.
    WhoKnowsIt,
}

/// What telling a member came to.
enum Brought {
    /// It knows all that is known here. Whether it takes over.
    Up { takes: bool },
    /// It has nothing to do with it, or all begins anew.
    Nothing,
    /// It knows that the volume was dissolved.
    Dissolved,
}

/// Tells a member what it does not know.
fn bring_up(
    around: &Around<'_>,
    line: &mut Line<'_>,
    (volume, portrait): (VolumeId, &Portrait),
    whom: Whom,
) -> Result<Brought> {
    match line.control(&VmdRequest::Describe) {
        Ok(VmdReply::Volume(info)) if info.state == VolumeState::Dissolved => return Ok(Brought::Dissolved),
        Ok(VmdReply::Volume(info)) => {
            if info.members.len() > portrait.said.members.len() {
                let learned = around.store.add_members(volume, info.members);
                learned.map_err(crate::transport::refusal)?;
                // With what was learned, all begins anew.
                return Ok(Brought::Nothing);
            }
            if knows_all(&info, portrait) {
                return Ok(Brought::Up { takes: true });
            }
        }
        Ok(_) => return Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
        // It has not heard of it.
        Err(error) if error.kind == ErrorKind::Volume && whom == Whom::WhoKnowsIt => {
            return Ok(Brought::Nothing);
        }
        Err(error) if error.kind == ErrorKind::Volume => {}
        Err(error) => return Err(error),
    }
    match inherit(line, portrait, portrait.said.clone()) {
        Ok(()) => Ok(Brought::Up { takes: true }),
        // As it says that it leaves.
        Err(error) if error.kind == ErrorKind::Full => Ok(Brought::Up { takes: false }),
        Err(error) => Err(error),
    }
}

/// Says all that is known here, the VM's state and the final set included.
fn inherit(line: &mut Line<'_>, portrait: &Portrait, said: Inheritance) -> Result<()> {
    if !portrait.pieces.is_empty() {
        // Whoever finds the state finds what goes ahead of it.
        line.control(&VmdRequest::Inherit(Box::new(said.clone())))?;
        for (number, piece) in (0..).zip(&portrait.pieces) {
            let (bytes, checksum) = line.push_state(&piece.bytes)?;
            line.control(&VmdRequest::InheritPiece { number, bytes, checksum })?;
        }
    }
    let blob = portrait.blob.as_ref().map(|blob| line.push_state(&blob.bytes)).transpose()?;
    line.control(&VmdRequest::Inherit(Box::new(Inheritance { blob, ..said }))).map(|_| ())
}

fn knows_all(info: &VolumeInfo, portrait: &Portrait) -> bool {
    let Portrait { epoch, said, blob, .. } = portrait;
    let term = |parking: &Option<Parking>| parking.as_ref().map(|parking| parking.term);
    (info.has_state || blob.is_none())
        && (info.committed || !said.committed)
        && info.members.len() == said.members.len()
        && info.epoch >= *epoch
        && term(&info.parking) >= term(&said.parking)
        && info.mending.copies >= said.copies
}
