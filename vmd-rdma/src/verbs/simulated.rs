//! Devices of one simulated network, all in this process, for tests: it checks what a device checks (keys, bounds,
//! rights, domains), and completes, delays and fails what it is asked by seed.
//!
//! Nothing here happens by itself: works go on when somebody reaps, some more or less of them as the seed has it, in the
//! order of their queue pair. So a seed is the same run again, whatever the clock does.
#![allow(unsafe_code)]

mod fabric;

use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use self::fabric::{Fabric, Memory, Posted};
use super::{Access, Device, Domain, Done, Endpoint, Limits, Patience, QueuePair, Region, Work};
use libsg::{Error, ErrorKind};

pub use self::fabric::Counts;

/// What every simulated device can do: little, so that tests meet the limits.
pub const LIMITS: Limits =
    Limits { works_max: 64, pieces_max: 8, message_bytes_max: 1 << 20, inline_bytes_max: 64, reads_max: 4 };

/// A network of simulated devices.
#[derive(Clone, Debug)]
pub struct Network(Arc<Mutex<Fabric>>);

impl Network {
    /// A network on which things happen as this seed has it.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Fabric::new(seed))))
    }

    /// A host's device. Its number is in its GID.
    #[must_use]
    pub fn device(&self, host: u16) -> Arc<dyn Device> {
        let gid = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host);
        Arc::new(SimulatedDevice { name: format!("sim{host}"), gid, network: self.clone() })
    }

    /// The host is gone, or nobody reaches it: works to it fail, and its own as well.
    pub fn cut_off(&self, host: u16) {
        self.0.lock().cut_off(host);
    }

    /// The host is reached again. Queue pairs that failed meanwhile stay in the error state.
    pub fn restore(&self, host: u16) {
        self.0.lock().restore(host);
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.lock().counts()
    }
}

#[derive(Debug)]
struct SimulatedDevice {
    name: String,
    gid: Ipv6Addr,
    network: Network,
}

impl Device for SimulatedDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn domain(&self) -> Result<Arc<dyn Domain>, Error> {
        let number = self.network.0.lock().number();
        Ok(Arc::new(SimulatedDomain { number, gid: self.gid, network: self.network.clone() }))
    }
}

#[derive(Debug)]
struct SimulatedDomain {
    number: u32,
    gid: Ipv6Addr,
    network: Network,
}

impl Domain for SimulatedDomain {
    unsafe fn register(
        self: Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Box<dyn Region>, Error> {
        if access.remote_write && !access.local_write {
            let what = "a region that peers write must be writable for its owner";
            return Err(Error::new(ErrorKind::Input, what));
        }
        // SAFETY: the caller says that it stays mapped until the region is dropped, which takes it from the fabric.
        let memory = unsafe { Memory::new(start, bytes) };
        let key = self.network.0.lock().register(self.number, memory, access);
        Ok(Box::new(SimulatedRegion { key, domain: self }))
    }

    fn queue_pair(self: Arc<Self>, works: usize) -> Result<Box<dyn QueuePair>, Error> {
        if works == 0 || works > LIMITS.works_max {
            let what = format!("a queue pair has 1 to {} work requests", LIMITS.works_max);
            return Err(Error::new(ErrorKind::Input, what));
        }
        let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let endpoint = self.network.0.lock().add_pair(self.number, self.gid);
        Ok(Box::new(SimulatedPair { endpoint, works, event, domain: self }))
    }
}

#[derive(Debug)]
struct SimulatedRegion {
    key: u32,
    domain: Arc<SimulatedDomain>,
}

impl Region for SimulatedRegion {
    fn local_key(&self) -> u32 {
        self.key
    }

    fn remote_key(&self) -> u32 {
        self.key
    }
}

impl Drop for SimulatedRegion {
    fn drop(&mut self) {
        self.domain.network.0.lock().withdraw(self.key);
    }
}

#[derive(Debug)]
struct SimulatedPair {
    endpoint: Endpoint,
    works: usize,
    /// Readable when armed with anything outstanding: whoever reaps then makes it happen.
    event: OwnedFd,
    domain: Arc<SimulatedDomain>,
}

impl SimulatedPair {
    fn fabric(&self) -> parking_lot::MutexGuard<'_, Fabric> {
        self.domain.network.0.lock()
    }
}

impl QueuePair for SimulatedPair {
    fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    fn connect(&mut self, peer: &Endpoint, _: Patience) -> Result<(), Error> {
        if peer.mtu_bytes != self.endpoint.mtu_bytes {
            let what = format!(
                "the peer's port has an MTU of {} bytes, ours one of {}: give both the same",
                peer.mtu_bytes, self.endpoint.mtu_bytes
            );
            return Err(Error::new(ErrorKind::Input, what));
        }
        self.fabric().connect(self.endpoint.number, peer)
    }

    fn post(&mut self, works: &[Work<'_>]) -> Result<usize, Error> {
        let mut fabric = self.fabric();
        let room = self.works.saturating_sub(fabric.outstanding(self.endpoint.number));
        let mut posted = 0;
        for work in works.iter().take(room) {
            let work = Posted::checked(work)?;
            fabric.post(self.endpoint.number, work)?;
            posted += 1;
        }
        Ok(posted)
    }

    fn reap(&mut self, most: usize, into: &mut Vec<Done>) -> Result<(), Error> {
        let before = into.len();
        self.fabric().reap(self.endpoint.number, most, into);
        if into.len() > before {
            // What it was armed for has come. As long as nothing has, it stays readable: nothing would ever happen else.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<(), Error> {
        if self.fabric().outstanding(self.endpoint.number) > 0 {
            rustix::io::write(&self.event, &1u64.to_ne_bytes())?;
        }
        Ok(())
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn fail(&mut self) {
        self.fabric().fail(self.endpoint.number);
    }
}

impl Drop for SimulatedPair {
    fn drop(&mut self) {
        self.fabric().remove_pair(self.endpoint.number);
    }
}

#[cfg(test)]
mod test;
