//! Hosts with several QEMUs, and with other VMMs beside them, are emptied by one command.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guest::Work;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::commands::{Sg, path, sg};
use crate::machine::{Host, Machine, one_heart};
use crate::process::{Qemu, settings};
use crate::resume::{intermediaries, said, until};

const NOWHERE: &str = "127.0.0.1:0";

/// A directory of sockets in this one.
fn place(directory: &Path, name: &str) -> PathBuf {
    let place = directory.join(name);
    std::fs::create_dir(&place).expect("created");
    place
}

fn report(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).expect("written")).expect("JSON")
}

fn status(qemu: &Qemu) -> Value {
    qemu.connect().execute("query-status", &json!({})).expect("answers")["status"].take()
}

/// Each to a QEMU of its own; both have all of their memory there, and their hearts beat on.
#[test]
fn all_vms_of_a_host_leave_at_once() {
    let work = Work { filled_mib: 100, writes_per_s: 1000, checks_per_s: 20_000, threads: 1 };
    let machine = Machine::of("q35", "256M", work, &[]);
    let [here, there] = ["here", "there"].map(|name| place(machine.directory.path(), name));
    let start = |directory: &Path, more: &[&str]| -> [Host; 2] {
        ["db", "web"].map(|name| machine.start_in(directory, name, more))
    };
    let (mut from, mut to) = (start(&here, &[]), start(&there, &["-incoming", "defer"]));
    for vm in &mut from {
        vm.await_beat("the guest does not start", |beat| beat.passes >= 1);
    }
    let [one, two] = intermediaries();
    let [(db, to_db), (web, to_web)] = to.each_ref().map(|vm| {
        Sg::listening(&["gather", "--qmp", path(&vm.qemu.qmp), "--listen", NOWHERE, "--limit", "200mbit"])
    });
    let file = machine.directory.path().join("report");
    let evict =
        ["evict", "--all", path(&here), "--to", &to_db, "--to", &to_web, "--weight", "web=3", "--quit"];
    let at =
        ["--intermediary", &one.1, "--intermediary", &two.1, "--scatter", "300mbit", "--json", path(&file)];
    let evicted = sg(&[&evict[..], &at].concat());
    assert!(evicted.status.success(), "{}", said(&evicted));

    let told = report(&file);
    assert_eq!((&told["status"], &told["left_out"]), (&json!("ok"), &json!([])), "{told}");
    assert!(told["host"]["eviction_s"].as_f64() > Some(0.0), "{told}");
    let vms = told["vms"].as_array().expect("several");
    for (at, (vm, (name, to))) in vms.iter().zip([("db", &to_db), ("web", &to_web)]).enumerate() {
        assert_eq!((&vm["vm"], &vm["to"], &vm["status"]), (&json!(name), &json!(to), &json!("ok")), "{told}");
        assert_eq!((&vm["socket"], &vm["resumed"]), (&json!(from[at].qemu.qmp), &json!(0)), "{told}");
        assert!(
            vm["pages"]["total"].as_u64() > Some(65_536) && vm["eviction_s"].as_f64().is_some(),
            "{told}"
        );
    }
    assert_eq!(vms.len(), 2);
    let events: Vec<Value> = String::from_utf8_lossy(&evicted.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    for name in ["db", "web"] {
        for event in ["started", "commit", "resumed", "evicted"] {
            let its = |told: &&Value| told["event"] == event && told["vm"] == name;
            assert_eq!(events.iter().filter(its).count(), 1, "{event} of {name}: {events:?}");
        }
    }
    assert!(events.iter().all(|told| told["vm"].is_string() && told["socket"].is_string()), "{events:?}");

    for mut gathering in [db, web] {
        let mut said = String::new();
        gathering.1.read_to_string(&mut said).expect("read");
        assert!(gathering.0.wait().expect("ends").success(), "{said}");
    }
    for (from, to) in from.iter_mut().zip(&mut to) {
        assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
        to.await_passes();
        one_heart(&from.console, &to.console);
    }
}

/// A VMM of the other kind, killed when it is dropped.
struct Vmm(std::process::Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn vmm(directory: &Path, name: &str) -> Vmm {
    let socket = directory.join(format!("{name}.sock"));
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_sg")).with_file_name("sg-vmm"));
    command.args([
        "run",
        "--vcpu",
        "thread",
        "--name",
        name,
        "--memory",
        "16M",
        "--workload",
        "idle",
        "--control",
    ]);
    let started = command.arg(&socket).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let vmm = Vmm(started.expect("sg-vmm is built beside sg: cargo build --workspace"));
    until("it has a control socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    vmm
}

const MACHINE: [&str; 4] = ["-machine", "q35", "-m", "64M"];

/// Of a host with VMMs of both kinds those leave that can. Nothing of the others is changed, and why is said.
#[test]
fn what_stands_in_the_way_of_one_stops_nobody_else() {
    let directory = tempfile::tempdir().expect("creates");
    let here = place(directory.path(), "here");
    let _app = vmm(&here, "app");
    let waits = [&MACHINE[..], &["-incoming", "defer"]].concat();
    let start = |name| Qemu::start(&here, name, &MACHINE);
    let (held, taken, mut web) = (start("held"), start("taken"), start("web"));
    let second = format!("unix:{},server=on,wait=off", here.join("web2.qmp").display());
    let twice = Qemu::start(&here, "twice", &[&MACHINE[..], &["-qmp", &second]].concat());
    let waiting = Qemu::start(&here, "waits", &waits);
    let capability = json!([{ "capability": "multifd", "state": true }]);
    held.connect().execute("migrate-set-capabilities", &json!({ "capabilities": capability })).expect("on");
    let before = settings(&mut held.connect());
    let [one, _] = intermediaries();
    let file = directory.path().join("report");
    let evict = |more: &[&str]| {
        let park =
            ["evict", "--all", path(&here), "--park", "rack7", "--intermediary", &one.1, "--link", "1gbit"];
        sg(&[&park[..], &["--quit", "--json", path(&file)], more].concat())
    };
    let refused = evict(&["--mode", "hybrid"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("--mode hybrid"), "{}", said(&refused));

    let somebody = taken.connect();
    let evicted = evict(&["--deadline", "10m"]);
    assert_eq!(evicted.status.code(), Some(1), "{}", said(&evicted));
    let told = report(&file);
    let vms = told["vms"].as_array().expect("several");
    let parked: Vec<_> = vms.iter().map(|vm| (&vm["parked_as"], &vm["mode"], &vm["status"])).collect();
    let [hybrid, once, ok] = ["hybrid", "scatter-gather", "ok"].map(Value::from);
    let names = ["rack7-app", "rack7-twice", "rack7-web"].map(Value::from);
    assert_eq!(
        parked,
        [(&names[0], &hybrid, &ok), (&names[1], &once, &ok), (&names[2], &once, &ok)],
        "{told}"
    );
    let why = |name: &str| {
        let of = |left: &&Value| left["socket"].as_str().is_some_and(|socket| socket.ends_with(name));
        let left_out = told["left_out"].as_array().expect("a list").iter().find(of);
        left_out.and_then(|left| left["why"].as_str()).unwrap_or_default().to_owned()
    };
    assert!(why("/held.qmp").contains("capability multifd"), "{told}");
    assert!(why("/taken.qmp").contains("another client"), "{told}");
    assert!(why("/waits.qmp").contains("there is no VM"), "{told}");
    assert!(why("/web2.qmp").contains("another socket of the QEMU at"), "{told}");
    drop((somebody, twice));
    assert_eq!(settings(&mut held.connect()), before, "nothing of it was changed");
    for stays in [&held, &taken] {
        assert_eq!(status(stays), "running");
    }
    assert!(web.has_ended_well(), "{}", web.said());

    let claim = ["gather", "--qmp", path(&waiting.qmp), "--claim", "rack7-web", "--intermediary", &one.1];
    let claimed = sg(&claim);
    assert!(claimed.status.success(), "{}", said(&claimed));
    assert_eq!(status(&waiting), "running");

    // Those who drive VMMs leave QEMUs alone.
    let cancelled = sg(&["cancel", "--all", path(&here)]);
    assert!(said(&cancelled).contains("held.qmp: a QEMU's"), "{}", said(&cancelled));
    assert_eq!(settings(&mut held.connect()), before);
}

/// What is not committed is called off: the VMs run on, as they were.
#[test]
fn an_interrupt_calls_off_all_of_them() {
    let directory = tempfile::tempdir().expect("creates");
    let qemus = ["a", "b"].map(|name| Qemu::start(directory.path(), name, &MACHINE));
    let before = qemus.each_ref().map(|qemu| settings(&mut qemu.connect()));
    let [one, _] = intermediaries();
    let file = directory.path().join("report");
    let evict = ["evict", "--qmp", path(&qemus[0].qmp), "--qmp", path(&qemus[1].qmp), "--park"];
    let slowly = ["--scatter", "100kbit", "--intermediary", &one.1, "--json", path(&file)];
    let mut evicting = Sg::start(&[&evict[..], &slowly].concat());
    for _ in &qemus {
        evicting.await_event("started");
    }
    kill_process(Pid::from_child(&evicting.0), Signal::INT).expect("told");
    assert_eq!(evicting.0.wait().expect("ends").code(), Some(130));
    let told = report(&file);
    for (vm, name) in told["vms"].as_array().expect("several").iter().zip(["a", "b"]) {
        assert_eq!((&vm["vm"], &vm["status"]["kind"]), (&json!(name), &json!("cancelled")), "{told}");
    }
    for (qemu, before) in qemus.iter().zip(before) {
        until("it runs on", || status(qemu) == "running");
        assert_eq!(settings(&mut qemu.connect()), before);
        assert!(!directory.path().join(format!("{}.evict.json", path(&qemu.qmp))).exists());
    }
    // What is of one is not of two.
    for of_one in ["--resume", "--state-file=x"] {
        let named = ["evict", "--qmp", path(&qemus[0].qmp), "--qmp", path(&qemus[1].qmp), of_one];
        assert_eq!(sg(&named).status.code(), Some(2), "{of_one}");
    }
    assert_eq!(
        sg(&["evict", "/run/x.sock", "--quit", "--to", "127.0.0.1:1"]).status.code(),
        Some(2),
        "no QEMU"
    );
}
