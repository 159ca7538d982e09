//! CRC32C of a page. Each page is summed at the source and at the destination: after copying, the most that is done
//! to it in user space.
//!
//! `crc-fast` sums any bytes that lie still. A page of a guest does not, and would be copied to the stack first; and
//! 4 KiB are little for the wide ways that it has. Here the words are taken one by one, as whoever owns them reads them,
//! and go to the processor's own instruction in three lanes, since its answer takes three times as long as its
//! next question. Twice to three times as fast on a page in the cache. On one that is not, most of the time is memory's:
//! the processor begins anew with each page to guess what comes, so the next one is asked for while this one is summed.
#![allow(unsafe_code)]

use crate::page::PAGE_BYTES;

/// Words of a page.
const WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Words of each of the three lanes; what is left of the page comes after them.
const LANE: usize = WORDS / 3;

/// What a processor gets from memory at once.
pub(crate) const LINE_BYTES: usize = 64;

/// Lines of a page.
const LINES: usize = PAGE_BYTES / LINE_BYTES;

/// Words of each lane between two calls for lines ahead: as many as a line has, in each lane.
const STEP: usize = LINE_BYTES / size_of::<u64>();

const _: () = assert!(3 * LANE.div_ceil(STEP) >= LINES, "every line is asked for");

/// The polynomial, bit-reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What `LANE` words of zeros behind a sum make of it, by each byte of it.
static BEHIND_A_LANE: [[u32; 256]; 4] = shifts();

/// CRC32C of a page, of which `word` gives each word as it lies in memory. Meanwhile `ahead` is told to have each line
/// of the page fetched that comes next.
#[inline]
pub(crate) fn of_page(word: impl Fn(usize) -> u64, ahead: impl Fn(usize)) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { in_lanes(word, ahead) };
    }
    (0..LINES).for_each(ahead);
    let mut page = [0; PAGE_BYTES];
    for (at, bytes) in page.as_chunks_mut().0.iter_mut().enumerate() {
        *bytes = word(at).to_ne_bytes();
    }
    crc_fast::crc32_iscsi(&page)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn in_lanes(word: impl Fn(usize) -> u64, ahead: impl Fn(usize)) -> u32 {
    use std::arch::x86_64::_mm_crc32_u64 as sum;
    let (mut first, mut second, mut third) = (u64::from(u32::MAX), 0, 0);
    for step in 0..LANE.div_ceil(STEP) {
        (3 * step..LINES.min(3 * step + 3)).for_each(&ahead);
        for at in STEP * step..LANE.min(STEP * (step + 1)) {
            first = sum(first, word(at));
            second = sum(second, word(LANE + at));
            third = sum(third, word(2 * LANE + at));
        }
    }
    let joined = behind_a_lane(behind_a_lane(first as u32) ^ second as u32) ^ third as u32;
    let mut whole = u64::from(joined);
    for at in 3 * LANE..WORDS {
        whole = sum(whole, word(at));
    }
    !(whole as u32)
}

fn behind_a_lane(sum: u32) -> u32 {
    let each = sum.to_le_bytes().into_iter().zip(&BEHIND_A_LANE);
    each.fold(0, |all, (byte, shifted)| all ^ shifted[usize::from(byte)])
}

const fn shifts() -> [[u32; 256]; 4] {
    let mut zeros = 1 << 31;
    let mut bit = 0;
    while bit < LANE * u64::BITS as usize {
        zeros = times_x(zeros);
        bit += 1;
    }
    let mut shifts = [[0; 256]; 4];
    let mut byte = 0;
    while byte < 4 {
        let mut value = 0;
        while value < 256 {
            shifts[byte][value] = times((value as u32) << (8 * byte), zeros);
            value += 1;
        }
        byte += 1;
    }
    shifts
}

/// The product of two polynomials, the highest bit of which is x^0, modulo the polynomial.
const fn times(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 1 << 31;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = times_x(b);
        bit >>= 1;
    }
    product
}

const fn times_x(a: u32) -> u32 {
    if a & 1 == 0 { a >> 1 } else { (a >> 1) ^ POLYNOMIAL }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn same(page: &[u8; PAGE_BYTES]) {
        let asked_for = std::cell::RefCell::new(Vec::new());
        let word = |at: usize| u64::from_ne_bytes(page.as_chunks().0[at]);
        let sum = of_page(word, |line| asked_for.borrow_mut().push(line));
        assert_eq!(sum, crc_fast::crc32_iscsi(page));
        assert!(asked_for.into_inner().into_iter().eq(0..LINES), "each line once");
    }

    proptest! {
        #[test]
        fn it_is_crc32c(seed in any::<u64>()) {
            let mut page = [0; PAGE_BYTES];
            for (at, bytes) in page.as_chunks_mut().0.iter_mut().enumerate() {
                *bytes = seed.wrapping_mul(at as u64 | 1).rotate_left(at as u32).to_ne_bytes();
            }
            same(&page);
        }
    }

    #[test]
    fn any_one_bit_counts() {
        for bit in (0..PAGE_BYTES * 8).step_by(61) {
            let mut page = [0; PAGE_BYTES];
            page[bit / 8] = 1 << (bit % 8);
            same(&page);
        }
        same(&[0xff; PAGE_BYTES]);
    }
}
