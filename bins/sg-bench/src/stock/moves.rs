//! The ways in which a VM of a stock QEMU moves: by its own migration, and by `sg evict` and `sg gather`.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use libsg::report::{Report, SCHEMA};
use qemu::Qmp;
use serde_json::{Value, json};

use super::machine::Host;
use crate::cli::{StockArgs, StockMode};
use crate::cluster::{DESTINATION_PORT, INTERMEDIARY_PORT, secret, words};
use crate::error::chained;
use crate::interrupt;
use crate::lab::{Lab, Node};
use crate::process::Process;

/// Where `socat` listens on the source's host.
const RELAY_PORT: u16 = 7799;
/// How long anything may take until it is ready.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a move may take.
const MOVE_LIMIT: Duration = Duration::from_secs(600);
/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(5);
/// Next to nothing.
const LEAST_BYTES_PER_S: u64 = 4096;
/// As much as there is, for a QEMU.
const UNLIMITED_BYTES_PER_S: u64 = 10 << 30;

/// By QEMU itself: pre-copy, or post-copy from the start on.
pub fn by_itself(lab: &Lab, args: &StockArgs, from: &Host, there: &Host) -> Result<Report> {
    let to = SocketAddr::new(lab.address(Node::Destination), DESTINATION_PORT);
    let (mut source, mut destination) = (from.connect()?, there.connect()?);
    let post_copy = args.mode == StockMode::PostCopy;
    ensure!(
        post_copy || source.version().major >= 10,
        "a QEMU {} that pre-copies a guest that writes corrupts it under software emulation: put 10.0 in front of PATH \
         (PATH=$(ci/qemu-10):$PATH)",
        source.version()
    );
    let capabilities = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": post_copy }] });
    for qmp in [&mut source, &mut destination] {
        ask(qmp, "migrate-set-capabilities", &capabilities)?;
    }
    // Of post-copy nothing goes before the switch: what a QEMU before 9.0 sends there of an emulated guest may be out of date.
    let before_switch = if post_copy { LEAST_BYTES_PER_S } else { UNLIMITED_BYTES_PER_S };
    let parameters = json!({ "max-bandwidth": before_switch, "max-postcopy-bandwidth": 0 });
    ask(&mut source, "migrate-set-parameters", &parameters)?;
    ask(&mut destination, "migrate-incoming", &json!({ "uri": format!("tcp:{to}") }))?;
    let socat = args.socat.then(|| relay(lab, to)).transpose()?;
    let to = if args.socat { SocketAddr::from(([127, 0, 0, 1], RELAY_PORT)) } else { to };

    let start = Instant::now();
    ask(&mut source, "migrate", &json!({ "uri": format!("tcp:{to}") }))?;
    if post_copy {
        ask(&mut source, "migrate-start-postcopy", &json!({}))?;
    }
    let mut source_cpu_s = None;
    let until = start + MOVE_LIMIT;
    loop {
        let told = ask(&mut source, "query-migrate", &json!({}))?;
        // It is gone a moment after the stream is.
        source_cpu_s = socat.as_ref().and_then(|socat| socat.usage().cpu_s).or(source_cpu_s);
        match told["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled" | "postcopy-paused") => bail!("QEMU's own migration: {told}"),
            _ => {}
        }
        ensure!(Instant::now() < until, "QEMU's own migration takes too long: {told}");
        interrupt::sleep(LOOK)?;
    }
    let took_s = start.elapsed().as_secs_f64();
    let mut report = Report { schema: SCHEMA, ..Report::default() };
    (report.eviction_s, report.total_migration_s) = (Some(took_s), Some(took_s));
    report.cpu_s.source = source_cpu_s;
    Ok(report)
}

/// A plain copy of the stream from one socket to another, at the source.
fn relay(lab: &Lab, to: SocketAddr) -> Result<Process> {
    let arguments = words(&format!("-b 262144 TCP-LISTEN:{RELAY_PORT},bind=127.0.0.1,reuseaddr TCP:{to}"))
        .collect::<Vec<_>>();
    let socat = Process::spawn_at(lab, Node::Source, "socat", Path::new("socat"), &arguments, |_| {})
        .context("socat is needed: apt install socat")?;
    // It takes one connection, so that nobody may try.
    interrupt::sleep(Duration::from_millis(300))?;
    socat.check()?;
    Ok(socat)
}

/// By `sg evict` at the source, `sg gather` at the destination, and `sg serve` at the intermediaries.
pub fn by_us(lab: &Lab, args: &StockArgs, from: &Host, there: &Host) -> Result<Report> {
    let secret = secret(lab)?;
    let nodes = lab.nodes().iter().copied().filter(|node| matches!(node, Node::Intermediary(_)));
    let servers: Vec<Server> =
        nodes.map(|node| Server::start(lab, node, args.memory.0 / 4 * 5, &secret)).collect::<Result<_>>()?;
    let to = SocketAddr::new(lab.address(Node::Destination), DESTINATION_PORT);
    let file = |name: &str| lab.directory().join(name);
    let gathered = file("gathered.json");
    let words_of = |line: &str, json: &Path| {
        let more = ["--secret".into(), secret.clone(), "--json".into(), json.display().to_string()];
        words(line).chain(more).collect::<Vec<_>>()
    };
    let gather =
        format!("gather --qmp {} --listen {to} --gather-limit {}", there.qmp.display(), args.gather_limit);
    let gather = Started::start(lab, Node::Destination, "gather", words_of(&gather, &gathered))?;
    gather.await_listening()?;

    let evicted = file("evicted.json");
    let peers: String = servers.iter().map(|server| format!(" --intermediary {}", server.address)).collect();
    let mode = if args.mode == StockMode::Hybrid { " --mode hybrid" } else { "" };
    let evict = format!("evict --qmp {} --to {to}{mode} --quit{peers}", from.qmp.display());
    let start = Instant::now();
    let evict = Started::start(lab, Node::Source, "evict", words_of(&evict, &evicted))?;
    evict.await_end()?;
    let eviction_s = start.elapsed().as_secs_f64();
    gather.await_end()?;
    let total_s = start.elapsed().as_secs_f64();
    let (mut report, arrived) = (report(&evicted)?, report(&gathered)?);
    // Those who call the command wait for its end, and for what comes before its first byte.
    (report.eviction_s, report.total_migration_s) = (Some(eviction_s), Some(total_s));
    report.cpu_s.destination = arrived.cpu_s.destination;
    report.faults = arrived.faults;
    report.bytes.gathered = arrived.bytes.gathered;
    Ok(report)
}

fn report(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("no report at {}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

struct Server {
    address: SocketAddr,
    _process: Started,
}

impl Server {
    fn start(lab: &Lab, node: Node, bytes: u64, secret: &str) -> Result<Self> {
        let address = SocketAddr::new(lab.address(node), INTERMEDIARY_PORT);
        let line = format!("serve --memory {bytes} --listen {address} --name {node} --secret {secret}");
        let process = Started::start(lab, node, &node.to_string(), words(&line).collect())?;
        process.await_listening()?;
        Ok(Self { address, _process: process })
    }
}

/// An `sg` that runs.
struct Started {
    process: Process,
    /// Whether it has said so.
    listens: Arc<AtomicBool>,
}

impl Started {
    fn start(lab: &Lab, node: Node, name: &str, arguments: Vec<String>) -> Result<Self> {
        let listens = Arc::<AtomicBool>::default();
        let hears = Arc::clone(&listens);
        let process = Process::spawn(lab, node, name, "sg", &arguments, move |line| {
            if line.contains("\"listening\"") {
                hears.store(true, Ordering::Relaxed);
            }
        })?;
        Ok(Self { process, listens })
    }

    fn await_listening(&self) -> Result<()> {
        let until = Instant::now() + START_LIMIT;
        while !self.listens.load(Ordering::Relaxed) {
            self.process.check()?;
            ensure!(
                Instant::now() < until,
                "{} does not listen:\n{}",
                self.process.name,
                self.process.log_tail()
            );
            interrupt::sleep(LOOK)?;
        }
        Ok(())
    }

    fn await_end(&self) -> Result<()> {
        ensure!(
            self.process.wait(MOVE_LIMIT)?,
            "{} takes too long:\n{}",
            self.process.name,
            self.process.log_tail()
        );
        let good = self.process.has_ended_well();
        ensure!(good, "{} failed:\n{}", self.process.name, self.process.log_tail());
        Ok(())
    }
}

fn ask(qmp: &mut Qmp, command: &str, arguments: &Value) -> Result<Value> {
    qmp.execute(command, arguments).map_err(chained)
}
