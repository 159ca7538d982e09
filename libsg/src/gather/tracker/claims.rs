//! Who may install a unit, and what is in place.

use std::time::Instant;

use super::{Claim, Path, Tracker};
use crate::gather::books::{Kind, State};
use crate::ids::Round;
use crate::page::{PageIndex, PageRange};

impl Tracker {
    /// Asks to install the unit of a page with bytes of `round`.
    pub fn claim(&mut self, page: PageIndex, round: Round) -> Claim {
        let Some(unit) = self.unit(page) else { return Claim::Held };
        let state = self.states[unit.first.as_usize()];
        let settled = match state.kind() {
            Kind::Installed => !self.replaces,
            kind => matches!(kind, Kind::Removed | Kind::Lost),
        };
        if self.closed || settled || state.is_installing() || self.is_stopped() {
            return Claim::Held;
        }
        let stale = |page: usize| match self.states[page].kind() {
            // All of a unit of one page is zero: bytes of the same round are older news.
            Kind::Zero if unit.pages == 1 => round.0 <= self.rounds[page],
            // Whoever came first with a round has installed it.
            Kind::Installed => round.0 <= self.rounds[page],
            _ => round.0 < self.rounds[page],
        };
        if unit.positions().any(stale) {
            return Claim::Held;
        }
        let replaces = self.replaces;
        self.change(unit, |state| {
            if replaces {
                // What is required meanwhile is told apart when it is in place.
                state.learn(Kind::Missing);
            }
            state.install();
        });
        if self.replaces {
            for of in &mut self.rounds[unit.positions()] {
                if *of != round.0 {
                    *of = round.0;
                }
            }
        }
        Claim::Install(unit)
    }

    /// Asks to install the unit of a page with zeros, because somebody waits for it.
    pub fn claim_zero(&mut self, page: PageIndex) -> Claim {
        let Some(unit) = self.unit(page) else { return Claim::Held };
        let zero = |page: usize| {
            let state = self.states[page];
            !state.is_installing() && matches!(state.kind(), Kind::Zero | Kind::Removed)
        };
        if self.closed || !unit.positions().all(zero) {
            return Claim::Held;
        }
        // A page that was given up and is given up again while it is installed must stay so.
        self.change(unit, |state| {
            state.learn(Kind::Zero);
            state.install();
        });
        Claim::Install(unit)
    }

    /// Claimed units are in place. `range` consists of whole units.
    pub fn installed(&mut self, range: PageRange, path: Path, now: Instant) {
        match path {
            Path::Direct => self.direct += u64::from(range.pages),
            Path::Staged => self.staged += u64::from(range.pages),
            Path::Zero => {}
        }
        self.early.note(range);
        let mut waited = false;
        for page in range.positions() {
            self.tally(page, false);
            let state = &mut self.states[page];
            waited |= state.is_waiting();
            state.settle(match state.kind() {
                Kind::Removed => Kind::Removed,
                Kind::Suspect if self.replaces => Kind::Missing,
                _ => Kind::Installed,
            });
            self.tally(page, true);
        }
        if waited {
            self.waiting.answered(range, now);
        }
    }

    /// Another process may go on with what is in place, and knows nothing of these books: what is only known to be zero is not
    /// held as far as the source is concerned.
    pub fn outlive(&mut self) {
        self.outlived = true;
    }

    /// Whether somebody is at the page.
    #[must_use]
    pub fn is_installing(&self, page: PageIndex) -> bool {
        self.states.get(page.as_usize()).is_some_and(|state| state.is_installing())
    }

    /// These were in place before this gather began. Parts of units are left alone.
    pub fn in_place(&mut self, range: PageRange) {
        let end = range.positions().end.min(self.states.len());
        let mut page = range.first;
        while page.as_usize() < end {
            let Some(unit) = self.unit(page) else { return };
            if unit.first == page && unit.positions().end <= end {
                self.change(unit, |state| state.settle(Kind::Installed));
            }
            page = PageIndex(unit.first.0 + unit.pages);
        }
    }

    /// A claimed unit could not be installed.
    pub fn unclaim(&mut self, range: PageRange) {
        self.change(range, State::uninstall);
    }
}
