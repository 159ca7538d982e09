//! What the operator allows in one direction, and how connections share it: each waits for its turn.

mod line;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub(super) use self::line::Class;
use self::line::Line;
use crate::host::{self, Condvar};

/// Who waits looks so often whether it is its turn, if nobody says so.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// So many bytes a second, over all connections of the server.
#[derive(Debug)]
pub(super) struct Limit(Mutex<State>);

#[derive(Debug)]
struct State {
    line: Line,
    /// By the connections' numbers.
    wakes: BTreeMap<u64, Arc<Condvar>>,
}

impl State {
    /// Gives out what there is, and wakes who has it, but for the one who asks.
    fn serve(&mut self, asks: Option<u64>) {
        let Self { line, wakes } = self;
        line.serve(host::now(), |number| {
            if let Some(wake) = wakes.get(&number).filter(|_| Some(number) != asks) {
                wake.notify_one();
            }
        });
    }
}

impl Limit {
    /// So many bytes a second; zero is unlimited.
    pub(super) fn new(bytes_per_s: u64) -> Self {
        Self(Mutex::new(State { line: Line::new(host::now(), rate(bytes_per_s)), wakes: BTreeMap::new() }))
    }

    /// From now on so many bytes a second; zero is unlimited, and then nobody waits any more.
    pub(super) fn set(&self, bytes_per_s: u64) {
        let mut state = self.0.lock();
        state.line.set_rate(host::now(), rate(bytes_per_s));
        state.serve(None);
    }

    /// The bytes that moved so far, over all connections.
    pub(super) fn moved(&self) -> u64 {
        self.0.lock().line.moved()
    }
}

fn rate(bytes_per_s: u64) -> Option<u64> {
    (bytes_per_s > 0).then_some(bytes_per_s)
}

/// A connection's turns. Dropped, it is in nobody's way.
#[derive(Debug)]
pub(super) struct Turn<'l> {
    limit: &'l Limit,
    number: u64,
    wake: Arc<Condvar>,
}

impl<'l> Turn<'l> {
    pub(super) fn new(limit: &'l Limit) -> Self {
        let wake = Arc::new(Condvar::new());
        let mut state = limit.0.lock();
        let number = state.line.join();
        state.wakes.insert(number, Arc::clone(&wake));
        drop(state);
        Self { limit, number, wake }
    }

    /// What the operator allows, in bytes/s.
    pub(super) fn rate(&self) -> Option<u64> {
        self.limit.0.lock().line.rate()
    }

    /// Waits until some of `bytes`, which are not none, may move, and says how many.
    pub(super) fn wait(&self, class: Class, bytes: usize) -> usize {
        let mut state = self.limit.0.lock();
        if state.line.passes(bytes as u64) {
            return bytes;
        }
        state.line.ask(self.number, class, bytes as u64);
        loop {
            state.serve(Some(self.number));
            if let Some(granted) = state.line.take(self.number) {
                return granted as usize;
            }
            let wait = state.line.wait(self.number, host::now()).min(LOOK_EVERY);
            self.wake.wait_for(&mut state, wait);
        }
    }

    /// How many of `bytes` bulk bytes may move now: none is for later, and then it has its place in the line. Asked
    /// again, it wants the same bytes.
    pub(super) fn poll(&self, bytes: usize) -> usize {
        let mut state = self.limit.0.lock();
        if state.line.passes(bytes as u64) {
            return bytes;
        }
        state.line.ask(self.number, Class::Bulk, bytes as u64);
        state.serve(Some(self.number));
        state.line.take(self.number).map_or(0, |granted| granted as usize)
    }

    /// So many of the bytes that may move did not.
    pub(super) fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            self.limit.0.lock().line.give_back(self.number, bytes as u64);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.limit.0.lock();
        state.line.leave(self.number);
        state.wakes.remove(&self.number);
        state.serve(None);
    }
}
