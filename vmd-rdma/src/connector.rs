//! Links whose pages go over a device, where both ends have one; else over their connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libsg::content::{ContentHasher, Sharing};
use libsg::ids::{Epoch, VolumeId};
use libsg::transport::PoolSecret;
use libsg::vmd::{Class, Connector, Link, TcpConnector};
use libsg::{Error, Result};

use crate::link::RdmaLink;
use crate::verbs::Device;

/// Makes links over a device, all with one pool secret.
#[derive(Clone, Debug)]
pub struct RdmaConnector {
    tcp: TcpConnector,
    device: Arc<dyn Device>,
    said: Said,
}

/// What is said once, however many links there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said(Arc<AtomicBool>);

impl Said {
    /// Pages do not go over the device, on one link at least.
    pub(crate) fn not_over_the_device(&self, why: &Error) {
        if self.0.swap(true, Ordering::Relaxed) {
            tracing::debug!(error = why.chain(), "pages of one more link go over its connection");
        } else {
            tracing::warn!(error = why.chain(), "pages go over a connection, not over the RDMA device");
        }
    }
}

impl RdmaConnector {
    /// For a pool with this secret, over this device.
    #[must_use]
    pub fn new(secret: PoolSecret, device: Arc<dyn Device>) -> Self {
        Self { tcp: TcpConnector::new(secret), device, said: Said::default() }
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
        let control = self.tcp.link(address, (volume, epoch), class, timeout)?;
        if volume == VolumeId(0) {
            // An operator moves no pages.
            return Ok(Box::new(control));
        }
        Ok(Box::new(RdmaLink::new(control, Arc::clone(&self.device), class, self.said.clone())?))
    }
}
