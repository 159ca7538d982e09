//! A session's end of its connection: whole pieces in and out, waiting as long as it takes.
//!
//! One direction at a time is enough: clients never wait while they write, so a session that waits for its
//! answers to be taken stops only a client that reads nothing, and holds no more than one answer for it.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::draw::Draws;
use super::forward::Forwards;
use super::limit::{Class, Limit, Turn};
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, Known};
use crate::memory::SlotSlice;
use crate::memory::vectored::{self, IoPart, IoPartMut};
use crate::pace;
use crate::page::PAGE_BYTES;
use crate::transport::{self, Awaited, Channel};

/// Bytes read beyond what is asked for: the next header and table come with a batch's last pages.
const AHEAD_BYTES: usize = 2048;

/// How often a session that waits looks whether it still should.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A session's end of its connection.
pub(super) struct Stream<'c> {
    channel: &'c Channel,
    turn_in: Turn<'c>,
    ahead: [u8; AHEAD_BYTES],
    /// The part of `ahead` that was not given out.
    from: usize,
    to: usize,
    /// The last read took all that there was.
    drained: bool,
    awaited: Awaited,
    back: Back<'c>,
}

impl<'c> Stream<'c> {
    pub(super) fn new(
        store: &'c Store,
        channel: &'c Channel,
        (limit_in, limit_out): (&'c Limit, &'c Limit),
    ) -> Self {
        Self {
            back: Back {
                channel,
                turn_out: Turn::new(limit_out),
                forwards: Forwards::new(store, limit_out),
                draws: Draws::new(store),
            },
            channel,
            turn_in: Turn::new(limit_in),
            ahead: [0; AHEAD_BYTES],
            from: 0,
            to: 0,
            drained: false,
            awaited: Awaited::default(),
        }
    }

    /// Fills `out`. `false` when the peer closed before its first byte.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when the connection broke or ended in between.
    pub(super) fn read(&mut self, mut out: &mut [u8]) -> Result<bool> {
        let wanted = out.len();
        loop {
            let ready = self.ahead.get(self.from..self.to).unwrap_or_default();
            let take = ready.len().min(out.len());
            let (head, rest) = out.split_at_mut(take);
            head.copy_from_slice(&ready[..take]);
            self.from += take;
            out = rest;
            if out.is_empty() {
                return Ok(true);
            }
            let first = out.len() == wanted;
            let got = self.receive(out.len(), IoPartMut::Bytes(&mut *out))?;
            if got == 0 {
                return if first { Ok(false) } else { Err(ended()) };
            }
            out = &mut out[got..];
        }
    }

    /// Fills a run of slots, straight from the socket.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(super) fn read_slots(&mut self, mut slots: SlotSlice<'_>) -> Result<()> {
        let ready = self.ahead.get(self.from..self.to).unwrap_or_default();
        let take = ready.len().min(slots.len());
        slots.take(take).copy_from(&ready[..take]);
        self.from += take;
        slots = slots.skip(take);
        while !slots.is_empty() {
            let allowed = self.turn_in.wait(Class::Bulk, slots.len());
            let got = self.receive(slots.len(), IoPartMut::Slot(slots.take(allowed)))?;
            if got == 0 {
                return Err(ended());
            }
            self.turn_in.give_back(allowed.saturating_sub(got));
            slots = slots.skip(got);
        }
        Ok(())
    }

    /// Drops `bytes` bytes that come: they count as pages that are taken, which the link has carried.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(super) fn skip(&mut self, mut bytes: usize) -> Result<()> {
        let mut sink = [0; PAGE_BYTES];
        while bytes > 0 {
            let piece = self.turn_in.wait(Class::Bulk, bytes.min(sink.len()));
            if !self.read(&mut sink[..piece])? {
                return Err(ended());
            }
            bytes -= piece;
        }
        Ok(())
    }

    /// Receives once into `part`, which wants `missing` bytes, and ahead behind it when it is all that is
    /// missing. Gives the bytes of `part`; zero is the end.
    fn receive(&mut self, missing: usize, part: IoPartMut<'_>) -> Result<usize> {
        let wanted = part.len();
        self.from = 0;
        self.to = 0;
        let ahead = if wanted == missing { &mut self.ahead[..] } else { &mut [] };
        let most = wanted + ahead.len();
        let mut parts = [part, IoPartMut::Bytes(ahead)];
        loop {
            if std::mem::take(&mut self.drained) {
                self.awaited.set(self.channel, wanted);
                self.back.wait_readable()?;
            }
            match vectored::recv(self.channel, &mut parts) {
                Ok(got) => {
                    self.to = got.saturating_sub(wanted);
                    self.drained = got < most;
                    if got >= PAGE_BYTES {
                        // An acknowledgement that waits would look like a queue to the sender.
                        let _ = pace::quick_ack(self.channel);
                    }
                    return Ok(got.min(wanted));
                }
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => self.drained = true,
                Err(cause) => return Err(cause.into()),
            }
        }
    }

    /// Waits until so many bytes of pages may be taken, which do not come here.
    pub(super) fn take_turn_in(&self, bytes: usize) {
        wait_for(&self.turn_in, Class::Bulk, bytes);
    }

    /// Waits until so many bytes of pages may be given, which do not go from here.
    pub(super) fn take_turn_out(&self, class: Class, bytes: usize) {
        wait_for(&self.back.turn_out, class, bytes);
    }

    /// What the operator lets out, in bytes/s over all connections.
    pub(super) fn limit_out(&self) -> Option<u64> {
        self.back.turn_out.rate()
    }

    /// Moves copies on, and tells the client of those that are made. Does not wait, unless the client takes nothing.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn move_copies(&mut self) -> Result<()> {
        self.back.move_copies()
    }

    /// Waits until so many bytes more may be copied: until then the client's window fills.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn make_room(&mut self, bytes: usize) -> Result<()> {
        self.back.until(|back| back.forwards.has_room(bytes))
    }

    /// Waits until copies of so many pages more may be read from elsewhere.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn make_room_to_draw(&mut self, pages: usize) -> Result<()> {
        self.back.until(|back| back.draws.has_room(pages))
    }

    /// Waits until all copies that are read from elsewhere have been answered.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn finish_draws(&mut self) -> Result<()> {
        self.back.until(|back| !back.draws.is_reading())
    }

    /// What copies are read with.
    pub(super) fn draws(&mut self) -> &mut Draws<'c> {
        &mut self.back.draws
    }

    /// What copies are made with.
    pub(super) fn forwards(&mut self) -> &mut Forwards<'c> {
        &mut self.back.forwards
    }

    /// Writes all of it, in its turn. `patience` is asked about once a second while the peer takes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when the connection broke, or patience is over.
    pub(super) fn write(
        &mut self,
        class: Class,
        parts: &mut [IoPart<'_>],
        patience: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.back.write(class, parts, patience)
    }
}

/// The way back to the client, with what goes on while nothing comes from it.
struct Back<'c> {
    channel: &'c Channel,
    turn_out: Turn<'c>,
    forwards: Forwards<'c>,
    draws: Draws<'c>,
}

impl Back<'_> {
    fn is_busy(&self) -> bool {
        self.forwards.is_busy() || self.draws.is_busy()
    }

    /// Waits for the client. Copies go on meanwhile, and their answers go out.
    fn wait_readable(&mut self) -> Result<()> {
        if !self.is_busy() {
            transport::wait(&[(Some(self.channel.as_fd()), false)], LOOK_EVERY)?;
            return Ok(());
        }
        while self.is_busy() {
            self.move_copies()?;
            if self.wait_for_copies(true)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits for what copies wait for, and where it is asked to for the client; whether the client said something.
    fn wait_for_copies(&self, or_client: bool) -> Result<bool> {
        let mut on = Vec::with_capacity(transport::WAIT_MAX);
        if or_client {
            on.push((Some(self.channel.as_fd()), false));
        }
        on.extend(self.draws.awaited().map(|fd| (Some(fd), false)));
        let timeout = self.forwards.awaited(&mut on);
        on.truncate(transport::WAIT_MAX);
        let ready = transport::wait(&on, timeout)?;
        Ok(or_client && ready & 1 != 0)
    }

    fn move_copies(&mut self) -> Result<()> {
        if !self.is_busy() {
            return Ok(());
        }
        self.forwards.progress();
        self.draws.progress();
        for ready in [self.forwards.take_ready(), self.draws.take_ready()] {
            if !ready.is_empty() {
                self.write(Class::Urgent, &mut [IoPart::Bytes(&ready)], &|| true)?;
            }
        }
        Ok(())
    }

    /// Copies go on until it is so.
    fn until(&mut self, is_so: impl Fn(&Self) -> bool) -> Result<()> {
        while !is_so(self) {
            self.move_copies()?;
            if !is_so(self) {
                self.wait_for_copies(false)?;
            }
        }
        Ok(())
    }

    fn write(&self, class: Class, parts: &mut [IoPart<'_>], patience: &dyn Fn() -> bool) -> Result<()> {
        let mut rest = parts;
        let mut left: usize = rest.iter().map(IoPart::len).sum();
        while left > 0 {
            let allowed = self.turn_out.wait(class, left);
            let sent = self.send(rest, allowed, patience)?;
            self.turn_out.give_back(allowed.saturating_sub(sent));
            left -= sent;
            rest = IoPart::advance(rest, sent);
        }
        Ok(())
    }

    fn send(&self, parts: &[IoPart<'_>], bytes_max: usize, patience: &dyn Fn() -> bool) -> Result<usize> {
        loop {
            match vectored::send_some(self.channel, parts, bytes_max) {
                Ok(sent) => return Ok(sent),
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => {
                    if !writable_soon(self.channel)? && !patience() {
                        let what = "the peer takes no answer, and its volume was dissolved";
                        return Err(Error::new(ErrorKind::Unreachable, what));
                    }
                }
                Err(cause) => return Err(cause.into()),
            }
        }
    }
}

fn wait_for(turn: &Turn<'_>, class: Class, mut bytes: usize) {
    while bytes > 0 {
        bytes -= turn.wait(class, bytes);
    }
}

/// Waits until the socket takes bytes; `false` when it did not for a while.
fn writable_soon(socket: impl AsFd) -> Result<bool> {
    if let Known::Ready(bits) = host::before_wait([(socket.as_fd(), false, true)].into_iter(), LOOK_EVERY) {
        return Ok(bits > 0);
    }
    let timeout = Timespec { tv_sec: LOOK_EVERY.as_secs() as i64, tv_nsec: 0 };
    match rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Unreachable, "the peer closed the connection within a frame")
}
