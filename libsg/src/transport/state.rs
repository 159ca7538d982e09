//! The VM's opaque state on the wire: `State` frames, then a message with its length and checksum.

use std::sync::Arc;

use super::{Frame, Outbox};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Checksum;
use crate::limits;
use crate::memory::PageSlice;
use crate::wire::{Header, Kind};

/// Queues the pieces of `state`. `header` gives volume, epoch and sequence. Returns the length and
/// checksum for the message behind them.
///
/// # Errors
/// [`ErrorKind::Input`] for more than [`limits::STATE_BYTES_MAX`].
pub fn push_state(outbox: &mut Outbox, header: Header, state: &[u8]) -> Result<(u64, Checksum)> {
    if state.len() > limits::STATE_BYTES_MAX {
        let message = format!("{} bytes of state, more than {}", state.len(), limits::STATE_BYTES_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    let all = PageSlice::owned(Arc::from(state));
    let mut at = 0;
    loop {
        let bytes = (state.len() - at).min(limits::CONTROL_BYTES_MAX);
        let last = at + bytes == state.len();
        let header = Header { kind: Kind::State, count: u16::from(last), ..header };
        outbox.push_frame(header, &[], [all.part(at, bytes)?])?;
        at += bytes;
        if last {
            return Ok((state.len() as u64, Checksum::of(state)));
        }
    }
}

/// Puts the pieces together again. What it holds is bounded by [`limits::STATE_BYTES_MAX`].
#[derive(Debug, Default)]
pub struct StateAssembler {
    bytes: Vec<u8>,
    last: bool,
}

impl StateAssembler {
    /// One that has seen no piece.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a `State` frame.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for a piece behind the last one, an empty one before it, or too many bytes.
    pub fn push(&mut self, frame: Frame<'_>) -> Result<()> {
        let last = frame.header.count == 1;
        if self.last || frame.header.count > 1 || (frame.body.is_empty() && !last) {
            return Err(Error::new(ErrorKind::Protocol, "a piece of state that does not fit the others"));
        }
        if self.bytes.len() + frame.body.len() > limits::STATE_BYTES_MAX {
            let message = format!("more than {} bytes of state", limits::STATE_BYTES_MAX);
            return Err(Error::new(ErrorKind::Protocol, message));
        }
        self.bytes.extend_from_slice(frame.body);
        self.last = last;
        Ok(())
    }

    /// The whole state, once its end was announced with length and checksum. Ready for another.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] when these are not those of the pieces.
    pub fn finish(&mut self, bytes: u64, checksum: Checksum) -> Result<Vec<u8>> {
        let Self { bytes: state, last } = std::mem::take(self);
        if !last || state.len() as u64 != bytes || Checksum::of(&state) != checksum {
            return Err(Error::new(ErrorKind::Protocol, "the state did not arrive as it was sent"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::transport::Inbox;

    fn carried(state: &[u8]) -> (StateAssembler, u64, Checksum) {
        let (near, far) = UnixStream::pair().expect("sockets");
        near.set_nonblocking(true).expect("nonblocking");
        far.set_nonblocking(true).expect("nonblocking");
        let (mut outbox, mut inbox) = (Outbox::new(), Inbox::new());
        let (bytes, checksum) = push_state(&mut outbox, Header::new(Kind::State), state).expect("fits");
        let mut assembler = StateAssembler::new();
        while !assembler.last {
            outbox.flush(&near, usize::MAX).expect("open");
            while let Some(frame) = inbox.poll(&far).expect("honest") {
                assembler.push(frame).expect("honest");
            }
        }
        (assembler, bytes, checksum)
    }

    #[test]
    fn state_arrives_whole_or_not_at_all() {
        for length in [0, 1, limits::CONTROL_BYTES_MAX, 2 * limits::CONTROL_BYTES_MAX + 7] {
            let state: Vec<u8> = (0..length).map(|at| (at % 253) as u8).collect();
            let (mut assembler, bytes, checksum) = carried(&state);
            assert!(assembler.finish(bytes, checksum).expect("whole") == state);
            let (mut assembler, bytes, checksum) = carried(&state);
            assert!(assembler.finish(bytes + 1, checksum).is_err());
            assert!(assembler.finish(bytes, checksum).is_err(), "it started afresh");
        }
        assert!(
            push_state(&mut Outbox::new(), Header::new(Kind::State), &vec![0; limits::STATE_BYTES_MAX + 1])
                .is_err()
        );
    }

    #[test]
    fn pieces_that_do_not_fit_are_refused() {
        let piece = |count, body| Frame { header: Header { count, ..Header::new(Kind::State) }, body };
        let mut assembler = StateAssembler::new();
        assert!(assembler.push(piece(0, &[])).is_err());
        assert!(assembler.push(piece(2, &[1])).is_err());
        assembler.push(piece(1, &[1])).expect("fits");
        assert!(assembler.push(piece(1, &[1])).is_err());
        let mut assembler = StateAssembler::new();
        let body = vec![0; limits::CONTROL_BYTES_MAX];
        for _ in 0..limits::STATE_BYTES_MAX / limits::CONTROL_BYTES_MAX {
            assembler.push(piece(0, &body)).expect("fits");
        }
        assert!(assembler.push(piece(0, &body)).is_err());
    }
}
