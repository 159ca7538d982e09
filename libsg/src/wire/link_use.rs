//! How fast pages may move at an intermediary.

use serde::{Deserialize, Serialize};

/// How fast pages may move at an intermediary now, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkUse {
    /// Page bytes that it takes in a second, at most; zero is unlimited.
    pub limit_in_bytes_per_s: u64,
    /// Bytes that it gives out a second, at most; zero is unlimited.
    pub limit_out_bytes_per_s: u64,
    /// Its host's own traffic, where that goes first.
    pub local: Option<LocalTraffic>,
}

/// What a host receives and sends beside the pages that pass through it, in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalTraffic {
    /// Received.
    pub in_bytes_per_s: u64,
    /// Sent.
    pub out_bytes_per_s: u64,
}
