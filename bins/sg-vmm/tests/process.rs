//! The command as scripts see it: control socket, signals, exit codes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

struct Vmm {
    child: Child,
    control: BufReader<UnixStream>,
    directory: tempfile::TempDir,
}

impl Vmm {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let socket = directory.path().join("control");
        let child = command(arguments).arg("--control").arg(&socket).spawn().expect("starts");
        let control = BufReader::new(connect(&socket));
        Self { child, control, directory }
    }

    fn ask(&mut self, request: &str) -> Value {
        writeln!(self.control.get_mut(), "{request}").expect("sent");
        let mut answer = String::new();
        self.control.read_line(&mut answer).expect("answered");
        serde_json::from_str(&answer).expect("JSON")
    }

    fn exit_code(mut self) -> Option<i32> {
        let code = self.child.wait().expect("ends").code();
        assert!(!self.directory.path().join("control").exists(), "the socket is removed");
        code
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Of a test that failed; one that has ended is not there to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg-vmm"));
    command.args(["run", "--memory", "4M"]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn connect(socket: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(30), "no control socket: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_vm_is_watched_checked_and_told_to_quit() {
    let mut vmm = Vmm::start(&["--workload", "random", "--write-rate", "2000", "--seed", "9"]);
    let report = vmm.ask(r#"{"do":"report"}"#);
    assert_eq!((&report["schema"], &report["status"], &report["seed"]), (&2.into(), &"ok".into(), &9.into()));
    for by in ["guest", "vmm"] {
        let guest = &vmm.ask(&format!(r#"{{"do":"verify","by":"{by}"}}"#))["guest"];
        assert_eq!((&guest["mismatches"], &guest["verified_pages"]), (&0.into(), &1024.into()));
    }
    assert_eq!(vmm.ask(r#"{"do":"pause"}"#)["writes_add_up"], true);
    assert_eq!(vmm.ask(r#"{"do":"stats"}"#)["guest"]["running"], false);
    assert_eq!(vmm.ask(r#"{"do":"resume"}"#)["ok"], true);
    assert_eq!(vmm.ask(r#"{"do":"verify","by":"nobody"}"#)["error"]["kind"], "input");
    assert_eq!(vmm.ask(r#"{"do":"quit"}"#)["ok"], true);
    assert_eq!(vmm.exit_code(), Some(0));
}

#[test]
fn a_spoiled_page_is_one_mismatch_and_exit_code_3() {
    let mut vmm = Vmm::start(&["--workload", "idle"]);
    assert_eq!(vmm.ask(r#"{"do":"spoil","page":1}"#)["error"]["kind"], "input", "not one of the workload");
    assert_eq!(vmm.ask(r#"{"do":"spoil","page":500}"#)["ok"], true);
    assert_eq!(vmm.ask(r#"{"do":"verify"}"#)["guest"]["mismatches"], 1);
    vmm.ask(r#"{"do":"quit"}"#);
    assert_eq!(vmm.exit_code(), Some(3));
}

#[test]
fn signals_and_wrong_arguments_have_their_exit_codes() {
    let vmm = Vmm::start(&["--workload", "reader"]);
    let pid = rustix::process::Pid::from_child(&vmm.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
    assert_eq!(vmm.exit_code(), Some(130));
    for wrong in [["--vcpus", "0"], ["--memory", "3"], ["--zero-fraction", "2"], ["--workload", "none"]] {
        let wrong: Vec<_> = wrong.into_iter().collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg-vmm"));
        let status = command.arg("run").args(&wrong).stderr(Stdio::null()).status().expect("runs");
        assert_eq!(status.code(), Some(2), "{wrong:?}");
    }
}
