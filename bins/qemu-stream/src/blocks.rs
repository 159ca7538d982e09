//! The blocks of a VM's memory: the table with which its section begins.

use crate::bytes::{Cursor, Stop, put_name, put_u32, put_u64};
use crate::command::Span;
use crate::error::{StreamErrorKind, Unsupported};
use crate::limits::{BLOCK_PAGE_BYTES_MAX, BLOCKS_MAX, MEMORY_BYTES_MAX, NAME_BYTES_MAX};
use crate::records::{END_OF_SECTION, SECTION_START, put_footer, take_footer};
use crate::{PAGE_BYTES_U64, records};

/// The version of the memory's section, since 2.5.
const RAM_VERSION: u32 = 4;

/// Which block, by its place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockIndex(pub u16);

/// A block of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What QEMU calls it: of a device (`pc.ram`), of a firmware file, of a memory backend.
    pub name: String,
    /// Its length: whole pages of [`Self::page_bytes`].
    pub length_bytes: u64,
    /// What is placed at once at the destination: 4 KiB, or more for huge pages.
    pub page_bytes: u64,
}

impl Block {
    /// A block of ordinary pages.
    #[must_use]
    pub fn new(name: &str, length_bytes: u64) -> Self {
        Self { name: name.into(), length_bytes, page_bytes: PAGE_BYTES_U64 }
    }

    pub(crate) fn check_offset(&self, offset_bytes: u64) -> Result<(), Stop> {
        if offset_bytes >= self.length_bytes || !offset_bytes.is_multiple_of(PAGE_BYTES_U64) {
            return Err(bounds("a page's offset", offset_bytes, "whole pages within its block"));
        }
        Ok(())
    }

    pub(crate) fn check_span(&self, span: Span, unit: u64) -> Result<(), Stop> {
        let end = span.start_bytes.checked_add(span.length_bytes);
        let whole = span.start_bytes.is_multiple_of(unit) && span.length_bytes.is_multiple_of(unit);
        if !whole || span.length_bytes == 0 || end.is_none_or(|end| end > self.length_bytes) {
            return Err(bounds("a range's start", span.start_bytes, "whole pages within its block"));
        }
        Ok(())
    }
}

pub(crate) fn bounds(what: &'static str, value: u64, bounds: &'static str) -> Stop {
    StreamErrorKind::Bounds { what, value, bounds }.into()
}

/// All blocks of a VM, in the stream's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks(Vec<Block>);

impl Blocks {
    /// Of these.
    ///
    /// # Errors
    /// What no QEMU would send: too many, too long, two of one name, lengths that are not whole pages.
    pub fn new(blocks: Vec<Block>) -> Result<Self, StreamErrorKind> {
        let mut table = Self::default();
        for block in blocks {
            match table.push(block) {
                Err(Stop::Refused(kind)) => return Err(kind),
                Err(Stop::Short) | Ok(()) => {}
            }
        }
        Ok(table)
    }

    fn push(&mut self, block: Block) -> Result<(), Stop> {
        let page = block.page_bytes;
        if !page.is_power_of_two() || !(PAGE_BYTES_U64..=BLOCK_PAGE_BYTES_MAX).contains(&page) {
            return Err(bounds("a block's page size", page, "4 KiB to 1 GiB, a power of two"));
        }
        if block.length_bytes == 0 || !block.length_bytes.is_multiple_of(page) {
            return Err(bounds("a block's length", block.length_bytes, "whole pages, one at least"));
        }
        if block.length_bytes > MEMORY_BYTES_MAX - self.total_bytes() {
            return Err(bounds("a block's length", block.length_bytes, "less than 16 TiB for all of them"));
        }
        if self.0.len() == BLOCKS_MAX {
            return Err(bounds("the number of blocks", BLOCKS_MAX as u64 + 1, "256 at most"));
        }
        crate::bytes::text(block.name.as_bytes(), "a block's name")?;
        if block.name.len() > NAME_BYTES_MAX {
            return Err(bounds("a block name's length", block.name.len() as u64, "255 bytes at most"));
        }
        if self.find(&block.name).is_some() {
            return Err(StreamErrorKind::Order("a second block of the same name").into());
        }
        self.0.push(block);
        Ok(())
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.0.iter().map(|block| block.length_bytes).sum()
    }

    /// The page sizes of all of them, each a bit: what POSTCOPY_ADVISE says.
    #[must_use]
    pub fn page_sizes(&self) -> u64 {
        self.0.iter().fold(0, |sizes, block| sizes | block.page_bytes)
    }

    /// In the stream's order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockIndex, &Block)> {
        self.0.iter().enumerate().map(|(at, block)| (BlockIndex(at as u16), block))
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, index: BlockIndex) -> Option<&Block> {
        self.0.get(usize::from(index.0))
    }

    /// The one of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<BlockIndex> {
        self.0.iter().position(|block| block.name == name).map(|at| BlockIndex(at as u16))
    }

    /// The one that a name names.
    pub(crate) fn take(&self, cursor: &mut Cursor<'_>) -> Result<(BlockIndex, &Block), Stop> {
        let name = cursor.name()?;
        let unknown = || StreamErrorKind::Block(String::from_utf8_lossy(name).into_owned());
        let index = std::str::from_utf8(name).ok().and_then(|name| self.find(name)).ok_or_else(unknown)?;
        Ok((index, self.get(index).ok_or_else(unknown)?))
    }

    /// Appends the section that begins the memory's transfer, under the number by which its parts will go.
    pub fn encode(&self, section: u32, out: &mut Vec<u8>) {
        out.push(SECTION_START);
        put_u32(section, out);
        put_name("ram", out);
        put_u32(0, out);
        put_u32(RAM_VERSION, out);
        put_u64(self.total_bytes() | records::MEMORY_SIZE, out);
        for block in &self.0 {
            put_name(&block.name, out);
            put_u64(block.length_bytes, out);
            if block.page_bytes != PAGE_BYTES_U64 {
                put_u64(block.page_bytes, out);
            }
        }
        put_u64(END_OF_SECTION, out);
        put_footer(section, out);
    }

    /// What stands behind the byte that says that a section begins: its number, and the table.
    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<(u32, Self), Stop> {
        let section = cursor.u32()?;
        let name = cursor.text("a section's name")?;
        if name != "ram" {
            return Err(Unsupported::Section(name.into()).into());
        }
        let instance = cursor.u32()?;
        if instance != 0 {
            return Err(bounds("the instance of the memory's section", instance.into(), "0"));
        }
        match cursor.u32()? {
            RAM_VERSION => {}
            other => return Err(StreamErrorKind::Version("the memory's section", other).into()),
        }
        let word = cursor.u64()?;
        let total = word & !(PAGE_BYTES_U64 - 1);
        if word != total | records::MEMORY_SIZE {
            return Err(StreamErrorKind::Unknown("list of blocks", word).into());
        }
        let blocks = Self::decode_list(total, cursor)?;
        take_footer(section, cursor)?;
        Ok((section, blocks))
    }

    fn decode_list(total: u64, cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let (mut blocks, mut listed) = (Self::default(), 0);
        while listed < total {
            let mut block = Block::new(cursor.text("a block's name")?, cursor.u64()?);
            // A page size has nothing in front of it that says so. A name's length is never zero, as its first byte is.
            // Behind the last block the end of the section comes, which is no page size.
            if cursor.peek()? == 0 && cursor.peek_u64()? != END_OF_SECTION {
                block.page_bytes = cursor.u64()?;
                if block.page_bytes == PAGE_BYTES_U64 {
                    return Err(bounds(
                        "a page size that is told",
                        PAGE_BYTES_U64,
                        "another than the host's",
                    ));
                }
            }
            blocks.push(block)?;
            listed = blocks.total_bytes();
        }
        if listed != total {
            return Err(bounds("the length of all blocks", total, "as long as the blocks"));
        }
        match cursor.u64()? {
            END_OF_SECTION => Ok(blocks),
            other => Err(StreamErrorKind::Unknown("word behind the last block", other).into()),
        }
    }
}
