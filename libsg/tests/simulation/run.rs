//! One run: the hosts, and what happens to them, step by step, with all contracts looked at in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use libsg::event::{Event as Told, Observer};
use libsg::host::simulation::Bug;
use libsg::ids::NodeId;
use libsg::migrate::source::Outgoing;
use libsg::page::{PageIndex, PageRange};
use libsg::server::ServerHandle;
use parking_lot::Mutex;

use crate::clock::{Host, Node, Step};
use crate::contracts::Contracts;
use crate::guest::Vm;
use crate::net::{Net, NodeNumber};
use crate::scenario::{After, DESTINATION, Event, Role, SOURCE, Scenario, address};
use crate::{destination, intermediary, source, stranger};

/// No run is longer.
const TIME_MAX: Duration = Duration::from_secs(120);

/// After everything is over, so long for what comes late.
const AFTERMATH: Duration = Duration::from_millis(300);

/// The same for a destination whose source died before COMMIT: it may wait for ever, and must not run the VM.
const ORPHANED: Duration = Duration::from_secs(5);

/// What was told by either end, and when.
#[derive(Debug, Default)]
pub struct Log {
    pub reached: BTreeMap<After, Duration>,
    pub gathered: Option<Duration>,
    pub lost_pages: u32,
    pub failed: Vec<(Role, String)>,
    lines: Vec<String>,
}

/// How a run went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The first breach of a contract.
    pub breach: Option<String>,
    pub turns: u64,
    pub time: Duration,
    pub trace: u64,
    pub evicted: bool,
    pub lost_pages: u32,
    pub carried_bytes: u64,
    /// The events that had happened.
    pub happened: Vec<Event>,
    /// What was told, for people.
    pub lines: Vec<String>,
}

/// A run under way.
pub struct Run {
    pub scenario: Scenario,
    pub host: Arc<Host>,
    pub vm: Arc<Vm>,
    pub nodes: BTreeMap<Role, Arc<Node>>,
    stranger: Arc<Node>,
    pub source: source::Handle,
    pub destination: destination::Host,
    pub intermediaries: BTreeMap<Role, intermediary::Handle>,
    pub log: Arc<Mutex<Log>>,
    /// What was done to whom, so far.
    pub done: Vec<Event>,
    /// Pages of which a copy was damaged.
    pub damaged: Vec<PageIndex>,
    dead_nodes: Vec<NodeNumber>,
    todo: Vec<Event>,
    later: Vec<(Duration, Later)>,
    next_node: usize,
}

/// What ends or follows an event.
#[derive(Clone, Copy, Debug)]
enum Later {
    Thaw(Role, usize),
    Mend(usize, usize),
    Restart(Role),
}

impl Run {
    pub fn new(scenario: &Scenario, bug: Option<Bug>) -> Self {
        let host = Host::new(scenario.seed, Net::new(scenario.seed, scenario.weather), bug);
        let vm = Vm::new(scenario.memory.clone());
        let log = Arc::<Mutex<Log>>::default();
        let mut nodes = BTreeMap::new();
        for (number, role) in scenario.roles().into_iter().enumerate() {
            nodes.insert(role, host.node(number));
            host.with_net(|net, _| net.add(number, address(role)));
        }
        let mut intermediaries = BTreeMap::new();
        for (role, memory) in scenario.members().zip(&scenario.intermediaries) {
            intermediaries.insert(role, intermediary::start(&nodes[&role], role, *memory));
        }
        let observe = |role| observer(role, &nodes[&role], &log);
        let destination = destination::start(&nodes[&DESTINATION], &vm, scenario, observe(DESTINATION));
        let source = source::start(&nodes[&SOURCE], &vm, scenario, observe(SOURCE));
        let stranger = host.node(nodes.len());
        if scenario.seed.is_multiple_of(stranger::ONE_IN) {
            stranger::start(&stranger, &vm, scenario);
        }
        let next_node = nodes.len() + 1;
        Self {
            scenario: scenario.clone(),
            host,
            vm,
            nodes,
            stranger,
            source,
            destination,
            intermediaries,
            log,
            done: Vec::new(),
            damaged: Vec::new(),
            dead_nodes: Vec::new(),
            todo: scenario.events.clone(),
            later: Vec::new(),
            next_node,
        }
    }

    /// Runs to the end, or to the first breach.
    pub fn run(mut self) -> Outcome {
        let mut contracts = Contracts::new(&self);
        let mut over_at = None;
        loop {
            let now = self.host.now();
            self.happen(now);
            let until = self.next_event().unwrap_or(TIME_MAX).min(over_at.unwrap_or(TIME_MAX));
            let stepped = self.host.step(until);
            contracts.check(&self);
            if contracts.is_broken(&self) || self.host.now() >= TIME_MAX {
                break;
            }
            if over_at.is_none() {
                over_at = self.aftermath().map(|time| self.host.now() + time);
            }
            if over_at.is_some_and(|at| self.host.now() >= at && stepped == Step::Nothing) {
                break;
            }
        }
        contracts.check_end(&self);
        self.end(contracts)
    }

    fn end(self, contracts: Contracts) -> Outcome {
        let breach = contracts.breach(&self);
        let nodes: Vec<_> = self.nodes.values().chain([&self.stranger]).cloned().collect();
        for node in nodes {
            self.host.with_net(|net, _| net.remove(node.number()));
            self.host.kill(&node);
        }
        let mut log = self.log.lock();
        Outcome {
            breach,
            turns: self.host.turns(),
            time: self.host.now(),
            trace: self.host.trace(),
            evicted: log.reached.contains_key(&After::Evicted),
            lost_pages: log.lost_pages,
            happened: self.done.clone(),
            carried_bytes: self.host.with_net(|net, _| net.carried_bytes()),
            lines: std::mem::take(&mut log.lines),
        }
    }

    pub fn outgoing(&self) -> Option<Arc<Outgoing>> {
        self.source.lock().clone()
    }

    /// The servers that live.
    pub fn servers(&self) -> Vec<(Role, Arc<ServerHandle>)> {
        let lives = |role: &Role| !self.nodes[role].is_dead();
        let servers = self.intermediaries.iter().filter(|(role, _)| lives(role));
        servers.filter_map(|(role, handle)| Some((*role, handle.lock().upgrade()?))).collect()
    }

    /// The host at which a member of the volume lives, with the incarnation that it had.
    pub fn server_of(&self, node: &NodeId) -> Option<Role> {
        self.servers().into_iter().find(|(_, server)| server.node() == node).map(|(role, _)| role)
    }

    pub fn is_node_dead(&self, number: NodeNumber) -> bool {
        self.dead_nodes.contains(&number)
    }

    pub fn is_dead(&self, role: Role) -> bool {
        self.nodes[&role].is_dead()
    }

    /// Whether both ends have nothing left to do, or are gone.
    fn is_over(&self) -> bool {
        let ended = self.destination.ended.lock().dissolved.is_some() || self.is_dead(DESTINATION);
        let left = self.is_dead(SOURCE) || self.outgoing().is_some_and(|outgoing| outgoing.is_over());
        ended && left
    }

    /// For how long to look on when all is decided; `None` before.
    fn aftermath(&self) -> Option<Duration> {
        let orphaned = self.is_dead(SOURCE) && !self.vm.is_committed();
        if self.is_over() { Some(AFTERMATH) } else { orphaned.then_some(ORPHANED) }
    }

    /// When something happens next, as far as is known.
    fn next_event(&self) -> Option<Duration> {
        let log = self.log.lock();
        let due = |event: &Event| Some(*log.reached.get(&event.after)? + event.delay);
        self.todo.iter().filter_map(due).chain(self.later.iter().map(|(at, _)| *at)).min()
    }

    /// Lets happen what is due.
    fn happen(&mut self, now: Duration) {
        self.log.lock().reached.entry(After::Start).or_insert(Duration::ZERO);
        let reached = self.log.lock().reached.clone();
        let is_due = |event: &Event| reached.get(&event.after).is_some_and(|at| *at + event.delay <= now);
        for event in self.todo.extract_if(.., |event| is_due(event)).collect::<Vec<_>>() {
            self.log.lock().lines.push(format!("{now:?} {event}"));
            self.event(event, now);
            self.done.push(event);
        }
        for (_, later) in self.later.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
            self.log.lock().lines.push(format!("{now:?} {later:?}"));
            match later {
                Later::Thaw(role, number) if self.nodes[&role].number() == number => {
                    self.host.freeze(number, false)
                }
                Later::Thaw(..) => {}
                Later::Mend(one, other) => self.host.with_net(|net, _| net.cut(one, other, false)),
                Later::Restart(role) => self.restart(role),
            }
        }
    }

    fn event(&mut self, event: Event, now: Duration) {
        use crate::scenario::What;
        let number = |role: Role| self.nodes[&role].number();
        match event.what {
            What::Kill(role, restart) => {
                self.kill(role);
                self.later.extend(restart.map(|time| (now + time, Later::Restart(role))));
            }
            What::Freeze(role, time) if !self.is_dead(role) => {
                self.host.freeze(number(role), true);
                self.later.push((now + time, Later::Thaw(role, number(role))));
            }
            What::Freeze(..) => {}
            What::Break(one, other) => {
                let (one, other) = (number(one), number(other));
                self.host.with_net(|net, _| net.break_links(one, other));
            }
            What::Cut(one, other, time) => {
                let (one, other) = (number(one), number(other));
                self.host.with_net(|net, _| net.cut(one, other, true));
                self.later.push((now + time, Later::Mend(one, other)));
            }
            What::Damage(role) => self.damage(role),
            What::Fill(role) => stranger::fill(&self.stranger, role, self.scenario.memory_of(role)),
            What::Limit(bytes_per_s) => {
                if let Some(incoming) = &*self.destination.incoming.lock() {
                    incoming.set_gather_limit(bytes_per_s);
                }
            }
        }
    }

    fn kill(&mut self, role: Role) {
        let node = Arc::clone(&self.nodes[&role]);
        if node.is_dead() {
            return;
        }
        match role {
            SOURCE => self.vm.source_died(),
            DESTINATION => self.vm.destination_died(),
            Role::Intermediary(_) => {}
        }
        self.host.with_net(|net, _| net.remove(node.number()));
        self.host.kill(&node);
        self.dead_nodes.push(node.number());
    }

    fn restart(&mut self, role: Role) {
        let Role::Intermediary(nth) = role else { return };
        if !self.is_dead(role) {
            return;
        }
        let node = self.host.node(self.next_node);
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), address(role)));
        self.intermediaries.insert(role, intermediary::start(&node, role, self.scenario.intermediaries[nth]));
        self.nodes.insert(role, node);
    }

    /// Flips a bit of some page that an intermediary holds.
    fn damage(&mut self, role: Role) {
        let Some((_, server)) = self.servers().into_iter().find(|(other, _)| *other == role) else { return };
        let Some(scatter) = self.outgoing().and_then(|outgoing| outgoing.scatter()) else { return };
        let mut random = self.scenario.random(5 + self.done.len() as u64);
        for (_, index) in self.servers() {
            let entries = index.index_entries(scatter.volume, scatter.epoch, all(&self.vm));
            let mut placed = entries.iter().filter_map(|entry| Some((entry.page, entry.placement?)));
            if let Some((page, at)) = placed.nth(random.below(20) as usize)
                && server.damage(scatter.volume, scatter.epoch, page, at, random.below(4096) as usize)
            {
                self.damaged.push(page);
                return;
            }
        }
    }
}

/// All pages of the VM.
pub fn all(vm: &Vm) -> PageRange {
    PageRange::new(PageIndex(0), vm.pages())
}

/// Writes down what an end tells.
fn observer(role: Role, node: &Arc<Node>, log: &Arc<Mutex<Log>>) -> Observer {
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
        log.lines.push(format!("{now:?} {role:?}: {told:?}"));
    })
}
