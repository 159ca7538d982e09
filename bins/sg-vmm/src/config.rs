//! What a VM is made of. Travels in the manifest, so that the destination builds the same VM.

use clap::ValueEnum;
use libsg::manifest::{Manifest, Region};
use libsg::page::{InstallUnit, PAGE_BYTES_U64};
use libsg::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::page_format::PageFormat;

/// 2 MiB: the guest's own page tables map its memory in such pieces.
pub const HUGE_BYTES: u64 = 2 << 20;
/// What one entry of the guest's top page table maps.
const MEMORY_BYTES_MAX: u64 = 512 << 30;
/// vCPUs that a VM may have.
const VCPUS_MAX: u16 = 64;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Nothing but a heartbeat every 10 ms
    Idle,
    /// Checks and writes page after page
    Sequential,
    /// Checks and writes random pages
    Random,
    /// Checks random pages, writes none
    Reader,
}

/// How a vCPU is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VcpuKind {
    /// By KVM.
    Kvm,
    /// By a host thread that does natively what the guest's code does.
    Thread,
}

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackingKind {
    /// Anonymous private memory
    Anon,
    /// A memfd, shared mapping
    Memfd,
    /// 2 MiB hugetlb pages (needs /proc/sys/vm/nr_hugepages)
    Hugetlb,
}

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    /// The VM's name, for operators.
    pub name: String,
    /// Guest memory, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// What the memory is made of.
    pub backing: BackingKind,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// How they are run.
    pub vcpu: VcpuKind,
    /// What they do.
    pub workload: Workload,
    /// Operations of all vCPUs together in a second; 0 = as many as they can.
    pub write_rate: u64,
    /// Bytes that the workload touches; 0 = all.
    pub working_set_bytes: u64,
    /// Fraction of pages that are zero at the start.
    pub zero_fraction: f64,
    /// Fraction of pages whose content every VM has alike.
    pub common: f64,
    /// What the content of the others comes from.
    pub seed: u64,
}

impl VmConfig {
    /// Checks every bound; call it on what came from outside.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] naming what is out of bounds.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::Input, what));
        let memory = self.memory_bytes;
        if memory == 0 || !memory.is_multiple_of(HUGE_BYTES) || memory > MEMORY_BYTES_MAX {
            return refuse(format!("{memory} bytes of memory: not a multiple of 2M, or more than 512G"));
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return refuse(format!("{} vCPUs, not 1 to {VCPUS_MAX}", self.vcpus));
        }
        let fractions = [self.zero_fraction, self.common];
        if fractions.iter().any(|f| !(0.0..=1.0).contains(f)) || fractions.iter().sum::<f64>() > 1.0 {
            return refuse("zero fraction and common fraction must each, and together, be 0 to 1".into());
        }
        if self.name.len() > libsg::limits::NAME_BYTES_MAX {
            return refuse("the VM's name is too long".into());
        }
        let layout = Layout::of(self);
        if layout.workload_pages() < u64::from(self.vcpus) {
            return refuse("fewer pages than vCPUs".into());
        }
        Ok(())
    }

    /// What libsg has to know of the VM: its memory; the rest of `self` travels inside, opaque.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the configuration is out of bounds.
    pub fn manifest(&self) -> Result<Manifest> {
        self.check()?;
        let unit = match self.backing {
            BackingKind::Hugetlb => InstallUnit::Huge2M,
            BackingKind::Anon | BackingKind::Memfd => InstallUnit::Page,
        };
        let length_bytes = self.memory_bytes;
        let region = Region { name: "ram".into(), guest_address: Some(0), length_bytes, unit };
        let vm_config = postcard::to_stdvec(self)
            .map_err(|e| Error::new(ErrorKind::Input, "the configuration cannot be encoded").because(e))?;
        Ok(Manifest { vm: self.name.clone(), regions: vec![region], vm_config, sharing: None })
    }

    /// The VM that a manifest of [`Self::manifest`] describes.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when it is not such a manifest, or out of bounds.
    pub fn from_manifest(manifest: &Manifest) -> Result<Self> {
        manifest.check()?;
        let config: Self = postcard::from_bytes(&manifest.vm_config)
            .map_err(|e| Error::new(ErrorKind::Input, "the manifest is not one of an sg-vmm").because(e))?;
        if config.manifest()?.regions != manifest.regions {
            return Err(Error::new(ErrorKind::Input, "the manifest's regions are not those of its VM"));
        }
        Ok(config)
    }

    /// Which pages hold what at the start.
    #[must_use]
    pub fn format(&self) -> PageFormat {
        PageFormat::new(self.seed, self.zero_fraction, self.common)
    }
}

/// Which page of guest memory is what. Guest addresses start at 0, without a hole.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// All pages.
    pub pages: u64,
    /// The page of the guest's code.
    pub code: u64,
    /// First page of the page tables: top, then 512 GiB level, then one page for each GiB.
    pub tables: u64,
    /// Number of those last ones.
    pub directories: u64,
    /// First page of the shadow table: 32 bits for each page of the VM.
    pub shadow: u64,
    /// First page of the workload; everything up to the end is the workload's.
    pub workload: u64,
    /// Pages that operations touch, from `workload` on.
    pub working_set: u64,
    /// Number of vCPUs: page `workload + i` belongs to vCPU `i % vcpus`.
    pub vcpus: u64,
}

impl Layout {
    /// The layout of a VM.
    #[must_use]
    pub fn of(config: &VmConfig) -> Self {
        let pages = config.memory_bytes / PAGE_BYTES_U64;
        let (code, tables) = (1, 2);
        let directories = config.memory_bytes.div_ceil(1 << 30);
        let shadow = tables + 2 + directories;
        let workload = shadow + (pages * 4).div_ceil(PAGE_BYTES_U64);
        let vcpus = u64::from(config.vcpus);
        let all = pages.saturating_sub(workload);
        let working_set = match config.working_set_bytes.div_ceil(PAGE_BYTES_U64) {
            0 => all,
            some => some.clamp(vcpus.min(all), all),
        };
        Self { pages, code, tables, directories, shadow, workload, working_set, vcpus }
    }

    /// Pages that carry index, version and checksum.
    #[must_use]
    pub fn workload_pages(&self) -> u64 {
        self.pages.saturating_sub(self.workload)
    }

    /// How many of the first `pages` workload pages belong to a vCPU.
    #[must_use]
    pub fn owned(&self, vcpu: u64, pages: u64) -> u64 {
        pages.saturating_sub(vcpu).div_ceil(self.vcpus)
    }

    /// Byte offset of a page's shadow entry.
    #[must_use]
    pub fn shadow_offset(&self, page: u64) -> u64 {
        self.shadow * PAGE_BYTES_U64 + page * 4
    }
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod test {
    use super::*;

    /// A small VM for tests.
    pub fn small(vcpu: VcpuKind) -> VmConfig {
        VmConfig {
            name: "test".into(),
            memory_bytes: HUGE_BYTES,
            backing: BackingKind::Anon,
            vcpus: 2,
            vcpu,
            workload: Workload::Random,
            write_rate: 0,
            working_set_bytes: 0,
            zero_fraction: 0.1,
            common: 0.1,
            seed: 42,
        }
    }

    #[test]
    fn each_workload_page_belongs_to_one_vcpu() {
        for vcpus in [1, 2, 3, 7] {
            let config = VmConfig { vcpus, ..small(VcpuKind::Thread) };
            config.check().expect("good");
            let layout = Layout::of(&config);
            let owned = (0..layout.vcpus).map(|v| layout.owned(v, layout.workload_pages()));
            assert_eq!(owned.sum::<u64>(), layout.workload_pages());
        }
    }

    #[test]
    fn bounds_are_checked() {
        let good = small(VcpuKind::Thread);
        for bad in [
            VmConfig { memory_bytes: HUGE_BYTES + 4096, ..good.clone() },
            VmConfig { memory_bytes: 1 << 60, ..good.clone() },
            VmConfig { vcpus: 0, ..good.clone() },
            VmConfig { zero_fraction: 0.6, common: 0.6, ..good.clone() },
            VmConfig { zero_fraction: f64::NAN, ..good.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_manifest_rebuilds_the_vm() {
        let config = VmConfig { backing: BackingKind::Hugetlb, common: 0.3, ..small(VcpuKind::Kvm) };
        let manifest = config.manifest().expect("manifest");
        assert_eq!(VmConfig::from_manifest(&manifest).expect("a VM"), config);
        let mut other = manifest.clone();
        other.regions[0].length_bytes *= 2;
        assert!(VmConfig::from_manifest(&other).is_err());
        let mut other = manifest;
        other.vm_config.truncate(9);
        assert!(VmConfig::from_manifest(&other).is_err());
    }

    #[test]
    fn the_working_set_gives_every_vcpu_a_page() {
        let layout = Layout::of(&VmConfig { working_set_bytes: 1, ..small(VcpuKind::Thread) });
        assert_eq!(layout.working_set, 2);
        assert_eq!(layout.owned(1, layout.working_set), 1);
    }
}
