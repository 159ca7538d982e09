//! The VMD server: every intermediary is a content server (slots that hold pages) and an index server
//! (where the pages of a volume lie).
//!
//! ```text
//!  accept loop --> one thread a connection: session
//!                    |            |
//!                  slots        index, volumes, copies  pure cores, behind locks of the store
//!                    |
//!                  arena        memory, touched ahead of the writers and given back by a thread of its own
//! ```
//!
//! A session whose client wants copies sends what it stored on to other members, over connections of its own
//! (`forward`), while it goes on. One that leaves hands over what it has first (`drain`). What lay at one that died is
//! copied again by those that have it (`mend`).

mod accept;
mod arena;
pub mod backend;
mod bits;
mod budget;
pub mod copies;
pub mod drain;
mod draw;
mod forward;
pub mod index;
#[cfg(feature = "simulation")]
mod inspect;
mod limit;
pub mod local;
mod mend;
mod seats;
mod session;
pub mod slots;
mod store;
mod stream;
mod transit;
pub mod volumes;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, Listener, thread::JoinHandle};
use crate::ids::{NodeId, random_bytes};
use crate::limits;
use crate::transport::PoolSecret;
use crate::wire::link_use::LinkUse;
use crate::wire::message::NodeStatistics;

use accept::Shared;
pub use drain::{DrainOptions, Drained};
pub use store::Holding;

/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 1024;

/// Knows of other intermediaries, of which one may become a member of a volume that has copies too few. Asked on the
/// thread that makes copies again, which waits for the answer.
pub trait Others: Send + Sync + fmt::Debug {
    /// Where they listen, in the order in which they are to be tried.
    fn others(&self) -> Vec<SocketAddr>;
}

impl Others for Vec<SocketAddr> {
    fn others(&self) -> Vec<SocketAddr> {
        self.clone()
    }
}

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; port 0 picks one.
    pub listen: SocketAddr,
    /// The intermediary's name.
    pub name: String,
    /// Its zone, for those who spread copies.
    pub zone: Option<String>,
    /// The most memory it gives to pages, in bytes; index and states may take an eighth of it more.
    pub memory_bytes: u64,
    /// What clients must know.
    pub secret: PoolSecret,
    /// Page bytes taken a second, over all connections; zero is unlimited.
    pub limit_in_bytes_per_s: u64,
    /// Bytes given out a second, over all connections; zero is unlimited.
    pub limit_out_bytes_per_s: u64,
    /// Connections that passed the handshake. More are refused with `Busy`.
    pub connections_max: usize,
    /// Connections in the handshake. For one more the oldest of them is dropped, so that those who only
    /// open connections lock nobody out.
    pub half_open_max: usize,
    /// Time for the handshake as a whole.
    pub handshake_timeout: Duration,
    /// Volumes at once. More are refused with `Busy`.
    pub volumes_max: usize,
    /// Lets clients reach memory here by themselves. Without one, all pages go over their connections.
    pub backend: Option<Arc<dyn backend::Backend>>,
    /// Where a volume's copies are made again, if its own intermediaries have no room for them or are too few; `None` is
    /// nowhere.
    pub others: Option<Arc<dyn Others>>,
    /// For tests only: flips a byte of the n-th page that is stored, to see that it is found out.
    pub canary_flip_slot: Option<u64>,
}

impl Config {
    /// The defaults, for one who listens there, under this name, with so much memory.
    #[must_use]
    pub fn new(listen: SocketAddr, name: impl Into<String>, memory_bytes: u64, secret: PoolSecret) -> Self {
        Self {
            listen,
            name: name.into(),
            zone: None,
            memory_bytes,
            secret,
            limit_in_bytes_per_s: 0,
            limit_out_bytes_per_s: 0,
            connections_max: 1024,
            half_open_max: 128,
            handshake_timeout: Duration::from_secs(5),
            volumes_max: 4096,
            backend: None,
            others: None,
            canary_flip_slot: None,
        }
    }
}

/// A server that listens and does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

impl Server {
    /// Listens. Takes no memory for pages yet.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a name that is too long or memory for not even one chunk of 2 MiB;
    /// [`ErrorKind::System`] when the address is taken.
    pub fn bind(config: Config) -> Result<Self> {
        if config.name.is_empty() || config.name.len() > limits::NODE_NAME_BYTES_MAX {
            let what = format!("an intermediary's name has 1 to {} bytes", limits::NODE_NAME_BYTES_MAX);
            return Err(Error::new(ErrorKind::Input, what));
        }
        if config.memory_bytes < slots::CHUNK_BYTES as u64 {
            return Err(Error::new(ErrorKind::Input, "an intermediary needs at least 2M of memory"));
        }
        let listener = Listener::bind(config.listen, listen).map_err(|cause| {
            let what = format!("cannot listen on {}: is another server running there?", config.listen);
            Error::new(ErrorKind::System, what).because(cause)
        })?;
        let address = listener.address();
        let node = NodeId { name: config.name.clone(), incarnation: u64::from_le_bytes(random_bytes()?) };
        Ok(Self { listener, shared: Arc::new(Shared::new(config, node, address)?) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.address()
    }

    /// Who it is.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        self.shared.node()
    }

    /// Serves from now on, in threads of its own.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when no thread can be started.
    pub fn spawn(self) -> Result<ServerHandle> {
        let tend = Arc::clone(&self.shared);
        let (accept, mend) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let listener = self.listener;
        let threads = vec![
            named("sg-serve-memory", move || tend.store().tend_memory())?,
            named("sg-serve-accept", move || accept::run(&accept, &listener))?,
            named("sg-serve-mend", move || mend::run(mend.store(), mend.limit_out(), mend.others()))?,
        ];
        Ok(ServerHandle { shared: self.shared, threads })
    }
}

fn named(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    Ok(host::thread::Builder::new().name(name.into()).spawn(work)?)
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A server that serves. Dropped, it shuts down.
#[derive(Debug)]
pub struct ServerHandle {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ServerHandle {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.address()
    }

    /// Who it is.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        self.shared.node()
    }

    /// What it has and holds.
    #[must_use]
    pub fn statistics(&self) -> NodeStatistics {
        self.shared.statistics()
    }

    /// Other limits from now on, which it tells with its statistics.
    pub fn set_link_use(&self, link: LinkUse) {
        self.shared.set_link_use(link);
    }

    /// Bytes that came over its connections, as far as the kernel has them, and that went, without headers of the network:
    /// what of its host's traffic is its own.
    #[must_use]
    pub fn moved_bytes(&self) -> (u64, u64) {
        self.shared.moved()
    }

    /// What would be lost if it went now.
    #[must_use]
    pub fn holdings(&self) -> Vec<Holding> {
        self.shared.store().losses()
    }

    /// Takes nothing more in, and hands over all that is here, until others have it: then it can go, and nothing is lost.
    /// Waits as long as that takes. Whoever reads here is answered meanwhile, and afterwards.
    ///
    /// # Errors
    /// What nobody took for so long, and why: it stays, and takes pages again.
    pub fn drain(&self, options: &DrainOptions<'_>) -> Result<Drained> {
        drain::run(self.shared.store(), self.shared.limit_out(), options)
    }

    /// Ends every connection, forgets everything, and waits for all threads.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the server panicked");
            }
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}
