//! The VMD: the free memory of all intermediaries, seen as one device.
//!
//! [`Link`] is what a backend implements: one client's path to one intermediary. What is common to
//! all backends is written once above it.

pub mod link;
mod memory;
mod tcp;

pub use link::{Class, Completion, Connector, Link, PathSample, Reply, Request, Ticket};
pub use memory::{MemoryConnector, MemoryLink, MemoryNode};
pub use tcp::{TcpConnector, TcpLink};
