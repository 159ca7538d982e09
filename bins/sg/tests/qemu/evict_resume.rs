//! Who leads a VM out of its QEMU dies: another goes on.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use libsg::migrate::source::{SourceOptions, To, start};
use libsg::migrate::{Mode, OutgoingVm as _, PoolSecret, RoundOptions};
use libsg::vmd::TcpConnector;
use qemu::{DepartedFile, Departure, Qmp};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::commands::{Sg, path, sg};
use crate::machine::{Host, Machine, one_heart};
use crate::process::Qemu;
use crate::resume::{
    evict, filled, host, hosts, intermediaries, intermediaries_of, migration, resumed as gathered, said,
    until,
};

const NOWHERE: &str = "127.0.0.1:0";

pub fn state_file(qemu: &Qemu) -> PathBuf {
    let mut path = qemu.qmp.clone().into_os_string();
    path.push(".evict.json");
    path.into()
}

pub fn noted(qemu: &Qemu) -> String {
    std::fs::read_to_string(state_file(qemu)).unwrap_or_default()
}

pub fn resume(qmp: &Path, more: &[&str]) -> (Option<i32>, String) {
    let resumed = sg(&[&["evict", "--qmp", path(qmp), "--resume"], more].concat());
    (resumed.status.code(), said(&resumed))
}

/// It goes on, and is out; its report.
fn evicted(qemu: &mut Qemu, more: &[&str], directory: &Path) -> Value {
    let report = directory.join("report");
    let (code, said) = resume(&qemu.qmp, &[&["--quit", "--json", path(&report)], more].concat());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("\"evicted\""), "{said}");
    assert!(qemu.has_ended_well(), "{}", qemu.said());
    assert!(!state_file(qemu).exists(), "nobody needs it any more");
    serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON")
}

/// It is not gone on with, for this reason.
fn refused(qmp: &Path, more: &[&str], why: &str) {
    let (code, said) = resume(qmp, more);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(why), "{said}");
}

fn ends_well(mut gather: Sg) {
    assert!(gather.0.wait().expect("ends").success());
}

/// Waits until so many pages are out.
fn until_scattered(evicting: &mut Sg, percent: u32) {
    let mut line = String::new();
    let event = format!("{{\"event\":\"scattered\",\"percent\":{percent}}}");
    while line.trim_end() != event {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut evicting.1, &mut line).expect("read") > 0, "it ended");
    }
}

/// Killed in the middle: the guest runs on what it has, and finds the rest when the next goes on, which sends that alone.
#[test]
fn a_relay_is_killed_in_the_middle() {
    let moves =
        [("pc", "scatter-gather", "48mbit"), ("q35", "hybrid", "48mbit"), ("q35", "post-copy", "90mbit")];
    for (machine, mode, limit) in moves {
        let machine = Machine::new(machine, 2, &[]);
        let (mut from, mut there) = hosts(&machine);
        let [one, two] = intermediaries();
        let gather = ["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE, "--limit", limit];
        let (feeder, to) = Sg::listening(&gather);
        let at: &[&str] = if mode == "post-copy" { &[] } else { &[&one.1, &two.1] };
        let mut evicting = evict(&from.qemu, &to, "90mbit", at, &["--mode", mode]);
        there.await_beat("its heart stands still", |_| true);
        until_scattered(&mut evicting, 80);
        evicting.kill();
        until("QEMU notices", || migration(&mut from.qemu.connect()) == "postcopy-paused");

        let report = evicted(&mut from.qemu, &["--scatter", "0"], machine.directory.path());
        assert_eq!(report["resumed"], 1, "{report}");
        let (sent, total) = (&report["bytes"], report["pages"]["total"].as_u64());
        let sent =
            sent["direct"].as_u64().zip(sent["staged"].as_u64()).map(|(direct, staged)| direct + staged);
        // What lies there of a round before is sent again, for it may be out of date.
        if mode != "hybrid" {
            assert!(sent.zip(total).is_some_and(|(sent, total)| sent < total * 4096 / 4), "{report}");
        }
        ends_well(feeder);
        assert_eq!(migration(&mut there.qemu.connect()), "completed");
        there.await_passes();
        one_heart(&from.console, &there.console);
        refused(&there.qemu.qmp, &[], "nothing is to be resumed");
    }
}

/// What lay at an intermediary that dies when another has gone on is sent once more: its relay never had it.
#[test]
fn an_intermediary_dies_behind_a_relay() {
    let machine = Machine::new("q35", 1, &[]);
    let (mut from, mut there) = hosts(&machine);
    let [one, two] = intermediaries();
    let gather = ["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE, "--limit", "8mbit"];
    let (feeder, to) = Sg::listening(&gather);
    let mut evicting = evict(&from.qemu, &to, "60mbit", &[&one.1, &two.1], &[]);
    there.await_beat("its heart stands still", |_| true);
    until_scattered(&mut evicting, 80);
    evicting.kill();
    let report = machine.directory.path().join("report");
    let resumes = ["evict", "--qmp", path(&from.qemu.qmp), "--resume", "--quit", "--scatter", "30mbit"];
    let mut next = Sg::start(&[&resumes[..], &["--json", path(&report)]].concat());
    until_scattered(&mut next, 85);
    drop(two);
    assert!(next.0.wait().expect("ends").success() && from.qemu.has_ended_well());
    let report: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    // Its stream was broken off for that, if it flowed again already.
    assert!(report["pages"]["resent"].as_u64() > Some(0), "it sends them again: {report}");
    ends_well(feeder);
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// The destination's process dies as well: the source is out without it.
#[test]
fn both_ends_are_killed() {
    let machine = Machine::new("q35", 1, &[]);
    let (mut from, mut there) = hosts(&machine);
    let [one, two] = intermediaries();
    let gather = ["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE, "--limit", "8mbit"];
    let (feeder, to) = Sg::listening(&gather);
    let mut evicting = evict(&from.qemu, &to, "40mbit", &[&one.1, &two.1], &[]);
    there.await_beat("its heart stands still", |_| true);
    until_scattered(&mut evicting, 75);
    evicting.kill();
    feeder.kill();
    evicted(&mut from.qemu, &[], machine.directory.path());
    gathered(&there.qemu.qmp, &["--source-grace", "2s"]);
    there.await_passes();
    one_heart(&from.console, &there.console);
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("told");
}

/// One that is at it, stopped or not, is the only one; and what is another QEMU's is of no use.
#[test]
fn one_leads_it_at_a_time() {
    let directory = tempfile::tempdir().expect("creates");
    let (mut from, there, _) = filled(directory.path());
    let [one, _] = intermediaries();
    refused(&from.qmp, &[], "nothing is to be resumed");
    let (feeder, to) = Sg::listening(&["gather", "--qmp", path(&there.qmp), "--listen", NOWHERE]);
    let mut evicting = evict(&from, &to, "8mbit", &[&one.1], &[]);
    evicting.await_event("resumed");
    assert!(noted(&from).contains("\"epoch\":1"), "written before COMMIT: {}", noted(&from));
    refused(&from.qmp, &[], "another client has its socket");
    let second = directory.path().join("from.second.qmp");
    let by = ["--state-file", path(&state_file(&from))].map(ToOwned::to_owned);
    let by = by.each_ref().map(String::as_str);
    refused(&second, &by, "is at it still");
    signal(&evicting.0, Signal::STOP);
    refused(&second, &by, "is at it still");
    let copy = directory.path().join("copy");
    std::fs::copy(state_file(&from), &copy).expect("copied");
    evicting.kill();

    // The next is killed, too, and is followed by another.
    until("QEMU notices", || migration(&mut from.connect()) == "postcopy-paused");
    let resumes = ["evict", "--qmp", path(&from.qmp), "--resume", "--scatter", "8mbit"];
    let next = Sg::start(&resumes);
    until("it goes on", || migration(&mut Qmp::connect(&second).expect("greets")) == "postcopy-active");
    refused(&second, &by, "is at it still");
    next.kill();
    until("QEMU notices", || migration(&mut from.connect()) == "postcopy-paused");
    let other = Qemu::start(directory.path(), "other", &["-machine", "q35", "-m", "64M"]);
    refused(&other.qmp, &["--state-file", path(&copy)], "not the QEMU whose VM was leaving");
    evicted(&mut from, &[], directory.path());
    ends_well(feeder);
    assert_eq!(migration(&mut there.connect()), "completed");
}

/// Nobody was told of COMMIT: the VM runs on, as it was, and can leave.
#[test]
fn a_vm_that_was_not_given_away_runs_on() {
    let machine = Machine::new("q35", 1, &[]);
    let (mut from, mut there) = hosts(&machine);
    let before = crate::process::settings(&mut from.qemu.connect());
    let file = DepartedFile::new(&state_file(&from.qemu), None);
    for (pauses, parks) in [(false, false), (true, false), (true, true)] {
        let mut departure = Departure::begin(from.qemu.connect(), "web").expect("begins");
        departure.record(file.clone()).expect("written");
        if pauses {
            let mut vm = if parks { departure.vm_to_park() } else { departure.vm() };
            vm.pause().expect("paused");
        }
        // As when its process dies, but for that.
        departure.pages().hang_up();
        drop(departure);
        let of = noted(&from.qemu);
        let mut ours: Value = serde_json::from_str(&of).expect("JSON");
        refused(&from.qemu.qmp, &[], "is at it still");
        ours["by"] = json!(null);
        std::fs::write(state_file(&from.qemu), ours.to_string()).expect("written");
        let beat = from.said().beats.last().map_or(0, |beat| beat.number);
        let (code, said) = resume(&from.qemu.qmp, &[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("runs on here"), "{said}");
        assert!(!state_file(&from.qemu).exists());
        from.await_beat("it does not run on", |now| now.number > beat + 3);
        assert_eq!(crate::process::settings(&mut from.qemu.connect()), before);
    }
    let [one, _] = intermediaries();
    let (feeder, to) = Sg::listening(&["gather", "--qmp", path(&there.qemu.qmp), "--listen", NOWHERE]);
    let evicted = evict(&from.qemu, &to, "0", &[&one.1], &[]).0.wait().expect("ends");
    assert!(evicted.success() && from.qemu.has_ended_well() && !state_file(&from.qemu).exists());
    ends_well(feeder);
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// Nobody has the volume any more: QEMU keeps what it has, for somebody to look at.
#[test]
fn without_the_volume_nothing_is_changed() {
    let directory = tempfile::tempdir().expect("creates");
    let (from, there, _) = filled(directory.path());
    let [one, _] = intermediaries();
    let (feeder, to) = Sg::listening(&["gather", "--qmp", path(&there.qmp), "--listen", NOWHERE]);
    let mut evicting = evict(&from, &to, "8mbit", &[&one.1], &[]);
    evicting.await_event("resumed");
    evicting.kill();
    feeder.kill();
    until("QEMU notices", || migration(&mut from.connect()) == "postcopy-paused");
    let listed = sg(&["ls", "--intermediary", &one.1, "--json"]);
    let volumes: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let volume = volumes["volumes"][0]["volume"].as_str().expect("one").to_owned();
    assert!(sg(&["dissolve", &volume, "--yes", "--intermediary", &one.1]).status.success());
    refused(&from.qmp, &[], "dissolved it");
    assert_eq!(migration(&mut from.connect()), "postcopy-paused");
    assert!(state_file(&from).exists());
}

/// Claimed from where it was parked, it runs there, with all of its memory.
fn is_claimed(machine: &Machine, from: &Host, at: &[&str]) {
    let mut there = machine.start("there", &["-incoming", "defer"]);
    let claimed = sg(&[&["gather", "--qmp", path(&there.qemu.qmp), "--claim", "web"], at].concat());
    assert!(claimed.status.success(), "{}", said(&claimed));
    assert_eq!(migration(&mut there.qemu.connect()), "completed");
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// Killed while it parks a VM, as is the one that goes on: until it is parked nobody can claim it, and what is safe is not sent
/// again, but where there are copies.
#[test]
fn a_relay_is_killed_while_it_parks() {
    for (name, replicas) in [("pc", "1"), ("q35", "2")] {
        let machine = Machine::new(name, 1, &[]);
        let mut from = host(&machine);
        // With copies there is room for what is sent again.
        let [one, two] = intermediaries_of(if replicas == "1" { "128M" } else { "256M" });
        let at = ["--intermediary", &one.1, "--intermediary", &two.1];
        let park = ["evict", "--qmp", path(&from.qemu.qmp), "--park", "web", "--quit", "--scatter", "90mbit"];
        let mut parking = Sg::start(&[&park[..], &["--replicas", replicas], &at].concat());
        until_scattered(&mut parking, if replicas == "1" { 75 } else { 40 });
        parking.kill();
        let noted = noted(&from.qemu);
        assert!(noted.contains("\"name\":\"web\"") && noted.contains("\"keeper\":null"), "{noted}");
        let notices = |from: &Host| {
            until("QEMU notices", || migration(&mut from.qemu.connect()) == "postcopy-paused");
        };
        notices(&from);
        let waits = machine.start("waits", &["-incoming", "defer"]);
        let claims = ["gather", "--qmp", path(&waits.qemu.qmp), "--claim", "web"];
        let early = sg(&[&claims[..], &at].concat());
        assert_eq!(early.status.code(), Some(1), "{}", said(&early));
        if replicas == "1" {
            let resumes = ["evict", "--qmp", path(&from.qemu.qmp), "--resume", "--scatter", "60mbit"];
            let mut next = Sg::start(&resumes);
            until_scattered(&mut next, 85);
            next.kill();
            notices(&from);
        }
        let report = evicted(&mut from.qemu, &["--scatter", "0"], machine.directory.path());
        assert_eq!(report["resumed"], 1, "{report}");
        let (sent, total) = (report["bytes"]["staged"].as_u64(), report["pages"]["total"].as_u64());
        let is_little = sent.zip(total).is_some_and(|(sent, total)| sent < total * 4096 / 4);
        assert_eq!(is_little, replicas == "1", "{report}");
        is_claimed(&machine, &from, &at);
    }
}

/// A VM that is parked by this process, up to "evicted", and whose QEMU hears nothing of that.
fn parked_and_not_told(from: &Host, at: &[&str]) {
    let mut departure = Departure::begin(from.qemu.connect(), "web").expect("begins");
    departure.record(DepartedFile::new(&state_file(&from.qemu), None)).expect("written");
    let secret = PoolSecret::open();
    let options = SourceOptions {
        to: To::parked("web"),
        intermediaries: at.iter().map(|at| at.parse().expect("an address")).collect(),
        replacements: None,
        replicas: 2,
        mode: Mode::ScatterGather,
        rounds: RoundOptions::default(),
        connector: Arc::new(TcpConnector::new(secret.clone())),
        secret,
        scatter_limit_bytes_per_s: 0,
        ready_timeout: Duration::from_secs(10),
        observer: Arc::new(|_| {}),
    };
    let (vm, manifest) = (Box::new(departure.vm_to_park()), departure.manifest().clone());
    let outgoing = start(vm, Arc::new(departure.pages()), manifest, options).expect("starts");
    outgoing.wait_evicted(Duration::from_secs(60)).expect("parked");
    departure.pages().hang_up();
    drop((outgoing, departure));
    // As if that had been another process, which is gone.
    let noted = noted(&from.qemu);
    assert!(noted.contains("\"keeper\":{"), "{noted}");
    let (before, ours) = noted.split_once("\"by\":{").expect("who");
    let (_, behind) = ours.split_once('}').expect("who");
    let theirs = format!("{before}\"by\":{{\"number\":1,\"started\":1}}{behind}");
    std::fs::write(state_file(&from.qemu), theirs).expect("written");
}

/// It died when all were told that the VM is parked, and its QEMU was not; the VM is claimed behind that, or was before: then it
/// is said that it never runs here again.
#[test]
fn a_relay_dies_when_the_vm_is_parked_and_its_qemu_was_not_told() {
    for was_claimed in [false, true] {
        let machine = Machine::new("q35", 1, &[]);
        let mut from = host(&machine);
        let [one, two] = intermediaries();
        let at = ["--intermediary", &one.1, "--intermediary", &two.1];
        parked_and_not_told(&from, &[&one.1, &two.1]);
        if was_claimed {
            is_claimed(&machine, &from, &at);
        }
        let (code, said) = resume(&from.qemu.qmp, &["--quit"]);
        assert!(code == Some(0) && said.contains("\"evicted\""), "{said}");
        assert_eq!(said.contains("has claimed it"), was_claimed, "{said}");
        until("its QEMU ends", || !from.qemu.is_alive());
        assert!(!state_file(&from.qemu).exists(), "nobody needs it any more");
        if !was_claimed {
            is_claimed(&machine, &from, &at);
        }
    }
}

/// Killed when all is safe, by then or not yet told to those that have it, and its QEMU told, or gone: it is parked.
#[test]
fn a_relay_is_killed_when_all_is_safe() {
    for last in ["", "commit", "parked"] {
        let machine = Machine::new("pc", 1, &[]);
        let mut from = host(&machine);
        let [one, two] = intermediaries();
        let at = ["--intermediary", &one.1, "--intermediary", &two.1];
        let park = ["evict", "--qmp", path(&from.qemu.qmp), "--park", "web", "--quit"];
        let mut parking = Sg::start(&[&park[..], &at].concat());
        until_scattered(&mut parking, 100);
        if !last.is_empty() {
            parking.await_event(last);
        }
        parking.kill();
        // There may be nothing to do any more.
        let (_, said) = resume(&from.qemu.qmp, &["--quit"]);
        until(&format!("its QEMU ends: {said}"), || !from.qemu.is_alive());
        is_claimed(&machine, &from, &at);
    }
}

/// The intermediaries are gone with all that it had sent, and nobody was told that it is parked: the VM runs on.
#[test]
fn where_it_cannot_be_parked_any_more_the_vm_runs_on() {
    let machine = Machine::new("q35", 1, &[]);
    let mut from = host(&machine);
    let before = crate::process::settings(&mut from.qemu.connect());
    let [one, two] = intermediaries();
    let qmp = from.qemu.qmp.clone();
    let park = ["evict", "--qmp", path(&qmp), "--park", "web"];
    let mut parking = Sg::start(&[&park[..], &["--scatter", "60mbit", "--intermediary", &one.1]].concat());
    until_scattered(&mut parking, 70);
    parking.kill();
    drop(one);
    let beat = from.said().beats.last().map_or(0, |beat| beat.number);
    let (code, said) = resume(&qmp, &[]);
    assert!(code == Some(1) && said.contains("runs on here"), "{said}");
    assert!(!state_file(&from.qemu).exists());
    from.await_beat("it does not run on", |now| now.number > beat + 3);
    assert_eq!(crate::process::settings(&mut from.qemu.connect()), before);
    let at = ["--intermediary", &two.1];
    let parked = sg(&[&park[..], &["--quit"], &at].concat());
    assert!(parked.status.success() && from.qemu.has_ended_well(), "{}", crate::resume::said(&parked));
    is_claimed(&machine, &from, &at);
}
