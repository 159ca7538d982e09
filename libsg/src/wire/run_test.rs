//! Runs of any shape come back as they were; bytes of any shape are refused or bounded.

use proptest::prelude::*;

use super::*;
use crate::ids::{Generation, MemberIndex};

/// Entries that partly follow one another: each is the last one's follower, or a fresh one.
fn chains<E: RunEntry + std::fmt::Debug>(fresh: impl Strategy<Value = E>) -> impl Strategy<Value = Vec<E>> {
    prop::collection::vec((fresh, 1..40_u32, any::<u32>()), 1..12).prop_map(|parts| {
        let spread = |(first, len, sum): (E, u32, u32)| {
            (0..len).filter_map(move |n| {
                let mut entry = first.nth(n)?;
                if entry.checksum().is_some() {
                    entry.set_checksum(Checksum(sum.wrapping_mul(n)));
                }
                Some(entry)
            })
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
    (pages(), 0..3_u16, 1..=u16::MAX, 0..4_u8).prop_map(|(page, round, run, kind)| match kind {
        0 => PageEntry::zero(page, run, Round(round)),
        1 => PageEntry::gone(page),
        2 => PageEntry {
            encoding: Encoding::Reference,
            encoded_bytes: CONTENT_HASH_BYTES as u16,
            ..PageEntry::raw(page, Round(round), Checksum(0))
        },
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
    assert_eq!(table.len(), runs * E::HEAD_BYTES + checksum_bytes(entries));
    decode_runs(&table, runs, &mut back).expect("own bytes decode");
    assert_eq!(back, entries);
    assert!(decode_runs(&table, runs + 1, &mut back).is_err());
    assert!(decode_runs(&table, runs - 1, &mut back).is_err());
    assert!(decode_runs(&table[1..], runs, &mut back).is_err());
    table.push(0);
    assert_eq!(decode_runs(&table, runs, &mut back), Err(Malformed::Trailing));
    let broken = (1..entries.len()).filter(|at| {
        let follows = entries[at - 1].nth(1).is_some_and(|next| {
            let mut next = next;
            entries[*at].checksum().into_iter().for_each(|sum| next.set_checksum(sum));
            next == entries[*at]
        });
        !follows
    });
    assert_eq!(runs, 1 + broken.count(), "as few runs as there are");
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
        let _ = decode_pages(&bytes, count, &mut Vec::new());
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

fn refused<E: RunEntry + std::fmt::Debug>(entry: &E, entries: u32, sums: usize, why: Malformed) {
    let mut table = Vec::new();
    entry.encode_head(entries, &mut table);
    table.resize(table.len() + sums * CHECKSUM_BYTES, 0);
    let mut out = Vec::new();
    assert_eq!(decode_runs::<E>(&table, 1, &mut out), Err(why), "{entries} of {entry:?}");
    assert!(out.len() <= E::ENTRIES_MAX);
}

#[test]
fn runs_are_bounded_before_they_are_spread_out() {
    let at = |page, slot| IndexEntry::at(PageIndex(page), Round(0), place(slot), Checksum(0));
    let get = |page, slot| GetEntry { page: PageIndex(page), placement: place(slot) };
    let raw = |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(0));
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
    refused(&PageEntry::zero(PageIndex(u32::MAX - 1), 2, Round(0)), 1, 0, pages);
    refused(&IndexEntry::zero(PageIndex(9), 0, Round(0)), 1, 0, pages);
    refused(&IndexEntry::zero(PageIndex(9), u32::MAX - 8, Round(0)), 1, 0, pages);

    let slots = Malformed::Bounds("run of slots");
    refused(&at(0, u32::MAX), 2, 2, slots);
    refused(&get(0, u32::MAX), 2, 0, slots);
    refused(&Some(place(u32::MAX)), 2, 0, slots);
    refused(&None::<Placement>, 0, 0, slots);

    // Many small runs are no way around it either.
    let mut table = Vec::new();
    assert_eq!(encode_runs((0..=batch).map(|n| get(n, 2 * n)), &mut table), batch as usize + 1);
    assert_eq!(decode_runs::<GetEntry>(&table, batch as usize + 1, &mut Vec::new()), Err(many));
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
    // Reserved bytes.
    assert_eq!(edited(19, 1).0, Err(Malformed::Reserved));
    assert_eq!(edited(9, 1).1, Err(Malformed::Reserved));
    assert_eq!(edited(6, 1).2, Err(Malformed::Reserved));
    assert_eq!(edited(11, 1).3, Err(Malformed::Reserved));
    // Encodings: none, unknown, and what an index does not hold.
    assert_eq!(edited(18, 0).0, Err(Malformed::Unknown("encoding", 0)));
    assert_eq!(edited(8, 9).1, Err(Malformed::Unknown("encoding", 9)));
    assert_eq!(edited(18, 3).0, Err(Malformed::Bounds("encoding of an index entry")));
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
    body.extend([7; 2 * PAGE_BYTES]);
    let mut out = Vec::new();
    assert_eq!(decode_pages(&body, 2, &mut out), Ok(&[7; 2 * PAGE_BYTES][..]));
    assert_eq!(out, entries);
    body.pop();
    assert_eq!(decode_pages(&body, 2, &mut out), Err(Malformed::Truncated));
    body.extend([0, 0]);
    assert_eq!(decode_pages(&body, 2, &mut out), Err(Malformed::Trailing));
}
