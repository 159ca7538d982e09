//! An etcd of a test's own, on loopback, with a data directory of its own.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take that is to happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running etcd; killed when it is dropped.
pub struct Etcd {
    child: Option<Child>,
    directory: tempfile::TempDir,
    /// Where its clients ask.
    pub port: u16,
    peer_port: u16,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Etcd {
    /// Starts one that has nothing yet.
    pub fn start() -> Self {
        // A port that was free may be somebody's by the time it is used.
        for _ in 0..5 {
            let directory = tempfile::tempdir().expect("directory");
            let mut etcd = Self { child: None, directory, port: free_port(), peer_port: free_port() };
            if etcd.run(etcd.port) {
                return etcd;
            }
        }
        panic!("etcd does not start");
    }

    /// `etcd://` and so on, for a pool of that name.
    pub fn pool(&self, prefix: &str) -> String {
        format!("etcd://127.0.0.1:{}/{prefix}", self.port)
    }

    /// Ends it as a power failure would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It fails only for one that ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again with what it had.
    pub fn restart(&mut self) {
        self.restart_at(self.port);
    }

    /// The same, under another port.
    pub fn restart_at(&mut self, port: u16) {
        self.kill();
        assert!(self.run(port), "etcd does not start again: see {}", self.log().display());
    }

    /// Starts it again with nothing.
    pub fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.directory.path().join("data")).expect("removed");
        self.restart();
    }

    fn log(&self) -> std::path::PathBuf {
        self.directory.path().join("log")
    }

    fn run(&mut self, port: u16) -> bool {
        let (client, peer) = (url(port), url(self.peer_port));
        let log = std::fs::File::create(self.log()).expect("a log");
        let mut command = Command::new("etcd");
        command.args(["--name", "test", "--data-dir"]).arg(self.directory.path().join("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("test={peer}")]);
        // Nothing of the environment.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdout(Stdio::null()).stderr(log);
        let started = command.spawn();
        let child = started.unwrap_or_else(|error| panic!("etcd ({error}): ci/setup installs etcd-server"));
        let child = self.child.insert(child);
        let begun = Instant::now();
        loop {
            if ask(port, "GET", "/health", "").is_some_and(|answer| answer.contains("\"true\"")) {
                return true;
            }
            if child.try_wait().expect("asked").is_some() || begun.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it answers to a request.
    pub fn post(&self, port: u16, what: &str, body: &str) -> String {
        let answer = ask(port, "POST", &format!("/v3/{what}"), body).expect("answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
        answer
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// One that nobody listens at.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    listener.local_addr().expect("address").port()
}

fn ask(port: u16, how: &str, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let length = body.len();
    let head =
        format!("{how} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Waits until it holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A file with a secret.
pub fn secret_file(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, format!("the secret of {name}")).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}
