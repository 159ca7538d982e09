//! `sg serve --local-first`, on a link of its own between two network namespaces.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libsg::ids::{Checksum, Epoch, MemberSet, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::transport::PoolSecret;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector as _, Link, Request, TcpConnector};
use libsg::wire::PageEntry;
use libsg::wire::message::{Member, VmdRequest};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PATIENCE: Duration = Duration::from_secs(120);
const BATCH_PAGES: u32 = 64;
/// Connections that bring pages, beside one of the host's own.
const CLIENTS: u64 = 4;
/// What the link carries, and what the host itself receives of it: so little that a busy machine fills the link, too.
const LINK: &str = "40mbit";
const LOCAL_BYTES_PER_S: f64 = 2_800_000.0;

/// Two network namespaces and the link between them: `there`, from where pages and local traffic come, and `host`.
struct Net {
    there: String,
    host: String,
}

impl Net {
    fn new(name: &str) -> Self {
        let net = Self {
            there: format!("sglf-{name}-{}-a", std::process::id()),
            host: format!("sglf-{name}-{}-b", std::process::id()),
        };
        for name in [&net.there, &net.host] {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        ip(&[
            "-n", &net.there, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", &net.host,
        ]);
        for (name, link, address) in [(&net.there, "v0", "10.1.1.1/24"), (&net.host, "v1", "10.1.1.2/24")] {
            ip(&["-n", name, "address", "add", address, "dev", link]);
            ip(&["-n", name, "link", "set", link, "up"]);
            run(&[
                "tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", "rate", LINK, "burst", "32k",
                "limit", "128k",
            ]);
        }
        net
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in [&self.there, &self.host] {
            // What was not made cannot be taken away.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

fn ip(arguments: &[&str]) {
    run(&[&["ip"], arguments].concat());
}

fn run(words: &[&str]) {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
}

/// The calling thread is in that namespace from now on.
fn enter(name: &str) {
    let namespace = File::open(format!("/run/netns/{name}")).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// Killed when it is dropped.
struct Daemon(Child, SocketAddr);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(net: &Net, more: &[&str]) -> Daemon {
    let mut child = Command::new("ip")
        .args(["netns", "exec", &net.host, env!("CARGO_BIN_EXE_sg"), "serve", "--memory", "1G", "--insecure"])
        .args(["--listen", "10.1.1.2:7701", "--name", "i1"])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    let address = ready["address"].as_str().unwrap().parse().unwrap();
    Daemon(child, address)
}

/// Puts the same pages again and again, until `ended`.
fn put_pages(address: SocketAddr, volume: u64, ended: &AtomicBool) {
    let connector = TcpConnector::new(PoolSecret::open());
    let mut link =
        connector.connect(address, VolumeId(volume.into()), Epoch::FIRST, Class::Bulk, PATIENCE).unwrap();
    create(&mut *link, address);
    let bytes: Arc<[u8]> = Arc::from(vec![volume as u8; PAGE_BYTES]);
    let sum = Checksum::of(&bytes);
    let entries: Vec<_> =
        (0..BATCH_PAGES).map(|page| PageEntry::raw(PageIndex(page), Round(0), sum)).collect();
    let slices: Vec<_> = entries.iter().map(|_| PageSlice::owned(Arc::clone(&bytes))).collect();
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    let mut open = 0;
    while !ended.load(Ordering::Relaxed) {
        while open < 2 {
            link.submit(put).unwrap();
            open += 1;
        }
        link.progress(usize::MAX).unwrap();
        while let Some(completion) = link.completion() {
            completion.result.unwrap();
            open -= 1;
        }
        if open == 2 {
            libsg::transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], Duration::from_millis(100))
                .unwrap();
        }
    }
}

fn create(link: &mut dyn Link, address: SocketAddr) {
    let region = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(BATCH_PAGES) * PAGE_BYTES as u64,
        unit: InstallUnit::Page,
    };
    let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
    let members = vec![Member { node: link.member().node.clone(), address }];
    ask(link, Request::Control(&VmdRequest::Create { manifest, members }), PATIENCE, |_| Ok(())).unwrap();
}

/// Offers local traffic by schedule, dropping nothing: what the link does not take waits. Until `ended`; the bytes offered.
fn offer(mut stream: TcpStream, ended: &AtomicBool, offered: &AtomicU64) {
    let piece = [7; 14_000];
    let begun = Instant::now();
    stream.set_nonblocking(true).unwrap();
    while !ended.load(Ordering::Relaxed) {
        let due = (begun.elapsed().as_secs_f64() * LOCAL_BYTES_PER_S) as u64;
        if offered.load(Ordering::Relaxed) >= due {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        offered.fetch_add(piece.len() as u64, Ordering::Relaxed);
        // What the socket does not take now is not offered again: as a request that is not made.
        let _ = stream.write(&piece);
    }
}

/// What part of its local traffic the host receives while pages come as fast as they may, and how many page bytes those are
/// to each byte of it.
fn beside_transit(name: &str, more: &[&str]) -> (f64, f64) {
    let net = Net::new(name);
    let daemon = serve(&net, more);
    let (ended, offered, received) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (net, ended, offered, received) = (&net, &ended, &offered, &received);
        let (ready, listens) = std::sync::mpsc::channel();
        scope.spawn(move || {
            enter(&net.host);
            let listener = TcpListener::bind("10.1.1.2:9000").unwrap();
            ready.send(()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = vec![0; 64 << 10];
            while let Ok(got @ 1..) = stream.read(&mut bytes) {
                received.fetch_add(got as u64, Ordering::Relaxed);
            }
        });
        listens.recv().unwrap();
        scope.spawn(move || {
            enter(&net.there);
            offer(TcpStream::connect("10.1.1.2:9000").unwrap(), ended, offered);
        });
        for volume in 1..=CLIENTS {
            let address = daemon.1;
            scope.spawn(move || {
                enter(&net.there);
                put_pages(address, volume, ended);
            });
        }
        // The first seconds find out what there is; what is compared are bytes.
        std::thread::sleep(Duration::from_secs(3));
        let now = || (offered.load(Ordering::Relaxed), received.load(Ordering::Relaxed), taken_in(net));
        let before = now();
        std::thread::sleep(Duration::from_secs(5));
        let after = now();
        ended.store(true, Ordering::Relaxed);
        let (offered, received) = (after.0 - before.0, after.1 - before.1);
        let part = received as f64 / offered as f64;
        (part, (after.2 - before.2) as f64 / received.max(1) as f64)
    })
}

/// Page bytes that the intermediary took in so far, as an operator sees it.
fn taken_in(net: &Net) -> u64 {
    status(net)["bytes_in"].as_u64().unwrap()
}

fn status(net: &Net) -> serde_json::Value {
    let output = Command::new("ip")
        .args(["netns", "exec", &net.there, env!("CARGO_BIN_EXE_sg"), "status", "--json"])
        .args(["--intermediary", "10.1.1.2:7701"])
        .output()
        .unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    said["nodes"][0].clone()
}

#[test]
fn the_hosts_own_traffic_keeps_its_rate_beside_pages() {
    let (alike, _) = beside_transit("0", &[]);
    let (first, pages) = beside_transit("1", &["--local-first", "v1", "--link", LINK]);
    assert!(first > 0.85, "of its own traffic the host received {first} ({alike} where all are alike)");
    assert!(first > 1.3 * alike, "{first} beside {alike}");
    assert!(pages > 0.1, "pages go on: {pages} bytes to each of the host's own");
}

#[test]
fn operators_see_what_the_host_leaves() {
    let net = Net::new("2");
    let daemon = serve(&net, &["--local-first", "v1", "--link", LINK, "--limit-out", "10mbit"]);
    let begun = Instant::now();
    let link = loop {
        let link = status(&net)["link"].clone();
        if !link["local"].is_null() {
            break link;
        }
        assert!(begun.elapsed() < PATIENCE, "never looked: {link}");
    };
    let limit = |name: &str| link[name].as_u64().unwrap();
    assert!((4_000_000..5_000_000).contains(&limit("limit_in_bytes_per_s")), "{link}");
    assert_eq!(limit("limit_out_bytes_per_s"), 1_250_000, "the operator's");
    drop(daemon);
    let refused = |more: &[&str]| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &net.host, env!("CARGO_BIN_EXE_sg"), "serve", "--memory", "1G"]);
        command.args(["--listen", "127.0.0.1:0"]).args(more).output().unwrap()
    };
    let none = refused(&["--local-first", "nope"]);
    assert_eq!(none.status.code(), Some(2), "{none:?}");
    assert!(String::from_utf8_lossy(&none.stderr).contains("no interface nope"), "{none:?}");
}
