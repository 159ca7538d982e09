//! CRC32C of a page. Each page is summed at the source and at the destination: after copying, the most that is done
//! to it in user space.
//!
//! `crc-fast` sums any bytes that lie still. A page of a guest does not, and would be copied to the stack first; and
//! 4 KiB are little for the wide ways that it has. Here a page is read from where it lies, by instructions that the compiler
//! knows nothing of, in one of two ways:
//!
//! - 64 bytes at a time, four such lines side by side: each is moved on over the page, as a product of polynomials, and what
//!   lies there is added to it, until the four are left that have the page's sum (AVX-512 and VPCLMULQDQ);
//! - else by the processor's own instruction in three lanes, since its answer takes three times as long as its next
//!   question (SSE 4.2).
//!
//! Of a page that is not in the cache, most of the time is memory's: the processor begins anew with each page to guess
//! what comes, so the next one is asked for while this one is summed.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as x86;

use crate::page::PAGE_BYTES;

/// Words of a page.
const WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Words of each of the three lanes; what is left of the page comes after them.
const LANE: usize = WORDS / 3;

/// What a processor gets from memory at once.
const LINE_BYTES: usize = 64;

/// Lines of a page.
const LINES: usize = PAGE_BYTES / LINE_BYTES;

/// Lines side by side.
const ABREAST: usize = 4;

/// Words of each lane between two calls for lines ahead: as many as a line has, in each lane.
const STEP: usize = LINE_BYTES / size_of::<u64>();

const _: () = assert!(3 * LANE.div_ceil(STEP) >= LINES, "every line is asked for");
const _: () = assert!(LANE.is_multiple_of(2) && STEP.is_multiple_of(2), "words are taken by twos");
const _: () = assert!(LINES.is_multiple_of(ABREAST));

/// The polynomial, bit-reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The sum of a page of zeros.
pub(crate) const OF_ZEROS: u32 = !times(u32::MAX, power(PAGE_BYTES * 8));

/// What `LANE` words of zeros behind a sum make of it, by each byte of it.
static BEHIND_A_LANE: [[u32; 256]; 4] = shifts();

/// CRC32C of bytes that lie still.
pub(crate) fn of(bytes: &[u8]) -> u32 {
    let page = (bytes.len() == PAGE_BYTES).then_some(bytes.as_ptr());
    // SAFETY: it is a page, and borrowed.
    let sum = page.and_then(|page| unsafe { of_page(page, page) });
    sum.unwrap_or_else(|| crc_fast::crc32_iscsi(bytes))
}

/// CRC32C of a page. Meanwhile the page at `next` is fetched from memory; the same page where no other is wanted.
/// `None` where the processor has no instruction for it.
///
/// # Safety
/// `page` is readable for [`PAGE_BYTES`]. Others may write it meanwhile, by no Rust reference.
#[inline]
pub(crate) unsafe fn of_page(page: *const u8, next: *const u8) -> Option<u32> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("vpclmulqdq") && has!("sse4.2") {
            // SAFETY: the caller's, and the processor has what the function was compiled for.
            return Some(unsafe { in_lines(page, next) });
        }
        if has!("sse4.2") {
            // SAFETY: as above.
            return Some(unsafe { in_lanes(page, next) });
        }
    }
    let _ = (page, next);
    None
}

/// # Safety
/// As of [`of_page`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,vpclmulqdq,sse4.2")]
unsafe fn in_lines(page: *const u8, next: *const u8) -> u32 {
    use x86::__m512i;
    let line = |at: usize| -> __m512i {
        let line;
        // SAFETY: inside of the page, which is readable.
        unsafe {
            std::arch::asm!("vmovdqu64 {}, [{}]", out(zmm_reg) line, in(reg) page.add(at * LINE_BYTES),
                options(nostack, preserves_flags, readonly));
        }
        line
    };
    let moved = |line: __m512i, (first, last): (i64, i64)| {
        let by = x86::_mm512_set_epi64(last, first, last, first, last, first, last, first);
        let (first, last) = (
            x86::_mm512_clmulepi64_epi128::<0x00>(line, by),
            x86::_mm512_clmulepi64_epi128::<0x11>(line, by),
        );
        x86::_mm512_xor_si512(first, last)
    };
    let mut four: [__m512i; ABREAST] = std::array::from_fn(line);
    let begin = x86::_mm512_set_epi64(0, 0, 0, 0, 0, 0, 0, u32::MAX.into());
    four[0] = x86::_mm512_xor_si512(four[0], begin);
    for from in (0..LINES).step_by(ABREAST) {
        for (at, sum) in (from..).zip(&mut four) {
            if from > 0 {
                *sum = x86::_mm512_xor_si512(moved(*sum, const { further(ABREAST * LINE_BYTES) }), line(at));
            }
            fetch(next, at);
        }
    }
    let two = x86::_mm512_xor_si512(
        moved(four[0], const { further(3 * LINE_BYTES) }),
        moved(four[1], const { further(2 * LINE_BYTES) }),
    );
    let one = x86::_mm512_xor_si512(moved(four[2], const { further(LINE_BYTES) }), four[3]);
    let mut words = [0u64; LINE_BYTES / size_of::<u64>()];
    // SAFETY: as many bytes.
    unsafe { x86::_mm512_storeu_si512(words.as_mut_ptr().cast(), x86::_mm512_xor_si512(two, one)) };
    !(words.into_iter().fold(0, |sum, word| x86::_mm_crc32_u64(sum, word)) as u32)
}

/// What the first 8 bytes of 16, and the last, are multiplied by, to lie so many bytes further on.
#[cfg(target_arch = "x86_64")]
const fn further(bytes: usize) -> (i64, i64) {
    // Of words whose first bit is the highest power, the product is one power too high.
    const fn word(power_of_x: usize) -> i64 {
        ((power(power_of_x) as u64) << 32).cast_signed()
    }
    (word(bytes * 8 + 63), word(bytes * 8 - 1))
}

/// # Safety
/// As of [`of_page`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
unsafe fn in_lanes(page: *const u8, next: *const u8) -> u32 {
    const WORD_BYTES: usize = size_of::<u64>();
    let (mut first, mut second, mut third) = (u64::from(u32::MAX), 0u64, 0u64);
    for from in (0..LANE).step_by(STEP) {
        // The last two may be of what lies behind the page.
        (0..3).for_each(|at| fetch(next, 3 * (from / STEP) + at));
        let mut word = page.wrapping_add(from * WORD_BYTES);
        for _ in 0..(LANE - from).min(STEP) / 2 {
            // SAFETY: inside of the page, which is readable: two words of the first lane, and of the two behind it.
            unsafe {
                std::arch::asm!(
                    "crc32 {first}, qword ptr [{word}]",
                    "crc32 {second}, qword ptr [{word} + {one}]",
                    "crc32 {third}, qword ptr [{word} + {two}]",
                    "crc32 {first}, qword ptr [{word} + 8]",
                    "crc32 {second}, qword ptr [{word} + {one} + 8]",
                    "crc32 {third}, qword ptr [{word} + {two} + 8]",
                    first = inout(reg) first, second = inout(reg) second, third = inout(reg) third,
                    word = in(reg) word, one = const LANE * WORD_BYTES, two = const 2 * LANE * WORD_BYTES,
                    options(nostack, preserves_flags, readonly)
                );
            }
            word = word.wrapping_add(2 * WORD_BYTES);
        }
    }
    let joined = behind_a_lane(behind_a_lane(first as u32) ^ second as u32) ^ third as u32;
    let mut whole = u64::from(joined);
    for at in 3 * LANE..WORDS {
        // SAFETY: inside of the page.
        unsafe {
            std::arch::asm!("crc32 {}, qword ptr [{}]", inout(reg) whole, in(reg) page.add(at * WORD_BYTES),
                options(nostack, preserves_flags, readonly));
        }
    }
    !(whole as u32)
}

/// Has the processor fetch a line of a page from memory, without waiting.
#[cfg(target_arch = "x86_64")]
#[inline]
fn fetch(page: *const u8, line: usize) {
    // SAFETY: fetching reads nothing and faults nowhere, whatever the address; every x86-64 processor knows how.
    unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T0 }>(page.wrapping_add(line * LINE_BYTES).cast()) };
}

fn behind_a_lane(sum: u32) -> u32 {
    let each = sum.to_le_bytes().into_iter().zip(&BEHIND_A_LANE);
    each.fold(0, |all, (byte, shifted)| all ^ shifted[usize::from(byte)])
}

const fn shifts() -> [[u32; 256]; 4] {
    let zeros = power(LANE * u64::BITS as usize);
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

/// So high a power of x, modulo the polynomial; the highest bit is x^0.
const fn power(of_x: usize) -> u32 {
    let mut power = 1 << 31;
    let mut at = 0;
    while at < of_x {
        power = times_x(power);
        at += 1;
    }
    power
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

    /// By each way that this processor has.
    fn same(page: &[u8; PAGE_BYTES]) {
        let sum = crc_fast::crc32_iscsi(page);
        assert_eq!(of(page), sum);
        #[cfg(target_arch = "x86_64")]
        {
            let next = [0; PAGE_BYTES];
            if std::arch::is_x86_feature_detected!("sse4.2") {
                // SAFETY: a page, and the processor has the instruction.
                assert_eq!(unsafe { in_lanes(page.as_ptr(), next.as_ptr()) }, sum, "in lanes");
            }
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("vpclmulqdq")
            {
                // SAFETY: a page, and the processor has the instructions.
                assert_eq!(unsafe { in_lines(page.as_ptr(), next.as_ptr()) }, sum, "in lines");
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_crc32c_wherever_it_lies(seed in any::<u64>(), offset in 0_usize..64) {
            let mut bytes = [0; PAGE_BYTES + 64];
            for (at, bytes) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
                *bytes = seed.wrapping_mul(at as u64 | 1).rotate_left(at as u32).to_ne_bytes();
            }
            same(bytes[offset..].first_chunk().expect("a page"));
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

    #[test]
    fn zeros_have_the_sum_that_is_known_of_them() {
        same(&[0; PAGE_BYTES]);
        assert_eq!(of(&[0; PAGE_BYTES]), OF_ZEROS);
    }
}
