//! `sg-bench qemu` as others run it: a guest of a stock QEMU moves, by each way that its release allows, and is reported.

use std::process::Command;

use serde_json::Value;

fn moves(mode: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg-bench"));
    command.args(["qemu", "--shape", "off", "--memory", "320M", "--mode", mode, "--json", "-"]);
    let output = command.output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{mode}: {said}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["mode"], mode);
    for (of, what) in
        [(&report, "eviction_s"), (&report, "total_migration_s"), (&report["guest"], "longest_pause_ms")]
    {
        assert!(of[what].as_f64().is_some_and(|value| value > 0.0), "{what}: {report}");
    }
    // 160 MiB, all of them looked at by the guest where it arrived.
    let guest = &report["guest"];
    assert_eq!(
        (&guest["verified_pages"], &guest["mismatches"]),
        (&Value::from(40_960), &Value::from(0)),
        "{guest}"
    );
    report
}

#[test]
fn a_guest_leaves_by_sg_evict() {
    let report = moves("scatter-gather");
    let bytes = |name: &str| report["bytes"][name].as_u64().expect("a number");
    assert!(bytes("direct") + bytes("staged") >= 160 << 20, "{report}");
    assert!(report["cpu_s"]["destination"].as_f64().is_some_and(|s| s > 0.0), "{report}");
}

#[test]
fn a_guest_leaves_by_post_copy_of_its_own() {
    moves("post-copy");
}

#[test]
fn a_vm_with_too_little_memory_is_refused() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg-bench"));
    let output = command.args(["qemu", "--shape", "off", "--memory", "64M"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("at least 320M"), "{said}");
}
