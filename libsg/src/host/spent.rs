//! The processor time that libsg's own threads have used: what a migration costs, apart from what else a VMM
//! does in its process.

use std::collections::BTreeSet;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::time::ClockId;

use crate::usage;

struct Books {
    /// Threads that run, by the kernel's number.
    live: BTreeSet<i32>,
    /// What those have used that have ended.
    ended: Duration,
}

static BOOKS: Mutex<Books> = Mutex::new(Books { live: BTreeSet::new(), ended: Duration::ZERO });

/// While it lives, the thread that made it is counted.
pub(super) struct Counted(i32);

impl Counted {
    pub(super) fn begin() -> Self {
        let thread = rustix::thread::gettid().as_raw_pid();
        BOOKS.lock().live.insert(thread);
        Self(thread)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let used = usage::used(ClockId::ThreadCPUTime);
        let mut books = BOOKS.lock();
        books.live.remove(&self.0);
        books.ended += used;
    }
}

/// User and system time of all threads that libsg ever started in this process; nothing in a simulated world, of which
/// there are others in the process.
pub(crate) fn spent() -> Duration {
    #[cfg(feature = "simulation")]
    if super::simulation::world().is_some() {
        return Duration::ZERO;
    }
    let books = BOOKS.lock();
    let living: Duration = books.live.iter().filter_map(|thread| usage::cpu_of_thread(*thread)).sum();
    books.ended + living
}
