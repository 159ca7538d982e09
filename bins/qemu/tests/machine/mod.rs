//! A VM with an operating system that knows what its memory has, and whose heart beats.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest::{Beat, Said, Work};

use crate::process::{PATIENCE, Qemu};

/// What the guest fills; the VM has more.
pub const FILLED_MIB: u32 = 48;

/// A VM that can be started twice: where it is, and where it goes.
pub struct Machine {
    pub directory: tempfile::TempDir,
    arguments: Vec<String>,
}

/// One of its QEMUs.
pub struct Host {
    pub qemu: Qemu,
    pub console: PathBuf,
}

impl Machine {
    pub fn new(machine: &str, vcpus: u32, devices: &[&str]) -> Self {
        let work = Work { filled_mib: FILLED_MIB, writes_per_s: 3000, checks_per_s: 20_000, threads: vcpus };
        Self::of(machine, "128M", work, devices)
    }

    /// With so much memory, and a guest that does so; a vCPU for each of its threads.
    pub fn of(machine: &str, memory: &str, work: Work, devices: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("creates");
        let mut arguments = work.arguments(directory.path()).unwrap_or_else(|error| panic!("{error:#}"));
        let (vcpus, own) = (work.threads.to_string(), ["-machine", machine, "-m", memory, "-smp"]);
        arguments.extend(own.iter().chain([&vcpus.as_str()]).chain(devices).map(ToString::to_string));
        Self { directory, arguments }
    }

    pub fn start(&self, name: &str, more: &[&str]) -> Host {
        self.start_in(self.directory.path(), name, more)
    }

    /// With its sockets in another directory.
    pub fn start_in(&self, directory: &Path, name: &str, more: &[&str]) -> Host {
        let console = directory.join(format!("{name}.console"));
        let serial = format!("file:{}", console.display());
        let own: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let qemu = Qemu::start(directory, name, &[&own[..], &["-serial", &serial], more].concat());
        Host { qemu, console }
    }
}

impl Host {
    pub fn said(&self) -> Said {
        Said::parse(&std::fs::read(&self.console).unwrap_or_default())
    }

    /// Waits until the guest's last beat is as wanted.
    pub fn await_beat(&mut self, what: &str, is_wanted: impl Fn(&Beat) -> bool) -> Beat {
        let begun = Instant::now();
        loop {
            let said = self.said();
            assert!(said.complaints.is_empty(), "{:?}", said.complaints);
            if let Some(beat) = said.beats.last().filter(|beat| is_wanted(beat)) {
                return *beat;
            }
            assert!(self.qemu.is_alive(), "QEMU ended: {}", self.qemu.said());
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", said.beats.last());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until every page was looked at twice from now on.
    pub fn await_passes(&mut self) -> Beat {
        let passes = self.said().beats.last().map_or(0, |beat| beat.passes);
        self.await_beat("the guest does not look at its memory", |beat| beat.passes >= passes + 2)
    }
}

/// Beats of both, as of one console: none is missing, none comes twice.
pub fn one_heart(from: &Path, there: &Path) {
    let mut console = std::fs::read(from).expect("a console");
    console.extend(std::fs::read(there).expect("a console"));
    let said = Said::parse(&console);
    for (at, beat) in said.beats.iter().enumerate() {
        assert_eq!(beat.number, at as u64, "{beat:?}");
        assert_eq!(beat.wrong, 0, "{beat:?}");
    }
    assert_eq!(said.complaints, [""; 0]);
}
