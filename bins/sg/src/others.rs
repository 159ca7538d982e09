//! Other intermediaries of the pool: who takes over from one that leaves, and copies that a volume's own have no room for.

use std::cmp::Reverse;
use std::net::SocketAddr;

use libsg::discovery::Found;
use libsg::discovery::select::memory_offer;
use libsg::server::Others;
use libsg::transport::PoolSecret;
use libsg::wire::announcement::Duty;

use crate::cli::{Intermediaries, ServeArgs};

/// Those of `--peer` and `--pool`.
#[derive(Debug)]
pub struct Peers {
    at: Intermediaries,
    secret: PoolSecret,
    zone: Option<String>,
}

impl Peers {
    /// `None` where none are named, nor is a pool.
    pub fn of(args: &ServeArgs, secret: &PoolSecret) -> Option<Self> {
        let pool = args.pool.clone().or_else(|| args.announce.as_ref().map(ToString::to_string));
        let at = Intermediaries { intermediary: args.peer.clone(), pool, secret: None };
        let any = !at.intermediary.is_empty() || at.pool.is_some();
        any.then(|| Self { at, secret: secret.clone(), zone: args.zone.clone() })
    }
}

impl Others for Peers {
    /// Those that do not leave themselves: first those that are named, then those in other zones than this one, each with
    /// the most room first.
    fn others(&self) -> Vec<SocketAddr> {
        let found =
            self.at.find(&self.secret).inspect_err(|error| tracing::warn!(%error, "others cannot be found"));
        in_order(found.unwrap_or_default(), self.zone.as_deref())
    }
}

fn in_order(mut found: Vec<Found>, zone: Option<&str>) -> Vec<SocketAddr> {
    let stays = |duty: Duty| matches!(duty, Duty::Lends);
    found.retain(|found| found.announced.as_ref().is_none_or(|announced| stays(announced.duty)));
    found.sort_by_key(|found| {
        found.announced.as_ref().map(|announced| {
            let is_beside = zone.is_some() && announced.zone.as_deref() == zone;
            (is_beside, Reverse(memory_offer(announced)))
        })
    });
    found.into_iter().map(|found| found.address).collect()
}
