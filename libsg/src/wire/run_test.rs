//! Runs of any shape come back as they were; bytes of any shape are refused or bounded.

use proptest::prelude::*;

use super::*;
use crate::ids::{Generation, MemberIndex, Placement, Round, SlotIndex};
use crate::limits;
use crate::page::{PAGE_BYTES, PageIndex};
use crate::wire::Kind;
use crate::wire::entry::{GetEntry, IndexEntry};

/// Entries that partly lie together, with gaps and without.
fn chains<E: RunEntry + std::fmt::Debug>(fresh: impl Strategy<Value = E>) -> impl Strategy<Value = Vec<E>> {
    let gaps = prop_oneof![2 => Just(1..2_u32), 1 => Just(1..4), 1 => Just(1..40)]
        .prop_flat_map(|gaps| prop::collection::vec(gaps, 0..40));
    prop::collection::vec((fresh, gaps, any::<u32>()), 1..12).prop_map(|parts| {
        let spread = |(first, gaps, sum): (E, Vec<u32>, u32)| {
            let mut at = 0;
            let mut more: Vec<E> = vec![first];
            for (before, gap) in (1..).zip(gaps) {
                at += gap;
                let Some(mut entry) = first.further(at, before) else { break };
                entry = entry.joined(1 + gap % 2).unwrap_or(entry);
                if entry.checksum().is_some() {
                    entry.set_checksum(Checksum(sum.wrapping_mul(before)));
                }
                more.push(entry);
            }
            more
        };
        parts.into_iter().flat_map(spread).collect()
    })
}

fn pages() -> impl Strategy<Value = PageIndex> {
    // Few enough that chains meet.
    prop_oneof![0..200_u32, 0..u32::MAX - 70_000].prop_map(PageIndex)
}

fn placements() -> impl Strategy<Value = Placement> {
    let slots = prop_oneof![0..200_u32, 0..u32::MAX - 70_000];
    (0..3_u16, slots, 1..3_u16).prop_map(|(member, slot, generation)| Placement {
        member: MemberIndex(member),
        slot: SlotIndex(slot),
        generation: Generation(generation),
    })
}

fn page_entries() -> impl Strategy<Value = PageEntry> {
    (pages(), 0..3_u16, 1..=u16::MAX, 0..3_u8).prop_map(|(page, round, run, kind)| match kind {
        0 => PageEntry::zero(page, run, Round(round)),
        1 => PageEntry::gone(page),
        _ => PageEntry::raw(page, Round(round), Checksum(0)),
    })
}

fn index_entries() -> impl Strategy<Value = IndexEntry> {
    (pages(), 0..3_u16, placements(), 1..=70_000_u32, any::<bool>()).prop_map(
        |(page, round, place, run, zero)| {
            if zero {
                IndexEntry::zero(page, run, Round(round))
            } else {
                IndexEntry::at(page, Round(round), place, Checksum(0))
            }
        },
    )
}

fn round_trip<E: RunEntry + std::fmt::Debug>(entries: &[E]) {
    let (mut table, mut back) = (Vec::new(), Vec::<E>::new());
    let runs = encode_runs(entries.iter().copied(), &mut table);
    assert_eq!(table.len(), table_bytes(entries));
    let alone: usize = entries.iter().map(|entry| table_bytes(&[*entry])).sum();
    assert!(table.len() <= alone, "never more than each on its own");
    decode_runs(&table, runs, &mut back).expect("own bytes decode");
    assert_eq!(back, entries);
    assert!(decode_runs(&table, runs + 1, &mut back).is_err());
    assert!(decode_runs(&table, runs - 1, &mut back).is_err());
    assert!(decode_runs(&table[1..], runs, &mut back).is_err());
    table.push(0);
    assert_eq!(decode_runs(&table, runs, &mut back), Err(Malformed::Trailing));
}

proptest! {
    #[test]
    fn runs_round_trip(
        pages in chains(page_entries()),
        index in chains(index_entries()),
        gets in chains((pages(), placements()).prop_map(|(page, placement)| GetEntry { page, placement })),
        stored in chains(prop::option::of(placements())),
    ) {
        round_trip(&pages);
        round_trip(&index);
        round_trip(&gets);
        round_trip(&stored);
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0_usize..20) {
        let header = Header { count: count as u16, ..Header::new(Kind::Pages) }.with_body(&bytes, 0);
        let _ = decode_pages((&header, &bytes), &mut Vec::new());
        let _ = decode_runs::<PageEntry>(&bytes, count, &mut Vec::new());
        let _ = decode_runs::<IndexEntry>(&bytes, count, &mut Vec::new());
        let _ = decode_runs::<GetEntry>(&bytes, count, &mut Vec::new());
        let _ = decode_runs::<Option<Placement>>(&bytes, count, &mut Vec::new());
    }
}

fn place(slot: u32) -> Placement {
    Placement { member: MemberIndex(1), slot: SlotIndex(slot), generation: Generation(1) }
}

#[test]
fn what_a_page_takes() {
    let mut table = Vec::new();
    let raw = |n| PageEntry::raw(PageIndex(n), Round(0), Checksum(n));
    assert_eq!(encode_runs((0..64).map(raw), &mut table), 1);
    assert_eq!(table.len(), 12 + 64 * 4);
    table.clear();
    let at = |n| IndexEntry::at(PageIndex(n), Round(0), place(n), Checksum(n));
    assert_eq!(encode_runs((0..64).map(at), &mut table), 1);
    assert_eq!(table.len(), 20 + 64 * 4);
    table.clear();
    assert_eq!(encode_runs((0..64).map(|n| at(n * 2)), &mut table), 64);
    assert_eq!(table.len(), 64 * 24, "never more than an entry for each");
    table.clear();
    assert_eq!(encode_runs([raw(0)], &mut table), 1);
    assert_eq!(table.len(), PageEntry::BYTES_MAX);
}

#[test]
fn what_lies_between_others_takes_a_bit() {
    // Every third page is zero, as in memory that is partly used.
    let (raw, zero): (Vec<u32>, Vec<u32>) = (0..64_u32).partition(|page| page % 3 != 0);
    let stored: Vec<_> = (0..)
        .zip(&raw)
        .map(|(slot, page)| IndexEntry::at(PageIndex(*page), Round(0), place(slot), Checksum(*page)))
        .collect();
    assert_eq!(table_bytes(&stored), 20 + 8 + raw.len() * 4);
    let zeros: Vec<_> = zero.iter().map(|page| IndexEntry::zero(PageIndex(*page), 1, Round(0))).collect();
    assert_eq!(table_bytes(&zeros), 20 + 8);
    let put: Vec<_> =
        raw.iter().map(|page| PageEntry::raw(PageIndex(*page), Round(0), Checksum(*page))).collect();
    assert_eq!(table_bytes(&put), 12 + 8 + raw.len() * 4);
    // Behind a long run nothing is looked for: it would only shift what follows.
    let long = |n| at(n, n);
    let gap = (0..40).chain(41..300).map(long);
    assert_eq!(encode_runs(gap, &mut Vec::new()), 2);
}

fn at(page: u32, slot: u32) -> IndexEntry {
    IndexEntry::at(PageIndex(page), Round(0), place(slot), Checksum(0))
}

fn get(page: u32, slot: u32) -> GetEntry {
    GetEntry { page: PageIndex(page), placement: place(slot) }
}

fn raw(page: u32) -> PageEntry {
    PageEntry::raw(PageIndex(page), Round(0), Checksum(0))
}

fn refused_with<E: RunEntry + std::fmt::Debug>(
    (first, pages): (&E, u32),
    mask: Option<u64>,
    sums: usize,
    why: Malformed,
) {
    let mut table = Vec::new();
    first.encode_head(pages, mask.is_some(), &mut table);
    mask.into_iter().for_each(|mask| table.extend(mask.to_le_bytes()));
    table.resize(table.len() + sums * CHECKSUM_BYTES, 0);
    let mut out = Vec::new();
    assert_eq!(decode_runs::<E>(&table, 1, &mut out), Err(why), "{pages} from {first:?} on");
    assert!(out.len() <= E::ENTRIES_MAX);
}

fn refused<E: RunEntry + std::fmt::Debug>(first: &E, pages: u32, sums: usize, why: Malformed) {
    refused_with((first, pages), None, sums, why);
}

#[test]
fn runs_are_bounded_before_they_are_spread_out() {
    let (max, batch) = (limits::INDEX_ENTRIES_MAX as u32, limits::BATCH_PAGES_MAX as u32);
    let many = Malformed::Bounds("entries of a table");
    refused(&at(0, 0), max + 1, max as usize + 1, many);
    refused(&at(0, 0), 1 << 31, 0, many);
    refused(&raw(0), batch + 1, batch as usize + 1, many);
    refused(&get(0, 0), batch + 1, 0, many);
    refused(&Some(place(0)), batch + 1, 0, many);
    refused(&None::<Placement>, batch + 1, 0, many);
    refused(&at(0, 0), max, max as usize - 1, Malformed::Truncated);
    refused(&at(0, 0), max, max as usize + 1, Malformed::Trailing);

    let pages = Malformed::Bounds("run of pages");
    refused(&at(0, 0), 0, 0, pages);
    refused(&raw(0), 0, 0, pages);
    refused(&get(0, 0), 0, 0, pages);
    refused(&at(u32::MAX - 1, 0), 2, 2, pages);
    refused(&raw(u32::MAX - 1), 2, 2, pages);
    refused(&get(u32::MAX - 1, 0), 2, 0, pages);
    refused(&PageEntry::zero(PageIndex(u32::MAX - 1), 1, Round(0)), 2, 0, pages);
    refused(&IndexEntry::zero(PageIndex(9), 1, Round(0)), 0, 0, pages);
    refused(&IndexEntry::zero(PageIndex(9), 1, Round(0)), u32::MAX - 8, 0, pages);

    let slots = Malformed::Bounds("run of slots");
    refused(&at(0, u32::MAX), 2, 2, slots);
    refused(&get(0, u32::MAX), 2, 0, slots);
    refused(&Some(place(u32::MAX)), 2, 0, slots);
    refused(&None::<Placement>, 0, 0, slots);

    // Many small runs are no way around it either, nor are masks.
    let mut table = Vec::new();
    assert_eq!(encode_runs((0..=batch).map(|n| get(n, 2 * n)), &mut table), batch as usize + 1);
    assert_eq!(decode_runs::<GetEntry>(&table, batch as usize + 1, &mut Vec::new()), Err(many));
    let (mut heads, mut masks) = (Vec::new(), Vec::new());
    for n in 0..=batch / 64 {
        get(n * 64, 0).encode_head(64, true, &mut heads);
        masks.extend(u64::MAX.to_le_bytes());
    }
    assert_eq!(decode_heads::<GetEntry>(&heads, &masks, &mut Vec::new()), Err(many));
}

#[test]
fn masks_say_what_their_heads_say() {
    let mask = Malformed::Bounds("mask of a run");
    refused_with((&at(0, 0), 65), Some(1), 1, mask);
    refused_with((&at(0, 0), 4), Some(0), 0, mask);
    refused_with((&at(0, 0), 4), Some(0b1000), 1, mask);
    refused_with((&at(0, 0), 4), Some(0b0101), 2, mask);
    refused_with((&raw(0), 2), Some(0b101), 2, mask);
    refused_with((&get(0, 0), 64), Some(u64::MAX >> 1), 0, mask);
    refused_with((&at(0, 0), 4), Some(0b1001), 1, Malformed::Truncated);
    refused_with((&at(0, 0), 4), Some(0b1001), 3, Malformed::Trailing);
    refused_with((&at(0, u32::MAX), 4), Some(0b1001), 2, Malformed::Bounds("run of slots"));
    refused_with((&at(u32::MAX - 3, 0), 4), Some(0b1001), 2, Malformed::Bounds("run of pages"));
    let mut table = Vec::new();
    at(7, 5).encode_head(64, true, &mut table);
    table.extend((1_u64 << 63 | 1).to_le_bytes());
    table.extend([0; 8]);
    let mut out = Vec::new();
    assert_eq!(decode_runs(&table, 1, &mut out), Ok(()));
    assert_eq!(out, [at(7, 5), at(70, 6)]);
    assert_eq!(decode_runs::<IndexEntry>(&table[..24], 1, &mut out), Err(Malformed::Truncated));
}

#[test]
fn fields_that_no_honest_peer_sets_are_refused() {
    let edited = |at: usize, value: u8| {
        let (mut index, mut page, mut get, mut stored) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        encode_runs([IndexEntry::at(PageIndex(1), Round(0), place(2), Checksum(3))], &mut index);
        encode_runs([PageEntry::raw(PageIndex(1), Round(0), Checksum(3))], &mut page);
        encode_runs([GetEntry { page: PageIndex(1), placement: place(2) }], &mut get);
        encode_runs([Some(place(2))], &mut stored);
        for table in [&mut index, &mut page, &mut get, &mut stored] {
            if let Some(byte) = table.get_mut(at) {
                *byte = value;
            }
        }
        (
            decode_runs::<IndexEntry>(&index, 1, &mut Vec::new()),
            decode_runs::<PageEntry>(&page, 1, &mut Vec::new()),
            decode_runs::<GetEntry>(&get, 1, &mut Vec::new()),
            decode_runs::<Option<Placement>>(&stored, 1, &mut Vec::new()),
        )
    };
    assert_eq!(edited(100, 0), (Ok(()), Ok(()), Ok(()), Ok(())));
    // Neither with gaps nor without; reserved bytes.
    assert_eq!(edited(19, 2).0, Err(Malformed::Reserved));
    assert_eq!(edited(9, 2).1, Err(Malformed::Reserved));
    assert_eq!(edited(6, 2).2, Err(Malformed::Reserved));
    assert_eq!(edited(7, 1).2, Err(Malformed::Reserved));
    assert_eq!(edited(11, 1).3, Err(Malformed::Reserved));
    // Encodings: none, unknown, and what an index does not hold.
    assert_eq!(edited(18, 0).0, Err(Malformed::Unknown("encoding", 0)));
    assert_eq!(edited(18, 3).0, Err(Malformed::Unknown("encoding", 3)));
    assert_eq!(edited(8, 9).1, Err(Malformed::Unknown("encoding", 9)));
    assert_eq!(edited(18, 4).0, Err(Malformed::Bounds("encoding of an index entry")));
    assert_eq!(edited(18, 2).0, Err(Malformed::Bounds("placement")), "zero pages lie nowhere");
    assert_eq!(edited(8, 2).1, Err(Malformed::Bounds("encoded length")));
    // A generation of zero is no placement.
    assert_eq!(edited(12, 0).0, Err(Malformed::Bounds("placement")));
    assert_eq!(edited(12, 0).2, Err(Malformed::Bounds("placement")));
    assert_eq!(edited(4, 0).3, Err(Malformed::Bounds("placement")));
}

#[test]
fn page_frames_have_exactly_the_bytes_they_say() {
    let entries = [
        PageEntry::raw(PageIndex(1), Round(0), Checksum(2)),
        PageEntry::raw(PageIndex(2), Round(0), Checksum(3)),
        PageEntry::zero(PageIndex(3), 9, Round(0)),
    ];
    let mut body = Vec::new();
    assert_eq!(encode_runs(entries, &mut body), 2);
    let header = Header { count: 2, ..Header::new(Kind::Pages) }.with_body(&body, 2 * PAGE_BYTES);
    body.extend([7; 2 * PAGE_BYTES]);
    let mut out = Vec::new();
    assert_eq!(decode_pages((&header, &body), &mut out), Ok(&[7; 2 * PAGE_BYTES][..]));
    assert_eq!(out, entries);
    // A checksum in the table, which nothing else tells from another.
    let table_bytes = body.len() - 2 * PAGE_BYTES;
    body[table_bytes - 1] ^= 1;
    assert_eq!(decode_pages((&header, &body), &mut out), Err(Malformed::BodyChecksum));
    body[table_bytes - 1] ^= 1;
    body.pop();
    assert_eq!(decode_pages((&header, &body), &mut out), Err(Malformed::Truncated));
    body.extend([0, 0]);
    assert_eq!(decode_pages((&header, &body), &mut out), Err(Malformed::Trailing));
}
