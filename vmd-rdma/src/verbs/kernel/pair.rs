//! Reliable connected queue pairs of a device: how they are connected, posted to and reaped.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use libsg::{Error, ErrorKind, Result};
use rdma_sys::{
    bind_mw_tso_union_t, ibv_access_flags, ibv_poll_cq, ibv_post_send, ibv_qp_attr_mask as Mask,
    ibv_qp_state, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status,
    ibv_wr_opcode, imm_data_invalidated_rkey_union_t, qp_type_t, rdma_t, tso_t, wr_t, xrc_t,
};

use super::domain::Protection;
use super::queue::{Pair, no_attributes};
use super::{LinkLayer, Opened, refusal};
use crate::verbs::{Done, Endpoint, Fault, Operation, Patience, QueuePair, Work};

/// Work requests with one doorbell.
const DOORBELL: usize = 16;

/// Completions that are taken from the device at once.
const TAKEN: usize = 32;

/// How often a queue pair in the error state is asked for what is outstanding, a millisecond apart, before it is
/// destroyed all the same.
const DRAINS_MAX: usize = 1000;

/// Routers on the way.
const HOPS_MAX: u8 = 64;

/// A queue pair at a port.
#[derive(Debug)]
pub(super) struct KernelPair {
    opened: Arc<Opened>,
    works: usize,
    packet_sequence: u32,
    /// Numbers of those that are outstanding, the first of which the device knows as `first`.
    ids: VecDeque<u64>,
    first: u64,
    /// A wakeup was asked for, and not taken yet.
    armed: bool,
    posted: Posted,
    pair: Pair,
}

/// What is handed to the device with one doorbell, which it copies.
#[derive(Default)]
struct Posted {
    works: Vec<ibv_send_wr>,
    pieces: Vec<ibv_sge>,
}

// SAFETY: the pointers in there are to what is in there, and are set anew before each use.
unsafe impl Send for Posted {}

impl std::fmt::Debug for Posted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} works", self.works.len())
    }
}

impl KernelPair {
    pub(super) fn new(protection: &Arc<Protection>, opened: &Arc<Opened>, works: usize) -> Result<Self> {
        if works == 0 || works > opened.limits.works_max {
            let what =
                format!("a queue pair of this device has 1 to {} work requests", opened.limits.works_max);
            return Err(Error::new(ErrorKind::Input, what));
        }
        let pair = Pair::new(protection, &opened.limits, works)?;
        Ok(Self {
            opened: Arc::clone(opened),
            works,
            packet_sequence: u32::from_le_bytes(libsg::ids::random_bytes()?) >> 8,
            ids: VecDeque::with_capacity(works),
            first: 0,
            armed: false,
            posted: Posted {
                works: Vec::with_capacity(DOORBELL),
                pieces: Vec::with_capacity(DOORBELL * opened.limits.pieces_max),
            },
            pair,
        })
    }

    fn to_init(&self) -> io::Result<()> {
        let mut attributes = no_attributes();
        attributes.qp_state = ibv_qp_state::IBV_QPS_INIT;
        attributes.port_num = self.opened.picked.port.number;
        attributes.qp_access_flags =
            ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        let what =
            [Mask::IBV_QP_STATE, Mask::IBV_QP_PKEY_INDEX, Mask::IBV_QP_PORT, Mask::IBV_QP_ACCESS_FLAGS];
        self.pair.modify(&mut attributes, &what)
    }

    /// Ready to be written and read by the peer.
    fn to_receive(&self, peer: &Endpoint) -> io::Result<()> {
        let picked = &self.opened.picked;
        let mut attributes = no_attributes();
        attributes.qp_state = ibv_qp_state::IBV_QPS_RTR;
        attributes.path_mtu = (picked.mtu_bytes.min(peer.mtu_bytes) / 128).ilog2();
        attributes.dest_qp_num = peer.number;
        attributes.rq_psn = peer.packet_sequence;
        attributes.max_dest_rd_atomic = self.opened.limits.reads_max as u8;
        attributes.min_rnr_timer = 12;
        let way = &mut attributes.ah_attr;
        way.port_num = picked.port.number;
        way.dlid = peer.lid;
        if picked.port.layer == LinkLayer::Ethernet {
            way.is_global = 1;
            way.grh.dgid.raw = peer.gid.octets();
            way.grh.sgid_index = picked.gid.index as u8;
            way.grh.hop_limit = HOPS_MAX;
            way.grh.traffic_class = picked.traffic_class;
        }
        let what = [
            Mask::IBV_QP_STATE,
            Mask::IBV_QP_AV,
            Mask::IBV_QP_PATH_MTU,
            Mask::IBV_QP_DEST_QPN,
            Mask::IBV_QP_RQ_PSN,
            Mask::IBV_QP_MAX_DEST_RD_ATOMIC,
            Mask::IBV_QP_MIN_RNR_TIMER,
        ];
        self.pair.modify(&mut attributes, &what)
    }

    fn to_send(&self, patience: Patience) -> io::Result<()> {
        let mut attributes = no_attributes();
        attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
        attributes.sq_psn = self.packet_sequence;
        attributes.timeout = timeout(patience.acknowledged_within);
        attributes.retry_cnt = patience.retries.min(7);
        attributes.rnr_retry = 7;
        attributes.max_rd_atomic = self.opened.limits.reads_max as u8;
        let what = [
            Mask::IBV_QP_STATE,
            Mask::IBV_QP_TIMEOUT,
            Mask::IBV_QP_RETRY_CNT,
            Mask::IBV_QP_RNR_RETRY,
            Mask::IBV_QP_SQ_PSN,
            Mask::IBV_QP_MAX_QP_RD_ATOMIC,
        ];
        self.pair.modify(&mut attributes, &what)
    }

    fn check(&self, work: &Work<'_>) -> Result<()> {
        let limits = &self.opened.limits;
        let bytes: usize = work.pieces.iter().map(|piece| piece.bytes as usize).sum();
        let most = match work.operation {
            Operation::WriteInline => self.pair.inline_bytes_max().min(limits.inline_bytes_max),
            _ => limits.message_bytes_max,
        };
        if work.pieces.len() > limits.pieces_max || bytes > most {
            let what = format!(
                "a work request of {} pieces and {bytes} bytes, where the device takes {} and {most}",
                work.pieces.len(),
                limits.pieces_max
            );
            return Err(Error::new(ErrorKind::Input, what));
        }
        Ok(())
    }

    /// Posts at most [`DOORBELL`] of them, each within the limits. Returns how many.
    fn ring(&mut self, works: &[Work<'_>]) -> Result<usize> {
        let Posted { works: requests, pieces } = &mut self.posted;
        requests.clear();
        pieces.clear();
        let next = self.first + self.ids.len() as u64;
        for (at, work) in works.iter().enumerate() {
            let sge = |piece: &crate::verbs::Piece| ibv_sge {
                addr: piece.address,
                length: piece.bytes,
                lkey: piece.key,
            };
            let from = pieces.len();
            pieces.extend(work.pieces.iter().map(sge));
            let (opcode, flag) = match work.operation {
                Operation::Write => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, 0),
                Operation::WriteInline => {
                    (ibv_wr_opcode::IBV_WR_RDMA_WRITE, ibv_send_flags::IBV_SEND_INLINE.0)
                }
                Operation::Read => (ibv_wr_opcode::IBV_WR_RDMA_READ, 0),
            };
            let signal = if work.signalled { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
            requests.push(ibv_send_wr {
                wr_id: next + at as u64,
                next: ptr::null_mut(),
                // Room for all of them was made before: what is there stays where it is.
                sg_list: pieces[from..].as_mut_ptr(),
                num_sge: work.pieces.len() as i32,
                opcode,
                send_flags: flag | signal,
                imm_data_invalidated_rkey_union: imm_data_invalidated_rkey_union_t { imm_data: 0 },
                wr: wr_t { rdma: rdma_t { remote_addr: work.remote.address, rkey: work.remote.key } },
                qp_type: qp_type_t { xrc: xrc_t { remote_srqn: 0 } },
                bind_mw_tso_union: bind_mw_tso_union_t {
                    tso: tso_t { hdr: ptr::null_mut(), hdr_sz: 0, mss: 0 },
                },
            });
        }
        for at in 1..requests.len() {
            requests[at - 1].next = &raw mut requests[at];
        }
        let (start, mut bad) = (requests.as_mut_ptr(), ptr::null_mut());
        // SAFETY: a list of requests that ends, with pieces that are all there; the device copies both before it returns.
        // The memory that they name is its regions' affair: who posts keeps them until the request has ended.
        let errno = unsafe { ibv_post_send(self.pair.raw(), start, &raw mut bad) };
        let posted = match errno {
            0 => works.len(),
            // The first that was not posted; at the first, where nobody says which.
            _ => (bad as usize).saturating_sub(start as usize) / size_of::<ibv_send_wr>(),
        };
        let posted = posted.min(works.len());
        self.ids.extend(works[..posted].iter().map(|work| work.id));
        // Whatever has no room now has some when others have ended.
        let is_full = errno == rustix::io::Errno::NOMEM.raw_os_error() && !self.ids.is_empty();
        if errno != 0 && !is_full {
            let what = "the device refuses a work request";
            return Err(Error::new(ErrorKind::System, what).because(io::Error::from_raw_os_error(errno)));
        }
        Ok(posted)
    }

    /// Its own number of a work request that has ended. Those before it have as well.
    fn ended(&mut self, number: u64) -> Option<u64> {
        let behind = usize::try_from(number.checked_sub(self.first)?).ok()?;
        if behind >= self.ids.len() {
            return None;
        }
        self.first = number + 1;
        self.ids.drain(..=behind).next_back()
    }

    /// Whatever is outstanding has ended, or never will.
    fn drain(&mut self) {
        let mut done = Vec::new();
        for _ in 0..DRAINS_MAX {
            if self.ids.is_empty() || self.reap(TAKEN, &mut done).is_err() {
                return;
            }
            if done.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            done.clear();
        }
        tracing::warn!(outstanding = self.ids.len(), "a queue pair is destroyed before it was drained");
    }
}

impl QueuePair for KernelPair {
    fn endpoint(&self) -> Endpoint {
        let picked = &self.opened.picked;
        Endpoint {
            number: self.pair.number(),
            packet_sequence: self.packet_sequence,
            gid: picked.gid.address,
            lid: picked.port.lid,
            mtu_bytes: picked.mtu_bytes,
        }
    }

    fn connect(&mut self, peer: &Endpoint, patience: Patience) -> Result<()> {
        let picked = &self.opened.picked;
        reachable(&self.endpoint(), peer, picked.port.layer)?;
        let failed = |error| refusal::not_connected(&picked.gid, peer.gid, error);
        self.to_init().map_err(failed)?;
        self.to_receive(peer).map_err(failed)?;
        self.to_send(patience).map_err(failed)
    }

    fn post(&mut self, works: &[Work<'_>]) -> Result<usize> {
        let room = works.len().min(self.works - self.ids.len());
        let mut posted = 0;
        while posted < room {
            let some = &works[posted..room.min(posted + DOORBELL)];
            let wrong = some.iter().find_map(|work| self.check(work).err());
            let fine = some.iter().take_while(|work| self.check(work).is_ok()).count();
            let rung = if fine > 0 { self.ring(&some[..fine])? } else { 0 };
            posted += rung;
            if rung < fine {
                break;
            }
            if let Some(error) = wrong {
                return Err(error);
            }
        }
        Ok(posted)
    }

    fn reap(&mut self, most: usize, into: &mut Vec<Done>) -> Result<()> {
        if self.armed && self.pair.queue().take_wakeup() {
            self.armed = false;
        }
        let mut found = [MaybeUninit::<ibv_wc>::uninit(); TAKEN];
        let before = into.len();
        while into.len() - before < most {
            let wanted = (most - (into.len() - before)).min(TAKEN);
            // SAFETY: ours, and room for so many completions.
            let count =
                unsafe { ibv_poll_cq(self.pair.queue().raw(), wanted as i32, found.as_mut_ptr().cast()) };
            let Ok(count) = usize::try_from(count) else {
                let what = "the device gives no completions any more: was it removed?";
                return Err(Error::new(ErrorKind::System, what));
            };
            for completion in &found[..count] {
                // SAFETY: the device wrote the first `count` of them.
                let (number, status) = unsafe {
                    let completion = completion.assume_init_ref();
                    (completion.wr_id, completion.status)
                };
                let ended = self.ended(number);
                into.extend(ended.map(|id| Done { id, result: result(status) }));
            }
            if count < wanted {
                break;
            }
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<()> {
        if self.armed {
            return Ok(());
        }
        // SAFETY: ours.
        let errno = unsafe { ibv_req_notify_cq(self.pair.queue().raw(), 0) };
        if errno != 0 {
            let what = "the device tells nobody of completions any more: was it removed?";
            return Err(Error::new(ErrorKind::System, what).because(io::Error::from_raw_os_error(errno)));
        }
        self.armed = true;
        Ok(())
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.pair.queue().fd()
    }

    fn fail(&mut self) {
        self.pair.to_error();
    }
}

impl Drop for KernelPair {
    fn drop(&mut self) {
        // First it takes nothing more, then what it had comes to its end, then it goes.
        if !self.ids.is_empty() {
            self.pair.to_error();
            self.drain();
        }
    }
}

/// Whether a queue pair there can be reached from here at all.
fn reachable(ours: &Endpoint, peer: &Endpoint, layer: LinkLayer) -> Result<()> {
    let kind = |gid: &std::net::Ipv6Addr| (gid.to_ipv4_mapped().is_some(), gid.is_unicast_link_local());
    let what = match layer {
        LinkLayer::InfiniBand if peer.lid == 0 => {
            "this port is InfiniBand, and the peer's has no LID: it is Ethernet, or no subnet manager runs"
                .to_owned()
        }
        LinkLayer::Ethernet if peer.lid != 0 => {
            "this port is Ethernet, and the peer's is InfiniBand: choose others".to_owned()
        }
        LinkLayer::Ethernet if kind(&ours.gid) != kind(&peer.gid) => format!(
            "the GID here is {}, and the peer's {}: choose GIDs of one kind by their index",
            ours.gid, peer.gid
        ),
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Input, what))
}

/// How often 4.096 µs are to be doubled for a time at least as long: the device's own unit.
fn timeout(time: Duration) -> u8 {
    let units = time.as_nanos().div_ceil(4096).max(2);
    u8::try_from(units.next_power_of_two().ilog2()).unwrap_or(31).min(31)
}

fn result(status: ibv_wc_status::Type) -> Result<(), Fault> {
    match status {
        ibv_wc_status::IBV_WC_SUCCESS => Ok(()),
        ibv_wc_status::IBV_WC_LOC_PROT_ERR | ibv_wc_status::IBV_WC_LOC_ACCESS_ERR => {
            Err(Fault::LocalProtection)
        }
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => Err(Fault::RemoteAccess),
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR | ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => {
            Err(Fault::RetriesExceeded)
        }
        ibv_wc_status::IBV_WC_WR_FLUSH_ERR => Err(Fault::Flushed),
        other => Err(Fault::Other(other)),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn times_are_the_devices_next_longer_ones() {
        let of = |time: Duration| timeout(time);
        assert_eq!(of(Duration::from_millis(268)), 16, "4.096 us 65,536 times are 268.4 ms");
        assert_eq!(of(Duration::from_millis(269)), 17);
        assert_eq!((of(Duration::ZERO), of(Duration::MAX)), (1, 31), "zero would be for ever");
    }

    #[test]
    fn ends_of_two_kinds_do_not_reach_each_other() {
        let end = |gid: &str, lid| Endpoint {
            number: 1,
            packet_sequence: 0,
            gid: gid.parse().expect("an address"),
            lid,
            mtu_bytes: 1024,
        };
        let (v4, v6, local) = (end("::ffff:10.0.0.1", 0), end("2001:db8::1", 0), end("fe80::1", 0));
        assert!(reachable(&v4, &end("::ffff:10.0.9.1", 0), LinkLayer::Ethernet).is_ok(), "it is routed");
        assert!(reachable(&v6, &v6, LinkLayer::Ethernet).is_ok());
        let infiniband = end("fe80::1", 7);
        assert!(reachable(&infiniband, &infiniband, LinkLayer::InfiniBand).is_ok());
        for (ours, peer, layer) in [
            (&v4, &v6, LinkLayer::Ethernet),
            (&v4, &local, LinkLayer::Ethernet),
            (&local, &v6, LinkLayer::Ethernet),
            (&v4, &infiniband, LinkLayer::Ethernet),
            (&infiniband, &v4, LinkLayer::InfiniBand),
        ] {
            assert_eq!(reachable(ours, peer, layer).expect_err("no way").kind, ErrorKind::Input);
        }
    }
}
