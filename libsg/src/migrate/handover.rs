//! From the first connection to COMMIT and RUN, at the source. Until COMMIT every failure leaves the VM
//! running here; after it, nothing here ever runs it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::source::{Control, SourceOptions};
use super::{Event, OutgoingVm};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, MemberIndex, VolumeId};
use crate::manifest::Manifest;
use crate::scatter::session::{Destination, Session, serve_while};
use crate::scatter::{Scatter, UrgentSink};
use crate::transport::{Conversation, wait};
use crate::vmd::{Class, Link, Reply, Request, Ticket};
use crate::wire::handshake::Purpose;
use crate::wire::message::{Member, Talk, VmdRequest};

/// How long an intermediary has to be reached and to create the volume.
const MEMBER_TIME: Duration = Duration::from_secs(2);

/// How long state and COMMIT may wait for intermediaries as long as none has answered.
const COMMIT_TIME: Duration = Duration::from_secs(2);

/// The VM is paused: once one has answered, the others have as long again, this at least, twice over.
const PAUSED_PATIENCE: Duration = Duration::from_millis(30);

/// How often a wait looks whether the migration was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// Links to the members, in their order; `None` for one that was lost.
pub(super) type Members = Vec<Option<Box<dyn Link>>>;

/// Connects to every intermediary at once and creates the volume there. Those that cannot be reached
/// are left out, each with a warning.
pub(super) fn connect_members(
    options: &SourceOptions,
    volume: VolumeId,
    epoch: Epoch,
    manifest: &Manifest,
) -> Vec<Box<dyn Link>> {
    let warn = |message: String| (options.observer)(&Event::Warning { message });
    let reached: Vec<Result<Box<dyn Link>>> = std::thread::scope(|scope| {
        let connect = |address| {
            let connector = &options.connector;
            scope.spawn(move || connector.connect(address, volume, epoch, Class::Bulk, MEMBER_TIME))
        };
        let threads: Vec<_> = options.intermediaries.iter().map(|address| connect(*address)).collect();
        let lost = || Error::new(ErrorKind::Poisoned, "a connecting thread panicked");
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(lost()))).collect()
    });
    let mut links: Members = Vec::new();
    for link in reached {
        match link {
            Ok(link) => links.push(Some(link)),
            Err(error) => warn(format!("an intermediary is left out: {}", error.chain())),
        }
    }
    // Those that do not take the volume are left out, and the others told a list without them.
    loop {
        let members = members_of(&links);
        let create = VmdRequest::Create { manifest: manifest.clone(), members };
        let before = links.len();
        ask_all(
            &mut links,
            || Request::Control(&create),
            Patience::Even(MEMBER_TIME),
            |_, error| {
                warn(format!("an intermediary is left out: {}", error.chain()));
            },
        );
        links.retain(Option::is_some);
        if links.len() == before {
            break;
        }
    }
    if links.is_empty() {
        let message = "no intermediary can be reached: this is a post-copy migration, and the destination's \
                       pace is the eviction's";
        warn(message.into());
    }
    links.into_iter().flatten().collect()
}

fn members_of(links: &Members) -> Vec<Member> {
    links.iter().flatten().map(|link| link.member().clone()).collect()
}

/// How long members may take to answer.
#[derive(Clone, Copy, Debug)]
enum Patience {
    /// All of them so long.
    Even(Duration),
    /// So long until one has answered, the others little more: one that fell silent is not waited for.
    Paused(Duration),
}

impl Patience {
    /// When waiting ends, for members that were asked at `asked`, of which one answered first at `first`.
    fn until(self, asked: Instant, first: Option<Instant>) -> Instant {
        match (self, first) {
            (Self::Paused(most), Some(first)) => {
                let took = first.saturating_duration_since(asked).max(PAUSED_PATIENCE);
                (first + 2 * took).min(asked + most)
            }
            (Self::Even(most) | Self::Paused(most), _) => asked + most,
        }
    }
}

/// Asks every member the same, all at once, and waits for the answers. A member that fails is taken
/// out and told to `lost`. Returns how many said yes.
fn ask_all<'r>(
    links: &mut Members,
    request: impl Fn() -> Request<'r>,
    patience: Patience,
    mut lost: impl FnMut(MemberIndex, Error),
) -> usize {
    let asked = Instant::now();
    let mut first = None;
    let mut open: Vec<Option<Ticket>> = Vec::new();
    let mut drop_member = |links: &mut Members, at: usize, error: Error| {
        links[at] = None;
        lost(MemberIndex(at as u16), error);
    };
    for at in 0..links.len() {
        let submitted = links[at].as_mut().map(|link| link.submit(request()));
        open.push(match submitted {
            Some(Ok(ticket)) => Some(ticket),
            Some(Err(error)) => {
                drop_member(links, at, error);
                None
            }
            None => None,
        });
    }
    let mut agreed = 0;
    while open.iter().any(Option::is_some) {
        for at in 0..links.len() {
            let (Some(link), Some(ticket)) = (links[at].as_mut(), open[at]) else { continue };
            match answer(&mut **link, ticket) {
                Ok(false) => continue,
                Ok(true) => {
                    agreed += 1;
                    first.get_or_insert_with(Instant::now);
                }
                Err(error) => drop_member(links, at, error),
            }
            open[at] = None;
        }
        let left = patience.until(asked, first).saturating_duration_since(Instant::now());
        let waiting: Vec<usize> = (0..links.len()).filter(|at| open[*at].is_some()).collect();
        if left.is_zero() {
            for at in waiting {
                let error = Error::new(ErrorKind::Timeout, "an intermediary did not answer in time");
                drop_member(links, at, error);
            }
            break;
        }
        let on: Vec<_> = waiting
            .iter()
            .filter_map(|at| links[*at].as_ref())
            .map(|link| (link.poll_fd(), link.queued_bytes() > 0))
            .collect();
        if !on.is_empty() && wait(&on, left.min(LOOK)).is_err() {
            break;
        }
    }
    agreed
}

/// Moves bytes; `true` once the request was answered with yes.
fn answer(link: &mut dyn Link, ticket: Ticket) -> Result<bool> {
    link.progress(usize::MAX)?;
    while let Some(completion) = link.completion() {
        if completion.ticket == ticket {
            let _: Reply<'_> = completion.result?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the handover works with.
pub(super) struct Handover<'a> {
    pub(super) control: &'a Control,
    pub(super) options: &'a SourceOptions,
    pub(super) manifest: &'a Manifest,
    pub(super) destination: &'a Destination,
    pub(super) scatter: &'a Arc<Scatter>,
    pub(super) started: Instant,
}

impl Handover<'_> {
    /// Everything up to READY. The VM is paused as late, and for as short, as can be: connections,
    /// the destination's memory and the volume are there before. On failure the connection is left in
    /// `open`, if it was made.
    pub(super) fn until_ready(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        open: &mut Option<Conversation>,
    ) -> Result<(Session, Instant)> {
        let control = open.insert(Conversation::new(self.destination.dial(Purpose::MigrationControl)?));
        let offer = Talk::Offer {
            manifest: self.manifest.clone(),
            members: self.scatter.members.clone(),
            elapsed_us: self.started.elapsed().as_micros() as u64,
        };
        let deadline = Instant::now() + self.options.ready_timeout;
        control.send_talk(&offer, deadline)?;
        self.expect(control, &Talk::Accepted, deadline)?;
        let direct = self.destination.dial(Purpose::MigrationDirect)?;
        let urgent = self.destination.dial(Purpose::MigrationUrgent)?;
        let mut urgent = UrgentSink::new(self.scatter.clone(), urgent);
        self.control.check_cancelled()?;

        let paused_at = Instant::now();
        let state = vm.pause()?;
        self.control.mark_paused();
        let deadline = Instant::now() + self.options.ready_timeout;
        control.send_state(&state, deadline)?;
        ask_all(
            members,
            || Request::PutState(&state),
            Patience::Paused(COMMIT_TIME),
            |member, error| {
                self.scatter.member_lost(member, &error);
            },
        );
        self.scatter.take_stock()?;
        // Loading the state may touch guest memory: faults are answered from here on.
        serve_while(self.scatter, (control, &mut urgent), |control| {
            self.expect(control, &Talk::Ready, deadline)
        })?;
        (self.options.observer)(&Event::Ready);
        let control = open.take().ok_or_else(|| Error::new(ErrorKind::Unreachable, "no connection"))?;
        Ok((Session { control, direct, urgent }, paused_at))
    }

    /// Waits for one message, looking for a cancel in between.
    fn expect(&self, control: &mut Conversation, wanted: &Talk, deadline: Instant) -> Result<()> {
        loop {
            self.control.check_cancelled()?;
            if self.scatter.is_poisoned() {
                return Err(self.scatter.failure());
            }
            match control.recv_talk(deadline.min(Instant::now() + LOOK)) {
                Ok(talk) if talk == *wanted => return Ok(()),
                Ok(Talk::Abort { reason } | Talk::Failed { reason }) => {
                    let message = format!("the destination cannot take the VM: {reason}");
                    return Err(Error::new(ErrorKind::Vm, message));
                }
                Ok(Talk::Progress { .. }) => {}
                Ok(other) => {
                    let message = format!("the destination said {other:?} where {wanted:?} belongs");
                    return Err(Error::new(ErrorKind::Protocol, message));
                }
                Err(error) if error.kind == ErrorKind::Timeout && Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// COMMIT is written to the volume, then the destination is told to run. Whatever fails from here
    /// on, the VM is the destination's. Returns the connections, unless they broke, and the downtime.
    pub(super) fn commit(
        &self,
        mut session: Session,
        members: &mut Members,
        paused_at: Instant,
    ) -> (Option<Session>, Option<Duration>) {
        (self.options.observer)(&Event::Commit);
        ask_all(
            members,
            || Request::Control(&VmdRequest::Commit),
            Patience::Paused(COMMIT_TIME),
            |member, error| {
                self.scatter.member_lost(member, &error);
            },
        );
        let deadline = Instant::now() + self.options.ready_timeout;
        let run = session.control.send_talk(&Talk::Run, deadline);
        let ran = run.and_then(|()| {
            let Session { control, urgent, .. } = &mut session;
            serve_while(self.scatter, (control, urgent), |control| {
                self.expect(control, &Talk::Running, deadline)
            })
        });
        match ran {
            Ok(()) => {
                let downtime = paused_at.elapsed();
                (self.options.observer)(&Event::Resumed);
                (Some(session), Some(downtime))
            }
            Err(error) => {
                let message =
                    format!("after COMMIT, destination {}: {}", self.destination.address, error.chain());
                (self.options.observer)(&Event::NodeLost { message });
                // Faults that were answered on the connection that broke will not be acknowledged.
                self.scatter.destination_lost();
                (None, None)
            }
        }
    }

    /// Before COMMIT: the VM runs on here, the destination and the intermediaries are told.
    /// `open` is the connection to the destination, if there is one.
    pub(super) fn give_up(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        open: Option<Conversation>,
        error: Error,
    ) -> Error {
        self.scatter.stop();
        let resumed = if self.control.was_paused() { vm.resume() } else { Ok(()) };
        let open = self.say_abort(open, &error);
        let patience = Patience::Even(MEMBER_TIME);
        ask_all(members, || Request::Control(&VmdRequest::Dissolve), patience, |_, _| {});
        drop(open);
        match resumed {
            Ok(()) => error,
            Err(resume) => {
                let message = format!("{}; and the VM could not be run again", error.chain());
                Error::new(ErrorKind::Vm, message).because(resume)
            }
        }
    }

    /// Tells the destination that the VM stays, on the open connection, or, where that is of no use, on a new one.
    /// Returns the one that it was said on, to be kept for as long as there is something else to do.
    fn say_abort(&self, open: Option<Conversation>, error: &Error) -> Option<Conversation> {
        let abort = Talk::Abort { reason: error.chain() };
        let say = |mut line: Conversation| {
            line.send_talk(&abort, Instant::now() + LOOK * 10).ok()?;
            // Closing a connection on which something is unread throws away what is on its way.
            while line.recv_talk(Instant::now()).is_ok() {}
            Some(line)
        };
        let alive = open.filter(|_| !matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Protocol));
        let anew = || Some(Conversation::new(self.destination.dial(Purpose::MigrationControl).ok()?));
        alive.and_then(say).or_else(|| say(anew()?))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_silent_member_is_waited_for_as_long_as_nobody_else_answers() {
        let asked = Instant::now();
        let after = |ms| Some(asked + Duration::from_millis(ms));
        let until = |first| Patience::Paused(COMMIT_TIME).until(asked, first) - asked;
        assert_eq!(until(None), COMMIT_TIME);
        assert_eq!(until(after(1)), Duration::from_millis(61));
        assert_eq!(until(after(200)), Duration::from_millis(600));
        assert_eq!(until(after(1_500)), COMMIT_TIME);
        assert_eq!(Patience::Even(MEMBER_TIME).until(asked, after(1)), asked + MEMBER_TIME);
    }
}
