//! The connections to the destination: control, direct and urgent. When one breaks after COMMIT, all
//! three are made again, and the destination says what it holds: nothing is inferred from TCP.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::Duration;

use super::direct::{DirectSink, unexpected};
use super::shared::{Counters, PoisonsOnPanic, Scatter, panicked};
use super::urgent::UrgentSink;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::ScopedJoinHandle};
use crate::ids::{Epoch, VolumeId};
use crate::pace::{Class, LinkId, LinkReading};
use crate::page::PageRange;
use crate::transport::{Channel, Conversation, Inbox, Outbox, PoolSecret, TcpPath, Waker, dial, wait};
use crate::wire::entry::decode_table;
use crate::wire::handshake::Purpose;
use crate::wire::message::{self, Talk};
use crate::wire::run::encode_runs;
use crate::wire::{Header, IndexEntry, Kind};

/// Announcements in one frame.
const ANNOUNCE_MAX: usize = 512;

/// The longest sleep of the control thread; announcements wait at most this long.
const TICK: Duration = Duration::from_millis(10);

/// How often a destination that cannot be reached is tried again.
const REDIAL_EVERY: Duration = Duration::from_millis(250);

/// How long each connection has for its handshake.
pub(crate) const DIAL_TIME: Duration = Duration::from_secs(3);

/// Where the destination is, and how to prove that we belong to its pool.
#[derive(Clone)]
pub struct Destination {
    /// Its address.
    pub address: SocketAddr,
    /// The pool's secret.
    pub secret: PoolSecret,
    /// The volume that is migrated.
    pub volume: VolumeId,
    /// The source's epoch.
    pub epoch: Epoch,
}

impl Destination {
    /// A connection for one purpose.
    ///
    /// # Errors
    /// Unreachable, refused, or time is up.
    pub fn dial(&self, purpose: Purpose) -> Result<Channel> {
        dial(self.address, purpose, self.volume, self.epoch, &self.secret, DIAL_TIME)
    }
}

/// The three connections.
pub struct Session {
    /// Talk, state and announcements.
    pub control: Conversation,
    /// Batches.
    pub direct: DirectSink,
    /// Faults.
    pub urgent: UrgentSink,
}

/// Runs a conversation on the control connection while faults are answered: a VM that loads its
/// state may touch its memory.
///
/// # Errors
/// The conversation's.
pub fn serve_while<T>(
    scatter: &Arc<Scatter>,
    (control, urgent): (&mut Conversation, &mut UrgentSink),
    talk: impl FnOnce(&mut Conversation) -> Result<T>,
) -> Result<T> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = &over;
        let ended = move || over.load(Ordering::Acquire) || scatter.stopping();
        let thread = host::thread::Builder::new().name("sg-scatter-urgent".into());
        let thread = thread.spawn_scoped(scope, move || {
            let _poisons = PoisonsOnPanic(scatter.clone());
            urgent.run(ended)
        })?;
        let result = talk(control);
        over.store(true, Ordering::Release);
        scatter.urgent_waker().wake();
        // A connection that broke here is noticed again by whoever uses it next.
        thread.join().map_err(|_| panicked("sg-scatter-urgent")).and(result)
    })
}

/// What the destination said, for whoever waits for it.
pub trait Listener: Sync {
    /// The destination said something.
    fn heard(&self, talk: Talk);

    /// Whether it has said that it holds every page.
    fn has_gathered(&self) -> bool;
}

/// Keeps the connections to the destination until the scatter stops or the destination has gathered: runs
/// `session`, and whenever there is none, or it breaks, makes new ones.
///
/// # Errors
/// [`ErrorKind::Poisoned`] when a thread panicked or the source failed, and what a destination says that no honest one does.
pub fn keep(
    scatter: &Arc<Scatter>,
    destination: &Destination,
    mut session: Option<Session>,
    listener: &dyn Listener,
) -> Result<()> {
    let mut told = false;
    while !scatter.stopping() {
        let made = match session.take() {
            Some(session) => Ok(session),
            None => rejoin(scatter, destination, listener),
        };
        match made.and_then(|session| {
            told = false;
            run(scatter, session, listener)
        }) {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Poisoned => return Err(error),
            Err(_) if listener.has_gathered() => {
                // It closes behind itself. What it had no time to acknowledge is there.
                scatter.all_held();
                return Ok(());
            }
            Err(error) => {
                scatter.destination_lost();
                if !told && !scatter.stopping() {
                    let message = format!("destination {}: {}", destination.address, error.chain());
                    (scatter.observer)(&crate::event::Event::NodeLost { message });
                    told = true;
                }
                wait(&[], REDIAL_EVERY)?;
            }
        }
    }
    Ok(())
}

/// Connects again and learns what the destination holds.
///
/// # Errors
/// As [`Destination::dial`], and what no honest destination says.
pub fn rejoin(scatter: &Arc<Scatter>, destination: &Destination, listener: &dyn Listener) -> Result<Session> {
    let deadline = host::now() + DIAL_TIME;
    let mut control = Conversation::new(destination.dial(Purpose::MigrationControl)?);
    control.send_talk(&Talk::Rejoin, deadline)?;
    let mut ranges: Vec<PageRange> = Vec::new();
    let running = loop {
        let frame = control.recv(deadline)?;
        match frame.header.kind {
            Kind::Holdings => {
                decode_table(frame.body, usize::from(frame.header.count), &mut ranges)?;
                let mut planner = scatter.planner.lock();
                ranges.drain(..).for_each(|range| planner.held(range));
            }
            Kind::Talk => match Talk::decode(frame.body)? {
                Talk::Rejoined { running } => break running,
                // The VM's destination is gone, and somebody else is there: what is here goes to intermediaries.
                Talk::Abort { reason, .. } => return Err(Error::new(ErrorKind::Unreachable, reason)),
                other => listener.heard(other),
            },
            Kind::Ping => {}
            other => return Err(unexpected(other)),
        }
    };
    scatter.check_progress();
    if !running {
        control.send_talk(&Talk::Run, deadline)?;
    }
    let direct = DirectSink::new(Arc::clone(scatter), destination.dial(Purpose::MigrationDirect)?);
    let urgent = UrgentSink::new(Arc::clone(scatter), destination.dial(Purpose::MigrationUrgent)?);
    Ok(Session { control, direct, urgent })
}

/// Runs one set of connections until one of them breaks or the scatter stops.
fn run(scatter: &Arc<Scatter>, session: Session, listener: &dyn Listener) -> Result<()> {
    let Session { mut control, mut direct, mut urgent } = session;
    let broken = AtomicBool::new(false);
    let ended = || scatter.stopping() || broken.load(Ordering::Acquire);
    std::thread::scope(|scope| {
        let threads = [
            (
                "sg-scatter-direct",
                spawn(scope, "sg-scatter-direct", &broken, scatter, move || direct.run(ended))?,
            ),
            (
                "sg-scatter-urgent",
                spawn(scope, "sg-scatter-urgent", &broken, scatter, move || urgent.run(ended))?,
            ),
        ];
        let mut result = converse(scatter, &mut control, listener, &mut { ended });
        broken.store(true, Ordering::Release);
        scatter.direct_waker().wake();
        scatter.urgent_waker().wake();
        for (name, thread) in threads {
            let ended = match thread.join() {
                Ok(ended) => ended,
                Err(_) => Err(panicked(name)),
            };
            result = match (result, ended) {
                (_, Err(error)) if error.kind == ErrorKind::Poisoned => Err(error),
                (Ok(()), ended) => ended,
                (error, _) => error,
            };
        }
        result
    })
}

/// Starts a named thread that says when it ends, however it does.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    broken: &'scope AtomicBool,
    scatter: &'scope Arc<Scatter>,
    body: impl FnOnce() -> Result<()> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<()>>> {
    struct Says<'a>(&'a AtomicBool, &'a Waker);
    impl Drop for Says<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
            self.1.wake();
        }
    }
    let thread = host::thread::Builder::new().name(name.into()).spawn_scoped(scope, move || {
        // Dropped last: whoever hears that it ended can see whether it panicked.
        let _says = Says(broken, scatter.control_waker());
        let _poisons = PoisonsOnPanic(scatter.clone());
        body()
    });
    Ok(thread?)
}

/// Keeps a conversation with the destination going, announcements out and talk in, until `ended` says so, which
/// is asked each 10 ms at least, and whenever the control thread's waker is woken.
///
/// # Errors
/// The connection's end, and what no honest destination says.
pub fn converse(
    scatter: &Scatter,
    control: &mut Conversation,
    listener: &dyn Listener,
    ended: &mut dyn FnMut() -> bool,
) -> Result<()> {
    let (channel, inbox, outbox) = control.parts();
    let control = Control {
        scatter,
        channel,
        inbox,
        outbox,
        listener,
        told_evicted: false,
        told_members: scatter.members.first(),
        pings: VecDeque::new(),
        entries: Vec::new(),
        table: Vec::new(),
    };
    control.run(ended)
}

/// The control connection: announcements out, talk in.
struct Control<'a> {
    scatter: &'a Scatter,
    channel: &'a Channel,
    inbox: &'a mut Inbox,
    outbox: &'a mut Outbox,
    listener: &'a dyn Listener,
    told_evicted: bool,
    /// Of how many members the destination was told, and of how many in each of the pings that are not answered.
    told_members: usize,
    pings: VecDeque<usize>,
    entries: Vec<IndexEntry>,
    table: Vec<u8>,
}

impl Control<'_> {
    fn run(mut self, ended: &mut dyn FnMut() -> bool) -> Result<()> {
        let link = self.scatter.pacer.add_link(Class::Urgent);
        let result = self.converse(link, ended);
        // Whatever ended it: what was said before counts. And closing a connection on which something is unread
        // throws away what is on its way.
        let _ = self.read();
        self.scatter.pacer.remove_link(link);
        result
    }

    fn converse(&mut self, link: LinkId, ended: &mut dyn FnMut() -> bool) -> Result<()> {
        let waker = self.scatter.control_waker().clone();
        let mut path = TcpPath::new();
        while !ended() {
            let now = host::now();
            let reading = LinkReading::from(path.refresh(self.channel, now));
            self.scatter.pacer.observe(link, LinkReading { queue_delay: None, ..reading }, now);
            self.read()?;
            self.tell_members()?;
            self.announce()?;
            self.tell_evicted()?;
            let written = self.outbox.flush(self.channel, usize::MAX)?;
            self.scatter.pacer.charge(Class::Bulk, written as u64, host::now());
            Counters::add(&self.scatter.counters.wire, written);
            let writing = self.outbox.queued_bytes() > 0;
            wait(&[(Some(self.channel.as_fd()), writing), (Some(waker.as_fd()), false)], TICK)?;
            waker.drain();
        }
        self.tell_evicted()?;
        if self.scatter.is_poisoned() {
            let reason = self.scatter.failure().chain();
            let body = message::encode(&Talk::Failed { reason })?;
            self.outbox.push_frame(self.channel.header(Kind::Talk), &body, [])?;
        }
        // Best effort: what is queued may still go out.
        let _ = self.outbox.flush(self.channel, usize::MAX);
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        while let Some(frame) = self.inbox.poll(self.channel)? {
            match frame.header.kind {
                Kind::Talk => self.listener.heard(Talk::decode(frame.body)?),
                Kind::Ping => {
                    let pong = frame.header.answer(Kind::Pong);
                    self.outbox.push_frame(pong, &[], [])?;
                }
                Kind::Pong => {
                    if let Some(members) = self.pings.pop_front() {
                        self.scatter.members.destination_knows(members);
                        self.scatter.check_progress();
                    }
                }
                other => return Err(unexpected(other)),
            }
        }
        Ok(())
    }

    /// Members that were added are told before anything speaks of them; a ping behind that says when they are known.
    fn tell_members(&mut self) -> Result<()> {
        let members = self.scatter.members.books().len();
        if members > self.told_members {
            self.told_members = members;
            let body = message::encode(&Talk::Members(self.scatter.members.list()))?;
            self.outbox.push_frame(self.channel.header(Kind::Talk), &body, [])?;
            self.outbox.push_frame(self.channel.header(Kind::Ping), &[], [])?;
            self.pings.push_back(members);
        }
        Ok(())
    }

    fn announce(&mut self) -> Result<()> {
        // A destination that takes nothing is not sent more: it will find the pages by the index.
        while self.outbox.queued_bytes() == 0 {
            self.scatter.take_announcements(ANNOUNCE_MAX, &mut self.entries);
            if self.entries.is_empty() {
                break;
            }
            self.tell_members()?;
            self.table.clear();
            let runs = encode_runs(self.entries.iter().copied(), &mut self.table);
            let header = Header { count: runs as u16, ..self.channel.header(Kind::Announce) };
            self.outbox.push_frame(header, &self.table, [])?;
            let written = self.outbox.flush(self.channel, usize::MAX)?;
            self.scatter.pacer.charge(Class::Bulk, written as u64, host::now());
            Counters::add(&self.scatter.counters.wire, written);
        }
        Ok(())
    }

    fn tell_evicted(&mut self) -> Result<()> {
        if self.told_evicted || self.outbox.queued_bytes() > 0 || self.scatter.tell_done().is_none() {
            return Ok(());
        }
        self.told_evicted = true;
        let body = message::encode(&Talk::Evicted).map_err(Error::from)?;
        self.outbox.push_frame(self.channel.header(Kind::Talk), &body, [])?;
        Ok(())
    }
}
