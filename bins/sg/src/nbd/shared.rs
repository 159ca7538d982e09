//! What the threads of `sg nbd` share: the volume, its books when it is one's own, and how it all ends.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use libsg::content::ContentHasher;
use libsg::ids::{Checksum, Epoch, MemberIndex};
use libsg::transport::{Waker, wait};
use libsg::vmd::{Class, Link, Volume};
use libsg::wire::message::VolumeState;
use libsg::{Error, ErrorKind, Result};
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::books::Books;
use super::buffers::Spare;
use super::handshake::Export;

/// Why the process ends.
#[derive(Debug)]
pub enum Ending {
    /// A signal.
    Signal(i32),
    /// The volume is of no further use.
    Failed(Error),
}

/// What becomes of a read of a block that nobody has written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Unwritten {
    /// It waits, for as long as --timeout says, and fails then
    Wait,
    /// It fails at once
    Error,
}

/// A volume that this process writes, and nobody else.
pub struct Own {
    /// The volume.
    pub volume: Box<dyn Volume>,
    books: Mutex<Books>,
    /// Wakes the thread that tells the index servers.
    pub index: Waker,
    /// Some connection waits for what it does.
    awaited: AtomicBool,
}

/// A volume that others may write.
pub struct View {
    /// As it was found last.
    volume: RwLock<Arc<dyn Volume>>,
    /// How often it was found anew.
    found: AtomicU64,
    /// Nothing more is written.
    complete: AtomicBool,
    /// Wakes who looks for it.
    pub look: Sender<()>,
}

/// The two kinds of volume.
pub enum Kind {
    /// Its writer is here.
    Own(Own),
    /// Its writer, if any, is elsewhere.
    View(View),
}

/// What the threads share.
pub struct Shared {
    /// What clients see.
    pub export: Export,
    /// The volume.
    pub kind: Kind,
    /// Compares pages with the checksums of a volume that shares its pages with others.
    pub hasher: Option<ContentHasher>,
    /// How long an intermediary may be silent, and a read wait for a block to be written.
    pub timeout: Duration,
    /// What becomes of a read of a block that nobody has written.
    pub unwritten: Unwritten,
    stopping: AtomicBool,
    failed: AtomicBool,
    ending: Sender<Ending>,
    wakers: Mutex<Vec<(u64, Waker)>>,
    /// Buffers that nobody uses.
    pub spare: Arc<Spare>,
    /// Wakes who takes new clients, at the end.
    pub last: Waker,
}

impl Shared {
    /// Of an export.
    pub fn new(
        (export, kind): (Export, Kind),
        hasher: Option<ContentHasher>,
        (timeout, unwritten): (Duration, Unwritten),
        ending: Sender<Ending>,
    ) -> Result<Self> {
        let (stopping, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        let wakers = Mutex::default();
        let last = Waker::new()?;
        Ok(Self {
            export,
            kind,
            hasher,
            timeout,
            unwritten,
            stopping,
            failed,
            ending,
            wakers,
            spare: Arc::default(),
            last,
        })
    }

    /// The volume, if it is one's own.
    pub const fn own(&self) -> Option<&Own> {
        match &self.kind {
            Kind::Own(own) => Some(own),
            Kind::View(_) => None,
        }
    }

    /// The volume, if others may write it.
    pub const fn view(&self) -> Option<&View> {
        match &self.kind {
            Kind::Own(_) => None,
            Kind::View(view) => Some(view),
        }
    }

    /// A new connection to a member. Waits for it.
    ///
    /// # Errors
    /// Those of [`Volume::link`].
    pub fn link(&self, member: MemberIndex) -> Result<Box<dyn Link>> {
        match &self.kind {
            Kind::Own(own) => own.volume.link(member, Class::Bulk),
            Kind::View(view) => view.volume().link(member, Class::Bulk),
        }
    }

    /// Whether bytes are the page of this checksum.
    pub fn matches(&self, bytes: &[u8], checksum: Checksum) -> bool {
        match &self.hasher {
            Some(hasher) => hasher.matches(bytes, checksum),
            None => Checksum::of(bytes) == checksum,
        }
    }

    /// A member of one's own volume is gone: whatever lay there is lost, what it knew of the index is told others.
    pub fn lost(&self, member: MemberIndex, why: &Error) {
        let Some(own) = self.own() else { return };
        let (gone, left) = {
            let mut books = own.books();
            (books.gone(member), books.alive().iter().filter(|alive| **alive).count())
        };
        match gone {
            Ok(None) => return,
            Ok(Some(lost_pages)) => {
                tracing::error!(%member, lost_pages, left, error = why.chain(), "an intermediary is gone");
            }
            Err(_) => self.fail(worn()),
        }
        if left == 0 {
            let message = "no intermediary of the volume is left: what was written is lost";
            self.fail(Error::new(ErrorKind::Lost, message));
        }
        own.index.wake();
        self.wake_all();
    }

    /// The volume is of no further use: everything that is asked fails from now on, and the process ends.
    pub fn fail(&self, error: Error) {
        if !self.failed.swap(true, Ordering::SeqCst) {
            // Whoever does not listen any more ends already.
            let _ = self.ending.send(Ending::Failed(error));
        }
        self.wake_everybody();
    }

    /// Whether it is.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// No more requests are taken.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake_everybody();
    }

    fn wake_everybody(&self) {
        self.last.wake();
        self.own().into_iter().for_each(|own| own.index.wake());
        self.wake_all();
    }

    /// Whether that is so.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// A thread wants to be woken by [`Self::wake_all`], until it says otherwise under this number.
    pub fn register(&self, number: u64, waker: Waker) {
        self.wakers.lock().push((number, waker));
    }

    /// It does no more.
    pub fn unregister(&self, number: u64) {
        self.wakers.lock().retain(|(other, _)| *other != number);
    }

    /// Wakes the threads of all connections.
    pub fn wake_all(&self) {
        self.wakers.lock().iter().for_each(|(_, waker)| waker.wake());
    }

    /// Waits until the index servers have been told everything.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`], or the volume is of no further use.
    pub fn settle(&self) -> Result<()> {
        let Some(own) = self.own() else { return Ok(()) };
        let waker = Waker::new()?;
        self.register(0, waker.clone());
        let settled = self.wait_settled(own, &waker);
        self.unregister(0);
        settled
    }

    fn wait_settled(&self, own: &Own, waker: &Waker) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        loop {
            waker.drain();
            own.await_index();
            own.index.wake();
            let safe = {
                let books = own.books();
                books.journal.safe_below() == books.journal.now()
            };
            if safe {
                return Ok(());
            }
            if self.has_failed() {
                return Err(Error::new(ErrorKind::Volume, "the volume is of no further use"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = "the index servers do not take what they are told: see their logs";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            wait(&[(Some(waker.as_fd()), false)], left)?;
        }
    }
}

/// Each opening of a volume, and each death of a member, takes a round.
pub fn worn() -> Error {
    let message = "the volume was opened, or lost an intermediary, 65,535 times: copy it to a new one";
    Error::new(ErrorKind::Volume, message)
}

impl Own {
    /// With these books.
    pub fn new(volume: Box<dyn Volume>, books: Books, index: Waker) -> Self {
        Self { volume, books: Mutex::new(books), index, awaited: AtomicBool::new(false) }
    }

    /// The books. Nobody waits for anything while he has them.
    pub fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock()
    }

    /// Says, before looking at the books, that the index thread is waited for.
    pub fn await_index(&self) {
        self.awaited.store(true, Ordering::SeqCst);
    }

    /// Whether it was since the last time that this was asked.
    pub fn is_awaited(&self) -> bool {
        self.awaited.swap(false, Ordering::SeqCst)
    }
}

impl View {
    /// Of a volume as it was found.
    pub fn new(volume: Box<dyn Volume>, complete: bool, look: Sender<()>) -> Self {
        let (found, complete) = (AtomicU64::new(0), AtomicBool::new(complete));
        Self { volume: RwLock::new(volume.into()), found, complete, look }
    }

    /// The volume.
    pub fn volume(&self) -> Arc<dyn Volume> {
        Arc::clone(&self.volume.read())
    }

    /// How often it was found anew: connections of before are of no further use.
    pub fn found(&self) -> u64 {
        self.found.load(Ordering::SeqCst)
    }

    /// It was found anew.
    pub fn replace(&self, volume: Box<dyn Volume>) {
        *self.volume.write() = volume.into();
        self.found.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether nothing more is written.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::SeqCst)
    }

    /// Notes in what state it is.
    pub fn note(&self, state: VolumeState) {
        self.complete.store(state != VolumeState::Open, Ordering::SeqCst);
    }

    /// Its epoch changed, as it seems: it is to be looked for.
    pub fn look(&self) {
        // One look is enough for all who want it.
        let _ = self.look.try_send(());
    }

    /// The epoch under which it was found.
    pub fn epoch(&self) -> Epoch {
        self.volume.read().epoch()
    }
}
