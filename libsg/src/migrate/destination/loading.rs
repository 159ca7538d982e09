//! The VM while it loads its state: on a thread of its own, `sg-gather-load`, for it may touch memory that
//! has to come first, over connections that have to be made first.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam::channel::{Receiver, bounded};

use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::JoinHandle};
use crate::migrate::IncomingVm;
use crate::transport::Waker;

/// The VM, and how its loading went.
type Loaded = (Box<dyn IncomingVm>, Result<()>);

/// A VM that loads.
pub(super) struct Loading {
    result: Receiver<Loaded>,
    thread: JoinHandle<()>,
}

impl Loading {
    /// Starts it; `waker` is woken at the end.
    pub fn start(mut vm: Box<dyn IncomingVm>, state: Vec<u8>, waker: Waker) -> Result<Self> {
        let (sender, result) = bounded(1);
        let load = move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| vm.load(&state)))
                .unwrap_or_else(|panic| Err(panicked("sg-gather-load", &*panic)));
            // Nobody is there to take it only when the arrival has ended badly.
            let _ = sender.send((vm, loaded));
            waker.wake();
        };
        let thread = host::thread::Builder::new()
            .name("sg-gather-load".into())
            .spawn(load)
            .map_err(|cause| Error::new(ErrorKind::System, "a thread could not be started").because(cause))?;
        Ok(Self { result, thread })
    }

    /// The VM, once it is done.
    pub fn done(&self) -> Option<Loaded> {
        self.result.try_recv().ok()
    }

    /// Waits for the end.
    pub fn join(self) -> Option<Loaded> {
        self.thread.wait_for_end();
        let loaded = self.result.recv().ok();
        // Its panic was caught.
        let _ = self.thread.join();
        loaded
    }
}

/// The error that a panic is.
pub(super) fn panicked(thread: &str, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::new(ErrorKind::Poisoned, format!("thread {thread} panicked: {text}"))
}
