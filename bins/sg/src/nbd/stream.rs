//! The client's end of a connection: bytes in and out without ever waiting, over TCP or a Unix socket alike.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libsg::{Error, ErrorKind, Result};
use rustix::io::Errno;

use super::buffers::Buffer;
use super::handshake::OPTION_BYTES_MAX;

/// Room for what comes before it is known what it is: the longest option with its head.
const INPUT_BYTES: usize = 2 * OPTION_BYTES_MAX;

/// Replies that leave with one system call.
const REPLIES_AT_ONCE: usize = 32;

/// One answer: what is made up for it, and the bytes behind that, if any.
struct Piece {
    head: Vec<u8>,
    data: Option<(Buffer, usize)>,
    sent: usize,
}

impl Piece {
    fn len(&self) -> usize {
        self.head.len() + self.data.as_ref().map_or(0, |(_, bytes)| *bytes)
    }

    /// What is left of it.
    fn parts(&self) -> [&[u8]; 2] {
        let data = self.data.as_ref().map_or(&[][..], |(buffer, bytes)| &buffer[..*bytes]);
        let head_sent = self.sent.min(self.head.len());
        [&self.head[head_sent..], &data[self.sent - head_sent..]]
    }
}

/// A client's connection.
pub struct Stream {
    socket: OwnedFd,
    input: Box<[u8]>,
    start: usize,
    end: usize,
    /// The client sends nothing more.
    closed: bool,
    output: VecDeque<Piece>,
    /// Buffers whose bytes have left.
    sent: Vec<Buffer>,
}

impl Stream {
    /// Over a socket that does not block.
    pub fn new(socket: OwnedFd) -> Self {
        let input = vec![0; INPUT_BYTES].into_boxed_slice();
        let (output, sent) = (VecDeque::new(), Vec::new());
        Self { socket, input, start: 0, end: 0, closed: false, output, sent }
    }

    /// What came and was not taken.
    pub fn bytes(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    /// Whether the client has closed its end: nothing comes any more.
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes bytes that came.
    pub fn take(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
    }

    /// Reads what has come. Returns whether there was anything.
    ///
    /// # Errors
    /// The connection broke.
    pub fn fill(&mut self) -> Result<bool> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.input.len() {
            return Ok(false);
        }
        let read = again(rustix::io::read(&self.socket, &mut self.input[self.end..]))?;
        self.closed |= read == Some(0);
        self.end += read.unwrap_or(0);
        Ok(read.is_some_and(|read| read > 0))
    }

    /// Reads into `to`, and what comes behind that into the input. Returns how much of `to` there is.
    ///
    /// # Errors
    /// The connection broke.
    pub fn fill_into(&mut self, to: &mut [u8]) -> Result<usize> {
        let here = self.bytes().len().min(to.len());
        to[..here].copy_from_slice(&self.input[self.start..self.start + here]);
        self.take(here);
        if here > 0 || to.is_empty() {
            return Ok(here);
        }
        // All that came is taken.
        (self.start, self.end) = (0, 0);
        let wanted = to.len();
        let mut parts = [IoSliceMut::new(to), IoSliceMut::new(&mut self.input)];
        let read = again(rustix::io::readv(&self.socket, &mut parts))?;
        self.closed |= read == Some(0);
        let read = read.unwrap_or(0);
        self.end = read.saturating_sub(wanted);
        Ok(read.min(wanted))
    }

    /// Queues an answer.
    pub fn push(&mut self, head: Vec<u8>, data: Option<(Buffer, usize)>) {
        self.output.push_back(Piece { head, data, sent: 0 });
    }

    /// Whether something waits to leave.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what the socket takes. Returns buffers whose bytes have left.
    ///
    /// # Errors
    /// The connection broke.
    pub fn flush(&mut self) -> Result<std::vec::Drain<'_, Buffer>> {
        while !self.output.is_empty() {
            let some = self.output.iter().take(REPLIES_AT_ONCE);
            let parts: Vec<IoSlice<'_>> = some.flat_map(Piece::parts).map(IoSlice::new).collect();
            let written = again(rustix::io::writev(&self.socket, &parts))?;
            drop(parts);
            let Some(written) = written else { break };
            self.advance(written);
        }
        Ok(self.sent.drain(..))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(piece) = self.output.front_mut() {
            let left = piece.len() - piece.sent;
            if written < left {
                piece.sent += written;
                return;
            }
            written -= left;
            if let Some((buffer, _)) = self.output.pop_front().and_then(|piece| piece.data) {
                self.sent.push(buffer);
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// `None` where the socket has nothing, or takes nothing, now.
fn again(result: rustix::io::Result<usize>) -> Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(errno) => {
            Err(Error::new(ErrorKind::Unreachable, "the client is gone").because(std::io::Error::from(errno)))
        }
    }
}

/// The whole of a buffer that is nobody else's.
///
/// # Errors
/// Somebody else has it.
pub fn own(buffer: &mut Buffer) -> Result<&mut [u8]> {
    Arc::get_mut(buffer).ok_or_else(|| Error::new(ErrorKind::Poisoned, "a buffer has two owners"))
}

#[cfg(test)]
mod test {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Stream) {
        let (client, server) = UnixStream::pair().expect("sockets");
        server.set_nonblocking(true).expect("set");
        (client, Stream::new(server.into()))
    }

    #[test]
    fn payload_is_read_around_what_came_with_it() {
        let (mut client, mut stream) = pair();
        assert!(!stream.fill().expect("nothing yet"));
        client.write_all(b"headpay").expect("sent");
        assert!(stream.fill().expect("read"));
        stream.take(4);
        let mut to = [0; 8];
        assert_eq!(stream.fill_into(&mut to).expect("read"), 3);
        assert_eq!(stream.fill_into(&mut to[3..]).expect("nothing yet"), 0);
        client.write_all(b"loads+next").expect("sent");
        assert_eq!(stream.fill_into(&mut to[3..]).expect("read"), 5);
        assert_eq!((&to, stream.bytes()), (b"payloads", &b"+next"[..]));
        drop(client);
        assert!(!stream.fill().expect("read") && stream.is_closed());
    }

    #[test]
    fn answers_leave_whole_and_in_order_whatever_the_socket_takes() {
        let (mut client, mut stream) = pair();
        let buffer: Buffer = std::iter::repeat_n(7, 1 << 20).collect();
        stream.push(vec![1; 16], Some((Arc::clone(&buffer), 1_000_000)));
        stream.push(vec![2; 16], None);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            client.read_to_end(&mut all).expect("read");
            all
        });
        let mut back = 0;
        while stream.has_output() {
            back += stream.flush().expect("sent").count();
        }
        drop(stream);
        let all = reader.join().expect("joined");
        assert_eq!((all.len(), back), (1_000_032, 1));
        assert!(all[..16] == [1; 16] && all[16..1_000_016].iter().all(|byte| *byte == 7));
        assert_eq!(all[1_000_016..], [2; 16]);
    }
}
