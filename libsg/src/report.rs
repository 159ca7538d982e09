//! What a migration did, as finished values: one part from the source, one from the destination,
//! and the whole. Each duration says from which event to which. A value that is not known is `null`
//! in JSON, never absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::latency::LatencyHistogram;
use crate::page::{PAGE_BYTES_U64, PageRange};

mod beside;

pub use beside::{Cotenant, CpuPerGib, Latencies, Neighbour, Pressure};

/// Version of the report's keys: raised when one changes its meaning. Keys are added freely.
pub const SCHEMA: u32 = 2;

/// How it ended: `"ok"`, or an object with `kind`, `message` and the `lost` page ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StatusForm", into = "StatusForm")]
pub enum Status {
    /// It did what it was asked to.
    #[default]
    Ok,
    /// It did not.
    Failed(Failure),
}

/// Why it did not end well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong, to match on.
    pub kind: ErrorKind,
    /// The same for people, with causes.
    pub message: String,
    /// The pages of which no copy is left; empty when nothing was lost.
    pub lost: Vec<PageRange>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StatusForm {
    Word(StatusWord),
    Failed(Failure),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StatusWord {
    Ok,
}

impl From<StatusForm> for Status {
    fn from(form: StatusForm) -> Self {
        match form {
            StatusForm::Word(StatusWord::Ok) => Self::Ok,
            StatusForm::Failed(failure) => Self::Failed(failure),
        }
    }
}

impl From<Status> for StatusForm {
    fn from(status: Status) -> Self {
        match status {
            Status::Ok => Self::Word(StatusWord::Ok),
            Status::Failed(failure) => Self::Failed(failure),
        }
    }
}

impl From<&Error> for Status {
    fn from(error: &Error) -> Self {
        let lost = if error.kind == ErrorKind::Lost { error.pages.clone() } else { Vec::new() };
        Self::Failed(Failure { kind: error.kind, message: error.chain(), lost })
    }
}

/// One value of the source and one of the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ends<T> {
    /// At the source.
    pub source: Option<T>,
    /// At the destination.
    pub destination: Option<T>,
}

/// Pages, by what happened to them. Each counts distinct pages unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages of the volume, present or not.
    pub total: Option<u64>,
    /// Pages that had memory behind them at the source, all-zero ones included.
    pub present: Option<u64>,
    /// Present pages that were all zero: they travel as index entries.
    pub zero: Option<u64>,
    /// Pages whose bytes the source sent to the destination.
    pub direct: Option<u64>,
    /// Pages whose bytes went to intermediaries.
    pub staged: Option<u64>,
    /// Pages that the destination had installed while the VM ran at the source, and took out again at the switch: they
    /// were written since.
    pub withdrawn: Option<u64>,
    /// Pages that were stored as a reference to bytes that were there already.
    pub referenced: Option<u64>,
    /// Pages the guest waited for.
    pub faulted: Option<u64>,
    /// Pages sent a second way because the first was late.
    pub hedged: Option<u64>,
    /// Pages sent again because a node or a connection was lost.
    pub resent: Option<u64>,
}

/// Application bytes, by path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Page bytes, source to destination.
    pub direct: Option<u64>,
    /// Page bytes, source to intermediaries.
    pub staged: Option<u64>,
    /// Page bytes, intermediaries to destination.
    pub gathered: Option<u64>,
    /// Page bytes, intermediary to intermediary: second and further copies.
    pub replicated: Option<u64>,
    /// Page bytes that did not travel because their content was there already.
    pub dedup_saved: Option<u64>,
    /// Everything that is not page bytes: headers, tables, index entries, control messages.
    pub overhead: Option<u64>,
    /// All bytes written to and read from sockets at source and destination, each counted once.
    pub wire_total: Option<u64>,
}

/// How long the guest waited for pages: from the fault event read to the install done, at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Faults {
    /// Faults that were answered.
    pub count: Option<u64>,
    /// Half of them took at most this long.
    pub p50_us: Option<f64>,
    /// Nine of ten took at most this long.
    pub p90_us: Option<f64>,
    /// 99 of 100 took at most this long.
    pub p99_us: Option<f64>,
    /// The longest.
    pub max_us: Option<f64>,
}

impl From<&LatencyHistogram> for Faults {
    fn from(histogram: &LatencyHistogram) -> Self {
        Self {
            count: Some(histogram.count()),
            p50_us: histogram.percentile_us(50.0),
            p90_us: histogram.percentile_us(90.0),
            p99_us: histogram.percentile_us(99.0),
            max_us: histogram.max_us(),
        }
    }
}

/// What the guest saw of its own migration. Filled by a VMM whose guest checks itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Guest operations a second, over its life in this process.
    pub ops_per_s: Option<f64>,
    /// The longest gap between completed operations of any vCPU by the host's monotonic clock, the
    /// switch from source to destination included.
    pub longest_pause_ms: Option<f64>,
    /// Pages that did not read as they were written.
    pub mismatches: Option<u64>,
    /// Pages verified after they were installed. A run is valid only if this is every page.
    pub verified_pages: Option<u64>,
    /// Whole passes of verification.
    pub verify_passes: Option<u64>,
    /// Pages the guest filled before it was ready.
    pub fill_pages: Option<u64>,
}

/// One intermediary's share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Intermediary {
    /// Its name.
    pub id: String,
    /// Page bytes it took.
    pub bytes_in: Option<u64>,
    /// Page bytes it gave.
    pub bytes_out: Option<u64>,
    /// Page bytes that passed its processors in the whole run, each time that they did.
    pub touched_bytes: Option<u64>,
    /// When all had evicted: slots that clients might have written, and had not.
    pub unused_leased_slots: Option<u64>,
    /// User + system time of its process.
    pub cpu_s: Option<f64>,
    /// Its largest resident set.
    pub peak_rss_bytes: Option<u64>,
}

/// One moment of a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Since the start command was accepted at the source.
    pub t_s: f64,
    /// Guest operations completed so far, at both ends.
    pub guest_ops: Option<u64>,
    /// Page bytes so far, by path (`direct`, `staged`, `gathered`).
    pub bytes: Bytes,
    /// Faults answered so far.
    pub faults: Option<u64>,
    /// Share of the volume's pages that are safe outside the source.
    pub evicted_percent: Option<f64>,
    /// Share of the volume's pages that the destination holds.
    pub gathered_percent: Option<f64>,
    /// What 19 of 20 answers of the last second to a co-tenant's client took at most, by the host it shares.
    #[serde(default)]
    pub cotenants_p95_us: BTreeMap<String, f64>,
}

/// Why the VM was paused, in the modes that send it in rounds while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// What is left takes no longer than the downtime limit.
    Converged,
    /// As many rounds as were asked for.
    Cap,
    /// The VM writes as fast as it is sent.
    NotShrinking,
    /// Nobody takes pages: intermediaries are full, or away.
    NoRoom,
}

/// One round that was sent while the VM ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that were to be sent.
    pub pages: u64,
    /// How long it took.
    pub s: f64,
    /// Pages that were written meanwhile.
    pub dirty_after: u64,
}

/// What only the source knows. Taken when it reports evicted, or when it failed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// How it ended at the source.
    pub status: Status,
    /// The mode asked for.
    pub mode: Option<String>,
    /// From the start command accepted to "evicted": nothing that anyone needs is left at the source.
    pub eviction_s: Option<f64>,
    /// From the start command accepted to the destination's word that it holds every page; `None`
    /// when the source left before that.
    pub total_migration_s: Option<f64>,
    /// From the vCPUs paused to the destination's word that it runs them.
    pub downtime_s: Option<f64>,
    /// The rounds that were sent while the VM ran; none in the modes that have none.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Why the VM was paused after the last of them.
    #[serde(default)]
    pub rounds_ended: Option<Ended>,
    /// `total`, `present`, `zero`, `direct`, `staged`, `referenced`, `hedged`, `resent`.
    pub pages: Pages,
    /// `direct`, `staged`, `replicated`, `dedup_saved`, `overhead`, `wire_total`, of what the source sent.
    pub bytes: Bytes,
    /// Per intermediary, `bytes_in`.
    pub intermediaries: Vec<Intermediary>,
    /// Bytes allocated for the books of this migration, over the volume's pages.
    pub bookkeeping_bytes_per_page: Option<f64>,
    /// User + system time of the process, from the start command accepted to "evicted".
    pub cpu_s: Option<f64>,
    /// Of that, what libsg's threads used: the migration without the guest.
    pub migration_cpu_s: Option<f64>,
    /// Largest resident set of the process up to now.
    pub peak_rss_bytes: Option<u64>,
}

/// What only the destination knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DestinationReport {
    /// How it ended at the destination.
    pub status: Status,
    /// From the start command accepted at the source (which tells its age in its first message) to
    /// every page installed here.
    pub total_migration_s: Option<f64>,
    /// `total`, `faulted`, `withdrawn`; `direct` and `staged` count pages installed from the source and from intermediaries.
    pub pages: Pages,
    /// `direct`, `gathered`, `overhead`, `wire_total`, of what the destination received and sent to
    /// intermediaries.
    pub bytes: Bytes,
    /// All faults.
    pub faults: Faults,
    /// Of these, the ones answered before the source had evicted.
    pub faults_while_scattering: Faults,
    /// Per intermediary, `bytes_out`.
    pub intermediaries: Vec<Intermediary>,
    /// Bytes allocated for the books of this migration, over the volume's pages.
    pub bookkeeping_bytes_per_page: Option<f64>,
    /// User + system time of the process, from the source's offer to every page installed.
    pub cpu_s: Option<f64>,
    /// Of that, what libsg's threads used: the migration without the guest.
    pub migration_cpu_s: Option<f64>,
    /// Largest resident set of the process up to now.
    pub peak_rss_bytes: Option<u64>,
}

/// Several VMs leaving one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// From the first start command accepted to the last VM's "evicted".
    pub eviction_s: Option<f64>,
    /// From the first start command accepted to the last VM gathered.
    pub total_migration_s: Option<f64>,
    /// Page bytes that left the source, of all VMs.
    pub bytes: Option<u64>,
}

/// One migration, both ends merged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How it ended: the destination's failure before the source's, for what it lost is lost.
    pub status: Status,
    /// `scatter-gather`, `post-copy`, …
    pub mode: Option<String>,
    /// The guest's seed.
    pub seed: Option<u64>,
    /// `tcp` or `rdma`.
    pub transport: Option<String>,
    /// Best of three plain TCP streams over the same shaped path in this run, megabits of payload a second.
    pub link_mbps: Option<f64>,
    /// The same of each sink whose own link is slower than the source's, by node.
    pub sinks_mbps: BTreeMap<String, f64>,
    /// What a fault costs at least: a plain request and a page in answer, destination to source, over the same
    /// links while they are idle (median), plus one install.
    pub idle_fault_us: Option<f64>,
    /// (present pages - zero pages) x 4096 bytes at `link_mbps`.
    pub line_rate_bound_s: Option<f64>,
    /// See [`SourceReport::eviction_s`].
    pub eviction_s: Option<f64>,
    /// See [`DestinationReport::total_migration_s`].
    pub total_migration_s: Option<f64>,
    /// See [`SourceReport::downtime_s`].
    pub downtime_s: Option<f64>,
    /// See [`SourceReport::rounds`].
    pub rounds: Vec<Round>,
    /// See [`SourceReport::rounds_ended`].
    pub rounds_ended: Option<Ended>,
    /// From both ends; where both count (direct, staged), what the source sent.
    pub pages: Pages,
    /// From both ends; where both count (direct), what the source sent.
    pub bytes: Bytes,
    /// All faults.
    pub faults: Faults,
    /// Of these, the ones answered before the source had evicted.
    pub faults_while_scattering: Faults,
    /// What the guest saw.
    pub guest: Guest,
    /// Each intermediary.
    pub intermediaries: Vec<Intermediary>,
    /// See [`SourceReport::cpu_s`] and [`DestinationReport::cpu_s`].
    pub cpu_s: Ends<f64>,
    /// See [`SourceReport::migration_cpu_s`] and [`DestinationReport::migration_cpu_s`].
    pub migration_cpu_s: Ends<f64>,
    /// Largest resident sets of the processes.
    pub peak_rss_bytes: Ends<u64>,
    /// All bytes written to and read from sockets: `bytes.wire_total` by end.
    pub wire_bytes: Ends<u64>,
    /// From the allocation sizes.
    pub bookkeeping_bytes_per_page: Ends<f64>,
    /// Cost in processor time by role, beside a plain stream's.
    pub cpu_s_per_gib: CpuPerGib,
    /// Services that share hosts with the migration.
    pub cotenants: Vec<Cotenant>,
    /// The destination's memory limit, where it has one.
    pub destination_memory: Option<Pressure>,
    /// Each 100 ms.
    pub samples: Vec<Sample>,
    /// With several VMs, each one's report.
    pub vms: Option<Vec<Report>>,
    /// With several VMs, the host's figures.
    pub host: Option<Host>,
}

impl Report {
    /// Sets `link_mbps`, and from it `line_rate_bound_s`.
    pub fn set_link(&mut self, mbps: f64) {
        self.link_mbps = Some(mbps);
        let filled = self.pages.present.map(|present| present.saturating_sub(self.pages.zero.unwrap_or(0)));
        self.line_rate_bound_s = filled.map(|pages| (pages * PAGE_BYTES_U64) as f64 * 8e-6 / mbps);
    }

    /// Merges what both ends told; either may be missing (it was killed, or never came so far).
    #[must_use]
    pub fn merged(source: Option<&SourceReport>, destination: Option<&DestinationReport>) -> Self {
        let nothing = (SourceReport::default(), DestinationReport::default());
        let (from, to) = (source.unwrap_or(&nothing.0), destination.unwrap_or(&nothing.1));
        let status = if to.status == Status::Ok { &from.status } else { &to.status };
        let mut intermediaries = from.intermediaries.clone();
        for theirs in &to.intermediaries {
            match intermediaries.iter_mut().find(|mine| mine.id == theirs.id) {
                Some(mine) => mine.bytes_out = theirs.bytes_out,
                None => intermediaries.push(theirs.clone()),
            }
        }
        Self {
            schema: SCHEMA,
            status: status.clone(),
            mode: from.mode.clone(),
            eviction_s: from.eviction_s,
            total_migration_s: to.total_migration_s.or(from.total_migration_s),
            downtime_s: from.downtime_s,
            rounds: from.rounds.clone(),
            rounds_ended: from.rounds_ended,
            pages: Pages {
                total: from.pages.total.or(to.pages.total),
                direct: from.pages.direct.or(to.pages.direct),
                staged: from.pages.staged.or(to.pages.staged),
                faulted: to.pages.faulted,
                withdrawn: to.pages.withdrawn,
                ..from.pages
            },
            bytes: Bytes {
                direct: from.bytes.direct.or(to.bytes.direct),
                gathered: to.bytes.gathered,
                overhead: sum(from.bytes.overhead, to.bytes.overhead),
                wire_total: sum(from.bytes.wire_total, to.bytes.wire_total),
                ..from.bytes
            },
            faults: to.faults,
            faults_while_scattering: to.faults_while_scattering,
            intermediaries,
            cpu_s: Ends { source: from.cpu_s, destination: to.cpu_s },
            migration_cpu_s: Ends { source: from.migration_cpu_s, destination: to.migration_cpu_s },
            peak_rss_bytes: Ends { source: from.peak_rss_bytes, destination: to.peak_rss_bytes },
            wire_bytes: Ends { source: from.bytes.wire_total, destination: to.bytes.wire_total },
            bookkeeping_bytes_per_page: Ends {
                source: from.bookkeeping_bytes_per_page,
                destination: to.bookkeeping_bytes_per_page,
            },
            ..Self::default()
        }
    }
}

fn sum(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod test;
