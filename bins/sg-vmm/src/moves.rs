//! This VM's migrations: leaving, arriving, and what is told of them.
//!
//! Every event is a line of JSON on standard output, flushed as it happens. The source's `evicted` and
//! `failed` carry the report: whoever reads them may kill the source the moment after.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::content::Sharing;
use libsg::event::{Event, Observer};
use libsg::manifest::Manifest;
use libsg::migrate::destination::{
    ArrivalPhase, ClaimOptions, Destination, DestinationOptions, Incoming, claim,
};
use libsg::migrate::source::{Backlog, Outgoing, SourceOptions, To, start};
use libsg::migrate::{Mode, PoolSecret, Replacements, RoundOptions, Via};
use libsg::report::{Bytes, DestinationReport, Sample, SourceReport};
use libsg::source::{MemorySource, PageSource};
use libsg::units::Rate;
use libsg::vmd::Connector;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use pools::Spares;
use serde_json::{Value, json};

use crate::canary::{PanicAt, Panicking};
use crate::migration::{Arriving, Berth, Leaving};
use crate::pool::{self, PoolView};
use crate::serial::Serial;
use crate::vm::Vm;

/// How long the destination has to build and load the VM.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long intermediaries have to give the volume's memory back before a report is asked for in vain, and
/// before the process goes all the same.
const DISSOLVE_TIME: Duration = Duration::from_secs(15);

/// Longer than any migration.
pub const FOREVER: Duration = Duration::from_secs(30 * 86_400);

/// What `start` asks for.
#[derive(Debug, serde::Deserialize)]
pub struct Start {
    /// How the memory leaves.
    #[serde(default)]
    pub mode: Mode,
    /// Where the destination listens; or `park`.
    pub to: Option<SocketAddr>,
    /// There is no destination yet: the name under which the VM is parked at the intermediaries.
    pub park: Option<String>,
    /// With `park`: the engine that says who may have it, `etcd://HOST/PREFIX`; an intermediary where it is not said.
    pub arbiter: Option<String>,
    /// Intermediaries that may take pages.
    #[serde(default)]
    pub intermediaries: Vec<SocketAddr>,
    /// Others, who take the place of those that die on the way, in this order. Without `pool`, which knows whom to take.
    #[serde(default)]
    pub spares: Vec<SocketAddr>,
    /// Intermediaries are chosen among those of the pool that the VMM hears.
    #[serde(default)]
    pub pool: bool,
    /// The whole zone is emptied: nothing goes to its nodes.
    #[serde(default)]
    pub evacuate: bool,
    /// With `pool`: only says whom it would choose.
    #[serde(default)]
    pub dry_run: bool,
    /// Most rounds while the VM runs; what is usual in the mode where it is not said.
    pub rounds: Option<u16>,
    /// Where the rounds of pre-copy go.
    #[serde(default)]
    pub via: Via,
    /// The VM is paused once what it has written can be sent in this time.
    pub downtime_limit_ms: Option<u64>,
    /// How many intermediaries hold each page; one where it is not said.
    pub replicas: Option<u8>,
    /// With whom its pages are shared at intermediaries; nobody where it is not said.
    pub dedup: Option<Sharing>,
    /// Most that leaves in bulk, from the start on: a rate such as "256mbit".
    pub scatter: Option<String>,
}

/// What `claim` asks for.
#[derive(Debug, serde::Deserialize)]
pub struct Wanted {
    /// The name under which the VM was parked, or its volume.
    pub claim: String,
    /// Intermediaries to ask for it; any one that knows it is enough.
    pub intermediaries: Vec<SocketAddr>,
    /// Whatever stands against it, the operator knows that the VM runs nowhere.
    #[serde(default)]
    pub force: bool,
}

impl Start {
    fn to(&self) -> Result<To> {
        match (self.to, &self.park) {
            (Some(address), None) => Ok(address.into()),
            (None, Some(name)) => Ok(To::Parked { name: name.clone(), arbiter: self.arbiter.clone() }),
            _ => Err(Error::new(
                ErrorKind::Input,
                "say either \"to\", where a destination listens, or \"park\", under which name the VM is left at the \
                 intermediaries",
            )),
        }
    }

    fn replicas(&self) -> u8 {
        self.replicas.unwrap_or(1)
    }

    fn rounds(&self) -> RoundOptions {
        let usual = RoundOptions::default();
        RoundOptions {
            rounds_max: self.rounds,
            via: self.via,
            downtime_limit: self.downtime_limit_ms.map_or(usual.downtime_limit, Duration::from_millis),
            ..usual
        }
    }
}

/// Leaving and arriving.
pub struct Moves {
    secret: PoolSecret,
    connector: Arc<dyn Connector>,
    pool: Option<Arc<PoolView>>,
    canary: Option<Arc<PanicAt>>,
    began: Mutex<Option<Instant>>,
    outgoing: Mutex<Option<Arc<Outgoing>>>,
    incoming: Mutex<Option<Arc<Incoming>>>,
}

impl Moves {
    /// No migration yet; those that come reach intermediaries by the connector. The canary is the page at which a worker panics.
    #[must_use]
    pub fn new(
        secret: PoolSecret,
        connector: Arc<dyn Connector>,
        pool: Option<PoolView>,
        canary: Option<u64>,
    ) -> Arc<Self> {
        Arc::new(Self {
            secret,
            connector,
            pool: pool.map(Arc::new),
            canary: canary.map(|page| Arc::new(PanicAt::page(page))),
            began: Mutex::new(None),
            outgoing: Mutex::new(None),
            incoming: Mutex::new(None),
        })
    }

    fn observer(self: &Arc<Self>) -> Observer {
        let moves = Arc::clone(self);
        Arc::new(move |event| match event {
            // Told with their report, by who waits for it.
            Event::Evicted | Event::Failed { .. } if moves.outgoing.lock().is_some() => {}
            event => moves.tell(event, None),
        })
    }

    fn tell(&self, event: &Event, report: Option<&SourceReport>) {
        let mut line = json!(event);
        if let Value::Object(fields) = &mut line {
            fields.insert("t_s".into(), json!(self.began.lock().map(|at| at.elapsed().as_secs_f64())));
            if let Some(report) = report {
                fields.insert("report".into(), json!(report));
            }
        }
        let mut out = std::io::stdout().lock();
        // Nobody may be reading; the migration goes on.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Starts the migration of a VM that runs here. Returns how intermediaries were chosen, if they were.
    ///
    /// # Errors
    /// One is under way, or it cannot be started; a choice among a pool that this VMM is not in.
    pub fn start(self: &Arc<Self>, vm: &Arc<Vm>, what: Start) -> Result<Option<Value>> {
        let to = what.to()?;
        let (mut told, mut replacements) = (None, None::<Arc<dyn Replacements>>);
        let mut intermediaries = what.intermediaries.clone();
        if what.pool {
            let pool = self.pool.as_ref().ok_or_else(pool::none)?;
            let choice = pool.choose((vm.config().memory_bytes, what.replicas()), what.to, what.evacuate)?;
            replacements = Some(pool.replacements(&choice));
            intermediaries.extend(choice.addresses);
            told = Some(choice.told);
        } else if what.dry_run || what.evacuate {
            let message = "\"dry_run\" and \"evacuate\" are about a choice: say \"pool\":true";
            return Err(Error::new(ErrorKind::Input, message));
        }
        if !what.spares.is_empty() && replacements.is_none() {
            replacements = Some(Arc::new(Spares(what.spares.clone())));
        }
        if !what.dry_run {
            self.go(vm, &what, to, (intermediaries, replacements))?;
        }
        Ok(told)
    }

    fn go(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        what: &Start,
        to: To,
        (intermediaries, replacements): (Vec<SocketAddr>, Option<Arc<dyn Replacements>>),
    ) -> Result<()> {
        let mut slot = self.outgoing.lock();
        if slot.as_ref().is_some_and(|outgoing| !outgoing.is_over()) {
            return Err(Error::new(ErrorKind::Input, "a migration of this VM is under way"));
        }
        if let Some(incoming) = &*self.incoming.lock()
            && incoming.wait_gathered(Duration::ZERO).is_err()
        {
            let message = "the VM has not gathered its memory yet: it can migrate on when it has";
            return Err(Error::new(ErrorKind::Input, message));
        }
        let scatter_limit = what.scatter.as_deref().map(str::parse::<Rate>).transpose()?;
        *self.began.lock() = Some(Instant::now());
        let options = SourceOptions {
            to,
            replicas: what.replicas(),
            mode: what.mode,
            rounds: what.rounds(),
            intermediaries,
            replacements,
            secret: self.secret.clone(),
            connector: Arc::clone(&self.connector),
            scatter_limit_bytes_per_s: scatter_limit.map_or(0, Rate::bytes_per_s),
            ready_timeout: READY_TIMEOUT,
            observer: self.observer(),
        };
        let mut source: Arc<dyn PageSource> = Arc::new(MemorySource::new(vm.memory().guest().clone()));
        if let Some(canary) = &self.canary {
            source = Arc::new(Panicking(source, Arc::clone(canary)));
        }
        let leaving = Box::new(Leaving::new(Arc::clone(vm)));
        let manifest = Manifest { sharing: what.dedup.clone(), ..vm.config().manifest()? };
        let outgoing = Arc::new(start(leaving, source, manifest, options)?);
        *slot = Some(Arc::clone(&outgoing));
        self.pool.iter().for_each(|pool| pool.set_leaving(true));
        let moves = Arc::clone(self);
        std::thread::Builder::new().name("sg-evicted".into()).spawn(move || {
            let event = match outgoing.wait_evicted(FOREVER) {
                Ok(_) => Event::Evicted,
                Err(error) => Event::Failed { kind: error.kind, message: error.chain() },
            };
            moves.tell(&event, Some(&outgoing.report()));
            moves.pool.iter().for_each(|pool| pool.set_leaving(false));
        })?;
        Ok(())
    }

    fn arriving(&self, berth: &Berth, serial: Serial) -> Box<Arriving> {
        let arriving = Arriving::new(berth.clone(), serial);
        Box::new(match &self.canary {
            Some(canary) => arriving.with_canary(Arc::clone(canary)),
            None => arriving,
        })
    }

    /// Waits for a VM on `address`. Returns the address that it listens on.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it cannot be listened on.
    pub fn await_vm(
        self: &Arc<Self>,
        address: SocketAddr,
        gather_limit: u64,
        berth: &Berth,
        serial: Serial,
    ) -> Result<SocketAddr> {
        let mut options = DestinationOptions::new(address, self.secret.clone(), Arc::clone(&self.connector));
        options.gather_limit = gather_limit;
        options.observer = self.observer();
        let destination = Destination::listen(options)?;
        let address = destination.address();
        *self.began.lock() = Some(Instant::now());
        let incoming = destination.accept(self.arriving(berth, serial))?;
        *self.incoming.lock() = Some(Arc::new(incoming));
        Ok(address)
    }

    /// Claims a parked VM. Returns at once: whether it was granted is told as events, and by the handle.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] where a VM arrives, or has arrived; no intermediary is named.
    pub fn claim(
        self: &Arc<Self>,
        what: Wanted,
        gather_limit: u64,
        berth: &Berth,
        serial: Serial,
    ) -> Result<Arc<Incoming>> {
        let mut slot = self.incoming.lock();
        let is_free = slot.as_ref().is_none_or(|incoming| incoming.progress().phase == ArrivalPhase::Failed);
        if !is_free || berth.vm().is_some() {
            return Err(Error::new(ErrorKind::Input, "there is a VM here, or one arrives"));
        }
        let nowhere = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let mut options = DestinationOptions::new(nowhere, self.secret.clone(), Arc::clone(&self.connector));
        options.name = this_process();
        options.gather_limit = gather_limit;
        options.observer = self.observer();
        *self.began.lock() = Some(Instant::now());
        let wanted = ClaimOptions {
            name: what.claim,
            intermediaries: what.intermediaries,
            force: what.force,
            engines: Some(pools::engines()),
        };
        let incoming = claim(self.arriving(berth, serial), wanted, options)?;
        Ok(Arc::clone(slot.insert(Arc::new(incoming))))
    }

    /// Changes limits, in bytes a second; 0 is none.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a limit of something that does not happen here.
    pub fn limit(&self, gather: Option<u64>, scatter: Option<u64>) -> Result<()> {
        let here = |what: &str| Error::new(ErrorKind::Input, format!("no VM {what} here"));
        if let Some(limit) = gather {
            self.incoming.lock().as_ref().ok_or_else(|| here("arrives"))?.set_gather_limit(limit);
        }
        if let Some(limit) = scatter {
            self.outgoing.lock().as_ref().ok_or_else(|| here("leaves"))?.set_scatter_limit(limit);
        }
        Ok(())
    }

    /// Grants a VM that leaves a share of the host's link, in bytes a second, for so long, `None` being any rate; for no time
    /// at all grants nothing. Says how it stands.
    #[must_use]
    pub fn share(&self, bytes_per_s: Option<u64>, valid: Duration) -> Value {
        let Some(outgoing) = self.outgoing.lock().clone() else { return json!({"leaving": null}) };
        let is_over = outgoing.is_over();
        if !valid.is_zero() {
            outgoing.grant(bytes_per_s, valid);
        }
        let Backlog { told, left_bytes } = outgoing.backlog();
        let now = outgoing.progress();
        let micros = |time: Duration| time.as_micros() as u64;
        json!({"leaving": {
            "paced_bytes": told.paced.delivered,
            "urgent_bytes": told.urgent_bytes,
            "queue_delay_us": told.paced.queue_delay.map(micros),
            "base_rtt_us": micros(told.paced.base_rtt),
            "backlogged": told.paced.backlogged,
            "left_bytes": left_bytes,
            "sent_bytes": now.direct_bytes + now.staged_bytes,
            "safe_pages": now.safe_pages,
            "total_pages": now.total_pages,
            "committed": now.committed,
            "evicted": now.evicted,
            "over": is_over,
        }})
    }

    /// What becomes of a VM: whether it leaves, has left, or is not all there yet.
    #[must_use]
    pub fn state(&self, vm: &Vm) -> &'static str {
        let leaves = self.outgoing.lock().as_ref().is_some_and(|outgoing| !outgoing.is_over());
        let arrives = |incoming: &Arc<Incoming>| incoming.wait_gathered(Duration::ZERO).is_err();
        match vm.has_left() {
            _ if leaves => "leaving",
            true => "left",
            false if self.incoming.lock().as_ref().is_some_and(arrives) => "arriving",
            false => "here",
        }
    }

    /// Calls the migration off, before COMMIT.
    ///
    /// # Errors
    /// COMMIT was given, or there is no migration.
    pub fn cancel(&self) -> Result<()> {
        if let Some(outgoing) = self.outgoing.lock().clone() {
            return outgoing.cancel();
        }
        match self.incoming.lock().clone() {
            Some(incoming) => incoming.cancel(),
            None => Err(Error::new(ErrorKind::Input, "no migration is under way")),
        }
    }

    /// Before the process ends: a VM that has gathered has the intermediaries give its memory back first. Bounded,
    /// and what is left there then is told.
    pub fn settle(&self) {
        let Some(incoming) = self.incoming.lock().clone() else { return };
        if incoming.progress().phase == ArrivalPhase::Gathered
            && let Err(error) = incoming.wait_dissolved(DISSOLVE_TIME)
        {
            tracing::warn!(error = error.chain(), "going before every intermediary has its memory back");
        }
    }

    /// This moment, as this end knows it.
    #[must_use]
    pub fn sample(&self, vm: Option<&Vm>) -> Sample {
        let mut sample = Sample {
            t_s: self.began.lock().map_or(0.0, |at| at.elapsed().as_secs_f64()),
            guest_ops: vm.map(|vm| vm.stats().ops),
            ..Sample::default()
        };
        if let Some(outgoing) = self.outgoing.lock().clone() {
            let now = outgoing.progress();
            sample.bytes.direct = Some(now.direct_bytes);
            sample.bytes.staged = Some(now.staged_bytes);
            sample.evicted_percent = percent(now.safe_pages, now.total_pages);
        }
        if let Some(incoming) = self.incoming.lock().clone() {
            let now = incoming.progress();
            sample.bytes =
                Bytes { direct: Some(now.direct_bytes), gathered: Some(now.gathered_bytes), ..sample.bytes };
            sample.faults = Some(now.pages.faults);
            sample.gathered_percent = percent(now.pages.held, now.pages.total);
        }
        sample
    }

    /// What the source knows, if this VM leaves or has left.
    #[must_use]
    pub fn source_report(&self) -> Option<SourceReport> {
        Some(self.outgoing.lock().clone()?.report())
    }

    /// What the destination knows, if this VM has arrived.
    #[must_use]
    pub fn destination_report(&self) -> Option<DestinationReport> {
        let incoming = self.incoming.lock().clone()?;
        // "Gathered" is told before the intermediaries have their memory back; the report is there after.
        let patience = match incoming.progress().phase {
            ArrivalPhase::Gathered => DISSOLVE_TIME,
            _ => Duration::ZERO,
        };
        match incoming.wait_gathered(patience) {
            Ok(report) => Some(report),
            Err(error) if error.kind == ErrorKind::Timeout => None,
            Err(error) => Some(DestinationReport { status: (&error).into(), ..DestinationReport::default() }),
        }
    }
}

/// Whom operators are told of as the owner of a VM that was claimed here.
fn this_process() -> String {
    let mut host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = format!(" pid {}", std::process::id());
    while host.len() + process.len() > libsg::limits::NODE_NAME_BYTES_MAX {
        host.pop();
    }
    host + &process
}

fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 * 100.0 / whole as f64)
}
