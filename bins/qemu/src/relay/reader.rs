//! The thread that reads a source QEMU's stream.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libsg::memory::{Backing, GuestMemory, PresenceMap};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::{Error, ErrorKind, Result};
use qemu_stream::{Answer, Command, Configuration, Item, Package, StreamDecoder, limits};

use super::{Begun, Shared};
use crate::layout::Layout;
use crate::machine::Devices;

/// Bytes read at once, behind what is left of an item.
const READ_BYTES: usize = 1 << 20;

const _: () = assert!(READ_BYTES > limits::ITEM_BYTES_MAX);

const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

pub(super) fn run(shared: &Shared, mut connection: UnixStream) {
    let mut reader = Reader {
        shared,
        decoder: StreamDecoder::new(),
        configuration: None,
        package: Vec::new(),
        written: None,
        news: Vec::new(),
        switched: false,
    };
    if let Err(error) = reader.read(&mut connection) {
        tracing::warn!(error = error.chain(), "the source QEMU's stream ended");
        shared.fail(&error);
    }
}

struct Reader<'a> {
    shared: &'a Shared,
    decoder: StreamDecoder,
    configuration: Option<Configuration>,
    package: Vec<u8>,
    /// Where there are bytes in the memory that a page of zeros must overwrite.
    written: Option<(Begun, PresenceMap)>,
    /// Pages that have come since the books were last written.
    news: Vec<PageRange>,
    /// The package has come.
    switched: bool,
}

impl Reader<'_> {
    fn read(&mut self, connection: &mut UnixStream) -> Result<()> {
        let mut buffer = vec![0; READ_BYTES + limits::ITEM_BYTES_MAX];
        let (mut from, mut to) = (0, 0);
        while !self.decoder.is_over() {
            let taken = self.take(&buffer[from..to])?;
            from += taken;
            self.tell()?;
            if self.decoder.is_over() {
                break;
            }
            buffer.copy_within(from..to, 0);
            (to, from) = (to - from, 0);
            match connection.read(&mut buffer[to..]) {
                Ok(0) => return Err(hung_up()),
                Ok(bytes) => to += bytes,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(hung_up().because(error)),
            }
        }
        self.end();
        Ok(())
    }

    /// Takes every item that is whole; how many bytes they were.
    fn take(&mut self, input: &[u8]) -> Result<usize> {
        let mut from = 0;
        loop {
            let next = self.decoder.next(&input[from..]).map_err(|cause| {
                let message = "the source QEMU's stream cannot be carried";
                Error::new(ErrorKind::Vm, message).because(cause)
            })?;
            let Some((item, taken)) = next else { return Ok(from) };
            self.item(item, &input[from..from + taken])?;
            from += taken;
        }
    }

    fn item(&mut self, item: Item, bytes: &[u8]) -> Result<()> {
        match item {
            Item::Configuration(configuration) => self.configuration = Some(configuration),
            Item::Command(command) => self.command(command)?,
            Item::Start => self.begin()?,
            Item::Page { block, offset_bytes, bytes: range } => {
                self.page(block, offset_bytes, Some(&bytes[range]))?;
            }
            Item::Zero { block, offset_bytes } => self.page(block, offset_bytes, None)?,
            Item::PackageBytes { bytes: range, left_bytes } => {
                self.package.extend_from_slice(&bytes[range]);
                if left_bytes == 0 {
                    self.switched()?;
                }
            }
            Item::PartBegins { .. } | Item::PartEnds { .. } | Item::End => {}
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Ping(number) => {
                self.shared.answer(self.decoder.blocks(), &Answer::Pong(number));
            }
            Command::SwitchoverStart => self.shared.books.lock().switchover = true,
            Command::RamDiscard(discard) => {
                // What came before it is what it is about.
                self.tell()?;
                let Some((begun, _)) = &self.written else { return Ok(()) };
                let layout = &begun.layout;
                let mut books = self.shared.books.lock();
                for span in discard.spans {
                    let pages = (span.length_bytes / PAGE_BYTES as u64) as u32;
                    let range = PageRange::new(layout.page(discard.block, span.start_bytes), pages);
                    books.came.iter_mut().for_each(|came| came.remove(range));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        let Some(configuration) = self.configuration.take() else { return Ok(()) };
        let layout = Layout::new(self.decoder.blocks().clone());
        let section = self.decoder.section();
        let manifest = layout.manifest("", (&configuration, section), &Devices::default())?;
        let memory = GuestMemory::allocate(&manifest, Backing::Anon)?;
        let none = PresenceMap::new(layout.pages());
        let begun = Begun { layout: Arc::new(layout), configuration, section, memory };
        self.written = Some((begun.clone(), none.clone()));
        let mut books = self.shared.books.lock();
        (books.begun, books.came) = (Some(begun), Some(none));
        drop(books);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn page(&mut self, block: qemu_stream::BlockIndex, offset: u64, bytes: Option<&[u8]>) -> Result<()> {
        let Some((begun, written)) = &mut self.written else { return Ok(()) };
        let page = begun.layout.page(block, offset);
        let range = PageRange::new(page, 1);
        match bytes {
            Some(bytes) => {
                begun.memory.copy_in(range, bytes)?;
                written.insert(range);
            }
            None if written.contains(page) => begun.memory.copy_in(range, &ZEROS)?,
            None => {}
        }
        match self.news.last_mut() {
            Some(run) if run.first.0 + run.pages == page.0 => run.pages += 1,
            _ => self.news.push(range),
        }
        Ok(())
    }
}

impl Reader<'_> {
    /// Enters what has come into the books.
    fn tell(&mut self) -> Result<()> {
        // Before the switch nobody is told, and units of which a part was sent are forgotten.
        let kept = if self.switched { self.part_of_unit() } else { None };
        if self.news.is_empty() {
            self.news.extend(kept);
            return Ok(());
        }
        let mut books = self.shared.books.lock();
        for run in self.news.drain(..) {
            let came = books.came.as_ref();
            if self.switched && run.iter().any(|page| came.is_some_and(|came| came.contains(page))) {
                // Its bytes may be under way already.
                let message = "the source QEMU sends a page a second time after it has switched";
                return Err(Error::new(ErrorKind::Protocol, message).about([run]));
            }
            books.came.iter_mut().for_each(|came| came.insert(run));
            if self.switched {
                books.untold.push(run);
            }
        }
        drop(books);
        self.news.extend(kept);
        Ok(())
    }

    /// Takes the last pages out of the news if the rest of their unit is still to come.
    fn part_of_unit(&mut self) -> Option<PageRange> {
        let (begun, _) = self.written.as_ref()?;
        let run = self.news.last_mut()?;
        let end = PageIndex(run.first.0 + run.pages - 1);
        let (index, offset) = begun.layout.place(end)?;
        let unit_pages = (begun.layout.blocks().get(index)?.page_bytes / PAGE_BYTES as u64) as u32;
        let over = ((offset / PAGE_BYTES as u64) as u32 + 1) % unit_pages;
        let part = over.min(run.pages);
        if part == 0 {
            return None;
        }
        run.pages -= part;
        let part = PageRange::new(PageIndex(run.first.0 + run.pages), part);
        if run.pages == 0 {
            self.news.pop();
        }
        Some(part)
    }

    /// The package is whole. Pages that came before and count can be had from now on.
    fn switched(&mut self) -> Result<()> {
        let package = std::mem::take(&mut self.package);
        Package::inspect(&package).map_err(|cause| {
            Error::new(ErrorKind::Vm, "the source QEMU's stream cannot be carried").because(cause)
        })?;
        // What came in the same piece came before it.
        self.tell()?;
        self.switched = true;
        let mut books = self.shared.books.lock();
        let before: Vec<PageRange> = books.came.iter().flat_map(PresenceMap::runs).collect();
        books.untold = before;
        books.package = Some(package.into());
        drop(books);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// No more will come: what has not come is zero.
    fn end(&mut self) {
        let mut books = self.shared.books.lock();
        let absent: Vec<PageRange> = books.came.iter().flat_map(PresenceMap::absent_runs).collect();
        for run in absent {
            books.came.iter_mut().for_each(|came| came.insert(run));
            books.untold.push(run);
        }
        books.over = true;
        drop(books);
        self.shared.changed.notify_all();
    }
}

fn hung_up() -> Error {
    Error::new(ErrorKind::Unreachable, "the source QEMU hung up before it had sent everything")
}
