//! What managers and tools link against: the VMD as a device, and a volume on it.

use std::fmt;
use std::net::SocketAddr;

use super::link::{Class, Link};
use crate::content::ContentHash;
use crate::error::Result;
use crate::ids::{Checksum, Epoch, MemberIndex, Round, VolumeId};
use crate::manifest::Manifest;
use crate::memory::PageSlice;
use crate::page::{PageIndex, PageRange};
use crate::wire::message::{Member, NodeStatistics, VolumeInfo};
use crate::wire::{GetEntry, IndexEntry};

/// As whom a volume is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// To write it, under the epoch that one owns it with.
    Writer(Epoch),
    /// To read it, whoever owns it now.
    Reader,
}

/// A page to be stored.
#[derive(Clone, Debug)]
pub struct PagePut {
    /// Which page.
    pub page: PageIndex,
    /// How often it was scattered before.
    pub round: Round,
    /// Of the bytes.
    pub checksum: Checksum,
    /// Its 4096 bytes. Nobody changes them until the call is over.
    pub bytes: PageSlice,
}

/// A page to be stored by what is in it: the bytes do not travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageReference {
    /// Which page.
    pub page: PageIndex,
    /// How often it was scattered before.
    pub round: Round,
    /// Of the bytes.
    pub checksum: Checksum,
    /// Of the bytes, as those hash who share with the volume ([`crate::vmd::Connector::hasher`]).
    pub hash: ContentHash,
}

/// What came of a page that was to be stored by what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// Its bytes were there: it is safe.
    Have(IndexEntry),
    /// Nobody has its bytes: put it, soon.
    Send,
    /// Another is about to send its bytes: ask again, or put it.
    Pending,
}

/// What came of asking for a page.
#[derive(Clone, PartialEq, Eq)]
pub enum Fetched {
    /// Its bytes, which match their checksum.
    Bytes(Box<[u8]>),
    /// It is all zero.
    Zero,
    /// Its copy is lost: nobody has it there, or what came does not match its checksum.
    Lost,
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Pages are other people's.
        f.write_str(match self {
            Self::Bytes(_) => "Bytes",
            Self::Zero => "Zero",
            Self::Lost => "Lost",
        })
    }
}

/// The free memory of all intermediaries, seen as one device on which volumes are made.
///
/// Everything here waits, for as long as the client's timeout at each intermediary. It is for tools,
/// tests and what is rare; whoever moves pages in bulk takes [`Volume::link`]s and keeps many requests
/// outstanding on them.
pub trait Vmd: Send + Sync {
    /// Makes a volume at those of the intermediaries that answer, which become its members in the order
    /// given, and opens it as its writer. Made again under the same epoch, it is the same.
    /// Nothing is reserved.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unreachable`] when none answers; [`crate::ErrorKind::Volume`] when it was
    /// dissolved or is somebody else's; [`crate::ErrorKind::Fenced`] when it has a newer owner;
    /// [`crate::ErrorKind::Input`] for a manifest or a number of intermediaries out of bounds.
    fn create(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        manifest: &Manifest,
        intermediaries: &[SocketAddr],
    ) -> Result<Box<dyn Volume>>;

    /// Opens a volume that there is, asking these intermediaries for its members. Any one that knows the
    /// volume is enough.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Volume`] when none of those that answer knows it, [`crate::ErrorKind::Fenced`] for a writer
    /// with an older epoch than the volume's, [`crate::ErrorKind::Unreachable`] when none answers.
    fn open(&self, volume: VolumeId, role: Role, intermediaries: &[SocketAddr]) -> Result<Box<dyn Volume>>;

    /// What an intermediary has and holds.
    ///
    /// # Errors
    /// Those of reaching it.
    fn statistics(&self, intermediary: SocketAddr) -> Result<NodeStatistics>;
}

/// One VM's pages in the VMD, opened under one epoch.
///
/// # Contract
/// - What a call has stored is seen by any later call of any client.
/// - A newer round replaces an older one, never the reverse; of the same round the later one holds.
/// - A member that cannot be reached any more, or that restarted, is dead for this value from then on: its
///   pages are lost, its share of the index is taken over by the next in rotation.
/// - An older epoch than the volume's is refused with [`crate::ErrorKind::Fenced`]; writing is for
///   the writer of an open volume ([`crate::ErrorKind::Volume`] otherwise).
/// - Requests that fail with [`crate::ErrorKind::Timeout`] or [`crate::ErrorKind::Unreachable`] may or may
///   not have happened, and may be done again.
pub trait Volume: Send + Sync {
    /// Which volume.
    fn id(&self) -> VolumeId;

    /// The epoch it was opened under.
    fn epoch(&self) -> Epoch;

    /// Its intermediaries, dead ones included, by their index.
    fn members(&self) -> Vec<Member>;

    /// Which of the members are not known to be dead.
    fn alive(&self) -> Vec<bool>;

    /// Adds intermediaries: makes the volume known to them, and them to the present members.
    ///
    /// # Errors
    /// As [`Vmd::create`].
    fn grow(&self, intermediaries: &[SocketAddr]) -> Result<()>;

    /// A connection of one's own to a member, for moving many pages.
    ///
    /// # Errors
    /// Those of reaching it. A member that restarted is [`crate::ErrorKind::Unreachable`]: it is somebody else.
    fn link(&self, member: MemberIndex, class: Class) -> Result<Box<dyn Link>>;

    /// Stores pages where there is room, and their index entries, which are returned in the order of the
    /// pages: when it returns they are safe. `copies` intermediaries each hold them then (at most
    /// [`crate::limits::COPIES_MAX`]), or all that are alive, if they are fewer: so many but one may die, and
    /// [`Self::locate`] and [`Self::get`] still find them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Full`] when no member has room, [`crate::ErrorKind::Unreachable`] when none is alive.
    fn put(&self, pages: &[PagePut], copies: u8) -> Result<Vec<IndexEntry>>;

    /// Stores pages by their content where an intermediary already holds it for somebody who shares with this
    /// volume, with their index entries. It is theirs from then on, whatever becomes of the other's.
    ///
    /// # Errors
    /// As [`Self::put`].
    fn put_by_reference(&self, pages: &[PageReference]) -> Result<Vec<Shared>>;

    /// Puts entries into the index: for zero pages, and for pages that were stored over a link.
    ///
    /// # Errors
    /// As [`Self::put`].
    fn index(&self, entries: &[IndexEntry]) -> Result<()>;

    /// Reads pages where the index says that they are, one result an entry (its first page for a run of
    /// zeros), or where another copy of them is. Never a wrong page: the checksum of each is compared.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Fenced`], [`crate::ErrorKind::Volume`]. Members that cannot be reached make lost
    /// pages, not errors.
    fn get(&self, entries: &[IndexEntry]) -> Result<Vec<Fetched>>;

    /// What the index of any living member knows of these pages, ascending and without overlap; of several
    /// entries for a page the newest round, and of those one that lies at a living member.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Fenced`], [`crate::ErrorKind::Volume`]; [`crate::ErrorKind::Unreachable`] when no
    /// member is left to ask.
    fn locate(&self, range: PageRange) -> Result<Vec<IndexEntry>>;

    /// Shows every page of the volume that the index knows, ascending.
    ///
    /// # Errors
    /// As [`Self::locate`], and the visitor's own.
    fn scan(&self, visit: &mut dyn FnMut(&IndexEntry) -> Result<()>) -> Result<()>;

    /// Drops what was put below a round, from stores and indexes.
    ///
    /// # Errors
    /// As [`Self::commit`].
    fn discard(&self, range: PageRange, below: Round) -> Result<()>;

    /// Gives slots back whose pages are safe elsewhere, and the copies of what lies there. The index is left alone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Fenced`], [`crate::ErrorKind::Volume`].
    fn drop_slots(&self, entries: &[GetEntry]) -> Result<()>;

    /// Stores the VM's opaque state at every living member. Returns how many have it.
    ///
    /// # Errors
    /// As [`Self::commit`]; [`crate::ErrorKind::Input`] for a state that is too long.
    fn put_state(&self, state: &[u8]) -> Result<usize>;

    /// The VM's opaque state, from the first member that has it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Volume`] when none has; else as [`Self::locate`].
    fn get_state(&self) -> Result<Vec<u8>>;

    /// Writes COMMIT to every living member: the source never runs the VM again. Returns how many have it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unreachable`] when no member took it; [`crate::ErrorKind::Fenced`] when any of
    /// them has a newer owner; else that of the last member, when none took it.
    fn commit(&self) -> Result<usize>;

    /// No more pages come.
    ///
    /// # Errors
    /// As [`Self::commit`].
    fn seal(&self) -> Result<usize>;

    /// Makes this value the owner, under a newer epoch, at every living member in their order: of two who
    /// claim, the one who comes second to the first living member is refused there. Connections
    /// under the old epoch are of no further use.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Fenced`] unless the epoch is above the volume's; else as [`Self::commit`].
    fn claim(&self, epoch: Epoch) -> Result<usize>;

    /// Makes this value the writer of a volume that is open and stays so, under a newer epoch, at every living member
    /// in their order. Connections under the old epoch are of no further use.
    ///
    /// # Errors
    /// As [`Self::claim`]; [`crate::ErrorKind::Volume`] for one that is not open; [`crate::ErrorKind::Input`] unless it
    /// was opened as [`Role::Writer`].
    fn succeed(&self, epoch: Epoch) -> Result<usize>;

    /// Gives its memory back, everywhere. Done again, it changes nothing.
    ///
    /// # Errors
    /// As [`Self::commit`].
    fn dissolve(&self) -> Result<usize>;

    /// What each member knows of the volume; an error for one that does not answer.
    fn describe(&self) -> Vec<Result<VolumeInfo>>;
}
