//! What happens in a migration, as it happens.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::ids::Epoch;
use crate::page::PageRange;

/// What happens in a migration, as it happens. Written as lines of JSON by the tools.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// Source: the start command was accepted.
    Started,
    /// Source: a round begins while the VM runs, of what was written while the one before was sent.
    Round {
        /// From 0 on.
        round: u16,
        /// What is to be sent in it.
        pages: u64,
    },
    /// Both: READY came from the destination, which holds the state in a paused VM.
    Ready,
    /// Both: the source will never run the VM again.
    Commit,
    /// Both: the vCPUs run at the destination.
    Resumed,
    /// Source: this share of the volume's pages is safe outside it; each 5 %.
    Scattered {
        /// 0 to 100.
        percent: u8,
    },
    /// Source: it holds nothing that anyone still needs, and may lose power.
    Evicted,
    /// Destination: it holds this share of the pages; each 5 %.
    Gathering {
        /// 0 to 100.
        percent: u8,
    },
    /// Destination: it holds every page.
    Gathered,
    /// Destination: the intermediaries have the volume's memory back.
    Dissolved,
    /// Both: an intermediary was lost, or the source's connection, or it cannot be reached.
    NodeLost {
        /// Which, and why.
        message: String,
    },
    /// Source: another intermediary takes the place of one that was lost.
    NodeReplaced {
        /// Which, and in whose place.
        message: String,
    },
    /// Both: something an operator should know; it is no reason for the migration to end.
    Warning {
        /// What.
        message: String,
    },
    /// Destination: pages of which no copy is left.
    Lost {
        /// Which.
        pages: Vec<PageRange>,
    },
    /// Source: the volume is complete and nobody's: it can be claimed.
    Parked {
        /// Which one, as operators name it.
        volume: String,
        /// What it is called.
        name: String,
        /// The intermediary that grants claims.
        keeper: String,
    },
    /// Destination: the parked volume is this host's, unless it takes too long to run the VM.
    Claimed {
        /// Which one, as operators name it.
        volume: String,
        /// What it is called.
        name: String,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// It ended without success.
    Failed {
        /// Why, to match on.
        kind: ErrorKind,
        /// Why, for people.
        message: String,
    },
}

/// Is told of every event, from libsg's threads, in the order of this end. It must return soon.
pub type Observer = Arc<dyn Fn(&Event) + Send + Sync>;
