//! The relay: stands where the destination of a source QEMU would be, and gives libsg what comes.
//!
//! ```text
//! source QEMU -- stream --> reader (sg-qemu-reader) --> memory of the relay's own --> PageSource
//!             <-- PONG, REQ_PAGES, SHUT --
//! ```
//!
//! It keeps every page that it has read until it ends: so any page can be had again, whichever intermediary dies. What it costs
//! is as much memory as the VM has used.

mod reader;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::manifest::Manifest;
use libsg::memory::{GuestMemory, PageSlice, PresenceMap};
use libsg::page::{PageIndex, PageRange};
use libsg::source::{Outcome, PageSource, Repeat, Supply};
use libsg::{Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};
use qemu_stream::{Answer, Blocks, Configuration, Package, Span};

use crate::layout::Layout;
use crate::machine::Devices;

/// A VM's stream, and what has come of it. Clones are the same.
#[derive(Clone)]
pub struct Relay(Arc<Shared>);

struct Shared {
    books: Mutex<Books>,
    changed: Condvar,
    /// The way back. Who holds it writes a few bytes.
    answers: Mutex<UnixStream>,
}

/// What is known once the memory's transfer has begun.
#[derive(Clone)]
struct Begun {
    layout: Arc<Layout>,
    configuration: Configuration,
    section: u32,
    memory: GuestMemory,
}

#[derive(Default)]
struct Books {
    begun: Option<Begun>,
    /// The switch, as it was said: what a destination is to be told before the package.
    switchover: bool,
    package: Option<Arc<[u8]>>,
    /// Pages that have come and count.
    came: Option<PresenceMap>,
    /// Of them, those that nobody was told of.
    untold: Vec<PageRange>,
    /// Units that were asked for before they came.
    asked: std::collections::HashSet<u32>,
    over: bool,
    failure: Option<(ErrorKind, String)>,
}

impl Books {
    fn check(&self) -> Result<()> {
        match &self.failure {
            Some((kind, message)) => Err(Error::new(*kind, message.clone())),
            None => Ok(()),
        }
    }
}

impl Relay {
    /// For the connection that a source QEMU has made. Reads from now on, on a thread of its own.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when a thread cannot be started.
    pub fn start(connection: UnixStream) -> Result<Self> {
        let answers = connection.try_clone()?;
        answers.set_write_timeout(Some(Duration::from_secs(5)))?;
        let shared = Arc::new(Shared {
            books: Mutex::default(),
            changed: Condvar::new(),
            answers: Mutex::new(answers),
        });
        let reads = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sg-qemu-reader".into())
            .spawn(move || reader::run(&reads, connection))?;
        Ok(Self(shared))
    }

    /// The VM's memory, once the source has begun with it: a manifest for a VM called `vm` that has these devices.
    ///
    /// # Errors
    /// The stream's; [`ErrorKind::Timeout`].
    pub(crate) fn manifest(&self, vm: &str, devices: &Devices, patience: Duration) -> Result<Manifest> {
        let begun = self.0.wait(patience, "does not begin", |books| books.begun.clone())?;
        begun.layout.manifest(vm, (&begun.configuration, begun.section), devices)
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
        let mut came = 0;
        while let Err(error) = self.0.wait(patience, "does not end", |books| books.over.then_some(())) {
            let now = self.0.books.lock().came.as_ref().map_or(0, PresenceMap::count);
            if error.kind != ErrorKind::Timeout || now == std::mem::replace(&mut came, now) {
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

    /// Hangs up.
    pub fn hang_up(&self) {
        // It fails only where the other side has done so already.
        let _ = self.0.answers.lock().shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
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
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
    }

    /// Whether the answer was written. Where not, the source has hung up, and the reader says so.
    fn answer(&self, blocks: &Blocks, answer: &Answer) -> bool {
        let mut bytes = Vec::with_capacity(288);
        answer.encode(blocks, &mut bytes);
        std::io::Write::write_all(&mut *self.answers.lock(), &bytes).is_ok()
    }

    fn fail(&self, error: &Error) {
        self.books.lock().failure.get_or_insert_with(|| (error.kind, error.chain()));
        self.changed.notify_all();
    }
}

impl PageSource for Relay {
    fn repeat(&self) -> Repeat {
        Repeat::Any
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
        out.append(&mut books.untold);
        Ok(if books.over { Supply::Complete } else { Supply::More })
    }

    fn want(&self, page: PageIndex) -> Result<()> {
        let mut books = self.0.books.lock();
        books.check()?;
        let Some(begun) = books.begun.clone() else { return Ok(()) };
        let came = books.came.as_ref().is_some_and(|came| came.contains(page));
        let Some((index, offset)) = begun.layout.place(page) else { return Ok(()) };
        let Some(block) = begun.layout.blocks().get(index) else { return Ok(()) };
        let start_bytes = offset - offset % block.page_bytes;
        let unit = begun.layout.page(index, start_bytes);
        if came || books.over || !books.asked.insert(unit.0) {
            return Ok(());
        }
        drop(books);
        let span = Span { start_bytes, length_bytes: block.page_bytes };
        // One that cannot be asked has hung up: the reader tells it.
        self.0.answer(begun.layout.blocks(), &Answer::RequestPages { block: index, span });
        Ok(())
    }

    fn slice(&self, range: PageRange) -> Result<PageSlice> {
        let books = self.0.books.lock();
        let run = books.came.as_ref().and_then(|came| came.next_run(range.first, range.pages));
        let (Some(begun), Some(run)) = (&books.begun, run.filter(|run| run.first == range.first)) else {
            return Err(Error::new(ErrorKind::Input, "a page that has not come yet").about([range]));
        };
        let run = begun.memory.run(run.first, run.pages).unwrap_or(run);
        PageSlice::guest(&begun.memory, run)
    }

    fn outcome(&self, _range: PageRange, _outcome: Outcome) {}
}

#[cfg(test)]
mod test;
