//! The final set: which copies count, written in front of the VM's state.
//!
//! A VM that runs while it is sent leaves older copies of pages behind, in the volume and at the destination. The final
//! set names every page that was sent again, with the round of its last copy. It lies in the state blob itself, at
//! the destination and in the volume, so that nobody can have the VM's state without knowing it.
//!
//! ```text
//!   version    1
//!   runs       token + 1: gap << 2 | longer << 1 | new round   gap: pages since the last run
//!              [pages - 2]                                      if longer: of more than one page
//!              [round]                                          if it is not the last run's
//!   0
//!   the VM's state, to the end
//! ```
//!
//! All numbers are LEB128. A page written here and there costs a byte or two: it is sent while the VM is paused.

use super::Malformed;
use crate::ids::Round;
use crate::page::{PageIndex, PageRange};

const VERSION: u64 = 1;

/// The final set, ascending runs without overlap, and the state behind it, as one blob.
#[must_use]
pub fn encode(runs: impl Iterator<Item = (PageRange, Round)>, state: &[u8]) -> Vec<u8> {
    encode_within(usize::MAX, runs, state).unwrap_or_default()
}

/// The same, in at most so many bytes. `None`: it takes more, and no more memory than that was used to find out.
#[must_use]
pub fn encode_within(
    bytes_max: usize,
    runs: impl Iterator<Item = (PageRange, Round)>,
    state: &[u8],
) -> Option<Vec<u8>> {
    let runs_max = bytes_max.checked_sub(state.len())?;
    let mut out = Vec::with_capacity(state.len() + 64);
    put(&mut out, VERSION);
    let (mut end, mut last) = (0, Round(0));
    for (run, round) in runs.filter(|(run, _)| run.pages > 0) {
        let gap = u64::from(run.first.0.saturating_sub(end));
        let (longer, fresh) = (run.pages > 1, round != last);
        put(&mut out, (gap << 2 | u64::from(longer) << 1 | u64::from(fresh)) + 1);
        if longer {
            put(&mut out, u64::from(run.pages) - 2);
        }
        if fresh {
            put(&mut out, round.0.into());
        }
        (end, last) = (run.first.0 + run.pages, round);
        if out.len() >= runs_max {
            return None;
        }
    }
    put(&mut out, 0);
    out.extend_from_slice(state);
    (out.len() <= bytes_max).then_some(out)
}

/// Gives the runs to `take`, one by one, and returns the VM's state. `pages` are those of the volume.
///
/// # Errors
/// Runs that are not ascending pages of the volume in a round from 1 on, or bytes that are no final set.
pub fn decode(bytes: &[u8], pages: u32, take: &mut dyn FnMut(PageRange, Round)) -> Result<usize, Malformed> {
    let mut rest = bytes;
    if next(&mut rest)? != VERSION {
        return Err(Malformed::Bounds("version of the final set"));
    }
    let (mut end, mut round) = (0_u64, 0_u64);
    while let Some(token) = next(&mut rest)?.checked_sub(1) {
        let first = end.checked_add(token >> 2).ok_or(OUTSIDE)?;
        let length = if token & 2 == 0 { 1 } else { next(&mut rest)?.checked_add(2).ok_or(OUTSIDE)? };
        if token & 1 != 0 {
            round = next(&mut rest)?;
        }
        end = first.checked_add(length).filter(|end| *end <= u64::from(pages)).ok_or(OUTSIDE)?;
        let of = u16::try_from(round).ok().filter(|round| *round > 0);
        let of = of.ok_or(Malformed::Bounds("round in the final set"))?;
        take(PageRange::new(PageIndex(first as u32), length as u32), Round(of));
    }
    Ok(bytes.len() - rest.len())
}

const OUTSIDE: Malformed = Malformed::Bounds("pages of the final set");

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn next(rest: &mut &[u8]) -> Result<u64, Malformed> {
    let mut number = 0_u64;
    for shift in (0..63).step_by(7) {
        let (byte, behind) = rest.split_first().ok_or(Malformed::Truncated)?;
        *rest = behind;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Malformed::Bounds("a number in the final set"))
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    type Decoded = (Vec<(PageRange, Round)>, Vec<u8>);

    fn decoded(bytes: &[u8], pages: u32) -> Result<Decoded, Malformed> {
        let mut runs = Vec::new();
        let at = decode(bytes, pages, &mut |run, round| runs.push((run, round)))?;
        Ok((runs, bytes[at..].to_vec()))
    }

    #[test]
    fn bytes_are_fixed() {
        let runs = [(0, 1, 1), (1, 2, 1), (100, 512, 3)];
        let runs = runs.map(|(first, pages, round)| (PageRange::new(PageIndex(first), pages), Round(round)));
        let bytes = encode(runs.into_iter(), b"vcpu");
        assert_eq!(bytes, [1, 2, 1, 3, 0, 0x88, 0x03, 0xfe, 0x03, 3, 0, b'v', b'c', b'p', b'u']);
        assert_eq!(decoded(&bytes, 612), Ok((runs.to_vec(), b"vcpu".to_vec())));
        assert_eq!(decoded(&bytes, 611), Err(OUTSIDE));
        assert_eq!(encode(std::iter::empty(), b"x"), [1, 0, b'x']);
        assert_eq!(decoded(&[2, 0], 9), Err(Malformed::Bounds("version of the final set")));
        assert_eq!(decoded(&[1, 1, 0], 9), Err(Malformed::Bounds("round in the final set")));
        assert_eq!(decoded(&[1], 9), Err(Malformed::Truncated));
    }

    #[test]
    fn a_page_here_and_there_is_a_byte() {
        let runs = (0..100_000).map(|nth| (PageRange::new(PageIndex(nth * 20), 1), Round(2)));
        assert!(encode(runs, &[]).len() < 100_010);
    }

    #[test]
    fn what_is_too_long_is_not_built() {
        let runs =
            || [(4, 2), (9, 1)].map(|(first, pages)| (PageRange::new(PageIndex(first), pages), Round(300)));
        let whole = encode(runs().into_iter(), b"vcpu");
        assert_eq!(encode_within(whole.len(), runs().into_iter(), b"vcpu"), Some(whole.clone()));
        for less in 0..whole.len() {
            assert_eq!(encode_within(less, runs().into_iter(), b"vcpu"), None, "{less}");
        }
        // It ends where it is clear, and not with the runs.
        let mut taken = 0_u32;
        let endless =
            (0..).map(|nth| (PageRange::new(PageIndex(nth * 2), 1), Round(1))).inspect(|_| taken += 1);
        assert_eq!(encode_within(1000, endless, &[0; 100]), None);
        assert!(taken < 1000);
    }

    proptest! {
        #[test]
        fn round_trips(lengths in proptest::collection::vec((0_u32..200, 1_u32..2000, 1_u16..5), 0..50), state: Vec<u8>) {
            let mut at = 0;
            let runs: Vec<_> = lengths.into_iter().map(|(gap, pages, round)| {
                let run = PageRange::new(PageIndex(at + gap), pages);
                at = run.first.0 + pages;
                (run, Round(round))
            }).collect();
            prop_assert_eq!(decoded(&encode(runs.iter().copied(), &state), at), Ok((runs, state)));
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100), pages: u32) {
            if let Ok((runs, state)) = decoded(&bytes, pages) {
                let again = encode(runs.iter().copied(), &state);
                prop_assert_eq!(decoded(&again, pages), Ok((runs, state)));
            }
        }
    }
}
