//! The thread `sg-source` of a VM whose source died with its process behind COMMIT, or while it was parked, where its memory
//! outlived that: another process takes its place.
//!
//! ```text
//!   what the index knows, what the destination holds: safe  -->  PageSource::outcome
//!   OutgoingVm::committed: the memory comes again, without that
//!   scatter, as before  -->  "evicted"
//! ```
//!
//! One that was being parked ([`parked_on`](super::parked_on)) has no destination, and may be before COMMIT still.
//!
//! It has the place of the one before under the same epoch: the destination reads under it, and dissolves. So whoever goes on
//! has to be the only one by what its VM is. What the one before had sent may arrive late: a page that is put twice is the same
//! page, but an index entry for it would take the place of one that was put since. So each member is told that there is
//! another writer ([`VmdRequest::Fence`]) before its index is read.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::manager::{Left, Manager, spawn};
use super::{Control, Outgoing, SourceOptions, To, check};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, MemberIndex, NodeId, Round, VolumeId};
use crate::limits;
use crate::manifest::Manifest;
use crate::migrate::members::{MEMBER_TIME, Members, Patience, Seat, ask_all, zone};
use crate::migrate::recruit::Recruiter;
use crate::migrate::{Event, Mode, OutgoingVm};
use crate::page::{PageIndex, PageRange};
use crate::scatter::session::{self, Destination};
use crate::scatter::telling::Feed;
use crate::scatter::{Planner, Scatter};
use crate::source::PageSource;
use crate::vmd::link::ask;
use crate::vmd::{Class, Link, Reply, Request};
use crate::wire::IndexEntry;
use crate::wire::message::{Member, VmdReply, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::placement::{index_turn, owner_runs};

/// A VM that has left, or is being parked: it is paused, its state is elsewhere, and not all of its memory is safe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unscattered {
    /// Its pages at the intermediaries.
    pub volume: VolumeId,
    /// Under which they are scattered.
    pub epoch: Epoch,
    /// Where it goes.
    pub to: To,
    /// Of one that is parked, from right before COMMIT on: the intermediary that grants claims. Before that nobody was told
    /// that it may be claimed.
    pub keeper: Option<NodeId>,
    /// How its memory leaves.
    pub mode: Mode,
    /// The round that is sent, the last one.
    pub round: Round,
    /// How many intermediaries hold each page.
    pub replicas: u8,
    /// The intermediaries, those that died included.
    pub members: Vec<Member>,
    /// What the VM consists of.
    pub manifest: Manifest,
}

/// Goes on with a VM whose source died with its process behind COMMIT, or while it was parked, of which the memory is still
/// there: in the place of that process, which has to be gone. The source of pages is told which are safe, by
/// [`PageSource::outcome`], before [`OutgoingVm::committed`] lets it begin (of one that is not committed,
/// [`OutgoingVm::go_on`]); it names the others when they can be had. Of the options count secret, connector, limit and observer:
/// where and how the VM leaves stays as it was, and nobody takes the place of an intermediary that dies.
///
/// One that is not committed may be called off, and runs here again where it cannot be parked. One that was parked, and even
/// claimed, before anybody said so here, is evicted at once.
///
/// # Errors
/// [`ErrorKind::Input`] for what is out of bounds. What happens later is told by the handle: [`ErrorKind::Fenced`] where the volume
/// has another owner by now, [`ErrorKind::Volume`] where nobody has it any more, and nothing was changed; or as for
/// [`start`](super::start).
pub fn resume(
    vm: Box<dyn OutgoingVm>,
    source: Arc<dyn PageSource>,
    of: Unscattered,
    options: SourceOptions,
) -> Result<Outgoing> {
    check(&of.manifest, of.members.len(), of.replicas)?;
    let options = SourceOptions {
        to: of.to.clone(),
        intermediaries: of.members.iter().map(|member| member.address).collect(),
        replacements: None,
        replicas: of.replicas,
        mode: of.mode,
        ..options
    };
    options.to.check(&options)?;
    let control = Control::new(&options);
    if of.is_committed() {
        control.set_committed();
    }
    let manifest = of.manifest.clone();
    let lead = move |manager: Manager| match of.to {
        To::Destination(address) => manager.go_on(&of, address),
        To::Parked { .. } => manager.park_on(&of),
    };
    spawn(control, lead, (vm, source, manifest, options))
}

impl Unscattered {
    /// Whether COMMIT is given, or was about to be: the VM never runs at its source again.
    #[must_use]
    pub const fn is_committed(&self) -> bool {
        matches!(self.to, To::Destination(_)) || self.keeper.is_some()
    }

    /// What is scattered.
    pub(in crate::migrate) fn of(
        scatter: &Scatter,
        (options, manifest): (&SourceOptions, &Manifest),
    ) -> Self {
        Self {
            volume: scatter.volume,
            epoch: scatter.epoch,
            to: options.to.clone(),
            keeper: None,
            mode: options.mode,
            round: scatter.planner.lock().round(),
            replicas: options.replicas,
            members: scatter.members.list(),
            manifest: manifest.clone(),
        }
    }
}

impl Manager {
    fn go_on(mut self, of: &Unscattered, address: SocketAddr) -> Result<()> {
        let found = Found::look(&self.options, of).checked(of)?;
        let (scatter, mut members) = self.take_place(of, found)?;
        if of.replicas == 1 {
            self.read_index(&scatter, &mut members);
        }
        // Who has it already says so again.
        ask_all(
            &mut members,
            || Request::Control(&VmdRequest::Commit),
            Patience::Even,
            |member, error| scatter.member_lost(member, &error),
        );
        let secret = self.options.secret.clone();
        let destination = Destination { address, secret, volume: of.volume, epoch: of.epoch };
        let session = session::rejoin(&scatter, &destination, &*self.control)
            .inspect_err(|error| {
                let message = format!("destination {address}: {}", error.chain());
                (self.options.observer)(&Event::NodeLost { message });
            })
            .ok();
        let (safe, total) = scatter.planner.lock().progress();
        tracing::info!(volume = %of.volume, safe, total, "another process goes on with it");
        scatter.take_stock()?;
        // What is safe is told first.
        Feed::default().turn(&scatter)?;
        self.vm.committed();
        let recruiter = Mutex::new(Recruiter::new(&self.options, &self.manifest, (of.volume, of.epoch)));
        let left = Left { session, members, recruiter: &recruiter, rounds: None, downtime: None };
        self.scatter(&scatter, &destination, left)
    }

    /// The books of one who goes on, and who was found to go on with.
    pub(super) fn take_place(&self, of: &Unscattered, found: Found) -> Result<(Arc<Scatter>, Members)> {
        let scatter = self.books(of)?;
        // The destination may not have heard of those that came later.
        for member in found.members.get(of.members.len()..).unwrap_or_default() {
            scatter.add_member(member.clone())?;
        }
        scatter.index.follow();
        let mut members = Members::new();
        for (member, seat) in (0..).map(MemberIndex).zip(found.seats) {
            members.push(seat.map_err(|error| scatter.member_lost(member, &error)).ok());
        }
        (0..).map(MemberIndex).zip(&members).for_each(|(member, seat)| {
            seat.iter().for_each(|seat| seat.tell_zone(&scatter, member));
        });
        Ok((scatter, members))
    }

    /// Books in which nothing is safe yet.
    pub(super) fn books(&self, of: &Unscattered) -> Result<Arc<Scatter>> {
        let planner = Planner::new(&self.manifest, !of.members.is_empty()).in_round(of.round);
        let scatter = Arc::new(Scatter::new(
            (of.volume, of.epoch),
            self.source.clone(),
            of.members.clone(),
            planner,
            (of.replicas.into(), self.options.scatter_limit_bytes_per_s),
            self.options.observer.clone(),
        )?);
        self.control.state.lock().scatter = Some(scatter.clone());
        Ok(scatter)
    }

    /// Asks everybody where pages lie: the owner of each range before those that may stand in for it. Where pages have copies,
    /// no index tells how many there are of one.
    pub(super) fn read_index(&self, scatter: &Scatter, members: &mut Members) {
        let (all, mut entries) = (PageRange::new(PageIndex(0), self.manifest.pages()), Vec::new());
        for range in owner_runs(all) {
            for step in 0..members.len() {
                let Some(member) = index_turn(range.first, step, members.len()) else { break };
                if !scatter.planner.lock().lacks_some(range) {
                    break;
                }
                let seat = members[member.as_usize()].as_mut();
                let Some(link) = seat.and_then(Seat::link_mut) else { continue };
                if let Err(error) = locate(link, range, &mut entries) {
                    members[member.as_usize()] = None;
                    scatter.member_lost(member, &error);
                    continue;
                }
                let living = scatter.index.living();
                let mut planner = scatter.planner.lock();
                let is_there =
                    |entry: &IndexEntry| entry.placement.is_none_or(|at| living.contains(at.member));
                entries.retain(|entry| is_there(entry) && planner.found(entry));
                drop(planner);
                scatter.announce(&entries);
            }
        }
        scatter.planner.lock().forget_parts_of_units();
        scatter.check_progress();
    }
}

/// All that an index server knows of a range, which is an owner's.
fn locate(link: &mut dyn Link, range: PageRange, entries: &mut Vec<IndexEntry>) -> Result<()> {
    const _: () = assert!(limits::INDEX_RANGE_PAGES as usize <= limits::INDEX_ENTRIES_MAX);
    entries.clear();
    ask(link, Request::Locate(range), MEMBER_TIME, |reply| match reply {
        Reply::Located(located) => {
            entries.extend_from_slice(located);
            Ok(())
        }
        _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
    })
}

/// The intermediaries, as they are found.
pub(super) struct Found {
    pub members: Vec<Member>,
    /// In the same order.
    seats: Vec<Result<Seat>>,
    /// What those who answered know of the volume, whatever that is.
    pub known: Vec<(NodeId, VolumeInfo)>,
}

impl Found {
    /// Meets all members, those of whom only others know included.
    pub fn look(options: &SourceOptions, of: &Unscattered) -> Self {
        let mut found = Self { members: of.members.clone(), seats: Vec::new(), known: Vec::new() };
        while found.seats.len() < found.members.len() {
            let new = &found.members[found.seats.len()..];
            let met = std::thread::scope(|scope| {
                let start = |member| {
                    let meet = move || meet(options, of, member);
                    host::thread::Builder::new().spawn_scoped(scope, meet)
                };
                let threads: Vec<_> = new.iter().map(start).collect();
                let lost = || Error::new(ErrorKind::Poisoned, "a connecting thread panicked");
                let joined = threads.into_iter().map(|thread| thread?.join().unwrap_or_else(|_| Err(lost())));
                joined.collect::<Vec<_>>()
            });
            for met in met {
                found.take(met);
            }
        }
        found
    }

    fn take(&mut self, met: Result<Met>) {
        let seat = met.and_then(|Met { node, info, seat }| {
            let list = &info.members;
            let is_longer = list.len() > self.members.len() && list.starts_with(&self.members);
            if is_longer && seat.is_ok() && list.len() <= limits::MEMBERS_MAX {
                self.members.clone_from(list);
            }
            self.known.push((node, info));
            seat
        });
        self.seats.push(seat);
    }

    /// Whether somebody has the volume under a newer epoch.
    pub fn is_fenced(&self) -> bool {
        self.seats.iter().any(|seat| failed_by(seat, ErrorKind::Fenced))
    }

    /// It may be gone on with under the epoch of before.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] where it is another's, [`ErrorKind::Volume`] where it is nowhere.
    pub fn checked(mut self, of: &Unscattered) -> Result<Self> {
        if let Some(at) = self.seats.iter().position(|seat| failed_by(seat, ErrorKind::Fenced)) {
            self.seats.swap_remove(at)?;
        }
        if !self.seats.is_empty() && self.seats.iter().all(|seat| failed_by(seat, ErrorKind::Volume)) {
            let who = match of.to {
                To::Destination(_) => "its destination",
                To::Parked { .. } => "whoever claimed it",
            };
            let message = format!(
                "no intermediary has the VM's volume {} any more: {who} has all of it and gave it back, or somebody dissolved it. Ask there before what has the memory here is ended",
                of.volume
            );
            return Err(Error::new(ErrorKind::Volume, message));
        }
        Ok(self)
    }
}

fn failed_by(seat: &Result<Seat>, kind: ErrorKind) -> bool {
    seat.as_ref().is_err_and(|error| error.kind == kind)
}

/// A member that answered.
struct Met {
    node: NodeId,
    info: VolumeInfo,
    /// A link to it, where it has the volume, with the VM's state, and takes pages.
    seat: Result<Seat>,
}

fn meet(options: &SourceOptions, of: &Unscattered, member: &Member) -> Result<Met> {
    let mut link =
        options.connector.connect(member.address, of.volume, of.epoch, Class::Bulk, MEMBER_TIME)?;
    if link.member().node != member.node {
        let message = format!("it was restarted, as {}, and has forgotten the volume", link.member().node);
        return Err(Error::new(ErrorKind::Unreachable, message).at(&member.node));
    }
    let info: VolumeInfo =
        ask(&mut *link, Request::Control(&VmdRequest::Describe), MEMBER_TIME, |reply| match reply {
            Reply::Control(VmdReply::Volume(info)) => Ok(*info),
            _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
        })?;
    let seat = sit(link, (options, of), &info);
    Ok(Met { node: member.node.clone(), info, seat })
}

fn sit(
    mut link: Box<dyn Link>,
    (options, of): (&SourceOptions, &Unscattered),
    info: &VolumeInfo,
) -> Result<Seat> {
    let node = link.member().node.clone();
    let refuse = |kind, message: String| Err(Error::new(kind, message).at(&node));
    if info.epoch > of.epoch {
        let (theirs, ours) = (info.epoch.0, of.epoch.0);
        let message =
            format!("the volume {} has another owner since (epoch {theirs}, and not {ours})", of.volume);
        return refuse(ErrorKind::Fenced, message);
    }
    let is_open = match of.to {
        To::Destination(_) => info.state == VolumeState::Open,
        // Some may have been told by the one before that it is parked: they take what is lost since, and hear it again.
        To::Parked { .. } => matches!(info.state, VolumeState::Open | VolumeState::Parked),
    };
    if !is_open {
        let message = format!("the volume {} is {:?} there, and takes no pages", of.volume, info.state);
        return refuse(ErrorKind::Volume, message);
    }
    if !info.has_state {
        // Nothing lies there: pages go to those only that have it.
        return refuse(ErrorKind::Refused, "it has not got the VM's state, and is left out".into());
    }
    // What the one before had sent may come yet: of what is in the index behind that, nothing becomes out of date.
    ask(&mut *link, Request::Control(&VmdRequest::Fence), MEMBER_TIME, |reply| match reply {
        Reply::Control(VmdReply::Done) => Ok(()),
        _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
    })?;
    let zone = zone(&mut *link, options.replicas)?;
    Ok(Seat::new(link, zone))
}
