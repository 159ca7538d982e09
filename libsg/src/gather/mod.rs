//! Gather: how the destination comes by the pages of a VM that runs already.
//!
//! ```text
//!  source --- urgent: a page that was asked for -------------> fault thread <--- userfaultfd
//!         --- direct: pages as fast as credit lets them -----> direct thread        |
//!         --- announcements: "page N is at P" ---> tracker <------ all ------> install
//!  intermediary i --- urgent: a page the guest waits for ----> fault thread
//!                 --- the rest, in the background -----------> prepage thread iN
//!  index servers --- what nobody announced ------------------> index thread
//! ```
//!
//! The [`Tracker`] is the one place that knows of every page; the threads around it move bytes.

mod books;
mod desk;
mod direct;
mod fault;
mod gets;
mod index;
mod install;
mod prepage;
mod shared;
mod tracker;
#[cfg(test)]
mod rounds_test;
#[cfg(test)]
mod tracker_test;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

pub(crate) use shared::{Setup, Shared};
pub use tracker::{Claim, Counts, Path, Read, Tracker, Wanted, Word};

use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, thread::JoinHandle};
use crate::ids::MemberIndex;
use crate::wire::message::Member;

/// The threads that gather one volume.
pub(crate) struct Gather {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Gather {
    /// Starts them: from now on faults are answered.
    pub fn start(setup: Setup) -> Result<Self> {
        let members = setup.members.len();
        let gather = Self { shared: Arc::new(Shared::new(setup)?), threads: Mutex::new(Vec::new()) };
        gather.spawn("sg-gather-fault".into(), |shared| fault::run(shared))?;
        gather.spawn("sg-gather-direct".into(), |shared| direct::run(shared))?;
        gather.spawn("sg-gather-index".into(), |shared| index::run(shared))?;
        for member in 0..members {
            gather.start_member(MemberIndex(member as u16))?;
        }
        Ok(gather)
    }

    fn spawn(
        &self,
        name: String,
        body: impl FnOnce(&Arc<Shared>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let thread = spawn(&self.shared, name, body)?;
        self.threads.lock().push(thread);
        Ok(())
    }

    fn start_member(&self, member: MemberIndex) -> Result<()> {
        self.spawn(format!("sg-gather-{member}"), move |shared| prepage::run(shared, member))
    }

    /// What the threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The volume gained members.
    pub fn set_members(&self, members: &[Member]) -> Result<()> {
        for member in self.shared.add_members(members)? {
            self.start_member(member)?;
        }
        Ok(())
    }

    /// Ends every thread and waits for it.
    pub fn stop(&self) {
        self.shared.stop();
        for thread in self.threads.lock().drain(..) {
            // Its panic was caught and is the gather's failure.
            let _ = thread.join();
        }
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts a worker whose failure, or panic, is the failure of the whole gather.
fn spawn(
    shared: &Arc<Shared>,
    name: String,
    body: impl FnOnce(&Arc<Shared>) -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let thread = name.clone();
    let run = move || {
        // What a worker that panicked leaves behind is never looked at again: everything stops.
        match catch_unwind(AssertUnwindSafe(|| body(&shared))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => shared.fail(error),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                let message = format!("thread {thread} panicked: {text}");
                shared.fail(Error::new(ErrorKind::Poisoned, message));
            }
        }
    };
    Ok(host::thread::Builder::new().name(name).spawn(run)?)
}
