//! What a backend does for an intermediary whose clients move pages to and from its memory themselves, without any of its
//! processors: it lets them in, and opens memory to them a chunk at a time.
//!
//! Everything else is the server's: who may have how much of which chunk, and until when. What it takes back it takes
//! back in this order: the client's way in, what it could write, and then the slots. So a late write finds no way in, and
//! then no memory.

use std::fmt;
use std::sync::Arc;

pub use super::arena::ChunkMemory;
use crate::error::Result;
use crate::wire::access::{AccessKey, Endpoint};

/// A backend at an intermediary.
pub trait Backend: Send + Sync + fmt::Debug {
    /// A new domain. Whoever is let into one reaches nothing that is opened in another: one is made for each volume, and
    /// one for all volumes that share pages with each other.
    ///
    /// # Errors
    /// There are no more of them: the client's pages come over its connection then.
    fn domain(&self) -> Result<Arc<dyn Domain>>;
}

/// Clients, and the memory that they reach. May outlive what was made of it, and the other way round.
pub trait Domain: Send + Sync + fmt::Debug {
    /// Lets a client in, whose end is `peer`, which was not looked at: it comes from whoever knows the pool's secret.
    ///
    /// # Errors
    /// That end cannot be reached, or there is no room for one more.
    fn attach(&self, peer: &Endpoint) -> Result<Attached>;

    /// Opens a chunk to all who are in the domain and have its key.
    ///
    /// # Errors
    /// The system lets no more memory be reached so.
    fn open(&self, memory: ChunkMemory, rights: Rights) -> Result<Opened>;
}

/// What may be done with memory from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// It is written, and not read.
    Write,
    /// It is read, and not written.
    Read,
}

/// A client that was let in.
pub struct Attached {
    /// The end here, for the client.
    pub endpoint: Endpoint,
    /// Its way in: once this was dropped, nothing that it sent reaches any memory.
    pub guard: Box<dyn Send>,
}

/// Memory that was opened.
pub struct Opened {
    /// What reaches its first byte.
    pub key: AccessKey,
    /// Once this was dropped, nobody reaches the memory by the key, and no other memory ever is reached by it.
    pub guard: Box<dyn Send + Sync>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a client, at {:?}", self.endpoint)
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory, by {:?}", self.key)
    }
}
