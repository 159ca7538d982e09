//! Which intermediary knows of which page: a pure rule, so that everybody comes to the same answer
//! without asking anyone.
//!
//! Runs of [`limits::INDEX_RANGE_PAGES`] consecutive pages belong to the members in turn. When an owner is
//! dead the next in rotation that is alive stands in. Members are only ever added; as that moves
//! owners, whoever reads the index asks on along the rotation for what the owner does not know.

use crate::ids::MemberIndex;
use crate::limits;
use crate::page::{PageIndex, PageRange};

/// Numbers the runs of consecutive pages that have one owner.
#[must_use]
pub const fn index_range(page: PageIndex) -> u32 {
    page.0 / limits::INDEX_RANGE_PAGES
}

/// The member whose turn a page is `step` further on in the rotation, 0 being its owner's. `None` without members.
#[must_use]
pub fn index_turn(page: PageIndex, step: usize, members: usize) -> Option<MemberIndex> {
    let at = (index_range(page) as usize + step).checked_rem(members)?;
    Some(MemberIndex(at as u16))
}

/// The members that own a page's index entry: the owner first, then those that stand in for it, in their
/// order. Those of the `members` that are not alive are left out.
pub fn index_owners(
    page: PageIndex,
    members: usize,
    alive: impl Fn(MemberIndex) -> bool,
) -> impl Iterator<Item = MemberIndex> {
    (0..members).filter_map(move |step| index_turn(page, step, members)).filter(move |member| alive(*member))
}

/// The run, cut so that each piece has one owner.
pub fn owner_runs(range: PageRange) -> impl Iterator<Item = PageRange> {
    let end = u64::from(range.first.0) + u64::from(range.pages);
    let mut at = u64::from(range.first.0);
    std::iter::from_fn(move || {
        let width = u64::from(limits::INDEX_RANGE_PAGES);
        let stop = end.min((at / width + 1) * width);
        let piece = PageRange::new(PageIndex(u32::try_from(at).ok()?), (stop.saturating_sub(at)) as u32);
        at = stop;
        (piece.pages > 0).then_some(piece)
    })
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const WIDE: u32 = limits::INDEX_RANGE_PAGES;

    fn owners(page: u32, alive: &[bool]) -> Vec<u16> {
        index_owners(PageIndex(page), alive.len(), |member| alive[member.as_usize()])
            .map(|member| member.0)
            .collect()
    }

    #[test]
    fn owners_take_turns_and_stand_in() {
        assert_eq!(owners(0, &[true; 3]), [0, 1, 2]);
        assert_eq!(owners(WIDE - 1, &[true; 3]), [0, 1, 2]);
        assert_eq!(owners(WIDE, &[true; 3]), [1, 2, 0]);
        assert_eq!(owners(4 * WIDE, &[true, false, true]), [2, 0]);
        assert_eq!(owners(7, &[false; 3]), [0_u16; 0]);
        assert_eq!(owners(7, &[]), [0_u16; 0]);
    }

    proptest! {
        #[test]
        fn pieces_are_the_run_and_have_one_owner(first in 0..u32::MAX - 10_000, pages in 0_u32..10_000) {
            let range = PageRange::new(PageIndex(first), pages);
            let mut next = first;
            for piece in owner_runs(range) {
                prop_assert_eq!(piece.first.0, next);
                prop_assert!(piece.pages > 0);
                prop_assert_eq!(piece.first.0 / WIDE, (piece.first.0 + piece.pages - 1) / WIDE);
                next = piece.first.0 + piece.pages;
            }
            prop_assert_eq!(next, first + pages);
        }

        #[test]
        fn every_member_that_lives_is_asked_once(page: u32, alive in prop::collection::vec(any::<bool>(), 0..20)) {
            let mut asked = owners(page, &alive);
            asked.sort_unstable();
            let living: Vec<u16> = (0..alive.len() as u16).filter(|at| alive[usize::from(*at)]).collect();
            prop_assert_eq!(asked, living);
        }
    }
}
