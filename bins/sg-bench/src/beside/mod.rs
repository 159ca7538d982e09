//! What shares hosts with a migration and is measured before it and during it: co-tenants (a service, and its client
//! on a further host) and memory-hungry neighbours. Each is a process of its own: this executable again.

pub mod client;
pub mod neighbour;
pub mod service;
mod told;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use libsg::report::{Cotenant, Neighbour, Pressure};
use libsg::units::Size;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use crate::cli::MigrateArgs;
use crate::interrupt;
use crate::lab::memory::Swap;
use crate::lab::{Lab, Node};
use crate::process::Process;
use told::{Answers, Pass, now_ns, passes_per_s};

const PORT: u16 = 7790;
/// How long co-tenants are measured before the migration, after as much to get going.
const BEFORE: Duration = Duration::from_millis(2500);
const GET_GOING: Duration = Duration::from_millis(300);
/// Passes of each neighbour before the migration, and how long they may take on a swapping machine.
const PASSES_BEFORE: usize = 3;
const PASSES_LIMIT: Duration = Duration::from_secs(180);
/// How long requests of the last moment may take to be answered before they count as they stand.
const ANSWERS_LIMIT: Duration = Duration::from_secs(2);
const RECENT_NS: u64 = 1_000_000_000;

/// From when to when, by the monotonic clock.
type Window = (u64, u64);

/// Everything beside the migration of one run.
pub struct Beside {
    cotenants: Vec<Tenant>,
    neighbours: Vec<Worker>,
    /// Requests a second.
    rate: u32,
    neighbour_memory: Size,
    before: Window,
    swap_at_start: Option<Swap>,
}

struct Tenant {
    node: Node,
    client: Process,
    told: Arc<Mutex<Answers>>,
    /// Ended after its client.
    _service: Process,
}

struct Worker {
    process: Process,
    passes: Arc<Mutex<Vec<Pass>>>,
}

impl Beside {
    /// Starts it all.
    ///
    /// # Errors
    /// When a host cannot be entered, or there is no such host.
    pub fn start(lab: &Lab, args: &MigrateArgs) -> Result<Self> {
        let mut beside = Self {
            cotenants: Vec::new(),
            neighbours: Vec::new(),
            rate: args.cotenant_rate,
            neighbour_memory: args.neighbour_memory,
            before: (0, 0),
            swap_at_start: None,
        };
        for number in 0..args.neighbours {
            beside.neighbours.push(Worker::start(lab, number, args)?);
        }
        for node in args.cotenants() {
            ensure!(lab.nodes().contains(&node), "there is no {node} in this experiment for a co-tenant");
            beside.cotenants.push(Tenant::start(lab, node, args.cotenant_rate)?);
        }
        Ok(beside)
    }

    /// Lets it work by itself for as long as it takes to know what it does undisturbed.
    ///
    /// # Errors
    /// Something of it ended, a neighbour takes for ever, or interrupted.
    pub fn measure_before(&mut self) -> Result<()> {
        if !self.cotenants.is_empty() {
            interrupt::sleep(GET_GOING)?;
        }
        let (from_ns, until) = (now_ns(), Instant::now() + PASSES_LIMIT);
        let has_passed = |worker: &Worker| {
            worker.passes.lock().iter().filter(|pass| pass.end_ns > from_ns).count() >= PASSES_BEFORE
        };
        while !self.neighbours.iter().all(has_passed) {
            self.check()?;
            if Instant::now() > until {
                bail!("the neighbours' memory does not fit: {PASSES_BEFORE} passes take too long");
            }
            interrupt::sleep(Duration::from_millis(50))?;
        }
        let measured = Duration::from_nanos(now_ns() - from_ns);
        if !self.cotenants.is_empty() {
            interrupt::sleep(BEFORE.saturating_sub(measured))?;
        }
        self.before = (from_ns, now_ns());
        self.check()
    }

    /// The migration starts.
    pub fn note_start(&mut self, lab: &Lab) {
        self.swap_at_start = lab.memory().map(crate::lab::MemoryLimit::swap);
    }

    /// Fails when something of it has ended.
    pub fn check(&self) -> Result<()> {
        self.cotenants.iter().try_for_each(|tenant| tenant.client.check())?;
        self.neighbours.iter().try_for_each(|worker| worker.process.check())
    }

    /// What 19 of 20 answers of the last second took at most, by host.
    pub fn recent_p95_us(&self) -> BTreeMap<String, f64> {
        let recent = |tenant: &Tenant| {
            let told = tenant.told.lock();
            let window = (told.at_ns.saturating_sub(RECENT_NS), told.at_ns);
            Some((tenant.node.to_string(), told.latencies(window, self.period_ns()).p95_us?))
        };
        self.cotenants.iter().filter_map(recent).collect()
    }

    /// Of each co-tenant, for a migration that began so long ago, had evicted so long after its start, and ended so
    /// long after it.
    pub fn cotenants(&self, start: Instant, evicted: Option<Duration>, end: Duration) -> Vec<Cotenant> {
        let window = |end: Duration| window(start, end);
        let whole = window(end);
        let until = Instant::now() + ANSWERS_LIMIT;
        let late = |tenant: &Tenant| tenant.told.lock().complete_until_ns < whole.1;
        // Without answers (its link was cut, say) they count as they stand.
        while self.cotenants.iter().any(late) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let of = |tenant: &Tenant| {
            let told = tenant.told.lock();
            let latencies = |window| told.latencies(window, self.period_ns());
            Cotenant {
                node: tenant.node.to_string(),
                requests_per_s: f64::from(self.rate),
                answer_bytes: service::ANSWER_BYTES as u64,
                idle: latencies(self.before),
                scattering: evicted.map(|evicted| latencies(window(evicted))).unwrap_or_default(),
                migration: latencies(whole),
            }
        };
        self.cotenants.iter().map(of).collect()
    }

    /// The destination's memory pressure, if it is limited; of a migration as above.
    pub fn pressure(&self, lab: &Lab, start: Instant, end: Duration) -> Option<Pressure> {
        let (memory, before) = (lab.memory()?, self.swap_at_start?);
        let now = memory.swap();
        let during = window(start, end);
        let more = |of: fn(&Swap) -> Option<u64>| Some(of(&now)?.saturating_sub(of(&before)?));
        let neighbour = |worker: &Worker| {
            let passes = worker.passes.lock();
            Neighbour {
                memory_bytes: self.neighbour_memory.0,
                passes_per_s_before: passes_per_s(&passes, self.before),
                passes_per_s_during: passes_per_s(&passes, during),
            }
        };
        Some(Pressure {
            cgroup: memory.version().name().to_owned(),
            limit_bytes: memory.limit().0,
            pswpin: more(|swap| swap.in_pages),
            pswpout: more(|swap| swap.out_pages),
            counted: now.counted.to_owned(),
            swap_bytes: now.held_bytes,
            neighbours: self.neighbours.iter().map(neighbour).collect(),
        })
    }

    fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.rate)
    }
}

/// By the monotonic clock: from the start to so long after it.
fn window(start: Instant, length: Duration) -> Window {
    let from_ns = now_ns().saturating_sub(start.elapsed().as_nanos() as u64);
    (from_ns, from_ns + length.as_nanos() as u64)
}

impl Tenant {
    fn start(lab: &Lab, node: Node, rate: u32) -> Result<Self> {
        let address = SocketAddr::new(lab.address(node), PORT);
        let arguments = ["beside", "service", "--listen", &address.to_string()].map(str::to_owned);
        let service = spawn(lab, node, &format!("cotenant-{node}"), &arguments, |(): ()| {})?;
        let arguments = ["beside", "client", "--to", &address.to_string(), "--rate", &rate.to_string()];
        let told = Arc::new(Mutex::new(Answers::default()));
        let to = Arc::clone(&told);
        let name = format!("client-of-{node}");
        let add = move |answers: Answers| to.lock().add(answers);
        let client = spawn(lab, Node::Client, &name, &arguments.map(str::to_owned), add)?;
        Ok(Self { node, client, told, _service: service })
    }
}

impl Worker {
    fn start(lab: &Lab, number: u8, args: &MigrateArgs) -> Result<Self> {
        let (memory, seed) =
            (args.neighbour_memory.0.to_string(), (args.vm.seed + u64::from(number)).to_string());
        let words = ["beside", "neighbour", "--memory", &memory, "--seed", &seed].map(str::to_owned);
        let mut arguments = words.to_vec();
        if let Some(limit) = lab.memory() {
            arguments.extend(["--procs".to_owned(), limit.procs().display().to_string()]);
        }
        let passes = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&passes);
        let name = format!("neighbour-{}", number + 1);
        let process = spawn(lab, Node::Destination, &name, &arguments, move |pass| to.lock().push(pass))?;
        Ok(Self { process, passes })
    }
}

/// This executable again, on a host; `on_line` gets what it tells.
fn spawn<T: DeserializeOwned>(
    lab: &Lab,
    node: Node,
    name: &str,
    arguments: &[String],
    on_line: impl Fn(T) + Send + 'static,
) -> Result<Process> {
    let take = move |line: &str| match serde_json::from_str(line) {
        Ok(told) => on_line(told),
        Err(error) => tracing::warn!("{line:?} is not what was to be told: {error}"),
    };
    Process::spawn(lab, node, name, "sg-bench", arguments, take)
}
