//! What is wanted, and what was asked of whom about it.

use std::time::{Duration, Instant};

use crate::gather::tracker::Read;
use crate::ids::MemberIndex;
use crate::page::PageRange;
use crate::vmd::Ticket;

/// A question that is out, or was answered in vain.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    /// Since when it is out; `None` when it is not.
    pub(super) since: Option<Instant>,
    /// Of the frame to the source.
    pub(super) sequence: u64,
    /// Of the request on a link.
    pub(super) ticket: Option<(MemberIndex, Ticket)>,
}

impl Asked {
    pub(super) fn is_out(&self) -> bool {
        self.since.is_some()
    }

    pub(super) fn is_silent(&self, now: Instant, for_: Duration) -> bool {
        self.since.is_some_and(|since| now.saturating_duration_since(since) >= for_)
    }
}

/// A unit that is wanted.
pub(super) struct Pending {
    pub(super) unit: PageRange,
    /// Whether the guest waits for it; otherwise it is a wish.
    pub(super) guest: bool,
    pub(super) source: Asked,
    pub(super) read: Asked,
    pub(super) index: Asked,
    /// What was asked of the member, for checking the answer.
    pub(super) reads: Vec<Read>,
    /// Index servers that were asked, in turn from the owner on.
    pub(super) rotation: usize,
    pub(super) source_refused: bool,
    /// When the source was last asked.
    pub(super) source_at: Option<Instant>,
    pub(super) try_at: Instant,
    pub(super) done: bool,
}

impl Pending {
    pub(super) fn new(unit: PageRange, guest: bool, now: Instant) -> Self {
        Self {
            unit,
            guest,
            source: Asked::default(),
            read: Asked::default(),
            index: Asked::default(),
            reads: Vec::new(),
            rotation: 0,
            source_refused: false,
            source_at: None,
            try_at: now,
            done: false,
        }
    }
}
