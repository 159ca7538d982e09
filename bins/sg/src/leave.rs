//! `sg serve` at its first signal: what it holds goes to others before it does.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use libsg::page::PAGE_BYTES_U64;
use libsg::server::{DrainOptions, Drained, Holding, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::wire::announcement::Duty;
use signal_hook::iterator::Handle;

use crate::cli::{Intermediaries, ServeArgs};

/// Hands over in a thread of its own, and ends the wait for signals when that is done. Where it stays, that is announced, so
/// that it is chosen again.
pub fn start(
    server: &Arc<ServerHandle>,
    (args, secret): (&ServeArgs, &PoolSecret),
    signals: Handle,
    announce_leaving: impl Fn(bool) + Send + 'static,
) -> Result<std::thread::JoinHandle<()>> {
    let (server, secret, timeout) = (Arc::clone(server), secret.clone(), args.drain_timeout);
    let pool = args.pool.clone().or_else(|| args.announce.as_ref().map(ToString::to_string));
    let at = Intermediaries { intermediary: args.peer.clone(), pool, secret: None };
    let hand_over = move || {
        let others = || find(&at, &secret);
        tracing::info!(timeout_s = timeout.as_secs(), "handing what is here to others, then going");
        match server.drain(&DrainOptions { timeout, others: &others }) {
            Ok(Drained { volumes, pages }) => {
                tracing::info!(volumes, pages, "others have all that was here: going");
                signals.close();
            }
            Err(error) => {
                tracing::warn!(error = error.chain(), "not everything could be handed over");
                refuse(&server.holdings());
                announce_leaving(false);
            }
        }
    };
    Ok(std::thread::Builder::new().name("sg-serve-leaves".into()).spawn(hand_over)?)
}

/// Others of the pool that do not leave themselves.
fn find(at: &Intermediaries, secret: &PoolSecret) -> Vec<SocketAddr> {
    if at.intermediary.is_empty() && at.pool.is_none() {
        return Vec::new();
    }
    let found = at.find(secret).inspect_err(|error| tracing::warn!(%error, "others cannot be found"));
    let stays = |duty: Duty| matches!(duty, Duty::Lends);
    let mut found = found.unwrap_or_default();
    found.retain(|found| found.announced.as_ref().is_none_or(|announced| stays(announced.duty)));
    found.into_iter().map(|found| found.address).collect()
}

fn refuse(held: &[Holding]) {
    for holding in held {
        let volume = &holding.summary;
        tracing::warn!(
            volume = %volume.volume,
            vm = volume.vm,
            state = ?volume.state,
            pages = volume.stored_pages,
            bytes = volume.stored_pages * PAGE_BYTES_U64,
            indexed_pages = holding.indexed_pages,
            has_state = holding.has_state,
            age_s = volume.age_s,
            "staying: this volume is needed"
        );
    }
    tracing::warn!(
        volumes = held.len(),
        "pages of live volumes are here, and taken again; a second signal goes and loses them"
    );
}
