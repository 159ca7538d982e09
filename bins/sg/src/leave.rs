//! `sg serve` at its first signal: what it holds goes to others before it does.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use libsg::page::PAGE_BYTES_U64;
use libsg::server::{DrainOptions, Drained, Holding, Others, ServerHandle};
use signal_hook::iterator::Handle;

/// Hands over in a thread of its own, and ends the wait for signals when that is done. Where it stays, that is announced, so
/// that it is chosen again.
pub fn start(
    server: &Arc<ServerHandle>,
    (timeout, others): (Duration, Option<Arc<dyn Others>>),
    signals: Handle,
    announce_leaving: impl Fn(bool) + Send + 'static,
) -> Result<std::thread::JoinHandle<()>> {
    let server = Arc::clone(server);
    let hand_over = move || {
        let others = || others.as_ref().map(|others| others.others()).unwrap_or_default();
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
