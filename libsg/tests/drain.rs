//! An intermediary that leaves, or dies: what it has goes to others first, or copies of what it had are made again, over real
//! connections in one process.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::ErrorKind;
use libsg::content::{HashKind, Sharing};
use libsg::ids::{Checksum, Epoch, MemberSet, NodeId, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::server::{Config, DrainOptions, Drained, Server, ServerHandle};
use libsg::transport::PoolSecret;
use libsg::vmd::link::ask;
use libsg::vmd::{
    Arbiter, Class, Connector, Fetched, KeeperArbiter, Link, PagePut, PageReference, Reply, Request, Role,
    Shared, TcpConnector, Vmd, VmdClient, Volume,
};
use libsg::wire::message::{VmdReply, VmdRequest, VolumeInfo, VolumeState};
use libsg::wire::parking::{Claim, Parking, Verdict};
use libsg::wire::{IndexEntry, PageEntry};

/// Longer than anything takes that happens at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// For what is not to succeed.
const SHORT: Duration = Duration::from_millis(300);

/// Pages of a volume: several index ranges.
const PAGES: u32 = 4000;

fn connector() -> Arc<dyn Connector> {
    Arc::new(TcpConnector::new(PoolSecret::open()))
}

fn client() -> VmdClient {
    VmdClient::new(connector(), PATIENCE)
}

fn server_with(name: &str, memory_bytes: u64) -> ServerHandle {
    let config = Config::new(([127, 0, 0, 1], 0).into(), name, memory_bytes, PoolSecret::open());
    Server::bind(config).unwrap().spawn().unwrap()
}

fn server(name: &str) -> ServerHandle {
    server_with(name, 64 << 20)
}

fn servers(count: usize) -> Vec<ServerHandle> {
    (1..=count).map(|nth| server(&format!("i{nth}"))).collect()
}

fn addresses(servers: &[ServerHandle]) -> Vec<SocketAddr> {
    servers.iter().map(ServerHandle::address).collect()
}

fn manifest(sharing: Option<Sharing>, unit: InstallUnit) -> Manifest {
    let length_bytes = match unit {
        InstallUnit::Page => u64::from(PAGES) * PAGE_BYTES_U64,
        InstallUnit::Huge2M => 8 << 20,
    };
    let region = Region { name: "ram".into(), guest_address: None, length_bytes, unit };
    Manifest { vm: "web-7".into(), regions: vec![region], vm_config: Vec::new(), sharing }
}

fn create(servers: &[ServerHandle], manifest: &Manifest) -> Box<dyn Volume> {
    let id = VolumeId::random().unwrap();
    client().create(id, Epoch::FIRST, manifest, &addresses(servers)).unwrap()
}

fn content(page: u32) -> Vec<u8> {
    (0..PAGE_BYTES).map(|at| (page as usize + at * 7 + 1) as u8).collect()
}

fn put_of(page: u32) -> PagePut {
    let bytes = content(page);
    let checksum = Checksum::of(&bytes);
    PagePut { page: PageIndex(page), round: Round(0), checksum, bytes: PageSlice::owned(bytes.into()) }
}

/// Every third page, the VM's state, and COMMIT.
fn fill(volume: &dyn Volume, copies: u8) -> Vec<u32> {
    let pages: Vec<u32> = (0..PAGES).filter(|page| page % 3 != 0).collect();
    let puts: Vec<PagePut> = pages.iter().map(|page| put_of(*page)).collect();
    volume.put(&puts, copies).unwrap();
    let zeros = (0..PAGES).filter(|page| page % 3 == 0);
    let zeros: Vec<IndexEntry> = zeros.map(|page| IndexEntry::zero(PageIndex(page), 1, Round(0))).collect();
    volume.index(&zeros).unwrap();
    volume.put_state(b"state").unwrap();
    volume.commit().unwrap();
    pages
}

/// Whoever opens the volume at these finds every page.
fn is_whole(id: VolumeId, servers: &[ServerHandle], pages: &[u32]) {
    assert_eq!(has_all(id, servers, pages), PAGES as usize);
}

/// Whoever opens the volume at these finds these pages; how many there are in all.
fn has_all(id: VolumeId, servers: &[ServerHandle], pages: &[u32]) -> usize {
    let volume = client().open(id, Role::Reader, &addresses(servers)).unwrap();
    let mut entries = Vec::new();
    volume
        .scan(&mut |entry| {
            entries.extend(entry.range().iter().map(|page| IndexEntry { page, run_pages: 1, ..*entry }));
            Ok(())
        })
        .unwrap();
    let found = |page: &&u32| entries.iter().any(|entry| entry.page.0 == **page);
    assert_eq!(pages.iter().filter(found).count(), pages.len());
    for (entry, got) in entries.iter().zip(volume.get(&entries).unwrap()) {
        let expected = match pages.binary_search(&entry.page.0) {
            Ok(_) => Fetched::Bytes(content(entry.page.0).into()),
            Err(_) => Fetched::Zero,
        };
        assert_eq!(got, expected, "page {} at {:?}", entry.page, entry.placement);
    }
    assert_eq!(volume.get_state().unwrap(), b"state");
    entries.len()
}

fn drain(server: &ServerHandle, others: &[SocketAddr]) -> libsg::Result<Drained> {
    drain_within(PATIENCE, server, others)
}

/// In vain, as a rule.
fn drain_within(timeout: Duration, server: &ServerHandle, others: &[SocketAddr]) -> libsg::Result<Drained> {
    let others = || others.to_vec();
    server.drain(&DrainOptions { timeout, others: &others })
}

fn describe(server: &ServerHandle, id: VolumeId) -> VolumeInfo {
    let mut link = connector().connect(server.address(), id, Epoch(u64::MAX), Class::Bulk, PATIENCE).unwrap();
    ask(&mut *link, Request::Control(&VmdRequest::Describe), PATIENCE, |reply| match reply {
        Reply::Control(VmdReply::Volume(info)) => Ok(*info),
        other => panic!("{other:?}"),
    })
    .unwrap()
}

#[test]
fn what_it_has_goes_to_the_other_members() {
    let mut pool = servers(3);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 1));
    drop(volume);
    let leaves = pool.remove(1);
    let has = leaves.statistics().used_bytes / PAGE_BYTES_U64;
    assert!(has > 0);
    assert_eq!(drain(&leaves, &[]).unwrap(), Drained { volumes: 1, pages: has });
    assert_eq!(leaves.holdings(), [], "nothing would be lost with it");
    leaves.shutdown();
    is_whole(id, &pool, &pages);
    // The last but one goes as well.
    let leaves = pool.remove(0);
    drain(&leaves, &[]).unwrap();
    leaves.shutdown();
    is_whole(id, &pool, &pages);
}

#[test]
fn the_only_member_hands_over_to_one_of_the_pool() {
    let mut pool = servers(1);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let id = volume.id();
    let mut link = connector().connect(pool[0].address(), id, Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
    for number in 0..2 {
        let piece = [number as u8; 1000];
        ask(&mut *link, Request::PutPiece(number, &piece), PATIENCE, |_| Ok(())).unwrap();
    }
    let pages = fill(&*volume, 1);
    drop((volume, link));
    let error = drain_within(SHORT, &pool[0], &[]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Full, "{}", error.chain());
    assert!(error.chain().contains("--peer") && pool[0].holdings().len() == 1, "{}", error.chain());
    // It stays, and serves on.
    is_whole(id, &pool, &pages);
    let more = create(&pool, &manifest(None, InstallUnit::Page));
    more.put(&[put_of(0)], 1).unwrap();
    more.dissolve().unwrap();

    let new = [server_with("small", 4 << 20), server("new")];
    drain(&pool[0], &addresses(&new)).unwrap();
    pool.remove(0).shutdown();
    let [small, new] = new;
    assert!(small.statistics().used_bytes > 0, "it takes what it can");
    pool.extend([small, new]);
    is_whole(id, &pool, &pages);
    // It is a member like any other, and has the final set.
    let mut link = connector().connect(pool[1].address(), id, Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
    for number in 0..2 {
        let piece = ask(&mut *link, Request::GetPiece(number), PATIENCE, |reply| match reply {
            Reply::State(piece) => Ok(piece),
            other => panic!("{other:?}"),
        });
        assert_eq!(piece.unwrap(), [number as u8; 1000]);
    }
    assert_eq!(describe(&pool[1], id).members.len(), 3);
}

#[test]
fn of_pages_with_copies_one_that_has_none_gets_one() {
    let mut pool = servers(4);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 2));
    drop(volume);
    let leaves = pool.remove(0);
    let has = leaves.statistics().used_bytes / PAGE_BYTES_U64;
    assert_eq!(drain(&leaves, &[]).unwrap().pages, has);
    leaves.shutdown();
    // Each page still lies at two: any one may die.
    let stored: u64 = pool.iter().map(|server| server.statistics().used_bytes / PAGE_BYTES_U64).sum();
    assert_eq!(stored, 2 * pages.len() as u64);
    pool.remove(1).shutdown();
    // Of zero pages only the index knows, which has no copies here.
    has_all(id, &pool, &pages);
}

#[test]
fn what_volumes_share_is_shared_where_it_goes() {
    let mut pool = servers(2);
    let sharing = Sharing { hash: HashKind::Blake3, domain: "tenant".into() };
    let manifest = manifest(Some(sharing.clone()), InstallUnit::Page);
    let (one, other) = (create(&pool, &manifest), create(&pool, &manifest));
    let pages = fill(&*one, 1);
    let hasher = connector().hasher(&sharing);
    let reference = |page: &u32| {
        let bytes = content(*page);
        let (checksum, hash) = (Checksum::of(&bytes), hasher.hash(&bytes));
        PageReference { page: PageIndex(*page), round: Round(0), checksum, hash }
    };
    for pages in pages.chunks(64) {
        let offers: Vec<_> = pages.iter().map(reference).collect();
        let answers = other.put_by_reference(&offers).unwrap();
        assert!(answers.iter().all(|answer| matches!(answer, Shared::Have(_))));
    }
    fill_rest(&*other);
    let ids = [one.id(), other.id()];
    drop((one, other));
    let leaves = pool.remove(0);
    drain(&leaves, &[]).unwrap();
    leaves.shutdown();
    // What both have lies there once.
    let distinct: std::collections::BTreeSet<Vec<u8>> = pages.iter().map(|page| content(*page)).collect();
    let stored = pool[0].statistics().used_bytes / PAGE_BYTES_U64;
    assert!(stored <= 2 * distinct.len() as u64 + u64::from(PAGES) / 2, "{stored} pages stored");
    for id in ids {
        is_whole(id, &pool, &pages);
    }
}

/// Zero pages, state and COMMIT of a volume whose pages are there.
fn fill_rest(volume: &dyn Volume) {
    let zeros = (0..PAGES).filter(|page| page % 3 == 0);
    let zeros: Vec<IndexEntry> = zeros.map(|page| IndexEntry::zero(PageIndex(page), 1, Round(0))).collect();
    volume.index(&zeros).unwrap();
    volume.put_state(b"state").unwrap();
    volume.commit().unwrap();
}

/// Puts a batch at one intermediary; its index entries.
fn stored(link: &mut dyn Link, puts: &[PagePut]) -> Vec<IndexEntry> {
    let entry = |put: &PagePut| PageEntry::raw(put.page, put.round, put.checksum);
    let entries: Vec<_> = puts.iter().map(entry).collect();
    let slices: Vec<_> = puts.iter().map(|put| put.bytes.clone()).collect();
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    let placements = ask(link, put, PATIENCE, |reply| match reply {
        Reply::Stored { placements, .. } => Ok(placements.to_vec()),
        other => panic!("{other:?}"),
    });
    let placed = puts.iter().zip(placements.unwrap());
    placed.map(|(put, at)| IndexEntry::at(put.page, put.round, at.unwrap(), put.checksum)).collect()
}

#[test]
fn an_install_unit_goes_to_one_place() {
    let mut pool = servers(3);
    let volume = create(&pool, &manifest(None, InstallUnit::Huge2M));
    let members = volume.members();
    // Each unit at one member, as its source does it.
    for unit in 0..4_u32 {
        let at = pool.iter().position(|server| server.node() == &members[0].node).unwrap();
        let mut link = connector()
            .connect(pool[at].address(), volume.id(), Epoch::FIRST, Class::Bulk, PATIENCE)
            .unwrap();
        let puts: Vec<PagePut> = (unit * 512..(unit + 1) * 512).map(put_of).collect();
        volume.index(&stored(&mut *link, &puts)).unwrap();
    }
    volume.put_state(b"state").unwrap();
    volume.commit().unwrap();
    let id = volume.id();
    drop(volume);
    let leaves = pool.remove(0);
    drain(&leaves, &[]).unwrap();
    leaves.shutdown();
    let volume = client().open(id, Role::Reader, &addresses(&pool)).unwrap();
    let mut used = std::collections::BTreeSet::new();
    for unit in 0..4 {
        let entries = volume.locate(PageRange::new(PageIndex(unit * 512), 512)).unwrap();
        let at: std::collections::BTreeSet<u16> =
            entries.iter().filter_map(|entry| Some(entry.placement?.member.0)).collect();
        assert_eq!((entries.len(), at.len()), (512, 1), "unit {unit}");
        used.extend(at);
        for (entry, got) in entries.iter().zip(volume.get(&entries).unwrap()) {
            assert_eq!(got, Fetched::Bytes(content(entry.page.0).into()));
        }
    }
    assert_eq!(used.len(), 2, "units go to all who are there");
}

#[test]
fn a_volume_that_is_being_written_before_commit_is_waited_for() {
    let pool = servers(2);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    volume.put(&[put_of(1), put_of(2)], 1).unwrap();
    let has = |server: &&ServerHandle| server.statistics().used_bytes > 0;
    let error = drain_within(SHORT, pool.iter().find(has).unwrap(), &[]).unwrap_err();
    assert!(error.chain().contains("COMMIT"), "{}", error.chain());
}

fn by(name: &str) -> NodeId {
    NodeId { name: name.into(), incarnation: 1 }
}

/// Parked at the pool, whose first is the keeper; as who claims it sees it.
fn park(pool: &[ServerHandle]) -> (VolumeInfo, Vec<u32>) {
    let volume = create(pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 1));
    let parking = Parking { name: "web".into(), keeper: pool[0].node().clone(), term: 0, arbiter: None };
    for server in pool {
        let mut link =
            connector().connect(server.address(), id, Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
        let park = VmdRequest::Park(parking.clone());
        ask(&mut *link, Request::Control(&park), PATIENCE, |_| Ok(())).unwrap();
    }
    (describe(&pool[0], id), pages)
}

#[test]
fn who_grants_claims_is_another_one_then_and_what_was_granted_holds() {
    let mut pool = servers(3);
    let (parked, pages) = park(&pool);
    let arbiter = KeeperArbiter::new(connector(), PATIENCE);
    let claim = Claim { epoch: Epoch(2), by: by("a"), force: false };
    assert_eq!(arbiter.claim(&parked, &claim).unwrap(), Verdict::Granted);

    let leaves = pool.remove(0);
    drain(&leaves, &[]).unwrap();
    // It is there, and decides no more.
    let other = Claim { epoch: Epoch(3), by: by("b"), force: false };
    let verdict = arbiter.claim(&parked, &other).unwrap();
    assert!(matches!(verdict, Verdict::Claimed { ref by, .. } if by.name == "a"), "{verdict:?}");
    leaves.shutdown();
    let known = describe(&pool[1], parked.volume).parking.unwrap();
    assert_eq!((known.term, &known.keeper), (1, pool[0].node()));
    // One that has heard of nothing finds who decides, and so does the one after.
    assert_eq!(arbiter.claim(&parked, &claim).unwrap(), Verdict::Granted, "the same claim");
    let leaves = pool.remove(0);
    drain(&leaves, &[]).unwrap();
    leaves.shutdown();
    arbiter.run(&parked, &claim).unwrap();
    assert_eq!(arbiter.claim(&parked, &other).unwrap(), Verdict::Runs { by: by("a") });
    let info = describe(&pool[0], parked.volume);
    assert_eq!((info.state, info.parking.unwrap().term), (VolumeState::Running, 2));
    is_whole(parked.volume, &pool, &pages);
}

#[test]
fn a_keeper_that_is_stopped_while_nobody_takes_its_place_decides_again() {
    let pool = servers(1);
    let (parked, _) = park(&pool);
    assert!(drain_within(SHORT, &pool[0], &[]).is_err());
    let arbiter = KeeperArbiter::new(connector(), PATIENCE);
    let claim = Claim { epoch: Epoch(2), by: by("a"), force: false };
    assert_eq!(arbiter.claim(&parked, &claim).unwrap(), Verdict::Granted);
}

#[test]
fn whoever_takes_over_dies_and_another_does() {
    let pool = servers(1);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 1));
    drop(volume);
    let listen = ([127, 0, 0, 1], 0).into();
    let mut slow = Config::new(listen, "slow", 64 << 20, PoolSecret::open());
    // Far from through when it is shut down.
    slow.limit_in_bytes_per_s = 400_000;
    let slow = Server::bind(slow).unwrap().spawn().unwrap();
    let good = vec![server("good")];
    let others = [slow.address(), good[0].address()];
    std::thread::scope(|scope| {
        let leaves = scope.spawn(|| drain(&pool[0], &others));
        while slow.statistics().used_bytes == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        slow.shutdown();
        leaves.join().unwrap().unwrap();
    });
    pool.into_iter().for_each(ServerHandle::shutdown);
    is_whole(id, &good, &pages);
}

/// A disk's writer, or a source, puts an index entry late: by then the page is elsewhere.
#[test]
fn an_index_entry_that_comes_late_names_where_its_page_is() {
    let mut pool = servers(2);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let mut pages = fill(&*volume, 1);
    let id = volume.id();
    // What was zero is written, and stored at the first.
    let mut link = connector().connect(pool[0].address(), id, Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
    let late = stored(&mut *link, &[PagePut { round: Round(1), ..put_of(0) }]);
    drain(&pool[0], &[]).unwrap();
    volume.index(&late).unwrap();
    pages.insert(0, 0);
    drop((volume, link));
    pool.remove(0).shutdown();
    is_whole(id, &pool, &pages);
}

/// The first of them stays, and takes what the other has, which goes.
#[test]
fn of_members_that_all_leave_at_once_one_stays() {
    let pool = servers(2);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 1));
    drop(volume);
    let (first, second) = std::thread::scope(|scope| {
        let leave = |server| move || drain_within(Duration::from_secs(10), server, &[]);
        let leaving = [scope.spawn(leave(&pool[0])), scope.spawn(leave(&pool[1]))];
        let [first, second] = leaving.map(|leaving| leaving.join().unwrap());
        (first, second)
    });
    assert_eq!(first.unwrap_err().kind, ErrorKind::Full);
    assert!(second.unwrap().pages > 0);
    assert_eq!((pool[0].holdings().len(), pool[1].holdings().len()), (1, 0));
    is_whole(id, &pool[..1], &pages);
}

/// Waits until all of them are through with the copies of a volume, without so many members; how many are missing.
fn mended(servers: &[ServerHandle], id: VolumeId, away: u16) -> u64 {
    let begun = Instant::now();
    loop {
        let said: Vec<_> = servers.iter().map(|server| describe(server, id).mending).collect();
        let missing = said.iter().map(|said| said.missing_copies.filter(|_| said.away_members == away)).sum();
        if let Some(missing) = missing {
            return missing;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{said:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Two of three die one after the other, of each page there were two copies.
fn outlives_two(sharing: Option<Sharing>) {
    let mut pool = servers(3);
    let volume = create(&pool, &manifest(sharing, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 2));
    drop(volume);
    drop(pool.remove(2));
    assert_eq!(mended(&pool, id, 1), 0);
    for server in &pool {
        assert_eq!(describe(server, id).stored_pages, pages.len() as u64);
    }
    drop(pool.remove(0));
    // This client told each zero page one index server: those that the first to die alone had heard of are not known.
    let unknown = (2048..3072).filter(|page| page % 3 == 0).count();
    assert_eq!(has_all(id, &pool, &pages), PAGES as usize - unknown);
    // Nobody is left to have another.
    assert_eq!(mended(&pool, id, 2), pages.len() as u64);
}

#[test]
fn copies_that_went_with_one_that_died_are_made_again() {
    outlives_two(None);
}

#[test]
fn shared_pages_are_copied_again() {
    outlives_two(Some(Sharing { hash: HashKind::Blake3, domain: "tenant".into() }));
}

#[test]
fn where_there_is_no_room_for_copies_it_is_said_how_many_are_missing() {
    let mut pool = vec![server("i1"), server("i2"), server_with("i3", 2 << 20)];
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, pages) = (volume.id(), fill(&*volume, 2));
    drop(volume);
    drop(pool.remove(0));
    let missing = mended(&pool, id, 1);
    // A chunk of 512 pages is all the last one has.
    assert_eq!(missing, pages.len() as u64 - 512);
    assert_eq!(describe(&pool[1], id).stored_pages, 512);
}

#[test]
fn what_was_dissolved_is_not_brought_back() {
    let mut pool = servers(3);
    let volume = create(&pool, &manifest(None, InstallUnit::Page));
    let (id, _) = (volume.id(), fill(&*volume, 2));
    drop(volume);
    drop(pool.remove(0));
    let mut link = connector().connect(pool[0].address(), id, Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
    ask(&mut *link, Request::Control(&VmdRequest::Dissolve), PATIENCE, |_| Ok(())).unwrap();
    assert!(mended(&pool[1..], id, 1) > 0);
    assert_eq!((pool[0].statistics().volumes.len(), pool[0].statistics().used_bytes), (0, 0));
}
