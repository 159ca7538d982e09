//! The return path: what a destination QEMU answers on the connection that its stream comes by.

use std::ops::Range;

use crate::PAGE_BYTES_U64;
use crate::blocks::{Block, BlockIndex, Blocks, bounds};
use crate::bytes::{Cursor, Stop, put_name, put_u16, put_u32, put_u64};
use crate::command::Span;
use crate::error::{StreamError, StreamErrorKind};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// The only value that RESUME_ACK may have.
const RESUMED: u32 = 1;

/// What stands behind a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// What a destination says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done, and hangs up. Anything but 0: it failed.
    Shut(u32),
    /// It has come as far as the ping of that number.
    Pong(u32),
    /// The guest waits for these pages: whole ones of the block's own size.
    RequestPages {
        /// The block.
        block: BlockIndex,
        /// Where in the block.
        span: Span,
    },
    /// After a break: the bitmap of pages that have come follows, [`bitmap_bytes`](Self::bitmap_bytes) of the block, and
    /// [`Self::encode_bitmap_end`]. Bit by bit from the lowest of the first byte on, 1 is a page that has come.
    ReceivedBitmap(BlockIndex),
    /// After a break: it goes on.
    ResumeAck,
    /// The source may switch (capability `switchover-ack`, 8.1).
    SwitchoverAck,
}

impl Answer {
    /// How long a bitmap of a block is: a bit for each 4 KiB, in whole words of 64.
    #[must_use]
    pub const fn bitmap_bytes(block: &Block) -> u64 {
        (block.length_bytes / PAGE_BYTES_U64).div_ceil(64) * 8
    }

    /// Appends it. A block that is not in the table is left out, which only a caller that mixes up two VMs can have.
    pub fn encode(&self, blocks: &Blocks, out: &mut Vec<u8>) {
        let head = |kind: u16, length: usize, out: &mut Vec<u8>| {
            put_u16(kind, out);
            put_u16(length as u16, out);
        };
        let number = |kind: u16, number: u32, out: &mut Vec<u8>| {
            head(kind, 4, out);
            put_u32(number, out);
        };
        match self {
            Self::Shut(code) => number(SHUT, *code, out),
            Self::Pong(of) => number(PONG, *of, out),
            Self::ResumeAck => number(RESUME_ACK, RESUMED, out),
            Self::SwitchoverAck => head(SWITCHOVER_ACK, 0, out),
            Self::RequestPages { block, span } => {
                let Some(block) = blocks.get(*block) else { return };
                head(REQ_PAGES_ID, 13 + block.name.len(), out);
                put_u64(span.start_bytes, out);
                put_u32(span.length_bytes as u32, out);
                put_name(&block.name, out);
            }
            Self::ReceivedBitmap(block) => {
                let Some(block) = blocks.get(*block) else { return };
                head(RECV_BITMAP, 1 + block.name.len(), out);
                put_name(&block.name, out);
                put_u64(Self::bitmap_bytes(block), out);
            }
        }
    }

    /// Appends what stands behind a bitmap.
    pub fn encode_bitmap_end(out: &mut Vec<u8>) {
        put_u64(BITMAP_END, out);
    }
}

/// One thing of a return path. Ranges are of the bytes that the decoder was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerItem {
    /// An answer.
    Answer(Answer),
    /// Bytes of the bitmap that [`Answer::ReceivedBitmap`] announced.
    BitmapBytes {
        /// The next ones.
        bytes: Range<usize>,
        /// How many are still to come.
        left_bytes: u64,
    },
    /// The bitmap was whole.
    BitmapEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Answers,
    Bitmap { left_bytes: u64 },
    Shut,
}

/// Takes a destination's answers apart.
#[derive(Clone, Debug)]
pub struct AnswerDecoder {
    stage: Stage,
    /// The block that was last asked for: a request may say "the same".
    last: Option<BlockIndex>,
    taken_bytes: u64,
}

impl Default for AnswerDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl AnswerDecoder {
    /// For a connection, from its first answer on.
    #[must_use]
    pub const fn new() -> Self {
        Self { stage: Stage::Answers, last: None, taken_bytes: 0 }
    }

    /// Takes the next item off the front of what has come, as [`StreamDecoder::next`](crate::StreamDecoder::next) does, and
    /// holds it against the VM's blocks.
    ///
    /// # Errors
    /// What no QEMU answers to a stream of this VM.
    pub fn next(
        &mut self,
        blocks: &Blocks,
        input: &[u8],
    ) -> Result<Option<(AnswerItem, usize)>, StreamError> {
        let mut cursor = Cursor::new(input);
        let taken = match self.stage {
            Stage::Answers => self.answer(blocks, &mut cursor),
            Stage::Bitmap { left_bytes } => bitmap(left_bytes, input.len(), &mut cursor),
            Stage::Shut if input.is_empty() => Err(Stop::Short),
            Stage::Shut => Err(StreamErrorKind::Order("a byte behind SHUT").into()),
        };
        match taken {
            Ok(item) => {
                self.advance(&item, blocks);
                self.taken_bytes += cursor.at() as u64;
                Ok(Some((item, cursor.at())))
            }
            Err(Stop::Short) => Ok(None),
            Err(Stop::Refused(kind)) => {
                Err(StreamError { at_bytes: self.taken_bytes + cursor.at() as u64, kind })
            }
        }
    }

    fn answer(&self, blocks: &Blocks, cursor: &mut Cursor<'_>) -> Result<AnswerItem, Stop> {
        let (kind, length) = (cursor.u16()?, cursor.u16()?);
        let (least, most) = match kind {
            SHUT | PONG | RESUME_ACK => (4, 4),
            REQ_PAGES => (12, 12),
            REQ_PAGES_ID => (13, 13 + 255),
            RECV_BITMAP => (1, 1 + 255),
            SWITCHOVER_ACK => (0, 0),
            other => return Err(StreamErrorKind::Unknown("answer", other.into()).into()),
        };
        let wrong = || bounds("an answer's length", length.into(), "as long as what it says");
        if !(least..=most).contains(&length) {
            return Err(wrong());
        }
        let mut body = Cursor::new(cursor.take(length.into())?);
        let answer = self.body(kind, blocks, &mut body).map_err(|stop| match stop {
            Stop::Short => wrong(),
            refused => refused,
        })?;
        if body.left() > 0 {
            return Err(wrong());
        }
        if let Answer::ReceivedBitmap(index) = answer {
            let bytes = cursor.u64()?;
            if blocks.get(index).is_none_or(|block| Answer::bitmap_bytes(block) != bytes) {
                return Err(bounds("a bitmap's length", bytes, "a bit for each page of its block"));
            }
        }
        Ok(AnswerItem::Answer(answer))
    }

    fn body(&self, kind: u16, blocks: &Blocks, body: &mut Cursor<'_>) -> Result<Answer, Stop> {
        Ok(match kind {
            SHUT => Answer::Shut(body.u32()?),
            PONG => Answer::Pong(body.u32()?),
            RESUME_ACK => match body.u32()? {
                RESUMED => Answer::ResumeAck,
                other => return Err(bounds("RESUME_ACK", other.into(), "1")),
            },
            SWITCHOVER_ACK => Answer::SwitchoverAck,
            RECV_BITMAP => Answer::ReceivedBitmap(blocks.take(body)?.0),
            _ => {
                let span = Span { start_bytes: body.u64()?, length_bytes: body.u32()?.into() };
                let (index, block) = if kind == REQ_PAGES_ID {
                    blocks.take(body)?
                } else {
                    let before = self.last.and_then(|last| Some((last, blocks.get(last)?)));
                    before
                        .ok_or(StreamErrorKind::Order("a request of the block before, where there is none"))?
                };
                block.check_span(span, block.page_bytes)?;
                Answer::RequestPages { block: index, span }
            }
        })
    }

    fn advance(&mut self, item: &AnswerItem, blocks: &Blocks) {
        match item {
            AnswerItem::Answer(Answer::Shut(_)) => self.stage = Stage::Shut,
            AnswerItem::Answer(Answer::RequestPages { block, .. }) => self.last = Some(*block),
            AnswerItem::Answer(Answer::ReceivedBitmap(block)) => {
                let left_bytes = blocks.get(*block).map_or(0, Answer::bitmap_bytes);
                self.stage = Stage::Bitmap { left_bytes };
            }
            AnswerItem::BitmapBytes { left_bytes, .. } => {
                self.stage = Stage::Bitmap { left_bytes: *left_bytes };
            }
            AnswerItem::BitmapEnd => self.stage = Stage::Answers,
            AnswerItem::Answer(_) => {}
        }
    }
}

/// As much of a bitmap as there is, or its end.
fn bitmap(left_bytes: u64, there: usize, cursor: &mut Cursor<'_>) -> Result<AnswerItem, Stop> {
    if left_bytes == 0 {
        return match cursor.u64()? {
            BITMAP_END => Ok(AnswerItem::BitmapEnd),
            other => Err(StreamErrorKind::Unknown("end of a bitmap", other).into()),
        };
    }
    let length = there.min(usize::try_from(left_bytes).unwrap_or(usize::MAX));
    if length == 0 {
        return Err(Stop::Short);
    }
    cursor.take(length)?;
    Ok(AnswerItem::BitmapBytes { bytes: 0..length, left_bytes: left_bytes - length as u64 })
}
