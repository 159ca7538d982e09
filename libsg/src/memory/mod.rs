//! Guest memory as libsg sees it: regions of page-aligned memory whose pages are numbered densely,
//! and which others (vCPUs, devices, other processes) may change at any time.
//!
//! [`GuestMemory`] is the whole memory of a VM, allocated here or borrowed from the VMM; cheap to
//! clone, unmapped with its last clone. [`Mapping`] is one contiguous piece of such memory, which an
//! intermediary's arena is too. Neither ever becomes a Rust slice: [`GuestSlice`] and [`SlotSlice`]
//! are pointer and length, and [`vectored`] sends from and receives into them without a copy.

mod mapping;
mod page_slice;
mod presence;
mod raw;
pub mod vectored;
#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use mapping::{BackingFile, Mapping};
pub(crate) use mapping::{Scan, ScannedRun, scan_pagemap};
pub use page_slice::PageSlice;
pub use presence::PresenceMap;
pub use raw::{GuestSlice, SlotSlice};

use crate::error::{Error, ErrorKind, Result};
use crate::ids::Checksum;
use crate::manifest::{Manifest, Region};
use crate::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};

/// What guest memory that libsg allocates consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory of 4 KiB pages.
    Anon,
    /// Shared memory behind a memfd, 4 KiB pages.
    Memfd,
    /// Shared memory behind a memfd of 2 MiB huge pages; every region's unit must be 2 MiB.
    Hugetlb2M,
}

/// One region of guest memory.
#[derive(Debug)]
pub struct MemoryRegion {
    /// What the VMM calls it.
    pub name: String,
    /// Where the guest sees it, if it does.
    pub guest_address: Option<u64>,
    /// What is installed at once.
    pub unit: InstallUnit,
    first: PageIndex,
    mapping: Mapping,
}

impl MemoryRegion {
    /// Its pages, in the numbering of the volume.
    #[must_use]
    pub fn pages(&self) -> PageRange {
        PageRange::new(self.first, (self.mapping.len() / PAGE_BYTES) as u32)
    }

    /// Its memory.
    #[must_use]
    pub const fn mapping(&self) -> &Mapping {
        &self.mapping
    }
}

/// The memory of a VM. Clones are the same memory, which is unmapped with the last of them.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Arc<[MemoryRegion]>,
}

impl GuestMemory {
    /// Memory of the shape that `manifest` says, all of it zero.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a manifest that does not hold up, or huge pages for a region with
    /// smaller units; [`ErrorKind::System`] when the kernel gives no memory.
    pub fn allocate(manifest: &Manifest, backing: Backing) -> Result<Self> {
        manifest.check()?;
        let map = |region: &Region| {
            let bytes = region.length_bytes as usize;
            // The kernel takes no zero byte in a memfd's name, and at most 249 others.
            let name: String = region.name.chars().filter(char::is_ascii_graphic).take(64).collect();
            match backing {
                Backing::Anon => Mapping::anonymous(bytes),
                Backing::Memfd => Mapping::memfd(&name, bytes),
                Backing::Hugetlb2M => Mapping::hugetlb(&name, bytes),
            }
        };
        let regions = manifest.regions.iter().map(|region| Ok((region.clone(), map(region)?)));
        Self::from_mappings(regions.collect::<Result<_>>()?)
    }

    /// Memory of mappings that exist, each with the region that it is.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when lengths or units do not agree, or bounds are crossed.
    pub fn from_mappings(parts: Vec<(Region, Mapping)>) -> Result<Self> {
        let (regions, mappings): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let manifest = Manifest { vm: String::new(), regions, vm_config: Vec::new(), sharing: None };
        manifest.check()?;
        let mut placed = Vec::with_capacity(mappings.len());
        for ((first, region), mapping) in manifest.placed_regions().zip(mappings) {
            if mapping.len() as u64 != region.length_bytes {
                return Err(Error::new(
                    ErrorKind::Input,
                    format!("region {:?} is mapped with {} bytes", region.name, mapping.len()),
                ));
            }
            if mapping.is_huge() && region.unit != InstallUnit::Huge2M {
                return Err(Error::new(
                    ErrorKind::Input,
                    format!("region {:?} has 4 KiB units: 2 MiB huge pages cannot back it", region.name),
                ));
            }
            placed.push(MemoryRegion {
                name: region.name.clone(),
                guest_address: region.guest_address,
                unit: region.unit,
                first,
                mapping,
            });
        }
        Ok(Self { regions: placed.into() })
    }

    /// A second mapping of the same memory. `None` when a region has no file behind it.
    ///
    /// It is no way around userfaultfd: what is written through it is there for the first at once.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses.
    pub fn again(&self) -> Result<Option<Self>> {
        let mut regions = Vec::with_capacity(self.regions.len());
        for region in &*self.regions {
            let Some(mapping) = region.mapping.again()? else { return Ok(None) };
            regions.push(MemoryRegion { name: region.name.clone(), mapping, ..*region });
        }
        Ok(Some(Self { regions: regions.into() }))
    }

    /// The manifest of this memory.
    #[must_use]
    pub fn manifest(&self, vm: impl Into<String>, vm_config: Vec<u8>) -> Manifest {
        let regions = self.regions.iter().map(|region| Region {
            name: region.name.clone(),
            guest_address: region.guest_address,
            length_bytes: region.mapping.len() as u64,
            unit: region.unit,
        });
        Manifest { vm: vm.into(), regions: regions.collect(), vm_config, sharing: None }
    }

    /// The regions, in the order of their pages.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Pages of all regions together.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.regions.last().map_or(0, |region| region.first.0 + region.pages().pages)
    }

    /// Where a page is mapped in this process. `None` for a page that there is not.
    #[must_use]
    pub fn host_address(&self, page: PageIndex) -> Option<*mut u8> {
        self.slot(PageRange::new(page, 1)).ok().map(SlotSlice::as_mut_ptr)
    }

    /// The page that is mapped at an address of this process.
    #[must_use]
    pub fn page_at(&self, host_address: usize) -> Option<PageIndex> {
        self.regions.iter().find_map(|region| {
            let offset = host_address.checked_sub(region.mapping.as_ptr().addr())?;
            (offset < region.mapping.len()).then(|| PageIndex(region.first.0 + (offset / PAGE_BYTES) as u32))
        })
    }

    /// The longest run from `first` on that lies in one region, of at most `pages_max` pages. `None`
    /// for a page that there is not, and for no pages.
    #[must_use]
    pub fn run(&self, first: PageIndex, pages_max: u32) -> Option<PageRange> {
        let region = self.region_of(first)?.pages();
        let left = region.first.0 + region.pages - first.0;
        (pages_max > 0).then(|| PageRange::new(first, left.min(pages_max)))
    }

    /// The pages that are installed together with `page`. `None` for a page that there is not.
    #[must_use]
    pub fn unit(&self, page: PageIndex) -> Option<PageRange> {
        let region = self.region_of(page)?;
        let pages = region.unit.pages();
        let into = (page.0 - region.first.0) % pages;
        Some(PageRange::new(PageIndex(page.0 - into), pages))
    }

    /// A run of pages, for reading: to be sent by [`vectored::send`], checked, copied out.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for pages that there are not, or a run that leaves its region.
    pub fn slice(&self, range: PageRange) -> Result<GuestSlice<'_>> {
        self.slot(range).map(SlotSlice::readable)
    }

    /// A run of pages, for writing: to be received into by [`vectored::recv`], copied in.
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn slot(&self, range: PageRange) -> Result<SlotSlice<'_>> {
        let find = || {
            let region = self.region_of(range.first)?;
            let offset = (range.first.0 - region.first.0) as usize * PAGE_BYTES;
            region.mapping.slot(offset, range.pages as usize * PAGE_BYTES)
        };
        find().ok_or_else(|| outside(range))
    }

    /// Copies a run of pages out.
    ///
    /// # Errors
    /// As [`Self::slice`], and [`ErrorKind::Input`] for a buffer of another length.
    pub fn copy_out(&self, range: PageRange, to: &mut [u8]) -> Result<()> {
        let slice = self.slice(range)?;
        same_length(slice.len(), to.len(), range)?;
        slice.copy_to(to);
        Ok(())
    }

    /// Copies a run of pages in.
    ///
    /// # Errors
    /// As [`Self::copy_out`].
    pub fn copy_in(&self, range: PageRange, from: &[u8]) -> Result<()> {
        let slot = self.slot(range)?;
        same_length(slot.len(), from.len(), range)?;
        slot.copy_from(from);
        Ok(())
    }

    /// Writes a run of pages to the file behind it, not through the mapping: no page is mapped by it, and where the kernel
    /// has no memory it is an error.
    pub(crate) fn write_file(&self, range: PageRange, from: &[u8]) -> std::io::Result<()> {
        let region = self.region_of(range.first).filter(|_| from.len() == range.pages as usize * PAGE_BYTES);
        let region = region.ok_or(std::io::ErrorKind::InvalidInput)?;
        let offset = (range.first.0 - region.first.0) as usize * PAGE_BYTES;
        region.mapping.write_file(offset, from)
    }

    /// Whether a page is zero. Allocates a page that is absent: ask [`Self::presence`] first.
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn is_zero(&self, page: PageIndex) -> Result<bool> {
        Ok(self.slice(PageRange::new(page, 1))?.is_zero())
    }

    /// A page's checksum, as it is now.
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn checksum(&self, page: PageIndex) -> Result<Checksum> {
        Ok(self.slice(PageRange::new(page, 1))?.checksum())
    }

    /// Which pages have memory, in core or in swap. All others are zero. Reads no page.
    ///
    /// Where the kernel has no list of runs (private memory before 6.7), 8 bytes a page are read
    /// from `/proc/self/pagemap`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel does not tell.
    pub fn presence(&self) -> Result<PresenceMap> {
        let mut map = PresenceMap::new(self.pages());
        for region in &*self.regions {
            presence::scan(&region.mapping, region.first, &mut map)?;
        }
        Ok(map)
    }

    /// Gives pages back to the kernel: they read as zero afterwards, and are absent.
    ///
    /// # Errors
    /// As [`Self::slice`]; [`ErrorKind::System`] when the kernel refuses.
    pub fn release(&self, range: PageRange) -> Result<()> {
        let region = self.region_of(range.first).ok_or_else(|| outside(range))?;
        let offset = (range.first.0 - region.first.0) as usize * PAGE_BYTES;
        region.mapping.release(offset, range.pages as usize * PAGE_BYTES)
    }

    /// Forgets everything: every page is missing afterwards, not only zero.
    pub(crate) fn empty(&self) -> Result<()> {
        for region in &*self.regions {
            let mut map = PresenceMap::new(self.pages());
            if region.mapping.is_huge() {
                presence::scan(&region.mapping, region.first, &mut map)?;
            }
            region.mapping.empty(map.runs().map(|run| {
                ((run.first.0 - region.first.0) as usize * PAGE_BYTES, run.pages as usize * PAGE_BYTES)
            }))?;
        }
        Ok(())
    }

    /// Lets nobody touch pages any more: see [`Mapping::forbid`].
    pub(crate) fn forbid(&self, range: PageRange) -> Result<()> {
        let region = self.region_of(range.first).ok_or_else(|| outside(range))?;
        let offset = (range.first.0 - region.first.0) as usize * PAGE_BYTES;
        region.mapping.forbid(offset, range.pages as usize * PAGE_BYTES)
    }

    /// Leaves all of it out of core dumps.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel refuses.
    pub fn exclude_from_dumps(&self) -> Result<()> {
        self.regions.iter().try_for_each(|region| region.mapping.exclude_from_dumps())
    }

    /// The files behind the regions, and where in them each begins; for handing them to another
    /// process.
    pub fn files(&self) -> impl Iterator<Item = Option<(BorrowedFd<'_>, u64)>> {
        self.regions.iter().map(|region| region.mapping.file())
    }

    fn region_of(&self, page: PageIndex) -> Option<&MemoryRegion> {
        let after = self.regions.partition_point(|region| region.first <= page);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (page.0 - region.first.0 < region.pages().pages).then_some(region)
    }
}

fn outside(range: PageRange) -> Error {
    Error::new(ErrorKind::Input, "no such pages in one region of the memory").about([range])
}

fn same_length(pages: usize, buffer: usize, range: PageRange) -> Result<()> {
    if pages == buffer {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Input, format!("a buffer of {buffer} bytes for {pages}")).about([range]))
}

#[cfg(test)]
pub(crate) mod test;
