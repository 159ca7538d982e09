//! What this host has free: memory, link, processors. Read from `/proc` and `/sys`; what is not there to be read
//! counts as the least that makes sense.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::host;
use crate::wire::announcement::LinkRoom;

/// What a link is taken to carry when nobody says: 1 Gb/s.
const LINK_USUAL_BYTES_PER_S: u64 = 125_000_000;

/// What is used is measured over at least so long.
const OVER: Duration = Duration::from_millis(500);

/// A host in which everything stood still for memory in so many hundredths of the last ten seconds is pressed.
const PRESSED_PERCENT: f64 = 5.0;

/// The same where the kernel does not say how long things stood still: the part of memory that is available.
const PRESSED_PART: u64 = 32;

/// What a host has free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Memory that it has.
    pub host_bytes: u64,
    /// Memory that it could hand out without swapping.
    pub available_bytes: u64,
    /// Its link, the operator's limits not regarded.
    pub link: LinkRoom,
    /// Idle processor time, in thousandths.
    pub cpu_idle_permille: u16,
    /// It is short of memory: whatever runs here waits for it.
    pub pressed: bool,
}

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    received: u64,
    sent: u64,
    cpu_idle: u64,
    cpu_all: u64,
}

/// An interface of this host, as the process sees it.
#[derive(Clone, Debug)]
pub struct Interface(String);

impl Interface {
    /// By its name; nothing where there is none of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let interface = Self(name.to_owned());
        interface.traffic().map(|_| interface)
    }

    /// What its driver says that it carries, in bytes a second; nothing where it does not know.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<u64> {
        let speed: u64 = read(&format!("/sys/class/net/{}/speed", self.0)).trim().parse().ok()?;
        // A driver that does not know says -1, or the largest number there is.
        (1..10_000_000).contains(&speed).then_some(speed * 125_000)
    }

    /// Bytes received and sent since it is there, headers included; nothing when it is there no more.
    #[must_use]
    pub fn traffic(&self) -> Option<(u64, u64)> {
        traffic(&self.0, &read("/proc/net/dev"))
    }
}

/// Measures a host.
#[derive(Debug)]
pub struct Meter {
    interface: Interface,
    link_bytes_per_s: u64,
    last: (Instant, Counters),
    room: Room,
}

impl Meter {
    /// Measures this host, whose link is that of the interface with the address. It carries `link_bytes_per_s`; where that
    /// is not said, what the interface says, else 1 Gb/s.
    #[must_use]
    pub fn new(address: Ipv4Addr, link_bytes_per_s: Option<u64>) -> Self {
        let interface = Interface(interface(address, &read("/proc/net/route")));
        let says = || interface.bytes_per_s();
        let link_bytes_per_s = link_bytes_per_s.or_else(says).unwrap_or(LINK_USUAL_BYTES_PER_S);
        let counters = count(&interface);
        let link = LinkRoom {
            bytes_per_s: link_bytes_per_s,
            free_in_bytes_per_s: link_bytes_per_s,
            free_out_bytes_per_s: link_bytes_per_s,
            ..LinkRoom::default()
        };
        // Until there is something to compare with: since the host was started.
        let cpu_idle_permille = permille(counters.cpu_idle, counters.cpu_all);
        let room = Room { link, cpu_idle_permille, ..Room::default() };
        Self { interface, link_bytes_per_s, last: (host::now(), counters), room }
    }

    /// What is free now; links and processors over the time since the last call.
    pub fn measure(&mut self) -> Room {
        let (host_bytes, available_bytes) = memory(&read("/proc/meminfo"));
        self.room.host_bytes = host_bytes;
        self.room.available_bytes = available_bytes;
        self.room.pressed = stalled(&read("/proc/pressure/memory")).map_or_else(
            || available_bytes < host_bytes / PRESSED_PART,
            |percent| percent >= PRESSED_PERCENT,
        );
        let (then, before) = self.last;
        let (now, counters) = (host::now(), count(&self.interface));
        let took = now.saturating_duration_since(then);
        if took >= OVER {
            let free = |after: u64, before: u64| {
                let used = after.saturating_sub(before) as f64 / took.as_secs_f64();
                self.link_bytes_per_s.saturating_sub(used as u64)
            };
            self.room.link.free_in_bytes_per_s = free(counters.received, before.received);
            self.room.link.free_out_bytes_per_s = free(counters.sent, before.sent);
            self.room.cpu_idle_permille = permille(
                counters.cpu_idle.saturating_sub(before.cpu_idle),
                counters.cpu_all.saturating_sub(before.cpu_all),
            );
            self.last = (now, counters);
        }
        self.room
    }
}

/// What cannot be read is empty.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn count(interface: &Interface) -> Counters {
    let (received, sent) = interface.traffic().unwrap_or_default();
    let (cpu_idle, cpu_all) = processors(&read("/proc/stat"));
    Counters { received, sent, cpu_idle, cpu_all }
}

fn permille(part: u64, whole: u64) -> u16 {
    u16::try_from((part * 1000).checked_div(whole).unwrap_or(0)).unwrap_or(1000).min(1000)
}

/// All memory, and what of it is available.
fn memory(meminfo: &str) -> (u64, u64) {
    let all = bytes_of("MemTotal", meminfo).unwrap_or(0);
    (all, available_bytes(meminfo).unwrap_or(0).min(all))
}

/// What `/proc/meminfo` says could be handed out without swapping. `None` where it does not say.
#[must_use]
pub fn available_bytes(meminfo: &str) -> Option<u64> {
    bytes_of("MemAvailable", meminfo)
}

fn bytes_of(name: &str, meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// In how many hundredths of the last ten seconds everything stood still for memory.
fn stalled(pressure: &str) -> Option<f64> {
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "))?;
    full.split(' ').find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

/// Idle ticks, and all.
fn processors(stat: &str) -> (u64, u64) {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    // user nice system idle iowait irq softirq steal; what guests use is in user. Whoever is nice makes way.
    let ticks: Vec<u64> = line.split_whitespace().take(8).map(|word| word.parse().unwrap_or(0)).collect();
    let idle = [1, 3, 4].into_iter().filter_map(|at| ticks.get(at)).sum();
    (idle, ticks.iter().sum())
}

/// Bytes that an interface received and sent.
fn traffic(interface: &str, dev: &str) -> Option<(u64, u64)> {
    let line = dev.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'))?;
    let word = |at: usize| line.split_whitespace().nth(at)?.parse().ok();
    Some((word(0)?, word(8)?))
}

/// The interface of an address of ours: that of the narrowest route to its network.
fn interface(address: Ipv4Addr, routes: &str) -> String {
    if address.is_loopback() {
        return "lo".into();
    }
    let route = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // As the processor's words: little-endian.
        let number = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok().map(u32::swap_bytes);
        let (to, mask) = (number(1)?, number(7)?);
        (address.to_bits() & mask == to).then_some((mask, (*words.first()?).to_owned()))
    };
    routes.lines().skip(1).filter_map(route).max().map(|(_, name)| name).unwrap_or_default()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let meminfo = "MemTotal:        8000000 kB\nMemFree:  1 kB\nMemAvailable:    1234 kB\n";
        assert_eq!(memory(meminfo), (8_000_000 * 1024, 1234 * 1024));
        assert_eq!(memory("MemTotal: lots"), (0, 0));
        let pressure = "some avg10=9.00 avg60=0 avg300=0 total=1\nfull avg10=5.25 avg60=0.00 total=1\n";
        assert_eq!(stalled(pressure), Some(5.25));
        assert_eq!(stalled(""), None);
        assert_eq!(processors("cpu  10 1 9 70 10 0 0 0 5 0\ncpu0 1 1 1 1\n"), (81, 100));
        assert_eq!(processors(""), (0, 0));
        let dev = "Inter-| Receive\n face |bytes\n    lo: 7 1 0 0 0 0 0 0 8 1 0 0\n  eth0: 100 1 0 0 0 0 0 0 200 1\n";
        assert_eq!(
            (traffic("eth0", dev), traffic("lo", dev), traffic("eth", dev)),
            (Some((100, 200)), Some((7, 8)), None)
        );
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                      eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                      eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert_eq!(interface([192, 168, 3, 4].into(), routes), "eth1");
        assert_eq!(interface([10, 0, 0, 4].into(), routes), "eth0");
        assert_eq!(interface([127, 0, 0, 1].into(), routes), "lo");
        assert_eq!(interface([10, 0, 0, 4].into(), ""), "");
        assert_eq!([permille(1, 0), permille(1, 4), permille(5, 4)], [0, 250, 1000]);
    }

    #[test]
    fn this_host_is_measured() {
        let mut meter = Meter::new(Ipv4Addr::LOCALHOST, Some(1000));
        let room = meter.measure();
        assert!(room.host_bytes > 0 && room.available_bytes <= room.host_bytes, "{room:?}");
        assert_eq!(room.link.bytes_per_s, 1000);
        assert!(room.link.free_in_bytes_per_s <= 1000 && room.cpu_idle_permille <= 1000);
    }
}
