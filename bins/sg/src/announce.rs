//! `sg serve --announce`: what the daemon says of itself to the pool.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use libsg::discovery::Announces;
use libsg::discovery::meter::Meter;
use libsg::limits::ZONE_BYTES_MAX;
use libsg::server::{Config, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use pools::Meeting;

use crate::cli::{ServeArgs, WrongArguments};

/// What of the daemon's set-up is announced.
pub struct Setup {
    meeting: Meeting,
    secret: PoolSecret,
    zone: Option<String>,
    link_bytes_per_s: Option<u64>,
    limits_bytes_per_s: (u64, u64),
    connections_max: usize,
    volumes_max: usize,
}

impl Setup {
    /// Nothing where nothing is to be announced.
    pub fn of(args: &ServeArgs, config: &Config) -> Option<Self> {
        Some(Self {
            meeting: args.announce.clone()?,
            secret: config.secret.clone(),
            zone: config.zone.clone(),
            link_bytes_per_s: args.link_bytes_per_s(),
            limits_bytes_per_s: (config.limit_in_bytes_per_s, config.limit_out_bytes_per_s),
            connections_max: config.connections_max,
            volumes_max: config.volumes_max,
        })
    }

    /// Announces the server from now on, until the announcer is dropped: as one that leaves, once that is set.
    pub fn start(self, server: &Arc<ServerHandle>, leaves: Arc<AtomicBool>) -> Result<Box<dyn Announces>> {
        if self.zone.as_ref().is_some_and(|zone| zone.is_empty() || zone.len() > ZONE_BYTES_MAX) {
            return Err(WrongArguments(format!("--zone: a zone has 1 to {ZONE_BYTES_MAX} bytes")).into());
        }
        let own = self.meeting.own_address().map_err(|e| anyhow::anyhow!("{}", e.chain()))?;
        let address = match server.address() {
            listens if listens.ip().is_unspecified() => SocketAddr::new(own, listens.port()),
            listens => listens,
        };
        let interface = match own {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let mut meter = Meter::new(interface, self.link_bytes_per_s);
        let (meeting, secret, server) = (self.meeting.clone(), self.secret.clone(), Arc::clone(server));
        let describe = move || self.describe(&server, address, &mut meter, &leaves);
        meeting.announce(&secret, Box::new(describe)).map_err(|e| anyhow::anyhow!("{}", e.chain()))
    }

    fn describe(
        &self,
        server: &ServerHandle,
        address: SocketAddr,
        meter: &mut Meter,
        leaves: &AtomicBool,
    ) -> Announcement {
        let (statistics, room) = (server.statistics(), meter.measure());
        let within = |free: u64, limit: u64| if limit == 0 { free } else { free.min(limit) };
        let (limit_in, limit_out) = self.limits_bytes_per_s;
        let now = statistics.link;
        let left = |most: usize, used: usize| u32::try_from(most.saturating_sub(used)).unwrap_or(u32::MAX);
        Announcement {
            node: server.node().clone(),
            address,
            zone: self.zone.clone(),
            duty: match (leaves.load(Ordering::Relaxed), room.pressed) {
                (true, _) => Duty::Leaves,
                (false, true) => Duty::Pressed,
                (false, false) => Duty::Lends,
            },
            transports: Transports::TCP,
            memory: MemoryRoom {
                host_bytes: room.host_bytes,
                available_bytes: room.available_bytes,
                limit_bytes: statistics.limit_bytes,
                used_bytes: statistics.used_bytes,
            },
            link: LinkRoom {
                free_in_bytes_per_s: within(room.link.free_in_bytes_per_s, now.limit_in_bytes_per_s),
                free_out_bytes_per_s: within(room.link.free_out_bytes_per_s, now.limit_out_bytes_per_s),
                limit_in_bytes_per_s: limit_in,
                limit_out_bytes_per_s: limit_out,
                ..room.link
            },
            cpu_idle_permille: room.cpu_idle_permille,
            connections_free: left(self.connections_max, statistics.connections as usize),
            volumes_free: left(self.volumes_max, statistics.volumes.len()),
        }
    }
}
