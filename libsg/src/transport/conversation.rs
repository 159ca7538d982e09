//! Whole messages with a deadline: for control connections, where waiting is fine.

use std::os::fd::AsFd;
use std::time::Instant;

use super::{Channel, Frame, Inbox, Outbox, StateAssembler, push_state, wait};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::Checksum;
use crate::wire::message::{self, Talk};
use crate::wire::{Header, Kind};

/// A connection on which whole messages are sent and awaited.
#[derive(Debug)]
pub struct Conversation {
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
}

impl Conversation {
    /// Over a connection on which nothing was read yet.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self { channel, inbox: Inbox::new(), outbox: Outbox::new() }
    }

    /// The connection.
    #[must_use]
    pub const fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The parts, for going on without waiting: what came and was not looked at is in the inbox.
    #[must_use]
    pub const fn parts(&mut self) -> (&Channel, &mut Inbox, &mut Outbox) {
        (&self.channel, &mut self.inbox, &mut self.outbox)
    }

    /// Sends a frame and waits until the kernel has taken all of it.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at the deadline; else as [`Outbox::push_frame`] and [`Outbox::flush`].
    pub fn send(&mut self, header: Header, body: &[u8], deadline: Instant) -> Result<()> {
        self.outbox.push_frame(header, body, [])?;
        self.drain(deadline)
    }

    fn drain(&mut self, deadline: Instant) -> Result<()> {
        loop {
            self.outbox.flush(&self.channel, usize::MAX)?;
            if self.outbox.queued_bytes() == 0 {
                return Ok(());
            }
            self.channel.wait_writable(deadline)?;
        }
    }

    /// The next frame.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at the deadline; else as [`Inbox::poll`].
    pub fn recv(&mut self, deadline: Instant) -> Result<Frame<'_>> {
        while !self.inbox.has_frame(&self.channel)? {
            let left = deadline.saturating_duration_since(host::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, "the peer did not answer in time"));
            }
            wait(&[(Some(self.channel.as_fd()), false)], left)?;
        }
        let frame = self.inbox.poll(&self.channel)?;
        frame.ok_or_else(|| Error::new(ErrorKind::Unreachable, "the peer closed the connection"))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_talk(&mut self, talk: &Talk, deadline: Instant) -> Result<()> {
        let body = message::encode(talk)?;
        self.send(self.channel.header(Kind::Talk), &body, deadline)
    }

    /// The next frame, which is a message.
    ///
    /// # Errors
    /// As [`Self::recv`], and [`ErrorKind::Protocol`] for any other frame.
    pub fn recv_talk(&mut self, deadline: Instant) -> Result<Talk> {
        loop {
            let frame = self.recv(deadline)?;
            match frame.header.kind {
                Kind::Talk => return Ok(Talk::decode(frame.body)?),
                // Of a ping whose sender waits for it no more.
                Kind::Pong => {}
                other => return Err(unexpected(other)),
            }
        }
    }

    /// Sends the VM's state, with its end.
    ///
    /// # Errors
    /// As [`Self::send`]; [`ErrorKind::Input`] for a state that is too long.
    pub fn send_state(&mut self, state: &[u8], deadline: Instant) -> Result<()> {
        let header = self.channel.header(Kind::State);
        let (bytes, checksum) = push_state(&mut self.outbox, header, state)?;
        self.send_talk(&Talk::StateEnd { bytes, checksum: checksum.0 }, deadline)
    }

    /// The VM's state, all of it.
    ///
    /// # Errors
    /// As [`Self::recv`], and [`ErrorKind::Protocol`] for anything else, or a state that did not arrive as it
    /// was sent.
    pub fn recv_state(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        let mut assembler = StateAssembler::new();
        loop {
            let frame = self.recv(deadline)?;
            match frame.header.kind {
                Kind::State => assembler.push(frame)?,
                Kind::Talk => match Talk::decode(frame.body)? {
                    Talk::StateEnd { bytes, checksum } => return assembler.finish(bytes, Checksum(checksum)),
                    Talk::Abort { kind, reason } => {
                        return Err(Error::new(kind, format!("the peer gave up: {reason}")));
                    }
                    _ => return Err(unexpected(Kind::Talk)),
                },
                other => return Err(unexpected(other)),
            }
        }
    }
}

fn unexpected(kind: Kind) -> Error {
    Error::new(ErrorKind::Protocol, format!("a {kind:?} frame where none belongs"))
}
