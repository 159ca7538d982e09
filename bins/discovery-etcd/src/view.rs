//! Who is there, by what etcd says: a pure core. A listing first, then what happens to keys from its revision on.
//!
//! A value counts when its seal is the pool's, it is fresh and newer than the last of its host ([`Book`]), and it lies
//! under its host's own key: a copy under another would outlive it.

use std::collections::HashSet;
use std::time::Instant;

use libsg::discovery::book::{Book, Refusal};
use libsg::ids::NodeId;
use libsg::limits::POOL_HOSTS_MAX;
use libsg::wire::Malformed;
use libsg::wire::announcement::Announcement;
use libsg::wire::datagram::{AnnouncementKey, DATAGRAM_BYTES_MAX, Datagram, Said};

use crate::key;
use crate::message::{KeyValue, LIST_KEYS, Listed, Watched, What};

/// Bytes of the longest key that may be a host's.
const KEY_BYTES_MAX: usize = 512;

/// Pieces of the longest listing.
const PIECES_MAX: usize = POOL_HOSTS_MAX / LIST_KEYS + 1;

/// Why a value does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Longer than any announcement, or not even bytes.
    NoValue,
    /// Nobody of this pool has said it.
    Malformed(Malformed),
    /// It is no announcement, or lies under a key that is not its host's.
    Elsewhere,
    /// It was heard before, or is too old.
    Refused(Refusal),
}

/// What to do after something was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Hear on.
    Hear,
    /// What happened in between is forgotten, or this is another store: begin with a listing.
    List,
}

/// A listing that is under way.
#[derive(Debug)]
struct Listing {
    revision: i64,
    there: HashSet<NodeId>,
    pieces: usize,
}

/// Who is there.
#[derive(Debug)]
pub struct View {
    prefix: String,
    key: AnnouncementKey,
    book: Book,
    listing: Option<Listing>,
    /// The first revision that was not heard; `None` before a listing.
    next: Option<i64>,
    warned: bool,
}

impl View {
    /// Nobody yet, in the pool with that prefix and key.
    pub fn new(prefix: &str, key: AnnouncementKey) -> Self {
        let book = Book::new();
        Self { prefix: prefix.to_owned(), key, book, listing: None, next: None, warned: false }
    }

    /// From which revision on it has to be heard; `None` where a listing is needed first.
    pub const fn next(&self) -> Option<i64> {
        self.next
    }

    /// The hosts that are there.
    pub fn hosts(&self, now: Instant) -> Vec<Announcement> {
        self.book.hosts(now)
    }

    /// Forgets who is gone.
    pub fn forget(&mut self, now: Instant, wall_ms: u64) {
        self.book.forget(now, wall_ms);
    }

    /// What is heard next is a whole listing.
    pub fn begin_listing(&mut self) {
        self.next = None;
        self.listing = Some(Listing { revision: 0, there: HashSet::new(), pieces: 0 });
    }

    /// Takes a piece of the listing. Returns the revision and key that the next piece begins with; with the last one, who
    /// was not in it is gone.
    pub fn listed(&mut self, piece: &Listed, now: Instant, wall_ms: u64) -> Option<(i64, String)> {
        for kv in &piece.kvs {
            self.take(kv, now, wall_ms);
        }
        let prefix = &self.prefix;
        let listing = self.listing.as_mut()?;
        let there = piece.kvs.iter().filter_map(|kv| key::node(prefix, &kv.key.decode(KEY_BYTES_MAX)?));
        listing.there.extend(there);
        if listing.pieces == 0 {
            listing.revision = piece.header.revision;
        }
        listing.pieces += 1;
        let last = piece.kvs.last().and_then(|kv| kv.key.decode(KEY_BYTES_MAX));
        let last = last.and_then(|key| String::from_utf8(key).ok());
        if piece.more
            && listing.pieces < PIECES_MAX
            && let Some(last) = last
        {
            return Some((listing.revision, format!("{last}\0")));
        }
        if let Some(Listing { revision, there, .. }) = self.listing.take() {
            self.book.gone_unless(now, |node| there.contains(node));
            self.next = Some(revision.saturating_add(1));
        }
        None
    }

    /// Takes a message of the watch.
    pub fn watched(&mut self, message: &Watched, now: Instant, wall_ms: u64) -> Next {
        let Some(next) = self.next else { return Next::List };
        let is_behind = message.header.revision.saturating_add(1) < next;
        if message.canceled || (message.created && is_behind) {
            // It would wait for a revision that is far off, and tell nothing until then.
            self.next = None;
            return Next::List;
        }
        for event in &message.events {
            match event.what {
                What::Put => self.take(&event.kv, now, wall_ms),
                What::Delete => {
                    let key = event.kv.key.decode(KEY_BYTES_MAX);
                    if let Some(gone) = key.and_then(|key| key::node(&self.prefix, &key)) {
                        self.book.gone_unless(now, |node| *node != gone);
                    }
                }
            }
        }
        let heard = match message.events.last() {
            Some(last) => last.kv.mod_revision,
            None if message.created => 0,
            None => message.header.revision,
        };
        self.next = Some(next.max(heard.saturating_add(1)));
        Next::Hear
    }

    /// Takes what a key holds. Who may write there may write anything: the log is not filled with it.
    fn take(&mut self, kv: &KeyValue, now: Instant, wall_ms: u64) {
        match self.heard(kv, now, wall_ms) {
            // A listing says again what was heard.
            Ok(()) | Err(Why::Refused(Refusal::Replayed)) => {}
            Err(why) if !std::mem::replace(&mut self.warned, true) => {
                let key = kv.key.decode(KEY_BYTES_MAX).unwrap_or_default();
                let key = String::from_utf8_lossy(&key).into_owned();
                tracing::warn!(key, ?why, "a key in etcd is not of this pool; further ones are not logged");
            }
            Err(why) => tracing::debug!(?why, "a key in etcd does not count"),
        }
    }

    fn heard(&mut self, kv: &KeyValue, now: Instant, wall_ms: u64) -> Result<(), Why> {
        let value = kv.value.decode(DATAGRAM_BYTES_MAX).ok_or(Why::NoValue)?;
        let datagram = Datagram::decode(&value, &self.key).map_err(Why::Malformed)?;
        let Said::Here { host, .. } = &datagram.said else { return Err(Why::Elsewhere) };
        let own = key::of(&self.prefix, &host.node);
        if kv.key.decode(KEY_BYTES_MAX).as_deref() != Some(own.as_bytes()) {
            return Err(Why::Elsewhere);
        }
        self.book.hear(datagram, now, wall_ms).map(drop).map_err(Why::Refused)
    }
}

#[cfg(test)]
pub mod test;
