//! The slots against a model: written once, used again only under a new generation.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const CHUNK: u64 = CHUNK_BYTES as u64;

fn owner(page: u32, round: u16) -> Owner {
    Owner { page: PageIndex(page), checksum: Checksum(page.wrapping_mul(7)), round: Round(round) }
}

fn put(slots: &mut Slots, volume: VolumeId, page: u32, round: u16) -> (SlotIndex, Generation) {
    let mut runs = Vec::new();
    slots.allocate(volume, 1, &mut runs).expect("the volume is open");
    (runs[0].first, slots.store(runs[0].first, owner(page, round), None).expect("not dissolved"))
}

fn give_back(slots: &mut Slots) -> usize {
    std::iter::from_fn(|| slots.next_leaving().map(|number| slots.given_back(number))).count()
}

#[test]
fn a_batch_is_one_run_and_a_placement_is_exact() {
    let mut slots = Slots::new(4 * CHUNK);
    let (a, b) = (VolumeId(1), VolumeId(2));
    slots.open(a, None);
    slots.open(b, None);
    let mut runs = Vec::new();
    slots.allocate(a, 64, &mut runs).expect("the volume is open");
    assert_eq!(runs, [SlotRun { first: SlotIndex(0), slots: 64 }]);
    assert_eq!(slots.read(a, PageIndex(0), SlotIndex(0), Generation(1)), None, "not stored yet");
    let generation = slots.store(SlotIndex(0), owner(9, 1), None).expect("not dissolved");
    assert_eq!(slots.read(a, PageIndex(9), SlotIndex(0), generation), Some(owner(9, 1)));
    assert_eq!(slots.read(b, PageIndex(9), SlotIndex(0), generation), None, "another volume");
    assert_eq!(slots.read(a, PageIndex(8), SlotIndex(0), generation), None, "another page");
    assert_eq!(slots.read(a, PageIndex(9), SlotIndex(0), Generation(generation.0 + 1)), None);
    assert_eq!(slots.read(a, PageIndex(9), SlotIndex(u32::MAX), generation), None);
    let (slot, _) = put(&mut slots, b, 9, 0);
    assert_eq!(ChunkNumber::of(slot), ChunkNumber(1), "a chunk has one volume");
}

#[test]
fn a_batch_is_one_run_where_there_is_one() {
    let mut slots = Slots::new(4 * CHUNK);
    let volume = VolumeId(1);
    slots.open(volume, None);
    let mut runs = Vec::new();
    assert_eq!(slots.allocate(volume, 1024, &mut runs), Ok(1024));
    let hole = |first: u32, count: u32| (first..first + count).map(SlotIndex);
    let holes = [hole(0, 1), hole(10, 2), hole(100, 64), hole(700, 70)];
    holes.into_iter().flatten().for_each(|slot| slots.free(slot));
    let mut take = |count| {
        let mut runs = Vec::new();
        assert_eq!(slots.allocate(volume, count, &mut runs), Ok(count));
        runs.iter().map(|run| (run.first.0, run.slots)).collect::<Vec<_>>()
    };
    assert_eq!(take(64), [(100, 64)]);
    assert_eq!(take(66), [(700, 66)], "in another chunk than the last one");
    assert_eq!(take(2), [(10, 2)]);
    assert_eq!(take(100), [(766, 4), (0, 1), (1024, 95)], "the limit is filled, the longest first");
}

#[test]
fn the_limit_holds_and_a_stranger_gets_nothing() {
    let mut slots = Slots::new(2 * CHUNK + 17);
    let volume = VolumeId(1);
    let mut runs = Vec::new();
    assert_eq!(slots.allocate(volume, 1, &mut runs), Err(NoVolume));
    slots.open(volume, None);
    assert_eq!(slots.allocate(volume, 1025, &mut runs), Ok(1024));
    assert_eq!(slots.allocate(volume, 1, &mut Vec::new()), Ok(0));
    runs.iter().flat_map(|run| run.iter()).for_each(|slot| slots.free(slot));
    assert_eq!(give_back(&mut slots), 2);
    assert_eq!(slots.arena_bytes(), 0);
}

#[test]
fn what_is_pinned_is_not_used_again() {
    let mut slots = Slots::new(CHUNK);
    let volume = VolumeId(1);
    slots.open(volume, None);
    let (keeper, _) = put(&mut slots, volume, 1, 0);
    let (slot, generation) = put(&mut slots, volume, 2, 0);
    slots.pin(ChunkNumber(0));
    slots.discard_in(volume, 0, PageRange::new(PageIndex(2), 1), Round(1));
    assert_eq!(slots.read(volume, PageIndex(2), slot, generation), None);
    let mut runs = Vec::new();
    slots.allocate(volume, 510, &mut runs).expect("the volume is open");
    assert_eq!(slots.allocate(volume, 1, &mut Vec::new()), Ok(0), "it waits");
    slots.unpin(ChunkNumber(0));
    let (again, newer) = put(&mut slots, volume, 3, 0);
    assert_eq!((again, newer), (slot, Generation(generation.0 + 1)));

    slots.pin(ChunkNumber::of(keeper));
    assert_eq!(slots.dissolve(volume), 2);
    assert!(slots.condemned(ChunkNumber(0)));
    runs.iter()
        .flat_map(|run| run.iter())
        .for_each(|slot| assert_eq!(slots.store(slot, owner(5, 0), None), None));
    assert_eq!(give_back(&mut slots), 0);
    slots.unpin(ChunkNumber(0));
    assert_eq!(give_back(&mut slots), 1);
    assert_eq!(slots.arena_bytes(), 0);
}

#[test]
fn generations_go_on_and_are_never_used_up_unnoticed() {
    let mut slots = Slots::new(CHUNK);
    let volume = VolumeId(1);
    let mut seen = BTreeSet::new();
    for round in 0..3 * u32::from(u16::MAX) {
        slots.open(volume, None);
        let (slot, generation) = put(&mut slots, volume, round, 0);
        assert_ne!(generation.0, 0);
        assert!(seen.insert((slot.0, generation.0)), "{slot:?} {generation:?} twice");
        if round % 2 == 0 {
            slots.dissolve(volume);
        } else {
            slots.release(volume, PageIndex(round), slot, generation);
        }
        give_back(&mut slots);
    }
    assert_eq!(slots.stored_pages(), 0);
}

#[test]
fn ready_chunks_go_first_and_count() {
    let mut slots = Slots::new(2 * CHUNK);
    let volume = VolumeId(1);
    slots.open(volume, None);
    put(&mut slots, volume, 1, 0);
    let ahead = slots.prepare().expect("below the limit");
    assert_eq!(slots.prepare(), None, "the limit holds for them too");
    slots.prepared(ahead);
    let mut runs = Vec::new();
    slots.allocate(volume, 600, &mut runs).expect("the volume is open");
    assert_eq!(slots.ready_chunks(), 0);
    slots.dissolve(volume);
    runs.iter().flat_map(|run| run.iter()).for_each(|slot| slots.free(slot));
    give_back(&mut slots);
    let ahead = slots.prepare().expect("below the limit");
    slots.prepared(ahead);
    slots.drop_ready();
    assert_eq!(give_back(&mut slots), 1);
    assert_eq!(slots.arena_bytes(), 0);
}

#[derive(Clone, Debug)]
enum Op {
    Open(u8),
    Allocate(u8, usize),
    Store(prop::sample::Index, u32, u16),
    Free(prop::sample::Index),
    Pin(prop::sample::Index),
    Unpin(prop::sample::Index),
    Discard(u8, u32, u32, u16),
    Dissolve(u8),
    GiveBack,
}

fn ops() -> impl Strategy<Value = Op> {
    use prop::sample::Index;
    prop_oneof![
        1 => (0..3_u8).prop_map(Op::Open),
        4 => (0..3_u8, 1..200_usize).prop_map(|(v, n)| Op::Allocate(v, n)),
        8 => (any::<Index>(), 0..64_u32, 0..4_u16).prop_map(|(i, p, r)| Op::Store(i, p, r)),
        2 => any::<Index>().prop_map(Op::Free),
        2 => any::<Index>().prop_map(Op::Pin),
        2 => any::<Index>().prop_map(Op::Unpin),
        1 => (0..3_u8, 0..64_u32, 1..64_u32, 0..4_u16).prop_map(|(v, f, n, r)| Op::Discard(v, f, n, r)),
        1 => (0..3_u8).prop_map(Op::Dissolve),
        1 => Just(Op::GiveBack),
    ]
}

/// The naive one: what is in each slot that is given out, and all that was ever given out.
#[derive(Default)]
struct Model {
    open: BTreeSet<u8>,
    filling: Vec<(u8, SlotIndex)>,
    stored: BTreeMap<u32, (u8, Owner, Generation)>,
    issued: BTreeSet<(u32, u16)>,
    pins: Vec<ChunkNumber>,
    /// Freed in a chunk that was pinned then and since.
    frozen: BTreeSet<u32>,
}

impl Model {
    fn freed(&mut self, slot: SlotIndex) {
        if self.pins.contains(&ChunkNumber::of(slot)) {
            self.frozen.insert(slot.0);
        }
    }

    fn drop_stored(&mut self, doomed: impl Fn(u8, &Owner) -> bool) {
        let gone: Vec<u32> =
            self.stored.iter().filter(|(_, (v, o, _))| doomed(*v, o)).map(|(slot, _)| *slot).collect();
        for slot in gone {
            self.stored.remove(&slot);
            self.freed(SlotIndex(slot));
        }
    }

    fn apply(&mut self, slots: &mut Slots, op: Op) {
        match op {
            Op::Open(v) => {
                slots.open(VolumeId(v.into()), None);
                self.open.insert(v);
            }
            Op::Allocate(v, count) => self.allocate(slots, v, count),
            Op::Store(at, page, round) if !self.filling.is_empty() => {
                let (v, slot) = self.filling.swap_remove(at.index(self.filling.len()));
                match slots.store(slot, owner(page, round), None) {
                    Some(generation) => {
                        assert!(self.open.contains(&v));
                        assert!(self.issued.insert((slot.0, generation.0)), "a generation twice");
                        self.stored.insert(slot.0, (v, owner(page, round), generation));
                    }
                    None => self.freed(slot),
                }
            }
            Op::Free(at) if !self.filling.is_empty() => {
                let (_, slot) = self.filling.swap_remove(at.index(self.filling.len()));
                slots.free(slot);
                self.freed(slot);
            }
            Op::Pin(at) if !self.stored.is_empty() => {
                let slot = self.stored.keys().nth(at.index(self.stored.len())).expect("one is stored");
                slots.pin(ChunkNumber::of(SlotIndex(*slot)));
                self.pins.push(ChunkNumber::of(SlotIndex(*slot)));
            }
            Op::Unpin(at) if !self.pins.is_empty() => {
                let number = self.pins.swap_remove(at.index(self.pins.len()));
                slots.unpin(number);
                if !self.pins.contains(&number) {
                    self.frozen.retain(|slot| ChunkNumber::of(SlotIndex(*slot)) != number);
                }
            }
            Op::Discard(v, first, pages, below) => {
                let range = PageRange::new(PageIndex(first), pages);
                for nth in (0..slots.chunks_of(VolumeId(v.into()))).rev() {
                    slots.discard_in(VolumeId(v.into()), nth, range, Round(below));
                }
                let hit = |o: &Owner| range.positions().contains(&o.page.as_usize()) && o.round.0 < below;
                self.drop_stored(|of, o| of == v && hit(o));
            }
            Op::Dissolve(v) => {
                let had = self.stored.values().filter(|(of, ..)| *of == v).count();
                assert_eq!(slots.dissolve(VolumeId(v.into())), had as u64);
                self.open.remove(&v);
                self.drop_stored(|of, _| of == v);
                // What is being filled for it is condemned, also when the volume is opened again.
                self.filling.iter_mut().filter(|(of, _)| *of == v).for_each(|(of, _)| *of = u8::MAX);
            }
            Op::GiveBack => {
                give_back(slots);
            }
            _ => {}
        }
    }

    fn allocate(&mut self, slots: &mut Slots, v: u8, count: usize) {
        let mut runs = Vec::new();
        match slots.allocate(VolumeId(v.into()), count, &mut runs) {
            Ok(taken) => {
                assert!(self.open.contains(&v) && taken <= count);
                assert_eq!(runs.iter().map(|run| run.slots as usize).sum::<usize>(), taken);
                assert!(taken == count || slots.arena_bytes() == 5 * CHUNK, "room was left");
            }
            Err(NoVolume) => assert!(!self.open.contains(&v) && runs.is_empty()),
        }
        for slot in runs.iter().flat_map(|run| run.iter()) {
            assert!(!self.stored.contains_key(&slot.0), "{slot:?} holds a page");
            assert!(self.filling.iter().all(|(_, taken)| *taken != slot), "{slot:?} is being filled");
            assert!(!self.frozen.contains(&slot.0), "{slot:?} is being sent from");
            self.filling.push((v, slot));
        }
    }

    fn check(&self, slots: &Slots) {
        assert_eq!(slots.stored_pages(), self.stored.len() as u64);
        for (slot, (v, owner, generation)) in &self.stored {
            let read = |volume, page| slots.read(volume, page, SlotIndex(*slot), *generation);
            assert_eq!(read(VolumeId((*v).into()), owner.page), Some(*owner));
            assert_eq!(read(VolumeId(77), owner.page), None);
        }
        for v in 0..3 {
            let of = self.stored.values().filter(|(of, ..)| *of == v).count() as u64;
            assert_eq!(slots.stored_pages_of(VolumeId(v.into())), of);
        }
    }
}

proptest! {
    #[test]
    fn agrees_with_the_naive_one(ops in prop::collection::vec(ops(), 1..200)) {
        let mut slots = Slots::new(5 * CHUNK);
        let mut model = Model::default();
        for op in ops {
            model.apply(&mut slots, op);
            prop_assert!(slots.arena_bytes() <= 5 * CHUNK);
        }
        model.check(&slots);
        for v in 0..3 {
            model.apply(&mut slots, Op::Dissolve(v));
        }
        for (_, slot) in std::mem::take(&mut model.filling) {
            prop_assert_eq!(slots.store(slot, owner(0, 0), None), None);
        }
        std::mem::take(&mut model.pins).into_iter().for_each(|number| slots.unpin(number));
        give_back(&mut slots);
        prop_assert_eq!(slots.arena_bytes(), 0);
    }
}
