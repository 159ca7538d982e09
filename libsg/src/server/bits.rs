//! A set of the 512 slots of a chunk.

use super::slots::CHUNK_SLOTS;

const WORDS: usize = CHUNK_SLOTS / 64;

/// Which of a chunk's slots belong to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bits([u64; WORDS]);

impl Bits {
    pub(super) const NONE: Self = Self([0; WORDS]);
    pub(super) const ALL: Self = Self([u64::MAX; WORDS]);

    pub(super) fn contains(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 != 0
    }

    pub(super) fn insert(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.0[at / 64] &= !(1 << (at % 64));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    pub(super) fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub(super) fn insert_all(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    /// The members, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(at, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(at * 64 + bit as usize)
            })
        })
    }

    /// The first run of `wanted` consecutive members or, where none is that long, the longest: where it begins,
    /// and how much of it is wanted.
    pub(super) fn best_run(&self, wanted: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize)> = None;
        let mut from = 0;
        while let Some(first) = self.next(from, true) {
            let past = self.next(first, false).unwrap_or(CHUNK_SLOTS);
            if best.is_none_or(|(_, slots)| slots < past - first) {
                best = Some((first, wanted.min(past - first)));
            }
            if past - first >= wanted {
                break;
            }
            from = past;
        }
        best
    }

    /// The first slot from `from` on that is a member, or is none.
    fn next(&self, from: usize, member: bool) -> Option<usize> {
        let flip = if member { 0 } else { u64::MAX };
        (from / 64..WORDS).find_map(|at| {
            let before = if at == from / 64 { (1 << (from % 64)) - 1 } else { 0 };
            let word = (self.0[at] ^ flip) & !before;
            (word != 0).then(|| at * 64 + word.trailing_zeros() as usize)
        })
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(members in proptest::collection::btree_set(0..CHUNK_SLOTS, 0..400), wanted in 1..100_usize) {
            let mut bits = Bits::NONE;
            members.iter().for_each(|at| bits.insert(*at));
            prop_assert_eq!(bits.len() as usize, members.len());
            prop_assert_eq!(bits.iter().collect::<Vec<_>>(), members.iter().copied().collect::<Vec<_>>());
            let mut best = None;
            for first in members.iter().copied().filter(|at| *at == 0 || !members.contains(&(at - 1))) {
                let slots = (first..).take(wanted).take_while(|at| members.contains(at)).count();
                if best.is_none_or(|(_, longest)| longest < slots) {
                    best = Some((first, slots));
                }
            }
            prop_assert_eq!(bits.best_run(wanted), best);
            members.iter().for_each(|at| bits.remove(*at));
            prop_assert!(bits.is_empty());
        }
    }

    #[test]
    fn all_is_one_run() {
        assert_eq!(Bits::ALL.best_run(usize::MAX), Some((0, CHUNK_SLOTS)));
        assert_eq!(Bits::NONE.best_run(1), None);
        assert_eq!(Bits::ALL.len() as usize, CHUNK_SLOTS);
    }
}
