//! A small world of real processes on loopback: intermediaries, VMMs, and proxies that can be cut. All of them
//! end with the test, however it ends; nothing here waits without a bound.

pub mod proxy;

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::free_address;

use crate::places::Place;

/// What nothing takes as long as, on a busy machine: not a measure of speed, but of a hang.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A rate at which a source sends so little that a test does what it does in the middle, however busy the machine is.
pub const SLOWLY: &str = "24mbit";

/// Where everything of one test lives.
pub struct World {
    pub directory: tempfile::TempDir,
    pub intermediaries: Vec<Daemon>,
    _place: Place,
}

/// A process; killed and reaped when dropped.
pub struct Process {
    name: String,
    child: RefCell<Child>,
    log: PathBuf,
    lines: Receiver<Value>,
    seen: RefCell<Vec<Value>>,
}

/// `sg serve`.
pub struct Daemon {
    pub process: Process,
    pub address: SocketAddr,
}

/// `sg-vmm run`.
pub struct Vmm {
    pub process: Process,
    control: RefCell<BufReader<UnixStream>>,
    /// Its control socket.
    pub socket: PathBuf,
    /// Where it waits for a VM, if it does.
    pub address: SocketAddr,
}

impl World {
    /// With so many intermediaries, each with these arguments.
    pub fn new(intermediaries: usize, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let mut world = Self { directory, intermediaries: Vec::new(), _place: Place::take() };
        for number in 1..=intermediaries {
            world.serve(&format!("i{number}"), arguments);
        }
        world
    }

    /// One more intermediary.
    pub fn serve(&mut self, name: &str, arguments: &[&str]) {
        let mut command = program("sg");
        command.args(["serve", "--name", name]);
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if !arguments.contains(&"--memory") {
            command.args(["--memory", "256M"]);
        }
        let process = Process::spawn(name, command.args(arguments), self.directory.path());
        let line = process.wait("listening");
        let address = line["address"].as_str().and_then(|text| text.parse().ok()).expect("an address");
        self.intermediaries.push(Daemon { process, address });
    }

    /// The intermediaries' addresses.
    pub fn members(&self) -> Vec<SocketAddr> {
        self.intermediaries.iter().map(|daemon| daemon.address).collect()
    }

    /// What `sg` writes about these intermediaries.
    pub fn sg(&self, arguments: &[&str]) -> String {
        let mut command = program("sg");
        command.args(arguments);
        for address in self.members() {
            command.args(["--intermediary", &address.to_string()]);
        }
        String::from_utf8(command.output().expect("sg runs").stdout).expect("text")
    }

    /// Bytes of pages that the intermediaries hold.
    pub fn staged_bytes(&self) -> u64 {
        let status: Value = serde_json::from_str(&self.sg(&["status", "--json"])).expect("JSON");
        let nodes = status["nodes"].as_array().expect("nodes");
        nodes.iter().map(|node| node["used_bytes"].as_u64().unwrap_or_else(|| panic!("{status}"))).sum()
    }

    /// The intermediaries have their memory back, and know of no volume.
    pub fn holds_nothing(&self) {
        let began = Instant::now();
        // A batch that was half received is given back when its connection ends.
        while self.staged_bytes() > 0 {
            assert!(began.elapsed() < PATIENCE, "left behind: {}", self.sg(&["ls"]));
            std::thread::sleep(Duration::from_millis(20));
        }
        let volumes: Value = serde_json::from_str(&self.sg(&["ls", "--json"])).expect("JSON");
        assert_eq!(volumes["volumes"], json!([]));
    }

    /// A VM that runs here, of threads unless the arguments say otherwise.
    pub fn vm(&self, name: &str, arguments: &str) -> Vmm {
        let mut words: Vec<&str> = arguments.split_whitespace().collect();
        for (flag, value) in
            [("--vcpu", "thread"), ("--memory", "32M"), ("--write-rate", "5000"), ("--workload", "random")]
        {
            if !words.contains(&flag) {
                words.extend([flag, value]);
            }
        }
        self.vmm(name, &words, (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// A process that waits for a VM.
    pub fn incoming(&self, name: &str, arguments: &str) -> Vmm {
        let address = free_address();
        let at = address.to_string();
        let mut words: Vec<&str> = arguments.split_whitespace().collect();
        words.extend(["--vcpu", "thread", "--incoming", &at]);
        self.vmm(name, &words, address)
    }

    /// A process that claims a parked VM, asking the intermediaries.
    pub fn claim(&self, name: &str, parked: &str, arguments: &str) -> Vmm {
        let asked = self.asked();
        let words = ["--claim", parked].into_iter().chain(asked.iter().map(String::as_str));
        let words: Vec<&str> = words.chain(arguments.split_whitespace()).collect();
        self.vmm(name, &words, (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// What a process says that claims a parked VM in vain.
    pub fn claims_in_vain(&self, name: &str, parked: &str, arguments: &str) -> String {
        let mut command = program("sg-vmm");
        command.args(["run", "--claim", parked]).args(self.asked()).args(arguments.split_whitespace());
        let process = Process::spawn(name, &mut command, self.directory.path());
        assert_eq!(process.exit_code(), Some(1), "{}", process.log());
        process.log()
    }

    fn asked(&self) -> Vec<String> {
        let ask = |address: SocketAddr| ["--intermediary".to_owned(), address.to_string()];
        self.members().into_iter().flat_map(ask).collect()
    }

    fn vmm(&self, name: &str, arguments: &[&str], address: SocketAddr) -> Vmm {
        let socket = self.directory.path().join(format!("{name}.control"));
        let mut command = program("sg-vmm");
        command.arg("run").args(arguments).arg("--control").arg(&socket);
        let process = Process::spawn(name, &mut command, self.directory.path());
        let control = RefCell::new(process.connect(&socket));
        Vmm { process, control, socket, address }
    }
}

fn program(name: &str) -> Command {
    let directory = Path::new(env!("CARGO_BIN_EXE_sg-bench")).parent().expect("a directory");
    let path = directory.join(name);
    assert!(path.is_file(), "no {}: cargo build --workspace --bins makes it", path.display());
    Command::new(path)
}

impl Process {
    fn spawn(name: &str, command: &mut Command, directory: &Path) -> Self {
        let log = directory.join(format!("{name}.log"));
        let stderr = File::create(&log).expect("log");
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().expect("starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = serde_json::from_str(&line).map(|line| sender.send(line));
            }
        });
        let (child, seen) = (RefCell::new(child), RefCell::default());
        Self { name: name.into(), child, log, lines, seen }
    }

    pub fn connect(&self, socket: &Path) -> BufReader<UnixStream> {
        let began = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                return BufReader::new(stream);
            }
            assert!(
                began.elapsed() < PATIENCE && !self.has_ended(),
                "{} does not start: {}",
                self.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.borrow().id()
    }

    pub fn has_ended(&self) -> bool {
        self.child.borrow_mut().try_wait().expect("waits").is_some()
    }

    pub fn exit_code(&self) -> Option<i32> {
        let began = Instant::now();
        while !self.has_ended() {
            assert!(began.elapsed() < PATIENCE, "{} does not end: {}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.borrow_mut().wait().expect("waits").code()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child.borrow()), signal).expect("signalled");
    }

    pub fn kill(&self) {
        self.signal(Signal::KILL);
        self.child.borrow_mut().wait().expect("waits");
    }

    /// Whether it logged this.
    pub fn log_has(&self, part: &str) -> bool {
        std::fs::read_to_string(&self.log).unwrap_or_default().contains(part)
    }

    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(30).collect();
        let events: Vec<String> = self.seen.borrow().iter().map(brief).collect();
        format!(
            "\n{}\n{} told: {}\n",
            tail.into_iter().rev().collect::<Vec<_>>().join("\n"),
            self.name,
            events.join(", ")
        )
    }

    /// Waits for an event; returns its line. One that was told before counts.
    pub fn wait(&self, event: &str) -> Value {
        self.wait_for(event, |line| line["event"] == event)
    }

    /// Waits for `scattered` or `gathering` of so many percent.
    pub fn wait_percent(&self, event: &str, percent: u64) -> Value {
        self.wait_for(&format!("{event}={percent}%"), |line| {
            line["event"] == event && line["percent"].as_u64() >= Some(percent)
        })
    }

    /// Waits for an event with this in its message.
    pub fn wait_message(&self, event: &str, part: &str) -> Value {
        self.wait_for(&format!("{event} of {part}"), |line| says(line, event, part))
    }

    fn wait_for(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        if let Some(line) = self.seen.borrow().iter().find(|line| is_it(line)) {
            return line.clone();
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("{} does not tell {what}: {}", self.name, self.log());
            };
            self.seen.borrow_mut().push(line.clone());
            if is_it(&line) {
                return line;
            }
        }
    }

    /// Every line so far.
    pub fn told(&self) -> Vec<Value> {
        self.seen.borrow_mut().extend(self.lines.try_iter());
        self.seen.borrow().clone()
    }

    /// Whether it told of this event, with this in its message.
    pub fn has_told(&self, event: &str, part: &str) -> bool {
        self.told().iter().any(|line| says(line, event, part))
    }
}

fn says(line: &Value, event: &str, part: &str) -> bool {
    line["event"] == event && line["message"].as_str().unwrap_or_default().contains(part)
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.borrow_mut().kill();
        let _ = self.child.borrow_mut().wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn brief(line: &Value) -> String {
    let more = line["percent"].as_u64().map(|p| format!("={p}%"));
    let more = more.or_else(|| line["message"].as_str().map(|m| format!(" ({m})"))).unwrap_or_default();
    format!("{:.2}s {}{more}", line["t_s"].as_f64().unwrap_or(0.0), line["event"].as_str().unwrap_or("?"))
}

impl Vmm {
    /// The answer to a request, refusals included.
    pub fn ask(&self, request: &Value) -> Value {
        let mut control = self.control.borrow_mut();
        writeln!(control.get_mut(), "{request}").expect("sent");
        let mut answer = String::new();
        control
            .read_line(&mut answer)
            .unwrap_or_else(|error| panic!("{request}: {error}: {}", self.process.log()));
        serde_json::from_str(&answer)
            .unwrap_or_else(|_| panic!("{request}: {answer:?}: {}", self.process.log()))
    }

    /// Starts to leave.
    pub fn leave(&self, to: SocketAddr, members: &[SocketAddr]) {
        self.leave_by("scatter-gather", to, members);
    }

    /// Starts to leave for nobody yet.
    pub fn park(&self, name: &str, mode: &str, members: &[SocketAddr]) {
        let members: Vec<String> = members.iter().map(ToString::to_string).collect();
        let answer = self.ask(&json!({"do": "start", "mode": mode, "park": name, "intermediaries": members}));
        assert_eq!(answer["ok"], true, "{answer}");
    }

    /// Starts to leave in this mode.
    pub fn leave_by(&self, mode: &str, to: SocketAddr, members: &[SocketAddr]) {
        self.leave_at(mode, to, members, "0");
    }

    /// Starts to leave in this mode, [`SLOWLY`] until it [`Self::hurries`].
    pub fn leave_slowly(&self, mode: &str, to: SocketAddr, members: &[SocketAddr]) {
        self.leave_at(mode, to, members, SLOWLY);
    }

    fn leave_at(&self, mode: &str, to: SocketAddr, members: &[SocketAddr], scatter: &str) {
        let members: Vec<String> = members.iter().map(ToString::to_string).collect();
        let to = to.to_string();
        let start =
            json!({"do": "start", "mode": mode, "to": to, "intermediaries": members, "scatter": scatter});
        let answer = self.ask(&start);
        assert_eq!(answer["ok"], true, "{answer}");
    }

    /// What is left goes as fast as it can.
    pub fn hurries(&self) {
        let answer = self.ask(&json!({"do": "limit", "scatter": "0"}));
        assert_eq!(answer["ok"], true, "{answer}");
    }

    /// The guest reads every page: none is wrong, none is left out.
    pub fn verify(&self, memory_mib: u64) {
        let answer = self.ask(&json!({"do": "verify"}));
        let guest = &answer["guest"];
        assert_eq!(guest["mismatches"], 0, "{answer}: {}", self.process.log());
        assert_eq!(guest["verified_pages"], memory_mib * 256, "{answer}: {}", self.process.log());
    }

    /// The guest goes on doing operations.
    pub fn goes_on(&self) {
        let ops = || self.ask(&json!({"do": "stats"}))["guest"].clone();
        let (began, before) = (Instant::now(), ops());
        while ops()["guest_ops"] == before["guest_ops"] && ops()["ops"] == before["ops"] {
            assert!(began.elapsed() < PATIENCE, "the guest stands still: {before}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything has arrived and is right.
    pub fn arrived(&self, memory_mib: u64) {
        self.process.wait("gathered");
        self.verify(memory_mib);
        self.goes_on();
        let report = self.ask(&json!({"do": "report"}));
        assert_eq!(report["status"], "ok", "{report}");
        assert!(!self.process.told().iter().any(|line| line["event"] == "lost"));
    }

    /// Everything has arrived and is right, and is left nowhere else.
    pub fn arrived_whole(&self, world: &World, memory_mib: u64) {
        self.arrived(memory_mib);
        self.process.wait("dissolved");
        world.holds_nothing();
        self.quit(0);
    }

    /// Quits, with this exit code.
    pub fn quit(&self, code: i32) {
        self.ask(&json!({"do": "quit"}));
        assert_eq!(self.process.exit_code(), Some(code), "{}", self.process.log());
    }
}
