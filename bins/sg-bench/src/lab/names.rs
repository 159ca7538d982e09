//! Names that say whose they are, so that what a dead run left behind can be found and removed.
//!
//! Everything a run creates (network namespaces, cgroups, its directory) is called
//! `sg<pid>-<n>-<what>`, with the pid of the run and a number for each lab of that run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// `sg<pid>-<n>`: the start of every name of one lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The process the lab belongs to.
    pub owner: u32,
    number: u32,
}

impl Prefix {
    /// A prefix that no other lab of any living process has.
    pub fn next() -> Self {
        Self::of(std::process::id())
    }

    /// The same for a given owner.
    pub fn of(owner: u32) -> Self {
        static LABS: AtomicU32 = AtomicU32::new(0);
        Self { owner, number: LABS.fetch_add(1, Ordering::Relaxed) }
    }

    /// The prefix that `name` starts with, if it is one of ours.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("sg")?.splitn(3, '-');
        let prefix = Self { owner: parts.next()?.parse().ok()?, number: parts.next()?.parse().ok()? };
        (name == prefix.to_string() || name.starts_with(&format!("{prefix}-"))).then_some(prefix)
    }

    /// The full name of `what`.
    pub fn name(&self, what: impl fmt::Display) -> String {
        format!("{self}-{what}")
    }

    /// The run's directory: sockets, logs, the pool secret, the swap file, the list of its processes.
    pub fn directory(&self) -> PathBuf {
        std::env::temp_dir().join(self.to_string())
    }

    /// Whether the process it belongs to is gone.
    pub fn is_orphaned(&self) -> bool {
        !Path::new(&format!("/proc/{}", self.owner)).exists()
    }

    /// A loopback network of this lab's own, `127.a.b.x`, for runs without namespaces.
    pub fn loopback_network(&self) -> [u8; 3] {
        let [_, a, b, c] = self.owner.wrapping_mul(8).wrapping_add(self.number % 8).to_be_bytes();
        // 127.0.0.x is left alone: other programs listen there.
        [127, 1 + (a ^ b) % 254, c]
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sg{}-{}", self.owner, self.number)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_lead_back_to_their_owner() {
        let prefix = Prefix::next();
        assert_eq!(Prefix::parse(&prefix.name("source")), Some(prefix.clone()));
        assert_eq!(Prefix::parse(&prefix.to_string()), Some(prefix.clone()));
        assert!(!prefix.is_orphaned());
        for foreign in ["sg", "sgx-1-source", "sg1", "sg1-x", "sg1-1x", "sg01-1", "docker0", "sg1-2_source"] {
            assert_eq!(Prefix::parse(foreign), None, "{foreign}");
        }
    }
}
