//! The announcement: what a host of the pool says of itself to everybody.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;

/// What a host is, has free, and is doing at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Who says so. One that restarted is somebody else.
    pub node: NodeId,
    /// Where it listens. What else the same host says comes from the same address, under other ports.
    pub address: SocketAddr,
    /// Its zone: what fails together (rack, power feed).
    pub zone: Option<String>,
    /// What its host is doing.
    pub duty: Duty,
    /// How pages reach it.
    pub transports: Transports,
    /// Its memory.
    pub memory: MemoryRoom,
    /// Its link.
    pub link: LinkRoom,
    /// Processor time that nobody used lately, in thousandths of the whole host's.
    pub cpu_idle_permille: u16,
    /// Connections that it still takes.
    pub connections_free: u32,
    /// Volumes that it still takes.
    pub volumes_free: u32,
}

/// What a host is doing, as far as it matters to those who look for intermediaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Duty {
    /// It lends memory, or nothing that speaks against it.
    Lends,
    /// VMs are leaving it: its memory and its link are theirs.
    Source,
    /// It is short of memory itself, as a destination that swaps is.
    Pressed,
    /// It is about to go.
    Leaves,
}

/// Ways for pages to reach a host, one bit each. Bits that this version does not know are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Transports(pub u16);

impl Transports {
    /// TCP, which every host speaks.
    pub const TCP: Self = Self(1);

    /// Whether both have one in common.
    #[must_use]
    pub const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// A host's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRoom {
    /// What the host has.
    pub host_bytes: u64,
    /// What the host could hand out now without swapping, whoever asks.
    pub available_bytes: u64,
    /// The most that it lends.
    pub limit_bytes: u64,
    /// Lent now.
    pub used_bytes: u64,
}

/// A host's link, in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRoom {
    /// What it carries in each direction.
    pub bytes_per_s: u64,
    /// What it could take in beside what it took in lately, within the operator's limit.
    pub free_in_bytes_per_s: u64,
    /// What it could give out, likewise.
    pub free_out_bytes_per_s: u64,
    /// The operator's limit on page bytes taken in; zero is none.
    pub limit_in_bytes_per_s: u64,
    /// The operator's limit on page bytes given out; zero is none.
    pub limit_out_bytes_per_s: u64,
}
