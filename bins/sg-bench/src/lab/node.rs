//! The hosts of an experiment, by the names they have on the command line.

use std::fmt;
use std::str::FromStr;

/// One host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// Where the VM starts.
    Source,
    /// Where the VM goes.
    Destination,
    /// `i1`, `i2`, …: counted from 1.
    Intermediary(u8),
    /// Where the clients of co-tenants are. No part of the migration: nothing can be done to it.
    Client,
}

impl Node {
    /// The last number of the node's address.
    pub fn host_number(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Destination => 2,
            Self::Client => 3,
            Self::Intermediary(n) => 10 + n,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source => f.write_str("source"),
            Self::Destination => f.write_str("destination"),
            Self::Client => f.write_str("client"),
            Self::Intermediary(n) => write!(f, "i{n}"),
        }
    }
}

impl FromStr for Node {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "source" => Ok(Self::Source),
            "destination" => Ok(Self::Destination),
            _ => text
                .strip_prefix('i')
                .and_then(|n| n.parse().ok())
                .filter(|n| (1..=INTERMEDIARIES_MAX).contains(n))
                .map(Self::Intermediary)
                .ok_or_else(|| anyhow::anyhow!("{text:?} is not a node: source, destination, i1, i2, …")),
        }
    }
}

/// More intermediaries than a volume can have members make no experiment.
pub const INTERMEDIARIES_MAX: u8 = libsg::limits::MEMBERS_MAX as u8;

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_round_trip() {
        for node in [Node::Source, Node::Destination, Node::Intermediary(1), Node::Intermediary(64)] {
            assert_eq!(node.to_string().parse::<Node>().expect("parses"), node);
        }
        for wrong in ["", "client", "i", "i0", "i65", "i256", "x1", "Source"] {
            assert!(wrong.parse::<Node>().is_err(), "{wrong}");
        }
    }
}
