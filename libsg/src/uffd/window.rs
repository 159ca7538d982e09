//! Where the regions of a memory lie.

use crate::error::{Error, ErrorKind, Result};
use crate::memory::MemoryRegion;
use crate::page::{InstallUnit, PAGE_BYTES, PageIndex};

/// Where a region lies in the process whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Address of its first byte in that process.
    pub address: u64,
    /// Number of its first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u32,
    /// What is installed at once.
    pub unit: InstallUnit,
    /// Whether it is hugetlb memory, which has no page of zeros to share.
    pub huge: bool,
}

impl Window {
    pub(super) fn of(region: &MemoryRegion) -> Self {
        Self {
            address: region.mapping().as_ptr().addr() as u64,
            first: region.pages().first,
            pages: region.pages().pages,
            unit: region.unit,
            huge: region.mapping().is_huge(),
        }
    }

    pub(super) const fn bytes(&self) -> usize {
        self.pages as usize * PAGE_BYTES
    }

    pub(super) const fn end(&self) -> u64 {
        self.address + self.bytes() as u64
    }

    /// Pages that the kernel installs at once.
    pub(super) const fn kernel_unit(&self) -> InstallUnit {
        if self.huge { InstallUnit::Huge2M } else { InstallUnit::Page }
    }
}

/// Whether windows, sorted by page, are aligned and apart.
pub(super) fn check(windows: &[Window]) -> Result<()> {
    let refuse = |what| Err(Error::new(ErrorKind::Input, what));
    let mut by_address: Vec<&Window> = windows.iter().collect();
    by_address.sort_by_key(|window| window.address);
    for window in windows {
        let unit = window.kernel_unit();
        let bytes = unit.bytes() as u64;
        if window.pages == 0
            || !window.pages.is_multiple_of(window.unit.pages())
            || !window.address.is_multiple_of(bytes)
            || window.unit.pages() < unit.pages()
            || window.first.checked_add(window.pages).is_none()
            || window.address.checked_add(window.bytes() as u64).is_none()
        {
            return refuse("a region is empty, too long, or not aligned to its pages");
        }
    }
    if windows.windows(2).any(|pair| pair[0].first.0 + pair[0].pages > pair[1].first.0)
        || by_address.windows(2).any(|pair| pair[0].end() > pair[1].address)
    {
        return refuse("regions overlap");
    }
    Ok(())
}
