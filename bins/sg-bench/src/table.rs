//! Reports side by side, for people.

use std::fmt::Write as _;

use libsg::page::PAGE_BYTES_U64;
use libsg::report::{Cotenant, Latencies, Neighbour, Pressure, Report, Status};

/// How a figure is shown.
type Cell = fn(&Report) -> String;

/// One line for each figure, one column for each report.
pub fn of(reports: &[(&str, &Report)]) -> String {
    let rows: [(&str, Cell); 15] = [
        ("eviction time", |r| seconds(r.eviction_s)),
        ("  at the link's rate", |r| seconds(r.line_rate_bound_s)),
        ("total migration time", |r| seconds(r.total_migration_s)),
        ("downtime", |r| known(r.downtime_s, |s| format!("{:.1} ms", s * 1e3))),
        ("guest's longest pause", |r| known(r.guest.longest_pause_ms, |ms| format!("{ms:.1} ms"))),
        ("direct", |r| megabytes(r.bytes.direct)),
        ("to intermediaries", |r| megabytes(r.bytes.staged)),
        ("from intermediaries", |r| megabytes(r.bytes.gathered)),
        ("faults", |r| known(r.faults.count, |n| n.to_string())),
        ("  half within", |r| known(r.faults.p50_us, |us| format!("{us:.0} us"))),
        ("  99 of 100 within", |r| known(r.faults.p99_us, |us| format!("{us:.0} us"))),
        ("CPU s/GiB, source", |r| cost(r.cpu_s_per_gib.source, r.cpu_s_per_gib.stream.source)),
        ("  intermediaries", |r| cost(r.cpu_s_per_gib.intermediaries, r.cpu_s_per_gib.stream.destination)),
        ("  destination", |r| cost(r.cpu_s_per_gib.destination, r.cpu_s_per_gib.stream.destination)),
        ("self-check", verdict),
    ];
    let mut text = String::new();
    if reports.iter().any(|(title, _)| !title.is_empty()) {
        let titles: String = reports.iter().map(|(title, _)| format!("{title:>22}")).collect();
        let _ = writeln!(text, "{:22}{titles}", "");
    }
    let mut line = |name: &str, cell: &dyn Fn(&Report) -> String| {
        let cells: String = reports.iter().map(|(_, report)| format!("{:>22}", cell(report))).collect();
        let _ = writeln!(text, "{name:22}{cells}");
    };
    for (name, cell) in rows {
        line(name, &cell);
    }
    let mut nodes: Vec<_> = reports.iter().flat_map(|(_, r)| &r.cotenants).map(|c| &c.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    for node in nodes {
        let of = |report: &Report, which: fn(&Cotenant) -> Latencies| {
            let cotenant = report.cotenants.iter().find(|cotenant| cotenant.node == *node);
            known(cotenant, |cotenant| percentiles(&which(cotenant)))
        };
        line(&format!("co-tenant {node}"), &|report| of(report, |cotenant| cotenant.idle));
        line("  while it migrates", &|report| of(report, |cotenant| cotenant.migration));
    }
    if reports.iter().any(|(_, report)| report.destination_memory.is_some()) {
        line("swapped out, in", &|report| known(report.destination_memory.as_ref(), swapped));
        line("neighbours' passes/s", &|report| known(report.destination_memory.as_ref(), passes));
    }
    text
}

/// Half, 95 and 99 of 100 within.
fn percentiles(latencies: &Latencies) -> String {
    let us = |value: Option<f64>| known(value, |us| format!("{us:.0}"));
    format!("{}/{}/{} us", us(latencies.p50_us), us(latencies.p95_us), us(latencies.p99_us))
}

fn swapped(pressure: &Pressure) -> String {
    let bytes = |pages: Option<u64>| megabytes(pages.map(|pages| pages * PAGE_BYTES_U64));
    format!("{}, {}", bytes(pressure.pswpout), bytes(pressure.pswpin))
}

/// Before and during, of all neighbours.
fn passes(pressure: &Pressure) -> String {
    let sum = |of: fn(&Neighbour) -> Option<f64>| {
        known(pressure.neighbours.iter().map(of).sum::<Option<f64>>(), |sum| format!("{sum:.1}"))
    };
    format!("{} to {}", sum(|n| n.passes_per_s_before), sum(|n| n.passes_per_s_during))
}

/// Beside what a plain stream's end costs.
fn cost(ours: Option<f64>, plain: Option<f64>) -> String {
    known(ours, |ours| known(plain, |plain| format!("{ours:.2} (plain {plain:.2})")))
}

fn known<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

fn seconds(value: Option<f64>) -> String {
    known(value, |s| format!("{s:.2} s"))
}

fn megabytes(value: Option<u64>) -> String {
    known(value, |bytes| format!("{:.0} MB", bytes as f64 / 1e6))
}

/// Whether the guest found every page as it had written it.
fn verdict(report: &Report) -> String {
    let guest = &report.guest;
    match (&report.status, guest.mismatches, guest.verified_pages) {
        (Status::Failed(failure), ..) => format!("FAILED ({:?})", failure.kind),
        (_, Some(0), Some(pages)) if pages > 0 && Some(pages) >= guest.fill_pages => {
            format!("{pages} pages good")
        }
        (_, Some(0), Some(pages)) => format!("only {pages} verified"),
        (_, Some(wrong), _) => format!("{wrong} pages WRONG"),
        (_, None, _) => "not checked".to_owned(),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use libsg::report::Guest;

    #[test]
    fn columns_and_verdicts() {
        let mut report = Report { eviction_s: Some(3.5), ..Report::default() };
        assert_eq!(verdict(&report), "not checked");
        report.guest =
            Guest { mismatches: Some(0), verified_pages: Some(9), fill_pages: Some(9), ..Guest::default() };
        assert_eq!(verdict(&report), "9 pages good");
        report.guest.verified_pages = Some(8);
        assert_eq!(verdict(&report), "only 8 verified");
        report.guest.mismatches = Some(1);
        assert_eq!(verdict(&report), "1 pages WRONG");
        let text = of(&[("post-copy", &report), ("scatter-gather", &report)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|line| line.len() == 66), "{text}");
        assert!(lines[1].starts_with("eviction time") && lines[1].ends_with("3.50 s"));

        let latencies = |us| Latencies { p50_us: Some(us), p95_us: Some(us * 2.0), ..Latencies::default() };
        let (idle, migration) = (latencies(60.0), latencies(70.0));
        report.cotenants = vec![Cotenant { node: "i1".into(), idle, migration, ..Cotenant::default() }];
        let neighbour = Neighbour { passes_per_s_before: Some(2.0), ..Neighbour::default() };
        let pressure = Pressure { pswpout: Some(1000), neighbours: vec![neighbour], ..Pressure::default() };
        report.destination_memory = Some(pressure);
        let text = of(&[("", &report)]);
        let ends: Vec<_> = text.lines().rev().take(4).map(|line| line[22..].trim()).collect();
        assert_eq!(ends, ["2.0 to -", "4 MB, -", "70/140/- us", "60/120/- us"]);
    }
}
