//! Labs for real. They need root, as the experiments do: without it these tests fail, they do not pretend.

use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use super::*;

fn spec(destination_memory: Option<(Size, Size)>) -> LabSpec {
    LabSpec {
        sources: 2,
        intermediaries: 1,
        link_rate: Rate::mbit(1000),
        destination_rate: Rate::mbit(100),
        intermediary_rate: Rate::UNLIMITED,
        queue: Queue::Prio,
        cc: CongestionControl::Cubic,
        shape: true,
        client: false,
        destination_memory,
    }
}

fn left_of(prefix: &Prefix) -> Vec<String> {
    let names = net::ours().into_iter().filter(|(owner, _)| owner == prefix).map(|(_, name)| name);
    let groups = memory::ours().into_iter().filter(|(owner, _)| owner == prefix);
    let directory = Some(prefix.directory()).filter(|d| d.exists());
    names
        .chain(groups.map(|(_, path)| path.display().to_string()))
        .chain(directory.map(|d| d.display().to_string()))
        .collect()
}

#[test]
fn hosts_reach_each_other_and_leave_nothing_behind() {
    // Not `Lab::create`: it would remove what the next test pretends a dead run left behind.
    let prefix = Prefix::next();
    let lab = Lab::create_as(prefix.clone(), &spec(Some((Size(64 << 20), Size(16 << 20)))))
        .expect("needs root and iproute2");
    let address = lab.address(Node::Intermediary(1));
    let listener =
        lab.on(Node::Intermediary(1), || TcpListener::bind((address, 7701))).expect("enters").expect("binds");
    for node in [Node::Source, Node::FurtherSource(2), Node::Destination] {
        lab.on(node, || TcpStream::connect((address, 7701))).expect("enters").expect("connects");
        listener.accept().expect("accepts");
    }
    net::cut(&lab.namespace(Node::Destination).expect("has one")).expect("cuts");
    lab.on(Node::Destination, || TcpStream::connect((address, 7701)))
        .expect("enters")
        .expect_err("the link is down");
    net::mend(&lab.namespace(Node::Destination).expect("has one")).expect("mends");
    lab.on(Node::Destination, || TcpStream::connect((address, 7701))).expect("enters").expect("connects");
    drop(lab);
    assert_eq!(left_of(&prefix), [""; 0]);
}

#[test]
fn the_next_run_removes_what_a_dead_one_left() {
    let mut dead = Command::new("true").spawn().expect("spawns");
    let prefix = Prefix::of(dead.id());
    dead.wait().expect("ends");
    let lab = Lab::create_as(prefix.clone(), &spec(Some((Size(64 << 20), Size(16 << 20)))))
        .expect("needs root and iproute2");
    let mut orphan = lab
        .on(Node::Source, || Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn())
        .expect("enters")
        .expect("spawns");
    lab.remember(orphan.id()).expect("writes");
    lab.memory().expect("limited").admit(orphan.id()).expect("moves");
    std::mem::forget(lab);
    assert!(left_of(&prefix).len() >= 6, "{:?}", left_of(&prefix));

    // The orphan is this test's child, so somebody must reap it for its cgroup to become empty.
    let reaper = std::thread::spawn(move || orphan.wait());
    clean_up();
    assert_eq!(left_of(&prefix), [""; 0]);
    let status = reaper.join().expect("joins").expect("waits");
    assert!(!status.success(), "the orphan ended by itself");
}

#[test]
fn without_shaping_hosts_are_loopback_addresses() {
    let lab = Lab::create_as(Prefix::next(), &LabSpec { shape: false, ..spec(None) }).expect("needs nothing");
    let address = lab.address(Node::Destination);
    let listener = TcpListener::bind((address, 0)).expect("binds");
    TcpStream::connect(listener.local_addr().expect("has one")).expect("connects");
    assert_ne!(address, lab.address(Node::Source));
    assert_eq!(lab.namespace(Node::Source), None);
}
