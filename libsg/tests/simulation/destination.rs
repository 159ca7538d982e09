//! The destination's host: a VM that arrives, and the memory that it arrives in.

use std::sync::Arc;
use std::time::Duration;

use libsg::event::Observer;
use libsg::manifest::Manifest;
use libsg::migrate::destination::{Destination, DestinationOptions, Incoming};
use libsg::migrate::{IncomingVm, Mode};
use libsg::page::PageRange;
use libsg::sink::PageSink;
use libsg::{Error, ErrorKind};
use parking_lot::Mutex;

use crate::clock::Node;
use crate::guest::Vm;
use crate::memory::{Early, Memory, run_at_destination};
use crate::random::Random;
use crate::scenario::{Plan, Scenario, door, secret};

/// Longer than any run.
pub const ALWAYS: Duration = Duration::from_secs(100_000);

/// The VM as its VMM at the destination sees it.
struct Arriving {
    vm: Arc<Vm>,
    node: Arc<Node>,
    memory: Arc<Memory>,
    random: Random,
    think: Duration,
}

impl IncomingVm for Arriving {
    fn prepare(&mut self, manifest: &Manifest) -> libsg::Result<Arc<dyn PageSink>> {
        if manifest.vm != self.vm.manifest.vm {
            return Err(Error::new(ErrorKind::Vm, "another VM is waited for"));
        }
        assert_eq!(manifest.regions, self.vm.manifest.regions);
        Ok(self.memory.clone())
    }

    fn load(&mut self, state: &[u8]) -> libsg::Result<()> {
        assert_eq!(state, [7; 3000]);
        self.memory.loads();
        Ok(())
    }

    fn run(&mut self) -> libsg::Result<()> {
        if !self.node.is_dead() {
            self.memory.runs();
            self.vm.run_at_destination();
            let (memory, random, think) = (Arc::clone(&self.memory), self.random.clone(), self.think);
            self.node.spawn("guest", move || run_at_destination(&memory, random, think));
        }
        Ok(())
    }

    fn abandon(&mut self) {
        if self.memory.has_guest() && !self.node.is_dead() {
            self.vm.breach("one owner: the VM was thrown away where it runs".into());
        }
    }

    fn lost(&mut self, _: &[PageRange]) {}
}

/// How an arrival ended.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// Gathered: how many pages were lost, or why it failed.
    pub gathered: Option<Result<usize, String>>,
    pub dissolved: Option<Result<(), String>>,
}

/// A VM at the destination's host.
pub struct Host {
    pub memory: Arc<Memory>,
    pub ended: Arc<Mutex<Ended>>,
    pub incoming: Arc<Mutex<Option<Arc<Incoming>>>>,
}

/// A VM that is to arrive on a host, and the memory that it arrives in.
pub fn arriving(
    node: &Arc<Node>,
    vm: &Arc<Vm>,
    early: Early,
    (random, think): (Random, Duration),
) -> (Arc<Memory>, Box<dyn IncomingVm>) {
    let memory = Arc::new(Memory::new(Arc::clone(vm), Arc::clone(node), early));
    let (vm, node) = (Arc::clone(vm), Arc::clone(node));
    let arriving = Arriving { vm, node, memory: Arc::clone(&memory), random, think };
    (memory, Box::new(arriving))
}

/// Starts what belongs to a VM there.
pub fn start(
    node: &Arc<Node>,
    (nth, plan): (usize, &Plan),
    vm: &Arc<Vm>,
    scenario: &Scenario,
    observer: Observer,
) -> Host {
    let early = match plan.mode {
        Mode::PreCopy => Early::UntilRun,
        Mode::Hybrid if !plan.takes_once => Early::UntilLoaded,
        Mode::Hybrid | Mode::ScatterGather | Mode::PostCopy => Early::Never,
    };
    let (memory, arriving) =
        arriving(node, vm, early, (scenario.random(4 + 16 * nth as u64), scenario.think));
    let options = DestinationOptions {
        gather_limit: scenario.gather_limit,
        source_grace: scenario.grace,
        member_grace: scenario.grace,
        observer,
        ..DestinationOptions::new(door(nth), secret(), node.connector())
    };
    let host = Host { memory, ended: Arc::default(), incoming: Arc::default() };
    let (ended, handle) = (Arc::clone(&host.ended), Arc::clone(&host.incoming));
    node.spawn("vmm-destination", move || {
        let destination = Destination::listen(options).expect("listens");
        let incoming = Arc::new(destination.accept(arriving).expect("accepts"));
        *handle.lock() = Some(Arc::clone(&incoming));
        let gathered = incoming.wait_gathered(ALWAYS);
        let lost = gathered.map(|report| usize::from(report.status != libsg::report::Status::Ok));
        ended.lock().gathered = Some(lost.map_err(|error| error.chain()));
        let dissolved = incoming.wait_dissolved(ALWAYS);
        ended.lock().dissolved = Some(dissolved.map_err(|error| error.chain()));
    });
    host
}
