//! An intermediary's end that reads copies from where they lie at another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libsg::ids::SlotIndex;
use libsg::page::PAGE_BYTES;
use libsg::server::backend::{Attached, Reader, Reading};
use libsg::wire::access::{Endpoint, KeyEntry};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::blob;
use crate::stream::{Batch, Lost, Span, Stream};
use crate::verbs::{Domain, Limits, Operation, Patience, QueuePair};

/// Work requests at once: copies lie in few runs.
const WORKS_MAX: usize = 256;

/// The end, as far as it is. Whoever takes it back does so under the lock, so that nothing is posted behind it.
#[derive(Debug)]
enum End {
    Unconnected(Box<dyn QueuePair>),
    Open(Stream),
    Gone,
}

/// Ends it.
struct Guard(Arc<Mutex<End>>);

impl Drop for Guard {
    fn drop(&mut self) {
        let end = std::mem::replace(&mut *self.0.lock(), End::Gone);
        if let End::Unconnected(mut pair) = end {
            pair.fail();
        }
    }
}

#[derive(Debug)]
struct ReadsCopies {
    end: Arc<Mutex<End>>,
    limits: Limits,
    works: usize,
    /// Of the completion channel, which may go before this does.
    poll: OwnedFd,
}

/// An end in this domain.
pub(crate) fn reading(domain: &Arc<dyn Domain>, limits: Limits) -> Result<Reading> {
    let works = limits.works_max.min(WORKS_MAX);
    let pair = Arc::clone(domain).queue_pair(works)?;
    let endpoint = blob::of_endpoint(&pair.endpoint())?;
    let poll = pair.poll_fd().try_clone_to_owned()?;
    let end = Arc::new(Mutex::new(End::Unconnected(pair)));
    let attached = Attached { endpoint, guard: Box::new(Guard(Arc::clone(&end))) };
    Ok(Reading { attached, reader: Box::new(ReadsCopies { end, limits, works, poll }) })
}

impl Reader for ReadsCopies {
    fn connect(&mut self, peer: &Endpoint) -> Result<()> {
        let mut end = self.end.lock();
        let End::Unconnected(mut pair) = std::mem::replace(&mut *end, End::Gone) else { return Err(gone()) };
        pair.connect(&blob::endpoint(peer)?, Patience::default())?;
        *end = End::Open(Stream::new(pair, self.limits, self.works)?);
        Ok(())
    }

    fn is_open(&self) -> bool {
        matches!(&*self.end.lock(), End::Open(stream) if stream.is_proven())
    }

    fn read(
        &mut self,
        number: u64,
        pages: &[(SlotIndex, SlotIndex)],
        (there, here): (&[KeyEntry], &[KeyEntry]),
    ) -> Result<()> {
        let mut end = self.end.lock();
        let End::Open(stream) = &mut *end else { return Err(gone()) };
        let mut spans = stream.spans();
        for (from, into) in pages {
            let (remote, local) = (blob::slot(there, *from)?, blob::slot(here, *into)?);
            let span = Span { address: local.address, key: local.key, remote, bytes: PAGE_BYTES };
            Span::push(&mut spans, span);
        }
        stream.push(Operation::Read, Batch { number, spans });
        stream.post(0)?;
        Ok(())
    }

    fn progress(&mut self, ended: &mut Vec<u64>) -> Result<()> {
        let mut end = self.end.lock();
        let stream = match &mut *end {
            End::Unconnected(_) => return Ok(()),
            End::Open(stream) => stream,
            End::Gone => return Err(gone()),
        };
        loop {
            stream.post(0)?;
            stream.reap(ended).map_err(Lost::error)?;
            if !stream.is_busy() {
                return Ok(());
            }
            // What comes from here on is seen by who waits.
            stream.pair().arm()?;
            if !stream.reap(ended).map_err(Lost::error)? {
                return Ok(());
            }
        }
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Unreachable, "the end that reads copies was taken back")
}
