//! The feeder: stands where the source of a destination QEMU would be, and gives it what libsg has.
//!
//! ```text
//! PageSink::install --> a section of pages, PING n --> destination QEMU, which places them by userfaultfd
//!                  <-- PONG n: they are in place ---
//! SinkEvent::Fault <-- REQ_PAGES -------------------
//! ```
//!
//! QEMU takes its stream in order, one thing after the other: when it answers the ping behind a page, it has placed the page.
//! Its answers are heard by who reads the sink's events ([`hearing`]).

mod faults;
mod hearing;
mod recovery;

use std::io::Write as _;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use qemu_stream::{
    Answer, BlockIndex, Command, Configuration, Discard, END_OF_STREAM, Package, Records, Span, limits,
};

use self::faults::Faults;
use self::hearing::Hearing;
use self::recovery::Received;
use crate::layout::Layout;

/// How long QEMU may take to place pages, and to say so: a host that swaps is slow, not dead.
const PLACED: Duration = Duration::from_secs(120);

/// How long it may take to look at the head of a stream, on a busy host.
const HEAD: Duration = Duration::from_secs(30);

/// Pings of ours begin there: the package has its own, up to 0x42.
const FIRST_PING: u32 = 0x100;

/// A destination QEMU, which waits for its stream on a connection.
pub struct Feeder {
    layout: Layout,
    configuration: Configuration,
    section: u32,
    line: Mutex<Line>,
    /// The same connection, to be ended while somebody writes.
    ended: UnixStream,
    books: Mutex<Books>,
    hearing: Hearing,
}

/// The way to QEMU. Who holds it writes.
struct Line {
    connection: UnixStream,
    records: Records,
    ping: u32,
    bytes: Vec<u8>,
}

impl Line {
    /// Writes what is in the buffer.
    fn write(&mut self) -> std::io::Result<()> {
        self.connection.write_all(&self.bytes)
    }
}

#[derive(Default)]
struct Books {
    /// The last ping that was answered.
    answered: u32,
    faults: Faults,
    /// QEMU has the package: pages may follow.
    running: bool,
    /// What it had before, where it goes on.
    received: Received,
    /// Pages that there are no more anywhere.
    lost: bool,
    shut: Option<u32>,
    failure: Option<(ErrorKind, String)>,
}

impl Feeder {
    /// For a connection that a destination QEMU has accepted.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no descriptor.
    pub fn start(
        connection: UnixStream,
        (layout, configuration, section): (Layout, Configuration, u32),
    ) -> Result<Self> {
        connection.set_write_timeout(Some(PLACED))?;
        let (ended, hearing) = (connection.try_clone()?, Hearing::of(connection.try_clone()?)?);
        let line = Line { connection, records: Records::new(section), ping: FIRST_PING, bytes: Vec::new() };
        let books = Books { faults: Faults::new(layout.pages()), ..Books::default() };
        let (line, books) = (Mutex::new(line), Mutex::new(books));
        Ok(Self { layout, configuration, section, line, ended, books, hearing })
    }

    /// Says everything that stands before the package, and waits until QEMU has taken it: its machine and its memory fit.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when QEMU does not take it.
    pub fn head(&self, state: &[u8]) -> Result<()> {
        let (switchover, _) = split(state)?;
        let blocks = self.layout.blocks();
        let mut line = self.line.lock();
        line.bytes.clear();
        let bytes = &mut line.bytes;
        self.configuration.encode(bytes);
        Command::OpenReturnPath.encode(blocks, bytes);
        Command::PostcopyAdvise { page_sizes: blocks.page_sizes() }.encode(blocks, bytes);
        blocks.encode(self.section, bytes);
        if switchover {
            Command::SwitchoverStart.encode(blocks, bytes);
        }
        // QEMU 7.2 would not get past LISTEN without one.
        for (index, block) in blocks.iter() {
            let all = Span { start_bytes: 0, length_bytes: block.length_bytes };
            Command::RamDiscard(Discard { block: index, spans: vec![all] }).encode(blocks, bytes);
        }
        let sent = self.send(&mut line);
        drop(line);
        sent.and_then(|ping| self.await_pong(ping, HEAD)).map_err(|cause| {
            let message = "the destination QEMU does not take this VM: it must have the same machine type (with its \
                           version), -m, -smp and devices, and be allowed to use userfaultfd (its standard error says \
                           what it misses)";
            Error::new(ErrorKind::Vm, message).because(cause)
        })
    }

    /// Gives QEMU the package: it loads its devices, and runs the VM. Pages may follow from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when it hangs up.
    pub fn run(&self, state: &[u8]) -> Result<()> {
        let (_, package) = split(state)?;
        let mut line = self.line.lock();
        line.bytes.clear();
        let length_bytes = package.len() as u32;
        Command::Packaged { length_bytes }.encode(self.layout.blocks(), &mut line.bytes);
        line.bytes.extend_from_slice(package);
        line.write().map_err(|cause| hung_up().because(cause))?;
        drop(line);
        self.books.lock().running = true;
        self.hearing.has_changed();
        Ok(())
    }

    /// Hangs up. A QEMU that has the package pauses its VM until somebody goes on (`migrate-recover`); one that has not ends.
    pub fn hang_up(&self) {
        self.fail(&Error::new(ErrorKind::Cancelled, "the VM was given up"));
        // It fails only where the other side has done so already.
        let _ = self.ended.shutdown(std::net::Shutdown::Both);
    }

    /// Pages one by one, and a ping; returns when QEMU has placed them.
    fn place(&self, range: PageRange, bytes: Option<&[u8]>) -> Result<InstallOutcome> {
        let mut outcome = InstallOutcome::new(range)?;
        self.await_running()?;
        let blocks = self.layout.blocks();
        let mut line = self.line.lock();
        let Line { records, bytes: out, .. } = &mut *line;
        out.clear();
        records.begin(false, out);
        for (at, page) in range.iter().enumerate() {
            let (block, offset) = self
                .layout
                .place(page)
                .ok_or_else(|| Error::new(ErrorKind::Input, "a page that this VM has not").about([range]))?;
            match bytes.and_then(|bytes| bytes.get(at * PAGE_BYTES..(at + 1) * PAGE_BYTES)) {
                Some(bytes) => {
                    records.page(blocks, block, offset, out);
                    out.extend_from_slice(bytes);
                }
                None => records.zero(blocks, block, offset, out),
            }
        }
        records.end(out);
        let ping = self.send(&mut line)?;
        drop(line);
        self.await_pong(ping, PLACED)?;
        outcome.add_installed(range.pages);
        Ok(outcome)
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// The switch that a state says, and its package.
fn split(state: &[u8]) -> Result<(bool, &[u8])> {
    let (switchover, package) = match state.split_first() {
        Some((0, package)) => (false, package),
        Some((1, package)) => (true, package),
        _ => return Err(Error::new(ErrorKind::Input, "the state is not of a QEMU")),
    };
    let whole = Package::inspect(package);
    whole.map_err(|cause| Error::new(ErrorKind::Input, "the state is not of a QEMU").because(cause))?;
    if package.len() as u64 > u64::from(limits::PACKAGE_BYTES_MAX) {
        return Err(Error::new(ErrorKind::Input, "the state of the devices is longer than any"));
    }
    Ok((switchover, package))
}

impl Feeder {
    /// Writes what is in the line's buffer, and a ping behind it.
    fn send(&self, line: &mut Line) -> Result<u32> {
        line.ping = line.ping.wrapping_add(1).max(FIRST_PING);
        Command::Ping(line.ping).encode(self.layout.blocks(), &mut line.bytes);
        line.write().map_err(|cause| hung_up().because(cause))?;
        Ok(line.ping)
    }

    fn await_running(&self) -> Result<()> {
        self.wait(PLACED, |books| books.running.then_some(()))
    }
}

impl PageSink for Feeder {
    fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<InstallOutcome> {
        let range = PageRange::new(first, (bytes.len() / PAGE_BYTES) as u32);
        self.place(range, Some(bytes))
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        self.place(range, None)
    }

    /// QEMU knows no word for a page that is lost: who waits for it waits, and the stream does not end.
    fn poison(&self, _range: PageRange) -> Result<()> {
        self.books.lock().lost = true;
        Ok(())
    }

    fn in_place(&self, each: &mut dyn FnMut(PageRange)) {
        // It is asked once.
        let received = std::mem::take(&mut self.books.lock().received);
        received.runs(&self.layout, each);
    }

    fn events(&self, out: &mut Vec<SinkEvent>) -> Result<usize> {
        self.listen();
        let mut books = self.books.lock();
        // A QEMU that does not take the head is told of by who said it.
        if let Some((kind, message)) = books.failure.as_ref().filter(|_| books.running) {
            return Err(Error::new(*kind, message.clone()));
        }
        let before = out.len();
        out.extend(books.faults.take().map(|page| SinkEvent::Fault { page, write: false, thread: 0 }));
        Ok(out.len() - before)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.hearing.as_fd())
    }

    /// Ends the stream: QEMU lets the memory go, in which what never came is zero. Nothing is to be ended where QEMU has no
    /// package, and where pages are lost it would take them for zeros.
    fn finish(&self) -> Result<()> {
        {
            let books = self.books.lock();
            if books.lost || !books.running {
                return Ok(());
            }
        }
        let mut line = self.line.lock();
        let Line { records, bytes, .. } = &mut *line;
        bytes.clear();
        records.begin(true, bytes);
        records.end(bytes);
        bytes.push(END_OF_STREAM);
        line.write().map_err(|cause| hung_up().because(cause))?;
        drop(line);
        match self.wait(PLACED, |books| books.shut)? {
            0 => Ok(()),
            code => {
                let message = format!(
                    "the destination QEMU ended its migration with {code}: its standard error says why"
                );
                Err(Error::new(ErrorKind::Vm, message))
            }
        }
    }
}

fn hung_up() -> Error {
    Error::new(ErrorKind::Unreachable, "the destination QEMU hung up: its standard error says why")
}

#[cfg(test)]
mod test;
