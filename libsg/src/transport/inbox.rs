//! Reading frames from a socket that never waits.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::vectored::{self, IoPartMut};
use crate::pace;
use crate::page::PAGE_BYTES;
use crate::wire::{HEADER_BYTES, Header};

use super::Awaited;

/// Bytes read beyond the frame that is being read: many small frames come in one call, and not
/// more than this is moved when a long frame needs the buffer's start.
const READ_AHEAD_BYTES: usize = 16 << 10;

/// A frame that came.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Its header, checked.
    pub header: Header,
    /// Its body, of the length that the header says, and as its checksum says; but where bytes of pages end it, who finds
    /// where they begin compares what is in front of them ([`Header::check_said`]).
    pub body: &'a [u8],
}

/// Frames that come from one socket, by way of one buffer that is used again and again.
///
/// The buffer starts empty and grows only to the length of a frame whose header was checked: the
/// kind bounds it, and nothing is read before the handshake is over.
#[derive(Debug, Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// Bytes in the buffer that came and were not given out.
    unread: Range<usize>,
    /// Header of the frame at the front of `unread`, once it is there.
    header: Option<Header>,
    /// Body of the frame that was given out last.
    last: Range<usize>,
    awaited: Awaited,
    received_bytes: u64,
    /// The last read took all that was there.
    drained: bool,
    /// Acknowledgements may wait for what is said next.
    patient: bool,
}

impl Inbox {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One for a conversation of questions and answers, whose acknowledgements travel with what is said next.
    #[must_use]
    pub fn patient() -> Self {
        Self { patient: true, ..Self::default() }
    }

    /// Bytes that came, in all.
    #[must_use]
    pub const fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// The next frame, if all of it has come. Reads only when the buffer holds no whole frame: call it
    /// until it gives `None` before waiting for the socket, and wait for the socket before calling it again.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] at the end of the stream or when it broke; [`ErrorKind::Protocol`] for a
    /// header or a body that no honest peer sends, after which the stream is of no further use.
    pub fn poll(&mut self, socket: impl AsFd) -> Result<Option<Frame<'_>>> {
        if !self.has_frame(socket)? {
            return Ok(None);
        }
        self.take()
    }

    /// Whether [`Self::poll`] would give a frame; reads until it would, or nothing more is there.
    pub(crate) fn has_frame(&mut self, socket: impl AsFd) -> Result<bool> {
        loop {
            let missing = self.missing_bytes()?;
            if missing == 0 {
                return Ok(true);
            }
            // What was not filled took all there was: reading again would only be told so. What came since, the
            // socket is ready for.
            if std::mem::take(&mut self.drained) || !self.read(&socket)? {
                self.awaited.set(&socket, missing);
                return Ok(false);
            }
        }
    }

    /// The body of the frame that was given out last; nothing once more was read.
    pub(crate) fn last_body(&self) -> &[u8] {
        &self.buffer[self.last.clone()]
    }

    fn take(&mut self) -> Result<Option<Frame<'_>>> {
        let Some(header) = self.header.take() else { return Ok(None) };
        let start = self.unread.start + HEADER_BYTES;
        let end = start + header.body_bytes as usize;
        self.unread.start = end;
        self.last = start..end;
        let body = &self.buffer[start..end];
        header.check_body(body)?;
        Ok(Some(Frame { header, body }))
    }

    /// Bytes that are missing from the frame at the front, as far as is known. Zero is a whole frame.
    fn missing_bytes(&mut self) -> Result<usize> {
        let unread = self.unread.len();
        let header = match self.header {
            Some(header) => header,
            None => {
                let front = &self.buffer[self.unread.clone()];
                let Some(bytes) = front.first_chunk::<HEADER_BYTES>() else {
                    return Ok(HEADER_BYTES - unread);
                };
                let header = Header::decode(bytes)?;
                self.header = Some(header);
                header
            }
        };
        Ok((HEADER_BYTES + header.body_bytes as usize).saturating_sub(unread))
    }

    /// Reads once. `false` when nothing was there.
    fn read(&mut self, socket: impl AsFd) -> Result<bool> {
        let missing = self.missing_bytes()?;
        self.last = 0..0;
        self.make_room(missing);
        let end = self.buffer.len().min(self.unread.end + missing + READ_AHEAD_BYTES);
        let room = &mut self.buffer[self.unread.end..end];
        let room_bytes = room.len();
        match vectored::recv(&socket, &mut [IoPartMut::Bytes(room)]) {
            Ok(0) => Err(Error::new(ErrorKind::Unreachable, "the peer closed the connection")),
            Ok(bytes) => {
                self.unread.end += bytes;
                self.received_bytes += bytes as u64;
                self.drained = bytes < room_bytes;
                if bytes >= PAGE_BYTES && !self.patient {
                    // Bulk: an acknowledgement that waits would look like a queue to the sender. Only
                    // a socket that is not TCP refuses, and it has no such delay.
                    let _ = pace::quick_ack(&socket);
                }
                Ok(true)
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(cause) => Err(Error::from(cause)),
        }
    }

    /// Sees to it that `missing` bytes fit behind those that are unread.
    fn make_room(&mut self, missing: usize) {
        if self.unread.is_empty() {
            self.unread = 0..0;
        }
        if self.buffer.len() - self.unread.end >= missing {
            return;
        }
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let wanted = self.unread.end + missing + READ_AHEAD_BYTES;
        if self.buffer.len() < self.unread.end + missing {
            self.buffer.resize(wanted, 0);
        }
    }
}

#[cfg(test)]
mod test {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::limits;
    use crate::wire::Kind;

    fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut bytes = Header::new(kind).with_body(body, 0).encode().to_vec();
        bytes.extend(body);
        bytes
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (near, far) = UnixStream::pair().expect("sockets");
        near.set_nonblocking(true).expect("nonblocking");
        (near, far)
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let bodies: Vec<Vec<u8>> = [0, 8, 70_000, 3, 20_000, 0, 264_000]
            .iter()
            .map(|n| (0..*n).map(|i| i as u8).collect())
            .collect();
        let stream: Vec<u8> = bodies.iter().flat_map(|body| frame(Kind::Talk, body)).collect();
        for cut in [1, 63, 64, 65, 4096, 100_000] {
            let (near, mut far) = pair();
            let mut inbox = Inbox::new();
            let mut got = Vec::new();
            for piece in stream.chunks(cut.max(stream.len() / 5000)) {
                far.write_all(piece).expect("written");
                while let Some(frame) = inbox.poll(&near).expect("honest") {
                    got.push(frame.body.to_vec());
                }
            }
            assert!(got == bodies, "cut {cut}");
            assert_eq!(inbox.received_bytes(), stream.len() as u64);
            drop(far);
            assert_eq!(inbox.poll(&near).expect_err("end").kind, ErrorKind::Unreachable);
        }
    }

    #[test]
    fn a_body_that_was_damaged_ends_it() {
        let (near, mut far) = pair();
        let mut bytes = frame(Kind::Talk, b"what is said");
        far.write_all(&bytes).expect("written");
        *bytes.last_mut().expect("a body") ^= 4;
        far.write_all(&bytes).expect("written");
        let mut inbox = Inbox::new();
        assert_eq!(inbox.poll(&near).expect("honest").expect("whole").body, b"what is said");
        assert_eq!(inbox.poll(&near).expect_err("damaged").kind, ErrorKind::Protocol);
    }

    #[test]
    fn a_bad_header_ends_it_and_nothing_was_allocated_for_it() {
        let (near, mut far) = pair();
        let mut bytes = frame(Kind::Put, &[]);
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        far.write_all(&bytes).expect("written");
        let mut inbox = Inbox::new();
        assert_eq!(inbox.poll(&near).expect_err("checksum").kind, ErrorKind::Protocol);
        assert!(inbox.buffer.capacity() <= 2 * READ_AHEAD_BYTES);
    }

    #[test]
    fn the_buffer_stays_as_long_as_the_longest_frame() {
        let (near, mut far) = pair();
        let thread = std::thread::spawn(move || {
            for _ in 0..3 {
                far.write_all(&frame(Kind::Pages, &vec![1; limits::BODY_BYTES_MAX])).expect("written");
            }
            far
        });
        let mut inbox = Inbox::new();
        let mut frames = 0;
        while frames < 3 {
            frames += usize::from(inbox.poll(&near).expect("honest").is_some());
        }
        thread.join().expect("joined");
        assert!(inbox.buffer.len() <= limits::BODY_BYTES_MAX + 3 * READ_AHEAD_BYTES);
    }
}
