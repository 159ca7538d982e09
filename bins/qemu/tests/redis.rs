//! Redis moves in a guest, beneath those who talk to it: by the connections that they had, each value what it must be, and its
//! file on a disk that both hosts have.

mod process;
mod world;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest::Initramfs;
use libsg::report::Status;
use process::{PATIENCE, Qemu};
use qemu::Departure;
use redis::{Commands as _, Connection};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use world::World;

/// Where the guest is; the bridge, which is the host of its clients, is the first of this network.
const ADDRESS: &str = "10.92.0.2";
const CLIENTS: u64 = 2;
/// Of each client.
const KEYS: usize = 3000;
const VALUE_BYTES: usize = 4096;
const DISK_BYTES: u64 = 256 << 20;

/// A network namespace with a bridge, and a port on it for each QEMU.
struct Net(String);

impl Net {
    fn new(name: &str) -> Self {
        let net = Self(format!("sgredis-{name}-{}", std::process::id()));
        run("ip", &["netns", "add", &net.0]);
        let ip = |words: &[&str]| run("ip", &[&["-n", &net.0], words].concat());
        ip(&["link", "add", "br0", "type", "bridge"]);
        ip(&["address", "add", "10.92.0.1/24", "dev", "br0"]);
        for tap in ["from", "there"] {
            ip(&["tuntap", "add", tap, "mode", "tap"]);
            ip(&["link", "set", tap, "master", "br0", "up"]);
        }
        for link in ["lo", "br0"] {
            ip(&["link", "set", link, "up"]);
        }
        net
    }

    /// The calling thread, and what it starts, is there from now on.
    fn enter(&self) {
        let namespace = File::open(format!("/run/netns/{}", self.0)).expect("there");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entered");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // What was not made cannot be taken away.
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn run(program: &str, words: &[&str]) {
    let output = Command::new(program).args(words).output().expect("runs");
    assert!(output.status.success(), "{program} {words:?}: {output:?}");
}

/// What of the VM both hosts have.
struct Machine {
    directory: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Machine {
    fn new(machine: &str, vcpus: &str) -> Self {
        let directory = tempfile::tempdir().expect("creates");
        let file = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        let [kernel, root] =
            [guest::kernel(), guest::redis()].map(|at| at.unwrap_or_else(|e| panic!("{e:#}")));
        let files = Initramfs::of_directory(&root).expect("packed").finish();
        std::fs::write(file("initramfs"), files).expect("written");
        File::create(file("disk")).and_then(|disk| disk.set_len(DISK_BYTES)).expect("a disk");
        run("mke2fs", &["-q", "-t", "ext4", &file("disk")]);
        let line = format!("console=ttyS0 quiet panic=-1 no_timer_check redis_address={ADDRESS}/24");
        let drive = format!("file={},format=raw,if=none,id=disk", file("disk"));
        let mut arguments: Vec<String> =
            ["-machine", machine, "-smp", vcpus, "-m", "256M"].map(Into::into).into();
        arguments.extend(["-kernel".into(), kernel.to_string_lossy().into_owned(), "-append".into(), line]);
        arguments.extend(["-initrd".into(), file("initramfs"), "-drive".into(), drive]);
        arguments.extend(["-device", "virtio-blk-pci,drive=disk"].map(Into::into));
        arguments
            .extend(["-device", "virtio-net-pci,netdev=net,mac=52:54:00:92:00:02,romfile="].map(Into::into));
        Self { directory, arguments }
    }

    /// Starts it at a host, which is called like the port of the bridge that it has.
    fn start(&self, name: &str, more: &[&str]) -> Qemu {
        let serial = format!("file:{}", self.console(name));
        let net = format!("tap,id=net,ifname={name},script=no,downscript=no");
        let own: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let host = ["-serial", &serial, "-netdev", &net];
        Qemu::start(self.directory.path(), name, &[&own[..], &host, more].concat())
    }

    fn console(&self, name: &str) -> String {
        self.directory.path().join(format!("{name}.console")).to_string_lossy().into_owned()
    }
}

/// A value that was written so many times: no two are the same.
fn value(client: u64, key: usize, version: u64) -> Vec<u8> {
    let mut state = client << 56 ^ (key as u64) << 32 ^ version;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    };
    (0..VALUE_BYTES / 8).flat_map(|_| next()).collect()
}

/// Who writes keys of its own, and reads them back, over one connection.
struct Client {
    number: u64,
    connection: Connection,
    /// How often each key was written.
    versions: Vec<u64>,
}

impl Client {
    /// Once Redis answers.
    fn connect(number: u64, console: &Path) -> Self {
        let client = redis::Client::open(format!("redis://{ADDRESS}/")).expect("an address");
        let begun = Instant::now();
        let connection = loop {
            match client.get_connection_with_timeout(Duration::from_secs(5)) {
                Ok(connection) => break connection,
                Err(error) => {
                    let said = || std::fs::read_to_string(console).unwrap_or_default();
                    assert!(begun.elapsed() < PATIENCE, "Redis does not answer ({error}): {}", said());
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        connection.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        connection.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Self { number, connection, versions: vec![0; KEYS] }
    }

    fn name(&self, key: usize) -> String {
        format!("{}:{key}", self.number)
    }

    /// Writes every key.
    fn fill(&mut self) {
        for first in (0..KEYS).step_by(50) {
            let mut all = redis::pipe();
            for key in first..first + 50 {
                all.set(self.name(key), value(self.number, key, 0)).ignore();
            }
            all.query::<()>(&mut self.connection).expect("all are stored");
        }
    }

    /// Reads one key, and writes it, or another, in turn.
    fn work(&mut self, turn: u64) {
        let key = (turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % KEYS;
        self.check(key);
        if turn.is_multiple_of(2) {
            self.versions[key] += 1;
            let written = value(self.number, key, self.versions[key]);
            self.connection.set::<_, _, ()>(self.name(key), written).expect("it is stored");
        }
    }

    fn check(&mut self, key: usize) {
        let name = self.name(key);
        let found: Vec<u8> = self.connection.get(&name).expect("it is answered");
        let wanted = value(self.number, key, self.versions[key]);
        assert!(found == wanted, "{name}, written {} times, is something else", self.versions[key]);
    }

    fn check_all(&mut self) {
        (0..KEYS).for_each(|key| self.check(key));
    }
}

/// Ends the clients' work, whatever way it is left.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until every client has been answered so many times more.
fn await_turns(turns: &[AtomicU64], more: u64) {
    let begun = Instant::now();
    let before: Vec<u64> = turns.iter().map(|turns| turns.load(Ordering::Relaxed)).collect();
    while turns.iter().zip(&before).any(|(turns, before)| turns.load(Ordering::Relaxed) < before + more) {
        assert!(begun.elapsed() < PATIENCE, "Redis stands still: {before:?}, {turns:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The migration, while clients work: they are slowed down by nothing else than the guest's faults.
fn carry(world: &World, from: &mut Qemu, there: &Qemu, turns: &[AtomicU64]) {
    let (incoming, to) = world.arrive(there.connect(), 4 << 20);
    let departure = Departure::begin(from.connect(), "redis").expect("begins");
    let outgoing = world.leave(&departure, to, Arc::new(|_| {}));
    let left = outgoing.wait_evicted(PATIENCE).expect("is out");
    assert!(left.pages.staged > Some(1000), "{left:?}");
    departure.complete(true).expect("the source QEMU completes");
    assert!(from.has_ended_well(), "{}", from.said());
    drop(outgoing);
    incoming.wait_running(PATIENCE).expect("runs");
    await_turns(turns, 20);
    let pages = incoming.progress().pages;
    assert!(pages.held < pages.total, "it answered before all was there: {pages:?}");
    incoming.set_gather_limit(0);
    assert_eq!(incoming.wait_gathered(PATIENCE).expect("is there").status, Status::Ok);
    incoming.wait_dissolved(PATIENCE).expect("nothing is left at the intermediaries");
}

fn moves(name: &str, machine: &str, vcpus: &str) {
    let net = Net::new(name);
    net.enter();
    let machine = Machine::new(machine, vcpus);
    let mut from = machine.start("from", &[]);
    let console = machine.console("from");
    let mut clients: Vec<Client> = (0..CLIENTS).map(|at| Client::connect(at, Path::new(&console))).collect();
    clients.iter_mut().for_each(Client::fill);
    let there = machine.start("there", &["-incoming", "defer"]);
    let world = World::new(2);
    let (over, turns) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; CLIENTS as usize]);
    std::thread::scope(|scope| {
        for (client, turns) in clients.iter_mut().zip(&turns) {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    client.work(turns.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        let _ends = Ends(&over);
        await_turns(&turns, 20);
        carry(&world, &mut from, &there, &turns);
        await_turns(&turns, 20);
    });
    clients.iter_mut().for_each(Client::check_all);
    // What it reads back is what it wrote to its disk, on both hosts.
    redis::cmd("DEBUG").arg("LOADAOF").query::<()>(&mut clients[0].connection).expect("it reads its file");
    clients.iter_mut().for_each(Client::check_all);
}

#[test]
fn a_pc_with_one_vcpu() {
    moves("pc", "pc", "1");
}

#[test]
fn a_q35_with_two_vcpus() {
    moves("q35", "q35", "2");
}
