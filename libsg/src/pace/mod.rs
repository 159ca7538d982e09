//! Pacing: bulk leaves at just under what the bottleneck carries, so that its queue stays empty and
//! a page that a guest waits for finds no bulk ahead of it.
//!
//! [`TokenBucket`], [`RateFinder`] and the sharing of a rate are pure: bytes and time in, waits and rates out.
//! Worker threads share one [`SharedPacer`] per host, and feed it with what the kernel measures on each
//! connection ([`TcpInfo`]):
//!
//! ```text
//!  TCP_INFO of each link --report--> SharedPacer: sum of delivered, least delay --> RateFinder
//!  sender <--- its share: KernelPace --- direct first, bulk alike  <-----rate-----------+
//!  receiver <--- grant or wait --------- TokenBuckets  <----------------rate-----------+
//! ```
//!
//! What a host's own traffic leaves of its link to the pages of other hosts' VMs is [`LocalFirst`]'s.
//!
//! Several VMs that leave one host share its link. A [`LinkDivision`] divides it: what a VM's pacer is to its links, the
//! division is to those pacers.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bucket;
mod delay;
mod division;
mod local_first;
mod rate;
mod share;
mod shared;
mod socket;
mod tcp_info;
mod trickle;
#[cfg(test)]
mod test;

pub use bucket::{TokenBucket, slice_bytes};
pub(crate) use bucket::{bytes_in, is_near, time_of};
pub use delay::{Aggregate, LinkReading, aggregate, own_delay};
pub use division::{LinkDivision, Part};
pub use local_first::{LocalFirst, Passed};
pub use rate::{RateFinder, Reading};
pub use shared::{Acquire, Class, LinkId, SharedPacer, Told};
pub use socket::{Dscp, mark_bulk, mark_urgent, precise_timers, quick_ack, set_congestion};
pub use tcp_info::{KernelPace, TcpInfo, wake_reader_at};
pub use trickle::Trickle;
