//! The process: a VM, its control socket, and how it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use libsg::page::PAGE_BYTES_U64;
use libsg::report::{self, Status};
use libsg::units::Rate;
use libsg::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGBUS, SIGINT, SIGTERM};

use crate::cli::RunArguments;
use crate::control::{Controlled, Server};
use crate::memory::Memory;
use crate::migration::Berth;
use crate::moves::{FOREVER, Moves, Wanted};
use crate::pool::PoolView;
use crate::serial::Serial;
use crate::vm::{Verifier, Vm};

/// Exit codes, as operators know them.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed, nothing lost.
    pub const FAILED: u8 = 1;
    /// Wrong arguments.
    pub const USAGE: u8 = 2;
    /// Something was lost.
    pub const LOST: u8 = 3;
    /// Cancelled.
    pub const CANCELLED: u8 = 4;
    /// Interrupted by a signal.
    pub const INTERRUPTED: u8 = 130;
}

/// The longest that a share of the host's link holds without another word.
const SHARE_TIME_MAX: Duration = Duration::from_secs(10);

/// How the process came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Quit,
    Interrupted,
    /// The parked VM could not be had.
    Refused,
}

/// A running VMM, as its control socket sees it.
struct Vmm {
    berth: Berth,
    moves: Arc<Moves>,
    serial: Serial,
    gather_limit: u64,
    end: Sender<End>,
    ended: std::sync::atomic::AtomicBool,
}

/// Runs a VM until it is told to quit; the exit code.
///
/// # Errors
/// Whatever keeps the VM from being started.
pub fn run(arguments: &RunArguments) -> Result<u8> {
    let serial = arguments.serial.as_deref().map_or_else(|| Ok(Serial::default()), Serial::open)?;
    let berth = Berth::default();
    let (end, ends) = bounded(1);
    let secret = arguments.secret()?;
    let pool = arguments.membership()?;
    let pool = pool.map(|pool| PoolView::join(&pool, &secret, &arguments.name)).transpose()?;
    let wanted = arguments.wanted(&secret)?;
    if arguments.canary_panic_at.is_some() {
        tracing::warn!("TEST CANARY: a worker of a migration will panic on purpose");
    }
    let near = arguments.incoming.map(|address| address.ip());
    let connector = arguments.transport.connector(secret.clone(), near)?;
    let moves = Moves::new(secret, connector, pool, arguments.canary_panic_at);
    let gather_limit = arguments.gather_limit.bytes_per_s();
    let vmm = Arc::new(Vmm { berth, moves, serial, gather_limit, end, ended: false.into() });
    end_on_lost_pages()?;
    let signals = watch_signals(vmm.end.clone())?;
    match (arguments.incoming, wanted) {
        (Some(address), _) => {
            let address = vmm.moves.await_vm(address, gather_limit, &vmm.berth, vmm.serial.clone())?;
            tracing::info!(%address, "waiting for a VM");
        }
        (None, Some(wanted)) => vmm.claim_or_end(wanted)?,
        (None, None) if arguments.empty => tracing::info!("waiting to be told which VM to claim"),
        (None, None) => vmm.boot(arguments)?,
    }
    let socket = match &arguments.control {
        Some(path) => Some(Server::start(path, Arc::clone(&vmm) as Arc<dyn Controlled>)?),
        None => None,
    };
    let code = vmm.conclude(&ends);
    drop(socket);
    signals.close();
    code
}

/// A page that is lost for good ends who touches it with SIGBUS. Vcpus of KVM get an error instead;
/// a vCPU that is a thread, or the VMM itself, can only end: with the exit code that says why.
fn end_on_lost_pages() -> Result<()> {
    signal_hook::flag::register_conditional_shutdown(SIGBUS, exit::LOST.into(), Arc::new(true.into()))?;
    Ok(())
}

fn watch_signals(end: Sender<End>) -> Result<signal_hook::iterator::Handle> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let handle = signals.handle();
    let body = move || {
        for signal in signals.forever() {
            tracing::info!(signal, "told to end");
            let _ = end.try_send(End::Interrupted);
        }
    };
    std::thread::Builder::new().name("sg-signals".into()).spawn(body)?;
    Ok(handle)
}

impl Vmm {
    /// Fills the memory of a new VM and runs it.
    fn boot(&self, arguments: &RunArguments) -> Result<()> {
        let config = arguments.config()?;
        let memory = Memory::allocate(&config)?;
        let vm = Arc::new(Vm::new(config, Arc::new(memory), &self.serial)?);
        self.berth.place(Arc::clone(&vm));
        let began = Instant::now();
        vm.fill();
        let pages = vm.stats().fill_pages;
        tracing::info!(pages, seconds = began.elapsed().as_secs_f64(), "memory is filled");
        vm.run()
    }

    /// Claims a parked VM; where it cannot be had the process ends.
    fn claim_or_end(&self, wanted: Wanted) -> Result<()> {
        let incoming = self.moves.claim(wanted, self.gather_limit, &self.berth, self.serial.clone())?;
        let end = self.end.clone();
        std::thread::Builder::new().name("sg-claimed".into()).spawn(move || {
            if let Err(error) = incoming.wait_running(FOREVER) {
                tracing::error!(error = error.chain(), "the parked VM does not run here");
                let _ = end.try_send(End::Refused);
            }
        })?;
        Ok(())
    }

    fn claim(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let wanted = serde_json::from_value(Value::Object(arguments.clone())).map_err(|e| {
            let example = r#"{"do":"claim","claim":"web","intermediaries":["10.0.0.3:7701"]}"#;
            Error::new(ErrorKind::Input, format!("\"claim\" is to be like {example}")).because(e)
        })?;
        self.moves.claim(wanted, self.gather_limit, &self.berth, self.serial.clone())?;
        Ok(Map::new())
    }

    /// Waits for the end, and tells how it was.
    fn conclude(&self, ends: &Receiver<End>) -> Result<u8> {
        let end = ends.recv().unwrap_or(End::Quit);
        self.ended.store(true, std::sync::atomic::Ordering::Release);
        let Some(vm) = self.berth.vm() else {
            return Ok(match end {
                End::Quit => exit::DONE,
                End::Interrupted => exit::INTERRUPTED,
                End::Refused => exit::FAILED,
            });
        };
        let stopped = vm.stop();
        self.moves.settle();
        let has_failed = |status: Option<Status>| matches!(status, Some(Status::Failed(_)));
        // Behind COMMIT the VM is nowhere else; before it an arrival that failed leaves no VM here.
        let arrival = self.moves.destination_report().map(|report| report.status);
        if vm.stats().mismatches > 0 || !vm.lost().is_empty() || has_failed(arrival) {
            return Ok(exit::LOST);
        }
        if vm.has_left() && has_failed(self.moves.source_report().map(|report| report.status)) {
            return Ok(exit::FAILED);
        }
        stopped?;
        Ok(match end {
            End::Quit => exit::DONE,
            End::Interrupted => exit::INTERRUPTED,
            End::Refused => exit::FAILED,
        })
    }

    fn vm(&self) -> Result<Arc<Vm>> {
        self.berth.vm().ok_or_else(|| Error::new(ErrorKind::Vm, "no VM has arrived yet"))
    }

    fn report(&self) -> Result<Map<String, Value>> {
        let (source, destination) = (self.moves.source_report(), self.moves.destination_report());
        let Some(vm) = self.berth.vm() else {
            let status = destination.as_ref().map_or(&Status::Ok, |report| &report.status);
            return Ok(object(json!({
                "schema": report::SCHEMA, "status": status, "vm": null, "seed": null, "guest": null,
                "source": source, "destination": destination,
            })));
        };
        let stats = vm.stats();
        let status = match (&stats.failure, vm.lost()) {
            (None, lost) if lost.is_empty() => Status::Ok,
            (Some(failure), lost) if lost.is_empty() => Status::from(&Error::new(ErrorKind::Vm, failure)),
            (_, lost) => Status::from(&Error::new(ErrorKind::Lost, "pages are lost").about(lost)),
        };
        Ok(object(json!({
            "schema": report::SCHEMA,
            "status": status,
            "vm": vm.config(),
            "seed": vm.config().seed,
            "guest": stats,
            "source": source,
            "destination": destination,
        })))
    }

    fn limit(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let rate = |name: &str| -> Result<Option<u64>> {
            let text: Option<String> = argument(arguments, name, "a rate such as \"256mbit\"")?;
            text.map(|text| text.parse::<Rate>().map(Rate::bytes_per_s)).transpose()
        };
        self.moves.limit(rate("gather")?, rate("scatter")?)?;
        Ok(Map::new())
    }

    /// What somebody who has it leave needs to know before.
    fn describe(&self) -> Result<Map<String, Value>> {
        let Some(vm) = self.berth.vm() else {
            return Ok(object(json!({ "vm": null, "state": "empty" })));
        };
        let present_pages = vm.memory().guest().presence()?.count();
        Ok(object(json!({
            "vm": vm.config().name,
            "state": self.moves.state(&vm),
            "memory_bytes": vm.config().memory_bytes,
            "present_bytes": u64::from(present_pages) * PAGE_BYTES_U64,
        })))
    }

    fn share(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let bytes_per_s = argument(arguments, "bytes_per_s", "bytes a second, or null")?.unwrap_or(None);
        let valid_ms: u64 = argument(arguments, "for_ms", "milliseconds")?.unwrap_or(0);
        let valid = Duration::from_millis(valid_ms).min(SHARE_TIME_MAX);
        Ok(object(self.moves.share(bytes_per_s, valid)))
    }

    fn start(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let what = serde_json::from_value(Value::Object(arguments.clone())).map_err(|e| {
            let example = r#"{"do":"start","mode":"scatter-gather","to":"10.0.0.2:7700","intermediaries":["10.0.0.3:7701"]}"#;
            Error::new(ErrorKind::Input, format!("\"start\" is to be like {example}")).because(e)
        })?;
        let selection = self.moves.start(&self.vm()?, what)?;
        Ok(selection.map(|selection| object(json!({ "selection": selection }))).unwrap_or_default())
    }

    /// Both at once: a VM that is told to pause gives its state, which is thrown away here.
    fn pause(&self) -> Result<Map<String, Value>> {
        let vm = self.vm()?;
        let began = Instant::now();
        let state = vm.pause()?;
        let took_us = began.elapsed().as_secs_f64() * 1e6;
        let adds_up = vm.writes_add_up();
        Ok(object(json!({ "state_bytes": state.len(), "took_us": took_us, "writes_add_up": adds_up })))
    }

    fn verify(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let by = argument(arguments, "by", "\"guest\" or \"vmm\"")?.unwrap_or(Verifier::Guest);
        let stats = self.vm()?.verify(by, || self.ending())?;
        Ok(object(json!({ "guest": stats })))
    }

    fn spoil(&self, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        let page = argument(arguments, "page", "a page of the workload")?
            .ok_or_else(|| Error::new(ErrorKind::Input, "\"page\" says which page to spoil"))?;
        self.vm()?.spoil(page)?;
        Ok(Map::new())
    }
}

/// One argument of a command, if it is there.
fn argument<T: DeserializeOwned>(
    arguments: &Map<String, Value>,
    name: &str,
    what: &str,
) -> Result<Option<T>> {
    let Some(value) = arguments.get(name) else { return Ok(None) };
    serde_json::from_value(value.clone())
        .map(Some)
        .map_err(|e| Error::new(ErrorKind::Input, format!("{name:?} is to be {what}")).because(e))
}

impl Controlled for Vmm {
    fn command(&self, name: &str, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        match name {
            "start" => self.start(arguments),
            "claim" => self.claim(arguments),
            "progress" => {
                let sample = self.moves.sample(self.berth.vm().as_deref());
                Ok(object(json!({ "sample": sample })))
            }
            "describe" => self.describe(),
            "share" => self.share(arguments),
            "limit" => self.limit(arguments),
            "cancel" => self.moves.cancel().map(|()| Map::new()),
            "stats" => Ok(object(json!({ "guest": self.vm()?.stats() }))),
            "report" => self.report(),
            "verify" => self.verify(arguments),
            "pause" => self.pause(),
            "resume" => self.vm()?.run().map(|()| Map::new()),
            "spoil" => self.spoil(arguments),
            "quit" => {
                let _ = self.end.try_send(End::Quit);
                Ok(Map::new())
            }
            other => Err(Error::new(
                ErrorKind::Input,
                format!(
                    "no command {other:?}: there are describe, start, share, claim, progress, limit, cancel, report, stats, verify, pause, \
                     resume, spoil, quit"
                ),
            )),
        }
    }

    fn ending(&self) -> bool {
        self.ended.load(std::sync::atomic::Ordering::Acquire)
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}
