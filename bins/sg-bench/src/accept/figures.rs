//! What is computed from the runs of a row.

use anyhow::{Context, Result};
use libsg::page::PAGE_BYTES_U64;
use libsg::report::Report;

use super::experiments::{ALIKE, BOOKKEEPING, SEVERAL, STAGED};
use super::runs::{Results, Run};
use crate::stats;

/// Faults below which a 99th percentile says nothing.
const FAULTS_MIN: u64 = 300;

/// Until nothing was left at the source.
pub fn eviction(run: &Run) -> Option<f64> {
    run.report.eviction_s
}

/// Until the destination held everything.
pub fn total(run: &Run) -> Option<f64> {
    run.report.total_migration_s
}

/// Against everything filled at the rate that the link measured in the same run.
pub fn eviction_over_bound(run: &Run) -> Option<f64> {
    Some(run.report.eviction_s? / run.report.line_rate_bound_s?)
}

/// Against what QEMU 10 took, measured with a guest of 345 MB that writes 3,000 pages a second, over 1 Gb/s: 3.1 s. By
/// the bytes that the VM has, not by those that were sent: what is sent again is the migration's affair.
pub fn total_over_qemu(run: &Run) -> Option<f64> {
    const QEMU_S_PER_BYTE: f64 = 3.1 / 345e6;
    Some(run.report.total_migration_s? / (filled_bytes(run)? as f64 * QEMU_S_PER_BYTE))
}

/// Pages that the guest waited for.
pub fn faults(run: &Run) -> Option<f64> {
    run.report.faults.count.map(|count| count as f64)
}

/// Milliseconds.
pub fn longest_pause(run: &Run) -> Option<f64> {
    run.report.guest.longest_pause_ms
}

/// The VM's filled pages over the eviction time, each counted once however often it was sent: megabits a second.
fn evicted_mbps(run: &Run) -> Option<f64> {
    Some(filled_bytes(run)? as f64 * 8e-6 / run.report.eviction_s?)
}

fn filled_bytes(run: &Run) -> Option<u64> {
    let pages = run.report.pages.present? - run.report.pages.zero.unwrap_or(0);
    Some(pages * PAGE_BYTES_U64)
}

/// Over the sum of what the sinks' links measured in the same run.
pub fn over_sum_of_rates(run: &Run) -> Option<f64> {
    let sum: f64 = run.report.sinks_mbps.values().sum();
    Some(evicted_mbps(run)? / sum)
}

/// Share of the source's link that the scatter used, in page bytes: the link did carry more.
pub fn link_used(run: &Run) -> Option<f64> {
    let bytes = run.report.bytes.direct.unwrap_or(0) + run.report.bytes.staged.unwrap_or(0);
    Some(bytes as f64 * 8e-6 / run.report.eviction_s? / run.report.link_mbps?)
}

/// Share of the destination's link that was used until the source had evicted: by the direct path, and by pages that
/// the guest waited for and an intermediary had.
pub fn destination_used(run: &Run) -> Option<f64> {
    let bytes = run.report.bytes.direct? + run.gathered_at_evicted_bytes?;
    let mbps = bytes as f64 * 8e-6 / run.report.eviction_s?;
    Some(mbps / run.report.sinks_mbps.get("destination")?)
}

/// Of the faults while the source scattered.
pub fn fault_p50_over_idle(run: &Run) -> Option<f64> {
    enough_faults(run)?;
    Some(run.report.faults_while_scattering.p50_us? / run.report.idle_fault_us?)
}

/// Of the faults while the source scattered.
pub fn fault_p99_us(run: &Run) -> Option<f64> {
    enough_faults(run)?;
    run.report.faults_while_scattering.p99_us
}

fn enough_faults(run: &Run) -> Option<u64> {
    run.report.faults_while_scattering.count.filter(|count| *count >= FAULTS_MIN)
}

/// Throughput of the eviction over that of a plain stream in the same run.
pub fn over_fresh_stream(run: &Run) -> Option<f64> {
    Some(evicted_mbps(run)? / run.fresh_stream_mbps?)
}

/// The source's processor time over that of the sender of a plain stream.
pub fn source_cpu_over_stream(run: &Run) -> Option<f64> {
    Some(run.report.cpu_s_per_gib.source? / run.report.cpu_s_per_gib.stream.source?)
}

/// The intermediaries' processor time over that of the receiver of a plain stream into fresh memory.
pub fn intermediary_cpu_over_stream(run: &Run) -> Option<f64> {
    Some(run.report.cpu_s_per_gib.intermediaries? / run.report.cpu_s_per_gib.stream.destination?)
}

/// Of requests to the co-tenant of a host: 95th percentile from the start to the end of the run over that before.
fn cotenant_p95_over_idle(run: &Run, node: &str) -> Option<f64> {
    let cotenant = run.report.cotenants.iter().find(|cotenant| cotenant.node == node)?;
    Some(cotenant.migration.p95_us? / cotenant.idle.p95_us?)
}

/// The destination's.
pub fn destination_cotenant(run: &Run) -> Option<f64> {
    cotenant_p95_over_idle(run, "destination")
}

/// The first intermediary's.
pub fn intermediary_cotenant(run: &Run) -> Option<f64> {
    cotenant_p95_over_idle(run, "i1")
}

/// How much longer the longest of several evictions took than the shortest, round by round: a share of the shortest.
pub fn eviction_spread(results: &Results, experiments: &[&'static str]) -> Result<Vec<f64>> {
    let mut rounds: Vec<Vec<Option<f64>>> = Vec::new();
    for experiment in experiments {
        for (round, value) in results.each(experiment, eviction)?.into_iter().enumerate() {
            if rounds.len() <= round {
                rounds.push(Vec::new());
            }
            if let Some(values) = rounds.get_mut(round) {
                values.push(value);
            }
        }
    }
    let whole = rounds.into_iter().filter(|values| values.len() == experiments.len());
    let whole = whole.filter_map(|values| values.into_iter().collect::<Option<Vec<f64>>>());
    Ok(whole.filter_map(|values| stats::spread(&values)).map(|(least, most)| most / least - 1.0).collect())
}

/// Bytes that left the sources over those of the pages' contents, each counted once: of [`SEVERAL`] VMs with [`ALIKE`] in
/// common.
pub fn sent_over_unique(run: &Run) -> Option<f64> {
    let unique = filled_bytes(run)? as f64 * (1.0 - ALIKE + ALIKE / f64::from(SEVERAL));
    Some(run.report.wire_bytes.source? as f64 / unique)
}

/// A figure of one experiment over that of another, round by round; nothing of rounds that lack a run of either.
pub fn ratios(
    results: &Results,
    (above, below): (&str, &str),
    of: fn(&Run) -> Option<f64>,
) -> Result<Vec<Option<f64>>> {
    let (above, below) = (results.each(above, of)?, results.each(below, of)?);
    Ok(above.into_iter().zip(below).map(|(above, below)| Some(above? / below?)).collect())
}

/// How much sooner the sources are free with deduplication, over how much fewer bytes left them.
pub fn gained_over_saved(results: &Results, with: &str, without: &str) -> Result<Vec<f64>> {
    let sent = |run: &Run| run.report.wire_bytes.source.map(|bytes| bytes as f64);
    let gained = ratios(results, (without, with), eviction)?;
    let saved = ratios(results, (without, with), sent)?;
    Ok(gained.into_iter().zip(saved).filter_map(|(gained, saved)| Some(gained? / saved?)).collect())
}

/// Bytes a page: what a process's largest resident set beyond the VM's memory grows by, least squares over the
/// medians of each size.
pub fn rss_slope(results: &Results, rss: fn(&Report) -> Option<u64>) -> Result<Vec<f64>> {
    let mut points = Vec::new();
    for (experiment, mebibytes) in BOOKKEEPING {
        let bytes = mebibytes << 20;
        let beyond = |run: &Run| rss(&run.report).map(|rss| rss as f64 - bytes as f64);
        let values: Vec<f64> = results.each(experiment, beyond)?.into_iter().flatten().collect();
        let median = stats::median(&values).context("no runs")?;
        points.push(((bytes / PAGE_BYTES_U64) as f64, median));
    }
    Ok(vec![least_squares(&points)])
}

/// Bytes a page that intermediaries hold: what their largest resident sets beyond the pages grow by, least squares over
/// the medians of each size.
pub fn server_rss_slope(results: &Results) -> Result<Vec<f64>> {
    let mut points = Vec::new();
    for (experiment, _) in STAGED {
        let axis = |of: fn(u64, u64) -> f64| -> Result<f64> {
            let sum = |run: &Run| {
                let each = run.report.intermediaries.iter();
                each.map(|node| Some(of(node.bytes_in?, node.peak_rss_bytes?))).sum::<Option<f64>>()
            };
            let values: Vec<f64> = results.each(experiment, sum)?.into_iter().flatten().collect();
            stats::median(&values).context("no runs")
        };
        let pages = axis(|bytes_in, _| (bytes_in / PAGE_BYTES_U64) as f64)?;
        points.push((pages, axis(|bytes_in, rss| rss as f64 - bytes_in as f64)?));
    }
    Ok(vec![least_squares(&points)])
}

fn least_squares(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (mean_x, mean_y) =
        (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let above: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let below: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    above / below
}

#[cfg(test)]
mod test {
    use super::*;
    use libsg::report::{Cotenant, CpuPerGib, Ends, Faults, Latencies, Pages};

    fn run() -> Run {
        let mut report = Report { eviction_s: Some(2.0), ..Report::default() };
        report.pages = Pages { present: Some(1500), zero: Some(500), ..Pages::default() };
        report.bytes.direct = Some(1000 * PAGE_BYTES_U64);
        // Some pages went twice.
        report.bytes.staged = Some(500 * PAGE_BYTES_U64);
        report.set_link(32.768);
        report.sinks_mbps = [("destination".to_owned(), 16.384), ("i1".to_owned(), 16.384)].into();
        report.idle_fault_us = Some(50.0);
        report.cpu_s_per_gib =
            CpuPerGib { source: Some(1.5), intermediaries: Some(3.0), ..CpuPerGib::default() };
        report.cpu_s_per_gib.stream = Ends { source: Some(1.0), destination: Some(2.0) };
        let p95 = |us| Latencies { p95_us: Some(us), ..Latencies::default() };
        let (idle, migration) = (p95(100.0), p95(150.0));
        report.cotenants =
            vec![Cotenant { node: "destination".into(), idle, migration, ..Cotenant::default() }];
        Run { report, fresh_stream_mbps: Some(8.192), gathered_at_evicted_bytes: Some(250 * PAGE_BYTES_U64) }
    }

    #[test]
    fn rates_count_each_page_once_and_links_every_byte() {
        let run = run();
        let is = |got: Option<f64>, want: f64| {
            assert!((got.expect("told") - want).abs() < 1e-9, "{got:?} {want}");
        };
        is(evicted_mbps(&run), 16.384);
        is(over_sum_of_rates(&run), 0.5);
        is(link_used(&run), 0.75);
        is(destination_used(&run), 1.25);
        is(over_fresh_stream(&run), 2.0);
        is(eviction_over_bound(&run), 2.0);
        is(source_cpu_over_stream(&run), 1.5);
        let qemu = Run {
            report: Report { total_migration_s: Some(3.1), ..run.report.clone() },
            ..Run::new(Report::default(), None)
        };
        is(total_over_qemu(&qemu), 345e6 / 4_096_000.0);
        is(intermediary_cpu_over_stream(&run), 1.5);
        is(destination_cotenant(&run), 1.5);
        assert_eq!(intermediary_cotenant(&run), None);
    }

    #[test]
    fn percentiles_need_faults() {
        let mut run = run();
        run.report.faults_while_scattering =
            Faults { count: Some(FAULTS_MIN), p50_us: Some(75.0), p99_us: Some(300.0), ..Faults::default() };
        assert_eq!((fault_p50_over_idle(&run), fault_p99_us(&run)), (Some(1.5), Some(300.0)));
        run.report.faults_while_scattering.count = Some(FAULTS_MIN - 1);
        assert_eq!((fault_p50_over_idle(&run), fault_p99_us(&run)), (None, None));
    }

    #[test]
    fn slopes() {
        let line = [1.0, 2.0, 4.0].map(|x| (x, 7.0 + 12.0 * x));
        assert!((least_squares(&line) - 12.0).abs() < 1e-9);
    }
}
