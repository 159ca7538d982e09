//! Writing frames to a socket that never waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::PageSlice;
use crate::memory::vectored::{self, IO_PARTS_MAX, IoPart};
use crate::wire::{HEADER_BYTES, Header};

/// Written bytes at the front of the buffer that are not yet worth moving the rest for.
const SLACK_BYTES: usize = 64 << 10;

/// Frames that wait to be written to one socket. Headers and tables are copied into one buffer
/// that is used again and again; pages stay where they are until the kernel has copied them.
///
/// It has no limit of its own: whoever fills it keeps a window ([`Self::queued_bytes`]).
#[derive(Debug, Default)]
pub struct Outbox {
    /// Headers and tables, one behind the other; those before `head` are written.
    own: Vec<u8>,
    head: usize,
    parts: VecDeque<Part>,
    /// Bytes of the first part that are written.
    first_written: usize,
    queued_bytes: usize,
    written_bytes: u64,
}

#[derive(Debug)]
enum Part {
    /// So many of our own bytes.
    Own(usize),
    Pages(PageSlice),
}

impl Part {
    const fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => *bytes,
            Self::Pages(slice) => slice.len(),
        }
    }
}

impl Outbox {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that wait.
    #[must_use]
    pub const fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Bytes that the kernel took, in all.
    #[must_use]
    pub const fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Queues a frame: the header, whose body length is filled in here, the table, then the
    /// slices. Returns the bytes of the frame.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a body longer than its kind allows; nothing is queued then.
    pub fn push_frame(
        &mut self,
        header: Header,
        table: &[u8],
        slices: impl IntoIterator<Item = PageSlice>,
    ) -> Result<usize> {
        let (own_before, parts_before) = (self.own.len(), self.parts.len());
        let own = HEADER_BYTES + table.len();
        self.own.resize(own_before + HEADER_BYTES, 0);
        self.own.extend_from_slice(table);
        self.parts.push_back(Part::Own(own));
        let mut body = table.len();
        for slice in slices {
            body += slice.len();
            if !slice.is_empty() {
                self.parts.push_back(Part::Pages(slice));
            }
        }
        if body > header.kind.body_bytes_max() {
            self.own.truncate(own_before);
            self.parts.truncate(parts_before);
            let message = format!("a {:?} frame has no room for {body} bytes", header.kind);
            return Err(Error::new(ErrorKind::Input, message));
        }
        let encoded = header.with_body(table, body - table.len()).encode();
        self.own[own_before..own_before + HEADER_BYTES].copy_from_slice(&encoded);
        self.merge(parts_before);
        self.queued_bytes += HEADER_BYTES + body;
        Ok(HEADER_BYTES + body)
    }

    /// Makes one part of two neighbours that are our own bytes: small frames then go out together.
    fn merge(&mut self, at: usize) {
        let Some(before) = at.checked_sub(1) else { return };
        if let (Some(Part::Own(first)), Some(Part::Own(second))) =
            (self.parts.get(before), self.parts.get(at))
        {
            self.parts[before] = Part::Own(first + second);
            self.parts.remove(at);
        }
    }

    /// Writes what the socket takes, but not more than `bytes_max`. Returns the bytes written, which is
    /// zero when the socket takes nothing now.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when the connection broke.
    pub fn flush(&mut self, socket: impl AsFd, bytes_max: usize) -> Result<usize> {
        let mut written = 0;
        while written < bytes_max && !self.parts.is_empty() {
            let (sent, offered) = match self.send(&socket, bytes_max - written) {
                Ok(sent) => sent,
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => break,
                Err(cause) => return Err(cause.into()),
            };
            self.advance(sent);
            written += sent;
            if sent < offered {
                // The socket is full: asking again would only be told so.
                break;
            }
        }
        Ok(written)
    }

    /// One system call. Returns the bytes that went and those that were offered.
    fn send(&self, socket: impl AsFd, bytes_max: usize) -> io::Result<(usize, usize)> {
        let mut io = [IoPart::Bytes(&[]); IO_PARTS_MAX];
        let (mut count, mut offered, mut own, mut skip) = (0, 0, self.head, self.first_written);
        for (slot, part) in io.iter_mut().zip(&self.parts) {
            let take = (part.len() - skip).min(bytes_max - offered);
            *slot = match part {
                Part::Own(bytes) => {
                    let piece = IoPart::Bytes(&self.own[own..own + take]);
                    own += bytes - skip;
                    piece
                }
                Part::Pages(slice) => match slice.io() {
                    IoPart::Bytes(bytes) => IoPart::Bytes(&bytes[skip..skip + take]),
                    IoPart::Guest(guest) => IoPart::Guest(guest.skip(skip).take(take)),
                },
            };
            (count, offered, skip) = (count + 1, offered + take, 0);
            if offered == bytes_max {
                break;
            }
        }
        Ok((vectored::send(socket, &io[..count])?, offered))
    }

    fn advance(&mut self, bytes: usize) {
        self.queued_bytes -= bytes;
        self.written_bytes += bytes as u64;
        let mut left = bytes;
        while let Some(first) = self.parts.front() {
            let rest = first.len() - self.first_written;
            let step = rest.min(left);
            if matches!(first, Part::Own(_)) {
                self.head += step;
            }
            left -= step;
            if step < rest {
                self.first_written += step;
                break;
            }
            self.first_written = 0;
            self.parts.pop_front();
        }
        if self.head == self.own.len() {
            self.own.clear();
            self.head = 0;
        } else if self.head >= SLACK_BYTES && self.head >= self.own.len() / 2 {
            self.own.drain(..self.head);
            self.head = 0;
        }
    }
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::page::PAGE_BYTES;
    use crate::transport::Inbox;
    use crate::wire::Kind;

    fn pair() -> (UnixStream, UnixStream) {
        let (near, far) = UnixStream::pair().expect("sockets");
        near.set_nonblocking(true).expect("nonblocking");
        far.set_nonblocking(true).expect("nonblocking");
        (near, far)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_goes_in_comes_out_at_any_pace(
            frames in prop::collection::vec((0_usize..100, 0_usize..80), 1..30), step in 1_usize..300_000,
        ) {
            let (near, far) = pair();
            let (mut outbox, mut inbox) = (Outbox::new(), Inbox::new());
            let page = |n: usize| PageSlice::owned(Arc::from(vec![n as u8; PAGE_BYTES]));
            let mut queued = 0;
            for (table, pages) in &frames {
                let bytes = outbox.push_frame(Header::new(Kind::Pages), &vec![1; *table], (0..*pages).map(page));
                queued += bytes.expect("fits");
            }
            prop_assert_eq!(outbox.queued_bytes(), queued);
            let mut got = 0;
            while got < frames.len() {
                let written = outbox.flush(&near, step.max(queued / 1000)).expect("open");
                prop_assert!(written <= step.max(queued / 1000));
                while let Some(frame) = inbox.poll(&far).expect("honest") {
                    let (table, pages) = frames[got];
                    prop_assert_eq!(frame.body.len(), table + pages * PAGE_BYTES);
                    prop_assert!(frame.body[..table].iter().all(|byte| *byte == 1));
                    let chunks = frame.body[table..].chunks(PAGE_BYTES).enumerate();
                    prop_assert!(chunks.into_iter().all(|(n, page)| page.iter().all(|byte| *byte == n as u8)));
                    got += 1;
                }
            }
            prop_assert_eq!(outbox.queued_bytes(), 0);
            prop_assert_eq!(outbox.written_bytes(), queued as u64);
            prop_assert!(outbox.own.is_empty());
        }
    }

    #[test]
    fn small_frames_are_one_part_and_too_long_ones_leave_nothing() {
        let mut outbox = Outbox::new();
        for _ in 0..10 {
            outbox.push_frame(Header::new(Kind::Ping), &[], []).expect("fits");
        }
        assert_eq!(outbox.parts.len(), 1);
        assert!(outbox.push_frame(Header::new(Kind::Credit), &[0; 17], []).is_err());
        assert_eq!((outbox.queued_bytes(), outbox.own.len(), outbox.parts.len()), (640, 640, 1));
    }

    #[test]
    fn a_queue_that_never_empties_does_not_grow() {
        let (near, far) = pair();
        let (mut outbox, mut inbox) = (Outbox::new(), Inbox::new());
        for _ in 0..5000 {
            outbox.push_frame(Header::new(Kind::Talk), &[0; 200], []).expect("fits");
            outbox.push_frame(Header::new(Kind::Talk), &[0; 200], []).expect("fits");
            while outbox.queued_bytes() > 300 {
                let queued = outbox.queued_bytes();
                outbox.flush(&near, queued - 100).expect("open");
                while inbox.poll(&far).expect("honest").is_some() {}
            }
        }
        assert!(outbox.own.capacity() <= 4 * SLACK_BYTES);
    }
}
