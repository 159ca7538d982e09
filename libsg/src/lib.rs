//! libsg: scatter-gather live migration.
//!
//! Evicts running VMs from a host at the speed of its own link, however slow the destination is.
//! The modules are listed in the order in which a page meets them.

pub mod page;
pub mod ids;
pub mod limits;
pub mod error;
pub mod manifest;
pub mod latency;
pub mod event;
pub mod report;
pub mod usage;
pub mod memory;
pub mod source;
pub mod sink;
pub mod uffd;
pub mod units;
pub mod wire;
pub mod pace;
pub mod transport;
pub mod vmd;
pub mod scatter;
pub mod gather;
pub mod server;
pub mod migrate;

pub use error::{Error, ErrorKind, Result};
