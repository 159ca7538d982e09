//! `sg serve --announce etcd://…` and who looks for them: real processes, and a real etcd.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

#[path = "../../discovery-etcd/tests/process/mod.rs"]
mod process;

mod daemons;

use std::process::Output;

use daemons::Daemons;
use process::{Etcd, secret_file, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

struct Pool {
    etcd: Etcd,
    directory: tempfile::TempDir,
    daemons: Daemons,
}

impl Pool {
    fn secret(&self, name: &str) -> String {
        secret_file(self.directory.path(), name)
    }

    fn serve(&mut self, name: &str, secret: &str) {
        let (place, secret) = (self.etcd.pool("sg/e2e"), self.secret(secret));
        self.daemons.serve(name, &place, &secret, &[]);
    }

    fn sg(&self, arguments: &[&str]) -> Output {
        daemons::sg(arguments, &self.etcd.pool("sg/e2e"), &self.secret("ours"))
    }

    /// Names of those that `sg status` finds, dead ones included.
    fn names(&self) -> Vec<Value> {
        let status: Value = serde_json::from_slice(&self.sg(&["status"]).stdout).unwrap_or_default();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.into_iter().map(|node| node["name"].clone()).collect()
    }
}

#[test]
fn daemons_are_found_planned_with_and_gone_when_they_die() {
    let directory = tempfile::tempdir().unwrap();
    let mut pool = Pool { etcd: Etcd::start(), directory, daemons: Daemons::default() };
    pool.serve("a", "ours");
    pool.serve("b", "ours");
    pool.serve("stranger", "theirs");
    until("two are found", || pool.names() == ["a", "b"]);
    let status: Value = serde_json::from_slice(&pool.sg(&["status"]).stdout).unwrap();
    let announced = &status["nodes"][0]["announced"];
    assert_eq!(
        (&announced["zone"], &announced["memory"]["limit_bytes"]),
        (&"rack7".into(), &(64 << 20).into())
    );

    let planned = pool.sg(&["plan", "--memory", "16M", "--explain"]);
    let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
    let nodes = plan["nodes"].as_array().unwrap();
    assert!(nodes.len() == 2 && nodes.iter().all(|node| node["zone"] == "rack7"), "{plan}");
    assert_eq!(planned.status.code(), Some(i32::from(plan["fits"] == false)));

    // etcd is away for a moment.
    pool.etcd.kill();
    let away = pool.sg(&["status"]);
    assert_eq!(away.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&away.stderr).contains("etcd at 127.0.0.1"), "{away:?}");
    pool.etcd.restart();
    until("they are found again", || pool.names() == ["a", "b"]);

    // One leaves, and has done so when it has ended.
    kill_process(Pid::from_child(&pool.daemons.0[1]), Signal::TERM).unwrap();
    assert_eq!(pool.daemons.0[1].wait().unwrap().code(), Some(0));
    assert_eq!(pool.names(), ["a"]);

    // One dies: it is listed until its lease runs out, as one that does not answer.
    pool.daemons.0[0].kill().unwrap();
    until("it is gone", || {
        let output = pool.sg(&["status"]);
        String::from_utf8_lossy(&output.stderr).contains("nobody announces itself at etcd://")
    });
}
