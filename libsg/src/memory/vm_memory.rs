//! Guest memory that a VMM holds as `vm_memory::GuestMemoryMmap`.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion};

use super::{BackingFile, GuestMemory, Mapping};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Region;
use crate::page::InstallUnit;

impl GuestMemory {
    /// The memory of a VMM that uses `vm-memory`, regions named `ram0`, `ram1` and so on. It stays
    /// mapped as long as this value or a clone of it lives.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a region that is not a whole number of its pages;
    /// [`ErrorKind::System`] when a file descriptor cannot be duplicated.
    pub fn from_vm_memory<B: Bitmap + Send + Sync + 'static>(memory: &GuestMemoryMmap<B>) -> Result<Self> {
        let mut parts = Vec::new();
        for (number, region) in vm_memory::GuestMemoryBackend::iter(memory).enumerate() {
            let mapped = region.get_mmap();
            let huge = mapped.is_hugetlbfs().unwrap_or(false);
            let file = match mapped.file_offset() {
                None => None,
                Some(file) => Some(BackingFile { fd: file.file().try_clone()?.into(), offset: file.start() }),
            };
            let start = NonNull::new(mapped.as_ptr())
                .ok_or_else(|| Error::new(ErrorKind::Input, "a region is mapped at address zero"))?;
            let bytes = mapped.size();
            // SAFETY: `mapped` keeps the region mapped, goes into the mapping, and gives out volatile
            // accesses only.
            let mapping = unsafe { Mapping::borrowed(start, bytes, huge, file, Box::new(mapped)) }?;
            let region = Region {
                name: format!("ram{number}"),
                guest_address: Some(region.start_addr().0),
                length_bytes: bytes as u64,
                unit: if huge { InstallUnit::Huge2M } else { InstallUnit::Page },
            };
            parts.push((region, mapping));
        }
        Self::from_mappings(parts)
    }
}
