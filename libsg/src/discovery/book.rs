//! Who is there: a pure core over the datagrams that were heard.
//!
//! A datagram counts when it is fresh (sent within [`WINDOW`], by both clocks) and newer than the last of its sender
//! (the counter of that incarnation). What is sent again by somebody else is neither. A sender is remembered until its
//! last datagram is no longer fresh, so that nothing of it can be played to us while it would be believed.
//!
//! A host that is not heard for three of its periods is gone. One that restarted is another, which takes the
//! place of whoever was at its address.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::ids::NodeId;
use crate::limits;
use crate::wire::announcement::Announcement;
use crate::wire::datagram::{Datagram, Said};

/// How far the clocks of two hosts, and a datagram's way, may be apart.
pub const WINDOW: Duration = Duration::from_secs(30);

/// The shortest time between two announcements of a host.
pub const PERIOD_MIN: Duration = Duration::from_secs(1);

/// Announcements of all hosts together, in a second: what everybody has to read.
const ALL_PER_S: u64 = 500;

/// The longest time between two announcements: what all but the largest pools stay below.
const PERIOD_MAX: Duration = Duration::from_secs(60);

/// So many periods without a word, and a host is gone.
const PERIODS: u32 = 3;

/// How often a host of a pool of so many announces itself: once a second, less often where all together would be
/// more than 500 a second.
#[must_use]
pub fn period(hosts: usize) -> Duration {
    Duration::from_millis(hosts as u64 * 1000 / ALL_PER_S).clamp(PERIOD_MIN, PERIOD_MAX)
}

/// The period, up to a quarter shorter by that random number: hosts that were started together do not stay together.
#[must_use]
pub fn jittered(period: Duration, random: u64) -> Duration {
    period - period / 4 * ((random & 0xff) as u32) / 255
}

/// Why a datagram does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Too old, or from the future: a replay, or a clock that is wrong.
    Stale,
    /// Not newer than what was heard of its sender, or of who is at its address now: a replay.
    Replayed,
    /// There are [`limits::POOL_HOSTS_MAX`] already.
    Full,
}

/// One host.
#[derive(Debug)]
struct Entry {
    host: Announcement,
    counter: u64,
    sent_ms: u64,
    /// When it is gone, unless it is heard before.
    until: Instant,
}

/// The hosts of a pool.
#[derive(Debug, Default)]
pub struct Book {
    entries: HashMap<NodeId, Entry>,
    /// Who is at an address.
    at: HashMap<SocketAddr, NodeId>,
}

impl Book {
    /// Nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a datagram that was sealed with the pool's key. `wall_ms` is our clock's milliseconds since 1970. Says
    /// whether it is of a host that was not there before.
    ///
    /// # Errors
    /// Why it does not count.
    pub fn hear(&mut self, datagram: Datagram, now: Instant, wall_ms: u64) -> Result<bool, Refusal> {
        let Datagram { counter, sent_ms, said } = datagram;
        if wall_ms.abs_diff(sent_ms) > WINDOW.as_millis() as u64 {
            return Err(Refusal::Stale);
        }
        let Said::Here { period_ms, host } = said else { return Ok(false) };
        let until = now + Duration::from_millis(period_ms.into()) * PERIODS;
        let known = self.entries.get(&host.node);
        // An incarnation keeps its address.
        if known.is_some_and(|entry| counter <= entry.counter || entry.host.address != host.address) {
            return Err(Refusal::Replayed);
        }
        let is_new = known.is_none_or(|entry| entry.until <= now);
        if known.is_none() && self.entries.len() >= limits::POOL_HOSTS_MAX {
            self.forget(now, wall_ms);
            if self.entries.len() >= limits::POOL_HOSTS_MAX {
                return Err(Refusal::Full);
            }
        }
        // A port is listened to by one process. Where nobody listens (0), many may be.
        if host.address.port() != 0 {
            let other = self.at.get(&host.address).filter(|node| **node != host.node);
            if let Some(other) = other.and_then(|node| self.entries.get_mut(node)) {
                if other.sent_ms > sent_ms {
                    return Err(Refusal::Replayed);
                }
                other.until = now;
            }
            self.at.insert(host.address, host.node.clone());
        }
        self.entries.insert(host.node.clone(), Entry { host, counter, sent_ms, until });
        Ok(is_new)
    }

    /// The hosts that are there, in the order of their names.
    #[must_use]
    pub fn hosts(&self, now: Instant) -> Vec<Announcement> {
        let mut hosts: Vec<_> =
            self.entries.values().filter(|entry| entry.until > now).map(|entry| entry.host.clone()).collect();
        hosts.sort_unstable_by(|a, b| {
            (&a.node.name, a.node.incarnation).cmp(&(&b.node.name, b.node.incarnation))
        });
        hosts
    }

    /// How many are there.
    #[must_use]
    pub fn count(&self, now: Instant) -> usize {
        self.entries.values().filter(|entry| entry.until > now).count()
    }

    /// All others are gone, whatever their periods say: whoever keeps their announcements for them has them no more.
    pub fn gone_unless(&mut self, now: Instant, is_there: impl Fn(&NodeId) -> bool) {
        for (_, entry) in self.entries.iter_mut().filter(|(node, _)| !is_there(node)) {
            entry.until = entry.until.min(now);
        }
    }

    /// Forgets who is gone, and of whom nothing could be replayed.
    pub fn forget(&mut self, now: Instant, wall_ms: u64) {
        self.entries
            .retain(|_, entry| entry.until > now || entry.sent_ms + WINDOW.as_millis() as u64 >= wall_ms);
        let entries = &self.entries;
        self.at.retain(|_, node| entries.contains_key(node));
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::announcement::test::announcement;

    const WALL_MS: u64 = 1_800_000_000_000;

    fn datagram(incarnation: u64, counter: u64, sent_ms: u64) -> Datagram {
        let mut host = announcement();
        host.node.incarnation = incarnation;
        Datagram { counter, sent_ms, said: Said::Here { period_ms: 1000, host } }
    }

    #[test]
    fn replays_do_not_count() {
        let (mut book, now) = (Book::new(), Instant::now());
        assert_eq!(book.hear(datagram(1, 5, WALL_MS), now, WALL_MS), Ok(true));
        assert_eq!(book.hear(datagram(1, 5, WALL_MS), now, WALL_MS), Err(Refusal::Replayed));
        assert_eq!(book.hear(datagram(1, 4, WALL_MS), now, WALL_MS), Err(Refusal::Replayed));
        assert_eq!(book.hear(datagram(1, 6, WALL_MS + 10), now, WALL_MS), Ok(false));
        let off = WINDOW.as_millis() as u64 + 1;
        for sent_ms in [WALL_MS - off, WALL_MS + off] {
            assert_eq!(book.hear(datagram(1, 9, sent_ms), now, WALL_MS), Err(Refusal::Stale));
            assert_eq!(book.hear(datagram(2, 9, sent_ms), now, WALL_MS), Err(Refusal::Stale));
        }
        // Gone, and still remembered for as long as its last word would be believed.
        let later = now + Duration::from_secs(10);
        assert_eq!(book.count(later), 0);
        book.forget(later, WALL_MS + 10_000);
        assert_eq!(book.hear(datagram(1, 6, WALL_MS + 10), later, WALL_MS + 10_000), Err(Refusal::Replayed));
        let much_later = now + Duration::from_secs(60);
        book.forget(much_later, WALL_MS + 60_000);
        assert!(book.entries.is_empty() && book.at.is_empty());
        assert_eq!(
            book.hear(datagram(1, 6, WALL_MS + 10), much_later, WALL_MS + 60_000),
            Err(Refusal::Stale)
        );
    }

    #[test]
    fn one_that_restarted_takes_its_place_and_the_old_one_cannot_be_played_back() {
        let (mut book, now) = (Book::new(), Instant::now());
        book.hear(datagram(1, 100, WALL_MS), now, WALL_MS).expect("new");
        assert_eq!(book.hear(datagram(2, 1, WALL_MS + 500), now, WALL_MS), Ok(true));
        assert_eq!(book.hosts(now).iter().map(|host| host.node.incarnation).collect::<Vec<_>>(), [2]);
        assert_eq!(book.hear(datagram(1, 100, WALL_MS), now, WALL_MS), Err(Refusal::Replayed));
        // One that we never heard while it lived.
        assert_eq!(book.hear(datagram(3, 7, WALL_MS + 400), now, WALL_MS), Err(Refusal::Replayed));
        assert_eq!(book.count(now), 1);
    }

    #[test]
    fn who_is_not_heard_is_gone() {
        let (mut book, now) = (Book::new(), Instant::now());
        book.hear(datagram(1, 1, WALL_MS), now, WALL_MS).expect("new");
        assert_eq!(book.count(now + Duration::from_millis(2999)), 1);
        assert_eq!(book.count(now + Duration::from_millis(3000)), 0);
        let back = now + Duration::from_secs(5);
        assert_eq!(book.hear(datagram(1, 2, WALL_MS + 5000), back, WALL_MS + 5000), Ok(true));
        assert_eq!(book.hosts(back).len(), 1);
    }

    #[test]
    fn one_that_was_taken_away_is_gone_and_cannot_be_played_back() {
        let (mut book, now) = (Book::new(), Instant::now());
        book.hear(datagram(1, 5, WALL_MS), now, WALL_MS).expect("new");
        book.gone_unless(now, |node| node.incarnation == 1);
        assert_eq!(book.count(now), 1);
        book.gone_unless(now, |node| node.incarnation != 1);
        assert_eq!(book.count(now), 0);
        assert_eq!(book.hear(datagram(1, 5, WALL_MS), now, WALL_MS), Err(Refusal::Replayed));
        assert_eq!(book.hear(datagram(1, 6, WALL_MS + 10), now, WALL_MS), Ok(true), "it is there again");
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (mut book, now) = (Book::new(), Instant::now());
        let at = |n: u32| {
            let mut datagram = datagram(n.into(), 1, WALL_MS);
            if let Said::Here { host, .. } = &mut datagram.said {
                host.address = (n.to_be_bytes(), 7701).into();
            }
            datagram
        };
        for n in 0..limits::POOL_HOSTS_MAX as u32 {
            assert_eq!(book.hear(at(n), now, WALL_MS), Ok(true));
        }
        let one_more = limits::POOL_HOSTS_MAX as u32;
        assert_eq!(book.hear(at(one_more), now, WALL_MS), Err(Refusal::Full));
        let later = now + Duration::from_secs(40);
        let mut fresh = at(one_more);
        fresh.sent_ms += 40_000;
        assert_eq!(book.hear(fresh, later, WALL_MS + 40_000), Ok(true), "those are gone");
    }

    #[test]
    fn the_period_grows_with_the_pool() {
        assert_eq!([0, 10, 500].map(period), [PERIOD_MIN; 3]);
        assert_eq!(period(10_000), Duration::from_secs(20));
        assert_eq!(period(10_000_000), PERIOD_MAX);
        assert_eq!(jittered(PERIOD_MIN, 0), PERIOD_MIN);
        assert_eq!(jittered(PERIOD_MIN, 255), PERIOD_MIN * 3 / 4);
        // Nobody is thought to be gone while it waits for its turn.
        assert!(WINDOW < PERIOD_MAX * PERIODS);
    }

    proptest! {
        /// Whatever is heard, in whatever order: a datagram is taken once.
        #[test]
        fn each_datagram_counts_once(
            heard in proptest::collection::vec((1..4_u64, 0..20_u64, 0..90_u64, 0..30_u64), 1..200)
        ) {
            let (mut book, start, mut wall_ms) = (Book::new(), Instant::now(), WALL_MS);
            let mut taken = std::collections::HashSet::new();
            for (incarnation, counter, sent_s, wait_s) in heard {
                wall_ms += wait_s * 1000;
                let now = start + Duration::from_millis(wall_ms - WALL_MS);
                let datagram = datagram(incarnation, counter, WALL_MS + sent_s * 1000);
                let key = (incarnation, counter, sent_s);
                if book.hear(datagram, now, wall_ms).is_ok() {
                    prop_assert!(taken.insert(key), "{key:?} was taken twice");
                }
                book.forget(now, wall_ms);
                prop_assert!(book.count(now) <= 1, "one address, one host");
            }
        }
    }
}
