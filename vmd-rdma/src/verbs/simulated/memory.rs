//! Memory of simulated hosts while it is registered, and works on their way from one to the other.

use std::ptr::NonNull;

use super::LIMITS;
use crate::verbs::{Access, Operation, Piece, Remote, Work};
use libsg::memory::{GuestSlice, SlotSlice};
use libsg::{Error, ErrorKind};

/// Memory of some host, as long as it is registered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is only reached through slices of memory that others may change, whose accesses are fit for any thread.
unsafe impl Send for Memory {}

impl Memory {
    /// # Safety
    /// As [`crate::verbs::Domain::register`].
    pub(super) unsafe fn new(start: NonNull<u8>, bytes: usize) -> Self {
        Self { start, bytes }
    }

    /// Where in it `bytes` bytes from this address are, if all of them are.
    pub(super) fn find(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.start.as_ptr() as u64)?).ok()?;
        (offset.checked_add(bytes)? <= self.bytes).then_some(offset)
    }

    /// Appends what is there.
    pub(super) fn read(&self, offset: usize, bytes: usize, into: &mut Vec<u8>) {
        let from = into.len();
        into.resize(from + bytes, 0);
        // SAFETY: it is mapped, by the promise of `new`, while it is registered, and nobody has a reference to it.
        let all = unsafe { GuestSlice::new(self.start, self.bytes) };
        all.skip(offset).take(bytes).copy_to(&mut into[from..]);
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: as for `read`; that it may be written was said when it was registered.
        let all = unsafe { SlotSlice::new(self.start, self.bytes) };
        all.skip(offset).take(bytes.len()).copy_from(bytes);
    }
}

/// A region.
#[derive(Debug)]
pub(super) struct Registered {
    pub host: u16,
    pub domain: u32,
    pub memory: Memory,
    pub access: Access,
}

/// A work request that was posted.
#[derive(Debug)]
pub(super) struct Posted {
    pub id: u64,
    pub operation: Operation,
    pub pieces: Vec<Piece>,
    /// The bytes of one that travels inline.
    pub inline: Vec<u8>,
    pub remote: Remote,
    pub signalled: bool,
}

impl Posted {
    /// As a device takes it over.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] where it exceeds the limits.
    pub(super) fn checked(work: &Work<'_>) -> Result<Self, Error> {
        let bytes: usize = work.pieces.iter().map(|piece| piece.bytes as usize).sum();
        let inline = work.operation == Operation::WriteInline;
        let bytes_max = if inline { LIMITS.inline_bytes_max } else { LIMITS.message_bytes_max };
        if work.pieces.len() > LIMITS.pieces_max || bytes > bytes_max {
            let what =
                format!("{bytes} bytes in {} pieces are more than the device takes", work.pieces.len());
            return Err(Error::new(ErrorKind::Input, what));
        }
        let mut taken = Vec::new();
        if inline {
            for piece in work.pieces {
                let start = NonNull::new(piece.address as *mut u8)
                    .ok_or_else(|| Error::new(ErrorKind::Input, "a piece at address zero"))?;
                let from = taken.len();
                taken.resize(from + piece.bytes as usize, 0);
                // SAFETY: whoever posts says that these bytes are there, as to a device; they are read once, now.
                unsafe { GuestSlice::new(start, piece.bytes as usize) }.copy_to(&mut taken[from..]);
            }
        }
        Ok(Self {
            id: work.id,
            operation: work.operation,
            pieces: work.pieces.to_vec(),
            inline: taken,
            remote: work.remote,
            signalled: work.signalled,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes as usize).sum()
    }

    pub(super) fn is_read(&self) -> bool {
        self.operation == Operation::Read
    }
}
