//! libsg's conformance suite over simulated devices.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use libsg::server::{Config, Server, ServerHandle};
use libsg::vmd::Connector;
use libsg::vmd::conformance::{Fixture, FixtureNode, run_all};
use vmd_rdma::verbs::simulated::Network;

struct Simulated {
    network: Network,
    hosts: AtomicU16,
}

struct Node {
    config: Config,
    server: Option<ServerHandle>,
}

impl Fixture for Simulated {
    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(common::connector(&self.network))
    }

    fn start(&self, limit_bytes: u64) -> Box<dyn FixtureNode> {
        let host = self.hosts.fetch_add(1, Ordering::Relaxed);
        let mut node = Node { config: common::config(&self.network, host, limit_bytes), server: None };
        node.restart();
        Box::new(node)
    }
}

impl FixtureNode for Node {
    fn address(&self) -> SocketAddr {
        self.config.listen
    }

    fn kill(&mut self) {
        self.server.take().into_iter().for_each(ServerHandle::shutdown);
    }

    fn restart(&mut self) {
        let server = Server::bind(self.config.clone()).unwrap();
        self.config.listen = server.address();
        self.server = Some(server.spawn().unwrap());
    }
}

#[test]
fn over_simulated_devices() {
    for seed in 1..=3 {
        let network = Network::new(seed);
        run_all(&Simulated { network: network.clone(), hosts: AtomicU16::new(common::CLIENTS + 1) });
        let counts = network.counts();
        eprintln!("seed {seed}: {counts:?}");
        assert_eq!(counts.refused, 0, "no key was used that was not ours to use");
        assert!(counts.written_bytes > 4 * common::MIB && counts.read_bytes > 4 * common::MIB, "{counts:?}");
    }
}
