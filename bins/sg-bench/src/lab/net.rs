//! Network namespaces, one per node, joined by a bridge in a namespace of its own; links shaped by tbf.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::names::Prefix;
use super::node::Node;
use libsg::units::Rate;

/// What stands in front of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Queue {
    /// tbf with a `pfifo_fast` child: what a host's NIC has, urgent packets first.
    Prio,
    /// Plain tbf: one first-in-first-out queue, as in a switch.
    Fifo,
}

/// Which congestion control the namespaces use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CongestionControl {
    /// `bbr`
    Bbr,
    /// `cubic`
    Cubic,
}

impl CongestionControl {
    fn name(self) -> &'static str {
        match self {
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        }
    }
}

/// How long a packet may wait in a plain tbf queue before it is dropped: a shallow switch buffer of
/// 2.5 MB at 1 Gb/s.
const QUEUE_LATENCY_MS: u32 = 20;

/// The largest burst of one sender. A NIC puts packets of several flows on the wire in turn; segments of 64 KiB,
/// which virtual links pass on whole, would hold the link for half a millisecond at 1 Gb/s.
const SEGMENT_BYTES: u32 = 16 << 10;

/// Packets in the queue of a switch port with a `pfifo_fast` child, each up to [`SEGMENT_BYTES`].
const PORT_QUEUE_PACKETS: u32 = 160;

/// One node's link.
pub struct Link {
    /// Whose.
    pub node: Node,
    /// The rate of either direction.
    pub rate: Rate,
}

/// Creates the namespaces and links. What was created when it fails is the caller's to remove.
pub fn create(prefix: &Prefix, links: &[Link], queue: Queue, cc: CongestionControl) -> Result<()> {
    allow(cc)?;
    let switch = prefix.name("switch");
    let mut all = format!("netns add {switch}\n");
    let mut in_switch = String::from("link add name br0 type bridge\nlink set dev br0 up\n");
    for Link { node, .. } in links {
        let host = prefix.name(node);
        writeln!(all, "netns add {host}")?;
        writeln!(all, "link add name eth0 netns {host} type veth peer name {node} netns {switch}")?;
        writeln!(
            in_switch,
            "link set dev {node} txqueuelen {PORT_QUEUE_PACKETS} gso_max_size {SEGMENT_BYTES}"
        )?;
        writeln!(in_switch, "link set dev {node} master br0 up")?;
    }
    batch("ip", None, &all)?;
    batch("ip", Some(&switch), &in_switch)?;
    inside(&switch, bridge_only)?;
    for Link { node, rate } in links {
        let host = prefix.name(node);
        let address = address(*node);
        let commands = format!(
            "link set dev lo up\naddr add {address}/24 dev eth0\n\
             link set dev eth0 gso_max_size {SEGMENT_BYTES} up\n"
        );
        batch("ip", Some(&host), &commands)?;
        shape(&host, "eth0", *rate, queue)?;
        shape(&switch, &node.to_string(), *rate, queue)?;
        inside(&host, || {
            std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", cc.name()).with_context(|| {
                format!("this kernel has no {} (try: modprobe tcp_{})", cc.name(), cc.name())
            })
        })??;
    }
    Ok(())
}

/// Puts a congestion control on the host's list of those that anybody may use: a namespace can have no
/// other as its default. The list is the one thing that a run changes for good.
fn allow(cc: CongestionControl) -> Result<()> {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let name = cc.name();
    let allowed = std::fs::read_to_string(ALLOWED)?;
    if allowed.split_whitespace().any(|one| one == name) {
        return Ok(());
    }
    // Where it is a module, nothing else loads it. What modprobe fails at, the next line fails at too, and says so.
    let _ = Command::new("modprobe").arg(format!("tcp_{name}")).stderr(Stdio::null()).status();
    std::fs::write(ALLOWED, format!("{} {name}", allowed.trim())).with_context(|| {
        format!("the congestion control {name} cannot be allowed: root and the kernel module tcp_{name} are needed")
    })
}

/// A switch has no firewall: where the kernel has one for bridges, every packet would go through it, on a
/// processor that the hosts of the experiment share.
fn bridge_only() {
    for family in ["arptables", "iptables", "ip6tables"] {
        // Without the module there is no such file, and nothing to switch off.
        let _ = std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{family}"), "0");
    }
}

/// The address of a node in its namespace.
pub fn address(node: Node) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(10, 77, 0, node.host_number())
}

fn shape(namespace: &str, device: &str, rate: Rate, queue: Queue) -> Result<()> {
    if rate.is_unlimited() {
        return Ok(());
    }
    // Half a millisecond: what the timers of a busy machine are late must not cost rate.
    let burst = (rate.0 / 8 / 2000).max(2 * u64::from(SEGMENT_BYTES));
    let bits = rate.0;
    let mut commands = format!(
        "qdisc add dev {device} root handle 1: tbf rate {bits}bit burst {burst} latency {QUEUE_LATENCY_MS}ms\n"
    );
    if queue == Queue::Prio {
        writeln!(commands, "qdisc add dev {device} parent 1:1 handle 10: pfifo_fast")?;
    }
    batch("tc", Some(namespace), &commands)
}

/// Lets a node's link go as fast as it can, both ways.
pub fn lift(prefix: &Prefix, node: Node) -> Result<()> {
    let free = |device: &str| format!("qdisc replace dev {device} root pfifo_fast\n");
    batch("tc", Some(&prefix.name(node)), &free("eth0"))?;
    batch("tc", Some(&prefix.name("switch")), &free(&node.to_string()))
}

/// Takes a node's link down.
pub fn cut(namespace: &str) -> Result<()> {
    batch("ip", Some(namespace), "link set dev eth0 down\n")
}

/// Takes a node's link up again.
pub fn mend(namespace: &str) -> Result<()> {
    batch("ip", Some(namespace), "link set dev eth0 up\n")
}

/// Removes a namespace with everything in it.
pub fn remove(namespace: &str) -> Result<()> {
    batch("ip", None, &format!("netns delete {namespace}\n"))
}

/// Every namespace with one of our names.
pub fn ours() -> Vec<(Prefix, String)> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            Some((Prefix::parse(&name)?, name))
        })
        .collect()
}

/// Runs `work` in a thread of its own inside a namespace. Processes it spawns are born there.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = Path::new("/run/netns").join(namespace);
    let file = File::open(&path).with_context(|| format!("no network namespace {namespace}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).with_context(|| {
                format!("cannot enter the network namespace {namespace} (root is needed)")
            })?;
            Ok(work())
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Runs many commands of `ip` or `tc` in one process.
fn batch(program: &str, namespace: Option<&str>, commands: &str) -> Result<()> {
    let mut command = Command::new(program);
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program} (install iproute2)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that failed ends the batch early; its own message says more than a broken pipe.
        let _ = stdin.write_all(commands.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed in {}: {}", namespace.unwrap_or("the root namespace"), message.trim());
    }
    Ok(())
}
