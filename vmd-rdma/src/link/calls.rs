//! What the caller asks of a link, and what it is told.

use std::os::fd::{AsFd, BorrowedFd};

use libsg::Result;
use libsg::vmd::{AccessReply, Completion, Link, PathSample, Reply, Request, Ticket};
use libsg::wire::message::Member;

use super::job::Job;
use super::way::Way;
use super::{End, RdmaLink, own, plain};

impl Link for RdmaLink {
    fn member(&self) -> &Member {
        self.control.member()
    }

    fn submit(&mut self, request: Request<'_>) -> Result<Ticket> {
        self.check_alive()?;
        if matches!(request, Request::Put { .. } | Request::Get(_) | Request::GetKnown { .. }) {
            if !self.is_open()
                && matches!(self.way, Way::Asked(_) | Way::Open(_))
                && let Err(error) = self.advance()
            {
                self.way = Way::Closed;
                self.dead = true;
                return Err(error);
            }
            let ticket = match self.take(request)? {
                Some(ticket) => ticket,
                None => plain(self.control.submit(request)?),
            };
            self.try_way().inspect_err(|_| self.dead = true)?;
            return Ok(ticket);
        }
        Ok(plain(self.control.submit(request)?))
    }

    fn progress(&mut self, write_bytes_max: usize) -> Result<usize> {
        self.check_alive()?;
        self.move_bytes(write_bytes_max).inspect_err(|_| {
            self.way = Way::Closed;
            self.dead = true;
        })
    }

    fn completion(&mut self) -> Option<Completion<'_>> {
        if self.dead || self.failed.is_some() {
            return None;
        }
        let end = match self.next_end() {
            Ok(end) => end?,
            Err(error) => {
                self.lose(error);
                return None;
            }
        };
        let (ticket, result) = match end {
            End::Plain(ticket, answer) => (
                ticket,
                answer.map(|answered| match self.control.show(answered) {
                    AccessReply::Plain(reply) => reply,
                    // Whatever else was asked is not the caller's.
                    _ => Reply::Done,
                }),
            ),
            End::Put(number, result) => {
                self.forget(number);
                let stored = |missing| Reply::Stored { placements: &self.stored, missing };
                (own(number), result.map(stored))
            }
            End::Got(number, result) => {
                let (area, bytes) = match self.jobs.get(&number) {
                    Some(Job::Get(get)) => (get.area, get.bytes),
                    _ => (0, 0),
                };
                self.forget(number);
                if result.is_ok() {
                    self.shown = Some(area);
                }
                let bytes = match &self.way {
                    Way::Open(open) => open.landed(area, bytes),
                    _ => &[],
                };
                (own(number), result.map(|()| Reply::Pages { entries: &self.entries, bytes }))
            }
        };
        Some(Completion { ticket, result })
    }

    fn queued_bytes(&self) -> usize {
        let data = match &self.way {
            Way::Open(open) => open.stream.queued_bytes(),
            _ => 0,
        };
        self.control.queued_bytes() + data
    }

    fn outstanding_bytes(&self) -> usize {
        self.control.outstanding_bytes() + self.job_bytes
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // A failed link is always ready, and so is one whose connection failed.
        self.control.poll_fd().filter(|_| self.failed.is_none()).map(|_| self.poll.as_fd())
    }

    fn path(&self) -> PathSample {
        let path = self.control.path();
        PathSample {
            delivered_bytes: path.delivered_bytes + self.written_bytes,
            received_bytes: path.received_bytes + self.read_bytes,
            ..path
        }
    }

    /// Of what comes over the connection. What the device reads comes at the pace at which it was asked for.
    fn pace_answers(&mut self, bytes_per_s: Option<u64>) {
        self.control.pace_answers(bytes_per_s);
    }
}
