//! Who may have the bytes of a hash, of those that this intermediary is asked about.
//!
//! A hint that is wrong costs one question, and one that is lost a page that is sent twice. So they are kept as a
//! processor's cache keeps lines: in sets, known by a few bits of the hash, the oldest of a set forgotten for the next.

use super::Holder;

/// Hints of a set.
const WAYS: usize = 4;

/// Sets of a domain: 2 MB, for half a million hints.
const SETS: usize = 128 << 10;

/// Hints by hash.
pub(super) struct Hints {
    /// None until the first hint. In each set the newest is first; 0 is none, others are bits of the hash and the holder.
    sets: Vec<[u32; WAYS]>,
}

impl Hints {
    pub const fn new() -> Self {
        Self { sets: Vec::new() }
    }

    pub fn get(&self, word: u64) -> Option<Holder> {
        let found = self.sets.get(set_of(word))?.iter().find(|hint| *hint >> Holder::BITS == tag_of(word))?;
        Some(*found as Holder)
    }

    pub fn set(&mut self, word: u64, holder: Holder) {
        if self.sets.is_empty() {
            self.sets = vec![[0; WAYS]; SETS];
        }
        let Some(set) = self.sets.get_mut(set_of(word)) else { return };
        let known = set.iter().position(|hint| hint >> Holder::BITS == tag_of(word));
        set[..=known.unwrap_or(WAYS - 1)].rotate_right(1);
        set[0] = tag_of(word) << Holder::BITS | u32::from(holder);
    }
}

fn set_of(word: u64) -> usize {
    word as usize % SETS
}

/// The uppermost bits of the hash; never 0.
fn tag_of(word: u64) -> u32 {
    (word >> (u64::BITS - (u32::BITS - Holder::BITS))) as u32 | 1
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    /// As uniform as hashes are.
    fn word(number: u64) -> u64 {
        u64::from_le_bytes(blake3::hash(&number.to_le_bytes()).as_bytes()[..8].try_into().expect("eight"))
    }

    proptest! {
        #[test]
        fn the_last_that_was_told_of_a_hash_counts(
            told in proptest::collection::vec((0u64..100, any::<Holder>()), 0..300),
        ) {
            let (mut hints, mut model) = (Hints::new(), std::collections::HashMap::new());
            for (number, holder) in told {
                hints.set(word(number), holder);
                model.insert(number, holder);
            }
            for number in 0..100 {
                prop_assert_eq!(hints.get(word(number)), model.get(&number).copied());
            }
        }
    }

    #[test]
    fn few_are_lost_of_half_as_many_as_there_is_room_for_and_few_are_mistaken() {
        let mut hints = Hints::new();
        let told = (SETS * WAYS / 2) as u64;
        (0..told).for_each(|number| hints.set(word(number), 7));
        let kept = (0..told).filter(|number| hints.get(word(*number)).is_some()).count();
        assert!(kept as f64 > 0.95 * told as f64, "{kept} of {told}");
        let mistaken = (told..2 * told).filter(|number| hints.get(word(*number)).is_some()).count();
        assert!((mistaken as f64) < told as f64 / 4_000.0, "{mistaken} of {told}");
    }

    #[test]
    fn the_oldest_of_a_set_goes() {
        let mut hints = Hints::new();
        let of_one_set = |n: u64| n << 50 | 5;
        (1..=5).for_each(|n| hints.set(of_one_set(n), n as Holder));
        assert_eq!(hints.get(of_one_set(1)), None);
        hints.set(of_one_set(2), 9);
        hints.set(of_one_set(6), 6);
        let left: Vec<_> = (1..=6).map(|n| hints.get(of_one_set(n))).collect();
        assert_eq!(left, [None, Some(9), None, Some(4), Some(5), Some(6)]);
    }
}
