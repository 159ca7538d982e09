//! What the benches, and `sg-bench micro`, have in common. Each other file beside this one that Cargo.toml names is a
//! bench of its own; all together take about two minutes: `cargo bench -p sg-benches`.

pub mod content;
pub mod plain;
pub mod pure;
pub mod store;

use std::fs::File;
use std::path::Path;

use libsg::Result;
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, BackingFile, GuestMemory, Mapping};
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};

/// One region of so many pages.
#[must_use]
pub fn manifest(pages: u32) -> Manifest {
    let ram = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(pages) * PAGE_BYTES_U64,
        unit: InstallUnit::Page,
    };
    Manifest { vm: "bench".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None }
}

/// Memory of so many pages, never touched.
///
/// # Errors
/// The kernel gives no memory.
pub fn fresh(pages: u32) -> Result<GuestMemory> {
    GuestMemory::allocate(&manifest(pages), Backing::Anon)
}

/// The same in a file: of this directory, which may be of a tmpfs with large folios (`mount -o huge=within_size`), or a
/// memfd.
///
/// # Errors
/// The kernel gives no memory, or the directory takes no file.
pub fn fresh_file(pages: u32, directory: Option<&Path>) -> Result<GuestMemory> {
    let Some(directory) = directory else { return GuestMemory::allocate(&manifest(pages), Backing::Memfd) };
    let path = directory.join(format!("sg-bench-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    let bytes = u64::from(pages) * PAGE_BYTES_U64;
    file.set_len(bytes)?;
    let mapping = Mapping::shared(BackingFile { fd: file.into(), offset: 0 }, bytes as usize, false)?;
    GuestMemory::from_mappings(manifest(pages).regions.into_iter().zip([mapping]).collect())
}

/// Memory of so many pages, each zero but for its last byte: the longest way for the zero check.
///
/// # Errors
/// The kernel gives no memory.
pub fn filled(pages: u32) -> Result<GuestMemory> {
    filled_of(pages, Backing::Anon)
}

/// The same, of this kind.
///
/// # Errors
/// As [`filled`].
pub fn filled_of(pages: u32, backing: Backing) -> Result<GuestMemory> {
    let memory = GuestMemory::allocate(&manifest(pages), backing)?;
    let mut page = [0; PAGE_BYTES];
    page[PAGE_BYTES - 1] = 1;
    for number in 0..pages {
        memory.copy_in(PageRange::new(PageIndex(number), 1), &page)?;
    }
    Ok(memory)
}
