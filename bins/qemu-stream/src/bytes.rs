//! Big-endian numbers and names, off the front of what has come, and behind what is to be sent.

use crate::error::StreamErrorKind;
use crate::limits::NAME_BYTES_MAX;

/// Why an item cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Not all of it has come.
    Short,
    /// It is refused.
    Refused(StreamErrorKind),
}

impl<E: Into<StreamErrorKind>> From<E> for Stop {
    fn from(kind: E) -> Self {
        Self::Refused(kind.into())
    }
}

/// What has come, and how much of it was read.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read.
    pub(crate) const fn at(&self) -> usize {
        self.at
    }

    /// Bytes that are there and not read.
    pub(crate) const fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..length)).ok_or(Stop::Short)?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| Stop::Short)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn uuid(&mut self) -> Result<[u8; 16], Stop> {
        self.array()
    }

    /// The next byte, which is not read.
    pub(crate) fn peek(&self) -> Result<u8, Stop> {
        self.bytes.get(self.at).copied().ok_or(Stop::Short)
    }

    /// The next eight bytes as a number, which are not read.
    pub(crate) fn peek_u64(&self) -> Result<u64, Stop> {
        Cursor { ..*self }.u64()
    }

    /// A name behind its length in one byte, as it is.
    pub(crate) fn name(&mut self) -> Result<&'a [u8], Stop> {
        let length = self.u8()?;
        self.take(length.into())
    }

    /// A name that is text, and not empty.
    pub(crate) fn text(&mut self, what: &'static str) -> Result<&'a str, Stop> {
        let name = self.name()?;
        text(name, what)
    }
}

/// Bytes of a name as text: printable, and not empty.
pub(crate) fn text<'a>(name: &'a [u8], what: &'static str) -> Result<&'a str, Stop> {
    let text = std::str::from_utf8(name).map_err(|_| StreamErrorKind::Text(what))?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(StreamErrorKind::Text(what).into());
    }
    Ok(text)
}

/// Appends a name behind its length. One that is too long for a byte is cut: no value of this crate has such a name.
pub(crate) fn put_name(name: &str, out: &mut Vec<u8>) {
    let name = name.as_bytes();
    let length = name.len().min(NAME_BYTES_MAX);
    out.push(length as u8);
    out.extend(name.iter().take(length));
}

pub(crate) fn put_u16(value: u16, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(crate) fn put_u32(value: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(crate) fn put_u64(value: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_be_bytes());
}
