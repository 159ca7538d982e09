//! Hosts that find each other by UDP multicast: an [`Announcer`] says who we are, a [`MulticastPool`] asks who is
//! there. Both keep a [`Book`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};

use super::book::{Book, Refusal, WINDOW, jittered, period};
use super::{Announces, Describe, Found, Hears, Pool};
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, wall_ms};
use crate::ids::random_bytes;
use crate::transport::{PoolSecret, Waker, wait};
use crate::wire::Malformed;
use crate::wire::announcement::{Announcement, Duty};
use crate::wire::datagram::{AnnouncementKey, DATAGRAM_BYTES_MAX, Datagram, Said};

/// The port of announcements.
pub const PORT: u16 = 7702;

/// What may wait in the kernel to be read: a second of all announcements there may be.
const RECEIVE_BYTES: usize = 1 << 20;

/// The least time between two announcements of a host that is asked.
const ANSWER_MIN: Duration = Duration::from_millis(200);

/// Answers of all hosts together, in a second: they spread so as not to come all at once.
const ANSWERS_PER_S: u64 = 2000;

/// When nobody new was heard for so long, everybody was: longer than the answers of a small pool spread.
const QUIET: Duration = Duration::from_millis(300);

/// When nobody at all was heard for so long, nobody is there.
const ALONE: Duration = Duration::from_secs(3);

/// Where announcements go: a group, its port, and the address of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Group and port.
    pub group: SocketAddrV4,
    /// An address of the interface; unspecified is the one that the routes say.
    pub interface: Ipv4Addr,
}

impl FromStr for Place {
    type Err = Error;

    /// `GROUP[:PORT][@INTERFACE]`: `239.83.71.1:7702@10.0.0.3`.
    fn from_str(text: &str) -> Result<Self> {
        let refuse = || {
            let what =
                format!("{text:?} is not like 239.83.71.1:7702@10.0.0.3: GROUP[:PORT][@INTERFACE'S ADDRESS]");
            Error::new(ErrorKind::Input, what)
        };
        let (group, interface) = match text.split_once('@') {
            Some((group, interface)) => (group, interface.parse().map_err(|_| refuse())?),
            None => (text, Ipv4Addr::UNSPECIFIED),
        };
        let group = match group.parse::<Ipv4Addr>() {
            Ok(group) => SocketAddrV4::new(group, PORT),
            Err(_) => group.parse().map_err(|_| refuse())?,
        };
        if !group.ip().is_multicast() || group.port() == 0 {
            return Err(refuse());
        }
        Ok(Self { group, interface })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.group)?;
        if self.interface.is_unspecified() { Ok(()) } else { write!(f, "@{}", self.interface) }
    }
}

impl Place {
    /// Our own address there.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when no route leads there.
    pub fn own_address(&self) -> Result<IpAddr> {
        if !self.interface.is_unspecified() {
            return Ok(self.interface.into());
        }
        let no_route = |cause: std::io::Error| {
            let what =
                format!("no route leads to {}: name the interface, {}@ADDRESS", self.group, self.group);
            Error::new(ErrorKind::System, what).because(cause)
        };
        // Nothing is sent by this.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(no_route)?;
        socket.connect(self.group).map_err(no_route)?;
        Ok(socket.local_addr().map_err(no_route)?.ip())
    }
}

/// A socket of the group.
#[derive(Debug)]
pub(super) struct Line {
    socket: UdpSocket,
    group: SocketAddrV4,
    key: AnnouncementKey,
    counter: u64,
    refused: bool,
}

impl Line {
    fn open(place: Place, secret: &PoolSecret) -> Result<Self> {
        let IpAddr::V4(interface) = place.own_address()? else {
            return Err(Error::new(ErrorKind::Input, "announcements go by IPv4"));
        };
        let refuse = |cause: std::io::Error| {
            let what = format!("cannot announce at {place}: has the interface with {interface} multicast?");
            Error::new(ErrorKind::System, what).because(cause)
        };
        Ok(Self {
            socket: open(place.group, interface).map_err(refuse)?,
            group: place.group,
            key: secret.announcement_key(),
            counter: 0,
            refused: false,
        })
    }

    fn send(&mut self, said: Said) -> Result<()> {
        self.counter += 1;
        let bytes = Datagram { counter: self.counter, sent_ms: wall_ms(), said }.encode(&self.key)?;
        self.socket.send_to(&bytes, self.group)?;
        Ok(())
    }

    /// The next datagram of this pool; `None` when no more wait.
    fn next(&mut self) -> Option<Datagram> {
        let mut bytes = [0; DATAGRAM_BYTES_MAX + 1];
        loop {
            // Errors of a socket that only receives are those of single packets.
            let (length, from) = self.socket.recv_from(&mut bytes).ok()?;
            match Datagram::decode(&bytes[..length], &self.key) {
                Ok(datagram) => return Some(datagram),
                Err(why) => self.refuse(from, &why),
            }
        }
    }

    /// A group is open to everybody: the log is not.
    fn refuse(&mut self, from: SocketAddr, why: &Malformed) {
        if !std::mem::replace(&mut self.refused, true) {
            tracing::warn!(%from, %why, "a datagram that is not of this pool; further ones are not logged");
        }
    }
}

/// What tests say and hear.
#[cfg(test)]
impl Line {
    pub(super) fn open_for_test(place: Place, secret: &PoolSecret) -> Self {
        Self::open(place, secret).expect("loopback has groups")
    }

    pub(super) fn say(&mut self, period_ms: u32, host: Announcement) {
        self.send(Said::Here { period_ms, host }).expect("sent");
    }

    /// The next packet like that, as it is.
    pub(super) fn packet(&mut self, is_it: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut bytes = [0; DATAGRAM_BYTES_MAX];
        for _ in 0..1000 {
            wait(&[(Some(self.socket.as_fd()), false)], QUIET).expect("waits");
            match self.socket.recv(&mut bytes) {
                Ok(length) if is_it(&bytes[..length]) => return bytes[..length].to_vec(),
                _ => {}
            }
        }
        panic!("no such packet");
    }
}

fn open(group: SocketAddrV4, interface: Ipv4Addr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // Every process of a host hears the group.
    socket.set_reuse_address(true)?;
    socket.set_recv_buffer_size(RECEIVE_BYTES)?;
    socket.bind(&SocketAddr::from(group).into())?;
    socket.join_multicast_v4(group.ip(), &interface)?;
    socket.set_multicast_if_v4(&interface)?;
    socket.set_multicast_loop_v4(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn random() -> u64 {
    // Without random bytes hosts keep step, which costs bursts, not correctness.
    random_bytes().map_or(0, u64::from_le_bytes)
}

/// Announces a host until it is dropped, and then that it leaves.
#[derive(Debug)]
pub struct Announcer {
    shared: Arc<Shared>,
    thread: Option<host::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    book: Mutex<Book>,
    over: AtomicBool,
    /// Something has changed that shall not wait.
    now: AtomicBool,
    waker: Waker,
}

impl Announcer {
    /// Announces what `describe` says, at once and from then on, in a thread of its own (`sg-announce`).
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the group cannot be joined there, [`ErrorKind::Input`] for a host that cannot be
    /// announced (a zone or name that is too long).
    pub fn start(place: Place, secret: &PoolSecret, mut describe: Describe) -> Result<Self> {
        let mut line = Line::open(place, secret)?;
        // The first is sent from here: what is wrong with it is an error of the one who starts it.
        line.send(Said::Here { period_ms: milliseconds(period(1)), host: describe() })?;
        line.send(Said::WhoIsThere)?;
        let (over, now) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { book: Mutex::default(), over, now, waker: Waker::new()? });
        let ours = Arc::clone(&shared);
        let run = move || run(&ours, &mut line, &mut describe);
        let thread = Some(host::thread::Builder::new().name("sg-announce".into()).spawn(run)?);
        Ok(Self { shared, thread })
    }
}

impl Announces for Announcer {
    fn announce(&self) {
        self.shared.now.store(true, Ordering::Release);
        self.shared.waker.wake();
    }
}

impl Hears for Announcer {
    fn hosts(&self) -> Vec<Announcement> {
        self.shared.book.lock().hosts(host::now())
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the announcing thread panicked");
        }
    }
}

fn milliseconds(period: Duration) -> u32 {
    u32::try_from(period.as_millis()).unwrap_or(u32::MAX)
}

fn run(shared: &Shared, line: &mut Line, describe: &mut Describe) {
    let mut last = host::now();
    let mut due = last + jittered(period(1), random());
    while !shared.over.load(Ordering::Acquire) {
        let now = host::now();
        if now >= due || shared.now.swap(false, Ordering::AcqRel) {
            let hosts = shared.book.lock().count(now);
            announce(line, describe(), hosts);
            last = now;
            due = now + jittered(period(hosts), random());
            shared.book.lock().forget(now, wall_ms());
        }
        let waited = wait(
            &[(Some(line.socket.as_fd()), false), (Some(shared.waker.as_fd()), false)],
            due.saturating_duration_since(now),
        );
        if let Err(error) = waited {
            tracing::error!(error = error.chain(), "announcements end");
            return;
        }
        shared.waker.drain();
        while let Some(datagram) = line.next() {
            let is_question = datagram.said == Said::WhoIsThere;
            let (now, mut book) = (host::now(), shared.book.lock());
            match book.hear(datagram, now, wall_ms()) {
                Ok(_) if is_question => due = due.min(answer(last, now, book.count(now))),
                Ok(_) | Err(Refusal::Replayed) => {}
                Err(why) => tracing::debug!(?why, "a datagram does not count"),
            }
        }
    }
    let host = Announcement { duty: Duty::Leaves, ..describe() };
    announce(line, host, shared.book.lock().count(host::now()));
}

fn announce(line: &mut Line, host: Announcement, hosts: usize) {
    if let Err(error) = line.send(Said::Here { period_ms: milliseconds(period(hosts)), host }) {
        // The next one may get through: an interface that is down comes up again.
        tracing::warn!(error = error.chain(), "an announcement was not sent");
    }
}

/// When a host that is asked announces itself: somewhere in the time that all answers together take, and once in that
/// time at most, so that a question that is played back again and again costs no more.
fn answer(last: Instant, now: Instant, hosts: usize) -> Instant {
    let spread = Duration::from_micros(hosts as u64 * 1_000_000 / ANSWERS_PER_S);
    let within = spread * ((random() & 0xffff) as u32) / 0xffff;
    (last + ANSWER_MIN.max(spread)).max(now + within)
}

/// Asks a group who is there.
#[derive(Debug)]
pub struct MulticastPool {
    line: Line,
    book: Book,
}

impl MulticastPool {
    /// Joins the group.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it cannot be joined there.
    pub fn open(place: Place, secret: &PoolSecret) -> Result<Self> {
        Ok(Self { line: Line::open(place, secret)?, book: Book::new() })
    }
}

impl Pool for MulticastPool {
    /// Asks, and again, and listens until nobody new is heard, or `patience` is over.
    fn find(&mut self, patience: Duration) -> Result<Vec<Found>> {
        let begun = host::now();
        let (mut quiet_since, mut asked) = (begun, 0);
        loop {
            let now = host::now();
            let elapsed = now.saturating_duration_since(begun);
            // Once more for whoever missed the first.
            if asked == 0 || (asked == 1 && elapsed >= QUIET / 2) {
                self.line.send(Said::WhoIsThere)?;
                asked += 1;
            }
            let heard_all = now.saturating_duration_since(quiet_since) >= QUIET && self.book.count(now) > 0;
            let alone = elapsed >= ALONE && self.book.count(now) == 0;
            if heard_all || alone || elapsed >= patience {
                break;
            }
            wait(&[(Some(self.line.socket.as_fd()), false)], QUIET / 10)?;
            while let Some(datagram) = self.line.next() {
                let now = host::now();
                if self.book.hear(datagram, now, wall_ms()) == Ok(true) {
                    quiet_since = now;
                }
            }
        }
        let hosts = self.book.hosts(host::now());
        Ok(hosts.into_iter().map(|host| Found { address: host.address, announced: Some(host) }).collect())
    }
}

// All answers of the largest pool come while the question is fresh.
const _: () = assert!(WINDOW.as_secs() * ANSWERS_PER_S > crate::limits::POOL_HOSTS_MAX as u64);

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for (text, group, interface) in [
            ("239.83.71.1", "239.83.71.1:7702", "0.0.0.0"),
            ("239.83.71.1:9", "239.83.71.1:9", "0.0.0.0"),
            ("239.83.71.1:9@10.0.0.3", "239.83.71.1:9", "10.0.0.3"),
        ] {
            let place: Place = text.parse().expect("good");
            assert_eq!(
                (place.group.to_string(), place.interface.to_string()),
                (group.into(), interface.into())
            );
            assert_eq!(place.to_string().parse::<Place>().expect("good"), place);
        }
        for wrong in ["", "10.0.0.1", "239.1.1.1:0", "239.1.1.1@", "239.1.1.1@lo", "ff02::1"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn answers_spread_and_are_not_too_many() {
        let now = Instant::now();
        for _ in 0..100 {
            assert_eq!(answer(now, now, 10), now + ANSWER_MIN, "it was just heard");
            let long_ago = now.checked_sub(Duration::from_secs(5)).expect("a while ago");
            assert!((now..=now + Duration::from_secs(1)).contains(&answer(long_ago, now, 2000)));
        }
    }
}
