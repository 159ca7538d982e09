//! Memory behind chunks: which chunk is leased next, which are touched ahead of need, and which go back.

use super::sharing::Contents;
use super::{CHUNK_SLOTS, Chunk, ChunkNumber, Entry, Slot, Slots};
use crate::ids::{Generation, VolumeId};
use crate::server::bits::Bits;

impl Slots {
    /// One more chunk for the volume; `false` at the limit.
    pub(super) fn lease_chunk(&mut self, volume: VolumeId) -> bool {
        let Some(number) = self.ready.pop_front().or_else(|| self.hold_number()) else { return false };
        let (Entry::Idle { spent } | Entry::Vacant { spent }) = self.entries[number as usize] else {
            return false;
        };
        let lease = self.leases.entry(volume).or_default();
        let contents = lease.domain.map(Contents::boxed);
        if let Some(domain) = lease.domain.and_then(|domain| self.domains.get_mut(&domain)) {
            domain.users += 1;
        }
        self.entries[number as usize] = Entry::Leased(Box::new(Chunk {
            volume,
            condemned: false,
            at: lease.chunks.len(),
            listed: true,
            pins: 0,
            taken: 0,
            free: Bits::ALL,
            stored: Bits::NONE,
            owned: Bits::NONE,
            contents,
            limbo: Bits::NONE,
            slots: [Slot { page: 0, checksum: 0, round: 0, generation: spent }; CHUNK_SLOTS],
        }));
        lease.chunks.push(number);
        lease.open.push(number);
        self.leases_ever += 1;
        true
    }

    /// A number that has no memory yet, from now on idle and counted.
    fn hold_number(&mut self) -> Option<u32> {
        if self.chunks_held >= self.chunks_max {
            return None;
        }
        let fresh = self.entries.len() as u32;
        let number = if fresh < self.numbers_max && self.vacant.is_empty() {
            self.entries.push(Entry::Idle { spent: 0 });
            fresh
        } else {
            let number = self.vacant.pop_front()?;
            if let Entry::Vacant { spent } = self.entries[number as usize] {
                self.entries[number as usize] = Entry::Idle { spent };
            }
            number
        };
        self.chunks_held += 1;
        Some(number)
    }

    /// A chunk without memory whose memory shall be touched ahead of need; it comes back by
    /// [`Self::prepared`]. `None` at the limit.
    pub fn prepare(&mut self) -> Option<ChunkNumber> {
        self.hold_number().map(ChunkNumber)
    }

    /// The chunk's memory is touched: it is leased before any other.
    pub fn prepared(&mut self, number: ChunkNumber) {
        self.ready.push_back(number.0);
    }

    /// Chunks that are touched and wait for a lease.
    #[must_use]
    pub fn ready_chunks(&self) -> usize {
        self.ready.len()
    }

    /// Chunks that were leased since the beginning: where it stands still, nobody writes much.
    #[must_use]
    pub fn leases(&self) -> u64 {
        self.leases_ever
    }

    /// Nobody writes any more: chunks that wait for a lease are to be given back.
    pub fn drop_ready(&mut self) {
        self.leaving.extend(self.ready.drain(..).map(ChunkNumber));
    }

    /// The next chunk whose memory is to be given back; it is confirmed by [`Self::given_back`].
    pub fn next_leaving(&mut self) -> Option<ChunkNumber> {
        self.leaving.pop()
    }

    /// The chunk's memory is with the system again.
    pub fn given_back(&mut self, number: ChunkNumber) {
        let Some(entry) = self.entries.get_mut(number.0 as usize) else { return };
        let Entry::Idle { spent } = *entry else { return };
        *entry = Entry::Vacant { spent };
        self.chunks_held -= 1;
        if spent < Generation::LAST {
            self.vacant.push_back(number.0);
        }
    }
}
