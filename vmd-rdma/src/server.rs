//! The backend at an intermediary: a queue pair for each client, and a registration for each chunk that is open. It posts
//! nothing, but where it reads copies that lie at another.

mod reader;

use std::sync::Arc;

use libsg::Result;
use libsg::server::backend::{Attached, Backend, ChunkMemory, Domain, Opened, Reading, Rights};
use libsg::wire::access::Endpoint;

use crate::blob;
use crate::region::Registered;
use crate::verbs::{self, Access, Device, Limits, Patience, QueuePair, Remote};

/// Work requests of a queue pair here: as few as there may be.
const WORKS: usize = 1;

/// An intermediary's device, for [`libsg::server::Config::backend`].
#[derive(Debug)]
pub struct RdmaBackend {
    device: Arc<dyn Device>,
}

impl RdmaBackend {
    /// At this device.
    #[must_use]
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device }
    }
}

impl Backend for RdmaBackend {
    fn domain(&self) -> Result<Arc<dyn Domain>> {
        Ok(Arc::new(Circle { domain: self.device.domain()?, limits: self.device.limits() }))
    }
}

#[derive(Debug)]
struct Circle {
    domain: Arc<dyn verbs::Domain>,
    limits: Limits,
}

impl Domain for Circle {
    fn attach(&self, peer: &Endpoint) -> Result<Attached> {
        let peer = blob::endpoint(peer)?;
        let mut pair = Arc::clone(&self.domain).queue_pair(WORKS)?;
        pair.connect(&peer, Patience::default())?;
        let endpoint = blob::of_endpoint(&pair.endpoint())?;
        Ok(Attached { endpoint, guard: Box::new(Way(pair)) })
    }

    fn open(&self, memory: ChunkMemory, rights: Rights) -> Result<Opened> {
        let access = match rights {
            Rights::Write => Access { local_write: true, remote_write: true, remote_read: false },
            Rights::Read => Access { remote_read: true, ..Access::default() },
            Rights::Fill => Access { local_write: true, ..Access::default() },
        };
        let registered = Registered::new(&self.domain, memory, access)?;
        let key = match rights {
            Rights::Write | Rights::Read => registered.remote_key(),
            Rights::Fill => registered.local_key(),
        };
        let key = blob::of_remote(Remote { address: registered.start(), key })?;
        Ok(Opened { key, guard: Box::new(registered) })
    }

    fn reader(&self) -> Result<Reading> {
        reader::reading(&self.domain, self.limits)
    }
}

/// A client's queue pair. Dropped, it takes nothing more, and is gone.
#[derive(Debug)]
struct Way(Box<dyn QueuePair>);

impl Drop for Way {
    fn drop(&mut self) {
        self.0.fail();
    }
}
