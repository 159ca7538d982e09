//! The memory that a VM arrives in, and the guest that reads and writes it there.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::transport::{Waker, wait};
use parking_lot::Mutex;

use crate::clock::Node;
use crate::content::{Mark, mark};
use crate::guest::Vm;
use crate::random::Random;

/// A page of the guest's memory at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Missing,
    Present,
    Poisoned,
}

/// Until when something else may be in place than is to be there in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early {
    /// Never: each page is taken once.
    Never,
    /// Until the VM loads its state: by then what was out of date was taken out.
    UntilLoaded,
    /// Until it runs: by then all is there.
    UntilRun,
}

/// The guest's memory at the destination, and where faults come from.
pub struct Memory {
    vm: Arc<Vm>,
    node: Arc<Node>,
    early: Early,
    loaded: AtomicBool,
    state: Mutex<MemoryState>,
    faulted: Waker,
    resolved: Waker,
}

struct MemoryState {
    places: Vec<Place>,
    /// What was installed.
    holds: Vec<Mark>,
    /// What the guest wrote since a page came.
    written: Vec<u32>,
    faults: Vec<PageIndex>,
    waits: Option<(PageIndex, Duration)>,
    /// Which page waited how long.
    longest: Duration,
    finished: bool,
    /// The guest runs in it.
    runs: bool,
}

impl Memory {
    pub fn new(vm: Arc<Vm>, node: Arc<Node>, early: Early) -> Self {
        let pages = vm.pages() as usize;
        let state = MemoryState {
            places: vec![Place::Missing; pages],
            holds: vec![Mark::default(); pages],
            written: vec![0; pages],
            faults: Vec::new(),
            waits: None,
            longest: Duration::ZERO,
            finished: false,
            runs: false,
        };
        let waker = || Waker::new().expect("an eventfd");
        let (loaded, state) = (AtomicBool::new(false), Mutex::new(state));
        Self { vm, node, early, loaded, state, faulted: waker(), resolved: waker() }
    }

    /// Whether a page is in place, as it is to be, and will not be taken out again.
    pub fn has(&self, page: PageIndex) -> bool {
        let truth = self.vm.content_to_be(page).mark(page);
        let is_right = !self.may_replace() || self.state.lock().holds[page.as_usize()] == truth;
        self.place(page) == Place::Present && is_right && !self.may_withdraw()
    }

    fn may_replace(&self) -> bool {
        match self.early {
            Early::Never => false,
            Early::UntilLoaded => self.may_withdraw(),
            Early::UntilRun => !self.vm.runs_at_destination(),
        }
    }

    fn may_withdraw(&self) -> bool {
        self.early == Early::UntilLoaded && !self.loaded.load(Ordering::Relaxed)
    }

    /// The VM loads its state: what is there from now on is what it has to be.
    pub fn loads(&self) {
        let state = self.state.lock();
        let there = state.places.iter().enumerate().filter(|(_, place)| **place == Place::Present);
        for (at, _) in there.filter(|_| self.may_withdraw()) {
            let page = PageIndex(at as u32);
            if state.holds[at] != self.vm.content_to_be(page).mark(page) {
                self.vm.breach(format!("each page is right: {page} is old when the VM loads its state"));
            }
        }
        self.loaded.store(true, Ordering::Relaxed);
    }

    /// The VM runs from now on: what was installed in rounds is what it has to be.
    pub fn runs(&self) {
        let contents = self.vm.contents();
        let mut state = self.state.lock();
        state.runs = true;
        for (at, content) in contents.into_iter().enumerate().filter(|_| self.early == Early::UntilRun) {
            let page = PageIndex(at as u32);
            let is_right = match state.places[at] {
                Place::Present => state.holds[at] == content.mark(page),
                _ => content.is_zero(),
            };
            if !is_right {
                let what = if state.places[at] == Place::Present { "old" } else { "missing" };
                self.vm.breach(format!("each page is right: {page} is {what} when the VM runs"));
            }
        }
    }

    /// Whether the guest runs in it.
    pub fn has_guest(&self) -> bool {
        self.state.lock().runs
    }

    pub fn poisoned(&self) -> Vec<PageIndex> {
        let state = self.state.lock();
        let places = state.places.iter().enumerate();
        places
            .filter(|(_, place)| **place == Place::Poisoned)
            .map(|(page, _)| PageIndex(page as u32))
            .collect()
    }

    /// The fault that waits now, and since when; and the longest wait that ended.
    pub fn waits(&self) -> (Option<(PageIndex, Duration)>, Duration) {
        let state = self.state.lock();
        (state.waits, state.longest)
    }

    fn place(&self, page: PageIndex) -> Place {
        let state = self.state.lock();
        if state.finished && state.places[page.as_usize()] == Place::Missing {
            return Place::Present;
        }
        state.places[page.as_usize()]
    }

    /// One access of the guest, which waits for the page.
    fn touch(&self, page: PageIndex, write: bool) {
        if self.place(page) == Place::Missing {
            let since = self.node.host().now();
            let mut state = self.state.lock();
            state.faults.push(self.vm.unit(page).first);
            state.waits = Some((page, since));
            drop(state);
            self.faulted.wake();
            while self.place(page) == Place::Missing {
                wait(&[(Some(self.resolved.as_fd()), false)], Duration::from_secs(5)).expect("waits");
                self.resolved.drain();
            }
            let mut state = self.state.lock();
            state.longest = state.longest.max(self.node.host().now() - since);
            state.waits = None;
        }
        if write && self.place(page) == Place::Present {
            self.state.lock().written[page.as_usize()] += 1;
        }
    }

    /// No kernel does anything with a part of a unit, or with two regions at once.
    fn look_at_units(&self, range: PageRange) {
        let last = PageIndex(range.first.0 + range.pages - 1);
        let ends = (self.vm.unit(range.first).positions().start, self.vm.unit(last).positions().end);
        if ends != (range.first.as_usize(), range.positions().end) || !self.vm.in_one_region(range) {
            self.vm.breach(format!("install units: pages {range} are no whole units of one region"));
        }
    }

    fn install_one(&self, state: &mut MemoryState, page: PageIndex, bytes: Option<&[u8]>) {
        let truth = self.vm.content_to_be(page);
        let is_right = match bytes {
            Some(bytes) => truth.is(page, bytes),
            None => truth.is_zero(),
        };
        state.holds[page.as_usize()] = bytes.map_or(Mark::default(), mark);
        if !is_right && !self.may_replace() {
            self.vm.breach(format!("each page is right: {page} was installed as something that it is not"));
        }
        let place = &mut state.places[page.as_usize()];
        if *place == Place::Present {
            self.vm.breach(format!("install once: {page} was installed twice"));
        }
        if *place == Place::Poisoned {
            self.vm.breach(format!("lost is lost: {page} was installed after it was given up"));
        }
        *place = Place::Present;
    }

    fn install_all(&self, range: PageRange, bytes: Option<&[u8]>) -> libsg::Result<InstallOutcome> {
        let mut outcome = InstallOutcome::new(range)?;
        self.look_at_units(range);
        let mut state = self.state.lock();
        for (nth, page) in range.iter().enumerate() {
            if self.may_replace() && state.places[page.as_usize()] == Place::Present {
                outcome.add_present(1);
                continue;
            }
            let bytes = bytes.map(|bytes| &bytes[nth * PAGE_BYTES..(nth + 1) * PAGE_BYTES]);
            self.install_one(&mut state, page, bytes);
            outcome.add_installed(1);
        }
        if state.waits.is_some_and(|(page, _)| range.positions().contains(&page.as_usize())) {
            self.resolved.wake();
        }
        Ok(outcome)
    }
}

impl PageSink for Memory {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> libsg::Result<InstallOutcome> {
        self.install_all(PageRange::new(first, (bytes.len() / PAGE_BYTES) as u32), Some(bytes))
    }

    fn install_zero(&self, range: PageRange) -> libsg::Result<InstallOutcome> {
        self.install_all(range, None)
    }

    fn can_replace(&self) -> bool {
        self.early != Early::Never
    }

    fn withdraw(&self, runs: &[PageRange]) -> libsg::Result<()> {
        for run in runs {
            self.look_at_units(*run);
            let mut state = self.state.lock();
            for page in run.positions() {
                if !self.may_withdraw() || state.places[page] != Place::Present {
                    self.vm.breach(format!("install once: page {page} is taken out where it must not be"));
                }
                (state.places[page], state.holds[page]) = (Place::Missing, Mark::default());
            }
        }
        Ok(())
    }

    fn replace(&self, first: PageIndex, bytes: &[u8]) -> libsg::Result<()> {
        let may = self.may_replace();
        self.look_at_units(PageRange::new(first, (bytes.len() / PAGE_BYTES) as u32));
        let mut state = self.state.lock();
        for (nth, bytes) in bytes.chunks(PAGE_BYTES).enumerate() {
            let at = first.as_usize() + nth;
            if !may || state.places[at] != Place::Present {
                self.vm.breach(format!("install once: page {at} is replaced where it must not be"));
            }
            state.holds[at] = mark(bytes);
        }
        Ok(())
    }

    fn poison(&self, range: PageRange) -> libsg::Result<()> {
        self.look_at_units(range);
        let mut state = self.state.lock();
        for page in range.positions() {
            if state.places[page] == Place::Missing {
                state.places[page] = Place::Poisoned;
            }
        }
        drop(state);
        self.resolved.wake();
        Ok(())
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> libsg::Result<usize> {
        self.faulted.drain();
        let faults = std::mem::take(&mut self.state.lock().faults);
        out.extend(faults.iter().map(|page| SinkEvent::Fault { page: *page, write: false, thread: 1 }));
        Ok(faults.len())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.faulted.as_fd())
    }

    fn finish(&self) -> libsg::Result<()> {
        if self.node.is_dead() {
            return Ok(());
        }
        let contents = self.vm.contents();
        let mut state = self.state.lock();
        state.finished = true;
        if state.runs {
            let places = state.places.iter().zip(&contents).enumerate();
            for (page, _) in
                places.filter(|(_, (place, content))| **place == Place::Missing && !content.is_zero())
            {
                self.vm.breach(format!("each page is right: page {page} never came, and reads as zero"));
            }
        }
        drop(state);
        self.resolved.wake();
        Ok(())
    }
}

/// Runs the guest at the destination: touches pages until it has seen all of them.
pub fn run_at_destination(memory: &Memory, mut random: Random, think: Duration) {
    let pages = memory.vm.pages();
    for _ in 0..pages / 4 {
        let page = PageIndex(random.below(pages.into()) as u32);
        memory.touch(page, random.one_in(3));
        libsg::host::thread::sleep(think * random.below(200) as u32 / 100);
    }
}
