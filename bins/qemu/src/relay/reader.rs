//! The thread that reads a source QEMU's stream.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libsg::memory::PresenceMap;
use libsg::page::{PageIndex, PageRange};
use libsg::{Error, ErrorKind, Result};
use qemu_stream::{Answer, Command, Configuration, Item, Package, StreamDecoder, limits};

use super::pages::{Limits, Pages};
use super::store::{Came, Slot, Writer};
use super::stream::{RECORD_BYTES, Unread};
use super::{Begun, Flow, Line, NEXT_TO_NOTHING, Shared, UNLIMITED};
use crate::layout::Layout;

/// Bytes read at once, behind what is left of an item.
const READ_BYTES: usize = 1 << 20;

const _: () = assert!(READ_BYTES > limits::ITEM_BYTES_MAX);

/// So many parts in which nothing is, behind the last page, say that a source believes that it has more. One that knows better says
/// its end behind one at most.
const EMPTY_PARTS_MAX: u32 = 16;

/// How often it is told so.
const RECOUNTS_MAX: u32 = 8;

/// The least that is read at once.
const LEAST_BYTES: usize = 4096;

pub(super) fn run(shared: &Shared, connection: UnixStream, limits: Limits) {
    Reader::new(shared, limits, StreamDecoder::new(), None).end_with(Ok(connection));
}

/// Reads what a source sends that has it resumed, of whose stream another process has read the rest.
pub(super) fn run_on(shared: &Shared, (begun, writer): (Begun, Writer), limits: Limits) {
    let none = PresenceMap::new(begun.layout.pages());
    let decoder = StreamDecoder::recovering(begun.layout.blocks().clone(), begun.section);
    let written = Written { begun, writer, filled: none.clone(), seen: none };
    let mut reader = Reader::new(shared, limits, decoder, Some(written));
    let begins = reader.resume();
    reader.end_with(begins);
}

struct Reader<'a> {
    shared: &'a Shared,
    decoder: StreamDecoder,
    configuration: Option<Configuration>,
    package: Vec<u8>,
    limits: Limits,
    written: Option<Written>,
    /// Pages that have come since the books were last written.
    news: Vec<Came>,
    /// Parts that have begun since the last page.
    empty_parts: u32,
    /// How often it was broken off for that.
    recounts: u32,
    /// The package has come.
    switched: bool,
}

/// What is written, and where.
struct Written {
    begun: Begun,
    writer: Writer,
    /// Pages that had bytes once: what does not come of them is not zero.
    filled: PresenceMap,
    /// Pages that have come. Since the switch they do not come again: their bytes may be under way.
    seen: PresenceMap,
}

/// How a connection ended.
enum Ended {
    /// All of the stream has come.
    Whole,
    /// It was broken off.
    Broken,
}

impl<'a> Reader<'a> {
    /// Of a stream from its beginning, or of one that has switched, of which this was written before.
    fn new(shared: &'a Shared, limits: Limits, decoder: StreamDecoder, written: Option<Written>) -> Self {
        Self {
            shared,
            decoder,
            configuration: None,
            package: Vec::new(),
            limits,
            switched: written.is_some(),
            written,
            news: Vec::new(),
            empty_parts: 0,
            recounts: 0,
        }
    }
}

impl Reader<'_> {
    /// Reads all that comes over this connection, and others behind it.
    fn end_with(&mut self, connection: Result<UnixStream>) {
        if let Err(error) = connection.and_then(|connection| self.read_all(connection)) {
            tracing::warn!(error = error.chain(), "the source QEMU's stream ended");
            self.shared.fail(&error);
        }
        self.shared.books.lock().unread.forget();
    }

    fn read_all(&mut self, mut connection: UnixStream) -> Result<()> {
        while let Ended::Broken = self.read(&mut connection)? {
            connection = self.resume()?;
        }
        self.end()
    }

    fn read(&mut self, connection: &mut UnixStream) -> Result<Ended> {
        let mut buffer = vec![0; READ_BYTES + limits::ITEM_BYTES_MAX];
        let (mut from, mut to) = (0, 0);
        while !self.decoder.is_over() {
            let taken = self.take(&buffer[from..to])?;
            from += taken;
            self.tell()?;
            if self.decoder.is_over() {
                break;
            }
            self.recount()?;
            buffer.copy_within(from..to, 0);
            (to, from) = (to - from, 0);
            let most = self.room()?;
            let end = buffer.len().min(to + most);
            let ended = match connection.read(&mut buffer[to..end]) {
                Ok(0) => hung_up(),
                Ok(bytes) => {
                    to += bytes;
                    self.shared.books.lock().unread.read(bytes);
                    continue;
                }
                Err(error) if is_silence(&error) => match self.shared.lives() {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => hung_up().because(error),
            };
            return if self.shared.books.lock().line == Line::Broken {
                Ok(Ended::Broken)
            } else {
                Err(ended)
            };
        }
        Ok(Ended::Whole)
    }

    /// Waits until there is room for more, and says how much may be read at once: so little that the source cannot be through
    /// behind it before it is made to go slowly.
    fn room(&self) -> Result<usize> {
        let mut books = self.shared.books.lock();
        loop {
            // What is read while it comes slowly may go on when it flows.
            let slowly = if books.flow == Flow::Still { LEAST_BYTES } else { READ_BYTES };
            let flow = books.flow;
            let flows = books.line == Line::Up && matches!(flow, Flow::Free | Flow::Live);
            let Some(pages) = books.pages.as_ref().filter(|_| flows) else { return Ok(slowly) };
            let has_room = pages.has_room();
            match (books.beyond(), flow) {
                (0, Flow::Live) => books.held = true,
                (0, _) => {
                    books.flow = Flow::Asked;
                    drop(books);
                    self.shared.rate(NEXT_TO_NOTHING)?;
                    self.shared.ask()?;
                    return Ok(READ_BYTES);
                }
                (beyond, _) if has_room => {
                    return Ok((beyond as usize).saturating_mul(RECORD_BYTES).clamp(LEAST_BYTES, READ_BYTES));
                }
                _ => {}
            }
            self.shared.changed.wait(&mut books);
        }
    }

    /// Has the source go on over another connection.
    fn resume(&mut self) -> Result<UnixStream> {
        self.reconnect().map_err(|cause| {
            let message = "the source QEMU does not go on with its stream, which was broken off. What of its memory is not safe is \
                           there only, paused (query-migrate): do not end it";
            Error::new(cause.kind, message).because(cause)
        })
    }

    fn reconnect(&mut self) -> Result<UnixStream> {
        self.empty_parts = 0;
        let flow = {
            let mut books = self.shared.books.lock();
            // Half of what was said says nothing.
            let pages = &mut books.pages;
            self.news.drain(..).for_each(|came| pages.iter_mut().for_each(|pages| pages.came_in_vain(came)));
            while books.is_to_rest() && books.line == Line::Broken {
                self.shared.changed.wait(&mut books);
            }
            books.pages.iter_mut().for_each(Pages::broken);
            books.flow = books.next_flow();
            (books.flow, books.all)
        };
        self.shared.rate(if flow == (Flow::Asked, false) { NEXT_TO_NOTHING } else { UNLIMITED })?;
        let mut steering = self.shared.steering.lock();
        let steering = steering.as_mut().ok_or_else(hung_up)?;
        let mut stream = steering.resume()?;
        *self.shared.answers.lock() = stream.answers()?;
        let unread = Unread::of(&mut stream)?;
        let mut books = self.shared.books.lock();
        books.unread = unread;
        books.beyond();
        drop(books);
        self.decoder = StreamDecoder::recovering(self.decoder.blocks().clone(), self.decoder.section());
        Ok(stream.ours)
    }

    /// The source asks what of a block has come.
    fn tell_received(&self, block: qemu_stream::BlockIndex) {
        let blocks = self.decoder.blocks();
        let bytes = blocks.get(block).map_or(0, Answer::bitmap_bytes) as usize;
        let mut said = Vec::with_capacity(bytes + 300);
        Answer::ReceivedBitmap(block).encode(blocks, &mut said);
        {
            let mut books = self.shared.books.lock();
            // What is lost from now on is not in what was said of blocks.
            if books.line == Line::Broken {
                books.line = Line::Resuming { again: false };
            }
            books.pages.iter().for_each(|pages| pages.received(block, bytes, &mut said));
        }
        Answer::encode_bitmap_end(&mut said);
        self.shared.say(&said);
    }

    /// The source goes on.
    fn resumed(&mut self) -> Result<()> {
        let blocks = self.decoder.blocks();
        let mut asks = Vec::new();
        let mut books = self.shared.books.lock();
        let again = books.line == Line::Resuming { again: true };
        books.resumed += 1;
        if let (Some(pages), Some(written)) = (&mut books.pages, &mut self.written) {
            pages.wanted(&mut asks);
            for run in written.seen.runs().collect::<Vec<_>>() {
                run.iter().filter(|page| pages.is_to_come(*page)).for_each(|page| {
                    written.seen.remove(PageRange::new(page, 1));
                });
            }
        }
        if books.line != Line::HungUp {
            books.line = if again { Line::Broken } else { Line::Up };
        }
        drop(books);
        self.shared.steering.lock().iter_mut().for_each(|steering| steering.listens());
        self.shared.answer(blocks, &Answer::ResumeAck);
        if again {
            self.shared.break_off();
            return Ok(());
        }
        tracing::info!("the source QEMU has resumed its stream");
        if let Some(written) = &self.written {
            self.shared.request(&written.begun.layout, &asks);
        }
        self.shared.ask()
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
            Item::PartBegins { .. } => self.empty_parts = self.empty_parts.saturating_add(1),
            Item::PartEnds { .. } | Item::End => {}
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
                let Some(Written { begun, .. }) = &self.written else { return Ok(()) };
                let layout = &begun.layout;
                let mut books = self.shared.books.lock();
                for span in discard.spans {
                    let range = layout.range(discard.block, span);
                    books.pages.iter_mut().for_each(|pages| pages.discard(range));
                }
            }
            Command::ReceivedBitmap(block) => self.tell_received(block),
            Command::PostcopyResume => self.resumed()?,
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        let Some(configuration) = self.configuration.take() else { return Ok(()) };
        let layout = Layout::new(self.decoder.blocks().clone());
        let section = self.decoder.section();
        let (filled, layout) = (PresenceMap::new(layout.pages()), Arc::new(layout));
        let mut pages = Pages::new(Arc::clone(&layout), self.limits)?;
        pages.warm()?;
        let begun = Begun { layout, configuration, section };
        let writer = pages.writer();
        self.written = Some(Written { begun: begun.clone(), writer, seen: filled.clone(), filled });
        let mut books = self.shared.books.lock();
        (books.begun, books.pages) = (Some(begun), Some(pages));
        drop(books);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn page(&mut self, block: qemu_stream::BlockIndex, offset: u64, bytes: Option<&[u8]>) -> Result<()> {
        self.empty_parts = 0;
        let Some(Written { begun, writer, filled, seen }) = &mut self.written else { return Ok(()) };
        let page = begun.layout.page(block, offset);
        let range = PageRange::new(page, 1);
        if self.switched && seen.contains(page) {
            let message = "the source QEMU sends a page a second time after it has switched";
            return Err(Error::new(ErrorKind::Protocol, message).about([range]));
        }
        seen.insert(range);
        let slot = match bytes {
            Some(bytes) => {
                if writer.is_full() {
                    let mut books = self.shared.books.lock();
                    books.pages.iter_mut().try_for_each(|pages| pages.refill(writer))?;
                }
                filled.insert(range);
                writer.write(bytes)?
            }
            None => Slot::ZERO,
        };
        if !self.news.last_mut().is_some_and(|run| run.join(page, slot)) {
            self.news.push(Came { pages: range, slot });
        }
        Ok(())
    }
}

impl Reader<'_> {
    /// Enters what has come into the books.
    fn tell(&mut self) -> Result<()> {
        // Before the switch nobody is told, and units of which a part was sent are forgotten.
        let told = if self.switched { self.whole_units() } else { self.news.len() };
        if told == 0 {
            return Ok(());
        }
        let mut books = self.shared.books.lock();
        let Some(pages) = &mut books.pages else { return Ok(()) };
        let wanted_before = pages.wanted_pages();
        for run in self.news.drain(..told) {
            if self.switched {
                pages.came(run);
            } else {
                pages.came_early(run);
            }
        }
        let has_wanted = pages.wanted_pages() < wanted_before;
        let rests = books.is_to_rest() && books.line == Line::Up;
        if rests {
            books.line = Line::Broken;
        }
        drop(books);
        if has_wanted {
            self.shared.wake_wanting();
        }
        if rests {
            self.shared.break_off();
            return Ok(());
        }
        self.shared.ask()
    }

    /// Breaks off the stream of a source that has sent all, and believes that there is more: resumed, it counts anew.
    fn recount(&mut self) -> Result<()> {
        if !self.switched || self.empty_parts <= EMPTY_PARTS_MAX {
            return Ok(());
        }
        let mut books = self.shared.books.lock();
        if books.line != Line::Up || books.pages.as_ref().is_none_or(|pages| pages.to_come() > 0) {
            return Ok(());
        }
        self.recounts += 1;
        if self.recounts > RECOUNTS_MAX {
            let message = "the source QEMU has sent all of its memory, and does not say so";
            return Err(Error::new(ErrorKind::Vm, message));
        }
        books.line = Line::Broken;
        drop(books);
        tracing::info!("the source QEMU has lost count of its pages: all of them came");
        self.shared.break_off();
        Ok(())
    }

    /// How much of the news is entered: not the last pages, if the rest of their unit is still to come.
    fn whole_units(&mut self) -> usize {
        let (Some(Written { begun, .. }), Some(last)) = (&self.written, self.news.last()) else { return 0 };
        let end = PageIndex(last.pages.first.0 + last.pages.pages - 1);
        let Some((block, span)) = begun.layout.unit(end) else { return self.news.len() };
        let unit = begun.layout.range(block, span);
        let mut part = (end.0 + 1 - unit.first.0) % unit.pages;
        let mut at = self.news.len();
        // Its pages of zeros, and others, are runs of their own.
        while part > 0 && at > 0 {
            let run = self.news[at - 1];
            if run.pages.pages > part {
                let (before, behind) = run.split(run.pages.pages - part);
                self.news[at - 1] = before;
                self.news.insert(at, behind);
                return at;
            }
            part -= run.pages.pages;
            at -= 1;
        }
        at
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
        if let (Some(pages), Some(written)) = (&mut books.pages, &mut self.written) {
            pages.switched();
            written.seen = pages.settled();
        }
        books.package = Some(package.into());
        drop(books);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// No more will come: what has not come is zero.
    fn end(&mut self) -> Result<()> {
        let mut books = self.shared.books.lock();
        let missing = match (&mut books.pages, &self.written) {
            (Some(pages), Some(written)) => pages.ended(|page| written.filled.contains(page)),
            _ => Vec::new(),
        };
        books.over = missing.is_empty();
        drop(books);
        if !missing.is_empty() {
            let message = "the source QEMU ends without pages that it was to send again";
            return Err(Error::new(ErrorKind::Protocol, message).about(missing));
        }
        self.shared.changed.notify_all();
        Ok(())
    }
}

/// Nothing came for a while.
fn is_silence(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

pub(super) fn hung_up() -> Error {
    Error::new(ErrorKind::Unreachable, "the source QEMU hung up before it had sent everything")
}
