//! What the benches, and `sg-bench micro`, have in common. Each other file beside this one that Cargo.toml names is a
//! bench of its own; all together take about two minutes: `cargo bench -p sg-benches`.

pub mod content;
pub mod plain;
pub mod pure;
pub mod store;

use libsg::Result;
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory};
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
