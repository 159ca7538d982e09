//! What the benches have in common. Each file beside this one is a bench of its own; all together take about
//! two minutes: `cargo bench -p sg-benches`.

use std::time::Duration;

use criterion::Criterion;
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Backing, GuestMemory};
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};

/// Short runs: differences that matter here are of tens of percents.
#[must_use]
pub fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args()
}

/// One region of so many pages.
#[must_use]
pub fn manifest(pages: u32) -> Manifest {
    let ram = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(pages) * PAGE_BYTES_U64,
        unit: InstallUnit::Page,
    };
    Manifest { vm: "bench".into(), regions: vec![ram], vm_config: Vec::new() }
}

/// Memory of so many pages, each zero but for its last byte: the longest way for the zero check.
///
/// # Panics
/// When the kernel gives no memory.
#[must_use]
pub fn filled(pages: u32) -> GuestMemory {
    let memory = GuestMemory::allocate(&manifest(pages), Backing::Anon).expect("memory");
    let mut page = [0; PAGE_BYTES];
    page[PAGE_BYTES - 1] = 1;
    for number in 0..pages {
        memory.copy_in(PageRange::new(PageIndex(number), 1), &page).expect("a page of it");
    }
    memory
}
