//! The rows: which experiments they need, what is computed from them, what is wanted.

use std::fmt;

use anyhow::Result;
use libsg::discovery::select::CHOICES;
use sg_benches::content::{self, Content};

use super::experiments::{ADDING_UP, BOOKKEEPING, FAULT_FIFO, FLAT, Family, STAGED, STOPPED};
use super::figures::{
    destination_cotenant, destination_used, eviction, eviction_over_bound, eviction_spread,
    fault_p50_over_idle, fault_p99_us, faults, gained_over_saved, intermediary_cotenant,
    intermediary_cpu_over_stream, link_used, longest_pause, over_fresh_stream, over_sum_of_rates, ratios,
    rss_slope, sent_over_unique, server_rss_slope, source_cpu_over_stream, total, total_over_qemu,
};
use super::rounds::Rounds;
use super::runs::{Results, Run};
use crate::{disk, select};

/// Pages that the store is measured with, 64 MiB, and how often.
const STORE_PAGES: u32 = 16 << 10;
const STORE_ROUNDS: usize = 15;

/// One row of the table.
pub struct Row {
    /// Which issue wants it.
    pub issue: u8,
    pub name: &'static str,
    pub what: &'static str,
    pub families: Vec<Family>,
    pub parts: Vec<Part>,
}

impl Row {
    /// Whether it needs an experiment: all of its family, but for rows that look at one of two.
    pub fn uses(&self, experiment: &str) -> bool {
        self.parts.iter().any(|part| part.experiments.contains(&experiment))
    }
}

/// What is computed from one run.
type Figure = fn(&Run) -> Option<f64>;

type Values = Box<dyn Fn(&Results) -> Result<Vec<f64>>>;

/// One figure of a row.
pub struct Part {
    pub name: String,
    pub experiments: Vec<&'static str>,
    pub want: Want,
    pub values: Values,
}

/// What a figure must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Want {
    AtMost(f64),
    AtLeast(f64),
    Between(f64, f64),
}

use Want::{AtLeast, AtMost, Between};

impl Want {
    /// Whether it is.
    pub fn holds(self, got: f64) -> bool {
        match self {
            AtMost(most) => got <= most,
            AtLeast(least) => got >= least,
            Between(least, most) => (least..=most).contains(&got),
        }
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AtMost(most) => write!(f, "<= {most}"),
            AtLeast(least) => write!(f, ">= {least}"),
            Between(least, most) => write!(f, "{least} to {most}"),
        }
    }
}

/// Every row, in the order of the table.
pub fn all() -> Vec<Row> {
    let mut rows = eviction_rows();
    rows.extend(guest_rows());
    rows.extend(cost_rows());
    rows.extend(round_rows().into_iter().chain(shared_rows()).map(|row| Row { issue: 3, ..row }));
    let whole = [store_row(), replicas_row(), server_memory_row(), select_row(), nbd_row()];
    rows.extend(
        dedup_rows().into_iter().chain([several_row()]).chain(whole).map(|row| Row { issue: 4, ..row }),
    );
    rows.extend(super::stock::rows());
    rows
}

fn row(name: &'static str, what: &'static str, families: &[Family], parts: Vec<Part>) -> Row {
    Row { issue: 2, name, what, families: families.to_vec(), parts }
}

/// How soon the source is free.
fn eviction_rows() -> Vec<Row> {
    use Family::{AddingUp, Limited, NoIntermediary, SlowLink, Stopped, Swapping};
    let bound = |experiment| vec![figure("", experiment, AtMost(1.05), eviction_over_bound)];
    let over_post_copy =
        |name, ours, post_copy, want, of: Figure| ratio(name, (ours, post_copy), AtMost(want), of);
    vec![
        row(
            "eviction-limited",
            "eviction / line rate, gather limited to 256 Mb/s",
            &[Limited],
            bound("limited"),
        ),
        row("eviction-slow-link", "the same, destination at 256 Mb/s", &[SlowLink], bound("slow")),
        row("eviction-swapping", "the same, destination with 512 MiB", &[Swapping], bound("swapping")),
        row(
            "eviction-stopped",
            "the same, destination stopped when it has resumed, and when half was evicted",
            &[Stopped],
            STOPPED
                .map(|(name, _)| {
                    figure(name.trim_start_matches("stopped "), name, AtMost(1.05), eviction_over_bound)
                })
                .into(),
        ),
        row(
            "against-post-copy",
            "eviction of post-copy / ours, destination at 256 Mb/s",
            &[SlowLink],
            vec![ratio("", ("slow post-copy", "slow"), AtLeast(3.6), eviction)],
        ),
        row(
            "total-time",
            "total migration time / post-copy's, destination at 256 Mb/s, and swapping",
            &[SlowLink, Swapping],
            vec![
                over_post_copy("256 Mb/s", "slow", "slow post-copy", 1.05, total),
                over_post_copy("swapping", "swapping", "swapping post-copy", 1.05, total),
            ],
        ),
        row(
            "no-intermediary",
            "eviction / post-copy's, without intermediaries",
            &[NoIntermediary],
            vec![over_post_copy("", "alone", "alone post-copy", 1.02, eviction)],
        ),
        row(
            "adding-up",
            "bytes / eviction over the sum of the sinks' rates, idle VM, destination 100 Mb/s, 1 to 4 intermediaries of 200 Mb/s",
            &[AddingUp],
            ADDING_UP.map(|name| figure(name, name, Between(0.93, 1.02), over_sum_of_rates)).into(),
        ),
    ]
}

/// What the guest notices.
fn guest_rows() -> Vec<Row> {
    use Family::{Fast, FaultFifo, SlowLink};
    vec![
        row(
            "pause",
            "guest's longest pause in ms, 10,000 writes a second, destination unlimited and at 256 Mb/s",
            &[Fast, SlowLink],
            vec![
                figure("unlimited", "fast", AtMost(50.0), longest_pause),
                figure("256 Mb/s", "slow", AtMost(50.0), longest_pause),
            ],
        ),
        row(
            "fault-prio",
            "faults while scattering at full rate, priority queue",
            &[Fast],
            fault_parts("", "fast", (2.0, 1000.0), link_used),
        ),
        row(
            "fault-fifo",
            "the same, one first-in-first-out queue, at the source's link and at a destination's of 256 Mb/s",
            &[FaultFifo],
            FAULT_FIFO
                .into_iter()
                .flat_map(|name| {
                    let used: Figure = if name.ends_with("source") { link_used } else { destination_used };
                    fault_parts(&format!("{name} "), name, (3.0, 2000.0), used)
                })
                .collect(),
        ),
    ]
}

/// What it takes.
fn cost_rows() -> Vec<Row> {
    vec![
        row(
            "unshaped",
            "eviction throughput on loopback, gather held / one plain TCP stream into equally fresh memory",
            &[Family::Unshaped],
            vec![figure("", "unshaped", AtLeast(0.8), over_fresh_stream)],
        ),
        row(
            "bookkeeping",
            "bytes a page: slope of peak RSS beyond VM memory, 512 MiB to 4 GiB",
            &[Family::Bookkeeping],
            vec![
                slope("source", |report| report.peak_rss_bytes.source),
                slope("destination", |report| report.peak_rss_bytes.destination),
            ],
        ),
    ]
}

/// The modes with rounds.
fn round_rows() -> Vec<Row> {
    vec![
        row(
            "pre-copy",
            "total time of pre-copy / QEMU 10's 3.1 s for 345 MB, scaled to the VM's bytes; 3,000 writes a second",
            &[Family::PreCopy],
            vec![figure("", "pre-copy", AtMost(1.1), total_over_qemu)],
        ),
        row(
            "hybrid-faults",
            "faults of hybrid with one round / of scatter-gather, reader over a quarter of memory",
            &[Family::Hybrid],
            vec![ratio("", ("hybrid", "hybrid scatter-gather"), AtMost(0.5), faults)],
        ),
    ]
}

/// What others notice, and what they pay.
fn shared_rows() -> Vec<Row> {
    vec![
        row(
            "flat",
            "spread of eviction, destination at 1 Gb/s, 256, 100 and 50 Mb/s: longest over shortest, less one",
            &[Family::Flat],
            vec![Part {
                name: String::new(),
                experiments: FLAT.map(|(name, _)| name).into(),
                want: AtMost(0.05),
                values: Box::new(|results| eviction_spread(results, &FLAT.map(|(name, _)| name))),
            }],
        ),
        row(
            "cotenant",
            "95th percentile of requests to a co-tenant while the VM migrates / before, gather limited to 256 Mb/s",
            &[Family::Cotenant],
            vec![
                figure("destination", "cotenant", AtMost(2.0), destination_cotenant),
                figure("i1", "cotenant", AtMost(2.0), intermediary_cotenant),
                figure("eviction", "cotenant", AtMost(1.05), eviction_over_bound),
            ],
        ),
        row(
            "cpu-source",
            "source's cpu-s a GiB / a plain writev stream's over the same link, idle guest, gather held",
            &[Family::Held],
            vec![figure("", "held", AtMost(1.25), source_cpu_over_stream)],
        ),
        row(
            "cpu-intermediary",
            "intermediaries' cpu-s a GiB staged / a plain stream's into fresh memory, the same runs",
            &[Family::Held],
            vec![figure("", "held", AtMost(1.25), intermediary_cpu_over_stream)],
        ),
    ]
}

/// What VMs that are alike save, and what it costs those that are not.
fn dedup_rows() -> Vec<Row> {
    vec![
        row(
            "dedup-wire",
            "bytes leaving the sources / of contents, each once; 4 VMs of 512 MiB with 0.6 in common, 2 hosts, parked",
            &[Family::Alike],
            vec![figure("", "alike", AtMost(1.05), sent_over_unique)],
        ),
        row(
            "dedup-eviction",
            "the same: eviction without / with deduplication, over bytes without / with",
            &[Family::Alike],
            vec![Part {
                name: String::new(),
                experiments: vec!["alike", "alike without"],
                want: AtLeast(0.9),
                values: Box::new(|results| gained_over_saved(results, "alike", "alike without")),
            }],
        ),
        row(
            "dedup-cost",
            "eviction with deduplication / without, of as many VMs with nothing in common",
            &[Family::Unlike],
            vec![ratio("", ("unlike", "unlike without"), AtMost(1.03), eviction)],
        ),
    ]
}

/// Many at once.
fn several_row() -> Row {
    row(
        "several",
        "4 VMs of 512 MiB to one destination with memory for two: first start to last evicted / bytes at link rate",
        &[Family::Several],
        vec![figure("", "several", AtMost(1.05), eviction_over_bound)],
    )
}

/// What intermediaries keep beside the pages.
fn server_memory_row() -> Row {
    row(
        "server-memory",
        "bytes a page at intermediaries: slope of peak RSS beyond the pages, with deduplication, 512 MiB to 2 GiB",
        &[Family::Staged],
        vec![Part {
            name: String::new(),
            experiments: STAGED.map(|(name, _)| name).into(),
            want: AtMost(64.0),
            values: Box::new(server_rss_slope),
        }],
    )
}

/// What an intermediary's books cost beside the hash of each page: no hosts are built for it.
fn store_row() -> Row {
    let part = |name: &str, of: fn(&content::Round) -> f64| Part {
        name: name.to_owned(),
        experiments: Vec::new(),
        want: AtMost(1.25),
        values: Box::new(move |_| {
            let mut content = Content::start(STORE_PAGES)?;
            let rounds = (0..STORE_ROUNDS).map(|_| Ok(of(&content.round()?)));
            rounds.collect::<Result<_>>()
        }),
    };
    row(
        "store",
        "content server with BLAKE3 and warm slots, batches of 64 pages, one thread / hash and copy alone",
        &[],
        vec![
            part("put", |round| round.put_s / round.alone_s),
            part("get", |round| round.get_s / round.alone_s),
        ],
    )
}

/// What copies cost.
fn replicas_row() -> Row {
    row(
        "replicas",
        "eviction with 2 copies of each page / with 1, 4 intermediaries, gather limited to 256 Mb/s",
        &[Family::Replicas],
        vec![ratio("", ("two copies", "one copy"), AtMost(1.05), eviction)],
    )
}

/// Choosing intermediaries: no hosts are built for it.
fn select_row() -> Row {
    let part = |name: &str, want, of: fn(&select::Outcome) -> f64| Part {
        name: name.to_owned(),
        experiments: Vec::new(),
        want,
        values: Box::new(move |_| {
            (1..=3).map(|seed| Ok(of(&select::simulate(10_000, 1000, seed, CHOICES)?))).collect()
        }),
    };
    row(
        "select",
        "10,000 nodes, 1,000 migrations at once: mean time of a decision in ms, load of the nodes after it",
        &[],
        vec![
            part("ms", AtMost(1.0), |outcome| outcome.decision_us.mean / 1e3),
            part("max/mean", AtMost(1.2), |outcome| outcome.load.max_over_mean),
        ],
    )
}

/// A volume as a block device: no hosts are built for it either. Both parts are of the same rounds.
fn nbd_row() -> Row {
    let rounds = Rounds::of(|| disk::compare(1 << 30, 3));
    row(
        "nbd",
        "1 GiB by nbdcopy through sg nbd / through nbdkit nbd in front of nbdkit memory, fresh memory: throughput",
        &[],
        vec![
            rounds.part("in", AtLeast(0.8), |round| Some(round.theirs.in_s / round.ours.in_s)),
            rounds.part("out", AtLeast(0.8), |round| Some(round.theirs.out_s / round.ours.out_s)),
        ],
    )
}

/// A figure of one experiment.
fn figure(name: &str, experiment: &'static str, want: Want, of: Figure) -> Part {
    Part {
        name: name.to_owned(),
        experiments: vec![experiment],
        want,
        values: Box::new(move |results| Ok(results.each(experiment, of)?.into_iter().flatten().collect())),
    }
}

/// A figure of one experiment over that of another, run by run: the n-th of both were neighbours in time.
fn ratio(name: &str, (above, below): (&'static str, &'static str), want: Want, of: Figure) -> Part {
    let values =
        move |results: &Results| Ok(ratios(results, (above, below), of)?.into_iter().flatten().collect());
    Part { name: name.to_owned(), experiments: vec![above, below], want, values: Box::new(values) }
}

fn fault_parts(prefix: &str, experiment: &'static str, (p50, p99_us): (f64, f64), used: Figure) -> Vec<Part> {
    vec![
        figure(&format!("{prefix}p50/idle"), experiment, AtMost(p50), fault_p50_over_idle),
        figure(&format!("{prefix}p99 us"), experiment, AtMost(p99_us), fault_p99_us),
        figure(&format!("{prefix}link used"), experiment, AtLeast(0.97), used),
    ]
}

fn slope(end: &str, rss: fn(&libsg::report::Report) -> Option<u64>) -> Part {
    Part {
        name: end.to_owned(),
        experiments: BOOKKEEPING.map(|(name, _)| name).into(),
        want: AtMost(16.0),
        values: Box::new(move |results| rss_slope(results, rss)),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::accept::experiments;

    #[test]
    fn every_row_finds_its_experiments() {
        let rows = all();
        for row in &rows {
            let there: Vec<_> = row.families.iter().flat_map(|family| experiments::of(*family)).collect();
            for name in row.parts.iter().flat_map(|part| &part.experiments) {
                assert!(there.iter().any(|e| e.name == *name), "{}: no experiment {name}", row.name);
            }
        }
        let mut names: Vec<_> = rows.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len(), "a name twice: {names:?}");
    }

    #[test]
    fn wants() {
        assert!(AtMost(1.05).holds(1.05) && !AtMost(1.05).holds(1.06));
        assert!(AtLeast(3.6).holds(3.7) && !AtLeast(3.6).holds(f64::NAN));
        assert!(Between(0.93, 1.02).holds(1.0) && !Between(0.93, 1.02).holds(1.03));
        assert_eq!(Between(0.93, 1.02).to_string(), "0.93 to 1.02");
    }
}
