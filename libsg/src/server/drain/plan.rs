//! What of a volume is handed to whom: a pure core, without socket, lock or clock.
//!
//! Pages that were handed to somebody who is lost since are to be handed anew. An install unit is read from one place, so
//! that all of it goes to one member.

use crate::ids::{MemberIndex, MemberSet, Placement};
use crate::limits::{BATCH_PAGES, BATCH_PAGES_MAX};
use crate::page::{PageIndex, PageRange};
use crate::server::slots::Held;
use crate::wire::MovedEntry;

/// Where a page is, as far as this one has to see to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Only here.
    Here,
    /// At this member, which said so.
    At(MemberIndex),
    /// At as many others as there can be, or nowhere: nobody needs it.
    Settled,
}

#[derive(Clone, Copy, Debug)]
struct Item {
    held: Held,
    fate: Fate,
    /// Where index servers were last told that it is.
    told: Option<Placement>,
}

/// Pages that go to one member together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// The positions of the first of them and behind the last.
    items: (u32, u32),
    /// Of the install unit that they belong to; the page's own number where that is one page.
    pub unit: PageIndex,
    /// Members that have all of them.
    pub has: MemberSet,
}

/// The pages of a volume that leave.
#[derive(Debug, Default)]
pub struct Plan {
    items: Vec<Item>,
}

impl Plan {
    /// What is here now, ascending: what became of it before stays known.
    pub fn refresh(&mut self, held: Vec<Held>) {
        let mut before = std::mem::take(&mut self.items).into_iter().peekable();
        let fresh = |held| Item { held, fate: Fate::Here, told: None };
        self.items = held
            .into_iter()
            .map(|held| {
                while before.next_if(|item| item.held < held).is_some() {}
                before.next_if(|item| item.held == held).unwrap_or_else(|| fresh(held))
            })
            .collect();
    }

    /// Whether nothing is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// A member has nothing of what it was given.
    pub fn lost(&mut self, member: MemberIndex) {
        for item in &mut self.items {
            if item.fate == Fate::At(member) {
                item.fate = Fate::Here;
            }
        }
    }

    /// Members that were given pages.
    #[must_use]
    pub fn holders(&self) -> MemberSet {
        let at = |item: &Item| match item.fate {
            Fate::At(member) => Some(member),
            Fate::Here | Fate::Settled => None,
        };
        self.items.iter().filter_map(at).collect()
    }

    /// Pages that are only here.
    #[must_use]
    pub fn left(&self) -> usize {
        self.items.iter().filter(|item| item.fate == Fate::Here).count()
    }

    /// Of units of several pages, those that went to different members, or not all: all of it is to be handed anew.
    pub fn join_units(&mut self, unit_of: &dyn Fn(PageIndex) -> PageRange) {
        let mut at = 0;
        while at < self.items.len() {
            let unit = unit_of(self.items[at].held.page);
            let same = self.items[at..]
                .iter()
                .take_while(|item| unit.positions().contains(&item.held.page.as_usize()));
            let end = at + same.count().max(1);
            let fate = self.items[at].fate;
            if unit.pages > 1 && self.items[at..end].iter().any(|item| item.fate != fate) {
                self.items[at..end].iter_mut().for_each(|item| item.fate = Fate::Here);
            }
            at = end;
        }
    }

    /// What is to be handed over, in pieces of a frame each. `has` says who has a page anyway, of its round or a newer one.
    #[must_use]
    pub fn groups(
        &self,
        unit_of: &dyn Fn(PageIndex) -> PageRange,
        has: &dyn Fn(&Held) -> MemberSet,
    ) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (at, item) in self.items.iter().enumerate().filter(|(_, item)| item.fate == Fate::Here) {
            let at = at as u32;
            let (unit, there) = (unit_of(item.held.page), has(&item.held));
            let is_whole = unit.pages > 1;
            let most = if is_whole { BATCH_PAGES_MAX } else { BATCH_PAGES };
            match groups.last_mut() {
                Some(group)
                    if group.items.1 == at
                        && ((group.items.1 - group.items.0) as usize) < most
                        && (if is_whole { group.unit == unit.first } else { group.has == there }) =>
                {
                    group.items.1 += 1;
                    group.has = group.has.and(there);
                }
                _ => groups.push(Group { items: (at, at + 1), unit: unit.first, has: there }),
            }
        }
        groups
    }

    /// The pages of a group.
    #[must_use]
    pub fn pages(&self, group: &Group) -> Vec<Held> {
        self.of(group).iter().map(|item| item.held).collect()
    }

    fn of(&self, group: &Group) -> &[Item] {
        &self.items[group.items.0 as usize..group.items.1 as usize]
    }

    fn of_mut(&mut self, group: &Group) -> &mut [Item] {
        &mut self.items[group.items.0 as usize..group.items.1 as usize]
    }

    /// Whoever could take these pages has them.
    pub fn settled(&mut self, group: &Group) {
        self.of_mut(group).iter_mut().for_each(|item| item.fate = Fate::Settled);
    }

    /// A member has those pages of a group that were `taken`; the others are no more. Appends what index servers are to be
    /// told of those: where they lay here, and where they were said to be since.
    pub fn handed(
        &mut self,
        (group, taken): (&Group, &[bool]),
        (me, to): (MemberIndex, MemberIndex),
        placements: &[Placement],
        moved: &mut Vec<MovedEntry>,
    ) {
        let mut placements = placements.iter();
        for (item, taken) in self.of_mut(group).iter_mut().zip(taken) {
            let Some(place) = Some(taken).filter(|taken| **taken).and_then(|_| placements.next()) else {
                item.fate = Fate::Settled;
                continue;
            };
            let Held { page, slot, generation, .. } = item.held;
            let here = Placement { member: me, slot, generation };
            let place = Placement { member: to, ..*place };
            for from in item.told.into_iter().chain([here]) {
                moved.push(MovedEntry { page, from, to: place });
            }
            (item.fate, item.told) = (Fate::At(to), Some(place));
        }
    }
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Generation, Round, SlotIndex};

    const ME: MemberIndex = MemberIndex(0);

    fn held(page: u32, slot: u32) -> Held {
        Held { page: PageIndex(page), slot: SlotIndex(slot), generation: Generation(1), round: Round(0) }
    }

    fn single(page: PageIndex) -> PageRange {
        PageRange::new(page, 1)
    }

    /// Units of eight pages behind the first hundred.
    fn mixed(page: PageIndex) -> PageRange {
        match page.0.checked_sub(100) {
            Some(into) => PageRange::new(PageIndex(100 + into / 8 * 8), 8),
            None => single(page),
        }
    }

    fn place(member: u16, slot: u32) -> Placement {
        Placement { member: MemberIndex(member), slot: SlotIndex(slot), generation: Generation(3) }
    }

    #[test]
    fn what_others_have_goes_to_one_that_has_it_not() {
        let mut plan = Plan::default();
        plan.refresh((0..6).map(|page| held(page, page)).collect());
        let has = |held: &Held| if held.page.0 < 4 { MemberSet(2) } else { MemberSet(4) };
        let groups = plan.groups(&single, &has);
        assert_eq!(
            groups.iter().map(|group| (group.items, group.has)).collect::<Vec<_>>(),
            [((0, 4), MemberSet(2)), ((4, 6), MemberSet(4))]
        );
        plan.settled(&groups[0]);
        assert_eq!((plan.left(), plan.groups(&single, &has).len()), (2, 1));
    }

    #[test]
    fn a_unit_that_was_split_is_handed_anew_as_a_whole() {
        let mut plan = Plan::default();
        plan.refresh((100..108).chain(116..118).map(|page| held(page, page)).collect());
        let groups = plan.groups(&mixed, &|_| MemberSet::NONE);
        assert_eq!(groups.iter().map(|group| group.items).collect::<Vec<_>>(), [(0, 8), (8, 10)]);
        let half = Group { items: (0, 4), ..groups[0] };
        let at: Vec<_> = (0..8).map(|slot| place(1, slot)).collect();
        plan.handed((&half, &[true; 4]), (ME, MemberIndex(1)), &at, &mut Vec::new());
        plan.handed((&groups[1], &[true; 2]), (ME, MemberIndex(2)), &at, &mut Vec::new());
        plan.join_units(&mixed);
        assert_eq!((plan.left(), plan.holders()), (8, MemberSet(4)));
    }

    proptest! {
        /// Members take, refuse and die, pages go, until all is done: an index that was told of every move names a page that a
        /// living member has, whatever it named before.
        #[test]
        fn an_index_that_is_told_of_every_move_ends_at_who_has_the_page(
            steps in prop::collection::vec((0..4_u8, 1..4_u16, any::<u8>()), 0..40),
            pages in prop::collection::btree_set(0..140_u32, 1..60),
        ) {
            let mut plan = Plan::default();
            let mut here: Vec<Held> = pages.iter().map(|page| held(*page, 1000 + page)).collect();
            let mut index: BTreeMap<u32, Placement> = here
                .iter()
                .map(|of| (of.page.0, Placement { member: ME, slot: of.slot, generation: of.generation }))
                .collect();
            let mut alive = [true; 4];
            let mut slots = 0;
            let last = (0..8).map(|_| (0, 3, 0));
            for (op, member, which) in steps.into_iter().chain(last) {
                plan.refresh(here.clone());
                match op {
                    // The third never dies.
                    1 if member != 3 => {
                        alive[usize::from(member)] = false;
                        plan.lost(MemberIndex(member));
                    }
                    2 if here.len() > 1 => {
                        let gone = here.remove(usize::from(which) % here.len());
                        index.remove(&gone.page.0);
                    }
                    _ if alive[usize::from(member)] => {
                        let groups = plan.groups(&mixed, &|_| MemberSet::NONE);
                        for group in groups.iter().take(if op == 3 { 1 } else { usize::MAX }) {
                            let taken = vec![true; plan.pages(group).len()];
                            let at: Vec<_> = taken.iter().map(|_| { slots += 1; place(member, slots) }).collect();
                            let mut moved = Vec::new();
                            plan.handed((group, &taken), (ME, MemberIndex(member)), &at, &mut moved);
                            for MovedEntry { page, from, to } in moved {
                                if let Some(known) = index.get_mut(&page.0).filter(|known| **known == from) {
                                    *known = to;
                                }
                            }
                        }
                        plan.join_units(&mixed);
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(plan.left(), 0);
            prop_assert_eq!(index.len(), here.len());
            for (page, at) in &index {
                prop_assert!(at.member != ME && alive[at.member.as_usize()], "page {} at {:?}", page, at);
                let unit = mixed(PageIndex(*page));
                let together = index.range(unit.first.0..unit.first.0 + unit.pages).all(|(_, other)| other.member == at.member);
                prop_assert!(together, "unit {} is split", unit);
            }
        }
    }
}
