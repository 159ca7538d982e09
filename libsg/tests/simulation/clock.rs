//! The simulated host: a clock, and a scheduler that lets one thread run at a time.
//!
//! libsg's threads are real ones, and everything in them is the product's code; but each runs only when the
//! scheduler gives it the turn, until it waits. Which of those that could go on does is drawn by seed. The clock
//! moves only when nobody can go on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use libsg::host::simulation::{Bug, KEY_OF_THREADS, World, enter};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::net::{Net, NodeNumber};
use crate::random::Random;

/// Time that one turn of a thread takes.
const TURN: Duration = Duration::from_micros(2);

/// A thread that holds its turn for so long, in real time, waits for something behind the scheduler's back.
const STUCK: Duration = Duration::from_secs(20);

/// All nodes, their threads, their clock and their network.
pub struct Host {
    started: Instant,
    main: std::thread::Thread,
    core: Mutex<Core>,
    bug: Option<Bug>,
}

struct Core {
    now: Duration,
    turns: u64,
    trace: u64,
    next_thread: u64,
    tasks: BTreeMap<u64, Task>,
    running: Option<u64>,
    frozen: Vec<NodeNumber>,
    net: Net,
    random: Random,
}

struct Task {
    node: NodeNumber,
    seat: Arc<Seat>,
    waits: Waits,
}

/// What a thread waits for.
#[derive(Default)]
struct Waits {
    on: Vec<(OwnedFd, PollFlags)>,
    key: Option<usize>,
    until: Duration,
}

/// Where a thread waits for its turn.
#[derive(Default)]
struct Seat {
    turn: AtomicBool,
    thread: Mutex<Option<std::thread::Thread>>,
}

impl Seat {
    fn give_turn(&self) {
        self.turn.store(true, Ordering::Release);
        if let Some(thread) = &*self.thread.lock() {
            thread.unpark();
        }
    }

    fn wait_for_turn(&self) {
        while !self.turn.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
    }
}

/// What came of asking for the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A thread had its turn.
    Ran,
    /// Nobody can go on before this time.
    Nothing,
}

thread_local! {
    static TASK: RefCell<Option<(u64, Arc<Seat>)>> = const { RefCell::new(None) };
}

/// The host as the threads of one node see it.
pub struct Node {
    host: Arc<Host>,
    number: NodeNumber,
    dead: AtomicBool,
}

/// What a thread of a node that was killed unwinds with.
struct Killed;

impl Host {
    pub fn new(seed: u64, net: Net, bug: Option<Bug>) -> Arc<Self> {
        let core = Core {
            now: Duration::ZERO,
            turns: 0,
            trace: 0,
            next_thread: 0,
            tasks: BTreeMap::new(),
            running: None,
            frozen: Vec::new(),
            net,
            random: Random::new(seed).fork(1),
        };
        Arc::new(Self { started: Instant::now(), main: std::thread::current(), core: Mutex::new(core), bug })
    }

    pub fn node(self: &Arc<Self>, number: NodeNumber) -> Arc<Node> {
        Arc::new(Node { host: Arc::clone(self), number, dead: AtomicBool::new(false) })
    }

    /// Since the beginning.
    pub fn now(&self) -> Duration {
        self.core.lock().now
    }

    /// Turns that threads had.
    pub fn turns(&self) -> u64 {
        self.core.lock().turns
    }

    /// A number that two runs have in common only if the same threads ran at the same times.
    pub fn trace(&self) -> u64 {
        self.core.lock().trace
    }

    pub fn with_net<T>(&self, act: impl FnOnce(&mut Net, Duration) -> T) -> T {
        let core = &mut *self.core.lock();
        act(&mut core.net, core.now)
    }

    /// A frozen node's threads do not run.
    pub fn freeze(&self, node: NodeNumber, frozen: bool) {
        let mut core = self.core.lock();
        core.frozen.retain(|other| *other != node);
        if frozen {
            core.frozen.push(node);
        }
    }

    /// Lets one thread have its turn; moves the clock, but not past `until`, when nobody can go on now.
    pub fn step(&self, until: Duration) -> Step {
        let seat = {
            let core = &mut *self.core.lock();
            let Some(thread) = core.choose(until) else { return Step::Nothing };
            core.turns += 1;
            core.now += TURN;
            core.trace = (core.trace ^ thread ^ (core.now.as_nanos() as u64) << 8)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(23);
            core.running = Some(thread);
            let Some(task) = core.tasks.get_mut(&thread) else { return Step::Nothing };
            task.waits = Waits::default();
            Arc::clone(&task.seat)
        };
        seat.give_turn();
        let begun = Instant::now();
        while self.core.lock().running.is_some() {
            std::thread::park_timeout(STUCK);
            assert!(begun.elapsed() < STUCK, "a thread waits behind the scheduler's back");
        }
        Step::Ran
    }

    /// Ends every thread of a node where it stands.
    pub fn kill(&self, node: &Node) {
        node.dead.store(true, Ordering::Release);
        self.freeze(node.number, false);
        let begun = Instant::now();
        loop {
            let core = self.core.lock();
            let left: Vec<_> = core.tasks.values().filter(|task| task.node == node.number).collect();
            if left.is_empty() {
                return;
            }
            left.iter().for_each(|task| task.seat.give_turn());
            drop(core);
            std::thread::park_timeout(Duration::from_millis(1));
            assert!(begun.elapsed() < STUCK, "a thread of a node that was killed does not end");
        }
    }
}

impl Core {
    /// A thread that can go on now, or when the clock has moved on.
    fn choose(&mut self, until: Duration) -> Option<u64> {
        loop {
            self.net.deliver(self.now);
            let ready = self.ready();
            if !ready.is_empty() {
                return Some(ready[self.random.below(ready.len() as u64) as usize]);
            }
            let deadlines =
                self.tasks.values().filter(|t| !self.frozen.contains(&t.node)).map(|t| t.waits.until);
            let next = deadlines.chain(self.net.next_delivery()).min().unwrap_or(Duration::MAX).max(self.now);
            if next > until {
                self.now = self.now.max(until);
                return None;
            }
            self.now = next;
        }
    }

    fn ready(&self) -> Vec<u64> {
        let (mut ready, mut asked, mut polled) = (Vec::new(), Vec::new(), Vec::new());
        for (thread, task) in self.tasks.iter().filter(|(_, task)| !self.frozen.contains(&task.node)) {
            if task.waits.until <= self.now {
                ready.push(*thread);
                continue;
            }
            for (fd, flags) in &task.waits.on {
                asked.push(*thread);
                polled.push(PollFd::new(fd, *flags));
            }
        }
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !polled.is_empty() && rustix::event::poll(&mut polled, Some(&at_once)).expect("polled") > 0 {
            let is_ready = asked.iter().zip(&polled).filter(|(_, fd)| !fd.revents().is_empty());
            ready.extend(is_ready.map(|(thread, _)| *thread));
            ready.sort_unstable();
            ready.dedup();
        }
        ready
    }
}

impl Node {
    pub fn number(&self) -> NodeNumber {
        self.number
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Starts a thread of this node.
    pub fn spawn(self: &Arc<Self>, name: &str, body: impl FnOnce() + Send + 'static) {
        let thread = libsg::host::thread::Builder::new().name(name.into());
        enter(self.clone(), || thread.spawn(body)).expect("a thread");
    }

    /// Whether a thread that was killed is to return at once; unwinds it where it does not yet.
    fn returns_at_once(&self) -> bool {
        if self.is_dead() && !std::thread::panicking() {
            std::panic::resume_unwind(Box::new(Killed));
        }
        self.is_dead()
    }

    fn task(&self) -> (u64, Arc<Seat>) {
        TASK.with_borrow(Clone::clone).expect("a thread of the simulation")
    }

    /// Gives the turn back, and waits for the next one.
    fn rest(&self, waits: Waits) {
        let (thread, seat) = self.task();
        {
            let core = &mut *self.host.core.lock();
            core.net.collect(self.number, core.now);
            if let Some(task) = core.tasks.get_mut(&thread) {
                task.waits = waits;
            }
            core.running = None;
        }
        self.host.main.unpark();
        seat.wait_for_turn();
    }

    fn wait_for(&self, on: Vec<(OwnedFd, PollFlags)>, key: Option<usize>, timeout: Duration) {
        if self.returns_at_once() {
            std::thread::yield_now();
            return;
        }
        let until = self.host.now() + timeout;
        self.rest(Waits { on, key, until });
        self.returns_at_once();
    }
}

impl World for Node {
    fn now(&self) -> Instant {
        self.returns_at_once();
        self.host.started + self.host.now()
    }

    fn wait(&self, on: &[(BorrowedFd<'_>, bool, bool)], key: Option<usize>, timeout: Duration) {
        let own = |(fd, read, write): &(BorrowedFd<'_>, bool, bool)| {
            let flags = if *read { PollFlags::IN } else { PollFlags::empty() };
            let flags = if *write { flags | PollFlags::OUT } else { flags };
            (fd.try_clone_to_owned().expect("a descriptor"), flags)
        };
        self.wait_for(on.iter().map(own).collect(), key, timeout);
    }

    fn notify(&self, key: usize) {
        let core = &mut *self.host.core.lock();
        let now = core.now;
        let waits = core.tasks.values_mut().map(|task| &mut task.waits);
        waits.filter(|waits| waits.key == Some(key)).for_each(|waits| waits.until = now);
    }

    fn thread_starts(&self) -> u64 {
        self.returns_at_once();
        let core = &mut *self.host.core.lock();
        core.next_thread += 1;
        let waits = Waits { until: core.now, ..Waits::default() };
        core.tasks.insert(core.next_thread, Task { node: self.number, seat: Arc::default(), waits });
        core.next_thread
    }

    fn thread_runs(&self, thread: u64) {
        let seat = Arc::clone(&self.host.core.lock().tasks[&thread].seat);
        *seat.thread.lock() = Some(std::thread::current());
        TASK.set(Some((thread, Arc::clone(&seat))));
        seat.wait_for_turn();
        self.returns_at_once();
    }

    fn thread_ends(&self, thread: u64) {
        {
            let core = &mut *self.host.core.lock();
            core.net.collect(self.number, core.now);
            core.tasks.remove(&thread);
            if core.running == Some(thread) {
                core.running = None;
            }
        }
        self.notify(KEY_OF_THREADS | thread as usize);
        self.host.main.unpark();
    }

    fn has_ended(&self, thread: u64) -> bool {
        !self.host.core.lock().tasks.contains_key(&thread)
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        let random = &mut self.host.core.lock().random;
        bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
    }

    fn connect(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        let round_trip = self.host.with_net(|net, _| net.way(self.number, address));
        let Some(round_trip) = round_trip.filter(|time| *time < timeout) else {
            self.wait_for(Vec::new(), None, timeout);
            return Err(io::ErrorKind::TimedOut.into());
        };
        self.wait_for(Vec::new(), None, round_trip);
        self.host.with_net(|net, _| net.connect(self.number, address))
    }

    fn listen(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        let waker = self.host.with_net(|net, _| net.listen(self.number, address))?;
        waker.as_fd().try_clone_to_owned()
    }

    fn accept(&self, address: SocketAddr) -> io::Result<(TcpStream, SocketAddr)> {
        self.host.with_net(|net, _| net.accept(address))
    }

    fn has_bug(&self, bug: Bug) -> bool {
        self.host.bug == Some(bug)
    }
}
