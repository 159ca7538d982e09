//! What a volume consists of: its regions of memory, and how its pages are numbered over them.

use serde::{Deserialize, Serialize};

use crate::content::Sharing;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::page::{InstallUnit, PAGE_BYTES_U64, PageIndex, PageRange};

/// One region of the VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// What the VMM calls it (`ram`, `pc.ram`).
    pub name: String,
    /// Where the guest sees it, if it does.
    pub guest_address: Option<u64>,
    /// Length in bytes, a multiple of the install unit.
    pub length_bytes: u64,
    /// What is installed at once.
    pub unit: InstallUnit,
}

/// The memory of a VM, region by region. Sent to the destination and stored with the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The VM's name, for operators (`sg ls`, logs).
    pub vm: String,
    /// The regions, in the order in which their pages are numbered.
    pub regions: Vec<Region>,
    /// What the VMM at the destination must know to build the same VM: opaque to libsg.
    pub vm_config: Vec<u8>,
    /// With whom its pages are shared at intermediaries; `None` for nobody.
    pub sharing: Option<Sharing>,
}

impl Manifest {
    /// Checks every bound. Whoever receives a manifest calls this before anything else.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] naming what is out of bounds.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::Input, what));
        if self.vm.len() > limits::NAME_BYTES_MAX {
            return refuse(format!("the VM's name has more than {} bytes", limits::NAME_BYTES_MAX));
        }
        if self.vm_config.len() > limits::VM_CONFIG_BYTES_MAX {
            return refuse(format!(
                "the VM's configuration has more than {} bytes",
                limits::VM_CONFIG_BYTES_MAX
            ));
        }
        if self.sharing.as_ref().is_some_and(|sharing| sharing.domain.len() > limits::NAME_BYTES_MAX) {
            return refuse(format!("the domain's name has more than {} bytes", limits::NAME_BYTES_MAX));
        }
        if self.regions.is_empty() || self.regions.len() > limits::REGIONS_MAX {
            return refuse(format!("{} regions, not 1 to {}", self.regions.len(), limits::REGIONS_MAX));
        }
        let mut pages: u64 = 0;
        for region in &self.regions {
            if region.name.len() > limits::NAME_BYTES_MAX {
                return refuse(format!("a region's name has more than {} bytes", limits::NAME_BYTES_MAX));
            }
            if region.length_bytes == 0 || !region.length_bytes.is_multiple_of(region.unit.bytes() as u64) {
                return refuse(format!(
                    "region {:?} has {} bytes, not a multiple of {}",
                    region.name,
                    region.length_bytes,
                    region.unit.bytes()
                ));
            }
            pages = pages.saturating_add(region.length_bytes / PAGE_BYTES_U64);
        }
        if pages > limits::VOLUME_PAGES_MAX {
            return refuse(format!("{pages} pages, more than {}", limits::VOLUME_PAGES_MAX));
        }
        Ok(())
    }

    /// Pages of all regions together.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.regions.iter().map(|r| (r.length_bytes / PAGE_BYTES_U64) as u32).sum()
    }

    /// The regions with the number of their first page.
    pub fn placed_regions(&self) -> impl Iterator<Item = (PageIndex, &Region)> {
        let mut first = 0;
        self.regions.iter().map(move |region| {
            let start = PageIndex(first);
            first += (region.length_bytes / PAGE_BYTES_U64) as u32;
            (start, region)
        })
    }
}

/// Which pages of a VM are installed together, and lie in one region.
#[derive(Debug)]
pub struct Units {
    regions: Vec<(PageRange, InstallUnit)>,
}

impl Units {
    /// Those of a VM.
    #[must_use]
    pub fn new(manifest: &Manifest) -> Self {
        let regions = manifest.placed_regions().map(|(first, region)| {
            let pages = region.length_bytes / PAGE_BYTES_U64;
            (PageRange::new(first, pages as u32), region.unit)
        });
        Self { regions: regions.collect() }
    }

    fn region(&self, page: PageIndex) -> Option<&(PageRange, InstallUnit)> {
        let behind = self.regions.partition_point(|(range, _)| range.first <= page);
        let region = self.regions.get(behind.checked_sub(1)?)?;
        (page.0 - region.0.first.0 < region.0.pages).then_some(region)
    }

    /// The pages that are installed together with this one. `None` for a page that there is not.
    #[must_use]
    pub fn of(&self, page: PageIndex) -> Option<PageRange> {
        let (range, unit) = self.region(page)?;
        let into = (page.0 - range.first.0) % unit.pages();
        Some(PageRange::new(PageIndex(page.0 - into), unit.pages()))
    }

    /// Whether two pages lie in one region.
    #[must_use]
    pub fn same_region(&self, a: PageIndex, b: PageIndex) -> bool {
        self.region(a).is_some_and(|(range, _)| range.positions().contains(&b.as_usize()))
    }

    /// Memory that it takes.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.regions.capacity() * size_of::<(PageRange, InstallUnit)>()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn region(length_bytes: u64, unit: InstallUnit) -> Region {
        Region { name: "ram".into(), guest_address: Some(0), length_bytes, unit }
    }

    #[test]
    fn pages_are_numbered_over_all_regions() {
        let manifest = Manifest {
            vm: "vm".into(),
            regions: vec![region(8192, InstallUnit::Page), region(2 << 20, InstallUnit::Huge2M)],
            vm_config: Vec::new(),
            sharing: None,
        };
        manifest.check().expect("good");
        assert_eq!(manifest.pages(), 514);
        assert_eq!(manifest.placed_regions().map(|(first, _)| first.0).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn bounds_are_checked() {
        let with = |regions| Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None };
        assert!(with(vec![]).check().is_err());
        assert!(with(vec![region(4096, InstallUnit::Huge2M)]).check().is_err());
        assert!(with(vec![region(0, InstallUnit::Page)]).check().is_err());
        assert!(with(vec![region(1 << 60, InstallUnit::Page)]).check().is_err());
    }
}
