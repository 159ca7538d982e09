//! Slots that are shared, against a model: who holds what, and that nothing goes that anyone holds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::sharing::GRANT_TIME;
use super::*;
use crate::content::{CONTENT_HASH_BYTES, HashKind};

const CHUNK: u64 = CHUNK_BYTES as u64;
const VOLUMES: u8 = 5;

fn hash(content: u8) -> ContentHash {
    ContentHash([content; CONTENT_HASH_BYTES])
}

fn volume(v: u8) -> VolumeId {
    VolumeId(v.into())
}

/// Two domains, and one volume that shares with nobody.
fn domain(v: u8) -> Option<u8> {
    (v + 1 < VOLUMES).then_some(v % 2)
}

fn open(slots: &mut Slots, v: u8) {
    let sharing = domain(v).map(|d| Sharing { hash: HashKind::Blake3, domain: d.to_string() });
    slots.open(volume(v), sharing.as_ref());
}

fn put(slots: &mut Slots, v: u8, page: u32, round: u16, content: u8) -> Option<(SlotIndex, Generation)> {
    let mut runs = Vec::new();
    slots.allocate(volume(v), 1, &mut runs).ok()?;
    let slot = runs.first()?.first;
    let owner = Owner { page: PageIndex(page), checksum: Checksum(content.into()), round: Round(round) };
    let hash = hash(content);
    Some((slot, slots.store(slot, owner, domain(v).map(|_| &hash))?))
}

fn refer(slots: &mut Slots, v: u8, page: u32, content: u8, now: Instant) -> Referred {
    slots.refer(volume(v), (PageIndex(page), Round(0)), &hash(content), now).expect("the volume is open")
}

#[test]
fn one_sends_the_others_wait_and_then_have() {
    let (mut slots, now) = (Slots::new(4 * CHUNK), Instant::now());
    (0..VOLUMES).for_each(|v| open(&mut slots, v));
    assert_eq!(refer(&mut slots, 0, 1, 7, now), Referred::Send);
    assert_eq!(refer(&mut slots, 2, 1, 7, now), Referred::Pending);
    assert_eq!(refer(&mut slots, 1, 1, 7, now), Referred::Send, "another domain");
    assert_eq!(refer(&mut slots, 4, 1, 7, now), Referred::Send, "it shares with nobody");
    assert_eq!(refer(&mut slots, 4, 1, 7, now), Referred::Send);
    let late = now + GRANT_TIME;
    assert_eq!(refer(&mut slots, 2, 1, 7, late), Referred::Send, "who was to send it did not");
    assert_eq!(refer(&mut slots, 0, 1, 7, late), Referred::Pending);
    let (slot, generation) = put(&mut slots, 2, 1, 0, 7).expect("there is room");
    assert_eq!(refer(&mut slots, 0, 9, 7, late), Referred::Have(slot, generation));
    assert_eq!(refer(&mut slots, 1, 9, 7, late), Referred::Send);
    assert_eq!(slots.read(volume(0), PageIndex(1), slot, generation), None, "its page is another");
    assert_eq!(slots.read(volume(1), PageIndex(9), slot, generation), None);
    assert_eq!(slots.dissolve(volume(2)), 1);
    assert!(slots.read(volume(0), PageIndex(9), slot, generation).is_some(), "it outlives who sent it");
    assert_eq!(slots.read(volume(2), PageIndex(1), slot, generation), None);
    assert_eq!((slots.stored_pages(), slots.stored_pages_of(volume(0))), (1, 1));
    let (next, _) = put(&mut slots, 0, 2, 0, 8).expect("there is room");
    assert_eq!(ChunkNumber::of(next), ChunkNumber::of(slot), "the chunk was inherited");
    assert_eq!(slots.dissolve(volume(0)), 2);
    assert_eq!(refer(&mut slots, 3, 9, 7, late), Referred::Pending, "the other domain's grant");
    assert_eq!(slots.stored_pages(), 0);
}

#[test]
fn a_hint_is_told_to_those_of_the_domain_and_bytes_go_before_it() {
    let (mut slots, now) = (Slots::new(4 * CHUNK), Instant::now());
    (0..VOLUMES).for_each(|v| open(&mut slots, v));
    assert_eq!(refer(&mut slots, 0, 1, 7, now), Referred::Send);
    slots.hint(volume(0), &hash(7), 5);
    slots.hint(volume(4), &hash(7), 6);
    assert_eq!(refer(&mut slots, 2, 1, 7, now), Referred::At(5));
    assert_eq!(refer(&mut slots, 1, 1, 7, now), Referred::Send);
    assert_eq!(refer(&mut slots, 4, 1, 7, now), Referred::Send);
    assert_eq!(slots.grant(volume(2), &hash(7), now), Referred::Send, "who cannot ask there");
    assert_eq!(slots.grant(volume(0), &hash(7), now), Referred::Pending);
    let (slot, generation) = put(&mut slots, 2, 1, 0, 7).expect("there is room");
    assert_eq!(refer(&mut slots, 0, 1, 7, now), Referred::Have(slot, generation));
}

#[test]
fn a_page_that_holds_its_slot_twice_gives_it_back_twice() {
    let (mut slots, now) = (Slots::new(CHUNK), Instant::now());
    open(&mut slots, 0);
    let (slot, generation) = put(&mut slots, 0, 1, 0, 7).expect("there is room");
    // Written again, and the same as before.
    assert_eq!(refer(&mut slots, 0, 1, 7, now), Referred::Have(slot, generation));
    slots.release(volume(0), PageIndex(1), slot, generation);
    assert!(slots.read(volume(0), PageIndex(1), slot, generation).is_some());
    slots.release(volume(0), PageIndex(1), slot, generation);
    slots.release(volume(0), PageIndex(1), slot, generation);
    assert_eq!((slots.stored_pages(), slots.stored_pages_of(volume(0))), (0, 0));
}

#[test]
fn a_late_copy_of_an_older_round_changes_no_checksum() {
    let mut slots = Slots::new(CHUNK);
    open(&mut slots, 0);
    let (slot, generation) = put(&mut slots, 0, 1, 0, 7).expect("there is room");
    let mut share = |round, checksum| {
        let owner = Owner { page: PageIndex(1), checksum: Checksum(checksum), round: Round(round) };
        let there = slots.share(volume(0), owner, &hash(7));
        assert_eq!(there, Some((slot, generation)));
        slots.read(volume(0), PageIndex(1), slot, generation).map(|held| held.checksum)
    };
    assert_eq!(share(2, 70), Some(Checksum(70)));
    assert_eq!(share(1, 60), Some(Checksum(70)), "written to while it was sent");
    slots.release(volume(0), PageIndex(1), slot, generation);
    slots.release(volume(0), PageIndex(1), slot, generation);
    let left = slots.read(volume(0), PageIndex(1), slot, generation).map(|held| held.checksum);
    assert_eq!(left, Some(Checksum(70)));
}

#[derive(Clone, Debug)]
enum Op {
    Open(u8),
    Put(u8, u32, u16, u8),
    Refer(u8, u32, u16, u8),
    Release(prop::sample::Index),
    Discard(u8, u32, u32, u16),
    Dissolve(u8),
    Pin(prop::sample::Index),
    Later,
}

fn ops() -> impl Strategy<Value = Op> {
    use prop::sample::Index;
    let page = || (0..VOLUMES, 0..20_u32, 0..3_u16, 0..12_u8);
    prop_oneof![
        2 => (0..VOLUMES).prop_map(Op::Open),
        6 => page().prop_map(|(v, p, r, c)| Op::Put(v, p, r, c)),
        8 => page().prop_map(|(v, p, r, c)| Op::Refer(v, p, r, c)),
        4 => any::<Index>().prop_map(Op::Release),
        1 => (0..VOLUMES, 0..20_u32, 1..20_u32, 0..4_u16).prop_map(|(v, f, n, r)| Op::Discard(v, f, n, r)),
        1 => (0..VOLUMES).prop_map(Op::Dissolve),
        1 => any::<Index>().prop_map(Op::Pin),
        1 => Just(Op::Later),
    ]
}

/// One page's hold on a slot.
#[derive(Clone, Copy, Debug)]
struct Hold {
    v: u8,
    page: u32,
    slot: u32,
    round: u16,
    /// The slot was written for it.
    own: bool,
}

struct Model {
    open: BTreeSet<u8>,
    holds: Vec<Hold>,
    /// What was written where, under which generation.
    written: BTreeMap<u32, (u8, Generation)>,
    /// Bytes that were put while they lay elsewhere: the slot that is left of them may not be the known one.
    doubled: BTreeSet<u8>,
    grants: BTreeMap<(u8, u8), Instant>,
    /// Grants of domains that may have been forgotten since.
    unsure: BTreeSet<(u8, u8)>,
    pins: Vec<ChunkNumber>,
    now: Instant,
}

impl Model {
    fn refer(&mut self, slots: &mut Slots, (v, page, round, content): (u8, u32, u16, u8)) {
        let offered = slots.refer(volume(v), (PageIndex(page), Round(round)), &hash(content), self.now);
        let Ok(referred) = offered else {
            assert!(!self.open.contains(&v));
            return;
        };
        let Some(d) = domain(v) else {
            assert_eq!(referred, Referred::Send);
            return;
        };
        let of = |hold: &&Hold| domain(hold.v) == Some(d) && self.written[&hold.slot].0 == content;
        let there: BTreeSet<u32> = self.holds.iter().filter(of).map(|hold| hold.slot).collect();
        match referred {
            Referred::Have(slot, generation) => {
                assert!(there.contains(&slot.0), "other bytes, or another domain's");
                assert_eq!(self.written[&slot.0].1, generation);
                self.holds.push(Hold { v, page, slot: slot.0, round, own: false });
            }
            // Of bytes that were sent twice one slot is known, which may be gone.
            Referred::Send => {
                let over = self.grants.get(&(d, content)).is_none_or(|until| *until <= self.now);
                assert!(over || self.unsure.contains(&(d, content)));
                self.unsure.remove(&(d, content));
                self.grants.insert((d, content), self.now + GRANT_TIME);
            }
            Referred::Pending => assert!(self.grants[&(d, content)] > self.now),
            Referred::At(_) => panic!("nobody gave a hint"),
        }
        assert!(
            there.len() != 1 || matches!(referred, Referred::Have(..)) || self.doubled.contains(&content)
        );
    }

    fn apply(&mut self, slots: &mut Slots, op: Op) {
        match op {
            Op::Open(v) => {
                open(slots, v);
                self.open.insert(v);
            }
            Op::Put(v, page, round, content) => {
                let Some((slot, generation)) = put(slots, v, page, round, content) else { return };
                assert!(self.open.contains(&v));
                assert!(self.holds.iter().all(|hold| hold.slot != slot.0), "{slot:?} is held");
                let lies_elsewhere = |(at, (of, _)): (&u32, &(u8, _))| *at != slot.0 && *of == content;
                self.doubled.extend(self.written.iter().any(lies_elsewhere).then_some(content));
                self.written.insert(slot.0, (content, generation));
                self.holds.push(Hold { v, page, slot: slot.0, round, own: true });
                domain(v).and_then(|d| self.grants.remove(&(d, content)));
            }
            Op::Refer(v, page, round, content) => self.refer(slots, (v, page, round, content)),
            Op::Release(at) if !self.holds.is_empty() => {
                let hold = self.holds[at.index(self.holds.len())];
                let generation = self.written[&hold.slot].1;
                slots.release(volume(hold.v), PageIndex(hold.page), SlotIndex(hold.slot), generation);
                // Of a page's holds on a slot, one that was written for it goes first if it is older than all references, else
                // a reference, the oldest before the others.
                let same =
                    |other: &&Hold| (other.v, other.page, other.slot) == (hold.v, hold.page, hold.slot);
                let all = || self.holds.iter().filter(same);
                let newest = all().filter(|h| !h.own).map(|h| h.round).max();
                let older = all().find(|h| h.own && Some(h.round) < newest).map(|h| (h.own, h.round));
                let gone = older.or_else(|| all().map(|h| (h.own, h.round)).min()).expect("itself");
                let at = self.holds.iter().position(|h| same(&h) && (h.own, h.round) == gone);
                self.holds.remove(at.expect("there"));
            }
            Op::Discard(v, first, pages, below) => {
                let range = PageRange::new(PageIndex(first), pages);
                for nth in (0..slots.chunks_of(volume(v))).rev() {
                    slots.discard_in(volume(v), nth, range, Round(below));
                }
                slots.discard_references(volume(v), range, Round(below));
                let holds = self.holds.clone();
                self.holds.retain(|hold| {
                    // References of one page to one slot go together, by the newest of them.
                    let same =
                        |h: &&Hold| (h.v, h.page, h.slot, h.own) == (hold.v, hold.page, hold.slot, hold.own);
                    let newest = holds.iter().filter(same).map(|h| h.round).max();
                    let hit = range.positions().contains(&(hold.page as usize)) && newest < Some(below);
                    hold.v != v || !hit
                });
            }
            Op::Dissolve(v) => {
                let had = self.holds.iter().filter(|hold| hold.v == v).count();
                assert_eq!(slots.dissolve(volume(v)), had as u64);
                self.holds.retain(|hold| hold.v != v);
                self.open.remove(&v);
                // With the last of a domain what was granted in it is forgotten, when nothing is being filled or sent.
                let left = |d: u8| self.open.iter().any(|v| domain(*v) == Some(d)) || self.held_in(d);
                let gone = self.grants.keys().filter(|(d, _)| !left(*d)).copied().collect::<Vec<_>>();
                self.unsure.extend(gone);
            }
            Op::Pin(at) if !self.holds.is_empty() && self.pins.len() < 3 => {
                let number = ChunkNumber::of(SlotIndex(self.holds[at.index(self.holds.len())].slot));
                slots.pin(number);
                self.pins.push(number);
            }
            Op::Later => {
                self.now += Duration::from_millis(600);
                self.pins.drain(..).for_each(|number| slots.unpin(number));
            }
            _ => {}
        }
    }

    fn held_in(&self, d: u8) -> bool {
        self.holds.iter().any(|hold| domain(hold.v) == Some(d))
    }

    fn check(&self, slots: &Slots) {
        let slots_held: BTreeSet<u32> = self.holds.iter().map(|hold| hold.slot).collect();
        assert_eq!(slots.stored_pages(), slots_held.len() as u64);
        for v in 0..VOLUMES {
            let held = self.holds.iter().filter(|hold| hold.v == v).count();
            assert_eq!(slots.stored_pages_of(volume(v)), held as u64);
            for (slot, (content, generation)) in &self.written {
                for page in 0..20 {
                    let holds = self.holds.iter().filter(|h| (h.v, h.page, h.slot) == (v, page, *slot));
                    let newest = holds.map(|h| h.round).max();
                    let read = slots.read(volume(v), PageIndex(page), SlotIndex(*slot), *generation);
                    assert_eq!(
                        read.map(|owner| owner.round.0),
                        newest,
                        "volume {v}, page {page}, slot {slot}"
                    );
                    assert!(read.is_none_or(|owner| owner.checksum == Checksum((*content).into())));
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_goes_that_anyone_holds(ops in prop::collection::vec(ops(), 1..150)) {
        let mut slots = Slots::new(4 * CHUNK);
        let mut model = Model {
            open: BTreeSet::new(),
            holds: Vec::new(),
            written: BTreeMap::new(),
            doubled: BTreeSet::new(),
            grants: BTreeMap::new(),
            unsure: BTreeSet::new(),
            pins: Vec::new(),
            now: Instant::now(),
        };
        for op in ops {
            model.apply(&mut slots, op);
            std::iter::from_fn(|| slots.next_leaving().map(|number| slots.given_back(number))).for_each(drop);
        }
        model.check(&slots);
        for v in 0..VOLUMES {
            model.apply(&mut slots, Op::Dissolve(v));
            model.check(&slots);
        }
        model.apply(&mut slots, Op::Later);
        std::iter::from_fn(|| slots.next_leaving().map(|number| slots.given_back(number))).for_each(drop);
        prop_assert_eq!((slots.arena_bytes(), slots.domains.len()), (0, 0));
    }
}
