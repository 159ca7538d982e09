//! The relay: stands where the destination of a source QEMU would be, and gives libsg what comes.
//!
//! ```text
//! source QEMU -- stream --> reader (sg-qemu-reader) --> memory of the relay's own --> PageSource
//!             <-- PONG, REQ_PAGES, SHUT --
//! ```
//!
//! It keeps what is not safe yet, in a window: while that is full, it reads only what the guest waits for. What is safe is let
//! go. Where an intermediary dies with such pages, the relay breaks the stream off, and has the source resume it: a QEMU then
//! asks what has come, and sends all else again. That it can do until it has said everything. So the last pages are left where
//! they are until all others are safe.
//!
//! How far a source is cannot be seen: what it says waits in its socket ([`stream`]). So when so few pages are to come that it
//! might be through, it is made to send next to nothing by itself (`max-postcopy-bandwidth`), and asked for all but the last
//! ones. Until then it is held by not being read: what a guest waits for then comes behind the little that is unread.

mod again;
mod books;
mod live;
mod pages;
mod reader;
mod store;
mod stream;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use libsg::manifest::Manifest;
use libsg::memory::{PageSlice, PresenceMap};
use libsg::page::{PageIndex, PageRange};
use libsg::source::{Outcome, PageSource, Repeat, Supply, Wake};
use libsg::{Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};
use qemu_stream::{Answer, Blocks, Package};

use self::again::Again;
use self::books::{Begun, Books, Flow, Line};
pub(crate) use self::pages::Limits;
use self::pages::{Lost, Pages};
pub(crate) use self::stream::Stream;
use self::stream::Unread;
use crate::layout::Layout;
use crate::machine::Devices;

/// The rate of a source that is asked for what it is to send, in bytes a second: 10 pages come by themselves.
const NEXT_TO_NOTHING: u64 = 10;

/// That of one that sends as fast as it is read.
const UNLIMITED: u64 = 0;

/// A VM's stream, and what has come of it. Clones are the same.
#[derive(Clone)]
pub struct Relay(Arc<Shared>);

/// How a source is driven beside its stream.
pub(crate) trait Steering: Send {
    /// So many bytes a second it sends by itself; 0 is any number.
    fn rate(&mut self, bytes_per_s: u64) -> Result<()>;

    /// Its stream was broken off: has it go on over another connection.
    fn resume(&mut self) -> Result<Stream>;

    /// It has said that it goes on: returns when it waits for the word that it may.
    fn listens(&mut self);

    /// It goes on, though nothing comes; else why it does not.
    fn goes_on(&mut self) -> Result<()>;
}

struct Shared {
    books: Mutex<Books>,
    changed: Condvar,
    /// The way back. Who holds it writes a few bytes.
    answers: Mutex<UnixStream>,
    steering: Mutex<Option<Box<dyn Steering>>>,
    /// Who waits for pages that were wanted.
    wanting: OnceLock<Wake>,
    /// Where another process has read a part: what begins when it flows.
    again: Mutex<Option<Again>>,
}

impl Relay {
    /// For the connection that a source QEMU has made. Reads from now on, on a thread of its own.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when a thread cannot be started.
    pub(crate) fn start(stream: impl Into<Stream>, limits: Limits) -> Result<Self> {
        let mut stream = stream.into();
        let answers = stream.answers()?;
        let books = Books { unread: Unread::of(&mut stream)?, ..Books::default() };
        let shared = Arc::new(Shared::new(answers, books, None));
        let reads = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sg-qemu-reader".into())
            .spawn(move || reader::run(&reads, stream.ours, limits))?;
        Ok(Self(shared))
    }

    /// Lets the memory come, of a source that is steered by this from now on.
    ///
    /// # Errors
    /// The source's: it stays slow.
    pub(crate) fn flow(&self, steering: Box<dyn Steering>) -> Result<()> {
        *self.0.steering.lock() = Some(steering);
        if let Some(again) = self.0.again.lock().take() {
            return self.go_on(again);
        }
        let flow = {
            let mut books = self.0.books.lock();
            books.beyond();
            books.next_flow()
        };
        self.0.rate(if flow == Flow::Free { UNLIMITED } else { NEXT_TO_NOTHING })?;
        let mut books = self.0.books.lock();
        books.flow = flow;
        let owes = std::mem::take(&mut books.owes);
        if owes {
            books.line = Line::Broken;
        }
        drop(books);
        self.0.changed.notify_all();
        if owes {
            self.0.break_off();
        }
        self.0.ask()
    }

    /// The VM is sent in rounds from now on: its pages are told of while it runs.
    ///
    /// # Errors
    /// The stream's.
    pub(crate) fn begin_rounds(&self) -> Result<()> {
        let mut books = self.0.books.lock();
        books.check()?;
        books.pages.iter_mut().for_each(Pages::begin_rounds);
        books.flow = Flow::Live;
        books.held = books.beyond() == 0;
        drop(books);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Rounds are over: what the source left for that comes.
    pub(crate) fn end_rounds(&self) {
        let mut books = self.0.books.lock();
        if books.flow == Flow::Live {
            books.flow = Flow::Still;
        }
        drop(books);
        self.0.changed.notify_all();
    }

    /// Takes the pages that came again since the last time.
    ///
    /// # Errors
    /// The stream's.
    pub(crate) fn take_written(&self, out: &mut Vec<PageRange>) -> Result<()> {
        let mut books = self.0.books.lock();
        books.check()?;
        books.pages.iter_mut().for_each(|pages| pages.take_written(out));
        Ok(())
    }

    /// The VM's memory, once the source has begun with it: a manifest for a VM called `vm` that has these devices.
    ///
    /// # Errors
    /// The stream's; [`ErrorKind::Timeout`].
    pub(crate) fn manifest(&self, vm: &str, devices: &Devices, patience: Duration) -> Result<Manifest> {
        let begun = self.0.wait(patience, "does not begin", |books| books.begun.clone())?;
        begun.layout.manifest(vm, (&begun.configuration, begun.section), devices)
    }

    /// Has a source look at once whether it is to switch: one whose rate is used up sleeps for up to 100 ms, and wakes up for a
    /// page that is asked for. It comes first behind the switch, if it comes at all.
    pub(crate) fn hurry(&self) {
        let layout = self.0.books.lock().begun.as_ref().map(|begun| Arc::clone(&begun.layout));
        if let Some(layout) = layout
            && let Some(first) = layout.unit(PageIndex(0))
        {
            self.0.request(&layout, &[first]);
        }
    }

    /// The state of the VM's devices, once the source has switched.
    ///
    /// # Errors
    /// The stream's; [`ErrorKind::Timeout`].
    pub fn state(&self, patience: Duration) -> Result<Vec<u8>> {
        self.0.wait(patience, "does not switch", |books| {
            let package = books.package.as_ref()?;
            Some([&[u8::from(books.switchover)], &package[..]].concat())
        })
    }

    /// The state of the devices was taken: a source from 10.2 on waits for a word of that.
    pub fn taken(&self) {
        let package = self.0.books.lock().package.clone();
        if let Some(Ok(Package { awaited: Some(ping), .. })) =
            package.map(|package| Package::inspect(&package))
        {
            self.0.answer(&Blocks::default(), &Answer::Pong(ping));
        }
    }

    /// All is safe: the source completes, once it has said that there is no more, which may come behind the last page.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] while pages are still to come: they would be gone. [`ErrorKind::Unreachable`] when it hung up.
    pub fn release(&self, patience: Duration) -> Result<()> {
        self.0.wait(patience, "does not end", |books| books.over.then_some(()))?;
        // Whoever drove it has its QMP socket again.
        self.0.steering.lock().take();
        if self.0.answer(&Blocks::default(), &Answer::Shut(0)) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unreachable, "the source QEMU hung up before it was told that all is safe"))
    }

    /// Not all is safe: the source has failed, and keeps the VM. It hears that once it has said that there is no more, for which
    /// all of its memory comes yet.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when nothing came for so long, [`ErrorKind::Unreachable`] when it hung up.
    pub fn refuse(&self, patience: Duration) -> Result<()> {
        self.0.release()?;
        let mut left = u32::MAX;
        while let Err(error) = self.0.wait(patience, "does not end", |books| books.over.then_some(())) {
            let now = self.0.books.lock().pages.as_ref().map_or(0, Pages::to_come);
            if error.kind != ErrorKind::Timeout || now == std::mem::replace(&mut left, now) {
                return Err(error);
            }
        }
        if self.0.answer(&Blocks::default(), &Answer::Shut(1)) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unreachable,
            "the source QEMU hung up before it was told that it keeps its VM",
        ))
    }

    /// How often the stream was resumed.
    pub(crate) fn resumed(&self) -> u32 {
        self.0.books.lock().resumed
    }

    /// Hangs up.
    pub fn hang_up(&self) {
        {
            let mut books = self.0.books.lock();
            books.line = Line::HungUp;
            books.unread.forget();
        }
        self.0.steering.lock().take();
        self.0.changed.notify_all();
        // It fails only where the other side has done so already.
        let _ = self.0.answers.lock().shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
    fn new(answers: UnixStream, books: Books, again: Option<Again>) -> Self {
        Self {
            books: Mutex::new(books),
            changed: Condvar::new(),
            answers: Mutex::new(answers),
            steering: Mutex::default(),
            wanting: OnceLock::new(),
            again: Mutex::new(again),
        }
    }

    fn wait<T>(&self, patience: Duration, what: &str, take: impl Fn(&Books) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut books = self.books.lock();
        loop {
            if let Some(found) = take(&books) {
                return Ok(found);
            }
            books.check()?;
            if self.changed.wait_until(&mut books, deadline).timed_out() {
                let message = format!("the source QEMU {what} within {} s", patience.as_secs());
                tracing::warn!(stands = ?*books, "{message}");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
    }

    /// Whether the answer was written. Where not, the source has hung up, and the reader says so.
    fn answer(&self, blocks: &Blocks, answer: &Answer) -> bool {
        let mut bytes = Vec::with_capacity(288);
        answer.encode(blocks, &mut bytes);
        self.say(&bytes)
    }

    fn say(&self, bytes: &[u8]) -> bool {
        std::io::Write::write_all(&mut *self.answers.lock(), bytes).is_ok()
    }

    /// The source goes on though nothing comes, as far as it can be asked.
    fn lives(&self) -> Result<()> {
        let books = self.books.lock();
        let is_there = books.unread.lives();
        let flows = matches!(books.flow, Flow::Free | Flow::Asked) && !books.over;
        drop(books);
        if !is_there {
            return Err(reader::hung_up());
        }
        match self.steering.lock().as_mut() {
            Some(steering) if flows => steering.goes_on(),
            _ => Ok(()),
        }
    }

    fn rate(&self, bytes_per_s: u64) -> Result<()> {
        self.steering.lock().as_mut().map_or(Ok(()), |steering| steering.rate(bytes_per_s))
    }

    /// Asks the source for what is to come next, if it sends nothing by itself.
    fn ask(&self) -> Result<()> {
        let mut books = self.books.lock();
        let Books {
            pages: Some(pages),
            begun: Some(begun),
            flow: Flow::Asked,
            line: Line::Up,
            all,
            over: false,
            ..
        } = &mut *books
        else {
            return Ok(());
        };
        let (layout, mut asks) = (Arc::clone(&begun.layout), Vec::new());
        pages.next_asks(*all, &mut asks);
        let are_others_safe = asks.is_empty() && pages.is_idle();
        let releases = are_others_safe && !*all;
        drop(books);
        self.request(&layout, &asks);
        if releases { self.release() } else { Ok(()) }
    }

    /// The last pages may come.
    fn release(&self) -> Result<()> {
        let mut books = self.books.lock();
        (books.all, books.flow) = (true, Flow::Asked);
        drop(books);
        self.changed.notify_all();
        self.rate(UNLIMITED)?;
        self.ask()
    }

    fn request(&self, layout: &Layout, asks: &[(qemu_stream::BlockIndex, qemu_stream::Span)]) {
        if asks.is_empty() {
            return;
        }
        let mut bytes = Vec::with_capacity(asks.len() * 32);
        for (block, span) in asks {
            Answer::RequestPages { block: *block, span: *span }.encode(layout.blocks(), &mut bytes);
        }
        // One that cannot be asked has hung up: the reader tells it.
        self.say(&bytes);
    }

    /// Breaks the stream off, to have the source go on with what is missing.
    fn break_off(&self) {
        tracing::info!("the source QEMU's stream is broken off, to be resumed");
        let _ = self.answers.lock().shutdown(std::net::Shutdown::Both);
        self.changed.notify_all();
    }

    fn fail(&self, error: &Error) {
        self.books.lock().failure.get_or_insert_with(|| (error.kind, error.chain()));
        self.changed.notify_all();
    }
}

impl PageSource for Relay {
    fn repeat(&self) -> Repeat {
        Repeat::ByRecovery
    }

    /// Which pages are zero is known when they come.
    fn presence(&self) -> Result<PresenceMap> {
        let books = self.0.books.lock();
        books.check()?;
        let pages = books.begun.as_ref().map_or(0, |begun| begun.layout.pages());
        let mut all = PresenceMap::new(pages);
        all.insert(PageRange::new(PageIndex(0), pages));
        Ok(all)
    }

    fn available(&self, out: &mut Vec<PageRange>) -> Result<Supply> {
        let mut books = self.0.books.lock();
        books.check()?;
        books.pages.iter_mut().for_each(|pages| pages.take_untold(out));
        Ok(match books.over {
            true => Supply::Complete,
            false if books.flow == Flow::Live && books.held => Supply::AfterPause,
            false => Supply::More,
        })
    }

    fn withdrawn(&self, out: &mut Vec<PageRange>) {
        self.0.books.lock().pages.iter().for_each(|pages| pages.withdrawn(out));
    }

    fn want(&self, page: PageIndex) -> Result<()> {
        let mut books = self.0.books.lock();
        books.check()?;
        let Books { pages: Some(pages), begun: Some(begun), over: false, .. } = &mut *books else {
            return Ok(());
        };
        let (layout, wanted) = (Arc::clone(&begun.layout), pages.want(page));
        // It came meanwhile.
        let is_here = pages.has_untold(page);
        drop(books);
        if is_here {
            self.0.wake_wanting();
        }
        if let Some(wanted) = wanted {
            self.0.request(&layout, &[wanted]);
        }
        // It is read for that though there be no room.
        self.0.changed.notify_all();
        Ok(())
    }

    fn wake_for_wanted(&self, wake: Wake) {
        let _ = self.0.wanting.set(wake);
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let books = self.0.books.lock();
        let slice = books.pages.as_ref().and_then(|pages| pages.slice(range));
        slice.unwrap_or_else(|| Err(Error::new(ErrorKind::Input, "a page that is not here").about([range])))
    }

    fn outcome(&self, range: PageRange, outcome: Outcome) {
        let told = match outcome {
            Outcome::Safe => self.0.safe(range),
            Outcome::Lost => self.0.lost(range),
        };
        if let Err(error) = told.and_then(|()| self.0.ask()) {
            tracing::error!(error = error.chain(), "the source QEMU's pages cannot be had");
            self.0.fail(&error);
        }
    }
}

impl Shared {
    fn wake_wanting(&self) {
        self.wanting.get().into_iter().for_each(|wake| wake());
    }

    fn safe(&self, range: PageRange) -> Result<()> {
        let is_asked = self.again.lock().is_none();
        let mut books = self.books.lock();
        if let Some(pages) = &mut books.pages {
            if !is_asked {
                pages.settle(range);
                return Ok(());
            }
            pages.safe(range);
        }
        drop(books);
        self.changed.notify_all();
        Ok(())
    }

    fn lost(&self, range: PageRange) -> Result<()> {
        let mut books = self.books.lock();
        let lost = books.pages.as_mut().map(|pages| pages.lost(range));
        if lost != Some(Lost::Again) {
            return Ok(());
        }
        if books.package.is_none() {
            books.owes = true;
            return Ok(());
        }
        if books.over {
            let message = "an intermediary died with pages that the source QEMU cannot send again: it has said everything";
            return Err(Error::new(ErrorKind::Lost, message).about([range]));
        }
        match &mut books.line {
            Line::Up => books.line = Line::Broken,
            Line::Resuming { again } => {
                *again = true;
                return Ok(());
            }
            // It is not resumed yet, and will be asked for these, too.
            Line::Broken | Line::HungUp => return Ok(()),
        }
        drop(books);
        self.break_off();
        Ok(())
    }
}

#[cfg(test)]
mod again_test;
#[cfg(test)]
mod recovery_test;
#[cfg(test)]
mod test;
