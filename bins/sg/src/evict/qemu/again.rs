//! `sg evict --qmp … --resume`: goes on with a VM whose `sg evict` died.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use libsg::migrate::RoundOptions;
use libsg::migrate::source::{SourceOptions, resume};
use libsg::units::Rate;
use qemu::{DepartedFile, Departure, Qmp, Standing, bring_back, finish, standing};

use super::super::args::EvictArgs;
use super::{READY_TIMEOUT, clear, see_out, tell};
use crate::cli::secret;

/// The VM is gone on with, or is its source's again; the exit code.
pub fn evict(args: &EvictArgs, socket: &Path, interrupted: &AtomicBool) -> Result<u8> {
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
        return Ok(0);
    }
    let Some(unscattered) = departed.unscattered.clone() else {
        bring_back(qmp, &departed, &file)?;
        eprintln!(
            "{}: nothing is to be resumed: nobody was told of COMMIT, and {} runs on here. What waits for it (sg gather) is to be \
             ended, and what it has at intermediaries given back (sg ls, sg dissolve); then it can leave",
            socket.display(),
            departed.vm()
        );
        return Ok(1);
    };
    if stands == Standing::Completed {
        finish(qmp, &departed, &file, args.quit)?;
        eprintln!("{}: nothing is to be resumed: {} is evicted", socket.display(), departed.vm());
        return Ok(0);
    }
    let secret = secret(args.at.secret.as_deref().or(departed.secret.as_deref()))?;
    let to = unscattered.to.clone();
    let options = SourceOptions {
        to: to.clone(),
        mode: unscattered.mode,
        intermediaries: Vec::new(),
        replacements: None,
        replicas: unscattered.replicas,
        rounds: RoundOptions::USUAL,
        connector: args.transport.connector(secret.clone(), None)?,
        secret,
        scatter_limit_bytes_per_s: args.scatter.map_or(0, Rate::bytes_per_s),
        ready_timeout: READY_TIMEOUT,
        observer: Arc::new(tell),
    };
    let departure = Departure::go_on(qmp, &departed, file, stands)?;
    let outgoing = resume(Box::new(departure.vm()), Arc::new(departure.pages()), unscattered, options)?;
    see_out(args, socket, (outgoing, departure, to), interrupted)
}

/// Says how another may go on, behind COMMIT.
pub fn hint(args: &EvictArgs, socket: &Path) {
    let of = args.state_file.as_ref().map(|path| format!(" --state-file {}", path.display()));
    let of = of.unwrap_or_default();
    eprintln!("if its QEMU is \"postcopy-paused\": sg evict --qmp {} --resume{of}", socket.display());
}
