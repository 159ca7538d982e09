//! One intermediary of the volume, as the threads of a gather share it.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use parking_lot::Mutex;

use crate::transport::Waker;
use crate::vmd::Link;
use crate::wire::message::Member;

/// One intermediary of the volume, as its threads share it.
pub(crate) struct MemberDesk {
    pub member: Member,
    pub waker: Waker,
    /// A link for faults that was just made, for the fault thread to take.
    pub urgent: Mutex<Option<Box<dyn Link>>>,
    /// The fault thread has no link any more.
    pub wants_urgent: AtomicBool,
    /// Page bytes that came from here.
    pub bytes_out: AtomicU64,
    pub state: Mutex<MemberState>,
}

/// How a member fares.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MemberState {
    /// Since when it cannot be reached.
    pub lost_since: Option<Instant>,
    /// It is somebody else now, or there is nobody: its pages will not come back.
    pub gone: bool,
    /// It has the volume's memory back, or the tries to tell it so are over.
    pub dissolved: Option<bool>,
}
