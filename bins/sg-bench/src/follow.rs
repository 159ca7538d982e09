//! Follows a migration from the outside: events as they come, both ends' progress each 100 ms.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use crossbeam::channel::{Receiver, RecvTimeoutError};
use libsg::ErrorKind;
use libsg::report::{Bytes, DestinationReport, Failure, Guest, Host, Report, Sample, SourceReport, Status};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::beside::Beside;
use crate::cli::{MigrateArgs, Until};
use crate::cluster::{Cluster, Pair};
use crate::cost::Meter;
use crate::events::{Harm, Occurred};
use crate::experiment::time_limit;
use crate::interrupt;
use crate::lab::{Lab, Node};
use crate::ui::Ui;

const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// What a verification pass goes over at least, on a busy or swapping machine.
const VERIFY_BYTES_PER_S: u64 = 4 << 20;

/// What is known of one VM.
#[derive(Default)]
struct Followed {
    evicted: Option<Instant>,
    gathered: Option<Instant>,
    failed: Failures,
    source: Option<SourceReport>,
    /// The source's process has ended, and nothing that it told is left to be taken.
    source_gone: bool,
    samples: Vec<Sample>,
}

/// What each end says that it failed with.
#[derive(Default)]
struct Failures {
    source: Option<Failure>,
    destination: Option<Failure>,
}

impl Failures {
    fn note(&mut self, node: Node, failure: Failure) {
        let end = if node == Node::Source { &mut self.source } else { &mut self.destination };
        end.get_or_insert(failure);
    }

    fn are_known(&self) -> bool {
        self.source.is_some() || self.destination.is_some()
    }

    /// What the migration failed with. What is lost is lost, whoever says so; of anything else the destination knows
    /// most, for it was told why a source gave up.
    fn verdict(self) -> Option<Failure> {
        let lost = |failure: &Failure| failure.kind == ErrorKind::Lost;
        if self.source.as_ref().is_some_and(lost) { self.source } else { self.destination.or(self.source) }
    }
}

/// What is watched beside the migration.
pub struct Watched<'a> {
    /// Co-tenants and neighbours.
    pub beside: &'a Beside,
    /// Processor time.
    pub meter: &'a mut Meter,
}

/// A run that goes on.
pub struct Following<'a> {
    args: &'a MigrateArgs,
    start: Instant,
    occurred: &'a Receiver<Occurred>,
    vms: Vec<Followed>,
    /// When limits were lifted, or else the end of the run.
    end: Option<Instant>,
}

impl<'a> Following<'a> {
    /// From its start.
    pub fn new(args: &'a MigrateArgs, start: Instant, occurred: &'a Receiver<Occurred>) -> Self {
        let vms = (0..args.vms).map(|_| Followed::default()).collect();
        Self { args, start, occurred, vms, end: None }
    }

    /// To its end: evicted or gathered, as the arguments want, or failed.
    ///
    /// # Errors
    /// A process ended that nobody killed, the run takes too long, or was interrupted.
    pub fn follow(&mut self, lab: &Lab, cluster: &mut Cluster, watched: Watched, ui: &mut Ui) -> Result<()> {
        let limit = time_limit(self.args);
        let mut next_sample = self.start;
        let (mut to_claim, mut to_lift) = (self.args.park, self.args.lift_at_evicted);
        loop {
            interrupt::check()?;
            self.take_events(next_sample, ui);
            if self.vms.iter().all(|vm| vm.evicted.is_some()) {
                watched.meter.note_evicted(lab, cluster);
                if std::mem::take(&mut to_claim) && self.args.until == Until::Gathered {
                    cluster.claim()?;
                }
                if std::mem::take(&mut to_lift) {
                    self.end = Some(Instant::now());
                    lab.lift()?;
                    // What is parked is not gathered yet.
                    if !self.args.park || self.args.until == Until::Gathered {
                        cluster.lift()?;
                    }
                }
            }
            if self.is_over() {
                self.end.get_or_insert_with(Instant::now);
                // The last sample shows the end.
                self.sample(cluster, watched.beside, ui);
                return Ok(());
            }
            if Instant::now() >= next_sample {
                next_sample = Instant::now() + SAMPLE_EVERY;
                self.sample(cluster, watched.beside, ui);
                self.check_processes(cluster)?;
                watched.beside.check()?;
                self.see_who_left(cluster, ui);
            }
            if self.start.elapsed() > limit {
                bail!("no end after {} s", limit.as_secs());
            }
        }
    }

    fn take_events(&mut self, until: Instant, ui: &Ui) {
        loop {
            match self.occurred.recv_deadline(until) {
                Ok(occurred) => self.take(&occurred, ui),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
            if self.is_over() {
                return;
            }
        }
    }

    fn take(&mut self, occurred: &Occurred, ui: &Ui) {
        let message = occurred.line["message"].as_str().unwrap_or_default();
        let Some(vm) = self.vms.get_mut(occurred.vm) else { return };
        if occurred.node == Node::Source && !occurred.line["report"].is_null() {
            vm.source = part(&occurred.line, "report");
        }
        match &*occurred.event {
            "evicted" if vm.evicted.is_none() => vm.evicted = Some(occurred.at),
            "gathered" if vm.gathered.is_none() => vm.gathered = Some(occurred.at),
            "lost" => {
                let lost = serde_json::from_value(occurred.line["pages"].clone()).unwrap_or_default();
                let message = format!("pages were lost, {} tells", occurred.node);
                vm.failed.note(occurred.node, Failure { kind: ErrorKind::Lost, message, lost });
            }
            "failed" => {
                let kind = serde_json::from_value(occurred.line["kind"].clone()).unwrap_or(ErrorKind::System);
                let message = format!("{}: {message}", occurred.node);
                vm.failed.note(occurred.node, Failure { kind, message, lost: Vec::new() });
            }
            "warning" | "node-lost" | "node-replaced" => {
                let at = occurred.at.saturating_duration_since(self.start).as_secs_f64();
                ui.say(&format!("  {at:6.1} s  {}: {message}", occurred.node));
            }
            _ => {}
        }
    }

    fn is_over(&self) -> bool {
        self.vms.iter().all(|vm| {
            vm.failed.are_known()
                || match self.args.until {
                    Until::Evicted => vm.evicted.is_some(),
                    // A source that was killed earlier than that will never tell.
                    Until::Gathered => vm.gathered.is_some() && (vm.evicted.is_some() || vm.source_gone),
                }
        })
    }

    /// Notes sources that have ended, after everything that they told was taken: the last word of one that is
    /// killed when it has evicted is its report.
    fn see_who_left(&mut self, cluster: &Cluster, ui: &Ui) {
        for (number, pair) in cluster.pairs.iter().enumerate() {
            if pair.source.process.is_silent() {
                while let Ok(occurred) = self.occurred.try_recv() {
                    self.take(&occurred, ui);
                }
                if let Some(vm) = self.vms.get_mut(number) {
                    vm.source_gone = true;
                }
            }
        }
    }

    /// A process that ended without being told to, or killed by plan, makes the run worthless.
    fn check_processes(&self, cluster: &Cluster) -> Result<()> {
        let planned = |node: Node| {
            self.args.injections().iter().any(|plan| plan.harm == Harm::Kill && plan.when.node == node)
        };
        for (pair, vm) in cluster.pairs.iter().zip(&self.vms) {
            if !planned(Node::Source) && vm.evicted.is_none() {
                pair.source.process.check()?;
            }
            if !planned(Node::Destination) && !vm.failed.are_known() {
                pair.destination.process.check()?;
            }
        }
        for (process, number) in cluster.intermediaries.iter().zip(1..) {
            if !planned(Node::Intermediary(number)) {
                process.check()?;
            }
        }
        Ok(())
    }

    fn sample(&mut self, cluster: &mut Cluster, beside: &Beside, ui: &mut Ui) {
        let t_s = self.start.elapsed().as_secs_f64();
        let cotenants_p95_us = beside.recent_p95_us();
        for (pair, vm) in cluster.pairs.iter_mut().zip(&mut self.vms) {
            let before = vm.samples.last().cloned().unwrap_or_default();
            let sample = sample_of(pair, &before, t_s, vm.evicted.is_some());
            vm.samples.push(Sample { cotenants_p95_us: cotenants_p95_us.clone(), ..sample });
        }
        let latest: Vec<&Sample> = self.vms.iter().filter_map(|vm| vm.samples.last()).collect();
        ui.show(&together(&latest, t_s));
    }

    /// Each VM's report; verified first, when it was to be gathered.
    pub fn reports(&mut self, cluster: &mut Cluster, until: Until) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for (pair, vm) in cluster.pairs.iter_mut().zip(&mut self.vms) {
            reports.push(report_of(pair, vm, self.args, self.start, until)?);
        }
        Ok(reports)
    }

    /// From the start to the end of the run, or to where limits were lifted: from there on it is another one.
    pub fn length(&self) -> Duration {
        self.end.map_or_else(|| self.start.elapsed(), |end| end - self.start)
    }

    /// First start to the last VM's end.
    pub fn host(&self) -> Host {
        let last = |of: fn(&Followed) -> Option<Instant>| {
            let ends: Option<Vec<Instant>> = self.vms.iter().map(of).collect();
            ends?.into_iter().max().map(|end| (end - self.start).as_secs_f64())
        };
        let bytes = self.vms.iter().filter_map(|vm| vm.samples.last());
        let bytes = bytes.map(|s| Some(s.bytes.direct.unwrap_or(0) + s.bytes.staged?));
        Host {
            eviction_s: last(|vm| vm.evicted),
            total_migration_s: last(|vm| vm.gathered),
            bytes: bytes.sum(),
        }
    }
}

fn part<T: DeserializeOwned>(answer: &Value, key: &str) -> Option<T> {
    match &answer[key] {
        Value::Null => None,
        value => serde_json::from_value(value.clone())
            .inspect_err(|error| tracing::warn!("the VMM's {key} is not what it must be: {error}"))
            .ok(),
    }
}

/// What both ends know now; where one does not answer (any more), what it knew before.
fn sample_of(pair: &mut Pair, before: &Sample, t_s: f64, evicted: bool) -> Sample {
    let from = pair.source.control.ask("progress").ok();
    let to = pair.destination.control.ask("progress").ok();
    let from: Sample = from.and_then(|answer| part(&answer, "sample")).unwrap_or_default();
    let to: Sample = to.and_then(|answer| part(&answer, "sample")).unwrap_or_default();
    let evicted_percent = if evicted { Some(100.0) } else { from.evicted_percent };
    Sample {
        t_s,
        guest_ops: to.guest_ops.max(from.guest_ops).max(before.guest_ops),
        bytes: Bytes {
            direct: from.bytes.direct.max(to.bytes.direct).max(before.bytes.direct),
            staged: from.bytes.staged.or(before.bytes.staged),
            gathered: to.bytes.gathered.or(before.bytes.gathered),
            ..Bytes::default()
        },
        faults: to.faults.or(before.faults),
        evicted_percent: evicted_percent.or(before.evicted_percent),
        gathered_percent: to.gathered_percent.or(before.gathered_percent),
        ..Sample::default()
    }
}

/// Several VMs at one moment: sums, and means of percents.
fn together(samples: &[&Sample], t_s: f64) -> Sample {
    let sum = |of: fn(&Sample) -> Option<u64>| samples.iter().filter_map(|s| of(s)).reduce(|a, b| a + b);
    let mean = |of: fn(&Sample) -> Option<f64>| {
        let known: Vec<f64> = samples.iter().filter_map(|s| of(s)).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / samples.len() as f64)
    };
    Sample {
        t_s,
        guest_ops: sum(|s| s.guest_ops),
        bytes: Bytes {
            direct: sum(|s| s.bytes.direct),
            staged: sum(|s| s.bytes.staged),
            gathered: sum(|s| s.bytes.gathered),
            ..Bytes::default()
        },
        faults: sum(|s| s.faults),
        evicted_percent: mean(|s| s.evicted_percent),
        gathered_percent: mean(|s| s.gathered_percent),
        cotenants_p95_us: samples.first().map(|s| s.cotenants_p95_us.clone()).unwrap_or_default(),
    }
}

fn report_of(
    pair: &mut Pair,
    vm: &mut Followed,
    args: &MigrateArgs,
    start: Instant,
    until: Until,
) -> Result<Report> {
    let from = pair.source.control.request(&json!({"do": "report"}), Duration::from_secs(5)).ok();
    let to = pair.destination.control.request(&json!({"do": "report"}), Duration::from_secs(5)).ok();
    let source = from.and_then(|answer| part(&answer, "source")).or(vm.source.take());
    let destination: Option<DestinationReport> = to.as_ref().and_then(|answer| part(answer, "destination"));
    let mut guest: Guest = to.as_ref().and_then(|answer| part(answer, "guest")).unwrap_or_default();
    if until == Until::Gathered && !vm.failed.are_known() {
        // After the report: what verification costs the guest is not what the migration cost it.
        let limit = Duration::from_secs(60 + args.vm.memory.0 / VERIFY_BYTES_PER_S);
        let answer = pair.destination.control.request(&json!({"do": "verify"}), limit);
        let answer = answer.context("the guest's verification of every page")?;
        let verified: Guest = part(&answer, "guest").unwrap_or_default();
        guest = Guest { longest_pause_ms: guest.longest_pause_ms, ops_per_s: guest.ops_per_s, ..verified };
    }
    let mut report = Report::merged(source.as_ref(), destination.as_ref());
    report.mode = Some(args.mode.name().to_owned());
    report.seed = Some(args.vm.seed);
    report.transport = Some(args.transport.name().to_owned());
    report.guest = guest;
    // Where an end could not tell any more, this process's clock did see the event.
    let seen = |at: Option<Instant>| at.map(|at| (at - start).as_secs_f64());
    report.eviction_s = report.eviction_s.or(seen(vm.evicted));
    // Of a VM that was parked, the destination knows only since when it has claimed it.
    let told = report.total_migration_s.filter(|_| !args.park);
    report.total_migration_s = told.or(seen(vm.gathered));
    report.samples = std::mem::take(&mut vm.samples);
    if let Some(failure) = std::mem::take(&mut vm.failed).verdict()
        && !matches!(&report.status, Status::Failed(told) if !told.lost.is_empty())
    {
        report.status = Status::Failed(failure);
    }
    Ok(report)
}

#[cfg(test)]
mod test {
    use super::*;
    use crossbeam::channel::unbounded;

    fn told(node: Node, event: &str, line: Value) -> Occurred {
        Occurred { vm: 0, node, event: event.into(), at: Instant::now(), line }
    }

    #[test]
    fn it_is_over_when_what_was_asked_for_happened() {
        let (_sender, receiver) = unbounded();
        let ui = Ui::new();
        let gathered = MigrateArgs::new();
        let mut following = Following::new(&gathered, Instant::now(), &receiver);
        following.take(&told(Node::Destination, "gathered", json!({})), &ui);
        assert!(!following.is_over(), "the source has not evicted yet");
        following.vms[0].source_gone = true;
        assert!(following.is_over(), "it never will");
        following.vms[0].source_gone = false;
        let report = SourceReport { eviction_s: Some(2.0), ..SourceReport::default() };
        following.take(&told(Node::Source, "evicted", json!({"report": report})), &ui);
        assert!(following.is_over());
        assert_eq!(following.vms[0].source, Some(report));
        let host = following.host();
        assert!(host.eviction_s.is_some() && host.total_migration_s <= host.eviction_s);

        let evicted = MigrateArgs { until: Until::Evicted, ..gathered };
        let mut following = Following::new(&evicted, Instant::now(), &receiver);
        following.take(&told(Node::Source, "scattered=100%", json!({})), &ui);
        assert!(!following.is_over());
        following.take(&told(Node::Source, "evicted", json!({})), &ui);
        assert!(following.is_over());
    }

    #[test]
    fn lost_pages_end_it_with_their_numbers() {
        let (_sender, receiver) = unbounded();
        let args = MigrateArgs::new();
        let mut following = Following::new(&args, Instant::now(), &receiver);
        let pages = json!({"pages": [{"first": 7, "pages": 2}]});
        following.take(&told(Node::Destination, "lost", pages), &Ui::new());
        assert!(following.is_over());
        let failure = std::mem::take(&mut following.vms[0].failed).verdict().expect("failed");
        assert_eq!((failure.kind, failure.lost[0].pages), (ErrorKind::Lost, 2));
        assert_eq!(crate::experiment::exit_code(&Status::Failed(failure)), 3);
    }

    #[test]
    fn who_cancels_is_told_so_by_the_exit_code() {
        let (_sender, receiver) = unbounded();
        let args = MigrateArgs::new();
        let failed = |node, kind: ErrorKind| told(node, "failed", json!({"kind": kind, "message": "x"}));
        for (from, to, code) in [
            (ErrorKind::Cancelled, ErrorKind::Cancelled, 4),
            (ErrorKind::Vm, ErrorKind::Vm, 1),
            (ErrorKind::Vm, ErrorKind::Full, 1),
            (ErrorKind::Cancelled, ErrorKind::Lost, 3),
            (ErrorKind::Lost, ErrorKind::Unreachable, 3),
        ] {
            let mut following = Following::new(&args, Instant::now(), &receiver);
            following.take(&failed(Node::Destination, to), &Ui::new());
            assert!(following.is_over());
            following.take(&failed(Node::Source, from), &Ui::new());
            let failure = std::mem::take(&mut following.vms[0].failed).verdict().expect("failed");
            assert_eq!(crate::experiment::exit_code(&Status::Failed(failure)), code, "{from:?} and {to:?}");
        }
    }

    #[test]
    fn several_vms_show_as_one() {
        let one =
            |ops, percent| Sample { guest_ops: Some(ops), evicted_percent: percent, ..Sample::default() };
        let both = together(&[&one(5, Some(100.0)), &one(7, None)], 1.5);
        assert_eq!((both.t_s, both.guest_ops, both.evicted_percent), (1.5, Some(12), Some(50.0)));
        assert_eq!(both.gathered_percent, None);
    }
}
