//! Memory for the bytes of requests: used again and again, so that a request allocates nothing that grows with its
//! pages, and bounded for each connection.

use std::sync::Arc;

use libsg::page::PAGE_BYTES;

use super::wire::PAYLOAD_BYTES_MAX;

/// Bytes that the requests of one connection hold at once: one of the longest. What comes meanwhile waits in the socket.
const HELD_BYTES_MAX: usize = PAYLOAD_BYTES_MAX as usize;

/// Bytes that are kept for later.
const SPARE_BYTES_MAX: usize = 16 << 20;

/// Bytes of a request: at least as many as it has. Clones are the same.
pub type Buffer = Arc<[u8]>;

/// The buffers of one connection.
#[derive(Default)]
pub struct Buffers {
    spare: Vec<Buffer>,
    spare_bytes: usize,
    held_bytes: usize,
}

fn size_for(bytes: usize) -> usize {
    bytes.max(PAGE_BYTES).next_power_of_two()
}

impl Buffers {
    /// Whether there is room for so many bytes more.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.held_bytes + size_for(bytes) <= HELD_BYTES_MAX
    }

    /// A buffer of at least so many bytes, nobody else's. What is in it is of no meaning.
    pub fn take(&mut self, bytes: usize) -> Buffer {
        let size = size_for(bytes);
        self.held_bytes += size;
        match self.spare.iter().rposition(|buffer| buffer.len() == size) {
            Some(at) => {
                self.spare_bytes -= size;
                self.spare.swap_remove(at)
            }
            None => std::iter::repeat_n(0, size).collect(),
        }
    }

    /// Gives one back.
    pub fn give(&mut self, mut buffer: Buffer) {
        self.held_bytes = self.held_bytes.saturating_sub(buffer.len());
        let fits = self.spare_bytes + buffer.len() <= SPARE_BYTES_MAX;
        // One that something still points to is not used again.
        if fits && Arc::get_mut(&mut buffer).is_some() {
            self.spare_bytes += buffer.len();
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn memory_is_bounded_and_used_again() {
        let mut buffers = Buffers::default();
        assert!(buffers.has_room(HELD_BYTES_MAX) && !buffers.has_room(HELD_BYTES_MAX + 1));
        let (one, two) = (buffers.take(5000), buffers.take(1));
        assert_eq!((one.len(), two.len()), (8192, PAGE_BYTES));
        assert!(!buffers.has_room(HELD_BYTES_MAX));
        let (address, kept) = (one.as_ptr(), Arc::clone(&two));
        buffers.give(one);
        buffers.give(two);
        assert!(buffers.has_room(HELD_BYTES_MAX));
        assert_eq!(buffers.take(8192).as_ptr(), address);
        assert_ne!(buffers.take(1).as_ptr(), kept.as_ptr(), "somebody looks at it");
    }
}
