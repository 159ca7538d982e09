//! The VM: what is in its memory, where it runs, and the guest that writes at the source.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory, PresenceMap};
use libsg::migrate::source::Unscattered;
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use parking_lot::Mutex;

use crate::content::Content;
use crate::random::Random;
use crate::scenario::Plan;

/// Versions of pages of one VM: those of several have nothing in common.
const VERSIONS: u32 = 1 << 24;

/// Versions that pages have in the beginning are below.
const VERSIONS_OLD: u32 = 1 << 20;

/// Pages that were read lately, which the guest likes to write.
const LATELY: usize = 8;

/// The VM and everything that is wrong with it.
pub struct Vm {
    pub manifest: Manifest,
    /// Real memory, which the product reads while the guest writes it.
    memory: GuestMemory,
    /// The log names whole install units, as a kernel does that protects huge pages, and not single pages.
    logs_units: bool,
    state: Mutex<State>,
    /// What another process needs that goes on with it.
    noted: Mutex<Option<Unscattered>>,
    breaches: Mutex<Vec<String>>,
}

struct State {
    contents: Vec<Content>,
    /// As it was when it was paused: what the destination is to have, also where the VM then stays at the source, runs
    /// on and writes, and the destination does not know yet.
    at_pause: Option<Vec<Content>>,
    /// What was written since that was last asked for, while it is logged.
    written: Option<BTreeSet<PageIndex>>,
    /// The write that is under way: half of the page is done.
    writes: Option<(PageIndex, u32)>,
    read_lately: VecDeque<PageIndex>,
    next_version: u32,
    random: Random,
    runs_at_source: bool,
    runs_at_destination: bool,
    /// It has run somewhere else than at its source.
    has_run: bool,
    committed: bool,
}

/// What a VM of such regions consists of.
pub fn manifest(vm: String, regions: &[(u64, InstallUnit)]) -> Manifest {
    let region = |(nth, (pages, unit)): (usize, &(u64, InstallUnit))| Region {
        name: format!("ram{nth}"),
        guest_address: Some((nth as u64) << 32),
        length_bytes: pages * PAGE_BYTES_U64,
        unit: *unit,
    };
    let regions = regions.iter().enumerate().map(region).collect();
    Manifest { vm, regions, vm_config: Vec::new(), sharing: None }
}

impl Vm {
    /// The one of a plan. What is in it is in no other.
    pub fn new(nth: usize, plan: &Plan, random: Random) -> Arc<Self> {
        let manifest = manifest(format!("vm{nth}"), &plan.regions);
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).expect("memory");
        let versions = nth as u32 * VERSIONS;
        let contents: Vec<_> = plan.memory.iter().map(|content| content.later(versions)).collect();
        for (page, content) in (0..).map(PageIndex).zip(&contents).filter(|(_, content)| !content.is_zero()) {
            memory.copy_in(PageRange::new(page, 1), &content.bytes(page)).expect("inside");
        }
        let state = State {
            contents,
            at_pause: None,
            written: None,
            writes: None,
            read_lately: VecDeque::new(),
            next_version: versions + VERSIONS_OLD,
            random,
            runs_at_source: true,
            runs_at_destination: false,
            has_run: false,
            committed: false,
        };
        let (state, noted, breaches) = (Mutex::new(state), Mutex::default(), Mutex::default());
        Arc::new(Self { manifest, memory, logs_units: plan.logs_units, state, noted, breaches })
    }

    pub fn pages(&self) -> u32 {
        self.manifest.pages()
    }

    /// The pages that are installed together with a page.
    pub fn unit(&self, page: PageIndex) -> PageRange {
        self.memory.unit(page).expect("a page of the VM")
    }

    pub fn in_one_region(&self, range: PageRange) -> bool {
        self.memory.run(range.first, range.pages) == Some(range)
    }

    /// Something was wrong.
    pub fn breach(&self, what: String) {
        self.breaches.lock().push(what);
    }

    pub fn breaches(&self) -> Vec<String> {
        self.breaches.lock().clone()
    }

    /// What outlives the process that it leaves by.
    pub fn note(&self, unscattered: &Unscattered) {
        *self.noted.lock() = Some(unscattered.clone());
    }

    /// It is given back: nobody is to go on with it.
    pub fn stays(&self) {
        *self.noted.lock() = None;
    }

    pub fn noted(&self) -> Option<Unscattered> {
        self.noted.lock().clone()
    }

    /// What a page must be at the destination.
    pub fn content_to_be(&self, page: PageIndex) -> Content {
        let state = self.state.lock();
        state.at_pause.as_ref().unwrap_or(&state.contents)[page.as_usize()]
    }

    pub fn contents(&self) -> Vec<Content> {
        self.state.lock().contents.clone()
    }

    pub fn presence(&self) -> PresenceMap {
        let mut presence = PresenceMap::new(self.pages());
        for (page, _) in (0..).zip(self.contents()).filter(|(_, content)| *content != Content::Absent) {
            presence.insert(PageRange::new(PageIndex(page), 1));
        }
        presence
    }

    /// The memory, of which pages are read now: a guest that runs, and whose writes are logged, may be just
    /// writing one of them.
    pub fn read(&self, range: PageRange) -> &GuestMemory {
        let state = &mut *self.state.lock();
        if state.runs_at_source && state.written.is_some() {
            let page = PageIndex(range.first.0 + state.random.below(range.pages.into()) as u32);
            state.read_lately.truncate(LATELY - 1);
            state.read_lately.push_front(page);
            if state.writes.is_none() && state.random.one_in(4) {
                self.begin_write_of(state, page);
            }
        }
        &self.memory
    }

    pub fn runs_at_source(&self) -> bool {
        self.state.lock().runs_at_source
    }

    pub fn runs_at_destination(&self) -> bool {
        self.state.lock().runs_at_destination
    }

    /// Whether it was run by any destination.
    pub fn has_run(&self) -> bool {
        self.state.lock().has_run
    }

    pub fn is_committed(&self) -> bool {
        self.state.lock().committed
    }

    /// It stops where it is, be it in the middle of a page.
    pub fn pause(&self) {
        let mut state = self.state.lock();
        state.runs_at_source = false;
        state.at_pause = Some(state.contents.clone());
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
        if state.has_run {
            self.breach("one owner: the VM is run a second time".into());
        }
        (state.runs_at_destination, state.has_run) = (true, true);
    }

    /// The source's host is gone, and with it a VM that ran there.
    pub fn source_died(&self) {
        self.state.lock().runs_at_source = false;
    }

    /// The destination's host is gone, and with it a VM that ran there.
    pub fn destination_died(&self) {
        self.state.lock().runs_at_destination = false;
    }

    /// The guest at the source begins to write a page, unless it is paused or has not finished another.
    fn begin_write(&self) {
        let state = &mut *self.state.lock();
        let lately = state.random.below(LATELY as u64) as usize;
        let anywhere = PageIndex(state.random.below(state.contents.len() as u64) as u32);
        let page = state.read_lately.get(lately).copied().unwrap_or(anywhere);
        if state.writes.is_none() {
            self.begin_write_of(state, page);
        }
    }

    fn begin_write_of(&self, state: &mut State, page: PageIndex) {
        if !state.runs_at_source {
            return;
        }
        state.next_version += 1;
        let version = if state.random.one_in(4) { 0 } else { state.next_version };
        let [_, second] = state.contents[page.as_usize()].halves();
        state.writes = Some((page, version));
        self.write(state, page, [version, second]);
    }

    /// It finishes what it began.
    fn end_write(&self) {
        let state = &mut *self.state.lock();
        if state.runs_at_source
            && let Some((page, version)) = state.writes.take()
        {
            self.write(state, page, [version, version]);
        }
    }

    /// The bytes, and the log, in one step.
    fn write(&self, state: &mut State, page: PageIndex, halves: [u32; 2]) {
        let unit = self.unit(page);
        // Memory comes in whole units.
        let absent = |content: &&mut Content| **content == Content::Absent;
        state.contents[unit.positions()]
            .iter_mut()
            .filter(absent)
            .for_each(|content| *content = Content::Zero);
        let content = Content::of(halves);
        state.contents[page.as_usize()] = content;
        let bytes = content.bytes(page);
        debug_assert_eq!(bytes.len(), PAGE_BYTES);
        self.memory.copy_in(PageRange::new(page, 1), &bytes).expect("inside");
        if let Some(written) = &mut state.written {
            if self.logs_units { written.extend(unit.iter()) } else { written.extend([page]) }
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

/// Runs the guest at the source until COMMIT: busy at first, or not, and ever more at ease where that takes long.
pub fn run_at_source(vm: &Vm, mut random: Random) {
    let busy = random.pick(&[0, 200]);
    for writes in 0.. {
        if vm.is_committed() {
            return;
        }
        vm.begin_write();
        if random.one_in(2) {
            libsg::host::thread::sleep(Duration::from_micros(random.within(0, 200)));
        }
        vm.end_write();
        let most_us = if writes < busy { 1000 } else { 10_000 + 1000 * (writes - busy).min(200) };
        libsg::host::thread::sleep(Duration::from_micros(random.within(most_us / 10, most_us)));
    }
}
