//! QEMU's migration stream as bytes, for who stands between a stock QEMU and another, or in the place of one.
//!
//! A leaf: no sockets, no files, no clock. [`StreamDecoder`] takes what a source QEMU sends, [`AnswerDecoder`] what a
//! destination QEMU answers; [`Configuration`], [`Blocks`], [`Command`], [`Records`] and [`Answer`] write the same bytes.
//! Post-copy without further capabilities is all that is spoken, since version 7.2:
//!
//! ```text
//! source QEMU                                                     destination QEMU
//!   "QEVM" 3, configuration                                Item::Configuration
//!   OPEN_RETURN_PATH, PING, POSTCOPY_ADVISE                Item::Command
//!   SECTION_START ram: every block's name and length       Item::Start
//!   SECTION_PART ram: pages, while the VM runs             Item::PartBegins, Page | Zero .., PartEnds
//!   [SWITCHOVER_START], RAM_DISCARD .., PING               Item::Command
//!   PACKAGED: LISTEN, every device, PING, RUN              Item::Command, PackageBytes ..
//!   PING                                                   Item::Command
//!   SECTION_PART ram: all other pages                      Item::PartBegins ..
//!   SECTION_END ram, EOF                                   Item::PartBegins { last } .., End
//!
//!   after a break:  RECV_BITMAP for each block, RESUME     StreamDecoder::recovering
//!
//!   Answer:  <---------------  PONG, REQ_PAGES, SHUT; after a break RECV_BITMAP, RESUME_ACK
//! ```
//!
//! **Strict.** What follows a section or a record that is not known cannot be found, since few of them say their length.
//! So all that is not in the picture is refused, with the name of the capability or device that it belongs to.
//! The only thing that passes unread is the package: its length is known, and what is in it is the destination's.
//!
//! **Piece by piece, and not copied.** A decoder is given whatever has come. It takes one item off its front, or says
//! that more is needed, at most [`limits::ITEM_BYTES_MAX`] in all. Bytes of pages and of the package are ranges of what it was
//! given. Nothing is allocated on the way of a page, and nothing elsewhere before its length was held against
//! [`limits`].
//!
//! ```
//! use qemu_stream::{Command, Configuration, Item, StreamDecoder};
//!
//! let mut stream = Vec::new();
//! Configuration::new("pc-q35-7.2").encode(&mut stream);
//! Command::Ping(1).encode(&Default::default(), &mut stream);
//!
//! let mut decoder = StreamDecoder::new();
//! let (item, taken) = decoder.next(&stream)?.expect("it is all there");
//! assert!(matches!(item, Item::Configuration(it) if it.machine == "pc-q35-7.2"));
//! assert!(decoder.next(&stream[taken..taken + 3])?.is_none());
//! assert_eq!(decoder.next(&stream[taken..])?, Some((Item::Command(Command::Ping(1)), 9)));
//! # Ok::<(), qemu_stream::StreamError>(())
//! ```

#![deny(clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::indexing_slicing))]

pub mod limits;
mod error;
mod bytes;
mod blocks;
mod configuration;
mod command;
mod package;
mod records;
mod stream;
mod answer;

pub use answer::{Answer, AnswerDecoder, AnswerItem};
pub use blocks::{Block, BlockIndex, Blocks};
pub use command::{Command, Discard, Span};
pub use configuration::Configuration;
pub use error::{StreamError, StreamErrorKind, Unsupported};
pub use package::{Package, PackageError};
pub use records::{END_OF_STREAM, Records};
pub use stream::{Item, StreamDecoder};

/// Bytes of a page of the stream, whatever the pages of its block are.
pub const PAGE_BYTES: usize = 4096;

/// [`PAGE_BYTES`], for arithmetic with offsets.
pub const PAGE_BYTES_U64: u64 = PAGE_BYTES as u64;
