//! What an experiment measures beside the migration itself: its neighbours, its memory pressure, its cost.

use serde::{Deserialize, Serialize};

use super::Ends;

/// A service that shares a host of the migration, as its client sees it: requests at a fixed rate, each timed from
/// when it was to be sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cotenant {
    /// The host it shares.
    pub node: String,
    /// Requests a second, whatever the answers do.
    pub requests_per_s: f64,
    /// Of one answer.
    pub answer_bytes: u64,
    /// Before the migration, with the VM at work at the source.
    pub idle: Latencies,
    /// From the start to evicted, of the last VM.
    pub scattering: Latencies,
    /// From the start to the end of the run; where limits are lifted at evicted, to evicted.
    pub migration: Latencies,
}

/// How long requests took, from when each was to be sent to the whole answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Requests that were to be sent in this time, answered late or not at all included.
    pub count: Option<u64>,
    /// Half of them took at most this long.
    pub p50_us: Option<f64>,
    /// 19 of 20 took at most this long.
    pub p95_us: Option<f64>,
    /// 99 of 100 took at most this long.
    pub p99_us: Option<f64>,
    /// The longest.
    pub max_us: Option<f64>,
}

/// A destination with little memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// `v1` or `v2`: of the cgroup.
    pub cgroup: String,
    /// What the destination and its neighbours may have in memory.
    pub limit_bytes: u64,
    /// Pages read back from swap, from the start to the end of the run.
    pub pswpin: Option<u64>,
    /// Pages written to swap meanwhile.
    pub pswpout: Option<u64>,
    /// Whose pages these are: `cgroup`, or `machine` where the kernel counts none by cgroup (v1; v2 before
    /// Linux 6.13).
    pub counted: String,
    /// What lay in swap at the end of the run.
    pub swap_bytes: Option<u64>,
    /// Who else is in the cgroup.
    pub neighbours: Vec<Neighbour>,
}

/// A memory-hungry neighbour of the destination: ranks a synthetic graph again and again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its memory, of which each pass touches 0.8.
    pub memory_bytes: u64,
    /// Passes over the graph in a second of work, before the migration.
    pub passes_per_s_before: Option<f64>,
    /// The same from the start to the end of the run; passes that ended in it.
    pub passes_per_s_during: Option<f64>,
}

/// User + system seconds a GiB of pages, and what a plain TCP stream over the same links costs in the same run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuPerGib {
    /// libsg's threads at the source from the start to evicted, over the page bytes it sent.
    pub source: Option<f64>,
    /// libsg's threads at the destination until every page was installed, over the page bytes it received. What its
    /// vCPUs wait for the pages is not in it.
    pub destination: Option<f64>,
    /// The intermediaries' processes from the start to evicted, over the page bytes they took meanwhile. What they
    /// gave to the destination in that time is in it.
    pub intermediaries: Option<f64>,
    /// A plain stream: its sender (`writev` of 64 pages at once, out of memory as long as the stream), and its
    /// receiver (into memory that was never touched).
    pub stream: Ends<f64>,
}
