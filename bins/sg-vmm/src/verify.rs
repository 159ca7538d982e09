//! The VMM's own check of guest memory, beside the guest's.
//!
//! The guest checks head, version and tail of each page against its shadow table: of every page it
//! touches, and of all pages in a pass of its own. The VMM checks the bytes that never change while
//! the guest runs, and for a pass without the guest (which is much faster where the guest's code is
//! emulated) what the guest would: a page that seems wrong then may just be being written, and is
//! looked at again with the vCPUs stopped.
//!
//! In either kind of pass the parts do not overlap, so that a wrong byte is found once.

use libsg::page::{PAGE_BYTES_U64, PageRange};

use crate::config::{Layout, VmConfig};
use crate::guest;
use crate::memory::Memory;
use crate::page_format::{
    BODY_WORD, CHECKSUM_WORD, PAGE_WORDS, PageFormat, SHADOW_COMMON, TAIL_WORD, VERSION_WORD, expected,
};

/// How often a page that is just being written is read again before it is suspected.
const TRIES: u32 = 3;

/// What the VMM found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Pages with wrong bytes where none ever change.
    pub wrong: Vec<u64>,
    /// Pages whose head, version or tail may be wrong.
    pub suspects: Vec<u64>,
}

/// Compares guest memory with what it must be: every byte that never changes, and with `heads` the
/// rest as well, but for pages that are lost. `stop` ends it early, and is told how many pages are
/// done.
pub fn look(
    config: &VmConfig,
    memory: &Memory,
    lost: &[PageRange],
    heads: bool,
    stop: impl Fn(u64) -> bool,
) -> Findings {
    let is_lost = |page: u64| lost.iter().any(|run| run.positions().contains(&(page as usize)));
    let (layout, format) = (Layout::of(config), config.format());
    let mut findings = Findings::default();
    let (mut want, mut found) = ([0; PAGE_WORDS], [0; PAGE_WORDS]);
    for page in 0..layout.pages {
        if page.is_multiple_of(1024) && stop(page) {
            break;
        }
        let shadow_page = layout.shadow_offset(page) / PAGE_BYTES_U64;
        if !lost.is_empty() && (is_lost(page) || is_lost(shadow_page)) {
            continue;
        }
        memory.load_page(page, &mut found);
        let same = if page >= layout.workload {
            if heads && (0..TRIES).all(|_| !is_current(&layout, &format, memory, page)) {
                findings.suspects.push(page);
            }
            format.body(page, &mut want);
            found[BODY_WORD..TAIL_WORD] == want[BODY_WORD..TAIL_WORD]
        } else if let Some(want) = guest::fixed_page(&layout, page) {
            found == want
        } else {
            shadow_padding_is_zero(&layout, memory, page)
        };
        if !same {
            tracing::error!(page, "mismatch: the VMM found wrong bytes in a page");
            findings.wrong.push(page);
        }
    }
    findings
}

/// With the vCPUs stopped: which of the suspects are wrong. Those are repaired as the guest would
/// do it, so that it does not report them a second time.
pub fn judge(config: &VmConfig, memory: &Memory, mut suspects: Vec<u64>) -> Vec<u64> {
    let (layout, format) = (Layout::of(config), config.format());
    suspects.retain(|&page| !is_current(&layout, &format, memory, page));
    for &page in &suspects {
        tracing::error!(page, "mismatch: the VMM found a page that is not the version it must be");
        let shadow = memory.load32(layout.shadow_offset(page));
        for (word, value) in MUTABLE.into_iter().zip(expected(page, shadow, format.seed_of(shadow))) {
            memory.store(page * PAGE_BYTES_U64 + word as u64 * 8, value);
        }
    }
    suspects
}

/// The words of a page that change, in the order of [`expected`].
const MUTABLE: [usize; 4] = [0, VERSION_WORD, CHECKSUM_WORD, TAIL_WORD];

fn is_current(layout: &Layout, format: &PageFormat, memory: &Memory, page: u64) -> bool {
    let shadow = memory.load32(layout.shadow_offset(page));
    let want = expected(page, shadow, format.seed_of(shadow));
    MUTABLE.map(|word| memory.load(page * PAGE_BYTES_U64 + word as u64 * 8)) == want
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

/// Entries of the shadow table that belong to no workload page.
fn shadow_padding_is_zero(layout: &Layout, memory: &Memory, page: u64) -> bool {
    let entries = PAGE_BYTES_U64 / 4;
    let first = (page - layout.shadow) * entries;
    (first..first + entries)
        .filter(|entry| !(layout.workload..layout.pages).contains(entry))
        .all(|entry| memory.load32(layout.shadow_offset(entry)) == 0)
}
