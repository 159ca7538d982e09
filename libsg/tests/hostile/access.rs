//! Clients that move pages themselves: what they may have of an intermediary's memory, and until when.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libsg::ids::{Checksum, Epoch, MemberSet, Placement, Round, Sequence, VolumeId};
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::server::ServerHandle;
use libsg::transport::wait;
use libsg::vmd::link::{Reply, Ticket};
use libsg::vmd::{AccessReply, AccessRequest, Class, Link, TcpConnector, TcpLink};
use libsg::wire::access::{Endpoint, KeyEntry};
use libsg::wire::message::VmdRequest;
use libsg::wire::{Encoding, GetEntry, Header, Kind, PageEntry, Status};
use libsg::{ErrorKind, Result, limits};

use super::backend::Network;
use super::peers::{last_words, rude, write_all};
use super::support::{Client, MIB, PATIENCE, content, eventually, secret, serve, wanted};

/// A client that was let in.
struct Reacher {
    link: TcpLink,
    network: Network,
    volume: VolumeId,
    client: u64,
}

/// Slots that it may write.
#[derive(Debug)]
struct Lease {
    ticket: Ticket,
    placements: Vec<Option<Placement>>,
    keys: Vec<KeyEntry>,
}

impl Lease {
    fn granted(&self) -> usize {
        self.placements.iter().flatten().count()
    }
}

fn start(change: impl FnOnce(&mut libsg::server::Config)) -> (ServerHandle, Network) {
    let network = Network::default();
    let server = serve(|config| {
        config.backend = Some(Arc::new(network.clone()));
        change(config);
    });
    (server, network)
}

fn raw(volume: VolumeId, page: u32) -> PageEntry {
    PageEntry::raw(PageIndex(page), Round(0), Checksum::of(&content(volume, page)))
}

impl Reacher {
    fn connect(server: &ServerHandle, network: &Network, volume: u128, epoch: u64) -> Result<Self> {
        let volume = VolumeId(volume);
        let connector = TcpConnector::new(secret());
        let of = (volume, Epoch(epoch));
        let link = connector.link(server.address(), of, Class::Bulk, PATIENCE).unwrap();
        let mut reacher = Self { link, network: network.clone(), volume, client: 0 };
        reacher.attach()?;
        Ok(reacher)
    }

    fn attach(&mut self) -> Result<()> {
        let endpoint = Endpoint::decode(b"a client").unwrap();
        self.client = self.asked(AccessRequest::Attach(&endpoint), |_, reply| match reply {
            AccessReply::Attached(end) => u64::from_le_bytes(end.as_bytes().try_into().unwrap()),
            other => panic!("{other:?}"),
        })?;
        Ok(())
    }

    fn asked<T>(
        &mut self,
        request: AccessRequest<'_>,
        take: impl FnOnce(Ticket, AccessReply<'_>) -> T,
    ) -> Result<T> {
        let ticket = self.link.submit_access(request)?;
        loop {
            self.link.progress(usize::MAX)?;
            if let Some((answered, result)) = self.link.answered() {
                assert_eq!(answered, ticket);
                let answered = result?;
                return Ok(take(ticket, self.link.show(answered)));
            }
            wait(&[(self.link.poll_fd(), self.link.queued_bytes() > 0)], PATIENCE).unwrap();
        }
    }

    fn lease(&mut self, pages: usize) -> Result<Lease> {
        self.asked(AccessRequest::Lease(pages), |ticket, reply| match reply {
            AccessReply::Leased { placements, keys } => {
                Lease { ticket, placements: placements.to_vec(), keys: keys.to_vec() }
            }
            other => panic!("{other:?}"),
        })
    }

    /// Writes pages where a lease says; whether all of them landed.
    fn write(&self, lease: &Lease, first: u32) -> bool {
        (first..).zip(lease.placements.iter().flatten()).all(|(page, place)| {
            let bytes = content(self.volume, page);
            let mut keys = lease.keys.iter();
            let (key, at) = keys.find_map(|key| Some((key.key, key.place_of(place.slot)?))).unwrap();
            self.network.write(self.client, &key, usize::from(at) * PAGE_BYTES, &bytes)
        })
    }

    fn settle(&mut self, lease: &Lease, first: u32) -> Result<Vec<Option<Placement>>> {
        let pages = first..first + lease.granted() as u32;
        let entries: Vec<PageEntry> = pages.map(|page| raw(self.volume, page)).collect();
        self.settle_as(lease.ticket, &entries)
    }

    fn settle_as(&mut self, lease: Ticket, entries: &[PageEntry]) -> Result<Vec<Option<Placement>>> {
        let request = AccessRequest::Settle { lease, entries, copies: MemberSet::NONE };
        self.asked(request, |_, reply| match reply {
            AccessReply::Plain(Reply::Stored { placements, .. }) => placements.to_vec(),
            other => panic!("{other:?}"),
        })
    }

    fn put(&mut self, pages: std::ops::Range<u32>) -> Vec<Option<Placement>> {
        let lease = self.lease(pages.len()).unwrap();
        assert!(self.write(&lease, pages.start));
        let placements = self.settle(&lease, pages.start).unwrap();
        assert_eq!(placements, lease.placements);
        placements
    }

    fn reach(&mut self, wanted: &[GetEntry]) -> Result<(Ticket, Vec<PageEntry>, Vec<KeyEntry>)> {
        self.asked(AccessRequest::Reach(wanted), |ticket, reply| match reply {
            AccessReply::Reached { entries, keys, .. } => (ticket, entries.to_vec(), keys.to_vec()),
            other => panic!("{other:?}"),
        })
    }

    fn read(&self, at: Placement, keys: &[KeyEntry]) -> Option<Vec<u8>> {
        let (key, slot) = keys.iter().find_map(|key| Some((key.key, key.place_of(at.slot)?)))?;
        self.network.read(self.client, &key, usize::from(slot) * PAGE_BYTES, PAGE_BYTES)
    }

    fn release(&mut self, ticket: Ticket) {
        self.link.release(&[ticket]).unwrap();
        while self.link.queued_bytes() > 0 {
            self.link.progress(usize::MAX).unwrap();
        }
    }
}

fn refused<T>(result: Result<T>, kind: ErrorKind) {
    assert_eq!(result.map(|_| ()).expect_err("refused").kind, kind);
}

#[test]
fn pages_that_a_client_wrote_are_as_any_others() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 5000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let placements = writer.put(0..300);
    let got = plain.get(&wanted(0..300, &placements)).unwrap();
    assert!((0..300).zip(got).all(|(page, bytes)| bytes.unwrap() == content(plain.volume, page)));
    assert_eq!(server.statistics().used_bytes, 300 * PAGE_BYTES_U64);
    // And the other way round.
    let put = plain.put(1000..1400).unwrap();
    let mut reader = Reacher::connect(&server, &network, 1, 1).unwrap();
    let asked = wanted(1000..1400, &put);
    let (_, entries, keys) = reader.reach(&asked).unwrap();
    assert!((1000..1400).map(|page| raw(plain.volume, page)).eq(entries));
    for (page, get) in (1000..1400).zip(&asked) {
        assert!(reader.read(get.placement, &keys).unwrap() == content(plain.volume, page), "page {page}");
    }
    // What is not there is said to be gone, and has no key.
    let other = GetEntry { page: PageIndex(4999), placement: asked[0].placement };
    let (_, entries, keys) = reader.reach(&[other]).unwrap();
    assert_eq!((entries[0].encoding, keys.len()), (Encoding::Gone, 0));
}

#[test]
fn whoever_reads_cannot_write_and_nobody_reaches_another_volume() {
    let (server, network) = start(|_| {});
    let _ = (Client::create(&server, 1, 100), Client::create(&server, 2, 100));
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let lease = writer.lease(4).unwrap();
    let key = lease.keys[0].key;
    assert!(writer.write(&lease, 0));
    let stranger = Reacher::connect(&server, &network, 2, 1).unwrap();
    assert!(!network.write(stranger.client, &key, 0, &[1]));
    assert_eq!(network.read(writer.client, &key, 0, 1), None);
    let at = writer.settle(&lease, 0).unwrap();
    let (_, _, keys) = writer.reach(&wanted(0..4, &at)).unwrap();
    assert!(!network.write(writer.client, &keys[0].key, 0, &[1]));
    assert_eq!(network.read(stranger.client, &keys[0].key, 0, 1), None);
    assert!(network.read(writer.client, &keys[0].key, 0, 1).is_some());
    let statistics = server.statistics();
    assert_eq!((statistics.bytes_in, statistics.bytes_out), (4 * PAGE_BYTES_U64, 4 * PAGE_BYTES_U64));
    assert_eq!((statistics.touched_bytes, statistics.leased_slots), (0, 0), "no processor did that");
}

#[test]
fn leases_are_bounded_and_end_with_their_session() {
    let (server, network) = start(|config| config.memory_bytes = 16 * MIB);
    let mut plain = Client::create(&server, 1, 100_000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let mut leased = 0;
    while leased + limits::BATCH_PAGES_MAX <= limits::LEASED_SLOTS_MAX {
        leased += writer.lease(limits::BATCH_PAGES_MAX).unwrap().granted();
    }
    assert_eq!(leased, limits::LEASED_SLOTS_MAX);
    refused(writer.lease(1), ErrorKind::Full);
    let statistics = server.statistics();
    assert_eq!((statistics.used_bytes, statistics.leased_slots), (0, leased as u64), "nothing is stored yet");
    // Nobody else has these slots meanwhile: of 4096, so many are left.
    let others: usize =
        (0..9).map(|n| plain.put(n * 500..(n + 1) * 500).unwrap().iter().flatten().count()).sum();
    assert_eq!(others + leased, 16 * MIB as usize / PAGE_BYTES);
    assert_eq!(
        writer.lease(1).map(|lease| lease.granted()).map_err(|error| error.kind),
        Err(ErrorKind::Full)
    );
    let client = writer.client;
    drop(writer);
    eventually("its way in is gone", || network.is_gone(client));
    eventually("and its leases", || server.statistics().leased_slots == 0);
    let plain = RefCell::new(plain);
    let put = |pages| plain.borrow_mut().put(pages).unwrap().iter().all(Option::is_some);
    eventually("and its slots are free", || put(50_000..50_001));
    assert!(put(50_001..50_501));
    assert_eq!(network.counts(), (0, 0));
}

#[test]
fn what_is_not_there_is_not_leased() {
    let (server, network) = start(|config| config.memory_bytes = 2 * MIB);
    let _plain = Client::create(&server, 1, 1000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    writer.put(0..500);
    let lease = writer.lease(20).unwrap();
    assert_eq!((lease.granted(), lease.placements.len()), (12, 20));
    assert!(writer.write(&lease, 500));
    writer.settle(&lease, 500).unwrap();
    let none = writer.lease(20).unwrap();
    assert_eq!((none.granted(), none.keys.len()), (0, 0));
}

#[test]
fn a_full_chunk_is_written_no_more_and_what_is_freed_in_an_open_one_is_nobody_elses() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 10_000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let released = writer.lease(10).unwrap();
    writer.release(released.ticket);
    // The request behind it is answered when that was done.
    let lease = writer.lease(10).unwrap();
    let others = plain.put(0..400).unwrap();
    let slots =
        |placements: &[Option<Placement>]| placements.iter().map(|at| at.unwrap().slot).collect::<Vec<_>>();
    let before = slots(&released.placements);
    assert!(slots(&others).iter().chain(&slots(&lease.placements)).all(|slot| !before.contains(slot)));
    assert!(writer.write(&lease, 1000));
    writer.settle(&lease, 1000).unwrap();
    assert!(writer.write(&lease, 1000), "it fills the chunk");
    writer.put(2000..2512);
    assert!(!writer.write(&lease, 1000), "it is full");
    let again = writer.lease(10).unwrap();
    assert!(writer.write(&again, 3000));
}

#[test]
fn whoever_has_a_newer_epoch_is_met_by_nothing_late() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let mut old = Reacher::connect(&server, &network, 1, 1).unwrap();
    let stored = old.put(0..10);
    let lease = old.lease(10).unwrap();
    let (_, _, keys) = old.reach(&wanted(0..10, &stored)).unwrap();
    plain.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    assert!(network.is_gone(old.client), "before the claim is answered");
    assert!(!old.write(&lease, 10));
    assert_eq!(old.read(stored[0].unwrap(), &keys), None);
    refused(old.settle(&lease, 10), ErrorKind::Fenced);
    refused(old.lease(1), ErrorKind::Fenced);
    refused(old.reach(&wanted(0..10, &stored)), ErrorKind::Fenced);
    refused(old.attach(), ErrorKind::Fenced);
    let mut owner = Reacher::connect(&server, &network, 1, 2).unwrap();
    let (_, entries, keys) = owner.reach(&wanted(0..10, &stored)).unwrap();
    assert!(entries.iter().all(|entry| entry.encoding == Encoding::Raw));
    assert!(owner.read(stored[3].unwrap(), &keys).unwrap() == content(owner.volume, 3));
    assert_eq!(server.statistics().used_bytes, 10 * PAGE_BYTES_U64);
}

#[test]
fn who_is_fenced_while_memory_is_opened_gets_nothing() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let stored = plain.put(0..4).unwrap();
    let mut old = Reacher::connect(&server, &network, 1, 1).unwrap();
    let claim = |epoch| {
        let mut plain = Client::connect(&server, 1, 1);
        move || plain.control(&VmdRequest::Claim { epoch: Epoch(epoch) }).map(|_| ()).unwrap()
    };
    network.meanwhile(claim(2));
    refused(old.lease(10), ErrorKind::Fenced);
    assert_eq!(network.counts(), (0, 0));
    let mut old = Reacher::connect(&server, &network, 1, 2).unwrap();
    network.meanwhile(claim(3));
    refused(old.reach(&wanted(0..4, &stored)), ErrorKind::Fenced);
    network.meanwhile(claim(4));
    refused(Reacher::connect(&server, &network, 1, 3), ErrorKind::Fenced);
    assert_eq!(network.counts().0, 0, "nobody is let in");
    let mut owner = Reacher::connect(&server, &network, 1, 4).unwrap();
    let (_, _, keys) = owner.reach(&wanted(0..4, &stored)).unwrap();
    assert!(owner.read(stored[2].unwrap(), &keys).unwrap() == content(owner.volume, 2));
}

#[test]
fn a_volume_that_is_succeeded_parked_or_sealed_takes_nothing_late() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let mut old = Reacher::connect(&server, &network, 1, 1).unwrap();
    let lease = old.lease(10).unwrap();
    plain.control(&VmdRequest::Succeed { epoch: Epoch(2) }).unwrap();
    assert!(!old.write(&lease, 0));
    let mut writer = Reacher::connect(&server, &network, 1, 2).unwrap();
    let stored = writer.put(0..10);
    let lease = writer.lease(10).unwrap();
    let mut owner = Client::connect(&server, 1, 2);
    owner.control(&VmdRequest::Seal).unwrap();
    assert!(!writer.write(&lease, 10));
    refused(writer.settle(&lease, 10), ErrorKind::Volume);
    refused(writer.lease(1), ErrorKind::Volume);
    // What it reads it still does.
    let (_, _, keys) = writer.reach(&wanted(0..10, &stored)).unwrap();
    assert!(writer.read(stored[9].unwrap(), &keys).unwrap() == content(writer.volume, 9));
}

#[test]
fn a_dissolved_volume_gives_back_what_clients_still_had() {
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let stored = writer.put(0..10);
    let lease = writer.lease(10).unwrap();
    let (_, _, keys) = writer.reach(&wanted(0..10, &stored)).unwrap();
    plain.control(&VmdRequest::Dissolve).unwrap();
    assert_eq!(network.counts().0, 0);
    assert!(!writer.write(&lease, 10));
    assert_eq!(writer.read(stored[0].unwrap(), &keys), None);
    refused(writer.settle(&lease, 10), ErrorKind::Volume);
    refused(writer.reach(&wanted(0..10, &stored)), ErrorKind::Volume);
    eventually("no chunk is open", || network.counts() == (0, 0));
    eventually("the memory is with the system", || server.statistics().arena_bytes == 0);
}

#[test]
fn pages_that_are_read_stay_until_they_are_released() {
    let (server, network) = start(|config| config.memory_bytes = 2 * MIB);
    let mut plain = Client::create(&server, 1, 1000);
    let stored = plain.put(0..512).unwrap();
    let mut reader = Reacher::connect(&server, &network, 1, 1).unwrap();
    let asked = wanted(0..512, &stored);
    let (ticket, _, keys) = reader.reach(&asked).unwrap();
    let dropped = libsg::vmd::Request::Drop(&asked);
    libsg::vmd::link::ask(&mut *plain.link, dropped, PATIENCE, |_| Ok(())).unwrap();
    assert!(plain.put(0..8).unwrap().iter().all(Option::is_none), "somebody reads there");
    assert!(reader.read(stored[7].unwrap(), &keys).unwrap() == content(reader.volume, 7));
    reader.release(ticket);
    eventually("no chunk is open", || network.counts() == (1, 0));
    eventually("there is room", || server.statistics().arena_bytes == 0);
    assert!(plain.put(0..8).unwrap().iter().all(Option::is_some));
    assert_eq!(reader.read(stored[7].unwrap(), &keys), None);
}

#[test]
fn who_cannot_be_let_in_uses_the_connection() {
    let server = serve(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let nowhere = Network::default();
    refused(Reacher::connect(&server, &nowhere, 1, 1), ErrorKind::Unreachable);
    plain.check(0..64);
    // There is a network, which lets no more memory be reached.
    let (server, network) = start(|_| {});
    let mut plain = Client::create(&server, 1, 1000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    network.refuses.store(true, Ordering::Relaxed);
    refused(writer.lease(10), ErrorKind::Unreachable);
    let stored = plain.put(0..512).unwrap();
    refused(writer.reach(&wanted(0..512, &stored)), ErrorKind::Unreachable);
    assert_eq!(server.statistics().used_bytes, 512 * PAGE_BYTES_U64);
    // Of what was refused nothing is left: a whole chunk more.
    plain.check(100..200);
    network.refuses.store(false, Ordering::Relaxed);
    writer.put(200..300);
}

#[test]
fn a_client_that_is_let_in_again_has_nothing_of_before() {
    let (server, network) = start(|_| {});
    let _plain = Client::create(&server, 1, 1000);
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    let (lease, before) = (writer.lease(10).unwrap(), writer.client);
    writer.attach().unwrap();
    assert!(network.is_gone(before));
    assert!(!writer.write(&lease, 0));
    refused(writer.settle(&lease, 0), ErrorKind::Protocol);
}

#[test]
fn what_no_honest_client_sends_ends_its_connection_only() {
    let (server, network) = start(|_| {});
    let mut honest = Client::create(&server, 1, 1000);
    let settle = |lease: u64, pages: std::ops::Range<u32>| {
        let mut body = [lease.to_le_bytes(), [0; 8]].concat();
        let entries = pages.map(|page| raw(VolumeId(1), page));
        let runs = libsg::wire::run::encode_runs(entries, &mut body);
        (Kind::Settle, runs as u16, body)
    };
    let attach = || (Kind::Attach, 0, b"a client".to_vec());
    let lease = |pages| (Kind::Lease, pages, Vec::new());
    type Frames = Vec<(Kind, u16, Vec<u8>)>;
    let cases: Vec<(&str, Frames)> = vec![
        ("no end at all", vec![(Kind::Attach, 0, Vec::new())]),
        ("a lease before it is let in", vec![lease(1)]),
        ("a settlement before it is let in", vec![settle(1, 0..1)]),
        ("a release before it is let in", vec![(Kind::Release, 1, vec![0; 8])]),
        ("a lease of nothing", vec![attach(), lease(0)]),
        ("a lease of more than a batch", vec![attach(), lease(513)]),
        ("a settlement without a lease", vec![attach(), settle(77, 0..1)]),
        ("fewer pages than slots", vec![attach(), lease(5), settle(2, 0..4)]),
        ("more pages than slots", vec![attach(), lease(5), settle(2, 0..6)]),
        ("a lease that is settled twice", vec![attach(), lease(5), settle(2, 0..5), settle(2, 0..5)]),
        (
            "a released lease",
            vec![attach(), lease(5), (Kind::Release, 1, vec![2, 0, 0, 0, 0, 0, 0, 0]), settle(2, 0..5)],
        ),
        ("an answer", vec![attach(), (Kind::LeaseReply, 0, Vec::new())]),
    ];
    for (what, frames) in cases {
        let channel = rude(&server, 1);
        for (at, (kind, count, body)) in frames.into_iter().enumerate() {
            let sequence = Sequence(at as u64 + 1);
            let header = Header { count, sequence, ..channel.header(kind) }.with_body(&body, 0);
            write_all(&channel, &[&header.encode()[..], &body].concat()).unwrap();
        }
        let heard = last_words(&channel);
        assert_eq!(heard.last().map(|header| header.status), Some(Status::Malformed), "{what}");
        honest.check(0..64);
    }
    eventually("nobody is let in", || network.counts().0 == 0);
    // What nobody has is released without harm; pages behind the volume's end are refused, and go nowhere.
    let mut writer = Reacher::connect(&server, &network, 1, 1).unwrap();
    writer.release(Ticket(99));
    let lease = writer.lease(1).unwrap();
    refused(writer.settle_as(lease.ticket, &[raw(VolumeId(1), 1000)]), ErrorKind::Protocol);
    writer.put(0..10);
    honest.check(0..64);
}

#[test]
fn a_lying_end_is_refused_and_a_frame_reused_is_told_from_the_first() {
    let (server, network) = start(|_| {});
    let _plain = Client::create(&server, 1, 1000);
    let channel = rude(&server, 1);
    let say = |kind, count, sequence, body: &[u8]| {
        let sequence = Sequence(sequence);
        let header = Header { count, sequence, ..channel.header(kind) }.with_body(body, 0);
        write_all(&channel, &[&header.encode()[..], body].concat()).unwrap();
    };
    say(Kind::Attach, 0, 1, b"somebody else");
    say(Kind::Attach, 0, 2, b"a client");
    say(Kind::Lease, 4, 3, &[]);
    say(Kind::Lease, 4, 3, &[]);
    say(Kind::Pong, 0, 4, &[]);
    let statuses: Vec<(Kind, Status)> =
        last_words(&channel).iter().map(|header| (header.kind, header.status)).collect();
    assert_eq!(
        statuses,
        [
            (Kind::AttachReply, Status::Malformed),
            (Kind::AttachReply, Status::Ok),
            (Kind::LeaseReply, Status::Ok),
            (Kind::LeaseReply, Status::Malformed),
            (Kind::Refused, Status::Malformed),
        ]
    );
    eventually("nobody is let in", || network.counts() == (0, 0));
}
