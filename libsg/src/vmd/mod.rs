//! The VMD: the free memory of all intermediaries, seen as one device.
//!
//! [`Link`] is what a backend implements: one client's path to one intermediary. What is common to
//! all backends is written once above it: [`VmdClient`] makes a [`Vmd`] of any [`Connector`]. The
//! in-memory backend is the model, and the conformance suite compares the others with it.

mod arbiter;
mod client;
#[cfg(feature = "test-util")]
pub mod conformance;
mod device;
pub mod link;
mod memory;
mod tcp;

pub use crate::wire::placement;
pub use arbiter::{Arbiter, Engines, KeeperArbiter};
pub(crate) use arbiter::{is_away, verdict, visit, visit_all};
pub use client::VmdClient;
pub use device::{Fetched, PagePut, PageReference, Role, Shared, Vmd, Volume};
pub use link::{Class, Completion, Connector, Link, PathSample, Reply, Request, Ticket};
pub use memory::{MemoryConnector, MemoryLink, MemoryNode};
pub use tcp::{AccessReply, AccessRequest, Answered, TcpConnector, TcpLink};
