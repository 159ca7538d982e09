//! The index against a plain map, and what it keeps of older rounds.

use proptest::prelude::*;

use super::*;
use crate::ids::{Generation, MemberIndex, SlotIndex};

fn at(page: u32, round: u16, slot: u32) -> IndexEntry {
    let placement = Placement { member: MemberIndex(1), slot: SlotIndex(slot), generation: Generation(1) };
    IndexEntry::at(PageIndex(page), Round(round), placement, Checksum(slot ^ 5))
}

fn zero(page: u32, pages: u32, round: u16) -> IndexEntry {
    IndexEntry::zero(PageIndex(page), pages, Round(round))
}

fn put(index: &mut Index, entries: &[IndexEntry]) {
    index.put(entries, &mut || true).expect("there is room");
}

fn all(index: &Index) -> Vec<IndexEntry> {
    let mut out = Vec::new();
    index.locate(PageRange::new(PageIndex(0), u32::MAX), usize::MAX, &mut out);
    out
}

#[test]
fn an_empty_tebibyte_costs_nothing() {
    let mut index = Index::default();
    let pages = 1 << 28;
    for first in (0..pages).step_by(1 << 16) {
        put(&mut index, &[zero(first, 1 << 16, 0)]);
    }
    assert_eq!((index.blocks(), index.extents.len()), (0, 1));
    assert_eq!(index.pages(), u64::from(pages));
    assert_eq!(all(&index), [zero(0, pages, 0)]);
    put(&mut index, &[at(1000, 0, 9)]);
    assert_eq!((index.blocks(), index.extents.len()), (1, 3));
    assert_eq!(all(&index), [zero(0, 1000, 0), at(1000, 0, 9), zero(1001, pages - 1001, 0)]);
    put(&mut index, &[zero(0, u32::MAX, 1)]);
    assert_eq!(all(&index), [zero(0, u32::MAX, 1)]);
}

#[test]
fn a_newer_round_stays_and_the_same_is_put_again() {
    let mut index = Index::default();
    put(&mut index, &[at(7, 2, 1), at(7, 1, 2), zero(0, 2048, 1)]);
    assert_eq!(all(&index), [zero(0, 7, 1), at(7, 2, 1), zero(8, 2040, 1)]);
    put(&mut index, &[at(7, 2, 3)]);
    assert_eq!(all(&index)[1], at(7, 2, 3));
    put(&mut index, &[zero(0, 2048, 3)]);
    assert_eq!(all(&index), [zero(0, 2048, 3)]);
    assert_eq!(index.blocks(), 0);
}

#[test]
fn memory_is_asked_for() {
    let mut index = Index::default();
    let mut left = 1;
    let mut more = || {
        left -= 1;
        left >= 0
    };
    assert_eq!(index.put(&[at(1, 0, 1), at(2, 0, 2), at(600, 0, 3)], &mut more), Err(Full));
    assert_eq!(all(&index), [at(1, 0, 1), at(2, 0, 2)]);
    index.discard(PageRange::new(PageIndex(0), 3), Round(1));
    assert_eq!((index.blocks(), index.pages()), (0, 0));
}

#[test]
fn locate_stops_and_goes_on_behind() {
    let mut index = Index::default();
    put(&mut index, &[at(1, 0, 1), zero(2, 3, 0), at(5, 0, 2), at(9, 0, 3)]);
    let mut out = Vec::new();
    index.locate(PageRange::new(PageIndex(0), 100), 2, &mut out);
    assert_eq!(out, [at(1, 0, 1), zero(2, 3, 0)]);
    out.clear();
    index.locate(PageRange::new(PageIndex(4), 96), 3, &mut out);
    assert_eq!(out, [zero(4, 1, 0), at(5, 0, 2), at(9, 0, 3)]);
}

const PAGES: u32 = 5 * BLOCK_PAGES;

#[derive(Clone, Debug)]
enum Op {
    Put(IndexEntry),
    Discard(PageRange, u16),
}

fn ranges() -> impl Strategy<Value = (u32, u32)> {
    // Often at the edges of blocks, where the mistakes are.
    let edge = (0..=5_u32, -1..=1_i32)
        .prop_map(|(block, by)| (block * BLOCK_PAGES).saturating_add_signed(by).min(PAGES - 1));
    let point = prop_oneof![edge, 0..PAGES];
    (point.clone(), point).prop_map(|(a, b)| (a.min(b), a.abs_diff(b).max(1)))
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..PAGES, 0..4_u16, 0..1000_u32).prop_map(|(p, r, s)| Op::Put(at(p, r, s))),
        3 => (ranges(), 0..4_u16).prop_map(|((p, n), r)| Op::Put(zero(p, n, r))),
        1 => (ranges(), 0..5_u16).prop_map(|((p, n), r)| Op::Discard(PageRange::new(PageIndex(p), n), r)),
    ]
}

fn naive(model: &[Option<IndexEntry>], range: PageRange) -> Vec<IndexEntry> {
    let mut out = Vec::new();
    model[range.positions()].iter().flatten().for_each(|entry| {
        push(&mut out, *entry, usize::MAX);
    });
    out
}

proptest! {
    #[test]
    fn agrees_with_the_naive_one(ops in prop::collection::vec(ops(), 1..60), (first, pages) in ranges()) {
        let mut index = Index::default();
        let mut model = vec![None; PAGES as usize];
        for op in ops {
            match op {
                Op::Put(entry) => {
                    put(&mut index, &[entry]);
                    for page in entry.range().iter() {
                        let known: &mut Option<IndexEntry> = &mut model[page.as_usize()];
                        if known.is_none_or(|known| known.round <= entry.round) {
                            *known = Some(IndexEntry { page, run_pages: 1, ..entry });
                        }
                    }
                }
                Op::Discard(range, below) => {
                    index.discard(range, Round(below));
                    for known in &mut model[range.positions()] {
                        known.take_if(|known| known.round.0 < below);
                    }
                }
            }
            prop_assert_eq!(all(&index), naive(&model, PageRange::new(PageIndex(0), PAGES)));
        }
        let range = PageRange::new(PageIndex(first), pages);
        let mut out = Vec::new();
        index.locate(range, usize::MAX, &mut out);
        prop_assert_eq!(out, naive(&model, range));
        prop_assert_eq!(index.pages(), model.iter().flatten().count() as u64);
        let dense = index.extents.values().filter(|extent| matches!(extent, Extent::Dense(_))).count();
        prop_assert_eq!(index.blocks(), dense);
    }
}
