//! How much of anything a stream may have. What is longer is refused before anything is allocated for it.

use crate::PAGE_BYTES;

/// Blocks of memory of a VM. A machine with a few dozen devices has as many of them; the table is one item of the stream.
pub const BLOCKS_MAX: usize = 256;

/// Bytes of a name of a block, of a section, of a capability: its length is one byte.
pub const NAME_BYTES_MAX: usize = 255;

/// Bytes of the name of a machine type.
pub const MACHINE_BYTES_MAX: usize = 255;

/// Bytes of the memory of a VM: 2^32 - 1 pages, whose count fits where libsg numbers them.
pub const MEMORY_BYTES_MAX: u64 = PAGE_BYTES as u64 * u32::MAX as u64;

/// Bytes of a page of a block: 1 GiB.
pub const BLOCK_PAGE_BYTES_MAX: u64 = 1 << 30;

/// Pairs of start and length in one RAM_DISCARD, as QEMU has it.
pub const DISCARD_SPANS_MAX: usize = 12;

/// Bytes of a package: the state of all devices. Those of a machine with everything that is supported stay under a
/// megabyte; older QEMU refused more than 16 MiB.
pub const PACKAGE_BYTES_MAX: u32 = 64 << 20;

/// Bytes that must be there to be sure of an item: the table of blocks is the longest.
pub const ITEM_BYTES_MAX: usize = 512 + BLOCKS_MAX * (1 + NAME_BYTES_MAX + 16);

const _: () = assert!(ITEM_BYTES_MAX > 2 * (PAGE_BYTES + NAME_BYTES_MAX));
