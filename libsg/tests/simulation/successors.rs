//! New processes on the hosts of source and destination, after those of the migration were killed: they know nothing
//! of it, and must not disturb it.
//!
//! At the source it is another VM, which wants to go the same way: to a destination that is at something else, or
//! waits for a VM that is no more. At the destination it is the same command once more: somebody waits for the VM at the
//! same door, to which a source that goes on dials again.

use std::sync::Arc;

use libsg::event::Observer;
use libsg::migrate::Mode;
use libsg::page::InstallUnit;

use crate::clock::Node;
use crate::content::Content;
use crate::guest::Vm;
use crate::moving::Move;
use crate::scenario::{Plan, Scenario, door};
use crate::{destination, source};

/// What such a VM is numbered from, so that no other has pages of the same content.
const FIRST: usize = 16;

const PAGES: u64 = 64;

/// A VM whose process came later.
pub struct Successor {
    vm: Arc<Vm>,
    source: source::Handle,
}

/// What is told by a process that came later: nothing happens after it.
fn unheard() -> Observer {
    Arc::new(|_| {})
}

/// Another VM, on the host of the source.
pub fn leaves(nth: usize, node: &Arc<Node>, scenario: &Scenario) -> Successor {
    let plan = Plan {
        memory: vec![Content::Version(1); PAGES as usize],
        regions: vec![(PAGES, InstallUnit::Page)],
        mode: Mode::ScatterGather,
        takes_once: false,
        ..scenario.vms[0].clone()
    };
    let vm = Vm::new(FIRST + nth, &plan, scenario.random(200 + nth as u64));
    let source = source::start(node, (FIRST + nth, &plan), &vm, scenario, (door(0).into(), unheard()));
    Successor { vm, source }
}

/// The same VM is waited for once more.
pub fn waits(of: &Move, node: &Arc<Node>, scenario: &Scenario) {
    destination::start(node, (of.nth, &of.plan), &of.vm, scenario, unheard());
}

impl Successor {
    /// Nobody takes it: it stays where it is, unharmed.
    pub fn breach(&self) -> Option<String> {
        let is_over = || self.source.lock().as_ref().is_some_and(|outgoing| outgoing.is_over());
        let breach = self.vm.breaches().into_iter().next();
        breach
            .or_else(|| self.vm.is_committed().then(|| "COMMIT was given to nobody".into()))
            .or_else(|| {
                let stays = self.vm.runs_at_source() || !is_over();
                (!stays).then(|| "without COMMIT the VM does not run on at the source".into())
            })
            .map(|what: String| format!("one owner: a VM that came later: {what}"))
    }
}
