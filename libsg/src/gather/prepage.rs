//! Prepaging: what is announced at an intermediary is read from there in the background. One thread
//! for each, `sg-gather-iN`; it also makes the links to its intermediary, the one for faults
//! included, and at the end gives the volume's memory there back.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::desk::{MemberDesk, MemberState};
use super::gets::Gets;
use super::install::Installer;
use super::shared::Shared;
use super::tracker::Read;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::host;
use crate::ids::MemberIndex;
use crate::limits::BATCH_PAGES;
use crate::pace::{self, Acquire, Class, LinkId, LinkReading, bytes_in};
use crate::page::PAGE_BYTES;
use crate::transport::wait;
use crate::vmd::link::ask;
use crate::vmd::{self, Link, Reply, Request, Ticket};
use crate::wire::PageEntry;
use crate::wire::message::VmdRequest;

/// Bytes asked for and not yet here, while the rate is not known; and the most.
const WINDOW_BYTES: u64 = 1 << 20;

/// The same in time, where it is: a thread on a busy host wakes late by less.
const WINDOW_TIME: Duration = Duration::from_millis(10);

/// One request brings what this link may carry in so much time. Each costs both hosts some ten system calls; a page
/// that the guest waits for does not queue behind it, since the intermediary's kernel spreads it over its time.
const REQUEST_TIME: Duration = Duration::from_millis(4);

/// Pages are asked for so long before their time. The direct path looks further ahead, and so goes first.
const AHEAD: Duration = Duration::from_millis(8);

/// Answers may come faster than this link's share by one in so many, to catch up with what was asked for late.
const CATCH_UP_PARTS: u64 = 16;

/// A pace that differs from the one told by less than one in so many is not told: at the intermediary it is a system
/// call.
const PACE_PARTS: u64 = 16;

/// However small the share is, what was asked for comes within this time: at the pace of a share, or a limit, that has
/// grown long since it would be waited for, and another pace goes only with the next request.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(100);

/// What one page costs on the wire: its bytes, its checksum, and its part of heads and headers.
const PAGE_WIRE_BYTES: u64 = (PAGE_BYTES + 8) as u64;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// Tries to reach a member again, at first and at most this far apart.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// How often nobody listens at a member's address until it counts as gone for good.
const REFUSED_MAX: u32 = 4;

/// How long the thread sleeps at most.
const NAP: Duration = Duration::from_millis(20);

/// How often, and how long each time, a member is told to give the volume's memory back.
const DISSOLVE_TRIES: u32 = 3;
const DISSOLVE_WAIT: Duration = Duration::from_secs(2);

/// The thread `sg-gather-iN`.
pub(crate) fn run(shared: &Shared, member: MemberIndex) -> Result<()> {
    let Some(desk) = shared.member(member) else { return Ok(()) };
    // Sleeps are then up to 50 µs late, and still right.
    let _ = pace::precise_timers();
    let mut worker = Worker {
        shared,
        desk: &desk,
        member,
        link: None,
        pace_link: shared.pacer.add_link(Class::Bulk),
        flights: VecDeque::new(),
        spare: Vec::new(),
        gets: Gets::default(),
        entries: Vec::new(),
        installer: Installer::default(),
        share: None,
        told: None,
        last_sign: host::now(),
        counted: 0,
    };
    let ended = worker.work();
    shared.pacer.remove_link(worker.pace_link);
    ended
}

struct Worker<'a> {
    shared: &'a Shared,
    desk: &'a MemberDesk,
    member: MemberIndex,
    link: Option<Box<dyn Link>>,
    pace_link: LinkId,
    flights: VecDeque<(Ticket, Vec<Read>)>,
    spare: Vec<Vec<Read>>,
    gets: Gets,
    entries: Vec<PageEntry>,
    installer: Installer,
    /// What this link may carry of what the port does, in bytes/s.
    share: Option<u64>,
    /// The pace that the intermediary was told.
    told: Option<u64>,
    /// When something last came, while something was asked for.
    last_sign: Instant,
    counted: u64,
}

impl Worker<'_> {
    fn work(&mut self) -> Result<()> {
        while !self.shared.is_stopping() && !self.shared.is_dissolving() {
            if self.link.is_none() && !self.connect()? {
                return self.leave();
            }
            self.desk.waker.drain();
            match self.step() {
                Ok(again_at) => self.rest(again_at)?,
                Err(error) if is_of_link(&error) => {
                    self.drop_link(&error);
                    // One that takes connections and refuses what is asked on them is not asked without end.
                    wait(&[(Some(self.desk.waker.as_fd()), false)], RETRY_FIRST)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.leave()
    }

    /// Until there is a link, and one for faults. `false` when gather ends, or the member is gone for good.
    fn connect(&mut self) -> Result<bool> {
        let (mut pause, mut refused) = (RETRY_FIRST, 0);
        while !self.shared.is_stopping() && !self.shared.is_dissolving() {
            match self.connect_once(vmd::Class::Bulk) {
                Ok(link) => {
                    (self.link, self.told) = (Some(link), None);
                    (self.last_sign, self.counted) = (host::now(), 0);
                    self.set_lost(false, None);
                    return Ok(true);
                }
                Err(error) => {
                    refused = if was_refused(&error) { refused + 1 } else { 0 };
                    let gone = error.kind == ErrorKind::Volume || refused >= REFUSED_MAX;
                    self.set_lost(gone, Some(&error));
                    if gone {
                        self.wait_for_the_end()?;
                        return Ok(false);
                    }
                }
            }
            wait(&[(Some(self.desk.waker.as_fd()), false)], pause)?;
            self.desk.waker.drain();
            pause = (2 * pause).min(RETRY_MAX);
        }
        Ok(false)
    }

    fn connect_once(&self, class: vmd::Class) -> Result<Box<dyn Link>> {
        let Shared { connector, volume, epoch, .. } = self.shared;
        let link = connector.connect(self.desk.member.address, *volume, *epoch, class, CONNECT_MAX)?;
        let found = &link.member().node;
        if *found != self.desk.member.node {
            let message = format!("at its address is {found} now: it was restarted, and its pages are gone");
            return Err(Error::new(ErrorKind::Volume, message).at(&self.desk.member.node));
        }
        Ok(link)
    }

    /// Says whether the member can be reached.
    fn set_lost(&self, gone: bool, error: Option<&Error>) {
        let lost = error.is_some();
        let before = {
            let mut state = self.desk.state.lock();
            let before = *state;
            let since = before.lost_since.unwrap_or_else(host::now);
            *state = MemberState { lost_since: lost.then_some(since), gone, ..before };
            before
        };
        if before.lost_since.is_some() != lost || before.gone != gone {
            {
                let mut tracker = self.shared.tracker.lock();
                tracker.set_member_lost(self.member, lost);
                if !lost {
                    tracker.ask_again(false);
                }
            }
            if let Some(error) = error.filter(|_| before.lost_since.is_none() || gone) {
                let message = format!("{}: {}", self.desk.member.node, error.chain());
                tracing::warn!(member = %self.desk.member.node, error = error.chain(), gone, "intermediary lost");
                self.shared.tell(&Event::NodeLost { message });
            }
            self.shared.wake_index.wake();
            self.shared.look_again();
        }
    }

    fn wait_for_the_end(&self) -> Result<()> {
        while !self.shared.is_stopping() && !self.shared.is_dissolving() {
            wait(&[(Some(self.desk.waker.as_fd()), false)], Duration::from_secs(1))?;
            self.desk.waker.drain();
        }
        Ok(())
    }

    fn drop_link(&mut self, error: &Error) {
        self.link = None;
        let mut tracker = self.shared.tracker.lock();
        for (_, reads) in self.flights.drain(..) {
            tracker.give_back(&reads);
        }
        drop(tracker);
        self.set_lost(false, Some(error));
    }

    /// Takes what came, and asks for more in its place; returns when to look again.
    fn step(&mut self) -> Result<Instant> {
        if self.desk.wants_urgent.load(Ordering::Acquire) && self.desk.urgent.lock().is_none() {
            let link = self.connect_once(vmd::Class::Urgent)?;
            *self.desk.urgent.lock() = Some(link);
            self.desk.wants_urgent.store(false, Ordering::Release);
            self.shared.look_again();
        }
        let Some(link) = &mut self.link else { return Ok(host::now() + NAP) };
        link.progress(usize::MAX)?;
        self.reap()?;
        self.report();
        let again_at = self.request()?;
        // It goes out now, and not with the next wake-up.
        if let Some(link) = &mut self.link {
            link.progress(usize::MAX)?;
        }
        if !self.flights.is_empty() && host::elapsed(self.last_sign) > self.shared.member_grace {
            let message = format!("no answer for {} s", self.shared.member_grace.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message).at(&self.desk.member.node));
        }
        Ok(again_at)
    }

    fn request(&mut self) -> Result<Instant> {
        let now = host::now();
        let nap = now + NAP;
        let direct_first = self.shared.direct_first(now);
        let ahead = AHEAD;
        #[cfg(feature = "simulation")]
        let (direct_first, ahead) =
            if host::has_bug(host::Bug::DirectLast) { (false, 8 * AHEAD) } else { (direct_first, ahead) };
        if !self.shared.may_install() {
            return Ok(nap);
        }
        if direct_first {
            return Ok(nap.min(now + Duration::from_millis(2)));
        }
        let pace = self.pace(now);
        let pages = request_pages(pace);
        let wanted = pages as u64 * PAGE_WIRE_BYTES;
        let window = pace.map_or(WINDOW_BYTES, |share| {
            bytes_in(share, WINDOW_TIME).clamp(2 * wanted, WINDOW_BYTES.max(2 * wanted))
        });
        loop {
            let asked: u64 = self.flights.iter().map(|(_, reads)| reads.len() as u64 * PAGE_WIRE_BYTES).sum();
            if asked >= window || self.shared.tracker.lock().left_at(self.member) == 0 {
                return Ok(nap);
            }
            if let Acquire::WaitUntil(at) = self.shared.pacer.acquire_ahead(wanted, ahead, now) {
                return Ok(at.min(nap));
            }
            let got = self.ask_for((pages, pace), asked)?;
            // A whole unit may be more than was granted: the next request then waits for longer.
            if got > wanted {
                self.shared.pacer.charge(Class::Bulk, got - wanted, now);
            } else {
                self.shared.pacer.give_back(Class::Bulk, wanted - got);
            }
            if got == 0 {
                return Ok(nap);
            }
        }
    }

    /// The pace at which to ask, in bytes/s: this link's share, which is what faults have left lately; and where they leave more
    /// now, as a guest waits for nothing for a moment, that at once, divided among all.
    fn pace(&self, now: Instant) -> Option<u64> {
        let share = self.share?;
        let left = self.shared.pacer.pace_ahead(AHEAD, now).unwrap_or(0);
        Some(share.max(left / self.shared.member_count().max(1) as u64))
    }

    /// Submits one request for about so many pages, at such a pace, with so many bytes asked for already; the bytes that it
    /// brings.
    fn ask_for(&mut self, (pages, pace): (usize, Option<u64>), asked: u64) -> Result<u64> {
        let mut reads = self.spare.pop().unwrap_or_default();
        self.shared.tracker.lock().next_batch(self.member, pages, &mut reads);
        if reads.is_empty() {
            self.spare.push(reads);
            return Ok(0);
        }
        let bytes = reads.len() as u64 * PAGE_WIRE_BYTES;
        if self.flights.is_empty() {
            self.last_sign = host::now();
        }
        let pace = pace.map(|share| answer_pace(share, asked + bytes));
        let submitted = match &mut self.link {
            Some(link) => {
                if !pace::is_near(pace, self.told, PACE_PARTS) {
                    link.pace_answers(pace);
                    self.told = pace;
                }
                link.submit(self.gets.known(&reads))
            }
            None => Err(Error::new(ErrorKind::Unreachable, "no link")),
        };
        match submitted {
            Ok(ticket) => self.flights.push_back((ticket, reads)),
            Err(error) => {
                self.shared.tracker.lock().give_back(&reads);
                return Err(error);
            }
        }
        Ok(bytes)
    }

    fn reap(&mut self) -> Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        while let Some(completion) = link.completion() {
            let place = self.flights.iter().position(|(ticket, _)| *ticket == completion.ticket);
            let Some((_, mut reads)) = place.and_then(|place| self.flights.remove(place)) else { continue };
            self.last_sign = host::now();
            let shared = self.shared;
            match completion.result {
                Ok(Reply::Pages { entries, bytes }) => {
                    shared.counters.gathered.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    self.desk.bytes_out.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    self.entries.clear();
                    self.entries.extend_from_slice(entries);
                    let between = &mut || shared.let_events_be_read();
                    let installed = self.installer.reads(shared, &reads, &self.entries, bytes, between);
                    // What was not installed (a part of a unit, a lost copy) is in flight no longer.
                    shared.tracker.lock().give_back(&reads);
                    installed?;
                }
                Ok(_) => {
                    shared.tracker.lock().give_back(&reads);
                    return Err(Error::new(ErrorKind::Protocol, "an answer to another question"));
                }
                Err(error) => {
                    shared.tracker.lock().give_back(&reads);
                    return Err(error);
                }
            }
            reads.clear();
            self.spare.push(reads);
        }
        Ok(())
    }

    fn report(&mut self) {
        let Some(link) = &self.link else { return };
        let path = link.path();
        let reading = LinkReading {
            delivered: path.received_bytes,
            queue_delay: path.receive_delay,
            base_rtt: Duration::ZERO,
            backlogged: false,
        };
        self.share = self.shared.pacer.report(self.pace_link, reading, host::now());
        let fresh = path.received_bytes.saturating_sub(self.counted);
        self.counted = path.received_bytes;
        self.shared.counters.wire.fetch_add(fresh, Ordering::Relaxed);
    }

    fn rest(&self, again_at: Instant) -> Result<()> {
        let timeout = again_at.saturating_duration_since(host::now());
        let waker = (Some(self.desk.waker.as_fd()), false);
        match &self.link {
            Some(link) if !self.flights.is_empty() || link.queued_bytes() > 0 => {
                wait(&[waker, (link.poll_fd(), link.queued_bytes() > 0)], timeout)?
            }
            _ => wait(&[waker], timeout)?,
        };
        Ok(())
    }

    /// Gives back what was in flight; when gather is over, the volume's memory too.
    fn leave(&mut self) -> Result<()> {
        let mut tracker = self.shared.tracker.lock();
        for (_, reads) in self.flights.drain(..) {
            tracker.give_back(&reads);
        }
        drop(tracker);
        if !self.shared.is_dissolving() {
            return Ok(());
        }
        let gone = self.desk.state.lock().gone;
        let mut outcome = Err(Error::new(ErrorKind::Unreachable, "it is gone"));
        for _ in 0..DISSOLVE_TRIES {
            if gone || self.shared.is_stopping() {
                break;
            }
            outcome = self.dissolve();
            if outcome.is_ok() {
                break;
            }
            self.link = None;
        }
        if let Err(error) = &outcome {
            let message = format!(
                "{} could not be told to give the volume's memory back: {}",
                self.desk.member.node,
                error.chain()
            );
            tracing::warn!(message);
            if !gone {
                self.shared.tell(&Event::Warning { message });
            }
        }
        self.desk.state.lock().dissolved = Some(outcome.is_ok());
        self.shared.wake_conductor();
        Ok(())
    }

    fn dissolve(&mut self) -> Result<()> {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => match self.connect_once(vmd::Class::Bulk) {
                // Nobody is there, or somebody else: its memory is the host's again.
                Err(error) if error.kind == ErrorKind::Volume || was_refused(&error) => return Ok(()),
                connected => connected?,
            },
        };
        match ask(&mut *link, Request::Control(&VmdRequest::Dissolve), DISSOLVE_WAIT, |_| Ok(())) {
            // It does not know the volume (any more): there is nothing to give back.
            Err(error) if error.kind == ErrorKind::Volume => Ok(()),
            asked => asked,
        }
    }
}

/// Pages of one request at a rate.
fn request_pages(rate: Option<u64>) -> usize {
    let pages = rate.map(|rate| bytes_in(rate, REQUEST_TIME) / PAGE_WIRE_BYTES);
    pages.map_or(BATCH_PAGES, |pages| (pages as usize).clamp(1, BATCH_PAGES))
}

/// Bytes/s at which answers are to leave when a share is so large and so much is asked for.
fn answer_pace(share: u64, asked_bytes: u64) -> u64 {
    let soon_enough = (asked_bytes as f64 / ANSWER_TIME_MAX.as_secs_f64()) as u64;
    (share + share / CATCH_UP_PARTS).max(soon_enough)
}

/// Whether an error is about the member, not about this host.
pub(super) fn is_of_link(error: &Error) -> bool {
    use ErrorKind as K;
    matches!(
        error.kind,
        K::Unreachable | K::Timeout | K::Protocol | K::Version | K::Refused | K::Fenced | K::Volume | K::Full
    )
}

fn was_refused(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn requests_follow_the_rate() {
        assert_eq!(request_pages(None), BATCH_PAGES);
        assert_eq!(request_pages(Some(100_000)), 1);
        assert_eq!(request_pages(Some(16_000_000)), 15);
        assert_eq!(request_pages(Some(125_000_000)), BATCH_PAGES);
        assert_eq!(request_pages(Some(u64::MAX)), BATCH_PAGES);
    }

    #[test]
    fn answers_come_soon_whatever_the_share_was() {
        assert_eq!(answer_pace(16_000_000, 64 << 10), 17_000_000);
        // All that is asked for before anything paces, and then a limit of 1 Mb/s.
        assert_eq!(answer_pace(60_000, WINDOW_BYTES), 10 * WINDOW_BYTES);
        assert!(answer_pace(1, 2 * PAGE_WIRE_BYTES) < 100_000);
    }
}
