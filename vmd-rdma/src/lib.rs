//! One-sided RDMA for libsg: the source writes guest pages from where they lie into leased slots of registered memory on
//! intermediaries, and the destination reads them from there. No processor of an intermediary touches a page.
//!
//! [`RdmaConnector`] is for the clients, [`RdmaBackend`] for the intermediaries. [`verbs`] is the narrow seam to the
//! hardware.

mod blob;
pub mod check;
mod connector;
mod link;
mod region;
mod server;
mod several;
mod stream;
pub mod verbs;

pub use connector::{Devices, RdmaConnector};
pub use link::RdmaLink;
pub use server::RdmaBackend;
pub use several::Several;
