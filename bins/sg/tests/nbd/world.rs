//! Intermediaries, `sg nbd`, and the tools that others made, as processes.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Mebibytes.
pub const M: u64 = 1 << 20;

/// How long anything may take that is to come.
const PATIENCE: Duration = Duration::from_secs(180);

/// A process that is killed when it is dropped.
pub struct Process {
    child: Child,
    /// The line that it wrote when it was ready.
    pub ready: Value,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}: {}", self.log.display(), self.log());
        }
    }
}

impl Process {
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its TCP port.
    pub fn port(&self) -> SocketAddr {
        let (_, rest) = self.text("uri").split_once("nbd://").unwrap();
        rest.split_once('/').unwrap().0.parse().unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn kill(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        self.end();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn text(&self, key: &str) -> &str {
        self.ready[key].as_str().unwrap()
    }
}

/// A pool of intermediaries, and a directory.
pub struct World {
    pub directory: TempDir,
    pub nodes: Vec<Process>,
    started: std::cell::Cell<u32>,
}

impl World {
    /// So many intermediaries, each of 256 MiB.
    pub fn new(nodes: usize) -> Self {
        let directory = tempfile::Builder::new().prefix("sg-nbd-").tempdir().unwrap();
        let mut world = Self { directory, nodes: Vec::new(), started: 0.into() };
        for number in 1..=nodes {
            let name = format!("i{number}");
            let arguments = ["serve", "--memory", "256M", "--listen", "127.0.0.1:0", "--name", &name];
            let node = world.start(&arguments.map(str::to_owned)).expect("it listens");
            world.nodes.push(node);
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts `sg`, and waits until it is ready; else what it said, and its exit code.
    fn start(&self, arguments: &[String]) -> Result<Process, (Option<i32>, String)> {
        self.started.set(self.started.get() + 1);
        let log = self.path(&format!("{}-{}.log", arguments[0], self.started.get()));
        let mut child = Command::new(env!("CARGO_BIN_EXE_sg"))
            .args(arguments)
            .env("RUST_LOG", "info,sg=debug")
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Process { child, ready, log }),
            Err(_) => {
                let status = child.wait().unwrap();
                Err((status.code(), std::fs::read_to_string(&log).unwrap()))
            }
        }
    }

    pub fn address(&self, node: usize) -> SocketAddr {
        self.nodes[node].text("address").parse().unwrap()
    }

    fn pool(&self) -> Vec<String> {
        let each =
            (0..self.nodes.len()).flat_map(|node| ["--intermediary".into(), self.address(node).to_string()]);
        each.collect()
    }

    /// `sg nbd` over all intermediaries, on the socket of this name.
    pub fn try_nbd(&self, socket: &str, arguments: &[&str]) -> Result<Process, (Option<i32>, String)> {
        let socket = self.path(socket).display().to_string();
        let mut all: Vec<String> = ["nbd", "--socket", &socket].map(str::to_owned).to_vec();
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        all.extend(self.pool());
        self.start(&all)
    }

    pub fn nbd(&self, socket: &str, arguments: &[&str]) -> Process {
        self.try_nbd(socket, arguments).expect("it listens")
    }

    /// `sg nbd` over all intermediaries, on a TCP port.
    pub fn nbd_tcp(&self, arguments: &[&str]) -> Process {
        let mut all: Vec<String> = ["nbd", "--listen", "127.0.0.1:0"].map(str::to_owned).to_vec();
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        all.extend(self.pool());
        self.start(&all).expect("it listens")
    }

    /// `sg nbd` with these arguments alone.
    pub fn nbd_plain(&self, arguments: &[&str]) -> Result<Process, (Option<i32>, String)> {
        let all: Vec<String> =
            ["nbd"].iter().chain(arguments).map(|argument| (*argument).to_owned()).collect();
        self.start(&all)
    }

    /// What `sg ls` knows of a volume: its pages.
    pub fn stored_pages(&self, name: &str) -> Option<u64> {
        let output =
            Command::new(env!("CARGO_BIN_EXE_sg")).args(["ls", "--json"]).args(self.pool()).output().unwrap();
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let volume = all["volumes"].as_array().unwrap().iter().find(|volume| volume["vm"] == name)?.clone();
        Some(volume["stored_pages"].as_u64().unwrap())
    }

    /// Waits until a volume has so many pages: slots are given back in the background.
    pub fn comes_to(&self, name: &str, pages: u64) {
        eventually(|| self.stored_pages(name) == Some(pages));
    }

    /// A file of random bytes.
    pub fn image(&self, name: &str, bytes: u64, seed: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, random(bytes, seed)).unwrap();
        path
    }
}

/// Asks again and again, until it is so.
pub fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it does not come to that");
    }
}

/// Bytes that are nowhere alike, by seed.
pub fn random(bytes: u64, seed: u64) -> Vec<u8> {
    let word = |at: u64| {
        let mut x = (at ^ seed << 40).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)).to_le_bytes()
    };
    (0..bytes / 8).flat_map(word).collect()
}

/// Runs a tool of others. One that hangs is ended, which is a failure.
pub fn tool(name: &str, arguments: &[&str]) -> Output {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "60", name])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("coreutils are there");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(127), "{name} is missing: `ci/setup` installs it ({said})");
    assert_ne!(output.status.code(), Some(124), "{name} {arguments:?} hangs");
    output
}

/// Runs one that must do what it is asked for; what it said.
pub fn done(name: &str, arguments: &[&str]) -> String {
    let output = tool(name, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {:?} {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs one that must fail.
pub fn fails(name: &str, arguments: &[&str]) -> String {
    let output = tool(name, arguments);
    assert!(!output.status.success(), "{name} {arguments:?} is content");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A client of the protocol, just able enough for what no tool does.
pub struct Client<S = UnixStream>(pub S);

impl Client {
    /// Connects to the socket of this name.
    pub fn new(world: &World, socket: &str) -> Self {
        Self::begin(UnixStream::connect(world.path(socket)).unwrap())
    }
}

impl<S: Read + Write> Client<S> {
    /// Begins by the name, without chunks.
    pub fn begin(stream: S) -> Self {
        let mut client = Self(stream);
        let mut greeting = [0; 18];
        client.0.read_exact(&mut greeting).unwrap();
        client.0.write_all(&3_u32.to_be_bytes()).unwrap();
        client.0.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut export = [0; 10];
        client.0.read_exact(&mut export).unwrap();
        client
    }

    pub fn send(&mut self, (flags, command): (u16, u16), offset: u64, length: u32, bytes: &[u8]) {
        let mut all = 0x2560_9513_u32.to_be_bytes().to_vec();
        all.extend(flags.to_be_bytes());
        all.extend(command.to_be_bytes());
        all.extend(offset.to_be_bytes());
        all.extend(offset.to_be_bytes());
        all.extend(length.to_be_bytes());
        all.extend(bytes);
        self.0.write_all(&all).unwrap();
    }

    /// The next answer: which (the offset of what was asked), and how it went.
    pub fn answer(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let fault = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), fault)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.send((0, 0), offset, length, &[]);
        match self.answer().1 {
            0 => {
                let mut bytes = vec![0; length as usize];
                self.0.read_exact(&mut bytes).unwrap();
                Ok(bytes)
            }
            fault => Err(fault),
        }
    }

    pub fn ask(&mut self, how: (u16, u16), offset: u64, length: u32, bytes: &[u8]) -> u32 {
        self.send(how, offset, length, bytes);
        self.answer().1
    }
}
