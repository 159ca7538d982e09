//! `sg serve`: the intermediary.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use anyhow::{Context as _, Result};
use libsg::discovery::Announces;
use libsg::server::{Config, Holding, Others, Server};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::{ServeArgs, WrongArguments, secret};
use crate::others::Peers;
use crate::{announce, leave, local_first, logs, notify, process};

/// Exit code of one that went with pages of live volumes.
const LOST: u8 = 3;

/// Serves until a signal ends it.
pub fn run(args: &ServeArgs) -> Result<u8> {
    logs::start(args.log_format, logs::DAEMON);
    let config = config(args)?;
    let others = config.others.clone();
    let announced = announce::Setup::of(args, &config);
    let local_first = local_first::Setup::of(args, &config)?;
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals cannot be caught")?;
    process::settle(Some(args.oom_score_adj));
    process::check_memory(args.memory.0);
    let server = Server::bind(config).map_err(|e| anyhow::anyhow!("{}", e.chain()))?;
    let server = Arc::new(server.spawn().map_err(|e| anyhow::anyhow!("{}", e.chain()))?);
    let _watch = local_first.map(|setup| setup.start(&server)).transpose()?;
    let leaves = Arc::new(AtomicBool::new(false));
    let announcer: Option<Arc<dyn Announces>> = match announced {
        Some(setup) => Some(setup.start(&server, Arc::clone(&leaves))?.into()),
        None => None,
    };
    tracing::info!(
        address = %server.address(), node = %server.node(), memory_bytes = args.memory.0, "listening"
    );
    // Nobody may be there to read it, which is no reason not to serve.
    let ready = json!({
        "event": "listening",
        "address": server.address().to_string(),
        "node": server.node().to_string(),
    });
    let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
    notify::tell("READY=1");

    let (handle, mut leaving) = (signals.handle(), None);
    for signal in signals.forever() {
        let held = server.holdings();
        if held.is_empty() {
            tracing::info!(signal, "nobody needs what is here: going");
            break;
        }
        notify::tell("STOPPING=1");
        if args.force || leaving.is_some() {
            drop(announcer);
            return Ok(go_anyway(&held));
        }
        let (flag, weak) = (Arc::clone(&leaves), announcer.as_ref().map(Arc::downgrade));
        let announce = move |leaves| {
            flag.store(leaves, Ordering::Relaxed);
            weak.iter().filter_map(Weak::upgrade).for_each(|announcer| announcer.announce());
        };
        announce(true);
        leaving =
            Some(leave::start(&server, (args.drain_timeout, others.clone()), handle.clone(), announce)?);
    }
    // It says that it leaves.
    drop(announcer);
    Ok(0)
}

fn config(args: &ServeArgs) -> Result<Config> {
    let secret = secret(args.secret.as_deref())?;
    if secret.is_open() && !args.listen.ip().is_loopback() && !args.insecure {
        let what = format!(
            "listening on {} without --secret would let anybody read the VMs' memory: give a secret, or listen on \
             127.0.0.1, or say --insecure",
            args.listen
        );
        return Err(WrongArguments(what).into());
    }
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = args.name.clone().unwrap_or_else(host);
    let mut config = Config::new(args.listen, name, args.memory.0, secret);
    config.zone.clone_from(&args.zone);
    config.limit_in_bytes_per_s = args.limit_in.bytes_per_s();
    config.limit_out_bytes_per_s = args.limit_out.bytes_per_s();
    config.backend =
        args.transport.backend(args.listen.ip()).map_err(|e| anyhow::anyhow!("{}", e.chain()))?;
    config.others = Peers::of(args, &config.secret).map(|peers| Arc::new(peers) as Arc<dyn Others>);
    config.canary_flip_slot = args.canary_flip_slot;
    if args.canary_flip_slot.is_some() {
        tracing::warn!("TEST CANARY: a stored page will be damaged on purpose");
    }
    Ok(config)
}

fn go_anyway(held: &[Holding]) -> u8 {
    for holding in held {
        let volume = &holding.summary;
        tracing::error!(
            volume = %volume.volume,
            vm = volume.vm,
            pages = volume.stored_pages,
            indexed_pages = holding.indexed_pages,
            has_state = holding.has_state,
            age_s = volume.age_s,
            "lost: going with pages of a live volume"
        );
    }
    let lost: Vec<_> = held
        .iter()
        .map(|holding| {
            json!({
                "volume": holding.summary.volume.to_string(),
                "vm": holding.summary.vm,
                "pages": holding.summary.stored_pages,
                "has_state": holding.has_state,
                "age_s": holding.summary.age_s,
            })
        })
        .collect();
    let _ = writeln!(std::io::stdout(), "{}", json!({ "event": "lost", "volumes": lost }));
    LOST
}
