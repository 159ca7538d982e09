//! Announcers and askers on the loopback interface, and those who are not of the pool.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use super::multicast::{Announcer, Line, MulticastPool, Place};
use super::*;
use crate::ids::random_bytes;
use crate::transport::PoolSecret;
use crate::wire::announcement::{Announcement, Duty, test::announcement};

const PATIENCE: Duration = Duration::from_secs(60);

/// A group of this test's own.
fn place() -> Place {
    let [a, b, c, d] = random_bytes().expect("random bytes");
    let port = 20_000 + u16::from_le_bytes([c, d]) % 10_000;
    Place { group: SocketAddrV4::new(Ipv4Addr::new(239, 255, a, b), port), interface: Ipv4Addr::LOCALHOST }
}

fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"of this pool").expect("not empty")
}

fn host(number: u8) -> Announcement {
    let mut host = announcement();
    host.node.name = format!("host{number}");
    host.node.incarnation = number.into();
    host.address = ([127, 0, 0, 1], 1000 + u16::from(number)).into();
    host
}

fn announce(place: Place, number: u8) -> Announcer {
    Announcer::start(place, &secret(), Box::new(move || host(number))).expect("loopback has groups")
}

fn names(hosts: &[Announcement]) -> Vec<&str> {
    hosts.iter().map(|host| &*host.node.name).collect()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn hosts_find_each_other_and_are_found() {
    let place = place();
    let (one, two) = (announce(place, 1), announce(place, 2));
    until("each hears both", || [&one, &two].iter().all(|host| names(&host.hosts()) == ["host1", "host2"]));
    let found = MulticastPool::open(place, &secret()).and_then(|mut pool| pool.find(PATIENCE));
    let found: Vec<_> = found.expect("found").into_iter().map(|found| found.announced).collect();
    assert_eq!(found, [Some(host(1)), Some(host(2))]);
    drop(two);
    until("it said that it leaves", || one.hosts().iter().any(|host| host.duty == Duty::Leaves));
}

#[test]
fn one_that_is_heard_no_more_is_gone() {
    let place = place();
    let one = announce(place, 1);
    // It says so once, and dies.
    let mut line = Line::open_for_test(place, &secret());
    line.say(100, host(2));
    until("it is heard", || names(&one.hosts()) == ["host1", "host2"]);
    until("it is gone", || names(&one.hosts()) == ["host1"]);
}

#[test]
fn strangers_and_echoes_are_not_heard() {
    let place = place();
    let one = announce(place, 1);
    // Somebody who hears everything, and says it again.
    let mut ear = Line::open_for_test(place, &secret());
    let mut two = Line::open_for_test(place, &secret());
    two.say(60_000, host(2));
    let old = ear.packet(|packet| packet.windows(5).any(|name| name == b"host2"));
    let leaves = Announcement { duty: Duty::Leaves, ..host(2) };
    two.say(60_000, leaves.clone());
    until("it leaves", || one.hosts().contains(&leaves));
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    socket2::SockRef::from(&stranger).set_multicast_if_v4(&Ipv4Addr::LOCALHOST).expect("set");
    let say = |packet: &[u8]| assert_eq!(stranger.send_to(packet, place.group).expect("sent"), packet.len());
    say(&old);
    for at in (0..old.len()).step_by(5) {
        let mut forged = old.clone();
        forged[at] ^= 1;
        say(&forged);
    }
    say(&[]);
    say(&[0xff; 1400]);
    let other = PoolSecret::from_bytes(b"of another pool").expect("not empty");
    Line::open_for_test(place, &other).say(60_000, host(3));
    // Packets from here come in their order: when this one is heard, the others were.
    until("an honest one is heard", || {
        two.say(60_000, host(4));
        names(&one.hosts()).contains(&"host4")
    });
    let hosts = one.hosts();
    assert_eq!(names(&hosts), ["host1", "host2", "host4"]);
    assert_eq!(hosts[1], leaves, "what it said before does not come back");
}

#[test]
fn a_list_is_a_pool_of_which_nothing_is_known() {
    let address = ([10, 0, 0, 1], 7701).into();
    let found = StaticPool(vec![address]).find(PATIENCE).expect("a list");
    assert_eq!(found, [Found { address, announced: None }]);
}
