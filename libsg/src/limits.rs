//! Every limit of every role, with its reason and what happens when it is crossed.

use std::time::Duration;

use crate::page::PAGE_BYTES;

/// Pages in one batch: one frame on the wire, one acknowledgement. 64 pages are what a single
/// vectored write carries without losing throughput; a hugetlb unit is the exception (512).
pub const BATCH_PAGES: usize = 64;

/// Pages in the largest frame: one 2 MiB install unit, which is never split. A longer one is refused.
pub const BATCH_PAGES_MAX: usize = 512;

/// Index entries in one frame. A longer one is refused.
pub const INDEX_ENTRIES_MAX: usize = 4096;

/// Bytes of a frame's body; bounded before anything is allocated. A longer one is refused and the
/// connection closed.
pub const BODY_BYTES_MAX: usize = BATCH_PAGES_MAX * (PAGE_BYTES + 32);

/// Bytes of a control message's body (postcard-encoded): the manifest is the largest.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;

/// Bytes of the VM's opaque CPU and device state.
pub const STATE_BYTES_MAX: usize = 64 << 20;

/// Bytes of the list of pages that were sent again, in front of the state; a longer one is cut into pieces of that many.
pub const FINAL_PIECE_BYTES: usize = 16 << 20;

/// Such pieces: 4 GiB, of a VM of several TiB that was sent again page by page. With more it is refused, and runs on.
pub const FINAL_PIECES_MAX: u32 = 256;

/// Bytes of the VMM's opaque configuration in a manifest.
pub const VM_CONFIG_BYTES_MAX: usize = 64 << 10;

/// Bytes of a name of a VM or a region.
pub const NAME_BYTES_MAX: usize = 255;

/// Bytes of an intermediary's name.
pub const NODE_NAME_BYTES_MAX: usize = 64;

/// Bytes of the name under which a volume is parked.
pub const PARKING_NAME_BYTES_MAX: usize = 64;

/// Bytes of what a parked volume says of who decides who may have it.
pub const ARBITER_BYTES_MAX: usize = 256;

/// How long whoever claimed a parked volume has until it runs the VM, or says that it is still at it. Then another
/// may claim it. Nothing that is safe rests on it: whoever was replaced is refused when it wants to run the VM.
pub const CLAIM_LEASE: Duration = Duration::from_secs(10);

/// Bytes of a zone's name.
pub const ZONE_BYTES_MAX: usize = 64;

/// Bytes of an announcement's body, names included. A longer one is not sent, and not read.
pub const ANNOUNCEMENT_BYTES_MAX: usize = 512;

/// Hosts of a pool that are remembered, those that were heard of lately included. Further ones are not heard.
pub const POOL_HOSTS_MAX: usize = 16_384;

/// Regions in a manifest.
pub const REGIONS_MAX: usize = 1024;

/// Pages of a volume: what [`crate::page::PageIndex`] can number.
pub const VOLUME_PAGES_MAX: u64 = u32::MAX as u64;

/// Intermediaries of one volume. More are refused when the migration starts.
pub const MEMBERS_MAX: usize = 64;

/// Intermediaries that are looked for in the place of those that died, in one migration: a pool in which more die is no place
/// for the VM's pages. Further ones are not replaced.
pub const REPLACEMENTS_MAX: usize = 8;

/// Intermediaries that hold the same page. More are refused when the migration starts, and by intermediaries: a
/// session waits for all of them.
pub const COPIES_MAX: usize = 8;

/// Consecutive pages that one index server owns, in turn: long enough that a batch has one owner,
/// short enough that the index spreads over all members.
pub const INDEX_RANGE_PAGES: u32 = 1024;

/// Bytes in which one end of a backend describes itself to the other. Longer ones are refused.
pub const ENDPOINT_BYTES_MAX: usize = 256;

/// Bytes by which a backend reaches a piece of an intermediary's memory. Longer ones are refused.
pub const ACCESS_KEY_BYTES_MAX: usize = 64;

/// Leases, and reads that were let in, of one session at once. One more is refused.
pub const GRANTS_MAX: usize = 1024;

/// Slots that are leased to one session and not settled: a client's largest window, and a unit of 2 MiB beside it. A
/// lease of more is refused, so that nobody takes memory without bringing pages.
pub const LEASED_SLOTS_MAX: usize = 1024 + BATCH_PAGES_MAX;

const _: () = assert!(BATCH_PAGES <= BATCH_PAGES_MAX);
// A set of members is one word.
const _: () = assert!(MEMBERS_MAX <= u64::BITS as usize);
const _: () = assert!(INDEX_RANGE_PAGES as usize >= BATCH_PAGES_MAX);
const _: () = assert!(CONTROL_BYTES_MAX <= BODY_BYTES_MAX);
const _: () = assert!(VM_CONFIG_BYTES_MAX + REGIONS_MAX * (NAME_BYTES_MAX + 32) <= CONTROL_BYTES_MAX);
