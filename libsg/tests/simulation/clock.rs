//! The simulated host: a clock, and a scheduler that lets one thread run at a time.
//!
//! libsg's threads are real ones, and everything in them is the product's code; but each runs only when the
//! scheduler gives it the turn, until it waits. Which of those that could go on does is drawn by seed. The clock
//! moves only when nobody can go on.
//!
//! Who gives its turn back passes it on itself: it looks at everything on behalf of the director, and wakes the next
//! one. The main thread has its own turn only when something is to happen to hosts.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libsg::host::simulation::{Bug, KEY_OF_THREADS, World, enter, outside};
use libsg::server::backend::Backend;
use libsg::vmd::{Connector, TcpConnector};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::net::{Net, NodeNumber};
use crate::random::Random;
use crate::scenario::secret;

/// Time that one turn of a thread takes.
const TURN: Duration = Duration::from_micros(2);

/// A thread that holds its turn for so long, in real time, waits for something behind the scheduler's back.
const STUCK: Duration = Duration::from_secs(20);

/// What happens to hosts, and what must hold meanwhile.
pub trait Director: Send + 'static {
    /// Lets happen what is due now; until when threads may have their turns.
    fn happen(&mut self) -> Duration;

    /// Looks at everything after a step.
    fn look(&mut self, step: Step) -> Next;
}

/// How it goes on after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// With turns of threads, until then.
    Turns(Duration),
    /// Something is due.
    Happens,
    Over,
}

type Look = dyn Fn(Step) -> Next + Send + Sync;

/// All nodes, their threads, their clock and their network.
pub struct Host {
    started: Instant,
    main: std::thread::Thread,
    core: Mutex<Core>,
    look: Mutex<Option<Arc<Look>>>,
    bug: Option<Bug>,
}

struct Core {
    now: Duration,
    turns: u64,
    trace: u64,
    next_thread: u64,
    /// By their numbers.
    tasks: Vec<Task>,
    running: Option<u64>,
    /// Why nobody runs: it is the main thread's turn.
    halted: Option<Halt>,
    frozen: Vec<NodeNumber>,
    net: Net,
    random: Random,
    /// Room for what is asked in each step.
    ready: Vec<usize>,
    polled: Vec<PollFd<'static>>,
}

#[derive(Clone, Copy)]
enum Halt {
    /// After a turn.
    Next(Next),
    /// Nobody can go on in time.
    Nothing,
}

struct Task {
    thread: u64,
    node: NodeNumber,
    seat: Arc<Seat>,
    waits: Waits,
}

/// What a thread waits for.
#[derive(Default)]
struct Waits {
    on: Vec<Lent>,
    /// Which of these were ready when they were looked at.
    ready: u64,
    key: Option<usize>,
    until: Duration,
}

/// A descriptor that a thread waits for, lent by that thread.
type Lent = (BorrowedFd<'static>, PollFlags);

fn lend((fd, read, write): &(BorrowedFd<'_>, bool, bool)) -> Lent {
    let flags = if *read { PollFlags::IN } else { PollFlags::empty() };
    let flags = if *write { flags | PollFlags::OUT } else { flags };
    // SAFETY: only a thread that waits lends, and it has borrowed the descriptor for as long as it does. What is
    // lent is forgotten, under the lock under which it is used, before that thread goes on (`Core::next`) or is
    // unwound (`Host::kill`).
    #[expect(unsafe_code)]
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    (fd, flags)
}

/// Where a thread waits for its turn.
#[derive(Default)]
struct Seat {
    turn: AtomicBool,
    /// Which of the descriptors that it waited for are ready.
    found: AtomicU64,
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
            tasks: Vec::new(),
            running: None,
            halted: None,
            frozen: Vec::new(),
            net,
            random: Random::new(seed).fork(1),
            ready: Vec::new(),
            polled: Vec::new(),
        };
        let (started, main) = (Instant::now(), std::thread::current());
        Arc::new(Self { started, main, core: Mutex::new(core), look: Mutex::default(), bug })
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

    /// Runs to the end, as the director says.
    pub fn run<D: Director>(&self, director: D) -> D {
        let director = Arc::new(Mutex::new(director));
        let looks = Arc::clone(&director);
        *self.look.lock() = Some(Arc::new(move |step| looks.lock().look(step)));
        loop {
            let until = director.lock().happen();
            let next = match self.go(until) {
                Halt::Next(next) => next,
                Halt::Nothing => director.lock().look(Step::Nothing),
            };
            if next == Next::Over {
                break;
            }
        }
        *self.look.lock() = None;
        Arc::into_inner(director).expect("nobody looks any more").into_inner()
    }

    /// Lets threads have their turns.
    fn go(&self, until: Duration) -> Halt {
        let seat = {
            let core = &mut *self.core.lock();
            // Whatever has happened may have stirred any of them.
            core.net.stirred.extend(core.tasks.iter().map(|task| task.node));
            core.next(until)
        };
        let Some((_, seat)) = seat else { return Halt::Nothing };
        seat.give_turn();
        let (mut begun, mut turns) = (Instant::now(), self.turns());
        loop {
            if let Some(halt) = self.core.lock().halted.take() {
                return halt;
            }
            std::thread::park_timeout(STUCK);
            if begun.elapsed() >= STUCK {
                let before = std::mem::replace(&mut turns, self.turns());
                assert!(before != turns, "a thread waits behind the scheduler's back");
                begun = Instant::now();
            }
        }
    }

    /// Passes the turn on, which nobody has now; true where the next one is the thread of this number, which calls.
    fn pass_on(&self, own: Option<u64>) -> bool {
        let look = self.look.lock().clone();
        let next = outside(|| look.map_or(Next::Over, |look| look(Step::Ran)));
        let mut core = self.core.lock();
        let halt = match next {
            Next::Turns(until) => match core.next(until) {
                Some((thread, _)) if own == Some(thread) => return true,
                Some((_, seat)) => {
                    drop(core);
                    seat.give_turn();
                    return false;
                }
                None => Halt::Nothing,
            },
            next => Halt::Next(next),
        };
        core.halted = Some(halt);
        drop(core);
        self.main.unpark();
        false
    }

    /// Ends every thread of a node where it stands.
    pub fn kill(&self, node: &Node) {
        node.dead.store(true, Ordering::Release);
        self.freeze(node.number, false);
        let begun = Instant::now();
        loop {
            let mut core = self.core.lock();
            let mut left = core.tasks.iter_mut().filter(|task| task.node == node.number).peekable();
            if left.peek().is_none() {
                return;
            }
            left.for_each(|task| {
                task.waits = Waits::default();
                task.seat.give_turn();
            });
            drop(core);
            std::thread::park_timeout(Duration::from_millis(1));
            assert!(begun.elapsed() < STUCK, "a thread of a node that was killed does not end");
        }
    }
}

impl Core {
    fn task(&mut self, thread: u64) -> Option<&mut Task> {
        let at = self.tasks.binary_search_by_key(&thread, |task| task.thread).ok()?;
        self.tasks.get_mut(at)
    }

    /// Who has the next turn; moves the clock, but not past `until`, when nobody can go on now.
    fn next(&mut self, until: Duration) -> Option<(u64, Arc<Seat>)> {
        let at = self.choose(until)?;
        self.turns += 1;
        self.now += TURN;
        let Task { thread, seat, waits, .. } = &mut self.tasks[at];
        seat.found.store(std::mem::take(waits).ready, Ordering::Release);
        self.trace = (self.trace ^ *thread ^ (self.now.as_nanos() as u64) << 8)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23);
        self.running = Some(*thread);
        Some((*thread, Arc::clone(seat)))
    }

    /// Which of the tasks can go on now, or when the clock has moved on.
    fn choose(&mut self, until: Duration) -> Option<usize> {
        loop {
            self.net.deliver(self.now);
            self.look_at_stirred();
            let mut next = Duration::MAX;
            self.ready.clear();
            for (at, Task { node, waits, .. }) in self.tasks.iter().enumerate() {
                let is_frozen = self.frozen.contains(node);
                if !is_frozen && (waits.ready > 0 || waits.until <= self.now) {
                    self.ready.push(at);
                } else if !is_frozen {
                    next = next.min(waits.until);
                }
            }
            if !self.ready.is_empty() {
                return Some(self.ready[self.random.below(self.ready.len() as u64) as usize]);
            }
            next = next.min(self.net.next_delivery().unwrap_or(Duration::MAX)).max(self.now);
            if next > until {
                self.now = self.now.max(until);
                return None;
            }
            self.now = next;
        }
    }

    /// Looks which descriptors are ready now, one question for all that may have changed.
    fn look_at_stirred(&mut self) {
        let Self { tasks, net, polled, .. } = self;
        if net.stirred.is_empty() {
            return;
        }
        let is_stirred = |task: &Task| net.stirred.contains(&task.node);
        polled.clear();
        for task in tasks.iter().filter(|task| is_stirred(task)) {
            let fds = task.waits.on.iter();
            polled.extend(fds.map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
        }
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !polled.is_empty() {
            rustix::event::poll(polled, Some(&at_once)).expect("polled");
        }
        let mut answers = polled.iter().map(|fd| u64::from(!fd.revents().is_empty()));
        for Waits { on, ready, .. } in
            tasks.iter_mut().filter(|task| is_stirred(task)).map(|task| &mut task.waits)
        {
            *ready = (0..on.len()).zip(answers.by_ref()).map(|(nth, is_ready)| is_ready << nth).sum();
        }
        polled.clear();
        net.stirred.clear();
    }

    /// A thread gives its turn back: what its node has sent, and told its other threads, is looked for.
    fn rests(&mut self, node: NodeNumber) {
        self.net.collect(node, self.now);
        self.net.stirred.push(node);
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

    /// What makes this node's links to intermediaries.
    pub fn connector(&self) -> Arc<dyn Connector> {
        let beside = self.host.with_net(|net, _| net.side()?.connector(self.number));
        beside.unwrap_or_else(|| Arc::new(TcpConnector::new(secret())))
    }

    /// What an intermediary here lets clients in by that move pages themselves.
    pub fn backend(&self) -> Option<Arc<dyn Backend>> {
        self.host.with_net(|net, _| net.side()?.backend(self.number))
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

    /// Gives the turn back, and waits for the next one; which of the descriptors are ready then.
    fn rest(&self, waits: Waits) -> u64 {
        let (thread, seat) = self.task();
        {
            let core = &mut *self.host.core.lock();
            if let Some(task) = core.task(thread) {
                task.waits = waits;
            }
            core.rests(self.number);
            core.running = None;
        }
        if !self.host.pass_on(Some(thread)) {
            seat.wait_for_turn();
        }
        seat.found.load(Ordering::Acquire)
    }

    /// Which of the descriptors are ready then.
    fn wait_for(&self, on: Vec<Lent>, key: Option<usize>, timeout: Duration) -> u64 {
        if self.returns_at_once() {
            std::thread::yield_now();
            return 0;
        }
        let until = self.host.now() + timeout;
        let found = self.rest(Waits { on, ready: 0, key, until });
        self.returns_at_once();
        found
    }
}

impl World for Node {
    fn now(&self) -> Instant {
        self.returns_at_once();
        self.host.started + self.host.now()
    }

    fn wait(&self, on: &[(BorrowedFd<'_>, bool, bool)], key: Option<usize>, timeout: Duration) -> u64 {
        self.wait_for(on.iter().map(lend).collect(), key, timeout)
    }

    fn notify(&self, key: usize) {
        let core = &mut *self.host.core.lock();
        let now = core.now;
        let waits = core.tasks.iter_mut().map(|task| &mut task.waits);
        waits.filter(|waits| waits.key == Some(key)).for_each(|waits| waits.until = now);
    }

    fn thread_starts(&self) -> u64 {
        self.returns_at_once();
        let core = &mut *self.host.core.lock();
        core.next_thread += 1;
        let waits = Waits { until: core.now, ..Waits::default() };
        let thread = core.next_thread;
        core.tasks.push(Task { thread, node: self.number, seat: Arc::default(), waits });
        thread
    }

    fn thread_runs(&self, thread: u64) {
        let seat =
            self.host.core.lock().task(thread).map(|task| Arc::clone(&task.seat)).expect("it was started");
        *seat.thread.lock() = Some(std::thread::current());
        TASK.set(Some((thread, Arc::clone(&seat))));
        seat.wait_for_turn();
        self.returns_at_once();
    }

    fn thread_ends(&self, thread: u64) {
        let had_turn = {
            let core = &mut *self.host.core.lock();
            core.tasks.retain(|task| task.thread != thread);
            core.rests(self.number);
            core.running.take_if(|running| *running == thread).is_some()
        };
        self.notify(KEY_OF_THREADS | thread as usize);
        if had_turn {
            self.host.pass_on(None);
        } else {
            self.host.main.unpark();
        }
    }

    fn has_ended(&self, thread: u64) -> bool {
        self.host.core.lock().task(thread).is_none()
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
