//! What stands in the way of a migration is found at a real QEMU, by name, and nothing is changed by looking.

mod process;

use std::os::unix::fs::PermissionsExt as _;

use process::Qemu;
use qemu::{Disks, Found, Qmp, Settings, Version, destination, source};
use serde_json::{Value, json};
use test_support::skipped;

fn machine<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["-machine", "q35", "-m", "64M"], more].concat()
}

/// Capabilities and parameters, as they are.
fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|command| qmp.execute(command, &json!({})).expect("answers"))
}

fn only(found: &Found, words: &[&str]) {
    let [refusal] = &found.refusals[..] else { panic!("{words:?}: {found:?}") };
    assert!(words.iter().all(|word| refusal.contains(word)), "{words:?}: {refusal}");
}

fn set(qmp: &mut Qmp, capability: &str, on: bool) {
    let list = json!([{ "capability": capability, "state": on }]);
    qmp.execute("migrate-set-capabilities", &json!({ "capabilities": list })).expect("set");
}

#[test]
fn a_vm_with_nothing_in_the_way_and_each_capability_that_is() {
    let directory = tempfile::tempdir().expect("creates");
    let qemu = Qemu::start(directory.path(), "vm", &machine(&[]));
    let mut qmp = qemu.connect();
    assert!(qmp.version() >= Version { major: 7, minor: 2, micro: 0 }, "{}", qmp.version());
    let before = settings(&mut qmp);
    assert_eq!(source(&mut qmp, Disks::AsFound).expect("looked"), Found::default());

    for capability in [
        "block",
        "compress",
        "dirty-bitmaps",
        "multifd",
        "pause-before-switchover",
        "rdma-pin-all",
        "release-ram",
        "x-colo",
        "x-ignore-shared",
        "xbzrle",
    ] {
        // Newer ones have lost some of them.
        let known = before[0].as_array().expect("a list").iter().any(|one| one["capability"] == capability);
        if known {
            set(&mut qmp, capability, true);
            only(
                &source(&mut qmp, Disks::AsFound).expect("looked"),
                &[capability, "migrate-set-capabilities"],
            );
            set(&mut qmp, capability, false);
        }
    }
    qmp.execute("migrate-set-parameters", &json!({ "tls-creds": "mine" })).expect("set");
    only(&source(&mut qmp, Disks::AsFound).expect("looked"), &["tls-creds"]);
    qmp.execute("migrate-set-parameters", &json!({ "tls-creds": "" })).expect("set");

    only(&destination(&mut qmp).expect("looked"), &["waits for no VM", "-incoming defer"]);
    qmp.execute("stop", &json!({})).expect("stopped");
    only(&source(&mut qmp, Disks::AsFound).expect("looked"), &["\"paused\"", "cont"]);
    assert_eq!(settings(&mut qmp), before);
}

#[test]
fn devices_and_drives_are_named() {
    let directory = tempfile::tempdir().expect("creates");
    let disk = directory.path().join("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("a disk");
    let disk = disk.to_str().expect("text");
    let (writable, only_read) = (
        format!("file={disk},format=raw,if=none,id=root,file.locking=off"),
        format!("file={disk},format=raw,if=none,id=cd,readonly=on,file.locking=off"),
    );
    let arguments = [
        "-machine",
        "q35",
        "-m",
        "64M,slots=1,maxmem=256M",
        "-drive",
        &writable,
        "-device",
        "virtio-blk-pci,drive=root",
        "-drive",
        &only_read,
        "-device",
        "virtio-blk-pci,drive=cd",
        "-netdev",
        "user,id=n0",
        "-device",
        "virtio-net-pci,netdev=n0",
    ];
    let qemu = Qemu::start(directory.path(), "disks", &arguments);
    let mut qmp = qemu.connect();
    only(&source(&mut qmp, Disks::AsFound).expect("looked"), &["drive root", disk, "--shared-disks"]);
    assert_eq!(source(&mut qmp, Disks::Shared).expect("looked"), Found::default());

    let arguments = [
        "-machine",
        "q35",
        "-m",
        "64M,slots=1,maxmem=256M",
        "-object",
        "memory-backend-ram,id=more,size=64M",
        "-device",
        "virtio-mem-pci,id=growing,memdev=more",
    ];
    let qemu = Qemu::start(directory.path(), "device", &arguments);
    only(&source(&mut qemu.connect(), Disks::AsFound).expect("looked"), &["device growing", "virtio-mem"]);
}

#[test]
fn a_destination_waits_and_for_us() {
    let directory = tempfile::tempdir().expect("creates");
    let waits = Qemu::start(directory.path(), "waits", &machine(&["-incoming", "defer"]));
    let mut qmp = waits.connect();
    let before = settings(&mut qmp);
    assert_eq!(destination(&mut qmp).expect("looked"), Found::default());
    assert_eq!(settings(&mut qmp), before);
    let listens = Qemu::start(directory.path(), "listens", &machine(&["-incoming", "tcp:127.0.0.1:0"]));
    only(&destination(&mut listens.connect()).expect("looked"), &["listens", "-incoming defer"]);
}

/// Who runs it may not use userfaultfd: that is said before a VM is offered, with who may give it that.
#[test]
fn a_destination_without_userfaultfd_is_refused() {
    let part = "a destination without userfaultfd";
    let anybody = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if anybody.trim() != "0" {
        return skipped(part, "the sysctl vm.unprivileged_userfaultfd is not 0: everybody may use it");
    }
    if std::fs::metadata("/dev/userfaultfd").is_ok_and(|of| of.permissions().mode() & 0o006 != 0) {
        return skipped(part, "everybody may use /dev/userfaultfd");
    }
    let directory = tempfile::tempdir().expect("creates");
    let arguments = machine(&["-incoming", "defer"]);
    let Some(qemu) = Qemu::start_as_nobody("", directory.path(), "nobody", &arguments) else { return };
    let mut qmp = qemu.connect();
    let before = settings(&mut qmp);
    let found = destination(&mut qmp).expect("looked");
    only(&found, &["CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd"]);
    assert_eq!(settings(&mut qmp), before);
}

/// A device that QEMU knows not to move, by its own words.
#[test]
fn what_qemu_itself_does_not_let_leave_is_named() {
    let directory = tempfile::tempdir().expect("creates");
    let qemu = Qemu::start(directory.path(), "vm", &machine(&["-device", "nvme,id=fast,serial=1"]));
    only(&source(&mut qemu.connect(), Disks::AsFound).expect("looked"), &["does not let", "nvme"]);
}

#[test]
fn settings_are_put_back() {
    let directory = tempfile::tempdir().expect("creates");
    let qemu = Qemu::start(directory.path(), "vm", &machine(&[]));
    let mut qmp = qemu.connect();
    let before = settings(&mut qmp);
    let capabilities = [("postcopy-ram", true), ("return-path", true)];
    let mut changed =
        Settings::change(&mut qmp, &capabilities, &[("max-bandwidth", 10_000_000_000)]).expect("changed");
    let between = settings(&mut qmp);
    assert_eq!(between[1]["max-bandwidth"], 10_000_000_000_u64);
    assert_ne!(between[0], before[0]);
    changed.restore(&mut qmp).expect("put back");
    assert_eq!(settings(&mut qmp), before);
    changed.restore(&mut qmp).expect("there is nothing left to do");

    // One that there is not: what was set before it is put back.
    let error = Settings::change(&mut qmp, &[("postcopy-ram", true), ("teleport", true)], &[]);
    let error = error.expect_err("there is none");
    assert!(error.message.contains("capability teleport"), "{error}");
    // One that does not go with another that is on.
    set(&mut qmp, "postcopy-ram", true);
    let error = Settings::change(&mut qmp, &[("return-path", true), ("x-ignore-shared", true)], &[]);
    assert!(error.expect_err("refused").message.contains("Postcopy is not compatible"));
    set(&mut qmp, "postcopy-ram", false);
    assert_eq!(settings(&mut qmp), before);
}
