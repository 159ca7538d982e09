//! Many runs: over all processors, one thread of runs on each.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libsg::host::simulation::Bug;
use parking_lot::Mutex;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::run::{Outcome, Run};
use crate::scenario::Scenario;
use crate::shrink;

/// Seeds within which each bug that was put in on purpose is found.
const CANARY_SEEDS: u64 = 1000;

/// A number from the environment.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number")))
}

/// A seed is the same run each time.
pub fn repeat_themselves(seeds: Range<u64>) {
    for seed in seeds {
        let run = || Run::new(&Scenario::of(seed), None).run().trace;
        assert_eq!(run(), run(), "seed {seed}");
    }
}

/// No seed breaks a contract; what they were.
pub fn hold(seeds: Range<u64>) -> Sum {
    let sum = run_all(seeds, None, 20);
    println!("{sum}");
    let broken = sum.broken.first().and_then(|(seed, _)| shrink::shrink(*seed, None));
    let report = broken.map_or_else(String::new, |failure| failure.report());
    assert!(sum.broken.is_empty(), "{sum}\n{:?}\n{report}", sum.broken);
    sum
}

/// Runs seeds with a bug until one breaks a contract, which must be one of those that `says` names.
pub fn find(bug: Bug, says: &[&str]) {
    let sum = run_all(0..CANARY_SEEDS, Some(bug), 1);
    let (seed, breach) = sum.broken.first().unwrap_or_else(|| panic!("{bug:?} was not found: {sum}"));
    println!("{bug:?}: seed {seed}: {breach}");
    assert!(says.iter().any(|words| breach.contains(words)), "{bug:?} was found as something else: {breach}");
}

/// What many runs were.
#[derive(Debug, Default)]
pub struct Sum {
    runs: u64,
    turns: u64,
    evicted: u64,
    with_losses: u64,
    carried_bytes: u64,
    /// By clients themselves.
    pub moved_bytes: u64,
    flipped_bits: usize,
    time: Duration,
    /// Seeds in which a contract was broken, and how.
    pub broken: Vec<(u64, String)>,
}

impl Sum {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.runs += 1;
        self.turns += outcome.turns;
        self.evicted += u64::from(outcome.evicted);
        self.with_losses += u64::from(outcome.lost_pages > 0);
        self.carried_bytes += outcome.carried_bytes;
        self.moved_bytes += outcome.moved_bytes;
        self.flipped_bits += outcome.flipped_bits;
        self.broken.extend(outcome.breach.map(|breach| (seed, breach)));
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { runs, turns, evicted, with_losses, carried_bytes, flipped_bits, time, broken, .. } = self;
        let (seconds, mebibytes, moved) = (time.as_secs_f64(), carried_bytes >> 20, self.moved_bytes >> 20);
        let rate = *runs as f64 / seconds;
        write!(
            f,
            "{runs} runs in {seconds:.1} s ({rate:.0} a second): {turns} turns of threads, {mebibytes} MiB"
        )?;
        write!(
            f,
            " carried, {moved} MiB moved beside connections, {flipped_bits} bits flipped; evicted in {evicted}, pages lost in {with_losses}, broken in {}",
            broken.len()
        )
    }
}

/// Runs these seeds, until so many broke a contract.
pub fn run_all(seeds: Range<u64>, bug: Option<Bug>, broken_max: usize) -> Sum {
    run_each(seeds, bug.is_none(), broken_max, |seed| Run::new(&Scenario::of(seed), bug).run())
}

/// Runs what `run` makes of these seeds, until so many broke a contract, and says which where `says` wants that.
pub fn run_each(
    seeds: Range<u64>,
    says: bool,
    broken_max: usize,
    run: impl Fn(u64) -> Outcome + Sync,
) -> Sum {
    let begun = Instant::now();
    let (next, sum) = (AtomicU64::new(seeds.start), Mutex::new(Sum::default()));
    let work = || {
        while sum.lock().broken.len() < broken_max {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            let outcome = run(seed);
            if let Some(breach) = &outcome.breach
                && says
            {
                eprintln!("seed {seed}: {breach}");
            }
            sum.lock().add(seed, outcome);
        }
    };
    std::thread::scope(|scope| {
        for processor in processors() {
            let work = &work;
            scope.spawn(move || {
                stay_on(processor);
                work();
            });
        }
    });
    let mut sum = sum.into_inner();
    sum.broken.sort();
    sum.time = begun.elapsed();
    sum
}

fn processors() -> Vec<usize> {
    let all = sched_getaffinity(None).unwrap_or_default();
    let ours: Vec<_> = (0..CpuSet::MAX_CPU).filter(|processor| all.is_set(*processor)).collect();
    if ours.is_empty() { vec![0] } else { ours }
}

/// Threads of which one runs at a time hand the turn over faster on one processor.
fn stay_on(processor: usize) {
    let mut here = CpuSet::new();
    here.set(processor);
    // Where that is not allowed it is only slower.
    let _ = sched_setaffinity(None, &here);
}
