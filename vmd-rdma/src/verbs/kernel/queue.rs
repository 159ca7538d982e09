//! Queue pairs of a device as libibverbs has them, with what belongs to each: a completion queue and a channel.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use libsg::Result;
use rdma_sys::{
    ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq, ibv_create_qp,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_destroy_qp, ibv_get_cq_event, ibv_modify_qp, ibv_qp,
    ibv_qp_attr, ibv_qp_attr_mask as Mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type,
};

use super::domain::Protection;
use super::refusal;
use crate::verbs::Limits;

/// A wakeup for completions.
#[derive(Debug)]
struct Channel(NonNull<ibv_comp_channel>);

impl Channel {
    fn new(protection: &Protection) -> Result<Self> {
        // SAFETY: an open device.
        let raw = NonNull::new(unsafe { ibv_create_comp_channel(protection.context().raw()) });
        let raw = raw.ok_or_else(|| refusal::no_more("completion channel", io::Error::last_os_error()))?;
        let channel = Self(raw);
        rustix::fs::fcntl_setfl(channel.fd(), rustix::fs::OFlags::NONBLOCK)?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(self.0.as_ref().fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: ours; its queue is gone before.
        unsafe { ibv_destroy_comp_channel(self.0.as_ptr()) };
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Queue {
    raw: NonNull<ibv_cq>,
    channel: Channel,
}

impl Queue {
    fn new(protection: &Protection, entries: usize) -> Result<Self> {
        let channel = Channel::new(protection)?;
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: an open device, and a channel of it that lives as long as the queue.
        let raw = unsafe {
            ibv_create_cq(protection.context().raw(), entries, ptr::null_mut(), channel.0.as_ptr(), 0)
        };
        let raw = NonNull::new(raw);
        let raw = raw.ok_or_else(|| refusal::no_more("completion queue", io::Error::last_os_error()))?;
        Ok(Self { raw, channel })
    }

    pub(super) fn raw(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Becomes readable with a completion that was asked for.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// Takes the wakeup, if there is one.
    pub(super) fn take_wakeup(&self) -> bool {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is open, and does not block; no other queue has it.
        let taken = unsafe { ibv_get_cq_event(self.channel.0.as_ptr(), &raw mut cq, &raw mut context) } == 0;
        if taken {
            // SAFETY: one event of this queue was taken, and is acknowledged once.
            unsafe { ibv_ack_cq_events(self.raw.as_ptr(), 1) };
        }
        taken
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: ours; its queue pair is gone before, and all its events were acknowledged.
        unsafe { ibv_destroy_cq(self.raw.as_ptr()) };
    }
}

/// A queue pair of the device with what it needs. Dropped in this order.
#[derive(Debug)]
pub(super) struct Pair {
    raw: NonNull<ibv_qp>,
    inline_bytes_max: usize,
    queue: Queue,
    _protection: Arc<Protection>,
}

// SAFETY: the pointers are this value's own, and libibverbs binds none of them to a thread.
unsafe impl Send for Pair {}

impl Pair {
    pub(super) fn new(protection: &Arc<Protection>, limits: &Limits, works: usize) -> Result<Self> {
        let queue = Queue::new(protection, works + 1)?;
        // SAFETY: a structure of numbers and pointers, for which zero is a value.
        let mut wanted: ibv_qp_init_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        wanted.send_cq = queue.raw.as_ptr();
        wanted.recv_cq = queue.raw.as_ptr();
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = u32::try_from(works).unwrap_or(u32::MAX);
        wanted.cap.max_send_sge = limits.pieces_max as u32;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_recv_sge = 1;
        wanted.cap.max_inline_data = limits.inline_bytes_max as u32;
        // SAFETY: a domain and a queue of the same device, both of which live as long as the queue pair.
        let raw = NonNull::new(unsafe { ibv_create_qp(protection.raw(), &raw mut wanted) });
        let raw = raw.ok_or_else(|| refusal::no_more("queue pair", io::Error::last_os_error()))?;
        let inline_bytes_max = wanted.cap.max_inline_data as usize;
        Ok(Self { raw, inline_bytes_max, queue, _protection: Arc::clone(protection) })
    }

    pub(super) fn inline_bytes_max(&self) -> usize {
        self.inline_bytes_max
    }

    pub(super) fn raw(&self) -> *mut ibv_qp {
        self.raw.as_ptr()
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn number(&self) -> u32 {
        // SAFETY: ours, and its number does not change.
        unsafe { self.raw.as_ref().qp_num }
    }

    pub(super) fn modify(&self, attributes: &mut ibv_qp_attr, what: &[Mask]) -> io::Result<()> {
        let mask = what.iter().fold(0, |all, one| all | one.0);
        // SAFETY: ours; the attributes that the mask names were set.
        match unsafe { ibv_modify_qp(self.raw.as_ptr(), attributes, mask.cast_signed()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub(super) fn to_error(&self) {
        let mut attributes = no_attributes();
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        if let Err(error) = self.modify(&mut attributes, &[Mask::IBV_QP_STATE]) {
            tracing::debug!(%error, "a queue pair did not go to the error state, and is destroyed as it is");
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: ours, and destroyed once: the device uses no memory of its requests behind this.
        let errno = unsafe { ibv_destroy_qp(self.raw.as_ptr()) };
        if errno != 0 {
            // The device might still write into memory that is given to others next.
            tracing::error!(error = %io::Error::from_raw_os_error(errno), "a queue pair stays");
            std::process::abort();
        }
    }
}

pub(super) fn no_attributes() -> ibv_qp_attr {
    // SAFETY: a structure of numbers and of unions of numbers, for which zero is a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}
