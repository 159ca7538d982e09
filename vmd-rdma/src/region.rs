//! Memory with a device: what is registered stays mapped until it is not registered any more.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;

use libsg::memory::vectored::IoPart;
use libsg::memory::{Mapping, PageSlice};
use libsg::server::backend::ChunkMemory;
use libsg::{Error, ErrorKind, Result};

use crate::verbs::{Access, Domain, Region};

/// Memory that stays where it is.
///
/// # Safety
/// The bytes that it says stay mapped until the value is dropped, and whoever else reaches them expects them to change at
/// any time: no Rust reference to them exists, unless they are registered for reading only.
pub(crate) unsafe trait Stays: Send + Sync {
    fn place(&self) -> Result<(NonNull<u8>, usize)>;
}

fn at(start: *const u8) -> Result<NonNull<u8>> {
    NonNull::new(start.cast_mut()).ok_or_else(|| Error::new(ErrorKind::Input, "memory at address zero"))
}

// SAFETY: that is what it promises; it is never reached but through slices of memory that others may change.
unsafe impl Stays for ChunkMemory {
    fn place(&self) -> Result<(NonNull<u8>, usize)> {
        Ok((at(self.bytes().as_mut_ptr())?, self.bytes().len()))
    }
}

// SAFETY: a slice keeps what it is in mapped. Guest memory is reached as memory that others may change; a buffer of our
// own is constant, and is only ever registered for reading: see `Windows`.
unsafe impl Stays for PageSlice {
    fn place(&self) -> Result<(NonNull<u8>, usize)> {
        match self.io() {
            IoPart::Bytes(bytes) => Ok((at(bytes.as_ptr())?, bytes.len())),
            IoPart::Guest(guest) => Ok((at(guest.as_ptr())?, guest.len())),
        }
    }
}

// SAFETY: it is mapped until the last of them is dropped. References to what was read into it are made by
// `Landing::bytes` only.
unsafe impl Stays for Arc<Mapping> {
    fn place(&self) -> Result<(NonNull<u8>, usize)> {
        let all =
            self.slice(0, self.len()).ok_or_else(|| Error::new(ErrorKind::Input, "an empty mapping"))?;
        Ok((at(all.as_ptr())?, all.len()))
    }
}

/// Memory that is registered. The fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct Registered<M> {
    region: Box<dyn Region>,
    start: u64,
    bytes: usize,
    _memory: M,
}

impl<M: Stays> Registered<M> {
    pub(crate) fn new(domain: &Arc<dyn Domain>, memory: M, access: Access) -> Result<Self> {
        let (start, bytes) = memory.place()?;
        // SAFETY: `Stays` promises it for as long as `memory` lives, which is dropped behind the region.
        let region = unsafe { Arc::clone(domain).register(start, bytes, access) }?;
        Ok(Self { region, start: start.as_ptr() as u64, bytes, _memory: memory })
    }
}

impl<M> Registered<M> {
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn local_key(&self) -> u32 {
        self.region.local_key()
    }

    pub(crate) fn remote_key(&self) -> u32 {
        self.region.remote_key()
    }

    fn has(&self, address: u64, bytes: usize) -> bool {
        address
            .checked_sub(self.start)
            .and_then(|offset| offset.checked_add(bytes as u64))
            .is_some_and(|end| end <= self.bytes as u64)
    }
}

/// Guest memory is registered so much at a time.
pub(crate) const WINDOW_BYTES: usize = 2 << 20;

/// What of the memory that pages are written from is registered: what was used last. What is being written from stays.
#[derive(Debug)]
pub(crate) struct Windows {
    domain: Arc<dyn Domain>,
    /// By number; the longest unused first.
    known: Vec<Window>,
    most: usize,
    next: u64,
}

#[derive(Debug)]
struct Window {
    number: u64,
    registered: Registered<PageSlice>,
    users: u32,
}

/// A piece of memory within a window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local {
    pub address: u64,
    pub key: u32,
    pub window: u64,
}

impl Windows {
    /// At most so many that nothing is written from.
    pub(crate) fn new(domain: Arc<dyn Domain>, most: usize) -> Self {
        Self { domain, known: Vec::new(), most, next: 0 }
    }

    /// Where the device reads the slice, until [`Self::done`].
    ///
    /// # Errors
    /// The device registers no more.
    pub(crate) fn find(&mut self, slice: &PageSlice) -> Result<Local> {
        let (start, bytes) = slice.place()?;
        let address = start.as_ptr() as u64;
        let has = |window: &Window| window.registered.has(address, bytes);
        let mut window = match self.known.iter().rposition(has) {
            Some(at) => self.known.remove(at),
            None => {
                let registered = self.register(slice)?;
                self.next += 1;
                Window { number: self.next, registered, users: 0 }
            }
        };
        window.users += 1;
        let local = Local { address, key: window.registered.local_key(), window: window.number };
        self.known.push(window);
        Ok(local)
    }

    fn register(&mut self, slice: &PageSlice) -> Result<Registered<PageSlice>> {
        self.shrink(self.most.saturating_sub(1));
        let wide = || slice.widened(WINDOW_BYTES);
        match Registered::new(&self.domain, wide(), Access::default()) {
            Err(error) if error.kind == ErrorKind::Full => {
                self.shrink(0);
                Registered::new(&self.domain, wide(), Access::default())
            }
            other => other,
        }
    }

    /// Lets go of windows that nothing is written from, as long as there are more than so many.
    fn shrink(&mut self, most: usize) {
        let mut beyond = self.known.len().saturating_sub(most);
        self.known.retain(|window| {
            let goes = beyond > 0 && window.users == 0;
            beyond -= usize::from(goes);
            !goes
        });
    }

    /// What was found there was written.
    pub(crate) fn done(&mut self, window: u64) {
        if let Some(window) = self.known.iter_mut().find(|known| known.number == window) {
            window.users -= 1;
        }
    }
}

/// Where pages are read to: a ring of areas, given out in turn, each to be given back.
#[derive(Debug)]
pub(crate) struct Landing {
    memory: Arc<Mapping>,
    registered: Registered<Arc<Mapping>>,
    areas: VecDeque<Area>,
}

#[derive(Debug)]
struct Area {
    offset: usize,
    bytes: usize,
    free: bool,
}

impl Landing {
    /// # Errors
    /// No memory, or the device registers none.
    pub(crate) fn new(domain: &Arc<dyn Domain>, bytes: usize) -> Result<Self> {
        let memory = Arc::new(Mapping::anonymous(bytes)?);
        let access = Access { local_write: true, ..Access::default() };
        let registered = Registered::new(domain, Arc::clone(&memory), access)?;
        Ok(Self { memory, registered, areas: VecDeque::new() })
    }

    /// An area of so many bytes; `None` until others were given back.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<usize> {
        let offset = match (self.areas.front(), self.areas.back()) {
            (Some(first), Some(last)) => {
                let end = last.offset + last.bytes;
                let behind = if last.offset >= first.offset { self.memory.len() } else { first.offset };
                if behind - end >= bytes {
                    end
                } else if last.offset >= first.offset && first.offset >= bytes {
                    0
                } else {
                    return None;
                }
            }
            _ if bytes <= self.memory.len() => 0,
            _ => return None,
        };
        self.areas.push_back(Area { offset, bytes, free: false });
        Some(offset)
    }

    /// The area is free again.
    pub(crate) fn give_back(&mut self, offset: usize) {
        if let Some(area) = self.areas.iter_mut().find(|area| area.offset == offset && !area.free) {
            area.free = true;
        }
        while self.areas.front().is_some_and(|area| area.free) {
            self.areas.pop_front();
        }
    }

    /// Where the device writes an area.
    pub(crate) fn local(&self, offset: usize) -> (u64, u32) {
        (self.registered.start() + offset as u64, self.registered.local_key())
    }

    /// The first `bytes` bytes of an area that was read into.
    ///
    /// # Safety
    /// All reads into the area came to their end, and none is posted into it until what is returned is dropped.
    pub(crate) unsafe fn bytes(&self, offset: usize, bytes: usize) -> &[u8] {
        let Some(area) = self.memory.slice(offset, bytes) else { return &[] };
        // SAFETY: within the mapping, as was just looked up, which lives as long as self. Nobody but the device writes
        // it, and the device does not, as the caller promises. Anonymous memory is never uninitialised.
        unsafe { std::slice::from_raw_parts(area.as_ptr(), area.len()) }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::verbs::simulated::Network;

    const PAGE: usize = 4096;

    fn domain() -> Arc<dyn Domain> {
        Network::new(1).device(1).domain().expect("a domain")
    }

    #[test]
    fn a_ring_gives_out_what_was_given_back() {
        let mut ring = Landing::new(&domain(), 8 * PAGE).expect("memory");
        assert_eq!([3, 3, 2].map(|pages| ring.take(pages * PAGE)), [Some(0), Some(3 * PAGE), Some(6 * PAGE)]);
        assert_eq!(ring.take(PAGE), None);
        ring.give_back(3 * PAGE);
        assert_eq!(ring.take(PAGE), None, "in turn");
        ring.give_back(0);
        assert_eq!(ring.take(7 * PAGE), None);
        assert_eq!(ring.take(4 * PAGE), Some(0));
        assert_eq!(ring.take(2 * PAGE), Some(4 * PAGE));
        assert_eq!(ring.take(PAGE), None, "the last of the first round is there");
        ring.give_back(6 * PAGE);
        assert_eq!(ring.take(2 * PAGE), Some(6 * PAGE));
        for offset in [0, 4 * PAGE, 6 * PAGE] {
            ring.give_back(offset);
        }
        assert_eq!(ring.take(8 * PAGE), Some(0));
        assert_eq!(ring.take(9 * PAGE), None);
    }

    #[test]
    fn windows_that_are_in_use_stay() {
        let mapping = Arc::new(Mapping::anonymous(8 * WINDOW_BYTES).expect("memory"));
        let slice = |window: usize| {
            PageSlice::mapping(Arc::clone(&mapping), window * WINDOW_BYTES + PAGE, PAGE, None)
                .expect("inside")
        };
        let mut windows = Windows::new(domain(), 2);
        let first = windows.find(&slice(0)).expect("registered");
        assert_eq!(first.address, slice(0).place().expect("there").0.as_ptr() as u64);
        let again = windows.find(&slice(0)).expect("registered");
        assert_eq!((again.window, again.key), (first.window, first.key));
        for window in 1..5 {
            let found = windows.find(&slice(window)).expect("registered");
            windows.done(found.window);
        }
        assert_eq!(windows.known.len(), 2);
        assert_eq!(windows.find(&slice(0)).expect("registered").window, first.window, "it was used");
        (0..3).for_each(|_| windows.done(first.window));
        for window in 5..7 {
            windows.find(&slice(window)).expect("registered");
        }
        assert_ne!(windows.find(&slice(0)).expect("registered").window, first.window, "it was not");
    }
}
