//! A stock QEMU whose VM leaves through this process, driven as any other VMM is.
//!
//! ```text
//!   looked at --start--> begins --> leaves --> is out: QEMU completes, and ends where that was asked for
//!                           |          |
//!                           +----------+--> is called off, or fails: QEMU's VM and settings are what they were;
//!                                           behind COMMIT it waits, for who goes on
//! ```
//!
//! A thread of its own leads each: one QEMU that is slow holds up no other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use libsg::migrate::source::{Outgoing, SourceOptions, To, start};
use libsg::migrate::{Observer, PoolSecret, Replacements, RoundOptions};
use libsg::report::{Bytes, DestinationReport, Failure, Sample, SourceReport, Status};
use libsg::units::{Rate, Size};
use libsg::vmd::Connector;
use libsg::{Error, ErrorKind};
use parking_lot::Mutex;
use pools::Spares;
use qemu::{DepartedFile, Departure, Disks, Found, Qmp, Resident, Whereabouts};
use rustix::process::Pid;
use transports::TransportArgs;
use vmms::{Backlog, Described, Leaving, Start, State as VmState, Vmm, Wanted};

use super::super::args::{EvictArgs, evict_file};
use super::super::who::stem;
use super::tell;
use crate::cli::secret;

/// How long the destination has to take the VM.
pub const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Longer than any migration.
const FOREVER: Duration = Duration::from_secs(30 * 86_400);

/// What all QEMUs of an eviction have in common.
pub struct Through {
    secret: Option<PathBuf>,
    transport: TransportArgs,
    state_file: Option<PathBuf>,
    window: Option<Size>,
    disks: Disks,
    quits: bool,
    /// Events say whose they are.
    several: bool,
    /// Made when the first leaves.
    wires: Mutex<Option<(PoolSecret, Arc<dyn Connector>)>>,
}

impl Through {
    /// As it was said.
    pub fn of(args: &EvictArgs) -> Arc<Self> {
        Arc::new(Self {
            secret: args.at.secret.clone(),
            transport: args.transport.clone(),
            state_file: args.state_file.clone(),
            window: args.window,
            disks: if args.shared_disks { Disks::Shared } else { Disks::AsFound },
            quits: args.quit,
            several: args.only_qemu().is_none(),
            wires: Mutex::new(None),
        })
    }

    /// Who is told of what happens to the VM of one QEMU.
    pub fn tells(&self, vm: &str, socket: &Path) -> Observer {
        let of = self.several.then(|| (vm.to_owned(), socket.to_owned()));
        Arc::new(move |event| tell(event, of.as_ref().map(|(vm, socket)| (vm.as_str(), socket.as_path()))))
    }

    fn wires(&self) -> Result<(PoolSecret, Arc<dyn Connector>)> {
        let mut wires = self.wires.lock();
        if let Some((secret, connector)) = &*wires {
            return Ok((secret.clone(), Arc::clone(connector)));
        }
        let secret = secret(self.secret.as_deref())?;
        let connector = self.transport.connector(secret.clone(), None)?;
        Ok(wires.insert((secret, connector)).clone())
    }
}

/// A QEMU that was looked at. Nothing of it was changed.
pub struct Looked {
    /// It.
    pub leaver: Leaver,
    /// What VM it has.
    pub described: Described,
    /// What stands in the way of that, and what is worth knowing.
    pub found: Found,
    /// Which process it is, where that is known.
    pub process: Option<Pid>,
}

/// A QEMU whose VM is to leave, or leaves.
#[derive(Clone)]
pub struct Leaver(Arc<Shared>);

struct Shared {
    socket: PathBuf,
    described: Described,
    through: Arc<Through>,
    state: Mutex<State>,
}

/// How far it is.
#[derive(Default)]
struct State {
    /// Until it is told to leave.
    qmp: Option<Qmp>,
    /// It was told.
    told: bool,
    called_off: bool,
    outgoing: Option<Arc<Outgoing>>,
    /// As it was last, when it is over.
    leaving: Leaving,
    over: Option<SourceReport>,
    resumed: u32,
    /// What another process needs is written down still.
    is_recorded: bool,
}

impl Leaver {
    /// Looks at a QEMU.
    pub fn look(mut qmp: Qmp, socket: &Path, through: &Arc<Through>) -> Result<Looked> {
        let resident = Resident::of(&mut qmp)?;
        let found = qemu::source(&mut qmp, through.disks)?;
        let described = Described {
            vm: Some(resident.name.unwrap_or_else(|| stem(socket))),
            state: match resident.whereabouts {
                Whereabouts::Awaited => VmState::Empty,
                Whereabouts::Here => VmState::Here,
                Whereabouts::Arriving => VmState::Arriving,
                Whereabouts::Left => VmState::Left,
            },
            memory_bytes: resident.memory_bytes,
            present_bytes: resident.present_bytes,
        };
        let process = qmp.process();
        let leaver = Self::new(socket, described.clone(), through);
        leaver.0.state.lock().qmp = Some(qmp);
        Ok(Looked { leaver, described, found, process })
    }

    /// Goes on with one that another process led before.
    pub fn going_on(
        socket: &Path,
        through: &Arc<Through>,
        (outgoing, departure): (Outgoing, Departure),
    ) -> Result<Self> {
        let bytes = departure.manifest().pages() as u64 * libsg::page::PAGE_BYTES_U64;
        let described = Described {
            vm: Some(departure.manifest().vm.clone()),
            state: VmState::Leaving,
            memory_bytes: bytes,
            present_bytes: bytes,
        };
        let leaver = Self::new(socket, described, through);
        let outgoing = Arc::new(outgoing);
        {
            let mut state = leaver.0.state.lock();
            (state.told, state.outgoing) = (true, Some(Arc::clone(&outgoing)));
            state.is_recorded = true;
        }
        leaver.lead(move |shared| Ok(shared.see_out(&outgoing, departure)))?;
        Ok(leaver)
    }

    fn new(socket: &Path, described: Described, through: &Arc<Through>) -> Self {
        let (socket, through) = (socket.to_owned(), Arc::clone(through));
        Self(Arc::new(Shared { socket, described, through, state: Mutex::default() }))
    }

    /// Its QMP socket.
    pub fn socket(&self) -> &Path {
        &self.0.socket
    }

    /// How often its stream was resumed, to have pages again that were lost.
    pub fn resumed(&self) -> u32 {
        self.0.state.lock().resumed
    }

    /// What of its QEMU there is to say when it is evicted.
    pub fn afterwards(&self) -> &'static str {
        if self.0.through.quits { "its QEMU has ended" } else { "its QEMU may be ended" }
    }

    /// How another may go on with it, or bring it back, where this process could not.
    pub fn hint(&self) -> Option<String> {
        let (state, through) = (self.0.state.lock(), &self.0.through);
        let of = through.state_file.as_ref().map(|path| format!(" --state-file {}", path.display()));
        let quit = if state.leaving.committed && through.quits { " --quit" } else { "" };
        let stands = match (state.leaving.committed, state.leaving.evicted) {
            (true, false) => "if its QEMU is \"postcopy-paused\"",
            (true, true) => "if its QEMU is there still, to end what was begun",
            (false, _) => "if its QEMU is there still, to have the VM run on as it was",
        };
        state.is_recorded.then(|| {
            let socket = self.0.socket.display();
            format!("{stands}: sg evict --qmp {socket} --resume{quit}{}", of.unwrap_or_default())
        })
    }

    /// Has a thread of its own lead it to its end.
    fn lead(&self, led: impl FnOnce(&Shared) -> Result<SourceReport> + Send + 'static) -> Result<()> {
        let ends = Ends(Arc::clone(&self.0));
        let body = move || {
            let report = led(&ends.0).unwrap_or_else(|error| failed(&error));
            ends.0.end(report);
        };
        std::thread::Builder::new().name("sg-evict-qemu".into()).spawn(body)?;
        Ok(())
    }

    /// One that was told of, and does not exist.
    #[cfg(test)]
    pub fn described(socket: &str, described: Described) -> Self {
        let through = Through {
            secret: None,
            transport: TransportArgs::default(),
            state_file: None,
            window: None,
            disks: Disks::AsFound,
            quits: false,
            several: true,
            wires: Mutex::new(None),
        };
        Self::new(Path::new(socket), described, &Arc::new(through))
    }
}

/// However its thread ends, who waits is told.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        if self.0.state.lock().over.is_none() {
            self.0.end(failed(&anyhow::anyhow!("the thread that led it panicked")));
        }
    }
}

impl Shared {
    fn vm(&self) -> &str {
        self.described.vm.as_deref().unwrap_or_default()
    }

    /// Has QEMU begin, and all of it leave.
    fn leave(&self, qmp: Qmp, how: &Start) -> Result<SourceReport> {
        let (secret, connector) = self.through.wires()?;
        let mut departure = match self.through.window {
            Some(window) => Departure::begin_within(qmp, self.vm(), window.0),
            None => Departure::begin(qmp, self.vm()),
        }?;
        let outgoing = match self.begin(&mut departure, how, (secret, connector)) {
            Ok(outgoing) => outgoing,
            Err(error) => {
                let what = format!("{error:#}");
                let given_up = self.ended(&what, departure.give_up());
                return given_up
                    .map_or(Err(error), |status| Ok(SourceReport { status, ..SourceReport::default() }));
            }
        };
        Ok(self.see_out(&outgoing, departure))
    }

    fn begin(
        &self,
        departure: &mut Departure,
        how: &Start,
        (secret, connector): (PoolSecret, Arc<dyn Connector>),
    ) -> Result<Arc<Outgoing>> {
        let path = self.through.state_file.clone().unwrap_or_else(|| evict_file(&self.socket));
        let file = DepartedFile::new(&path, self.through.secret.as_deref());
        departure.record(file)?;
        self.state.lock().is_recorded = true;
        let to = match (how.to, &how.park) {
            (Some(to), _) => To::from(to),
            (None, Some(name)) => To::Parked { name: name.clone(), arbiter: how.arbiter.clone() },
            (None, None) => bail!("it was not said where it goes"),
        };
        let mut manifest = departure.manifest().clone();
        manifest.sharing.clone_from(&how.dedup);
        let vm = match to {
            To::Destination(_) => departure.vm(),
            To::Parked { .. } => departure.vm_to_park(),
        };
        let spares = how.spares.clone();
        let options = SourceOptions {
            to,
            mode: how.mode,
            intermediaries: how.intermediaries.clone(),
            replacements: (!spares.is_empty()).then(|| Arc::new(Spares(spares)) as Arc<dyn Replacements>),
            replicas: how.replicas,
            rounds: RoundOptions::USUAL,
            connector,
            secret,
            scatter_limit_bytes_per_s: limit(how)?,
            ready_timeout: READY_TIMEOUT,
            observer: self.through.tells(self.vm(), &self.socket),
        };
        let mut state = self.state.lock();
        if state.called_off {
            return Err(Error::new(ErrorKind::Cancelled, "it was called off; the VM stays here").into());
        }
        let outgoing = Arc::new(start(Box::new(vm), Arc::new(departure.pages()), manifest, options)?);
        state.outgoing = Some(Arc::clone(&outgoing));
        Ok(outgoing)
    }

    /// Until it is out, or is not; then its QEMU is what it is to be.
    fn see_out(&self, outgoing: &Outgoing, departure: Departure) -> SourceReport {
        let left = outgoing.wait_evicted(FOREVER);
        let is_committed = outgoing.progress().committed;
        let mut report = outgoing.report();
        self.state.lock().resumed = departure.resumed();
        let (what, ended) = match &left {
            Ok(_) => ("it is evicted".to_owned(), departure.complete(self.through.quits)),
            // What is not safe is there, for who goes on.
            Err(_) if is_committed => return report,
            Err(error) => (error.chain(), departure.give_up()),
        };
        if let Some(status) = self.ended(&what, ended) {
            report.status = status;
        }
        report
    }

    /// What to say where its QEMU, behind what happened, did not become what it is to be: both.
    fn ended(&self, what: &str, ended: libsg::Result<()>) -> Option<Status> {
        let Err(error) = ended else {
            self.state.lock().is_recorded = false;
            return None;
        };
        let message = format!("{what}; and its QEMU is not what it is to be: {}", error.chain());
        Some(Status::Failed(Failure { kind: ErrorKind::Vm, message, lost: Vec::new() }))
    }

    fn end(&self, report: SourceReport) {
        let leaving = self.leaving();
        let mut state = self.state.lock();
        state.leaving = Leaving { over: true, ..leaving };
        // Its memory is needed no more, whatever becomes of others.
        state.outgoing = None;
        state.over = Some(report);
    }

    fn leaving(&self) -> Leaving {
        let outgoing = {
            let state = self.state.lock();
            match &state.outgoing {
                Some(outgoing) => Arc::clone(outgoing),
                None => return state.leaving,
            }
        };
        let (backlog, now) = (outgoing.backlog(), outgoing.progress());
        Leaving {
            backlog: Backlog { told: backlog.told, left_bytes: backlog.left_bytes },
            sent_bytes: now.direct_bytes + now.staged_bytes,
            safe_pages: now.safe_pages,
            total_pages: now.total_pages,
            committed: now.committed,
            evicted: now.evicted,
            // Not before its QEMU is what it is to be.
            over: false,
        }
    }
}

/// Most that leaves in bulk, in bytes a second; 0 is no limit.
fn limit(how: &Start) -> libsg::Result<u64> {
    let said = how.scatter.as_deref().map(str::parse::<Rate>).transpose()?;
    Ok(said.map_or(0, Rate::bytes_per_s))
}

/// It did not leave, for this reason.
fn failed(error: &anyhow::Error) -> SourceReport {
    let status = match error.downcast_ref::<Error>() {
        Some(error) => Status::from(error),
        None => {
            Status::Failed(Failure { kind: ErrorKind::Vm, message: format!("{error:#}"), lost: Vec::new() })
        }
    };
    SourceReport { status, ..SourceReport::default() }
}

impl Vmm for Leaver {
    fn describe(&mut self) -> Result<Described> {
        Ok(self.0.described.clone())
    }

    fn start(&mut self, how: &Start) -> Result<()> {
        let qmp = {
            let mut state = self.0.state.lock();
            let Some(qmp) = state.qmp.take() else { bail!("it was told to leave already") };
            state.told = true;
            qmp
        };
        let how = how.clone();
        self.lead(move |shared| shared.leave(qmp, &how))
    }

    fn share(&mut self, bytes_per_s: Option<u64>, valid: Duration) -> Result<Option<Leaving>> {
        let outgoing = {
            let state = self.0.state.lock();
            if !state.told {
                return Ok(None);
            }
            state.outgoing.clone()
        };
        if let Some(outgoing) = outgoing.filter(|_| !valid.is_zero()) {
            outgoing.grant(bytes_per_s, valid);
        }
        Ok(Some(self.0.leaving()))
    }

    fn claim(&mut self, _: &Wanted) -> Result<()> {
        bail!("a parked VM is claimed for a QEMU by sg gather --qmp")
    }

    fn progress(&mut self) -> Result<Sample> {
        let leaving = self.0.leaving();
        let percent = leaving.safe_pages as f64 * 100.0 / leaving.total_pages.max(1) as f64;
        let now = self.0.state.lock().outgoing.as_ref().map(|outgoing| outgoing.progress());
        let bytes = Bytes {
            direct: now.map(|now| now.direct_bytes),
            staged: now.map(|now| now.staged_bytes),
            ..Bytes::default()
        };
        let evicted_percent = (leaving.total_pages > 0).then_some(percent);
        Ok(Sample { bytes, evicted_percent, ..Sample::default() })
    }

    fn report(&mut self) -> Result<(Option<SourceReport>, Option<DestinationReport>)> {
        let state = self.0.state.lock();
        let now = || state.outgoing.as_ref().map(|outgoing| outgoing.report());
        Ok((state.over.clone().or_else(now), None))
    }

    fn limit(&mut self, scatter: Option<Rate>, gather: Option<Rate>) -> Result<()> {
        let outgoing = self.0.state.lock().outgoing.clone();
        match (outgoing, scatter, gather) {
            (_, _, Some(_)) => bail!("no VM arrives here"),
            (None, ..) => bail!("no VM leaves here"),
            (Some(outgoing), Some(rate), None) => outgoing.set_scatter_limit(rate.bytes_per_s()),
            (Some(_), None, None) => {}
        }
        Ok(())
    }

    fn cancel(&mut self) -> Result<()> {
        let mut state = self.0.state.lock();
        match &state.outgoing {
            Some(outgoing) => outgoing.cancel()?,
            None if state.told && state.over.is_none() => state.called_off = true,
            None => bail!("no migration is under way"),
        }
        Ok(())
    }
}
