//! `sg` as operators have it.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::process::PATIENCE;

/// How long any `sg` may run: one that hangs is killed, and its test fails, as it waits for what that says or for its end.
const LIFE: Duration = PATIENCE.saturating_mul(4);

/// An `sg` that is killed when it is dropped; and what it logs, which is shown when its test fails.
pub struct Sg(pub Child, pub BufReader<ChildStdout>, File);

impl Drop for Sg {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
        if std::thread::panicking() {
            let mut said = String::new();
            let read = self.2.rewind().and_then(|()| self.2.read_to_string(&mut said));
            eprintln!("sg, process {} ({read:?}): {said}", self.0.id());
        }
    }
}

impl Sg {
    /// Starts one.
    pub fn start(arguments: &[&str]) -> Self {
        let log = tempfile::tempfile().expect("a log");
        let mut command = command(arguments);
        command.env("RUST_LOG", "info").stdout(Stdio::piped()).stderr(log.try_clone().expect("twice"));
        let mut child = bounded(&mut command, arguments);
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Self(child, out, log)
    }

    /// Starts one that says where it listens, and where that is.
    pub fn listening(arguments: &[&str]) -> (Self, String) {
        let mut sg = Self::start(arguments);
        let mut line = String::new();
        sg.1.read_line(&mut line).expect("it says where");
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
        assert_eq!(said["event"], "listening", "{line}");
        let address = said["address"].as_str().expect("an address").to_owned();
        (sg, address)
    }

    /// What it has told that nobody has read: of one that has ended.
    pub fn told(&mut self) -> String {
        let mut told = String::new();
        self.1.read_to_string(&mut told).expect("text");
        told
    }
}

/// One of which all is heard when it ends.
pub fn spawn(arguments: &[&str]) -> Child {
    bounded(command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()), arguments)
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Starts one, which ends in time.
fn bounded(command: &mut Command, arguments: &[&str]) -> Child {
    let child = command.spawn().expect("starts");
    // By pidfd: who has the number after it is nobody's business.
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("ours");
    let said = format!("sg {}, process {}", arguments.join(" "), child.id());
    std::thread::spawn(move || {
        let life = Timespec::try_from(LIFE).expect("short");
        if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&life)).is_ok_and(|ended| ended == 0) {
            eprintln!("killed, for it does not end: {said}");
            // It fails only for one that ended just now.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    });
    child
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("text")
}

pub fn sg(arguments: &[&str]) -> Output {
    spawn(arguments).wait_with_output().expect("runs")
}
