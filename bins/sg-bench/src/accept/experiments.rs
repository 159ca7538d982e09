//! The experiments that rows are made of, in families whose members are run in turn.

use std::time::Duration;

use libsg::units::{Rate, Size};

use crate::cli::{MigrateArgs, Mode};
use crate::events::When;
use crate::lab::{CongestionControl, Node, Queue};

/// One experiment.
pub struct Experiment {
    /// What rows call it.
    pub name: &'static str,
    /// How it is run.
    pub args: MigrateArgs,
    /// Whether a plain TCP stream over loopback, as long as the VM's memory and into fresh memory, is measured
    /// next to each run.
    pub fresh_stream: bool,
}

/// Experiments that are run in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// The gather limit at 256 Mb/s.
    Limited,
    /// The destination's link at 256 Mb/s, beside post-copy.
    SlowLink,
    /// The destination with half of the memory, beside post-copy.
    Swapping,
    /// The destination stopped on the way, until all has evicted.
    Stopped,
    /// Nobody else there, beside post-copy.
    NoIntermediary,
    /// A slow destination and 1 to 4 slow intermediaries.
    AddingUp,
    /// Nothing limited, one queue with priorities in front of each link.
    Fast,
    /// One queue without priorities, at either end, with either congestion control.
    FaultFifo,
    /// Loopback, gather held.
    Unshaped,
    /// Loopback, VMs of several sizes.
    Bookkeeping,
    /// Pre-copy of a busy VM as large as the one that QEMU was measured with.
    PreCopy,
    /// A guest that reads, by hybrid and by scatter-gather.
    Hybrid,
    /// Destinations of several rates.
    Flat,
    /// All through intermediaries, and nothing else.
    Held,
    /// Beside a co-tenant at the destination and at an intermediary.
    Cotenant,
    /// Loopback, VMs of several sizes that go through intermediaries, their pages known there by what is in them.
    Staged,
    /// Four intermediaries, with two copies of each page and with one.
    Replicas,
    /// Four VMs of two hosts that have much in common, parked, by their contents and without.
    Alike,
    /// The same with nothing in common.
    Unlike,
    /// Four VMs to one destination that has memory for two.
    Several,
}

/// A destination's slow link, and the gather limit.
const SLOW: Rate = Rate::mbit(256);
/// Of a destination whose VM has 1 GiB.
const SWAPPING: Size = Size(512 << 20);
/// Next to nothing.
const HELD: Rate = Rate::mbit(1);

/// At which event of the source or the destination.
pub const STOPPED: [(&str, &str); 2] = [("stopped at once", "resumed"), ("stopped at 50 %", "scattered=50%")];

/// By the number of intermediaries, from 1 on.
pub const ADDING_UP: [&str; 4] =
    ["1 intermediary", "2 intermediaries", "3 intermediaries", "4 intermediaries"];

/// Which congestion control; whose link is the bottleneck.
pub const FAULT_FIFO: [&str; 4] = ["bbr source", "cubic source", "bbr destination", "cubic destination"];

/// Mebibytes.
pub const BOOKKEEPING: [(&str, u64); 4] =
    [("512M VM", 512), ("1G VM", 1024), ("2G VM", 2048), ("4G VM", 4096)];

/// Mebibytes.
pub const STAGED: [(&str, u64); 3] = [("512M staged", 512), ("1G staged", 1024), ("2G staged", 2048)];

/// Of the VM that QEMU 10 was seen to pre-copy: 345 MB, in pages of 2 MiB.
const QEMU_MEMORY: Size = Size(330 << 20);

/// By the destination's rate.
pub const FLAT: [(&str, Option<Rate>); 4] = [
    ("flat", None),
    ("flat 256 Mb/s", Some(SLOW)),
    ("flat 100 Mb/s", Some(Rate::mbit(100))),
    ("flat 50 Mb/s", Some(Rate::mbit(50))),
];

/// VMs at once, and the memory of each.
pub const SEVERAL: u8 = 4;
const SEVERAL_MEMORY: Size = Size(512 << 20);
/// What they have in common, where they do.
pub const ALIKE: f64 = 0.6;

/// The experiments of a family.
pub fn of(family: Family) -> Vec<Experiment> {
    match family {
        Family::Limited => {
            vec![plain("limited", |a| (a.gather_limit, a.lift_at_evicted) = (SLOW, true))]
        }
        Family::SlowLink => beside_post_copy("slow", "slow post-copy", |a| {
            a.lab.destination_rate = Some(SLOW);
        }),
        Family::Swapping => beside_post_copy("swapping", "swapping post-copy", |a| {
            a.destination_memory = Some(SWAPPING);
        }),
        Family::Stopped => STOPPED.map(|(name, event)| plain(name, |a| stop(a, event))).into(),
        Family::NoIntermediary => beside_post_copy("alone", "alone post-copy", |a| a.lab.intermediaries = 0),
        Family::AddingUp => (1..).zip(ADDING_UP).map(|(n, name)| plain(name, |a| add_up(a, n))).collect(),
        Family::Fast => vec![plain("fast", |a| a.lab.queue = Queue::Prio)],
        Family::FaultFifo => FAULT_FIFO.into_iter().map(|name| plain(name, |a| one_queue(a, name))).collect(),
        Family::Unshaped => {
            let held = plain("unshaped", |a| {
                a.lab.shape = false;
                (a.gather_limit, a.lift_at_evicted) = (HELD, true);
            });
            vec![Experiment { fresh_stream: true, ..held }]
        }
        Family::Bookkeeping => {
            let sized = |(name, mebibytes)| {
                plain(name, |a| {
                    a.lab.shape = false;
                    a.vm.memory = Size(mebibytes << 20);
                    a.ready_memory = false;
                })
            };
            BOOKKEEPING.into_iter().map(sized).collect()
        }
        Family::PreCopy => vec![plain("pre-copy", |a| {
            a.mode = Mode::PreCopy;
            (a.vm.memory, a.vm.write_rate) = (QEMU_MEMORY, 3000);
        })],
        Family::Hybrid => {
            let reader = |name, mode| {
                plain(name, |a| {
                    (a.mode, a.rounds) = (mode, (mode == Mode::Hybrid).then_some(1));
                    (a.vm.workload, a.vm.working_set) = ("reader".to_owned(), Some(Size(a.vm.memory.0 / 4)));
                })
            };
            vec![reader("hybrid", Mode::Hybrid), reader("hybrid scatter-gather", Mode::ScatterGather)]
        }
        Family::Flat => {
            let at =
                |(name, rate)| plain(name, |a| (a.lab.destination_rate, a.lift_at_evicted) = (rate, true));
            FLAT.into_iter().map(at).collect()
        }
        Family::Held => {
            // A page that the guest waits for is served on its own, which no plain stream does.
            vec![plain("held", |a| {
                a.vm.workload = "idle".to_owned();
                (a.gather_limit, a.lift_at_evicted) = (HELD, true);
            })]
        }
        Family::Staged => {
            let sized = |(name, mebibytes)| {
                plain(name, |a| {
                    (a.lab.shape, a.dedup, a.ready_memory) = (false, true, false);
                    (a.vm.memory, a.vm.workload) = (Size(mebibytes << 20), "idle".to_owned());
                    (a.gather_limit, a.lift_at_evicted) = (HELD, true);
                })
            };
            STAGED.into_iter().map(sized).collect()
        }
        Family::Replicas => {
            let copies = |name, replicas| {
                plain(name, |a| {
                    (a.lab.intermediaries, a.replicas) = (4, replicas);
                    (a.gather_limit, a.lift_at_evicted) = (SLOW, true);
                })
            };
            vec![copies("two copies", 2), copies("one copy", 1)]
        }
        Family::Alike => beside_plain("alike", "alike without", ALIKE),
        Family::Unlike => beside_plain("unlike", "unlike without", 0.0),
        Family::Several => vec![plain("several", |a| {
            (a.vms, a.vm.memory) = (SEVERAL, SEVERAL_MEMORY);
            // What the processes take beside their VMs is theirs, too.
            a.destination_memory = Some(Size(2 * SEVERAL_MEMORY.0 + (64 << 20)));
        })],
        Family::Cotenant => {
            vec![plain("cotenant", |a| (a.gather_limit, a.cotenant) = (SLOW, Some(Vec::new())))]
        }
    }
}

/// Parked: with deduplication, and without.
fn beside_plain(name: &'static str, without: &'static str, common: f64) -> Vec<Experiment> {
    let parked = |name, dedup| {
        plain(name, |a| {
            (a.vms, a.lab.source_hosts, a.vm.memory) = (SEVERAL, 2, SEVERAL_MEMORY);
            // A guest that writes has less and less in common with the others.
            (a.vm.workload, a.vm.common) = ("idle".to_owned(), common);
            (a.dedup, a.park, a.lift_at_evicted) = (dedup, true, true);
        })
    };
    vec![parked(name, true), parked(without, false)]
}

impl Experiment {
    /// About how long one run of it takes, on a machine like the one it was written on.
    pub fn about_s(&self) -> u32 {
        let args = &self.args;
        let gib = args.vm.memory.0 as f64 * f64::from(args.vms) / (1_u64 << 30) as f64;
        let at = |rates: &[Rate]| {
            let bits = rates.iter().filter(|rate| !rate.is_unlimited()).map(|rate| rate.0).min();
            bits.map_or(gib, |bits| gib * 9e9 / bits as f64)
        };
        let shaped = |rate: Rate| if args.lab.shape { rate } else { Rate::UNLIMITED };
        let destination = shaped(args.lab.destination_rate.unwrap_or(args.lab.link_rate));
        let (source, limit) = (shaped(args.lab.link_rate), args.gather_limit);
        let evicts_alone = args.mode != Mode::PostCopy && args.lift_at_evicted;
        let moving = if evicts_alone {
            at(&[source]) + at(&[Rate::mbit(2000)])
        } else {
            at(&[source, destination, limit])
        };
        let swapping = if args.destination_memory.is_some() { 40.0 } else { 0.0 };
        (5.0 + 3.0 * gib + moving + swapping) as u32
    }
}

/// 1 GiB of random writer, all pages filled, 1 Gb/s, 2 intermediaries, but for a change.
fn plain(name: &'static str, change: impl FnOnce(&mut MigrateArgs)) -> Experiment {
    let mut args = MigrateArgs::new();
    change(&mut args);
    Experiment { name, args, fresh_stream: false }
}

fn beside_post_copy(
    name: &'static str,
    post_copy: &'static str,
    change: impl Fn(&mut MigrateArgs),
) -> Vec<Experiment> {
    let other = plain(post_copy, |args| {
        change(args);
        args.mode = Mode::PostCopy;
    });
    vec![plain(name, change), other]
}

/// From that event until all has evicted.
fn stop(args: &mut MigrateArgs, event: &str) {
    let when = |event: &str| When { node: Node::Destination, event: event.to_owned(), after: Duration::ZERO };
    (args.stop, args.continued) = (vec![when(event)], vec![when("evicted")]);
    args.lift_at_evicted = true;
}

fn add_up(args: &mut MigrateArgs, intermediaries: u8) {
    // Pages that a guest faults on come from intermediaries through the destination's link as well: they are no
    // bytes of the eviction, and at 100 Mb/s they are half of what the link carries.
    args.vm.workload = "idle".to_owned();
    args.vm.memory = Size(512 << 20);
    args.lab.destination_rate = Some(Rate::mbit(100));
    args.lab.intermediary_rate = Some(Rate::mbit(200));
    args.lab.intermediaries = intermediaries;
    args.lift_at_evicted = true;
}

fn one_queue(args: &mut MigrateArgs, name: &str) {
    args.lab.queue = Queue::Fifo;
    let bbr = name.starts_with("bbr");
    args.lab.cc = if bbr { CongestionControl::Bbr } else { CongestionControl::Cubic };
    if name.ends_with("destination") {
        args.lab.destination_rate = Some(SLOW);
        args.lift_at_evicted = true;
    }
}
