//! Who feeds a QEMU dies, or loses it: another goes on.

use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use qemu::Qmp;
use serde_json::{Value, json};

use crate::commands::{Sg, path, sg};
use crate::machine::{Host, Machine, one_heart};
use crate::process::{PATIENCE, Qemu};

const NOWHERE: &str = "127.0.0.1:0";

pub fn intermediaries() -> [(Sg, String); 2] {
    intermediaries_of("128M")
}

pub fn intermediaries_of(memory: &str) -> [(Sg, String); 2] {
    ["i1", "i2"]
        .map(|name| Sg::listening(&["serve", "--memory", memory, "--listen", NOWHERE, "--name", name]))
}

/// Where it is written down what another needs.
fn state_file(qemu: &Qemu) -> PathBuf {
    let mut path = qemu.qmp.clone().into_os_string();
    path.push(".gather.json");
    path.into()
}

pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn migration(qmp: &mut Qmp) -> Value {
    qmp.execute("query-migrate", &json!({})).expect("answers")["status"].clone()
}

impl Sg {
    /// Kills it as nobody can help.
    pub fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("is dead");
    }

    /// Waits for an event.
    pub fn await_event(&mut self, event: &str) {
        let mut line = String::new();
        let event = format!("{{\"event\":\"{event}\"");
        while !line.starts_with(&event) {
            line.clear();
            assert!(self.1.read_line(&mut line).expect("read") > 0, "it ended before {event}");
        }
    }
}

/// Where it is, its memory filled.
pub fn host(machine: &Machine) -> Host {
    let mut from = machine.start("from", &[]);
    from.await_beat("the guest does not start", |beat| beat.passes >= 1);
    from
}

/// The same, and where it goes.
pub fn hosts(machine: &Machine) -> (Host, Host) {
    (host(machine), machine.start("there", &["-incoming", "defer"]))
}

/// The VM leaves, its memory no faster than that.
pub fn evict(from: &Qemu, to: &str, scatter: &str, intermediaries: &[&str], more: &[&str]) -> Sg {
    let leaves = ["evict", "--qmp", path(&from.qmp), "--to", to, "--quit", "--scatter", scatter];
    let at = intermediaries.iter().flat_map(|at| ["--intermediary", at]);
    Sg::start(&leaves.into_iter().chain(at).chain(more.iter().copied()).collect::<Vec<_>>())
}

pub fn said(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said).into_owned());
    format!("{out}{err}")
}

/// It goes on, and ends well.
pub fn resumed(qmp: &Path, more: &[&str]) -> String {
    let resumed = sg(&[&["gather", "--qmp", path(qmp), "--resume"], more].concat());
    let said = said(&resumed);
    assert!(resumed.status.success(), "{said}");
    assert!(said.contains("\"gathered\"") && said.contains("\"dissolved\""), "{said}");
    said
}

/// Killed with most of the memory at intermediaries and the source gone: the guest waits for its next page, and finds it all.
#[test]
fn a_feeder_is_killed_with_the_source_gone() {
    let machine = Machine::new("pc", 1, &[]);
    let (mut from, mut there) = hosts(&machine);
    let [one, two] = intermediaries();
    let gather = ["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE, "--limit", "8mbit"];
    let (feeder, to) = Sg::listening(&gather);
    let evict = ["evict", "--qmp", path(&from.qemu.qmp), "--to", &to, "--quit"];
    let evicted = sg(&[&evict[..], &["--intermediary", &one.1, "--intermediary", &two.1]].concat());
    assert!(evicted.status.success(), "{evicted:?}");
    assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
    let last = from.said().beats.last().map_or(0, |beat| beat.number);
    there.await_beat("its heart stands still", |beat| beat.number > last + 3);
    let file = state_file(&there.qemu);
    let noted = || std::fs::read_to_string(&file).expect("written before it ran");
    until("it is noted that the source is gone", || noted().contains("\"source_gone\":true"));
    feeder.kill();

    until("QEMU notices", || migration(&mut there.qemu.connect()) == "postcopy-paused");
    let report = machine.directory.path().join("report");
    resumed(&there.qemu.qmp, &["--json", path(&report)]);
    let report: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    let staged = report["pages"]["staged"].as_u64();
    assert!(staged > Some(1000) && staged < report["pages"]["total"].as_u64(), "{report}");
    assert!(!file.exists(), "nobody needs it any more");
    assert_eq!(migration(&mut there.qemu.connect()), "completed");
    there.await_passes();
    one_heart(&from.console, &there.console);
    let again = sg(&["gather", "--qmp", path(&there.qemu.qmp), "--resume"]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(said(&again).contains("nothing is to be resumed"), "{again:?}");
}

/// Killed with most of the memory at the source, which goes on, finds the next at the same address, and gives it the rest.
#[test]
fn a_feeder_is_killed_while_the_source_scatters() {
    let machine = Machine::new("q35", 2, &[]);
    let (mut from, mut there) = hosts(&machine);
    let [one, two] = intermediaries();
    let gather = ["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE];
    let (feeder, to) = Sg::listening(&gather);
    let mut evicting = evict(&from.qemu, &to, "40mbit", &[&one.1, &two.1], &[]);
    there.await_beat("its heart stands still", |_| true);
    feeder.kill();

    let report = machine.directory.path().join("report");
    let told = resumed(&there.qemu.qmp, &["--json", path(&report)]);
    assert!(told.contains(&to), "it listens where the first did: {told}");
    let report: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    assert!(report["pages"]["direct"].as_u64() > Some(0), "the source gave it pages: {report}");
    assert!(evicting.0.wait().expect("ends").success());
    assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
    assert_eq!(migration(&mut there.qemu.connect()), "completed");
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// A source whose memory is not zero, and a destination that can be asked twice at once. Its vCPU does not run: firmware that
/// waits for a page within a device holds up QMP as well.
pub fn filled(directory: &Path) -> (Qemu, Qemu, PathBuf) {
    let (filling, mut word) = (directory.join("filling"), 0x9e37_79b9_7f4a_7c15_u64);
    let words = std::iter::repeat_with(|| {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.to_le_bytes()
    });
    std::fs::write(&filling, words.take(2 << 20).flatten().collect::<Vec<_>>()).expect("written");
    let loader = format!("loader,file={},addr=0x1000000,force-raw=on", filling.display());
    let machine = ["-machine", "q35", "-m", "64M"];
    let second = |name: &str| format!("unix:{},server=on,wait=off", directory.join(name).display());
    let qmp = second("from.second.qmp");
    let from = Qemu::start(directory, "from", &[&machine[..], &["-device", &loader, "-qmp", &qmp]].concat());
    let qmp = second("second.qmp");
    let there = Qemu::start(
        directory,
        "there",
        &[&machine[..], &["-S", "-incoming", "defer", "-qmp", &qmp]].concat(),
    );
    (from, there, directory.join("second.qmp"))
}

/// It is not gone on with, for this reason.
fn refused(qmp: &Path, more: &[&str], why: &str) {
    let refused = sg(&[&["gather", "--qmp", path(qmp), "--resume"], more].concat());
    let said = said(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(why), "{said}");
}

/// The first is stopped, not dead, and wakes up when others have gone on: it can do no harm. Of those who go on, the one counts
/// that wrote it down last.
#[test]
fn one_feeds_it_at_a_time() {
    let directory = tempfile::tempdir().expect("creates");
    let (mut from, there, second) = filled(directory.path());
    let [one, _] = intermediaries();
    refused(&there.qmp, &[], "nothing is to be resumed");
    let slowly = ["--limit", "4mbit"];
    let gather = ["gather", "--qmp", path(&there.qmp), "--listen", NOWHERE];
    let (mut first, to) = Sg::listening(&[&gather[..], &slowly].concat());
    let evicted = evict(&from, &to, "0", &[&one.1], &[]).0.wait().expect("ends");
    assert!(evicted.success() && from.has_ended_well());
    first.await_event("resumed");
    let file = state_file(&there);
    let noted = || std::fs::read_to_string(&file).expect("written before it ran");
    until("it is noted that the source is gone", || noted().contains("\"source_gone\":true"));
    let old = directory.path().join("old");
    std::fs::copy(&file, &old).expect("copied");
    let (by, by_old) = (["--state-file", path(&file)], ["--state-file", path(&old)]);
    refused(&second, &by, "another feeds it");
    refused(&there.qmp, &[], "another client has its socket");

    let stop = |signal| rustix::process::kill_process(rustix::process::Pid::from_child(&first.0), signal);
    stop(rustix::process::Signal::STOP).expect("stopped");
    let mut qmp = Qmp::connect(&second).expect("greets");
    qmp.execute("migrate-pause", &json!({})).expect("lets go of it");
    until("QEMU notices", || migration(&mut qmp) == "postcopy-paused");
    drop(qmp);
    let on = [&["gather", "--qmp", path(&second), "--resume"][..], &by, &slowly].concat();
    let mut next = Sg::start(&on);
    next.await_event("resumed");
    next.kill();
    let mut qmp = Qmp::connect(&second).expect("greets");
    until("QEMU notices", || migration(&mut qmp) == "postcopy-paused");
    drop(qmp);
    refused(&second, &by_old, "has another owner since");
    stop(rustix::process::Signal::CONT).expect("goes on");
    assert_eq!(first.0.wait().expect("ends").code(), Some(1));
    resumed(&second, &by);
    assert_eq!(migration(&mut there.connect()), "completed");
    // As if it had died before its file was gone, though QEMU has everything.
    let last = std::fs::read_to_string(&old).expect("read").replace("\"epoch\":1", "\"epoch\":3");
    let copy = directory.path().join("copy");
    for path in [&old, &copy] {
        std::fs::write(path, &last).expect("written");
    }
    let told = resumed(&second, &by_old);
    assert!(told.contains("nothing is to be resumed"), "{told}");
    // Nor is it of use to another QEMU.
    let other =
        Qemu::start(directory.path(), "other", &["-machine", "q35", "-m", "64M", "-incoming", "defer"]);
    refused(&other.qmp, &["--state-file", path(&copy)], "not the QEMU that took the VM");
}

/// QEMU lets go of a feeder that lives, while the source has most of the memory: the source is not told that all is over.
#[test]
fn a_feeder_that_loses_its_qemu_ends_and_the_source_goes_on() {
    let directory = tempfile::tempdir().expect("creates");
    let (mut from, there, second) = filled(directory.path());
    let [one, _] = intermediaries();
    let (mut first, to) = Sg::listening(&["gather", "--qmp", path(&there.qmp), "--listen", NOWHERE]);
    let mut evicting = evict(&from, &to, "16mbit", &[&one.1], &[]);
    first.await_event("resumed");
    let mut qmp = Qmp::connect(&second).expect("greets");
    // Its devices are loaded before it can lose anything.
    until("it has the VM", || {
        qmp.execute("query-status", &json!({})).expect("answers")["status"] == "paused"
    });
    qmp.execute("migrate-pause", &json!({})).expect("lets go of it");
    assert_eq!(first.0.wait().expect("ends").code(), Some(1));
    until("QEMU notices", || migration(&mut qmp) == "postcopy-paused");
    resumed(&there.qmp, &[]);
    assert!(evicting.0.wait().expect("ends").success() && from.has_ended_well());
    assert_eq!(migration(&mut qmp), "completed");
}

/// A VM that was parked, and claimed: its owner goes on with it, under a newer epoch. With an intermediary gone meanwhile pages
/// are lost, and the VM becomes what was wished.
#[test]
fn a_feeder_that_has_claimed_a_vm_is_killed() {
    for on_lost in [None, Some("kill"), Some("pause")] {
        let directory = tempfile::tempdir().expect("creates");
        let (mut from, mut there, _) = filled(directory.path());
        let [one, two] = intermediaries();
        let at = ["--intermediary", &one.1, "--intermediary", &two.1];
        let parked = sg(&[&["evict", "--qmp", path(&from.qmp), "--park", "web", "--quit"][..], &at].concat());
        assert!(parked.status.success() && from.has_ended_well(), "{parked:?}");
        let claim = ["gather", "--qmp", path(&there.qmp), "--claim", "web", "--limit", "4mbit"];
        let mut first = Sg::start(&[&claim[..], &at].concat());
        first.await_event("resumed");
        let mut qmp = Qmp::connect(&directory.path().join("second.qmp")).expect("greets");
        until("it has the VM", || {
            qmp.execute("query-status", &json!({})).expect("answers")["status"] == "paused"
        });
        first.kill();
        until("QEMU notices", || migration(&mut qmp) == "postcopy-paused");
        let Some(on_lost) = on_lost else {
            resumed(&there.qmp, &[]);
            assert_eq!(migration(&mut qmp), "completed");
            continue;
        };
        drop(two.0);
        let report = directory.path().join("report");
        let resume = ["gather", "--qmp", path(&there.qmp), "--resume", "--json", path(&report)];
        let lost = sg(&[&resume[..], &["--on-lost", on_lost]].concat());
        let said = said(&lost);
        assert_eq!(lost.status.code(), Some(3), "{said}");
        let report: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
        let first = report["status"]["lost"][0]["first"].as_u64().expect("a range");
        assert!(report["status"]["kind"] == "lost" && said.contains("{\"event\":\"lost\""), "{report}");
        assert!(said.contains(&format!("lost are the pages {first}")), "{first}: {said}");
        if on_lost == "kill" {
            assert!(!there.has_ended_well() && !there.is_alive());
            continue;
        }
        // As it was begun.
        assert_eq!(qmp.execute("query-status", &json!({})).expect("answers")["status"], "paused");
        assert_eq!(migration(&mut qmp), "postcopy-paused");
    }
}
