//! The devices of a host in several networks, each opened when the first link goes by its network.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use libsg::Result;
use parking_lot::Mutex;

use crate::connector::Devices;
use crate::verbs::Device;
use crate::verbs::kernel::{self, Choice};

/// A device that is used where no other is nearer, and the others.
#[derive(Debug)]
pub struct Several {
    first: Arc<dyn Device>,
    choice: Choice,
    /// By the addresses of this host that links have gone by.
    known: Mutex<HashMap<IpAddr, Arc<dyn Device>>>,
}

impl Several {
    /// The device that is meant; it is used for all links where it is named, or one of its GIDs is.
    ///
    /// # Errors
    /// As [`kernel::open`].
    pub fn open(choice: &Choice) -> Result<Self> {
        Ok(Self { first: kernel::open(choice)?, choice: choice.clone(), known: Mutex::default() })
    }

    fn find(&self, address: IpAddr) -> Arc<dyn Device> {
        match kernel::open_at(&self.choice, address) {
            Ok(Some(device)) => {
                tracing::info!(device = device.name(), %address, "links by this address have a device");
                device
            }
            Ok(None) => Arc::clone(&self.first),
            Err(error) => {
                tracing::warn!(error = error.chain(), %address, "the device of this address is not used");
                Arc::clone(&self.first)
            }
        }
    }
}

impl Devices for Several {
    fn near(&self, address: Option<IpAddr>) -> Arc<dyn Device> {
        let is_meant = self.choice.device.is_some() || self.choice.gid_index.is_some();
        match address.filter(|address| !is_meant && Some(*address) != self.choice.near) {
            Some(address) => {
                Arc::clone(self.known.lock().entry(address).or_insert_with(|| self.find(address)))
            }
            None => Arc::clone(&self.first),
        }
    }
}
