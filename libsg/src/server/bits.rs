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

    /// The first run of consecutive members: where it begins, and how long it is, at most `longest`.
    pub(super) fn first_run(&self, longest: usize) -> Option<(usize, usize)> {
        let word = self.0.iter().position(|word| *word != 0)?;
        let first = word * 64 + self.0[word].trailing_zeros() as usize;
        let end = CHUNK_SLOTS.min(first + longest);
        let past = (first..end).find(|at| !self.contains(*at)).unwrap_or(end);
        Some((first, past - first))
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(members in proptest::collection::btree_set(0..CHUNK_SLOTS, 0..80), longest in 1..100_usize) {
            let mut bits = Bits::NONE;
            members.iter().for_each(|at| bits.insert(*at));
            prop_assert_eq!(bits.len() as usize, members.len());
            prop_assert_eq!(bits.iter().collect::<Vec<_>>(), members.iter().copied().collect::<Vec<_>>());
            let run = members.first().map(|first| {
                (*first, (*first..).take(longest).take_while(|at| members.contains(at)).count())
            });
            prop_assert_eq!(bits.first_run(longest), run);
            members.iter().for_each(|at| bits.remove(*at));
            prop_assert!(bits.is_empty());
        }
    }

    #[test]
    fn all_is_one_run() {
        assert_eq!(Bits::ALL.first_run(usize::MAX >> 1), Some((0, CHUNK_SLOTS)));
        assert_eq!(Bits::ALL.len() as usize, CHUNK_SLOTS);
    }
}
