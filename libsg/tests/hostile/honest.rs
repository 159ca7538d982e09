//! What clients that keep to the protocol get.

use libsg::ErrorKind;
use libsg::ids::{Checksum, Epoch, Generation, MemberSet, Round};
use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::vmd::link::ask;
use libsg::vmd::{Reply, Request};
use libsg::wire::message::{VmdReply, VmdRequest, VolumeState};
use libsg::wire::{GetEntry, IndexEntry};

use super::support::{Client, MIB, PATIENCE, batch, content, eventually, serve, wanted};

#[test]
fn pages_come_back_and_their_memory_is_given_back() {
    let server = serve(|_| {});
    assert_eq!(server.statistics().arena_bytes, 0, "nothing is reserved");
    let mut client = Client::create(&server, 1, 4096);
    for first in (0..2048).step_by(64) {
        client.check(first..first + 64);
    }
    let statistics = server.statistics();
    assert_eq!(statistics.used_bytes, 2048 * PAGE_BYTES_U64);
    assert_eq!(statistics.bytes_in, 8 * MIB);
    eventually("what was sent is counted", || server.statistics().bytes_out == 8 * MIB);
    assert_eq!(server.statistics().touched_bytes, 16 * MIB, "in, and out");
    assert!(statistics.arena_bytes <= 64 * MIB && statistics.arena_bytes >= 8 * MIB);
    assert_eq!(server.holdings().len(), 1);
    client.control(&VmdRequest::Dissolve).unwrap();
    client.control(&VmdRequest::Dissolve).unwrap();
    assert!(server.holdings().is_empty());
    eventually("the arena is empty", || server.statistics().arena_bytes == 0);
    assert_eq!(client.put(0..1).unwrap_err().kind, ErrorKind::Volume);
    server.shutdown();
}

#[test]
fn a_placement_opens_one_page_of_one_volume() {
    let server = serve(|_| {});
    let (mut one, mut two) = (Client::create(&server, 1, 100), Client::create(&server, 2, 100));
    let placements = one.put(0..3).unwrap();
    let good = wanted(0..3, &placements);
    assert!(two.get(&good).unwrap().iter().all(Option::is_none), "another volume's");
    let at = good[1].placement;
    let bad = [
        GetEntry { page: PageIndex(2), ..good[1] },
        GetEntry { placement: libsg::ids::Placement { generation: Generation(9), ..at }, ..good[1] },
        GetEntry {
            placement: libsg::ids::Placement { slot: libsg::ids::SlotIndex(u32::MAX), ..at },
            ..good[1]
        },
        good[1],
    ];
    let got = one.get(&bad).unwrap();
    assert_eq!(got.iter().filter(|page| page.is_some()).count(), 1);
    assert_eq!(got[3].as_deref(), Some(&*content(one.volume, 1)));
    assert_eq!(one.put(99..101).unwrap_err().kind, ErrorKind::Protocol, "beyond the volume");
}

#[test]
fn a_full_server_stores_what_fits() {
    let server = serve(|config| config.memory_bytes = 2 * MIB);
    let (mut one, mut two) = (Client::create(&server, 1, 1000), Client::create(&server, 2, 1000));
    let stored = |placements: Vec<Option<_>>| placements.iter().flatten().count();
    assert_eq!(stored(one.put(0..500).unwrap()), 500);
    assert_eq!(stored(one.put(500..564).unwrap()), 12);
    assert_eq!(stored(two.put(0..64).unwrap()), 0);
    one.control(&VmdRequest::Dissolve).unwrap();
    eventually("there is room again", || server.statistics().arena_bytes == 0);
    assert_eq!(stored(two.put(0..64).unwrap()), 64);
}

#[test]
fn the_index_knows_and_a_claim_fences() {
    let server = serve(|_| {});
    let mut writer = Client::create(&server, 1, 1 << 28);
    let placements = writer.put(10..12).unwrap();
    let at = |page, place| IndexEntry::at(PageIndex(page), Round(0), place, Checksum(page));
    let entries = [
        IndexEntry::zero(PageIndex(0), 1 << 28, Round(0)),
        at(10, placements[0].unwrap()),
        at(11, placements[1].unwrap()),
    ];
    let put_index = |client: &mut Client, entries: &[IndexEntry]| {
        ask(&mut *client.link, Request::PutIndex(entries), PATIENCE, |_| Ok(()))
    };
    put_index(&mut writer, &entries).unwrap();
    let mut reader = Client::connect(&server, 1, 1);
    let range = PageRange::new(PageIndex(5), 10);
    let located = ask(&mut *reader.link, Request::Locate(range), PATIENCE, |reply| match reply {
        Reply::Located(entries) => Ok(entries.to_vec()),
        other => panic!("{other:?}"),
    });
    let zero = |first, pages| IndexEntry::zero(PageIndex(first), pages, Round(0));
    assert_eq!(located.unwrap(), [zero(5, 5), entries[1], entries[2], zero(12, 3)]);

    let mut claimer = Client::connect(&server, 1, 2);
    claimer.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    assert_eq!(writer.put(1..2).unwrap_err().kind, ErrorKind::Fenced);
    assert_eq!(put_index(&mut writer, &entries).unwrap_err().kind, ErrorKind::Fenced);
    assert_eq!(writer.control(&VmdRequest::Dissolve).unwrap_err().kind, ErrorKind::Fenced);
    let VmdReply::Volume(info) = claimer.control(&VmdRequest::Describe).unwrap() else { panic!("volume") };
    assert_eq!((info.state, info.epoch, info.stored_pages), (VolumeState::Claimed, Epoch(2), 2));
    assert_eq!(info.indexed_pages, 1 << 28);
}

#[test]
fn the_state_comes_back_whole() {
    let server = serve(|_| {});
    let mut client = Client::create(&server, 1, 10);
    let state: Vec<u8> = (0..3_500_000_u32).map(|at| (at % 251) as u8).collect();
    ask(&mut *client.link, Request::PutState(&state), PATIENCE, |_| Ok(())).unwrap();
    let got = ask(&mut *client.link, Request::GetState, PATIENCE, |reply| match reply {
        Reply::State(bytes) => Ok(bytes),
        other => panic!("{other:?}"),
    });
    assert!(got.unwrap() == state);
    assert!(server.holdings()[0].has_state);
}

/// Puts and gets in one stream: neither direction may wait for the other for ever.
/// Pieces of a final set are kept within the memory for books, and go with the volume.
#[test]
fn pieces_are_bounded_and_given_back() {
    let server = serve(|config| config.memory_bytes = 2 << 20);
    let piece = vec![7; libsg::limits::STATE_BYTES_MAX];
    for volume in 1..=2 {
        let mut client = Client::create(&server, volume, 100);
        let mut put =
            |number| ask(&mut *client.link, Request::PutPiece(number, &piece), PATIENCE, |_| Ok(()));
        put(0).unwrap();
        put(1).unwrap();
        assert_eq!(put(2).unwrap_err().kind, ErrorKind::Full);
        client.control(&VmdRequest::Dissolve).unwrap();
    }
}

#[test]
fn a_pipeline_of_both_kinds_does_not_lock_up() {
    let server = serve(|config| config.memory_bytes = 128 * MIB);
    let mut client = Client::create(&server, 1, 1 << 20);
    let placements = client.put(0..64).unwrap();
    let gets = wanted(0..64, &placements);
    let (entries, slices) = batch(client.volume, 0..64);
    let link = &mut *client.link;
    let mut open = 0;
    for _ in 0..200 {
        link.submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE }).unwrap();
        link.submit(Request::Get(&gets)).unwrap();
        open += 2;
    }
    while open > 0 {
        link.progress(usize::MAX).unwrap();
        while let Some(completion) = link.completion() {
            completion.result.unwrap();
            open -= 1;
        }
        if open > 0 {
            let on = [(link.poll_fd(), link.queued_bytes() > 0)];
            libsg::transport::wait(&on, PATIENCE).unwrap();
        }
    }
}

#[test]
fn many_clients_of_many_volumes_at_once_under_limits() {
    let server = serve(|config| {
        config.memory_bytes = 256 * MIB;
        config.limit_in_bytes_per_s = 100 * MIB;
        config.limit_out_bytes_per_s = 100 * MIB;
    });
    std::thread::scope(|scope| {
        for volume in 1..=4 {
            Client::create(&server, volume, 10_000);
            for part in 0..2 {
                let server = &server;
                scope.spawn(move || {
                    let mut client = Client::connect(server, volume, 1);
                    (0..10).for_each(|n| client.check(part * 5000 + n * 64..part * 5000 + n * 64 + 64));
                });
            }
        }
    });
    assert_eq!(server.statistics().used_bytes, 4 * 2 * 640 * PAGE_BYTES_U64);
}

#[test]
fn the_canary_damages_one_page() {
    let server = serve(|config| config.canary_flip_slot = Some(70));
    let mut client = Client::create(&server, 1, 1000);
    let mut wrong = Vec::new();
    for first in [0, 64] {
        let placements = client.put(first..first + 64).unwrap();
        let got = client.get(&wanted(first..first + 64, &placements)).unwrap();
        let pages = (first..first + 64).zip(got);
        wrong.extend(pages.filter(|(page, got)| *got.as_ref().unwrap() != content(client.volume, *page)));
    }
    assert_eq!(wrong.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [69]);
}
