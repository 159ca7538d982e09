//! Pacing: bulk leaves at just under what the bottleneck carries, so that its queue stays empty and
//! a page that a guest waits for finds no bulk ahead of it.
//!
//! [`TokenBucket`] and [`RateFinder`] are pure: bytes and time in, waits and rates out. Worker threads
//! share one [`SharedPacer`] per host, which charges direct and bulk traffic to one sum, and feed it with
//! what the kernel measures on each connection ([`TcpInfo`]):
//!
//! ```text
//!  TCP_INFO of each link --report--> SharedPacer: sum of delivered, least delay --> RateFinder
//!  worker <--- grant or wait ------- strict priority over TokenBuckets  <---rate------+
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bucket;
mod delay;
mod rate;
mod shared;
mod socket;
mod tcp_info;
#[cfg(test)]
mod test;

pub use bucket::{TokenBucket, slice_bytes};
pub use delay::{Aggregate, LinkReading, aggregate, own_delay};
pub use rate::{RateFinder, Reading};
pub use shared::{Acquire, Class, Hungry, LinkId, SharedPacer};
pub use socket::{Dscp, mark_bulk, mark_urgent, precise_timers, quick_ack, set_congestion, sleep_until};
pub use tcp_info::{TcpInfo, smooth};
