//! Rounds: whatever comes again, is staged, let go, lost or discarded, in whatever order: in the end the last version of
//! each page is safe.

use libsg::page::PAGE_BYTES;
use proptest::prelude::*;

use super::super::pages::test::{PAGES, SMALL, before_the_switch as pages, is_filled_with, unit, written};
use super::*;
use crate::relay::pages::{Limits, Lost};
use crate::relay::store::{Came, Slot, Writer};

/// Where a planner has a unit, and which version of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Waiting,
    Unsent,
    Staged(u8),
    Told(u8),
}

/// A source that sends, and a planner that stages.
struct World {
    pages: Pages,
    writer: Writer,
    /// What a unit's bytes are at the source, by its first page.
    version: Vec<u8>,
    /// What was sent of it last.
    sent: Vec<u8>,
    is: Vec<Is>,
    switched: bool,
}

fn firsts() -> impl Iterator<Item = u32> {
    (0..SMALL).chain([SMALL])
}

impl World {
    fn new() -> Self {
        let (mut pages, writer) = pages(Limits::of_window(0));
        pages.begin_rounds();
        let all = PAGES as usize;
        Self {
            pages,
            writer,
            version: vec![1; all],
            sent: vec![0; all],
            is: vec![Is::Waiting; all],
            switched: false,
        }
    }

    /// The source sends a unit as it is, a page after the other.
    fn come(&mut self, first: u32) {
        let at = first as usize;
        for page in unit(first).iter() {
            let came =
                written(&mut self.pages, &mut self.writer, PageRange::new(page, 1), |_| self.version[at]);
            came.into_iter().for_each(|came| self.pages.came_early(came));
        }
        self.sent[at] = self.version[at];
        self.named();
    }

    fn named(&mut self) {
        let mut runs = Vec::new();
        self.pages.take_untold(&mut runs);
        for page in runs.into_iter().flat_map(PageRange::iter) {
            let is = &mut self.is[unit(page.0).first.as_usize()];
            if *is == Is::Waiting {
                *is = Is::Unsent;
            }
        }
    }

    fn stage(&mut self, first: u32) {
        let at = first as usize;
        if self.is[at] == Is::Unsent {
            let mut rest = unit(first);
            while rest.pages > 0 {
                let slice = self.pages.slice(rest).expect("it was named").expect("inside");
                is_filled_with(&slice, self.sent[at]);
                let pages = (slice.len() / PAGE_BYTES) as u32;
                rest = PageRange::new(PageIndex(rest.first.0 + pages), rest.pages - pages);
            }
            self.is[at] = Is::Staged(self.sent[at]);
        }
    }

    fn tell(&mut self, first: u32) {
        if let Is::Staged(version) = self.is[first as usize] {
            self.is[first as usize] = Is::Told(version);
            self.pages.safe(unit(first));
        }
    }

    /// Whoever had it died.
    fn lose(&mut self, first: u32) -> Option<Lost> {
        match self.is[first as usize] {
            Is::Told(_) => {
                self.is[first as usize] = Is::Waiting;
                let lost = self.pages.lost(unit(first));
                self.named();
                Some(lost)
            }
            Is::Staged(_) => {
                self.is[first as usize] = Is::Unsent;
                None
            }
            _ => None,
        }
    }

    /// The next round: what came again is sent again.
    fn round(&mut self) {
        let mut written = Vec::new();
        self.pages.take_written(&mut written);
        let mut of: Vec<u32> =
            written.into_iter().flat_map(PageRange::iter).map(|page| unit(page.0).first.0).collect();
        of.dedup();
        for first in of {
            let lost = self.lose(first);
            assert!(lost != Some(Lost::Again) || self.pages.is_to_come(PageIndex(first)) && self.switched);
        }
    }
}

proptest! {
    #[test]
    fn the_last_version_of_each_page_is_safe_in_the_end(
        // Of few units, so that much happens to each.
        steps in prop::collection::vec((0..9_u8, prop::sample::select(vec![0, 1, 2, 3, 7, SMALL])), 1..200),
        late in prop::collection::vec(any::<bool>(), SMALL as usize + 1),
    ) {
        let mut world = World::new();
        for (what, first) in steps {
            match what {
                0..=2 => world.come(first),
                3 | 4 => world.stage(first),
                5 => world.tell(first),
                6 => drop(world.lose(first)),
                7 if world.sent[first as usize] > 0 => {
                    world.version[first as usize] += 1;
                    world.come(first);
                }
                _ => world.round(),
            }
        }
        // The switch: what the source never sent, or what was written since, is to come.
        for first in firsts() {
            let at = first as usize;
            if world.sent[at] == 0 || late[at] {
                world.version[at] += u8::from(world.sent[at] > 0);
                world.pages.discard(unit(first));
            }
        }
        world.pages.switched();
        world.switched = true;
        world.round();
        let mut withdrawn = Vec::new();
        world.pages.withdrawn(&mut withdrawn);
        for page in withdrawn.into_iter().flat_map(PageRange::iter) {
            let is = &mut world.is[unit(page.0).first.as_usize()];
            if *is == Is::Unsent {
                *is = Is::Waiting;
            }
        }
        world.named();
        for first in firsts() {
            let at = first as usize;
            if world.pages.is_to_come(PageIndex(first)) {
                let came = written(&mut world.pages, &mut world.writer, unit(first), |_| world.version[at]);
                came.into_iter().for_each(|came| world.pages.came(came));
                world.sent[at] = world.version[at];
            }
        }
        world.named();
        for first in firsts() {
            world.stage(first);
            let is = world.is[first as usize];
            let version = world.version[first as usize];
            prop_assert!(is == Is::Staged(version) || is == Is::Told(version), "{}: {:?}, not {}", first, is, version);
        }
    }
}

#[test]
fn a_unit_is_named_when_all_of_it_has_come() {
    let (mut pages, _) = pages(Limits::of_window(0));
    pages.begin_rounds();
    assert_eq!(pages.unseen(), PAGES - 512);
    let zeros = |first, pages| Came { pages: PageRange::new(PageIndex(first), pages), slot: Slot::ZERO };
    pages.came_early(zeros(0, 100));
    pages.came_early(zeros(SMALL, 511));
    let mut named = Vec::new();
    pages.take_untold(&mut named);
    assert_eq!(named, [PageRange::new(PageIndex(0), 100)]);
    pages.came_early(zeros(SMALL + 511, 1));
    named.clear();
    pages.take_untold(&mut named);
    assert_eq!((named, pages.unseen()), (vec![unit(SMALL)], 88));
}
