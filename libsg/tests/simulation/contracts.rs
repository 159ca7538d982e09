//! What must hold, whatever happens: looked at after every step, and at the end.
//!
//! What the model of the VM sees by itself (a wrong page, one installed twice, two owners) it says itself.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use libsg::migrate::Mode;
use libsg::page::{PageIndex, PageRange};
use libsg::scatter::Scatter;
use libsg::server::ServerHandle;
use libsg::wire::message::{Member, VolumeSummary};

use crate::content::Content;
use crate::moving::{Move, all};
use crate::net::NodeNumber;
use crate::run::Run;
use crate::scenario::{After, DESTINATION, Event, Role, SOURCE, What};
use crate::{late, writers};

/// No fault waits longer, whatever happens: longer than everything that can happen lasts, and every grace.
const WAIT_MAX: Duration = Duration::from_secs(25);

/// The same when nothing happens.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(2);

/// The same on a fast network on which nothing happens.
const FAST_WAIT_MAX: Duration = Duration::from_millis(50);

/// So often everything is looked at again, in steps.
const FULL_EVERY: u64 = 512;

/// Background reads leave the port to the direct path for so long after it was last used, less what a fast
/// network takes to carry what was asked for before.
const DIRECT_WINDOW: (Duration, Duration) = (Duration::from_millis(8), Duration::from_millis(45));

/// What must hold.
pub struct Contracts {
    found: Option<String>,
    steps: u64,
    safe: Vec<bool>,
    safe_count: u32,
    /// Where a page that is safe lies: on which nodes its entry and its bytes are.
    homes: Vec<Option<(NodeNumber, NodeNumber)>>,
    evicted: bool,
    /// Its source was done.
    done: bool,
    /// What had happened to intermediaries when that was looked at last.
    mishaps: usize,
    /// So many of them died before it had evicted, and each page lay at as many as it should all the same: as many may die
    /// once more.
    made_good: usize,
    poisoned: Vec<bool>,
    direct: Direct,
}

/// When pages came directly, and how many others had come.
#[derive(Default)]
struct Direct {
    times: VecDeque<Duration>,
    direct: u64,
    staged: u64,
    /// Of those, how many came while the direct path was in use.
    background: u64,
}

/// Where a page can be had without the source.
enum Found {
    AtDestination,
    At(NodeNumber, NodeNumber),
    Nowhere,
}

impl Contracts {
    pub fn new(of: &Move) -> Self {
        let pages = of.vm.pages() as usize;
        Self {
            found: None,
            steps: 0,
            safe: vec![false; pages],
            safe_count: 0,
            homes: vec![None; pages],
            evicted: false,
            done: false,
            mishaps: 0,
            made_good: 0,
            poisoned: vec![false; pages],
            direct: Direct::default(),
        }
    }

    pub fn breach(&self, of: &Move) -> Option<String> {
        of.vm.breaches().first().cloned().or_else(|| self.found.clone())
    }

    fn broken(&mut self, what: String) {
        self.found.get_or_insert(what);
    }

    /// After a step.
    pub fn check(&mut self, run: &Run, of: &Move) {
        self.steps += 1;
        if let Some(scatter) = of.outgoing().and_then(|outgoing| outgoing.scatter()) {
            self.check_safe(run, of, &scatter);
        }
        self.check_guest(run, of);
        self.check_direct_first(run, of);
        if self.steps.is_multiple_of(FULL_EVERY) {
            self.check_bounds(run, of);
        }
    }

    /// Safe pages can be had without the source; once it has evicted, all can.
    fn check_safe(&mut self, run: &Run, of: &Move, scatter: &Scatter) {
        let just_evicted = !self.evicted && of.log.lock().reached.contains_key(&After::Evicted);
        self.evicted |= just_evicted;
        // Whoever knew of a member may die the moment after.
        let just_done = !self.done && scatter.done_at().is_some();
        let is_struck = std::mem::replace(&mut self.mishaps, run.mishaps()) != run.mishaps();
        self.done |= just_done;
        if just_evicted && self.holders_due(run, scatter) > run.scenario.spare() {
            self.made_good = run.mishaps();
        }
        let count = scatter.planner.lock().progress().0;
        let full = just_evicted || just_done || self.steps.is_multiple_of(FULL_EVERY);
        // While it runs, what is safe is written again; and a VM that died with its source is no more.
        let is_final = !of.vm.runs_at_source() && (!run.is_dead(SOURCE) || of.vm.is_committed());
        if (count == self.safe_count && !full) || run.is_dead(DESTINATION) || !is_final {
            return;
        }
        self.safe_count = count;
        let servers = run.servers();
        let safe: Vec<bool> = {
            let planner = scatter.planner.lock();
            all(&of.vm).iter().map(|page| planner.is_safe(page)).collect()
        };
        let contents = of.vm.contents();
        let mut fresh_units = Vec::new();
        for (at, safe) in safe.into_iter().enumerate() {
            let page = PageIndex(at as u32);
            let fresh = safe && !self.safe[at];
            self.safe[at] = safe;
            if !safe && just_evicted {
                // A holder may have died between the last page's being safe and the word of it: others have copies then.
                let can_be_had = self.copies_are_enough(run)
                    && !matches!(find(run, of, scatter, &servers, page, contents[at], None), Found::Nowhere);
                if !can_be_had {
                    self.broken(format!("evicted means evicted: {page} is not safe"));
                }
            }
            if !(fresh || (full && safe)) {
                continue;
            }
            let is_looked_at = (fresh && !self.evicted) || just_done || just_evicted;
            if is_looked_at && !self.lies_at_all(run, of, scatter, page, contents[at]) {
                self.broken(format!(
                    "evicted means evicted: {page} is safe, and not all copies of it are made"
                ));
            }
            match find(run, of, scatter, &servers, page, contents[at], None) {
                Found::AtDestination => self.homes[at] = None,
                Found::At(index, content) => {
                    self.homes[at] = Some((index, content));
                    // Whom a destination that is stopped knew may all have left.
                    let is_calm = !is_struck && !run.has_anybody_left();
                    if just_done && is_calm && !is_home_known(run, of, scatter, &servers, page) {
                        self.broken(format!("evicted means evicted: {page} is safe where nobody would look"));
                    }
                }
                Found::Nowhere if self.is_excused(run, of, scatter, page) => {}
                Found::Nowhere => self.broken(format!(
                    "evicted means evicted: {page} is said to be safe, and cannot be had without the source"
                )),
            }
            fresh_units.extend((of.vm.unit(page).pages > 1).then(|| of.vm.unit(page)));
        }
        fresh_units.dedup();
        fresh_units.retain(|unit| self.safe[unit.positions()].iter().all(|safe| *safe));
        for unit in fresh_units {
            self.check_unit(run, of, scatter, unit);
        }
    }

    /// At how many intermediaries each page is to lie that is safe: as many as are wanted, or live and take pages. `None`
    /// where something else has happened to any of them than that its death is known, or not all are told of by the source.
    fn holders_due(&self, run: &Run, scatter: &Scatter) -> Option<usize> {
        let wanted = run.scenario.spare()? + 1;
        let living = scatter.index.living();
        let is_there = |member: &Member| run.server_of(&member.node).is_some();
        let mut members = (0..).map(libsg::ids::MemberIndex).zip(scatter.members.list());
        let are_known = members.all(|(at, member)| is_there(&member) == living.contains(at));
        (run.has_only_killed() && are_known).then(|| wanted.min(scatter.copies.counted(living).len()))
    }

    /// Whether what has happened to intermediaries loses nothing that has copies.
    fn copies_are_enough(&self, run: &Run) -> bool {
        run.scenario.spare().is_some_and(|spare| run.mishaps() - self.made_good <= spare)
    }

    /// Whether a page lies at as many intermediaries as it is to, where that is known.
    fn lies_at_all(
        &self,
        run: &Run,
        of: &Move,
        scatter: &Scatter,
        page: PageIndex,
        content: Content,
    ) -> bool {
        let Some(due) = self.holders_due(run, scatter) else { return true };
        if content.is_zero() || of.destination.memory.has(page) {
            return true;
        }
        let has = |(role, server): &(Role, Arc<ServerHandle>)| {
            let alone = [(*role, Arc::clone(server))];
            matches!(find(run, of, scatter, &alone, page, content, Some(*role)), Found::At(..))
        };
        run.servers().iter().filter(|server| has(server)).count() >= due
    }

    /// A unit is had from one intermediary, or not at all.
    fn check_unit(&mut self, run: &Run, of: &Move, scatter: &Scatter, unit: PageRange) {
        let homes: BTreeSet<_> =
            self.homes[unit.positions()].iter().flatten().map(|(_, content)| content).collect();
        let in_one_place = homes.len() <= 1 || can_be_had(run, of, scatter, &run.servers(), unit);
        if !in_one_place && !unit.iter().any(|page| self.is_excused(run, of, scatter, page)) {
            self.broken(format!("evicted means evicted: pages {unit} are safe, and in no place all of them"));
        }
    }

    /// Whether a page may be lost: a node that has it died and the source cannot know yet, or it was damaged, or it
    /// was given back because all is over.
    fn is_excused(&self, run: &Run, of: &Move, scatter: &Scatter, page: PageIndex) -> bool {
        let over = of.log.lock().gathered.is_some() || of.destination.ended.lock().gathered.is_some();
        if over || run.damaged.contains(&(of.nth, page)) || is_flipped(run, of, scatter, page) {
            return true;
        }
        if self.copies_are_enough(run) {
            return false;
        }
        let dies_unnoticed = scatter.members.list().iter().enumerate().any(|(at, member)| {
            let index = libsg::ids::MemberIndex(at as u16);
            let is_there = run.server_of(&member.node).is_some() || run.has_left(&member.node);
            !scatter.index.is_dead(index) && !is_there
        });
        let home_died = self.homes[page.as_usize()]
            .is_some_and(|(index, content)| run.is_node_dead(index) || run.is_node_dead(content));
        let evicted_and_died = self.evicted && run.any_member_died();
        dies_unnoticed || home_died || evicted_and_died
    }

    /// What is lost is lost for a reason, and nobody waits for ever.
    fn check_guest(&mut self, run: &Run, of: &Move) {
        let memory = &of.destination.memory;
        let (waits, longest) = memory.waits();
        let waited = waits.map_or(longest, |(_, since)| longest.max(run.host.now().saturating_sub(since)));
        if run.is_dead(DESTINATION) || run.scenario.stops(DESTINATION) {
            return;
        }
        let quiet = run.scenario.events.is_empty();
        let max = match quiet {
            true if run.scenario.weather.is_fast() => FAST_WAIT_MAX,
            true => QUIET_WAIT_MAX,
            false => WAIT_MAX,
        };
        if waited > max {
            self.broken(format!("faults overtake: the guest waited for {waited:?}, {waits:?}"));
        }
        if self.steps.is_multiple_of(16) || of.log.lock().lost_pages > 0 {
            self.check_lost(run, of, &memory.poisoned());
        }
    }

    fn check_lost(&mut self, run: &Run, of: &Move, poisoned: &[PageIndex]) {
        let fresh: Vec<_> = poisoned.iter().filter(|page| !self.poisoned[page.as_usize()]).copied().collect();
        if fresh.is_empty() {
            return;
        }
        fresh.iter().for_each(|page| self.poisoned[page.as_usize()] = true);
        let Some(scatter) = of.outgoing().and_then(|outgoing| outgoing.scatter()) else { return };
        let calm = |role: Role| run.is_calm(role);
        if !calm(DESTINATION) {
            return;
        }
        if calm(SOURCE) && scatter.done_at().is_none() {
            self.broken(format!("a death is an event: {fresh:?} are lost though the source has them"));
        }
        let mut servers = run.servers();
        servers.retain(|(role, _)| calm(*role));
        let contents = of.vm.contents();
        let whole = |page: &&PageIndex| !run.damaged.contains(&(of.nth, **page));
        // What was flipped before it was sent on is so everywhere.
        let spared = self.copies_are_enough(run) && !run.has_flipped();
        if self.evicted && spared && fresh.iter().any(|page| whole(&page)) {
            self.broken(format!("a death is an event: {fresh:?} are lost though there are copies"));
        }
        let mut units: Vec<_> = fresh.iter().map(|page| of.vm.unit(*page)).collect();
        units.dedup();
        // Where nothing lies, nothing can be found.
        units.retain(|unit| contents[unit.positions()].iter().any(|content| !content.is_zero()));
        let is_owner_calm = |member: &Member| run.server_of(&member.node).is_some_and(calm);
        for unit in units.into_iter().filter(|_| scatter.members.list().iter().all(is_owner_calm)) {
            let is_damaged = unit.iter().any(|page| run.damaged.contains(&(of.nth, page)));
            if !is_damaged && can_be_had(run, of, &scatter, &servers, unit) {
                self.broken(format!("a death is an event: pages {unit} are lost though they can be had"));
            }
        }
    }

    /// Until the source has evicted, background reads leave the port to the direct path.
    fn check_direct_first(&mut self, run: &Run, of: &Move) {
        let calm = run.is_calm(SOURCE) && run.is_calm(DESTINATION);
        let rounds = of.plan.mode != Mode::ScatterGather;
        if !run.scenario.weather.is_fast() || self.evicted || !calm || rounds {
            return;
        }
        let Some(incoming) = of.destination.incoming.lock().clone() else { return };
        let (pages, now) = (incoming.progress().pages, run.host.now());
        let unit = of.unit_pages();
        let Direct { times, direct, staged, background } = &mut self.direct;
        let (near, far) = DIRECT_WINDOW;
        times.retain(|at| now - *at <= far);
        let busy = times.iter().any(|at| now - *at >= near);
        // One unit may be a fault's.
        if pages.direct > *direct + unit {
            times.push_back(now);
        }
        if busy {
            *background += pages.staged - *staged;
        }
        (*direct, *staged) = (pages.direct, pages.staged);
        // A fault is answered at any time.
        if *background > (pages.faults + 1) * unit {
            let what = format!("{background} read, {} faults, directly at {times:?}", pages.faults);
            self.broken(format!(
                "direct first: pages were read in the background while direct was in use: {what}"
            ));
        }
    }

    /// Nobody has more than he may.
    fn check_bounds(&mut self, run: &Run, of: &Move) {
        for (role, server) in run.servers() {
            let (has, may) = (server.statistics().arena_bytes, run.scenario.memory_of(role));
            if has > may {
                self.broken(format!("limits hold: {role:?} uses {has} bytes, and may use {may}"));
            }
        }
        if let Some(scatter) = of.outgoing().and_then(|outgoing| outgoing.scatter()) {
            let bytes = scatter.planner.lock().bytes();
            if bytes > 16 * of.vm.pages() as usize + (256 << 10) {
                self.broken(format!("bounded: the source's books have {bytes} bytes"));
            }
        }
    }

    /// When nothing happens any more.
    pub fn check_end(&mut self, run: &Run, of: &Move) {
        self.check_bounds(run, of);
        self.check_owner(run, of);
        self.check_eviction(run, of);
        self.check_arrival(run, of);
    }

    /// The VM runs somewhere, unless it died with its host.
    fn check_owner(&mut self, run: &Run, of: &Move) {
        let (committed, at_source) = (of.vm.is_committed(), of.vm.runs_at_source());
        if !committed && !run.is_dead(SOURCE) && !at_source {
            self.broken("one owner: without COMMIT the VM does not run on at the source".into());
        }
        if committed && !run.is_dead(DESTINATION) && !of.vm.runs_at_destination() {
            let volume = of.outgoing().and_then(|o| o.scatter()).map(|scatter| scatter.volume);
            let known =
                volume.is_some_and(|volume| run.servers().iter().any(|(_, s)| s.knows_commit(volume)));
            let calm = run.scenario.roles().into_iter().all(|role| role == SOURCE || run.is_calm(role));
            if (known && calm) || (run.is_calm(SOURCE) && run.is_calm(DESTINATION)) {
                self.broken("one owner: COMMIT was given, and the VM runs nowhere".into());
            }
        }
    }

    /// Eviction comes, and soon, whatever the destination or a single intermediary is like.
    fn check_eviction(&mut self, run: &Run, of: &Move) {
        let log = of.log.lock();
        let (Some(commit), evicted) = (log.reached.get(&After::Commit), log.reached.get(&After::Evicted))
        else {
            return;
        };
        let failed = log.failed.clone();
        let roomy =
            |role: &Role| run.is_calm(*role) && run.scenario.memory_of(*role) >= run.scenario.room_for_all();
        let by_members = !run.scenario.is_short() && run.scenario.members().any(|role| roomy(&role));
        let way_out = run.is_steady(DESTINATION) || by_members;
        if !run.is_steady(SOURCE) || !way_out || log.lost_pages > 0 {
            return;
        }
        let took = evicted.map(|at| *at - *commit);
        drop(log);
        if took.is_none_or(|took| took > run.scenario.eviction_max()) {
            self.broken(format!("no tail: eviction took {took:?} from COMMIT on; {failed:?}"));
        }
    }

    /// Every page arrives, or is known to be lost.
    fn check_arrival(&mut self, run: &Run, of: &Move) {
        if run.is_dead(DESTINATION) || run.is_stopped(DESTINATION) || !of.vm.runs_at_destination() {
            return;
        }
        let ended = of.destination.ended.lock().clone();
        let Some(gathered) = ended.gathered else {
            self.broken("a death is an event: the arrival has no end".into());
            return;
        };
        let quiet = run.scenario.events.is_empty();
        let lost = of.destination.memory.poisoned();
        if quiet && (gathered.is_err() || !lost.is_empty() || !matches!(ended.dissolved, Some(Ok(())))) {
            let (dissolved, failed) = (ended.dissolved, &of.log.lock().failed);
            self.broken(format!("nothing happened: {gathered:?}, lost {lost:?}, {dissolved:?}, {failed:?}"));
        }
        let leaves = |event: &Event| matches!(event.what, What::Leave(..));
        if run.scenario.events.iter().all(leaves) && (gathered.is_err() || !lost.is_empty()) {
            self.broken(format!("leaving loses nothing: {gathered:?}, lost {lost:?}"));
        }
        let all_dissolved = run.moves.iter().all(|vm| vm.destination.ended.lock().dissolved.is_some());
        // Others, who write volumes of their own, may be at it still.
        let others = [writers::VOLUME, late::VOLUME];
        let is_held = |of: &VolumeSummary| of.stored_pages > 0 && !others.contains(&of.volume);
        let holds_pages =
            run.servers().iter().any(|(_, server)| server.statistics().volumes.iter().any(is_held));
        if quiet && all_dissolved && holds_pages {
            self.broken("nothing happened: an intermediary still holds pages".into());
        }
    }
}

/// Whether somebody who outlives the source knows of a member at which a page lies, or its entry: the destination, or
/// another intermediary.
fn is_home_known(
    run: &Run,
    of: &Move,
    scatter: &Scatter,
    servers: &[(Role, Arc<ServerHandle>)],
    page: PageIndex,
) -> bool {
    let members = scatter.members.list();
    let is_known = |at: usize| {
        let others =
            servers.iter().filter(|(_, server)| Some(server.node()) != members.get(at).map(|m| &m.node));
        let mut lists = others.map(|(_, server)| server.members_known(scatter.volume));
        at < scatter.members.first()
            || scatter.members.known_to_destination() > at
            || lists.any(|known| known > at)
    };
    let content = of.vm.contents()[page.as_usize()];
    let is_there = |at: usize| {
        let role = members.get(at).and_then(|member| run.server_of(&member.node));
        role.is_some() && !matches!(find(run, of, scatter, servers, page, content, role), Found::Nowhere)
    };
    servers.iter().any(|(_, server)| {
        let index = members.iter().position(|member| member.node == *server.node());
        let entries = server.index_entries(scatter.volume, scatter.epoch, PageRange::new(page, 1));
        let mut places = entries.iter().filter_map(|entry| Some(entry.placement?.member.as_usize()));
        index.is_some_and(is_known) && places.any(|at| is_known(at) && is_there(at))
    })
}

/// Whether a destination could have a unit without the source.
fn can_be_had(
    run: &Run,
    of: &Move,
    scatter: &Scatter,
    servers: &[(Role, Arc<ServerHandle>)],
    unit: PageRange,
) -> bool {
    let contents = of.vm.contents();
    let has = |at: Option<Role>, page: PageIndex| {
        let found = find(run, of, scatter, servers, page, contents[page.as_usize()], at);
        !matches!(found, Found::Nowhere)
    };
    if unit.pages == 1 {
        return has(None, unit.first);
    }
    servers.iter().any(|(role, _)| unit.iter().all(|page| has(Some(*role), page)))
}

/// Looks for a page where a destination would, without the source: at one intermediary, or at all.
fn find(
    run: &Run,
    of: &Move,
    scatter: &Scatter,
    servers: &[(Role, Arc<ServerHandle>)],
    page: PageIndex,
    content: Content,
    at: Option<Role>,
) -> Found {
    if of.destination.memory.has(page) || content.is_zero() {
        return Found::AtDestination;
    }
    let volume = (scatter.volume, scatter.epoch);
    for (index_role, index) in servers {
        for entry in index.index_entries(volume.0, volume.1, PageRange::new(page, 1)) {
            let Some(placement) = entry.placement else { continue };
            let Some(books) = scatter.members.books().get(placement.member) else { continue };
            let member = &books.member;
            let Some((role, server)) = servers.iter().find(|(_, server)| *server.node() == member.node)
            else {
                continue;
            };
            if at.is_some_and(|at| at != *role) {
                continue;
            }
            if server
                .page_at(volume.0, volume.1, page, placement)
                .is_some_and(|bytes| content.is(page, &bytes))
            {
                return Found::At(run.nodes[index_role].number(), run.nodes[role].number());
            }
        }
    }
    Found::Nowhere
}

/// Whether somebody has the page with one bit that is not as it was: it came so.
fn is_flipped(run: &Run, of: &Move, scatter: &Scatter, page: PageIndex) -> bool {
    if !run.has_flipped() {
        return false;
    }
    let truth = of.vm.contents()[page.as_usize()].bytes(page);
    let servers = run.servers();
    let places = servers.iter().flat_map(|(_, index)| {
        index.index_entries(scatter.volume, scatter.epoch, PageRange::new(page, 1)).into_iter()
    });
    let places: Vec<_> = places.filter_map(|entry| entry.placement).collect();
    let mut found = servers.iter().flat_map(|(_, server)| {
        places.iter().filter_map(|at| server.page_at(scatter.volume, scatter.epoch, page, *at))
    });
    found.any(|bytes| {
        bytes.iter().zip(&truth).map(|(one, other)| (one ^ other).count_ones()).sum::<u32>() == 1
    })
}

impl Run {
    /// Whether a bit was flipped on the way.
    fn has_flipped(&self) -> bool {
        self.host.with_net(|net, _| net.flipped() > 0)
    }

    /// Whether nothing was, or will be, done to a host.
    pub fn is_calm(&self, role: Role) -> bool {
        !self.scenario.events.iter().any(|event| event.what.hosts().contains(&role))
    }

    /// Whether nothing is done to a host but that its connections break.
    fn is_steady(&self, role: Role) -> bool {
        let events = self.scenario.events.iter().filter(|event| event.what.hosts().contains(&role));
        events.into_iter().all(|event| matches!(event.what, What::Break(..)))
    }

    /// How often something happened to an intermediary so far: each time one may be lost to the others.
    fn mishaps(&self) -> usize {
        let hits = |event: &&Event| {
            let hosts = event.what.hosts();
            let member = hosts.iter().any(|host| matches!(host, Role::Intermediary(_)));
            member && !matches!(event.what, What::Fill(_))
        };
        self.done.iter().filter(hits).count()
    }

    /// Whether nothing worse has happened to intermediaries than that some were killed.
    fn has_only_killed(&self) -> bool {
        let is_other = |event: &&Event| {
            let to_member = event.what.hosts().iter().any(|host| matches!(host, Role::Intermediary(_)));
            to_member && !matches!(event.what, What::Kill(..) | What::Fill(_))
        };
        !self.done.iter().any(|event| is_other(&event))
    }

    /// Whether an intermediary was killed so far.
    fn any_member_died(&self) -> bool {
        self.done.iter().any(|event| matches!(event.what, What::Kill(Role::Intermediary(_), _)))
    }
}
