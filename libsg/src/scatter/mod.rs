//! Scatter: how pages leave the source.
//!
//! ```text
//!                      +--> direct.rs   (credit)   --> destination
//!  source --> planner -+--> member.rs   (window)   --> intermediary: content, then its index entry
//!   load.rs            +--> urgent.rs   (at once)  --> destination, for a page the guest waits for
//! ```
//!
//! The [`planner`] is pure; the sinks pull from it and share one pacer, which keeps the source's link
//! just under full. [`session`] keeps the destination's connections; [`shared`] is what all have in common.

pub mod batch;
mod changes;
pub mod copies;
mod direct;
mod entries;
mod index_router;
mod load;
mod member;
pub mod membership;
pub mod offers;
mod outcomes;
pub mod planner;
pub mod roster;
pub mod session;
pub mod shared;
mod spans;
pub mod table;
pub mod telling;
mod urgent;
pub mod window;

pub use direct::DirectSink;
pub use member::MemberSink;
pub use planner::Planner;
pub use shared::Scatter;
pub use urgent::UrgentSink;
