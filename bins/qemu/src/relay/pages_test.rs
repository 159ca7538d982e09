//! The books of the relay: memory is used again when pages are safe and nobody reads them, and they are asked for in time.

use std::collections::BTreeMap;

use libsg::page::PAGE_BYTES;
use proptest::prelude::*;
use qemu_stream::{Block, Blocks};

use super::*;
use crate::relay::store::{CHUNK_SLOTS, Slot, write};

/// 700 pages, of which each fourth is zero, and one of 2 MiB.
pub const SMALL: u32 = 700;
pub const PAGES: u32 = SMALL + 512;

pub fn pages(limits: Limits) -> (Pages, Writer) {
    let (mut pages, writer) = before_the_switch(limits);
    pages.discard(PageRange::new(PageIndex(0), PAGES));
    pages.switched();
    (pages, writer)
}

/// Nothing has come of them.
pub fn before_the_switch(limits: Limits) -> (Pages, Writer) {
    let huge = Block { page_bytes: 2 << 20, ..Block::new("huge", 2 << 20) };
    let blocks = Blocks::new(vec![Block::new("ram", u64::from(SMALL) << 12), huge]).expect("blocks");
    let pages = Pages::new(Arc::new(Layout::new(blocks)), limits).expect("memory");
    let writer = pages.writer();
    (pages, writer)
}

/// Pages that came together, each full of this byte.
pub fn written(
    pages: &mut Pages,
    writer: &mut Writer,
    range: PageRange,
    byte: impl Fn(u32) -> u8,
) -> Vec<Came> {
    let mut all: Vec<Came> = Vec::new();
    for page in range.iter() {
        let byte = byte(page.0);
        let slot = if byte == 0 { Slot::ZERO } else { write(&mut pages.store, writer, byte) };
        if !all.last_mut().is_some_and(|came| came.join(page, slot)) {
            all.push(Came { pages: PageRange::new(page, 1), slot });
        }
    }
    all
}

/// What fills a page: none is zero that has bytes.
fn fill(page: u32) -> u8 {
    if page < SMALL && page.is_multiple_of(4) { 0 } else { (page % 255) as u8 + 1 }
}

/// A page comes, as a source sends it.
fn come((pages, writer): (&mut Pages, &mut Writer), range: PageRange) {
    written(pages, writer, range, fill).into_iter().for_each(|came| pages.came(came));
}

pub fn unit(page: u32) -> PageRange {
    if page < SMALL { PageRange::new(PageIndex(page), 1) } else { PageRange::new(PageIndex(SMALL), 512) }
}

/// All of a slice's bytes are this one.
pub fn is_filled_with(slice: &PageSlice, byte: u8) {
    let mut bytes = vec![0; slice.len()];
    slice.copy_to(&mut bytes);
    assert!(bytes.iter().all(|at| *at == byte), "it is not of version {byte}");
}

/// A slice has the bytes of its pages.
fn is_right(first: u32, slice: &PageSlice) {
    let mut bytes = vec![0; slice.len()];
    slice.copy_to(&mut bytes);
    for (page, bytes) in (first..).zip(bytes.chunks(PAGE_BYTES)) {
        assert!(bytes.iter().all(|byte| *byte == fill(page)), "page {page} is not what it was");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    ToCome,
    Here,
    Safe,
}

proptest! {
    /// Whatever is said of pages in whatever order: what can be read is right, also when its page was let go meanwhile, lost,
    /// and has come again; and of what is safe and read by nobody the memory is free.
    #[test]
    fn no_page_is_read_that_was_let_go(steps in prop::collection::vec((0..8_u8, 0..PAGES), 1..400)) {
        let (mut pages, mut writer) = pages(Limits::of_window(0));
        let mut is = vec![Is::ToCome; PAGES as usize];
        let mut slices: BTreeMap<u32, PageSlice> = BTreeMap::new();
        let mut asks = Vec::new();
        for (what, page) in steps {
            let unit = unit(page);
            let was = is[page as usize];
            let mut set = |to| unit.positions().for_each(|at| is[at] = to);
            match what {
                0 | 1 if was == Is::ToCome => {
                    come((&mut pages, &mut writer), unit);
                    set(Is::Here);
                }
                2 | 3 if was == Is::Here => {
                    pages.safe(unit);
                    set(Is::Safe);
                }
                4 if was == Is::Safe => {
                    prop_assert_eq!(pages.lost(unit), Lost::Again);
                    prop_assert!(unit.iter().all(|page| pages.is_to_come(page)));
                    set(Is::ToCome);
                }
                5 => match pages.slice(PageRange::new(PageIndex(page), 64)) {
                    Some(slice) => {
                        let slice = slice.expect("inside");
                        prop_assert_eq!(was, Is::Here);
                        is_right(page, &slice);
                        slices.insert(page, slice);
                    }
                    None => prop_assert_ne!(was, Is::Here),
                },
                6 => {
                    if let Some((first, slice)) = slices.pop_first() {
                        is_right(first, &slice);
                    }
                }
                _ => pages.next_asks(page % 2 == 0, &mut asks),
            }
            for (first, slice) in &slices {
                is_right(*first, slice);
            }
            let count = |wanted| is.iter().filter(|is| **is == wanted).count() as u32;
            prop_assert_eq!((pages.here_count, pages.to_come_count), (count(Is::Here), count(Is::ToCome)));
            prop_assert_eq!(pages.asked_count, pages.asked.count());
            prop_assert!(pages.asked.runs().flat_map(PageRange::iter).all(|page| pages.to_come.contains(page)));
        }
        slices.clear();
        pages.store.tidy();
        let has_bytes = |page: &u32| is[*page as usize] == Is::Here && fill(*page) > 0;
        let kept = (0..PAGES).filter(has_bytes).count() as u32;
        // In pieces at worst, and what is written next.
        prop_assert!(pages.store.used_slots() <= (kept + 1) * CHUNK_SLOTS, "{} are used", pages.store.used_slots());
    }
}

fn next(pages: &mut Pages, all: bool) -> Vec<PageRange> {
    let mut asks = Vec::new();
    pages.next_asks(all, &mut asks);
    asks.iter().map(|(block, span)| pages.layout.range(*block, *span)).collect()
}

#[test]
fn what_is_asked_for_has_room_and_the_last_pages_are_left() {
    let limits = Limits { window_pages: 500, asked_pages: 400, last_pages: 40, ..Limits::of_window(0) };
    let (mut pages, mut writer) = pages(limits);
    assert_eq!(next(&mut pages, false), [PageRange::new(PageIndex(0), 400)]);
    assert_eq!(next(&mut pages, false), []);
    come((&mut pages, &mut writer), PageRange::new(PageIndex(0), 150));
    assert_eq!(next(&mut pages, false), [PageRange::new(PageIndex(400), 100)], "500 are here, or asked for");
    // What the guest waits for is asked for whatever room there is, and its whole unit.
    let (block, span) = pages.want(PageIndex(SMALL + 9)).expect("to be asked");
    assert_eq!(pages.layout.range(block, span), unit(SMALL));
    assert!(pages.has_room() && pages.want(PageIndex(SMALL + 10)).is_none());
    come((&mut pages, &mut writer), unit(SMALL));
    assert!(!pages.has_room());
    // All is safe but the last ones, which then may come.
    for range in [PageRange::new(PageIndex(150), 150), PageRange::new(PageIndex(300), SMALL - 300 - 40)] {
        come((&mut pages, &mut writer), range);
        assert!(!pages.is_idle());
    }
    pages.safe(PageRange::new(PageIndex(0), SMALL - 40));
    pages.safe(unit(SMALL));
    assert!(pages.is_idle());
    pages.want(PageIndex(SMALL - 1)).expect("to be asked");
    assert!(pages.is_idle(), "what the guest waits for is one of the last");
    assert_eq!(next(&mut pages, false), []);
    assert_eq!(next(&mut pages, true), [PageRange::new(PageIndex(SMALL - 40), 39)]);
    // Broken off, what was asked for is asked for again.
    pages.broken();
    assert_eq!(next(&mut pages, true), [PageRange::new(PageIndex(SMALL - 40), 40)]);
}

#[test]
fn what_comes_though_it_is_safe_is_let_go() {
    let (mut pages, mut writer) = pages(Limits::of_window(0));
    pages.safe(PageRange::new(PageIndex(1), 1));
    come((&mut pages, &mut writer), PageRange::new(PageIndex(0), 3));
    let mut told = Vec::new();
    pages.take_untold(&mut told);
    assert_eq!(told, [PageRange::new(PageIndex(0), 1), PageRange::new(PageIndex(2), 1)]);
    assert!(pages.slice(PageRange::new(PageIndex(1), 1)).is_none());
    come((&mut pages, &mut writer), PageRange::new(PageIndex(3), 400));
    pages.safe(PageRange::new(PageIndex(0), 403));
    assert_eq!(pages.store.used_slots(), CHUNK_SLOTS, "nothing is kept, and one chunk is written");
}
