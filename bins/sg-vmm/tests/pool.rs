//! A VMM that hears a pool by etcd, and chooses in it.

#[path = "../../discovery-etcd/tests/process/mod.rs"]
mod process;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use discovery_etcd::Announcer;
use libsg::ids::NodeId;
use libsg::transport::PoolSecret;
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use process::{Etcd, secret_file, until};
use serde_json::Value;

/// Killed when it is dropped.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(control: &mut BufReader<UnixStream>, request: &str) -> Value {
    writeln!(control.get_mut(), "{request}").expect("sent");
    let mut answer = String::new();
    control.read_line(&mut answer).expect("answered");
    serde_json::from_str(&answer).expect("JSON")
}

fn lender() -> Announcement {
    Announcement {
        node: NodeId { name: "lender".into(), incarnation: 7 },
        address: ([127, 0, 0, 1], 7701).into(),
        zone: None,
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory: MemoryRoom {
            host_bytes: 8 << 30,
            available_bytes: 8 << 30,
            limit_bytes: 4 << 30,
            used_bytes: 0,
        },
        link: LinkRoom {
            bytes_per_s: 1_000_000_000,
            free_in_bytes_per_s: 1_000_000_000,
            free_out_bytes_per_s: 1_000_000_000,
            ..LinkRoom::default()
        },
        cpu_idle_permille: 1000,
        connections_free: 100,
        volumes_free: 100,
    }
}

#[test]
fn intermediaries_are_chosen_among_those_that_etcd_keeps() {
    let etcd = Etcd::start();
    let directory = tempfile::tempdir().expect("directory");
    let (secret, socket) = (secret_file(directory.path(), "ours"), directory.path().join("control"));
    let pool = etcd.pool("sg/vmm");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg-vmm"));
    command.args([
        "run",
        "--memory",
        "4M",
        "--vcpu",
        "thread",
        "--workload",
        "idle",
        "--pool",
        &pool,
        "--secret",
    ]);
    command.arg(&secret).arg("--control").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
    let _vmm = Vmm(command.spawn().expect("starts"));
    until("it has a control socket", || UnixStream::connect(&socket).is_ok());
    let mut control = BufReader::new(UnixStream::connect(&socket).expect("connected"));
    let ours = PoolSecret::from_bytes(b"the secret of ours").expect("not empty");
    let place = pool.parse().expect("good");
    let _lender = Announcer::start(&place, &ours, Box::new(lender)).expect("started");
    until("it is chosen", || {
        let asked = r#"{"do":"start","to":"127.0.0.1:1","pool":true,"dry_run":true}"#;
        let answer = ask(&mut control, asked);
        answer["selection"]["nodes"]
            .as_array()
            .is_some_and(|nodes| nodes.len() == 1 && nodes[0]["taken"] == true)
    });
    assert_eq!(ask(&mut control, r#"{"do":"quit"}"#)["ok"], true);
}
