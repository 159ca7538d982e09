//! Which hosts there are, and which of them a migration uses.
//!
//! ```text
//!  announcement (wire) --> multicast: announcer, asker --> book: who is there     pure
//!         ^                                                  |
//!       meter: what this host has free                     select: whom to take   pure
//! ```
//!
//! [`Pool`] is the seam for ways to find hosts: a [`StaticPool`] is a list that somebody wrote, a
//! [`multicast::MulticastPool`] hears what hosts announce. Others implement it from outside, and [`Announces`] and
//! [`Hears`] for hosts that stay in a pool. What they carry is a [`Datagram`](crate::wire::datagram::Datagram) whatever
//! carries it: sealed by the pool's secret, and kept in a [`book::Book`], which lets nothing count twice.

pub mod book;
pub mod meter;
pub mod multicast;
pub mod select;
#[cfg(test)]
mod test;

use std::net::SocketAddr;
use std::time::Duration;

use crate::error::Result;
use crate::wire::announcement::Announcement;

/// A host of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it announced; nothing where hosts are only named.
    pub announced: Option<Announcement>,
}

/// Finds the hosts of a pool.
pub trait Pool: Send {
    /// Who is there. Takes `patience` at most.
    ///
    /// # Errors
    /// What keeps it from looking. A pool without hosts is none.
    fn find(&mut self, patience: Duration) -> Result<Vec<Found>>;
}

/// Says what a host is now.
pub type Describe = Box<dyn FnMut() -> Announcement + Send>;

/// Announces a host to a pool until it is dropped, and then that it leaves.
pub trait Announces: Send + Sync {
    /// Announces the host at once: what it does has changed.
    fn announce(&self);
}

/// Announces a host, and hears all others of the pool meanwhile.
pub trait Hears: Announces {
    /// Who is there, as far as was heard; we as well.
    fn hosts(&self) -> Vec<Announcement>;
}

/// A list of addresses: everybody on it is there, and nothing is known of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StaticPool(pub Vec<SocketAddr>);

impl Pool for StaticPool {
    fn find(&mut self, _patience: Duration) -> Result<Vec<Found>> {
        Ok(self.0.iter().map(|address| Found { address: *address, announced: None }).collect())
    }
}
