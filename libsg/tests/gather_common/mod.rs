//! A scripted source, a VM that arrives and a pool of intermediaries in memory: what the gather tests
//! have in common. Nothing here asserts a time; what never happens ends at [`LONG`].
#![allow(dead_code, clippy::unwrap_used)]

pub mod stream;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libsg::ids::{Checksum, Epoch, MemberSet, Round, Sequence, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory, PageSlice, PresenceMap};
use libsg::migrate::destination::{Destination, DestinationOptions, Incoming};
use libsg::migrate::{Event, IncomingVm};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::source::{MemorySource, Outcome, PageSource, Repeat, Supply};
use libsg::transport::{Channel, Conversation, Inbox, Outbox, PoolSecret, dial, wait};
use libsg::uffd::{InstallBy, Uffd};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Reply, Request};
use libsg::vmd::{MemoryConnector, MemoryNode};
use libsg::wire::entry::decode_table;
use libsg::wire::final_set;
use libsg::wire::handshake::Purpose;
use libsg::wire::message::{Member, Rounds, Talk, VmdRequest};
use libsg::wire::run::{encode_runs, table_bytes};
use libsg::wire::{Credit, Header, IndexEntry, Kind, PageEntry};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

/// Longer than anything takes that happens at all.
pub const LONG: Duration = Duration::from_secs(60);

pub const EPOCH: Epoch = Epoch::FIRST;

/// What page `page` holds: itself, and bytes that follow from it.
pub fn content(page: u32) -> Vec<u8> {
    let mut bytes = vec![(page % 251) as u8 | 1; PAGE_BYTES];
    bytes[..4].copy_from_slice(&page.to_le_bytes());
    bytes
}

pub fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"of the gather tests").unwrap()
}

pub fn manifest(pages: u64, unit: InstallUnit) -> Manifest {
    let length_bytes = pages * PAGE_BYTES as u64;
    let region = Region { name: "ram".into(), guest_address: Some(0), length_bytes, unit };
    Manifest { vm: "vm".into(), regions: vec![region], vm_config: vec![1], sharing: None }
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What happened to the arriving VM, seen from outside.
#[derive(Default)]
pub struct Seen {
    pub memory: Mutex<Option<GuestMemory>>,
    pub state: Mutex<Vec<u8>>,
    pub running: AtomicBool,
    pub abandoned: AtomicBool,
    pub lost: Mutex<Vec<PageRange>>,
    pub poisoned: Mutex<Vec<PageRange>>,
    pub installed: AtomicU64,
    pub events: Mutex<Vec<Event>>,
    /// The next installation panics.
    pub panic: AtomicBool,
    /// Whoever installs zeros waits with it for as long as this is set, and counts himself.
    pub hold_zeros: AtomicBool,
    pub held_zeros: AtomicU64,
    /// Units may be installed again before the VM runs.
    pub replaces: AtomicBool,
    pub replaced: AtomicU64,
    /// Pages that were taken out again.
    pub withdrawn: AtomicU64,
    /// Each page is taken once.
    pub takes_once: AtomicBool,
    /// Pages that were installed before the VM was paused at the source.
    pub installed_before: AtomicU64,
}

impl Seen {
    pub fn memory(&self) -> GuestMemory {
        self.memory.lock().clone().expect("prepared")
    }

    pub fn has(&self, is: impl Fn(&Event) -> bool) -> bool {
        self.events.lock().iter().any(is)
    }
}

/// Memory of 4 KiB pages, and how they get there; where the kernel cannot map pages of files, they are copied.
pub const KINDS: [(Backing, InstallBy); 3] =
    [(Backing::Anon, InstallBy::Copy), (Backing::Memfd, InstallBy::Copy), (Backing::Memfd, InstallBy::File)];

struct Vm {
    seen: Arc<Seen>,
    backing: Backing,
    by: InstallBy,
    /// Pages that loading the state touches.
    touch: Vec<u32>,
}

impl IncomingVm for Vm {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        let memory = GuestMemory::allocate(manifest, self.backing)?;
        let uffd = Uffd::register_by(&memory, self.by)?;
        *self.seen.memory.lock() = Some(memory);
        Ok(Arc::new(Spy { uffd, seen: Arc::clone(&self.seen) }))
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        *self.seen.state.lock() = state.to_vec();
        let memory = self.seen.memory();
        for page in &self.touch {
            assert_eq!(read(&memory, *page), content(*page));
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        self.seen.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn abandon(&mut self) {
        self.seen.abandoned.store(true, Ordering::SeqCst);
    }

    fn lost(&mut self, pages: &[PageRange]) {
        self.seen.lost.lock().extend_from_slice(pages);
    }
}

/// A VM that arrives in memory of this kind, whose state touches these pages.
pub fn arriving(seen: &Arc<Seen>, backing: Backing, touch: Vec<u32>) -> Box<dyn IncomingVm> {
    Box::new(Vm { seen: Arc::clone(seen), backing, by: InstallBy::best(), touch })
}

/// The state as it is sent of a VM that was paused before anything was.
pub fn blob(state: &[u8]) -> Vec<u8> {
    final_set::encode(std::iter::empty(), state)
}

/// Touches a page as the guest would: waits until it is there.
pub fn read(memory: &GuestMemory, page: u32) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    memory.copy_out(PageRange::new(PageIndex(page), 1), &mut bytes).unwrap();
    bytes
}

/// A userfaultfd that is watched.
struct Spy {
    uffd: Uffd,
    seen: Arc<Seen>,
}

impl Spy {
    fn note(&self, outcome: Result<InstallOutcome>) -> Result<InstallOutcome> {
        assert!(!self.seen.panic.load(Ordering::SeqCst), "told to panic");
        if let Ok(outcome) = &outcome {
            self.seen.installed.fetch_add(outcome.installed_pages().into(), Ordering::SeqCst);
            // In pre-copy it is then replaced, until it runs.
            let may_replace =
                self.seen.replaces.load(Ordering::SeqCst) && !self.seen.running.load(Ordering::SeqCst);
            assert!(may_replace || outcome.already_present().next().is_none(), "a unit was installed twice");
        }
        outcome
    }
}

impl PageSink for Spy {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome> {
        self.note(self.uffd.install(first, bytes))
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        if self.seen.hold_zeros.load(Ordering::SeqCst) {
            self.seen.held_zeros.fetch_add(1, Ordering::SeqCst);
            until("zeros may be installed", || !self.seen.hold_zeros.load(Ordering::SeqCst));
        }
        self.note(self.uffd.install_zero(range))
    }

    fn can_replace(&self) -> bool {
        self.uffd.can_replace() && !self.seen.takes_once.load(Ordering::SeqCst)
    }

    fn replace(&self, first: PageIndex, bytes: &[u8]) -> Result<()> {
        assert!(self.seen.replaces.load(Ordering::SeqCst) && !self.seen.running.load(Ordering::SeqCst));
        self.seen.replaced.fetch_add(bytes.len() as u64 / 4096, Ordering::SeqCst);
        self.uffd.replace(first, bytes)
    }

    fn withdraw(&self, runs: &[PageRange]) -> Result<()> {
        assert!(
            self.can_replace() && self.seen.state.lock().is_empty(),
            "taken out before the state is loaded"
        );
        let pages: u32 = runs.iter().map(|run| run.pages).sum();
        self.seen.withdrawn.fetch_add(pages.into(), Ordering::SeqCst);
        self.uffd.withdraw(runs)
    }

    fn poison(&self, range: PageRange) -> Result<()> {
        self.seen.poisoned.lock().push(range);
        self.uffd.poison(range)
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize> {
        self.uffd.events(out)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.uffd.event_fd()
    }

    fn finish(&self) -> Result<()> {
        self.uffd.finish()
    }
}

/// One migration: the destination, what it does to its VM, and a pool.
pub struct Scene {
    pub incoming: Incoming,
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    pub manifest: Manifest,
    pub volume: VolumeId,
    pub connector: MemoryConnector,
    pub nodes: Vec<MemoryNode>,
}

pub struct Plan {
    pub pages: u64,
    pub unit: InstallUnit,
    pub backing: Backing,
    pub by: InstallBy,
    pub nodes: usize,
    pub gather_limit: u64,
    pub grace: Duration,
    pub touch: Vec<u32>,
    /// Its memory takes each page once.
    pub takes_once: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            pages: 300,
            unit: InstallUnit::Page,
            backing: Backing::Anon,
            by: InstallBy::Copy,
            nodes: 0,
            gather_limit: 0,
            grace: Duration::from_millis(300),
            touch: Vec::new(),
            takes_once: false,
        }
    }
}

impl Scene {
    pub fn new(plan: Plan) -> Self {
        let seen = Arc::new(Seen::default());
        let connector = MemoryConnector::new();
        let nodes: Vec<_> =
            (0..plan.nodes).map(|n| connector.node(&format!("i{}", n + 1), 1 << 20).unwrap()).collect();
        let mut options =
            DestinationOptions::new("127.0.0.1:0".parse().unwrap(), secret(), Arc::new(connector.clone()));
        options.gather_limit = plan.gather_limit;
        (options.source_grace, options.member_grace) = (plan.grace, plan.grace);
        let watch = Arc::clone(&seen);
        options.observer = Arc::new(move |event| watch.events.lock().push(event.clone()));
        let destination = Destination::listen(options).unwrap();
        let address = destination.address();
        let vm = Vm { seen: Arc::clone(&seen), backing: plan.backing, by: plan.by, touch: plan.touch };
        let incoming = destination.accept(Box::new(vm)).unwrap();
        let manifest = manifest(plan.pages, plan.unit);
        let volume = VolumeId::random().unwrap();
        let scene = Self { incoming, address, seen, manifest, volume, connector, nodes };
        for node in &scene.nodes {
            let create = VmdRequest::Create { manifest: scene.manifest.clone(), members: scene.members() };
            scene.control(node, &create);
        }
        scene
    }

    pub fn members(&self) -> Vec<Member> {
        self.nodes.iter().map(MemoryNode::member).collect()
    }

    pub fn control(&self, node: &MemoryNode, request: &VmdRequest) {
        self.ask(node, Request::Control(request), |_| Ok(()));
    }

    pub fn ask<T>(
        &self,
        node: &MemoryNode,
        request: Request<'_>,
        take: impl FnOnce(Reply<'_>) -> Result<T>,
    ) -> T {
        let mut link =
            self.connector.connect(node.member().address, self.volume, EPOCH, Class::Bulk, LONG).unwrap();
        ask(&mut *link, request, LONG, take).unwrap()
    }

    /// Puts pages to a node, and says where they lie now.
    pub fn stage(&self, node: usize, pages: impl IntoIterator<Item = u32>) -> Vec<IndexEntry> {
        let mut entries = Vec::new();
        let pages: Vec<u32> = pages.into_iter().collect();
        for some in pages.chunks(64) {
            let put: Vec<_> = some.iter().map(|page| raw(*page)).collect();
            let slices: Vec<_> = some.iter().map(|page| PageSlice::owned(content(*page).into())).collect();
            let request = Request::Put { entries: &put, slices: &slices, copies: MemberSet::NONE };
            let placed = self.ask(&self.nodes[node], request, |reply| match reply {
                Reply::Stored { placements, .. } => Ok(placements.to_vec()),
                other => panic!("{other:?}"),
            });
            entries.extend(put.iter().zip(placed).map(|(put, place)| {
                IndexEntry::at(put.page, put.round, place.expect("stored"), put.checksum)
            }));
        }
        entries
    }

    /// Puts entries into the index of the node that owns them.
    pub fn index(&self, node: usize, entries: &[IndexEntry]) {
        self.ask(&self.nodes[node], Request::PutIndex(entries), |_| Ok(()));
    }

    /// Puts entries into the index where their owner is, as a source does.
    pub fn index_at_owners(&self, entries: &[IndexEntry]) {
        for owner in 0..self.nodes.len() {
            let of = |entry: &&IndexEntry| (entry.page.0 / 1024) as usize % self.nodes.len() == owner;
            let some: Vec<_> = entries.iter().filter(of).copied().collect();
            some.chunks(1000).for_each(|some| self.index(owner, some));
        }
    }

    pub fn dial(&self, purpose: Purpose) -> Channel {
        dial(self.address, purpose, self.volume, EPOCH, &secret(), LONG).unwrap()
    }

    /// As a source whose connections broke. The ranges that the destination says it holds, and whether the VM runs.
    pub fn rejoin(&self) -> (Conversation, Vec<PageRange>, bool) {
        let mut control = Conversation::new(self.dial(Purpose::MigrationControl));
        control.send_talk(&Talk::Rejoin, soon()).unwrap();
        let (mut held, mut ended) = (Vec::new(), false);
        loop {
            let frame = control.recv(soon()).unwrap();
            match frame.header.kind {
                Kind::Holdings if frame.header.count == 0 => ended = true,
                Kind::Holdings => {
                    let mut some = Vec::new();
                    decode_table(frame.body, frame.header.count.into(), &mut some).unwrap();
                    held.append(&mut some);
                }
                Kind::Talk => {
                    if let Talk::Rejoined { running } = Talk::decode(frame.body).unwrap() {
                        assert!(ended, "holdings come first");
                        return (control, held, running);
                    }
                }
                _ => {}
            }
        }
    }

    /// Every page reads as it was written, but the zero ones and those in `lost`.
    pub fn check(&self, zero: impl Fn(u32) -> bool, lost: impl Fn(u32) -> bool) {
        let memory = self.seen.memory();
        for page in (0..self.manifest.pages()).filter(|page| !lost(*page)) {
            let want = if zero(page) { vec![0; PAGE_BYTES] } else { content(page) };
            assert!(read(&memory, page) == want, "page {page}");
        }
    }

    pub fn nothing_staged(&self) {
        for node in &self.nodes {
            self.ask(node, Request::Control(&VmdRequest::Statistics), |reply| match reply {
                Reply::Control(libsg::wire::message::VmdReply::Statistics(stats)) => {
                    assert_eq!(stats.used_bytes, 0);
                    Ok(())
                }
                other => panic!("{other:?}"),
            });
        }
    }
}

/// How a source of pages ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an error, of a kind that a peer's failure has too.
    Fails,
    /// With a panic, in the thread of a sink.
    Panics,
    /// With a panic before the first page, while the VM is paused.
    PanicsWhenPaused,
}

/// A source of pages that gives so many slices and then ends.
pub struct Limited {
    pub memory: MemorySource,
    pub slices_left: AtomicU32,
    pub end: End,
}

impl PageSource for Limited {
    fn repeat(&self) -> Repeat {
        self.memory.repeat()
    }

    fn presence(&self) -> Result<PresenceMap> {
        assert_ne!(self.end, End::PanicsWhenPaused, "no presence today");
        self.memory.presence()
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        self.memory.available(out)
    }

    fn want(&self, page: PageIndex) -> Result<()> {
        self.memory.want(page)
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let left = self.slices_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match (left, self.end) {
            (Ok(_), _) => self.memory.slice(range),
            (Err(_), End::Fails) => Err(Error::new(ErrorKind::Unreachable, "the memory's host is gone")),
            (Err(_), _) => panic!("no page today"),
        }
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        self.memory.outcome(range, outcome);
    }
}

pub fn raw(page: u32) -> PageEntry {
    PageEntry::raw(PageIndex(page), Round(0), Checksum::of(&content(page)))
}

/// How the source answers a fault.
#[derive(Clone, Copy)]
pub enum Answer {
    Page,
    At(IndexEntry),
    Zero,
    Gone,
    Silent,
}

/// A source that does what the test says.
pub struct Source {
    pub control: Conversation,
    pub direct: Option<Direct>,
    pub faults: Arc<AtomicU64>,
    urgent: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Source {
    /// Offers the VM and waits until it is accepted.
    pub fn offer(scene: &Scene) -> Self {
        Self::offer_in(scene, Rounds::None)
    }

    /// The same, of a VM that is sent in rounds.
    pub fn offer_in(scene: &Scene, rounds: Rounds) -> Self {
        let mut control = Conversation::new(scene.dial(Purpose::MigrationControl));
        let offer = Talk::Offer {
            manifest: scene.manifest.clone(),
            members: scene.members(),
            elapsed_us: 1_000,
            rounds,
        };
        control.send_talk(&offer, soon()).unwrap();
        let mut source = Self { control, direct: None, faults: Arc::default(), urgent: None };
        source.hear(|talk| *talk == Talk::Accepted);
        source
    }

    /// Opens the other two connections.
    pub fn connect(&mut self, scene: &Scene, answer: impl Fn(u32) -> Answer + Send + 'static) {
        self.direct = Some(Direct::new(scene.dial(Purpose::MigrationDirect)));
        let channel = scene.dial(Purpose::MigrationUrgent);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, faults) = (Arc::clone(&stop), Arc::clone(&self.faults));
        let unit = scene.manifest.regions[0].unit.pages();
        let thread = std::thread::spawn(move || serve_urgent(&channel, &stopped, &faults, unit, answer));
        self.urgent = Some((stop, thread));
    }

    /// Messages until one is as wanted; progress, pings and other frames are let pass.
    pub fn hear(&mut self, wanted: impl Fn(&Talk) -> bool) -> Talk {
        self.try_hear(wanted).unwrap()
    }

    pub fn try_hear(&mut self, wanted: impl Fn(&Talk) -> bool) -> Result<Talk> {
        loop {
            let frame = self.control.recv(soon())?;
            let header = frame.header;
            match header.kind {
                Kind::Talk => {
                    let talk = Talk::decode(frame.body)?;
                    if wanted(&talk) {
                        return Ok(talk);
                    }
                }
                Kind::Ping => self.control.send(header.answer(Kind::Pong), &[], soon())?,
                _ => {}
            }
        }
    }

    pub fn say(&mut self, talk: &Talk) {
        self.control.send_talk(talk, soon()).unwrap();
    }

    pub fn announce(&mut self, entries: &[IndexEntry]) {
        for some in entries.chunks(1000) {
            let mut table = Vec::new();
            let runs = encode_runs(some.iter().copied(), &mut table);
            let header = self.control.channel().header(Kind::Announce);
            let header = Header { count: runs as u16, ..header };
            self.control.send(header, &table, soon()).unwrap();
        }
    }

    /// Sends the state and waits for READY.
    pub fn send_state(&mut self) {
        self.control.send_state(&blob(b"state of the vCPUs"), soon()).unwrap();
        self.hear(|talk| *talk == Talk::Ready);
    }

    /// State, READY, RUN, Running.
    pub fn run(&mut self) {
        self.send_state();
        self.say(&Talk::Run);
        self.hear(|talk| *talk == Talk::Running);
    }

    /// All of it up to the running VM.
    pub fn start(scene: &Scene, answer: impl Fn(u32) -> Answer + Send + 'static) -> Self {
        let mut source = Self::offer(scene);
        source.connect(scene, answer);
        source.run();
        source
    }

    /// It is gone, as by SIGKILL.
    pub fn die(mut self) {
        self.cut();
    }

    fn cut(&mut self) {
        self.control.channel().shut_down();
        self.cut_data();
    }

    pub fn cut_data(&mut self) {
        if let Some(direct) = self.direct.take() {
            direct.channel.shut_down();
        }
        if let Some((stop, thread)) = self.urgent.take() {
            stop.store(true, Ordering::SeqCst);
            thread.join().unwrap();
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.cut();
    }
}

pub fn soon() -> Instant {
    Instant::now() + LONG
}

fn serve_urgent(
    channel: &Channel,
    stop: &AtomicBool,
    faults: &AtomicU64,
    unit: u32,
    answer: impl Fn(u32) -> Answer,
) {
    let (mut inbox, mut outbox) = (Inbox::new(), Outbox::new());
    while !stop.load(Ordering::SeqCst) {
        loop {
            let frame = match inbox.poll(channel) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => return,
            };
            if frame.header.kind != Kind::Fault {
                continue;
            }
            faults.fetch_add(1, Ordering::SeqCst);
            let mut pages = Vec::<PageIndex>::new();
            decode_table(frame.body, frame.header.count.into(), &mut pages).unwrap();
            let page = pages[0].0;
            let answered = answer(page);
            let mut table = Vec::new();
            let mut slices = Vec::new();
            let (kind, count) = match answered {
                Answer::Silent => continue,
                Answer::At(entry) => (Kind::Announce, encode_runs([entry], &mut table)),
                Answer::Gone => (Kind::Pages, encode_runs([PageEntry::gone(PageIndex(page))], &mut table)),
                Answer::Zero => {
                    let zero = PageEntry::zero(PageIndex(page), unit as u16, Round(0));
                    (Kind::Pages, encode_runs([zero], &mut table))
                }
                Answer::Page => {
                    slices.extend((page..page + unit).map(|page| PageSlice::owned(content(page).into())));
                    (Kind::Pages, encode_runs((page..page + unit).map(raw), &mut table))
                }
            };
            let header = Header { count: count as u16, ..frame.header.answer(kind) };
            outbox.push_frame(header, &table, slices).unwrap();
        }
        if outbox.flush(channel, usize::MAX).is_err() {
            return;
        }
        let writes = outbox.queued_bytes() > 0;
        wait(&[(Some(channel.as_fd()), writes)], Duration::from_millis(20)).unwrap();
    }
    channel.shut_down();
}

/// The direct connection, as the source sees it.
pub struct Direct {
    pub channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    pub credit: u64,
    pub sent: u64,
    sequence: u64,
    /// What was acknowledged: the pages that were not installed, by batch.
    pub acks: HashMap<u64, Vec<PageIndex>>,
}

impl Direct {
    pub fn new(channel: Channel) -> Self {
        let (inbox, outbox) = (Inbox::new(), Outbox::new());
        Self { channel, inbox, outbox, credit: 0, sent: 0, sequence: 0, acks: HashMap::new() }
    }

    /// Reads acknowledgements and credit.
    pub fn hear(&mut self, timeout: Duration) -> Result<()> {
        self.outbox.flush(&self.channel, usize::MAX)?;
        wait(&[(Some(self.channel.as_fd()), self.outbox.queued_bytes() > 0)], timeout)?;
        while let Some(frame) = self.inbox.poll(&self.channel)? {
            match frame.header.kind {
                Kind::Credit => {
                    let credit = Credit::decode(frame.body).unwrap();
                    assert!(credit.limit >= self.credit, "credit never shrinks");
                    self.credit = credit.limit;
                }
                Kind::PagesAck => {
                    let mut bad = Vec::new();
                    decode_table(frame.body, frame.header.count.into(), &mut bad).unwrap();
                    self.acks.insert(frame.header.sequence.0, bad);
                }
                other => panic!("{other:?}"),
            }
        }
        Ok(())
    }

    /// Sends one batch, once its credit is there; returns its number.
    pub fn send(&mut self, entries: &[PageEntry], bytes: &[Vec<u8>]) -> u64 {
        let length = 64 + table_bytes(entries) as u64 + bytes.iter().map(|b| b.len() as u64).sum::<u64>();
        while self.sent + length > self.credit {
            self.hear(LONG).unwrap();
        }
        let mut table = Vec::new();
        let runs = encode_runs(entries.iter().copied(), &mut table);
        self.sequence += 1;
        let header = self.channel.header(Kind::Pages);
        let header = Header { count: runs as u16, sequence: Sequence(self.sequence), ..header };
        let slices = bytes.iter().map(|bytes| PageSlice::owned(bytes.as_slice().into()));
        self.sent += self.outbox.push_frame(header, &table, slices).unwrap() as u64;
        // A connection that broke is noticed by whoever listens next.
        let _ = self.hear(Duration::ZERO);
        self.sequence
    }

    /// Sends pages in batches of `batch`.
    pub fn pages(&mut self, pages: impl IntoIterator<Item = u32>, batch: usize) {
        let pages: Vec<u32> = pages.into_iter().collect();
        for some in pages.chunks(batch) {
            let entries: Vec<_> = some.iter().map(|page| raw(*page)).collect();
            let bytes: Vec<_> = some.iter().map(|page| content(*page)).collect();
            self.send(&entries, &bytes);
        }
    }

    /// Until everything that was sent is acknowledged; nothing of it was refused.
    pub fn settle(&mut self) {
        until("every batch is acknowledged", || {
            self.hear(Duration::from_millis(5)).unwrap();
            self.acks.len() as u64 == self.sequence
        });
        assert!(self.acks.values().all(Vec::is_empty));
    }
}
