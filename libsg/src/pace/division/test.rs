//! VMs that share a simulated link in made-up time.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::LinkReading;
use super::*;

const STEP: Duration = Duration::from_millis(1);
/// How often a VM tells, in steps.
const TELLS: u32 = 5;
const CAPACITY: f64 = 125e6;
/// What a queue holds at most: congestion windows bound it.
const QUEUE_S_MAX: f64 = 0.005;

/// One that leaves.
struct Vm {
    part: Option<Part>,
    share: Option<u64>,
    left: f64,
    /// What its own paths take, bytes/s.
    takes: f64,
    /// What faults take, bytes/s: outside of its share.
    faults: f64,
    told: (f64, f64),
    /// When it had nothing left.
    ended: Option<Duration>,
}

impl Vm {
    fn new(mebibytes: u64) -> Self {
        let left = (mebibytes << 20) as f64;
        Self {
            part: None,
            share: None,
            left,
            takes: 2.0 * CAPACITY,
            faults: 0.0,
            told: (0.0, 0.0),
            ended: None,
        }
    }
}

struct Sim {
    division: LinkDivision,
    start: Instant,
    steps: u32,
    vms: Vec<Vm>,
    queued: f64,
    carried: f64,
}

impl Sim {
    fn new(weights: Option<&[f64]>, mut vms: Vec<Vm>) -> Self {
        let start = Instant::now();
        let division = LinkDivision::new(start);
        for (at, vm) in vms.iter_mut().enumerate() {
            vm.part = Some(division.add(weights.map(|weights| weights[at])));
        }
        Self { division, start, steps: 0, vms, queued: 0.0, carried: 0.0 }
    }

    fn elapsed(&self) -> Duration {
        self.steps * STEP
    }

    fn run(&mut self, seconds: f64) {
        let until = self.elapsed() + Duration::from_secs_f64(seconds);
        while self.elapsed() < until {
            self.step();
        }
    }

    /// What each carries over the next so many seconds, bytes/s.
    fn rates(&mut self, seconds: f64) -> Vec<f64> {
        let before: Vec<f64> = self.vms.iter().map(|vm| vm.told.0).collect();
        self.run(seconds);
        self.vms.iter().zip(before).map(|(vm, before)| (vm.told.0 - before) / seconds).collect()
    }

    fn step(&mut self) {
        let dt = STEP.as_secs_f64();
        let unpaced = 2.0 * CAPACITY;
        let sends = |vm: &Vm| {
            let share = vm.share.map_or(unpaced, |share| share as f64);
            let paced = if vm.left > 0.0 { share.min(vm.takes) } else { 0.0 };
            (paced * dt, vm.faults * dt)
        };
        let sent: Vec<(f64, f64)> = self.vms.iter().map(sends).collect();
        let all: f64 = sent.iter().map(|(paced, faults)| paced + faults).sum();
        let room = QUEUE_S_MAX * CAPACITY - self.queued + CAPACITY * dt;
        let taken = all.min(room.max(0.0));
        let served = (self.queued + taken).min(CAPACITY * dt);
        self.queued += taken - served;
        self.carried += served;
        self.steps += 1;
        // A queue is shorter than a step of it matters: what is served is theirs in proportion to what they send.
        let part = if all > 0.0 { served / all } else { 0.0 };
        let delay = Duration::from_secs_f64(self.queued / CAPACITY + 30e-6);
        let (now, elapsed) = (self.start + self.elapsed(), self.elapsed());
        for (at, (vm, (paced, faults))) in self.vms.iter_mut().zip(sent).enumerate() {
            vm.told.0 += paced * part;
            vm.told.1 += faults * part;
            vm.left = (vm.left - paced * part).max(0.0);
            if vm.left == 0.0 && vm.ended.is_none() {
                vm.ended = Some(elapsed);
                vm.part.take().into_iter().for_each(|part| self.division.remove(part));
            }
            if (self.steps + at as u32).is_multiple_of(TELLS)
                && let Some(it) = &vm.part
            {
                let paced = LinkReading {
                    delivered: vm.told.0 as u64,
                    queue_delay: Some(delay),
                    base_rtt: Duration::from_micros(50),
                    backlogged: vm.share.is_none_or(|share| vm.takes >= share as f64),
                };
                let told = Told { paced, urgent_bytes: vm.told.1 as u64 };
                vm.share = self.division.told(it, &told, vm.left as u64, now);
            }
        }
    }
}

#[test]
fn vms_of_any_size_end_together_and_the_link_is_never_idle() {
    let sizes = [64, 256, 512, 1024];
    let mut sim = Sim::new(None, sizes.map(Vm::new).into());
    sim.run(20.0);
    let ends: Vec<f64> = sim.vms.iter().map(|vm| vm.ended.unwrap().as_secs_f64()).collect();
    let bound = (sizes.iter().sum::<u64>() << 20) as f64 / CAPACITY;
    let last = ends.iter().copied().fold(0.0, f64::max);
    assert!(last < 1.03 * bound, "{ends:?} of {bound}");
    assert!(ends.iter().all(|end| *end > 0.95 * last), "{ends:?}");
}

#[test]
fn what_one_does_not_take_goes_to_the_others_until_it_takes_it_again() {
    let mut sim = Sim::new(None, vec![Vm::new(8000), Vm::new(8000), Vm::new(8000)]);
    sim.vms[0].takes = 10e6;
    sim.run(3.0);
    let rates = sim.rates(1.0);
    assert!(rates[0] > 9e6 && rates[1] > 52e6 && rates[2] > 52e6, "{rates:?}");
    sim.vms[0].takes = 2.0 * CAPACITY;
    sim.run(3.0);
    let rates = sim.rates(1.0);
    assert!(rates[0] > 35e6, "{rates:?}");
}

#[test]
fn one_that_dies_leaves_its_part_at_once() {
    let mut sim = Sim::new(None, vec![Vm::new(8000), Vm::new(8000)]);
    sim.run(3.0);
    let part = sim.vms[1].part.take().unwrap();
    sim.division.remove(part);
    (sim.vms[1].left, sim.vms[1].ended) = (0.0, Some(Duration::ZERO));
    sim.run(0.1);
    let rates = sim.rates(0.5);
    assert!(rates[0] > 0.95 * CAPACITY, "{rates:?}");
}

#[test]
fn one_that_falls_silent_leaves_its_part_too() {
    let mut sim = Sim::new(None, vec![Vm::new(8000), Vm::new(8000)]);
    sim.run(3.0);
    // Stopped: it tells nothing and sends nothing, but is there.
    let _kept = sim.vms[1].part.take().unwrap();
    sim.vms[1].takes = 0.0;
    sim.run(1.5);
    let rates = sim.rates(0.5);
    assert!(rates[0] > 0.9 * CAPACITY, "{rates:?}");
}

#[test]
fn faults_of_one_go_before_the_bulk_of_all() {
    let mut sim = Sim::new(None, vec![Vm::new(8000), Vm::new(8000)]);
    sim.vms[0].faults = 30e6;
    sim.run(3.0);
    let before = sim.vms[0].told.1;
    let rates = sim.rates(1.0);
    let faults = sim.vms[0].told.1 - before;
    assert!(faults > 29e6, "{faults}");
    assert!((rates[0] - rates[1]).abs() < 0.05 * CAPACITY, "both give way: {rates:?}");
    assert!(rates.iter().sum::<f64>() + faults > 0.95 * CAPACITY, "{rates:?} {faults}");
    let delay = sim.queued / CAPACITY;
    assert!(delay < 0.002, "{delay}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever weights and sizes there are: what is sent is what the link carries, nobody starves, weights hold.
    #[test]
    fn shares_add_up_and_weights_hold(weights in proptest::collection::vec(1u32..9, 2..7)) {
        let weights: Vec<f64> = weights.into_iter().map(f64::from).collect();
        let vms = weights.iter().map(|_| Vm::new(64_000)).collect();
        let mut sim = Sim::new(Some(&weights), vms);
        sim.run(3.0);
        let rates = sim.rates(2.0);
        let sum: f64 = rates.iter().sum();
        prop_assert!(sum > 0.95 * CAPACITY && sum < 1.001 * CAPACITY, "{sum}");
        let all: f64 = weights.iter().sum();
        for (rate, weight) in rates.iter().zip(&weights) {
            let fair = sum * weight / all;
            prop_assert!((rate - fair).abs() < 0.1 * fair, "{rates:?} by {weights:?}");
        }
    }

    /// Some paths are slow: nobody gets less than the least of what it takes and its fair part, and nothing is left over.
    #[test]
    fn nobody_starves_and_nothing_is_wasted(takes in proptest::collection::vec(2e6f64..200e6, 2..7)) {
        let vms = takes.iter().map(|takes| Vm { takes: *takes, ..Vm::new(64_000) }).collect();
        let mut sim = Sim::new(None, vms);
        sim.run(5.0);
        let rates = sim.rates(2.0);
        let most = CAPACITY.min(takes.iter().sum());
        let sum: f64 = rates.iter().sum();
        prop_assert!(sum > 0.75 * most, "{sum} of {most}: {rates:?} of {takes:?}");
        let fair = CAPACITY / takes.len() as f64;
        for (rate, takes) in rates.iter().zip(&takes) {
            prop_assert!(*rate > 0.7 * takes.min(fair), "{rates:?} of {takes:?}");
        }
    }
}
