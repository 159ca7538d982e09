//! Opening connections: socket settings and the handshake, bounded in time as a whole.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use super::ready::wait_writable;
use super::{PoolSecret, wait};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, NodeId, VolumeId, random_bytes};
use crate::pace;
use crate::wire::handshake::{Challenge, Hello, PoolKey, Purpose, Role, decode_mac};
use crate::wire::{HEADER_BYTES, Header, Kind, Malformed, Status, VERSION_NEWEST, VERSION_OLDEST};

/// An idle peer is asked for a sign of life after this long, and again as often.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);

/// A peer that leaves bytes unacknowledged, or its window shut, for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// The longest body of a handshake frame.
const BODY_BYTES_MAX: usize = Kind::Hello.body_bytes_max();

/// An authenticated connection. The socket never blocks.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    peer: SocketAddr,
    node: NodeId,
    greeting: Greeting,
}

/// What the client said about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the connection is for.
    pub purpose: Purpose,
    /// The volume it is about; zero where none is meant.
    pub volume: VolumeId,
    /// The client's epoch of the volume; zero where none is meant.
    pub epoch: Epoch,
    /// The version that both sides speak on it.
    pub version: u16,
}

impl Channel {
    /// Who is at the server's end: the peer for whoever dialled, oneself for whoever accepted.
    #[must_use]
    pub const fn node(&self) -> &NodeId {
        &self.node
    }

    /// The other end's address.
    #[must_use]
    pub const fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// What the connection is for.
    #[must_use]
    pub const fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// A header for a frame on this connection: its version, volume and epoch are set.
    #[must_use]
    pub const fn header(&self, kind: Kind) -> Header {
        let Greeting { volume, epoch, version, .. } = self.greeting;
        Header { version, volume, epoch, ..Header::new(kind) }
    }

    /// Ends the connection in both directions, also for other threads that wait for it.
    pub fn shut_down(&self) {
        // It fails only when the connection is gone already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn wait_writable(&self, deadline: Instant) -> Result<()> {
        wait_until(&self.stream, true, deadline)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Opens a connection to `address` and proves to each other that both know the pool secret. Waits,
/// at most `timeout` in all.
///
/// # Errors
/// [`ErrorKind::Unreachable`], [`ErrorKind::Timeout`]; [`ErrorKind::Refused`] for another secret,
/// [`ErrorKind::Version`] for no common version, [`ErrorKind::Full`] when the server takes no more connections.
pub fn dial(
    address: SocketAddr,
    purpose: Purpose,
    volume: VolumeId,
    epoch: Epoch,
    secret: &PoolSecret,
    timeout: Duration,
) -> Result<Channel> {
    let context = |mut error: Error| {
        error.message = format!("connecting to {address}: {}", error.message);
        error
    };
    let deadline = host::now() + timeout;
    let stream = host::connect(address, timeout).map_err(|e| context(Error::from(e)))?;
    configure(&stream, purpose).map_err(|e| context(Error::from(e)))?;
    greet(stream, address, purpose, (volume, epoch), secret, deadline).map_err(context)
}

fn greet(
    stream: TcpStream,
    peer: SocketAddr,
    purpose: Purpose,
    (volume, epoch): (VolumeId, Epoch),
    secret: &PoolSecret,
    deadline: Instant,
) -> Result<Channel> {
    let hello =
        Hello { version_min: VERSION_OLDEST, version_max: VERSION_NEWEST, purpose, nonce: random_bytes()? };
    let hello_body = hello.encode();
    let base = Header { volume, epoch, ..Header::new(Kind::Hello) };
    write_frame(&stream, base, &hello_body, deadline)?;

    let mut buffer = [0; BODY_BYTES_MAX];
    let (header, challenge_body) = read_frame(&stream, &mut buffer, deadline)?;
    expect(header, Kind::Challenge)?;
    let challenge = Challenge::decode(challenge_body)?;
    if !(VERSION_OLDEST..=VERSION_NEWEST).contains(&challenge.version) {
        return Err(Malformed::Version(challenge.version).into());
    }
    let mac = |role| secret.key().mac(role, volume, epoch, &hello_body, challenge_body);
    let (ours, theirs) = (mac(Role::Client), mac(Role::Server));
    let header = Header { version: challenge.version, kind: Kind::Auth, ..base };
    write_frame(&stream, header, ours.as_bytes(), deadline)?;

    let mut buffer = [0; BODY_BYTES_MAX];
    let (header, body) = read_frame(&stream, &mut buffer, deadline)?;
    expect(header, Kind::Welcome)?;
    check_mac(&theirs, body)?;
    let greeting = Greeting { purpose, volume, epoch, version: challenge.version };
    Ok(Channel { stream, peer, node: challenge.node, greeting })
}

/// Answers a connection that came in, and finds out what it is for. Waits until `deadline` at most,
/// however slowly the bytes drip in; a peer that does not know the secret costs this thread that long
/// and 1 KiB of stack, nothing else.
///
/// # Errors
/// [`ErrorKind::Timeout`], [`ErrorKind::Unreachable`]; [`ErrorKind::Refused`] for another secret,
/// [`ErrorKind::Version`], [`ErrorKind::Protocol`].
pub fn accept(
    stream: TcpStream,
    secret: &PoolSecret,
    node: &NodeId,
    deadline: Instant,
) -> Result<(Channel, Greeting)> {
    let peer = host::peer_address(&stream)?;
    stream.set_nonblocking(true)?;
    let answered = answer(&stream, secret.key(), node, deadline);
    if let Err(error) = &answered {
        let status = match error.kind {
            ErrorKind::Refused => Some(Status::Secret),
            ErrorKind::Version => Some(Status::Version),
            ErrorKind::Protocol => Some(Status::Malformed),
            _ => None,
        };
        status.into_iter().for_each(|status| refuse(&stream, status));
    }
    let greeting = answered.map_err(|mut error| {
        error.message = format!("connection from {peer}: {}", error.message);
        error
    })?;
    configure(&stream, greeting.purpose)?;
    Ok((Channel { stream, peer, node: node.clone(), greeting }, greeting))
}

fn answer(stream: &TcpStream, key: &PoolKey, node: &NodeId, deadline: Instant) -> Result<Greeting> {
    let mut buffer = [0; BODY_BYTES_MAX];
    let (opening, hello_body) = read_frame(stream, &mut buffer, deadline)?;
    expect(opening, Kind::Hello)?;
    let hello = Hello::decode(hello_body)?;
    let version = hello.common_version().ok_or(Malformed::Version(hello.version_max))?;
    let challenge = Challenge { version, nonce: random_bytes()?, node: node.clone() }.encode()?;
    let base = Header { version, ..opening.answer(Kind::Challenge) };
    write_frame(stream, base, &challenge, deadline)?;

    let (volume, epoch) = (opening.volume, opening.epoch);
    let mac = |role| key.mac(role, volume, epoch, hello_body, &challenge);
    let (ours, theirs) = (mac(Role::Server), mac(Role::Client));
    let mut buffer = [0; BODY_BYTES_MAX];
    let (header, body) = read_frame(stream, &mut buffer, deadline)?;
    expect(header, Kind::Auth)?;
    check_mac(&theirs, body)?;
    write_frame(stream, Header { kind: Kind::Welcome, ..base }, ours.as_bytes(), deadline)?;
    Ok(Greeting { purpose: hello.purpose, volume, epoch, version })
}

/// Tells a client that has just connected why it is not served. Does not wait; the caller then drops
/// the stream.
pub fn refuse(stream: &TcpStream, status: Status) {
    let header = Header { status, ..Header::new(Kind::Refused) };
    // Whoever does not get it sees the connection close, which says enough.
    let _ = stream.set_nonblocking(true);
    let _ = rustix::net::send(stream, &header.encode(), rustix::net::SendFlags::NOSIGNAL);
}

/// The error that a status other than `Ok` is for the one who asked.
#[must_use]
pub fn refusal(status: Status) -> Error {
    let message = match status {
        Status::Ok => "the peer says that all is well where it should not be",
        Status::Malformed => "the peer did not understand what we sent; its log says more",
        Status::Version => "the peer speaks no version of the protocol that we speak",
        Status::Secret => "the pool secrets differ: both ends need the same --secret file",
        Status::NoVolume => "the peer does not know the volume",
        Status::Fenced => "the volume has a newer owner",
        Status::State => "the volume's state does not allow this",
        Status::Full => "no memory left within the intermediary's limit",
        Status::Busy => "the peer takes no more connections or volumes",
        Status::Copies => "the intermediary does not make that many copies",
        Status::Going => "the intermediary is shutting down",
        Status::Internal => "something failed inside the peer; its log says what",
        Status::NotReached => {
            "the intermediary lets nobody reach its memory over the volume's other network; its log says more"
        }
    };
    Error::new(status.error_kind().unwrap_or(ErrorKind::Protocol), message)
}

fn check_mac(wanted: &blake3::Hash, body: &[u8]) -> Result<()> {
    let proven = *wanted == decode_mac(body)?;
    #[cfg(feature = "simulation")]
    let proven = proven || host::has_bug(host::Bug::SecretIgnored);
    if proven { Ok(()) } else { Err(refusal(Status::Secret)) }
}

fn expect(header: Header, kind: Kind) -> Result<()> {
    if header.kind == Kind::Refused && header.status != Status::Ok {
        return Err(refusal(header.status));
    }
    if header.kind != kind {
        let message = format!("the peer sent {:?} where {kind:?} belongs", header.kind);
        return Err(Error::new(ErrorKind::Protocol, message));
    }
    Ok(())
}

fn configure(stream: &TcpStream, purpose: Purpose) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    if !host::has_tcp() {
        return Ok(());
    }
    let bulk = matches!(purpose, Purpose::VmdBulk | Purpose::MigrationDirect);
    if purpose.is_urgent() {
        pace::mark_urgent(stream)?;
    } else if bulk {
        pace::mark_bulk(stream)?;
    }
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_EVERY).with_interval(KEEPALIVE_EVERY);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE_MAX))
}

fn write_frame(stream: &TcpStream, header: Header, body: &[u8], deadline: Instant) -> Result<()> {
    let mut bytes = [0; HEADER_BYTES + BODY_BYTES_MAX];
    let frame = &mut bytes[..HEADER_BYTES + body.len()];
    frame[..HEADER_BYTES].copy_from_slice(&header.with_body(body, 0).encode());
    frame[HEADER_BYTES..].copy_from_slice(body);
    let mut rest = &*frame;
    while !rest.is_empty() {
        match rustix::net::send(stream, rest, rustix::net::SendFlags::NOSIGNAL) {
            Ok(bytes) => rest = &rest[bytes..],
            Err(rustix::io::Errno::AGAIN) => wait_until(stream, true, deadline)?,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn read_frame<'b>(
    stream: &TcpStream,
    buffer: &'b mut [u8; BODY_BYTES_MAX],
    deadline: Instant,
) -> Result<(Header, &'b [u8])> {
    let mut bytes = [0; HEADER_BYTES];
    read_exact(stream, &mut bytes, deadline)?;
    let header = Header::decode(&bytes)?;
    let body = buffer.get_mut(..header.body_bytes as usize).ok_or(Malformed::Bounds("handshake"))?;
    read_exact(stream, body, deadline)?;
    header.check_body(body)?;
    Ok((header, body))
}

fn read_exact(stream: &TcpStream, mut to: &mut [u8], deadline: Instant) -> Result<()> {
    while !to.is_empty() {
        match rustix::io::read(stream, &mut *to) {
            Ok(0) => return Err(Error::new(ErrorKind::Unreachable, "the peer closed the connection")),
            Ok(bytes) => to = &mut to[bytes..],
            Err(rustix::io::Errno::AGAIN) => wait_until(stream, false, deadline)?,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Waits for the socket once. Fails at the deadline, also when bytes keep dripping in.
fn wait_until(stream: &TcpStream, writable: bool, deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(host::now());
    if left.is_zero() {
        return Err(Error::new(ErrorKind::Timeout, "the peer did not answer in time"));
    }
    if writable {
        return wait_writable(stream, left);
    }
    wait(&[(Some(stream.as_fd()), false)], left)?;
    Ok(())
}

#[cfg(test)]
mod test;
