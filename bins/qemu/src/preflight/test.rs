//! Preflight beside a QEMU that is played, with what no test can have.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;
use crate::qmp;

/// A VM whose other devices and back ends no test can have.
#[test]
fn devices_of_the_host_are_named() {
    let path = "/machine/peripheral";
    let (_directory, socket) = qmp::test::answering(move |command, arguments| match command {
        "query-status" => json!({ "status": "running" }),
        "qom-list" if arguments["path"] == path => json!([
            { "name": "type", "type": "string" },
            { "name": "gpu", "type": "child<vfio-pci>" },
            { "name": "disk", "type": "child<vhost-user-blk-pci>" },
            { "name": "net", "type": "child<virtio-net-pci>" },
        ]),
        "human-monitor-command" => json!(
            "net: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: index=0,type=vhost-user,x=y\r\n"
        ),
        "query-block" => json!([
            { "device": "cd", "removable": true },
            { "device": "root", "inserted": { "ro": false, "file": "nbd://h/x", "dirty-bitmaps": [{ "name": "b" }] } },
        ]),
        _ => json!({}),
    });
    let mut qmp = Qmp::connect(&socket).expect("greets");
    let found = source(&mut qmp, Disks::AsFound).expect("looked");
    let [gpu, disk, net] = &found.refusals[..] else { panic!("{found:?}") };
    assert!(
        gpu.contains("device gpu (vfio-pci)") && disk.contains("device disk (vhost-user-blk-pci)"),
        "{found:?}"
    );
    assert!(net.contains("network back end n0 (vhost-user)"), "{net}");
    assert!(matches!(&found.warnings[..], [bitmaps] if bitmaps.contains("drive root")), "{found:?}");
}

#[test]
fn files_of_this_host_are_told_from_others() {
    let here = tempfile::NamedTempFile::new().expect("a file");
    let here = here.path().to_str().expect("text");
    assert!(!is_shared(here, None, &NETWORKED));
    let described =
        format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{here}\"}}}}");
    assert!(!is_shared(&described, None, &NETWORKED));
    assert!(is_shared("nbd://10.0.0.7:10809/disk", None, &NETWORKED));
    assert!(is_shared("json:{\"driver\":\"rbd\",\"pool\":\"vms\",\"image\":\"web\"}", None, &NETWORKED));
    assert!(!is_shared("json:what", None, &NETWORKED), "nothing is known of it");
    assert!(!is_shared("/nonexistent", None, &NETWORKED));
}

/// A path that is not from the root is from QEMU's directory, not from ours.
#[test]
fn files_are_looked_for_where_qemu_is() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    std::fs::write(directory.path().join("root.img"), "").expect("written");
    let file_system = [rustix::fs::statfs(directory.path()).expect("told").f_type as u32];
    let mut qemu = Command::new("sleep");
    let qemu = qemu.arg("1000").current_dir(directory.path()).stdin(Stdio::null()).spawn();
    let mut qemu = qemu.expect("starts");
    let process = Some(Pid::from_child(&qemu));
    let node = "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"root.img\"}}";
    let found = ["root.img", node, "other.img"].map(|file| is_shared(file, process, &file_system));
    let unknown = is_shared("root.img", None, &file_system);
    qemu.kill().and_then(|()| qemu.wait()).expect("ended");
    assert_eq!((found, unknown), ([true, true, false], false));
}

/// A QEMU that says this of each thing.
fn looked(
    look: impl FnOnce(&mut Qmp) -> Result<Found>,
    answer: impl Fn(&str, &Value) -> Option<Value> + Send + 'static,
) -> Found {
    let (_directory, socket) =
        qmp::test::answering(move |command, asked| answer(command, asked).unwrap_or_else(|| json!({})));
    look(&mut Qmp::connect(&socket).expect("greets")).expect("looked")
}

#[test]
fn each_capability_that_is_in_the_way_is_named() {
    for (name, why) in CAPABILITIES {
        for (on, runs) in [(true, "running"), (false, "running"), (true, "inmigrate"), (false, "inmigrate")] {
            let answer = move |command: &str, _: &Value| match command {
                "query-status" => Some(json!({ "status": runs })),
                "query-migrate-capabilities" => Some(json!([
                    { "capability": "postcopy-ram", "state": true },
                    { "capability": name, "state": on },
                ])),
                _ => None,
            };
            let found = match runs {
                "running" => looked(|qmp| source(qmp, Disks::AsFound), answer),
                _ => looked(destination, answer),
            };
            match &found.refusals[..] {
                [] => assert!(!on, "{name}"),
                [refusal] => assert!(on && refusal.contains(name) && refusal.contains(why), "{found:?}"),
                _ => panic!("{found:?}"),
            }
        }
    }
}

#[test]
fn what_qemu_says_keeps_it_is_said() {
    let found = looked(
        |qmp| source(qmp, Disks::AsFound),
        |command, _| match command {
            "query-status" => Some(json!({ "status": "running" })),
            "query-migrate" => {
                Some(json!({ "blocked-reasons": ["non-migratable device: nvme", "and more"] }))
            }
            _ => None,
        },
    );
    let [nvme, more] = &found.refusals[..] else { panic!("{found:?}") };
    assert!(nvme.contains("non-migratable device: nvme") && more.contains("and more"), "{found:?}");
}

/// QEMU 10 that was started with `-incoming exec:` or `fd:`.
#[test]
fn a_destination_that_was_told_where_from_is_refused() {
    let found = looked(destination, |command, _| match command {
        "query-status" => Some(json!({ "status": "inmigrate" })),
        "query-migrate" => Some(json!({ "status": "setup" })),
        _ => None,
    });
    assert!(matches!(&found.refusals[..], [only] if only.contains("-incoming defer")), "{found:?}");
}

/// userfaultfd is to blame where QEMU refuses, and for nothing else.
#[test]
fn a_qemu_that_does_not_answer_is_not_said_to_lack_userfaultfd() {
    for refuses in [false, true] {
        let (_directory, socket) = qmp::test::playing(move |command, _, _| match command {
            "query-migrate-capabilities" => {
                json!({ "return": [{ "capability": "postcopy-ram", "state": false }] })
            }
            "migrate-set-capabilities" if refuses => {
                json!({ "error": { "desc": "Postcopy is not supported" } })
            }
            "migrate-set-capabilities" => Value::Null,
            _ => json!({ "return": {} }),
        });
        let mut qmp = Qmp::connect(&socket).expect("greets");
        let answer = if refuses { Duration::from_secs(30) } else { Duration::from_millis(200) };
        qmp.hurry(answer, answer);
        let error = switch_postcopy_on(&mut qmp).expect_err("it cannot");
        assert_eq!(error.kind, if refuses { ErrorKind::Vm } else { ErrorKind::Timeout }, "{}", error.chain());
        for grant in ["CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd"] {
            assert_eq!(error.chain().contains(grant), refuses, "{}", error.chain());
        }
    }
}
