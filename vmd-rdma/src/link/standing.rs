//! Chunks that stay as they are at the intermediary though nothing is read from them now: pages of them of which it is known
//! what they are, are read without asking.
//!
//! That the chunk is not given back is what a request for a page in it has seen to, which is not released. Whether the bytes
//! are the page's they say themselves, by their checksum. Whether reading there is still free is asked once a second.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use libsg::ids::SlotIndex;
use libsg::vmd::{Class, Ticket};
use libsg::wire::GetEntry;
use libsg::wire::access::KeyEntry;

/// Requests that are kept for pages that somebody waits for, anywhere in a volume: 1 GiB of it, as nobody fills the chunks
/// any more by then.
const URGENT_MAX: usize = 512;

/// And for those that are read as they lie, as long as there are any: what comes free in these chunks is given to nobody else
/// meanwhile.
const BULK_MAX: usize = 16;

/// How long what an answer has said counts.
const ASKED_WITHIN: Duration = Duration::from_secs(1);

/// A request that was not released, and what it keeps.
#[derive(Debug)]
struct Kept {
    number: u64,
    ticket: Ticket,
    asked_at: Instant,
    /// It is being asked again.
    asks: bool,
    /// It is not used any more.
    ended: bool,
    /// Reads that are under way in it.
    reads: u32,
}

/// Of one link.
#[derive(Debug)]
pub(super) struct Standing {
    most: usize,
    /// The longest there first.
    kept: VecDeque<Kept>,
    /// By the first slot, with who keeps it.
    keys: BTreeMap<u32, (KeyEntry, u64)>,
    next: u64,
}

impl Standing {
    pub(super) fn new(class: Class) -> Self {
        let most = match class {
            Class::Bulk => BULK_MAX,
            Class::Urgent => URGENT_MAX,
        };
        Self { most, kept: VecDeque::new(), keys: BTreeMap::new(), next: 0 }
    }

    fn key_of(&self, slot: SlotIndex) -> Option<(KeyEntry, u64)> {
        let (_, (key, number)) = self.keys.range(..=slot.0).next_back()?;
        key.place_of(slot).map(|_| (*key, *number))
    }

    fn kept(&mut self, number: u64) -> Option<&mut Kept> {
        self.kept.iter_mut().find(|kept| kept.number == number)
    }

    /// How all of these pages are reached without asking, if they are: into `keys`, and by whom, into `by`. Once they were
    /// read, [`Self::has_read`].
    pub(super) fn reads(&mut self, wanted: &[GetEntry], keys: &mut Vec<KeyEntry>, by: &mut Vec<u64>) -> bool {
        keys.clear();
        for get in wanted {
            let slot = get.placement.slot;
            if keys.last().is_some_and(|key: &KeyEntry| key.place_of(slot).is_some()) {
                continue;
            }
            let Some((key, number)) = self.key_of(slot) else {
                by.clear();
                return false;
            };
            keys.push(key);
            if !by.contains(&number) {
                by.push(number);
            }
        }
        for number in by.iter() {
            if let Some(kept) = self.kept(*number) {
                kept.reads += 1;
            }
        }
        true
    }

    /// Of those that keep something: one that is to be asked again, if there is one, which is asked from now on.
    pub(super) fn asks_again(&mut self, by: &[u64], now: Instant) -> Option<u64> {
        let is_due = |kept: &&mut Kept| {
            by.contains(&kept.number)
                && !kept.asks
                && now.saturating_duration_since(kept.asked_at) >= ASKED_WITHIN
        };
        let kept = self.kept.iter_mut().find(is_due)?;
        kept.asks = true;
        Some(kept.number)
    }

    /// Asked again, it may be read on, or not.
    pub(super) fn was_asked(&mut self, number: u64, goes_on: bool, now: Instant, released: &mut Vec<Ticket>) {
        if let Some(kept) = self.kept(number) {
            (kept.asks, kept.asked_at) = (false, now);
            kept.ended |= !goes_on;
        }
        if !goes_on {
            self.keys.retain(|_, (_, by)| *by != number);
            self.let_go(released);
        }
    }

    /// What these keep was read.
    pub(super) fn has_read(&mut self, by: &mut Vec<u64>, released: &mut Vec<Ticket>) {
        for number in by.drain(..) {
            if let Some(kept) = self.kept(number) {
                kept.reads -= 1;
            }
        }
        self.let_go(released);
    }

    /// Keeps what a request has asked for, unless all of that is kept already: it is to be released then.
    pub(super) fn keep(
        &mut self,
        keys: &[KeyEntry],
        ticket: Ticket,
        now: Instant,
        released: &mut Vec<Ticket>,
    ) {
        let known = |key: &KeyEntry| self.keys.get(&key.first.0).map(|(_, number)| *number);
        if keys.iter().all(|key| known(key).is_some()) {
            for number in keys.iter().filter_map(known).collect::<Vec<_>>() {
                self.was_asked(number, true, now, released);
            }
            released.push(ticket);
            return;
        }
        if self.kept.len() >= self.most {
            let Some(oldest) = self.kept.iter_mut().find(|kept| kept.reads == 0) else {
                released.push(ticket);
                return;
            };
            oldest.ended = true;
            let gone = oldest.number;
            self.keys.retain(|_, (_, by)| *by != gone);
            self.let_go(released);
        }
        self.next += 1;
        for key in keys {
            self.keys.insert(key.first.0, (*key, self.next));
        }
        let (asks, ended, reads) = (false, false, 0);
        self.kept.push_back(Kept { number: self.next, ticket, asked_at: now, asks, ended, reads });
    }

    /// Nobody wants pages now. Where they are read as they lie, what is kept is kept for nobody.
    pub(super) fn is_idle(&mut self, released: &mut Vec<Ticket>) {
        if self.most == BULK_MAX {
            self.keys.clear();
            self.kept.iter_mut().for_each(|kept| kept.ended = true);
            self.let_go(released);
        }
    }

    /// What is not used any more, and not being read, is to be released.
    fn let_go(&mut self, released: &mut Vec<Ticket>) {
        self.kept.retain(|kept| {
            let goes = kept.ended && kept.reads == 0;
            released.extend(goes.then_some(kept.ticket));
            !goes
        });
    }
}

#[cfg(test)]
mod test {
    use libsg::ids::{Generation, MemberIndex, Placement};
    use libsg::page::PageIndex;
    use libsg::wire::access::AccessKey;

    use super::*;

    fn key(chunk: u32) -> KeyEntry {
        let key = AccessKey::decode(&[1]).expect("fits");
        KeyEntry { first: SlotIndex(chunk * 512), slots: 512, key }
    }

    fn get(slot: u32) -> GetEntry {
        let at = Placement { member: MemberIndex(0), slot: SlotIndex(slot), generation: Generation(1) };
        GetEntry { page: PageIndex(slot), placement: at }
    }

    struct Bench(Standing, Instant, Vec<Ticket>);

    impl Bench {
        fn new(class: Class) -> Self {
            Self(Standing::new(class), Instant::now(), Vec::new())
        }

        fn reads(&mut self, slots: &[u32]) -> Option<(Vec<u32>, Vec<u64>)> {
            let (mut keys, mut by) = (Vec::new(), Vec::new());
            let wanted: Vec<GetEntry> = slots.iter().map(|slot| get(*slot)).collect();
            let reads = self.0.reads(&wanted, &mut keys, &mut by);
            reads.then(|| (keys.iter().map(|key| key.first.0 / 512).collect(), by))
        }

        fn keep(&mut self, chunks: &[u32], ticket: u64) {
            let keys: Vec<KeyEntry> = chunks.iter().map(|chunk| key(*chunk)).collect();
            self.0.keep(&keys, Ticket(ticket), self.1, &mut self.2);
        }

        fn released(&mut self) -> Vec<u64> {
            self.2.drain(..).map(|ticket| ticket.0).collect()
        }
    }

    #[test]
    fn the_oldest_goes_unless_it_is_being_read() {
        let mut bench = Bench::new(Class::Bulk);
        assert_eq!(bench.reads(&[7]), None);
        for chunk in 0..BULK_MAX as u32 {
            bench.keep(&[chunk], chunk.into());
        }
        assert!(bench.released().is_empty());
        bench.keep(&[5], 100);
        assert_eq!(bench.released(), [100], "it is known");
        let (chunks, mut by) = bench.reads(&[7, 8, 600]).expect("both are kept");
        assert_eq!(chunks, [0, 1]);
        bench.keep(&[200, 201], 101);
        assert_eq!(bench.released(), [2], "the oldest that is not being read");
        assert_eq!((bench.reads(&[1024]), bench.reads(&[7, 1024])), (None, None));
        bench.0.has_read(&mut by, &mut bench.2);
        bench.keep(&[300], 102);
        assert_eq!(bench.released(), [0]);
        assert_eq!(bench.reads(&[200 * 512 + 511, 201 * 512]).map(|read| read.0), Some(vec![200, 201]));
    }

    #[test]
    fn what_is_read_as_it_lies_is_kept_as_long_as_there_is_more() {
        for (class, released) in [(Class::Bulk, vec![1, 2]), (Class::Urgent, vec![])] {
            let mut bench = Bench::new(class);
            bench.keep(&[0], 1);
            bench.keep(&[1, 2], 2);
            bench.0.is_idle(&mut bench.2);
            assert_eq!((bench.reads(&[7]).is_some(), bench.released()), (class == Class::Urgent, released));
        }
    }

    #[test]
    fn whether_reading_is_free_is_asked_once_a_second() {
        let mut bench = Bench::new(Class::Urgent);
        bench.keep(&[0], 1);
        let (_, mut by) = bench.reads(&[7]).expect("kept");
        let late = bench.1 + ASKED_WITHIN;
        assert_eq!(bench.0.asks_again(&by, bench.1), None);
        assert_eq!(bench.0.asks_again(&by, late), Some(by[0]));
        assert_eq!(bench.0.asks_again(&by, late), None, "it is being asked");
        bench.0.was_asked(by[0], true, late, &mut bench.2);
        assert_eq!(bench.0.asks_again(&by, late), None);
        bench.0.was_asked(by[0], false, late, &mut bench.2);
        assert_eq!((bench.reads(&[7]), bench.released()), (None, vec![]), "it is being read still");
        bench.0.has_read(&mut by, &mut bench.2);
        assert_eq!(bench.released(), [1]);
    }
}
