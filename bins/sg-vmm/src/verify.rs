//! The VMM's own check of guest memory, beside the guest's: every byte that never changes.
//!
//! The guest checks head, version and tail of each page against its shadow table; it would take it
//! minutes to look at every byte. The VMM does that from outside, while the guest runs: the two
//! parts do not overlap, so that a wrong byte is found once.

use libsg::page::PAGE_BYTES_U64;

use crate::config::{Layout, VmConfig};
use crate::guest;
use crate::memory::Memory;
use crate::page_format::{BODY_WORD, PAGE_WORDS, SHADOW_COMMON, TAIL_WORD};

/// Compares every byte of guest memory that never changes with what it must be. Returns the pages
/// that differ. `stop` ends it early.
pub fn fixed_bytes(config: &VmConfig, memory: &Memory, stop: impl Fn() -> bool) -> Vec<u64> {
    let (layout, format) = (Layout::of(config), config.format());
    let mut words = [0; PAGE_WORDS];
    let mut wrong = Vec::new();
    for page in 0..layout.pages {
        if page % 1024 == 0 && stop() {
            break;
        }
        let same = if page >= layout.workload {
            format.body(page, &mut words);
            compare(memory, page, &words, BODY_WORD..TAIL_WORD)
        } else if let Some(words) = guest::fixed_page(&layout, page) {
            compare(memory, page, &words, 0..PAGE_WORDS)
        } else {
            shadow_padding_is_zero(&layout, memory, page)
        };
        if !same {
            tracing::error!(page, "mismatch: the VMM found wrong bytes in a page");
            wrong.push(page);
        }
    }
    wrong
}

/// How often the guest has written, from its shadow table: what its vCPUs counted must be the same.
#[must_use]
pub fn writes_in_shadow(config: &VmConfig, memory: &Memory) -> u64 {
    let (layout, format) = (Layout::of(config), config.format());
    let written = |page| {
        let now = memory.load32(layout.shadow_offset(page)) & !SHADOW_COMMON;
        u64::from(now.wrapping_sub(format.shadow(page) & !SHADOW_COMMON))
    };
    (layout.workload..layout.pages).map(written).sum()
}

fn compare(memory: &Memory, page: u64, words: &[u64; PAGE_WORDS], part: std::ops::Range<usize>) -> bool {
    let base = page * PAGE_BYTES_U64;
    part.into_iter().all(|word| memory.load(base + word as u64 * 8) == words[word])
}

/// Entries of the shadow table that belong to no workload page.
fn shadow_padding_is_zero(layout: &Layout, memory: &Memory, page: u64) -> bool {
    let entries = PAGE_BYTES_U64 / 4;
    let first = (page - layout.shadow) * entries;
    (first..first + entries)
        .filter(|entry| !(layout.workload..layout.pages).contains(entry))
        .all(|entry| memory.load32(layout.shadow_offset(entry)) == 0)
}
