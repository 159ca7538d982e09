//! Intermediaries with simulated devices, and links to them.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test binary uses some of it, and shall say where it fails"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libsg::ids::{Checksum, Epoch, MemberSet, Placement, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::vmd::conformance::{Fixture, FixtureNode};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Reply, Request};
use libsg::wire::message::{Member, VmdReply, VmdRequest};
use libsg::wire::{GetEntry, PageEntry};
use libsg::{Error, Result};
use vmd_rdma::verbs::Device;
use vmd_rdma::verbs::simulated::Network;
use vmd_rdma::{RdmaBackend, RdmaConnector, RdmaLink};

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const MIB: u64 = 1 << 20;

/// The clients' host; intermediaries are those from 2 on.
pub const CLIENTS: u16 = 1;

pub fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"the pool's").unwrap()
}

/// How an intermediary on that host is set up.
pub fn config(network: &Network, host: u16, memory_bytes: u64) -> Config {
    config_at(network.device(host), &format!("i{host}"), memory_bytes)
}

/// The same, with this device.
pub fn config_at(device: Arc<dyn Device>, name: &str, memory_bytes: u64) -> Config {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = Config::new(listen, name.to_owned(), memory_bytes, secret());
    config.backend = Some(Arc::new(RdmaBackend::new(device)));
    config
}

/// What the conformance suite needs: clients at one device, and intermediaries at others.
pub struct Devices<F> {
    pub clients: Arc<dyn Device>,
    pub next: F,
}

struct Node {
    config: Config,
    server: Option<ServerHandle>,
}

impl<F: Fn() -> Arc<dyn Device> + Send + Sync> Fixture for Devices<F> {
    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(RdmaConnector::new(secret(), self.clients.clone()))
    }

    fn start(&self, limit_bytes: u64) -> Box<dyn FixtureNode> {
        let mut node = Node { config: config_at((self.next)(), "node", limit_bytes), server: None };
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

pub fn serve(network: &Network, host: u16) -> ServerHandle {
    Server::bind(config(network, host, 64 * MIB)).unwrap().spawn().unwrap()
}

pub fn connector(network: &Network) -> RdmaConnector {
    RdmaConnector::new(secret(), network.device(CLIENTS))
}

pub fn content(page: u32) -> Vec<u8> {
    let seed = (u64::from(page) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (1..=PAGE_BYTES as u64 / 8).flat_map(|word| seed.wrapping_mul(word).to_le_bytes()).collect()
}

pub fn batch(pages: impl IntoIterator<Item = u32>) -> (Vec<PageEntry>, Vec<PageSlice>) {
    let page = |page| {
        let bytes = content(page);
        let entry = PageEntry::raw(PageIndex(page), Round(0), Checksum::of(&bytes));
        (entry, PageSlice::owned(bytes.into()))
    };
    pages.into_iter().map(page).unzip()
}

pub struct Client {
    pub link: Box<RdmaLink>,
    pub volume: VolumeId,
}

pub const VOLUME: VolumeId = VolumeId(1);

impl Client {
    pub fn connect(network: &Network, server: &ServerHandle, epoch: u64) -> Self {
        Self::link(&connector(network), server, epoch, Class::Bulk)
    }

    pub fn link(connector: &RdmaConnector, server: &ServerHandle, epoch: u64, class: Class) -> Self {
        let link = connector.link(server.address(), (VOLUME, Epoch(epoch)), class, PATIENCE).unwrap();
        Self { link: Box::new(link), volume: VOLUME }
    }

    /// A volume at these, as the client of the first.
    pub fn create(network: &Network, servers: &[&ServerHandle]) -> Self {
        let members: Vec<Member> = servers
            .iter()
            .map(|server| Member { node: server.node().clone(), address: server.address() })
            .collect();
        let (name, unit) = ("ram".into(), InstallUnit::Page);
        let ram = Region { name, guest_address: None, length_bytes: 1 << 30, unit };
        let manifest = Manifest { vm: "vm".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None };
        let create = VmdRequest::Create { manifest, members };
        let mut clients = servers.iter().map(|server| Self::connect(network, server, 1));
        let mut first = clients.next().unwrap();
        first.control(&create).unwrap();
        clients.for_each(|mut client| client.control(&create).map(|_| ()).unwrap());
        first
    }

    pub fn control(&mut self, request: &VmdRequest) -> Result<VmdReply> {
        ask(&mut *self.link, Request::Control(request), PATIENCE, |reply| match reply {
            Reply::Control(reply) => Ok(reply),
            other => panic!("{other:?}"),
        })
    }

    /// The first pages go over the connection; those behind this go over the device.
    pub fn warm_up(&mut self) {
        self.put([0]).unwrap();
        for _ in 0..1000 {
            if self.link.is_open() {
                return;
            }
            self.control(&VmdRequest::Describe).unwrap();
        }
        panic!("the device was not let in");
    }

    pub fn put(&mut self, pages: impl IntoIterator<Item = u32>) -> Result<Vec<Option<Placement>>> {
        self.put_copies(pages, MemberSet::NONE)
    }

    pub fn put_copies(
        &mut self,
        pages: impl IntoIterator<Item = u32>,
        copies: MemberSet,
    ) -> Result<Vec<Option<Placement>>> {
        let (entries, slices) = batch(pages);
        ask(&mut *self.link, Request::Put { entries: &entries, slices: &slices, copies }, PATIENCE, |reply| {
            match reply {
                Reply::Stored { placements, missing } => {
                    assert!(missing.is_none());
                    Ok(placements.to_vec())
                }
                other => panic!("{other:?}"),
            }
        })
    }

    /// The same, of pages of which is known what they are.
    pub fn get_known(&mut self, pages: &[u32], placements: &[Option<Placement>]) -> Result<Vec<bool>> {
        let (known, _) = batch(pages.iter().copied());
        let wanted: Vec<GetEntry> = wanted(pages, placements);
        let request = Request::GetKnown { wanted: &wanted, known: &known };
        ask(&mut *self.link, request, PATIENCE, |reply| match reply {
            Reply::Pages { entries, bytes } => Ok(whole(entries, bytes)),
            other => panic!("{other:?}"),
        })
    }

    /// Whether each page is there, as it was put.
    pub fn get(&mut self, pages: &[u32], placements: &[Option<Placement>]) -> Result<Vec<bool>> {
        let wanted: Vec<GetEntry> = wanted(pages, placements);
        ask(&mut *self.link, Request::Get(&wanted), PATIENCE, |reply| match reply {
            Reply::Pages { entries, bytes } => Ok(whole(entries, bytes)),
            other => panic!("{other:?}"),
        })
    }
}

/// Pages and where they lie.
pub fn wanted(pages: &[u32], placements: &[Option<Placement>]) -> Vec<GetEntry> {
    let at = |(page, place): (&u32, &Option<Placement>)| GetEntry {
        page: PageIndex(*page),
        placement: place.unwrap(),
    };
    pages.iter().zip(placements).map(at).collect()
}

/// Whether each page is there, with its own bytes.
pub fn whole(entries: &[PageEntry], bytes: &[u8]) -> Vec<bool> {
    let mut bytes = bytes.chunks(PAGE_BYTES);
    let there = entries
        .iter()
        .map(|entry| {
            entry.encoded_bytes > 0 && {
                let page = bytes.next().unwrap();
                assert!(page == content(entry.page.0), "page {}", entry.page);
                assert_eq!(entry.checksum, Checksum::of(page));
                true
            }
        })
        .collect();
    assert!(bytes.next().is_none());
    there
}

/// Waits until `holds`; it does in the end.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn kind<T>(result: std::result::Result<T, Error>) -> libsg::ErrorKind {
    result.map(|_| ()).unwrap_err().kind
}
