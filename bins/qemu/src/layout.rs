//! A QEMU's blocks of memory as the regions of a volume, and what else a destination must know before the memory comes.

use libsg::manifest::{Manifest, Region};
use libsg::page::{InstallUnit, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::{Error, ErrorKind, Result};
use qemu_stream::{Block, BlockIndex, Blocks, Configuration, Span};
use serde::{Deserialize, Serialize};

use crate::machine::Devices;

/// Blocks, and where their pages are in the numbering of the volume.
#[derive(Clone, Debug)]
pub struct Layout {
    blocks: Blocks,
    /// The number of each block's first page, and of the page behind the last.
    firsts: Vec<u32>,
}

/// What a manifest says of a QEMU beside its memory.
#[derive(Debug, Serialize, Deserialize)]
struct Described {
    machine: String,
    uuid: Option<[u8; 16]>,
    /// The number by which the memory's sections go.
    section: u32,
    devices: Devices,
}

impl Described {
    fn of(manifest: &Manifest) -> Result<Self> {
        serde_json::from_slice(&manifest.vm_config).map_err(|cause| unusable().because(cause))
    }
}

/// The devices that a manifest tells of.
///
/// # Errors
/// As [`Layout::of`].
pub(crate) fn devices(manifest: &Manifest) -> Result<Devices> {
    Ok(Described::of(manifest)?.devices)
}

impl Layout {
    /// Of these blocks, in their order. There are no more pages of them than can be numbered: [`Blocks`] has none with more.
    #[must_use]
    pub fn new(blocks: Blocks) -> Self {
        let mut firsts = vec![0];
        for (_, block) in blocks.iter() {
            let first = firsts.last().copied().unwrap_or(0);
            firsts.push(first + (block.length_bytes / PAGE_BYTES_U64) as u32);
        }
        Self { blocks, firsts }
    }

    /// The blocks.
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Pages of all of them.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.firsts.last().copied().unwrap_or(0)
    }

    /// The number of a page; of the block's first where there is no such block.
    #[must_use]
    pub fn page(&self, block: BlockIndex, offset_bytes: u64) -> PageIndex {
        let first = self.firsts.get(usize::from(block.0)).copied().unwrap_or(0);
        PageIndex(first + (offset_bytes / PAGE_BYTES_U64) as u32)
    }

    /// Where a page is. `None` for one that there is not.
    #[must_use]
    pub fn place(&self, page: PageIndex) -> Option<(BlockIndex, u64)> {
        if page.0 >= self.pages() {
            return None;
        }
        let at = self.firsts.partition_point(|first| *first <= page.0) - 1;
        Some((BlockIndex(at as u16), u64::from(page.0 - self.firsts[at]) * PAGE_BYTES_U64))
    }

    /// The pages that come together with one, which are one of QEMU's. `None` for one that there is not.
    #[must_use]
    pub fn unit(&self, page: PageIndex) -> Option<(BlockIndex, Span)> {
        let (block, offset) = self.place(page)?;
        let length_bytes = self.blocks.get(block)?.page_bytes;
        Some((block, Span { start_bytes: offset - offset % length_bytes, length_bytes }))
    }

    /// The numbers of pages of a block.
    #[must_use]
    pub fn range(&self, block: BlockIndex, span: Span) -> PageRange {
        PageRange::new(self.page(block, span.start_bytes), (span.length_bytes / PAGE_BYTES_U64) as u32)
    }

    /// The manifest of a VM of this memory, called `vm`.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for pages that libsg does not know, naming the block.
    pub fn manifest(
        &self,
        vm: &str,
        (configuration, section): (&Configuration, u32),
        devices: &Devices,
    ) -> Result<Manifest> {
        let region = |(_, block): (BlockIndex, &Block)| {
            let unit = match block.page_bytes {
                bytes if bytes == InstallUnit::Page.bytes() as u64 => InstallUnit::Page,
                bytes if bytes == InstallUnit::Huge2M.bytes() as u64 => InstallUnit::Huge2M,
                bytes => {
                    let what = format!("the memory {:?} has pages of {} MiB", block.name, bytes >> 20);
                    return Err(Error::new(
                        ErrorKind::Input,
                        format!("{what}: only 4 KiB and 2 MiB can move"),
                    ));
                }
            };
            Ok(Region {
                name: block.name.clone(),
                guest_address: None,
                length_bytes: block.length_bytes,
                unit,
            })
        };
        let described = Described {
            machine: configuration.machine.clone(),
            uuid: configuration.uuid,
            section,
            devices: devices.clone(),
        };
        let vm_config = serde_json::to_vec(&described).map_err(|cause| unusable().because(cause))?;
        let regions = self.blocks.iter().map(region).collect::<Result<_>>()?;
        let manifest = Manifest { vm: vm.into(), regions, vm_config, sharing: None };
        manifest.check()?;
        Ok(manifest)
    }

    /// What a manifest says, as who offers a VM has sent it.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when it is not of a QEMU, or of one that there cannot be.
    pub fn of(manifest: &Manifest) -> Result<(Self, Configuration, u32)> {
        let described = Described::of(manifest)?;
        let block = |region: &Region| Block {
            page_bytes: region.unit.bytes() as u64,
            ..Block::new(&region.name, region.length_bytes)
        };
        let blocks = Blocks::new(manifest.regions.iter().map(block).collect());
        let blocks = blocks.map_err(|cause| unusable().because(cause))?;
        let configuration = Configuration { uuid: described.uuid, ..Configuration::new(&described.machine) };
        Ok((Self::new(blocks), configuration, described.section))
    }
}

fn unusable() -> Error {
    Error::new(ErrorKind::Input, "what is offered is not a VM of a QEMU")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn blocks_are_regions_and_back() {
        let huge = Block { page_bytes: 2 << 20, ..Block::new("ram-node0", 4 << 20) };
        let blocks = Blocks::new(vec![Block::new("pc.bios", 8192), huge, Block::new("pc.rom", 4096)]);
        let layout = Layout::new(blocks.expect("blocks"));
        assert_eq!(layout.pages(), 2 + 1024 + 1);
        for page in [0, 1, 2, 3, 1025, 1026].map(PageIndex) {
            let (block, offset) = layout.place(page).expect("a page");
            assert_eq!(layout.page(block, offset), page);
        }
        assert_eq!(layout.place(PageIndex(1025)), Some((BlockIndex(1), 1023 << 12)));
        assert_eq!(layout.place(PageIndex(1027)), None);

        let configuration = Configuration { uuid: Some([7; 16]), ..Configuration::new("pc-q35-7.2") };
        let manifest = layout.manifest("web", (&configuration, 2), &Devices::default()).expect("a manifest");
        assert_eq!(manifest.pages(), layout.pages());
        let (back, said, section) = Layout::of(&manifest).expect("of a QEMU");
        assert_eq!((back.blocks(), said, section), (layout.blocks(), configuration, 2));
        let other = Manifest { vm_config: b"{}".to_vec(), ..manifest };
        assert_eq!(Layout::of(&other).expect_err("of no QEMU").kind, ErrorKind::Input);
    }

    /// As many as can be numbered, and one more, as a peer may offer them.
    #[test]
    fn more_pages_than_can_be_numbered_are_refused() {
        let most = u64::from(u32::MAX);
        for (pages, is_taken) in [([1, most - 1], true), ([1, most], false), ([most, 1], false)] {
            let [one, other] = pages.map(|pages| pages * PAGE_BYTES_U64);
            let few = Layout::new(Blocks::new(vec![Block::new("a", 4096)]).expect("blocks"));
            let of = Configuration::new("pc");
            let mut manifest = few.manifest("web", (&of, 2), &Devices::default()).expect("a manifest");
            let region = |name: &str, length_bytes| Region {
                name: name.into(),
                guest_address: None,
                length_bytes,
                unit: InstallUnit::Page,
            };
            manifest.regions = vec![region("a", one), region("b", other)];
            match Layout::of(&manifest) {
                Ok((layout, ..)) => assert!(is_taken && layout.pages() == u32::MAX, "{pages:?}"),
                Err(error) => {
                    assert!(!is_taken && error.kind == ErrorKind::Input, "{pages:?}: {}", error.chain());
                    assert!(error.chain().contains("16 TiB"), "{}", error.chain());
                }
            }
        }
    }

    #[test]
    fn pages_of_another_size_are_named() {
        let gigantic = Block { page_bytes: 1 << 30, ..Block::new("ram1g", 1 << 30) };
        let layout = Layout::new(Blocks::new(vec![gigantic]).expect("blocks"));
        let error = layout
            .manifest("web", (&Configuration::new("pc"), 2), &Devices::default())
            .expect_err("not known");
        assert!(error.message.contains("ram1g") && error.message.contains("1024 MiB"), "{error}");
    }
}
