//! What peers do that do not keep to the protocol, or do not know the secret: the server lives, its memory is
//! bounded, and honest clients are served meanwhile.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use libsg::ids::{
    Checksum, Epoch, Generation, MemberIndex, MemberSet, Placement, Round, Sequence, SlotIndex, VolumeId,
};
use libsg::page::{PAGE_BYTES, PageIndex};
use libsg::server::ServerHandle;
use libsg::transport::{Channel, Inbox, Outbox, PoolSecret, dial};
use libsg::vmd::TcpConnector;
use libsg::vmd::{Class, Connector};
use libsg::wire::handshake::Purpose;
use libsg::wire::message::VmdRequest;
use libsg::wire::run::{RunEntry, encode_runs};
use libsg::wire::{GetEntry, HEADER_BYTES, Header, IndexEntry, Kind, PageEntry, Status};
use libsg::{Error, ErrorKind};

use super::support::{Client, MIB, PATIENCE, eventually, secret, serve, wanted};

/// A channel to a volume, without any of a client's good manners.
pub fn rude(server: &ServerHandle, volume: u128) -> Channel {
    dial(server.address(), Purpose::VmdBulk, VolumeId(volume), Epoch(1), &secret(), PATIENCE).unwrap()
}

pub fn write_all(channel: &Channel, mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        match rustix::net::send(channel, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(rustix::io::Errno::AGAIN) => {
                libsg::transport::wait(&[(Some(std::os::fd::AsFd::as_fd(channel)), true)], PATIENCE)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// All that the server says until it closes the connection.
pub fn last_words(channel: &Channel) -> Vec<Header> {
    let (mut inbox, mut heard) = (Inbox::new(), Vec::new());
    loop {
        match inbox.poll(channel) {
            Ok(Some(frame)) => heard.push(frame.header),
            Ok(None) => {
                let fd = std::os::fd::AsFd::as_fd(channel);
                assert_ne!(libsg::transport::wait(&[(Some(fd), false)], PATIENCE).unwrap(), 0, "not closed");
            }
            Err(_) => return heard,
        }
    }
}

fn refused_as_malformed(channel: &Channel) {
    let heard = last_words(channel);
    let last = heard.last().expect("it says why");
    assert_eq!((last.kind, last.status), (Kind::Refused, Status::Malformed));
}

fn put_header(channel: &Channel, pages: u16) -> (Header, Vec<u8>) {
    let mut body = Vec::new();
    let entry = |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(0));
    let runs = encode_runs((0..u32::from(pages)).map(entry), &mut body);
    let header = Header { count: runs as u16, sequence: Sequence(1), ..channel.header(Kind::Put) };
    (header.with_body(&body, usize::from(pages) * PAGE_BYTES), body)
}

/// A table of one entry.
fn run_of<E: RunEntry>(entry: &E) -> Vec<u8> {
    let mut table = Vec::new();
    encode_runs([*entry], &mut table);
    table
}

#[test]
fn bytes_that_make_no_sense_end_the_connection_only() {
    let server = serve(|_| {});
    let mut honest = Client::create(&server, 1, 1000);
    let channel = || rude(&server, 1);
    let base = channel().header(Kind::Put);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("garbage", vec![0xa5; 4096]),
        ("a body beyond any limit", Header { body_bytes: u32::MAX, ..base }.encode().to_vec()),
        (
            "more entries than a batch",
            Header { count: 600, body_bytes: 600 * 4112, ..base }.encode().to_vec(),
        ),
        ("a table longer than the body", Header { count: 5, body_bytes: 16, ..base }.encode().to_vec()),
        ("an answer", Header { kind: Kind::PutReply, ..base }.encode().to_vec()),
        ("a migration's frame", Header { kind: Kind::Pages, ..base }.encode().to_vec()),
        ("another volume", Header { volume: VolumeId(2), ..base }.encode().to_vec()),
        ("another epoch", Header { epoch: Epoch(7), ..base }.encode().to_vec()),
    ];
    for (what, bytes) in cases {
        let channel = channel();
        write_all(&channel, &bytes).unwrap();
        let heard = last_words(&channel);
        assert_eq!(heard.last().map(|header| header.status), Some(Status::Malformed), "{what}");
        honest.check(0..64);
    }
    // Runs that spread out to more than a frame may have.
    let place = Placement { member: MemberIndex(0), slot: SlotIndex(0), generation: Generation(1) };
    let mut heads: [(Kind, Vec<u8>); 3] = [Kind::Put, Kind::Get, Kind::PutIndex].map(|kind| (kind, vec![]));
    PageEntry::raw(PageIndex(0), Round(0), Checksum(0)).encode_head(513, false, &mut heads[0].1);
    GetEntry { page: PageIndex(0), placement: place }.encode_head(513, false, &mut heads[1].1);
    IndexEntry::at(PageIndex(0), Round(0), place, Checksum(0)).encode_head(4097, false, &mut heads[2].1);
    for (kind, body) in heads {
        let channel = channel();
        let header = Header { count: 1, sequence: Sequence(1), ..channel.header(kind) }.with_body(&body, 0);
        write_all(&channel, &[&header.encode()[..], &body].concat()).unwrap();
        refused_as_malformed(&channel);
    }
    // Batches with copies that are none.
    let zeros = IndexEntry::zero(PageIndex(0), 1, Round(0));
    let members = MemberSet(1).0.to_le_bytes();
    let zero_page = run_of(&PageEntry::zero(PageIndex(0), 1, Round(0)));
    let cases = [
        (Kind::PutCopies, 0, vec![1; 7]),
        (Kind::PutCopies, 1, [&members[..], &zero_page].concat()),
        (Kind::PutCopies, 600, [&members[..], &[0; 600 * 12]].concat()),
        (Kind::Copy, 1, run_of(&zeros)),
        (Kind::Copy, 1, run_of(&IndexEntry::at(PageIndex(0), Round(0), place, Checksum(0)))),
        (Kind::Copy, 0, Vec::new()),
        (Kind::CopyReply, 0, Vec::new()),
        (Kind::Draw, 0, vec![1]),
        (Kind::DrawReply, 0, vec![1]),
        (Kind::DrawFrom, 0, Vec::new()),
        (Kind::DrawFromReply, 0, Vec::new()),
        (Kind::CopyAt, 0, Vec::new()),
        (Kind::CopyAt, 1, run_of(&zeros)),
        (
            Kind::CopyAt,
            1,
            [&run_of(&IndexEntry::at(PageIndex(0), Round(0), place, Checksum(0)))[..], &[1; 7]].concat(),
        ),
        (Kind::HandPages, 1, run_of(&zeros)),
        (Kind::HandCopies, 0, Vec::new()),
        (Kind::Moved, 1, vec![0; 19]),
        (Kind::Moved, 1, vec![0; 20]),
        (Kind::HandIndex, 2, run_of(&zeros)),
        (Kind::HandReply, 0, Vec::new()),
        (Kind::MovedReply, 0, Vec::new()),
        (Kind::PutCopiesReply, 0, vec![0; 16]),
        (Kind::Spread, 0, vec![1; 7]),
        (Kind::Spread, 0, members.to_vec()),
        (Kind::Spread, 1, [&members[..], &run_of(&zeros)].concat()),
        (Kind::Spread, 2, [&members[..], &run_of(&zeros)].concat()),
        (Kind::SpreadReply, 0, vec![0; 16]),
    ];
    for (kind, count, body) in cases {
        let channel = channel();
        let header = Header { count, sequence: Sequence(1), ..channel.header(kind) }.with_body(&body, 0);
        write_all(&channel, &[&header.encode()[..], &body].concat()).unwrap();
        refused_as_malformed(&channel);
        honest.check(0..64);
    }
    // Tables of nonsense behind a good header.
    for kind in [Kind::Put, Kind::Get, Kind::PutIndex, Kind::Locate, Kind::Discard, Kind::Vmd, Kind::State] {
        let channel = channel();
        let body = [0xff; 16];
        let header = Header { count: 1, sequence: Sequence(1), ..channel.header(kind) }.with_body(&body, 0);
        write_all(&channel, &header.encode()).unwrap();
        write_all(&channel, &body).unwrap();
        write_all(&channel, &[0xff; HEADER_BYTES]).unwrap();
        refused_as_malformed(&channel);
    }
    honest.check(0..64);
}

#[test]
fn a_bit_that_was_flipped_on_the_way_ends_the_connection_and_stores_nothing() {
    let server = serve(|_| {});
    let mut honest = Client::create(&server, 1, 1000);
    let used_bytes = server.statistics().used_bytes;
    let (_, table) = put_header(&rude(&server, 1), 64);
    for bit in (0..table.len() * 8).step_by(37) {
        let channel = rude(&server, 1);
        let (header, mut table) = put_header(&channel, 64);
        table[bit / 8] ^= 1 << (bit % 8);
        write_all(&channel, &[&header.encode()[..], &table].concat()).unwrap();
        // It may be said before the rest has come.
        let _ = write_all(&channel, &vec![1; 64 * PAGE_BYTES]);
        let refused = last_words(&channel).iter().all(|heard| heard.status == Status::Malformed);
        assert!(refused, "bit {bit}");
    }
    let channel = rude(&server, 1);
    let mut body = libsg::wire::message::encode(&VmdRequest::Dissolve).unwrap();
    let header = Header { sequence: Sequence(1), ..channel.header(Kind::Vmd) }.with_body(&body, 0);
    body[0] ^= 1;
    write_all(&channel, &[&header.encode()[..], &body].concat()).unwrap();
    refused_as_malformed(&channel);
    assert_eq!(server.statistics().used_bytes, used_bytes);
    honest.check(0..64);
}

#[test]
fn half_a_batch_leaves_nothing() {
    let server = serve(|_| {});
    let mut honest = Client::create(&server, 1, 10_000);
    for pages_sent in [0, 1, 20, 63] {
        let channel = rude(&server, 1);
        let (header, table) = put_header(&channel, 64);
        write_all(&channel, &header.encode()).unwrap();
        write_all(&channel, &table).unwrap();
        write_all(&channel, &vec![1; pages_sent * PAGE_BYTES + pages_sent / 2]).unwrap();
        drop(channel);
    }
    eventually("what was not finished is given back", || server.statistics().arena_bytes == 0);
    assert_eq!(server.statistics().used_bytes, 0);
    honest.check(0..64);
}

#[test]
fn whoever_does_not_know_the_secret_gets_nothing() {
    let server = serve(|config| config.handshake_timeout = Duration::from_secs(3));
    let mut honest = Client::create(&server, 1, 1000);
    let connect = |secret| {
        TcpConnector::new(secret).connect(server.address(), VolumeId(1), Epoch(1), Class::Bulk, PATIENCE)
    };
    for wrong in [PoolSecret::from_bytes(b"guessed").unwrap(), PoolSecret::open()] {
        assert_eq!(connect(wrong).err().map(|error| error.kind), Some(ErrorKind::Refused));
    }
    // Garbage, and a Hello that drips in byte by byte: the deadline is for all of it.
    let mut garbage = TcpStream::connect(server.address()).unwrap();
    garbage.write_all(&[0x5a; 1000]).unwrap();
    let mut rest = Vec::new();
    let _ = garbage.read_to_end(&mut rest);
    let mut slow = TcpStream::connect(server.address()).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let hello = Header { body_bytes: 64, ..Header::new(Kind::Hello) }.encode();
    for byte in hello.iter().cycle() {
        let closed = slow.write_all(&[*byte]).is_err() || matches!(slow.read(&mut [0]), Ok(0));
        if closed {
            break;
        }
    }
    honest.check(0..64);
}

/// Passes one connection on, and keeps what the client said.
fn record(server: &ServerHandle) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (proxy, server) = (listener.local_addr().unwrap(), server.address());
    let client = std::thread::spawn(move || {
        let connector = TcpConnector::new(secret());
        connector.connect(proxy, VolumeId(1), Epoch(1), Class::Bulk, PATIENCE).map(|_| ())
    });
    let (mut near, _) = listener.accept().unwrap();
    let mut far = TcpStream::connect(server).unwrap();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let back = std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
    let mut said = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(got @ 1..) = near.read(&mut bytes) {
        said.extend_from_slice(&bytes[..got]);
        far.write_all(&bytes[..got]).unwrap();
    }
    far.shutdown(Shutdown::Both).unwrap();
    client.join().unwrap().unwrap();
    let _ = back.join();
    said
}

#[test]
fn a_handshake_that_was_overheard_opens_nothing() {
    let server = serve(|_| {});
    let mut honest = Client::create(&server, 1, 1000);
    let said = record(&server);
    let mut replay = TcpStream::connect(server.address()).unwrap();
    replay.write_all(&said).unwrap();
    let dissolve = Header { volume: VolumeId(1), epoch: Epoch(1), ..Header::new(Kind::Vmd) };
    let body = libsg::wire::message::encode(&VmdRequest::Dissolve).unwrap();
    let header = dissolve.with_body(&body, 0);
    let _ = replay.write_all(&header.encode()).and_then(|()| replay.write_all(&body));
    let mut answer = Vec::new();
    let _ = replay.read_to_end(&mut answer);
    let welcomed = answer.windows(4).enumerate().filter(|(_, four)| *four == libsg::wire::header::MAGIC).any(
        |(at, _)| {
            let bytes = answer.get(at..at + HEADER_BYTES).and_then(|bytes| bytes.try_into().ok());
            bytes.and_then(|bytes| Header::decode(bytes).ok()).is_some_and(|h| h.kind == Kind::Welcome)
        },
    );
    assert!(!welcomed);
    honest.check(0..64);
}

#[test]
fn a_thousand_half_open_connections_lock_nobody_out() {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let all = rustix::process::Rlimit { current: files.maximum, ..files };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, all).unwrap();
    let server = serve(|config| config.half_open_max = 32);
    let mut early = Client::create(&server, 1, 10_000);
    let mut idle = Vec::new();
    for n in 0..1000 {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        if n % 2 == 0 {
            let _ = stream.write_all(&libsg::wire::header::MAGIC);
        }
        idle.push(stream);
        if n % 250 == 249 {
            let mut client = Client::connect(&server, 1, 1);
            client.check(0..64);
            early.check(64..128);
        }
    }
    eventually("only honest ones are let in", || server.statistics().connections <= 2);
    server.shutdown();
}

#[test]
fn connections_are_limited_and_free_again() {
    let server = serve(|config| config.connections_max = 3);
    let clients: Vec<Client> = (0..3).map(|_| Client::connect(&server, 1, 1)).collect();
    eventually("three are open", || server.statistics().connections == 3);
    let connect = || {
        TcpConnector::new(secret()).connect(server.address(), VolumeId(1), Epoch(1), Class::Bulk, PATIENCE)
    };
    assert!(connect().is_err());
    drop(clients);
    eventually("one more is taken", || connect().is_ok());
}

#[test]
fn a_client_that_reads_nothing_stops_itself_alone() {
    let server = serve(|_| {});
    let mut honest = Client::create(&server, 1, 10_000);
    let placements = honest.put(0..64).unwrap();
    let gets = wanted(0..64, &placements);
    let greedy = rude(&server, 1);
    let mut table = Vec::new();
    let runs = encode_runs(gets.iter().copied(), &mut table);
    let mut outbox = Outbox::new();
    // Until neither our kernel nor the server's takes any more.
    let mut idle = 0;
    while idle < 20 {
        if outbox.queued_bytes() == 0 {
            let header = Header { count: runs as u16, sequence: Sequence(1), ..greedy.header(Kind::Get) };
            for _ in 0..100 {
                outbox.push_frame(header, &table, []).unwrap();
            }
        }
        let sent = outbox.flush(&greedy, usize::MAX).unwrap();
        idle = if sent == 0 { idle + 1 } else { 0 };
        if sent == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    honest.check(64..128);
    assert!(server.statistics().arena_bytes <= 32 * MIB, "it costs no memory");
    honest.control(&VmdRequest::Dissolve).unwrap();
    eventually("what it pinned is given back", || server.statistics().arena_bytes == 0);
    drop(greedy);
}
