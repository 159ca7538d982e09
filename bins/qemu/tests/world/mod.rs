//! What a migration of a QEMU's VM needs beside the QEMUs: intermediaries, and both ends of libsg, in this process.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use libsg::migrate::destination::{ClaimOptions, Destination, DestinationOptions, Incoming, claim};
use libsg::migrate::source::{Outgoing, SourceOptions, To, start};
use libsg::migrate::{Mode, Observer, OutgoingVm, PoolSecret, RoundOptions};
use libsg::server::{Config, Server, ServerHandle};
use libsg::vmd::TcpConnector;
use qemu::{ArrivingQemu, Departure, OnLost, Qmp};

use crate::process::PATIENCE;

/// The hosts of a migration, but for the QEMUs.
pub struct World {
    pub secret: PoolSecret,
    pub connector: Arc<TcpConnector>,
    pub servers: Vec<ServerHandle>,
    /// Intermediaries that somebody else holds.
    pub others: Vec<SocketAddr>,
}

impl World {
    /// With so many intermediaries, each with room for more than the VM.
    pub fn new(intermediaries: usize) -> Self {
        Self::with_room(intermediaries, 256 << 20)
    }

    pub fn with_room(intermediaries: usize, bytes: u64) -> Self {
        let secret = PoolSecret::from_bytes(b"known to everybody in this process").expect("a secret");
        let connector = Arc::new(TcpConnector::new(secret.clone()));
        let server = |at: usize| {
            let config = Config::new(anywhere(), format!("i{at}"), bytes, secret.clone());
            Server::bind(config).and_then(Server::spawn).expect("serves")
        };
        let servers = (0..intermediaries).map(server).collect();
        Self { secret, connector, servers, others: Vec::new() }
    }

    pub fn arrive(&self, qmp: Qmp, gather_limit: u64) -> (Incoming, SocketAddr) {
        self.arrive_as(qmp, OnLost::Pause, |options| options.gather_limit = gather_limit)
    }

    /// With other options than the usual ones.
    pub fn arrive_as(
        &self,
        qmp: Qmp,
        on_lost: OnLost,
        change: impl FnOnce(&mut DestinationOptions),
    ) -> (Incoming, SocketAddr) {
        let mut options = DestinationOptions::new(anywhere(), self.secret.clone(), self.connector.clone());
        options.source_grace = Duration::from_secs(2);
        change(&mut options);
        let destination = Destination::listen(options).expect("listens");
        let to = destination.address();
        (destination.accept(Box::new(ArrivingQemu::new(qmp, on_lost))).expect("waits"), to)
    }

    pub fn leave(&self, departure: &Departure, to: SocketAddr, observer: Observer) -> Outgoing {
        self.leave_as(departure, to, |options| options.observer = observer)
    }

    /// With other options than the usual ones.
    pub fn leave_as(
        &self,
        departure: &Departure,
        to: SocketAddr,
        change: impl FnOnce(&mut SourceOptions),
    ) -> Outgoing {
        self.leave_by(Box::new(departure.vm()), departure, to, change)
    }

    /// With something between libsg and the VM.
    pub fn leave_by(
        &self,
        vm: Box<dyn OutgoingVm>,
        departure: &Departure,
        to: SocketAddr,
        change: impl FnOnce(&mut SourceOptions),
    ) -> Outgoing {
        let mut options = self.options(to.into());
        change(&mut options);
        let pages = Arc::new(departure.pages());
        start(vm, pages, departure.manifest().clone(), options).expect("starts")
    }

    pub fn park(&self, departure: &Departure, name: &str, limit_bytes_per_s: u64) -> Outgoing {
        let options =
            SourceOptions { scatter_limit_bytes_per_s: limit_bytes_per_s, ..self.options(To::parked(name)) };
        let pages = Arc::new(departure.pages());
        start(Box::new(departure.vm_to_park()), pages, departure.manifest().clone(), options).expect("starts")
    }

    pub fn claim(&self, qmp: Qmp, name: &str, force: bool) -> Incoming {
        let options = DestinationOptions::new(anywhere(), self.secret.clone(), self.connector.clone());
        let wanted =
            ClaimOptions { name: name.into(), intermediaries: self.intermediaries(), force, engines: None };
        claim(Box::new(ArrivingQemu::new(qmp, OnLost::Pause)), wanted, options).expect("claims")
    }

    fn intermediaries(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(ServerHandle::address).chain(self.others.iter().copied()).collect()
    }

    fn options(&self, to: To) -> SourceOptions {
        SourceOptions {
            to,
            intermediaries: self.intermediaries(),
            replacements: None,
            replicas: 1,
            mode: Mode::ScatterGather,
            rounds: RoundOptions::default(),
            secret: self.secret.clone(),
            connector: self.connector.clone(),
            scatter_limit_bytes_per_s: 0,
            ready_timeout: PATIENCE,
            observer: Arc::new(|_| {}),
        }
    }
}

pub fn anywhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}
