//! The thread `sg-source` of a VM whose source died with its process behind COMMIT, where its memory outlived that: another
//! process takes its place.
//!
//! ```text
//!   what the index knows, what the destination holds: safe  -->  PageSource::outcome
//!   OutgoingVm::committed: the memory comes again, without that
//!   scatter, as before  -->  "evicted"
//! ```
//!
//! It has the place of the one before under the same epoch: the destination reads under it, and dissolves. So whoever goes on
//! has to be the only one by what its VM is, and one of whom nothing is under way any more but what arrived late: a page that is
//! put twice is the same page, and each of its index entries is right.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::manager::{Left, Manager, spawn};
use super::{Control, Outgoing, SourceOptions, check};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, MemberIndex, Round, VolumeId};
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

/// A VM for which COMMIT is given, or is about to be: it never runs at its source again, and not all of its memory is safe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unscattered {
    /// Its pages at the intermediaries.
    pub volume: VolumeId,
    /// Under which they are scattered.
    pub epoch: Epoch,
    /// Where its destination listens.
    pub destination: SocketAddr,
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

/// Goes on with a VM whose source died with its process behind COMMIT, of which the memory is still there: in the place of that
/// process, which has to be gone. The source of pages is told which are safe, by [`PageSource::outcome`], before
/// [`OutgoingVm::committed`] lets it begin; it names the others when they can be had. Of the options count secret, connector,
/// limit and observer: where and how the VM leaves stays as it was, and nobody takes the place of an intermediary that dies.
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
        to: of.destination.into(),
        intermediaries: of.members.iter().map(|member| member.address).collect(),
        replacements: None,
        replicas: of.replicas,
        mode: of.mode,
        ..options
    };
    let control = Control::new(&options);
    control.set_committed();
    let manifest = of.manifest.clone();
    spawn(control, move |manager| manager.go_on(of), (vm, source, manifest, options))
}

impl Unscattered {
    /// What is scattered, right before COMMIT.
    pub(super) fn of(
        scatter: &Scatter,
        destination: SocketAddr,
        (options, manifest): (&SourceOptions, &Manifest),
    ) -> Self {
        Self {
            volume: scatter.volume,
            epoch: scatter.epoch,
            destination,
            mode: options.mode,
            round: scatter.planner.lock().round(),
            replicas: options.replicas,
            members: scatter.members.list(),
            manifest: manifest.clone(),
        }
    }
}

impl Manager {
    fn go_on(mut self, of: Unscattered) -> Result<()> {
        let found = Found::look(&self.options, &of)?;
        let planner = Planner::new(&self.manifest, !found.seats.is_empty()).in_round(of.round);
        let scatter = Arc::new(Scatter::new(
            (of.volume, of.epoch),
            self.source.clone(),
            of.members.clone(),
            planner,
            (of.replicas.into(), self.options.scatter_limit_bytes_per_s),
            self.options.observer.clone(),
        )?);
        // The destination may not have heard of those that came later.
        for member in found.members.get(of.members.len()..).unwrap_or_default() {
            scatter.add_member(member.clone())?;
        }
        scatter.index.follow();
        self.control.state.lock().scatter = Some(scatter.clone());
        let mut members = Members::new();
        for (member, seat) in (0..).map(MemberIndex).zip(found.seats) {
            members.push(seat.map_err(|error| scatter.member_lost(member, &error)).ok());
        }
        (0..).map(MemberIndex).zip(&members).for_each(|(member, seat)| {
            seat.iter().for_each(|seat| seat.tell_zone(&scatter, member));
        });
        self.read_index(&scatter, &mut members);
        // Who has it already says so again.
        ask_all(
            &mut members,
            || Request::Control(&VmdRequest::Commit),
            Patience::Even,
            |member, error| scatter.member_lost(member, &error),
        );
        let (secret, address) = (self.options.secret.clone(), of.destination);
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

    /// Asks everybody where pages lie: the owner of each range before those that may stand in for it. Where pages have copies,
    /// what there is of one is not told by any index: these are sent again.
    fn read_index(&self, scatter: &Scatter, members: &mut Members) {
        if self.options.replicas > 1 {
            return;
        }
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
struct Found {
    members: Vec<Member>,
    /// In the same order.
    seats: Vec<Result<Seat>>,
}

impl Found {
    /// Meets all members, those of whom only others know included.
    fn look(options: &SourceOptions, of: &Unscattered) -> Result<Self> {
        let mut found = Self { members: of.members.clone(), seats: Vec::new() };
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
                if let Err(error) = &met
                    && error.kind == ErrorKind::Fenced
                {
                    return met.map(|_| found);
                }
                found.seats.push(met.map(|(seat, list)| {
                    let is_longer = list.len() > found.members.len() && list.starts_with(&found.members);
                    if is_longer && list.len() <= limits::MEMBERS_MAX {
                        found.members = list;
                    }
                    seat
                }));
            }
        }
        let is_gone = |seat: &Result<Seat>| seat.as_ref().is_err_and(|error| error.kind == ErrorKind::Volume);
        if !found.seats.is_empty() && found.seats.iter().all(is_gone) {
            let message = format!(
                "no intermediary has the VM's volume {} any more: its destination has all of it and gave it back, or somebody dissolved it. Ask there before what has the memory here is ended",
                of.volume
            );
            return Err(Error::new(ErrorKind::Volume, message));
        }
        Ok(found)
    }
}

/// A link to a member that has the volume, with the VM's state, and the members that it knows of.
fn meet(options: &SourceOptions, of: &Unscattered, member: &Member) -> Result<(Seat, Vec<Member>)> {
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
    let refuse = |kind, message: String| Err(Error::new(kind, message).at(&member.node));
    if info.epoch > of.epoch {
        let (theirs, ours) = (info.epoch.0, of.epoch.0);
        let message =
            format!("the volume {} has another owner since (epoch {theirs}, and not {ours})", of.volume);
        return refuse(ErrorKind::Fenced, message);
    }
    if info.state != VolumeState::Open {
        let message = format!("the volume {} is {:?} there, and takes no pages", of.volume, info.state);
        return refuse(ErrorKind::Volume, message);
    }
    if !info.has_state {
        // Nothing lies there: pages go to those only that have it.
        return refuse(ErrorKind::Refused, "it has not got the VM's state, and is left out".into());
    }
    let zone = zone(&mut *link, options.replicas)?;
    Ok((Seat::new(link, zone), info.members))
}
