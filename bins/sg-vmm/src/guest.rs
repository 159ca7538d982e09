//! What lies in the guest's memory before it starts: its code, its page tables, the shadow table
//! and the content of its pages.

use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64};

use crate::config::{HUGE_BYTES, Layout, VmConfig};
use crate::memory::Memory;
use crate::page_format::{Content, PAGE_WORDS};

/// The guest's code, assembled from `guest/guest.S`.
pub const CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));

const _: () = assert!(CODE.len() <= PAGE_BYTES, "the guest's code fits its page");

/// Where the guest's memory begins in its physical address space: past the last page below 4 GiB. There KVM takes an
/// access to 0xfee00000 that it emulates for one to the local APIC, whatever memory lies at that address.
pub const PHYSICAL_BASE: u64 = 4 << 30;

/// Present, writable, accessed. With the accessed and dirty bits set from the start nobody changes
/// the tables: they can be checked byte by byte.
const TABLE_ENTRY: u64 = 0b10_0011;
/// The same, dirty, and mapping 2 MiB.
const HUGE_ENTRY: u64 = TABLE_ENTRY | 0b1100_0000;

/// Threads that fill memory at most: page faults of one process do not scale further.
const FILL_THREADS_MAX: usize = 8;

/// The words that page `page` holds before the start, if it is not one of the workload.
/// `None` for pages of the shadow table as well: those change.
#[must_use]
pub fn fixed_page(layout: &Layout, page: u64) -> Option<[u64; PAGE_WORDS]> {
    let mut words = [0; PAGE_WORDS];
    let directories = layout.tables + 2;
    if page == layout.code {
        let mut bytes = CODE.to_vec();
        bytes.resize(PAGE_BYTES, 0);
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
        }
    } else if page == layout.tables {
        words[0] = (PHYSICAL_BASE + (page + 1) * PAGE_BYTES_U64) | TABLE_ENTRY;
    } else if page == layout.tables + 1 {
        for (word, directory) in words.iter_mut().zip(0..layout.directories) {
            *word = (PHYSICAL_BASE + (directories + directory) * PAGE_BYTES_U64) | TABLE_ENTRY;
        }
    } else if (directories..layout.shadow).contains(&page) {
        let first = (page - directories) << 30;
        for (word, huge) in words.iter_mut().zip(0_u64..) {
            let address = first + huge * HUGE_BYTES;
            if address < layout.pages * PAGE_BYTES_U64 {
                *word = (PHYSICAL_BASE + address) | HUGE_ENTRY;
            }
        }
    } else if page >= layout.shadow {
        return None;
    }
    Some(words)
}

/// Writes everything the guest starts with. Returns how many workload pages were filled; zero pages
/// are not touched.
pub fn fill(config: &VmConfig, memory: &Memory) -> u64 {
    let layout = Layout::of(config);
    for page in 0..layout.shadow {
        if let Some(words) = fixed_page(&layout, page).filter(|words| words.iter().any(|w| *w != 0)) {
            memory.store_page(page, &words);
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(FILL_THREADS_MAX) as u64;
    let share = layout.workload_pages().div_ceil(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let first = (layout.workload + thread * share).min(layout.pages);
                let last = (first + share).min(layout.pages);
                scope.spawn(move || fill_range(config, &layout, memory, first..last))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_default()).sum()
    })
}

fn fill_range(config: &VmConfig, layout: &Layout, memory: &Memory, pages: std::ops::Range<u64>) -> u64 {
    let format = config.format();
    let mut words = [0; PAGE_WORDS];
    let mut filled = 0;
    for page in pages {
        if format.content(page) == Content::Zero {
            continue;
        }
        format.page(page, &mut words);
        memory.store_page(page, &words);
        memory.store32(layout.shadow_offset(page), format.shadow(page));
        filled += 1;
    }
    filled
}
