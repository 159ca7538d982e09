//! Faults: pages that the guest waits for. One thread, `sg-gather-fault`, with connections of its own
//! to the source and to every intermediary, on which nothing else travels. It waits for nothing but for
//! all of them at once; any number of faults may be under way.
//!
//! A page that is announced is read where it lies; any other is asked from the source, which
//! answers with the page, with "it is at P" or with "gone". Whoever is silent is not waited for: the
//! next way is tried beside it, and the first answer counts.

mod pending;
mod ways;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use self::pending::{Asked, Pending};
use super::desk::MemberDesk;
use super::direct::acknowledge;
use super::gets::Gets;
use super::install::Installer;
use super::prepage::is_of_link;
use super::shared::Shared;
use super::tracker::{Path, Read, Wanted, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::MemberIndex;
use crate::limits::MEMBERS_MAX;
use crate::pace::{self, Class, LinkId, LinkReading};
use crate::page::PageIndex;
use crate::sink::SinkEvent;
use crate::transport::{Channel, Inbox, Outbox, WAIT_MAX, wait};
use crate::vmd::{Link, Reply};
use crate::wire::run::{decode_pages, decode_runs};
use crate::wire::{Encoding, IndexEntry, Kind, PageEntry};

/// Whoever does not answer for this long is not waited for: many times what an answer takes.
const SILENCE: Duration = Duration::from_millis(100);

/// How long the thread sleeps at most.
const NAP: Duration = Duration::from_millis(500);

/// While more links are waited for than one call can watch.
const SHORT_NAP: Duration = Duration::from_millis(1);

/// An acknowledgement waits so long for the next question to travel with: each packet of its own costs both hosts
/// about as much as a page's.
const ACK_DELAY: Duration = Duration::from_millis(2);

/// Wishes that are asked from the source at once: nobody waits for them.
const WISHES_AT_ONCE: usize = 64;

/// The connection to the source.
struct Line {
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    /// When what is in the outbox is to be written; `None` when there is nothing.
    write_at: Option<Instant>,
    sequence: u64,
    counted: u64,
    pace_link: LinkId,
}

impl Line {
    /// Something was queued that may wait until `at`.
    fn write_by(&mut self, at: Instant) {
        self.write_at = Some(self.write_at.map_or(at, |before| before.min(at)));
    }
}

/// A link to a member, as far as this thread has one.
struct Seat {
    desk: Arc<MemberDesk>,
    link: Option<Box<dyn Link>>,
    /// Requests that are out.
    out: usize,
    counted: u64,
    pace_link: LinkId,
}

/// Who may have something to say.
#[derive(Clone, Copy)]
struct Ready {
    events: bool,
    source: bool,
    /// A bit for each.
    members: u64,
}

impl Ready {
    const ALL: Self = Self { events: true, source: true, members: u64::MAX };

    const fn has_member(self, member: usize) -> bool {
        self.members >> member & 1 != 0
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    source: Option<Line>,
    seats: Vec<Seat>,
    pending: Vec<Pending>,
    events: Vec<SinkEvent>,
    wishes: Vec<PageIndex>,
    reads: Vec<Read>,
    gets: Gets,
    entries: Vec<PageEntry>,
    places: Vec<IndexEntry>,
    table: Vec<u8>,
    installer: Installer,
}

/// The thread `sg-gather-fault`.
pub(crate) fn run(shared: &Shared) -> Result<()> {
    // Sleeps are then up to 50 µs late, and still right.
    let _ = pace::precise_timers();
    let mut worker = Worker {
        shared,
        source: None,
        seats: Vec::new(),
        pending: Vec::new(),
        events: Vec::new(),
        wishes: Vec::new(),
        reads: Vec::new(),
        gets: Gets::default(),
        entries: Vec::new(),
        places: Vec::new(),
        table: Vec::new(),
        installer: Installer::default(),
    };
    let mut ready = Ready::ALL;
    while !shared.is_stopping() {
        shared.wake_fault.drain();
        worker.step(ready)?;
        ready = worker.rest()?;
    }
    if let Some(line) = &worker.source {
        line.channel.shut_down();
    }
    Ok(())
}

impl Worker<'_> {
    fn step(&mut self, ready: Ready) -> Result<()> {
        self.adopt();
        self.read_events(ready.events)?;
        // Questions go out before anything else is done.
        self.flush_source();
        if ready.source {
            self.hear_source()?;
        }
        for member in (0..self.seats.len()).filter(|member| ready.has_member(*member)) {
            self.hear_member(member)?;
        }
        self.take_wishes();
        let now = host::now();
        let all = self.shared.take_relook();
        for at in 0..self.pending.len() {
            if all || self.pending[at].try_at <= now {
                self.advance(at, now)?;
            }
        }
        self.pending.retain(|pending| !pending.done);
        self.flush_source();
        Ok(())
    }

    /// Takes connections and links that others made.
    fn adopt(&mut self) {
        if let Some(channel) = self.shared.urgent.lock().take() {
            self.drop_source();
            let (inbox, outbox) = (Inbox::patient(), Outbox::new());
            let pace_link = self.shared.pacer.add_link(Class::Urgent);
            let (sequence, counted, write_at) = (0, 0, None);
            self.source = Some(Line { channel, inbox, outbox, write_at, sequence, counted, pace_link });
            // What it had not before it may have now; where not, it says so again, to books that were told to ask again.
            for pending in &mut self.pending {
                (pending.try_at, pending.source_refused) = (host::now(), false);
            }
        }
        let members = self.shared.members();
        for desk in members.into_iter().skip(self.seats.len()) {
            let pace_link = self.shared.pacer.add_link(Class::Urgent);
            self.seats.push(Seat { desk, link: None, out: 0, counted: 0, pace_link });
        }
        for seat in &mut self.seats {
            if seat.link.is_none()
                && let Some(link) = seat.desk.urgent.lock().take()
            {
                (seat.link, seat.out, seat.counted) = (Some(link), 0, 0);
                self.pending.iter_mut().for_each(|pending| pending.try_at = host::now());
            }
        }
    }

    fn drop_source(&mut self) {
        if let Some(line) = self.source.take() {
            line.channel.shut_down();
            self.shared.pacer.remove_link(line.pace_link);
            self.shared.wake_conductor();
        }
        let now = host::now();
        for pending in &mut self.pending {
            (pending.source, pending.try_at) = (Asked::default(), now);
        }
    }

    fn drop_link(&mut self, member: usize, error: &Error) {
        tracing::info!(member = %self.seats[member].desk.member.node, error = error.chain(), "urgent link ended");
        self.seats[member].link = None;
        self.seats[member].desk.wants_urgent.store(true, Ordering::Release);
        self.seats[member].desk.waker.wake();
        let now = host::now();
        let lost = |asked: &Asked| asked.ticket.is_some_and(|(at, _)| at.as_usize() == member);
        for pending in &mut self.pending {
            if lost(&pending.read) {
                (pending.read, pending.try_at) = (Asked::default(), now);
            }
            if lost(&pending.index) {
                (pending.index, pending.try_at) = (Asked::default(), now);
                pending.rotation += 1;
            }
        }
    }

    /// Reads the sink's events, if there are any, once: more than that call gave are there at the next look.
    fn read_events(&mut self, has_events: bool) -> Result<()> {
        for page in self.shared.take_later() {
            self.fault(page)?;
        }
        if !has_events {
            return Ok(());
        }
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.shared.sink.events(&mut events)?;
        for event in &events {
            match *event {
                SinkEvent::Fault { page, .. } => self.fault(page)?,
                SinkEvent::Removed(range) => self.shared.tracker.lock().removed(range),
                SinkEvent::Installed(range) => {
                    self.shared.tracker.lock().installed(range, Path::Staged, host::now());
                }
            }
        }
        self.events = events;
        Ok(())
    }

    fn fault(&mut self, page: PageIndex) -> Result<()> {
        let now = host::now();
        let (wanted, unit) = {
            let mut tracker = self.shared.tracker.lock();
            (tracker.fault(page, now, &mut self.reads), tracker.unit(page))
        };
        let Some(unit) = unit.filter(|_| wanted != Wanted::Held) else { return Ok(()) };
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::FaultsWait) {
            return Ok(());
        }
        if let Some(at) = self.pending.iter().position(|pending| pending.unit == unit) {
            self.pending[at].guest = true;
            return self.advance(at, now);
        }
        self.pending.push(Pending::new(unit, true, now));
        self.advance(self.pending.len() - 1, now)
    }

    fn hear_source(&mut self) -> Result<()> {
        let Some(mut line) = self.source.take() else { return Ok(()) };
        match self.hear(&mut line) {
            Ok(()) => self.source = Some(line),
            Err(error) if is_of_link(&error) => {
                tracing::info!(error = error.chain(), "the source's urgent connection ended");
                self.source = Some(line);
                self.drop_source();
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn hear(&mut self, line: &mut Line) -> Result<()> {
        let shared = self.shared;
        while let Some(frame) = line.inbox.poll(&line.channel)? {
            let header = frame.header;
            if header.volume != shared.volume {
                return Err(Error::new(ErrorKind::Protocol, "a frame about another volume"));
            }
            match header.kind {
                Kind::Pages => {
                    let bytes = decode_pages((&header, frame.body), &mut self.entries)?;
                    let between = &mut || read_removals(shared);
                    self.installer.pages(shared, &self.entries, bytes, between)?;
                    let gone = self.entries.iter().any(|entry| entry.encoding == Encoding::Gone);
                    shared.pacer.charge(Class::Urgent, bytes.len() as u64, host::now());
                    shared.counters.direct.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    acknowledge(&mut line.outbox, &header, &self.installer.bad, &mut self.table)?;
                    line.write_by(host::now() + ACK_DELAY);
                    self.answered(header.sequence.0, gone);
                }
                Kind::Announce => {
                    decode_runs(frame.body, header.count.into(), &mut self.places)?;
                    shared.announce(&self.places, Word::Source)?;
                    self.answered(header.sequence.0, false);
                }
                kind => {
                    let message = format!("a {kind:?} frame on the urgent connection");
                    return Err(Error::new(ErrorKind::Protocol, message));
                }
            }
        }
        Ok(())
    }

    /// The source answered: what came of it is seen by looking.
    fn answered(&mut self, sequence: u64, gone: bool) {
        let now = host::now();
        let asked = |pending: &&mut Pending| pending.source.sequence == sequence && pending.source.is_out();
        if let Some(pending) = self.pending.iter_mut().find(asked) {
            (pending.source, pending.try_at) = (Asked::default(), now);
            if gone {
                pending.source_refused = true;
                self.shared.tracker.lock().source_has_not(pending.unit.first);
            }
        }
    }

    fn hear_member(&mut self, member: usize) -> Result<()> {
        let Some(mut link) = self.seats[member].link.take() else { return Ok(()) };
        if self.seats[member].out == 0 {
            self.seats[member].link = Some(link);
            return Ok(());
        }
        let heard = self.hear_link(member, &mut *link);
        let received = link.path().received_bytes;
        let fresh = received.saturating_sub(std::mem::replace(&mut self.seats[member].counted, received));
        self.shared.counters.wire.fetch_add(fresh, Ordering::Relaxed);
        report(self.shared, self.seats[member].pace_link, received);
        match heard {
            Ok(()) => self.seats[member].link = Some(link),
            Err(error) if is_of_link(&error) => self.drop_link(member, &error),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn hear_link(&mut self, member: usize, link: &mut dyn Link) -> Result<()> {
        let (shared, members) = (self.shared, self.seats.len());
        link.progress(usize::MAX)?;
        while let Some(completion) = link.completion() {
            self.seats[member].out = self.seats[member].out.saturating_sub(1);
            let now = host::now();
            let ticket = Some((MemberIndex(member as u16), completion.ticket));
            let of = |asked: &Asked| asked.is_out() && asked.ticket == ticket;
            let Some(pending) = self.pending.iter_mut().find(|p| of(&p.read) || of(&p.index)) else {
                continue;
            };
            let is_read = of(&pending.read);
            if is_read {
                pending.read = Asked::default();
                pending.try_at = now;
            } else {
                pending.index = Asked::default();
                pending.rotation += 1;
                // Once around in vain: the next round comes with the next try.
                pending.try_at = if pending.rotation % members == 0 { now + SILENCE } else { now };
            }
            match completion.result {
                Ok(Reply::Pages { entries, bytes }) if is_read => {
                    let between = &mut || read_removals(shared);
                    self.installer.reads(shared, &pending.reads, entries, bytes, between)?;
                    shared.pacer.charge(Class::Urgent, bytes.len() as u64, now);
                    shared.counters.gathered.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    self.seats[member].desk.bytes_out.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                Ok(Reply::Located(entries)) if !is_read => {
                    let silent = pending.read.ticket.filter(|_| pending.read.is_out());
                    let word = silent.map_or(Word::Index, |(member, _)| Word::Instead(member));
                    // What an index says that makes no sense is no reason to stop.
                    if let Err(error) = shared.announce(entries, word) {
                        tracing::warn!(error = error.chain(), "an index answered nonsense");
                    }
                }
                Ok(_) => return Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
                Err(error) => {
                    tracing::warn!(error = error.chain(), "an intermediary refused a fault");
                    pending.try_at = now + SILENCE;
                }
            }
        }
        Ok(())
    }

    fn flush_source(&mut self) {
        let Some(line) = &mut self.source else { return };
        if line.write_at.is_none_or(|at| host::now() < at) {
            return;
        }
        let flushed = line.outbox.flush(&line.channel, usize::MAX);
        if line.outbox.queued_bytes() == 0 {
            line.write_at = None;
        }
        let wire = line.inbox.received_bytes() + line.outbox.written_bytes();
        let fresh = wire - std::mem::replace(&mut line.counted, wire);
        self.shared.counters.wire.fetch_add(fresh, Ordering::Relaxed);
        if fresh > 0 {
            report(self.shared, line.pace_link, line.inbox.received_bytes());
        }
        if flushed.is_err() {
            self.drop_source();
        }
    }

    /// Waits, and says who may have something to say.
    fn rest(&self) -> Result<Ready> {
        let now = host::now();
        let write_at = self.source.as_ref().and_then(|line| line.write_at);
        let at = self.pending.iter().map(|pending| pending.try_at);
        // What is due and was not written waits for the socket, not for a time.
        let next = at.chain(write_at.filter(|at| *at > now)).min();
        let mut timeout = next.map_or(NAP, |at| at.saturating_duration_since(now).min(NAP));
        let mut on: [(Option<BorrowedFd<'_>>, bool); WAIT_MAX] = [(None, false); WAIT_MAX];
        on[0] = (Some(self.shared.wake_fault.as_fd()), false);
        let mut count = 1;
        let event_fd = self.shared.sink.event_fd();
        let events_at = event_fd.is_some().then_some(count);
        if event_fd.is_some() {
            on[count] = (event_fd, false);
            count += 1;
        }
        let source_at = self.source.is_some().then_some(count);
        if let Some(line) = &self.source {
            let is_due = write_at.is_some_and(|at| at <= now);
            on[count] = (Some(line.channel.as_fd()), is_due);
            count += 1;
        }
        // Where each member is watched. One that could not be is heard each time.
        let (mut places, mut members) = ([0_usize; MEMBERS_MAX], 0);
        for (member, seat) in self.seats.iter().enumerate().filter(|(_, seat)| seat.out > 0) {
            let Some(link) = &seat.link else { continue };
            if count == WAIT_MAX {
                timeout = timeout.min(SHORT_NAP);
                members = u64::MAX << member;
                break;
            }
            places[member] = count;
            on[count] = (link.poll_fd(), link.queued_bytes() > 0);
            count += 1;
        }
        let ready = wait(&on[..count], timeout)?;
        let is_ready = |at: Option<usize>| at.is_none_or(|at| ready & (1 << at) != 0);
        for (member, at) in places.iter().enumerate().filter(|(_, at)| **at > 0) {
            members |= (ready >> at & 1) << member;
        }
        Ok(Ready { events: is_ready(events_at), source: is_ready(source_at), members })
    }
}

/// What faults bring is part of what the port carries: a pacer that did not hear of it would take the port for
/// a slower one. Their own delay is no measure: they overtake.
fn report(shared: &Shared, link: LinkId, received_bytes: u64) {
    let reading = LinkReading { delivered: received_bytes, ..LinkReading::default() };
    shared.pacer.observe(link, reading, host::now());
}

/// What stands in the way of an installation is an event that was not read: the guest gives pages up. Faults
/// that are read along with it are kept for the next step.
fn read_removals(shared: &Shared) -> Result<()> {
    let mut events = Vec::new();
    shared.sink.events(&mut events)?;
    let mut tracker = shared.tracker.lock();
    for event in events {
        match event {
            SinkEvent::Removed(range) => tracker.removed(range),
            SinkEvent::Installed(range) => tracker.installed(range, Path::Staged, host::now()),
            SinkEvent::Fault { page, .. } => shared.fault_for_later(page),
        }
    }
    drop(tracker);
    if shared.is_stopping() {
        return Err(Error::new(ErrorKind::Cancelled, "gather ends"));
    }
    host::thread::yield_now();
    Ok(())
}
