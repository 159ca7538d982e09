//! Devices of one simulated network, all in this process, for tests: it checks what a device checks (keys, bounds,
//! rights, domains), and completes, delays and fails what it is asked by seed.
//!
//! Nothing here happens by itself: works go on when somebody reaps, some more or less of them as the seed has it, in the
//! order of their queue pair. So a seed is the same run again, whatever the clock does. Or else they go on when somebody
//! says how late it is ([`Network::on_a_clock`]), for a world that has a clock of its own.
#![allow(unsafe_code)]

mod clock;
mod fabric;
mod memory;

use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use self::clock::Clock;
use self::fabric::{Fabric, host_of};
use self::memory::{Memory, Posted};
use super::{Access, Device, Domain, Done, Endpoint, Limits, Patience, QueuePair, Region, Work};
use libsg::{Error, ErrorKind};

pub use self::clock::Pace;
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
        Self(Arc::new(Mutex::new(Fabric::new(seed, None))))
    }

    /// A network on which things happen when [`Self::advance`] says that it is time.
    #[must_use]
    pub fn on_a_clock(seed: u64, pace: Pace) -> Self {
        Self(Arc::new(Mutex::new(Fabric::new(seed, Some(Clock::new(pace))))))
    }

    /// It is that late on its clock. Appends the hosts where somebody who waits is woken by what has happened.
    pub fn advance(&self, now: Duration, woken: &mut Vec<u16>) {
        self.0.lock().advance(now, woken);
    }

    /// When something happens next on its clock.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.0.lock().next()
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

    /// The host's process was killed: its memory and queue pairs are gone, which nobody tells its peers.
    pub fn remove(&self, host: u16) {
        self.0.lock().remove_host(host);
    }

    /// Carries nothing between two hosts from now on, or again.
    pub fn cut(&self, one: u16, other: u16, cut: bool) {
        self.0.lock().cut(one, other, cut);
    }

    /// The first host's queue pairs to the second are in the error state from now on.
    pub fn fail_between(&self, one: u16, other: u16) {
        self.0.lock().fail_between(one, other);
    }

    /// The host's device registers so much at once, and no more.
    pub fn limit_regions(&self, host: u16, most: usize) {
        self.0.lock().limit_regions(host, most);
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.lock().counts
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
        let key = self.network.0.lock().register((host_of(self.gid), self.number), memory, access)?;
        Ok(Box::new(SimulatedRegion { key, domain: self }))
    }

    fn queue_pair(self: Arc<Self>, works: usize) -> Result<Box<dyn QueuePair>, Error> {
        if works == 0 || works > LIMITS.works_max {
            let what = format!("a queue pair has 1 to {} work requests", LIMITS.works_max);
            return Err(Error::new(ErrorKind::Input, what));
        }
        let event = Arc::new(rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let endpoint = self.network.0.lock().add_pair(self.number, self.gid, Arc::clone(&event));
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
    /// Readable when armed with anything outstanding: whoever reaps then makes it happen. On a clock, when something
    /// has ended since it was armed.
    event: Arc<OwnedFd>,
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

    fn connect(&mut self, peer: &Endpoint, patience: Patience) -> Result<(), Error> {
        if peer.mtu_bytes != self.endpoint.mtu_bytes {
            let what = format!(
                "the peer's port has an MTU of {} bytes, ours one of {}: give both the same",
                peer.mtu_bytes, self.endpoint.mtu_bytes
            );
            return Err(Error::new(ErrorKind::Input, what));
        }
        self.fabric().connect(self.endpoint.number, peer, patience)
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
        self.fabric().reap(self.endpoint.number, most, into);
        Ok(())
    }

    fn arm(&mut self) -> Result<(), Error> {
        self.fabric().arm(self.endpoint.number);
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
