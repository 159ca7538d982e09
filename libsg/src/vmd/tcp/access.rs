//! A connection as the control part of a link whose pages take another way ([`crate::wire::access`]): what such a link
//! asks beside what any does, and the answers.

use super::TcpLink;
use super::answer::{Answer, Asked, Expected};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{MemberSet, Placement};
use crate::limits;
use crate::vmd::link::{Reply, Ticket, at_most, check_copies};
use crate::wire::access::{Endpoint, KeyEntry, Settled};
use crate::wire::entry::encode_table;
use crate::wire::run::encode_runs;
use crate::wire::{Encoding, GetEntry, Kind, PageEntry};

/// What a link whose pages take another way asks of an intermediary.
#[derive(Clone, Copy, Debug)]
pub enum AccessRequest<'a> {
    /// To be let in, with this end. Asked again, all that it had before is gone. Answered by
    /// [`AccessReply::Attached`]; refused with [`ErrorKind::Unreachable`] where this way leads nowhere.
    Attach(&'a Endpoint),
    /// Slots for so many pages (at most [`limits::BATCH_PAGES_MAX`]) that are there to be written at once. Answered by
    /// [`AccessReply::Leased`].
    Lease(usize),
    /// A lease's slots hold these pages, as many as there were slots, in their order. Answered as
    /// [`crate::vmd::Request::Put`] is. The lease is over, unless this was refused for what was asked.
    Settle {
        /// The lease's ticket.
        lease: Ticket,
        /// The pages, all of which have bytes.
        entries: &'a [PageEntry],
        /// As of a `Put`.
        copies: MemberSet,
    },
    /// Where pages can be read, which stay there until they are released. Answered by [`AccessReply::Reached`].
    Reach(&'a [GetEntry]),
}

/// The answer to any request of such a link.
#[derive(Debug)]
pub enum AccessReply<'a> {
    /// To `Attach`: the other end.
    Attached(Box<Endpoint>),
    /// To `Lease`.
    Leased {
        /// Where each page goes; `None` for one that there is no room for. With none at all there is no lease.
        placements: &'a [Option<Placement>],
        /// How to reach it.
        keys: &'a [KeyEntry],
    },
    /// To `Reach`.
    Reached {
        /// One for each page, `Gone` where nothing lies.
        entries: &'a [PageEntry],
        /// How to reach the others.
        keys: &'a [KeyEntry],
        /// The intermediary keeps to a limit: whoever reads there asks first.
        limited: bool,
    },
    /// To all others.
    Plain(Reply<'a>),
}

/// An answer that came: [`TcpLink::show`] shows it, until the next one is taken.
#[derive(Debug)]
pub struct Answered(pub(super) Answer);

impl TcpLink {
    /// Queues a request of a link whose pages take another way.
    ///
    /// # Errors
    /// The link has failed, or the request is larger than a frame may be.
    pub fn submit_access(&mut self, request: AccessRequest<'_>) -> Result<Ticket> {
        self.check_alive()?;
        self.table.clear();
        let expected = match request {
            AccessRequest::Attach(endpoint) => {
                self.table.extend_from_slice(endpoint.as_bytes());
                self.push(Kind::Attach, 0, &[])?;
                Expected::Attached
            }
            AccessRequest::Lease(pages) => {
                at_most(pages, limits::BATCH_PAGES_MAX)?;
                self.push(Kind::Lease, pages, &[])?;
                Expected::Leased(pages)
            }
            AccessRequest::Settle { lease, entries, copies } => {
                check_copies(copies)?;
                at_most(entries.len(), limits::BATCH_PAGES_MAX)?;
                if entries.iter().any(|entry| entry.encoding != Encoding::Raw) {
                    return Err(Error::new(ErrorKind::Input, "pages that have no bytes were written"));
                }
                encode_table([Settled { lease: lease.0, copies }], &mut self.table);
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::Settle, runs, &[])?;
                Expected::Settled(entries.len(), copies)
            }
            AccessRequest::Reach(entries) => {
                at_most(entries.len(), limits::BATCH_PAGES_MAX)?;
                let runs = encode_runs(entries.iter().copied(), &mut self.table);
                self.push(Kind::Reach, runs, &[])?;
                let mut pages = self.outstanding.page_list();
                pages.extend(entries.iter().map(|entry| entry.page));
                Expected::Reached(pages)
            }
        };
        let bytes = self.table.len();
        Ok(Ticket(self.outstanding.add(Asked { expected, bytes })))
    }

    /// Lets go of leases that nothing was written to, and of pages that were read, by their tickets. There is no answer.
    ///
    /// # Errors
    /// The link has failed, or these are more than a frame has room for.
    pub fn release(&mut self, tickets: &[Ticket]) -> Result<()> {
        self.check_alive()?;
        at_most(tickets.len(), limits::GRANTS_MAX)?;
        self.table.clear();
        encode_table(tickets.iter().map(|ticket| ticket.0), &mut self.table);
        self.push(Kind::Release, tickets.len(), &[])
    }

    /// The next request that came to its end, whichever kind it is: [`crate::vmd::Link::completion`] of such a link.
    pub fn answered(&mut self) -> Option<(Ticket, Result<Answered>)> {
        if self.dead || self.failed.is_some() {
            return None;
        }
        match self.next_answer() {
            Ok(next) => next.map(|(ticket, answer)| (ticket, answer.map(Answered))),
            Err(error) => {
                self.failed = Some(error.at(&self.member.node));
                None
            }
        }
    }

    /// Shows the answer that was taken last.
    pub fn show(&self, answered: Answered) -> AccessReply<'_> {
        match answered.0 {
            Answer::Attached(endpoint) => AccessReply::Attached(endpoint),
            Answer::Leased => AccessReply::Leased { placements: &self.stored, keys: &self.keys },
            Answer::Reached { limited } => {
                AccessReply::Reached { entries: &self.entries, keys: &self.keys, limited }
            }
            other => AccessReply::Plain(self.reply(other)),
        }
    }
}
