//! Announcers, watchers and askers over a real etcd, which dies, forgets, and holds what others put there.

mod process;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use discovery_etcd::{Announcer, EtcdPool, Place, Watcher};
use libsg::discovery::{Announces as _, Pool as _};
use libsg::ids::NodeId;
use libsg::transport::PoolSecret;
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use parking_lot::Mutex;
use process::{Etcd, PATIENCE, free_port, until};
use std::sync::Arc;

fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"of this pool").expect("not empty")
}

fn place(etcd: &Etcd) -> Place {
    etcd.pool("sg/test").parse().expect("good")
}

fn host(number: u8) -> Announcement {
    Announcement {
        node: NodeId { name: format!("host{number}"), incarnation: number.into() },
        address: ([127, 0, 0, 1], 1000 + u16::from(number)).into(),
        zone: Some("east".into()),
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory: MemoryRoom::default(),
        link: LinkRoom::default(),
        cpu_idle_permille: 900,
        connections_free: 10,
        volumes_free: 10,
    }
}

fn announce_by(etcd: &Etcd, number: u8, secret: &PoolSecret) -> Announcer {
    Announcer::start(&place(etcd), secret, Box::new(move || host(number))).expect("started")
}

fn announce(etcd: &Etcd, number: u8) -> Announcer {
    announce_by(etcd, number, &secret())
}

fn found(place: &Place) -> Vec<String> {
    let hosts = EtcdPool::open(place, &secret()).and_then(|mut pool| pool.find(PATIENCE));
    let hosts = hosts.unwrap_or_else(|error| panic!("{}", error.chain()));
    hosts.into_iter().filter_map(|found| Some(found.announced?.node.name)).collect()
}

fn heard(watcher: &Watcher) -> Vec<String> {
    watcher.hosts().into_iter().map(|host| host.node.name).collect()
}

#[test]
fn hosts_are_found_and_heard_until_they_leave() {
    let etcd = Etcd::start();
    let watcher = Watcher::start(&place(&etcd), &secret()).expect("started");
    let (one, two) = (announce(&etcd, 1), announce(&etcd, 2));
    until("both are heard", || heard(&watcher) == ["host1", "host2"]);
    assert_eq!(watcher.hosts(), [host(1), host(2)], "with all that they say");
    assert_eq!(found(&place(&etcd)), ["host1", "host2"]);
    // Another pool in the same etcd, whose name begins alike.
    let other: Place = etcd.pool("sg/testing").parse().expect("good");
    assert_eq!(found(&other), [""; 0]);
    // Its key is deleted when that returns.
    drop(one);
    assert_eq!(found(&place(&etcd)), ["host2"]);
    until("it is heard to leave", || heard(&watcher) == ["host2"]);
    drop(two);
    until("so is the other", || heard(&watcher).is_empty());
}

#[test]
fn what_changes_is_told_at_once() {
    let etcd = Etcd::start();
    let watcher = Watcher::start(&place(&etcd), &secret()).expect("started");
    let duty = Arc::new(Mutex::new(Duty::Lends));
    let now = Arc::clone(&duty);
    let describe = move || Announcement { duty: *now.lock(), ..host(1) };
    let announcer = Announcer::start(&place(&etcd), &secret(), Box::new(describe)).expect("started");
    for said in [Duty::Lends, Duty::Source, Duty::Leaves] {
        *duty.lock() = said;
        announcer.announce();
        until("it is heard", || watcher.hosts().iter().any(|host| host.duty == said));
    }
}

#[test]
fn an_etcd_that_dies_and_comes_back_is_used_on() {
    let mut etcd = Etcd::start();
    let watcher = Watcher::start(&place(&etcd), &secret()).expect("started");
    let _one = announce(&etcd, 1);
    until("it is heard", || heard(&watcher) == ["host1"]);
    etcd.kill();
    let two = announce(&etcd, 2);
    assert_eq!(heard(&watcher), ["host1"], "who is known stays");
    let refused = EtcdPool::open(&place(&etcd), &secret()).and_then(|mut pool| pool.find(PATIENCE));
    let refused = refused.expect_err("nobody answers").chain();
    assert!(refused.contains(&format!("etcd at 127.0.0.1:{}", etcd.port)), "{refused}");
    etcd.restart();
    until("both are heard", || heard(&watcher) == ["host1", "host2"]);
    drop(two);
    until("it is heard to leave", || heard(&watcher) == ["host1"]);
    // With nothing left, its revisions begin anew, and so do leases.
    etcd.restart_empty();
    let _three = announce(&etcd, 3);
    until("all are there again", || found(&place(&etcd)) == ["host1", "host3"]);
    until("and heard", || heard(&watcher) == ["host1", "host3"]);
}

#[test]
fn what_etcd_has_forgotten_is_listed_anew() {
    let mut etcd = Etcd::start();
    let watcher = Watcher::start(&place(&etcd), &secret()).expect("started");
    let one = announce(&etcd, 1);
    until("it is heard", || heard(&watcher) == ["host1"]);
    // Where the watcher does not find it, things happen, and are forgotten.
    let elsewhere = free_port();
    etcd.kill();
    drop(one);
    etcd.restart_at(elsewhere);
    let there: Place = format!("etcd://127.0.0.1:{elsewhere}/sg/test").parse().expect("good");
    let two = Announcer::start(&there, &secret(), Box::new(|| host(2))).expect("started");
    until("it is there", || found(&there).contains(&"host2".to_owned()));
    let key = STANDARD.encode("elsewhere");
    let put = etcd.post(elsewhere, "kv/put", &format!(r#"{{"key":"{key}","value":""}}"#));
    let revision = put.split("\"revision\":\"").nth(1).and_then(|rest| rest.split('"').next());
    let revision = revision.expect("a revision");
    etcd.post(elsewhere, "kv/compaction", &format!(r#"{{"revision":"{revision}","physical":true}}"#));
    etcd.restart();
    until("who came meanwhile is heard", || heard(&watcher).contains(&"host2".to_owned()));
    drop(two);
}

#[test]
fn what_strangers_keep_there_is_not_heard() {
    let etcd = Etcd::start();
    let _one = announce(&etcd, 1);
    let other = PoolSecret::from_bytes(b"of another pool").expect("not empty");
    let _stranger = announce_by(&etcd, 9, &other);
    until("one is there", || found(&place(&etcd)) == ["host1"]);
    let put = |key: &str, value: &str| {
        let key = STANDARD.encode(format!("sg/test/{key}"));
        etcd.post(etcd.port, "kv/put", &format!(r#"{{"key":"{key}","value":"{value}"}}"#))
    };
    // Its value, under other keys; garbage; what nobody can take for an announcement.
    let listed = etcd.post(
        etcd.port,
        "kv/range",
        &format!(r#"{{"key":"{}"}}"#, STANDARD.encode("sg/test/host1.0000000000000001")),
    );
    let value = listed.split("\"value\":\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a value");
    put("host2.0000000000000002", value);
    put("host1.0000000000000003", value);
    put("host3.0000000000000003", &STANDARD.encode([7; 300]));
    put("a", &STANDARD.encode(vec![7; 1_000_000]));
    put("host4.0000000000000004", "");
    let watcher = Watcher::start(&place(&etcd), &secret()).expect("started");
    until("the honest one is heard", || heard(&watcher) == ["host1"]);
    let two = announce(&etcd, 5);
    until("and a new one", || heard(&watcher) == ["host1", "host5"]);
    assert_eq!(found(&place(&etcd)), ["host1", "host5"]);
    // What it said is brought back after it left.
    let listed = etcd.post(
        etcd.port,
        "kv/range",
        &format!(r#"{{"key":"{}"}}"#, STANDARD.encode("sg/test/host5.0000000000000005")),
    );
    let value = listed.split("\"value\":\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a value");
    drop(two);
    until("it left", || heard(&watcher) == ["host1"]);
    put("host5.0000000000000005", value);
    let _six = announce(&etcd, 6);
    until("what came after is heard", || heard(&watcher).contains(&"host6".to_owned()));
    assert_eq!(heard(&watcher), ["host1", "host6"]);
}

#[test]
fn any_member_that_answers_will_do() {
    let etcd = Etcd::start();
    let (dead, live) = (free_port(), etcd.port);
    let several: Place = format!("etcd://127.0.0.1:{dead},127.0.0.1:{live}/sg/test").parse().expect("good");
    let _one = Announcer::start(&several, &secret(), Box::new(|| host(1))).expect("started");
    let watcher = Watcher::start(&several, &secret()).expect("started");
    until("it is heard", || heard(&watcher) == ["host1"]);
    assert_eq!(found(&several), ["host1"]);
}

#[test]
fn a_host_that_cannot_be_announced_is_an_error_of_who_starts_it() {
    let place: Place = "etcd://127.0.0.1:1/sg".parse().expect("good");
    let wrong = || Announcement { zone: Some("z".repeat(1000)), ..host(1) };
    let error = Announcer::start(&place, &secret(), Box::new(wrong)).expect_err("too long");
    assert_eq!(error.kind, libsg::ErrorKind::Input);
}
