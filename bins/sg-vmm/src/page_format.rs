//! What a page of the guest looks like. The guest's code (`guest/guest.S`) knows the same format;
//! a test in `vm.rs` proves that both agree.
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 0..8 | the page's index, with [`HEAD_MAGIC`] in the low bits |
//! | 8..16 | version: how often the page was written, from 1 on |
//! | 16..24 | checksum of both and of the seed |
//! | 24..4088 | pseudo-random bytes of (seed, index), or zeros; never changed after the start |
//! | 4088..4096 | the version again: a page that is torn shows it |
//!
//! A page of version 0 was never touched and is all zero. The shadow table holds the version that
//! each page must have, so that a page that is old but sound is found as well.

use libsg::page::PAGE_BYTES;

/// Bytes of a page as 64-bit words.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Low bits of a page's first word.
pub const HEAD_MAGIC: u64 = 0x5a7;
/// Word of the version.
pub const VERSION_WORD: usize = 1;
/// Word of the checksum.
pub const CHECKSUM_WORD: usize = 2;
/// First word of the part that never changes.
pub const BODY_WORD: usize = 3;
/// Word of the second copy of the version.
pub const TAIL_WORD: usize = PAGE_WORDS - 1;
/// Bit of a shadow entry: the page's content comes from [`COMMON_SEED`].
pub const SHADOW_COMMON: u32 = 1 << 31;
/// The seed of pages that every VM has alike.
pub const COMMON_SEED: u64 = 0x636f_6d6d_6f6e_2121;

/// Odd multiplier of the checksum: fits the immediate operand of one instruction.
const K: u64 = 0x5bd1_e995;

/// What a page holds at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: never touched, all zero, version 0.
    Zero,
    /// Bytes of this VM's seed.
    Own,
    /// Bytes that every VM has at this index.
    Common,
}

/// Which pages hold what, and the bytes they hold.
#[derive(Clone, Copy, Debug)]
pub struct PageFormat {
    seed: u64,
    zero_below: u64,
    common_from: u64,
}

impl PageFormat {
    /// The format of a VM with this seed and these fractions (0 to 1) of zero and common pages.
    #[must_use]
    pub fn new(seed: u64, zero_fraction: f64, common: f64) -> Self {
        let whole = (1_u64 << 32) as f64;
        let zero_below = (zero_fraction.clamp(0.0, 1.0) * whole) as u64;
        let common_from = ((1.0 - common.clamp(0.0, 1.0)) * whole) as u64;
        Self { seed: expand(seed), zero_below, common_from }
    }

    /// What page `index` holds at the start. The choice does not depend on the seed, so that the
    /// common pages of two VMs are the same pages.
    #[must_use]
    pub fn content(&self, index: u64) -> Content {
        let draw = expand(index) >> 32;
        if draw < self.zero_below {
            Content::Zero
        } else if draw >= self.common_from {
            Content::Common
        } else {
            Content::Own
        }
    }

    /// The seed as the guest's registers hold it.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The seed behind a page, from its shadow entry.
    #[must_use]
    pub fn seed_of(&self, shadow: u32) -> u64 {
        if shadow & SHADOW_COMMON == 0 { self.seed } else { COMMON_SEED }
    }

    /// A page's shadow entry at the start.
    #[must_use]
    pub fn shadow(&self, index: u64) -> u32 {
        match self.content(index) {
            Content::Zero => 0,
            Content::Own => 1,
            Content::Common => SHADOW_COMMON | 1,
        }
    }

    /// Writes the bytes that never change (and random ones where head and tail will be).
    pub fn body(&self, index: u64, words: &mut [u64; PAGE_WORDS]) {
        let seed = match self.content(index) {
            Content::Zero => return words.fill(0),
            Content::Own => self.seed,
            Content::Common => COMMON_SEED,
        };
        // Eight independent xorshift generators: as wide as the CPU's vector units.
        let mut lanes: [u64; 8] =
            std::array::from_fn(|lane| expand(seed ^ (index << 3 | lane as u64).wrapping_mul(K)) | 1);
        for row in words.chunks_exact_mut(8) {
            for (word, lane) in row.iter_mut().zip(&mut lanes) {
                *lane ^= *lane << 13;
                *lane ^= *lane >> 7;
                *lane ^= *lane << 17;
                *word = *lane;
            }
        }
    }

    /// Writes the whole page as it is at the start.
    pub fn page(&self, index: u64, words: &mut [u64; PAGE_WORDS]) {
        self.body(index, words);
        let shadow = self.shadow(index);
        let [head, version, checksum, tail] = expected(index, shadow, self.seed_of(shadow));
        words[0] = head;
        words[VERSION_WORD] = version;
        words[CHECKSUM_WORD] = checksum;
        words[TAIL_WORD] = tail;
    }
}

/// Head, version, checksum and tail that the page must have.
#[must_use]
pub fn expected(index: u64, shadow: u32, seed: u64) -> [u64; 4] {
    let version = u64::from(shadow & !SHADOW_COMMON);
    if version == 0 {
        return [0; 4];
    }
    let mixed = (index << 12).wrapping_add(seed).wrapping_mul(K);
    [index << 12 | HEAD_MAGIC, version, mixed.wrapping_add(version).wrapping_mul(K), version]
}

/// Spreads the bits of a small number over 64 (splitmix64).
fn expand(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod test {
    use super::*;

    fn page(format: PageFormat, index: u64) -> [u64; PAGE_WORDS] {
        let mut words = [0; PAGE_WORDS];
        format.page(index, &mut words);
        words
    }

    #[test]
    fn fractions_are_kept_and_common_pages_are_alike() {
        let (one, two) = (PageFormat::new(1, 0.25, 0.5), PageFormat::new(2, 0.25, 0.5));
        let mut counts = [0_u32; 3];
        for index in 0..10_000 {
            let content = one.content(index);
            counts[content as usize] += 1;
            assert_eq!(content, two.content(index));
        }
        for (count, want) in counts.into_iter().zip([2500_i64, 2500, 5000]) {
            assert!((i64::from(count) - want).abs() < 200, "{counts:?}");
        }
        for index in 0..200 {
            let alike = page(one, index) == page(two, index);
            assert_eq!(alike, one.content(index) != Content::Own);
        }
    }

    #[test]
    fn pages_differ_and_do_not_compress() {
        let format = PageFormat::new(7, 0.0, 0.0);
        let mut seen = std::collections::HashSet::new();
        for index in 0..100 {
            for word in page(format, index).into_iter().take(TAIL_WORD).skip(BODY_WORD) {
                assert!(seen.insert(word), "a word came twice");
            }
        }
    }

    #[test]
    fn every_input_changes_the_checksum() {
        let [_, _, checksum, _] = expected(5, 9, 77);
        for other in [expected(6, 9, 77), expected(5, 10, 77), expected(5, 9, 78)] {
            assert_ne!(other[2], checksum);
        }
        assert_eq!(expected(5, 0, 77), [0; 4]);
        assert_eq!(expected(5, SHADOW_COMMON | 3, 1)[1], 3);
    }
}
