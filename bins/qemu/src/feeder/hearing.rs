//! What a destination QEMU answers, and who hears it.
//!
//! The thread that reads the sink's events does: it is woken up by the connection itself, also where it waits for a page of its
//! own to be in place, so that a fault goes through no other thread. Who else waits is told by that one; and hears for itself
//! when that one does something else for long.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use libsg::transport::Waker;
use libsg::{Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};
use qemu_stream::{Answer, AnswerDecoder, AnswerItem};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, recv};

use super::{Books, FIRST_PING, Feeder, Layout, hung_up};

/// How long who hears waits at once for an answer: other things change as well.
const LISTENS: Duration = Duration::from_millis(20);

/// How long others wait before they hear for themselves.
const OTHERS_WAIT: Duration = Duration::from_millis(2);

/// Pings that are waited for at once are told apart, so that an answer wakes up who waits for it: there are as many threads that
/// place pages, or a few more.
const PLACES: usize = 8;

pub(super) struct Hearing {
    ear: Mutex<Ear>,
    /// Who reads the events.
    by: OnceLock<ThreadId>,
    placed: [Condvar; PLACES],
    changed: Condvar,
    /// Pages are waited for that were heard of by others than who reads the events.
    waker: Waker,
    /// Ready when there is something to hear, or the waker is set.
    ready: OwnedFd,
}

/// The way back from QEMU.
struct Ear {
    connection: UnixStream,
    decoder: AnswerDecoder,
    buffer: Vec<u8>,
    /// Bytes of half an answer.
    begun: usize,
    /// Nothing more is to be heard.
    over: bool,
}

impl Hearing {
    pub fn of(connection: UnixStream) -> Result<Self> {
        connection.set_read_timeout(Some(LISTENS))?;
        let (ready, waker) = (epoll::create(epoll::CreateFlags::CLOEXEC)?, Waker::new()?);
        epoll::add(&ready, &connection, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&ready, waker.as_fd(), EventData::new_u64(1), EventFlags::IN)?;
        let decoder = AnswerDecoder::new();
        let ear = Ear { connection, decoder, buffer: vec![0; 4096], begun: 0, over: false };
        let (placed, changed) = (Default::default(), Condvar::new());
        Ok(Self { ear: Mutex::new(ear), by: OnceLock::new(), placed, changed, waker, ready })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Something that is waited for is so now.
    pub fn has_changed(&self) {
        self.changed.notify_all();
    }

    /// Pings up to this one are answered, and were up to that one before.
    fn has_placed(&self, before: u32, answered: u32) {
        let placed = answered.wrapping_sub(before) as usize;
        for at in 0..placed.min(PLACES) {
            self.placed(answered.wrapping_sub(at as u32)).notify_all();
        }
    }

    fn placed(&self, ping: u32) -> &Condvar {
        &self.placed[ping as usize % PLACES]
    }

    /// Whether this thread is to hear.
    fn is_ours(&self) -> bool {
        self.by.get().is_none_or(|by| *by == std::thread::current().id())
    }
}

impl Feeder {
    /// Hears what there is to hear, for who reads the events: who calls it first is that from now on.
    pub(super) fn listen(&self) {
        self.hearing.by.get_or_init(|| std::thread::current().id());
        self.hearing.waker.drain();
        // Who else hears wakes this one up.
        if let Some(mut ear) = self.hearing.ear.try_lock() {
            self.hear(&mut ear, false);
        }
    }

    pub(super) fn await_pong(&self, ping: u32, patience: Duration) -> Result<()> {
        // They are answered in order; the difference is right over the end of their numbers too.
        let is_answered = |books: &Books| (ping.wrapping_sub(books.answered) as i32 <= 0).then_some(());
        self.wait_on(self.hearing.placed(ping), patience, is_answered)
    }

    pub(super) fn wait<T>(&self, patience: Duration, take: impl Fn(&Books) -> Option<T>) -> Result<T> {
        self.wait_on(&self.hearing.changed, patience, take)
    }

    fn wait_on<T>(
        &self,
        told: &Condvar,
        patience: Duration,
        take: impl Fn(&Books) -> Option<T>,
    ) -> Result<T> {
        let (deadline, is_ours) = (Instant::now() + patience, self.hearing.is_ours());
        loop {
            let mut books = self.books.lock();
            if let Some(found) = take(&books) {
                return Ok(found);
            }
            if let Some((kind, message)) = &books.failure {
                return Err(Error::new(*kind, message.clone()));
            }
            if Instant::now() > deadline {
                let message = format!("the destination QEMU did not answer within {} s", patience.as_secs());
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            if !is_ours && !told.wait_for(&mut books, OTHERS_WAIT).timed_out() {
                continue;
            }
            drop(books);
            match self.hearing.ear.try_lock().filter(|ear| !ear.over) {
                Some(mut ear) => {
                    let asks = self.hear(&mut ear, is_ours);
                    drop(ear);
                    if asks {
                        self.hearing.waker.wake();
                    }
                }
                None if is_ours => drop(told.wait_for(&mut self.books.lock(), OTHERS_WAIT)),
                None => {}
            }
        }
    }

    pub(super) fn fail(&self, error: &Error) {
        self.books.lock().failure.get_or_insert_with(|| (error.kind, error.chain()));
        self.hearing.has_changed();
        self.hearing.placed.iter().for_each(|placed| {
            placed.notify_all();
        });
        self.hearing.waker.wake();
    }

    /// Hears what there is, or, if it `waits`, what comes next. Whether pages are waited for since.
    fn hear(&self, ear: &mut Ear, waits: bool) -> bool {
        let mut asked = false;
        while !ear.over {
            let flags = if waits { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            let heard = match recv(&ear.connection, &mut ear.buffer[ear.begun..], flags) {
                Ok((0, _)) => Err(hung_up()),
                Ok((bytes, _)) => {
                    let is_all = ear.begun + bytes < ear.buffer.len();
                    ear.begun += bytes;
                    self.take_in(ear).map(|asks| (asks, is_all))
                }
                Err(rustix::io::Errno::AGAIN) => return asked,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(hung_up().because(io::Error::from(error))),
            };
            match heard {
                Ok((asks, true)) => return asked | asks,
                Ok((asks, false)) => asked |= asks,
                Err(error) => {
                    ear.over = true;
                    // It would be ready for ever. It fails only for one that is not there.
                    let _ = epoll::delete(&self.hearing.ready, &ear.connection);
                    if self.books.lock().shut.is_none() {
                        self.fail(&error);
                    }
                }
            }
        }
        asked
    }

    /// Takes in every answer that is whole. Whether pages are waited for since.
    fn take_in(&self, ear: &mut Ear) -> Result<bool> {
        let (mut from, mut is_news) = (0, false);
        let mut books = self.books.lock();
        let (before, asked) = (books.answered, books.faults.count());
        loop {
            let input = &ear.buffer[from..ear.begun];
            let next = ear.decoder.next(self.layout.blocks(), input);
            let next = next.map_err(|cause| {
                Error::new(ErrorKind::Protocol, "the destination QEMU answers what cannot be").because(cause)
            })?;
            let Some((item, taken)) = next else { break };
            match item {
                AnswerItem::Answer(answer) => is_news |= books.take(&self.layout, answer)?,
                AnswerItem::BitmapBytes { bytes, .. } => books.received.take(&input[bytes]),
                AnswerItem::BitmapEnd => {
                    books.received.end();
                    is_news = true;
                }
            }
            from += taken;
        }
        ear.buffer.copy_within(from..ear.begun, 0);
        ear.begun -= from;
        let (answered, asks) = (books.answered, books.faults.count() > asked);
        drop(books);
        self.hearing.has_placed(before, answered);
        if is_news {
            self.hearing.has_changed();
        }
        Ok(asks)
    }
}

impl Books {
    /// Enters an answer. Whether somebody may wait for it, who waits for no page.
    fn take(&mut self, layout: &Layout, answer: Answer) -> Result<bool> {
        match answer {
            Answer::Pong(ping) if ping >= FIRST_PING => self.answered = ping,
            Answer::RequestPages { block, span } => self.faults.ask(layout.page(block, span.start_bytes)),
            Answer::Shut(code) => self.shut = Some(code),
            Answer::ReceivedBitmap(block) => self.received.begin(layout, block)?,
            Answer::ResumeAck => self.received.resume(),
            _ => {}
        }
        Ok(matches!(answer, Answer::Shut(_) | Answer::ResumeAck))
    }
}
