//! Writing: whole pages are stored as they are, each in a new slot; of a page that is written in part the rest is read
//! first, and it is stored only if nobody wrote it meanwhile, else all over again. What is zero is stored nowhere.

use std::sync::Arc;
use std::time::Instant;

use libsg::ids::{Checksum, MemberIndex, MemberSet};
use libsg::memory::PageSlice;
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::vmd::{Reply, Request as LinkRequest};
use libsg::wire::PageEntry;
use libsg::{Error, ErrorKind, Result};

use super::engine::{BATCH_PAGES, Engine, LEFT_ALONE, Part, Putting, Wanted, Work};
use super::job::{Failure, JobId};
use super::table::Known;
use super::wire::{Command, Fault, Request};

/// Pages that are made zero before it is looked whether the index servers keep up.
const ZEROED_AT_ONCE: u32 = 16 << 10;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// A request's pages: those that it covers, and those of which it has a part.
struct Cover {
    whole: PageRange,
    parts: Vec<PageIndex>,
}

fn cover(request: &Request) -> Cover {
    let touched = Engine::pages_of(request);
    let first = request.offset.div_ceil(PAGE_BYTES_U64) as u32;
    let end = ((request.offset + u64::from(request.length)) / PAGE_BYTES_U64) as u32;
    let whole = PageRange::new(PageIndex(first), end.saturating_sub(first));
    let inside = |page: &PageIndex| (first..end).contains(&page.0);
    let last = PageIndex(touched.first.0 + touched.pages - 1);
    let mut parts: Vec<PageIndex> = [touched.first, last].into_iter().filter(|page| !inside(page)).collect();
    parts.dedup();
    Cover { whole, parts }
}

impl Engine {
    /// A write begins: its bytes are in the job's buffer.
    pub fn begin_write(&mut self, id: JobId, request: &Request) {
        let Cover { whole, parts } = cover(request);
        let Some(buffer) = self.jobs.get(id).and_then(|job| job.buffer.clone()) else { return };
        self.jobs.expect(id, whole.pages as usize);
        let bytes = PageSlice::owned(Arc::clone(&buffer));
        let mut putting: Vec<Putting> = Vec::with_capacity(BATCH_PAGES.min(whole.pages as usize));
        let mut zeros: Vec<PageIndex> = Vec::new();
        for page in whole.iter() {
            let at = (u64::from(page.0) * PAGE_BYTES_U64 - request.offset) as usize;
            let content = &buffer[at..at + PAGE_BYTES];
            if content == ZERO_PAGE {
                zeros.push(page);
                continue;
            }
            let Ok(bytes) = bytes.part(at, PAGE_BYTES) else {
                self.jobs.fail(id, 1, Failure::new(Fault::Io, "a write that is shorter than it says"));
                continue;
            };
            putting.push(Putting { page, checksum: Checksum::of(content), bytes, base: None });
            if putting.len() == BATCH_PAGES {
                let putting = std::mem::replace(&mut putting, Vec::with_capacity(BATCH_PAGES));
                self.todo.push(Work::Put { job: id, putting, not_at: 0 });
            }
        }
        if !putting.is_empty() {
            self.todo.push(Work::Put { job: id, putting, not_at: 0 });
        }
        if let Some(own) = self.shared.own().filter(|_| !zeros.is_empty()) {
            self.pushed = true;
            let mut books = own.books();
            for page in &zeros {
                books.write(*page, None, Known::Zero);
            }
        }
        self.jobs.through(id, zeros.len());
        self.begin_parts(id, parts);
    }

    fn begin_parts(&mut self, id: JobId, parts: Vec<PageIndex>) {
        self.jobs.expect(id, parts.len());
        let wanted: Vec<Wanted> =
            parts.into_iter().map(|page| Wanted { page, merge: true, tries: 0 }).collect();
        if !wanted.is_empty() {
            self.todo.push(Work::Look { job: id, wanted });
        }
    }

    /// Bytes are zero from now on, or of no use: then pages of which only a part is stay as they are.
    pub fn begin_zero(&mut self, id: JobId, request: &Request) {
        let Cover { whole, parts } = cover(request);
        if whole.pages > 0 {
            self.jobs.expect(id, 1);
            self.todo.push(Work::Zero { job: id, range: whole });
        }
        if request.command == Command::WriteZeroes {
            self.begin_parts(id, parts);
        }
    }

    /// Whole pages become zero, some at a time.
    pub fn zero(&mut self, id: JobId, range: PageRange) {
        let shared = Arc::clone(&self.shared);
        let Some(own) = shared.own() else { return self.jobs.through(id, 1) };
        let mut books = own.books();
        if !books.journal.has_room() {
            own.await_index();
            own.index.wake();
            drop(books);
            return self.stall(Work::Zero { job: id, range });
        }
        self.pushed = true;
        let some = range.pages.min(ZEROED_AT_ONCE);
        books.zero(PageRange::new(range.first, some));
        drop(books);
        if some == range.pages {
            return self.jobs.through(id, 1);
        }
        let rest = PageRange::new(PageIndex(range.first.0 + some), range.pages - some);
        self.todo.push(Work::Zero { job: id, range: rest });
    }

    /// A page that is written in part, and what it was.
    pub fn merge(&mut self, id: JobId, page: PageIndex, base: Known, before: &[u8]) {
        let Some(job) = self.jobs.get(id) else { return };
        let request = job.request;
        let start = u64::from(page.0) * PAGE_BYTES_U64;
        let skip = request.offset.saturating_sub(start) as usize;
        let at = start.saturating_sub(request.offset) as usize;
        let count = (PAGE_BYTES - skip).min(request.length as usize - at);
        let mut bytes: Arc<[u8]> = before.into();
        if let Some(to) = Arc::get_mut(&mut bytes) {
            match &job.buffer {
                Some(buffer) => to[skip..skip + count].copy_from_slice(&buffer[at..at + count]),
                None => to[skip..skip + count].fill(0),
            }
        }
        if bytes[..] == ZERO_PAGE {
            self.pushed = true;
            let written =
                self.shared.own().is_some_and(|own| own.books().write(page, Some(base), Known::Zero));
            return if written { self.jobs.through(id, 1) } else { self.merge_again(id, page) };
        }
        let checksum = Checksum::of(&bytes);
        let putting = vec![Putting { page, checksum, bytes: PageSlice::owned(bytes), base: Some(base) }];
        self.todo.push(Work::Put { job: id, putting, not_at: 0 });
    }

    /// Somebody wrote the page since it was read. One of those who do is always through.
    fn merge_again(&mut self, id: JobId, page: PageIndex) {
        self.todo.push(Work::Look { job: id, wanted: vec![Wanted { page, merge: true, tries: 0 }] });
    }

    /// Pages are to be stored, wherever there is room.
    pub fn put(&mut self, id: JobId, putting: Vec<Putting>, not_at: u64) {
        if self.jobs.has_failed(id) {
            return self.jobs.through(id, putting.len());
        }
        let Some(member) = self.next_member(not_at) else {
            let none = self.next_member(0).is_none();
            let failure = if none {
                Failure::new(Fault::Io, "no intermediary of the volume is left")
            } else {
                Failure::new(Fault::NoSpace, "no intermediary of the volume has room left")
            };
            return self.jobs.fail(id, putting.len(), failure);
        };
        if !self.connected(member) {
            return self.todo.push(Work::Put { job: id, putting, not_at });
        }
        let Some(round) = self.shared.own().map(|own| own.books().round()) else { return };
        let entry = |putting: &Putting| PageEntry::raw(putting.page, round, putting.checksum);
        let entries: Vec<PageEntry> = putting.iter().map(entry).collect();
        let slices: Vec<PageSlice> = putting.iter().map(|putting| putting.bytes.clone()).collect();
        let request = LinkRequest::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        let part = Part::Put { job: id, putting, not_at };
        if let Err((_, part)) = self.links.submit(member, request, part) {
            let parts = self.links.close(member);
            parts.into_iter().chain([part]).for_each(|part| self.part_again(part));
        }
    }

    /// The member with the least outstanding, those that have room first: in turn where they are alike.
    fn next_member(&mut self, not_at: u64) -> Option<MemberIndex> {
        let alive = self.shared.own()?.books().alive().to_vec();
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn;
        let members = (0..alive.len()).map(|step| (turn + step) % alive.len());
        let members =
            members.filter(|at| alive[*at] && not_at & (1 << at) == 0).map(|at| MemberIndex(at as u16));
        members.min_by_key(|member| (self.full.contains_key(member), self.links.outstanding_bytes(*member)))
    }

    /// A member's answer.
    pub fn stored(
        &mut self,
        member: MemberIndex,
        id: JobId,
        putting: Vec<Putting>,
        not_at: u64,
        result: Result<Reply<'_>>,
    ) {
        let placements = match result {
            Ok(Reply::Stored { placements, .. })
                if placements.iter().flatten().all(|at| at.member == member) =>
            {
                placements
            }
            Ok(_) => {
                let lie =
                    Error::new(ErrorKind::Protocol, "placements that are not where the pages were sent");
                self.shared.lost(member, &lie);
                return self.todo.push(Work::Put { job: id, putting, not_at });
            }
            Err(error) => return self.not_stored(member, id, putting, not_at, &error),
        };
        let mut left = Vec::new();
        let (mut through, mut again) = (0, Vec::new());
        if let Some(own) = self.shared.own() {
            self.pushed = true;
            let mut books = own.books();
            if books.alive().get(member.as_usize()) != Some(&true) {
                // Another connection found out first: what lies there is lost before it was noted.
                drop(books);
                return self.todo.push(Work::Put { job: id, putting, not_at });
            }
            for (putting, placement) in putting.into_iter().zip(placements) {
                let Some(placement) = placement else {
                    left.push(putting);
                    continue;
                };
                if books.write(putting.page, putting.base, Known::At(*placement, putting.checksum)) {
                    through += 1;
                } else {
                    books.journal.retire(putting.page, *placement);
                    again.push(putting.page);
                }
            }
        }
        self.jobs.through(id, through);
        again.into_iter().for_each(|page| self.merge_again(id, page));
        if !left.is_empty() {
            self.no_room(member, id, left, not_at);
        }
    }

    fn not_stored(
        &mut self,
        member: MemberIndex,
        id: JobId,
        putting: Vec<Putting>,
        not_at: u64,
        error: &Error,
    ) {
        if self.is_fatal(error) {
            return self.jobs.fail(id, putting.len(), Failure::new(Fault::Shutdown, error.chain()));
        }
        if error.kind != ErrorKind::Full {
            tracing::warn!(%member, error = error.chain(), "pages are not stored");
        }
        self.no_room(member, id, putting, not_at);
    }

    /// Others are asked, and for a while before this one.
    fn no_room(&mut self, member: MemberIndex, id: JobId, putting: Vec<Putting>, not_at: u64) {
        self.full.insert(member, Instant::now() + LEFT_ALONE);
        self.todo.push(Work::Put { job: id, putting, not_at: not_at | 1 << member.as_usize() });
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_request_covers_pages_and_has_parts_of_others() {
        let cover = |offset, length| {
            let request = Request { command: Command::Write, flags: 0, cookie: 0, offset, length };
            let Cover { whole, parts } = cover(&request);
            (whole.first.0, whole.pages, parts.into_iter().map(|page| page.0).collect::<Vec<_>>())
        };
        assert_eq!(cover(0, 8192), (0, 2, vec![]));
        assert_eq!(cover(100, 8192), (1, 1, vec![0, 2]));
        assert_eq!(cover(4096, 100), (1, 0, vec![1]));
        assert_eq!(cover(5000, 100), (2, 0, vec![1]));
        assert_eq!(cover(4000, 200), (1, 0, vec![0, 1]));
        assert_eq!(cover(4096, 4097), (1, 1, vec![2]));
        assert_eq!(cover(4095, 4097), (1, 1, vec![0]));
    }
}
