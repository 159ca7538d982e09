//! A VM moves, is parked and claimed, or stays.

use std::io::{BufRead as _, Read as _};
use std::path::Path;

use serde_json::{Value, json};

use crate::commands::{Sg, path, sg};
use crate::process::Qemu;

#[test]
fn the_vm_of_a_qemu_moves_to_another() {
    let directory = tempfile::tempdir().expect("creates");
    let machine = ["-machine", "q35", "-m", "64M"];
    let mut from = Qemu::start(directory.path(), "from", &machine);
    let there = Qemu::start(directory.path(), "there", &[&machine[..], &["-incoming", "defer"]].concat());
    let (_serving, intermediary) = Sg::listening(&["serve", "--memory", "128M", "--listen", "127.0.0.1:0"]);
    let gather = ["gather", "--qmp", path(&there.qmp), "--listen", "127.0.0.1:0", "--gather-limit", "80mbit"];
    let (mut gathering, to) = Sg::listening(&gather);

    let looked = sg(&["evict", "--qmp", path(&from.qmp), "--to", &to, "--dry-run"]);
    assert!(looked.status.success(), "{looked:?}");
    let (report, qmp) = (directory.path().join("report"), path(&from.qmp).to_owned());
    let evict = [
        "evict",
        "--qmp",
        &qmp,
        "--to",
        &to,
        "--intermediary",
        &intermediary,
        "--quit",
        "--json",
        path(&report),
    ];
    let evicted = sg(&evict);
    assert!(evicted.status.success(), "{evicted:?}");
    assert!(from.has_ended_well(), "{}", from.said());
    let report: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    assert_eq!(report["status"], "ok", "{report}");
    assert!(
        report["eviction_s"].as_f64() > Some(0.0) && report["pages"]["total"].as_u64() > Some(16_384),
        "{report}"
    );

    let mut said = String::new();
    gathering.1.read_to_string(&mut said).expect("read");
    assert!(gathering.0.wait().expect("ends").success(), "{said}");
    assert!(said.contains("gathered") && said.contains("dissolved"), "{said}");
    let mut qmp = there.connect();
    assert_eq!(qmp.execute("query-status", &json!({})).expect("answers")["status"], "running");
    assert_eq!(qmp.execute("query-migrate", &json!({})).expect("answers")["status"], "completed");
}

/// The guest's memory where it was filled.
fn filled(qemu: &Qemu, directory: &Path, bytes: usize) -> Vec<u8> {
    let file = directory.join("dump");
    let arguments = json!({ "val": 16 << 20, "size": bytes, "filename": file });
    qemu.connect().execute("pmemsave", &arguments).expect("saved");
    std::fs::read(&file).expect("a dump")
}

/// kill -9 of an intermediary that has pages which nobody else has, the relay included: QEMU sends them again.
#[test]
fn an_intermediary_that_is_killed_loses_nothing_while_the_source_lives() {
    let directory = tempfile::tempdir().expect("creates");
    let (file, mut word) = (directory.path().join("filling"), 1_u64);
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.to_le_bytes()
    })
    .take(2 << 20)
    .flatten()
    .collect();
    std::fs::write(&file, &bytes).expect("written");
    let loader = format!("loader,file={},addr={:#x},force-raw=on", file.display(), 16 << 20);
    let machine = ["-machine", "q35", "-m", "64M"];
    let filled_one = [&machine[..], &["-device", &loader]].concat();
    let from = Qemu::start(directory.path(), "from", &filled_one);
    let there = Qemu::start(directory.path(), "there", &[&machine[..], &["-incoming", "defer"]].concat());
    let serve = ["serve", "--memory", "128M", "--listen", "127.0.0.1:0"];
    let ((mut first, one), (_second, other)) = (Sg::listening(&serve), Sg::listening(&serve));
    let gather = ["gather", "--qmp", path(&there.qmp), "--listen", "127.0.0.1:0", "--gather-limit", "40mbit"];
    let (mut gathering, to) = Sg::listening(&gather);
    let report = directory.path().join("report");
    let (qmp, report_at) = (path(&from.qmp).to_owned(), path(&report).to_owned());
    let evict = ["evict", "--qmp", &qmp, "--to", &to, "--intermediary", &one, "--intermediary", &other];
    let more = ["--scatter", "80mbit", "--window", "8M", "--json", &report_at];
    let mut evicting = Sg::start(&[&evict[..], &more].concat());
    let mut line = String::new();
    while evicting.1.read_line(&mut line).expect("a line") > 0 {
        let event: Value = serde_json::from_str(&line).expect("JSON");
        line.clear();
        if event["event"] == "scattered" && event["percent"].as_u64() >= Some(60) {
            let _ = first.0.kill();
        }
    }
    assert!(evicting.0.wait().expect("ends").success());
    let told: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    assert_eq!(told["status"], "ok", "{told}");
    assert!(told["resumed"].as_u64() > Some(0) && told["pages"]["resent"].as_u64() > Some(0), "{told}");
    assert!(gathering.0.wait().expect("ends").success());
    assert!(filled(&there, directory.path(), bytes.len()) == bytes, "the memory is not what it was");
}

#[test]
fn the_vm_of_a_qemu_is_parked_and_claimed() {
    let directory = tempfile::tempdir().expect("creates");
    let machine = ["-machine", "q35", "-m", "64M"];
    let mut from = Qemu::start(directory.path(), "from", &machine);
    let (_serving, intermediary) = Sg::listening(&["serve", "--memory", "128M", "--listen", "127.0.0.1:0"]);
    let (report, qmp) = (directory.path().join("report"), path(&from.qmp).to_owned());
    let at = ["--intermediary", &intermediary, "--json", path(&report)];
    // A name that no VM can have: it runs on.
    let long = "x".repeat(1000);
    let refused = sg(&[&["evict", "--qmp", &qmp, "--park", &long][..], &at].concat());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let parked = sg(&[&["evict", "--qmp", &qmp, "--park", "web", "--quit"][..], &at].concat());
    assert!(parked.status.success(), "{parked:?}");
    assert!(from.has_ended_well(), "{}", from.said());
    let told: Value = serde_json::from_slice(&std::fs::read(&report).expect("written")).expect("JSON");
    assert_eq!((&told["status"], &told["parked_as"]), (&json!("ok"), &json!("web")), "{told}");

    let there = Qemu::start(directory.path(), "there", &[&machine[..], &["-incoming", "defer"]].concat());
    let claim = ["gather", "--qmp", path(&there.qmp), "--claim"];
    let refused = sg(&[&claim[..], &["db"], &at].concat());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let claimed = sg(&[&claim[..], &["web"], &at].concat());
    assert!(claimed.status.success(), "{claimed:?}");
    let said = String::from_utf8_lossy(&claimed.stdout);
    assert!(said.contains("claimed") && said.contains("gathered") && said.contains("dissolved"), "{said}");
    let mut qmp = there.connect();
    assert_eq!(qmp.execute("query-status", &json!({})).expect("answers")["status"], "running");
}

#[test]
fn what_stands_in_the_way_is_said_before_anything_is_done() {
    let directory = tempfile::tempdir().expect("creates");
    let disk = directory.path().join("root.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("a disk");
    let drive = format!("file={},format=raw,if=none,id=root", disk.display());
    let machine = ["-machine", "q35", "-m", "64M", "-drive", &drive, "-device", "virtio-blk-pci,drive=root"];
    let from = Qemu::start(directory.path(), "from", &machine);
    let refused = sg(&["evict", "--qmp", path(&from.qmp), "--to", "127.0.0.1:1"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("drive root") && said.contains("--shared-disks"), "{said}");
    let refused = sg(&["gather", "--qmp", path(&from.qmp), "--listen", "127.0.0.1:0"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("-incoming defer"), "{said}");
    // Nobody is there: it runs on here.
    let nobody = sg(&["evict", "--qmp", path(&from.qmp), "--to", "127.0.0.1:1", "--shared-disks"]);
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
    let mut qmp = from.connect();
    assert_eq!(qmp.execute("query-status", &json!({})).expect("answers")["status"], "running");
    assert_eq!(qmp.execute("query-migrate", &json!({})).expect("answers")["status"], "cancelled");
    drop(qmp);
    let evict = |more: &[&str]| sg(&[&["evict", "--qmp", path(&from.qmp)], more].concat()).status.code();
    assert_eq!(evict(&["--park"]), Some(2));
    let to = ["--to", "127.0.0.1:1", "--mode"];
    assert_eq!(evict(&[&to[..], &["hybrid"]].concat()), Some(2), "through nobody");
    assert_eq!(evict(&[&to[..], &["pre-copy", "--intermediary", "127.0.0.1:2"]].concat()), Some(2));
    let parked = ["--park", "web", "--mode", "hybrid", "--intermediary", "127.0.0.1:2"];
    assert_eq!(evict(&parked), Some(2));
    for wrong in [&["--listen", "127.0.0.1:0", "--claim", "web"][..], &["--claim", "web"], &[]] {
        let wrong = [&["gather", "--qmp", path(&from.qmp)], wrong].concat();
        assert_eq!(sg(&wrong).status.code(), Some(2), "{wrong:?}");
    }
}
