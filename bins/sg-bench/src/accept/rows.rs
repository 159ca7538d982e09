//! The rows: which experiments they need, what is computed from them, what is wanted.

use std::fmt;

use anyhow::{Context, Result};
use libsg::page::PAGE_BYTES_U64;

use super::{Baseline, Results, Run, Variant};
use crate::cli::{MigrateArgs, Mode, Until};
use crate::lab::{CongestionControl, Queue};
use libsg::units::{Rate, Size};

/// Experiments that are run in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Limited,
    SlowLink,
    Swapping,
    NoIntermediary,
    AddingUp,
    Pause,
    FaultPrio,
    FaultFifo,
    Unshaped,
    Bookkeeping,
}

/// One row of the table.
pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    pub families: &'static [Family],
    pub parts: Vec<Part>,
}

impl Row {
    /// Whether it needs a variant: all of its family, but for rows that look at one of two.
    pub fn uses(&self, variant: &str) -> bool {
        self.parts.iter().any(|part| part.variants.contains(&variant))
    }
}

/// What is computed from one run.
type Figure = fn(&Run) -> Option<f64>;

type Values = Box<dyn Fn(&Results) -> Result<Vec<f64>>>;

/// One figure of a row.
pub struct Part {
    pub name: String,
    pub variants: Vec<&'static str>,
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

impl Want {
    /// Whether it is.
    pub fn holds(self, got: f64) -> bool {
        match self {
            Self::AtMost(most) => got <= most,
            Self::AtLeast(least) => got >= least,
            Self::Between(least, most) => (least..=most).contains(&got),
        }
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "<= {most}"),
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::Between(least, most) => write!(f, "{least} to {most}"),
        }
    }
}

const SLOW: Rate = Rate::mbit(256);
const SWAPPING: Size = Size(512 << 20);

/// A figure of one variant.
fn figure(
    name: &str,
    variant: &'static str,
    want: Want,
    of: impl Fn(&Run) -> Option<f64> + Copy + 'static,
) -> Part {
    Part {
        name: name.to_owned(),
        variants: vec![variant],
        want,
        values: Box::new(move |results| results.each(variant, of)),
    }
}

/// A figure of one variant over that of another, run by run: the n-th of both were neighbours in time.
fn ratio(
    name: &str,
    above: &'static str,
    below: &'static str,
    want: Want,
    of: impl Fn(&Run) -> Option<f64> + Copy + 'static,
) -> Part {
    let values = move |results: &Results| {
        let (above, below) = (results.each(above, of)?, results.each(below, of)?);
        Ok(above.iter().zip(&below).map(|(a, b)| a / b).collect())
    };
    Part { name: name.to_owned(), variants: vec![above, below], want, values: Box::new(values) }
}

fn eviction(run: &Run) -> Option<f64> {
    run.report.eviction_s
}

fn total(run: &Run) -> Option<f64> {
    run.report.total_migration_s
}

fn eviction_over_bound(run: &Run) -> Option<f64> {
    Some(run.report.eviction_s? / run.report.line_rate_bound_s?)
}

/// Page bits a second that left the source, in megabits.
fn evicted_mbps(run: &Run) -> Option<f64> {
    let bytes = run.report.bytes.direct.unwrap_or(0) + run.report.bytes.staged.unwrap_or(0);
    Some(bytes as f64 * 8e-6 / run.report.eviction_s?)
}

/// Over the sum of what the sinks' links measured in the same run.
fn over_sum_of_rates(run: &Run) -> Option<f64> {
    let sum: f64 = run.report.sinks_mbps.values().sum();
    Some(evicted_mbps(run)? / sum)
}

/// Share of the destination's link that the direct path used until the source had evicted.
fn destination_used(run: &Run) -> Option<f64> {
    let mbps = run.report.bytes.direct? as f64 * 8e-6 / run.report.eviction_s?;
    Some(mbps / run.report.sinks_mbps.get("destination")?)
}

/// Share of the source's link that the scatter used. Page bytes only: the link did carry more.
fn link_used(run: &Run) -> Option<f64> {
    Some(evicted_mbps(run)? / run.report.link_mbps?)
}

fn fault_p50_over_idle(run: &Run) -> Option<f64> {
    Some(run.report.faults_while_scattering.p50_us? / run.report.idle_fault_us?)
}

fn fault_p99_us(run: &Run) -> Option<f64> {
    run.report.faults_while_scattering.p99_us
}

fn over_fresh_stream(run: &Run) -> Option<f64> {
    Some(evicted_mbps(run)? / run.baseline_mbps?)
}

const ADDING_UP: [&str; 4] = ["1 intermediary", "2 intermediaries", "3 intermediaries", "4 intermediaries"];
const FAULT_FIFO: [&str; 4] = ["bbr source", "cubic source", "bbr destination", "cubic destination"];
const BOOKKEEPING: [(&str, u64); 4] = [("512M VM", 512), ("1G VM", 1024), ("2G VM", 2048), ("4G VM", 4096)];

/// Every row, in the order of the table.
pub fn all() -> Vec<Row> {
    use Want::{AtLeast, AtMost, Between};
    let row = |name, what, families, parts| Row { name, what, families, parts };
    let bound = |variant| vec![figure("", variant, AtMost(1.05), eviction_over_bound)];
    vec![
        row(
            "eviction-limited",
            "eviction / line rate, gather limited to 256 Mb/s",
            &[Family::Limited],
            bound("limited"),
        ),
        row("eviction-slow-link", "the same, destination at 256 Mb/s", &[Family::SlowLink], bound("slow")),
        row(
            "eviction-swapping",
            "the same, destination with 512 MiB",
            &[Family::Swapping],
            bound("swapping"),
        ),
        row(
            "against-post-copy",
            "eviction of post-copy / ours, destination at 256 Mb/s",
            &[Family::SlowLink],
            vec![ratio("", "slow post-copy", "slow", AtLeast(3.6), eviction)],
        ),
        row(
            "total-time",
            "total migration time / post-copy's, destination at 256 Mb/s, and swapping",
            &[Family::SlowLink, Family::Swapping],
            vec![
                ratio("256 Mb/s", "slow", "slow post-copy", AtMost(1.05), total),
                ratio("swapping", "swapping", "swapping post-copy", AtMost(1.05), total),
            ],
        ),
        row(
            "no-intermediary",
            "eviction / post-copy's, without intermediaries",
            &[Family::NoIntermediary],
            vec![ratio("", "alone", "alone post-copy", AtMost(1.02), eviction)],
        ),
        row(
            "adding-up",
            "bytes / eviction over the sum of the sinks' rates, 1 to 4 intermediaries of 200 Mb/s",
            &[Family::AddingUp],
            ADDING_UP.map(|v| figure(v, v, Between(0.93, 1.02), over_sum_of_rates)).into(),
        ),
        row(
            "pause",
            "guest's longest pause in ms, 10,000 writes a second",
            &[Family::Pause],
            ["fast", "slow"]
                .map(|v| {
                    let variant = if v == "fast" { "pause" } else { "pause slow" };
                    figure(v, variant, AtMost(50.0), |run| run.report.guest.longest_pause_ms)
                })
                .into(),
        ),
        row(
            "fault-prio",
            "faults while scattering at full rate, priority queue",
            &[Family::FaultPrio],
            fault_parts("", "fault prio", 2.0, 1000.0, link_used),
        ),
        row(
            "fault-fifo",
            "the same, one first-in-first-out queue, at the source's link and at the destination's",
            &[Family::FaultFifo],
            FAULT_FIFO
                .into_iter()
                .flat_map(|v| {
                    let used: Figure = if v.ends_with("source") { link_used } else { destination_used };
                    fault_parts(&format!("{v} "), v, 3.0, 2000.0, used)
                })
                .collect(),
        ),
        row(
            "unshaped",
            "eviction throughput on loopback / one plain TCP stream into equally fresh memory",
            &[Family::Unshaped],
            vec![figure("", "unshaped", AtLeast(0.8), over_fresh_stream)],
        ),
        row(
            "bookkeeping",
            "bytes a page: slope of peak RSS beyond VM memory, 512 MiB to 4 GiB",
            &[Family::Bookkeeping],
            vec![
                slope("source", |r| r.peak_rss_bytes.source),
                slope("destination", |r| r.peak_rss_bytes.destination),
            ],
        ),
    ]
}

fn fault_parts(prefix: &str, variant: &'static str, p50: f64, p99_us: f64, used: Figure) -> Vec<Part> {
    vec![
        figure(&format!("{prefix}p50/idle"), variant, Want::AtMost(p50), fault_p50_over_idle),
        figure(&format!("{prefix}p99 us"), variant, Want::AtMost(p99_us), fault_p99_us),
        figure(&format!("{prefix}link used"), variant, Want::AtLeast(0.97), used),
    ]
}

/// Least squares over the sizes, with the medians of each.
fn slope(end: &'static str, rss: fn(&libsg::report::Report) -> Option<u64>) -> Part {
    let values = move |results: &Results| {
        let mut points = Vec::new();
        for (variant, mebibytes) in BOOKKEEPING {
            let bytes = mebibytes << 20;
            let beyond = |run: &Run| rss(&run.report).map(|rss| rss as f64 - bytes as f64);
            let median = crate::stats::median(&results.each(variant, beyond)?).context("no runs")?;
            points.push(((bytes / PAGE_BYTES_U64) as f64, median));
        }
        Ok(vec![least_squares(&points)])
    };
    Part {
        name: end.to_owned(),
        variants: BOOKKEEPING.map(|(name, _)| name).into(),
        want: Want::AtMost(16.0),
        values: Box::new(values),
    }
}

fn least_squares(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (mean_x, mean_y) =
        (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let above: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let below: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    above / below
}

/// The experiments of a family.
pub fn variants(family: Family) -> Vec<Variant> {
    let plain = MigrateArgs::new();
    let variant = |name, args| Variant { name, args, baseline: Baseline::Nothing };
    let with = |change: &dyn Fn(&mut MigrateArgs)| {
        let mut args = plain.clone();
        change(&mut args);
        args
    };
    let both = |name, post_copy, args: MigrateArgs| {
        let mut other = args.clone();
        other.mode = Mode::PostCopy;
        vec![variant(name, args), variant(post_copy, other)]
    };
    match family {
        Family::Limited => vec![variant("limited", with(&|a| a.gather_limit = SLOW))],
        Family::SlowLink => both("slow", "slow post-copy", with(&|a| a.lab.destination_rate = Some(SLOW))),
        Family::Swapping => {
            both("swapping", "swapping post-copy", with(&|a| a.destination_memory = Some(SWAPPING)))
        }
        Family::NoIntermediary => both("alone", "alone post-copy", with(&|a| a.lab.intermediaries = 0)),
        Family::AddingUp => (1..)
            .zip(ADDING_UP)
            .map(|(n, name)| {
                variant(
                    name,
                    with(&|a| {
                        a.vm.memory = Size(512 << 20);
                        a.lab.destination_rate = Some(Rate::mbit(100));
                        a.lab.intermediary_rate = Some(Rate::mbit(200));
                        a.lab.intermediaries = n;
                    }),
                )
            })
            .collect(),
        Family::Pause => vec![
            variant("pause", plain.clone()),
            variant("pause slow", with(&|a| a.lab.destination_rate = Some(SLOW))),
        ],
        Family::FaultPrio => vec![variant("fault prio", with(&|a| a.lab.queue = Queue::Prio))],
        Family::FaultFifo => FAULT_FIFO
            .into_iter()
            .map(|name| {
                variant(
                    name,
                    with(&|a| {
                        a.lab.queue = Queue::Fifo;
                        a.lab.cc = if name.starts_with("bbr") {
                            CongestionControl::Bbr
                        } else {
                            CongestionControl::Cubic
                        };
                        if name.ends_with("destination") {
                            a.lab.destination_rate = Some(SLOW);
                        }
                    }),
                )
            })
            .collect(),
        Family::Unshaped => {
            // Held: what may enter the destination is next to nothing, until the source has gone.
            let args = with(&|a| {
                a.lab.shape = false;
                a.gather_limit = Rate::mbit(1);
                a.until = Until::Evicted;
            });
            vec![Variant { name: "unshaped", args, baseline: Baseline::FreshStream }]
        }
        Family::Bookkeeping => BOOKKEEPING
            .map(|(name, mebibytes)| {
                variant(
                    name,
                    with(&|a| {
                        a.lab.shape = false;
                        a.vm.memory = Size(mebibytes << 20);
                    }),
                )
            })
            .into(),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_row_finds_its_experiments() {
        let rows = all();
        for row in &rows {
            let variants: Vec<_> = row.families.iter().flat_map(|family| variants(*family)).collect();
            for name in row.parts.iter().flat_map(|part| &part.variants) {
                assert!(variants.iter().any(|v| v.name == *name), "{}: no experiment {name}", row.name);
            }
        }
        let mut names: Vec<_> = rows.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn wants_and_slopes() {
        assert!(Want::AtMost(1.05).holds(1.05) && !Want::AtMost(1.05).holds(1.06));
        assert!(Want::AtLeast(3.6).holds(3.7) && !Want::AtLeast(3.6).holds(f64::NAN));
        assert!(Want::Between(0.93, 1.02).holds(1.0) && !Want::Between(0.93, 1.02).holds(1.03));
        assert_eq!(Want::Between(0.93, 1.02).to_string(), "0.93 to 1.02");
        let line = [1.0, 2.0, 4.0].map(|x| (x, 7.0 + 12.0 * x));
        assert!((least_squares(&line) - 12.0).abs() < 1e-9);
    }
}
