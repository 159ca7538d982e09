//! One-sided RDMA for libsg: the source writes guest pages from where they lie into leased slots of registered memory on
//! intermediaries, and the destination reads them from there. No processor of an intermediary touches a page.
//!
//! [`verbs`] is the narrow seam to the hardware.

pub mod verbs;
