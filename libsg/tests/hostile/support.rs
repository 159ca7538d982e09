//! A server, and a client that waits for each answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::Result;
use libsg::ids::{Checksum, Epoch, MemberSet, Placement, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::vmd::TcpConnector;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Link, Reply, Request};
use libsg::wire::message::{Member, VmdReply, VmdRequest};
use libsg::wire::{GetEntry, PageEntry};

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const MIB: u64 = 1 << 20;

pub fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"the pool's").unwrap()
}

pub fn serve(change: impl FnOnce(&mut Config)) -> ServerHandle {
    let mut config = Config::new("127.0.0.1:0".parse().unwrap(), "i1", 64 * MIB, secret());
    change(&mut config);
    Server::bind(config).unwrap().spawn().unwrap()
}

/// Waits until `holds`; it does in the end.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn manifest(pages: u64) -> Manifest {
    let length_bytes = pages * PAGE_BYTES as u64;
    let region = Region { name: "ram".into(), guest_address: None, length_bytes, unit: InstallUnit::Page };
    Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None }
}

/// What a page of a volume holds.
pub fn content(volume: VolumeId, page: u32) -> Vec<u8> {
    let seed = (volume.0 as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(page);
    (0..PAGE_BYTES as u64 / 8).flat_map(|word| (seed.wrapping_mul(2 * word + 1)).to_le_bytes()).collect()
}

/// A batch of pages: table and bytes.
pub fn batch(volume: VolumeId, pages: impl Iterator<Item = u32>) -> (Vec<PageEntry>, Vec<PageSlice>) {
    pages
        .map(|page| {
            let bytes = content(volume, page);
            let entry = PageEntry::raw(PageIndex(page), Round(0), Checksum::of(&bytes));
            (entry, PageSlice::owned(Arc::from(bytes)))
        })
        .unzip()
}

/// One client of one volume.
pub struct Client {
    pub link: Box<dyn Link>,
    pub volume: VolumeId,
}

impl Client {
    /// Connects, without creating anything.
    pub fn connect(server: &ServerHandle, volume: u128, epoch: u64) -> Self {
        let volume = VolumeId(volume);
        let link = TcpConnector::new(secret())
            .connect(server.address(), volume, Epoch(epoch), Class::Bulk, PATIENCE)
            .unwrap();
        Self { link, volume }
    }

    /// Connects, and creates the volume.
    pub fn create(server: &ServerHandle, volume: u128, pages: u64) -> Self {
        let mut client = Self::connect(server, volume, 1);
        let members = vec![Member { node: server.node().clone(), address: server.address() }];
        client.control(&VmdRequest::Create { manifest: manifest(pages), members }).unwrap();
        client
    }

    pub fn control(&mut self, request: &VmdRequest) -> Result<VmdReply> {
        ask(&mut *self.link, Request::Control(request), PATIENCE, |reply| match reply {
            Reply::Control(reply) => Ok(reply),
            other => panic!("{other:?}"),
        })
    }

    pub fn put(&mut self, pages: std::ops::Range<u32>) -> Result<Vec<Option<Placement>>> {
        let (entries, slices) = batch(self.volume, pages);
        let request = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        ask(&mut *self.link, request, PATIENCE, |reply| match reply {
            Reply::Stored { placements, .. } => Ok(placements.to_vec()),
            other => panic!("{other:?}"),
        })
    }

    /// The pages' bytes, `None` where they are gone.
    pub fn get(&mut self, wanted: &[GetEntry]) -> Result<Vec<Option<Vec<u8>>>> {
        ask(&mut *self.link, Request::Get(wanted), PATIENCE, |reply| match reply {
            Reply::Pages { entries, bytes } => {
                let mut bytes = bytes.chunks(PAGE_BYTES);
                let page =
                    |entry: &PageEntry| (entry.encoded_bytes > 0).then(|| bytes.next().unwrap().to_vec());
                Ok(entries.iter().map(page).collect())
            }
            other => panic!("{other:?}"),
        })
    }

    /// Puts pages, reads them back, and compares.
    pub fn check(&mut self, pages: std::ops::Range<u32>) {
        let placements = self.put(pages.clone()).unwrap();
        let wanted: Vec<GetEntry> = wanted(pages.clone(), &placements);
        for (page, got) in pages.zip(self.get(&wanted).unwrap()) {
            assert!(got.unwrap() == content(self.volume, page), "page {page}");
        }
    }
}

/// What to ask for, where all of it was stored.
pub fn wanted(pages: std::ops::Range<u32>, placements: &[Option<Placement>]) -> Vec<GetEntry> {
    let entry = |(page, placement): (u32, &Option<Placement>)| GetEntry {
        page: PageIndex(page),
        placement: placement.unwrap(),
    };
    pages.zip(placements).map(entry).collect()
}
