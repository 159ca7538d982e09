//! `sg-bench select`: thousands of hosts, and migrations that choose among them at once, all over the same
//! announcements. No network: what is measured is the choice.
//!
//! The pool: hosts with links of 25 Gb/s and 512 GiB in racks of 40, a cluster whose scheduler keeps links and memory
//! in use by 35 to 45 %. Ten VMs leave each of the hosts that are evacuated, each with a tenth of its host's link, and
//! each for a host drawn from the others. A host's load is the part of its link or its memory that is in use,
//! whichever is more, its own VMs' included, when every migration has spread itself evenly over its nodes.
//!
//! What the migrations *add* cannot be even: decisions that know nothing of each other fall like balls into bins. The
//! figures beside (migrations a node) show how they do.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use libsg::discovery::select::{CHOICES, Need, select};
use libsg::ids::NodeId;
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use serde::Serialize;
use serde_json::json;

use crate::cli::SelectArgs;
use crate::{interrupt, stats};

/// Bytes a second of a host's link: 25 Gb/s.
const LINK: u64 = 25_000_000_000 / 8;
/// Bytes of memory of a host.
const MEMORY: u64 = 512 << 30;
/// Hosts of a rack, which is a zone.
const RACK: usize = 40;
/// VMs that leave a host together.
const VMS: usize = 10;
/// Bytes of a VM.
const VM: u64 = 16 << 30;

/// What came of one simulation.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Of how many drawn nodes the least loaded was taken.
    pub choices: u8,
    /// Microseconds a decision.
    pub decision_us: Times,
    /// Load of the nodes, before and after.
    pub load: Load,
    /// Migrations that took a node.
    pub taken: Taken,
    /// Nodes that a migration took: least and most.
    pub members: (usize, usize),
    /// Migrations that do not fit, or lack bandwidth.
    pub lacking: usize,
}

/// Microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    pub mean: f64,
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// The part of a node that is in use.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    pub before_max_over_mean: f64,
    pub mean: f64,
    pub max: f64,
    pub max_over_mean: f64,
}

/// How many migrations took a node.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Taken {
    pub mean: f64,
    pub max: u32,
}

/// Prints what it comes to with the usual number of choices, and beside it with one and with many.
pub fn run(args: &SelectArgs) -> Result<u8> {
    let mut outcomes = Vec::new();
    for choices in [args.choices.unwrap_or(CHOICES), 1, 64] {
        interrupt::check()?;
        outcomes.push(simulate(args.nodes, args.migrations, args.seed, choices)?);
    }
    if args.json {
        let (this, compared) = outcomes.split_first().context("three were simulated")?;
        let mut told = json!({
            "schema": libsg::report::SCHEMA, "status": "ok",
            "nodes": args.nodes, "migrations": args.migrations, "seed": args.seed, "compared": compared,
        });
        if let (Some(told), Some(this)) = (told.as_object_mut(), json!(this).as_object_mut()) {
            told.append(this);
        }
        println!("{told}");
        return Ok(0);
    }
    println!("{} migrations at once over {} nodes, seed {}", args.migrations, args.nodes, args.seed);
    println!(
        "{:>8} {:>12} {:>10} {:>10} {:>14} {:>10} {:>18} {:>14} {:>8}",
        "choices",
        "us/decision",
        "p99 us",
        "mean load",
        "max/mean load",
        "(before)",
        "migrations a node",
        "nodes a VM",
        "lacking"
    );
    for outcome in &outcomes {
        let Outcome { decision_us, load, taken, members, .. } = outcome;
        println!(
            "{:>8} {:>12.0} {:>10.0} {:>10.3} {:>14.3} {:>10.3} {:>18} {:>14} {:>8}",
            outcome.choices,
            decision_us.mean,
            decision_us.p99,
            load.mean,
            load.max_over_mean,
            load.before_max_over_mean,
            format!("{:.2}, most {}", taken.mean, taken.max),
            format!("{} to {}", members.0, members.1),
            outcome.lacking
        );
    }
    Ok(0)
}

/// Numbers by seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// What of so much is free where 35 to 45 % are in use.
    fn free(&mut self, whole: u64) -> u64 {
        whole / 1000 * (650 - self.next() % 101)
    }
}

fn node(at: usize, random: &mut Random) -> Announcement {
    let bytes = (at as u32).to_be_bytes();
    Announcement {
        node: NodeId { name: format!("host{at}"), incarnation: random.next() },
        address: ([10, bytes[1], bytes[2], bytes[3]], 7701).into(),
        zone: Some(format!("rack{}", at / RACK)),
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory: MemoryRoom {
            host_bytes: MEMORY,
            available_bytes: random.free(MEMORY),
            limit_bytes: MEMORY / 4,
            used_bytes: 0,
        },
        link: LinkRoom {
            bytes_per_s: LINK,
            free_in_bytes_per_s: random.free(LINK),
            free_out_bytes_per_s: random.free(LINK),
            ..LinkRoom::default()
        },
        cpu_idle_permille: 500,
        connections_free: 1024,
        volumes_free: 4096,
    }
}

/// The larger part of it that is in use.
fn load(node: &Announcement) -> f64 {
    let used = |whole: u64, free: u64| 1.0 - free as f64 / whole as f64;
    let link = node.link.free_in_bytes_per_s.min(node.link.free_out_bytes_per_s);
    used(node.memory.host_bytes, node.memory.available_bytes).max(used(node.link.bytes_per_s, link))
}

/// Highest, and mean.
fn loads(nodes: &[Announcement]) -> (f64, f64) {
    let lending = || nodes.iter().filter(|node| node.duty == Duty::Lends).map(load);
    (lending().fold(0.0, f64::max), lending().sum::<f64>() / lending().count() as f64)
}

/// So many migrations decide over the same announcements.
pub fn simulate(nodes: usize, migrations: usize, seed: u64, choices: u8) -> Result<Outcome> {
    let sources = migrations.div_ceil(VMS);
    ensure!(sources * 2 <= nodes, "{migrations} migrations leave {sources} hosts: more than half of them");
    let mut random = Random(seed);
    let mut pool: Vec<_> = (0..nodes).map(|at| node(at, &mut random)).collect();
    let mut leaving = Vec::new();
    while leaving.len() < sources {
        let at = random.below(nodes);
        if pool[at].duty == Duty::Lends {
            pool[at].duty = Duty::Source;
            leaving.push(at);
        }
    }
    let (max, mean) = loads(&pool);
    let before_max_over_mean = max / mean;
    let (mut after, mut taken) = (pool.clone(), vec![0_u32; nodes]);
    let (mut times_us, mut sizes, mut lacking) = (Vec::new(), Vec::new(), 0);
    for migration in 0..migrations {
        let (source, destination) = (&pool[leaving[migration / VMS]], &pool[random.below(nodes)]);
        let rate = LINK / VMS as u64;
        let need = Need {
            source_zone: source.zone.clone(),
            destination_zone: destination.zone.clone(),
            never: vec![source.address.ip(), destination.address.ip()],
            choices,
            ..Need::new(VM, rate, rate, random.next())
        };
        let start = Instant::now();
        let selection = select(&pool, &need);
        times_us.push(start.elapsed().as_secs_f64() * 1e6);
        lacking += usize::from(!selection.lacks.is_empty());
        sizes.push(selection.members.len());
        for at in &selection.members {
            let (node, part) = (&mut after[*at], |whole: u64| whole / selection.members.len() as u64);
            taken[*at] += 1;
            node.memory.available_bytes = node.memory.available_bytes.saturating_sub(part(VM));
            node.link.free_in_bytes_per_s = node.link.free_in_bytes_per_s.saturating_sub(part(rate));
            node.link.free_out_bytes_per_s = node.link.free_out_bytes_per_s.saturating_sub(part(rate));
        }
    }
    let (max, mean) = loads(&after);
    let whole: u32 = taken.iter().sum();
    Ok(Outcome {
        choices,
        decision_us: times(times_us).context("no migration")?,
        load: Load { before_max_over_mean, mean, max, max_over_mean: max / mean },
        taken: Taken {
            mean: f64::from(whole) / (nodes - sources) as f64,
            max: taken.into_iter().max().unwrap_or(0),
        },
        members: (sizes.iter().copied().min().unwrap_or(0), sizes.iter().copied().max().unwrap_or(0)),
        lacking,
    })
}

fn times(mut us: Vec<f64>) -> Option<Times> {
    us.sort_by(f64::total_cmp);
    Some(Times {
        mean: us.iter().sum::<f64>() / us.len() as f64,
        p50: stats::percentile(&us, 50.0)?,
        p99: stats::percentile(&us, 99.0)?,
        max: stats::percentile(&us, 100.0)?,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn drawing_two_keeps_the_load_even_and_taking_the_best_does_not() {
        let of = |choices| simulate(2000, 200, 1, choices).expect("simulated");
        let (two, herd) = (of(CHOICES), of(u8::MAX));
        assert_eq!((two.lacking, two.members.0), (0, 8));
        assert!(two.load.max_over_mean < herd.load.max_over_mean, "{two:?} {herd:?}");
        assert!(two.load.max_over_mean <= 1.2, "{two:?}");
        assert!(simulate(10, 100, 1, 1).is_err());
    }
}
