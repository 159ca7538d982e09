//! The VM: what is in its pages, where it runs, and a guest that reads and writes them and looks whether they
//! are right. A page's content follows from its number and its version, so that any bytes can be checked.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use libsg::manifest::{Manifest, Region};
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::transport::{Waker, wait};
use parking_lot::Mutex;

use crate::clock::Node;
use crate::random::Random;
use crate::scenario::Plan;

/// Versions of pages of one VM.
const VERSIONS: u32 = 1 << 24;

/// What is in a page: absent (it has no memory), zero, or a version of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Absent,
    Zero,
    Version(u32),
}

impl Content {
    /// Those of several VMs have nothing in common.
    fn of_vm(self, nth: usize) -> Self {
        match self {
            Self::Version(version) => Self::Version(version + (nth as u32) * VERSIONS),
            other => other,
        }
    }

    pub fn bytes(self, page: PageIndex) -> Vec<u8> {
        match self {
            Self::Absent | Self::Zero => vec![0; PAGE_BYTES],
            Self::Version(version) => {
                let seed = u64::from(page.0) << 32 | u64::from(version);
                let word = (Random::new(seed).next() | 1).to_le_bytes();
                word.repeat(PAGE_BYTES / word.len())
            }
        }
    }

    /// Whether these bytes are this content.
    pub fn is(self, page: PageIndex, bytes: &[u8]) -> bool {
        bytes == self.bytes(page)
    }
}

/// The VM and everything that is wrong with it.
pub struct Vm {
    pub manifest: Manifest,
    versions_from: u32,
    state: Mutex<State>,
    breaches: Mutex<Vec<String>>,
}

struct State {
    memory: Vec<Content>,
    /// As it was when it was paused: what the destination is to have, also where the VM then stays at the source, runs
    /// on and writes, and the destination does not know yet.
    at_pause: Option<Vec<Content>>,
    /// What was written since that was last asked for, while it is logged.
    written: Option<BTreeSet<PageIndex>>,
    runs_at_source: bool,
    runs_at_destination: bool,
    committed: bool,
}

/// What a VM of so many pages consists of.
pub fn manifest(vm: String, pages: u64) -> Manifest {
    let region = Region {
        name: "ram".into(),
        guest_address: Some(0),
        length_bytes: pages * PAGE_BYTES_U64,
        unit: InstallUnit::Page,
    };
    Manifest { vm, regions: vec![region], vm_config: Vec::new(), sharing: None }
}

impl Vm {
    /// The one of a plan. What is in it is in no other.
    pub fn new(nth: usize, plan: &Plan) -> Arc<Self> {
        let memory: Vec<_> = plan.memory.iter().map(|content| content.of_vm(nth)).collect();
        let manifest = manifest(format!("vm{nth}"), memory.len() as u64);
        let state = State {
            memory,
            at_pause: None,
            written: None,
            runs_at_source: true,
            runs_at_destination: false,
            committed: false,
        };
        Arc::new(Self {
            manifest,
            versions_from: nth as u32 * VERSIONS,
            state: Mutex::new(state),
            breaches: Mutex::new(Vec::new()),
        })
    }

    pub fn pages(&self) -> u32 {
        self.manifest.pages()
    }

    /// Something was wrong.
    pub fn breach(&self, what: String) {
        self.breaches.lock().push(what);
    }

    pub fn breaches(&self) -> Vec<String> {
        self.breaches.lock().clone()
    }

    /// What a page is at the source.
    pub fn content(&self, page: PageIndex) -> Content {
        self.state.lock().memory[page.as_usize()]
    }

    /// What a page must be at the destination.
    pub fn content_to_be(&self, page: PageIndex) -> Content {
        let state = self.state.lock();
        state.at_pause.as_ref().unwrap_or(&state.memory)[page.as_usize()]
    }

    pub fn contents(&self) -> Vec<Content> {
        self.state.lock().memory.clone()
    }

    pub fn runs_at_source(&self) -> bool {
        self.state.lock().runs_at_source
    }

    pub fn runs_at_destination(&self) -> bool {
        self.state.lock().runs_at_destination
    }

    pub fn is_committed(&self) -> bool {
        self.state.lock().committed
    }

    pub fn pause(&self) {
        let mut state = self.state.lock();
        state.runs_at_source = false;
        state.at_pause = Some(state.memory.clone());
    }

    pub fn resume(&self) {
        let mut state = self.state.lock();
        if state.committed {
            self.breach("one owner: the source runs the VM again after COMMIT".into());
        }
        state.runs_at_source = true;
    }

    pub fn commit(&self) {
        self.state.lock().committed = true;
    }

    pub fn run_at_destination(&self) {
        let mut state = self.state.lock();
        if !state.committed {
            self.breach("one owner: the destination runs the VM without COMMIT".into());
        }
        if state.runs_at_source {
            self.breach("one owner: the VM runs at both ends".into());
        }
        state.runs_at_destination = true;
    }

    /// The source's host is gone, and with it a VM that ran there.
    pub fn source_died(&self) {
        self.state.lock().runs_at_source = false;
    }

    /// The destination's host is gone, and with it a VM that ran there.
    pub fn destination_died(&self) {
        self.state.lock().runs_at_destination = false;
    }

    /// The guest at the source writes a page, unless it is paused.
    pub fn write_at_source(&self, page: PageIndex, version: u32) {
        let mut state = self.state.lock();
        if state.runs_at_source {
            state.memory[page.as_usize()] = Content::Version(version);
            if let Some(written) = &mut state.written {
                written.insert(page);
            }
        }
    }

    /// Whether what the guest writes is logged.
    pub fn is_logged(&self) -> bool {
        self.state.lock().written.is_some()
    }

    pub fn log_writes(&self, on: bool) {
        self.state.lock().written = on.then(BTreeSet::new);
    }

    /// What was written since this was last asked for.
    pub fn written(&self) -> Vec<PageIndex> {
        self.state.lock().written.as_mut().map(std::mem::take).unwrap_or_default().into_iter().collect()
    }
}

/// Runs the guest at the source until it is paused.
pub fn run_at_source(vm: &Vm, mut random: Random) {
    let mut version = vm.versions_from + 1_000_000;
    while !vm.is_committed() {
        version += 1;
        vm.write_at_source(PageIndex(random.below(vm.pages().into()) as u32), version);
        libsg::host::thread::sleep(Duration::from_millis(random.within(1, 10)));
    }
}

/// What tells two contents of a page apart.
fn first_bytes(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

/// A page of the guest's memory at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Missing,
    Present,
    Poisoned,
}

/// The guest's memory at the destination, and where faults come from.
pub struct Memory {
    vm: Arc<Vm>,
    node: Arc<Node>,
    /// It is sent in rounds: what is installed before it runs may be replaced.
    replaces: bool,
    state: Mutex<MemoryState>,
    faulted: Waker,
    resolved: Waker,
}

struct MemoryState {
    places: Vec<Place>,
    /// What was installed, by its first bytes.
    holds: Vec<u64>,
    /// What the guest wrote since a page came.
    written: Vec<u32>,
    faults: Vec<PageIndex>,
    waits: Option<(PageIndex, Duration)>,
    /// Which page waited how long.
    longest: Duration,
    finished: bool,
}

impl Memory {
    pub fn new(vm: Arc<Vm>, node: Arc<Node>, replaces: bool) -> Self {
        let pages = vm.pages() as usize;
        let state = MemoryState {
            places: vec![Place::Missing; pages],
            holds: vec![0; pages],
            written: vec![0; pages],
            faults: Vec::new(),
            waits: None,
            longest: Duration::ZERO,
            finished: false,
        };
        let waker = || Waker::new().expect("an eventfd");
        Self { vm, node, replaces, state: Mutex::new(state), faulted: waker(), resolved: waker() }
    }

    /// Whether a page is in place, as it is to be.
    pub fn has(&self, page: PageIndex) -> bool {
        let truth = first_bytes(&self.vm.content_to_be(page).bytes(page));
        let is_right = !self.may_replace() || self.state.lock().holds[page.as_usize()] == truth;
        self.place(page) == Place::Present && is_right
    }

    fn may_replace(&self) -> bool {
        self.replaces && !self.vm.runs_at_destination()
    }

    /// The VM runs from now on: what was installed in rounds is what it has to be.
    pub fn runs(&self) {
        let contents = self.vm.contents();
        let state = self.state.lock();
        for (at, content) in contents.into_iter().enumerate().filter(|_| self.replaces) {
            let page = PageIndex(at as u32);
            let is_right = match state.places[at] {
                Place::Present => state.holds[at] == first_bytes(&content.bytes(page)),
                _ => !matches!(content, Content::Version(_)),
            };
            if !is_right {
                let what = if state.places[at] == Place::Present { "old" } else { "missing" };
                self.vm.breach(format!("each page is right: {page} is {what} when the VM runs"));
            }
        }
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
            state.faults.push(page);
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

    fn install_one(&self, state: &mut MemoryState, page: PageIndex, bytes: Option<&[u8]>) {
        let truth = self.vm.content_to_be(page);
        let is_right = match bytes {
            Some(bytes) => truth.is(page, bytes),
            None => !matches!(truth, Content::Version(_)),
        };
        state.holds[page.as_usize()] = bytes.map_or(0, first_bytes);
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
        true
    }

    fn replace(&self, first: PageIndex, bytes: &[u8]) -> libsg::Result<()> {
        let may = self.may_replace();
        let mut state = self.state.lock();
        for (nth, bytes) in bytes.chunks(PAGE_BYTES).enumerate() {
            let at = first.as_usize() + nth;
            if !may || state.places[at] != Place::Present {
                self.vm.breach(format!("install once: page {at} is replaced where it must not be"));
            }
            state.holds[at] = first_bytes(bytes);
        }
        Ok(())
    }

    fn poison(&self, range: PageRange) -> libsg::Result<()> {
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
        if self.vm.runs_at_destination() {
            let places = state.places.iter().zip(&contents).enumerate();
            for (page, _) in places.filter(|(_, (place, content))| {
                **place == Place::Missing && matches!(content, Content::Version(_))
            }) {
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
