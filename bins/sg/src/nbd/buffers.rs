//! Memory for the bytes of requests: used again and again, so that a request allocates nothing that grows with its
//! pages, and bounded for each connection. What is spare is everybody's: a client that comes anew touches no new memory.

use std::sync::Arc;

use libsg::page::PAGE_BYTES;
use parking_lot::Mutex;

/// Bytes that the requests of one connection hold at once, unless one of them alone is longer: enough to keep a fast
/// path busy, and few enough to stay in a cache. What comes meanwhile waits in the socket.
const HELD_BYTES_MAX: usize = 8 << 20;

/// Bytes that are kept for later, of all connections.
const SPARE_BYTES_MAX: usize = 32 << 20;

/// Bytes of a request: at least as many as it has. Clones are the same.
pub type Buffer = Arc<[u8]>;

/// Buffers that nobody uses.
#[derive(Default)]
pub struct Spare(Mutex<Vec<Buffer>>);

/// The buffers of one connection.
#[derive(Default)]
pub struct Buffers {
    spare: Arc<Spare>,
    held_bytes: usize,
}

fn size_for(bytes: usize) -> usize {
    bytes.max(PAGE_BYTES).next_power_of_two()
}

impl Spare {
    /// The one of this size that was used last.
    fn take(&self, size: usize) -> Option<Buffer> {
        let mut spare = self.0.lock();
        let at = spare.iter().rposition(|buffer| buffer.len() == size)?;
        Some(spare.remove(at))
    }

    fn give(&self, mut buffer: Buffer) {
        let mut spare = self.0.lock();
        let fits = spare.iter().map(|buffer| buffer.len()).sum::<usize>() + buffer.len() <= SPARE_BYTES_MAX;
        // One that something still points to is not used again.
        if fits && Arc::get_mut(&mut buffer).is_some() {
            spare.push(buffer);
        }
    }
}

impl Buffers {
    /// Of a connection, which shares what is spare with others.
    pub const fn new(spare: Arc<Spare>) -> Self {
        Self { spare, held_bytes: 0 }
    }

    /// Whether there is room for so many bytes more.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.held_bytes == 0 || self.held_bytes + size_for(bytes) <= HELD_BYTES_MAX
    }

    /// A buffer of at least so many bytes, nobody else's. What is in it is of no meaning.
    pub fn take(&mut self, bytes: usize) -> Buffer {
        let size = size_for(bytes);
        self.held_bytes += size;
        self.spare.take(size).unwrap_or_else(|| std::iter::repeat_n(0, size).collect())
    }

    /// Gives one back.
    pub fn give(&mut self, buffer: Buffer) {
        self.held_bytes = self.held_bytes.saturating_sub(buffer.len());
        self.spare.give(buffer);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn memory_is_bounded_and_used_again() {
        let mut buffers = Buffers::default();
        assert!(buffers.has_room(4 * HELD_BYTES_MAX), "one alone may be longer");
        let (one, two) = (buffers.take(5000), buffers.take(1));
        assert_eq!((one.len(), two.len()), (8192, PAGE_BYTES));
        assert!(buffers.has_room(HELD_BYTES_MAX / 2) && !buffers.has_room(HELD_BYTES_MAX));
        let (address, kept) = (one.as_ptr(), Arc::clone(&two));
        buffers.give(one);
        buffers.give(two);
        assert!(buffers.has_room(HELD_BYTES_MAX));
        let mut others = Buffers::new(Arc::clone(&buffers.spare));
        assert_eq!(others.take(8192).as_ptr(), address);
        assert_ne!(buffers.take(1).as_ptr(), kept.as_ptr(), "somebody looks at it");
        buffers.give(std::iter::repeat_n(0, 2 * SPARE_BYTES_MAX).collect());
        assert!(buffers.spare.take(2 * SPARE_BYTES_MAX).is_none());
    }
}
