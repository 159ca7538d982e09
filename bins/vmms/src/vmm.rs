//! What is asked of a VMM that is driven from outside.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use libsg::content::Sharing;
use libsg::migrate::Mode;
use libsg::pace::Told;
use libsg::report::{DestinationReport, Sample, SourceReport};
use libsg::units::Rate;
use serde::{Deserialize, Serialize};

/// What becomes of the VM in a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is none: one is waited for.
    Empty,
    /// It runs here.
    Here,
    /// It is leaving.
    Leaving,
    /// It was here.
    Left,
    /// It arrives, and is not all there yet.
    Arriving,
}

/// What a VMM says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Described {
    /// The VM's name, where there is one.
    pub vm: Option<String>,
    /// What becomes of it.
    pub state: State,
    /// Its memory.
    #[serde(default)]
    pub memory_bytes: u64,
    /// What of that there is: what has to leave, at most.
    #[serde(default)]
    pub present_bytes: u64,
}

/// How a VM is to leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Start {
    /// How the memory leaves.
    pub mode: Mode,
    /// Where a destination waits for it; or `park`.
    pub to: Option<SocketAddr>,
    /// The name under which it is parked.
    pub park: Option<String>,
    /// The engine that says who may have it then; an intermediary where it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// Who may take pages.
    pub intermediaries: Vec<SocketAddr>,
    /// Others, who take the place of those that die on the way, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub spares: Vec<SocketAddr>,
    /// With whom its pages are shared at intermediaries; nobody where it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup: Option<Sharing>,
    /// How many of them hold each page.
    pub replicas: u8,
    /// Most that leaves in bulk, as [`Rate`] is written.
    pub scatter: Option<String>,
}

/// Which parked VM is to run in a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wanted {
    /// Its name, or its volume.
    pub claim: String,
    /// Who may know it.
    pub intermediaries: Vec<SocketAddr>,
    /// Whatever stands against it.
    pub force: bool,
}

/// What a VM that leaves tells who divides the link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// What it has sent, and what its links show.
    pub told: Told,
    /// What it has left to send, about.
    pub left_bytes: u64,
}

/// How far a VM is that leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaving {
    /// For who divides the link.
    pub backlog: Backlog,
    /// Page bytes sent, to the destination and to intermediaries.
    pub sent_bytes: u64,
    /// Pages that are safe outside.
    pub safe_pages: u64,
    /// All pages.
    pub total_pages: u64,
    /// There is no way back.
    pub committed: bool,
    /// Nothing is left here that anybody needs.
    pub evicted: bool,
    /// It has evicted, or failed.
    pub over: bool,
}

/// A VMM, as who drives it sees it. Each call is one exchange, and fails when there is no answer in time, or a refusal.
pub trait Vmm: Send {
    /// What VM there is.
    ///
    /// # Errors
    /// As all: no answer, or a refusal.
    fn describe(&mut self) -> Result<Described>;

    /// Has the VM leave. Returns when that is accepted.
    ///
    /// # Errors
    /// As all.
    fn start(&mut self, how: &Start) -> Result<()>;

    /// Grants the VM so much of the host's link, in bytes a second, for so long; `None` is any rate. How far it is; `None`
    /// where no VM has been told to leave.
    ///
    /// # Errors
    /// As all.
    fn share(&mut self, bytes_per_s: Option<u64>, valid: Duration) -> Result<Option<Leaving>>;

    /// Has a VM that was parked run here. Returns when that is accepted.
    ///
    /// # Errors
    /// As all.
    fn claim(&mut self, wanted: &Wanted) -> Result<()>;

    /// How far it is now, whichever way the VM goes.
    ///
    /// # Errors
    /// As all.
    fn progress(&mut self) -> Result<Sample>;

    /// What is known of a migration: at its source, and at its destination.
    ///
    /// # Errors
    /// As all.
    fn report(&mut self) -> Result<(Option<SourceReport>, Option<DestinationReport>)>;

    /// Bounds what leaves in bulk, or what arrives in the background; 0 takes the bound away.
    ///
    /// # Errors
    /// As all.
    fn limit(&mut self, scatter: Option<Rate>, gather: Option<Rate>) -> Result<()>;

    /// Calls the migration off.
    ///
    /// # Errors
    /// As all: after COMMIT it is refused.
    fn cancel(&mut self) -> Result<()>;
}
