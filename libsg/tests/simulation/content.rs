//! What is in a page: it follows from its number and its versions, so that any bytes can be checked.

use libsg::page::{PAGE_BYTES, PageIndex};

use crate::random::Random;

/// Versions from here on are the same in each page of each VM.
pub const COMMON: u32 = u32::MAX - 255;

/// What is in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It has no memory.
    Absent,
    Zero,
    /// A version of its data.
    Version(u32),
    /// It is being written: its first half is of one version, its second of another; version 0 is zero.
    Torn(u32, u32),
}

/// What tells two contents of a page apart: a word of each half.
pub type Mark = [u64; 2];

/// That of some bytes.
pub fn mark(bytes: &[u8]) -> Mark {
    let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    [word(0), word(PAGE_BYTES / 2)]
}

impl Content {
    /// The same with later versions.
    pub fn later(self, versions: u32) -> Self {
        match self {
            Self::Version(version) if version < COMMON => Self::Version(version + versions),
            other => other,
        }
    }

    /// Nothing but zeros.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Absent | Self::Zero)
    }

    /// The versions of both halves.
    pub fn halves(self) -> [u32; 2] {
        match self {
            Self::Absent | Self::Zero => [0, 0],
            Self::Version(version) => [version, version],
            Self::Torn(first, second) => [first, second],
        }
    }

    /// That of two halves.
    pub fn of([first, second]: [u32; 2]) -> Self {
        match (first, second) {
            (0, 0) => Self::Zero,
            (first, second) if first == second => Self::Version(first),
            (first, second) => Self::Torn(first, second),
        }
    }

    pub fn mark(self, page: PageIndex) -> Mark {
        self.halves().map(|version| match version {
            0 => 0,
            version if version >= COMMON => Random::new(u64::from(version)).next() | 1,
            version => Random::new(u64::from(page.0) << 32 | u64::from(version)).next() | 1,
        })
    }

    pub fn bytes(self, page: PageIndex) -> Vec<u8> {
        let [first, second] = self.mark(page).map(u64::to_le_bytes);
        let words = PAGE_BYTES / 2 / first.len();
        [first.repeat(words), second.repeat(words)].concat()
    }

    /// Whether these bytes are this content.
    pub fn is(self, page: PageIndex, bytes: &[u8]) -> bool {
        bytes == self.bytes(page)
    }
}
