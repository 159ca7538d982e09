//! The destination's port. Whoever connects has to prove to know the pool secret before anything else is
//! looked at; how many may be at it at once, and how long, is bounded.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

use super::DestinationOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::JoinHandle};
use crate::ids::{NodeId, random_bytes};
use crate::transport::{self, Channel, PoolSecret, Waker, wait};
use crate::wire::Status;
use crate::wire::handshake::Purpose;

/// Handshakes at once. Those beyond are refused: a source tries again.
const HANDSHAKES_MAX: usize = 32;

/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Connections that are through and wait to be looked at.
const ARRIVALS_MAX: usize = 16;

/// How long the thread sleeps at most, and after the kernel refused a connection (no descriptors).
const NAP: Duration = Duration::from_secs(1);
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// A port that is listened on until this is dropped.
pub(super) struct Listener {
    address: SocketAddr,
    arrivals: Receiver<Channel>,
    /// Woken when a connection is through.
    waker: Waker,
    stop: Arc<AtomicBool>,
    wake_listener: Waker,
    thread: Option<JoinHandle<()>>,
}

struct Door {
    secret: PoolSecret,
    node: NodeId,
    arrivals: Sender<Channel>,
    waker: Waker,
    handshakes: AtomicUsize,
}

impl Listener {
    pub fn start(options: &DestinationOptions) -> Result<Self> {
        let listen = |cause: std::io::Error| {
            Error::new(ErrorKind::System, format!("cannot listen on {}", options.address)).because(cause)
        };
        let bind = |address| {
            let socket = TcpListener::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket = host::Listener::bind(options.address, bind).map_err(listen)?;
        let address = socket.address();
        let (sender, arrivals) = bounded(ARRIVALS_MAX);
        let (waker, wake_listener) = (Waker::new()?, Waker::new()?);
        let incarnation = u64::from_le_bytes(random_bytes()?);
        let door = Arc::new(Door {
            secret: options.secret.clone(),
            node: NodeId { name: options.name.clone(), incarnation },
            arrivals: sender,
            waker: waker.clone(),
            handshakes: AtomicUsize::new(0),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, wakes) = (Arc::clone(&stop), wake_listener.clone());
        let thread = host::thread::Builder::new()
            .name("sg-gather-listen".into())
            .spawn(move || listen_until(&socket, &door, &stopped, &wakes))
            .map_err(|cause| Error::new(ErrorKind::System, "a thread could not be started").because(cause))?;
        Ok(Self { address, arrivals, waker, stop, wake_listener, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// The next connection that is through.
    pub fn arrival(&self) -> Option<Channel> {
        self.arrivals.try_recv().ok()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake_listener.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen_until(socket: &host::Listener, door: &Arc<Door>, stop: &AtomicBool, wakes: &Waker) {
    while !stop.load(Ordering::Acquire) {
        if let Err(error) = wait(&[(Some(wakes.as_fd()), false), (Some(socket.as_fd()), false)], NAP) {
            tracing::error!(error = error.chain(), "cannot wait for connections");
            return;
        }
        loop {
            match socket.accept() {
                Ok((stream, peer)) => receive(stream, peer, door),
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(cause) => {
                    tracing::warn!(%cause, "a connection could not be accepted");
                    host::thread::sleep(REFUSED_PAUSE);
                    break;
                }
            }
        }
    }
}

/// Greets one connection on a thread of its own, of which there are only so many.
fn receive(stream: TcpStream, peer: SocketAddr, door: &Arc<Door>) {
    if door.handshakes.fetch_add(1, Ordering::AcqRel) >= HANDSHAKES_MAX {
        door.handshakes.fetch_sub(1, Ordering::AcqRel);
        transport::refuse(&stream, Status::Busy);
        return;
    }
    let theirs = Arc::clone(door);
    let greet = move || {
        greet(stream, &theirs);
        theirs.handshakes.fetch_sub(1, Ordering::AcqRel);
    };
    if let Err(cause) = host::thread::Builder::new().name("sg-gather-hello".into()).spawn(greet) {
        door.handshakes.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!(%cause, %peer, "no thread to answer a connection with");
    }
}

fn greet(stream: TcpStream, door: &Door) {
    let deadline = host::now() + HANDSHAKE_MAX;
    let (channel, greeting) = match transport::accept(stream, &door.secret, &door.node, deadline) {
        Ok(accepted) => accepted,
        Err(error) => {
            tracing::warn!(error = error.chain(), "a connection was refused");
            return;
        }
    };
    use Purpose as P;
    let about_migration =
        matches!(greeting.purpose, P::MigrationControl | P::MigrationDirect | P::MigrationUrgent);
    if !about_migration || greeting.volume.0 == 0 {
        tracing::warn!(?greeting, "a connection that is not about a migration");
        return;
    }
    if door.arrivals.try_send(channel).is_ok() {
        door.waker.wake();
    }
}
