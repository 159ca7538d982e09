//! `sg-bench migrate` as others run it: its report, its events, what it does to whom, its exit codes.

mod places;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use places::Place;
use serde_json::Value;
use test_support::skipped;

/// What nothing takes as long as, on a busy machine: not a measure of speed, but of a hang.
const PATIENCE: Duration = Duration::from_secs(180);

/// On loopback, with threads for vCPUs, slow enough that things happen in the middle.
const LOOPBACK: &str = "--shape off --vcpu thread --memory 16M --gather-limit 100mbit";

/// One `sg-bench migrate`, with a directory for everything it makes. Ended when dropped.
struct Bench {
    directory: tempfile::TempDir,
    child: Option<Child>,
    _place: Place,
}

impl Bench {
    fn start(arguments: &str) -> Self {
        let place = Place::take();
        let directory = tempfile::tempdir().expect("directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg-bench"));
        command.arg("migrate").args(arguments.split_whitespace()).args(["--json", "-", "--events"]);
        command.arg(directory.path().join("events")).env("TMPDIR", directory.path());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self { directory, child: Some(child.expect("starts")), _place: place }
    }

    /// Its end: exit code, report, what it said.
    fn end(&mut self) -> (Option<i32>, Value, String) {
        let child = self.child.take().expect("not ended twice");
        let Output { status, stdout, stderr } = child.wait_with_output().expect("ends");
        let said = String::from_utf8_lossy(&stderr).into_owned();
        (status.code(), serde_json::from_slice(&stdout).unwrap_or(Value::Null), said)
    }

    /// Its end, which is a good one.
    fn ends_well(&mut self) -> (Value, String) {
        let (code, report, said) = self.end();
        assert_eq!((code, &report["status"]), (Some(0), &Value::from("ok")), "{said}");
        (report, said)
    }

    /// Every event so far.
    fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.directory.path().join("events")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn wait(&self, event: &str) {
        let began = Instant::now();
        while !self.events().iter().any(|line| line["event"] == event) {
            assert!(began.elapsed() < PATIENCE, "no {event}: {:?}", self.events());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A file of the run's own directory.
    fn file(&self, name: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.directory.path()).expect("there").flatten();
        let paths = entries.map(|entry| entry.path().join(name));
        paths.into_iter().find(|path| path.exists()).expect("a run makes it")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = child.wait();
        }
    }
}

fn ask(socket: &Path, request: &str) -> Value {
    let mut stream = BufReader::new(UnixStream::connect(socket).expect("connects"));
    writeln!(stream.get_mut(), "{request}").expect("sent");
    let mut answer = String::new();
    stream.read_line(&mut answer).expect("answered");
    serde_json::from_str(&answer).expect("JSON")
}

fn is_positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number > 0.0)
}

#[test]
fn a_source_that_is_killed_when_it_has_evicted_has_told_its_report() {
    // In post-copy both ends are through at the same moment: whoever is heard first.
    for (mode, times) in [("post-copy", 3), ("scatter-gather", 1)] {
        for _ in 0..times {
            let mut bench = Bench::start(&format!("{LOOPBACK} --mode {mode} --kill source@evicted"));
            let (report, said) = bench.ends_well();
            for key in ["eviction_s", "downtime_s", "total_migration_s"] {
                assert!(is_positive(&report[key]), "{mode}: no {key}: {report}\n{said}");
            }
            assert!(is_positive(&report["bytes"]["direct"]) && is_positive(&report["pages"]["present"]));
            assert_eq!(report["guest"]["verified_pages"], 16 * 256);
            let events = bench.events();
            assert!(events.iter().any(|line| line["event"] == "evicted" && line["node"] == "source"));
        }
    }
}

#[test]
fn rdma_asks_for_a_device_and_for_no_namespaces() {
    let (code, _, said) = Bench::start("--transport rdma").end();
    assert!(code == Some(2) && said.contains("--shape off"), "{code:?} {said}");
    if Path::new("/sys/class/infiniband").exists() {
        skipped("what is said without RDMA", "this host has some");
    } else {
        let (code, _, said) = Bench::start(&format!("{LOOPBACK} --transport rdma")).end();
        assert!(code == Some(1) && said.contains("RDMA"), "{code:?} {said}");
        let bench = Command::new(env!("CARGO_BIN_EXE_sg-bench")).arg("rdma").output().expect("starts");
        let said = String::from_utf8_lossy(&bench.stderr);
        assert!(bench.status.code() == Some(1) && said.contains("RDMA"), "{said}");
    }
    let (report, _) = Bench::start(&format!("{LOOPBACK} --transport tcp --until evicted")).ends_well();
    assert_eq!(report["transport"], "tcp");
    for node in report["intermediaries"].as_array().expect("some") {
        let bytes = |key: &str| node[key].as_u64().unwrap_or_else(|| panic!("no {key}: {report}"));
        assert!(bytes("touched_bytes") >= bytes("bytes_in"), "each byte came over a connection: {report}");
        assert_eq!(bytes("unused_leased_slots"), 0);
    }
}

/// By a user who may use userfaultfd, and has neither the right to make namespaces nor `/dev/kvm`.
#[test]
fn the_demo_says_what_it_goes_without() {
    if !rustix::process::getuid().is_root() {
        return skipped("all of it", "only root may become the user that it is about");
    }
    let _place = Place::take();
    let directory = tempfile::tempdir().expect("directory");
    // Where every user can run them, and write.
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("its owner's");
    };
    open(directory.path());
    let from = Path::new(env!("CARGO_BIN_EXE_sg-bench")).parent().expect("a directory");
    for name in ["sg-bench", "sg", "sg-vmm"] {
        let program = directory.path().join(name);
        std::fs::copy(from.join(name), &program)
            .unwrap_or_else(|error| panic!("{name}: {error}: cargo build --workspace --bins makes it"));
        open(&program);
    }
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--bounding-set",
        "-all,+sys_ptrace",
    ]);
    command.args(["--inh-caps", "-all,+sys_ptrace", "--ambient-caps", "-all,+sys_ptrace"]);
    command.arg(directory.path().join("sg-bench")).args(["demo", "--memory", "32M"]);
    command.env("TMPDIR", directory.path()).current_dir(directory.path()).stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().expect("setpriv is of util-linux");
    let (told, said) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(0), "{told}\n{said}");
    assert!(told.contains("Without network namespaces") && told.contains("Without KVM"), "{told}");
    for shown in ["eviction", "post-copy", "scatter-gather", "The source was free"] {
        assert!(told.contains(shown), "no {shown}: {told}\n{said}");
    }
}

#[test]
fn a_vm_is_parked_and_claimed_when_its_source_is_gone() {
    let mut bench = Bench::start(&format!("{LOOPBACK} --park --kill source@evicted"));
    let (report, said) = bench.ends_well();
    assert_eq!(report["guest"]["verified_pages"], 16 * 256, "{said}");
    assert!(is_positive(&report["eviction_s"]) && is_positive(&report["bytes"]["staged"]), "{report}");
    assert_eq!((&report["downtime_s"], &report["bytes"]["direct"]), (&Value::Null, &0.into()));
    let events: Vec<_> = bench.events().iter().map(|line| line["event"].clone()).collect();
    let at = |event: &str| events.iter().position(|told| *told == event).expect("told");
    assert!(at("parked") < at("evicted") && at("evicted") < at("claimed") && at("claimed") < at("resumed"));
    assert!(report["total_migration_s"].as_f64() > report["eviction_s"].as_f64(), "{report}");
    for wrong in ["--mode post-copy", "--intermediaries 0"] {
        let (code, _, said) = Bench::start(&format!("{LOOPBACK} --park {wrong}")).end();
        assert!(code != Some(0) && said.contains("--park"), "{said}");
    }
}

#[test]
fn an_intermediary_is_killed_at_an_event_and_another_stopped_some_time_after_it() {
    let harm = "--intermediaries 3 --kill i1@scattered=25% --stop i2@scattered=25%+20";
    let mut bench = Bench::start(&format!("{LOOPBACK} {harm}"));
    let (report, said) = bench.ends_well();
    assert_eq!(report["guest"]["verified_pages"], 16 * 256);
    let events = bench.events();
    let lost = |line: &Value| line["message"].as_str().is_some_and(|message| message.contains("i1"));
    assert!(events.iter().any(|line| line["event"] == "node-lost" && lost(line)), "{events:?}\n{said}");
}

#[test]
fn a_link_is_cut_after_commit_and_mended() {
    // Needs root, as the experiments do: without it this fails, it does not pretend.
    for node in ["destination", "source"] {
        let mut bench = Bench::start(&format!(
            "--vcpu thread --memory 32M --link-rate 200mbit --destination-rate 100mbit \
             --cut {node}@scattered=25% --mend {node}@scattered=25%+700"
        ));
        let (report, said) = bench.ends_well();
        assert_eq!(report["guest"]["verified_pages"], 32 * 256, "{said}");
        // It could not be over before the link was there again.
        assert!(report["eviction_s"].as_f64() > Some(0.7), "{report}");
    }
}

#[test]
fn an_intermediary_is_cut_off_for_good() {
    let mut bench = Bench::start(
        "--vcpu thread --memory 32M --link-rate 200mbit --destination-rate 100mbit --cut i1@scattered=25%",
    );
    let (report, said) = bench.ends_well();
    assert_eq!(report["guest"]["verified_pages"], 32 * 256, "{said}");
    assert!(said.contains("i1"), "{said}");
}

#[test]
fn a_destination_that_is_stopped_goes_on_when_all_has_evicted() {
    let mut bench = Bench::start(&format!(
        "{LOOPBACK} --stop destination@scattered=50% --continue destination@evicted --lift-at-evicted"
    ));
    let (report, said) = bench.ends_well();
    assert_eq!(report["guest"]["mismatches"], 0, "{said}");
    assert!(
        is_positive(&report["guest"]["verified_pages"]) && is_positive(&report["bytes"]["staged"]),
        "{report}"
    );
}

#[test]
fn a_run_that_ends_when_the_source_has_evicted_leaves_nothing_and_warns_of_nothing() {
    let mut bench = Bench::start(&format!("{LOOPBACK} --until evicted --stop destination@resumed"));
    let (report, said) = bench.ends_well();
    assert!(is_positive(&report["eviction_s"]) && is_positive(&report["bytes"]["staged"]), "{report}");
    assert!(!said.contains("does not end"), "{said}");
    let left = std::fs::read_dir(bench.directory.path()).expect("there").flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["events"]);
}

#[test]
fn a_cancelled_migration_is_exit_code_4() {
    for _ in 0..5 {
        // A destination that stands still is never READY: there is time to cancel.
        let mut bench = Bench::start(&format!("{LOOPBACK} --stop destination@started"));
        bench.wait("started");
        let answer = ask(&bench.file("source.control"), r#"{"do":"cancel"}"#);
        if answer["ok"] == false {
            // It was stopped too late.
            continue;
        }
        let (code, report, said) = bench.end();
        assert_eq!((code, &report["status"]["kind"]), (Some(4), &Value::from("cancelled")), "{said}");
        return;
    }
    panic!("COMMIT was always faster");
}

#[test]
fn cotenants_are_measured_before_and_during_and_the_gather_limit_holds_for_post_copy() {
    let mut bench = Bench::start(&format!("{LOOPBACK} --mode post-copy --cotenant"));
    let (report, said) = bench.ends_well();
    let cotenants = report["cotenants"].as_array().expect("an array");
    let nodes: Vec<_> = cotenants.iter().map(|cotenant| &cotenant["node"]).collect();
    assert_eq!(nodes, ["destination", "i1"], "{said}");
    for cotenant in cotenants {
        for when in ["idle", "scattering", "migration"] {
            assert!(is_positive(&cotenant[when]["p95_us"]), "{when}: {cotenant}");
        }
        let requests = |when: &str| cotenant[when]["count"].as_u64().expect("a number");
        assert!(requests("migration") >= requests("scattering"), "{cotenant}");
    }
    assert!(said.contains("co-tenants' p95 us: destination "), "{said}");
    // Pages that the guest waits for are exempt, so it is only not faster than the rest of them.
    let faulted = report["pages"]["faulted"].as_u64().expect("a number");
    let least_s = (16.0 * 256.0 - faulted as f64) * 4096.0 * 8.0 / 100e6;
    assert!(report["eviction_s"].as_f64().expect("a number") > 0.8 * least_s, "{report}");
}

#[test]
fn a_destination_with_little_memory_and_hungry_neighbours_swaps_and_takes_every_page() {
    let little = "--shape off --vcpu thread --memory 64M --destination-memory 64M --neighbours 2 --neighbour-memory 16M";
    let mut bench = Bench::start(little);
    let (report, said) = bench.ends_well();
    assert_eq!(report["guest"]["verified_pages"], 64 * 256, "{said}");
    let pressure = &report["destination_memory"];
    assert_eq!(pressure["limit_bytes"], 64 << 20);
    let v1 = Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists();
    assert_eq!(pressure["cgroup"], if v1 { "v1" } else { "v2" }, "{pressure}");
    assert!(is_positive(&pressure["pswpout"]), "{pressure}");
    let neighbours = pressure["neighbours"].as_array().expect("an array");
    assert_eq!(neighbours.len(), 2);
    for neighbour in neighbours {
        assert!(is_positive(&neighbour["passes_per_s_before"]), "{neighbour}");
    }
    let left = std::fs::read_dir(bench.directory.path()).expect("there").flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).filter(|name| name != "events").collect();
    assert!(left.is_empty(), "{left:?}");
}
