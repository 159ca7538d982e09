//! The devices of a run's hosts.

use std::sync::Arc;
use std::time::Duration;

use libsg::server::backend::Backend;
use libsg::vmd::Connector;
use vmd_rdma::verbs::simulated::{Network, Pace};
use vmd_rdma::{RdmaBackend, RdmaConnector};

use crate::net::{NodeNumber, Weather};
use crate::random::Random;
use crate::scenario::secret;
use crate::side::SideNetwork;

/// What hosts have, by seed.
#[derive(Clone, Copy)]
enum Kind {
    /// No devices: pages go over connections.
    Connections,
    Devices,
    /// Some have one.
    Mixed,
}

const KINDS: [Kind; 8] = {
    use Kind::{Connections, Devices, Mixed};
    [Connections, Devices, Devices, Devices, Devices, Mixed, Mixed, Mixed]
};

/// Regions that a device has at once, on one host in four.
const REGIONS: [usize; 5] = [0, 1, 2, 4, 8];

pub struct Devices {
    network: Network,
    kind: Kind,
    seed: Random,
    /// What breaks.
    breaks: Random,
    woken: Vec<u16>,
}

impl Devices {
    pub fn of(seed: u64, weather: &Weather) -> Self {
        let random = Random::new(seed);
        let Weather { delay, jitter, port_rate: bytes_per_s } = *weather;
        Self {
            network: Network::on_a_clock(seed, Pace { delay, jitter, bytes_per_s }),
            kind: random.fork(80).pick(&KINDS),
            breaks: random.fork(81),
            seed: random,
            woken: Vec::new(),
        }
    }

    fn of_node(&self, node: NodeNumber) -> Random {
        self.seed.fork(1000 + node as u64)
    }

    /// A node's device, if it has one.
    fn device(&self, node: NodeNumber) -> Option<Arc<dyn vmd_rdma::verbs::Device>> {
        let mut random = self.of_node(node);
        let has_one = match self.kind {
            Kind::Connections => false,
            Kind::Devices => true,
            Kind::Mixed => !random.one_in(3),
        };
        if random.one_in(4) {
            self.network.limit_regions(host(node), random.pick(&REGIONS));
        }
        has_one.then(|| self.network.device(host(node)))
    }
}

/// A node as its device is numbered.
fn host(node: NodeNumber) -> u16 {
    node as u16
}

impl SideNetwork for Devices {
    fn connector(&self, node: NodeNumber) -> Option<Arc<dyn Connector>> {
        Some(Arc::new(RdmaConnector::new(secret(), self.device(node)?)))
    }

    fn backend(&self, node: NodeNumber) -> Option<Arc<dyn Backend>> {
        Some(Arc::new(RdmaBackend::new(self.device(node)?)))
    }

    fn remove(&mut self, node: NodeNumber) {
        self.network.remove(host(node));
    }

    /// Connections and queue pairs, or queue pairs only, of both or of one of them.
    fn break_links(&mut self, one: NodeNumber, other: NodeNumber) -> bool {
        let (one, other) = (host(one), host(other));
        let which = self.breaks.below(4);
        if which != 1 {
            self.network.fail_between(one, other);
        }
        if which != 2 {
            self.network.fail_between(other, one);
        }
        which == 0
    }

    fn cut(&mut self, one: NodeNumber, other: NodeNumber, cut: bool) {
        self.network.cut(host(one), host(other), cut);
    }

    fn deliver(&mut self, now: Duration, stirred: &mut Vec<NodeNumber>) {
        self.network.advance(now, &mut self.woken);
        stirred.extend(self.woken.drain(..).map(NodeNumber::from));
    }

    fn next_delivery(&self) -> Option<Duration> {
        self.network.next()
    }

    fn moved_bytes(&self) -> u64 {
        let counts = self.network.counts();
        counts.written_bytes + counts.read_bytes
    }
}
