//! Taking connections in: so many in the handshake, so many behind it, each with a thread of its own.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::limit::Limit;
use super::session::Session;
use super::store::Store;
use super::{Config, Others};
use crate::error::{ErrorKind, Result};
use crate::host::{self, Condvar, Listener};
use crate::ids::NodeId;
use crate::pace::TcpInfo;
use crate::transport::{self, Channel};
use crate::wire::Status;
use crate::wire::link_use::LinkUse;
use crate::wire::message::{NodeStatistics, VmdReply};

/// A session's stack: it keeps a few KiB there, and a thousand of them shall cost little.
const STACK_BYTES: usize = 512 << 10;

/// How long the accept loop rests when the system is out of descriptors or threads.
const REST: Duration = Duration::from_millis(50);

/// What all threads of a server share.
#[derive(Debug)]
pub(super) struct Shared {
    config: Config,
    address: SocketAddr,
    store: Store,
    limit_in: Limit,
    limit_out: Limit,
    link: Mutex<LinkUse>,
    connections: Mutex<Connections>,
    /// A connection's thread ended.
    left: Condvar,
}

/// The connections there are, by number: the lowest is the oldest.
#[derive(Debug, Default)]
struct Connections {
    next: u64,
    half_open: BTreeMap<u64, TcpStream>,
    open: BTreeMap<u64, TcpStream>,
    /// Bytes that came over connections that are gone.
    came_bytes: u64,
    /// Threads that have not ended, those of connections dropped from the lists included.
    threads: usize,
}

impl Shared {
    pub(super) fn new(config: Config, node: NodeId, address: SocketAddr) -> Result<Self> {
        let store = Store::new(node, &config)?;
        Ok(Self {
            limit_in: Limit::new(config.limit_in_bytes_per_s),
            limit_out: Limit::new(config.limit_out_bytes_per_s),
            link: Mutex::new(LinkUse {
                limit_in_bytes_per_s: config.limit_in_bytes_per_s,
                limit_out_bytes_per_s: config.limit_out_bytes_per_s,
                local: None,
            }),
            config,
            address,
            store,
            connections: Mutex::default(),
            left: Condvar::new(),
        })
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn others(&self) -> Option<&dyn Others> {
        self.config.others.as_deref()
    }

    pub(super) fn limit_out(&self) -> &Limit {
        &self.limit_out
    }

    pub(super) fn node(&self) -> &NodeId {
        self.store.node()
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn statistics(&self) -> NodeStatistics {
        let open = self.connections.lock().open.len();
        let link = *self.link.lock();
        NodeStatistics { link, ..self.store.statistics(u32::try_from(open).unwrap_or(u32::MAX)) }
    }

    /// Other limits from now on.
    pub(super) fn set_link_use(&self, link: LinkUse) {
        self.limit_in.set(link.limit_in_bytes_per_s);
        self.limit_out.set(link.limit_out_bytes_per_s);
        *self.link.lock() = link;
    }

    /// Bytes that came, as the kernel counts them, and that went.
    pub(super) fn moved(&self) -> (u64, u64) {
        let connections = self.connections.lock();
        let came = connections.open.values().map(came_bytes).sum::<u64>() + connections.came_bytes;
        drop(connections);
        (came, self.limit_out.moved())
    }

    /// Ends every connection and lets all threads of the server return.
    pub(super) fn close(&self) {
        self.store.close();
        self.limit_in.set(0);
        self.limit_out.set(0);
        let connections = self.connections.lock();
        for stream in connections.half_open.values().chain(connections.open.values()) {
            // It fails only where the peer was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(connections);
        self.left.notify_all();
        // Wakes the accept loop, which then sees that it is over.
        let _ = host::connect(reachable(self.address), REST);
    }

    /// Room for one more in the handshake: the oldest of too many goes. Waits for threads that are about to end, so
    /// that a flood of connections is no flood of threads.
    fn admit(&self, stream: &TcpStream) -> Result<Option<u64>> {
        let mut connections = self.connections.lock();
        if connections.open.len() >= self.config.connections_max {
            transport::refuse(stream, Status::Busy);
            return Ok(None);
        }
        while connections.half_open.len() >= self.config.half_open_max
            && let Some((_, oldest)) = connections.half_open.pop_first()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        let threads_max = self.config.connections_max + self.config.half_open_max;
        while connections.threads >= threads_max && !self.store.is_closing() {
            self.left.wait_for(&mut connections, REST);
        }
        let number = connections.next;
        connections.next += 1;
        connections.half_open.insert(number, stream.try_clone()?);
        connections.threads += 1;
        Ok(Some(number))
    }

    /// The connection passed the handshake; `false` when there is no room for it.
    fn promote(&self, number: u64) -> bool {
        let mut connections = self.connections.lock();
        let Some(stream) = connections.half_open.remove(&number) else { return false };
        if connections.open.len() >= self.config.connections_max || self.store.is_closing() {
            return false;
        }
        connections.open.insert(number, stream);
        true
    }
}

/// Bytes that came over a connection.
fn came_bytes(stream: &TcpStream) -> u64 {
    TcpInfo::read(stream).map_or(0, |info| info.bytes_received)
}

/// An address that reaches a listener there, which may listen on all of them.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

/// The accept loop: until the server closes, and its connections' threads have ended.
pub(super) fn run(shared: &Arc<Shared>, listener: &Listener) {
    while !shared.store.is_closing() {
        let taken = match listener.accept() {
            Ok((stream, _)) => take(shared, stream),
            // Of a socket that blocks only a simulated world says that.
            Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => {
                transport::wait(&[(Some(listener.as_fd()), false)], REST * 20).map(|_| ())
            }
            Err(cause) => Err(cause.into()),
        };
        if let Err(error) = taken {
            tracing::warn!(error = error.chain(), "a connection could not be taken");
            host::thread::sleep(REST);
        }
    }
    let mut connections = shared.connections.lock();
    while connections.threads > 0 {
        // Those that were taken while the server closed.
        for stream in connections.half_open.values().chain(connections.open.values()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        shared.left.wait_for(&mut connections, REST);
    }
}

fn take(shared: &Arc<Shared>, stream: TcpStream) -> Result<()> {
    let Some(number) = shared.admit(&stream)? else { return Ok(()) };
    let present = Present { shared: Arc::clone(shared), number };
    host::thread::Builder::new()
        .name(format!("sg-serve-{number}"))
        .stack_size(STACK_BYTES)
        .spawn(move || present.serve(stream))?;
    Ok(())
}

/// A connection in the lists; dropped, it is in none of them.
struct Present {
    shared: Arc<Shared>,
    number: u64,
}

impl Present {
    fn serve(self, stream: TcpStream) {
        let shared = &self.shared;
        let deadline = host::now() + shared.config.handshake_timeout;
        match transport::accept(stream, &shared.config.secret, shared.node(), deadline) {
            Ok((channel, _)) => self.serve_channel(&channel),
            Err(error) => tracing::debug!(error = error.chain(), "handshake failed"),
        }
    }

    fn serve_channel(&self, channel: &Channel) {
        let shared = &self.shared;
        if !shared.promote(self.number) {
            return;
        }
        let (peer, greeting) = (channel.peer_address(), channel.greeting());
        tracing::debug!(%peer, volume = %greeting.volume, purpose = ?greeting.purpose, "connected");
        let statistics = || VmdReply::Statistics(shared.statistics());
        let limits = (&shared.limit_in, &shared.limit_out);
        // What a panic leaves behind is freed by the values that the session consists of; nothing else of
        // the server is reached without a lock that its holder leaves in order.
        let served = catch_unwind(AssertUnwindSafe(|| {
            Session::new(&shared.store, channel, limits, &statistics).serve()
        }));
        channel.shut_down();
        match served {
            Ok(Ok(())) => tracing::debug!(%peer, "disconnected"),
            Ok(Err(error)) if error.kind == ErrorKind::Protocol => {
                tracing::warn!(%peer, error = error.chain(), "bytes of no honest peer");
            }
            Ok(Err(error)) => tracing::info!(%peer, error = error.chain(), "connection lost"),
            Err(_) => tracing::error!(%peer, "a session panicked; its connection is closed"),
        }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut connections = self.shared.connections.lock();
        connections.half_open.remove(&self.number);
        connections.came_bytes += connections.open.remove(&self.number).as_ref().map_or(0, came_bytes);
        connections.threads -= 1;
        drop(connections);
        self.shared.left.notify_all();
    }
}
