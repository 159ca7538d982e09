//! When whoever reads pages is woken: not for each segment that comes.

use std::os::fd::AsFd;

use crate::host;
use crate::pace;

/// More is not waited for at once: what lies in the socket is to be in the cache yet when it is read, and a window of
/// credit (96 KiB at least) must never be smaller.
const BYTES_MAX: usize = 64 << 10;

/// Less is not worth a system call.
const BYTES_MIN: usize = 16 << 10;

/// The bytes of which the kernel knows that they are waited for, on one socket. Starts with one, as every socket.
#[derive(Debug)]
pub(crate) struct Awaited(usize);

impl Default for Awaited {
    fn default() -> Self {
        Self(1)
    }
}

impl Awaited {
    /// Before a wait for `missing` bytes, with nothing left to read: the wait ends when they are there, or a good part
    /// of them.
    pub(crate) fn set(&mut self, socket: impl AsFd, missing: usize) {
        let bytes = if missing < BYTES_MIN { 1 } else { missing.min(BYTES_MAX) };
        // A socket that does not know of it wakes more often, that is all.
        if bytes != self.0 && host::has_tcp() && pace::wake_reader_at(socket, bytes).is_ok() {
            self.0 = bytes;
        }
    }
}
