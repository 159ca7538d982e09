//! The intermediaries during the handover, all asked at once. One that is slow while the VM is paused is not
//! waited for: what it owes is heard in the background, and until then no page goes there.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::source::{SourceOptions, To};
use super::{Event, Mode};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::manifest::Manifest;
use crate::scatter::{MemberSink, Scatter};
use crate::transport::wait;
use crate::vmd::link::ask;
use crate::vmd::{Class, Connector, Link, Reply, Request, Ticket};
use crate::wire::final_set::Blobs;
use crate::wire::message::{Member, VmdReply, VmdRequest};

/// How long an intermediary has to be reached, to create the volume, and to answer anything else.
pub(super) const MEMBER_TIME: Duration = Duration::from_secs(2);

/// How long a paused VM waits for the first intermediary to have its state, or COMMIT.
const PAUSED_TIME: Duration = Duration::from_millis(50);

/// How much longer for the others, once one has answered.
const PAUSED_PATIENCE: Duration = Duration::from_millis(20);

/// How often a wait looks around.
const LOOK: Duration = Duration::from_millis(20);

/// The members, in their order; `None` for one that was lost.
pub(super) type Members = Vec<Option<Seat>>;

/// A member's link, and what it has not answered.
pub(super) struct Seat {
    held: Held,
    /// When it last owed nothing.
    since: Instant,
    /// Its zone, where it is known.
    zone: Option<String>,
}

enum Held {
    /// No page goes there yet.
    Link(Box<dyn Link>, Vec<Ticket>),
    /// Pages went there while the VM ran.
    Sink(Box<MemberSink>),
}

impl Seat {
    /// A link to one who has the volume, or is to, in this zone.
    pub fn new(link: Box<dyn Link>, zone: Option<String>) -> Self {
        Self { held: Held::Link(link, Vec::new()), since: host::now(), zone }
    }

    /// Copies of what lies there are to be in other zones.
    pub fn tell_zone(&self, scatter: &Scatter, member: MemberIndex) {
        self.zone.iter().for_each(|zone| scatter.copies.set_zone(member, zone));
    }

    fn link(&self) -> &dyn Link {
        match &self.held {
            Held::Link(link, _) => &**link,
            Held::Sink(sink) => sink.link(),
        }
    }

    /// The link, for who asks by itself, as long as no page goes there. `None` once some have gone.
    pub fn link_mut(&mut self) -> Option<&mut dyn Link> {
        match &mut self.held {
            Held::Link(link, _) => Some(&mut **link),
            Held::Sink(_) => None,
        }
    }

    /// Who it is.
    pub fn member(&self) -> &Member {
        self.link().member()
    }

    /// It becomes a sink, for pages to go there while the VM runs.
    pub fn seat(self, scatter: &Arc<Scatter>, member: MemberIndex) -> Self {
        let held = match self.held {
            Held::Link(link, _) => Held::Sink(Box::new(MemberSink::new(scatter.clone(), member, link))),
            sink @ Held::Sink(_) => sink,
        };
        Self { held, ..self }
    }

    /// The sink, where it is one.
    pub fn sink(&mut self) -> Option<&mut MemberSink> {
        match &mut self.held {
            Held::Link(..) => None,
            Held::Sink(sink) => Some(sink),
        }
    }

    fn owes(&self) -> bool {
        match &self.held {
            Held::Link(_, owes) => !owes.is_empty(),
            Held::Sink(sink) => sink.owes(),
        }
    }

    /// Asks for something that has to be answered by a yes before any page goes there.
    ///
    /// # Errors
    /// The link's.
    pub fn ask(&mut self, request: Request<'_>) -> Result<()> {
        if !self.owes() {
            self.since = host::now();
        }
        match &mut self.held {
            Held::Link(link, owes) => owes.push(link.submit(request)?),
            Held::Sink(sink) => sink.ask(request)?,
        }
        Ok(())
    }

    /// Moves bytes and takes the answers that came: each has to be a yes.
    fn hear(&mut self) -> Result<()> {
        let (link, owes) = match &mut self.held {
            Held::Link(link, owes) => (link, owes),
            Held::Sink(sink) => return sink.hear(),
        };
        link.progress(usize::MAX)?;
        while let Some(completion) = link.completion() {
            if let Some(at) = owes.iter().position(|ticket| *ticket == completion.ticket) {
                let _: Reply<'_> = completion.result?;
                owes.swap_remove(at);
            }
        }
        Ok(())
    }

    fn late(&self) -> Result<()> {
        if host::elapsed(self.since) < MEMBER_TIME {
            return Ok(());
        }
        let message = format!("no answer within {} s", MEMBER_TIME.as_secs());
        Err(Error::new(ErrorKind::Timeout, message).at(&self.member().node))
    }

    fn awaited(&self) -> (Option<BorrowedFd<'_>>, bool) {
        (self.link().poll_fd(), self.link().queued_bytes() > 0)
    }

    /// Waits until it has answered everything, and somebody who outlives the source knows of it; then pages may go there.
    /// `false` when `over` says that nobody needs it any more.
    ///
    /// # Errors
    /// It said no, was lost, or took too long.
    pub fn wait_until_ready(
        &mut self,
        scatter: &Scatter,
        member: MemberIndex,
        over: impl Fn() -> bool,
    ) -> Result<bool> {
        loop {
            self.hear()?;
            #[cfg(feature = "simulation")]
            let counts = scatter.is_known(member) || host::has_bug(host::Bug::MemberUnknown);
            #[cfg(not(feature = "simulation"))]
            let counts = scatter.is_known(member);
            if !self.owes() && counts {
                scatter.index.answered(member);
                return Ok(true);
            }
            if over() {
                return Ok(false);
            }
            if self.owes() {
                self.late()?;
            }
            wait(&[self.awaited()], LOOK)?;
        }
    }

    /// The same; then it is a sink.
    ///
    /// # Errors
    /// As [`Self::wait_until_ready`].
    pub fn settle(
        mut self,
        scatter: &Arc<Scatter>,
        member: MemberIndex,
        over: impl Fn() -> bool,
    ) -> Result<Option<Box<MemberSink>>> {
        if !self.wait_until_ready(scatter, member, over)? {
            return Ok(None);
        }
        Ok(match self.seat(scatter, member).held {
            Held::Sink(sink) => Some(sink),
            Held::Link(..) => None,
        })
    }
}

/// How long members may take to answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// As long as a member has. Who has not answered then is lost.
    Even,
    /// The VM is paused: a moment, and who has not answered then owes the answer.
    Paused,
}

impl Patience {
    /// When waiting ends, for members that were asked at `asked`, of which one answered first at `first`.
    fn until(self, asked: Instant, first: Option<Instant>) -> Instant {
        match (self, first) {
            (Self::Even, _) => asked + MEMBER_TIME,
            (Self::Paused, None) => asked + PAUSED_TIME,
            (Self::Paused, Some(first)) => (first + PAUSED_PATIENCE).min(asked + PAUSED_TIME),
        }
    }
}

/// Connects to every intermediary at once and creates the volume there. Those that cannot be reached
/// are left out, each with a warning.
pub(super) fn connect(
    options: &SourceOptions,
    volume: VolumeId,
    epoch: Epoch,
    manifest: &Manifest,
) -> Members {
    let warn = |message: String| (options.observer)(&Event::Warning { message });
    let reached: Vec<Result<Seat>> = std::thread::scope(|scope| {
        let connect = |address| {
            let connector = &options.connector;
            let connect = move || {
                let mut link = connector.connect(address, volume, epoch, Class::Bulk, MEMBER_TIME)?;
                let zone = zone(&mut *link, options.replicas)?;
                Ok(Seat::new(link, zone))
            };
            host::thread::Builder::new().spawn_scoped(scope, connect)
        };
        let threads: Vec<_> = options.intermediaries.iter().map(|address| connect(*address)).collect();
        let lost = || Error::new(ErrorKind::Poisoned, "a connecting thread panicked");
        threads.into_iter().map(|thread| thread?.join().unwrap_or_else(|_| Err(lost()))).collect()
    });
    let mut members = Members::new();
    for link in reached {
        match link {
            Ok(seat) => members.push(Some(seat)),
            Err(error) => warn(format!("an intermediary is left out: {}", error.chain())),
        }
    }
    // Those that do not take the volume are left out, and the others told a list without them.
    loop {
        let create = VmdRequest::Create { manifest: manifest.clone(), members: list(&members) };
        let before = members.len();
        for request in std::iter::once(&create).chain(copies(options.replicas).as_ref()) {
            let left_out = |_, error: Error| warn(format!("an intermediary is left out: {}", error.chain()));
            ask_all(&mut members, || Request::Control(request), Patience::Even, left_out);
        }
        members.retain(Option::is_some);
        if members.len() == before {
            break;
        }
    }
    if members.is_empty() && !matches!(options.to, To::Parked { .. }) {
        warn(format!(
            "no intermediary can be reached: {}",
            match options.mode {
                Mode::PreCopy => "all rounds go to the destination",
                Mode::Hybrid | Mode::PostCopy | Mode::ScatterGather => {
                    "this is a post-copy migration, and the destination's pace is the eviction's"
                }
            }
        ));
    }
    members
}

/// In which zone an intermediary is, as it says; it is asked only where pages lie at several.
///
/// # Errors
/// The link's, or that it does not answer.
pub(super) fn zone(link: &mut dyn Link, replicas: u8) -> Result<Option<String>> {
    if replicas < 2 {
        return Ok(None);
    }
    ask(link, Request::Control(&VmdRequest::Statistics), MEMBER_TIME, |reply| match reply {
        Reply::Control(VmdReply::Statistics(said)) => Ok(said.zone),
        _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
    })
}

/// The request that says how many copies there are to be, where there are to be several.
pub(super) fn copies(replicas: u8) -> Option<VmdRequest> {
    (replicas > 1).then_some(VmdRequest::Copies(replicas))
}

/// The requests that put a VM's state to the volume: what it rests on goes ahead of it.
pub(super) fn put_state(blobs: &Blobs) -> impl Iterator<Item = Request<'_>> {
    let pieces = (0..).zip(&blobs.pieces).map(|(number, piece)| Request::PutPiece(number, piece));
    pieces.chain([Request::PutState(&blobs.state)])
}

/// Pages may go to every member from now on.
pub(super) fn seat_all(scatter: &Arc<Scatter>, members: &mut Members) {
    for (at, seat) in members.iter_mut().enumerate() {
        *seat = seat.take().map(|seat| seat.seat(scatter, MemberIndex(at as u16)));
    }
}

/// Who they are.
pub(super) fn list(members: &Members) -> Vec<Member> {
    members.iter().flatten().map(|seat| seat.member().clone()).collect()
}

/// Asks every member the same, all at once, and waits for the answers. A member that fails is taken
/// out and told to `lost`. One that still owes an earlier answer is asked, and not waited for.
pub(super) fn ask_all<'r>(
    members: &mut Members,
    request: impl Fn() -> Request<'r>,
    patience: Patience,
    lost: impl FnMut(MemberIndex, Error),
) {
    ask_some(members, |_| true, request, patience, lost);
}

/// As [`ask_all`], of those that `which` names.
pub(super) fn ask_some<'r>(
    members: &mut Members,
    which: impl Fn(usize) -> bool,
    request: impl Fn() -> Request<'r>,
    patience: Patience,
    mut lost: impl FnMut(MemberIndex, Error),
) {
    let asked = host::now();
    let mut first = None;
    let mut open: Vec<usize> = Vec::new();
    for at in (0..members.len()).filter(|at| which(*at)) {
        let Some(seat) = &mut members[at] else { continue };
        let waits = matches!(patience, Patience::Even) || !seat.owes();
        match seat.ask(request()).and_then(|()| seat.hear()) {
            Ok(()) if !seat.owes() => first = Some(asked),
            Ok(()) if waits => open.push(at),
            Ok(()) => {}
            Err(error) => drop_member(members, at, error, &mut lost),
        }
    }
    while !open.is_empty() {
        open.retain(|at| {
            let Some(seat) = &mut members[*at] else { return false };
            match seat.hear() {
                Ok(()) if !seat.owes() => {
                    first.get_or_insert_with(host::now);
                    false
                }
                Ok(()) => true,
                Err(error) => {
                    drop_member(members, *at, error, &mut lost);
                    false
                }
            }
        });
        let left = patience.until(asked, first).saturating_duration_since(host::now());
        if left.is_zero() {
            break;
        }
        let seats = open.iter().filter_map(|at| members[*at].as_ref());
        let on: Vec<_> = seats.map(Seat::awaited).collect();
        if !on.is_empty() && wait(&on, left.min(LOOK)).is_err() {
            break;
        }
    }
    if matches!(patience, Patience::Even) {
        for at in open {
            let late = Error::new(ErrorKind::Timeout, "an intermediary did not answer in time");
            drop_member(members, at, late, &mut lost);
        }
    }
}

/// Has the volume dissolved at every member. One that was lost on its link may be there all the same, and is asked over
/// a new one. An operator is told of those that may still hold pages.
pub(super) fn dissolve(
    options: &SourceOptions,
    of: (VolumeId, Epoch),
    all: &[Member],
    members: &mut Members,
) {
    ask_all(members, || Request::Control(&VmdRequest::Dissolve), Patience::Even, |_, _| {});
    let left = all.iter().zip(members).filter(|(_, seat)| seat.is_none()).map(|(member, _)| member);
    std::thread::scope(|scope| {
        let anew = |member| move || dissolve_anew(&*options.connector, of, member);
        let start = |member| (member, host::thread::Builder::new().spawn_scoped(scope, anew(member)));
        let threads: Vec<_> = left.map(start).collect();
        for (member, thread) in threads {
            let lost = || Error::new(ErrorKind::Poisoned, "a thread panicked");
            let done =
                thread.map_err(Error::from).and_then(|thread| thread.join().unwrap_or_else(|_| Err(lost())));
            if let Err(error) = done {
                let volume = of.0;
                let message = format!(
                    "{} may still hold pages of the VM, which runs on here: sg dissolve {volume} ({})",
                    member.node,
                    error.chain()
                );
                (options.observer)(&Event::Warning { message });
            }
        }
    });
}

/// Has the volume dissolved at one who may have it, over a link of its own.
pub(super) fn dissolve_anew(
    connector: &dyn Connector,
    (volume, epoch): (VolumeId, Epoch),
    member: &Member,
) -> Result<()> {
    let mut link = connector.connect(member.address, volume, epoch, Class::Bulk, MEMBER_TIME)?;
    let request = Request::Control(&VmdRequest::Dissolve);
    match ask(&mut *link, request, MEMBER_TIME, |_| Ok(())) {
        // It has none such: it restarted, or never took the volume.
        Err(error) if error.kind == ErrorKind::Volume => Ok(()),
        done => done,
    }
}

fn drop_member(members: &mut Members, at: usize, error: Error, lost: &mut impl FnMut(MemberIndex, Error)) {
    members[at] = None;
    lost(MemberIndex(at as u16), error);
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_paused_vm_does_not_wait_for_who_is_silent() {
        let asked = Instant::now();
        let after = |ms| Some(asked + Duration::from_millis(ms));
        let until = |first| Patience::Paused.until(asked, first) - asked;
        assert_eq!(until(None), PAUSED_TIME);
        assert_eq!(until(after(1)), Duration::from_millis(21));
        assert_eq!(until(after(40)), PAUSED_TIME);
        assert_eq!(Patience::Even.until(asked, after(1)), asked + MEMBER_TIME);
    }
}
