//! A list that only grows, and is read without a lock: members of a volume are only added.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::ids::MemberIndex;
use crate::limits::MEMBERS_MAX;

/// What there is for each member, in their order.
#[derive(Debug)]
pub struct Roster<T> {
    seats: Box<[OnceLock<T>]>,
    count: AtomicUsize,
    adding: Mutex<()>,
}

impl<T> Roster<T> {
    /// With these to begin with; those beyond [`MEMBERS_MAX`] are left out.
    #[must_use]
    pub fn new(first: impl IntoIterator<Item = T>) -> Self {
        let seats = (0..MEMBERS_MAX).map(|_| OnceLock::new()).collect();
        let roster = Self { seats, count: AtomicUsize::new(0), adding: Mutex::new(()) };
        for one in first {
            let _ = roster.add(one);
        }
        roster
    }

    /// Adds one; `None` where there is no room for more.
    pub fn add(&self, one: T) -> Option<MemberIndex> {
        let _adding = self.adding.lock();
        let at = self.count.load(Ordering::Acquire);
        self.seats.get(at)?.set(one).ok()?;
        // Whoever sees the number sees who it counts.
        self.count.store(at + 1, Ordering::Release);
        Some(MemberIndex(at as u16))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What there is for a member, if it is one.
    #[must_use]
    pub fn get(&self, member: MemberIndex) -> Option<&T> {
        self.seats.get(member.as_usize())?.get()
    }

    /// All, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.seats[..self.len()].iter().filter_map(OnceLock::get)
    }
}

impl<T> std::ops::Index<MemberIndex> for Roster<T> {
    type Output = T;

    /// # Panics
    /// For one that is no member: whose number comes from a peer is asked of [`Self::get`].
    fn index(&self, member: MemberIndex) -> &T {
        self.get(member).expect("a member")
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn it_grows_while_it_is_read_and_has_an_end() {
        let roster = Roster::new([0]);
        assert_eq!((roster.len(), roster[MemberIndex(0)], roster.get(MemberIndex(1))), (1, 0, None));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (1..MEMBERS_MAX).for_each(|at| assert_eq!(roster.add(at), Some(MemberIndex(at as u16))))
            });
            while roster.len() < MEMBERS_MAX {
                let seen = roster.len();
                assert!(roster.iter().take(seen).copied().eq(0..seen));
            }
        });
        assert_eq!(roster.add(99), None);
        assert!(roster.get(MemberIndex(MEMBERS_MAX as u16)).is_none() && !roster.is_empty());
    }
}
