//! Where hosts announce themselves and are found, by how it is written: `multicast:GROUP` or `etcd://HOST/PREFIX`. What
//! commands have in common; libsg itself knows the seams only.

mod spares;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use discovery_etcd::{EtcdArbiter, EtcdPool, Watcher};
use libsg::discovery::multicast::{self, MulticastPool};
use libsg::discovery::{Announces, Describe, Hears, Pool};
use libsg::transport::PoolSecret;
use libsg::vmd::Engines;
use libsg::wire::announcement::Announcement;
use libsg::{Error, ErrorKind, Result};

pub use spares::Spares;

/// Where hosts announce themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// A multicast group: nothing to set up, and nobody whose death matters.
    Multicast(multicast::Place),
    /// An etcd, where a cluster has one.
    Etcd(discovery_etcd::Place),
}

impl Meeting {
    /// Our own address on the way there.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when no route leads there.
    pub fn own_address(&self) -> Result<IpAddr> {
        match self {
            Self::Multicast(place) => place.own_address(),
            Self::Etcd(place) => place.own_address(),
        }
    }

    /// Finds who is there, now and then.
    ///
    /// # Errors
    /// The group cannot be joined.
    pub fn open(&self, secret: &PoolSecret) -> Result<Box<dyn Pool>> {
        Ok(match self {
            Self::Multicast(place) => Box::new(MulticastPool::open(*place, secret)?),
            Self::Etcd(place) => Box::new(EtcdPool::open(place, secret)?),
        })
    }

    /// Announces a host from now on.
    ///
    /// # Errors
    /// The host cannot be announced, or not there.
    pub fn announce(&self, secret: &PoolSecret, describe: Describe) -> Result<Box<dyn Announces>> {
        Ok(match self {
            Self::Multicast(place) => Box::new(multicast::Announcer::start(*place, secret, describe)?),
            Self::Etcd(place) => Box::new(discovery_etcd::Announcer::start(place, secret, describe)?),
        })
    }

    /// Announces a host from now on, and hears all others.
    ///
    /// # Errors
    /// As [`Self::announce`].
    pub fn join(&self, secret: &PoolSecret, describe: Describe) -> Result<Box<dyn Hears>> {
        Ok(match self {
            Self::Multicast(place) => Box::new(multicast::Announcer::start(*place, secret, describe)?),
            Self::Etcd(place) => Box::new(EtcdMember {
                announcer: discovery_etcd::Announcer::start(place, secret, describe)?,
                watcher: Watcher::start(place, secret)?,
            }),
        })
    }
}

/// Says and hears: two who know nothing of each other.
struct EtcdMember {
    announcer: discovery_etcd::Announcer,
    watcher: Watcher,
}

impl Announces for EtcdMember {
    fn announce(&self) {
        self.announcer.announce();
    }
}

impl Hears for EtcdMember {
    fn hosts(&self) -> Vec<Announcement> {
        self.watcher.hosts()
    }
}

/// The engines that a parked VM may name, which say who may have it.
#[must_use]
pub fn engines() -> Engines {
    Arc::new(EtcdArbiter::named)
}

/// The engine that says who may have what is parked in a pool, by how the pool is written; `None` where a keeper does.
#[must_use]
pub fn arbiter_of(pool: &str) -> Option<String> {
    pool.starts_with("etcd:").then(|| pool.to_owned())
}

impl FromStr for Meeting {
    type Err = Error;

    /// `multicast:GROUP[:PORT][@ADDR]`, the group alone, or `etcd://HOST:PORT[,HOST:PORT…]/PREFIX`.
    fn from_str(text: &str) -> Result<Self> {
        if text.starts_with("etcd:") {
            return text.parse().map(Self::Etcd);
        }
        let place = text.strip_prefix("multicast:").unwrap_or(text);
        place.parse().map(Self::Multicast).map_err(|cause| {
            let what = format!(
                "{text:?} is no pool: multicast:GROUP[:PORT][@ADDR], or etcd://HOST[:PORT][,HOST…]/PREFIX"
            );
            Error::new(ErrorKind::Input, what).because(cause)
        })
    }
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Multicast(place) => write!(f, "multicast:{place}"),
            Self::Etcd(place) => place.fmt(f),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_scheme_says_which() {
        let read = |text: &str| text.parse::<Meeting>();
        let group = read("multicast:239.83.71.1@10.0.0.3").expect("good");
        assert!(
            matches!(group, Meeting::Multicast(_)) && read("239.83.71.1@10.0.0.3").expect("good") == group
        );
        let etcd = read("etcd://10.0.0.1,10.0.0.2/sg").expect("good");
        assert!(matches!(etcd, Meeting::Etcd(_)));
        for meeting in [group, etcd] {
            assert_eq!(read(&meeting.to_string()).expect("good"), meeting);
        }
        for wrong in ["", "etcd:x", "etcd://", "multicast:10.0.0.1", "static:list", "http://10.0.0.1/sg"] {
            assert_eq!(read(wrong).expect_err(wrong).kind, ErrorKind::Input, "{wrong}");
        }
    }
}
