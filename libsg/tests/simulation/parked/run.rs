//! One run of a VM that is parked and claimed, with what must hold looked at in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsg::event::{Event, Observer};
use libsg::host::simulation::Bug;
use libsg::ids::Epoch;
use libsg::migrate::destination::{ClaimOptions, DestinationOptions, Incoming, claim};
use libsg::migrate::source::{Outgoing, To};
use libsg::page::{PageIndex, PageRange};
use libsg::server::ServerHandle;
use parking_lot::Mutex;

use super::{After, At, Parking, What, Who};
use crate::clock::{Director, Host, Next, Node, Step};
use crate::destination::{ALWAYS, arriving};
use crate::guest::Vm;
use crate::memory::{Early, Memory};
use crate::net::Net;
use crate::random::Random;
use crate::run::Outcome;
use crate::scenario::{Role, SOURCE, address, secret};
use crate::{intermediary, source};

/// The name under which the VM is parked.
const NAME: &str = "parked";

/// No run is longer.
const TIME_MAX: Duration = Duration::from_secs(200);

/// The last claim comes so long after everything else: whoever claimed before and is gone has no time left.
const LAST_AFTER: Duration = Duration::from_secs(25);

/// After everything is over, so long for what comes late.
const AFTERMATH: Duration = Duration::from_millis(300);

/// What was told, and when.
#[derive(Default)]
struct Log {
    reached: BTreeMap<After, Duration>,
    lines: Vec<(Duration, String)>,
}

/// Somebody who claims.
struct Claiming {
    node: Arc<Node>,
    memory: Arc<Memory>,
    incoming: Arc<Mutex<Option<Arc<Incoming>>>>,
    ended: Arc<Mutex<Ended>>,
}

#[derive(Clone, Debug, Default)]
struct Ended {
    ran: Option<Result<(), String>>,
    /// How many pages were lost.
    gathered: Option<Result<bool, String>>,
    over: bool,
}

/// A run under way.
pub struct Run {
    parking: Parking,
    host: Arc<Host>,
    vm: Arc<Vm>,
    source_node: Arc<Node>,
    source: source::Handle,
    /// The parking of processes that others took the places of: it is not ended in the name of the dead.
    gone: Vec<Arc<Outgoing>>,
    intermediaries: Vec<(Arc<Node>, intermediary::Handle)>,
    claims: Vec<Option<Claiming>>,
    log: Arc<Mutex<Log>>,
    /// Intermediaries that were told to go, and whether they have.
    leaving: Vec<(usize, usize, Option<Duration>, Arc<AtomicBool>)>,
    todo: Vec<At<What>>,
    later: Vec<(Duration, Later)>,
    next_node: usize,
    checked_evicted: bool,
    breach: Option<String>,
    last_at: Option<Duration>,
    over_at: Option<Duration>,
}

impl Director for Run {
    fn happen(&mut self) -> Duration {
        self.let_happen(self.host.now());
        self.until()
    }

    fn look(&mut self, step: Step) -> Next {
        self.check();
        let now = self.host.now();
        if self.breach.is_some() || now >= TIME_MAX {
            return Next::Over;
        }
        if self.over_at.is_none() && self.is_over() {
            self.over_at = Some(now + AFTERMATH);
        }
        match self.over_at {
            Some(at) if now >= at && step == Step::Nothing => Next::Over,
            _ if self.is_due(now) => Next::Happens,
            _ => Next::Turns(self.until()),
        }
    }
}

#[derive(Clone, Copy)]
enum Later {
    Thaw(usize),
    Mend(usize, usize),
    Restart(usize),
    GoOn,
}

impl Run {
    pub fn new(parking: &Parking, bug: Option<Bug>) -> Self {
        let base = &parking.base;
        let host = Host::new(base.seed, Net::new(base.seed, base.weather), bug);
        let mut number = 0;
        let mut node = |at| {
            let node = host.node(number);
            host.with_net(|net, _| net.add(number, at));
            number += 1;
            node
        };
        let source_node = node(address(SOURCE));
        let start = |(nth, memory): (usize, &u64)| {
            let node = node(address(Role::Intermediary(nth)));
            let handle = intermediary::start(&node, Role::Intermediary(nth), *memory, base.strangers());
            (node, handle)
        };
        let intermediaries: Vec<_> = base.intermediaries.iter().enumerate().map(start).collect();
        let vm = Vm::new(0, &base.vms[0], base.random(6));
        let log = Arc::<Mutex<Log>>::default();
        let to = (To::parked(NAME), observer(None, &source_node, &log));
        let source = source::start(&source_node, (0, &base.vms[0]), &vm, base, to);
        log.lock().reached.insert(After::Start, Duration::ZERO);
        Self {
            parking: parking.clone(),
            host,
            vm,
            source_node,
            source,
            gone: Vec::new(),
            claims: parking.claims.iter().map(|_| None).collect(),
            intermediaries,
            log,
            leaving: Vec::new(),
            todo: parking.events.clone(),
            later: Vec::new(),
            next_node: number,
            checked_evicted: false,
            breach: None,
            last_at: None,
            over_at: None,
        }
    }

    /// Runs to the end, or to the first breach.
    pub fn run(self) -> Outcome {
        let host = Arc::clone(&self.host);
        let mut run = host.run(self);
        run.check_end();
        run.end()
    }

    /// Until when threads may have their turns.
    fn until(&self) -> Duration {
        self.next_event().unwrap_or(TIME_MAX).min(self.over_at.unwrap_or(TIME_MAX))
    }

    fn end(self) -> Outcome {
        let claimants = self.claims.iter().flatten().map(|claiming| Arc::clone(&claiming.node));
        let members = self.intermediaries.iter().map(|(node, _)| Arc::clone(node));
        let nodes: Vec<_> = claimants.chain(members).chain([Arc::clone(&self.source_node)]).collect();
        for node in nodes {
            self.host.with_net(|net, _| net.remove(node.number()));
            self.host.kill(&node);
        }
        let log = self.log.lock();
        Outcome {
            breach: self.breach.clone(),
            turns: self.host.turns(),
            time: self.host.now(),
            trace: self.host.trace(),
            evicted: log.reached.contains_key(&After::Evicted),
            lost_pages: 0,
            happened: Vec::new(),
            carried_bytes: self.host.with_net(|net, _| net.carried_bytes()),
            moved_bytes: self.host.with_net(|net, _| net.side().map_or(0, |side| side.moved_bytes())),
            flipped_bits: 0,
            lines: log.lines.iter().map(|(at, line)| format!("{at:?} {line}")).collect(),
        }
    }

    fn broken(&mut self, what: String) {
        self.breach.get_or_insert(what);
    }

    fn servers(&self) -> Vec<Arc<ServerHandle>> {
        let living = self.intermediaries.iter().filter(|(node, _)| !node.is_dead());
        living.filter_map(|(_, handle)| handle.lock().upgrade()).collect()
    }

    fn node_of(&self, who: Who) -> Option<Arc<Node>> {
        match who {
            Who::Source => Some(Arc::clone(&self.source_node)),
            Who::Intermediary(nth) => Some(Arc::clone(&self.intermediaries[nth].0)),
            Who::Claimant(nth) => self.claims[nth].as_ref().map(|claiming| Arc::clone(&claiming.node)),
        }
    }

    /// When something happens next, as far as is known.
    fn next_event(&self) -> Option<Duration> {
        let log = self.log.lock();
        let due = |after: &After, delay: Duration| Some(*log.reached.get(after)? + delay);
        let events = self.todo.iter().filter_map(|event| due(&event.after, event.delay));
        let claims = self.open_claims().filter_map(|nth| {
            let At { after, delay, .. } = self.parking.claims[nth];
            due(&after, delay)
        });
        events.chain(claims).chain(self.later.iter().map(|(at, _)| *at)).chain(self.last_at).min()
    }

    fn open_claims(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.claims.len()).filter(|nth| self.claims[*nth].is_none() && *nth < self.parking.claims.len())
    }

    /// Whether something is due.
    fn is_due(&self, now: Duration) -> bool {
        let has_left = |(.., left): &(_, _, _, Arc<AtomicBool>)| left.load(Ordering::Acquire);
        self.next_event().is_some_and(|at| at <= now) || self.leaving.iter().any(has_left)
    }

    /// Lets happen what is due.
    fn let_happen(&mut self, now: Duration) {
        let reached = self.log.lock().reached.clone();
        let is_due = |after: &After, delay: Duration| reached.get(after).is_some_and(|at| *at + delay <= now);
        for event in self.todo.extract_if(.., |event| is_due(&event.after, event.delay)).collect::<Vec<_>>() {
            self.log.lock().lines.push((now, format!("{:?}", event.what)));
            self.event(event.what, now);
        }
        self.let_go(now);
        for (_, later) in self.later.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
            match later {
                Later::Thaw(number) => self.host.freeze(number, false),
                Later::Mend(one, other) => self.host.with_net(|net, _| net.cut(one, other, false)),
                Later::Restart(nth) => self.restart(nth),
                Later::GoOn => self.go_on(),
            }
        }
        let due: Vec<_> = self
            .open_claims()
            .filter(|nth| {
                let At { after, delay, .. } = self.parking.claims[*nth];
                is_due(&after, delay)
            })
            .collect();
        due.into_iter().for_each(|nth| self.claim(nth, false));
        if self.last_at.is_some_and(|at| at <= now) {
            self.last_at = None;
            self.claims.push(None);
            // The operator knows that the VM runs nowhere, and that nobody else is at it.
            let is_at_it = |claiming: &Claiming| !claiming.node.is_dead() && !claiming.ended.lock().over;
            let force = !self.claims.iter().flatten().any(is_at_it) && !self.vm.has_run();
            self.claim(self.claims.len() - 1, force);
        }
    }

    fn event(&mut self, what: What, now: Duration) {
        match what {
            What::Kill(who, restart) => {
                let Some(node) = self.node_of(who).filter(|node| !node.is_dead()) else { return };
                match who {
                    Who::Source => self.vm.source_died(),
                    Who::Claimant(nth) => {
                        let runs = self.claims[nth].as_ref().is_some_and(|c| c.memory.has_guest());
                        if runs {
                            self.vm.destination_died();
                        }
                    }
                    Who::Intermediary(nth) => {
                        self.later.extend(restart.map(|time| (now + time, Later::Restart(nth))));
                    }
                }
                self.host.with_net(|net, _| net.remove(node.number()));
                self.host.kill(&node);
            }
            What::Succeed(time) if !self.source_node.is_dead() => {
                let node = Arc::clone(&self.source_node);
                self.host.with_net(|net, _| net.orphan(node.number(), now));
                self.host.kill(&node);
                self.later.push((now + time, Later::GoOn));
            }
            What::Succeed(_) => {}
            What::Freeze(who, time) => {
                let Some(node) = self.node_of(who).filter(|node| !node.is_dead()) else { return };
                self.host.freeze(node.number(), true);
                self.later.push((now + time, Later::Thaw(node.number())));
            }
            What::Break(one, other) | What::Cut(one, other, _) => {
                let (Some(one), Some(other)) = (self.node_of(one), self.node_of(other)) else { return };
                let (one, other) = (one.number(), other.number());
                let What::Cut(.., time) = what else {
                    self.host.with_net(|net, _| net.break_links(one, other));
                    return;
                };
                self.host.with_net(|net, _| net.cut(one, other, true));
                self.later.push((now + time, Later::Mend(one, other)));
            }
            What::Leave(nth, restart) => {
                let (node, handle) = &self.intermediaries[nth];
                if !node.is_dead() {
                    let others = self.parking.base.members().map(address).collect();
                    let left = intermediary::leave(node, handle, others);
                    self.leaving.push((nth, node.number(), restart, left));
                }
            }
            What::GiveUp(nth) => {
                let Some(claiming) = &self.claims[nth] else { return };
                // As its operator's thread does: who waits for the answer is not this one.
                let incoming = claiming.incoming.lock().clone();
                if let Some(incoming) = incoming.filter(|_| !claiming.node.is_dead()) {
                    claiming.node.spawn("operator", move || {
                        let _ = incoming.cancel();
                    });
                }
            }
        }
    }

    /// Ends the processes of those that have handed over.
    fn let_go(&mut self, now: Duration) {
        let has_left = |(.., left): &(_, _, _, Arc<AtomicBool>)| left.load(Ordering::Acquire);
        for (nth, number, restart, _) in self.leaving.extract_if(.., |of| has_left(of)).collect::<Vec<_>>() {
            let node = Arc::clone(&self.intermediaries[nth].0);
            if !node.is_dead() && node.number() == number {
                self.log.lock().lines.push((now, format!("intermediary {nth} has left")));
                self.host.with_net(|net, _| net.remove(number));
                self.host.kill(&node);
                self.later.extend(restart.map(|time| (now + time, Later::Restart(nth))));
            }
        }
    }

    fn restart(&mut self, nth: usize) {
        let node = self.host.node(self.next_node);
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), address(Role::Intermediary(nth))));
        let (memory, others) = (self.parking.base.intermediaries[nth], self.parking.base.strangers());
        let handle = intermediary::start(&node, Role::Intermediary(nth), memory, others);
        self.intermediaries[nth] = (node, handle);
    }

    /// Another process at the source goes on parking the VM. One whose state is nowhere else yet is looked at no more.
    fn go_on(&mut self) {
        let Some(of) = self.vm.noted() else { return self.vm.source_died() };
        if of.is_committed() {
            self.vm.commit();
        }
        let node = self.host.node(self.next_node);
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), address(SOURCE)));
        self.gone.extend(self.source.lock().take());
        let (base, observer) = (&self.parking.base, observer(None, &node, &self.log));
        source::go_on(&node, (&base.vms[0], of), &self.vm, base, (&self.source, observer));
        self.source_node = node;
    }

    /// A new host claims the VM.
    fn claim(&mut self, nth: usize, force: bool) {
        let node = self.host.node(self.next_node);
        let at = ([10, 0, 1, self.next_node as u8], 7700).into();
        self.next_node += 1;
        self.host.with_net(|net, _| net.add(node.number(), at));
        let base = &self.parking.base;
        let random: Random = base.random(100 + nth as u64);
        let (memory, vm) = arriving(&node, &self.vm, Early::Never, (random, base.think));
        let wanted = ClaimOptions {
            name: NAME.into(),
            intermediaries: base.lenders().map(address).collect(),
            force,
            engines: None,
        };
        let options = DestinationOptions {
            name: format!("claimant {nth}"),
            gather_limit: base.gather_limit,
            source_grace: base.grace,
            member_grace: base.grace,
            observer: observer(Some(nth), &node, &self.log),
            ..DestinationOptions::new(at, secret(), node.connector())
        };
        let claiming = Claiming { node, memory, incoming: Arc::default(), ended: Arc::default() };
        let (handle, ended) = (Arc::clone(&claiming.incoming), Arc::clone(&claiming.ended));
        let how = if force { " by force" } else { "" };
        self.log.lock().lines.push((self.host.now(), format!("claim {nth}{how}")));
        claiming.node.spawn("vmm-claim", move || {
            let incoming = Arc::new(claim(vm, wanted, options).expect("starts"));
            *handle.lock() = Some(Arc::clone(&incoming));
            let ran = incoming.wait_running(ALWAYS).map_err(|error| error.chain());
            ended.lock().ran = Some(ran);
            let gathered = incoming.wait_gathered(ALWAYS);
            let lost = gathered.map(|report| report.status != libsg::report::Status::Ok);
            ended.lock().gathered = Some(lost.map_err(|error| error.chain()));
            let _ = incoming.wait_dissolved(ALWAYS);
            ended.lock().over = true;
        });
        self.claims[nth] = Some(claiming);
    }

    fn has_source_ended(&self) -> bool {
        self.source_node.is_dead() || self.source.lock().as_ref().is_some_and(|outgoing| outgoing.is_over())
    }

    /// Whether there is nothing left to come. The last claim is made when there is nothing else.
    fn is_over(&mut self) -> bool {
        let ended = |claiming: &Claiming| claiming.node.is_dead() || claiming.ended.lock().over;
        let now = self.host.now();
        let waits_for_nothing = {
            let log = self.log.lock();
            let comes = |after: &After| log.reached.contains_key(after);
            !self.todo.iter().any(|event| comes(&event.after))
                && !self.open_claims().any(|nth| comes(&self.parking.claims[nth].after))
        };
        let rests = self.later.is_empty() && waits_for_nothing && self.has_source_ended();
        if !rests || !self.claims.iter().flatten().all(ended) {
            return false;
        }
        if self.claims.len() == self.parking.claims.len() && self.last_at.is_none() {
            self.last_at = Some(now + LAST_AFTER);
        }
        self.last_at.is_none()
    }

    fn check(&mut self) {
        if let Some(breach) = self.vm.breaches().first().cloned() {
            self.broken(breach);
        }
        let evicted = self.log.lock().reached.contains_key(&After::Evicted);
        if evicted && !std::mem::replace(&mut self.checked_evicted, true) {
            self.check_evicted();
        }
    }

    /// At the moment at which it is said: the source is needed by nobody.
    fn check_evicted(&mut self) {
        if !self.parking.keeps_intermediaries() || self.vm.has_run() {
            return;
        }
        let Some(volume) = self.source.lock().as_ref().and_then(|outgoing| Some(outgoing.scatter()?.volume))
        else {
            return;
        };
        let servers = self.servers();
        if !servers.iter().any(|server| server.knows_commit(volume)) {
            self.broken("evicted means evicted: nobody knows of COMMIT".into());
        }
        let newest = Epoch(u64::MAX);
        let contents = self.vm.contents();
        for (page, content) in (0..).map(PageIndex).zip(&contents).filter(|(_, content)| !content.is_zero()) {
            let found = servers.iter().any(|index| {
                let entries = index.index_entries(volume, newest, PageRange::new(page, 1));
                entries.iter().filter_map(|entry| entry.placement).any(|place| {
                    let at = |server: &Arc<ServerHandle>| server.page_at(volume, newest, page, place);
                    servers.iter().filter_map(at).any(|bytes| content.is(page, &bytes))
                })
            });
            if !found {
                self.broken(format!("evicted means evicted: {page} cannot be had"));
                return;
            }
        }
    }

    /// When nothing happens any more.
    fn check_end(&mut self) {
        let (committed, at_source) = (self.vm.is_committed(), self.vm.runs_at_source());
        if !committed && !self.source_node.is_dead() && !at_source {
            self.broken("one owner: without COMMIT the VM does not run on at the source".into());
        }
        let evicted = self.log.lock().reached.contains_key(&After::Evicted);
        let quiet = self.parking.events.is_empty();
        let room: u64 = self.parking.base.intermediaries.iter().sum();
        let fits = room >= self.parking.base.room_for_all();
        if quiet && fits && !evicted {
            self.broken(format!("nothing happened: it was not parked: {:?}", self.ends()));
        }
        // The keeper's answer may be lost: it is parked nevertheless, and the source does not know.
        if evicted && self.parking.keeps_intermediaries() {
            self.check_claims(quiet);
        }
    }

    /// No intermediary died, all ways are mended: whoever came last has the VM, unless another had it.
    fn check_claims(&mut self, quiet: bool) {
        let ended = self.ends();
        if !self.vm.has_run() {
            let is_stuck = |ended: &Ended| ended.ran.is_none();
            let asked = ended.iter().any(is_stuck);
            // Who was killed between its question and the answer may have been written down.
            let died = self.claims.iter().flatten().any(|claiming| claiming.node.is_dead());
            if !(died || asked && !quiet) {
                self.broken(format!("a death is an event: a parked VM cannot be had: {ended:?}"));
            }
            return;
        }
        for (nth, claiming) in self.claims.iter().enumerate() {
            let Some(claiming) = claiming.as_ref().filter(|c| c.memory.has_guest() && !c.node.is_dead())
            else {
                continue;
            };
            let ended = claiming.ended.lock().clone();
            let lost = claiming.memory.poisoned();
            let frozen = self
                .parking
                .events
                .iter()
                .any(|event| matches!(event.what, What::Freeze(..) | What::Cut(..)));
            if ended.gathered != Some(Ok(false)) && !frozen {
                self.breach.get_or_insert(format!(
                    "a death is an event: claimant {nth} does not have the VM's pages: {ended:?}, lost {lost:?}"
                ));
            }
        }
        let used: u64 = self.servers().iter().map(|server| server.statistics().used_bytes).sum();
        if quiet && used > 0 {
            self.broken("nothing happened: an intermediary still holds pages".into());
        }
    }

    fn ends(&self) -> Vec<Ended> {
        self.claims.iter().flatten().map(|claiming| claiming.ended.lock().clone()).collect()
    }
}

/// Writes down what an end tells.
fn observer(claim: Option<usize>, node: &Arc<Node>, log: &Arc<Mutex<Log>>) -> Observer {
    let (node, log) = (Arc::clone(node), Arc::clone(log));
    Arc::new(move |told| {
        if node.is_dead() {
            return;
        }
        let now = node.host().now();
        let mut log = log.lock();
        let after = match (claim, told) {
            (None, Event::Commit) => Some(After::Commit),
            (None, Event::Evicted) => Some(After::Evicted),
            (Some(nth), Event::Claimed { .. }) => Some(After::Claimed(nth)),
            (Some(nth), Event::Resumed) => Some(After::Running(nth)),
            _ => None,
        };
        if let Some(after) = after {
            log.reached.entry(after).or_insert(now);
        }
        let who = claim.map_or_else(|| "source".to_owned(), |nth| format!("claimant {nth}"));
        log.lines.push((now, format!("{who}: {told:?}")));
    })
}
