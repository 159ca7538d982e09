//! The source's host: a VM that leaves, and its memory.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libsg::dirty::DirtyLog;
use libsg::event::Observer;
use libsg::manifest::Manifest;
use libsg::memory::{PageSlice, PresenceMap};
use libsg::migrate::source::{self, Outgoing, SourceOptions, To, Unscattered};
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
    written: Arc<Mutex<Written>>,
}

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> libsg::Result<Vec<u8>> {
        self.vm.pause();
        Ok(vec![7; 3000])
    }

    fn resume(&mut self) -> libsg::Result<()> {
        // What a host does that was killed happens nowhere.
        if !self.node.is_dead() {
            self.vm.stays();
            self.vm.resume();
        }
        Ok(())
    }

    fn note(&mut self, unscattered: &Unscattered) -> libsg::Result<()> {
        if !self.node.is_dead() {
            self.vm.note(unscattered);
        }
        Ok(())
    }

    fn committed(&mut self) {
        self.vm.commit();
    }

    fn dirty_log(&mut self) -> libsg::Result<Box<dyn DirtyLog>> {
        Ok(Box::new(Log { vm: Arc::clone(&self.vm), written: Arc::clone(&self.written) }))
    }
}

/// What a log has named.
#[derive(Default)]
struct Written {
    last: Vec<PageRange>,
    ever: BTreeSet<PageIndex>,
}

/// Which pages its guest writes.
struct Log {
    vm: Arc<Vm>,
    written: Arc<Mutex<Written>>,
}

impl DirtyLog for Log {
    fn start(&mut self) -> libsg::Result<()> {
        self.vm.log_writes(true);
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> libsg::Result<()> {
        let written: Vec<PageRange> = PageRange::from_pages(self.vm.written());
        out.extend_from_slice(&written);
        let mut named = self.written.lock();
        named.ever.extend(written.iter().flat_map(|run| run.iter()));
        named.last = written;
        Ok(())
    }

    fn stop(&mut self) -> libsg::Result<()> {
        self.vm.log_writes(false);
        Ok(())
    }
}

/// Its memory.
struct Pages {
    vm: Arc<Vm>,
    named: Mutex<bool>,
}

/// Pages that it holds at once, and of the last ones so many are held back until all others are safe.
const WINDOW: u32 = 100;
const LAST: u32 = 12;

/// How long it takes until pages that were lost are there again.
const AGAIN: Duration = Duration::from_millis(300);

/// The memory of a VM whose VMM gives each page once, and again only when it is made to: what is safe is forgotten, and read
/// by nobody any more. Where it is sent in rounds it is as a stock VMM is then: the last pages come when it is paused, and some
/// of those that were written last once more.
struct Forgetful {
    pages: Pages,
    begun: std::time::Instant,
    books: Mutex<Books>,
    in_rounds: bool,
    written: Arc<Mutex<Written>>,
}

struct Books {
    /// Pages that were not named yet, or are to be named again.
    left: PresenceMap,
    /// Pages that can be had.
    here: PresenceMap,
    /// Pages that are safe: those that come again all the same are not named.
    safe: PresenceMap,
    /// Those that were named, and of which it was not said that they are safe.
    unsafe_pages: u32,
    /// Pages that somebody waits for: they are named next, whatever room there is.
    wanted: Vec<PageIndex>,
    /// Pages that are lost are there again at that time.
    coming: Vec<(Duration, PageRange)>,
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

impl Forgetful {
    fn new(pages: Pages, in_rounds: bool, written: Arc<Mutex<Written>>) -> Self {
        // Until it is paused, pages get memory.
        let none = PresenceMap::new(pages.vm.pages());
        let books = Books {
            left: none.clone(),
            here: none.clone(),
            safe: none,
            unsafe_pages: 0,
            wanted: Vec::new(),
            coming: Vec::new(),
        };
        Self { pages, begun: libsg::host::now(), books: Mutex::new(books), in_rounds, written }
    }

    /// Of a VM that is paused, and was leaving by another process: everything is to be named, but for what is safe.
    fn left(pages: Pages, written: Arc<Mutex<Written>>) -> Self {
        let all = PageRange::new(PageIndex(0), pages.vm.pages());
        let left = Self::new(pages, false, written);
        left.books.lock().left.insert(all);
        left
    }

    /// The last pages are not to be had while it runs.
    fn holds_back(&self) -> bool {
        self.in_rounds && self.pages.vm.runs_at_source()
    }
}

impl Books {
    /// Names whole units, as long as there is room for them.
    fn name(&mut self, vm: &Vm, holds_back: bool, out: &mut Vec<PageRange>) {
        for page in std::mem::take(&mut self.wanted) {
            let unit = vm.unit(page);
            if self
                .left
                .next_run(unit.first, 1)
                .is_some_and(|next| unit.positions().contains(&next.first.as_usize()))
            {
                self.give(unit, out);
            }
        }
        while let Some(next) = self.left.next_run(PageIndex(0), 1) {
            let unit = vm.unit(next.first);
            let held_back = self.left.count() <= LAST && (holds_back || self.unsafe_pages > 0);
            if held_back || self.unsafe_pages > WINDOW {
                break;
            }
            let mut named = unit;
            if unit.pages == 1 {
                named = self.left.next_run(unit.first, WINDOW).expect("there is one");
                let before_last = self.left.count().saturating_sub(LAST);
                if before_last > 0 {
                    named.pages = named.pages.min(before_last);
                }
                while !vm.in_one_region(named) {
                    named.pages -= 1;
                }
            }
            self.give(named, out);
        }
    }

    fn give(&mut self, named: PageRange, out: &mut Vec<PageRange>) {
        // What of a unit is zero belongs to it.
        self.left.remove(named);
        for page in named.iter().filter(|page| !self.safe.contains(*page)) {
            let one = PageRange::new(page, 1);
            self.here.insert(one);
            self.unsafe_pages += 1;
            out.push(one);
        }
    }
}

impl PageSource for Forgetful {
    fn repeat(&self) -> Repeat {
        Repeat::ByRecovery
    }

    fn presence(&self) -> libsg::Result<PresenceMap> {
        let mut presence = self.pages.presence()?;
        if self.in_rounds {
            // Which are zero is known when they come.
            presence.insert(PageRange::new(PageIndex(0), presence.pages()));
        }
        for run in presence.clone().runs() {
            run.iter().for_each(|page| presence.insert(self.pages.vm.unit(page)));
        }
        self.books.lock().left = presence.clone();
        Ok(presence)
    }

    fn available(&self, out: &mut Vec<PageRange>) -> libsg::Result<Supply> {
        let mut books = self.books.lock();
        let now = libsg::host::elapsed(self.begun);
        let books = &mut *books;
        books.coming.retain(|(at, range)| {
            if *at <= now {
                books.left.insert(*range);
            }
            *at > now
        });
        let holds_back = self.holds_back();
        books.name(&self.pages.vm, holds_back, out);
        Ok(match books.left.count() {
            _ if !books.coming.is_empty() => Supply::More,
            0 => Supply::Complete,
            left if holds_back && left <= LAST => Supply::AfterPause,
            _ => Supply::More,
        })
    }

    fn withdrawn(&self, out: &mut Vec<PageRange>) {
        let books = &mut *self.books.lock();
        for page in self.written.lock().last.iter().flat_map(|run| run.iter()) {
            let unit = self.pages.vm.unit(page);
            let is_here = unit.iter().all(|page| books.here.contains(page));
            if is_here && !unit.first.0.is_multiple_of(3) {
                books.here.remove(unit);
                books.unsafe_pages -= unit.pages;
                books.left.insert(unit);
                out.push(unit);
            }
        }
    }

    fn want(&self, page: PageIndex) -> libsg::Result<()> {
        self.books.lock().wanted.push(page);
        Ok(())
    }

    fn slice(&self, range: PageRange) -> libsg::Result<PageSlice> {
        let here = self.books.lock().here.next_run(range.first, range.pages);
        let Some(run) = here.filter(|run| run.first == range.first) else {
            let what = format!(
                "each page is right: {} is read though it was let go, or never was there",
                range.first
            );
            self.pages.vm.breach(what.clone());
            return Err(libsg::Error::new(libsg::ErrorKind::Input, what));
        };
        self.pages.slice(run)
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        let mut books = self.books.lock();
        match outcome {
            Outcome::Safe => {
                let here = range.iter().filter(|page| books.here.contains(*page)).count() as u32;
                books.unsafe_pages -= here;
                books.here.remove(range);
                books.safe.insert(range);
            }
            Outcome::Lost => {
                let here = range.iter().filter(|page| books.here.contains(*page)).count();
                if here > 0 {
                    self.pages
                        .vm
                        .breach(format!("each page is right: {range} is lost that was not said to be safe"));
                }
                books.safe.remove(range);
                // What was written comes by itself.
                if range.iter().all(|page| self.written.lock().ever.contains(&page)) {
                    books.left.insert(range);
                } else {
                    books.coming.push((libsg::host::elapsed(self.begun) + AGAIN, range));
                }
            }
        }
    }
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
    let (sharing, in_rounds) = (scenario.shares(), plan.rounds.most(plan.mode) > 0);
    // A stock VMM's VM that is parked is sent once.
    let forgets = scenario.forgets(plan) && !(in_rounds && matches!(to, To::Parked { .. }));
    let options = options(node, plan, scenario, (to, observer));
    node.spawn("vmm-source", move || {
        let pages = Pages { vm: Arc::clone(&vm_there), named: Mutex::new(false) };
        let written = Arc::default();
        let pages: Arc<dyn PageSource> = if forgets {
            Arc::new(Forgetful::new(pages, in_rounds, Arc::clone(&written)))
        } else {
            Arc::new(pages)
        };
        let leaving = Leaving { vm: Arc::clone(&vm_there), node: node_of_vm, written };
        let manifest = Manifest { sharing, ..vm_there.manifest.clone() };
        let outgoing = source::start(Box::new(leaving), pages, manifest, options).expect("started");
        *given.lock() = Some(Arc::new(outgoing));
    });
    let (vm, random) = (Arc::clone(vm), scenario.random(3 + 16 * nth as u64));
    node.spawn("guest-source", move || run_at_source(&vm, random));
    handle
}

fn options(
    node: &Arc<Node>,
    plan: &Plan,
    scenario: &Scenario,
    (to, observer): (To, Observer),
) -> SourceOptions {
    SourceOptions {
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
    }
}

/// Goes on, in another process, with a VM whose memory outlived the one that it was leaving by.
pub fn go_on(
    node: &Arc<Node>,
    (plan, of): (&Plan, Unscattered),
    vm: &Arc<Vm>,
    scenario: &Scenario,
    (handle, observer): (&Handle, Observer),
) {
    let options = options(node, plan, scenario, (of.to.clone(), observer));
    let (given, node_of_vm, vm) = (Arc::clone(handle), Arc::clone(node), Arc::clone(vm));
    node.spawn("vmm-source", move || {
        let written = Arc::default();
        let pages = Pages { vm: Arc::clone(&vm), named: Mutex::new(false) };
        let pages = Arc::new(Forgetful::left(pages, Arc::clone(&written)));
        let leaving = Leaving { vm, node: node_of_vm, written };
        let outgoing = source::resume(Box::new(leaving), pages, of, options).expect("started");
        *given.lock() = Some(Arc::new(outgoing));
    });
}
