//! The experiments that rows are made of, in families whose members are run in turn.

use libsg::units::{Rate, Size};

use crate::cli::{MigrateArgs, Mode};
use crate::lab::{CongestionControl, Queue};

/// One experiment.
pub struct Experiment {
    /// What rows call it.
    pub name: &'static str,
    /// How it is run.
    pub args: MigrateArgs,
    /// What else is measured in each of its runs.
    pub baseline: Baseline,
}

/// A measurement without a VM, made next to each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// None.
    Nothing,
    /// One plain TCP stream over loopback, as long as the VM's memory, into fresh memory.
    FreshStream,
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
}

/// A destination's slow link, and the gather limit.
const SLOW: Rate = Rate::mbit(256);
/// Of a destination whose VM has 1 GiB.
const SWAPPING: Size = Size(512 << 20);
/// Next to nothing.
const HELD: Rate = Rate::mbit(1);

/// By the number of intermediaries, from 1 on.
pub const ADDING_UP: [&str; 4] =
    ["1 intermediary", "2 intermediaries", "3 intermediaries", "4 intermediaries"];

/// Which congestion control; whose link is the bottleneck.
pub const FAULT_FIFO: [&str; 4] = ["bbr source", "cubic source", "bbr destination", "cubic destination"];

/// Mebibytes.
pub const BOOKKEEPING: [(&str, u64); 4] =
    [("512M VM", 512), ("1G VM", 1024), ("2G VM", 2048), ("4G VM", 4096)];

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
        Family::NoIntermediary => beside_post_copy("alone", "alone post-copy", |a| a.lab.intermediaries = 0),
        Family::AddingUp => (1..).zip(ADDING_UP).map(|(n, name)| plain(name, |a| add_up(a, n))).collect(),
        Family::Fast => vec![plain("fast", |a| a.lab.queue = Queue::Prio)],
        Family::FaultFifo => FAULT_FIFO.into_iter().map(|name| plain(name, |a| one_queue(a, name))).collect(),
        Family::Unshaped => {
            let held = plain("unshaped", |a| {
                a.lab.shape = false;
                (a.gather_limit, a.lift_at_evicted) = (HELD, true);
            });
            vec![Experiment { baseline: Baseline::FreshStream, ..held }]
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
    }
}

/// 1 GiB of random writer, all pages filled, 1 Gb/s, 2 intermediaries, but for a change.
fn plain(name: &'static str, change: impl FnOnce(&mut MigrateArgs)) -> Experiment {
    let mut args = MigrateArgs::new();
    change(&mut args);
    Experiment { name, args, baseline: Baseline::Nothing }
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
