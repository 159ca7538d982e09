//! Pages: the records of which the memory's sections consist.
//!
//! Each begins with a word: the page's offset in its block, and flags where an offset has none.

use crate::blocks::{BlockIndex, Blocks, bounds};
use crate::bytes::{Cursor, Stop, put_name, put_u32, put_u64};
use crate::error::{StreamErrorKind, Unsupported};
use crate::{PAGE_BYTES, PAGE_BYTES_U64};

pub(crate) const END_OF_FILE: u8 = 0x00;
pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
pub(crate) const SECTION_END: u8 = 0x03;
pub(crate) const SECTION_FULL: u8 = 0x04;
pub(crate) const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// The byte with which a stream ends, behind the last section.
pub const END_OF_STREAM: u8 = END_OF_FILE;

/// The word that ends what a section says.
pub(crate) const END_OF_SECTION: u64 = 0x10;
/// The flag of the word in front of the table of blocks.
pub(crate) const MEMORY_SIZE: u64 = 0x04;
const ZERO: u64 = 0x02;
const PAGE: u64 = 0x08;
const CONTINUE: u64 = 0x20;

/// Flags that capabilities bring along.
const FOREIGN: [(u64, &str); 4] =
    [(0x40, "xbzrle"), (0x80, "rdma-pin-all"), (0x100, "compress"), (0x200, "multifd")];

/// One record. The bytes of a page stand behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Page(BlockIndex, u64),
    Zero(BlockIndex, u64),
    EndOfSection,
}

impl Record {
    /// The next one; `last` is the block of the one before, of whatever section.
    pub(crate) fn decode(
        blocks: &Blocks,
        last: Option<BlockIndex>,
        cursor: &mut Cursor<'_>,
    ) -> Result<Self, Stop> {
        let word = cursor.u64()?;
        let (offset, flags) = (word & !(PAGE_BYTES_U64 - 1), word & (PAGE_BYTES_U64 - 1));
        if let Some((_, name)) = FOREIGN.iter().find(|(flag, _)| flags & flag != 0) {
            return Err(Unsupported::Capability(name).into());
        }
        match flags & !CONTINUE {
            _ if word == END_OF_SECTION => return Ok(Self::EndOfSection),
            PAGE | ZERO => {}
            _ => return Err(StreamErrorKind::Unknown("record of a page", word).into()),
        }
        let (index, block) = if flags & CONTINUE == 0 {
            blocks.take(cursor)?
        } else {
            let before = last.and_then(|last| Some((last, blocks.get(last)?)));
            before.ok_or(StreamErrorKind::Order("a page of the block before, where there is none"))?
        };
        block.check_offset(offset)?;
        if flags & PAGE != 0 {
            return Ok(Self::Page(index, offset));
        }
        match cursor.u8()? {
            0 => Ok(Self::Zero(index, offset)),
            other => Err(bounds("the byte that fills a page", other.into(), "0")),
        }
    }
}

pub(crate) fn put_footer(section: u32, out: &mut Vec<u8>) {
    out.push(FOOTER);
    put_u32(section, out);
}

pub(crate) fn take_footer(section: u32, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    match cursor.u8()? {
        FOOTER => {}
        other => return Err(StreamErrorKind::Unknown("end of a section", other.into()).into()),
    }
    let footer = cursor.u32()?;
    if footer != section {
        return Err(StreamErrorKind::Unknown("section", footer.into()).into());
    }
    Ok(())
}

/// Writes sections of pages. The bytes of pages are the caller's to put behind their heads, so that they need not be
/// copied.
///
/// A block of huge pages is placed at once: all pages of one of them go one after the other, in one section.
#[derive(Clone, Debug)]
pub struct Records {
    section: u32,
    last: Option<BlockIndex>,
}

impl Records {
    /// Under the number that the memory's section was begun with.
    #[must_use]
    pub const fn new(section: u32) -> Self {
        Self { section, last: None }
    }

    /// Begins a section; `last` is the one after which there is only [`END_OF_STREAM`]. Whatever came before, its first page names its block.
    pub fn begin(&mut self, last: bool, out: &mut Vec<u8>) {
        out.push(if last { SECTION_END } else { SECTION_PART });
        put_u32(self.section, out);
        self.last = None;
    }

    /// The head of a page at that offset: [`PAGE_BYTES`] bytes are to follow.
    pub fn page(&mut self, blocks: &Blocks, block: BlockIndex, offset_bytes: u64, out: &mut Vec<u8>) {
        self.head(PAGE, blocks, block, offset_bytes, out);
    }

    /// A page of zeros.
    pub fn zero(&mut self, blocks: &Blocks, block: BlockIndex, offset_bytes: u64, out: &mut Vec<u8>) {
        self.head(ZERO, blocks, block, offset_bytes, out);
        out.push(0);
    }

    fn head(&mut self, kind: u64, blocks: &Blocks, block: BlockIndex, offset: u64, out: &mut Vec<u8>) {
        debug_assert!(offset.is_multiple_of(PAGE_BYTES as u64), "{offset:#x} is no page's offset");
        let same = self.last.replace(block) == Some(block);
        put_u64(offset | kind | if same { CONTINUE } else { 0 }, out);
        if !same {
            put_name(blocks.get(block).map_or("", |block| &block.name), out);
        }
    }

    /// Ends the section.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        put_u64(END_OF_SECTION, out);
        put_footer(self.section, out);
    }
}
