//! Where pages of a volume are that others may write: every member is asked what its index knows, and the newest round
//! holds. What nobody knows was not written yet; it is never taken for zero.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::Result;
use libsg::ids::MemberIndex;
use libsg::limits::INDEX_ENTRIES_MAX;
use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::vmd::{Reply, Request as LinkRequest};
use libsg::wire::IndexEntry;

use super::engine::{Engine, Part, Wanted, Work};
use super::job::{Failure, JobId};
use super::shared::Unwritten;
use super::table::Known;
use super::wire::{Extent, Fault, Request, flag};

/// Pages that are looked up at once: no answer is cut off.
pub const LOOKUP_PAGES: u32 = INDEX_ENTRIES_MAX as u32;

/// How often a page is looked for where it is not worth waiting: between being found and being got it may be replaced.
const TRIES_MAX: u32 = 3;

/// How long it is waited the first time; a little longer each time after, up to so often that.
const WAIT: Duration = Duration::from_millis(20);
const WAITS_MAX: u32 = 25;

/// Extents in one answer. Fewer than there are is allowed; clients ask on.
const EXTENTS_MAX: usize = 1024;

/// A question to all members.
pub struct Lookup {
    job: JobId,
    range: PageRange,
    /// `None`: extents are asked for.
    wanted: Option<Vec<Wanted>>,
    best: Vec<Option<IndexEntry>>,
    /// Members that have not answered.
    open: usize,
    /// Some member did not say what it knows.
    failed: bool,
}

impl Engine {
    /// Pages are to be looked up, of at most [`LOOKUP_PAGES`] from the first to the last.
    pub fn look_up(&mut self, job: JobId, wanted: Vec<Wanted>) {
        let first = wanted.iter().map(|wanted| wanted.page.0).min().unwrap_or(0);
        let last = wanted.iter().map(|wanted| wanted.page.0).max().unwrap_or(0);
        self.ask_members(job, PageRange::new(PageIndex(first), last - first + 1), Some(wanted));
    }

    fn ask_members(&mut self, job: JobId, range: PageRange, wanted: Option<Vec<Wanted>>) {
        let Some(members) = self.shared.view().map(|view| view.volume().members().len()) else { return };
        let number = self.next_lookup;
        self.next_lookup += 1;
        let best = vec![None; range.pages as usize];
        self.lookups.insert(number, Lookup { job, range, wanted, best, open: 1, failed: false });
        let mut asked = false;
        for member in (0..members).map(|at| MemberIndex(at as u16)) {
            if !self.connected(member) {
                continue;
            }
            let part = Part::Locate { lookup: number };
            match self.links.submit(member, LinkRequest::Locate(range), part) {
                Ok(()) => {
                    asked = true;
                    self.lookups.get_mut(&number).into_iter().for_each(|lookup| lookup.open += 1);
                }
                Err(_) => {
                    let parts = self.links.close(member);
                    parts.into_iter().for_each(|part| self.part_again(part));
                    self.lookups.get_mut(&number).into_iter().for_each(|lookup| lookup.failed = true);
                }
            }
        }
        if let Some(lookup) = self.lookups.get_mut(&number) {
            lookup.failed |= !asked;
        }
        self.answered(number);
    }

    /// A member's answer.
    pub fn located(&mut self, number: u64, result: Result<Reply<'_>>) {
        if let Err(error) = &result {
            self.is_fatal(error);
        }
        let Some(lookup) = self.lookups.get_mut(&number) else { return };
        match result {
            Ok(Reply::Located(entries)) => entries.iter().for_each(|entry| lookup.learn(entry)),
            Ok(_) | Err(_) => lookup.failed = true,
        }
        self.answered(number);
    }

    fn answered(&mut self, number: u64) {
        let Some(lookup) = self.lookups.get_mut(&number) else { return };
        lookup.open -= 1;
        if lookup.open > 0 {
            return;
        }
        let Some(lookup) = self.lookups.remove(&number) else { return };
        match lookup {
            Lookup { job, wanted: Some(wanted), failed: true, .. } => self.look_again(job, wanted),
            Lookup { job, range, wanted: None, failed: true, .. } => self.extents_later(job, range),
            Lookup { job, range, wanted: None, best, .. } => {
                let zero = |entry: Option<&IndexEntry>| entry.is_some_and(|entry| entry.placement.is_none());
                let runs = best.iter().map(|entry| (1, zero(entry.as_ref())));
                self.tell_extents(job, range.first, &join(runs));
            }
            Lookup { job, range, wanted: Some(wanted), best, .. } => {
                let entry = |page: PageIndex| best.get((page.0 - range.first.0) as usize).copied().flatten();
                let (known, unwritten): (Vec<Wanted>, Vec<Wanted>) =
                    wanted.into_iter().partition(|wanted| entry(wanted.page).is_some());
                let known =
                    known.into_iter().filter_map(|wanted| Some((wanted, known_of(&entry(wanted.page)?))));
                self.found(job, known.collect());
                if !unwritten.is_empty() {
                    self.unwritten(job, unwritten);
                }
            }
        }
    }

    /// Nobody knows of these pages.
    fn unwritten(&mut self, job: JobId, wanted: Vec<Wanted>) {
        if self.waits_in_vain() {
            let page = wanted.first().map_or(0, |wanted| wanted.page.0);
            let why = format!("block {page} is not written, and --unwritten says that this is an error");
            return self.jobs.fail(job, wanted.len(), Failure::new(Fault::Io, why));
        }
        self.look_again(job, wanted);
    }

    fn waits_in_vain(&self) -> bool {
        self.shared.unwritten == Unwritten::Error || self.shared.view().is_some_and(|view| view.is_complete())
    }

    /// Pages that cannot be had now are looked for again later, unless the time is up.
    pub fn wait_for(&mut self, id: JobId, wanted: Vec<Wanted>) {
        let Some(job) = self.jobs.get(id) else { return };
        let late = job.begun.elapsed() >= self.shared.timeout;
        let tries = wanted.iter().map(|wanted| wanted.tries).max().unwrap_or(0);
        if late || (self.waits_in_vain() && tries >= TRIES_MAX) {
            let page = wanted.first().map_or(0, |wanted| wanted.page.0);
            let why =
                format!("block {page} was not to be had: not written yet, or lost with an intermediary");
            return self.jobs.fail(id, wanted.len(), Failure::new(Fault::Io, why));
        }
        let at = Instant::now() + WAIT * tries.clamp(1, WAITS_MAX);
        self.later.push((at, Work::Look { job: id, wanted }));
    }

    /// A question for extents begins.
    pub fn begin_extents(&mut self, job: JobId, request: &Request) {
        self.jobs.expect(job, 1);
        self.todo.push(Work::Extents { job, range: Self::pages_of(request) });
    }

    /// Which pages are zero, from the books or from the index.
    pub fn extents(&mut self, job: JobId, range: PageRange) {
        let shared = Arc::clone(&self.shared);
        let Some(own) = shared.own() else {
            return self.ask_members(job, PageRange::new(range.first, range.pages.min(LOOKUP_PAGES)), None);
        };
        let mut runs = Vec::new();
        let mut at = range.first.0;
        let end = range.first.0 + range.pages;
        let books = own.books();
        for (page, _) in books.table.filled(range) {
            runs.push((page.0 - at, true));
            runs.push((1, false));
            at = page.0 + 1;
        }
        drop(books);
        runs.push((end - at, true));
        self.tell_extents(job, range.first, &join(runs));
    }

    fn extents_later(&mut self, id: JobId, range: PageRange) {
        let Some(job) = self.jobs.get(id) else { return };
        if job.begun.elapsed() >= self.shared.timeout {
            return self.jobs.fail(id, 1, Failure::new(Fault::Io, "no intermediary says what it knows"));
        }
        self.later.push((Instant::now() + WAIT * WAITS_MAX, Work::Extents { job: id, range }));
    }

    /// Runs of pages from `first` on become extents of the bytes that were asked for.
    fn tell_extents(&mut self, id: JobId, first: PageIndex, runs: &[(u32, bool)]) {
        if let Some(job) = self.jobs.get(id) {
            let (from, end) = (job.request.offset, job.request.offset + u64::from(job.request.length));
            let most = if job.request.flags & flag::ONE_EXTENT != 0 { 1 } else { EXTENTS_MAX };
            let mut at = u64::from(first.0) * PAGE_BYTES_U64;
            for (pages, zero) in runs {
                let next = at + u64::from(*pages) * PAGE_BYTES_U64;
                let bytes = next.min(end).saturating_sub(at.max(from));
                if bytes > 0 && job.extents.len() < most {
                    job.extents.push(Extent { bytes: bytes as u32, zero: *zero });
                }
                at = next;
            }
        }
        self.jobs.through(id, 1);
    }
}

impl Lookup {
    /// Of what several members say, the newest round holds; and the last of one round.
    fn learn(&mut self, entry: &IndexEntry) {
        for page in entry.range().iter() {
            let at = page.0.checked_sub(self.range.first.0).map(|at| at as usize);
            let Some(best) = at.and_then(|at| self.best.get_mut(at)) else { continue };
            if best.is_none_or(|known| known.round <= entry.round) {
                *best = Some(IndexEntry { page, run_pages: 1, ..*entry });
            }
        }
    }
}

/// Neighbouring runs that are alike, as one.
fn join(runs: impl IntoIterator<Item = (u32, bool)>) -> Vec<(u32, bool)> {
    let mut joined: Vec<(u32, bool)> = Vec::new();
    for (pages, zero) in runs.into_iter().filter(|(pages, _)| *pages > 0) {
        match joined.last_mut() {
            Some((before, alike)) if *alike == zero => *before += pages,
            _ => joined.push((pages, zero)),
        }
    }
    joined
}

/// An entry as what is known.
fn known_of(entry: &IndexEntry) -> Known {
    entry.placement.map_or(Known::Zero, |placement| Known::At(placement, entry.checksum))
}

#[cfg(test)]
mod test {
    use libsg::ids::Round;

    use super::super::job::{Job, Jobs};
    use super::super::wire::Command;
    use super::*;

    #[test]
    fn runs_are_joined() {
        assert_eq!(join([(0, true), (1, false), (2, false), (0, true), (3, true)]), [(3, false), (3, true)]);
    }

    #[test]
    fn the_newest_round_holds_and_what_is_not_known_stays_so() {
        let range = PageRange::new(PageIndex(10), 4);
        let mut jobs = Jobs::default();
        let request = Request { command: Command::Read, flags: 0, cookie: 0, offset: 0, length: 1 };
        let job = jobs.add(Job::new(request, None));
        let best = vec![None; 4];
        let mut lookup = Lookup { job, range, wanted: None, best, open: 1, failed: false };
        lookup.learn(&IndexEntry::zero(PageIndex(9), 3, Round(2)));
        lookup.learn(&IndexEntry::zero(PageIndex(11), 2, Round(1)));
        let rounds: Vec<_> = lookup.best.iter().map(|entry| entry.map(|entry| entry.round.0)).collect();
        assert_eq!(rounds, [Some(2), Some(2), Some(1), None]);
    }
}
