//! Reading: where pages are is known from the books of one's own volume, or asked of the index ([`super::lookup`]); then
//! they are got where they lie, compared with their checksums, and copied to where they are needed.

use std::collections::BTreeMap;

use libsg::ids::MemberIndex;
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::vmd::{Reply, Request as LinkRequest};
use libsg::wire::{Encoding, GetEntry};
use libsg::{Error, ErrorKind, Result};

use super::engine::{BATCH_PAGES, Engine, Getting, Part, Wanted, Work};
use super::job::{Failure, JobId};
use super::lookup::LOOKUP_PAGES;
use super::stream::own;
use super::table::Known;
use super::wire::{Fault, Request};

/// How often a page of one's own is looked for: it may be written anew between being found and being got.
const TRIES_MAX: u32 = 64;

impl Engine {
    /// A read begins.
    pub fn begin_read(&mut self, job: JobId, request: &Request) {
        let pages = Self::pages_of(request);
        self.jobs.expect(job, pages.pages as usize);
        let all: Vec<Wanted> = pages.iter().map(|page| Wanted { page, merge: false, tries: 0 }).collect();
        self.todo
            .extend(all.chunks(LOOKUP_PAGES as usize).map(|some| Work::Look { job, wanted: some.to_vec() }));
    }

    /// Pages are to be found.
    pub fn look(&mut self, job: JobId, wanted: Vec<Wanted>) {
        if self.jobs.has_failed(job) {
            return self.jobs.through(job, wanted.len());
        }
        let shared = std::sync::Arc::clone(&self.shared);
        let Some(own) = shared.own() else { return self.look_up(job, wanted) };
        let found: Vec<(Wanted, Known)> = {
            let books = own.books();
            wanted.into_iter().map(|wanted| (wanted, books.table.get(wanted.page))).collect()
        };
        self.found(job, found);
    }

    /// It is known where pages are.
    pub fn found(&mut self, job: JobId, found: Vec<(Wanted, Known)>) {
        let mut by_member: BTreeMap<MemberIndex, Vec<Getting>> = BTreeMap::new();
        for (wanted, known) in found {
            match known {
                Known::Zero if wanted.merge => self.merge(job, wanted.page, known, &[0; PAGE_BYTES]),
                Known::Zero => self.read(job, wanted.page, None),
                Known::At(placement, checksum) => {
                    let getting = Getting { wanted, placement, checksum };
                    by_member.entry(placement.member).or_default().push(getting);
                }
                Known::Lost => {
                    let why = format!("block {} went with an intermediary", wanted.page.0);
                    self.jobs.fail(job, 1, Failure::new(Fault::Io, why));
                }
            }
        }
        for getting in by_member.into_values() {
            self.todo
                .extend(getting.chunks(BATCH_PAGES).map(|some| Work::Get { job, getting: some.to_vec() }));
        }
    }

    /// Pages are to be got from one member.
    pub fn get(&mut self, job: JobId, getting: Vec<Getting>) {
        if self.jobs.has_failed(job) {
            return self.jobs.through(job, getting.len());
        }
        let Some(member) = getting.first().map(|first| first.placement.member) else { return };
        let entry = |getting: &Getting| GetEntry { page: getting.wanted.page, placement: getting.placement };
        if !self.is_alive(member) || !self.connected(member) {
            return self.not_got(job, getting);
        }
        let entries: Vec<GetEntry> = getting.iter().map(entry).collect();
        let part = Part::Get { job, getting };
        if let Err((_, Part::Get { job, getting })) =
            self.links.submit(member, LinkRequest::Get(&entries), part)
        {
            let parts = self.links.close(member);
            parts.into_iter().for_each(|part| self.part_again(part));
            self.todo.push(Work::Get { job, getting });
        }
    }

    /// Pages cannot be had where they are said to be.
    fn not_got(&mut self, job: JobId, getting: Vec<Getting>) {
        if self.shared.own().is_none() {
            return self.look_again(job, getting.into_iter().map(|getting| getting.wanted));
        }
        // Where only a connection broke, the member itself is asked over a new one.
        for getting in getting {
            // It may have been written since.
            let known = Known::At(getting.placement, getting.checksum);
            let same =
                self.shared.own().is_none_or(|own| own.books().table.get(getting.wanted.page) == known);
            if same || getting.wanted.tries >= TRIES_MAX {
                let why =
                    format!("block {} is lost: its intermediary does not have it", getting.wanted.page.0);
                self.jobs.fail(job, 1, Failure::new(Fault::Io, why));
            } else {
                self.look_again(job, [getting.wanted]);
            }
        }
    }

    /// Pages are to be looked for once more: of one's own volume at once, of others' when time has passed.
    pub fn look_again(&mut self, job: JobId, wanted: impl IntoIterator<Item = Wanted>) {
        let wanted: Vec<Wanted> =
            wanted.into_iter().map(|wanted| Wanted { tries: wanted.tries + 1, ..wanted }).collect();
        if self.shared.own().is_some() {
            self.todo.push(Work::Look { job, wanted });
        } else {
            self.wait_for(job, wanted);
        }
    }

    /// A member's answer.
    pub fn got(&mut self, job: JobId, getting: Vec<Getting>, result: Result<Reply<'_>>) {
        let (entries, mut bytes) = match result {
            Ok(Reply::Pages { entries, bytes }) => (entries, bytes),
            Ok(_) => return self.not_got(job, getting),
            Err(error) => return self.not_given(job, getting, &error),
        };
        let mut missing = Vec::new();
        for (getting, entry) in getting.iter().zip(entries) {
            let (page, rest) = bytes.split_at_checked(entry.encoded_bytes.into()).unwrap_or_default();
            bytes = rest;
            let right = entry.encoding == Encoding::Raw && self.shared.matches(page, getting.checksum);
            if !right {
                missing.push(*getting);
            } else if getting.wanted.merge {
                let base = Known::At(getting.placement, getting.checksum);
                self.merge(job, getting.wanted.page, base, page);
            } else {
                self.read(job, getting.wanted.page, Some(page));
            }
        }
        if !missing.is_empty() {
            self.not_got(job, missing);
        }
    }

    fn not_given(&mut self, job: JobId, getting: Vec<Getting>, error: &Error) {
        if self.is_fatal(error) {
            return self.jobs.fail(job, getting.len(), Failure::new(Fault::Shutdown, error.chain()));
        }
        if !matches!(error.kind, ErrorKind::Fenced | ErrorKind::Volume) {
            tracing::warn!(error = error.chain(), "pages cannot be had from an intermediary");
        }
        self.not_got(job, getting);
    }

    /// A page of a read: its bytes, or `None` for zeros.
    fn read(&mut self, job: JobId, page: PageIndex, bytes: Option<&[u8]>) {
        if let Some(job) = self.jobs.get(job)
            && let Some(buffer) = &mut job.buffer
            && let Ok(to) = own(buffer)
        {
            let (offset, length) = (job.request.offset, job.request.length as usize);
            let start = u64::from(page.0) * PAGE_BYTES_U64;
            // From where in the page on, and where that goes.
            let skip = offset.saturating_sub(start) as usize;
            let at = start.saturating_sub(offset) as usize;
            let count = (PAGE_BYTES - skip).min(length - at);
            match bytes {
                Some(bytes) => to[at..at + count].copy_from_slice(&bytes[skip..skip + count]),
                None => to[at..at + count].fill(0),
            }
            job.zero &= bytes.is_none();
        }
        self.jobs.through(job, 1);
    }

    /// Whether a member of one's own volume is there; of others' volumes it is tried.
    pub fn is_alive(&self, member: MemberIndex) -> bool {
        let alive = |own: &super::shared::Own| own.books().alive().get(member.as_usize()) == Some(&true);
        self.shared.own().is_none_or(alive)
    }
}
