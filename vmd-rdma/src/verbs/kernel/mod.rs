//! Devices of the kernel, by libibverbs, which is loaded at run time: without it, and without devices, everything but this
//! works.
//!
//! [`Choice`] says which port, [`open`] opens it. What stands in the way is said with what to do about it.

mod context;
mod domain;
mod pair;
mod ports;
mod queue;
mod refusal;

use std::net::IpAddr;
use std::sync::Arc;

use libsg::Result;

use self::context::Context;
use self::domain::KernelDomain;
use self::ports::Picked;
pub use self::ports::{Gid, GidKind, LinkLayer, Port};
use super::{Device, Domain, Limits};

/// Which port of which device, and how it is used. What is not said is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The device, as `rdma link` names it.
    pub device: Option<String>,
    /// Its port, from 1.
    pub port: Option<u8>,
    /// The global identifier, by its index at the port. Else the one of `near`; on Ethernet else RoCE v2 with an IPv4
    /// address, then with an IPv6 address.
    pub gid_index: Option<u32>,
    /// For the network's quality of service: the IP header's, on Ethernet.
    pub traffic_class: u8,
    /// Bytes of the largest packet, at most what the port has now.
    pub mtu_bytes: Option<u32>,
    /// An address of this host: of several ports the one that has it, if one does.
    pub near: Option<IpAddr>,
}

/// Ports of all devices that can be opened.
///
/// # Errors
/// libibverbs is not here, the kernel has no RDMA, or no device can be opened.
pub fn ports() -> Result<Vec<Port>> {
    look().map(|(_, ports)| ports)
}

/// Opens the port that is chosen.
///
/// # Errors
/// [`libsg::ErrorKind::Input`] where there is none like it, or it is down; those of [`ports`].
pub fn open(choice: &Choice) -> Result<Arc<dyn Device>> {
    let (contexts, ports) = look()?;
    open_picked(contexts, ports::pick(&ports, choice)?)
}

/// The device that has this address of the host, if one has, used as said.
///
/// # Errors
/// As [`open`].
pub fn open_at(choice: &Choice, address: IpAddr) -> Result<Option<Arc<dyn Device>>> {
    let (contexts, ports) = look()?;
    let picked = ports::pick(&ports, &Choice { near: Some(address), ..choice.clone() })?;
    if picked.gid.is(address) { open_picked(contexts, picked).map(Some) } else { Ok(None) }
}

fn look() -> Result<(Vec<Arc<Context>>, Vec<Port>)> {
    let (contexts, mut all) = (Context::open_all()?, Vec::new());
    for context in &contexts {
        all.extend(context.ports()?);
    }
    Ok((contexts, all))
}

fn open_picked(contexts: Vec<Arc<Context>>, picked: Picked) -> Result<Arc<dyn Device>> {
    let context = contexts.into_iter().find(|context| context.name() == picked.port.device);
    let context = context.ok_or_else(|| refusal::no_device(&[]))?;
    let limits = domain::probe(&context, &picked)?;
    Ok(Arc::new(KernelDevice(Arc::new(Opened { context, picked, limits }))))
}

/// The port that [`open`] opens, and its identifier: for others who are to use the same.
///
/// # Errors
/// Those of [`open`].
pub fn picked(choice: &Choice) -> Result<(Port, Gid)> {
    let picked = ports::pick(&ports()?, choice)?;
    Ok((picked.port, picked.gid))
}

/// A port that is open, as its domains and queue pairs need it.
#[derive(Debug)]
struct Opened {
    context: Arc<Context>,
    picked: ports::Picked,
    limits: Limits,
}

#[derive(Debug)]
struct KernelDevice(Arc<Opened>);

impl Device for KernelDevice {
    fn name(&self) -> &str {
        self.0.context.name()
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn domain(&self) -> Result<Arc<dyn Domain>> {
        Ok(Arc::new(KernelDomain::new(&self.0)?))
    }
}
