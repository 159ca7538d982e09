//! Leaving: what lies here goes to others before this intermediary does.
//!
//! ```text
//!  drain --> one volume after the other, until there is nothing left to do at any of them
//!               volume   who there is to take it over; state, pages, index, and who grants claims, in this order
//!                 plan   which page went to whom: a pure core
//!                 line   a connection to who takes over
//! ```
//!
//! Whoever reads here is answered until the end, and goes first. Nothing is forgotten here before it was acknowledged there:
//! if this one dies on the way, no more is lost than by any other death.

pub(super) mod heirs;
pub(super) mod line;
pub(super) mod look;
pub mod plan;
mod volume;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use self::volume::{Handing, Pass};
use super::limit::Limit;
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::VolumeId;

/// After a volume could not be handed over it is tried again after so long.
const REST: Duration = Duration::from_millis(200);

/// How often the log says why it could not.
const TELL_AGAIN: Duration = Duration::from_secs(5);

/// Whoever reads a volume asks its members each second who they are: one that leaves is there for so long after there were new
/// ones. Where nobody else is left whom the reader knows, it is the only one that can say.
const LINGER: Duration = Duration::from_secs(3);

/// Whoever was read from within this time goes first.
const READ_LATELY: Duration = Duration::from_millis(50);

/// How an intermediary leaves.
pub struct DrainOptions<'a> {
    /// How long it may get no further, as nobody takes what is left. Then it stays, and takes pages again.
    pub timeout: Duration,
    /// Intermediaries that may become members of volumes whose own have no room, or are gone.
    pub others: &'a dyn Fn() -> Vec<SocketAddr>,
}

/// What was handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Of so many volumes.
    pub volumes: u64,
    /// So many pages: those that others had anyway are not among them.
    pub pages: u64,
}

/// What handing over, or on, needs of the server.
pub(super) struct Around<'s> {
    pub store: &'s Store,
    pub limit_out: &'s Limit,
    pub others: &'s dyn Fn() -> Vec<SocketAddr>,
    reads: Cell<(u64, Option<Instant>)>,
}

impl<'s> Around<'s> {
    pub(super) fn new(
        store: &'s Store,
        limit_out: &'s Limit,
        others: &'s dyn Fn() -> Vec<SocketAddr>,
    ) -> Self {
        Self { store, limit_out, others, reads: Cell::new((0, None)) }
    }

    /// Whether anybody ever read here.
    fn was_read(&self) -> bool {
        self.store.reads.load(std::sync::atomic::Ordering::Relaxed) > 0
    }

    /// Whether somebody reads here.
    pub(super) fn is_read(&self) -> bool {
        let (reads, now) = (self.store.reads.load(std::sync::atomic::Ordering::Relaxed), host::now());
        let (before, mut at) = self.reads.get();
        if reads != before {
            at = Some(now);
        }
        self.reads.set((reads, at));
        at.is_some_and(|at| now.saturating_duration_since(at) < READ_LATELY)
    }
}

/// Hands over everything.
///
/// # Errors
/// What could not be handed over, and why: then this intermediary stays.
pub(super) fn run(store: &Store, limit_out: &Limit, options: &DrainOptions<'_>) -> Result<Drained> {
    let around = Around::new(store, limit_out, options.others);
    let mut handings: BTreeMap<VolumeId, Handing> = BTreeMap::new();
    let (mut lingered, mut shut, mut told) = (false, false, None);
    let (mut least_left, mut least_at) = (u64::MAX, host::now());
    store.set_leaving(true);
    loop {
        let (worked, failed) = pass(&around, &mut handings)?;
        let so_far = || handings.values().map(|handing| handing.so_far(false));
        let left = so_far().map(|of| of.left_pages).sum();
        if left < least_left {
            (least_left, least_at) = (left, host::now());
        }
        // Everything was looked at again, and is where it is to be.
        if failed.is_none() && !worked {
            if handings.values().any(Handing::grew)
                && around.was_read()
                && !std::mem::replace(&mut lingered, true)
            {
                host::thread::sleep(LINGER);
                continue;
            }
            // Behind a door that is shut it looks once more: what came since it looked is found, and nothing comes after.
            if !shut {
                shut = true;
                store.set_shut(true);
                continue;
            }
            let volumes = handings.values().filter(|handing| handing.was_here()).count() as u64;
            return Ok(Drained { volumes, pages: so_far().map(|of| of.pages).sum() });
        }
        if std::mem::take(&mut shut) {
            store.set_shut(false);
        }
        let idle = host::elapsed(least_at);
        let mut is_to_stay = || handings.values_mut().any(|handing| handing.is_to_stay(&around));
        if idle >= options.timeout || (idle >= options.timeout / 2 && is_to_stay()) {
            handings.values().for_each(|handing| handing.stay(store));
            store.set_leaving(false);
            let restless = || Error::new(ErrorKind::Timeout, "those who take over come and go");
            return Err(failed.unwrap_or_else(restless));
        }
        let Some(error) = failed else { continue };
        if told.is_none_or(|at| host::elapsed(at) >= TELL_AGAIN) {
            told = Some(host::now());
            tracing::warn!(error = error.chain(), "not handed over yet: tried again");
        }
        host::thread::sleep(REST);
    }
}

/// Looks at each volume. Whether there was something to do, and what could not be done.
fn pass(around: &Around<'_>, handings: &mut BTreeMap<VolumeId, Handing>) -> Result<(bool, Option<Error>)> {
    let (mut worked, mut failed, store) = (false, None, around.store);
    for volume in store.volumes() {
        if store.is_closing() {
            return Err(Error::new(ErrorKind::Cancelled, "the server closes"));
        }
        let handing = handings.entry(volume).or_insert_with(|| Handing::new(volume));
        match handing.pass(around) {
            Ok(did) => {
                worked |= did != Pass::Clean;
                store.set_handed(volume, handing.so_far(did != Pass::Again));
            }
            Err(error) => {
                store.set_handed(volume, handing.so_far(false));
                handing.failed();
                failed = Some(named(volume, error));
            }
        }
    }
    Ok((worked, failed))
}

fn named(volume: VolumeId, error: Error) -> Error {
    let message = format!("the volume {volume} cannot be handed over");
    Error::new(error.kind, message).because(error)
}
