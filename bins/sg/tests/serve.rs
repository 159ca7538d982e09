//! `sg` as operators run it: real processes and signals.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

use std::fs::Permissions;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::ids::{Checksum, Epoch, MemberSet, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::transport::PoolSecret;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Link, Reply, Request, TcpConnector};
use libsg::wire::PageEntry;
use libsg::wire::message::{Member, VmdRequest};
use test_support::{Strangers, raise_open_files, resident_bytes, skipped};

const PATIENCE: Duration = Duration::from_secs(120);
const VOLUME: VolumeId = VolumeId(0xabc);
/// A user without any right.
const NOBODY: u32 = 65_534;

/// A running `sg serve`; killed when it is dropped.
struct Daemon {
    child: Child,
    output: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(more: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", more)
    }

    fn start_at(listen: &str, more: &[&str]) -> Self {
        Self::spawn(&mut Command::new(env!("CARGO_BIN_EXE_sg")), listen, more)
    }

    fn spawn(program: &mut Command, listen: &str, more: &[&str]) -> Self {
        let mut child = program
            .args(["serve", "--memory", "64M", "--listen", listen, "--name", "i1", "--log-format", "json"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["event"], "listening");
        assert!(ready["node"].as_str().unwrap().starts_with("i1#"));
        let address = ready["address"].as_str().unwrap().parse().unwrap();
        Self { child, output, address }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for it to end; what it logged.
    fn end(&mut self) -> (ExitStatus, String) {
        let mut logs = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut logs).unwrap();
        (self.child.wait().unwrap(), logs)
    }

    fn connect(&self) -> Box<dyn Link> {
        let connector = TcpConnector::new(PoolSecret::open());
        connector.connect(self.address, VOLUME, Epoch(1), Class::Bulk, PATIENCE).unwrap()
    }

    /// Puts pages of a volume there, and leaves them.
    fn fill(&self) {
        let mut link = self.connect();
        let region = Region {
            name: "ram".into(),
            guest_address: None,
            length_bytes: 1 << 20,
            unit: InstallUnit::Page,
        };
        let manifest =
            Manifest { vm: "web-7".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
        let members = vec![Member { node: link.member().node.clone(), address: self.address }];
        let create = VmdRequest::Create { manifest, members };
        ask(&mut *link, Request::Control(&create), PATIENCE, |_| Ok(())).unwrap();
        let page: Arc<[u8]> = vec![7; PAGE_BYTES].into();
        let entry = |n| PageEntry::raw(PageIndex(n), Round(0), Checksum::of(&page));
        let entries: Vec<_> = (0..20).map(entry).collect();
        let slices: Vec<_> = (0..20).map(|_| PageSlice::owned(Arc::clone(&page))).collect();
        let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        let stored = ask(&mut *link, put, PATIENCE, |reply| match reply {
            Reply::Stored { placements, .. } => Ok(placements.iter().flatten().count()),
            other => panic!("{other:?}"),
        });
        assert_eq!(stored.unwrap(), 20);
    }

    fn sg(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sg"))
            .args(arguments)
            .args(["--intermediary", &self.address.to_string()])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn without_live_volumes_it_goes_at_once() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut daemon = Daemon::start(&[]);
        drop(daemon.connect());
        daemon.signal(signal);
        assert_eq!(daemon.end().0.code(), Some(0));
    }
}

#[test]
fn it_stays_for_a_live_volume_and_a_second_signal_reports_what_is_lost() {
    // Nobody else is there to take it over.
    let mut daemon = Daemon::start(&["--drain-timeout", "0.2"]);
    daemon.fill();
    daemon.signal(rustix::process::Signal::TERM);
    let mut first = BufReader::new(daemon.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("staying") {
        line.clear();
        assert_ne!(first.read_line(&mut line).unwrap(), 0, "it went");
    }
    let log: serde_json::Value = serde_json::from_str(&line).unwrap();
    let fields = &log["fields"];
    assert_eq!((&fields["vm"], &fields["pages"]), (&"web-7".into(), &20.into()), "{line}");
    assert_eq!(fields["volume"], VOLUME.to_string());
    assert_eq!(daemon.sg(&["status"]).status.code(), Some(0), "it serves on");

    daemon.signal(rustix::process::Signal::TERM);
    let mut line = String::new();
    daemon.output.read_line(&mut line).unwrap();
    let lost: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&lost["event"], &lost["volumes"][0]["vm"]), (&"lost".into(), &"web-7".into()));
    let mut rest = String::new();
    first.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("lost: going with pages of a live volume"), "{rest}");
    assert_eq!(daemon.child.wait().unwrap().code(), Some(3));
}

#[test]
fn forced_it_goes_at_the_first_signal() {
    let mut daemon = Daemon::start(&["--force"]);
    daemon.fill();
    daemon.signal(rustix::process::Signal::INT);
    let (status, logs) = daemon.end();
    assert_eq!(status.code(), Some(3));
    assert!(logs.contains("web-7"), "{logs}");
}

#[test]
fn operators_see_and_dissolve_volumes() {
    let mut daemon = Daemon::start(&["--zone", "rack7"]);
    daemon.fill();
    let status: serde_json::Value = serde_json::from_slice(&daemon.sg(&["status", "--json"]).stdout).unwrap();
    let node = &status["nodes"][0];
    assert_eq!((&status["status"], &node["zone"]), (&"ok".into(), &"rack7".into()));
    assert_eq!(node["used_bytes"], 20 * PAGE_BYTES as u64);
    let told = text(&daemon.sg(&["status"]));
    assert!(told.contains("rack7") && told.contains("1: web-7"), "{told}");
    let volume = VOLUME.to_string();
    let listed = text(&daemon.sg(&["ls"]));
    assert!(listed.contains(&volume) && listed.contains("web-7") && listed.contains("open"), "{listed}");

    assert_eq!(daemon.sg(&["dissolve", &volume]).status.code(), Some(2), "nobody to ask");
    assert_eq!(daemon.sg(&["dissolve", "123", "--yes"]).status.code(), Some(1));
    let done = daemon.sg(&["dissolve", &volume, "--yes"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(!text(&daemon.sg(&["ls"])).contains(&volume));
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.end().0.code(), Some(0), "nothing holds it any more");
    let gone = daemon.sg(&["status", "--json"]);
    assert_eq!(gone.status.code(), Some(1));
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&gone.stdout).unwrap()["nodes"][0]["error"]["kind"],
        "unreachable"
    );
}

#[test]
fn one_that_was_killed_comes_back_as_somebody_else() {
    let mut daemon = Daemon::start(&[]);
    daemon.fill();
    let mut link = daemon.connect();
    let before = link.member().node.clone();
    daemon.signal(rustix::process::Signal::KILL);
    daemon.child.wait().unwrap();
    assert!(ask(&mut *link, Request::Control(&VmdRequest::Describe), PATIENCE, |_| Ok(())).is_err());
    let address = daemon.address.to_string();
    let again = Daemon::start_at(&address, &[]);
    let mut link = again.connect();
    assert_eq!(link.member().node.name, before.name);
    assert_ne!(link.member().node.incarnation, before.incarnation);
    assert!(ask(&mut *link, Request::Control(&VmdRequest::Describe), PATIENCE, |_| Ok(())).is_err());
}

#[test]
fn wrong_arguments_are_refused_before_anything_happens() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sg")).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["serve", "--memory", "64M", "--listen", "0.0.0.0:0"]);
    assert!(code == Some(2) && said.contains("--secret"), "{said}");
    assert_eq!(run(&["serve", "--memory", "64X"]).0, Some(2));
    assert_eq!(run(&["serve", "--memory", "64M", "--secret", "/nonexistent"]).0, Some(2));
    assert_eq!(run(&["status"]).0, Some(2));
    let (code, said) = run(&["serve", "--memory", "1M", "--listen", "127.0.0.1:0"]);
    assert!(code == Some(1) && said.contains("2M"), "{said}");
}

/// It holds other tenants' pages: none gets into a core dump or to another user's debugger, and the kernel is told when
/// it may be ended.
#[test]
fn pages_are_left_out_of_dumps_and_the_daemon_has_its_place_in_the_out_of_memory_killers_queue() {
    if !rustix::process::getuid().is_root() {
        return skipped("all of it", "only root may see the memory of a process that may not be dumped");
    }
    // Where every user can read it.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("sg");
    std::fs::copy(env!("CARGO_BIN_EXE_sg"), &program).unwrap();
    let mut command = Command::new(program);
    // A score that needs no right, and that the daemon does not choose by itself.
    let daemon = Daemon::spawn(command.uid(NOBODY).gid(NOBODY), "127.0.0.1:0", &["--oom-score-adj", "321"]);
    daemon.fill();
    let read = |file: &str| {
        let path = format!("/proc/{}/{file}", daemon.child.id());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    assert_eq!(read("oom_score_adj").trim(), "321");
    let limits = read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1], "as many as it may");
    // The arena: 64 MiB of addresses and a chunk more, of which 20 pages hold something. Its parts, open and closed, lie
    // beside each other.
    let maps = mappings(&read("smaps"));
    let excluded: Vec<&Area> =
        maps.iter().filter(|area| area.flags.iter().any(|flag| flag == "dd")).collect();
    let bytes: u64 = excluded.iter().map(|area| area.end - area.start).sum();
    assert!(bytes >= 66 << 20, "{bytes} bytes are left out of dumps: {maps:#?}");
    let resident: u64 = excluded.iter().map(|area| area.resident_bytes).sum();
    assert!(resident >= 20 * PAGE_BYTES as u64, "the pages are in there: {excluded:?}");
    // What is in /proc of a process that may not be dumped is root's, whoever runs it.
    let owner = std::fs::metadata(format!("/proc/{}/smaps", daemon.child.id())).unwrap().uid();
    assert_eq!(owner, 0, "run by {NOBODY}");
}

/// A part of a process's memory.
#[derive(Debug)]
struct Area {
    start: u64,
    end: u64,
    resident_bytes: u64,
    flags: Vec<String>,
}

/// What the kernel tells of a process's memory.
fn mappings(smaps: &str) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for line in smaps.lines() {
        let (key, rest) = line.split_once(' ').unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        match (key, areas.last_mut()) {
            ("Rss:", Some(area)) => {
                area.resident_bytes = rest.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10;
            }
            ("VmFlags:", Some(area)) => area.flags = rest.split_whitespace().map(str::to_owned).collect(),
            _ => {
                let range = key.split_once('-').and_then(|(start, end)| Some((hex(start)?, hex(end)?)));
                let area = |(start, end)| Area { start, end, resident_bytes: 0, flags: Vec::new() };
                areas.extend(range.map(area));
            }
        }
    }
    assert!(areas.len() > 10, "{smaps}");
    areas
}

#[test]
fn strangers_cost_a_bounded_amount_of_memory() {
    raise_open_files();
    let daemon = Daemon::start(&[]);
    daemon.fill();
    let before = resident_bytes(daemon.child.id());
    let address = daemon.address;
    let strangers = Strangers::come(&[], move || TcpStream::connect(address));
    let deadline = Instant::now() + PATIENCE;
    let status = || daemon.sg(&["status"]).status.code();
    while status() != Some(0) {
        assert!(Instant::now() < deadline, "honest clients are locked out");
    }
    let grown = resident_bytes(daemon.child.id()).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes for strangers");
    drop(strangers);
}

/// A service manager is told when it listens, and that it leaves while it has pages that others need.
#[test]
fn a_service_manager_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = [0; 64];
    let mut hear = move || {
        let bytes = manager.recv(&mut said).unwrap();
        String::from_utf8_lossy(&said[..bytes]).into_owned()
    };
    let daemon =
        Daemon::spawn(Command::new(env!("CARGO_BIN_EXE_sg")).env("NOTIFY_SOCKET", &path), "127.0.0.1:0", &[]);
    assert_eq!(hear(), "READY=1");
    daemon.fill();
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(hear(), "STOPPING=1");
}
