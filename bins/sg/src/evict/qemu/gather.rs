//! `sg gather --qmp`: a VM arrives at a stock QEMU, or is claimed, and is followed until it has all of its memory.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use libsg::migrate::destination::{
    ArrivalPhase, ClaimOptions, Destination, DestinationOptions, Incoming, claim, resume,
};
use libsg::page::PageRange;
use libsg::report::{DestinationReport, Report, Status};
use libsg::units::Rate;
use libsg::{Error, ErrorKind};
use qemu::{ArrivingQemu, Qmp, Record, StateFile};
use serde_json::json;

use super::super::args::GatherArgs;
use super::super::show::{Row, Show};
use super::super::{INTERRUPTED, PARKED_WHERE, addresses, told, write_json};
use super::{clear, tell};
use crate::cli::WrongArguments;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);

/// How long intermediaries have to give the volume's memory back.
const DISSOLVE_TIME: Duration = Duration::from_secs(15);

/// So many ranges of pages that are lost are named to people.
const NAMED: usize = 1000;

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
        if let Some(pages) = named(&failure.lost) {
            eprintln!("{}: lost are the pages {pages}", socket.display());
        }
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

/// Pages, as people read them. `None` where there are none.
fn named(ranges: &[PageRange]) -> Option<String> {
    let names: Vec<String> = ranges.iter().take(NAMED).map(ToString::to_string).collect();
    let more = ranges.len() - names.len();
    let rest = if more > 0 { format!(" and {more} more ranges (--json names them)") } else { String::new() };
    (!names.is_empty()).then(|| names.join(", ") + &rest)
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
        observer: Arc::new(|event| tell(event, None)),
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
fn follow_in(incoming: &Incoming, interrupted: &AtomicBool) -> libsg::Result<DestinationReport> {
    let (mut show, began, mut noted) = (Show::new("gathered", 1), Instant::now(), false);
    loop {
        match incoming.wait_gathered(LOOK) {
            // It may have failed by one, too.
            Err(error)
                if error.kind == ErrorKind::Timeout && incoming.progress().phase != ArrivalPhase::Failed => {}
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

#[cfg(test)]
mod test {
    use libsg::page::PageIndex;

    use super::*;

    #[test]
    fn lost_pages_are_named() {
        let range = |first| PageRange::new(PageIndex(first), 1 + first % 2);
        assert_eq!(named(&[]), None);
        assert_eq!(named(&[range(4), range(7)]).as_deref(), Some("4, 7-8"));
        let many = named(&(0..2002).map(|at| range(3 * at)).collect::<Vec<_>>()).expect("some");
        assert!(many.ends_with("2997-2998 and 1002 more ranges (--json names them)"), "{many}");
    }
}
