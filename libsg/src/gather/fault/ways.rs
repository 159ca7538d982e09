//! The ways to a page that is wanted, and which of them are worth taking now.

use std::time::{Duration, Instant};

use super::pending::{Asked, Pending};
use super::{SILENCE, WISHES_AT_ONCE, Worker, read_removals};
use crate::error::Result;
use crate::gather::tracker::{Claim, Path, Wanted};
use crate::host;
use crate::ids::{MemberIndex, Sequence};
use crate::page::PageRange;
use crate::vmd::{Link, Request, Ticket};
use crate::wire::entry::encode_table;
use crate::wire::placement::index_turn;
use crate::wire::{Header, Kind};

/// The same is asked again, of who did not answer, after so long.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Worker<'_> {
    /// Takes up what only the source can have.
    pub(super) fn take_wishes(&mut self) {
        if self.source.is_none() || self.pending.len() >= WISHES_AT_ONCE {
            return;
        }
        self.shared.take_wishes(&mut self.wishes);
        let now = host::now();
        for page in &self.wishes {
            let Some(unit) = self.shared.tracker.lock().unit(*page) else { continue };
            match self.pending.iter_mut().find(|pending| pending.unit == unit) {
                None => self.pending.push(Pending::new(unit, false, now)),
                // The source said once that it has it not, and something has come of the page since.
                Some(pending) if pending.source_refused => {
                    (pending.source_refused, pending.try_at) = (false, now);
                }
                Some(_) => {}
            }
        }
    }

    /// Takes every way for a unit that is worth taking now.
    pub(super) fn advance(&mut self, at: usize, now: Instant) -> Result<()> {
        let unit = self.pending[at].unit;
        let wanted = self.shared.tracker.lock().look(unit, &mut self.reads);
        self.pending[at].try_at = now + SILENCE;
        match wanted {
            Wanted::Held => self.pending[at].done = true,
            Wanted::Zero => {
                self.install_zero(unit)?;
                self.pending[at].done = true;
            }
            Wanted::Lost => {
                // It was poisoned when it was lost; who came in between is woken by doing it again.
                if self.pending[at].guest {
                    self.shared.sink.poison(unit)?;
                }
                self.pending[at].done = true;
            }
            Wanted::Read(member) => {
                let reads = self.read(at, member, now);
                if !reads || self.pending[at].read.is_silent(now, SILENCE) {
                    self.other_ways(at, now);
                }
            }
            Wanted::Unknown => self.other_ways(at, now),
        }
        Ok(())
    }

    /// Reads a unit where it lies, unless that is under way. `false`: there is no way there.
    fn read(&mut self, at: usize, member: MemberIndex, now: Instant) -> bool {
        let pending = &mut self.pending[at];
        let same =
            pending.read.ticket.is_some_and(|(asked, _)| asked == member) && pending.reads == self.reads;
        if pending.read.is_out() && same {
            return true;
        }
        let Some(seat) = self.seats.get_mut(member.as_usize()) else { return false };
        let Some(link) = &mut seat.link else { return false };
        match submit(&mut **link, self.gets.known(&self.reads)) {
            Ok(ticket) => {
                seat.out += 1;
                pending.read = Asked { since: Some(now), ticket: Some((member, ticket)), sequence: 0 };
                pending.reads.clone_from(&self.reads);
                true
            }
            Err(error) => {
                self.drop_link(member.as_usize(), &error);
                false
            }
        }
    }

    /// Asks the source; where it is away, silent, or has it no more, the index.
    fn other_ways(&mut self, at: usize, now: Instant) {
        let asks_source = self.ask_source(at, now);
        if !asks_source || self.pending[at].source.is_silent(now, SILENCE) {
            self.ask_index(at, now);
        }
    }

    fn ask_source(&mut self, at: usize, now: Instant) -> bool {
        let pending = &mut self.pending[at];
        let Some(line) = self.source.as_mut().filter(|_| !pending.source_refused) else { return false };
        if pending.source.is_out() && !pending.source.is_silent(now, ASK_AGAIN) {
            return true;
        }
        if pending.source_at.is_some_and(|at| now.saturating_duration_since(at) < SILENCE) {
            // It answered just now, and that did not help.
            return false;
        }
        line.sequence += 1;
        let sequence = line.sequence;
        self.table.clear();
        encode_table([pending.unit.first], &mut self.table);
        let header = Header { sequence: Sequence(sequence), count: 1, ..line.channel.header(Kind::Fault) };
        if let Err(error) = line.outbox.push_frame(header, &self.table, []) {
            tracing::error!(error = error.chain(), "a fault could not be asked for");
            return false;
        }
        line.write_by(now);
        pending.source = Asked { since: Some(now), sequence, ticket: None };
        pending.source_at = Some(now);
        true
    }

    fn ask_index(&mut self, at: usize, now: Instant) {
        let members = self.seats.len();
        let pending = &self.pending[at];
        if pending.index.is_out() && !pending.index.is_silent(now, SILENCE) {
            return;
        }
        let first = pending.unit.first;
        let from = pending.rotation + usize::from(pending.index.is_out());
        for turn in from..from + members {
            let Some(member) = index_turn(first, turn, members) else { return };
            let seat = &mut self.seats[member.as_usize()];
            let Some(link) = &mut seat.link else { continue };
            match submit(&mut **link, Request::Locate(self.pending[at].unit)) {
                Ok(ticket) => {
                    seat.out += 1;
                    let ticket = Some((member, ticket));
                    self.pending[at].index = Asked { since: Some(now), ticket, sequence: 0 };
                    self.pending[at].rotation = turn;
                    return;
                }
                Err(error) => self.drop_link(member.as_usize(), &error),
            }
        }
    }

    fn install_zero(&mut self, unit: PageRange) -> Result<()> {
        if self.shared.tracker.lock().claim_zero(unit.first) != Claim::Held {
            let shared = self.shared;
            shared.install(unit, None, &mut || read_removals(shared))?;
            shared.tracker.lock().installed(unit, Path::Zero, host::now());
            shared.progressed();
        }
        Ok(())
    }
}

fn submit(link: &mut dyn Link, request: Request<'_>) -> Result<Ticket> {
    let ticket = link.submit(request)?;
    link.progress(usize::MAX)?;
    Ok(ticket)
}
