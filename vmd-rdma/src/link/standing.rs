//! Chunks that stay as they are at the intermediary though nothing is read from them now: a page of one of them can be read
//! while the intermediary is asked for it.
//!
//! The answer says whether the bytes are the page's: whoever has its placement has it since it was stored, and where it is
//! there still under that generation when the intermediary looks, it was when the device read. That the chunk is not given
//! back meanwhile is what the earlier request for a page in it sees to, which is not released.

use std::collections::VecDeque;

use libsg::ids::SlotIndex;
use libsg::vmd::Ticket;
use libsg::wire::access::KeyEntry;

/// So many chunks: 128 MiB of a volume, whose slots are given to nobody else meanwhile.
const CHUNKS_MAX: usize = 64;

/// Of one link.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// The longest there first, each with the request that keeps it.
    chunks: VecDeque<(KeyEntry, Ticket)>,
    /// Reads that are under way by these keys.
    reading: usize,
}

impl Standing {
    /// How a slot is reached without asking, if it is. Once that was read, [`Self::has_read`].
    pub(super) fn reads(&mut self, slot: SlotIndex) -> Option<KeyEntry> {
        let key = self.chunks.iter().map(|(key, _)| *key).find(|key| key.place_of(slot).is_some())?;
        self.reading += 1;
        Some(key)
    }

    /// A read has ended.
    pub(super) fn has_read(&mut self) {
        self.reading -= 1;
    }

    /// Keeps what a request has asked for. Returns the request that is to be released for it, or instead of it.
    pub(super) fn keep(&mut self, key: KeyEntry, request: Ticket) -> Option<Ticket> {
        if self.chunks.iter().any(|(known, _)| known.first == key.first) {
            return Some(request);
        }
        let full = self.chunks.len() >= CHUNKS_MAX;
        if full && self.reading > 0 {
            return Some(request);
        }
        let oldest = if full { self.chunks.pop_front() } else { None };
        self.chunks.push_back((key, request));
        oldest.map(|(_, request)| request)
    }
}

#[cfg(test)]
mod test {
    use libsg::wire::access::AccessKey;

    use super::*;

    fn key(chunk: u32) -> KeyEntry {
        let key = AccessKey::decode(&[1]).expect("fits");
        KeyEntry { first: SlotIndex(chunk * 512), slots: 512, key }
    }

    #[test]
    fn the_oldest_goes_unless_something_is_being_read() {
        let mut standing = Standing::default();
        assert_eq!(standing.reads(SlotIndex(7)), None);
        for chunk in 0..CHUNKS_MAX as u32 {
            assert_eq!(standing.keep(key(chunk), Ticket(chunk.into())), None);
        }
        assert_eq!(standing.keep(key(5), Ticket(100)), Some(Ticket(100)), "it is known");
        assert_eq!(standing.reads(SlotIndex(512 + 7)), Some(key(1)));
        assert_eq!(standing.keep(key(200), Ticket(101)), Some(Ticket(101)), "it may be the one");
        standing.has_read();
        assert_eq!(standing.keep(key(200), Ticket(102)), Some(Ticket(0)));
        assert_eq!(standing.reads(SlotIndex(7)), None);
        assert_eq!(standing.reads(SlotIndex(200 * 512 + 511)), Some(key(200)));
    }
}
