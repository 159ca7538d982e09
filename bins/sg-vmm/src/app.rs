//! The process: a VM, its control socket, and how it ends.

use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, bounded};
use libsg::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cli::RunArguments;
use crate::control::{Controlled, Server, error_value};
use crate::memory::Memory;
use crate::serial::Serial;
use crate::vm::{Verifier, Vm};

/// Version of the report's form.
const REPORT_SCHEMA: u32 = 1;

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

/// How the process came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Quit,
    Interrupted,
}

/// A running VMM, as its control socket sees it.
struct Vmm {
    vm: Vm,
    end: Sender<End>,
    ended: std::sync::atomic::AtomicBool,
}

/// Runs a VM until it is told to quit; the exit code.
///
/// # Errors
/// Whatever keeps the VM from being started.
pub fn run(arguments: &RunArguments) -> Result<u8> {
    let config = arguments.config()?;
    let serial = arguments.serial.as_deref().map_or_else(|| Ok(Serial::default()), Serial::open)?;
    let memory = Memory::allocate(&config)?;
    let vm = Vm::new(config, Arc::new(memory), &serial)?;
    let (end, ends) = bounded(1);
    let vmm = Arc::new(Vmm { vm, end, ended: false.into() });
    let signals = watch_signals(vmm.end.clone())?;
    let began = std::time::Instant::now();
    vmm.vm.fill();
    tracing::info!(
        pages = vmm.vm.stats().fill_pages,
        seconds = began.elapsed().as_secs_f64(),
        "memory is filled"
    );
    vmm.vm.run()?;
    let socket = match &arguments.control {
        Some(path) => Some(Server::start(path, Arc::clone(&vmm) as Arc<dyn Controlled>)?),
        None => None,
    };
    let code = vmm.conclude(&ends);
    drop(socket);
    signals.close();
    code
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
    /// Waits for the end, and tells how it was.
    fn conclude(&self, ends: &Receiver<End>) -> Result<u8> {
        let end = ends.recv().unwrap_or(End::Quit);
        self.ended.store(true, std::sync::atomic::Ordering::Release);
        let stopped = self.vm.stop();
        if self.vm.stats().mismatches > 0 {
            return Ok(exit::LOST);
        }
        stopped?;
        Ok(match end {
            End::Quit => exit::DONE,
            End::Interrupted => exit::INTERRUPTED,
        })
    }

    fn report(&self) -> Map<String, Value> {
        let stats = self.vm.stats();
        let status = match &stats.failure {
            Some(failure) => error_value(&Error::new(ErrorKind::Vm, failure.clone())),
            None => "ok".into(),
        };
        object(json!({
            "schema": REPORT_SCHEMA,
            "status": status,
            "vm": self.vm.config(),
            "seed": self.vm.config().seed,
            "guest": stats,
        }))
    }
}

impl Controlled for Vmm {
    fn command(&self, name: &str, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
        match name {
            "stats" => Ok(object(json!({ "guest": self.vm.stats() }))),
            "report" => Ok(self.report()),
            "verify" => {
                let by = match arguments.get("by") {
                    None => Verifier::Guest,
                    Some(by) => serde_json::from_value(by.clone()).map_err(|e| {
                        Error::new(ErrorKind::Input, "\"by\" is \"guest\" or \"vmm\"").because(e)
                    })?,
                };
                Ok(object(json!({ "guest": self.vm.verify(by, || self.ending())? })))
            }
            "pause" => {
                let began = std::time::Instant::now();
                let state = self.vm.pause()?;
                let took_us = began.elapsed().as_secs_f64() * 1e6;
                let adds_up = self.vm.writes_add_up();
                Ok(object(
                    json!({ "state_bytes": state.len(), "took_us": took_us, "writes_add_up": adds_up }),
                ))
            }
            "resume" => self.vm.run().map(|()| Map::new()),
            "quit" => {
                let _ = self.end.try_send(End::Quit);
                Ok(Map::new())
            }
            other => Err(Error::new(
                ErrorKind::Input,
                format!("no command {other:?}: there are stats, report, verify, pause, resume, quit"),
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
