//! Commands: what the source tells the destination to do, between sections.

use crate::blocks::{BlockIndex, Blocks, bounds};
use crate::bytes::{Cursor, Stop, put_name, put_u16, put_u32, put_u64};
use crate::error::{StreamErrorKind, Unsupported};
use crate::limits::{BLOCK_PAGE_BYTES_MAX, DISCARD_SPANS_MAX, PACKAGE_BYTES_MAX};
use crate::{PAGE_BYTES_U64, records};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

/// Bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where they begin.
    pub start_bytes: u64,
    /// How many.
    pub length_bytes: u64,
}

/// What the destination is to forget of a block: all of it comes later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discard {
    /// The block.
    pub block: BlockIndex,
    /// At most [`DISCARD_SPANS_MAX`], of whole pages.
    pub spans: Vec<Span>,
}

/// What the source tells the destination to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answers are expected on the same connection from now on.
    OpenReturnPath,
    /// Is answered by [`crate::Answer::Pong`] with the same number.
    Ping(u32),
    /// Post-copy may follow: what pages both sides have.
    PostcopyAdvise {
        /// The page sizes of all blocks, each a bit.
        page_sizes: u64,
    },
    /// In the package only: pages are placed by userfaultfd from now on.
    PostcopyListen,
    /// In the package only: the VM runs at the destination from now on.
    PostcopyRun,
    /// Pages that came before are out of date.
    RamDiscard(Discard),
    /// The package follows.
    Packaged {
        /// Its length.
        length_bytes: u32,
    },
    /// After a break: what is said from now on goes on where it broke off.
    PostcopyResume,
    /// After a break: which pages of that block have come? Is answered by [`crate::Answer::ReceivedBitmap`].
    ReceivedBitmap(BlockIndex),
    /// The source has stopped its VM. Only to a destination that knows it (10.0).
    SwitchoverStart,
}

impl Command {
    /// Appends it. Blocks that are not in the table are left out, which only a caller that mixes up two VMs can have.
    pub fn encode(&self, blocks: &Blocks, out: &mut Vec<u8>) {
        let name = |block: BlockIndex| blocks.get(block).map_or("", |block| block.name.as_str());
        let head = |number: u16, length: usize, out: &mut Vec<u8>| {
            out.push(records::COMMAND);
            put_u16(number, out);
            put_u16(length as u16, out);
        };
        match self {
            Self::OpenReturnPath => head(OPEN_RETURN_PATH, 0, out),
            Self::Ping(number) => {
                head(PING, 4, out);
                put_u32(*number, out);
            }
            Self::PostcopyAdvise { page_sizes } => {
                head(POSTCOPY_ADVISE, 16, out);
                put_u64(*page_sizes, out);
                put_u64(PAGE_BYTES_U64, out);
            }
            Self::PostcopyListen => head(POSTCOPY_LISTEN, 0, out),
            Self::PostcopyRun => head(POSTCOPY_RUN, 0, out),
            Self::RamDiscard(Discard { block, spans }) => {
                let name = name(*block);
                head(RAM_DISCARD, 3 + name.len() + 16 * spans.len(), out);
                out.push(0);
                put_name(name, out);
                out.push(0);
                for span in spans {
                    put_u64(span.start_bytes, out);
                    put_u64(span.length_bytes, out);
                }
            }
            Self::Packaged { length_bytes } => {
                head(PACKAGED, 4, out);
                put_u32(*length_bytes, out);
            }
            Self::PostcopyResume => head(POSTCOPY_RESUME, 0, out),
            Self::ReceivedBitmap(block) => {
                let name = name(*block);
                head(RECV_BITMAP, 1 + name.len(), out);
                put_name(name, out);
            }
            Self::SwitchoverStart => head(SWITCHOVER_START, 0, out),
        }
    }

    /// What stands behind the byte that says that a command follows.
    pub(crate) fn decode(blocks: &Blocks, cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let number = cursor.u16()?;
        let length = usize::from(cursor.u16()?);
        let fixed = match number {
            OPEN_RETURN_PATH | POSTCOPY_LISTEN | POSTCOPY_RUN | POSTCOPY_RESUME | SWITCHOVER_START => Some(0),
            PING | PACKAGED => Some(4),
            POSTCOPY_ADVISE => Some(16),
            RAM_DISCARD | RECV_BITMAP => None,
            ENABLE_COLO => return Err(Unsupported::Capability("x-colo").into()),
            other => return Err(StreamErrorKind::Unknown("command", other.into()).into()),
        };
        if number == POSTCOPY_ADVISE && length == 0 {
            return Err(Unsupported::Capability("dirty-bitmaps").into());
        }
        if fixed.is_some_and(|fixed| fixed != length) {
            return Err(bounds("a command's length", length as u64, "as it is for each of this number"));
        }
        // Long enough for no name at all, and for all that QEMU may say.
        if fixed.is_none() && length > 3 + 255 + 16 * DISCARD_SPANS_MAX {
            return Err(bounds("a command's length", length as u64, "a name and 12 ranges at most"));
        }
        let mut body = Cursor::new(cursor.take(length)?);
        let command = Self::body(number, blocks, &mut body).map_err(|stop| match stop {
            Stop::Short => bounds("a command's length", length as u64, "as long as what it says"),
            refused => refused,
        })?;
        if body.left() > 0 {
            return Err(bounds("a command's length", length as u64, "as long as what it says"));
        }
        Ok(command)
    }

    fn body(number: u16, blocks: &Blocks, body: &mut Cursor<'_>) -> Result<Self, Stop> {
        Ok(match number {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING => Self::Ping(body.u32()?),
            POSTCOPY_ADVISE => {
                let (page_sizes, page) = (body.u64()?, body.u64()?);
                if page != PAGE_BYTES_U64 {
                    return Err(bounds("the machine's page size", page, "4 KiB"));
                }
                let known = PAGE_BYTES_U64..=BLOCK_PAGE_BYTES_MAX * 2 - 1;
                if !known.contains(&page_sizes) || !page_sizes.is_multiple_of(PAGE_BYTES_U64) {
                    return Err(bounds("the sum of page sizes", page_sizes, "sizes from 4 KiB to 1 GiB"));
                }
                Self::PostcopyAdvise { page_sizes }
            }
            POSTCOPY_LISTEN => Self::PostcopyListen,
            POSTCOPY_RUN => Self::PostcopyRun,
            RAM_DISCARD => Self::RamDiscard(Discard::decode(blocks, body)?),
            PACKAGED => {
                let length_bytes = body.u32()?;
                if length_bytes == 0 || length_bytes > PACKAGE_BYTES_MAX {
                    return Err(bounds("a package's length", length_bytes.into(), "1 byte to 64 MiB"));
                }
                Self::Packaged { length_bytes }
            }
            POSTCOPY_RESUME => Self::PostcopyResume,
            RECV_BITMAP => Self::ReceivedBitmap(blocks.take(body)?.0),
            SWITCHOVER_START => Self::SwitchoverStart,
            other => return Err(StreamErrorKind::Unknown("command", other.into()).into()),
        })
    }
}

impl Discard {
    fn decode(blocks: &Blocks, body: &mut Cursor<'_>) -> Result<Self, Stop> {
        match body.u8()? {
            0 => {}
            other => return Err(StreamErrorKind::Version("a RAM_DISCARD", other.into()).into()),
        }
        let (index, block) = blocks.take(body)?;
        match body.u8()? {
            0 => {}
            other => return Err(StreamErrorKind::Unknown("end of a block's name", other.into()).into()),
        }
        let count = body.left() / 16;
        if count == 0 || count > DISCARD_SPANS_MAX {
            return Err(bounds("the number of ranges to forget", count as u64, "1 to 12"));
        }
        let mut spans = Vec::with_capacity(count);
        for _ in 0..count {
            let span = Span { start_bytes: body.u64()?, length_bytes: body.u64()? };
            block.check_span(span, PAGE_BYTES_U64)?;
            spans.push(span);
        }
        Ok(Self { block: index, spans })
    }
}
