//! Protection domains, what is registered in them, and what queue pairs of a port can do.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use libsg::Result;
use rdma_sys::{ibv_access_flags, ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_mr};

use super::context::Context;
use super::pair::KernelPair;
use super::ports::Picked;
use super::queue::Pair;
use super::{Opened, refusal};
use crate::verbs::{Access, Domain, Limits, QueuePair, Region};

/// What is asked of a queue pair: more is of no use to anybody here.
const WORKS_MAX: usize = 1024;
const PIECES_MAX: usize = 16;
const INLINE_BYTES_MAX: usize = 64;

/// Reads of a queue pair that are on their way.
const READS_MAX: usize = 16;

/// Fewer work requests are not tried.
const WORKS_MIN: usize = 16;

/// A protection domain of a device.
#[derive(Debug)]
pub(super) struct Protection {
    raw: NonNull<ibv_pd>,
    /// It goes after what was made of it.
    context: Arc<Context>,
}

// SAFETY: libibverbs lets any thread use a domain at any time; it is given back by the last owner.
unsafe impl Send for Protection {}
// SAFETY: as above.
unsafe impl Sync for Protection {}

impl Protection {
    fn new(context: &Arc<Context>) -> Result<Self> {
        // SAFETY: an open device.
        let raw = NonNull::new(unsafe { ibv_alloc_pd(context.raw()) });
        let raw = raw.ok_or_else(|| refusal::no_more("protection domain", io::Error::last_os_error()))?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    pub(super) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }
}

impl Drop for Protection {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs keep an `Arc` of it, and so are gone.
        unsafe { ibv_dealloc_pd(self.raw()) };
    }
}

/// What a queue pair at this port can do: one is made, since devices say more of each thing than they have of all.
pub(super) fn probe(context: &Arc<Context>, picked: &Picked) -> Result<Limits> {
    let attributes = context.attributes()?;
    let count = |number: i32| usize::try_from(number).unwrap_or(0).max(1);
    let protection = Arc::new(Protection::new(context)?);
    let mut limits = Limits {
        works_max: count(attributes.max_qp_wr).min(count(attributes.max_cqe) - 1).clamp(1, WORKS_MAX),
        pieces_max: count(attributes.max_sge).min(PIECES_MAX),
        message_bytes_max: picked.port.message_bytes_max as usize,
        inline_bytes_max: INLINE_BYTES_MAX,
        reads_max: count(attributes.max_qp_rd_atom).min(count(attributes.max_qp_init_rd_atom)).min(READS_MAX),
    };
    // Reads land in one piece, or in as many as writes are gathered from.
    limits.pieces_max = limits.pieces_max.min(count(attributes.max_sge_rd));
    loop {
        match Pair::new(&protection, &limits, limits.works_max) {
            Ok(pair) => {
                limits.inline_bytes_max = pair.inline_bytes_max().min(INLINE_BYTES_MAX);
                return Ok(limits);
            }
            // A device has room for so many bytes of requests, however they are divided.
            Err(_) if limits.inline_bytes_max > 0 => limits.inline_bytes_max = 0,
            Err(_) if limits.works_max > WORKS_MIN => {
                limits.works_max = (limits.works_max / 2).max(WORKS_MIN)
            }
            Err(error) => return Err(error),
        }
    }
}

/// A protection domain with the port that its queue pairs are at.
#[derive(Debug)]
pub(super) struct KernelDomain {
    protection: Arc<Protection>,
    opened: Arc<Opened>,
}

impl KernelDomain {
    pub(super) fn new(opened: &Arc<Opened>) -> Result<Self> {
        Ok(Self { protection: Arc::new(Protection::new(&opened.context)?), opened: Arc::clone(opened) })
    }
}

impl Domain for KernelDomain {
    unsafe fn register(
        self: Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Box<dyn Region>> {
        let flags = [
            (access.local_write, ibv_access_flags::IBV_ACCESS_LOCAL_WRITE),
            (access.remote_read, ibv_access_flags::IBV_ACCESS_REMOTE_READ),
            (access.remote_write, ibv_access_flags::IBV_ACCESS_REMOTE_WRITE),
        ];
        let flags = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag.0);
        // SAFETY: the caller says that the memory stays mapped until the region is dropped, which takes it from the device.
        let raw =
            unsafe { ibv_reg_mr(self.protection.raw(), start.as_ptr().cast(), bytes, flags.cast_signed()) };
        let raw = NonNull::new(raw).ok_or_else(|| refusal::no_region(bytes, io::Error::last_os_error()))?;
        // SAFETY: what was just made is ours, and its keys do not change.
        let (local, remote) = unsafe { (raw.as_ref().lkey, raw.as_ref().rkey) };
        Ok(Box::new(KernelRegion { raw, local, remote, _protection: Arc::clone(&self.protection) }))
    }

    fn queue_pair(self: Arc<Self>, works: usize) -> Result<Box<dyn QueuePair>> {
        Ok(Box::new(KernelPair::new(&self.protection, &self.opened, works)?))
    }
}

#[derive(Debug)]
struct KernelRegion {
    raw: NonNull<ibv_mr>,
    local: u32,
    remote: u32,
    _protection: Arc<Protection>,
}

// SAFETY: it is only asked for its keys, which are copies, and dropped once, by any thread.
unsafe impl Send for KernelRegion {}
// SAFETY: as above.
unsafe impl Sync for KernelRegion {}

impl Region for KernelRegion {
    fn local_key(&self) -> u32 {
        self.local
    }

    fn remote_key(&self) -> u32 {
        self.remote
    }
}

impl Drop for KernelRegion {
    fn drop(&mut self) {
        // SAFETY: ours, and given back once. No memory window is ever bound to it, which is all that stands against it.
        let errno = unsafe { ibv_dereg_mr(self.raw.as_ptr()) };
        if errno != 0 {
            // The device might still write there: better memory that nobody gets than memory that changes.
            tracing::error!(error = %io::Error::from_raw_os_error(errno), "memory stays registered");
            std::process::abort();
        }
    }
}
