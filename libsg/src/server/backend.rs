//! What a backend does for an intermediary whose clients move pages to and from its memory themselves, without any of its
//! processors: it lets them in, and opens memory to them a chunk at a time.
//!
//! Everything else is the server's: who may have how much of which chunk, and until when. What it takes back it takes
//! back in this order: the client's way in, what it could write, and then the slots. So a late write finds no way in, and
//! then no memory.
//!
//! Intermediaries among themselves: whoever is to have copies reads them where they lie, and is a client there that only
//! reads. What it reads into is leased to it as to a client that only writes.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use super::arena::ChunkMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::SlotIndex;
use crate::wire::access::{AccessKey, Endpoint, KeyEntry};

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

    /// An end here that reads what others have opened in the same volume, or volumes.
    ///
    /// # Errors
    /// There is none, as with a backend that knows no such thing: copies come over connections then.
    fn reader(&self) -> Result<Reading> {
        Err(Error::new(ErrorKind::Unreachable, "this backend's intermediaries do not read from each other"))
    }
}

/// Reads pages from where they lie at another intermediary.
///
/// # Contract
/// Reads come to their ends in the order in which they were begun. Once the guard that it came with was dropped, nothing
/// that it began reaches memory here, and all of its methods fail.
pub trait Reader: Send + fmt::Debug {
    /// Connects it to the other's end, which was not looked at.
    ///
    /// # Errors
    /// That cannot be reached.
    fn connect(&mut self, peer: &Endpoint) -> Result<()>;

    /// Whether the other end was heard.
    fn is_open(&self) -> bool;

    /// Begins to read pages, from slots there into slots here, that keys reach: those that the other sent, and those of
    /// memory that was opened here to be filled.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where the other's keys do not reach its slots.
    fn read(
        &mut self,
        number: u64,
        pages: &[(SlotIndex, SlotIndex)],
        keys: (&[KeyEntry], &[KeyEntry]),
    ) -> Result<()>;

    /// Goes on, without waiting, and appends the numbers of the reads that have ended.
    ///
    /// # Errors
    /// One has failed, or the other end is gone: it is of no further use.
    fn progress(&mut self, ended: &mut Vec<u64>) -> Result<()>;

    /// Readable when there is something new, after a [`Self::progress`].
    fn poll_fd(&self) -> BorrowedFd<'_>;
}

/// What may be done with memory from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// It is written, and not read.
    Write,
    /// It is read, and not written.
    Read,
    /// Nobody reaches it from outside: a [`Reader`] here fills it, by the key.
    Fill,
}

/// A client that was let in.
pub struct Attached {
    /// The end here, for the client.
    pub endpoint: Endpoint,
    /// Its way in: once this was dropped, nothing that it sent reaches any memory.
    pub guard: Box<dyn Send>,
}

/// An end that reads.
#[derive(Debug)]
pub struct Reading {
    /// It, for the other, and what it can do no more once this was dropped.
    pub attached: Attached,
    /// It.
    pub reader: Box<dyn Reader>,
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
