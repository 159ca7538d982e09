//! `sg serve --announce` and who looks for them: real processes, over the loopback interface.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod daemons;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use daemons::Daemons;
use libsg::ids::{Epoch, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::page::InstallUnit;
use libsg::transport::PoolSecret;
use libsg::vmd::{TcpConnector, Vmd as _, VmdClient};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// A pool of its own: a group, and a secret.
struct Pool {
    directory: PathBuf,
    place: String,
    daemons: Daemons,
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Pool {
    fn new() -> Self {
        let [a, b, c, d] = libsg::ids::random_bytes().unwrap();
        let port = 30_000 + u16::from_le_bytes([c, d]) % 10_000;
        let directory = std::env::temp_dir().join(format!("sg-pool-{}-{a}-{b}-{port}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let pool = Self {
            directory,
            place: format!("239.255.{a}.{b}:{port}@127.0.0.1"),
            daemons: Daemons::default(),
        };
        pool.secret("ours");
        pool
    }

    fn secret(&self, name: &str) -> String {
        let path = self.directory.join(name);
        std::fs::write(&path, format!("the secret of {name}")).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn serve(&mut self, name: &str, secret: &str) {
        let secret = self.secret(secret);
        self.daemons.serve(name, &self.place, &secret, &["--limit-in", "500mbit"]);
    }

    fn sg(&self, arguments: &[&str]) -> Output {
        daemons::sg(arguments, &format!("multicast:{}", self.place), &self.secret("ours"))
    }

    /// Waits until these are found, and no others; what is said of them.
    fn finds(&self, names: &[&str]) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let output = self.sg(&["status"]);
            let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            if nodes.iter().map(|node| node["name"].as_str().unwrap_or("?")).eq(names.iter().copied()) {
                return nodes;
            }
            assert!(begun.elapsed() < PATIENCE, "not {names:?}: {output:?}");
        }
    }
}

#[test]
fn daemons_are_found_and_those_of_others_and_dead_ones_are_not() {
    let mut pool = Pool::new();
    pool.serve("a", "ours");
    pool.serve("b", "ours");
    pool.serve("stranger", "theirs");
    let nodes = pool.finds(&["a", "b"]);
    let announced = &nodes[0]["announced"];
    assert_eq!(announced["zone"], "rack7");
    assert_eq!(announced["memory"]["limit_bytes"], 64 << 20);
    assert_eq!(announced["link"]["bytes_per_s"], 125_000_000);
    let free = announced["link"]["free_in_bytes_per_s"].as_u64().unwrap();
    assert!(free <= 62_500_000, "the operator's limit holds: {free}");

    // Whether it fits depends on what this machine has free at the moment.
    let planned = pool.sg(&["plan", "--memory", "16M", "--explain"]);
    let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
    assert_eq!(plan["nodes"].as_array().unwrap().len(), 2, "{plan}");
    assert_eq!(planned.status.code(), Some(i32::from(plan["fits"] == false)));
    for node in plan["nodes"].as_array().unwrap() {
        assert_eq!(node["taken"], node["why"].as_str().unwrap().starts_with("taken for"), "{plan}");
    }
    let far = pool.sg(&["plan", "--memory", "1T", "--to-zone", "rack8", "--evacuate", "--explain"]);
    let far: Value = serde_json::from_slice(&far.stdout).unwrap();
    assert!(far["fits"] == false && far["nodes"][0]["taken"] == false, "{far}");

    pool.daemons.0[1].kill().unwrap();
    pool.finds(&["a"]);
    pool.daemons.0[0].kill().unwrap();
    let begun = Instant::now();
    while pool.sg(&["status"]).status.code() != Some(1) {
        assert!(begun.elapsed() < PATIENCE, "somebody is there");
    }
}

/// Where nobody takes over what is there, it is chosen again.
#[test]
fn one_that_could_not_leave_announces_that_it_lends() {
    let mut pool = Pool::new();
    let secret = pool.secret("ours");
    pool.daemons.serve("a", &pool.place, &secret, &["--drain-timeout", "15"]);
    let address = pool.finds(&["a"])[0]["address"].as_str().unwrap().parse().unwrap();
    let connector = Arc::new(TcpConnector::new(PoolSecret::from_file(Path::new(&secret)).unwrap()));
    let region =
        Region { name: "ram".into(), guest_address: None, length_bytes: 1 << 20, unit: InstallUnit::Page };
    let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
    let id = VolumeId::random().unwrap();
    let volume = VmdClient::new(connector, PATIENCE).create(id, Epoch::FIRST, &manifest, &[address]).unwrap();
    volume.put_state(b"state").unwrap();
    volume.commit().unwrap();
    drop(volume);
    let daemon = rustix::process::Pid::from_child(&pool.daemons.0[0]);
    rustix::process::kill_process(daemon, rustix::process::Signal::TERM).unwrap();
    for leaves in [true, false] {
        let begun = Instant::now();
        while (pool.finds(&["a"])[0]["announced"]["duty"] == "Leaves") != leaves {
            assert!(begun.elapsed() < PATIENCE, "{leaves}: {:?}", pool.finds(&["a"]));
        }
    }
}

#[test]
fn a_list_is_not_chosen_from() {
    let pool = Pool::new();
    let path = pool.directory.join("list");
    std::fs::write(&path, "127.0.0.1:1\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
    command.args(["plan", "--memory", "1G", "--pool", &format!("static:{}", path.display())]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("takes them all"), "{output:?}");
}
