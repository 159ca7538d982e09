//! `sg nbd`: a volume as a block device, for whatever speaks NBD.
//!
//! ```text
//!  client -- socket -- connection: sg-nbd-N ------- links ------- intermediaries
//!                        | requests -> jobs -> parts                content
//!                        | what was stored
//!                      books  <--- sg-nbd-index ---- links -------   index
//!                      (one's own volume)
//! ```
//!
//! Each connection is a thread that owns its socket and its links. Volumes of one's own have books, which say where every
//! page is and what the index servers are still to be told; a thread of its own tells them. Volumes of others are asked
//! for at their index servers, for every read.

mod args;
mod books;
mod buffers;
mod connection;
mod engine;
mod handshake;
mod index;
mod job;
mod journal;
mod links;
mod listen;
mod lookup;
mod reads;
mod shared;
mod stream;
mod table;
mod volume;
mod watch;
mod wire;
mod writes;

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use libsg::ErrorKind;
use libsg::transport::Waker;
use libsg::vmd::{Connector as _, TcpConnector, VmdClient};
use libsg::wire::message::VolumeState;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use args::NbdArgs;
use handshake::Export;
use listen::Listener;
use shared::{Ending, Kind, Own, Shared, View};
use wire::device;

use crate::cli::{WrongArguments, secret};
use crate::{logs, process};

/// Exit code of one whose volume is lost.
const LOST: u8 = 3;

/// Exit code of one that was told twice to end.
const INTERRUPTED: i32 = 130;

/// Serves until a signal ends it, or the volume is of no further use.
pub fn run(args: &NbdArgs) -> Result<u8> {
    logs::start(args.log_format, logs::DAEMON);
    process::settle(None);
    let secret = secret(args.at.secret.as_deref())?;
    let listener = match &args.socket {
        Some(path) => Listener::unix(path)?,
        None => Listener::tcp(args.address()?)?,
    };
    let known: Vec<SocketAddr> = args.at.find(&secret)?.iter().map(|found| found.address).collect();
    let connector = TcpConnector::new(secret);
    let vmd = VmdClient::new(Arc::new(connector.clone()), args.timeout);
    let (look, looks) = bounded(1);
    let (ending, endings) = unbounded();
    let shared = Arc::new(open(args, &connector, &vmd, &known, look.clone(), ending.clone())?);
    catch_signals(ending)?;
    let threads = start(&shared, listener, vmd, known, looks, args)?;
    let ended = endings.recv().context("nobody is left to say how it ends")?;
    end(&shared, threads, &ended, &endings, &look, args)
}

/// Opens the volume that is asked for.
fn open(
    args: &NbdArgs,
    connector: &TcpConnector,
    vmd: &VmdClient,
    known: &[SocketAddr],
    look: Sender<()>,
    ending: Sender<Ending>,
) -> Result<Shared> {
    let timing = (args.timeout, args.unwritten);
    let own = |name: &str, opened: volume::Opened| -> Result<Shared> {
        let bytes = u64::from(opened.books.table.pages()) * libsg::page::PAGE_BYTES_U64;
        let export = export(name, &*opened.volume, bytes, false);
        let own = Own::new(opened.volume, opened.books, Waker::new()?);
        Ok(Shared::new((export, Kind::Own(own)), None, timing, ending.clone())?)
    };
    if let (Some(name), Some(size)) = (&args.create, args.size) {
        return own(name, volume::create(vmd, name, size.0, known)?);
    }
    let name = args.volume.as_deref().unwrap_or_default();
    let found = volume::find(vmd, name, known, args.degraded)?;
    let manifest = &found.info.manifest;
    if found.is_disk() && !args.read_only {
        return own(&manifest.vm, found.own(vmd)?);
    }
    if args.dissolve {
        let what = "--dissolve is for volumes that are written here: `sg dissolve` ends any other";
        return Err(WrongArguments(what.into()).into());
    }
    let volume = found.view(vmd)?;
    let export = export(&manifest.vm, &*volume, found.bytes(), true);
    let hasher = manifest.sharing.as_ref().map(|sharing| connector.hasher(sharing));
    let view = View::new(volume, found.info.state != VolumeState::Open, look);
    Ok(Shared::new((export, Kind::View(view)), hasher, timing, ending)?)
}

fn export(name: &str, volume: &dyn libsg::vmd::Volume, bytes: u64, read_only: bool) -> Export {
    let common = device::HAS_FLAGS | device::MULTI_CONN | device::ONE_CHUNK | device::FLUSH;
    let writes = device::FUA | device::TRIM | device::WRITE_ZEROES | device::FAST_ZERO;
    let flags = common | if read_only { device::READ_ONLY } else { writes };
    Export { name: name.to_owned(), number: volume.id().to_string(), bytes, flags }
}

fn catch_signals(ending: Sender<Ending>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals cannot be caught")?;
    let forward = move || {
        for signal in signals.forever() {
            if ending.send(Ending::Signal(signal)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("sg-nbd-signals".into()).spawn(forward)?;
    Ok(())
}

/// What a thread does.
type Body = Box<dyn FnOnce(&Arc<Shared>) + Send>;

/// The threads that run beside the connections'.
struct Threads {
    listen: JoinHandle<()>,
    index: JoinHandle<()>,
    watch: JoinHandle<()>,
}

fn start(
    shared: &Arc<Shared>,
    listener: Listener,
    vmd: VmdClient,
    known: Vec<SocketAddr>,
    looks: Receiver<()>,
    args: &NbdArgs,
) -> Result<Threads> {
    let spawn = |name: &str, body: Body| {
        let shared = Arc::clone(shared);
        let body = move || {
            // One that panics shall not leave the others waiting.
            let poison = Poison(&shared);
            body(&shared);
            std::mem::forget(poison);
        };
        std::thread::Builder::new().name(name.into()).spawn(body)
    };
    let index = spawn("sg-nbd-index", Box::new(|shared| tell(index::run(shared).map_err(|e| e.chain()))))?;
    let watch = spawn("sg-nbd-watch", Box::new(move |shared| watch::run(shared, &vmd, &known, &looks)))?;
    // A volume that was just made is told its index servers, before anybody is told of it.
    if let Err(error) = shared.settle() {
        shared.fail(error);
    }
    let export = &shared.export;
    let uri = listener.uri(&export.name);
    let listen = spawn(
        "sg-nbd-listen",
        Box::new(move |shared| tell(listen::run(shared, &listener).map_err(|e| format!("{e:#}")))),
    )?;
    if shared.has_failed() {
        return Ok(Threads { listen, index, watch });
    }
    let read_only = shared.own().is_none();
    tracing::info!(
        uri,
        volume = export.number,
        name = export.name,
        bytes = export.bytes,
        read_only,
        timeout_s = args.timeout.as_secs_f64(),
        "listening"
    );
    let ready = json!({
        "event": "listening",
        "uri": uri,
        "volume": export.number,
        "name": export.name,
        "bytes": export.bytes,
        "read_only": read_only,
    });
    // Nobody may be there to read it, which is no reason not to serve.
    let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
    Ok(Threads { listen, index, watch })
}

fn tell(ended: Result<(), String>) {
    if let Err(error) = ended {
        tracing::error!(error, "a thread ended");
    }
}

/// Fails what the threads share, unless it is forgotten.
struct Poison<'s>(&'s Shared);

impl Drop for Poison<'_> {
    fn drop(&mut self) {
        self.0.fail(libsg::Error::new(ErrorKind::Poisoned, "a thread of sg nbd panicked"));
    }
}

/// Answers what was asked, tells the index servers all, and goes.
fn end(
    shared: &Arc<Shared>,
    threads: Threads,
    ended: &Ending,
    endings: &Receiver<Ending>,
    look: &Sender<()>,
    args: &NbdArgs,
) -> Result<u8> {
    if let Ending::Signal(signal) = ended {
        tracing::info!(signal, "going");
        let endings = endings.clone();
        std::thread::Builder::new().name("sg-nbd-hurry".into()).spawn(move || {
            while let Ok(ending) = endings.recv() {
                if let Ending::Signal(_) = ending {
                    tracing::warn!("going at once: what was not flushed may be lost");
                    std::process::exit(INTERRUPTED);
                }
            }
        })?;
    }
    shared.stop();
    let joined = threads.listen.join();
    let settled = shared.settle();
    if let Some(own) = shared.own() {
        own.index.wake();
        if let Err(error) = &settled {
            shared.fail(libsg::Error::new(error.kind, error.chain()));
        }
    }
    // One look, and it sees that this is the end.
    let _ = look.try_send(());
    let joined = joined.and(threads.index.join()).and(threads.watch.join());
    if let Ending::Failed(error) = ended {
        eprintln!("sg: {}", error.chain());
        return Ok(if error.kind == ErrorKind::Lost { LOST } else { 1 });
    }
    settled.map_err(|error| anyhow::anyhow!("what was not flushed may be lost: {}", error.chain()))?;
    joined.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    if let Some(own) = shared.own().filter(|_| args.dissolve) {
        let members = own.volume.dissolve().map_err(|error| anyhow::anyhow!("{}", error.chain()))?;
        tracing::info!(members, "the volume is dissolved");
    }
    Ok(0)
}
