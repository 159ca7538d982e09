//! Devices that are open.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv6Addr;
use std::ptr::NonNull;
use std::sync::Arc;

use libsg::Result;
use rdma_sys::{
    ibv_close_device, ibv_context, ibv_device_attr, ibv_free_device_list, ibv_get_device_list,
    ibv_get_device_name, ibv_gid_entry, ibv_node_type, ibv_open_device, ibv_port_attr, ibv_port_state,
    ibv_query_device, ibv_query_gid_table, ibv_query_port,
};

use super::ports::{Gid, GidKind, LinkLayer, Port};
use super::refusal;

/// What `ibv_port_attr` has for Ethernet; zero and one mean InfiniBand.
const ETHERNET: u8 = 2;

/// `IBV_GID_TYPE_ROCE_V2`.
const ROCE_V2: u32 = 2;

/// Identifiers of all ports of a device together that are looked at: the kernel writes less than 64 KiB of them.
const GIDS_MAX: usize = 2000;

/// An open device.
#[derive(Debug)]
pub(super) struct Context {
    raw: NonNull<ibv_context>,
    name: String,
}

// SAFETY: libibverbs lets any thread use a context at any time; it is closed by the last owner.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// All devices that can be opened: at least one.
    pub(super) fn open_all() -> Result<Vec<Arc<Self>>> {
        let mut count = 0;
        // SAFETY: it writes the count; the list is ours until it is freed below.
        let list = unsafe { ibv_get_device_list(&raw mut count) };
        if list.is_null() {
            return Err(refusal::no_verbs(io::Error::last_os_error()));
        }
        let (mut opened, mut unopened) = (Vec::new(), Vec::new());
        for at in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` devices, each of which lives as long as the list.
            let (device, is_ours, name) = unsafe {
                let device = *list.add(at);
                // iWARP devices have no reliable connected queue pairs that are connected by hand.
                let is_ours = (*device).node_type == ibv_node_type::IBV_NODE_CA;
                (device, is_ours, CStr::from_ptr(ibv_get_device_name(device)).to_string_lossy().into_owned())
            };
            if !is_ours {
                continue;
            }
            // SAFETY: a device of the list, which is freed later.
            match NonNull::new(unsafe { ibv_open_device(device) }) {
                Some(raw) => opened.push(Arc::new(Self { raw, name })),
                None => unopened.push((name, io::Error::last_os_error())),
            }
        }
        // SAFETY: the list is freed once, and what was opened does not need it.
        unsafe { ibv_free_device_list(list) };
        if opened.is_empty() {
            return Err(refusal::no_device(&unopened));
        }
        for (device, error) in &unopened {
            tracing::warn!(device, %error, "an RDMA device cannot be opened");
        }
        Ok(opened)
    }

    pub(super) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What the device can do.
    pub(super) fn attributes(&self) -> Result<ibv_device_attr> {
        let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: an open device, and room for its attributes.
        match unsafe { ibv_query_device(self.raw(), attributes.as_mut_ptr()) } {
            // SAFETY: numbers only, all of which were zeroed before.
            0 => Ok(unsafe { attributes.assume_init() }),
            errno => Err(io::Error::from_raw_os_error(errno).into()),
        }
    }

    /// Its ports.
    pub(super) fn ports(&self) -> Result<Vec<Port>> {
        let count = self.attributes()?.phys_port_cnt;
        let gids = self.gids()?;
        let mut ports = Vec::new();
        for number in 1..=count {
            let mut port = MaybeUninit::<ibv_port_attr>::zeroed();
            // SAFETY: an open device, a port that it has, and room for its attributes.
            let errno = unsafe { ibv_query_port(self.raw(), number, port.as_mut_ptr()) };
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno).into());
            }
            // SAFETY: numbers only, all of which were zeroed before.
            let port = unsafe { port.assume_init() };
            let of_port = gids.iter().filter(|(at, _)| *at == u32::from(number));
            ports.push(Port {
                device: self.name.clone(),
                number,
                is_active: port.state == ibv_port_state::IBV_PORT_ACTIVE,
                layer: if port.link_layer == ETHERNET { LinkLayer::Ethernet } else { LinkLayer::InfiniBand },
                lid: port.lid,
                // 1 is 256 bytes, 5 is 4096.
                mtu_bytes: 128 << port.active_mtu.clamp(1, 5),
                message_bytes_max: port.max_msg_sz,
                gids: of_port.map(|(_, gid)| *gid).collect(),
            });
        }
        Ok(ports)
    }

    /// The identifiers of all ports, each with its port.
    fn gids(&self) -> Result<Vec<(u32, Gid)>> {
        let mut entries: Vec<ibv_gid_entry> = Vec::with_capacity(GIDS_MAX);
        // SAFETY: an open device, and room for so many entries.
        let count = unsafe { ibv_query_gid_table(self.raw(), entries.as_mut_ptr(), GIDS_MAX, 0) };
        let Ok(count) = usize::try_from(count) else {
            let errno = i32::try_from(-count).unwrap_or(rustix::io::Errno::INVAL.raw_os_error());
            return Err(refusal::no_gids(io::Error::from_raw_os_error(errno)));
        };
        // SAFETY: the first `count` entries, which are at most as many as there is room for, were written.
        unsafe { entries.set_len(count.min(GIDS_MAX)) };
        let gid = |entry: &ibv_gid_entry| {
            // SAFETY: both of the union's ways to see it are 16 bytes, of any value.
            let address = Ipv6Addr::from(unsafe { entry.gid.raw });
            let kind = if entry.gid_type == ROCE_V2 { GidKind::RoceV2 } else { GidKind::Link };
            (entry.port_num, Gid { index: entry.gid_index, address, kind })
        };
        Ok(entries.iter().map(gid).filter(|(_, gid)| !gid.address.is_unspecified()).collect())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made of it keeps an `Arc` of it, and so is gone.
        unsafe { ibv_close_device(self.raw()) };
    }
}
