//! `sg evict --qmp … --resume`: goes on with a VM whose `sg evict` died.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use libsg::migrate::RoundOptions;
use libsg::migrate::source::{SourceOptions, To, resume};
use libsg::units::Rate;
use qemu::{Departed, DepartedFile, Departure, Qmp, Standing, bring_back, finish, standing};
use vmms::Start;

use super::super::Prepared;
use super::super::args::EvictArgs;
use super::super::driven::Driven;
use super::super::eviction::Vm;
use super::clear;
use super::leaver::{Leaver, READY_TIMEOUT, Through};
use crate::cli::secret;

/// What there is to do.
pub enum Again {
    /// Nothing any more; the exit code.
    Over(u8),
    /// The VM goes on to leave.
    Leaves(Box<Prepared>),
}

/// The VM is gone on with, or is its source's again.
pub fn evict(args: &EvictArgs, socket: &Path) -> Result<Again> {
    let path = args.state_file(socket);
    let file = DepartedFile::new(&path, None);
    let Some(departed) = file.read()? else {
        bail!(
            "{}: nothing is to be resumed, as far as is known here: there is no {}, which is there from when a VM begins to leave \
             until it is out, or stays; --state-file names another. Do not run a VM (cont) that may have been given away",
            socket.display(),
            path.display()
        );
    };
    let mut qmp = Qmp::connect(socket)?;
    let (found, stands) = standing(&mut qmp, &departed)?;
    clear(socket, &found)?;
    if args.dry_run {
        eprintln!("{}: nothing stands in the way", socket.display());
        return Ok(Again::Over(0));
    }
    let Some(unscattered) = departed.unscattered.clone().filter(|_| stands != Standing::Here) else {
        return stays(socket, qmp, (&departed, &file));
    };
    if stands == Standing::Completed {
        finish(qmp, &departed, &file, args.quit)?;
        eprintln!("{}: nothing is to be resumed: {} is evicted", socket.display(), departed.vm());
        return Ok(Again::Over(0));
    }
    let secret = secret(args.at.secret.as_deref().or(departed.secret.as_deref()))?;
    let through = Through::of(args);
    let told = through.tells(departed.vm(), socket);
    let mode = unscattered.mode;
    let (to, park, arbiter) = match unscattered.to.clone() {
        To::Destination(address) => (Some(address), None, None),
        To::Parked { name, arbiter } => (None, Some(name), arbiter),
    };
    let options = SourceOptions {
        to: unscattered.to.clone(),
        mode,
        intermediaries: Vec::new(),
        replacements: None,
        replicas: unscattered.replicas,
        rounds: RoundOptions::USUAL,
        connector: args.transport.connector(secret.clone(), None)?,
        secret,
        scatter_limit_bytes_per_s: args.scatter.map_or(0, Rate::bytes_per_s),
        ready_timeout: READY_TIMEOUT,
        observer: told,
    };
    let how = Start {
        mode,
        to,
        park,
        arbiter,
        intermediaries: Vec::new(),
        spares: Vec::new(),
        dedup: unscattered.manifest.sharing.clone(),
        replicas: unscattered.replicas,
        scatter: args.scatter.map(|rate| rate.to_string()),
    };
    let name = departed.vm().to_owned();
    let departure = Departure::go_on(qmp, &departed, file, stands)?;
    let outgoing = resume(Box::new(departure.vm()), Arc::new(departure.pages()), unscattered, options)?;
    let leaver = Leaver::going_on(socket, &through, (outgoing, departure))?;
    let vm = Vm { driven: Driven::Qemu(leaver), name, how: Some(how), leaves: true, weight: None };
    Ok(Again::Leaves(Box::new(Prepared::of_one(vm))))
}

/// Nobody was told of COMMIT: the VM runs on here.
fn stays(socket: &Path, qmp: Qmp, (departed, file): (&Departed, &DepartedFile)) -> Result<Again> {
    let vm = departed.vm();
    bring_back(qmp, departed, file).with_context(|| format!("{vm} is not back yet; --resume tries again"))?;
    eprintln!(
        "{}: nothing is to be resumed: nobody was told of COMMIT, and {vm} runs on here. What waits for it (sg gather) is to be \
         ended, and what it has at intermediaries given back (sg ls, sg dissolve); then it can leave",
        socket.display(),
    );
    Ok(Again::Over(1))
}
