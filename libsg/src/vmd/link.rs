//! One client's path to one intermediary: a queue pair in spirit.
//!
//! A worker submits requests up to its window, moves bytes, and reaps completions, all from one
//! thread and without ever blocking inside the link. Stop-and-wait is never needed: any number of
//! requests may be outstanding. Over TCP a link is a non-blocking socket that pipelines; over RDMA
//! it posts work requests; in memory it answers at once.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::content::{ContentHasher, Sharing};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, MemberSet, Placement, Round, VolumeId};
use crate::limits;
use crate::memory::PageSlice;
use crate::page::PageRange;
use crate::wire::message::{Member, VmdReply, VmdRequest};
use crate::wire::{Encoding, GetEntry, HintEntry, IndexEntry, Missing, PageEntry, ReferEntry, Referral};

/// What a link is for, which decides its priority on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Pages that nobody waits for, and control requests.
    Bulk,
    /// Pages that the guest waits for: a connection of its own, first in every queue.
    Urgent,
}

/// Numbers the requests of one link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What is asked of an intermediary. Borrowed tables are copied on submission; page bytes are not.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Store pages, each in a new slot. Answered by [`Reply::Stored`] once a later read by any
    /// client sees them.
    Put {
        /// The pages. Those of encoding `Raw` have their bytes in `slices`, in order.
        entries: &'a [PageEntry],
        /// The bytes, straight from the guest's memory: it must neither change nor go away until
        /// the completion (in post-copy the VM does not run at the source).
        slices: &'a [PageSlice],
        /// The members that shall each hold them when the answer comes, this one among them, which sends them on:
        /// each then finds them in [`Self::Locate`], whatever becomes of the index. None: this one alone, found by the
        /// index.
        copies: MemberSet,
    },
    /// Store pages by the hashes of their bytes, where these are (at most [`crate::limits::BATCH_PAGES_MAX`] at a
    /// time). Answered by [`Reply::Referred`].
    Refer(&'a [ReferEntry]),
    /// Have pages that were stored here by reference held by other members, too, as [`Self::Put`] does with pages that it
    /// stores: each finds them in [`Self::Locate`] then. Answered by [`Reply::Stored`]: a page that is not here, or for
    /// which that was asked before, has no placement, and needs not be given back.
    Spread {
        /// The pages (at most [`crate::limits::BATCH_PAGES_MAX`]): where they lie here, and their checksums, the seals.
        entries: &'a [IndexEntry],
        /// The members that shall hold them when the answer comes, this one among them.
        copies: MemberSet,
    },
    /// Tell who has the bytes of hashes that this intermediary is asked about (at most
    /// [`crate::limits::BATCH_PAGES_MAX`] at a time). A hint, which may be forgotten; [`Referral::At`] answers by it.
    Hint(&'a [HintEntry]),
    /// Put entries into the index here. An entry replaces one of an older round or the same
    /// (a page that was lost with an intermediary is put again elsewhere), never of a newer one.
    PutIndex(&'a [IndexEntry]),
    /// Read pages where they lie.
    Get(&'a [GetEntry]),
    /// The same, of pages of which the index has said what they are: whoever reads memory itself need not ask whether they
    /// are there, since the bytes tell. So a page may be had that was given back a moment ago.
    GetKnown {
        /// Where they lie.
        wanted: &'a [GetEntry],
        /// What they are, as many.
        known: &'a [PageEntry],
    },
    /// Ask the index for what it knows of these pages, in ascending order; at most
    /// [`crate::limits::INDEX_ENTRIES_MAX`] entries come: whoever gets that many asks on behind
    /// the last one. Over a large range this is a scan. Where copies lie here themselves, they are named where the index
    /// knows of no newer round.
    Locate(PageRange),
    /// Drop pages of the range that were put below this round, from store and index.
    Discard {
        /// Which pages.
        range: PageRange,
        /// Those of this round and above stay.
        below: Round,
    },
    /// Give slots back whose pages another way made safe first (at most
    /// [`crate::limits::BATCH_PAGES_MAX`] at a time), and copies that lie here of pages which another member was the
    /// first to hold, at these placements. The index is left alone.
    Drop(&'a [GetEntry]),
    /// Rare requests: volumes and their states.
    Control(&'a VmdRequest),
    /// Store the VM's opaque state with the volume, here.
    PutState(&'a [u8]),
    /// Give the VM's opaque state back.
    GetState,
    /// As `PutState`, of a piece of the final set, which lies ahead of the state
    /// ([`crate::wire::final_set`]).
    PutPiece(u32, &'a [u8]),
    /// As `GetState`, of a piece of the final set.
    GetPiece(u32),
}

impl Request<'_> {
    /// What every backend refuses before it sends anything.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for nothing, or more than a frame may have; pages that do not go with their bytes; copies in
    /// too many places, or of pages that lie nowhere.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Put { entries, slices, copies } => {
                check_copies(*copies)?;
                at_most(entries.len(), limits::BATCH_PAGES_MAX)?;
                check_bytes(entries, slices)
            }
            Self::Spread { entries, copies } => {
                check_copies(*copies)?;
                at_most(entries.len(), limits::BATCH_PAGES_MAX)?;
                if entries.iter().any(|entry| entry.placement.is_none()) {
                    return Err(Error::new(ErrorKind::Input, "copies of pages that lie nowhere"));
                }
                Ok(())
            }
            Self::Refer(offers) => at_most(offers.len(), limits::BATCH_PAGES_MAX),
            Self::Hint(hints) => at_most(hints.len(), limits::BATCH_PAGES_MAX),
            Self::PutIndex(entries) => at_most(entries.len(), limits::INDEX_ENTRIES_MAX),
            Self::Get(entries) | Self::Drop(entries) => at_most(entries.len(), limits::BATCH_PAGES_MAX),
            Self::GetKnown { wanted, known } => {
                at_most(wanted.len(), limits::BATCH_PAGES_MAX)?;
                let fit = wanted.iter().map(|get| get.page).eq(known.iter().map(|entry| entry.page));
                let have = known.iter().all(|entry| entry.encoding == Encoding::Raw);
                if fit && have {
                    return Ok(());
                }
                Err(Error::new(ErrorKind::Input, "what is known is of other pages than are wanted"))
            }
            Self::Locate(_)
            | Self::Discard { .. }
            | Self::Control(_)
            | Self::PutState(_)
            | Self::GetState
            | Self::PutPiece(..)
            | Self::GetPiece(_) => Ok(()),
        }
    }
}

fn check_bytes(entries: &[PageEntry], slices: &[PageSlice]) -> Result<()> {
    let said: usize = entries.iter().map(|entry| usize::from(entry.encoded_bytes)).sum();
    let given: usize = slices.iter().map(PageSlice::len).sum();
    if said != given || entries.iter().any(|entry| entry.encoding != Encoding::Raw) {
        let message =
            format!("{given} bytes of pages for a table that says {said}, or pages that have no bytes");
        return Err(Error::new(ErrorKind::Input, message));
    }
    Ok(())
}

pub(super) fn check_copies(copies: MemberSet) -> Result<()> {
    if copies.len() > limits::COPIES_MAX {
        let message = format!("{} copies of a page, more than {}", copies.len(), limits::COPIES_MAX);
        return Err(Error::new(ErrorKind::Input, message));
    }
    Ok(())
}

pub(super) fn at_most(entries: usize, max: usize) -> Result<()> {
    if entries == 0 || entries > max {
        let message = format!("a request with {entries} entries, not 1 to {max}");
        return Err(Error::new(ErrorKind::Input, message));
    }
    Ok(())
}

/// The answer to a request.
#[derive(Debug)]
pub enum Reply<'a> {
    /// To `Put` and `Spread`. Entries of encoding `Zero` are never put: the index has them.
    Stored {
        /// Where each entry lies; `None` for one that was not stored (no room), or is not there.
        placements: &'a [Option<Placement>],
        /// The members that have none of what lies here, though they were to hold copies.
        missing: Missing,
    },
    /// To `Refer`: what became of each. What is had can be read like any other page, and is the page's own: it stays
    /// whatever becomes of the page that it was first sent for. In the index its checksum is the seal
    /// ([`crate::content::ContentHash::seal`]).
    Referred(&'a [Referral]),
    /// To `PutIndex`.
    Indexed,
    /// To `Get`: one entry for each that was asked, in order; `Gone` where nothing lies under that
    /// placement for that page and volume. `bytes` are those of the entries with bytes, in order:
    /// not yet compared with any checksum.
    Pages {
        /// The pages.
        entries: &'a [PageEntry],
        /// Their bytes.
        bytes: &'a [u8],
    },
    /// To `Locate`.
    Located(&'a [IndexEntry]),
    /// To `Discard`, `Drop`, `PutState`, `PutPiece`, `Hint`.
    Done,
    /// To `Control`.
    Control(VmdReply),
    /// To `GetState` and `GetPiece`; its checksum is right.
    State(Vec<u8>),
}

/// A request that came to its end. An `Err` is about this request only (refused, no room); a link that
/// failed as a whole says so from [`Link::progress`], and gives no more completions.
#[derive(Debug)]
pub struct Completion<'a> {
    /// Which request.
    pub ticket: Ticket,
    /// How it went.
    pub result: Result<Reply<'a>>,
}

/// What a link knows of its path, for pacing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathSample {
    /// Bytes that the peer's kernel has acknowledged, since the link was made.
    pub delivered_bytes: u64,
    /// How long what we send waits in queues, as our kernel measures it.
    pub send_delay: Option<Duration>,
    /// The least round trip of what we send; zero where it is not known.
    pub base_rtt: Duration,
    /// Bytes that were written and have not left.
    pub unsent_bytes: u64,
    /// How long what the peer sends us waits in queues, as it last reported it.
    pub receive_delay: Option<Duration>,
    /// Bytes received since the link was made.
    pub received_bytes: u64,
}

/// One client's path to one intermediary, for one volume and epoch.
///
/// # Contract
/// - A completed `Put` is seen by any later `Get` of any client; a completed `PutIndex` by any later `Locate`.
/// - Requests may complete in any order. Requests that were outstanding when the link failed may
///   or may not have happened.
/// - An older epoch than the volume's is refused with [`crate::ErrorKind::Fenced`].
/// - Nothing here waits, except that `submit` of `PutState` and `PutPiece` may copy.
pub trait Link: Send {
    /// The intermediary at the other end.
    fn member(&self) -> &Member;

    /// Queues a request.
    ///
    /// # Errors
    /// The link has failed, or the request is larger than a frame may be.
    fn submit(&mut self, request: Request<'_>) -> Result<Ticket>;

    /// Moves bytes without waiting: reads what has come, writes what is queued, but not more than
    /// `write_bytes_max`. Returns the bytes written.
    ///
    /// # Errors
    /// The link has failed, for good: peer gone, or it sent what no honest peer sends.
    fn progress(&mut self, write_bytes_max: usize) -> Result<usize>;

    /// The next request that came to its end.
    fn completion(&mut self) -> Option<Completion<'_>>;

    /// Bytes that are queued and not yet written.
    fn queued_bytes(&self) -> usize;

    /// Page and table bytes of requests that have not come to their end, the queued ones included.
    fn outstanding_bytes(&self) -> usize;

    /// The file descriptor that becomes readable when a completion may have come, and writable when
    /// queued bytes may move. `None` where completions are there as soon as `progress` was called.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// What the link knows of its path.
    fn path(&self) -> PathSample;

    /// Has what is written leave at no more than so many bytes/s; `None` is at once. Returns whether the
    /// link's kernel or hardware does that: where it does not, whoever writes keeps the pace.
    fn pace(&mut self, bytes_per_s: Option<u64>) -> bool {
        let _ = bytes_per_s;
        false
    }

    /// Has what is asked for from now on come at no more than so many bytes/s; `None` is at once. A link that cannot
    /// say so to its peer does not.
    fn pace_answers(&mut self, bytes_per_s: Option<u64>) {
        let _ = bytes_per_s;
    }
}

/// Makes links to intermediaries: the entry point of a backend.
pub trait Connector: Send + Sync {
    /// Hashes pages as the intermediaries do, for volumes that share so.
    fn hasher(&self, sharing: &Sharing) -> ContentHasher;

    /// A link to the intermediary at `address`, for a volume under an epoch. Waits for the
    /// handshake, at most `timeout`. Who answered is in the link's [`Link::member`].
    ///
    /// # Errors
    /// Unreachable, refused, no common version, or time is up.
    fn connect(
        &self,
        address: std::net::SocketAddr,
        volume: VolumeId,
        epoch: Epoch,
        class: Class,
        timeout: Duration,
    ) -> Result<Box<dyn Link>>;
}

/// Submits one request and waits for its end: for rare requests, never on the page path.
///
/// Completions of other requests are dropped: the link is the caller's alone.
///
/// # Errors
/// The request's own, the link's, or [`crate::ErrorKind::Timeout`].
pub fn ask<T>(
    link: &mut dyn Link,
    request: Request<'_>,
    timeout: Duration,
    take: impl FnOnce(Reply<'_>) -> Result<T>,
) -> Result<T> {
    let deadline = host::now() + timeout;
    let ticket = link.submit(request)?;
    loop {
        link.progress(usize::MAX)?;
        while let Some(completion) = link.completion() {
            if completion.ticket == ticket {
                return take(completion.result?);
            }
        }
        let left = deadline.saturating_duration_since(host::now());
        if left.is_zero() {
            let message = format!("no answer within {} ms", timeout.as_millis());
            return Err(Error::new(crate::ErrorKind::Timeout, message).at(&link.member().node));
        }
        crate::transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], left)?;
    }
}
