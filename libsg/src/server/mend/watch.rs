//! Who of the members of volumes is there: a pure core, without socket, lock or clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::{MemberIndex, MemberSet, NodeId};
use crate::wire::message::Member;

/// Who has not answered for so long is away: one that is slow, or whose host is stopped for a moment, is not.
pub(super) const AWAY_AFTER: Duration = Duration::from_secs(4);

#[derive(Debug)]
struct Seen {
    member: Member,
    silent_since: Option<Instant>,
    /// Another has its place: it never comes back.
    is_replaced: bool,
}

/// The members of volumes, each of which is looked at in turn.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: BTreeMap<NodeId, Seen>,
    last: Option<NodeId>,
}

impl Watch {
    /// These are to be looked at from now on, and no others.
    pub fn keep<'m>(&mut self, members: impl Iterator<Item = &'m Member>) {
        let mut before = std::mem::take(&mut self.seen);
        for member in members {
            let fresh = || Seen { member: member.clone(), silent_since: None, is_replaced: false };
            let known = before.remove(&member.node);
            self.seen.entry(member.node.clone()).or_insert_with(|| known.unwrap_or_else(fresh));
        }
    }

    /// How many are to be looked at.
    pub fn len(&self) -> usize {
        self.seen.values().filter(|seen| !seen.is_replaced).count()
    }

    /// Whose turn it is.
    pub fn next(&mut self) -> Option<Member> {
        let behind = self.last.clone();
        let is_behind = |node: &NodeId| behind.as_ref().is_none_or(|last| node > last);
        let mut there = self.seen.iter().filter(|(_, seen)| !seen.is_replaced);
        let next = there.clone().find(|(node, _)| is_behind(node)).or_else(|| there.next());
        let member = next.map(|(_, seen)| seen.member.clone());
        self.last = member.as_ref().map(|member| member.node.clone());
        member
    }

    /// Who was found at a member's place, or nobody.
    pub fn found(&mut self, member: &Member, there: Option<&NodeId>, now: Instant) {
        let Some(seen) = self.seen.get_mut(&member.node) else { return };
        match there {
            Some(node) if *node == member.node => seen.silent_since = None,
            Some(_) => seen.is_replaced = true,
            None => _ = seen.silent_since.get_or_insert(now),
        }
    }

    /// Whether it is away.
    pub fn is_away(&self, node: &NodeId, now: Instant) -> bool {
        self.seen.get(node).is_some_and(|seen| {
            let silent = seen.silent_since.map(|since| now.saturating_duration_since(since));
            seen.is_replaced || silent.is_some_and(|silent| silent >= AWAY_AFTER)
        })
    }

    /// Those of a volume's members that are not away.
    pub fn living(&self, members: &[Member], now: Instant) -> MemberSet {
        let numbers = (0..).map(MemberIndex).zip(members);
        numbers.filter(|(_, member)| !self.is_away(&member.node, now)).map(|(number, _)| number).collect()
    }
}

/// When copies of a volume are to be made again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Care {
    /// Who was there when that was last tried.
    living: MemberSet,
    /// How often it was tried with those.
    pub tries: u32,
    /// When it is to be tried again; never, where nothing is left to do with those that are there.
    next: Option<Instant>,
}

/// After the first try in vain it is tried again in so long, then in twice that, and so on.
const TRY_AGAIN: Duration = Duration::from_secs(2);
const TRY_AGAIN_MAX: Duration = Duration::from_secs(60);

impl Care {
    /// Nothing is missing as long as all members are there, if they are enough for so many copies: whoever wrote the volume
    /// saw to that.
    pub fn begin(members: usize, copies: u8, now: Instant) -> Self {
        let are_few = members < usize::from(copies);
        Self { living: MemberSet::first(members), tries: 0, next: are_few.then_some(now) }
    }

    /// Whether it is time.
    pub fn is_due(&mut self, living: MemberSet, now: Instant) -> bool {
        if living != self.living {
            *self = Self { living, tries: 0, next: Some(now) };
        }
        self.next.is_some_and(|next| next <= now)
    }

    /// It was tried, and something is left to do, or not.
    pub fn tried(&mut self, is_left: bool, now: Instant) {
        let pause = TRY_AGAIN.saturating_mul(1 << self.tries.min(10)).min(TRY_AGAIN_MAX);
        self.tries += 1;
        self.next = is_left.then(|| now + pause);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn member(name: &str) -> Member {
        Member { node: NodeId { name: name.into(), incarnation: 1 }, address: ([127, 0, 0, 1], 7701).into() }
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn each_is_looked_at_in_turn_and_who_is_silent_for_long_is_away() {
        let (mut watch, now) = (Watch::default(), Instant::now());
        let members = ["a", "b", "c"].map(member);
        watch.keep(members.iter());
        let turns: Vec<_> = (0..4).filter_map(|_| watch.next()).collect();
        assert_eq!(turns, ["a", "b", "c", "a"].map(member));
        watch.found(&members[1], None, now);
        assert_eq!(watch.living(&members, now + seconds(3)), MemberSet(7));
        watch.found(&members[1], None, now + seconds(3));
        assert_eq!(watch.living(&members, now + AWAY_AFTER), MemberSet(5));
        watch.found(&members[1], Some(&members[1].node), now + seconds(9));
        assert_eq!(watch.living(&members, now + seconds(20)), MemberSet(7), "it is back");
        // Another has its place: for good, and nobody looks there any more.
        watch.found(&members[2], Some(&member("d").node), now);
        watch.found(&members[2], Some(&members[2].node), now);
        assert_eq!(watch.living(&members, now), MemberSet(3));
        assert_eq!((watch.len(), watch.next(), watch.next()), (2, Some(member("b")), Some(member("a"))));
        watch.keep(members[..1].iter());
        assert_eq!(
            (watch.len(), watch.living(&members[1..], now)),
            (1, MemberSet(3)),
            "nothing is known of them"
        );
    }

    #[test]
    fn it_is_tried_when_others_are_there_and_again_ever_later_while_something_is_left() {
        let now = Instant::now();
        assert!(Care::begin(1, 2, now).is_due(MemberSet(1), now), "they are too few");
        let mut care = Care::begin(3, 2, now);
        assert!(!care.is_due(MemberSet(7), now));
        assert!(care.is_due(MemberSet(5), now));
        care.tried(true, now);
        assert!(!care.is_due(MemberSet(5), now + seconds(1)));
        assert!(care.is_due(MemberSet(5), now + seconds(2)));
        care.tried(true, now);
        assert!(!care.is_due(MemberSet(5), now + seconds(3)) && care.is_due(MemberSet(5), now + seconds(4)));
        care.tried(false, now);
        assert!(!care.is_due(MemberSet(5), now + seconds(999)));
        assert!(care.is_due(MemberSet(1), now), "one more is away");
        assert_eq!(care.tries, 0);
        (0..40).for_each(|_| care.tried(true, now));
        assert!(care.is_due(MemberSet(1), now + TRY_AGAIN_MAX));
    }
}
