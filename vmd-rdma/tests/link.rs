//! Links over simulated devices: what goes which way, and what becomes of it when something breaks.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod common;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use common::{CLIENTS, Client, MIB, PATIENCE, batch, config, content, eventually, kind, serve, whole};
use libsg::ErrorKind;
use libsg::ids::{Checksum, Epoch, MemberIndex, MemberSet, Placement, VolumeId};
use libsg::memory::{Mapping, PageSlice};
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::server::{Server, ServerHandle};
use libsg::transport::wait;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Link as _, Reply, Request, Ticket};
use libsg::wire::message::VmdRequest;
use libsg::wire::{GetEntry, PageEntry};
use parking_lot::Mutex;
use vmd_rdma::verbs::Device;
use vmd_rdma::verbs::simulated::Network;
use vmd_rdma::{Devices, RdmaConnector, check};

/// Pages far apart, so that no two of them are one piece anywhere.
fn scattered(count: u32) -> Vec<u32> {
    (0..count).map(|n| n * 7919 % 262_144).collect()
}

#[test]
fn pages_go_over_the_device_and_nothing_else_does() {
    for seed in 1..=10 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let mut client = Client::create(&network, &[&server]);
        client.warm_up();
        let before = network.counts();
        let pages = scattered(300);
        let placements = client.put(pages.iter().copied()).unwrap();
        let written = network.counts().written_bytes - before.written_bytes;
        assert_eq!(written, 300 * PAGE_BYTES_U64, "seed {seed}");
        assert!(client.get(&pages, &placements).unwrap().into_iter().all(|there| there));
        assert_eq!(network.counts().read_bytes - before.read_bytes, 300 * PAGE_BYTES_U64);
        assert_eq!(server.statistics().used_bytes, 301 * PAGE_BYTES_U64);
        assert!(client.link.path().delivered_bytes >= written);
        client.control(&VmdRequest::Dissolve).unwrap();
        eventually("its memory is back", || server.statistics().arena_bytes == 0);
    }
}

#[test]
fn where_they_must_pages_wait_for_the_device() {
    for seed in 1..=10 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let strict = common::connector(&network).strict();
        // It is not there yet, and that is what is said.
        let mut early = Client::link(&strict, &server, 1, Class::Bulk);
        assert_eq!(kind(early.put([1])), ErrorKind::Volume);
        let _volume = Client::create(&network, &[&server]);
        let placements = early.put(0..300).unwrap();
        let mut urgent = Client::link(&strict, &server, 1, Class::Urgent);
        assert_eq!(urgent.get(&[7], &placements[7..8]).unwrap(), [true]);
        let counts = network.counts();
        assert_eq!((counts.written_bytes, counts.read_bytes), (300 * PAGE_BYTES_U64, PAGE_BYTES_U64));
        let statistics = server.statistics();
        // What was refused came over the connection.
        assert_eq!((statistics.touched_bytes, statistics.leased_slots), (PAGE_BYTES_U64, 0), "seed {seed}");
    }
}

#[test]
fn a_writers_pace_is_kept_to_the_byte() {
    let network = Network::new(5);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let link = &mut *client.link;
    let (entries, slices) = batch(0..40);
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    let ticket = link.submit(put).unwrap();
    let (mut written, mut done) = (0, false);
    while !done {
        let step = link.progress(1000).unwrap();
        assert!(step <= 1000);
        written += step;
        if let Some(completion) = link.completion() {
            assert_eq!(completion.ticket, ticket);
            assert!(matches!(completion.result.unwrap(), Reply::Stored { placements, .. }
                if placements.iter().all(Option::is_some)));
            done = true;
        } else {
            wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).unwrap();
        }
    }
    assert!(written >= 40 * PAGE_BYTES, "{written}");
    assert_eq!((link.queued_bytes(), link.outstanding_bytes()), (0, 0));
}

#[test]
fn guest_memory_is_written_from_where_it_lies() {
    let network = Network::new(6);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    // More windows than stay registered, each used again later.
    let pages: Vec<u32> = (0..40).flat_map(|window| [window * 512 + 511, window * 512 + 512]).collect();
    let mapping = Arc::new(Mapping::anonymous(42 * 512 * PAGE_BYTES).unwrap());
    for page in &pages {
        mapping.slot(*page as usize * PAGE_BYTES, PAGE_BYTES).unwrap().copy_from(&content(*page));
    }
    for _ in 0..3 {
        for two in pages.chunks(2) {
            let (entries, _) = batch(two.iter().copied());
            let slice =
                PageSlice::mapping(mapping.clone(), two[0] as usize * PAGE_BYTES, 2 * PAGE_BYTES, None);
            let slices = [slice.unwrap()];
            let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
            let placements = ask(&mut *client.link, put, PATIENCE, |reply| match reply {
                Reply::Stored { placements, .. } => Ok(placements.to_vec()),
                other => panic!("{other:?}"),
            });
            assert_eq!(client.get(two, &placements.unwrap()).unwrap(), [true, true]);
        }
    }
    assert_eq!(network.counts().refused, 0);
}

#[test]
fn many_puts_and_gets_are_under_way_at_once() {
    for seed in 20..26 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let mut client = Client::create(&network, &[&server]);
        client.warm_up();
        // More than may be leased at once, and more than can land at once.
        let batches: Vec<Vec<u32>> = scattered(12 * 500).chunks(500).map(<[u32]>::to_vec).collect();
        let mut open: HashMap<Ticket, usize> = HashMap::new();
        let mut stored: Vec<Vec<Placement>> = vec![Vec::new(); batches.len()];
        for (n, pages) in batches.iter().enumerate() {
            let (entries, slices) = batch(pages.iter().copied());
            let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
            open.insert(client.link.submit(put).unwrap(), n);
            let range = PageRange::new(PageIndex(0), 1);
            open.insert(client.link.submit(Request::Locate(range)).unwrap(), usize::MAX);
        }
        drain(&mut client, &mut open, |n, reply| match reply {
            Reply::Stored { placements, .. } => stored[n] = placements.iter().map(|at| at.unwrap()).collect(),
            Reply::Located(_) => assert_eq!(n, usize::MAX),
            other => panic!("{other:?}"),
        });
        for (n, pages) in batches.iter().enumerate() {
            let entry = |(page, at): (&u32, &Placement)| GetEntry { page: PageIndex(*page), placement: *at };
            let wanted: Vec<GetEntry> = pages.iter().zip(&stored[n]).map(entry).collect();
            open.insert(client.link.submit(Request::Get(&wanted)).unwrap(), n);
        }
        drain(&mut client, &mut open, |_, reply| match reply {
            Reply::Pages { entries, bytes } => {
                assert!(entries.len() == 500 && whole(entries, bytes).into_iter().all(|there| there));
            }
            other => panic!("{other:?}"),
        });
        let counts = network.counts();
        assert_eq!((counts.written_bytes, counts.read_bytes), (6000 * PAGE_BYTES_U64, 6000 * PAGE_BYTES_U64));
        assert_eq!(client.link.outstanding_bytes(), 0);
    }
}

fn drain(client: &mut Client, open: &mut HashMap<Ticket, usize>, mut take: impl FnMut(usize, Reply<'_>)) {
    while !open.is_empty() {
        client.link.progress(100_000).unwrap();
        while let Some(completion) = client.link.completion() {
            let n = open.remove(&completion.ticket).expect("a ticket that is open");
            take(n, completion.result.unwrap());
        }
        if !open.is_empty() {
            let link = &client.link;
            let ready = wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).unwrap();
            assert_ne!(ready, 0, "{} are open and nothing comes", open.len());
        }
    }
}

#[test]
fn a_host_that_is_cut_off_fails_its_link_and_what_it_had_is_free() {
    let network = Network::new(7);
    let server = Server::bind(config(&network, 2, 2 * MIB)).unwrap().spawn().unwrap();
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    network.cut_off(2);
    assert_eq!(kind(client.put(1..401)), ErrorKind::Unreachable);
    assert_eq!(kind(client.link.progress(1)), ErrorKind::Unreachable);
    assert!(client.link.completion().is_none());
    drop(client);
    // A connection counts until all that its client had was taken back.
    eventually("its session has ended", || server.statistics().connections == 0);
    network.restore(2);
    let mut next = Client::connect(&network, &server, 1);
    next.warm_up();
    assert_eq!(next.put(1..401).unwrap().iter().flatten().count(), 400, "the slots of its lease are free");
}

#[test]
fn a_peer_is_knocked_at_while_nothing_is_asked_of_it() {
    let network = Network::new(16);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let before = network.counts();
    eventually("it is knocked at", || {
        assert_eq!(client.link.progress(0).unwrap(), 0);
        network.counts().works > before.works
    });
    client.put(1..65).unwrap();
    assert!(client.link.is_open());
    network.cut_off(2);
    let mut error = None;
    eventually("it is missed", || {
        error = client.link.progress(0).err();
        error.is_some()
    });
    assert_eq!(error.unwrap().kind, ErrorKind::Unreachable);
    assert_eq!(kind(client.put(1..65)), ErrorKind::Unreachable);
}

#[test]
fn whoever_may_write_nothing_is_not_woken_by_room_to_write() {
    let network = Network::new(17);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let (entries, slices) = batch(1..9);
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    let link = &mut *client.link;
    link.submit(put).unwrap();
    assert_eq!(link.progress(0).unwrap(), 0);
    assert!(link.queued_bytes() > 0);
    let wakes =
        |link: &vmd_rdma::RdmaLink| wait(&[(link.poll_fd(), true)], std::time::Duration::ZERO).unwrap();
    assert_eq!(wakes(link), 0);
    // With leave to write it goes on.
    loop {
        link.progress(usize::MAX).unwrap();
        if link.completion().is_some() {
            break;
        }
        wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).unwrap();
    }
}

#[test]
fn a_killed_intermediary_fails_its_link() {
    let network = Network::new(8);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let placements = client.put(1..65).unwrap();
    server.shutdown();
    let pages: Vec<u32> = (1..65).collect();
    assert_eq!(kind(client.get(&pages, &placements)), ErrorKind::Unreachable);
    assert_eq!(kind(client.put(1..65)), ErrorKind::Unreachable);
}

#[test]
fn a_replaced_writer_is_told_so_and_writes_nothing() {
    let network = Network::new(9);
    let server = serve(&network, 2);
    let mut old = Client::create(&network, &[&server]);
    old.warm_up();
    let placements = old.put(1..11).unwrap();
    let mut owner = Client::connect(&network, &server, 2);
    owner.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    let before = network.counts();
    assert_eq!(kind(old.put(1..11)), ErrorKind::Fenced);
    let pages: Vec<u32> = (1..11).collect();
    assert_eq!(kind(old.get(&pages, &placements)), ErrorKind::Fenced);
    assert_eq!(network.counts(), before);
    assert_eq!(owner.get(&pages, &placements).unwrap(), [true; 10]);
}

#[test]
fn what_was_written_and_not_settled_when_a_claim_came_is_nowhere() {
    for seed in 30..40 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let mut old = Client::create(&network, &[&server]);
        old.warm_up();
        let (entries, slices) = batch(1..200);
        let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        old.link.submit(put).unwrap();
        // Leased, and some of it written.
        while network.counts().written_bytes == 0 {
            old.link.progress(20_000).unwrap();
            assert!(old.link.completion().is_none());
        }
        let mut owner = Client::connect(&network, &server, 2);
        owner.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
        let before = network.counts().written_bytes;
        let error = loop {
            if let Err(error) = old.link.progress(usize::MAX) {
                break error.kind;
            }
            if let Some(completion) = old.link.completion() {
                break kind(completion.result);
            }
            wait(&[(old.link.poll_fd(), old.link.queued_bytes() > 0)], PATIENCE).unwrap();
        };
        assert!(matches!(error, ErrorKind::Unreachable | ErrorKind::Fenced), "{error:?}");
        assert_eq!(network.counts().written_bytes, before, "nothing lands behind a claim");
        assert_eq!(server.statistics().used_bytes, PAGE_BYTES_U64);
    }
}

/// Pages are put and read, and none of them by the device.
fn all_goes_over_the_connection(network: &Network, client: &mut Client) {
    let pages: Vec<u32> = (1..300).collect();
    for _ in 0..3 {
        let placements = client.put(pages.iter().copied()).unwrap();
        assert!(client.get(&pages, &placements).unwrap().into_iter().all(|there| there));
    }
    assert!(!client.link.is_open());
    assert_eq!(network.counts().written_bytes, 0);
}

#[test]
fn where_there_is_no_device_pages_go_over_the_connection() {
    let network = Network::new(10);
    let plain = libsg::server::Config { backend: None, ..config(&network, 2, 64 * MIB) };
    let server = Server::bind(plain).unwrap().spawn().unwrap();
    let mut client = Client::create(&network, &[&server]);
    all_goes_over_the_connection(&network, &mut client);
    // Where it must be the device, nothing goes.
    let mut strict = Client::link(&common::connector(&network).strict(), &server, 1, Class::Bulk);
    let refused = strict.put([1]).and_then(|_| strict.control(&VmdRequest::Describe).map(|_| ()));
    assert_eq!(kind(refused), ErrorKind::Unreachable);
}

#[test]
fn where_packets_do_not_pass_pages_go_over_the_connection() {
    let network = Network::new(14);
    let server = serve(&network, 2);
    network.cut_off(2);
    let mut client = Client::create(&network, &[&server]);
    all_goes_over_the_connection(&network, &mut client);
    let mut strict = Client::link(&common::connector(&network).strict(), &server, 1, Class::Bulk);
    let asked = (0..100).try_for_each(|_| strict.put([1]).map(|_| ()));
    assert_eq!(kind(asked), ErrorKind::Unreachable);
}

#[test]
fn a_full_intermediary_stores_what_fits() {
    let network = Network::new(11);
    let server = Server::bind(config(&network, 2, 2 * MIB)).unwrap().spawn().unwrap();
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let stored = |client: &mut Client, pages| {
        client.put(pages).unwrap().iter().map(Option::is_some).collect::<Vec<_>>()
    };
    assert_eq!(stored(&mut client, 1..501), [true; 500]);
    let some = stored(&mut client, 600..620);
    assert_eq!(some.iter().filter(|there| **there).count(), 11);
    assert!(some[..11].iter().all(|there| *there), "first come, first served");
    assert_eq!(stored(&mut client, 700..720), [false; 20]);
    assert_eq!(client.link.outstanding_bytes(), 0);
}

/// Two intermediaries, and a client of the first whose copies the second reads where they lie.
fn copied(network: &Network) -> ([ServerHandle; 2], Client, MemberSet) {
    let servers = [serve(network, 2), serve(network, 3)];
    let mut client = Client::create(network, &[&servers[0], &servers[1]]);
    client.warm_up();
    let both = [MemberIndex(0), MemberIndex(1)].into_iter().collect();
    // The first go over a connection, until the second was let in.
    eventually("copies are read", || {
        client.put_copies([1], both).unwrap();
        network.counts().read_bytes > 0
    });
    (servers, client, both)
}

/// These pages are at the intermediary, as they were put.
fn check_copies(network: &Network, server: &ServerHandle, pages: std::ops::Range<u32>) {
    let mut client = Client::connect(network, server, 1);
    let range = PageRange::new(PageIndex(pages.start), pages.len() as u32);
    let placements = ask(&mut *client.link, Request::Locate(range), PATIENCE, |reply| match reply {
        Reply::Located(entries) => Ok(entries.iter().map(|entry| entry.placement).collect::<Vec<_>>()),
        other => panic!("{other:?}"),
    })
    .unwrap();
    assert_eq!(placements.len(), pages.len());
    let there = client.get(&pages.collect::<Vec<_>>(), &placements).unwrap();
    assert!(there.into_iter().all(|there| there));
}

#[test]
fn copies_are_read_where_they_lie() {
    for seed in 1..=5 {
        let network = Network::new(seed);
        let (servers, mut client, both) = copied(&network);
        let (before, touched) =
            (network.counts(), servers.each_ref().map(|server| server.statistics().touched_bytes));
        for first in (100..600).step_by(100) {
            client.put_copies(first..first + 100, both).unwrap();
        }
        let counts = network.counts();
        let moved = [
            counts.written_bytes - before.written_bytes,
            counts.read_bytes - before.read_bytes,
            counts.refused - before.refused,
        ];
        assert_eq!(moved, [500 * PAGE_BYTES_U64, 500 * PAGE_BYTES_U64, 0], "seed {seed}");
        assert_eq!(servers.each_ref().map(|server| server.statistics().touched_bytes), touched);
        servers.iter().for_each(|server| check_copies(&network, server, 100..600));
        for server in &servers {
            assert_eq!(server.statistics().leased_slots, 0);
            let mut client = Client::connect(&network, server, 1);
            client.control(&VmdRequest::Dissolve).unwrap();
            eventually("its memory is back", || server.statistics().arena_bytes == 0);
        }
    }
}

#[test]
fn where_the_way_between_intermediaries_breaks_copies_go_over_the_connection() {
    let network = Network::new(21);
    let (servers, mut client, both) = copied(&network);
    network.fail_between(3, 2);
    client.put_copies(100..300, both).unwrap();
    let before = network.counts().read_bytes;
    client.put_copies(300..400, both).unwrap();
    assert_eq!(network.counts().read_bytes, before);
    servers.iter().for_each(|server| check_copies(&network, server, 100..400));
    assert_eq!(servers.map(|server| server.statistics().leased_slots), [0, 0]);
}

#[test]
fn where_packets_do_not_pass_between_intermediaries_copies_go_over_the_connection() {
    let network = Network::new(22);
    network.cut(2, 3, true);
    let servers = [serve(&network, 2), serve(&network, 3)];
    let mut client = Client::create(&network, &[&servers[0], &servers[1]]);
    client.warm_up();
    let both: MemberSet = [MemberIndex(0), MemberIndex(1)].into_iter().collect();
    for first in (100..600).step_by(100) {
        client.put_copies(first..first + 100, both).unwrap();
    }
    assert_eq!(network.counts().read_bytes, 0);
    servers.iter().for_each(|server| check_copies(&network, server, 100..600));
}

#[test]
fn a_replaced_writers_copies_are_read_no_more() {
    let network = Network::new(23);
    let (servers, mut client, both) = copied(&network);
    let mut next = Client::connect(&network, &servers[0], 1);
    next.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    assert_eq!(kind(client.put_copies(100..200, both)), ErrorKind::Fenced);
    // The second has not heard of it: nobody lets it read there any more.
    let before = network.counts();
    assert!(kind(client.put_copies(100..200, both)) == ErrorKind::Fenced);
    assert_eq!(network.counts().read_bytes, before.read_bytes);
    assert_eq!(servers.map(|server| server.statistics().leased_slots), [0, 0]);
}

#[test]
fn who_is_answered_first_is_who_waits() {
    // A link of the urgent class reads single pages, with bulk beside it on another link.
    let network = Network::new(13);
    let server = serve(&network, 2);
    let mut client = Client::create(&network, &[&server]);
    client.warm_up();
    let pages: Vec<u32> = (1..200).collect();
    let placements = client.put(pages.iter().copied()).unwrap();
    let connector = common::connector(&network);
    let mut urgent = Client::link(&connector, &server, 1, Class::Urgent);
    for (page, placement) in pages.iter().zip(&placements) {
        assert_eq!(urgent.get(&[*page], &[*placement]).unwrap(), [true]);
    }
    assert!(network.counts().read_bytes >= 190 * PAGE_BYTES_U64, "{:?}", network.counts());
    // An operator's connection needs no device.
    let operator = connector.connect(server.address(), VolumeId(0), Epoch(0), Class::Bulk, PATIENCE).unwrap();
    assert_eq!(operator.member().node, *server.node());
    assert_eq!(network.device(CLIENTS).name(), "sim1");
}

/// By the address of this host's.
#[derive(Debug)]
struct ByAddress(Network, Mutex<Vec<Option<IpAddr>>>);

impl Devices for ByAddress {
    fn near(&self, address: Option<IpAddr>) -> Arc<dyn Device> {
        self.1.lock().push(address);
        self.0.device(CLIENTS)
    }
}

#[test]
fn a_link_goes_over_the_device_of_its_network() {
    let network = Network::new(16);
    let server = serve(&network, 2);
    let devices = Arc::new(ByAddress(network.clone(), Mutex::default()));
    let connector = RdmaConnector::among(common::secret(), devices.clone()).strict();
    let _volume = Client::create(&network, &[&server]);
    let mut client = Client::link(&connector, &server, 1, Class::Bulk);
    client.put([1]).unwrap();
    assert_eq!(*devices.1.lock(), [Some(IpAddr::from([127, 0, 0, 1]))]);
    assert_eq!(network.counts().written_bytes, PAGE_BYTES_U64);
}

/// A writer with 64 pages, and a reader of single ones that somebody waits for, which has read one of them.
fn reader(network: &Network, server: &ServerHandle) -> (Client, Client, Vec<Option<Placement>>) {
    let mut writer = Client::create(network, &[server]);
    writer.warm_up();
    let placements = writer.put(0..64).unwrap();
    let mut reader = Client::link(&common::connector(network).strict(), server, 1, Class::Urgent);
    assert_eq!(reader.get(&[0], &placements[..1]).unwrap(), [true]);
    (writer, reader, placements)
}

#[test]
fn a_page_beside_one_that_was_read_is_read_without_asking() {
    for seed in 40..60 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let (mut writer, mut reader, placements) = reader(&network, &server);
        let (read, asked) = (network.counts().read_bytes, server.statistics().bytes_out);
        let pages: Vec<u32> = (1..64).collect();
        for (page, place) in pages.iter().zip(&placements[1..]) {
            assert_eq!(reader.get_known(&[*page], &[*place]).unwrap(), [true], "seed {seed}");
        }
        assert_eq!(reader.get_known(&pages, &placements[1..]).unwrap(), [true; 63]);
        assert_eq!(network.counts().read_bytes - read, 2 * 63 * PAGE_BYTES_U64);
        assert!(server.statistics().bytes_out - asked <= PAGE_BYTES_U64, "it is asked again once a second");
        // Another page's slot: the device has read there, and that is nobody's page.
        assert_eq!(reader.get_known(&[6, 7], &[placements[6], placements[8]]).unwrap(), [true, false]);
        // One that was given back may be had still; not what is not there any more.
        let gone = common::wanted(&[9], &placements[9..10]);
        ask(&mut *writer.link, Request::Drop(&gone), PATIENCE, |_| Ok(())).unwrap();
        reader.get_known(&[9], &placements[9..10]).unwrap();
        assert_eq!(reader.get(&[9], &placements[9..10]).unwrap(), [false]);
        // What is put meanwhile is not put where others look.
        let again = writer.put([9]).unwrap();
        assert_ne!(again[0].unwrap().slot, placements[9].unwrap().slot);
        assert_eq!(reader.get_known(&[9], &again).unwrap(), [true]);
        assert_eq!(network.counts().refused, 0);
    }
}

#[test]
fn what_is_known_wrongly_is_asked_for() {
    let network = Network::new(61);
    let server = serve(&network, 2);
    let (_writer, mut reader, placements) = reader(&network, &server);
    let wanted = common::wanted(&[5], &placements[5..6]);
    let (known, _) = batch([5]);
    let known = [PageEntry { checksum: Checksum(known[0].checksum.0 ^ 1), ..known[0] }];
    let request = Request::GetKnown { wanted: &wanted, known: &known };
    let found = ask(&mut *reader.link, request, PATIENCE, |reply| match reply {
        Reply::Pages { entries, bytes } => Ok(whole(entries, bytes)),
        other => panic!("{other:?}"),
    });
    assert_eq!(found.unwrap(), [true]);
    let other = Request::GetKnown { wanted: &wanted, known: &[] };
    assert_eq!(kind(reader.link.submit(other)), ErrorKind::Input);
}

#[test]
fn where_there_is_a_limit_it_is_asked_first() {
    let network = Network::new(62);
    let config = libsg::server::Config { limit_out_bytes_per_s: 1 << 30, ..config(&network, 2, 64 * MIB) };
    let server = Server::bind(config).unwrap().spawn().unwrap();
    let (_writer, mut reader, placements) = reader(&network, &server);
    let asked = server.statistics().bytes_out;
    for page in 1..20 {
        assert_eq!(reader.get_known(&[page], &placements[page as usize..][..1]).unwrap(), [true]);
    }
    assert_eq!(server.statistics().bytes_out - asked, 19 * PAGE_BYTES_U64);
}

#[test]
fn many_pages_are_read_without_asking() {
    for seed in 60..66 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let (_writer, mut reader, placements) = reader(&network, &server);
        let mut open = HashMap::new();
        for n in (0..600).map(|n| n * 7 % 64) {
            let wanted = common::wanted(&[n as u32], &placements[n..=n]);
            let (known, _) = batch([n as u32]);
            let request = Request::GetKnown { wanted: &wanted, known: &known };
            open.insert(reader.link.submit(request).unwrap(), n);
        }
        drain(&mut reader, &mut open, |n, reply| match reply {
            Reply::Pages { entries, bytes } => {
                assert_eq!((entries[0].page.0 as usize, whole(entries, bytes)), (n, vec![true]));
            }
            other => panic!("{other:?}"),
        });
        assert_eq!((network.counts().read_bytes, network.counts().refused), (601 * PAGE_BYTES_U64, 0));
        assert_eq!(reader.link.outstanding_bytes(), 0);
    }
}

#[test]
fn what_is_kept_to_be_read_ends_with_its_volume() {
    for seed in 70..80 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let (mut writer, mut reader, placements) = reader(&network, &server);
        writer.control(&VmdRequest::Dissolve).unwrap();
        eventually("its memory is back", || server.statistics().arena_bytes == 0);
        let error = kind(reader.get(&[1], &placements[1..2]));
        assert!(matches!(error, ErrorKind::Unreachable | ErrorKind::Volume | ErrorKind::Fenced), "{error:?}");
    }
}

#[test]
fn a_reader_that_was_replaced_or_cut_off_reads_nothing_more() {
    for seed in 80..90 {
        let network = Network::new(seed);
        let server = serve(&network, 2);
        let (_writer, mut reader, placements) = reader(&network, &server);
        let mut owner = Client::connect(&network, &server, 2);
        owner.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
        let before = network.counts().read_bytes;
        let error = kind(reader.get(&[1], &placements[1..2]));
        assert!(matches!(error, ErrorKind::Unreachable | ErrorKind::Fenced), "{error:?}");
        assert_eq!(network.counts().read_bytes, before);
        let strict = common::connector(&network).strict();
        let mut urgent = Client::link(&strict, &server, 2, Class::Urgent);
        assert_eq!(urgent.get(&[1], &placements[1..2]).unwrap(), [true]);
        network.cut_off(2);
        assert_eq!(kind(urgent.get(&[2], &placements[2..3])), ErrorKind::Unreachable);
    }
}

#[test]
fn a_pair_of_hosts_is_tried_and_nothing_is_left_there() {
    let network = Network::new(15);
    let server = serve(&network, 2);
    let found = check::check(&common::connector(&network), server.address()).unwrap();
    assert_eq!((&found.node, found.pages), (server.node(), 1 + 100 + 8 * 256));
    assert!(network.counts().written_bytes >= 2148 * PAGE_BYTES_U64, "{:?}", network.counts());
    eventually("its memory is back", || server.statistics().arena_bytes == 0);
    network.cut_off(2);
    let error = check::check(&common::connector(&network), server.address()).unwrap_err();
    assert!(error.chain().contains("MTU"), "it says what to look at: {}", error.chain());
    eventually("its memory is back", || server.statistics().arena_bytes == 0);
    // An intermediary without a device says so.
    let plain = libsg::server::Config { backend: None, ..config(&network, 3, 64 * MIB) };
    let server = Server::bind(plain).unwrap().spawn().unwrap();
    let error = check::check(&common::connector(&network), server.address()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unreachable, "{}", error.chain());
    eventually("its memory is back", || server.statistics().arena_bytes == 0);
}
