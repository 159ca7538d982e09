//! One run: the hosts, and what happens to them, step by step, with all contracts looked at in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsg::host::simulation::Bug;
use libsg::ids::NodeId;
use libsg::migrate::source::Outgoing;
use libsg::page::PageIndex;
use libsg::server::ServerHandle;

use crate::clock::{Director, Host, Next, Node, Step};
use crate::contracts::Contracts;
use crate::moving::{Move, all};
use crate::net::{Net, NodeNumber};
use crate::scenario::{After, DESTINATION, Event, Plan, Role, SOURCE, Scenario, What, address};
use crate::{intermediary, late, stranger, successors, writers};

/// No run is longer.
const TIME_MAX: Duration = Duration::from_secs(120);

/// After everything is over, so long for what comes late.
const AFTERMATH: Duration = Duration::from_millis(300);

/// The same for a destination whose source died before COMMIT: it may wait for ever, and must not run the VM.
const ORPHANED: Duration = Duration::from_secs(5);

/// How a run went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The first breach of a contract.
    pub breach: Option<String>,
    pub turns: u64,
    pub time: Duration,
    pub trace: u64,
    pub evicted: bool,
    pub lost_pages: u32,
    pub carried_bytes: u64,
    /// Of pages that clients moved themselves.
    pub moved_bytes: u64,
    pub flipped_bits: usize,
    /// The events that had happened.
    pub happened: Vec<Event>,
    /// What was told, for people.
    pub lines: Vec<String>,
}

/// A run under way.
pub struct Run {
    pub scenario: Scenario,
    pub host: Arc<Host>,
    /// The VMs that move, all of them from the same host to the same host.
    pub moves: Vec<Move>,
    pub nodes: BTreeMap<Role, Arc<Node>>,
    stranger: Arc<Node>,
    pub intermediaries: BTreeMap<Role, intermediary::Handle>,
    /// What was done to whom, so far.
    pub done: Vec<Event>,
    /// Pages of which a copy was damaged, with whose they are.
    pub damaged: Vec<(usize, PageIndex)>,
    dead_nodes: Vec<NodeNumber>,
    /// Processes at the ends that came later, and the VMs of those.
    successors: Vec<(Arc<Node>, Option<successors::Successor>)>,
    /// The migrations of processes that others took the places of: they are not ended in the name of the dead.
    gone: Vec<Arc<Outgoing>>,
    /// Intermediaries that were told to go, and whether they have; and the nodes of those that did.
    leaving: Vec<(Role, NodeNumber, Option<Duration>, Arc<AtomicBool>)>,
    left: Vec<NodeId>,
    todo: Vec<Event>,
    later: Vec<(Duration, Later)>,
    next_node: usize,
    /// What happened when, for people.
    lines: Vec<(Duration, String)>,
}

/// What ends or follows an event.
#[derive(Clone, Copy, Debug)]
enum Later {
    Thaw(Role, usize),
    Mend(usize, usize),
    Restart(Role),
    GoOn,
}

/// A run, with what must hold in it.
struct Directed {
    run: Run,
    contracts: Vec<Contracts>,
    over_at: Option<Duration>,
}

impl Directed {
    /// Until when threads may have their turns.
    fn until(&self) -> Duration {
        self.run.next_event().unwrap_or(TIME_MAX).min(self.over_at.unwrap_or(TIME_MAX))
    }
}

impl Director for Directed {
    fn happen(&mut self) -> Duration {
        self.run.happen(self.run.host.now());
        self.until()
    }

    fn look(&mut self, step: Step) -> Next {
        let Self { run, contracts, over_at } = self;
        contracts.iter_mut().zip(&run.moves).for_each(|(of, vm)| of.check(run, vm));
        let now = run.host.now();
        if run.breach(contracts).is_some() || now >= TIME_MAX {
            return Next::Over;
        }
        if over_at.is_none() {
            *over_at = run.aftermath().map(|time| now + time);
        }
        match over_at {
            Some(at) if now >= *at && step == Step::Nothing => Next::Over,
            _ if run.is_due(now) => Next::Happens,
            _ => Next::Turns(self.until()),
        }
    }
}

impl Run {
    pub fn new(scenario: &Scenario, bug: Option<Bug>) -> Self {
        let host = Host::new(scenario.seed, Net::new(scenario.seed, scenario.weather), bug);
        let mut nodes = BTreeMap::new();
        for (number, role) in scenario.roles().into_iter().enumerate() {
            nodes.insert(role, host.node(number));
            host.with_net(|net, _| net.add(number, address(role)));
        }
        let mut intermediaries = BTreeMap::new();
        for (role, memory) in scenario.lenders().zip(&scenario.intermediaries) {
            let others = scenario.strangers();
            intermediaries.insert(role, intermediary::start(&nodes[&role], role, *memory, others));
        }
        let hosts = (&nodes[&SOURCE], &nodes[&DESTINATION]);
        let start = |(nth, plan): (usize, &Plan)| Move::start(nth, plan, scenario, hosts);
        let moves: Vec<_> = scenario.vms.iter().enumerate().map(start).collect();
        let stranger = host.node(nodes.len());
        if scenario.seed.is_multiple_of(stranger::ONE_IN) {
            stranger::start(&stranger, &moves[0].vm, scenario);
        }
        if scenario.writers {
            writers::start(&stranger, &moves[0].vm, scenario);
            late::start(&stranger, &moves[0].vm, scenario);
        }
        if scenario.events.iter().any(|event| matches!(event.what, What::Flip(..))) {
            host.with_net(|net, _| net.expect_flips());
        }
        let next_node = nodes.len() + 1;
        Self {
            scenario: scenario.clone(),
            host,
            moves,
            nodes,
            stranger,
            intermediaries,
            done: Vec::new(),
            damaged: Vec::new(),
            dead_nodes: Vec::new(),
            successors: Vec::new(),
            gone: Vec::new(),
            leaving: Vec::new(),
            left: Vec::new(),
            todo: scenario.events.clone(),
            later: Vec::new(),
            next_node,
            lines: Vec::new(),
        }
    }

    /// Runs to the end, or to the first breach.
    pub fn run(self) -> Outcome {
        let contracts = self.moves.iter().map(Contracts::new).collect();
        let host = Arc::clone(&self.host);
        let Directed { mut contracts, run, .. } = host.run(Directed { run: self, contracts, over_at: None });
        contracts.iter_mut().zip(&run.moves).for_each(|(of, vm)| of.check_end(&run, vm));
        run.end(&contracts)
    }

    /// The first contract that is broken, and whose.
    fn breach(&self, contracts: &[Contracts]) -> Option<String> {
        let mut found =
            contracts.iter().zip(&self.moves).filter_map(|(of, vm)| Some((vm.nth, of.breach(vm)?)));
        let Some((nth, what)) = found.next() else {
            return self.successors.iter().find_map(|(_, vm)| vm.as_ref()?.breach());
        };
        Some(if self.moves.len() > 1 { format!("VM {nth}: {what}") } else { what })
    }

    fn end(self, contracts: &[Contracts]) -> Outcome {
        let breach = self.breach(contracts);
        let later = self.successors.iter().map(|(node, _)| node);
        let nodes: Vec<_> = self.nodes.values().chain([&self.stranger]).chain(later).cloned().collect();
        for node in nodes {
            self.host.with_net(|net, _| net.remove(node.number()));
            self.host.kill(&node);
        }
        let logs: Vec<_> = self.moves.iter().map(|vm| vm.log.lock()).collect();
        let mut lines: Vec<_> = logs.iter().flat_map(|log| log.lines.clone()).chain(self.lines).collect();
        lines.sort_by_key(|(at, _)| *at);
        Outcome {
            breach,
            turns: self.host.turns(),
            time: self.host.now(),
            trace: self.host.trace(),
            evicted: logs.iter().all(|log| log.reached.contains_key(&After::Evicted)),
            lost_pages: logs.iter().map(|log| log.lost_pages).sum(),
            happened: self.done.clone(),
            carried_bytes: self.host.with_net(|net, _| net.carried_bytes()),
            moved_bytes: self.host.with_net(|net, _| net.side().map_or(0, |side| side.moved_bytes())),
            flipped_bits: self.host.with_net(|net, _| net.flipped()),
            lines: lines.into_iter().map(|(at, line)| format!("{at:?} {line}")).collect(),
        }
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

    /// Whether a host is stopped now, and goes on later.
    pub fn is_stopped(&self, role: Role) -> bool {
        self.later.iter().any(|(_, later)| matches!(later, Later::Thaw(other, _) if *other == role))
    }

    /// Whether both ends of a VM have nothing left to do, or are gone.
    fn is_over(&self, vm: &Move) -> bool {
        let ended = vm.destination.ended.lock().dissolved.is_some() || self.is_dead(DESTINATION);
        let left = self.is_dead(SOURCE) || vm.outgoing().is_some_and(|outgoing| outgoing.is_over());
        ended && left
    }

    /// For how long to look on when all is decided; `None` before.
    fn aftermath(&self) -> Option<Duration> {
        let orphaned = |vm: &Move| self.is_dead(SOURCE) && !vm.vm.is_committed();
        let left: Vec<_> = self.moves.iter().filter(|vm| !self.is_over(vm)).collect();
        left.iter().all(|vm| orphaned(vm)).then_some(if left.is_empty() { AFTERMATH } else { ORPHANED })
    }

    /// When something happens next, as far as is known.
    fn next_event(&self) -> Option<Duration> {
        let log = self.moves[0].log.lock();
        let due = |event: &Event| Some(*log.reached.get(&event.after)? + event.delay);
        self.todo.iter().filter_map(due).chain(self.later.iter().map(|(at, _)| *at)).min()
    }

    /// Whether something is due.
    fn is_due(&self, now: Duration) -> bool {
        let has_left = |(.., left): &(_, _, _, Arc<AtomicBool>)| left.load(Ordering::Acquire);
        self.next_event().is_some_and(|at| at <= now) || self.leaving.iter().any(has_left)
    }

    /// Lets happen what is due.
    fn happen(&mut self, now: Duration) {
        let reached = {
            let mut log = self.moves[0].log.lock();
            log.reached.entry(After::Start).or_insert(Duration::ZERO);
            log.reached.clone()
        };
        let is_due = |event: &Event| reached.get(&event.after).is_some_and(|at| *at + event.delay <= now);
        for event in self.todo.extract_if(.., |event| is_due(event)).collect::<Vec<_>>() {
            self.lines.push((now, event.to_string()));
            self.event(event, now);
            self.done.push(event);
        }
        self.let_go(now);
        for (_, later) in self.later.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
            self.lines.push((now, format!("{later:?}")));
            match later {
                Later::Thaw(role, number) if self.nodes[&role].number() == number => {
                    self.host.freeze(number, false)
                }
                Later::Thaw(..) => {}
                Later::Mend(one, other) => self.host.with_net(|net, _| net.cut(one, other, false)),
                Later::Restart(role) => self.restart(role),
                Later::GoOn => self.go_on(),
            }
        }
    }

    fn event(&mut self, event: Event, now: Duration) {
        let number = |role: Role| self.nodes[&role].number();
        match event.what {
            What::Kill(role, restart) => {
                if self.kill(role) || matches!(role, Role::Intermediary(_)) {
                    self.later.extend(restart.map(|time| (now + time, Later::Restart(role))));
                }
            }
            What::Succeed(time) => {
                if self.end_process(SOURCE, |net, node| net.orphan(node, now)) {
                    self.later.push((now + time, Later::GoOn));
                }
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
            What::Leave(role, restart) if !self.is_dead(role) => {
                let node = Arc::clone(&self.nodes[&role]);
                let left = intermediary::leave(&node, &self.intermediaries[&role], Vec::new());
                self.leaving.push((role, node.number(), restart, left));
            }
            What::Leave(..) => {}
            What::Damage(role) => self.damage(role),
            What::Flip(from, to) => {
                let random = self.scenario.random(300 + self.done.len() as u64);
                let (from, to) = (number(from), number(to));
                self.host.with_net(|net, _| net.flip(from, to, random));
            }
            What::Fill(role) => stranger::fill(&self.stranger, role, self.scenario.memory_of(role)),
            What::Limit(bytes_per_s) => {
                for incoming in self.moves.iter().filter_map(|vm| vm.destination.incoming.lock().clone()) {
                    incoming.set_gather_limit(bytes_per_s);
                }
            }
        }
    }

    /// Whether it lived.
    fn kill(&mut self, role: Role) -> bool {
        if !self.is_dead(role) {
            match role {
                SOURCE => self.moves.iter().for_each(|of| of.vm.source_died()),
                DESTINATION => self.moves.iter().for_each(|of| of.vm.destination_died()),
                Role::Intermediary(_) => {}
            }
        }
        self.end_process(role, Net::remove)
    }

    /// Ends a process, and its connections as said. Whether it lived: what was in its memory may outlive it.
    fn end_process(&mut self, role: Role, disconnect: impl FnOnce(&mut Net, NodeNumber)) -> bool {
        let node = Arc::clone(&self.nodes[&role]);
        if node.is_dead() {
            return false;
        }
        self.host.with_net(|net, _| disconnect(net, node.number()));
        self.host.kill(&node);
        self.dead_nodes.push(node.number());
        true
    }

    /// Ends the processes of those that have handed over.
    fn let_go(&mut self, now: Duration) {
        let has_left = |(.., left): &(_, _, _, Arc<AtomicBool>)| left.load(Ordering::Acquire);
        for (role, number, restart, _) in self.leaving.extract_if(.., |of| has_left(of)).collect::<Vec<_>>() {
            let node = Arc::clone(&self.nodes[&role]);
            if node.is_dead() || node.number() != number {
                continue;
            }
            self.lines.push((now, format!("{role:?} has left")));
            self.left.extend(self.intermediaries[&role].lock().upgrade().map(|server| server.node().clone()));
            self.host.with_net(|net, _| net.remove(node.number()));
            self.host.kill(&node);
            self.later.extend(restart.map(|time| (now + time, Later::Restart(role))));
        }
    }

    /// Whether an intermediary has left, and nothing shall be lost with it.
    pub fn has_left(&self, node: &NodeId) -> bool {
        self.left.contains(node)
    }

    /// Whether any has.
    pub fn has_anybody_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// A new process on a host whose last one is gone.
    fn restart(&mut self, role: Role) {
        if !self.is_dead(role) {
            return;
        }
        let node = self.host.node(self.next_node);
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), address(role)));
        match role {
            Role::Intermediary(nth) => {
                let memory = self.scenario.intermediaries[nth];
                let others = self.scenario.strangers();
                self.intermediaries.insert(role, intermediary::start(&node, role, memory, others));
                self.nodes.insert(role, node);
            }
            // What is looked at of the ends are those of the migration.
            Role::Source => {
                let vm = successors::leaves(self.successors.len(), &node, &self.scenario);
                self.successors.push((node, Some(vm)));
            }
            Role::Destination => {
                self.moves.iter().for_each(|of| successors::waits(of, &node, &self.scenario));
                self.successors.push((node, None));
            }
        }
    }

    /// Another process at the source goes on with those VMs for which COMMIT was given, or was about to be.
    fn go_on(&mut self) {
        let node = self.host.node(self.next_node);
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), address(SOURCE)));
        for of in &self.moves {
            match of.vm.noted() {
                Some(unscattered) => {
                    self.gone.extend(of.outgoing());
                    of.go_on(unscattered, &self.scenario, &node);
                }
                // Nobody was told of it, and what is run is looked at no more.
                None => of.vm.source_died(),
            }
        }
        self.nodes.insert(SOURCE, node);
    }

    /// Flips a bit of some page that an intermediary holds.
    fn damage(&mut self, role: Role) {
        let Some((_, server)) = self.servers().into_iter().find(|(other, _)| *other == role) else { return };
        let mut random = self.scenario.random(5 + self.done.len() as u64);
        let vm = &self.moves[random.below(self.moves.len() as u64) as usize];
        let Some(scatter) = vm.outgoing().and_then(|outgoing| outgoing.scatter()) else { return };
        for (_, index) in self.servers() {
            let entries = index.index_entries(scatter.volume, scatter.epoch, all(&vm.vm));
            let mut placed = entries.iter().filter_map(|entry| Some((entry.page, entry.placement?)));
            if let Some((page, at)) = placed.nth(random.below(20) as usize)
                && server.damage(scatter.volume, scatter.epoch, page, at, random.below(4096) as usize)
            {
                // Others may have what was damaged as theirs.
                let content = vm.vm.contents()[page.as_usize()];
                for other in &self.moves {
                    let contents = other.vm.contents();
                    let same = |page: &PageIndex| contents[page.as_usize()] == content;
                    let pages = all(&other.vm).iter().filter(same).map(|page| (other.nth, page));
                    self.damaged.extend(pages.filter(|_| self.scenario.sharing));
                }
                self.damaged.push((vm.nth, page));
                return;
            }
        }
    }
}
