//! One run: hosts, links measured, processes, migration followed to its end, verified, reported.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::CommandFactory as _;
use libsg::report::{Guest, Host, Report, Status};

use crate::beside::Beside;
use crate::cli::{Cli, MigrateArgs, Mode, Transport, Until};
use crate::cluster::Cluster;
use crate::cost::{self, Meter};
use crate::error::chained;
use crate::events::Events;
use crate::follow::{Following, Watched};
use crate::lab::{Lab, Node, Reserve};
use crate::stream::Cost;
use crate::ui::{Table, Ui};
use crate::{interrupt, micro, stream};
use libsg::units::Rate;
use vmd_rdma::verbs::kernel::{self, Choice};

/// What the links of a run carry.
struct Links {
    mbps: f64,
    sinks_mbps: BTreeMap<String, f64>,
    idle_fault_us: f64,
    /// Of a plain stream over them.
    cost: Cost,
}

/// Runs one experiment.
///
/// # Errors
/// When it could not be carried out, or was interrupted. A migration that fails is a report.
pub fn run(args: &MigrateArgs, ui: &mut Ui) -> Result<Report> {
    run_if(args, ui, |_| Ok(()))
}

/// Runs one experiment where its links are what they were set to.
///
/// # Errors
/// [`Unfit`] where they are not, before a VM was started; and as [`run`].
pub fn run_on_fit_links(args: &MigrateArgs, ui: &mut Ui) -> Result<Report> {
    run_if(args, ui, |links| {
        ensure!(fit(args, links.mbps, &links.sinks_mbps), Unfit(links.to_string()));
        Ok(())
    })
}

fn run_if(args: &MigrateArgs, ui: &mut Ui, links_do: impl FnOnce(&Links) -> Result<()>) -> Result<Report> {
    ensure!(
        args.lab.shape || (args.cut.is_empty() && args.mend.is_empty()),
        "--cut and --mend need namespaces: without (--shape off) there is no link to cut"
    );
    let parks = matches!(args.mode, Mode::ScatterGather | Mode::Hybrid) && args.lab.intermediaries > 0;
    ensure!(
        !args.park || parks,
        "--park leaves the VM at intermediaries: by scatter-gather or hybrid, and with --intermediaries"
    );
    if let Err(why) = args.check_transport() {
        bail!(why);
    }
    if args.transport == Transport::Rdma {
        kernel::open(&Choice::default()).map_err(chained)?;
    }
    let lab = Lab::create(&args.lab_spec())?;
    // Before anything is measured: packets are memory, too, and links of a machine without any measure slower.
    let mut reserve = Reserve::fill(args.memory_needed())?;
    reserve.hand_out()?;
    let links = measure(&lab, args)?;
    links_do(&links)?;
    let (events, occurred) = Events::new(args.events.as_deref(), args.injections())?;
    // Before the VM is there: its guest would work meanwhile, and that is no part of the run.
    let mut beside = Beside::start(&lab, args)?;
    let mut cluster = Cluster::start(&lab, args, &events)?;
    interrupt::check()?;
    beside.measure_before()?;
    beside.note_start(&lab);
    let mut meter = Meter::default();
    meter.note_start(&cluster);
    let start = cluster.go(args)?;
    let mut following = Following::new(args, start, &occurred);
    let followed = following.follow(&lab, &mut cluster, Watched { beside: &beside, meter: &mut meter }, ui);
    ui.end();
    if let Err(error) = followed {
        return Err(if error.is::<interrupt::Interrupted>() { error } else { error.context(cluster.logs()) });
    }
    let host = following.host();
    let end = following.length();
    let cotenants = beside.cotenants(start, host.eviction_s.map(Duration::from_secs_f64), end);
    let pressure = beside.pressure(&lab, start, end);
    let mut reports = following.reports(&mut cluster, args.until)?;
    let statistics = cluster.statistics(&lab);
    for report in &mut reports {
        report.set_link(links.mbps);
        report.sinks_mbps.clone_from(&links.sinks_mbps);
        report.idle_fault_us = Some(links.idle_fault_us);
        add_usage(report, &cluster);
        meter.add_intermediaries(report, &statistics);
    }
    let cost = meter.per_gib(&reports, links.cost);
    let failed = reports.iter().any(|report| report.status != Status::Ok);
    if failed {
        ui.say(&cluster.logs());
    }
    cluster.stop(failed || args.until == Until::Evicted)?;
    let mut whole = whole(reports, host);
    // Each VM could have a link for itself; all together have those of the hosts they start on.
    if args.vms > 1 {
        whole.line_rate_bound_s =
            whole.line_rate_bound_s.map(|s| s / f64::from(args.lab.source_hosts.min(args.vms)));
    }
    Ok(Report { cpu_s_per_gib: cost, cotenants, destination_memory: pressure, ..whole })
}

fn measure(lab: &Lab, args: &MigrateArgs) -> Result<Links> {
    let spec = args.lab_spec();
    let best = spec.best_sink();
    let mut sinks_mbps = BTreeMap::new();
    for node in spec.sinks().filter(|node| spec.shape && spec.speed(*node) < spec.speed(Node::Source)) {
        interrupt::check()?;
        let best = stream::in_band_mbps(lab, node, spec.rate_of(node).as_mbps())?;
        sinks_mbps.insert(node.to_string(), best);
    }
    let mbps = stream::link_mbps(lab, Node::Source, best)?;
    Ok(Links {
        mbps,
        cost: stream::into_fresh_memory_of(lab, Node::Source, best, cost_bytes(mbps))?,
        sinks_mbps,
        idle_fault_us: stream::idle_round_trip_us(lab, Node::Destination, Node::Source)?
            + micro::install_us()?,
    })
}

/// How long the stream is whose cost is measured: half a second, or what that comes to at 1 Gb/s.
fn cost_bytes(mbps: f64) -> usize {
    (mbps.min(1000.0) * 1e6 / 8.0 / 2.0) as usize
}

/// A run that was not made: its links do not measure what they were set to ([`stream::BAND`]).
#[derive(Debug)]
pub struct Unfit(String);

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (least, most) = (stream::BAND.start(), stream::BAND.end());
        write!(f, "a link is outside {least} to {most} of what it is set to: {}", self.0)
    }
}

impl std::error::Error for Unfit {}

impl std::fmt::Display for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} Mb/s", self.mbps)?;
        self.sinks_mbps.iter().try_for_each(|(node, mbps)| write!(f, ", {node} {mbps:.0} Mb/s"))
    }
}

fn fit(args: &MigrateArgs, mbps: f64, sinks_mbps: &BTreeMap<String, f64>) -> bool {
    let spec = args.lab_spec();
    let Some(nominal) = spec.nominal() else { return true };
    let fits = |mbps: f64, rate: Rate| stream::BAND.contains(&(mbps / rate.as_mbps()));
    let fits_its_own = |(name, mbps): (&String, &f64)| {
        name.parse::<Node>().is_ok_and(|node| fits(*mbps, spec.rate_of(node)))
    };
    sinks_mbps.iter().all(fits_its_own) && fits(mbps, nominal)
}

/// What the processes used, where they did not tell themselves.
fn add_usage(report: &mut Report, cluster: &Cluster) {
    if let Some(pair) = cluster.pairs.first() {
        let (from, to) = (pair.source.process.usage(), pair.destination.process.usage());
        report.peak_rss_bytes.source = report.peak_rss_bytes.source.or(from.peak_rss_bytes);
        report.peak_rss_bytes.destination = report.peak_rss_bytes.destination.or(to.peak_rss_bytes);
    }
    for process in &cluster.intermediaries {
        let usage = process.usage();
        if let Some(entry) =
            report.intermediaries.iter_mut().find(|entry| cost::is_it(&entry.id, &process.name))
        {
            (entry.cpu_s, entry.peak_rss_bytes) = (usage.cpu_s, usage.peak_rss_bytes);
        }
    }
}

/// The report of one VM is the whole; those of several are parts of one.
fn whole(mut reports: Vec<Report>, host: Host) -> Report {
    if reports.len() == 1 {
        return reports.remove(0);
    }
    let status = reports.iter().map(|r| &r.status).find(|s| **s != Status::Ok);
    let first = reports.first();
    let mut report = Report {
        schema: libsg::report::SCHEMA,
        status: status.cloned().unwrap_or_default(),
        mode: first.and_then(|r| r.mode.clone()),
        seed: first.and_then(|r| r.seed),
        transport: first.and_then(|r| r.transport.clone()),
        sinks_mbps: first.map(|r| r.sinks_mbps.clone()).unwrap_or_default(),
        idle_fault_us: first.and_then(|r| r.idle_fault_us),
        eviction_s: host.eviction_s,
        total_migration_s: host.total_migration_s,
        host: Some(host),
        ..Report::default()
    };
    let sum = |of: fn(&Report) -> Option<u64>| reports.iter().map(of).sum::<Option<u64>>();
    report.pages.total = sum(|r| r.pages.total);
    report.pages.present = sum(|r| r.pages.present);
    report.pages.zero = sum(|r| r.pages.zero);
    report.bytes.direct = sum(|r| r.bytes.direct);
    report.bytes.staged = sum(|r| r.bytes.staged);
    report.bytes.gathered = sum(|r| r.bytes.gathered);
    report.bytes.dedup_saved = sum(|r| r.bytes.dedup_saved);
    report.bytes.overhead = sum(|r| r.bytes.overhead);
    report.bytes.wire_total = sum(|r| r.bytes.wire_total);
    report.wire_bytes.source = sum(|r| r.wire_bytes.source);
    report.wire_bytes.destination = sum(|r| r.wire_bytes.destination);
    report.guest = Guest {
        longest_pause_ms: reports.iter().filter_map(|r| r.guest.longest_pause_ms).reduce(f64::max),
        ops_per_s: reports.iter().map(|r| r.guest.ops_per_s).sum(),
        mismatches: sum(|r| r.guest.mismatches),
        verified_pages: sum(|r| r.guest.verified_pages),
        verify_passes: reports.iter().filter_map(|r| r.guest.verify_passes).min(),
        fill_pages: sum(|r| r.guest.fill_pages),
    };
    if let Some(mbps) = reports.first().and_then(|r| r.link_mbps) {
        report.set_link(mbps);
    }
    report.vms = Some(reports);
    report
}

/// How long a run may take: four times what the slowest of its rates asks for, and then some.
pub fn time_limit(args: &MigrateArgs) -> Duration {
    let spec = args.lab_spec();
    let slowest = [spec.link_rate, spec.destination_rate, args.gather_limit]
        .into_iter()
        .filter(|rate| !rate.is_unlimited())
        .min()
        .unwrap_or(Rate::mbit(400));
    let bits = args.vm.memory.0 * u64::from(args.vms) * 8;
    let swapping = if args.destination_memory.is_some() { 300 + 120 * u64::from(args.neighbours) } else { 0 };
    match args.until {
        // Nothing is slow any more once the source has evicted.
        Until::Gathered if args.lift_at_evicted => {
            Duration::from_secs(180 + bits * 4 / slowest.0.max(100_000_000))
        }
        Until::Gathered => Duration::from_secs(60 + swapping + bits * 4 / slowest.0),
        // The destination may be as slow as it likes; post-copy waits for it nevertheless.
        Until::Evicted => Duration::from_secs(60 + bits * 4 / slowest.0.max(100_000_000)),
    }
}

/// `sg-bench migrate`: so many runs, and the report where it is wanted. The exit code.
pub fn command(args: &MigrateArgs) -> Result<u8> {
    if let Err(why) = args.check_transport() {
        Cli::command().error(clap::error::ErrorKind::ArgumentConflict, why).exit();
    }
    let mut ui = Ui::new();
    if let Some(path) = &args.events {
        std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))?;
    }
    for injection in args.injections() {
        let node = injection.when.node;
        let absent = matches!(node, Node::Intermediary(n) if n > args.lab.intermediaries);
        ensure!(
            !absent,
            "there is no {node} in this experiment (--intermediaries {})",
            args.lab.intermediaries
        );
    }
    let mut reports = Vec::new();
    for run_number in 1..=args.repeat {
        ui.begin(&format!("{} {}, run {run_number} of {}", args.mode.name(), args.vm.memory, args.repeat));
        reports.push(run(args, &mut ui)?);
    }
    let worst = reports.iter().map(|report| exit_code(&report.status)).max().unwrap_or(0);
    let values = reports.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    let json = match &values[..] {
        [one] => one.clone(),
        all => serde_json::json!({
            "runs": all,
            "median": crate::stats::fold(all, &crate::stats::median),
            "min": crate::stats::fold(all, &|v| crate::stats::spread(v).map(|s| s.0)),
            "max": crate::stats::fold(all, &|v| crate::stats::spread(v).map(|s| s.1)),
        }),
    };
    Table::beside(args.json.as_deref()).write(&json)?;
    if args.json.is_none() {
        reports.iter().for_each(|report| print!("{}", crate::table::of(&[("", report)])));
    }
    if let Some(Status::Failed(failure)) = reports.iter().map(|r| &r.status).find(|s| **s != Status::Ok) {
        eprintln!("sg-bench: the migration failed: {}", failure.message);
    }
    Ok(worst)
}

/// 0 done, 1 failed but nothing lost, 3 something was lost, 4 cancelled.
pub fn exit_code(status: &Status) -> u8 {
    match status {
        Status::Ok => 0,
        Status::Failed(failure) if !failure.lost.is_empty() => 3,
        Status::Failed(failure) => match failure.kind {
            libsg::ErrorKind::Lost => 3,
            libsg::ErrorKind::Cancelled => 4,
            _ => 1,
        },
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn report(eviction_s: f64) -> Report {
        let mut report = Report { eviction_s: Some(eviction_s), ..Report::default() };
        report.pages.present = Some(1000);
        report.set_link(950.0);
        report
    }

    #[test]
    fn several_reports_are_parts_of_one() {
        assert_eq!(whole(vec![report(2.0)], Host::default()), report(2.0));
        let host = Host { eviction_s: Some(3.0), ..Host::default() };
        let both = whole(vec![report(2.0), report(2.5)], host);
        assert_eq!((both.eviction_s, both.pages.present), (Some(3.0), Some(2000)));
        assert_eq!(both.line_rate_bound_s, report(0.0).line_rate_bound_s.map(|s| s * 2.0));
        assert_eq!(both.vms.map(|vms| vms.len()), Some(2));
    }

    #[test]
    fn a_link_counts_from_93_to_97_percent() {
        let mut args = MigrateArgs::new();
        let cost = Cost { mbps: 950.0, send_cpu_s_per_gib: 1.0, receive_cpu_s_per_gib: 1.0 };
        let mut links = Links { mbps: 950.0, sinks_mbps: BTreeMap::new(), idle_fault_us: 50.0, cost };
        assert!(fit(&args, links.mbps, &links.sinks_mbps));
        links.mbps = 920.0;
        assert!(!fit(&args, links.mbps, &links.sinks_mbps));
        links.mbps = 950.0;
        args.lab.intermediary_rate = Some(Rate::mbit(200));
        args.lab.destination_rate = Some(Rate::mbit(100));
        assert!(!fit(&args, links.mbps, &links.sinks_mbps), "the fastest sink takes 200 Mb/s");
        args.lab.shape = false;
        assert!(fit(&args, links.mbps, &links.sinks_mbps));
        args.lab.shape = true;
        links.mbps = 190.0;
        links.sinks_mbps = [("destination".to_owned(), 95.0), ("i1".to_owned(), 180.0)].into();
        assert!(!fit(&args, links.mbps, &links.sinks_mbps), "i1 is slow");
        assert_eq!(links.to_string(), "190 Mb/s, destination 95 Mb/s, i1 180 Mb/s");
    }
}
