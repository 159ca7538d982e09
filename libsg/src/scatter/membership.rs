//! Who the volume's members are, and who knows. Members are only added, in the place of those that died; until somebody
//! who outlives the source knows of a new one, nothing that lies there could be found again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::roster::Roster;
use crate::error::Result;
use crate::ids::MemberIndex;
use crate::transport::Waker;
use crate::wire::GetEntry;
use crate::wire::message::Member;

/// What the source has of one member.
#[derive(Debug)]
pub struct MemberBooks {
    /// Who it is.
    pub member: Member,
    /// Of its sink.
    pub waker: Arc<Waker>,
    /// Page bytes sent there.
    pub staged: AtomicU64,
    /// Slots that it shall have back.
    pub given_up: Mutex<Vec<GetEntry>>,
    /// How many members it knows of.
    pub knows: AtomicUsize,
}

/// The members of the volume, dead ones included.
#[derive(Debug)]
pub struct Membership {
    books: Roster<MemberBooks>,
    /// How many there were when the volume was created: all ends know these.
    first: usize,
    /// Of how many the destination is known to know.
    destination_knows: AtomicUsize,
    /// There is no destination yet.
    is_parked: AtomicBool,
}

impl Membership {
    /// Members with whom the volume was created.
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] when the kernel gives no event descriptors.
    pub fn new(members: Vec<Member>) -> Result<Self> {
        let first = members.len();
        let books = members.into_iter().map(|member| MemberBooks::new(member, first));
        let books = Roster::new(books.collect::<Result<Vec<_>>>()?);
        Ok(Self {
            books,
            first,
            destination_knows: AtomicUsize::new(first),
            is_parked: AtomicBool::new(false),
        })
    }

    /// Takes one more, on which the volume was created with all of them and itself as members. `None` where there is no
    /// room for it.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn add(&self, member: Member) -> Result<Option<MemberIndex>> {
        let knows = self.books.len() + 1;
        Ok(self.books.add(MemberBooks::new(member, knows)?))
    }

    /// What there is of each, in their order.
    #[must_use]
    pub const fn books(&self) -> &Roster<MemberBooks> {
        &self.books
    }

    /// All of them, in their order.
    #[must_use]
    pub fn list(&self) -> Vec<Member> {
        self.books.iter().map(|books| books.member.clone()).collect()
    }

    /// How many there were when the volume was created.
    #[must_use]
    pub const fn first(&self) -> usize {
        self.first
    }

    /// A member knows of so many.
    pub fn member_knows(&self, member: MemberIndex, of: usize) {
        self.books[member].knows.fetch_max(of, Ordering::AcqRel);
    }

    /// The destination knows of so many.
    pub fn destination_knows(&self, of: usize) {
        self.destination_knows.fetch_max(of, Ordering::AcqRel);
    }

    /// There is no destination yet: whoever claims the VM later asks all hosts that it knows of, and begins with any of them.
    pub fn park(&self) {
        self.is_parked.store(true, Ordering::Release);
    }

    /// Of how many the destination knows, as far as is known here.
    #[cfg(feature = "simulation")]
    #[must_use]
    pub fn known_to_destination(&self) -> usize {
        self.destination_knows.load(Ordering::Acquire)
    }

    /// Whether what lies at a member can be found without the source, though all but one of so many more die: the
    /// destination knows of it, or every other member that lives does, of whom the destination knows so many at least, and
    /// each of them is asked then.
    #[must_use]
    pub fn is_known(
        &self,
        member: MemberIndex,
        asked_least: usize,
        is_dead: impl Fn(MemberIndex) -> bool,
    ) -> bool {
        let needed = member.as_usize() + 1;
        let asked = self.first.max(self.destination_knows.load(Ordering::Acquire));
        let is_parked = self.is_parked.load(Ordering::Acquire);
        if needed <= asked {
            return true;
        }
        let others = self.books.iter().enumerate().map(|(at, books)| (MemberIndex(at as u16), books));
        let living: Vec<_> = others.filter(|(at, _)| *at != member && !is_dead(*at)).collect();
        let are_asked = living.iter().filter(|(at, _)| at.as_usize() < asked).count();
        (is_parked || are_asked >= asked_least)
            && living.iter().all(|(_, books)| books.knows.load(Ordering::Acquire) >= needed)
    }

    /// Whether that is so of every member that lives, each asked for by as many as `asked_least` says: whoever knew of one
    /// may have died since it came.
    #[must_use]
    pub fn are_known(
        &self,
        asked_least: impl Fn(MemberIndex) -> usize,
        is_dead: impl Fn(MemberIndex) -> bool,
    ) -> bool {
        let added = (self.first..self.books.len()).map(|at| MemberIndex(at as u16));
        added.filter(|at| !is_dead(*at)).all(|at| self.is_known(at, asked_least(at), &is_dead))
    }
}

impl MemberBooks {
    fn new(member: Member, knows: usize) -> Result<Self> {
        Ok(Self {
            member,
            waker: Arc::new(Waker::new()?),
            staged: AtomicU64::new(0),
            given_up: Mutex::new(Vec::new()),
            knows: AtomicUsize::new(knows),
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::NodeId;

    fn member(number: u16) -> Member {
        let node = NodeId { name: format!("i{number}"), incarnation: number.into() };
        Member { node, address: ([127, 0, 0, 1], 1000 + number).into() }
    }

    #[test]
    fn a_new_one_is_known_when_all_who_live_know_it_or_the_destination_does() {
        let members = Membership::new(vec![member(0), member(1), member(2)]).expect("event descriptors");
        let new = members.add(member(3)).expect("event descriptor").expect("room");
        assert_eq!((new, members.list().len(), members.first()), (MemberIndex(3), 4, 3));
        let dead = |dead: &'static [u16]| move |at: MemberIndex| dead.contains(&at.0);
        assert!(members.is_known(MemberIndex(2), 1, dead(&[])), "it was there from the beginning");
        assert!(!members.is_known(new, 1, dead(&[0])));
        members.member_knows(MemberIndex(1), 4);
        assert!(!members.is_known(new, 1, dead(&[0])), "one of two");
        assert!(members.is_known(new, 1, dead(&[0, 2])));
        members.member_knows(MemberIndex(2), 4);
        assert!(members.is_known(new, 1, dead(&[0])));
        assert!(!members.is_known(new, 1, dead(&[0, 1, 2])), "nobody else is left");
        // The next one is not known by that.
        let next = members.add(member(4)).expect("event descriptor").expect("room");
        assert!(!members.is_known(next, 1, dead(&[0])));
        assert!(members.are_known(|_| 1, dead(&[0, 4])) && !members.are_known(|_| 1, dead(&[0])));
        assert!(!members.are_known(|_| 1, dead(&[0, 1, 2, 4])), "those who knew died since");
        members.member_knows(MemberIndex(3), 5);
        assert!(
            !members.are_known(|_| 1, dead(&[0, 1, 2])),
            "they know of each other, and the destination of neither"
        );
        members.destination_knows(5);
        assert!(members.is_known(new, 1, dead(&[0, 1, 2])) && members.is_known(next, 1, dead(&[0, 1, 2])));
    }

    #[test]
    fn so_many_that_the_destination_knows_are_to_know_as_may_die_and_one() {
        let members = Membership::new(vec![member(0), member(1), member(2)]).expect("event descriptors");
        let new = members.add(member(3)).expect("event descriptor").expect("room");
        let dead = |dead: &'static [u16]| move |at: MemberIndex| dead.contains(&at.0);
        members.member_knows(MemberIndex(1), 4);
        members.member_knows(MemberIndex(2), 4);
        assert!(members.is_known(new, 2, dead(&[0])) && !members.is_known(new, 3, dead(&[0])));
        assert!(!members.is_known(new, 2, dead(&[0, 1])) && members.is_known(new, 1, dead(&[0, 1])));
        assert!(members.are_known(|_| 2, dead(&[0])) && !members.are_known(|_| 2, dead(&[0, 1])));
        members.destination_knows(4);
        assert!(members.is_known(new, 3, dead(&[0, 1, 2])));
    }

    #[test]
    fn of_a_parked_vm_all_that_live_are_to_know_whoever_they_are() {
        let members = Membership::new(vec![member(0)]).expect("event descriptors");
        members.park();
        let new = members.add(member(1)).expect("event descriptor").expect("room");
        let next = members.add(member(2)).expect("event descriptor").expect("room");
        assert!(!members.is_known(new, 1, |_| false) && !members.is_known(next, 1, |at| at.0 == 0));
        members.member_knows(new, 3);
        assert!(members.is_known(next, 1, |at| at.0 == 0) && members.are_known(|_| 1, |at| at.0 == 0));
        assert!(members.is_known(next, 1, |at| at.0 < 2), "it is the only one");
    }
}
