//! A VM that moves: both ends of it, and what they tell.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use libsg::event::{Event as Told, Observer};
use libsg::migrate::source::{Outgoing, Unscattered};
use libsg::page::{PageIndex, PageRange};
use parking_lot::Mutex;

use crate::clock::Node;
use crate::guest::Vm;
use crate::scenario::{After, DESTINATION, Plan, Role, SOURCE, Scenario, door};
use crate::{destination, source};

/// What was told by either end, and when.
#[derive(Debug, Default)]
pub struct Log {
    pub reached: BTreeMap<After, Duration>,
    pub gathered: Option<Duration>,
    pub lost_pages: u32,
    pub failed: Vec<(Role, String)>,
    pub lines: Vec<(Duration, String)>,
}

/// A VM that moves.
pub struct Move {
    /// Which of those that do.
    pub nth: usize,
    pub plan: Plan,
    pub vm: Arc<Vm>,
    pub source: source::Handle,
    pub destination: destination::Host,
    pub log: Arc<Mutex<Log>>,
}

impl Move {
    /// Starts its processes, on the hosts of source and destination.
    pub fn start(nth: usize, plan: &Plan, scenario: &Scenario, (from, to): (&Arc<Node>, &Arc<Node>)) -> Self {
        let vm = Vm::new(nth, plan, scenario.random(6 + 16 * nth as u64));
        let log = Arc::<Mutex<Log>>::default();
        let who = if scenario.vms.len() > 1 { format!("VM {nth}, ") } else { String::new() };
        let observe = |role, node| observer(role, who.clone(), node, &log);
        let destination = destination::start(to, (nth, plan), &vm, scenario, observe(DESTINATION, to));
        let source =
            source::start(from, (nth, plan), &vm, scenario, (door(nth).into(), observe(SOURCE, from)));
        Self { nth, plan: plan.clone(), vm, source, destination, log }
    }

    /// Another process at its source goes on with it.
    pub fn go_on(&self, of: Unscattered, scenario: &Scenario, node: &Arc<Node>) {
        let observer = observer(SOURCE, "again, ".into(), node, &self.log);
        source::go_on(node, (&self.plan, of), &self.vm, scenario, (&self.source, observer));
    }

    /// Pages of its largest install unit.
    pub fn unit_pages(&self) -> u64 {
        self.plan.regions.iter().map(|(_, unit)| u64::from(unit.pages())).max().unwrap_or(1)
    }

    pub fn outgoing(&self) -> Option<Arc<Outgoing>> {
        self.source.lock().clone()
    }
}

/// All pages of the VM.
pub fn all(vm: &Vm) -> PageRange {
    PageRange::new(PageIndex(0), vm.pages())
}

/// Writes down what an end tells.
fn observer(role: Role, who: String, node: &Arc<Node>, log: &Arc<Mutex<Log>>) -> Observer {
    let (node, log) = (Arc::clone(node), Arc::clone(log));
    Arc::new(move |told| {
        if node.is_dead() {
            return;
        }
        let now = node.host().now();
        let mut log = log.lock();
        let mut reached = |after| {
            log.reached.entry(after).or_insert(now);
        };
        match (role, told) {
            (DESTINATION, Told::Ready) => reached(After::Ready),
            (SOURCE, Told::Commit) => reached(After::Commit),
            (DESTINATION, Told::Resumed) => reached(After::Running),
            (SOURCE, Told::Evicted) => reached(After::Evicted),
            (_, Told::Gathered) => log.gathered = Some(now),
            (_, Told::Lost { pages }) => log.lost_pages += pages.iter().map(|range| range.pages).sum::<u32>(),
            (_, Told::Failed { message, .. }) => log.failed.push((role, message.clone())),
            _ => {}
        }
        log.lines.push((now, format!("{who}{role:?}: {told:?}")));
    })
}
