//! Asks etcd once who is there.

use std::time::{Duration, Instant};

use libsg::discovery::{Found, Pool};
use libsg::transport::PoolSecret;
use libsg::{Error, Result};
use parking_lot::Mutex;

use crate::client::{ANSWER, Client};
use crate::key;
use crate::place::Place;
use crate::transport::Cut;
use crate::view::View;
use crate::watcher::list;

/// The hosts whose announcements an etcd keeps.
pub struct EtcdPool {
    client: Client,
    range: (String, String),
    view: Mutex<View>,
}

impl EtcdPool {
    /// A pool. Nothing is asked yet.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::System`] when the kernel gives no descriptor.
    pub fn open(place: &Place, secret: &PoolSecret) -> Result<Self> {
        let view = View::new(place.prefix(), secret.announcement_key());
        Ok(Self {
            client: Client::new(place, ANSWER, Cut::new()?),
            range: key::range(place.prefix()),
            view: Mutex::new(view),
        })
    }
}

impl Pool for EtcdPool {
    fn find(&mut self, patience: Duration) -> Result<Vec<Found>> {
        let listed = list(&mut self.client, &self.range, &self.view, Instant::now() + patience);
        listed.map_err(Error::from)?;
        let hosts = self.view.lock().hosts(Instant::now());
        Ok(hosts.into_iter().map(|host| Found { address: host.address, announced: Some(host) }).collect())
    }
}
