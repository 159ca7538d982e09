//! How a request went.

use super::Malformed;

/// How a request went. Zero is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done, or not an answer.
    Ok = 1,
    /// The bytes were not understood.
    Malformed = 2,
    /// No common version.
    Version = 3,
    /// The pool secret differs.
    Secret = 4,
    /// No such volume here.
    NoVolume = 5,
    /// The epoch was replaced.
    Fenced = 6,
    /// The volume's state does not allow it (sealed, parked, dissolved).
    State = 7,
    /// No memory left within the operator's limit.
    Full = 8,
    /// Too many connections or volumes.
    Busy = 9,
    /// More copies than this server makes.
    Copies = 10,
    /// The server is going.
    Going = 11,
    /// Something failed inside the server; its log says what.
    Internal = 12,
    /// Its memory is not reached in this way here, or not any more.
    NotReached = 13,
}

impl Status {
    pub(super) const ALL: [Self; 13] = [
        Self::Ok,
        Self::Malformed,
        Self::Version,
        Self::Secret,
        Self::NoVolume,
        Self::Fenced,
        Self::State,
        Self::Full,
        Self::Busy,
        Self::Copies,
        Self::Going,
        Self::Internal,
        Self::NotReached,
    ];

    pub(super) fn decode(value: u16) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|status| *status as u16 == value)
            .ok_or(Malformed::Unknown("status", u32::from(value)))
    }

    /// The kind of error that this status is for the one who asked; `None` for `Ok`.
    #[must_use]
    pub fn error_kind(self) -> Option<crate::ErrorKind> {
        use crate::ErrorKind as K;
        match self {
            Self::Ok => None,
            Self::Malformed | Self::Internal | Self::Copies => Some(K::Protocol),
            Self::Version => Some(K::Version),
            Self::Secret => Some(K::Refused),
            Self::NoVolume | Self::State => Some(K::Volume),
            Self::Fenced => Some(K::Fenced),
            Self::Full | Self::Busy => Some(K::Full),
            Self::Going | Self::NotReached => Some(K::Unreachable),
        }
    }
}
