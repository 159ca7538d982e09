//! What etcd does for libsg, where a cluster has one: hosts find each other by it, and it says who may have a parked VM.
//! Announcements are keys that live as long as their lease.
//!
//! ```text
//!  Announcer   sg-announce   lease + put, each 5 s ------> etcd: PREFIX/NAME.INCARNATION = a sealed datagram
//!  Watcher     sg-watch      list, then watch from there <--+
//!  EtcdPool                  list <-------------------------+
//!  EtcdArbiter               compare + put                     who claimed a parked VM, and runs it (arbiter.rs)
//! ```
//!
//! For finding hosts, etcd carries what multicast carries elsewhere, the same sealed bytes, and is trusted with no more than the network is:
//! it can hide hosts, and it can neither make one up nor bring an old word of one back. Values count under the key of who
//! said them only, and once.
//!
//! It is spoken to by its JSON gateway, which every etcd since 3.4 has on its client port, over plain HTTP/1.1: no
//! protocol compiler, no async runtime. `view` is the pure core: what is said, in, and who is there, out.

mod announcer;
mod arbiter;
mod backoff;
mod client;
mod key;
mod message;
mod place;
mod pool;
mod transport;
mod view;
mod watcher;

pub use announcer::Announcer;
pub use arbiter::EtcdArbiter;
pub use place::Place;
pub use pool::EtcdPool;
pub use watcher::Watcher;

use std::time::Duration;

use libsg::discovery::book::WINDOW;

/// How often a host says what it is at least. In between it says so when that has changed by much.
pub const PERIOD: Duration = Duration::from_secs(5);

/// How long a host that was not heard is still there: its lease, and what others make of the period that it says.
pub const LEASE: Duration = Duration::from_secs(15);

// What is read of a host that lives is never thought to be a replay.
const _: () = assert!(LEASE.as_secs() == 3 * PERIOD.as_secs() && LEASE.as_secs() < WINDOW.as_secs());
