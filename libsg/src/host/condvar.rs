//! A condition variable over `parking_lot`'s, with the methods of it that libsg uses.

use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

/// Waits, under a lock, to be told that something changed.
#[derive(Debug, Default)]
pub struct Condvar(parking_lot::Condvar);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    timed_out: bool,
}

impl Waited {
    /// Whether time was over.
    #[must_use]
    pub const fn timed_out(self) -> bool {
        self.timed_out
    }
}

impl Condvar {
    /// One that nobody waits for.
    #[must_use]
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    /// Lets the lock go, and waits to be told, or for `timeout`. May return for no reason.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, timeout: Duration) -> Waited {
        #[cfg(feature = "simulation")]
        if let Some(world) = super::simulation::world() {
            let until = world.now() + timeout;
            MutexGuard::unlocked(guard, || world.wait(&[], Some(self.key()), timeout));
            return Waited { timed_out: world.now() >= until };
        }
        Waited { timed_out: self.0.wait_for(guard, timeout).timed_out() }
    }

    /// The same, until a moment.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant) -> Waited {
        self.wait_for(guard, deadline.saturating_duration_since(super::now()))
    }

    /// Tells one who waits.
    pub fn notify_one(&self) {
        #[cfg(feature = "simulation")]
        self.notify_world();
        self.0.notify_one();
    }

    /// Tells all who wait.
    pub fn notify_all(&self) {
        #[cfg(feature = "simulation")]
        self.notify_world();
        self.0.notify_all();
    }

    #[cfg(feature = "simulation")]
    fn notify_world(&self) {
        if let Some(world) = super::simulation::world() {
            world.notify(self.key());
        }
    }

    #[cfg(feature = "simulation")]
    fn key(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}
