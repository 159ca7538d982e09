//! A stock QEMU, over its QMP socket: `sg evict --qmp` is its destination, and `sg gather --qmp` another's source.

mod again;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use libsg::content::Sharing;
use libsg::migrate::destination::{ClaimOptions, Destination, DestinationOptions, Incoming, claim, resume};
use libsg::migrate::source::{Outgoing, SourceOptions, To, start};
use libsg::migrate::{Event, Mode, PoolSecret, RoundOptions};
use libsg::report::{Report, Status};
use libsg::units::Rate;
use libsg::vmd::Connector;
use libsg::{Error, ErrorKind};
use qemu::{ArrivingQemu, DepartedFile, Departure, Disks, Found, Qmp, Record, StateFile};
use serde_json::json;

use super::args::{EvictArgs, GatherArgs};
use super::show::{Row, Show};
use super::{INTERRUPTED, PARKED_WHERE, addresses, told, write_json};
use crate::cli::{WrongArguments, secret};

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);

/// How long the destination has to take the VM.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long intermediaries have to give the volume's memory back.
const DISSOLVE_TIME: Duration = Duration::from_secs(15);

/// The VM leaves, or is gone on with; the exit code.
pub fn evict(args: &EvictArgs, socket: &Path, interrupted: &AtomicBool) -> Result<u8> {
    if args.resume {
        return again::evict(args, socket, interrupted);
    }
    let to = match (&args.destinations()?[..], &args.park) {
        ([to], None) => Some(*to),
        ([], Some(_)) => None,
        _ => {
            let what =
                "say where the VM goes: --to HOST:PORT, once, where sg gather --qmp waits, or --park NAME";
            return Err(WrongArguments(what.into()).into());
        }
    };
    let secret = secret(args.at.secret.as_deref())?;
    let intermediaries = if args.at.is_empty() { Vec::new() } else { addresses(&args.at)? };
    if to.is_none() && intermediaries.is_empty() {
        return Err(WrongArguments(PARKED_WHERE.into()).into());
    }
    let mode = mode(args, !intermediaries.is_empty())?;
    let connector = args.transport.connector(secret.clone(), None)?;
    let mut qmp = Qmp::connect(socket)?;
    let disks = if args.shared_disks { Disks::Shared } else { Disks::AsFound };
    clear(socket, &qemu::source(&mut qmp, disks)?)?;
    if args.dry_run {
        eprintln!("{}: nothing stands in the way", socket.display());
        return Ok(0);
    }
    let name = socket.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut departure = match args.window {
        Some(window) => Departure::begin_within(qmp, &name, window.0),
        None => Departure::begin(qmp, &name),
    }?;
    let file = DepartedFile::new(&args.state_file(socket), args.at.secret.as_deref());
    if let Err(error) = departure.record(file, to.is_none()) {
        departure.give_up()?;
        return Err(error.into());
    }
    let to = to.map_or_else(
        || To::Parked { name: parking_name(args, &departure), arbiter: args.arbiter() },
        To::from,
    );
    let outgoing = match begin(args, &departure, (&to, mode), (secret, connector), intermediaries) {
        Ok(outgoing) => outgoing,
        Err(error) => {
            departure.give_up()?;
            return Err(error.into());
        }
    };
    see_out(args, socket, (outgoing, departure, to), interrupted)
}

/// Follows a VM that leaves, and says what became of it.
fn see_out(
    args: &EvictArgs,
    socket: &Path,
    (outgoing, departure, to): (Outgoing, Departure, To),
    interrupted: &AtomicBool,
) -> Result<u8> {
    let left = follow_out(&outgoing, departure.manifest().vm.as_str(), interrupted);
    let (report, resumed) = (outgoing.report(), departure.resumed());
    let is_committed = outgoing.progress().committed;
    let ended = match &left {
        Ok(()) => departure.complete(args.quit),
        Err(_) if is_committed => Ok(()),
        Err(_) => departure.give_up(),
    };
    let mut told = json!(Report::merged(Some(&report), None));
    told["socket"] = json!(socket);
    told["resumed"] = json!(resumed);
    let whither = match &to {
        To::Destination(to) => ("to", json!(to), String::new()),
        To::Parked { name, .. } => ("parked_as", json!(name), format!("parked as {name}, ")),
    };
    told[whither.0] = whither.1;
    write_json(args.json.as_deref(), &told)?;
    ended?;
    if let Err(error) = left {
        eprintln!("{}: {}", socket.display(), error.chain());
        if is_committed {
            again::hint(args, socket);
        }
        let was_called_off = error.kind == ErrorKind::Cancelled && interrupted.load(Ordering::Acquire);
        return Ok(if was_called_off { INTERRUPTED } else { told::code(&report.status) });
    }
    let whole = if args.quit { "its QEMU has ended" } else { "its QEMU may be ended" };
    eprintln!("{}: evicted: {}{whole}", socket.display(), whither.2);
    Ok(0)
}

/// How its memory leaves, through intermediaries or without any.
fn mode(args: &EvictArgs, through: bool) -> Result<Mode> {
    let usual = if through { Mode::ScatterGather } else { Mode::PostCopy };
    let mode = args.mode.map_or(usual, Mode::from);
    let against = match mode {
        Mode::PreCopy => "--mode pre-copy: that QEMU does by itself (its own migrate)",
        Mode::Hybrid if args.park.is_some() => {
            "--mode hybrid: a QEMU's VM that is parked is sent once, paused"
        }
        Mode::Hybrid | Mode::ScatterGather if !through => {
            "--mode hybrid and scatter-gather need intermediaries: --intermediary HOST:PORT or --pool"
        }
        _ => return Ok(mode),
    };
    Err(WrongArguments(against.into()).into())
}

/// The name under which it is parked: the one that was said, or its own.
fn parking_name(args: &EvictArgs, departure: &Departure) -> String {
    let said = args.park.as_ref().filter(|name| !name.is_empty());
    said.unwrap_or(&departure.manifest().vm).clone()
}

fn begin(
    args: &EvictArgs,
    departure: &Departure,
    (to, mode): (&To, Mode),
    (secret, connector): (PoolSecret, Arc<dyn Connector>),
    intermediaries: Vec<SocketAddr>,
) -> libsg::Result<Outgoing> {
    let mut manifest = departure.manifest().clone();
    let domain = args.domain_of(&manifest.vm);
    manifest.sharing = domain.map(|domain| Sharing { domain: domain.to_owned(), ..Sharing::default() });
    let options = SourceOptions {
        to: to.clone(),
        mode,
        intermediaries,
        replacements: None,
        replicas: args.replicas,
        rounds: RoundOptions::USUAL,
        connector,
        secret,
        scatter_limit_bytes_per_s: args.scatter.map_or(0, Rate::bytes_per_s),
        ready_timeout: READY_TIMEOUT,
        observer: Arc::new(tell),
    };
    let vm = match to {
        To::Destination(_) => departure.vm(),
        To::Parked { .. } => departure.vm_to_park(),
    };
    start(Box::new(vm), Arc::new(departure.pages()), manifest, options)
}

/// Until it is out, or is not; an interruption calls it off where it can be.
fn follow_out(outgoing: &Outgoing, vm: &str, interrupted: &AtomicBool) -> libsg::Result<()> {
    let (mut show, began, mut noted) = (Show::new("evicted", 1), Instant::now(), false);
    loop {
        match outgoing.wait_evicted(LOOK) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind == ErrorKind::Timeout && !outgoing.is_over() => {}
            Err(error) => return Err(error),
        }
        if interrupted.load(Ordering::Acquire) && !std::mem::replace(&mut noted, true) {
            // Behind COMMIT it goes on.
            if let Err(error) = outgoing.cancel() {
                show.say(&error.chain());
            }
        }
        let told = outgoing.progress();
        let percent = told.safe_pages as f64 * 100.0 / told.total_pages.max(1) as f64;
        let bytes = told.direct_bytes + told.staged_bytes;
        show.rows(&[Row { name: vm.to_owned(), percent, bytes, over: false }], began.elapsed());
    }
}

/// A VM arrives, or is claimed, or is gone on with; the exit code.
pub fn gather(args: &GatherArgs, socket: &Path, interrupted: &AtomicBool) -> Result<u8> {
    let way = Way::of(args)?;
    let path = args.state_file(socket);
    let (incoming, file) = match way {
        Way::Resumed => go_on(args, socket, &path)?,
        way => arrive(args, socket, (way, &path))?,
    };
    let arrived = follow_in(&incoming, interrupted);
    let (status, report) = match arrived {
        Ok(report) => (report.status.clone(), Some(report)),
        Err(error) => (Status::from(&error), None),
    };
    if report.is_some()
        && let Err(error) = incoming.wait_dissolved(DISSOLVE_TIME).and_then(|()| file.remove())
    {
        eprintln!("{}: {}", socket.display(), error.chain());
    }
    let mut told = json!(Report::merged(None, report.as_ref()));
    told["status"] = json!(status);
    told["socket"] = json!(socket);
    write_json(args.json.as_deref(), &told)?;
    if let Status::Failed(failure) = &status {
        eprintln!("{}: {}", socket.display(), failure.message);
        if report.is_none() && file.exists() {
            let of = args.state_file.as_ref().map(|path| format!(" --state-file {}", path.display()));
            let of = of.unwrap_or_default();
            eprintln!(
                "if its QEMU is \"postcopy-paused\": sg gather --qmp {} --resume{of}",
                socket.display()
            );
        }
    }
    let was_interrupted = interrupted.load(Ordering::Acquire) && status != Status::Ok;
    Ok(if was_interrupted { INTERRUPTED } else { told::code(&status) })
}

/// How a VM comes.
enum Way {
    Offered,
    Claimed(ClaimOptions),
    Resumed,
}

impl Way {
    fn of(args: &GatherArgs) -> Result<Self> {
        match (args.resume, args.listen, &args.claim[..]) {
            (true, ..) => Ok(Self::Resumed),
            (false, Some(_), []) => Ok(Self::Offered),
            (false, None, [name]) if args.at.is_empty() => {
                let what = format!("{PARKED_WHERE}: those that hold {name:?}");
                Err(WrongArguments(what).into())
            }
            (false, None, [name]) => {
                let (name, intermediaries) = (name.clone(), addresses(&args.at)?);
                let (force, engines) = (args.force, Some(pools::engines()));
                Ok(Self::Claimed(ClaimOptions { name, intermediaries, force, engines }))
            }
            _ => {
                let what = "say which VM: --listen ADDR:PORT, where sg evict --qmp sends it, --claim NAME, of one, or --resume, \
                            the one whose sg gather died";
                Err(WrongArguments(what.into()).into())
            }
        }
    }
}

fn options(
    args: &GatherArgs,
    secret: Option<&Path>,
    listen: Option<SocketAddr>,
) -> Result<DestinationOptions> {
    let secret = crate::cli::secret(secret)?;
    let nowhere = (Ipv4Addr::LOCALHOST, 0).into();
    let connector = args.transport.connector(secret.clone(), listen.map(|listen| listen.ip()))?;
    Ok(DestinationOptions {
        source_grace: args.source_grace,
        gather_limit: args.limit.map_or(0, Rate::bytes_per_s),
        observer: Arc::new(tell),
        ..DestinationOptions::new(listen.unwrap_or(nowhere), secret, connector)
    })
}

/// A QEMU that waits for a VM takes it.
fn arrive(args: &GatherArgs, socket: &Path, (way, path): (Way, &Path)) -> Result<(Incoming, StateFile)> {
    let secret = args.at.secret.as_deref();
    let options = options(args, secret, args.listen)?;
    let mut qmp = Qmp::connect(socket)?;
    clear(socket, &qemu::destination(&mut qmp)?)?;
    let vm = ArrivingQemu::new(qmp, args.on_lost.into());
    if let Way::Claimed(wanted) = way {
        let file = StateFile::new(path, None, secret);
        return Ok((claim(Box::new(vm.recorded(file.clone())), wanted, options)?, file));
    }
    let destination = Destination::listen(options)?;
    println!("{}", json!({ "event": "listening", "address": destination.address() }));
    let file = StateFile::new(path, Some(destination.address()), secret);
    Ok((destination.accept(Box::new(vm.recorded(file.clone())))?, file))
}

/// A QEMU that has a VM, and lost who fed it, is fed on.
fn go_on(args: &GatherArgs, socket: &Path, path: &Path) -> Result<(Incoming, StateFile)> {
    let Some(record) = Record::read(path)? else {
        bail!(
            "{}: nothing is to be resumed, as far as is known here: there is no {}, which is there from before a VM runs until it \
             has all of its memory; --state-file names another",
            socket.display(),
            path.display()
        );
    };
    let secret = args.at.secret.as_deref().or(record.secret.as_deref());
    let listen = args.listen.or(record.listen);
    let options = options(args, secret, listen)?;
    let mut qmp = Qmp::connect(socket)?;
    clear(socket, &qemu::resumable(&mut qmp, &record)?)?;
    let file = StateFile::new(path, listen, secret);
    let vm = ArrivingQemu::new(qmp, args.on_lost.into()).recorded(file.clone()).going_on();
    let listens = listen.filter(|_| !record.unfinished.source_gone);
    let incoming = resume(Box::new(vm), record.unfinished, options)?;
    if let Some(listen) = listens {
        println!("{}", json!({ "event": "listening", "address": listen }));
    }
    Ok((incoming, file))
}

/// Until all of it is there, or is not; an interruption gives it up where it can be.
fn follow_in(
    incoming: &Incoming,
    interrupted: &AtomicBool,
) -> libsg::Result<libsg::report::DestinationReport> {
    let (mut show, began, mut noted) = (Show::new("gathered", 1), Instant::now(), false);
    loop {
        match incoming.wait_gathered(LOOK) {
            Err(error) if error.kind == ErrorKind::Timeout => {}
            ended => return ended,
        }
        if interrupted.load(Ordering::Acquire) && !std::mem::replace(&mut noted, true) {
            match incoming.cancel() {
                Ok(()) => return Err(Error::new(ErrorKind::Cancelled, "the VM was given up")),
                // Behind COMMIT it goes on.
                Err(error) => show.say(&error.chain()),
            }
        }
        let told = incoming.progress();
        let percent = told.pages.held as f64 * 100.0 / told.pages.total.max(1) as f64;
        let bytes = told.direct_bytes + told.gathered_bytes;
        show.rows(&[Row { name: "vm".into(), percent, bytes, over: false }], began.elapsed());
    }
}

/// Says what was found, and fails where something stands in the way.
fn clear(socket: &Path, found: &Found) -> Result<()> {
    for warning in &found.warnings {
        eprintln!("sg: {}: {warning}", socket.display());
    }
    if found.refusals.is_empty() {
        return Ok(());
    }
    bail!("{}: {}", socket.display(), found.refusals.join("\n  and "))
}

/// Events as lines of JSON on standard output, as VMMs print them.
fn tell(event: &Event) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    // Nobody may be reading; the migration goes on.
    let _ = writeln!(out, "{}", json!(event)).and_then(|()| out.flush());
}
