//! The thread that tells the index servers what was written, and gives slots back that nothing points to any more.
//!
//! Each index server has one batch at a time, of all that gathered while it had the one before: entries of one page are
//! put in their order, whatever the link does, and a write is answered without waiting for any of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::ids::MemberIndex;
use libsg::limits::{BATCH_PAGES_MAX, INDEX_ENTRIES_MAX};
use libsg::transport::wait;
use libsg::vmd::Request;
use libsg::wire::{GetEntry, IndexEntry};
use libsg::{Error, ErrorKind, Result};

use super::links::Links;
use super::shared::{Own, Shared};

/// When a server that had no room for entries is asked again.
const AGAIN: Duration = Duration::from_millis(500);

/// Ranges that are told anew before it is looked whether something else is to do.
const RANGES_AT_ONCE: usize = 64;

/// What is outstanding at a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Entries,
    Unused,
}

/// The thread's own.
struct Index<'s> {
    shared: &'s Shared,
    own: &'s Own,
    links: Links<Told>,
    /// Since when a server has no room.
    full: Vec<Option<Instant>>,
    entries: Vec<IndexEntry>,
    unused: Vec<GetEntry>,
}

/// Runs until the volume is of no further use, or all is told after the end was asked for.
///
/// # Errors
/// The kernel does not let it wait.
pub fn run(shared: &Arc<Shared>) -> Result<()> {
    let Some(own) = shared.own() else { return Ok(()) };
    let members = own.books().alive().len();
    let mut index = Index {
        shared,
        own,
        links: Links::new(shared.timeout),
        full: vec![None; members],
        entries: Vec::new(),
        unused: Vec::new(),
    };
    while !shared.has_failed() {
        own.index.drain();
        let all_told = index.tell();
        let moved = index.progress();
        if own.is_awaited() || shared.is_stopping() {
            shared.wake_all();
        }
        if shared.is_stopping() && all_told && index.links.is_idle() {
            break;
        }
        if !moved {
            index.wait()?;
        }
    }
    Ok(())
}

impl Index<'_> {
    /// Sends each server what there is for it. Returns whether nothing is left to be told.
    fn tell(&mut self) -> bool {
        let (alive, all_told) = {
            let mut books = self.own.books();
            let _ranges = (0..RANGES_AT_ONCE).take_while(|_| books.tell_anew()).count();
            books.journal.unused(&mut self.unused);
            (books.alive().to_vec(), books.journal.safe_below() == books.journal.now())
        };
        for at in (0..alive.len()).filter(|at| alive[*at]) {
            let member = MemberIndex(at as u16);
            self.tell_entries(member);
            self.give_back(member);
        }
        // Whoever is gone has given back everything.
        self.unused.retain(|slot| alive.get(slot.placement.member.as_usize()) == Some(&true));
        all_told && self.unused.is_empty()
    }

    fn tell_entries(&mut self, member: MemberIndex) {
        let full = &mut self.full[member.as_usize()];
        if full.is_some_and(|since| since.elapsed() < AGAIN) {
            return;
        }
        *full = None;
        self.own.books().journal.send(member, INDEX_ENTRIES_MAX, &mut self.entries);
        if self.entries.is_empty() {
            return;
        }
        let entries = std::mem::take(&mut self.entries);
        let asked = self.ask(member, Request::PutIndex(&entries), Told::Entries);
        self.entries = entries;
        if !asked {
            self.own.books().journal.refused(member);
        }
    }

    fn give_back(&mut self, member: MemberIndex) {
        let mut batch: Vec<GetEntry> = Vec::new();
        self.unused.retain(|slot| {
            let takes = slot.placement.member == member && batch.len() < BATCH_PAGES_MAX;
            if takes {
                batch.push(*slot);
            }
            !takes
        });
        if !batch.is_empty() && !self.ask(member, Request::Drop(&batch), Told::Unused) {
            self.unused.append(&mut batch);
        }
    }

    /// Asks a member, over a new connection if there is none.
    fn ask(&mut self, member: MemberIndex, request: Request<'_>, told: Told) -> bool {
        if !self.links.has(member) {
            match self.shared.link(member) {
                Ok(link) => self.links.open(member, link),
                Err(error) => {
                    self.shared.lost(member, &error);
                    return false;
                }
            }
        }
        // A link that has failed says so when it is looked at.
        self.links.submit(member, request, told).is_ok()
    }

    /// Returns whether anything came to its end.
    fn progress(&mut self) -> bool {
        let mut ended: Vec<(MemberIndex, Told, Result<()>)> = Vec::new();
        let broken = self.links.progress(|member, told, result| ended.push((member, told, result.map(drop))));
        let moved = !ended.is_empty() || !broken.is_empty();
        for (member, told, result) in ended {
            self.ended(member, told, result);
        }
        for broken in broken {
            // What it was told is told again, over a new connection or to who stands in for it.
            self.own.books().journal.refused(broken.member);
            if broken.gone {
                self.shared.lost(broken.member, &broken.error);
            }
        }
        moved
    }

    fn ended(&mut self, member: MemberIndex, told: Told, result: Result<()>) {
        match (told, result) {
            (Told::Entries, Ok(())) => self.own.books().journal.acknowledged(member),
            (Told::Entries, Err(error)) => self.not_taken(member, error),
            (Told::Unused, Err(error)) => {
                tracing::warn!(%member, error = error.chain(), "slots are not given back")
            }
            (Told::Unused, Ok(())) => {}
        }
    }

    fn not_taken(&mut self, member: MemberIndex, error: Error) {
        self.own.books().journal.refused(member);
        match error.kind {
            ErrorKind::Full => {
                tracing::warn!(%member, error = error.chain(), "an index server has no room; it is asked again");
                self.full[member.as_usize()] = Some(Instant::now());
            }
            ErrorKind::Fenced | ErrorKind::Volume => self.shared.fail(error),
            _ => self.shared.lost(member, &error),
        }
    }

    fn wait(&self) -> Result<()> {
        let mut on = vec![(Some(std::os::fd::AsFd::as_fd(&self.own.index)), false)];
        self.links.awaited(&mut on);
        wait(&on, AGAIN).map(drop)
    }
}
