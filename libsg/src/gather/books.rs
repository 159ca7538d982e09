//! The parts that the tracker's books consist of: the state of one page in a byte, which pages are
//! installed together, and who waits since when.

use std::time::{Duration, Instant};

use crate::latency::LatencyHistogram;
use crate::page::{PageIndex, PageRange};

/// Faults whose waiting time is measured at once: more than a VM has threads. Those beyond are
/// answered like any other, but not timed.
const WAITING_MAX: usize = 4096;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Nothing yet.
    Missing = 0,
    /// It lies at a placement.
    Announced = 1,
    /// It is zero; need not be installed unless somebody waits for it.
    Zero = 2,
    /// It is in place.
    Installed = 3,
    /// No copy is left.
    Lost = 4,
    /// The guest gave it up: it is zero, whatever it was.
    Removed = 5,
    /// It was said to lie at a placement, and does not.
    Suspect = 6,
}

impl Kind {
    pub(super) const COUNT: usize = 7;
}

const KIND: u8 = 0x07;
const IN_FLIGHT: u8 = 0x08;
const INSTALLING: u8 = 0x10;
const WAITING: u8 = 0x20;
const NO_INDEX: u8 = 0x40;
const NO_SOURCE: u8 = 0x80;

/// The state of a page. Those of all pages of a unit agree, but for where each lies.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct State(u8);

impl State {
    pub(super) fn kind(self) -> Kind {
        match self.0 & KIND {
            1 => Kind::Announced,
            2 => Kind::Zero,
            3 => Kind::Installed,
            4 => Kind::Lost,
            5 => Kind::Removed,
            6 => Kind::Suspect,
            // 0; nothing sets 7.
            _ => Kind::Missing,
        }
    }

    fn set_kind(&mut self, kind: Kind) {
        self.0 = self.0 & !KIND | kind as u8;
    }

    fn set(&mut self, flag: u8, on: bool) {
        self.0 = if on { self.0 | flag } else { self.0 & !flag };
    }

    pub(super) fn is_in_flight(self) -> bool {
        self.0 & IN_FLIGHT != 0
    }

    pub(super) fn is_installing(self) -> bool {
        self.0 & INSTALLING != 0
    }

    pub(super) fn is_waiting(self) -> bool {
        self.0 & WAITING != 0
    }

    /// No index knows it, as far as was asked.
    pub(super) fn no_index(self) -> bool {
        self.0 & NO_INDEX != 0
    }

    /// The source has it no more.
    pub(super) fn no_source(self) -> bool {
        self.0 & NO_SOURCE != 0
    }

    pub(super) fn is_idle_announced(self) -> bool {
        self.0 & (KIND | IN_FLIGHT | INSTALLING) == Kind::Announced as u8
    }

    /// Something new is known: what was tried before says nothing any more.
    pub(super) fn learn(&mut self, kind: Kind) {
        self.set_kind(kind);
        self.set(IN_FLIGHT | NO_INDEX | NO_SOURCE, false);
    }

    /// What was known of it counts no more.
    pub(super) fn forget(&mut self, to: Kind) {
        if !matches!(self.kind(), Kind::Lost | Kind::Removed) {
            self.learn(to);
        }
    }

    pub(super) fn wait(&mut self) {
        self.set(WAITING, true);
    }

    pub(super) fn install(&mut self) {
        self.set(INSTALLING, true);
    }

    pub(super) fn uninstall(&mut self) {
        self.set(INSTALLING, false);
    }

    pub(super) fn settle(&mut self, kind: Kind) {
        self.0 = kind as u8;
    }

    pub(super) fn lose(&mut self) {
        self.0 = Kind::Lost as u8;
    }

    pub(super) fn fly(&mut self) {
        self.set(IN_FLIGHT, true);
    }

    pub(super) fn land(&mut self) {
        self.set(IN_FLIGHT, false);
    }

    /// A lost page stays lost: it was poisoned.
    pub(super) fn remove(&mut self) {
        if self.kind() != Kind::Lost {
            self.set_kind(Kind::Removed);
        }
    }

    pub(super) fn set_no_index(&mut self, on: bool) {
        self.set(NO_INDEX, on);
    }

    pub(super) fn set_no_source(&mut self, on: bool) {
        self.set(NO_SOURCE, on);
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}/{:02x}", self.kind(), self.0 & !KIND)
    }
}

/// Who waits since when, and how long those waited that were answered.
#[derive(Debug)]
pub(super) struct Waiting {
    since: Vec<(PageIndex, Instant)>,
    pub(super) total: LatencyHistogram,
    pub(super) while_scattering: LatencyHistogram,
    pub(super) scattering: bool,
}

impl Default for Waiting {
    fn default() -> Self {
        let (total, while_scattering) = (LatencyHistogram::new(), LatencyHistogram::new());
        Self { since: Vec::new(), total, while_scattering, scattering: true }
    }
}

impl Waiting {
    /// A second fault on a unit waits no longer than the first.
    pub(super) fn add(&mut self, unit: PageIndex, now: Instant) {
        if self.since.len() < WAITING_MAX && self.since.iter().all(|(waited, _)| *waited != unit) {
            self.since.push((unit, now));
        }
    }

    pub(super) fn answered(&mut self, range: PageRange, now: Instant) {
        let Self { since, total, while_scattering, scattering } = self;
        since.retain(|(unit, at)| {
            let answered = range.positions().contains(&unit.as_usize());
            if answered {
                let latency = now.saturating_duration_since(*at);
                total.record(latency);
                if *scattering {
                    while_scattering.record(latency);
                }
            }
            !answered
        });
    }

    pub(super) fn forget(&mut self, range: PageRange) {
        self.since.retain(|(unit, _)| !range.positions().contains(&unit.as_usize()));
    }

    pub(super) fn longest(&self, now: Instant) -> Option<Duration> {
        self.since.iter().map(|(_, at)| now.saturating_duration_since(*at)).max()
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        self.since.capacity() * size_of::<(PageIndex, Instant)>()
    }
}
