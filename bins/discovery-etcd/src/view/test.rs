//! What etcd says, honest or not, and who is there by it.

use std::time::Duration;

use libsg::transport::PoolSecret;
use libsg::wire::announcement::{Duty, LinkRoom, MemoryRoom, Transports};
use proptest::prelude::*;

use super::*;
use crate::message::{Base64, Happened, Header};

const PREFIX: &str = "sg/test";
const WALL_MS: u64 = 1_800_000_000_000;

/// A host that has something of everything.
pub fn host(number: u16) -> Announcement {
    Announcement {
        node: NodeId { name: format!("host{number}"), incarnation: number.into() },
        address: ([10, 0, 0, 1], number).into(),
        zone: None,
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory: MemoryRoom {
            host_bytes: 4 << 30,
            available_bytes: 3 << 30,
            limit_bytes: 2 << 30,
            used_bytes: 1 << 30,
        },
        link: LinkRoom {
            bytes_per_s: 125_000_000,
            free_in_bytes_per_s: 100_000_000,
            free_out_bytes_per_s: 90_000_000,
            ..LinkRoom::default()
        },
        cpu_idle_permille: 750,
        connections_free: 1000,
        volumes_free: 4000,
    }
}

fn secret() -> AnnouncementKey {
    PoolSecret::from_bytes(b"of this pool").expect("not empty").announcement_key()
}

fn sealed(number: u16, counter: u64, sent_ms: u64) -> Vec<u8> {
    let said = Said::Here { period_ms: 5000, host: host(number) };
    Datagram { counter, sent_ms, said }.encode(&secret()).expect("in bounds")
}

fn at(key: &str, value: &[u8], mod_revision: i64) -> KeyValue {
    KeyValue { key: Base64::of(key.as_bytes()), value: Base64::of(value), mod_revision, lease: 0 }
}

fn own_key(number: u16) -> String {
    key::of(PREFIX, &host(number).node)
}

fn of(number: u16, counter: u64) -> KeyValue {
    at(&own_key(number), &sealed(number, counter, WALL_MS), counter as i64)
}

fn put(kv: KeyValue) -> Happened {
    Happened { what: What::Put, kv }
}

fn gone(number: u16, revision: i64) -> Happened {
    Happened { what: What::Delete, kv: at(&own_key(number), b"", revision) }
}

fn watched(events: Vec<Happened>) -> Watched {
    let revision = events.last().map_or(0, |event| event.kv.mod_revision);
    Watched { header: Header { revision }, events, ..Watched::default() }
}

fn listed(revision: i64, kvs: Vec<KeyValue>) -> Listed {
    Listed { header: Header { revision }, kvs, more: false }
}

fn names(view: &View, now: Instant) -> Vec<String> {
    view.hosts(now).into_iter().map(|host| host.node.name).collect()
}

/// One that has listed these at revision 10.
fn view(kvs: Vec<KeyValue>, now: Instant) -> View {
    let mut view = View::new(PREFIX, secret());
    view.begin_listing();
    assert_eq!(view.listed(&listed(10, kvs), now, WALL_MS), None);
    assert_eq!(view.next(), Some(11));
    view
}

#[test]
fn a_listing_then_what_happens_from_there_on() {
    let now = Instant::now();
    let mut view = view(vec![of(1, 1), of(2, 2)], now);
    assert_eq!(names(&view, now), ["host1", "host2"]);
    let created = Watched { header: Header { revision: 30 }, created: true, ..Watched::default() };
    assert_eq!(view.watched(&created, now, WALL_MS), Next::Hear);
    assert_eq!(view.next(), Some(11), "what happened up to then comes yet");
    let happened = watched(vec![put(of(3, 20)), gone(1, 21)]);
    assert_eq!(view.watched(&happened, now, WALL_MS), Next::Hear);
    assert_eq!((names(&view, now), view.next()), (vec!["host2".into(), "host3".into()], Some(22)));
    // etcd says how far it is.
    let so_far = Watched { header: Header { revision: 90 }, ..Watched::default() };
    assert_eq!(view.watched(&so_far, now, WALL_MS), Next::Hear);
    assert_eq!(view.next(), Some(91));
    // Who is not put again is gone after three of its periods, whatever etcd says.
    assert_eq!(names(&view, now + Duration::from_secs(15)), [""; 0]);
}

#[test]
fn what_was_forgotten_is_listed_again_and_who_is_not_there_is_gone() {
    let now = Instant::now();
    let mut view = view(vec![of(1, 1), of(2, 2)], now);
    let compacted = Watched { canceled: true, compact_revision: 50, ..Watched::default() };
    assert_eq!(view.watched(&compacted, now, WALL_MS), Next::List);
    assert_eq!(view.next(), None);
    assert_eq!(names(&view, now), ["host1", "host2"], "nobody is gone for that");
    assert_eq!(view.watched(&watched(vec![put(of(3, 60))]), now, WALL_MS), Next::List);
    view.begin_listing();
    assert_eq!(view.listed(&listed(70, vec![of(2, 2), of(3, 60)]), now, WALL_MS), None);
    assert_eq!((names(&view, now), view.next()), (vec!["host2".into(), "host3".into()], Some(71)));
}

#[test]
fn a_store_that_begins_anew_is_listed_again() {
    let now = Instant::now();
    let mut view = view(vec![of(1, 1)], now);
    let created = |revision| Watched { header: Header { revision }, created: true, ..Watched::default() };
    assert_eq!(view.watched(&created(10), now, WALL_MS), Next::Hear);
    assert_eq!(view.watched(&created(2), now, WALL_MS), Next::List);
}

#[test]
fn a_listing_comes_in_pieces_of_one_revision() {
    let now = Instant::now();
    let mut view = View::new(PREFIX, secret());
    view.begin_listing();
    let first = Listed { more: true, ..listed(10, vec![of(1, 1)]) };
    assert_eq!(view.listed(&first, now, WALL_MS), Some((10, format!("{}\0", own_key(1)))));
    assert_eq!(view.next(), None);
    assert_eq!(view.listed(&listed(12, vec![of(2, 2)]), now, WALL_MS), None);
    assert_eq!((names(&view, now), view.next()), (vec!["host1".into(), "host2".into()], Some(11)));
    // One that never ends does.
    view.begin_listing();
    let endless = Listed { more: true, ..listed(20, vec![of(1, 1)]) };
    let pieces = (0..).take_while(|_| view.listed(&endless, now, WALL_MS).is_some()).count();
    assert!(pieces < PIECES_MAX);
}

#[test]
fn hostile_values_do_not_count() {
    let now = Instant::now();
    let mut view = view(vec![of(1, 5)], now);
    let whole = sealed(2, 1, WALL_MS);
    let mut forged = whole.clone();
    forged[40] ^= 1;
    let other = PoolSecret::from_bytes(b"of another pool").expect("not empty").announcement_key();
    let said = Said::Here { period_ms: 5000, host: host(2) };
    let stranger = Datagram { counter: 1, sent_ms: WALL_MS, said }.encode(&other).expect("in bounds");
    let question = Datagram { counter: 1, sent_ms: WALL_MS, said: Said::WhoIsThere };
    let question = question.encode(&secret()).expect("in bounds");
    let sealed_wrong = Err(Why::Malformed(Malformed::Sealed));
    let mut heard = |kv: &KeyValue| view.heard(kv, now, WALL_MS);
    assert_eq!(heard(&at(&own_key(2), &[7; 1 << 20], 1)), Err(Why::NoValue));
    assert_eq!(heard(&at(&own_key(2), b"", 1)), Err(Why::Malformed(Malformed::Truncated)));
    for length in 1..whole.len() {
        assert!(heard(&at(&own_key(2), &whole[..length], 1)).is_err(), "{length} bytes");
    }
    assert_eq!(heard(&at(&own_key(2), &forged, 1)), sealed_wrong);
    assert_eq!(heard(&at(&own_key(2), &stranger, 1)), sealed_wrong);
    assert_eq!(heard(&at(&own_key(2), &question, 1)), Err(Why::Elsewhere));
    // Kept under another key, it would be there when its own was deleted.
    for elsewhere in [own_key(3), format!("{}x", own_key(2)), "sg/other/host2".into(), "x".repeat(10_000)] {
        assert_eq!(heard(&at(&elsewhere, &whole, 1)), Err(Why::Elsewhere), "{elsewhere}");
    }
    // What it said before, brought back.
    assert_eq!(heard(&of(1, 5)), Err(Why::Refused(Refusal::Replayed)));
    assert_eq!(heard(&of(1, 4)), Err(Why::Refused(Refusal::Replayed)));
    let old = at(&own_key(2), &sealed(2, 1, WALL_MS - 31_000), 1);
    assert_eq!(heard(&old), Err(Why::Refused(Refusal::Stale)));
    assert_eq!(names(&view, now), ["host1"]);
    assert_eq!(view.heard(&at(&own_key(2), &whole, 1), now, WALL_MS), Ok(()));
}

#[test]
fn one_that_left_is_not_brought_back() {
    let now = Instant::now();
    let mut view = view(vec![of(1, 5)], now);
    view.watched(&watched(vec![gone(1, 11), put(of(1, 5)), put(of(1, 3))]), now, WALL_MS);
    assert_eq!(names(&view, now), [""; 0]);
    // Nor later, when nothing is remembered of it.
    let later = now + Duration::from_secs(60);
    view.forget(later, WALL_MS + 60_000);
    view.watched(&watched(vec![put(of(1, 5))]), later, WALL_MS + 60_000);
    assert_eq!(names(&view, later), [""; 0]);
}

proptest! {
    /// Whatever etcd says, in whatever order: nobody is there who did not say so, and no revision is heard twice.
    #[test]
    fn revisions_only_grow_and_hosts_are_of_the_pool(
        said in proptest::collection::vec((0..4_u8, 1..5_u16, -3..40_i64), 1..60)
    ) {
        let now = Instant::now();
        let mut view = view(Vec::new(), now);
        let mut put_once = std::collections::HashSet::new();
        for (what, number, revision) in said {
            let before = view.next();
            let header = Header { revision };
            match what {
                0 => {
                    put_once.insert(format!("host{number}"));
                    view.watched(&watched(vec![put(of(number, revision.max(1) as u64))]), now, WALL_MS);
                }
                1 => drop(view.watched(&watched(vec![gone(number, revision)]), now, WALL_MS)),
                2 => drop(view.watched(&Watched { header, created: true, ..Watched::default() }, now, WALL_MS)),
                _ => {
                    let garbage = at(&own_key(number), &revision.to_le_bytes(), revision);
                    view.watched(&watched(vec![put(garbage)]), now, WALL_MS);
                }
            }
            prop_assert!(view.next().is_none() || view.next() >= before);
            prop_assert!(names(&view, now).iter().all(|name| put_once.contains(name)));
            if view.next().is_none() {
                view.begin_listing();
                view.listed(&listed(revision.max(0), Vec::new()), now, WALL_MS);
            }
        }
    }
}
