//! The conformance suite over every backend that this crate has.

use std::net::SocketAddr;
use std::sync::Arc;

use libsg::page::PAGE_BYTES_U64;
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::vmd::conformance::{Fixture, FixtureNode, run_all};
use libsg::vmd::{Connector, MemoryConnector, MemoryNode, TcpConnector};

struct InMemory(MemoryConnector);

struct InMemoryNode(MemoryNode);

impl Fixture for InMemory {
    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(self.0.clone())
    }

    fn start(&self, limit_bytes: u64) -> Box<dyn FixtureNode> {
        Box::new(InMemoryNode(self.0.node("memory", limit_bytes / PAGE_BYTES_U64).expect("a node")))
    }
}

impl FixtureNode for InMemoryNode {
    fn address(&self) -> SocketAddr {
        self.0.member().address
    }

    fn kill(&mut self) {
        self.0.kill();
    }

    fn restart(&mut self) {
        self.0.restart().expect("restarted");
    }
}

struct Tcp(PoolSecret);

struct TcpNode {
    config: Config,
    server: Option<ServerHandle>,
}

impl Fixture for Tcp {
    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(TcpConnector::new(self.0.clone()))
    }

    fn start(&self, limit_bytes: u64) -> Box<dyn FixtureNode> {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut node =
            TcpNode { config: Config::new(listen, "tcp", limit_bytes, self.0.clone()), server: None };
        node.restart();
        Box::new(node)
    }
}

impl FixtureNode for TcpNode {
    fn address(&self) -> SocketAddr {
        self.config.listen
    }

    fn kill(&mut self) {
        self.server.take().into_iter().for_each(ServerHandle::shutdown);
    }

    fn restart(&mut self) {
        let server = Server::bind(self.config.clone()).expect("bound");
        self.config.listen = server.address();
        self.server = Some(server.spawn().expect("serves"));
    }
}

#[test]
fn in_memory() {
    run_all(&InMemory(MemoryConnector::new()));
}

#[test]
fn tcp() {
    run_all(&Tcp(PoolSecret::from_bytes(b"conformance").expect("not empty")));
}
