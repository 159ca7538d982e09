//! A source QEMU's stream as a connection, and how much of it may have been said that nobody has read.
//!
//! A source is through when it has said everything, read or not: then nothing can be had again. What it may have said is what
//! its socket holds, and in pages of zeros, 9 bytes each, that is 142 MiB at what hosts give by default. And what the guest waits
//! for stands behind it: with 240 KB in front of each such page, of which thousands are had while there is no room, a relay with
//! a window of 32 MiB held 550 to 650 MiB. So the buffer of the source's socket is made small from the beginning on, and smaller
//! near the end: by the relay, which made both ends of the connection, and keeps a duplicate of the source's until then. At 8
//! KiB a stream takes 1.4 s of processor time a GiB at each end.
//!
//! While the relay has the duplicate, the connection does not end with the source: whether that lives is looked at.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libsg::Result;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use rustix::net::sockopt::set_socket_send_buffer_size;

use super::pages::Limits;

/// Bytes of the shortest record of a page.
pub(super) const RECORD_BYTES: usize = 9;

/// What a source's socket is told to hold: from the beginning on, and near the end. It holds three times as much: the kernel
/// doubles it, and lets a piece of half of that in when there is room for any.
const STEPS_BYTES: [usize; 2] = [32 << 10, 8 << 10];

/// A piece that a source may be writing when its buffer is made small: that was allocated, or waits to be.
const PIECE_BYTES: u64 = 64 << 10;

/// What of its stream waits in a QEMU itself (a QEMUFile's buffer); and here, half an item.
const BEFORE_BYTES: u64 = (32 << 10) + (16 << 10);

/// How long nothing comes before it is looked whether the source lives.
const SILENCE: Duration = Duration::from_millis(500);

/// A connection to a source.
pub(crate) struct Stream {
    /// Our end.
    pub ours: UnixStream,
    /// A duplicate of the source's end.
    pub theirs: Option<UnixStream>,
    /// A connection to the source that ends with it, of which nothing is read.
    pub lives: Option<UnixStream>,
}

impl Stream {
    /// The way back, of which a write takes no longer than the way itself may stand still.
    pub fn answers(&self) -> io::Result<UnixStream> {
        let answers = self.ours.try_clone()?;
        answers.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(answers)
    }
}

impl From<UnixStream> for Stream {
    /// One of which the source has the other end alone.
    fn from(ours: UnixStream) -> Self {
        Self { ours, theirs: None, lives: None }
    }
}

/// What a source may have said that nobody has read.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// As long as its buffer can be made small: both ends.
    wide: Option<(UnixStream, UnixStream)>,
    lives: Option<UnixStream>,
    /// How many steps were made.
    step: usize,
    /// What was under way at the last one, less what was read since.
    left_bytes: u64,
}

impl Unread {
    /// Of a connection of which nothing was read.
    pub fn of(stream: &mut Stream) -> Result<Self> {
        stream.ours.set_read_timeout(Some(SILENCE))?;
        let ours = stream.ours.try_clone()?;
        let wide = stream.theirs.take().map(|theirs| (ours, theirs));
        let mut unread = Self { wide, lives: stream.lives.take(), step: 0, left_bytes: 0 };
        unread.step();
        Ok(unread)
    }

    /// Of a source that has so many pages left: makes its buffer smaller where they are few, if that can be done.
    pub fn narrow(&mut self, limits: &Limits, left: u32) {
        // It has one step to go at most.
        if left <= self.holds(limits) + limits.narrowed_pages {
            self.step();
        }
    }

    /// Makes its buffer smaller, if that can be done.
    fn step(&mut self) {
        let (Some((ours, theirs)), Some(size)) = (&self.wide, STEPS_BYTES.get(self.step)) else { return };
        let narrowed = set_socket_send_buffer_size(theirs, *size).and_then(|()| ioctl_fionread(ours));
        match narrowed {
            // A small read may be in hand that is counted both ways.
            Ok(queued) => (self.step, self.left_bytes) = (self.step + 1, queued + PIECE_BYTES + 4096),
            Err(error) => tracing::warn!(%error, "the buffer of the source QEMU's socket stays large"),
        }
        if narrowed.is_err() || self.step == STEPS_BYTES.len() {
            self.wide = None;
        }
    }

    /// Nothing more is read: what it was known by ends with the source.
    pub fn forget(&mut self) {
        (self.wide, self.lives) = (None, None);
    }

    /// So much was read.
    pub fn read(&mut self, bytes: usize) {
        self.left_bytes = self.left_bytes.saturating_sub(bytes as u64);
    }

    /// How many pages it may be, at most.
    pub fn pages(&self, limits: &Limits) -> u32 {
        self.holds(limits).max(if self.step == 0 { 0 } else { pages_of(self.left_bytes + BEFORE_BYTES) })
    }

    /// How many fit into a buffer of this size, and before it.
    fn holds(&self, limits: &Limits) -> u32 {
        let size = self.step.checked_sub(1).and_then(|at| STEPS_BYTES.get(at));
        size.map_or(limits.unread_pages, |size| pages_of(3 * *size as u64 + BEFORE_BYTES))
    }

    /// Whether the source has its end still, as far as can be seen.
    pub fn lives(&self) -> bool {
        let Some(lives) = self.lives.as_ref().filter(|_| self.wide.is_some()) else { return true };
        let mut looked = [PollFd::new(lives, PollFlags::RDHUP)];
        let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
        poll(&mut looked, Some(&none)).is_ok() && !looked[0].revents().intersects(ended)
    }
}

/// Pages that a source may have said and nobody has read: while its buffer is what the host gives, and right after it was made
/// small.
pub(super) fn unread_pages() -> (u32, u32) {
    let said = std::fs::read_to_string("/proc/sys/net/core/wmem_default");
    let socket = said.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(SOCKET_BYTES);
    let wide = socket.min(SOCKET_BYTES_MAX) + PIECE_BYTES + BEFORE_BYTES;
    (pages_of(wide), pages_of(PIECE_BYTES + 8192 + BEFORE_BYTES))
}

fn pages_of(bytes: u64) -> u32 {
    u32::try_from(bytes / RECORD_BYTES as u64).unwrap_or(u32::MAX)
}

/// What a unix socket takes by default, and more than which no host lets it take.
const SOCKET_BYTES: u64 = 208 << 10;
const SOCKET_BYTES_MAX: u64 = 1 << 30;

#[cfg(test)]
mod test {
    use std::io::{ErrorKind, Read as _, Write as _};

    use super::*;

    /// What fits into a connection that nobody reads.
    fn fill(source: &mut UnixStream) -> u64 {
        source.set_nonblocking(true).expect("set");
        let mut bytes = 0;
        // As a QEMU writes it that has pages of zeros.
        let piece = [0; 32 << 10];
        loop {
            match source.write(&piece) {
                Ok(written) => bytes += written as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn no_more_is_unread_than_it_says() {
        let limits = Limits::of_window(0);
        let (ours, mut source) = UnixStream::pair().expect("a pair");
        let theirs = Some(source.try_clone().expect("a duplicate"));
        let mut stream = Stream { ours, theirs, lives: None };
        let mut unread = Unread::of(&mut stream).expect("set");
        let said = fill(&mut source);
        // So much stands before a page that the guest waits for.
        assert!(said <= 3 * STEPS_BYTES[0] as u64, "{said}");
        let holds = |unread: &Unread, bytes: u64| bytes / 9 <= u64::from(unread.pages(&limits));
        let mut left = said;
        unread.narrow(&limits, 100_000);
        assert_eq!((unread.step, unread.pages(&limits)), (1, unread.holds(&limits)));
        let mut buffer = [0; 4096];
        for (pages, step) in [(40_000, 1), (20_000, 2), (0, 2)] {
            assert!(holds(&unread, left), "{left}");
            unread.narrow(&limits, pages);
            assert_eq!(unread.step, step);
            left += fill(&mut source);
            assert!(holds(&unread, left), "{left}");
            for _ in 0..200 {
                let read = stream.ours.read(&mut buffer).expect("there is some");
                unread.read(read);
                left = left - read as u64 + fill(&mut source);
                assert!(holds(&unread, left), "{left}");
            }
            assert!(left <= 3 * STEPS_BYTES[step - 1] as u64, "{left}");
        }
        assert!(unread.wide.is_none() && unread.pages(&limits) < limits.unread_pages / 4, "{unread:?}");
    }

    #[test]
    fn a_source_that_ends_is_seen() {
        let (ours, source) = UnixStream::pair().expect("a pair");
        let (lives, beats) = UnixStream::pair().expect("a pair");
        let theirs = Some(source.try_clone().expect("a duplicate"));
        let unread = Unread::of(&mut Stream { ours, theirs, lives: Some(lives) }).expect("set");
        assert!(unread.lives());
        drop((source, beats));
        assert!(!unread.lives());
    }
}
