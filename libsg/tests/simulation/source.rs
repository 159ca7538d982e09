//! The source's host: a VM that leaves, and its memory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libsg::dirty::DirtyLog;
use libsg::event::Observer;
use libsg::manifest::Manifest;
use libsg::memory::{PageSlice, PresenceMap};
use libsg::migrate::source::{self, Outgoing, SourceOptions, To};
use libsg::migrate::{OutgoingVm, Replacements, Vacancy};
use libsg::page::{PageIndex, PageRange};
use libsg::source::{Outcome, PageSource, Repeat, Supply};
use libsg::wire::message::Member;
use parking_lot::Mutex;

use crate::clock::Node;
use crate::guest::{Vm, run_at_source};
use crate::scenario::{Plan, Scenario, address, secret};

/// The VM as its VMM at the source sees it.
struct Leaving {
    vm: Arc<Vm>,
    node: Arc<Node>,
}

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> libsg::Result<Vec<u8>> {
        self.vm.pause();
        Ok(vec![7; 3000])
    }

    fn resume(&mut self) -> libsg::Result<()> {
        // What a host does that was killed happens nowhere.
        if !self.node.is_dead() {
            self.vm.resume();
        }
        Ok(())
    }

    fn committed(&mut self) {
        self.vm.commit();
    }

    fn dirty_log(&mut self) -> libsg::Result<Box<dyn DirtyLog>> {
        Ok(Box::new(Log(Arc::clone(&self.vm))))
    }
}

/// Which pages its guest writes.
struct Log(Arc<Vm>);

impl DirtyLog for Log {
    fn start(&mut self) -> libsg::Result<()> {
        self.0.log_writes(true);
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> libsg::Result<()> {
        out.extend(PageRange::from_pages(self.0.written()));
        Ok(())
    }

    fn stop(&mut self) -> libsg::Result<()> {
        self.0.log_writes(false);
        Ok(())
    }
}

/// Its memory.
struct Pages {
    vm: Arc<Vm>,
    named: Mutex<bool>,
}

impl PageSource for Pages {
    fn repeat(&self) -> Repeat {
        Repeat::Any
    }

    fn presence(&self) -> libsg::Result<PresenceMap> {
        Ok(self.vm.presence())
    }

    fn available(&self, out: &mut Vec<PageRange>) -> libsg::Result<Supply> {
        if !std::mem::replace(&mut *self.named.lock(), true) {
            out.extend(self.vm.presence().runs());
        }
        Ok(Supply::Complete)
    }

    fn want(&self, _: PageIndex) -> libsg::Result<()> {
        Ok(())
    }

    fn slice(&self, range: PageRange) -> libsg::Result<PageSlice> {
        if self.vm.runs_at_source() && !self.vm.is_logged() {
            self.vm.breach("each page is right: memory is sent while the guest writes it".into());
        }
        let memory = self.vm.read(range);
        PageSlice::guest(memory, memory.run(range.first, range.pages).unwrap_or(range))
    }

    fn outcome(&self, _: PageRange, _: Outcome) {}
}

/// Names who lends memory and is no member, those who stood by first, then those who died and may have restarted.
struct StandBy(Vec<SocketAddr>);

impl Replacements for StandBy {
    fn replacement(&self, vacancy: &Vacancy<'_>) -> Option<SocketAddr> {
        let is_at = |members: &[Member], at: SocketAddr| members.iter().any(|member| member.address == at);
        let free = self.0.iter().rev().copied();
        let free = free.filter(|at| !is_at(vacancy.living, *at) && !vacancy.tried.contains(at));
        free.min_by_key(|at| is_at(vacancy.gone, *at))
    }
}

/// The migration, once it was started.
pub type Handle = Arc<Mutex<Option<Arc<Outgoing>>>>;

/// Starts what belongs to a VM on the source's host.
pub fn start(
    node: &Arc<Node>,
    (nth, plan): (usize, &Plan),
    vm: &Arc<Vm>,
    scenario: &Scenario,
    (to, observer): (To, Observer),
) -> Handle {
    let handle = Handle::default();
    let (given, node_of_vm, vm_there) = (Arc::clone(&handle), Arc::clone(node), Arc::clone(vm));
    let sharing = scenario.shares();
    let options = SourceOptions {
        to,
        intermediaries: scenario.members().map(address).collect(),
        replacements: (scenario.spares > 0)
            .then(|| Arc::new(StandBy(scenario.lenders().map(address).collect())) as Arc<dyn Replacements>),
        replicas: scenario.replicas,
        mode: plan.mode,
        rounds: plan.rounds,
        secret: secret(),
        connector: node.connector(),
        scatter_limit_bytes_per_s: scenario.scatter_limit,
        ready_timeout: Duration::from_secs(5),
        observer,
    };
    node.spawn("vmm-source", move || {
        let pages = Arc::new(Pages { vm: Arc::clone(&vm_there), named: Mutex::new(false) });
        let leaving = Leaving { vm: Arc::clone(&vm_there), node: node_of_vm };
        let manifest = Manifest { sharing, ..vm_there.manifest.clone() };
        let outgoing = source::start(Box::new(leaving), pages, manifest, options).expect("started");
        *given.lock() = Some(Arc::new(outgoing));
    });
    let (vm, random) = (Arc::clone(vm), scenario.random(3 + 16 * nth as u64));
    node.spawn("guest-source", move || run_at_source(&vm, random));
    handle
}
