//! Links whose pages go over a device, where both ends have one; else over their connections.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsg::content::{ContentHasher, Sharing};
use libsg::ids::{Epoch, VolumeId};
use libsg::transport::PoolSecret;
use libsg::vmd::{Class, Connector, Link, TcpConnector};
use libsg::{Error, ErrorKind, Result};

use crate::link::RdmaLink;
use crate::verbs::Device;

/// Makes links over devices, all with one pool secret.
#[derive(Clone, Debug)]
pub struct RdmaConnector {
    tcp: TcpConnector,
    devices: Arc<dyn Devices>,
    said: Said,
}

/// The devices of a host that is in several networks.
pub trait Devices: Send + Sync + fmt::Debug {
    /// The one in the network in which this host has an address: that by which a link's connection goes.
    fn near(&self, address: Option<IpAddr>) -> Arc<dyn Device>;
}

/// Of a host that has one.
#[derive(Debug)]
struct One(Arc<dyn Device>);

impl Devices for One {
    fn near(&self, _: Option<IpAddr>) -> Arc<dyn Device> {
        Arc::clone(&self.0)
    }
}

/// What is said once, however many links there are; and what is no matter of saying, where there must be no other way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    is_strict: bool,
    over: Arc<AtomicBool>,
    not_over: Arc<AtomicBool>,
}

impl Said {
    /// Pages go over the device, or not at all.
    pub(crate) fn is_strict(&self) -> bool {
        self.is_strict
    }

    /// Pages go over the device, on one link at least.
    pub(crate) fn over_the_device(&self, device: &str) {
        if !self.over.swap(true, Ordering::Relaxed) {
            tracing::info!(device, "pages go over the RDMA device");
        }
    }

    /// Pages do not, on one link at least.
    ///
    /// # Errors
    /// They must, and so the link is of no use.
    pub(crate) fn not_over_the_device(&self, why: Error) -> Result<()> {
        if self.is_strict {
            let what = "pages cannot go over the RDMA device, and may not go otherwise";
            return Err(Error::new(ErrorKind::Unreachable, what).because(why));
        }
        if self.not_over.swap(true, Ordering::Relaxed) {
            tracing::debug!(error = why.chain(), "pages of one more link go over its connection");
        } else {
            tracing::warn!(error = why.chain(), "pages go over a connection, not over the RDMA device");
        }
        Ok(())
    }
}

impl RdmaConnector {
    /// For a pool with this secret, over this device.
    #[must_use]
    pub fn new(secret: PoolSecret, device: Arc<dyn Device>) -> Self {
        Self::among(secret, Arc::new(One(device)))
    }

    /// The same, over the device of the network in which the other end is.
    #[must_use]
    pub fn among(secret: PoolSecret, devices: Arc<dyn Devices>) -> Self {
        Self { tcp: TcpConnector::new(secret), devices, said: Said::default() }
    }

    /// Its links fail where pages cannot go over the device, instead of going over their connections: those that a link
    /// begins with wait until the intermediary has let the device in.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.said.is_strict = true;
        self
    }

    /// [`Connector::connect`], where pages are meant to move.
    ///
    /// # Errors
    /// The connection's.
    pub fn link(
        &self,
        address: SocketAddr,
        (volume, epoch): (VolumeId, Epoch),
        class: Class,
        timeout: Duration,
    ) -> Result<RdmaLink> {
        let control = self.tcp.link(address, (volume, epoch), class, timeout)?;
        let device = self.devices.near(control.local_address());
        RdmaLink::new(control, device, class, self.said.clone())
    }
}

impl Connector for RdmaConnector {
    fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        self.tcp.hasher(sharing)
    }

    fn connect(
        &self,
        address: SocketAddr,
        volume: VolumeId,
        epoch: Epoch,
        class: Class,
        timeout: Duration,
    ) -> Result<Box<dyn Link>> {
        if volume == VolumeId(0) {
            // An operator moves no pages.
            return self.tcp.connect(address, volume, epoch, class, timeout);
        }
        Ok(Box::new(self.link(address, (volume, epoch), class, timeout)?))
    }
}
