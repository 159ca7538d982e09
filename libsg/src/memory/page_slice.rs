//! A run of bytes that a queue may keep: guest memory, an intermediary's slots or an owned buffer,
//! kept alive by the value itself.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::vectored::IoPart;
use super::{GuestMemory, Mapping};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Checksum;
use crate::page::{PAGE_BYTES, PageRange};

/// Contiguous bytes, usually a run of pages, with what keeps them mapped. A clone is the same bytes.
///
/// It says where bytes lie, not that they stay what they are: whoever makes one sees to it that
/// nobody changes them until the last clone is gone (a paused VM, a pinned slot).
#[derive(Clone)]
pub struct PageSlice {
    owner: Owner,
    offset: usize,
    bytes: usize,
}

#[derive(Clone)]
enum Owner {
    Guest { memory: GuestMemory, region: usize, _pin: Option<Arc<dyn Any + Send + Sync>> },
    Mapping { mapping: Arc<Mapping>, _pin: Option<Arc<dyn Any + Send + Sync>> },
    Bytes(Arc<[u8]>),
}

impl PageSlice {
    /// Pages of a VM's memory, which lie in one region.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for pages that there are not, or a run that leaves its region.
    pub fn guest(memory: &GuestMemory, range: PageRange) -> Result<Self> {
        let bytes = memory.slice(range)?.len();
        let region = memory.regions().partition_point(|region| region.pages().first <= range.first);
        let region = region.checked_sub(1).ok_or_else(|| outside(range.pages as usize * PAGE_BYTES))?;
        let first = memory.regions()[region].pages().first;
        let offset = (range.first.0 - first.0) as usize * PAGE_BYTES;
        Ok(Self { owner: Owner::Guest { memory: memory.clone(), region, _pin: None }, offset, bytes })
    }

    /// Pages of a VM's memory, as [`Self::guest`] gives them, with a `pin` that lives as long as the last clone of the slice:
    /// whoever holds the other end gives the memory back only when it has gone.
    ///
    /// # Errors
    /// As [`Self::guest`].
    pub fn guest_pinned(
        memory: &GuestMemory,
        range: PageRange,
        pin: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let mut slice = Self::guest(memory, range)?;
        if let Owner::Guest { _pin, .. } = &mut slice.owner {
            *_pin = Some(pin);
        }
        Ok(slice)
    }

    /// Part of a mapping. `pin` lives as long as the last clone of the slice: an intermediary's
    /// guard that keeps slots from being given to somebody else while they wait in a queue.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for bytes outside of the mapping.
    pub fn mapping(
        mapping: Arc<Mapping>,
        offset: usize,
        bytes: usize,
        pin: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        mapping.slice(offset, bytes).ok_or_else(|| outside(bytes))?;
        Ok(Self { owner: Owner::Mapping { mapping, _pin: pin }, offset, bytes })
    }

    /// All of an owned buffer.
    #[must_use]
    pub fn owned(bytes: Arc<[u8]>) -> Self {
        let length = bytes.len();
        Self { owner: Owner::Bytes(bytes), offset: 0, bytes: length }
    }

    /// `bytes` bytes of it from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for bytes outside of the slice.
    pub fn part(&self, offset: usize, bytes: usize) -> Result<Self> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(outside(bytes));
        }
        Ok(Self { owner: self.owner.clone(), offset: self.offset + offset, bytes })
    }

    /// What of the same memory lies around it, from one multiple of `unit_bytes` in it to another: what is registered with a
    /// device at once. Of an owned buffer it is all. Guest memory that is pinned is so no more by this: what lies around is not
    /// the slice's.
    #[must_use]
    pub fn widened(&self, unit_bytes: usize) -> Self {
        let all = match &self.owner {
            Owner::Guest { memory, region, .. } => memory.regions()[*region].mapping().len(),
            Owner::Mapping { mapping, .. } => mapping.len(),
            Owner::Bytes(bytes) => {
                return Self { owner: self.owner.clone(), offset: 0, bytes: bytes.len() };
            }
        };
        let offset = self.offset - self.offset % unit_bytes.max(1);
        let end = (self.offset + self.bytes).next_multiple_of(unit_bytes.max(1)).min(all);
        let mut owner = self.owner.clone();
        if let Owner::Guest { _pin, .. } = &mut owner {
            *_pin = None;
        }
        Self { owner, offset, bytes: end - offset }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes, for [`super::vectored::send`].
    ///
    /// # Panics
    /// Never: the bounds were checked when the slice was made, and mappings do not change.
    #[must_use]
    pub fn io(&self) -> IoPart<'_> {
        let slice = match &self.owner {
            Owner::Guest { memory, region, .. } => {
                memory.regions()[*region].mapping().slice(self.offset, self.bytes)
            }
            Owner::Mapping { mapping, .. } => mapping.slice(self.offset, self.bytes),
            Owner::Bytes(bytes) => return IoPart::Bytes(&bytes[self.offset..self.offset + self.bytes]),
        };
        IoPart::Guest(slice.expect("the bounds were checked when the slice was made"))
    }

    /// Whether the `page`-th page of it is all zero; no page is.
    #[must_use]
    pub fn is_zero_page(&self, page: usize) -> bool {
        match self.page(page) {
            IoPart::Bytes(bytes) => bytes.iter().all(|byte| *byte == 0),
            IoPart::Guest(slice) => slice.is_zero(),
        }
    }

    /// The checksum of the `page`-th page of it.
    ///
    /// # Panics
    /// There is no such page in it.
    #[must_use]
    pub fn page_checksum(&self, page: usize) -> Checksum {
        match self.io() {
            IoPart::Bytes(bytes) => Checksum::of(&bytes[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]),
            IoPart::Guest(slice) => slice.page_checksum(page),
        }
    }

    fn page(&self, page: usize) -> IoPart<'_> {
        match self.io() {
            IoPart::Bytes(bytes) => {
                let start = bytes.len().min(page * PAGE_BYTES);
                IoPart::Bytes(&bytes[start..bytes.len().min(start + PAGE_BYTES)])
            }
            IoPart::Guest(slice) => IoPart::Guest(slice.skip(page * PAGE_BYTES).take(PAGE_BYTES)),
        }
    }

    /// Copies the bytes out.
    ///
    /// # Panics
    /// When `to` has another length.
    pub fn copy_to(&self, to: &mut [u8]) {
        match self.io() {
            IoPart::Bytes(bytes) => to.copy_from_slice(bytes),
            IoPart::Guest(slice) => slice.copy_to(to),
        }
    }
}

impl fmt::Debug for PageSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.owner {
            Owner::Guest { .. } => "guest memory",
            Owner::Mapping { .. } => "mapped memory",
            Owner::Bytes(_) => "a buffer",
        };
        write!(f, "{} bytes of {what}", self.bytes)
    }
}

fn outside(bytes: usize) -> Error {
    Error::new(ErrorKind::Input, format!("{bytes} bytes are not inside of the memory"))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::manifest::{Manifest, Region};
    use crate::memory::Backing;
    use crate::page::{InstallUnit, PageIndex};

    #[test]
    fn slices_show_their_bytes_and_keep_them() {
        let region = |name: &str| Region {
            name: name.into(),
            guest_address: None,
            length_bytes: 4 * PAGE_BYTES as u64,
            unit: InstallUnit::Page,
        };
        let manifest = Manifest {
            vm: "vm".into(),
            regions: vec![region("a"), region("b")],
            vm_config: vec![],
            sharing: None,
        };
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).expect("memory");
        let range = PageRange::new(PageIndex(5), 2);
        memory.copy_in(range, &[9; 2 * PAGE_BYTES]).expect("inside");
        let slice = PageSlice::guest(&memory, range).expect("inside");
        assert!(PageSlice::guest(&memory, PageRange::new(PageIndex(3), 2)).is_err());
        drop(memory);
        let mut out = vec![0; 2 * PAGE_BYTES];
        slice.copy_to(&mut out);
        assert!(out.iter().all(|byte| *byte == 9));
        assert!(slice.part(PAGE_BYTES, PAGE_BYTES + 1).is_err());
        let tail = slice.part(PAGE_BYTES, 16).expect("inside");
        let mut out = [0; 16];
        tail.copy_to(&mut out);
        assert_eq!(out, [9; 16]);
    }

    #[test]
    fn a_slice_is_widened_within_its_memory() {
        let mapping = Arc::new(Mapping::anonymous(5 * PAGE_BYTES).expect("memory"));
        let unit = 2 * PAGE_BYTES;
        let widened = |offset, bytes| {
            let slice = PageSlice::mapping(mapping.clone(), offset, bytes, None).expect("inside");
            let wide = slice.widened(unit);
            (wide.offset, wide.bytes)
        };
        assert_eq!(widened(PAGE_BYTES, 1), (0, unit));
        assert_eq!(widened(PAGE_BYTES, unit), (0, 2 * unit));
        assert_eq!(widened(4 * PAGE_BYTES, PAGE_BYTES), (2 * unit, PAGE_BYTES));
        assert_eq!(PageSlice::owned([0; 9].into()).part(3, 1).expect("inside").widened(4).len(), 9);
    }

    #[test]
    fn a_pin_lives_as_long_as_the_last_clone() {
        let mapping = Arc::new(Mapping::anonymous(PAGE_BYTES).expect("memory"));
        let pin = Arc::new(());
        let slice = PageSlice::mapping(mapping, 0, PAGE_BYTES, Some(pin.clone())).expect("inside");
        let part = slice.part(8, 8).expect("inside");
        drop(slice);
        assert_eq!(Arc::strong_count(&pin), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&pin), 1);

        let region =
            Region { name: "a".into(), guest_address: None, length_bytes: 4096, unit: InstallUnit::Page };
        let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: vec![], sharing: None };
        let memory = GuestMemory::allocate(&manifest, Backing::Anon).expect("memory");
        let range = PageRange::new(PageIndex(0), 1);
        let slice = PageSlice::guest_pinned(&memory, range, pin.clone()).expect("inside");
        let (part, around) = (slice.part(8, 8).expect("inside"), slice.widened(PAGE_BYTES));
        drop(slice);
        assert_eq!(Arc::strong_count(&pin), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&pin), 1, "{around:?} is registered, and pins nothing");
    }
}
