//! The processes of a run on their hosts: intermediaries, and a pair of VMMs for each VM.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::json;

use crate::cli::MigrateArgs;
use crate::events::Events;
use crate::interrupt;
use crate::lab::{Lab, Node};
use crate::process::Process;
use libsg::transport::PoolSecret;
use libsg::units::Size;
use libsg::vmd::{TcpConnector, Vmd as _, VmdClient};
use libsg::wire::message::NodeStatistics;
use vmms::{Control, ControlSocket, Divider};

pub const DESTINATION_PORT: u16 = 7700;
pub const INTERMEDIARY_PORT: u16 = 7701;
/// Ports between the destinations of two VMs.
const PORT_STEP: u16 = 10;

/// How long a process may take until it serves; filling memory is added to it.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a VMM may take to end: its intermediaries are told first that their memory is free.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long an intermediary may take to tell of itself: one that is stopped does not.
const TELL_LIMIT: Duration = Duration::from_millis(200);
/// How fast a guest fills its memory at least, on a busy machine.
const FILL_BYTES_PER_S: u64 = 64 << 20;

/// One end of one VM.
pub struct Vmm {
    /// The process.
    pub process: Process,
    /// Its socket.
    pub control: Control,
    socket: PathBuf,
}

/// Both ends of one VM.
pub struct Pair {
    /// Where it starts.
    pub source: Vmm,
    /// Where it goes.
    pub destination: Vmm,
    to: SocketAddr,
}

/// All of them.
pub struct Cluster {
    /// `i1`, `i2`, …
    pub intermediaries: Vec<Process>,
    /// One for each VM.
    pub pairs: Vec<Pair>,
    peers: Vec<SocketAddr>,
    secret: PoolSecret,
    /// One for each source host that several VMs leave.
    dividers: Vec<Divider>,
}

impl Cluster {
    /// Starts everything and waits until the guests have filled their memory and everybody listens.
    pub fn start(lab: &Lab, args: &MigrateArgs, events: &Arc<Events>) -> Result<Self> {
        let secret = secret(lab)?;
        let pool = PoolSecret::from_file(Path::new(&secret))?;
        let (intermediaries, pairs, peers, dividers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut cluster = Self { intermediaries, pairs, peers, secret: pool, dividers };
        for &node in lab.nodes() {
            if let Some(namespace) = lab.namespace(node) {
                events.add_link(node, namespace);
            }
            if matches!(node, Node::Intermediary(_)) && args.has_intermediaries() {
                cluster.add_intermediary(lab, node, args, &secret, events)?;
            }
        }
        for vm in 0..usize::from(args.vms) {
            cluster.add_pair(lab, vm, args, &secret, events)?;
        }
        cluster.wait_until_ready(lab, args)?;
        Ok(cluster)
    }

    fn add_intermediary(
        &mut self,
        lab: &Lab,
        node: Node,
        args: &MigrateArgs,
        secret: &str,
        events: &Events,
    ) -> Result<()> {
        let name = node.to_string();
        let address = SocketAddr::new(lab.address(node), INTERMEDIARY_PORT);
        // Each could take everything alone, with a quarter to spare.
        let memory = Size(args.vm.memory.0 * u64::from(args.vms) / 4 * 5);
        let serve = format!("serve --memory {} --listen {address} --name {name}", memory.0);
        let arguments = words(&format!("{serve} --transport {}", args.transport))
            .chain(["--secret".into(), secret.into()])
            .collect::<Vec<_>>();
        let process = Process::spawn(lab, node, &name, "sg", &arguments, |_| {})?;
        events.add_process(node, process.pid())?;
        self.intermediaries.push(process);
        self.peers.push(address);
        Ok(())
    }

    fn add_pair(
        &mut self,
        lab: &Lab,
        vm: usize,
        args: &MigrateArgs,
        secret: &str,
        events: &Arc<Events>,
    ) -> Result<()> {
        let port = DESTINATION_PORT + PORT_STEP * u16::try_from(vm)?;
        let to = SocketAddr::new(lab.address(Node::Destination), port);
        let what = &args.vm;
        let waits = match args.park {
            true => format!("--empty --gather-limit {}", args.gather_limit),
            false => format!("--incoming {to}"),
        };
        let transport = args.transport;
        let incoming =
            format!("run {waits} --vcpu {} --backing {} --transport {transport}", what.vcpu, what.backing);
        let outgoing = format!(
            "run --transport {transport} --memory {} --workload {} --working-set {} --write-rate {} --zero-fraction {} --common {} \
             --vcpus {} --vcpu {} --backing {} --seed {} --name vm{vm}",
            what.memory.0,
            what.workload,
            what.working_set.unwrap_or(Size(0)).0,
            what.write_rate,
            what.zero_fraction,
            what.common,
            what.vcpus,
            what.vcpu,
            what.backing,
            what.seed + vm as u64,
        );
        let destination =
            Vmm::spawn(lab, (Node::Destination, Node::Destination), vm, &incoming, secret, events)?;
        if let Some(memory) = lab.memory() {
            memory.admit(destination.process.pid().as_raw_pid().cast_unsigned())?;
        }
        let host = match vm % usize::from(args.lab.source_hosts) {
            0 => Node::Source,
            n => Node::FurtherSource(u8::try_from(n + 1)?),
        };
        let source = Vmm::spawn(lab, (Node::Source, host), vm, &outgoing, secret, events)?;
        self.pairs.push(Pair { source, destination, to });
        Ok(())
    }

    fn wait_until_ready(&mut self, lab: &Lab, args: &MigrateArgs) -> Result<()> {
        let filling = Duration::from_secs(args.vm.memory.0 * u64::from(args.vms) / FILL_BYTES_PER_S);
        let until = Instant::now() + START_LIMIT + filling;
        for (process, address) in self.intermediaries.iter().zip(&self.peers) {
            wait_for(process, until, || {
                lab.on(Node::Source, || TcpStream::connect_timeout(address, Duration::from_secs(1)).is_ok())
            })?;
        }
        for pair in &mut self.pairs {
            for vmm in [&mut pair.destination, &mut pair.source] {
                let (socket, control) = (&vmm.socket, &mut vmm.control);
                wait_for(&vmm.process, until, || {
                    Ok(socket.exists()
                        && control.request(&json!({"do": "report"}), Duration::from_secs(5)).is_ok())
                })?;
            }
        }
        Ok(())
    }

    /// Has every VM start to leave; the time at which the first was told.
    pub fn go(&mut self, args: &MigrateArgs) -> Result<Instant> {
        for pair in &mut self.pairs {
            // A VM that is parked is told its limit when it is claimed.
            if !args.gather_limit.is_unlimited() && !args.park {
                let limit = json!({"do": "limit", "gather": args.gather_limit.to_string()});
                pair.destination.control.request(&limit, START_LIMIT)?;
            }
        }
        let start = Instant::now();
        let intermediaries = self.peers();
        for (vm, pair) in self.pairs.iter_mut().enumerate() {
            let to = (!args.park).then(|| pair.to.to_string());
            let request = json!({
                "do": "start", "mode": args.mode.name(), "to": to, "park": args.park.then(|| parked_as(vm)),
                "intermediaries": intermediaries, "rounds": args.rounds, "via": args.via.name(),
                "downtime_limit_ms": args.downtime_limit, "replicas": args.replicas,
                "dedup": args.dedup.then(|| json!({})),
            });
            pair.source.control.request(&request, START_LIMIT)?;
        }
        self.divide_links(usize::from(args.lab.source_hosts))?;
        Ok(start)
    }

    /// Where several VMs leave a host, its link is divided among them, as `sg evict` does it.
    fn divide_links(&mut self, hosts: usize) -> Result<()> {
        for host in 0..hosts {
            let leaving: Vec<&Pair> = self.pairs.iter().skip(host).step_by(hosts).collect();
            if leaving.len() > 1 {
                let mut divider = Divider::new();
                for pair in leaving {
                    divider.add(Box::new(ControlSocket::new(&pair.source.socket)), None)?;
                }
                self.dividers.push(divider);
            }
        }
        Ok(())
    }

    /// Has every VM that was parked be claimed.
    pub fn claim(&mut self) -> Result<()> {
        let intermediaries = self.peers();
        for (vm, pair) in self.pairs.iter_mut().enumerate() {
            let request = json!({"do": "claim", "claim": parked_as(vm), "intermediaries": intermediaries});
            pair.destination.control.request(&request, START_LIMIT)?;
        }
        Ok(())
    }

    /// What the intermediaries say of themselves; nothing of those that do not answer.
    pub fn statistics(&self, lab: &Lab) -> Vec<NodeStatistics> {
        let vmd = VmdClient::new(Arc::new(TcpConnector::new(self.secret.clone())), TELL_LIMIT);
        // Asked on its own host: whatever its link does.
        let ask = |(number, address): (u8, &SocketAddr)| {
            lab.on(Node::Intermediary(number), || vmd.statistics(*address)).ok()?.ok()
        };
        (1..).zip(&self.peers).filter_map(ask).collect()
    }

    fn peers(&self) -> Vec<String> {
        self.peers.iter().map(ToString::to_string).collect()
    }

    /// Takes the gather limits off.
    pub fn lift(&mut self) -> Result<()> {
        for pair in &mut self.pairs {
            pair.destination.control.request(&json!({"do": "limit", "gather": "0"}), START_LIMIT)?;
        }
        Ok(())
    }

    /// Ends every process in order: the VMMs, then the intermediaries by SIGTERM, which they refuse while they hold
    /// pages of a volume. Where such are left, as the run was over before everything was gathered, they are
    /// killed.
    pub fn stop(mut self, pages_are_left: bool) -> Result<()> {
        let mut ending = Vec::new();
        for pair in &mut self.pairs {
            for vmm in [&mut pair.source, &mut pair.destination] {
                // One that does not answer is killed when it is dropped.
                if !vmm.process.has_ended() && vmm.control.ask("quit").is_ok() {
                    ending.push(&vmm.process);
                }
            }
        }
        for process in ending {
            process.wait(END_LIMIT)?;
        }
        for process in &self.intermediaries {
            process.signal(Signal::TERM)?;
        }
        if pages_are_left {
            return Ok(());
        }
        for process in &self.intermediaries {
            if !process.wait(Duration::from_secs(2))? {
                tracing::warn!("{} does not end: it still holds pages of a volume", process.name);
            }
        }
        Ok(())
    }

    /// The ends of the logs of all processes that ended, or of all.
    pub fn logs(&self) -> String {
        let vmms = self.pairs.iter().flat_map(|pair| [&pair.source.process, &pair.destination.process]);
        vmms.chain(&self.intermediaries).map(Process::log_tail).collect()
    }
}

impl Vmm {
    /// On `host`, in the role of the first such host: what it tells is told of that end.
    fn spawn(
        lab: &Lab,
        (node, host): (Node, Node),
        vm: usize,
        arguments: &str,
        secret: &str,
        events: &Arc<Events>,
    ) -> Result<Self> {
        let name = if vm == 0 { node.to_string() } else { format!("{node}-{}", vm + 1) };
        let socket = lab.directory().join(format!("{name}.control"));
        let arguments: Vec<String> = words(arguments)
            .chain(["--secret".into(), secret.into(), "--control".into(), socket.display().to_string()])
            .collect();
        let told = Arc::clone(events);
        let process =
            Process::spawn(lab, host, &name, "sg-vmm", &arguments, move |line| told.line(vm, node, line))?;
        events.add_process(host, process.pid())?;
        Ok(Self { control: Control::new(&socket), process, socket })
    }
}

/// A secret for the run, in a file that only its owner reads; where that is.
pub fn secret(lab: &Lab) -> Result<String> {
    let secret = lab.directory().join("secret");
    let bytes: [u8; 32] = libsg::ids::random_bytes()?;
    let text = bytes.map(|byte| format!("{byte:02x}")).concat();
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&secret)?;
    file.write_all(text.as_bytes())?;
    Ok(secret.display().to_string())
}

/// The name under which a VM is parked.
fn parked_as(vm: usize) -> String {
    format!("vm{vm}")
}

/// The words of a command.
pub fn words(line: &str) -> impl Iterator<Item = String> + '_ {
    line.split_whitespace().map(str::to_owned)
}

fn wait_for(process: &Process, until: Instant, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    while !ready()? {
        process.check().context("a process of the run failed to start")?;
        if Instant::now() > until {
            bail!("{} does not get ready:\n{}", process.name, process.log_tail());
        }
        interrupt::sleep(Duration::from_millis(10))?;
    }
    Ok(())
}
