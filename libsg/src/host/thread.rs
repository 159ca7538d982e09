//! Threads, as `std::thread` has them: a thread that is started in a simulated world belongs to it.

use std::io;
use std::time::Duration;

#[cfg(feature = "simulation")]
use super::simulation;
use super::spent::Counted;

/// Starts a thread, with a name.
#[derive(Debug)]
pub struct Builder(std::thread::Builder);

/// A thread that was started.
#[derive(Debug)]
pub struct JoinHandle<T> {
    thread: std::thread::JoinHandle<T>,
    #[cfg(feature = "simulation")]
    seat: Option<simulation::Seat>,
}

/// A thread that was started in a scope.
#[derive(Debug)]
pub struct ScopedJoinHandle<'scope, T> {
    thread: std::thread::ScopedJoinHandle<'scope, T>,
    #[cfg(feature = "simulation")]
    seat: Option<simulation::Seat>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// One without a name.
    #[must_use]
    pub fn new() -> Self {
        Self(std::thread::Builder::new())
    }

    /// Names the thread.
    #[must_use]
    pub fn name(self, name: String) -> Self {
        Self(self.0.name(name))
    }

    /// Sets the size of its stack.
    #[must_use]
    pub fn stack_size(self, bytes: usize) -> Self {
        Self(self.0.stack_size(bytes))
    }

    /// Starts it.
    ///
    /// # Errors
    /// The host has no room for a thread.
    pub fn spawn<T: Send + 'static>(
        self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let body = counted(body);
        #[cfg(feature = "simulation")]
        if let Some(world) = simulation::world() {
            let seat = simulation::Seat::of(world);
            let taken = seat.clone();
            let thread = self.0.spawn(move || taken.run(body))?;
            return Ok(JoinHandle { thread, seat: Some(seat) });
        }
        let thread = self.0.spawn(body)?;
        Ok(JoinHandle {
            thread,
            #[cfg(feature = "simulation")]
            seat: None,
        })
    }

    /// Starts it in a scope.
    ///
    /// # Errors
    /// The host has no room for a thread.
    pub fn spawn_scoped<'scope, T: Send + 'scope>(
        self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        body: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        let body = counted(body);
        #[cfg(feature = "simulation")]
        if let Some(world) = simulation::world() {
            let seat = simulation::Seat::of(world);
            let taken = seat.clone();
            let thread = self.0.spawn_scoped(scope, move || taken.run(body))?;
            return Ok(ScopedJoinHandle { thread, seat: Some(seat) });
        }
        let thread = self.0.spawn_scoped(scope, body)?;
        Ok(ScopedJoinHandle {
            thread,
            #[cfg(feature = "simulation")]
            seat: None,
        })
    }
}

/// Its processor time is libsg's.
fn counted<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    move || {
        let _counted = Counted::begin();
        body()
    }
}

impl<T> JoinHandle<T> {
    /// Waits for its end.
    ///
    /// # Errors
    /// What it panicked with.
    pub fn join(self) -> std::thread::Result<T> {
        self.wait_for_end();
        self.thread.join()
    }

    /// In a simulated world, waits until the thread has ended: whoever waits for it by other means of the host
    /// would keep it from running.
    pub fn wait_for_end(&self) {
        #[cfg(feature = "simulation")]
        self.seat.iter().for_each(simulation::Seat::wait_for_end);
    }
}

impl<T> ScopedJoinHandle<'_, T> {
    /// Waits for its end.
    ///
    /// # Errors
    /// What it panicked with.
    pub fn join(self) -> std::thread::Result<T> {
        #[cfg(feature = "simulation")]
        self.seat.iter().for_each(simulation::Seat::wait_for_end);
        self.thread.join()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        #[cfg(feature = "simulation")]
        if let Some(seat) = &self.seat {
            return seat.has_ended();
        }
        self.thread.is_finished()
    }
}

/// Sleeps.
pub fn sleep(time: Duration) {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        world.wait(&[], None, time);
        return;
    }
    std::thread::sleep(time);
}

/// Lets others run.
pub fn yield_now() {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulation::world() {
        world.wait(&[], None, Duration::ZERO);
        return;
    }
    std::thread::yield_now();
}
