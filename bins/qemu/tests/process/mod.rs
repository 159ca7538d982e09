//! A QEMU of a test's own: Debian's, under software emulation.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qemu::Qmp;
use serde_json::{Value, json};
use test_support::skipped;

/// How long anything may take that is to happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running QEMU; killed when it is dropped.
pub struct Qemu {
    child: Child,
    pub qmp: PathBuf,
    log: PathBuf,
}

/// QEMU, by what changes who it runs as.
fn command(by: &[&str]) -> Command {
    let mut words = by.iter().chain(&["qemu-system-x86_64"]);
    let mut command = Command::new(words.next().expect("QEMU itself"));
    command.args(words);
    command
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}: {}", self.log.display(), self.said());
        }
    }
}

impl Qemu {
    /// Starts one whose files are called `name` in `directory`.
    pub fn start(directory: &Path, name: &str, arguments: &[&str]) -> Self {
        Self::start_by(&[], directory, name, arguments)
    }

    /// The same, as nobody, who has these capabilities. `None` where that cannot be, which is said.
    pub fn start_as_nobody(
        capabilities: &str,
        directory: &Path,
        name: &str,
        arguments: &[&str],
    ) -> Option<Self> {
        let given = [format!("--inh-caps=-all{capabilities}"), format!("--ambient-caps=-all{capabilities}")];
        let by = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
        let by = [&by[..], &given.each_ref().map(String::as_str)].concat();
        let version = |by: &[&str]| {
            let told = command(by).arg("-version").output().ok()?;
            told.status.success().then_some(told.stdout)
        };
        if version(&by).is_none_or(|told| Some(told) != version(&[])) {
            skipped("a QEMU of somebody else", "nobody cannot run this one, or we are not root");
            return None;
        }
        std::fs::set_permissions(directory, Permissions::from_mode(0o777)).expect("everybody's");
        Some(Self::start_by(&by, directory, name, arguments))
    }

    fn start_by(by: &[&str], directory: &Path, name: &str, arguments: &[&str]) -> Self {
        let file = |ending: &str| directory.join(format!("{name}.{ending}"));
        let (qmp, log) = (file("qmp"), file("log"));
        let mut command = command(by);
        command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-name", name]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]).args(arguments);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(&log).expect("a log"));
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("qemu-system-x86_64 ({error}): ci/setup installs qemu-system-x86")
        });
        let mut qemu = Self { child, qmp, log };
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(&qemu.qmp).is_err() {
            assert!(qemu.is_alive() && begun.elapsed() < PATIENCE, "QEMU does not start: {}", qemu.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        qemu
    }

    /// A connection of its own; there may be one at a time.
    pub fn connect(&self) -> Qmp {
        Qmp::connect(&self.qmp).unwrap_or_else(|error| panic!("{}: {}", error.chain(), self.said()))
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("asked").is_none()
    }

    /// Whether it has ended by itself, and well.
    pub fn has_ended_well(&mut self) -> bool {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("asked") {
                return status.success();
            }
            if begun.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What it wrote on standard error.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Waits until a QEMU has noticed that its stream broke.
pub fn await_paused(qmp: &mut Qmp) {
    let begun = Instant::now();
    while qmp.migration().expect("answers") != "postcopy-paused" {
        assert!(begun.elapsed() < PATIENCE, "QEMU does not notice");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Capabilities and parameters of a QEMU's migrations.
pub fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|command| qmp.execute(command, &json!({})).expect("answers"))
}
