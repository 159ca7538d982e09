//! `sg gather`: VMs arrive, or are claimed, and are followed until they hold all of their memory.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use libsg::report::{DestinationReport, Report, SCHEMA, Sample, Status};
use serde_json::json;
use vmms::{ControlSocket, Vmm as _, Wanted};

use super::args::GatherArgs;
use super::show::{Row, Show};
use super::{INTERRUPTED, addresses, interruptible, told, write_json};
use crate::cli::{LogFormat, WrongArguments};
use crate::logs;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(200);

/// A VMM that does not answer for so long is dead, or as good as.
const SILENT: Duration = Duration::from_secs(10);

/// One VM that arrives.
struct Arrival {
    socket: PathBuf,
    vmm: ControlSocket,
    sample: Sample,
    heard: Instant,
    report: Option<DestinationReport>,
    /// It cannot be followed any more: why.
    failed: Option<String>,
}

/// Follows them; the exit code.
pub fn run(args: &GatherArgs) -> Result<u8> {
    logs::start(LogFormat::Text, logs::COMMAND);
    let interrupted = interruptible()?;
    if let Some(socket) = &args.qmp {
        return super::qemu::gather(args, socket, &interrupted);
    }
    let sockets = args.vmms.find()?;
    if !args.claim.is_empty() && args.claim.len() != sockets.len() {
        let what = format!("{} VMs to claim, and {} VMMs to run them", args.claim.len(), sockets.len());
        return Err(WrongArguments(what).into());
    }
    let mut arrivals: Vec<Arrival> = sockets.into_iter().map(Arrival::new).collect();
    let intermediaries = if args.claim.is_empty() { Vec::new() } else { addresses(&args.at)? };
    for (arrival, name) in arrivals.iter_mut().zip(&args.claim) {
        let wanted =
            Wanted { claim: name.clone(), intermediaries: intermediaries.clone(), force: args.force };
        arrival.failed = arrival.vmm.claim(&wanted).err().map(|error| format!("{error:#}"));
    }
    for arrival in arrivals.iter_mut().filter(|arrival| arrival.failed.is_none()) {
        let limited = args.limit.map(|limit| arrival.vmm.limit(None, Some(limit)));
        arrival.failed = limited.and_then(Result::err).map(|error| format!("{error:#}"));
    }
    let (began, mut show) = (Instant::now(), Show::new("gathered", arrivals.len()));
    while !interrupted.load(Ordering::Acquire) && arrivals.iter().any(|arrival| !arrival.is_over()) {
        arrivals.iter_mut().filter(|arrival| !arrival.is_over()).for_each(Arrival::look);
        let rows: Vec<Row> = arrivals.iter().map(Arrival::row).collect();
        show.rows(&rows, began.elapsed());
        std::thread::sleep(LOOK);
    }
    show.end();
    arrivals.iter().for_each(Arrival::print);
    let vms: Vec<_> = arrivals.iter().map(Arrival::told).collect();
    let failed = vms.iter().map(|vm| &vm["status"]).find(|status| **status != "ok");
    let status = failed.cloned().unwrap_or_else(|| "ok".into());
    write_json(args.json.as_deref(), &json!({ "schema": SCHEMA, "status": status, "vms": vms }))?;
    let code = arrivals.iter().map(Arrival::code).max_by_key(|code| told::severity(*code)).unwrap_or(0);
    let unfinished = arrivals.iter().any(|arrival| !arrival.is_over());
    Ok(if unfinished { INTERRUPTED } else { code })
}

impl Arrival {
    fn new(socket: PathBuf) -> Self {
        let vmm = ControlSocket::new(&socket);
        Self { socket, vmm, sample: Sample::default(), heard: Instant::now(), report: None, failed: None }
    }

    fn is_over(&self) -> bool {
        self.report.is_some() || self.failed.is_some()
    }

    /// A report is there when all is, or when it failed.
    fn look(&mut self) {
        let looked = self.vmm.progress().and_then(|sample| {
            self.sample = sample;
            self.vmm.report()
        });
        match looked {
            Ok((_, report)) => (self.heard, self.report) = (Instant::now(), report),
            Err(error) if self.heard.elapsed() > SILENT => self.failed = Some(format!("{error:#}")),
            Err(_) => {}
        }
    }

    fn name(&self) -> String {
        self.socket.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn row(&self) -> Row {
        let bytes = self.sample.bytes.direct.unwrap_or(0) + self.sample.bytes.gathered.unwrap_or(0);
        let percent = self.sample.gathered_percent.unwrap_or(0.0);
        Row { name: self.name(), percent, bytes, over: self.is_over() }
    }

    fn print(&self) {
        let said = match (&self.failed, self.report.as_ref().map(|report| &report.status)) {
            (Some(why), _) => why.clone(),
            (None, None) => "not all there yet: it goes on".into(),
            (None, Some(Status::Ok)) => "gathered".into(),
            (None, Some(Status::Failed(failure))) => failure.message.clone(),
        };
        eprintln!("{}: {said}", self.socket.display());
    }

    fn told(&self) -> serde_json::Value {
        let mut report = json!(Report::merged(None, self.report.as_ref()));
        if let Some(why) = &self.failed {
            report["status"] = json!({ "kind": "unreachable", "message": why, "lost": [] });
        }
        report["socket"] = json!(self.socket);
        report
    }

    fn code(&self) -> u8 {
        match (&self.failed, &self.report) {
            (Some(_), _) => 1,
            (None, Some(report)) => told::code(&report.status),
            (None, None) => 0,
        }
    }
}
