//! Intermediaries and VMMs of a test, each a process that ends with it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use libsg::discovery::multicast::Announcer;
use libsg::ids::{Epoch, VolumeId};
use libsg::transport::PoolSecret;
use libsg::vmd::{Class, Connector as _, TcpConnector};
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use serde_json::Value;

/// What nothing takes as long as, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Killed when it is dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pages of a VM of a test.
pub const PAGES: u64 = 4096;

/// All of them, and the directory with their sockets: of VMs in `here`, of VMMs that wait for one in `there`.
pub struct World {
    directory: tempfile::TempDir,
    pub intermediaries: Vec<(Process, String)>,
    pub vmms: Vec<Process>,
}

impl World {
    /// With so many intermediaries.
    pub fn new(intermediaries: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["here", "there"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let mut world = Self { directory, intermediaries: Vec::new(), vmms: Vec::new() };
        for number in 0..intermediaries {
            let name = format!("i{number}");
            world.serve(&["--name", &name]);
        }
        world
    }

    /// One more intermediary.
    pub fn serve(&mut self, more: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
        command.args(["serve", "--memory", "256M", "--listen", "127.0.0.1:0"]).args(more);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        self.intermediaries.push((Process(child), said["address"].as_str().unwrap().to_owned()));
    }

    /// Announces the intermediaries in place of themselves: with much to spare, however busy this machine is.
    pub fn announce(&self, place: &str, secret: &str) -> Vec<Announcer> {
        let secret = PoolSecret::from_file(Path::new(secret)).unwrap();
        let connector = TcpConnector::new(secret.clone());
        let announced = |address: &str| {
            let address = address.parse().unwrap();
            let link = connector.connect(address, VolumeId(0), Epoch(0), Class::Bulk, PATIENCE).unwrap();
            let (bytes, bytes_per_s) = (1 << 30, 12_500_000_000);
            let host = Announcement {
                node: link.member().node.clone(),
                address,
                zone: None,
                duty: Duty::Lends,
                transports: Transports::TCP,
                memory: MemoryRoom {
                    host_bytes: bytes,
                    available_bytes: bytes,
                    limit_bytes: bytes,
                    used_bytes: 0,
                },
                link: LinkRoom {
                    bytes_per_s,
                    free_in_bytes_per_s: bytes_per_s,
                    free_out_bytes_per_s: bytes_per_s,
                    ..LinkRoom::default()
                },
                cpu_idle_permille: 1000,
                connections_free: 100,
                volumes_free: 100,
            };
            Announcer::start(place.parse().unwrap(), &secret, Box::new(move || host.clone())).unwrap()
        };
        self.intermediaries.iter().map(|(_, address)| announced(address)).collect()
    }

    /// A directory of sockets, or a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a VMM whose socket is `place/name.sock`.
    pub fn vmm(&mut self, place: &str, name: &str, arguments: &[&str]) -> PathBuf {
        let socket = self.path(place).join(format!("{name}.sock"));
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_sg")).with_file_name("sg-vmm"));
        command
            .args(["run", "--vcpu", "thread", "--name", name])
            .args(arguments)
            .arg("--control")
            .arg(&socket);
        let started = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.vmms.push(Process(started.expect("sg-vmm is built beside sg: cargo build --workspace")));
        until("it has a control socket", || UnixStream::connect(&socket).is_ok());
        socket
    }

    /// VMs that run here.
    pub fn vms(&mut self, names: &[&str]) {
        for name in names {
            self.vmm("here", name, &["--memory", "16M", "--workload", "random", "--write-rate", "2000"]);
        }
    }

    /// Arguments that name every intermediary.
    pub fn named(&self) -> Vec<&str> {
        self.intermediaries.iter().flat_map(|(_, address)| ["--intermediary", address]).collect()
    }

    /// `sg` with these arguments, not started.
    pub fn sg(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// `sg evict --all`, of the VMs here, with the report on standard output.
    pub fn evict(&self, arguments: &[&str]) -> Command {
        let mut command = self.sg(&["evict", "--json", "-", "--all"]);
        command.arg(self.path("here")).args(arguments);
        command
    }

    /// What the VMM says of its VM.
    pub fn state(&self, place: &str, name: &str) -> String {
        let answer = ask(&self.path(place).join(format!("{name}.sock")), r#"{"do":"describe"}"#);
        answer["state"].as_str().unwrap_or("?").to_owned()
    }

    /// Whether the VM there is whole: each of its pages is what it is to be.
    pub fn is_whole(&self, place: &str, name: &str) -> bool {
        let answer = ask(&self.path(place).join(format!("{name}.sock")), r#"{"do":"verify"}"#);
        answer["guest"]["mismatches"] == 0 && answer["guest"]["verified_pages"] == PAGES
    }

    /// A VMM that waits for a VM, which arrives slowly in the background: where.
    pub fn incoming(&mut self, name: &str, gather_limit: &str) -> String {
        let free = test_support::free_address().to_string();
        self.vmm("there", name, &["--incoming", &free, "--gather-limit", gather_limit]);
        free
    }

    /// Waits until so much of every VM here is safe elsewhere, so that all are in the middle of it.
    pub fn until_begun(&self, names: &[&str]) {
        for name in names {
            let socket = self.path("here").join(format!("{name}.sock"));
            until("it is on its way", || {
                let sample = &ask(&socket, r#"{"do":"progress"}"#)["sample"];
                sample["evicted_percent"].as_f64().is_some_and(|percent| percent > 5.0)
            });
        }
    }
}

/// One exchange with a VMM.
pub fn ask(socket: &Path, request: &str) -> Value {
    let mut control = BufReader::new(UnixStream::connect(socket).unwrap());
    writeln!(control.get_mut(), "{request}").unwrap();
    let mut answer = String::new();
    control.read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

/// What a command wrote to standard output.
pub fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Waits for something that must come.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
