//! What may fail in a migration, with real processes: nothing is lost, nothing hangs, no page is wrong.
//!
//! Rates are low so that things can be made to happen in the middle: the destination takes 100 Mb/s in the
//! background, each intermediary 200 Mb/s. No test asserts how long something takes.

mod places;
// Nothing is parked here.
#[allow(dead_code)]
mod world;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libsg::discovery::multicast::{Announcer, Place};
use libsg::ids::{Epoch, VolumeId};
use libsg::transport::PoolSecret;
use libsg::vmd::{Class, Connector as _, TcpConnector};
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{free_address, free_huge_pages, skipped};
use world::proxy::Proxy;
use world::{PATIENCE, SLOWLY, Vmm, World};

/// Two intermediaries, a VM of 32 MiB, and a destination for it.
fn usual() -> (World, Vmm, Vmm) {
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let source = world.vm("source", "");
    let destination = world.incoming("destination", "--gather-limit 100mbit");
    (world, source, destination)
}

/// Waits for something that must come.
fn until(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Arrived, and the source is told so.
fn ends_well(source: &Vmm, destination: &Vmm) {
    source.process.wait("evicted");
    destination.arrived(32);
    source.quit(0);
    destination.quit(0);
}

#[test]
fn intermediaries_are_chosen_from_the_pool_and_a_dead_one_is_gone_from_it() {
    let [a, b, c, d] = libsg::ids::random_bytes().expect("random bytes");
    let port = 40_000 + u16::from_le_bytes([c, d]) % 10_000;
    let place = format!("239.255.{a}.{b}:{port}@127.0.0.1");
    let world = World::new(2, &["--announce", &place, "--link", "1gbit"]);
    let source = world.vm("source", &format!("--pool multicast:{place} --link 1gbit"));
    let destination = world.incoming("destination", "--gather-limit 100mbit");
    let start = |dry_run| {
        let to = destination.address.to_string();
        let answer = source.ask(&json!({"do": "start", "to": to, "pool": true, "dry_run": dry_run}));
        assert_eq!(answer["ok"], true, "{answer}");
        answer["selection"]["nodes"].as_array().cloned().unwrap_or_else(|| panic!("{answer}"))
    };
    let until_heard = |nodes: usize| until("they are heard of", || start(true).len() == nodes);
    until_heard(2);
    world.intermediaries[0].process.kill();
    until_heard(1);
    // Whether it has anything to spare at this moment, this machine says.
    let node = &start(false)[0];
    assert_eq!(node["taken"], node["why"].as_str().is_some_and(|why| why.starts_with("taken for")));
    ends_well(&source, &destination);
}

/// Announces an intermediary as one that has much to spare, whatever this machine has at the moment.
fn announce(place: Place, address: SocketAddr) -> Announcer {
    let connector = TcpConnector::new(PoolSecret::open());
    let link = connector.connect(address, VolumeId(0), Epoch(0), Class::Bulk, PATIENCE).expect("connected");
    let (node, gib, rate) = (link.member().node.clone(), 1 << 30, 125_000_000);
    let memory =
        MemoryRoom { host_bytes: 4 * gib, available_bytes: 4 * gib, limit_bytes: gib, used_bytes: 0 };
    let link = LinkRoom {
        bytes_per_s: rate,
        free_in_bytes_per_s: rate,
        free_out_bytes_per_s: rate,
        ..LinkRoom::default()
    };
    let host = Announcement {
        node,
        address,
        zone: None,
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory,
        link,
        cpu_idle_permille: 1000,
        connections_free: 100,
        volumes_free: 100,
    };
    Announcer::start(place, &PoolSecret::open(), Box::new(move || host.clone())).expect("announced")
}

/// Two are chosen from the pool; one is killed, and a third, of whom nobody knew at the start, takes its place.
#[test]
fn an_intermediary_of_the_pool_that_is_killed_is_replaced() {
    let [a, b, c, d] = libsg::ids::random_bytes().expect("random bytes");
    let port = 40_000 + u16::from_le_bytes([c, d]) % 10_000;
    let text = format!("239.255.{a}.{b}:{port}@127.0.0.1");
    let place: Place = text.parse().expect("a group");
    let mut world = World::new(3, &["--limit-in", "50mbit"]);
    let members = world.members();
    let _two = [announce(place, members[0]), announce(place, members[1])];
    let source = world.vm("source", &format!("--pool multicast:{text} --link 1gbit"));
    let destination = world.incoming("destination", "--gather-limit 50mbit");
    let to = destination.address.to_string();
    let chosen = || {
        let answer = source.ask(&json!({"do": "start", "to": to, "pool": true, "dry_run": true}));
        let nodes = answer["selection"]["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().filter(|node| node["taken"] == true).count()
    };
    until("two are chosen", || chosen() == 2);
    let answer = source.ask(&json!({"do": "start", "to": to, "pool": true, "scatter": SLOWLY}));
    assert_eq!(answer["ok"], true, "{answer}");
    let _third = announce(place, members[2]);
    source.process.wait_percent("scattered", 25);
    world.intermediaries[0].process.kill();
    let replaced = source.process.wait("node-replaced");
    assert!(replaced["message"].as_str().is_some_and(|why| why.contains("i3")), "{replaced}");
    source.hurries();
    let evicted = source.process.wait("evicted");
    let by = evicted["report"]["intermediaries"].as_array().cloned().unwrap_or_default();
    assert!(by.iter().any(|node| node["id"] == "i3" && node["bytes_in"].as_u64() > Some(0)), "{evicted}");
    ends_well(&source, &destination);
    assert!(source.process.has_told("node-lost", "i1"));
    world.intermediaries.remove(0);
    world.holds_nothing();
}

#[test]
fn an_intermediary_is_killed_while_the_source_has_the_vm() {
    let (world, source, destination) = usual();
    source.leave_slowly("scatter-gather", destination.address, &world.members());
    source.process.wait_percent("scattered", 30);
    world.intermediaries[0].process.kill();
    source.process.wait_message("node-lost", "i1");
    source.hurries();
    ends_well(&source, &destination);
}

#[test]
fn all_intermediaries_are_killed() {
    let (world, source, destination) = usual();
    source.leave_slowly("scatter-gather", destination.address, &world.members());
    source.process.wait_percent("scattered", 20);
    world.intermediaries[0].process.kill();
    source.process.wait_percent("scattered", 40);
    world.intermediaries[1].process.kill();
    source.process.wait_message("warning", "no intermediary is left");
    source.hurries();
    ends_well(&source, &destination);
}

#[test]
fn an_intermediary_is_stopped() {
    let (world, source, destination) = usual();
    source.leave_slowly("scatter-gather", destination.address, &world.members());
    source.process.wait_percent("scattered", 30);
    world.intermediaries[0].process.signal(Signal::STOP);
    source.hurries();
    let evicted = source.process.wait("evicted");
    // What it had not answered went elsewhere too.
    let pages = &evicted["report"]["pages"];
    assert!(pages["hedged"].as_u64() > Some(0), "{evicted}");
    ends_well(&source, &destination);
}

#[test]
fn the_only_intermediary_is_cut_off() {
    let world = World::new(1, &["--limit-in", "200mbit"]);
    let (source, destination) =
        (world.vm("source", ""), world.incoming("destination", "--gather-limit 100mbit"));
    let proxy = Proxy::to(world.intermediaries[0].address);
    source.leave(destination.address, &[proxy.address]);
    source.process.wait_percent("scattered", 30);
    proxy.hold();
    source.process.wait("evicted");
    // What lay there in vain is gathered from the source, for as long as it is there.
    destination.arrived(32);
}

#[test]
fn the_destination_stops_right_after_it_resumed_and_the_source_dies_when_it_has_evicted() {
    destination_stops(|_, destination| {
        destination.process.wait("resumed");
    });
}

#[test]
fn the_destination_stops_half_way_and_the_source_dies_when_it_has_evicted() {
    destination_stops(|source, _| {
        source.process.wait_percent("scattered", 50);
    });
}

fn destination_stops(when: impl Fn(&Vmm, &Vmm)) {
    let (world, source, destination) = usual();
    source.leave(destination.address, &world.members());
    when(&source, &destination);
    destination.process.signal(Signal::STOP);
    source.process.wait("evicted");
    source.process.kill();
    destination.process.signal(Signal::CONT);
    destination.arrived(32);
    destination.quit(0);
}

#[test]
fn the_destination_dies_before_commit() {
    before_commit(|_, destination, proxy| {
        proxy.hold_answers();
        destination.process.kill();
        proxy.cut();
    });
}

#[test]
fn the_network_is_cut_before_commit() {
    before_commit(|_, _, proxy| {
        proxy.cut();
    });
}

#[test]
fn a_migration_is_cancelled_before_commit() {
    before_commit(|source, destination, _| {
        assert_eq!(source.ask(&json!({"do": "cancel"}))["ok"], true);
        // The destination, which has said READY, hears of it and gives the VM up.
        destination.process.wait("failed");
        assert_eq!(destination.ask(&json!({"do": "report"}))["vm"], json!(null));
    });
}

/// READY never reaches the source: the VM is the source's, runs on, and can leave again.
fn before_commit(harm: impl Fn(&Vmm, &Vmm, &Proxy)) {
    let (world, source, destination) = usual();
    let proxy = Proxy::to(destination.address);
    proxy.hold_ready();
    source.leave(proxy.address, &world.members());
    destination.process.wait("ready");
    harm(&source, &destination, &proxy);
    source.process.wait("failed");
    assert!(!source.process.told().iter().any(|line| line["event"] == "commit"));
    source.goes_on();
    source.verify(32);
    world.holds_nothing();
    drop(destination);
    let other = world.incoming("other", "");
    source.leave(other.address, &world.members());
    ends_well(&source, &other);
}

#[test]
fn run_is_lost_and_the_volume_says_commit() {
    let (source, destination, proxy, _world) = without_run("random");
    proxy.cut();
    destination.process.wait("resumed");
    proxy.pass();
    ends_well(&source, &destination);
}

#[test]
fn the_source_dies_between_commit_and_run() {
    // A guest that touches a page that is lost ends, where its vCPU is a thread.
    let (source, destination, proxy, _world) = without_run("idle");
    source.process.kill();
    proxy.cut();
    // The VM is the destination's. What nobody has any more is told, and nothing waits for it for ever.
    destination.process.wait("resumed");
    assert!(!destination.process.wait("lost")["pages"].as_array().expect("ranges").is_empty());
    destination.process.wait("failed");
    destination.quit(3);
}

/// COMMIT is in the volume, and RUN has not come to the destination.
fn without_run(workload: &str) -> (Vmm, Vmm, Proxy, World) {
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let source = world.vm("source", &format!("--workload {workload}"));
    let destination = world.incoming("destination", "--gather-limit 100mbit");
    let proxy = Proxy::to(destination.address);
    proxy.hold_ready();
    source.leave(proxy.address, &world.members());
    destination.process.wait("ready");
    // What the source says to READY goes nowhere.
    proxy.hold_requests();
    proxy.pass_answers();
    source.process.wait("commit");
    until("COMMIT is in the volume", || {
        let volumes: Value = serde_json::from_str(&world.sg(&["ls", "--json"])).expect("JSON");
        let at = volumes["volumes"][0]["at"].as_array().cloned().unwrap_or_default();
        at.len() == 2 && at.iter().all(|at| at["committed"] == true)
    });
    assert!(!destination.process.told().iter().any(|line| line["event"] == "resumed"));
    (source, destination, proxy, world)
}

#[test]
fn a_cancel_after_commit_is_refused() {
    let (world, source, destination) = usual();
    source.leave(destination.address, &world.members());
    source.process.wait("commit");
    for vmm in [&source, &destination] {
        vmm.process.wait("resumed");
        let refused = vmm.ask(&json!({"do": "cancel"}));
        assert_eq!(refused["ok"], false);
        assert!(
            refused["error"]["message"].as_str().unwrap_or_default().contains("COMMIT was given"),
            "{refused}"
        );
    }
    ends_well(&source, &destination);
}

#[test]
fn connections_are_cut_after_commit_and_made_again() {
    for mode in ["scatter-gather", "post-copy"] {
        let (world, source, destination) = usual();
        let proxy = Proxy::to(destination.address);
        source.leave_slowly(mode, proxy.address, &world.members());
        source.process.wait_percent("scattered", 20);
        proxy.cut();
        source.process.wait("node-lost");
        std::thread::sleep(Duration::from_millis(700));
        proxy.pass();
        until("the source is back", || destination.process.log_has("the source reconnected"));
        source.hurries();
        ends_well(&source, &destination);
    }
}

#[test]
fn no_intermediary_can_be_reached() {
    let world = World::new(0, &[]);
    let (source, destination) = (world.vm("source", ""), world.incoming("destination", ""));
    // Nobody listens at the first; the second takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
    let nobody = free_address();
    source.leave(destination.address, &[nobody, silent.local_addr().expect("an address")]);
    ends_well(&source, &destination);
    assert!(source.process.has_told("warning", "no intermediary can be reached"));
}

#[test]
fn one_intermediary_is_full_then_all_are() {
    for full in [1, 2] {
        let mut world = World::new(full, &["--memory", "2M"]);
        if full == 1 {
            world.serve("i2", &["--limit-in", "100mbit"]);
        }
        // More than all of them take: 8,192 pages, of which a fifth is zero.
        let source = world.vm("source", "--zero-fraction 0.2");
        let destination = world.incoming("destination", "--gather-limit 100mbit");
        source.leave(destination.address, &world.members());
        let evicted = source.process.wait("evicted");
        let report = &evicted["report"];
        let by = report["intermediaries"].as_array().cloned().unwrap_or_default();
        for name in (1..=full).map(|n| format!("i{n}")) {
            let node = by.iter().find(|node| node["id"] == name.as_str()).expect("it took part");
            assert!(node["bytes_in"].as_u64() >= Some(2 << 20), "{name} has room left: {report}");
        }
        assert!(report["pages"]["resent"].as_u64() > Some(0), "nothing was refused: {report}");
        if full == 2 {
            assert!(report["pages"]["staged"].as_u64() <= Some(2 * 512), "{report}");
        }
        assert!(evicted["report"]["pages"]["direct"].as_u64() > Some(0), "{evicted}");
        ends_well(&source, &destination);
    }
}

/// The page at which a worker panics, early in a VM of 32 MiB.
const CANARY: &str = "--canary-panic-at 1000";

/// A worker panicked at this end, which says so; the other is told of it, and has failed in this way.
fn both_fail(at: &Vmm, other: &Vmm, kind: &str) {
    let failed = at.process.wait("failed");
    assert_eq!(failed["kind"], "poisoned", "{failed}: {}", at.process.log());
    assert!(at.process.log_has("test canary: page 1000"), "{}", at.process.log());
    let failed = other.process.wait("failed");
    assert_eq!(failed["kind"], kind, "{failed}: {}", other.process.log());
    let told = other.process.told();
    let says = |line: &Value| line["message"].as_str().is_some_and(|message| message.contains("panicked"));
    assert!(told.iter().any(says), "it is not told why: {}", other.process.log());
}

/// Pages are sent, and installed, before COMMIT where there are rounds.
fn a_worker_panics_before_commit(mode: &str, here: &str, there: &str, kind: &str) {
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let (source, destination) = (world.vm("source", here), world.incoming("destination", there));
    source.leave_by(mode, destination.address, &world.members());
    let (at, other) = if there.is_empty() { (&source, &destination) } else { (&destination, &source) };
    both_fail(at, other, kind);
    assert!(!source.process.told().iter().any(|line| line["event"] == "commit"));
    assert_eq!(destination.ask(&json!({"do": "report"}))["vm"], json!(null));
    destination.quit(0);
    source.goes_on();
    source.verify(32);
    world.holds_nothing();
    let other = world.incoming("other", "");
    source.leave(other.address, &world.members());
    ends_well(&source, &other);
}

#[test]
fn a_worker_of_the_source_panics_before_commit() {
    for mode in ["hybrid", "pre-copy"] {
        a_worker_panics_before_commit(mode, CANARY, "", "unreachable");
    }
}

#[test]
fn a_worker_of_the_destination_panics_before_commit() {
    a_worker_panics_before_commit("pre-copy", "", CANARY, "vm");
}

#[test]
fn a_worker_of_the_source_panics_after_commit() {
    for mode in ["scatter-gather", "post-copy"] {
        let world = World::new(2, &["--limit-in", "200mbit"]);
        // A guest that touches a page that is lost ends, where its vCPU is a thread.
        let source = world.vm("source", &format!("--workload idle {CANARY}"));
        let destination = world.incoming("destination", "--gather-limit 100mbit");
        source.leave_by(mode, destination.address, &world.members());
        // What was safe by then is gathered, and what was not is told.
        both_fail(&source, &destination, "lost");
        let report = source.ask(&json!({"do": "report"}));
        let pages = &destination.process.wait("lost")["pages"];
        let lost: u64 =
            pages.as_array().expect("ranges").iter().filter_map(|range| range["pages"].as_u64()).sum();
        assert!(lost > 0 && lost < 8192, "{lost}");
        assert_eq!(report["source"]["status"]["kind"], "poisoned", "{report}");
        destination.quit(3);
        assert_eq!(
            source.ask(&json!({"do": "resume"}))["ok"],
            false,
            "after COMMIT it never runs here again"
        );
        source.quit(1);
    }
}

#[test]
fn a_worker_of_the_destination_panics_after_commit() {
    for mode in ["scatter-gather", "post-copy"] {
        // Slow: a source that is out before it hears of it has nothing to fail with.
        let world = World::new(2, &["--limit-in", "20mbit"]);
        let source = world.vm("source", "--workload idle");
        let destination = world.incoming("destination", &format!("--gather-limit 100mbit {CANARY}"));
        source.leave_by(mode, destination.address, &world.members());
        both_fail(&destination, &source, "vm");
        destination.quit(3);
        source.quit(1);
    }
}

#[test]
fn two_vms_at_once() {
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let vm = |n: u32| {
        let source = world.vm(&format!("source{n}"), &format!("--seed {n} --name vm{n} --memory 16M"));
        (source, world.incoming(&format!("destination{n}"), "--gather-limit 50mbit"))
    };
    let pairs = [vm(1), vm(2)];
    for (source, destination) in &pairs {
        source.leave(destination.address, &world.members());
    }
    for (source, destination) in &pairs {
        source.process.wait("evicted");
        destination.arrived(16);
    }
    for (source, destination) in &pairs {
        source.quit(0);
        destination.quit(0);
    }
}

#[test]
fn a_destination_that_ends_when_it_has_gathered_leaves_nothing_behind() {
    let (world, source, destination) = usual();
    source.leave(destination.address, &world.members());
    destination.process.wait("gathered");
    destination.quit(0);
    for intermediary in &world.intermediaries {
        intermediary.process.signal(Signal::TERM);
        assert_eq!(intermediary.process.exit_code(), Some(0), "{}", intermediary.process.log());
    }
}

#[test]
fn there_and_back() {
    let (world, source, destination) = usual();
    source.leave(destination.address, &world.members());
    destination.arrived(32);
    source.quit(0);
    let home = world.incoming("home", "--gather-limit 100mbit");
    destination.leave(home.address, &world.members());
    ends_well(&destination, &home);
}

#[test]
fn the_source_is_killed_the_moment_it_has_evicted() {
    let times = std::env::var("SG_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    for seed in 0..times {
        let world = World::new(2, &["--limit-in", "400mbit"]);
        let source = world.vm("source", &format!("--memory 16M --zero-fraction 0.1 --seed {seed}"));
        let destination = world.incoming("destination", "--gather-limit 100mbit");
        source.leave(destination.address, &world.members());
        source.process.wait("evicted");
        source.process.kill();
        destination.arrived(16);
        destination.quit(0);
    }
}

#[test]
fn a_flipped_byte_is_a_lost_copy_and_no_page_is_wrong() {
    let world = World::new(2, &["--limit-in", "200mbit", "--canary-flip-slot", "100"]);
    let (source, destination) =
        (world.vm("source", ""), world.incoming("destination", "--gather-limit 50mbit"));
    source.leave(destination.address, &world.members());
    ends_well(&source, &destination);
    assert!(destination.process.has_told("warning", "lost copies"), "{}", destination.process.log());
}

#[test]
fn a_flipped_byte_without_the_source_is_a_lost_page_and_no_page_is_wrong() {
    let world = World::new(1, &["--limit-in", "400mbit", "--canary-flip-slot", "500"]);
    let (source, destination) =
        (world.vm("source", "--workload idle"), world.incoming("destination", "--gather-limit 100mbit"));
    source.leave(destination.address, &world.members());
    source.process.wait("evicted");
    source.process.kill();
    let lost = destination.process.wait("lost");
    let pages = lost["pages"].as_array().expect("ranges").clone();
    let count: u64 = pages.iter().map(|range| range["pages"].as_u64().expect("a number")).sum();
    assert_eq!(count, 1, "{lost}");
    destination.process.wait("failed");
    let report = destination.ask(&json!({"do": "report"}));
    assert_eq!(report["destination"]["status"]["kind"], "lost", "{report}");
    let checked = destination.ask(&json!({"do": "verify", "by": "vmm"}));
    assert_eq!(checked["guest"]["mismatches"], 0, "{checked}");
    destination.quit(3);
}

#[test]
fn a_page_spoiled_after_the_check_is_exactly_one_mismatch() {
    let (world, source, destination) = usual();
    source.leave(destination.address, &world.members());
    destination.arrived(32);
    assert_eq!(destination.ask(&json!({"do": "spoil", "page": 4000}))["ok"], true);
    let checked = destination.ask(&json!({"do": "verify"}));
    assert_eq!(checked["guest"]["mismatches"], 1, "{checked}");
    destination.quit(3);
}

#[test]
fn every_kind_of_memory_and_of_vcpu() {
    let huge = || free_huge_pages() >= 32;
    let kvm = || std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    for (what, there, lack) in [
        ("--zero-fraction 0.9", true, ""),
        ("--backing memfd", true, ""),
        ("--vcpus 2", true, ""),
        ("--backing hugetlb", huge(), "fewer than 32 huge pages of 2 MiB are free"),
        ("--vcpu kvm --vcpus 2", kvm(), "/dev/kvm cannot be opened"),
    ] {
        if !there {
            skipped(what, lack);
            continue;
        }
        let world = World::new(2, &["--limit-in", "200mbit"]);
        let source = world.vm("source", what);
        let destination = world.incoming("destination", "--gather-limit 100mbit");
        source.leave(destination.address, &world.members());
        ends_well(&source, &destination);
    }
}
