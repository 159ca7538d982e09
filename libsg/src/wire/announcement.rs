//! The announcement: what a host of the pool says of itself to everybody.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Malformed, message};
use crate::ids::NodeId;
use crate::limits;

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

impl Announcement {
    /// Whether everything is within its bounds.
    ///
    /// # Errors
    /// [`Malformed::Bounds`] names what is not.
    pub fn check(&self) -> Result<(), Malformed> {
        let refuse = |what| Err(Malformed::Bounds(what));
        if self.node.name.is_empty() || self.node.name.len() > limits::NODE_NAME_BYTES_MAX {
            return refuse("node name");
        }
        if self.zone.as_ref().is_some_and(|zone| zone.is_empty() || zone.len() > limits::ZONE_BYTES_MAX) {
            return refuse("zone");
        }
        if self.cpu_idle_permille > 1000 {
            return refuse("idle processor time");
        }
        if self.memory.available_bytes > self.memory.host_bytes {
            return refuse("available memory");
        }
        let link = &self.link;
        if link.free_in_bytes_per_s.max(link.free_out_bytes_per_s) > link.bytes_per_s {
            return refuse("free bandwidth");
        }
        Ok(())
    }

    /// Decodes and checks what [`message::encode`] made of one.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > limits::ANNOUNCEMENT_BYTES_MAX {
            return Err(Malformed::Bounds("announcement"));
        }
        let announcement: Self = message::decode(bytes)?;
        announcement.check()?;
        Ok(announcement)
    }
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

#[cfg(test)]
pub(crate) mod test {
    use super::*;

    /// One with a value in every field.
    pub(crate) fn announcement() -> Announcement {
        Announcement {
            node: NodeId { name: "rack2".into(), incarnation: 0x1122_3344_5566_7788 },
            address: SocketAddr::from(([10, 0, 0, 3], 7701)),
            zone: Some("east".into()),
            duty: Duty::Lends,
            transports: Transports::TCP,
            memory: MemoryRoom {
                host_bytes: 4 << 30,
                available_bytes: 3 << 30,
                limit_bytes: 2 << 30,
                used_bytes: 1 << 30,
            },
            link: LinkRoom {
                bytes_per_s: 125_000_000,
                free_in_bytes_per_s: 100_000_000,
                free_out_bytes_per_s: 90_000_000,
                limit_in_bytes_per_s: 0,
                limit_out_bytes_per_s: 110_000_000,
            },
            cpu_idle_permille: 750,
            connections_free: 1000,
            volumes_free: 4000,
        }
    }

    #[test]
    fn bounds_hold() {
        let refused = |change: fn(&mut Announcement)| {
            let mut changed = announcement();
            change(&mut changed);
            Announcement::decode(&message::encode(&changed).expect("encodes")).expect_err("out of bounds")
        };
        let bytes = message::encode(&announcement()).expect("encodes");
        assert_eq!(Announcement::decode(&bytes), Ok(announcement()));
        assert_eq!(Announcement::decode(&[bytes, vec![0]].concat()), Err(Malformed::Trailing));
        assert_eq!(refused(|a| a.node.name.clear()), Malformed::Bounds("node name"));
        assert_eq!(refused(|a| a.zone = Some(String::new())), Malformed::Bounds("zone"));
        assert_eq!(refused(|a| a.zone = Some("z".repeat(1000))), Malformed::Bounds("announcement"));
        assert_eq!(refused(|a| a.cpu_idle_permille = 1001), Malformed::Bounds("idle processor time"));
        assert_eq!(refused(|a| a.memory.available_bytes = u64::MAX), Malformed::Bounds("available memory"));
        assert_eq!(refused(|a| a.link.free_in_bytes_per_s = u64::MAX), Malformed::Bounds("free bandwidth"));
    }
}
