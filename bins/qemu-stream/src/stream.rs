//! What a source QEMU sends, item by item.

use std::ops::Range;

use crate::PAGE_BYTES;
use crate::blocks::{BlockIndex, Blocks};
use crate::bytes::{Cursor, Stop};
use crate::command::Command;
use crate::configuration::Configuration;
use crate::error::{StreamError, StreamErrorKind, Unsupported};
use crate::records::{
    COMMAND, END_OF_FILE, Record, SECTION_END, SECTION_FULL, SECTION_PART, SECTION_START, take_footer,
};

/// One thing that a source QEMU says. Ranges are of the bytes that the decoder was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The stream begins.
    Configuration(Configuration),
    /// Between sections.
    Command(Command),
    /// The memory's transfer begins: [`StreamDecoder::blocks`] and [`StreamDecoder::section`] are known.
    Start,
    /// Pages follow.
    PartBegins {
        /// No pages come after these.
        last: bool,
    },
    /// A page.
    Page {
        /// Its block.
        block: BlockIndex,
        /// Where in the block.
        offset_bytes: u64,
        /// Its [`PAGE_BYTES`].
        bytes: Range<usize>,
    },
    /// A page of zeros.
    Zero {
        /// Its block.
        block: BlockIndex,
        /// Where in the block.
        offset_bytes: u64,
    },
    /// No more pages in this section.
    PartEnds {
        /// Nor in another.
        last: bool,
    },
    /// Bytes of the package that [`Command::Packaged`] announced.
    PackageBytes {
        /// The next ones.
        bytes: Range<usize>,
        /// How many are still to come.
        left_bytes: u32,
    },
    /// The stream is over.
    End,
}

/// What may come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Header,
    /// Commands, then the memory's section.
    Setup,
    /// Pages while the VM runs at its source, then the package.
    PreCopy,
    Package {
        left_bytes: u32,
    },
    /// Pages, after the package.
    PostCopy,
    Part {
        last: bool,
        switched: bool,
    },
    /// Only the end of the stream.
    Ending,
    Ended,
    /// After a break.
    Recovery,
}

/// Takes a source's stream apart, and holds it against the order in which a QEMU says things.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    stage: Stage,
    /// The return path is open.
    opened: bool,
    /// The page sizes that were announced.
    advised: Option<u64>,
    blocks: Blocks,
    section: u32,
    /// The block of the last page: a page may say "the same", in the next section too.
    last: Option<BlockIndex>,
    taken_bytes: u64,
}

impl Default for StreamDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamDecoder {
    /// For a stream from its first byte on.
    #[must_use]
    pub fn new() -> Self {
        Self {
            stage: Stage::Header,
            opened: false,
            advised: None,
            blocks: Blocks::default(),
            section: 0,
            last: None,
            taken_bytes: 0,
        }
    }

    /// For what the source of a stream that broke off sends over its next connection.
    #[must_use]
    pub fn recovering(blocks: Blocks, section: u32) -> Self {
        Self { stage: Stage::Recovery, opened: true, blocks, section, ..Self::new() }
    }

    /// The VM's memory; none before [`Item::Start`].
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// The number by which the memory's sections go; 0 before [`Item::Start`].
    #[must_use]
    pub const fn section(&self) -> u32 {
        self.section
    }

    /// Whether nothing more may come.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Takes the next item off the front of what has come, and says how many bytes it was. `None`: more must come first. With
    /// [`ITEM_BYTES_MAX`](crate::limits::ITEM_BYTES_MAX) bytes there always is one, or an error.
    ///
    /// # Errors
    /// What no QEMU sends that is used as it must be. Then nothing more can be read of the stream.
    pub fn next(&mut self, input: &[u8]) -> Result<Option<(Item, usize)>, StreamError> {
        let mut cursor = Cursor::new(input);
        let taken = match self.stage {
            Stage::Header => Configuration::decode(&mut cursor).map(Item::Configuration),
            Stage::Package { left_bytes } => package(left_bytes, input.len(), &mut cursor),
            Stage::Part { last, .. } => self.record(last, &mut cursor),
            _ => self.between(&mut cursor),
        };
        match taken {
            Ok(item) => {
                self.advance(&item);
                self.taken_bytes += cursor.at() as u64;
                Ok(Some((item, cursor.at())))
            }
            Err(Stop::Short) => Ok(None),
            Err(Stop::Refused(kind)) => {
                Err(StreamError { at_bytes: self.taken_bytes + cursor.at() as u64, kind })
            }
        }
    }

    /// A record of a page, or the end of its section.
    fn record(&self, last: bool, cursor: &mut Cursor<'_>) -> Result<Item, Stop> {
        Ok(match Record::decode(&self.blocks, self.last, cursor)? {
            Record::Page(block, offset_bytes) => {
                let start = cursor.at();
                cursor.take(PAGE_BYTES)?;
                Item::Page { block, offset_bytes, bytes: start..start + PAGE_BYTES }
            }
            Record::Zero(block, offset_bytes) => Item::Zero { block, offset_bytes },
            Record::EndOfSection => {
                take_footer(self.section, cursor)?;
                Item::PartEnds { last }
            }
        })
    }

    /// What comes between sections.
    fn between(&mut self, cursor: &mut Cursor<'_>) -> Result<Item, Stop> {
        let order = |what| Err(StreamErrorKind::Order(what).into());
        match (cursor.u8()?, self.stage) {
            (_, Stage::Ended) => order("a byte behind the end of the stream"),
            (COMMAND, _) => {
                let command = Command::decode(&self.blocks, cursor)?;
                self.check_command(&command)?;
                Ok(Item::Command(command))
            }
            (SECTION_START, Stage::Setup) => {
                let (section, blocks) = Blocks::decode(cursor)?;
                if !self.opened {
                    return order("the memory's section before OPEN_RETURN_PATH");
                }
                match self.advised {
                    Some(sizes) if sizes == blocks.page_sizes() => {}
                    Some(_) => return order("a block whose page size was not announced"),
                    // It changes what the table of blocks looks like.
                    None => return order("the memory's section before POSTCOPY_ADVISE"),
                }
                (self.section, self.blocks) = (section, blocks);
                Ok(Item::Start)
            }
            (SECTION_START | SECTION_FULL, Stage::Setup | Stage::PreCopy) => {
                cursor.u32()?;
                Err(Unsupported::Section(cursor.text("a section's name")?.into()).into())
            }
            (SECTION_END, Stage::PreCopy) => Err(Unsupported::FinishedInPreCopy.into()),
            (SECTION_PART, Stage::PreCopy | Stage::PostCopy) => self.part(false, cursor),
            (SECTION_END, Stage::PostCopy) => self.part(true, cursor),
            (END_OF_FILE, Stage::Ending) => Ok(Item::End),
            (END_OF_FILE, _) => order("the end of the stream"),
            (SECTION_START | SECTION_FULL | SECTION_PART | SECTION_END, _) => order("a section"),
            (other, _) => Err(StreamErrorKind::Unknown("kind of section", other.into()).into()),
        }
    }

    fn part(&self, last: bool, cursor: &mut Cursor<'_>) -> Result<Item, Stop> {
        let section = cursor.u32()?;
        if section != self.section {
            return Err(StreamErrorKind::Unknown("section", section.into()).into());
        }
        Ok(Item::PartBegins { last })
    }

    fn check_command(&self, command: &Command) -> Result<(), Stop> {
        let (may, name) = match (command, self.stage) {
            (Command::OpenReturnPath, stage) => (stage == Stage::Setup && !self.opened, "OPEN_RETURN_PATH"),
            (Command::PostcopyAdvise { .. }, stage) => {
                (stage == Stage::Setup && self.advised.is_none(), "POSTCOPY_ADVISE")
            }
            (Command::Ping(_), stage) => {
                (matches!(stage, Stage::Setup | Stage::PreCopy | Stage::PostCopy), "PING")
            }
            (Command::RamDiscard(_), stage) => (stage == Stage::PreCopy, "POSTCOPY_RAM_DISCARD"),
            (Command::Packaged { .. }, stage) => (stage == Stage::PreCopy, "PACKAGED"),
            (Command::SwitchoverStart, stage) => (stage == Stage::PreCopy, "SWITCHOVER_START"),
            (Command::ReceivedBitmap(_), stage) => (stage == Stage::Recovery, "RECV_BITMAP"),
            (Command::PostcopyResume, stage) => (stage == Stage::Recovery, "POSTCOPY_RESUME"),
            (Command::PostcopyListen, _) => (false, "POSTCOPY_LISTEN outside of the package"),
            (Command::PostcopyRun, _) => (false, "POSTCOPY_RUN outside of the package"),
        };
        if may { Ok(()) } else { Err(StreamErrorKind::Order(name).into()) }
    }

    fn advance(&mut self, item: &Item) {
        self.stage = match item {
            Item::Configuration(_) => Stage::Setup,
            Item::Start => Stage::PreCopy,
            Item::PartBegins { last } => Stage::Part { last: *last, switched: self.stage == Stage::PostCopy },
            Item::PartEnds { last: true } => Stage::Ending,
            Item::PartEnds { last: false } => match self.stage {
                Stage::Part { switched: false, .. } => Stage::PreCopy,
                _ => Stage::PostCopy,
            },
            Item::Page { block, .. } | Item::Zero { block, .. } => {
                self.last = Some(*block);
                self.stage
            }
            Item::PackageBytes { left_bytes: 0, .. } => Stage::PostCopy,
            Item::PackageBytes { left_bytes, .. } => Stage::Package { left_bytes: *left_bytes },
            Item::End => Stage::Ended,
            Item::Command(command) => match command {
                Command::OpenReturnPath => {
                    self.opened = true;
                    self.stage
                }
                Command::PostcopyAdvise { page_sizes } => {
                    self.advised = Some(*page_sizes);
                    self.stage
                }
                Command::Packaged { length_bytes } => Stage::Package { left_bytes: *length_bytes },
                Command::PostcopyResume => Stage::PostCopy,
                _ => self.stage,
            },
        };
    }
}

/// As much of the package as there is.
fn package(left_bytes: u32, there: usize, cursor: &mut Cursor<'_>) -> Result<Item, Stop> {
    let length = there.min(left_bytes as usize);
    if length == 0 {
        return Err(Stop::Short);
    }
    cursor.take(length)?;
    Ok(Item::PackageBytes { bytes: 0..length, left_bytes: left_bytes - length as u32 })
}
