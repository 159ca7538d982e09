//! What libsg asks of the host it runs on: the time, sleep, threads, condition variables, random bytes, connections.
//!
//! In a product's build each of these is the standard library's, or the kernel's, called directly. With the
//! feature `simulation`, threads that were started in a simulated world (`simulation::World`) ask that instead,
//! so that a test can run whole migrations by seed, on a clock and a network of its own. Nothing else in libsg
//! may ask the clock, sleep, or start a thread: `tests/layering.rs` looks.

mod condvar;
mod listener;
#[cfg(feature = "simulation")]
pub mod simulation;
mod spent;
pub mod thread;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use condvar::Condvar;
pub use listener::Listener;
#[cfg(feature = "simulation")]
pub(crate) use simulation::{Bug, has_bug};
pub(crate) use spent::spent;

/// A descriptor that is waited for: to be readable where the first flag says so, writable where the second does.
pub(crate) type Awaited<'fd> = (BorrowedFd<'fd>, bool, bool);

/// The time.
#[must_use]
pub fn now() -> Instant {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        return world.now();
    }
    Instant::now()
}

/// How long ago that was.
#[must_use]
pub fn elapsed(since: Instant) -> Duration {
    now().saturating_duration_since(since)
}

/// Milliseconds since 1970, by this host's clock: for what other hosts compare with theirs, never for how long
/// something takes.
#[must_use]
pub fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What is known of descriptors before the kernel is asked.
pub(crate) enum Known {
    /// Nothing: it waits.
    Nothing,
    /// All, in a simulated world, where the wait is over by now: bit n says that the n-th is ready.
    #[cfg_attr(not(feature = "simulation"), expect(dead_code, reason = "only a simulated world knows"))]
    Ready(u64),
}

/// Called before the kernel is asked to wait for descriptors, at most 64.
pub(crate) fn before_wait<'fd>(on: impl Iterator<Item = Awaited<'fd>>, timeout: Duration) -> Known {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        return Known::Ready(world.wait(&on.collect::<Vec<_>>(), None, timeout));
    }
    let _ = (on, timeout);
    Known::Nothing
}

/// Random bytes.
pub(crate) fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        world.fill_random(bytes);
        return Ok(());
    }
    getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
}

/// Opens a connection.
pub(crate) fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        return world.connect(address, timeout);
    }
    TcpStream::connect_timeout(&address, timeout)
}

/// Who is at the other end of a connection.
pub(crate) fn peer_address(stream: &TcpStream) -> io::Result<SocketAddr> {
    #[cfg(feature = "simulation")]
    if simulation::world().is_some() {
        return Ok(SocketAddr::from(([0, 0, 0, 0], 0)));
    }
    stream.peer_addr()
}

/// Whether connections are the kernel's TCP: a simulated world's are not, and know none of its options.
pub(crate) fn has_tcp() -> bool {
    #[cfg(feature = "simulation")]
    if simulation::world().is_some() {
        return false;
    }
    true
}
