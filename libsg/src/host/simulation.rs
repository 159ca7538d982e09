//! A world that stands for the host of some threads: a simulated clock, scheduler and network.
//!
//! A thread belongs to the world of the thread that started it; [`enter`] makes the first ones. The world lets
//! one thread run at a time: each runs until it waits, and goes on when the world says so.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What libsg's threads ask instead of their host.
///
/// A world that ends a thread (its node was killed) unwinds it out of any of these calls; called by a thread that
/// unwinds already, each returns at once.
pub trait World: Send + Sync {
    /// The time.
    fn now(&self) -> Instant;

    /// Waits until a descriptor is ready (readable where the first flag says so, writable where the second
    /// does), the key is notified, or the time is over. Bit n of the answer says that the n-th descriptor is ready.
    fn wait(&self, on: &[(BorrowedFd<'_>, bool, bool)], key: Option<usize>, timeout: Duration) -> u64;

    /// Ends the waits for a key.
    fn notify(&self, key: usize);

    /// A thread will be started; gives its number.
    fn thread_starts(&self) -> u64;

    /// Called by that thread first: waits until it may run.
    fn thread_runs(&self, thread: u64);

    /// Called by that thread last, also when it panicked.
    fn thread_ends(&self, thread: u64);

    /// Whether that thread has ended.
    fn has_ended(&self, thread: u64) -> bool;

    /// Random bytes.
    fn fill_random(&self, bytes: &mut [u8]);

    /// Opens a connection.
    ///
    /// # Errors
    /// As the kernel's: nobody listens, or time is over.
    fn connect(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream>;

    /// Listens. The descriptor is readable while somebody waits to be accepted.
    ///
    /// # Errors
    /// Somebody listens there.
    fn listen(&self, address: SocketAddr) -> io::Result<OwnedFd>;

    /// The next connection that came to the address.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is none.
    fn accept(&self, address: SocketAddr) -> io::Result<(TcpStream, SocketAddr)>;

    /// Whether a bug is to be there, for a test that sees whether it is found.
    fn has_bug(&self, bug: Bug) -> bool;
}

/// Bugs that can be switched on in a simulated world, one for each thing that the simulation must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize)]
pub enum Bug {
    /// A page counts as safe before its index entry is acknowledged.
    IndexNotAwaited,
    /// An index server acknowledges entries that it does not keep.
    IndexNotKept,
    /// The source says "evicted" when nearly every page is safe.
    EvictedEarly,
    /// The destination does not compare checksums.
    ChecksumIgnored,
    /// Whoever claims a page second installs it too.
    InstalledTwice,
    /// Which pages are absent is looked at while the guest still writes.
    StockBeforePause,
    /// A destination that was ready runs the VM when its source is away.
    RunsWithoutCommit,
    /// A source that lost the destination after COMMIT runs the VM again.
    ResumesAfterCommit,
    /// Background reads do not leave the port to the direct path.
    DirectLast,
    /// Faults are not asked for.
    FaultsWait,
    /// What lay at an intermediary that died is not sent again.
    DeathForgotten,
    /// The guest is not told that a page is lost.
    LossNotTold,
    /// Batches that are late are given to nobody else.
    LateNotHedged,
    /// What was on its way to a destination that was lost is not sent again.
    FlightForgotten,
    /// Before the VM runs, whatever came first is not replaced by a newer round.
    OlderRoundWins,
    /// What was installed before the switch and is out of date there stays.
    StaleKept,
    /// The final set names no page.
    FinalSetUnnamed,
    /// What was written since the log was last collected is collected behind the pause, and not sent.
    WriteMissed,
    /// What a page was while its round sent it counts, and a write to it meanwhile does not.
    TornKept,
    /// An intermediary that stored the beginning of an install unit is said to have stored all of it.
    UnitHalfStored,
    /// What lies at a member that was added counts before anybody who outlives the source knows of it.
    MemberUnknown,
    /// Who came in the place of one that died gets no copies of what was stored before.
    JoinedInVain,
    /// An intermediary answers for one volume with the index and the pages of another.
    VolumesMixed,
    /// The first holder of pages says that the others have copies, and sends them none.
    CopyNotAwaited,
    /// A page that was stored by reference counts though others have no copies of it.
    ReferenceAlone,
    /// An intermediary takes more memory than it may.
    LimitIgnored,
    /// Whoever does not know the pool secret is let in.
    SecretIgnored,
    /// COMMIT is given, and the volume parked, before every page is safe.
    ParkedUnsafe,
    /// Every claim of a parked volume is granted.
    ClaimedTwice,
    /// Whoever claimed a parked volume runs the VM without having that written down.
    RunsUnasked,
    /// An intermediary leaves before what it hands over is acknowledged.
    LeavesEarly,
    /// A VM that was paused for a handover that failed stays so.
    LeftPaused,
    /// A writer whose epoch was replaced is let in.
    EpochIgnored,
    /// What a dead writer has under way enters an index, behind what another put since.
    FenceIgnored,
    /// An index takes an older round for a newer one.
    OlderRoundIndexed,
    /// A slot is given out again under the generation that it had.
    GenerationKept,
    /// Copies that went with an intermediary that died are said to be made again, and are not.
    MendsNothing,
    /// A client that moves pages itself keeps its way in when its slots are given to others.
    WayLeftOpen,
    /// What such a client writes counts before it is there.
    SettledEarly,
}

thread_local! {
    static WORLD: RefCell<Option<Arc<dyn World>>> = const { RefCell::new(None) };
}

/// The calling thread's world; `None` on the real host.
pub(super) fn world() -> Option<Arc<dyn World>> {
    WORLD.with_borrow(Clone::clone)
}

/// Whether the calling thread's world has a bug.
#[must_use]
pub fn has_bug(bug: Bug) -> bool {
    world().is_some_and(|world| world.has_bug(bug))
}

/// Runs `body` in a world.
pub fn enter<T>(world: Arc<dyn World>, body: impl FnOnce() -> T) -> T {
    move_to(Some(world), body)
}

/// Runs `body` out of the calling thread's world, as any other thread of the host would.
pub fn outside<T>(body: impl FnOnce() -> T) -> T {
    move_to(None, body)
}

fn move_to<T>(world: Option<Arc<dyn World>>, body: impl FnOnce() -> T) -> T {
    struct Leaves(Option<Arc<dyn World>>);
    impl Drop for Leaves {
        fn drop(&mut self) {
            WORLD.set(self.0.take());
        }
    }
    let _leaves = Leaves(WORLD.replace(world));
    body()
}

/// A thread's place in its world.
#[derive(Clone)]
pub(super) struct Seat {
    world: Arc<dyn World>,
    thread: u64,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "simulated thread {}", self.thread)
    }
}

impl Seat {
    pub(super) fn of(world: Arc<dyn World>) -> Self {
        let thread = world.thread_starts();
        Self { world, thread }
    }

    /// The body of the thread.
    pub(super) fn run<T>(self, body: impl FnOnce() -> T) -> T {
        struct Ends(Seat);
        impl Drop for Ends {
            fn drop(&mut self) {
                self.0.world.thread_ends(self.0.thread);
            }
        }
        let ends = Ends(self);
        let world = Arc::clone(&ends.0.world);
        world.thread_runs(ends.0.thread);
        enter(world, body)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.world.has_ended(self.thread)
    }

    pub(super) fn wait_for_end(&self) {
        while !self.has_ended() {
            self.world.wait(&[], Some(KEY_OF_THREADS | self.thread as usize), Duration::from_secs(3600));
        }
    }
}

/// Keys of threads that end; those of condition variables are addresses, which have not this bit.
pub const KEY_OF_THREADS: usize = 1 << (usize::BITS - 1);
