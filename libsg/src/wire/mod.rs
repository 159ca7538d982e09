//! The wire: what peers say to each other, as bytes. A leaf: no sockets here, only encode and decode.
//!
//! Every frame is a fixed 64-byte little-endian [`Header`] and a body whose length the header
//! bounds. There are three kinds of body: tables of fixed-size entries ([`entry`]) or of runs of them ([`run`]),
//! such tables followed by raw page bytes (which never pass through the encoder), and control messages
//! ([`message`], postcard). A connection opens with the [`handshake`], whose bytes are pinned by golden tests.
//!
//! `decode` functions are the only parsers of a peer's bytes. They never panic and allocate nothing
//! that the caller has not bounded.

pub mod access;
pub mod announcement;
pub mod copies;
mod credit;
pub mod datagram;
pub mod entry;
pub mod final_set;
pub mod handover;
pub mod handshake;
pub mod header;
mod heads;
pub mod link_use;
pub mod mending;
pub mod message;
pub mod parking;
pub mod placement;
pub mod run;
mod status;

pub use copies::Missing;
pub use credit::Credit;
pub use entry::{DiscardEntry, Encoding, GetEntry, HintEntry, IndexEntry, PageEntry, ReferEntry, Referral};
pub use handover::MovedEntry;
pub use header::{HEADER_BYTES, Header, Kind};
pub use status::Status;

/// Versions of the wire protocol, newest first.
///
/// | version | what changed |
/// | --- | --- |
/// | 1 | the first |
pub const VERSION_NEWEST: u16 = 1;

/// The oldest version that this build still speaks.
pub const VERSION_OLDEST: u16 = 1;

/// Why bytes were refused: what no honest peer of a known version sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer bytes than the structure has.
    #[error("the bytes end too early")]
    Truncated,
    /// More bytes than the structure has.
    #[error("bytes are left over at the end")]
    Trailing,
    /// The first bytes are not ours: not a libsg peer.
    #[error("the first bytes are not libsg's")]
    Magic,
    /// A version this build does not speak.
    #[error("version {0} is not spoken here")]
    Version(u16),
    /// The header's own checksum does not match.
    #[error("the header's checksum does not match")]
    HeaderChecksum,
    /// The checksum of what is said in a frame's body does not match.
    #[error("the checksum of the body does not match")]
    BodyChecksum,
    /// A number that is not one of the enum's.
    #[error("{0} has no value {1}")]
    Unknown(&'static str, u32),
    /// Reserved bytes that are not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// A number outside its bounds.
    #[error("{0} is out of bounds")]
    Bounds(&'static str),
    /// A datagram that nobody of this pool has sealed.
    #[error("it was not sealed with this pool's secret")]
    Sealed,
    /// A control message that does not decode.
    #[error("a control message does not decode")]
    Message,
}

impl From<Malformed> for crate::Error {
    fn from(cause: Malformed) -> Self {
        let kind = match cause {
            Malformed::Version(_) => crate::ErrorKind::Version,
            _ => crate::ErrorKind::Protocol,
        };
        Self::new(kind, "a peer's bytes were refused").because(cause)
    }
}
