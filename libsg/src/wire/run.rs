//! Tables of runs: pages that lie close together travel as one head and a checksum each.
//!
//! A table has four parts: the heads of its runs, of a fixed size, as many as the header counts; a mask of 8
//! bytes for each run that has gaps, which says which of up to 64 pages are meant; the checksums of all pages
//! that have bytes, 4 bytes each, in the order of the pages; and in page frames the bytes. The parts before it say
//! how long each is, so that nothing is read, or made room for, that was not bounded before. In memory there is an
//! entry for each page: encoding joins what lies together, decoding spreads it out again, into a buffer of at
//! most [`RunEntry::ENTRIES_MAX`].

use std::mem::size_of;

use super::entry::{PageEntry, page_bytes};
use super::{Header, Malformed};
use crate::ids::Checksum;
use crate::page::PageRange;

/// Bytes of one checksum in a table.
pub const CHECKSUM_BYTES: usize = size_of::<u32>();

/// Bytes of the mask of a run with gaps.
const MASK_BYTES: usize = size_of::<u64>();

/// From so many entries on, a run is not looked at for what lies behind a gap: its head costs little.
const LONG: usize = 32;

/// What the head of a run says.
#[derive(Clone, Copy, Debug)]
pub struct Head<E> {
    /// The first entry: of one page, without its checksum.
    pub first: E,
    /// From the first page to the last.
    pub pages: u32,
    /// Whether there are gaps between them, which a mask tells.
    pub gaps: bool,
}

/// An entry that travels in runs.
pub trait RunEntry: Copy + PartialEq {
    /// Bytes of the head of a run.
    const HEAD_BYTES: usize;

    /// Entries of one table, spread out.
    const ENTRIES_MAX: usize;

    /// The entry of a run that begins with this one which is `pages` further on, and has `before` others before
    /// it. It has this one's checksum. `None` past the last number.
    fn further(&self, pages: u32, before: u32) -> Option<Self>;

    /// The pages of an entry that is about pages.
    fn range(&self) -> Option<PageRange>;

    /// The entry for `pages` pages, where one can stand for many.
    fn joined(&self, pages: u32) -> Option<Self>;

    /// Appends the head of a run that begins with this entry.
    fn encode_head(&self, pages: u32, gaps: bool, table: &mut Vec<u8>);

    /// The head of a run: of at least one page, all of which have numbers.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    fn decode_head(bytes: &[u8]) -> Result<Head<Self>, Malformed>;

    /// The checksum that travels behind the heads; `None` for an entry that has none.
    fn checksum(&self) -> Option<Checksum> {
        None
    }

    /// Sets the checksum of an entry that has one.
    fn set_checksum(&mut self, _checksum: Checksum) {}
}

/// Entries that travel together.
struct Run<E> {
    first: E,
    entries: usize,
    pages: u32,
    /// Which pages, for one with gaps.
    mask: Option<u64>,
}

/// Appends `entries` to `table`, in few runs. Returns how many: the count in the frame's header.
pub fn encode_runs<E: RunEntry, I>(entries: I, table: &mut Vec<u8>) -> usize
where
    I: IntoIterator<Item = E, IntoIter: Clone>,
{
    let entries = entries.into_iter();
    let (mut runs, mut masks) = (0, 0);
    for run in runs_of(entries.clone()) {
        run.first.encode_head(run.pages, run.mask.is_some(), table);
        runs += 1;
        masks += usize::from(run.mask.is_some());
    }
    for mask in runs_of(entries.clone()).filter_map(|run| run.mask).take(masks) {
        table.extend_from_slice(&mask.to_le_bytes());
    }
    for sum in entries.filter_map(|entry| entry.checksum()) {
        table.extend_from_slice(&sum.0.to_le_bytes());
    }
    runs
}

/// Bytes of the table of these entries.
#[must_use]
pub fn table_bytes<E: RunEntry>(entries: &[E]) -> usize {
    let bytes = |run: Run<E>| E::HEAD_BYTES + if run.mask.is_some() { MASK_BYTES } else { 0 };
    runs_of(entries.iter().copied()).map(bytes).sum::<usize>() + checksum_bytes(entries)
}

/// Cuts entries into runs, the longest from each entry on.
fn runs_of<E: RunEntry>(mut rest: impl Iterator<Item = E> + Clone) -> impl Iterator<Item = Run<E>> {
    std::iter::from_fn(move || {
        let first = rest.next()?;
        let dense = without_gaps(first, rest.clone());
        let sparse = if dense.entries < LONG { with_gaps(first, rest.clone()) } else { None };
        let run = sparse.filter(|sparse| sparse.entries > dense.entries).unwrap_or(dense);
        if run.entries > 1 {
            rest.nth(run.entries - 2);
        }
        Some(run)
    })
}

fn without_gaps<E: RunEntry>(first: E, rest: impl Iterator<Item = E>) -> Run<E> {
    let alone = first.joined(1).is_some();
    let follow = |(n, next): &(u32, E)| !alone && is_at(&first, *n, *n, next);
    let more = (1..E::ENTRIES_MAX as u32).zip(rest).take_while(follow).count();
    let pages = if alone { first.range().map_or(1, |range| range.pages) } else { 1 + more as u32 };
    Run { first, entries: 1 + more, pages, mask: None }
}

fn with_gaps<E: RunEntry>(first: E, rest: impl Iterator<Item = E>) -> Option<Run<E>> {
    let begin = first.range()?;
    let mut mask = mask_of(begin, begin)?;
    let (mut entries, mut last) = (1, begin);
    for next in rest {
        let Some(range) = next.range() else { break };
        // Entries that stand for many pages come back as they were only if there is a gap between them.
        let apart = u32::from(next.joined(1).is_some());
        let behind = range.first.0.checked_sub(last.first.0 + last.pages).is_some_and(|gap| gap >= apart);
        let Some(more) = mask_of(begin, range).filter(|_| behind) else { break };
        if !is_at(&first, range.first.0 - begin.first.0, entries as u32, &next) {
            break;
        }
        (mask, last) = (mask | more, range);
        entries += 1;
    }
    let pages = u64::BITS - mask.leading_zeros();
    Some(Run { first, entries, pages, mask: Some(mask) })
}

/// The pages of a range as bits of a mask that begins where `begin` does.
fn mask_of(begin: PageRange, range: PageRange) -> Option<u64> {
    let at = range.first.0.checked_sub(begin.first.0)?;
    let end = at.checked_add(range.pages).filter(|end| *end <= u64::BITS && range.pages > 0)?;
    Some((u64::MAX >> (u64::BITS - (end - at))) << at)
}

/// Whether `next` is the entry of a run that begins with `first` at that place, whatever its checksum.
fn is_at<E: RunEntry>(first: &E, pages: u32, before: u32, next: &E) -> bool {
    let Some(mut expected) = first.further(pages, before) else { return false };
    if let Some(joined) = next.range().and_then(|range| expected.joined(range.pages)) {
        expected = joined;
    }
    if let Some(sum) = next.checksum() {
        expected.set_checksum(sum);
    }
    expected == *next
}

/// Bytes of the masks that follow these heads.
///
/// # Errors
/// What is wrong with a head.
pub fn mask_bytes<E: RunEntry>(heads: &[u8]) -> Result<usize, Malformed> {
    heads
        .chunks_exact(E::HEAD_BYTES)
        .try_fold(0, |bytes, head| Ok(bytes + if E::decode_head(head)?.gaps { MASK_BYTES } else { 0 }))
}

/// Decodes the heads of runs, and their masks, into `out`, which is cleared first: an entry for each page,
/// without its checksum.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_heads<E: RunEntry>(heads: &[u8], masks: &[u8], out: &mut Vec<E>) -> Result<(), Malformed> {
    out.clear();
    let mut masks = masks.chunks_exact(MASK_BYTES);
    for head in heads.chunks_exact(E::HEAD_BYTES) {
        let head = E::decode_head(head)?;
        if !head.gaps {
            spread(&head, out)?;
            continue;
        }
        let mask = masks.next().and_then(|mask| mask.try_into().ok()).ok_or(Malformed::Truncated)?;
        let mask = u64::from_le_bytes(mask);
        // The first page and the last are in it, which makes it as long as the head says.
        if mask & 1 == 0 || u64::BITS - mask.leading_zeros() != head.pages {
            return Err(Malformed::Bounds("mask of a run"));
        }
        spread_mask(&head, mask, out)?;
    }
    Ok(())
}

fn spread<E: RunEntry>(head: &Head<E>, out: &mut Vec<E>) -> Result<(), Malformed> {
    if let Some(joined) = head.first.joined(head.pages) {
        return push(joined, out);
    }
    if head.pages as usize > E::ENTRIES_MAX - out.len() {
        return Err(Malformed::Bounds("entries of a table"));
    }
    (0..head.pages).try_for_each(|n| push(head.first.further(n, n).ok_or(OUT_OF_NUMBERS)?, out))
}

fn spread_mask<E: RunEntry>(head: &Head<E>, mask: u64, out: &mut Vec<E>) -> Result<(), Malformed> {
    let (mut left, mut before) = (mask, 0);
    while left != 0 {
        let at = left.trailing_zeros();
        let here = head.first.further(at, before).ok_or(OUT_OF_NUMBERS)?;
        let width = (left >> at).trailing_ones();
        let (entry, pages) = here.joined(width).map_or((here, 1), |joined| (joined, width));
        push(entry, out)?;
        left &= u64::MAX.checked_shl(at + pages).unwrap_or(0);
        before += 1;
    }
    Ok(())
}

const OUT_OF_NUMBERS: Malformed = Malformed::Bounds("run of slots");

fn push<E: RunEntry>(entry: E, out: &mut Vec<E>) -> Result<(), Malformed> {
    if out.len() >= E::ENTRIES_MAX {
        return Err(Malformed::Bounds("entries of a table"));
    }
    out.push(entry);
    Ok(())
}

/// Bytes of the checksums that follow the heads of these entries.
#[must_use]
pub fn checksum_bytes<E: RunEntry>(entries: &[E]) -> usize {
    entries.iter().filter(|entry| entry.checksum().is_some()).count() * CHECKSUM_BYTES
}

/// Gives decoded entries their checksums, of which there are exactly [`checksum_bytes`].
///
/// # Errors
/// There are fewer or more.
pub fn decode_checksums<E: RunEntry>(bytes: &[u8], entries: &mut [E]) -> Result<(), Malformed> {
    let mut sums = bytes.chunks_exact(CHECKSUM_BYTES);
    for entry in entries.iter_mut().filter(|entry| entry.checksum().is_some()) {
        let bytes = sums.next().and_then(|bytes| bytes.try_into().ok()).ok_or(Malformed::Truncated)?;
        entry.set_checksum(Checksum(u32::from_le_bytes(bytes)));
    }
    if sums.next().is_some() || !sums.remainder().is_empty() {
        return Err(Malformed::Trailing);
    }
    Ok(())
}

/// Decodes a table of exactly `count` runs into `out`, which is cleared first: an entry for each page.
///
/// # Errors
/// What is wrong with the bytes; what `out` then holds means nothing.
pub fn decode_runs<E: RunEntry>(bytes: &[u8], count: usize, out: &mut Vec<E>) -> Result<(), Malformed> {
    decode_checksums(heads_then(bytes, count, out)?, out)
}

/// Decodes a table of `count` runs with which `bytes` begin, as [`decode_runs`] does, and gives what follows it.
pub(super) fn runs_then<'a, E: RunEntry>(
    bytes: &'a [u8],
    count: usize,
    out: &mut Vec<E>,
) -> Result<&'a [u8], Malformed> {
    let rest = heads_then(bytes, count, out)?;
    let (sums, rest) = rest.split_at_checked(checksum_bytes(out)).ok_or(Malformed::Truncated)?;
    decode_checksums(sums, out)?;
    Ok(rest)
}

/// Decodes the heads and masks, and gives what follows them.
fn heads_then<'a, E: RunEntry>(
    bytes: &'a [u8],
    count: usize,
    out: &mut Vec<E>,
) -> Result<&'a [u8], Malformed> {
    let heads = count.saturating_mul(E::HEAD_BYTES);
    let (heads, rest) = bytes.split_at_checked(heads).ok_or(Malformed::Truncated)?;
    let (masks, rest) = rest.split_at_checked(mask_bytes::<E>(heads)?).ok_or(Malformed::Truncated)?;
    decode_heads(heads, masks, out)?;
    Ok(rest)
}

/// Decodes the body of a page frame (`GetReply`, `Pages`), whose table is as the header's checksum says: runs into `out`,
/// and the page bytes behind them, which are exactly as many as the entries say.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_pages<'a>(
    (header, body): (&Header, &'a [u8]),
    out: &mut Vec<PageEntry>,
) -> Result<&'a [u8], Malformed> {
    let bytes = runs_then(body, header.count.into(), out)?;
    match bytes.len().cmp(&page_bytes(out)) {
        std::cmp::Ordering::Less => return Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => return Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => {}
    }
    header.check_said(&body[..body.len() - bytes.len()])?;
    Ok(bytes)
}

#[cfg(test)]
#[path = "run_test.rs"]
mod test;
