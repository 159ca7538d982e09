//! What the intermediary's answers do to puts and gets that go over the device.

use libsg::host;
#[cfg(feature = "simulation")]
use libsg::host::simulation::{Bug, has_bug};
use libsg::ids::{Checksum, Placement};
use libsg::page::PAGE_BYTES;
use libsg::vmd::{AccessReply, Answered, Link as _, Reply, Ticket};
use libsg::wire::{Missing, PageEntry};
use libsg::{Error, ErrorKind, Result};
use rustix::event::epoll::{self, EventData, EventFlags};

use super::job::Job;
use super::way::Way;
use super::{Asked, End, RdmaLink, own, plain};

/// The number of no job.
const NOBODY: u64 = 0;

/// A fault on purpose.
fn settles_early() -> bool {
    #[cfg(feature = "simulation")]
    return has_bug(Bug::SettledEarly);
    #[cfg(not(feature = "simulation"))]
    false
}

impl RdmaLink {
    /// An answer on the connection.
    pub(super) fn hear(&mut self, ticket: Ticket, answer: Result<Answered>) -> Result<()> {
        match self.asked.remove(&ticket) {
            None => self.heard = Some(End::Plain(plain(ticket), answer)),
            Some(Asked::Stands(number)) => {
                self.forget(number);
                self.heard = Some(End::Plain(own(number), answer));
            }
            Some(Asked::Attach) => self.hear_attached(answer)?,
            Some(Asked::Lease(number)) => self.hear_leased(number, answer)?,
            Some(Asked::Settle(number)) => self.hear_settled(number, answer)?,
            Some(Asked::Reach(number)) => self.hear_reached(number, answer)?,
            Some(Asked::Again(kept)) => self.hear_again(kept, ticket, answer)?,
        }
        Ok(())
    }

    fn hear_leased(&mut self, number: u64, answer: Result<Answered>) -> Result<()> {
        let (Some(Job::Put(put)), Way::Open(open)) = (self.jobs.get_mut(&number), &mut self.way) else {
            return Ok(());
        };
        let answered = match answer {
            Ok(answered) => answered,
            Err(error) => {
                self.grants -= 1;
                self.leased -= put.entries.len();
                if error.kind == ErrorKind::Unreachable {
                    return self.shut(number, error);
                }
                self.heard = Some(End::Put(number, Err(error)));
                return Ok(());
            }
        };
        let AccessReply::Leased { placements, keys } = self.control.show(answered) else {
            return Err(Error::new(ErrorKind::Protocol, "no lease where one belongs"));
        };
        put.placements.extend_from_slice(placements);
        let granted = put.entries.iter().zip(placements).filter(|(_, place)| place.is_some());
        put.granted.extend(granted.map(|(entry, _)| *entry));
        if put.granted.is_empty() {
            self.grants -= 1;
            self.leased -= put.entries.len();
            self.stored.clear();
            self.stored.extend_from_slice(placements);
            self.heard = Some(End::Put(number, Ok(Missing::NONE)));
            return Ok(());
        }
        let ends = if settles_early() { NOBODY } else { number };
        match open.write(ends, put, keys) {
            Ok(()) => {
                self.ended.extend((ends == NOBODY).then_some(number));
                self.news = true;
                Ok(())
            }
            Err(error) if error.kind == ErrorKind::Protocol => Err(error),
            Err(error) => {
                open.written(put);
                self.leased -= put.entries.len();
                self.releases.push(put.lease);
                self.shut(number, error)
            }
        }
    }

    fn hear_settled(&mut self, number: u64, answer: Result<Answered>) -> Result<()> {
        let Some(Job::Put(put)) = self.jobs.get(&number) else { return Ok(()) };
        let result = match answer {
            Ok(answered) => match self.control.show(answered) {
                AccessReply::Plain(Reply::Stored { placements, missing }) => {
                    let mut stored = placements.iter().copied();
                    self.stored.clear();
                    let place = |there: &Option<Placement>| there.and_then(|_| stored.next().flatten());
                    self.stored.extend(put.placements.iter().map(place));
                    Ok(missing)
                }
                _ => return Err(Error::new(ErrorKind::Protocol, "no placements where some belong")),
            },
            Err(error) => {
                // Where it was refused for what it asked, the lease goes on; else there is none to be released.
                self.grants += 1;
                self.releases.push(put.lease);
                Err(error)
            }
        };
        self.heard = Some(End::Put(number, result));
        Ok(())
    }

    fn hear_reached(&mut self, number: u64, answer: Result<Answered>) -> Result<()> {
        let (Some(Job::Get(get)), Way::Open(open)) = (self.jobs.get_mut(&number), &mut self.way) else {
            return Ok(());
        };
        get.answered = true;
        match answer {
            Ok(answered) => {
                let AccessReply::Reached { entries, keys, limited } = self.control.show(answered) else {
                    return Err(Error::new(ErrorKind::Protocol, "no pages where some belong"));
                };
                get.entries.extend_from_slice(entries);
                if !limited {
                    get.keys.extend_from_slice(keys);
                }
                open.read(number, get, keys)?;
            }
            Err(error) => get.refused = Some(error),
        }
        self.end_get(number)
    }

    /// Whether what is kept may be read on without asking.
    fn hear_again(&mut self, kept: u64, ticket: Ticket, answer: Result<Answered>) -> Result<()> {
        let goes_on = match answer {
            Ok(answered) => {
                self.releases.push(ticket);
                match self.control.show(answered) {
                    AccessReply::Reached { limited, .. } => !limited,
                    _ => return Err(Error::new(ErrorKind::Protocol, "no pages where some belong")),
                }
            }
            Err(_) => {
                self.grants -= 1;
                false
            }
        };
        self.standing.was_asked(kept, goes_on, host::now(), &mut self.releases);
        Ok(())
    }

    /// What was read without asking is held against what is known. Where it is something else, the intermediary is asked.
    pub(super) fn end_known(&mut self, number: u64) -> Result<()> {
        let (Some(Job::Get(get)), Way::Open(open)) = (self.jobs.get_mut(&number), &mut self.way) else {
            return Ok(());
        };
        let bytes = open.landed(get.area, get.known.len() * PAGE_BYTES);
        let is_it = |(known, page): (&PageEntry, &[u8])| known.checksum == Checksum::of(page);
        if get.known.iter().zip(bytes.chunks_exact(PAGE_BYTES)).all(is_it) {
            get.bytes = bytes.len();
            get.entries.append(&mut get.known);
            self.read_bytes += get.bytes as u64;
            self.got.push_back((number, Ok(())));
            return Ok(());
        }
        get.known.clear();
        get.bytes = 0;
        open.give_back(get.area);
        self.waiting.push_front(number);
        self.ask()
    }

    /// A get goes on where it was answered, and where its bytes are there; it ends where both have come.
    pub(super) fn end_get(&mut self, number: u64) -> Result<()> {
        let (Some(Job::Get(get)), Way::Open(open)) = (self.jobs.get_mut(&number), &mut self.way) else {
            return Ok(());
        };
        if !get.has_ended() {
            return Ok(());
        }
        let Some(error) = get.refused.take() else {
            self.read_bytes += get.bytes as u64;
            if get.keys.is_empty() {
                self.releases.push(get.reach);
            } else {
                self.standing.keep(&get.keys, get.reach, host::now(), &mut self.releases);
            }
            self.got.push_back((number, Ok(())));
            return Ok(());
        };
        self.grants -= 1;
        open.give_back(get.area);
        if error.kind == ErrorKind::Unreachable {
            return self.shut(number, error);
        }
        self.got.push_back((number, Err(error)));
        Ok(())
    }

    fn hear_attached(&mut self, answer: Result<Answered>) -> Result<()> {
        let Way::Asked(half) = std::mem::replace(&mut self.way, Way::Closed) else { return Ok(()) };
        let endpoint = match answer {
            Ok(answered) => match self.control.show(answered) {
                AccessReply::Attached(endpoint) => endpoint,
                _ => return Err(Error::new(ErrorKind::Protocol, "no end where one belongs")),
            },
            // Perhaps it is one later: the volume is not there yet, or this is the epoch of a claim to come.
            Err(error) if matches!(error.kind, ErrorKind::Volume | ErrorKind::Fenced) => {
                self.way = Way::Untried;
                // What waits for it is told the same, on the connection.
                while let Some(number) = self.waiting.pop_front() {
                    self.stand_in(number)?;
                }
                return Ok(());
            }
            Err(error) => {
                return self.said.not_over_the_device(error);
            }
        };
        match half.connect(&endpoint, self.class) {
            Ok(mut open) => {
                let fd = open.stream.pair().poll_fd();
                epoll::add(&self.poll, fd, EventData::new_u64(1), EventFlags::IN)?;
                self.way = Way::Open(Box::new(open));
            }
            Err(error) => return self.said.not_over_the_device(error.at(&self.control.member().node)),
        }
        Ok(())
    }
}
