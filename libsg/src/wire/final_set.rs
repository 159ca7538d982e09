//! The final set: which copies count, written in front of the VM's state.
//!
//! A VM that runs while it is sent leaves older copies of pages behind, in the volume and at the destination. The final
//! set names every page that was sent again, with the round of its last copy. It lies in the state blob itself, at
//! the destination and in the volume, so that nobody can have the VM's state without knowing it.
//!
//! ```text
//!   version    1                                                one blob: the set, and the state
//!   runs       token + 1: gap << 2 | longer << 1 | new round   gap: pages since the last run
//!              [pages - 2]                                      if longer: of more than one page
//!              [round]                                          if it is not the last run's
//!   0
//!   the VM's state, to the end
//! ```
//!
//! All numbers are LEB128. A page written here and there costs a byte or two: it is sent while the VM is paused.
//!
//! A set that is longer than [`Limits`] say goes ahead of the state in pieces, each a blob of its own, whose pages lie
//! behind those of the pieces before it; then the state says how many there are:
//!
//! ```text
//!   version    2                                                version    3
//!   number     from 0 on                                        pieces     from 1 on
//!   runs       as above                                         the VM's state, to the end
//!   0
//! ```

use super::Malformed;
use crate::ids::Round;
use crate::limits;
use crate::page::{PageIndex, PageRange};

/// The set and the state in one blob; a piece of a set; a state behind pieces.
const WHOLE: u64 = 1;
const PIECE: u64 = 2;
const BEHIND: u64 = 3;

/// How long blobs may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a blob, the state included.
    pub blob_bytes: usize,
    /// Bytes of runs in a blob; what is longer is cut into pieces of that many.
    pub runs_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { blob_bytes: limits::STATE_BYTES_MAX, runs_bytes: limits::FINAL_PIECE_BYTES }
    }
}

/// A final set and a state, as blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blobs {
    /// Ahead of the state, in this order.
    pub pieces: Vec<Vec<u8>>,
    /// The state, with the whole set in front of it where there are no pieces.
    pub state: Vec<u8>,
}

/// The final set, ascending runs without overlap, and the state behind it, as one blob.
#[must_use]
pub fn encode(runs: impl Iterator<Item = (PageRange, Round)>, state: &[u8]) -> Vec<u8> {
    let limits = Limits { blob_bytes: usize::MAX, runs_bytes: usize::MAX };
    encode_within(limits, runs, state).map_or_else(Vec::new, |blobs| blobs.state)
}

/// The same, in blobs of such lengths. `None`: it takes more than [`limits::FINAL_PIECES_MAX`] of them, or the state
/// alone is too long; no more memory than that was used to find out.
#[must_use]
pub fn encode_within(
    limits: Limits,
    runs: impl Iterator<Item = (PageRange, Round)>,
    state: &[u8],
) -> Option<Blobs> {
    let (mut pieces, mut now) = (Vec::new(), Runs::default());
    for (run, round) in runs.filter(|(run, _)| run.pages > 0) {
        if now.bytes.len() >= limits.runs_bytes {
            pieces.push(std::mem::take(&mut now).piece(pieces.len())?);
        }
        now.push(run, round);
    }
    let mut blob = Vec::with_capacity(state.len() + now.bytes.len() + 8);
    if pieces.is_empty() && now.bytes.len() + state.len() + 2 <= limits.blob_bytes {
        put(&mut blob, WHOLE);
        blob.append(&mut now.bytes);
        put(&mut blob, 0);
    } else {
        if !now.bytes.is_empty() {
            pieces.push(now.piece(pieces.len())?);
        }
        put(&mut blob, BEHIND);
        put(&mut blob, pieces.len() as u64);
    }
    blob.extend_from_slice(state);
    (blob.len() <= limits.blob_bytes).then_some(Blobs { pieces, state: blob })
}

/// Runs that are encoded.
#[derive(Default)]
struct Runs {
    bytes: Vec<u8>,
    end: u32,
    last: Round,
}

impl Runs {
    fn push(&mut self, run: PageRange, round: Round) {
        let out = &mut self.bytes;
        let gap = u64::from(run.first.0.saturating_sub(self.end));
        let (longer, fresh) = (run.pages > 1, round != self.last);
        put(out, (gap << 2 | u64::from(longer) << 1 | u64::from(fresh)) + 1);
        if longer {
            put(out, u64::from(run.pages) - 2);
        }
        if fresh {
            put(out, round.0.into());
        }
        (self.end, self.last) = (run.first.0 + run.pages, round);
    }

    /// As a piece; `None` for one too many.
    fn piece(self, number: usize) -> Option<Vec<u8>> {
        if number >= limits::FINAL_PIECES_MAX as usize {
            return None;
        }
        let mut out = Vec::with_capacity(self.bytes.len() + 4);
        put(&mut out, PIECE);
        put(&mut out, number as u64);
        out.extend_from_slice(&self.bytes);
        put(&mut out, 0);
        Some(out)
    }
}

/// What a blob was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blob {
    /// A piece of the set: there is more.
    Piece,
    /// The last: the VM's state begins there.
    State(usize),
}

/// A final set whose blobs come one by one.
#[derive(Debug, Default)]
pub struct FinalSet {
    pieces: u64,
    /// Behind the last page that was named.
    end: u64,
    ended: bool,
}

impl FinalSet {
    /// Takes the next blob: gives its runs to `take`, one by one, and says what it was. `pages` are those of the volume.
    ///
    /// # Errors
    /// Runs that are not ascending pages of the volume in a round from 1 on, a piece out of turn or missing, or bytes
    /// that are no final set.
    pub fn take(
        &mut self,
        bytes: &[u8],
        pages: u32,
        take: &mut dyn FnMut(PageRange, Round),
    ) -> Result<Blob, Malformed> {
        let mut rest = bytes;
        let version = next(&mut rest)?;
        if self.ended {
            return Err(Malformed::Bounds("a final set behind the last"));
        }
        match version {
            WHOLE if self.pieces == 0 => self.runs(&mut rest, pages, take)?,
            PIECE => {
                if next(&mut rest)? != self.pieces || self.pieces >= limits::FINAL_PIECES_MAX.into() {
                    return Err(PIECES);
                }
                self.runs(&mut rest, pages, take)?;
                self.pieces += 1;
                return if rest.is_empty() { Ok(Blob::Piece) } else { Err(Malformed::Trailing) };
            }
            BEHIND => {
                if next(&mut rest)? != self.pieces || self.pieces == 0 {
                    return Err(PIECES);
                }
            }
            WHOLE => return Err(PIECES),
            _ => return Err(Malformed::Bounds("version of the final set")),
        }
        self.ended = true;
        Ok(Blob::State(bytes.len() - rest.len()))
    }

    fn runs(
        &mut self,
        rest: &mut &[u8],
        pages: u32,
        take: &mut dyn FnMut(PageRange, Round),
    ) -> Result<(), Malformed> {
        let (mut end, mut round) = (0_u64, 0_u64);
        while let Some(token) = next(rest)?.checked_sub(1) {
            let first = end.checked_add(token >> 2).filter(|first| *first >= self.end).ok_or(OUTSIDE)?;
            let length = if token & 2 == 0 { 1 } else { next(rest)?.checked_add(2).ok_or(OUTSIDE)? };
            if token & 1 != 0 {
                round = next(rest)?;
            }
            end = first.checked_add(length).filter(|end| *end <= u64::from(pages)).ok_or(OUTSIDE)?;
            let of = u16::try_from(round).ok().filter(|round| *round > 0);
            let of = of.ok_or(Malformed::Bounds("round in the final set"))?;
            take(PageRange::new(PageIndex(first as u32), length as u32), Round(of));
        }
        self.end = self.end.max(end);
        Ok(())
    }
}

/// How many pieces go ahead of a state.
///
/// # Errors
/// Bytes that are no state.
pub fn pieces_of(mut state: &[u8]) -> Result<u32, Malformed> {
    match next(&mut state)? {
        WHOLE => Ok(0),
        BEHIND => {
            let pieces = next(&mut state)?;
            u32::try_from(pieces)
                .ok()
                .filter(|pieces| (1..=limits::FINAL_PIECES_MAX).contains(pieces))
                .ok_or(PIECES)
        }
        _ => Err(Malformed::Bounds("version of the final set")),
    }
}

const PIECES: Malformed = Malformed::Bounds("pieces of the final set");
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
        match FinalSet::default().take(bytes, pages, &mut |run, round| runs.push((run, round)))? {
            Blob::State(at) => Ok((runs, bytes[at..].to_vec())),
            Blob::Piece => panic!("it is the whole"),
        }
    }

    /// All blobs, one by one.
    fn put_together(blobs: &Blobs, pages: u32) -> Result<Decoded, Malformed> {
        let (mut set, mut runs) = (FinalSet::default(), Vec::new());
        assert_eq!(pieces_of(&blobs.state), Ok(blobs.pieces.len() as u32));
        for piece in &blobs.pieces {
            assert_eq!(set.take(piece, pages, &mut |run, round| runs.push((run, round)))?, Blob::Piece);
        }
        match set.take(&blobs.state, pages, &mut |run, round| runs.push((run, round)))? {
            Blob::State(at) => Ok((runs, blobs.state[at..].to_vec())),
            Blob::Piece => panic!("it is the last"),
        }
    }

    fn small(runs_bytes: usize) -> Limits {
        Limits { blob_bytes: 1000, runs_bytes }
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
        assert_eq!(decoded(&[4, 0], 9), Err(Malformed::Bounds("version of the final set")));
        assert_eq!(decoded(&[1, 1, 0], 9), Err(Malformed::Bounds("round in the final set")));
        assert_eq!(decoded(&[1], 9), Err(Malformed::Truncated));
    }

    #[test]
    fn a_page_here_and_there_is_a_byte() {
        let runs = (0..100_000).map(|nth| (PageRange::new(PageIndex(nth * 20), 1), Round(2)));
        assert!(encode(runs, &[]).len() < 100_010);
    }

    #[test]
    fn a_long_set_goes_ahead_in_pieces() {
        let runs = [(0, 1, 1), (1, 2, 1), (100, 512, 3)];
        let runs = runs.map(|(first, pages, round)| (PageRange::new(PageIndex(first), pages), Round(round)));
        let blobs = encode_within(small(1), runs.into_iter(), b"vcpu").expect("it fits");
        let pieces: [&[u8]; 3] =
            [&[2, 0, 2, 1, 0], &[2, 1, 8, 0, 1, 0], &[2, 2, 0x94, 0x03, 0xfe, 0x03, 3, 0]];
        assert_eq!(blobs.pieces, pieces);
        assert_eq!(blobs.state, [3, 3, b'v', b'c', b'p', b'u']);
        assert_eq!(put_together(&blobs, 612), Ok((runs.to_vec(), b"vcpu".to_vec())));
        assert_eq!(put_together(&blobs, 611), Err(OUTSIDE));
        // In one where it fits.
        let whole = encode_within(small(100), runs.into_iter(), b"vcpu").expect("it fits");
        assert_eq!((whole.pieces.len(), whole.state), (0, encode(runs.into_iter(), b"vcpu")));
        // The state alone fills its blob.
        let beside = encode_within(small(100), runs.into_iter(), &[7; 995]).expect("it fits");
        assert_eq!((beside.pieces.len(), beside.state.len()), (1, 997));
        assert_eq!(encode_within(small(100), runs.into_iter(), &[7; 999]), None);
    }

    #[test]
    fn pieces_out_of_turn_are_refused() {
        let run = |first| (PageRange::new(PageIndex(first), 1), Round(1));
        let Blobs { pieces, state } =
            encode_within(small(1), [run(5), run(9)].into_iter(), b"x").expect("it fits");
        let all = |order: &[&[u8]]| {
            let mut set = FinalSet::default();
            order.iter().map(|blob| set.take(blob, 100, &mut |_, _| {})).last().expect("one")
        };
        assert_eq!(all(&[&pieces[0], &pieces[1], &state]), Ok(Blob::State(2)));
        for order in [
            &[&pieces[1][..]][..],
            &[&pieces[0], &pieces[0]],
            &[&pieces[0], &state],
            &[&state],
            &[&pieces[0], &[1, 0]],
            &[&[3, 0]],
        ] {
            assert_eq!(all(order), Err(PIECES), "{order:?}");
        }
        assert_eq!(all(&[&pieces[0], &[2, 1, 4 * 5 + 2, 1, 0]]), Err(OUTSIDE), "the same page again");
        assert_eq!(all(&[&[2, 0, 0, 0]]), Err(Malformed::Trailing));
        assert!(all(&[&pieces[0], &pieces[1], &state, &state]).is_err());
        assert_eq!((pieces_of(&[3, 0]), pieces_of(&[3, 0x81, 2])), (Err(PIECES), Err(PIECES)));
        assert!(pieces_of(&pieces[0]).is_err() && pieces_of(&[]).is_err());
    }

    #[test]
    fn what_is_too_long_is_not_built() {
        let mut taken = 0_u32;
        let endless =
            (0..).map(|nth| (PageRange::new(PageIndex(nth * 2), 1), Round(1))).inspect(|_| taken += 1);
        assert_eq!(encode_within(small(10), endless, &[0; 100]), None);
        assert!(taken < 10 * limits::FINAL_PIECES_MAX + 20, "{taken}");
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
            prop_assert_eq!(decoded(&encode(runs.iter().copied(), &state), at), Ok((runs.clone(), state.clone())));
            for runs_bytes in [1, 7, 50] {
                let limits = Limits { blob_bytes: 1 << 20, runs_bytes };
                let blobs = encode_within(limits, runs.iter().copied(), &state).expect("it fits");
                prop_assert!(blobs.pieces.iter().all(|piece| piece.len() < runs_bytes + 20));
                prop_assert_eq!(put_together(&blobs, at), Ok((runs.clone(), state.clone())));
            }
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100), pages: u32) {
            let (mut set, mut runs) = (FinalSet::default(), Vec::new());
            let _ = pieces_of(&bytes);
            if let Ok(Blob::State(at)) = set.take(&bytes, pages, &mut |run, round| runs.push((run, round))) {
                let again = encode(runs.iter().copied(), &bytes[at..]);
                prop_assert_eq!(decoded(&again, pages), Ok((runs, bytes[at..].to_vec())));
            }
        }
    }
}
