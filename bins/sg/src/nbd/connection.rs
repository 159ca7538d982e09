//! One client's connection: the handshake, then requests in and answers out, by one thread that owns the socket and its
//! own links to the intermediaries, and waits for all of them at once.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::transport::{Waker, wait};
use libsg::{Error, ErrorKind, Result};

use super::buffers::Buffer;
use super::engine::Engine;
use super::handshake::{Agreed, Negotiation, Step, greeting};
use super::job::{Answer, Failure, Finished};
use super::shared::Shared;
use super::stream::{Stream, own};
use super::wire::{
    Command, Fault, REQUEST_BYTES, Request, data_chunk, error_chunk, extents_chunk, hole_chunk, simple_reply,
};

/// How long a client has to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long answers have to leave when the connection ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a thread waits when nothing is due. It is woken by what happens.
const LONG: Duration = Duration::from_secs(60);

/// Requests that begin before it is looked what came of others.
const BEGUN_AT_ONCE: usize = 16;

/// A write whose bytes are coming.
struct Coming {
    request: Request,
    /// `None`: the request was refused, its bytes are read and forgotten.
    buffer: Option<Buffer>,
    have: usize,
}

/// A connection behind the handshake.
struct Connection {
    stream: Stream,
    engine: Engine,
    agreed: Agreed,
    coming: Option<Coming>,
    /// Takes bytes that are of no use.
    waste: Vec<u8>,
    /// The client has said, or shown, that it asks for nothing more.
    goes: bool,
}

/// Serves a client until it goes. `number` tells connections apart.
///
/// # Errors
/// The client is gone, or sent what no client sends.
pub fn run(shared: &Arc<Shared>, socket: OwnedFd, number: u64) -> Result<()> {
    let waker = Waker::new()?;
    shared.register(number, waker.clone());
    let served = serve(shared, socket, &waker);
    shared.unregister(number);
    served
}

fn serve(shared: &Arc<Shared>, socket: OwnedFd, waker: &Waker) -> Result<()> {
    let mut stream = Stream::new(socket);
    let Some(agreed) = shake_hands(shared, &mut stream, waker)? else { return Ok(()) };
    let engine = Engine::new(Arc::clone(shared));
    let (coming, waste) = (None, Vec::new());
    let mut connection = Connection { stream, engine, agreed, coming, waste, goes: false };
    loop {
        waker.drain();
        match connection.turn() {
            Ok(true) => return Ok(()),
            Ok(false) => connection.wait(waker, true)?,
            Err(error) => {
                connection.finish(waker)?;
                return Err(error);
            }
        }
    }
}

/// `None`: the client goes.
fn shake_hands(shared: &Shared, stream: &mut Stream, waker: &Waker) -> Result<Option<Agreed>> {
    let deadline = Instant::now() + HANDSHAKE;
    let mut negotiation = Negotiation::new(&shared.export);
    stream.push(greeting(), None);
    loop {
        let mut out = Vec::new();
        let step = negotiation.step(stream.bytes(), &mut out);
        if !out.is_empty() {
            stream.push(out, None);
        }
        stream.flush()?;
        match step {
            Step::Took(bytes) => {
                stream.take(bytes);
                continue;
            }
            Step::Begin(bytes, agreed) => {
                stream.take(bytes);
                return Ok(Some(agreed));
            }
            Step::End => return Ok(None),
            Step::Incomplete => {}
        }
        if stream.fill()? {
            continue;
        }
        if stream.is_closed() || shared.is_stopping() {
            return Ok(None);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(ErrorKind::Timeout, "the client does not say what it wants"));
        }
        waker.drain();
        wait(&[(Some(stream.as_fd()), stream.has_output()), (Some(waker.as_fd()), false)], left)?;
    }
}

impl Connection {
    /// Does all that can be done now. `true` when nothing is left to be done for this client.
    fn turn(&mut self) -> Result<bool> {
        loop {
            let begun = self.take_requests()?;
            for finished in self.engine.progress() {
                self.answer(finished);
            }
            self.flush()?;
            if !begun {
                break;
            }
        }
        let over = self.goes || self.engine.shared.is_stopping() || self.engine.shared.has_failed();
        if over && self.engine.jobs.is_empty() {
            return self.last_words().map(|()| true);
        }
        Ok(false)
    }

    /// Takes requests that came, as long as there is room for what they need. Returns whether there may be more.
    fn take_requests(&mut self) -> Result<bool> {
        for _ in 0..BEGUN_AT_ONCE {
            if self.goes || self.engine.shared.is_stopping() {
                return Ok(false);
            }
            if self.coming.is_some() {
                if !self.take_payload()? {
                    return Ok(false);
                }
                continue;
            }
            let Some(bytes) = self.stream.bytes().first_chunk::<REQUEST_BYTES>() else {
                if self.stream.fill()? {
                    continue;
                }
                self.goes |= self.stream.is_closed();
                return Ok(false);
            };
            let nonsense =
                || Error::new(ErrorKind::Protocol, "the client sent what is no request, or too long a write");
            let request = Request::decode(bytes).ok_or_else(nonsense)?;
            if !self.engine.has_room(Self::held_bytes(&request)) {
                return Ok(false);
            }
            self.stream.take(REQUEST_BYTES);
            self.take_request(request);
        }
        Ok(true)
    }

    fn held_bytes(request: &Request) -> usize {
        match request.command {
            Command::Write => request.payload_bytes(),
            // Longer ones are refused.
            Command::Read => request.length.min(super::wire::PAYLOAD_BYTES_MAX) as usize,
            _ => 0,
        }
    }

    fn take_request(&mut self, request: Request) {
        let shared = &self.engine.shared;
        let checked = request.check(shared.export.bytes, shared.own().is_none());
        let checked = match checked {
            Ok(()) if request.command == Command::BlockStatus && !self.agreed.extents => Err(Fault::Invalid),
            checked => checked,
        };
        match (request.command, checked) {
            (Command::Disconnect, _) => self.goes = true,
            (Command::Write, checked) => {
                let buffer = checked.is_ok().then(|| self.engine.buffers.take(request.payload_bytes()));
                if let Err(fault) = checked {
                    self.refuse(request, fault);
                }
                self.coming = Some(Coming { request, buffer, have: 0 });
            }
            (_, Ok(())) => self.engine.begin(request, None),
            (_, Err(fault)) => self.refuse(request, fault),
        }
    }

    fn refuse(&mut self, request: Request, fault: Fault) {
        let result = Err(Failure::new(fault, "the request cannot be done on this device"));
        self.answer(Finished { request, result });
    }

    /// Takes bytes of a write. Returns whether they are all there.
    fn take_payload(&mut self) -> Result<bool> {
        let Some(coming) = &mut self.coming else { return Ok(true) };
        let wanted = coming.request.payload_bytes();
        while coming.have < wanted {
            let to = match &mut coming.buffer {
                Some(buffer) => &mut own(buffer)?[coming.have..wanted],
                None => {
                    self.waste.resize((wanted - coming.have).min(1 << 16), 0);
                    &mut self.waste[..]
                }
            };
            let read = self.stream.fill_into(to)?;
            coming.have += read;
            if read == 0 {
                // A client that went in the middle of a write has written nothing.
                self.goes |= self.stream.is_closed();
                return Ok(false);
            }
        }
        if let Some(Coming { request, buffer: Some(buffer), .. }) = self.coming.take() {
            self.engine.begin(request, Some(buffer));
        }
        Ok(true)
    }

    fn answer(&mut self, Finished { request, result }: Finished) {
        let cookie = request.cookie;
        let chunks = self.agreed.structured && request.command == Command::Read;
        let (head, data) = match result {
            Ok(Answer::Bytes(buffer)) if chunks => (data_chunk(&request), Some(buffer)),
            Ok(Answer::Bytes(buffer)) => (simple_reply(cookie, None), Some(buffer)),
            Ok(Answer::Zeros) if chunks => (hole_chunk(&request), None),
            Ok(Answer::Zeros) => {
                let mut zeros = simple_reply(cookie, None);
                zeros.resize(zeros.len() + request.length as usize, 0);
                (zeros, None)
            }
            Ok(Answer::Extents(extents)) => (extents_chunk(cookie, &extents), None),
            Ok(Answer::Done) => (simple_reply(cookie, None), None),
            Err(Failure { fault, why }) => {
                tracing::debug!(?request, ?fault, why, "a request failed");
                let words = chunks || (self.agreed.structured && request.command == Command::BlockStatus);
                (
                    if words { error_chunk(cookie, fault, &why) } else { simple_reply(cookie, Some(fault)) },
                    None,
                )
            }
        };
        self.stream.push(head, data.map(|buffer| (buffer, request.length as usize)));
    }

    fn flush(&mut self) -> Result<()> {
        for buffer in self.stream.flush()? {
            self.engine.buffers.give(buffer);
        }
        Ok(())
    }

    /// Answers leave, if the client still takes them.
    fn last_words(&mut self) -> Result<()> {
        let deadline = Instant::now() + LAST_WORDS;
        while self.stream.has_output() && Instant::now() < deadline {
            self.flush()?;
            let left = deadline.saturating_duration_since(Instant::now());
            wait(&[(Some(self.stream.as_fd()), self.stream.has_output())], left.min(LAST_WORDS / 10))?;
        }
        Ok(())
    }

    /// What is under way comes to its end, though nobody is there to be answered: pages that are stored are noted, so
    /// that their slots are not forgotten.
    fn finish(&mut self, waker: &Waker) -> Result<()> {
        self.goes = true;
        while !self.engine.jobs.is_empty() {
            waker.drain();
            drop(self.engine.progress());
            if !self.engine.jobs.is_empty() {
                self.wait(waker, false)?;
            }
        }
        Ok(())
    }

    fn wait(&self, waker: &Waker, client: bool) -> Result<()> {
        // Without room for more, or when nothing more is taken, it does not matter what came.
        let reads = !self.goes && (self.coming.is_some() || self.engine.has_room(self.next_bytes()));
        let mut on: Vec<(Option<BorrowedFd<'_>>, bool)> = vec![(Some(waker.as_fd()), false)];
        if client && (reads || self.stream.has_output()) {
            on.push((Some(self.stream.as_fd()), self.stream.has_output()));
        }
        self.engine.awaited(&mut on);
        let due = self.engine.next_due().map(|at| at.saturating_duration_since(Instant::now()));
        wait(&on, due.unwrap_or(LONG)).map(drop)
    }

    /// Bytes that the next request needs, as far as it came.
    fn next_bytes(&self) -> usize {
        let head = self.stream.bytes().first_chunk::<REQUEST_BYTES>();
        head.and_then(Request::decode).map_or(0, |request| Self::held_bytes(&request))
    }
}
