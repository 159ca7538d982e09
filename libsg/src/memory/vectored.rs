//! Socket reads and writes that mix plain bytes (headers) with memory others may change (pages), so
//! that a page goes from guest memory to the socket, and from the socket into its slot, without a
//! copy in user space.
//!
//! Neither call allocates. Both do what the socket does: a part of the bytes, or
//! [`io::ErrorKind::WouldBlock`]. `advance` then drops what is done from the front.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::raw::{GuestSlice, SlotSlice};

/// Parts that one call looks at: a header, a table and the pages of two batches. What is beyond is
/// left for the next call.
pub const IO_PARTS_MAX: usize = 130;

/// A part of what is sent.
#[derive(Clone, Copy, Debug)]
pub enum IoPart<'a> {
    /// Bytes of our own.
    Bytes(&'a [u8]),
    /// Guest memory, or an intermediary's slot.
    Guest(GuestSlice<'a>),
}

impl<'a> IoPart<'a> {
    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Guest(slice) => slice.len(),
        }
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The parts that are left when `bytes` bytes from the front of them are done.
    pub fn advance<'p>(parts: &'p mut [IoPart<'a>], mut bytes: usize) -> &'p mut [IoPart<'a>] {
        let done = whole_parts(parts.iter().map(Self::len), &mut bytes);
        let rest = &mut parts[done..];
        if let Some(first) = rest.first_mut() {
            match first {
                Self::Bytes(part) => *part = &part[bytes..],
                Self::Guest(part) => *part = part.skip(bytes),
            }
        }
        rest
    }
}

/// A part of where to receive to.
#[derive(Debug)]
pub enum IoPartMut<'a> {
    /// A buffer of our own.
    Bytes(&'a mut [u8]),
    /// An intermediary's slot, or the memory of the VM that is to run.
    Slot(SlotSlice<'a>),
}

impl<'a> IoPartMut<'a> {
    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Slot(slot) => slot.len(),
        }
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The parts that are left when `bytes` bytes from the front of them are done.
    pub fn advance<'p>(parts: &'p mut [IoPartMut<'a>], mut bytes: usize) -> &'p mut [IoPartMut<'a>] {
        let done = whole_parts(parts.iter().map(Self::len), &mut bytes);
        let rest = &mut parts[done..];
        if let Some(first) = rest.first_mut() {
            match first {
                Self::Bytes(part) => *part = &mut std::mem::take(part)[bytes..],
                Self::Slot(part) => *part = part.skip(bytes),
            }
        }
        rest
    }
}

/// How many parts `bytes` covers wholly (empty ones included); `bytes` becomes what is left of it.
///
/// # Panics
/// When there are fewer bytes in the parts: more was done than asked.
fn whole_parts(lengths: impl Iterator<Item = usize>, bytes: &mut usize) -> usize {
    let mut parts = 0;
    for length in lengths {
        if *bytes < length {
            return parts;
        }
        *bytes -= length;
        parts += 1;
    }
    assert_eq!(*bytes, 0, "advanced past the end");
    parts
}

/// Writes from the front of `parts` to a stream socket, and says how many bytes it took.
///
/// Never raises `SIGPIPE`. An interruption is tried again.
///
/// # Errors
/// What `sendmsg` says; [`io::ErrorKind::WouldBlock`] when a non-blocking socket takes nothing.
pub fn send(socket: impl AsFd, parts: &[IoPart<'_>]) -> io::Result<usize> {
    send_some(socket, parts, usize::MAX)
}

/// As [`send`], of the first `bytes_max` bytes.
///
/// # Errors
/// As [`send`].
pub fn send_some(socket: impl AsFd, parts: &[IoPart<'_>], bytes_max: usize) -> io::Result<usize> {
    let mut vectors = [NO_VECTOR; IO_PARTS_MAX];
    let (mut count, mut left) = (0, bytes_max);
    for (vector, part) in vectors.iter_mut().zip(parts) {
        let take = part.len().min(left);
        *vector = match part {
            IoPart::Bytes(bytes) => vector_of(bytes.as_ptr(), take),
            IoPart::Guest(slice) => vector_of(slice.as_ptr(), take),
        };
        (count, left) = (count + 1, left - take);
        if left == 0 {
            break;
        }
    }
    let message = message_of(&mut vectors, count);
    retry(|| {
        // SAFETY: the message points to `count` vectors, each to memory that is readable while the
        // parts are borrowed; the kernel only reads it.
        unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// Reads from a stream socket into `parts`, front first, and says how many bytes came. Zero is the
/// end of the stream, unless every part is empty.
///
/// An interruption is tried again.
///
/// # Errors
/// What `recvmsg` says; [`io::ErrorKind::WouldBlock`] when a non-blocking socket has nothing.
pub fn recv(socket: impl AsFd, parts: &mut [IoPartMut<'_>]) -> io::Result<usize> {
    let mut vectors = [NO_VECTOR; IO_PARTS_MAX];
    let count = parts.len().min(IO_PARTS_MAX);
    for (vector, part) in vectors.iter_mut().zip(parts) {
        *vector = match part {
            IoPartMut::Bytes(bytes) => vector_of(bytes.as_mut_ptr(), bytes.len()),
            IoPartMut::Slot(slot) => vector_of(slot.as_mut_ptr(), slot.len()),
        };
    }
    let mut message = message_of(&mut vectors, count);
    retry(|| {
        // SAFETY: the message points to `count` vectors, each to memory that is writable while the
        // parts are borrowed, exclusively (`Bytes`) or as memory that others may change (`Slot`).
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, 0) }
    })
}

const NO_VECTOR: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// A vector; what `send` is given is never written through it.
const fn vector_of(start: *const u8, bytes: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast_mut().cast(), iov_len: bytes }
}

fn message_of(vectors: &mut [libc::iovec; IO_PARTS_MAX], count: usize) -> libc::msghdr {
    // SAFETY: a msghdr of zeros is one without address, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = count as _;
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        let done = call();
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::memory::Mapping;
    use crate::page::PAGE_BYTES;
    use std::os::unix::net::UnixStream;

    #[test]
    fn pages_go_from_memory_to_slots_between_headers() {
        let pages = 200;
        let from = Mapping::anonymous(pages * PAGE_BYTES).expect("memory");
        let to = Mapping::anonymous(pages * PAGE_BYTES).expect("memory");
        for page in 0..pages {
            from.slot(page * PAGE_BYTES, PAGE_BYTES).expect("inside").copy_from(&[page as u8; PAGE_BYTES]);
        }
        let (near, far) = UnixStream::pair().expect("sockets");
        near.set_nonblocking(true).expect("nonblocking");
        let header = *b"header of the batch";
        let receiver = std::thread::spawn({
            move || {
                let mut header = [0; 19];
                let mut parts = vec![IoPartMut::Bytes(&mut header)];
                parts
                    .extend((0..pages).map(|page| {
                        IoPartMut::Slot(to.slot(page * PAGE_BYTES, PAGE_BYTES).expect("inside"))
                    }));
                let mut rest = &mut parts[..];
                while !rest.is_empty() {
                    let got = recv(&far, rest).expect("received");
                    assert_ne!(got, 0, "closed early");
                    rest = IoPartMut::advance(rest, got);
                }
                drop(parts);
                (header, to)
            }
        });
        let mut parts = vec![IoPart::Bytes(&header)];
        parts.extend(
            (0..pages).map(|page| IoPart::Guest(from.slice(page * PAGE_BYTES, PAGE_BYTES).expect("inside"))),
        );
        let (mut rest, mut most) = (&mut parts[..], 0);
        while !rest.is_empty() {
            // Within a part, at its end, and over several.
            most = most % 20_000 + 4077;
            match send_some(&near, rest, most) {
                Ok(sent) => {
                    assert!(sent <= most, "{sent} of at most {most}");
                    rest = IoPart::advance(rest, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        let (got, to) = receiver.join().expect("receiver");
        assert_eq!(got, header);
        for page in 0..pages {
            let slice = to.slice(page * PAGE_BYTES, PAGE_BYTES).expect("inside");
            let mut bytes = [0; PAGE_BYTES];
            slice.copy_to(&mut bytes);
            assert!(bytes.iter().all(|byte| *byte == page as u8), "page {page}");
        }
    }

    #[test]
    fn a_closed_socket_is_an_error_and_no_signal() {
        let (near, far) = UnixStream::pair().expect("sockets");
        drop(far);
        let error = send(&near, &[IoPart::Bytes(b"x")]).expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(recv(&near, &mut [IoPartMut::Bytes(&mut [0])]).expect("end"), 0);
    }
}
