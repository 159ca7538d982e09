//! The destination's side of a migration: listens for a source, builds the VM that it offers, runs it
//! once COMMIT was given, and gathers its pages.
//!
//! One [`Destination`] takes one VM. What happens after [`Destination::accept`] happens on threads of
//! libsg; the [`Incoming`] handle watches and steers them.

mod claim;
mod conductor;
mod ending;
mod line;
mod listener;
mod loading;
mod unfinished;
mod volume;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::{IncomingVm, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::gather::{Counts, Shared};
use crate::host::{self, Condvar, thread::JoinHandle};
use crate::report::DestinationReport;
use crate::transport::{PoolSecret, Waker};
use crate::vmd::Connector;

pub use claim::ClaimOptions;
use conductor::Way;
use listener::Listener;
pub use unfinished::Unfinished;

/// How long [`Incoming::cancel`] waits for the source to agree.
const CANCEL_WAIT: Duration = Duration::from_secs(10);

/// What a destination is made of.
#[derive(Clone)]
pub struct DestinationOptions {
    /// Where the source connects to; port 0 lets the kernel pick one ([`Destination::address`]).
    pub address: SocketAddr,
    /// What this host is called in logs.
    pub name: String,
    /// What source, destination and intermediaries have in common.
    pub secret: PoolSecret,
    /// How intermediaries are reached.
    pub connector: Arc<dyn Connector>,
    /// Most bytes a second that come in the background, the direct path included; 0 is unlimited.
    /// Never holds for a page that the guest waits for.
    pub gather_limit: u64,
    /// How long pages that only the source could have wait for it, or for who takes its place, to come back before they
    /// are lost; 10 s at most once it has evicted.
    pub source_grace: Duration,
    /// How long pages that only an intermediary has that does not answer wait for it, likewise.
    pub member_grace: Duration,
    /// Is told of every event.
    pub observer: Observer,
}

impl DestinationOptions {
    /// With the usual times (10 s each), no limit, and nobody who is told of events.
    #[must_use]
    pub fn new(address: SocketAddr, secret: PoolSecret, connector: Arc<dyn Connector>) -> Self {
        Self {
            address,
            name: "destination".into(),
            secret,
            connector,
            gather_limit: 0,
            source_grace: Duration::from_secs(10),
            member_grace: Duration::from_secs(10),
            observer: Arc::new(|_| {}),
        }
    }
}

/// A port on which a VM may arrive.
pub struct Destination {
    options: DestinationOptions,
    listener: Listener,
}

impl Destination {
    /// Listens. Sources that connect wait until [`Self::accept`].
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the address cannot be listened on.
    pub fn listen(options: DestinationOptions) -> Result<Self> {
        let listener = Listener::start(&options)?;
        Ok(Self { options, listener })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Takes the first VM that is offered. Returns at once; the offer may come any time later.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when a thread cannot be started.
    pub fn accept(self, vm: Box<dyn IncomingVm>) -> Result<Incoming> {
        let waker = self.listener.waker().clone();
        Incoming::start(self.options, Way::Offered(self.listener), waker, vm)
    }
}

/// Takes a VM that was parked ([`To::Parked`](super::source::To)), once of all who claim it: its state and its memory come
/// from the intermediaries, no source is asked. Returns at once; [`Incoming::wait_running`] says whether it was granted.
/// Nothing is listened on: the options' address is not used.
///
/// Until it is written down that the VM runs here, it is parked still: whatever fails leaves it to another claim.
///
/// # Errors
/// [`ErrorKind::Input`] where no intermediary is named, [`ErrorKind::System`] when a thread cannot be started.
pub fn claim(vm: Box<dyn IncomingVm>, wanted: ClaimOptions, options: DestinationOptions) -> Result<Incoming> {
    if wanted.intermediaries.is_empty() {
        let message = "name an intermediary that knows the parked VM: any one of them is enough";
        return Err(Error::new(ErrorKind::Input, message));
    }
    Incoming::start(options, Way::Claimed(wanted), Waker::new()?, vm)
}

/// Goes on with a VM that runs here already, whose memory another process of this host was gathering when it ended: from what
/// that had written down ([`IncomingVm::note`]). [`IncomingVm::prepare`] finds the VM as it is, and its sink says what is in place
/// ([`PageSink::in_place`](crate::sink::PageSink::in_place)). Returns at once; [`Incoming::wait_running`] says whether it goes on.
///
/// Where the source may be at it still, the options' address is listened on: it has to be that of the process before. Whoever
/// gathered before is shut out at the intermediaries, where the source is gone.
///
/// Until the VM is found, whatever fails changes nothing ([`ErrorKind::Fenced`]: it was claimed elsewhere since;
/// [`ErrorKind::Unreachable`]: no intermediary answers; [`ErrorKind::Lost`]: none has the volume any more). Afterwards it waits as
/// it did before, for the next who goes on.
///
/// # Errors
/// [`ErrorKind::System`] when the address cannot be listened on, or a thread cannot be started.
pub fn resume(
    vm: Box<dyn IncomingVm>,
    unfinished: Unfinished,
    options: DestinationOptions,
) -> Result<Incoming> {
    let listener = if unfinished.source_gone { None } else { Some(Listener::start(&options)?) };
    let waker = listener.as_ref().map_or_else(Waker::new, |listener| Ok(listener.waker().clone()))?;
    Incoming::start(options, Way::Resumed(Box::new(unfinished), listener), waker, vm)
}

/// Where an arriving VM stands.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ArrivalPhase {
    /// Nothing was offered yet.
    #[default]
    Waiting,
    /// The VM is built; its state is awaited.
    Accepted,
    /// The state is loaded: COMMIT is awaited.
    Ready,
    /// The vCPUs run.
    Running,
    /// Every page is here.
    Gathered,
    /// It ended without success: abandoned before COMMIT, or failed after it.
    Failed,
}

/// How far an arriving VM is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ArrivalProgress {
    /// Where it stands.
    pub phase: ArrivalPhase,
    /// Pages.
    pub pages: Counts,
    /// Page bytes that came from the source.
    pub direct_bytes: u64,
    /// Page bytes that came from intermediaries.
    pub gathered_bytes: u64,
    /// Whether the source has evicted.
    pub evicted: bool,
    /// How long the longest fault that is not answered yet has waited.
    pub longest_wait: Option<Duration>,
}

fn progress_of(phase: ArrivalPhase, gather: &Shared) -> ArrivalProgress {
    let (pages, longest_wait) = {
        let tracker = gather.tracker.lock();
        (tracker.counts(), tracker.longest_wait(host::now()))
    };
    ArrivalProgress {
        phase,
        pages,
        direct_bytes: gather.counters.direct.load(Ordering::Relaxed),
        gathered_bytes: gather.counters.gathered.load(Ordering::Relaxed),
        evicted: gather.source().evicted,
        longest_wait,
    }
}

/// An error that may be told more than once.
#[derive(Clone, Debug)]
struct Told {
    kind: ErrorKind,
    message: String,
    pages: Vec<crate::page::PageRange>,
}

impl From<&Error> for Told {
    fn from(error: &Error) -> Self {
        Self { kind: error.kind, message: error.chain(), pages: error.pages.clone() }
    }
}

impl From<Told> for Error {
    fn from(told: Told) -> Self {
        // The message names the pages already.
        let mut error = Self::new(told.kind, told.message);
        error.pages = if told.kind == ErrorKind::Lost { told.pages } else { Vec::new() };
        error
    }
}

#[derive(Default)]
struct Stage {
    phase: ArrivalPhase,
    committed: bool,
    gather: Option<Arc<Shared>>,
    /// How far it was when it ended.
    last: Option<ArrivalProgress>,
    running: Option<Result<(), Told>>,
    gathered: Option<Result<Box<DestinationReport>, Told>>,
    dissolved: Option<Result<(), Told>>,
}

/// What the handle and the conductor share.
struct Desk {
    stage: Mutex<Stage>,
    changed: Condvar,
    cancel: AtomicBool,
    limit: AtomicU64,
    waker: Waker,
}

impl Desk {
    fn change(&self, change: impl FnOnce(&mut Stage)) {
        change(&mut self.stage.lock());
        self.changed.notify_all();
    }

    /// Waits until `take` finds something.
    fn wait<T>(&self, timeout: Duration, take: impl Fn(&Stage) -> Option<T>) -> Option<T> {
        let deadline = host::now() + timeout;
        let mut stage = self.stage.lock();
        loop {
            if let Some(found) = take(&stage) {
                return Some(found);
            }
            if self.changed.wait_until(&mut stage, deadline).timed_out() {
                return take(&stage);
            }
        }
    }
}

/// A VM that arrives.
///
/// Dropping the handle before COMMIT gives the VM up, as [`Self::cancel`] does but without waiting. After
/// COMMIT it changes nothing: the threads go on until every page is here, for there is no other copy of
/// the VM.
pub struct Incoming {
    desk: Arc<Desk>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Incoming {
    fn start(options: DestinationOptions, way: Way, waker: Waker, vm: Box<dyn IncomingVm>) -> Result<Self> {
        let desk = Arc::new(Desk {
            stage: Mutex::new(Stage::default()),
            changed: Condvar::new(),
            cancel: AtomicBool::new(false),
            limit: AtomicU64::new(options.gather_limit),
            waker,
        });
        let thread = conductor::start(options, way, vm, Arc::clone(&desk))?;
        Ok(Self { desk, thread: Mutex::new(Some(thread)) })
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> ArrivalProgress {
        let (phase, gather, last) = {
            let stage = self.desk.stage.lock();
            (stage.phase, stage.gather.clone(), stage.last)
        };
        match gather {
            Some(gather) => progress_of(phase, &gather),
            None => ArrivalProgress { phase, ..last.unwrap_or_default() },
        }
    }

    /// Bounds what comes in the background to so many bytes a second from now on; 0 takes the bound away.
    pub fn set_gather_limit(&self, bytes_per_s: u64) {
        self.desk.limit.store(bytes_per_s, Ordering::Release);
        let gather = self.desk.stage.lock().gather.clone();
        if let Some(gather) = gather {
            gather.pacer.set_limit(bytes_per_s, host::now());
            gather.wake_all();
        }
    }

    /// Gives the VM up before COMMIT: it lives on at the source. Once the state is loaded only the
    /// source can say whether COMMIT was given, so that it is asked, and waited for. One that was claimed stays parked, unless
    /// it runs by then.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] after COMMIT: the VM runs here, or will; [`ErrorKind::Timeout`] when the source did
    /// not say within 10 s: the cancellation stands, and is carried out as soon as it does.
    pub fn cancel(&self) -> Result<()> {
        self.desk.cancel.store(true, Ordering::Release);
        self.desk.waker.wake();
        let decided = self.desk.wait(CANCEL_WAIT, |stage| match &stage.running {
            Some(Err(_)) if !stage.committed => Some(true),
            _ if stage.committed => Some(false),
            _ => None,
        });
        match decided {
            Some(true) => Ok(()),
            Some(false) => Err(Error::new(
                ErrorKind::Input,
                "COMMIT was given: the VM runs here now, and can only be migrated on",
            )),
            None => Err(Error::new(
                ErrorKind::Timeout,
                "the source did not say whether COMMIT was given: the VM is given up once it does",
            )),
        }
    }

    /// Waits until the vCPUs run.
    ///
    /// # Errors
    /// Why they never will; [`ErrorKind::Timeout`].
    pub fn wait_running(&self, timeout: Duration) -> Result<()> {
        match self.desk.wait(timeout, |stage| stage.running.clone()) {
            Some(running) => running.map_err(Error::from),
            None => Err(Error::new(ErrorKind::Timeout, "the VM does not run yet")),
        }
    }

    /// Waits until every page is here. The report's status says whether pages were lost on the way.
    ///
    /// # Errors
    /// Why that never will be; [`ErrorKind::Poisoned`] when a thread panicked; [`ErrorKind::Timeout`].
    pub fn wait_gathered(&self, timeout: Duration) -> Result<DestinationReport> {
        match self.desk.wait(timeout, |stage| stage.gathered.clone()) {
            Some(gathered) => gathered.map(|report| *report).map_err(Error::from),
            None => Err(Error::new(ErrorKind::Timeout, "not every page is here yet")),
        }
    }

    /// Waits until the intermediaries have their memory back and every thread has ended. A process that ends
    /// after it has gathered waits for this first.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] naming the intermediaries that could not be told; why the VM was never
    /// gathered; [`ErrorKind::Timeout`].
    pub fn wait_dissolved(&self, timeout: Duration) -> Result<()> {
        let Some(dissolved) = self.desk.wait(timeout, |stage| stage.dissolved.clone()) else {
            return Err(Error::new(ErrorKind::Timeout, "the intermediaries are not all told yet"));
        };
        if let Some(thread) = self.thread.lock().take() {
            // It catches its own panics: the result is in the stage.
            let _ = thread.join();
        }
        dissolved.map_err(Error::from)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.desk.cancel.store(true, Ordering::Release);
        self.desk.waker.wake();
    }
}
