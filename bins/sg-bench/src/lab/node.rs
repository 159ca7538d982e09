//! The hosts of an experiment, by the names they have on the command line.

use std::fmt;
use std::str::FromStr;

/// One host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// Where the VM starts; the first of several such hosts.
    Source,
    /// `source2`, `source3`, …: where further VMs start.
    FurtherSource(u8),
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
            Self::FurtherSource(n) => 2 + n,
            Self::Intermediary(n) => 10 + n,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source => f.write_str("source"),
            Self::FurtherSource(n) => write!(f, "source{n}"),
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
            _ => {
                let numbered = |prefix| text.strip_prefix(prefix).and_then(|n| n.parse::<u8>().ok());
                let intermediary = numbered("i").filter(|n| (1..=INTERMEDIARIES_MAX).contains(n));
                let source = numbered("source").filter(|n| (2..=SOURCES_MAX).contains(n));
                intermediary.map(Self::Intermediary).or(source.map(Self::FurtherSource)).ok_or_else(|| {
                    anyhow::anyhow!("{text:?} is not a node: source, source2, …, destination, i1, i2, …")
                })
            }
        }
    }
}

/// Their addresses lie between the other hosts' and the first intermediary's.
pub const SOURCES_MAX: u8 = 4;

/// More intermediaries than a volume can have members make no experiment.
pub const INTERMEDIARIES_MAX: u8 = libsg::limits::MEMBERS_MAX as u8;

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_round_trip() {
        let ends = [Node::Source, Node::Destination, Node::FurtherSource(2), Node::FurtherSource(4)];
        let all = ends.into_iter().chain([Node::Client, Node::Intermediary(1), Node::Intermediary(64)]);
        for node in all.clone().filter(|node| *node != Node::Client) {
            assert_eq!(node.to_string().parse::<Node>().expect("parses"), node);
        }
        let mut numbers: Vec<u8> = all.map(Node::host_number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 7, "each host has a number of its own");
        for wrong in ["", "client", "i", "i0", "i65", "i256", "x1", "Source", "source1", "source5"] {
            assert!(wrong.parse::<Node>().is_err(), "{wrong}");
        }
    }
}
