//! `sg` as operators have it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::Value;

/// An `sg` that is killed when it is dropped.
pub struct Sg(pub Child, pub BufReader<ChildStdout>);

impl Drop for Sg {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Sg {
    /// Starts one.
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
        let mut child =
            command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Self(child, out)
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
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("text")
}

pub fn sg(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sg")).args(arguments).stdin(Stdio::null()).output().expect("runs")
}
