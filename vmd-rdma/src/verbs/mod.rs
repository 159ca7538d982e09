//! The few verbs that the backend needs, and no more: devices, protection domains, regions of memory, and reliable
//! connected queue pairs that write and read one-sidedly.
//!
//! Two implementations keep the rules written here: a device of the kernel, and [`simulated`], which is a network of such
//! devices in one process. What goes over them is [`crate`]'s; here nobody knows what a page is.
//!
//! Terms and rules are those of the InfiniBand Architecture Specification, volume 1, chapters 9 to 11.
#![allow(unsafe_code)] // one method is unsafe to call

pub mod kernel;
pub mod simulated;

use std::fmt;
use std::net::Ipv6Addr;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use libsg::ids::NodeId;
use libsg::{Error, ErrorKind};

/// What those who reach a region by its remote key may do with it. Its owner always may read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The device may write it for its owner: what is read from others lands there.
    pub local_write: bool,
    /// Peers of the same domain may read it.
    pub remote_read: bool,
    /// Peers of the same domain may write it; the device asks for `local_write` as well.
    pub remote_write: bool,
}

/// What a device can do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Work requests of a queue pair that have not come to their end.
    pub works_max: usize,
    /// Pieces of memory in one of them.
    pub pieces_max: usize,
    /// Bytes that one of them moves.
    pub message_bytes_max: usize,
    /// Bytes of a write that may travel in the request itself; zero where there is no such thing.
    pub inline_bytes_max: usize,
    /// Reads of a queue pair that are on their way; others wait in the device.
    pub reads_max: usize,
}

/// A queue pair as its peer needs to know it. Exchanged over a connection that both ends trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its number at its device.
    pub number: u32,
    /// Where its packets begin to be counted: 24 bits.
    pub packet_sequence: u32,
    /// The port's global identifier.
    pub gid: Ipv6Addr,
    /// The port's local identifier, where the link is InfiniBand; zero on Ethernet.
    pub lid: u16,
    /// Bytes of its port's largest packet.
    pub mtu_bytes: u32,
}

/// How long a peer may be silent before a queue pair gives it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until a packet that nobody acknowledges is sent again.
    pub acknowledged_within: Duration,
    /// How often it is sent again.
    pub retries: u8,
}

impl Default for Patience {
    /// About 1.5 s in all: 268 ms, and that six times more at most.
    fn default() -> Self {
        Self { acknowledged_within: Duration::from_millis(268), retries: 5 }
    }
}

/// Memory of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Where it starts, as the peer counts.
    pub address: u64,
    /// The key under which it was registered there.
    pub key: u32,
}

/// Memory of our own, of a region that is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts in this process.
    pub address: u64,
    /// How long it is.
    pub bytes: u32,
    /// Its region's local key; not looked at for a write that travels inline.
    pub key: u32,
}

/// What a work request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Our pieces, one behind the other, to the peer's memory.
    Write,
    /// The same, of bytes that the device takes over while it is posted: the pieces may change at once.
    WriteInline,
    /// The peer's memory to our pieces.
    Read,
}

/// A work request.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Comes back with its completion.
    pub id: u64,
    /// What it does.
    pub operation: Operation,
    /// With what memory here.
    pub pieces: &'a [Piece],
    /// And there.
    pub remote: Remote,
    /// Whether it says that it came to its end also when nothing went wrong. Those before it have come to theirs then.
    pub signalled: bool,
}

/// Why a work request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Our own memory is not what its key says.
    LocalProtection,
    /// The peer has no such memory, or not for us: withdrawn, beyond its end, another domain, no right.
    RemoteAccess,
    /// Nobody acknowledges: the peer, or the way to it, is gone.
    RetriesExceeded,
    /// The queue pair was in the error state already; whether it happened is not known.
    Flushed,
    /// Anything else, by the number that the device gave.
    Other(u32),
}

/// A work request that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub id: u64,
    /// How it went.
    pub result: Result<(), Fault>,
}

impl Fault {
    /// As an error about a peer, with what an operator can do.
    #[must_use]
    pub fn at(self, peer: &NodeId) -> Error {
        self.error().at(peer)
    }

    /// As an error, with what an operator can do.
    #[must_use]
    pub fn error(self) -> Error {
        let (kind, what) = match self {
            Self::LocalProtection => {
                (ErrorKind::System, "the device refuses our own memory: it was withdrawn")
            }
            Self::RemoteAccess => (
                ErrorKind::Unreachable,
                "the peer refused access to its memory: lease withdrawn, or it restarted",
            ),
            Self::RetriesExceeded => (
                ErrorKind::Unreachable,
                "the peer acknowledges nothing any more: it is gone, or packets of this size do not pass (look at the \
                 MTU of both ports and of what is between them)",
            ),
            Self::Flushed => (ErrorKind::Unreachable, "the queue pair was torn down before"),
            Self::Other(_) => (ErrorKind::System, "the device gave a request up"),
        };
        let error = Error::new(kind, what);
        if let Self::Other(status) = self { error.because(Status(status)) } else { error }
    }
}

/// A completion's status that has no name here.
#[derive(Debug, thiserror::Error)]
#[error("completion status {0}")]
struct Status(u32);

/// A port of a device.
pub trait Device: Send + Sync + fmt::Debug {
    /// The device's name, as the kernel has it.
    fn name(&self) -> &str;

    /// What it can do.
    fn limits(&self) -> Limits;

    /// A new protection domain: regions and queue pairs of others do not meet in it.
    ///
    /// # Errors
    /// The device has no more.
    fn domain(&self) -> Result<Arc<dyn Domain>, Error>;
}

/// A protection domain. It lives as long as anything made of it.
pub trait Domain: Send + Sync + fmt::Debug {
    /// Registers memory: it is pinned, and reachable by its keys, until the value is dropped.
    ///
    /// # Safety
    /// The memory stays mapped until the region is dropped, and whoever else reaches it expects it to change at any time:
    /// no Rust reference to it exists.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] when the limit on locked memory or the device's own is reached; [`ErrorKind::System`].
    unsafe fn register(
        self: Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Box<dyn Region>, Error>;

    /// A queue pair with a completion queue of its own, for so many work requests at once (at most
    /// [`Limits::works_max`]).
    ///
    /// # Errors
    /// The device has no more.
    fn queue_pair(self: Arc<Self>, works: usize) -> Result<Box<dyn QueuePair>, Error>;
}

/// Registered memory. Dropped, it can be reached by nobody any more: what is on its way to it is refused.
pub trait Region: Send + Sync + fmt::Debug {
    /// For [`Piece::key`].
    fn local_key(&self) -> u32;

    /// For [`Remote::key`], at the peer.
    fn remote_key(&self) -> u32;
}

/// A reliable connected queue pair.
///
/// # Contract
/// - Work requests are done in the order in which they were posted, and their completions come in that order.
/// - A failed one leaves the queue pair in the error state: all behind it are [`Fault::Flushed`], and only
///   [`Self::fail`] and [`Self::reap`] are of any use.
/// - A write whose completion has come is in the peer's memory, whatever happens to this end.
/// - A write of nothing needs no key: it ends well when the peer has acknowledged it.
/// - Dropped in the error state with every completion reaped, none is ever heard of later. Dropped otherwise, it goes
///   to the error state first.
pub trait QueuePair: Send + fmt::Debug {
    /// As the peer needs to know it.
    fn endpoint(&self) -> Endpoint;

    /// Connects it. Both ends do so; each may post once both have.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for an endpoint that this device cannot reach: it says why, and what to look at.
    fn connect(&mut self, peer: &Endpoint, patience: Patience) -> Result<(), Error>;

    /// Posts work requests with one doorbell, as many of them as there is room for. Returns how many.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a request that exceeds [`Limits`]: those before it are posted.
    fn post(&mut self, works: &[Work<'_>]) -> Result<usize, Error>;

    /// Appends completions that have come, at most `most`.
    ///
    /// # Errors
    /// The device is gone.
    fn reap(&mut self, most: usize, into: &mut Vec<Done>) -> Result<(), Error>;

    /// Has [`Self::poll_fd`] become readable with the next completion. Those that came before may not do it: reap once
    /// more behind this.
    ///
    /// # Errors
    /// The device is gone.
    fn arm(&mut self) -> Result<(), Error>;

    /// Becomes readable when a completion comes after [`Self::arm`].
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// To the error state: what is outstanding comes to its end, as [`Fault::Flushed`] where it is not done.
    fn fail(&mut self);
}
