//! Volumes that others write: a block that is not written yet is never taken for zeros.

use std::sync::Arc;
use std::time::Duration;

use libsg::ids::{Checksum, Epoch, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::transport::PoolSecret;
use libsg::vmd::{PagePut, Role, TcpConnector, Vmd as _, VmdClient, Volume};
use libsg::wire::IndexEntry;

use crate::world::{Client, M, World, done, fails, random, text};

const IO: u32 = 5;
const PAGES: u32 = 4096;

fn client() -> VmdClient {
    VmdClient::new(Arc::new(TcpConnector::new(PoolSecret::open())), Duration::from_secs(20))
}

/// A VM that leaves: as its source makes it.
fn source(world: &World) -> Box<dyn Volume> {
    let region = |name: &str| Region {
        name: name.into(),
        guest_address: None,
        length_bytes: u64::from(PAGES) * 2048,
        unit: InstallUnit::Page,
    };
    let regions = vec![region("ram"), region("video")];
    let manifest = Manifest { vm: "web-7".into(), regions, vm_config: vec![1], sharing: None };
    let addresses: Vec<_> = (0..world.nodes.len()).map(|node| world.address(node)).collect();
    client().create(VolumeId::random().unwrap(), Epoch::FIRST, &manifest, &addresses).unwrap()
}

fn put(volume: &dyn Volume, pages: std::ops::Range<u32>, (bytes, round): (&[u8], u16)) {
    let put = |page: u32| {
        let bytes: Arc<[u8]> = bytes[page as usize * PAGE_BYTES..][..PAGE_BYTES].into();
        let checksum = Checksum::of(&bytes);
        PagePut { page: PageIndex(page), round: Round(round), checksum, bytes: PageSlice::owned(bytes) }
    };
    let all: Vec<PagePut> = pages.map(put).collect();
    volume.put(&all, 1).unwrap();
}

#[test]
fn a_block_that_is_not_written_is_an_error() {
    let world = World::new(2);
    let volume = source(&world);
    let bytes = random(16 * M, 1);
    put(&*volume, 0..100, (&bytes, 0));
    volume.index(&[IndexEntry::zero(PageIndex(100), 50, Round(0))]).unwrap();
    let nbd = world.nbd("sock", &["--volume", "web-7", "--unwritten", "error"]);
    assert_eq!((&nbd.ready["bytes"], &nbd.ready["read_only"]), (&(16 * M).into(), &true.into()));
    let mut reader = Client::new(&world, "sock");
    assert_eq!(reader.read(4096, 99 * 4096).unwrap(), bytes[4096..100 * 4096]);
    assert_eq!(reader.read(100 * 4096, 50 * 4096).unwrap(), vec![0; 50 * 4096], "known to be zero");
    assert_eq!(reader.read(140 * 4096, 11 * 4096), Err(IO));
    assert_eq!(reader.read(4000 * 4096, 100), Err(IO));
    // Tools that ask which blocks are zero are not told so of those that nobody knows.
    let map = done("nbdinfo", &["--map", nbd.text("uri")]);
    let zeros: Vec<&str> = map.lines().filter(|line| line.contains("zero")).collect();
    assert!(zeros.len() == 1 && zeros[0].contains("409600") && zeros[0].contains("204800"), "{map}");
    let said = fails("nbdcopy", &[nbd.text("uri"), text(&world.path("back"))]);
    assert!(said.contains("not written") || said.contains("Input/output error"), "{said}");
    assert!(done("nbdinfo", &[nbd.text("uri")]).contains("is_read_only: true"));
}

#[test]
fn a_block_that_is_not_written_is_waited_for() {
    let world = World::new(2);
    let volume = source(&world);
    let bytes = random(16 * M, 1);
    put(&*volume, 0..1000, (&bytes, 0));
    let nbd = world.nbd("sock", &["--volume", "web-7", "--timeout", "60"]);
    let mut reader = Client::new(&world, "sock");
    assert_eq!(reader.read(0, 8192).unwrap(), bytes[..8192]);
    std::thread::scope(|scope| {
        // It waits for what comes while it reads.
        let back = world.path("back");
        let copied = scope.spawn({
            let (uri, back) = (nbd.text("uri"), back.clone());
            move || done("nbdcopy", &[uri, text(&back)])
        });
        for first in (1000..PAGES).step_by(344) {
            put(&*volume, first..PAGES.min(first + 344), (&bytes, 0));
        }
        copied.join().unwrap();
        assert!(std::fs::read(&back).unwrap() == bytes);
    });
    // A newer round replaces what was read; the slot of the older one goes.
    let newer = random(16 * M, 2);
    put(&*volume, 0..64, (&newer, 1));
    volume.discard(libsg::page::PageRange::new(PageIndex(0), 64), Round(1)).unwrap();
    assert_eq!(
        reader.read(0, 65 * 4096).unwrap(),
        [&newer[..64 * 4096], &bytes[64 * 4096..65 * 4096]].concat()
    );
    // A new owner does not shut readers out.
    let addresses = [world.address(0), world.address(1)];
    let owner = client().open(volume.id(), Role::Reader, &addresses).unwrap();
    owner.claim(Epoch(7)).unwrap();
    assert_eq!(reader.read(4096, 8192).unwrap(), newer[4096..12_288]);
}

#[test]
fn waiting_ends() {
    let world = World::new(1);
    let volume = source(&world);
    put(&*volume, 0..1, (&random(4096, 1), 0));
    let mut nbd = world.nbd("sock", &["--volume", "web-7", "--timeout", "0.5"]);
    let mut reader = Client::new(&world, "sock");
    assert_eq!(reader.read(4096, 4096), Err(IO), "after the time that was given");
    // Nothing more comes to one that is sealed.
    volume.seal().unwrap();
    assert_eq!(reader.read(0, 4096).unwrap(), random(4096, 1));
    assert_eq!(reader.read(8192, 4096), Err(IO));
    volume.dissolve().unwrap();
    assert_eq!(nbd.end().code(), Some(1));
    assert!(nbd.log().contains("the volume was dissolved"), "{}", nbd.log());
}
