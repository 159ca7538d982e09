//! Reading a frame's body, whole or part by part: nothing is made room for that was not bounded before.

use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::server::stream::Stream;
use crate::wire::run::{self, RunEntry};
use crate::wire::{Header, Malformed};

/// Reads what is said in front of a batch's pages, and says how many bytes follow: first `before_bytes`, which `body` then
/// begins with, and behind them the table, part by part.
pub(super) fn read_table<E: RunEntry>(
    stream: &mut Stream<'_>,
    (header, before_bytes): (&Header, usize),
    body: &mut Vec<u8>,
    out: &mut Vec<E>,
) -> Result<usize> {
    let body_bytes = header.body_bytes as usize;
    let heads_end = before_bytes + usize::from(header.count) * E::HEAD_BYTES;
    if usize::from(header.count) > limits::BATCH_PAGES_MAX || heads_end > body_bytes {
        return Err(Malformed::Bounds("entries of a batch").into());
    }
    body.resize(heads_end, 0);
    read_whole(stream, body)?;
    let masks_end = heads_end + run::mask_bytes::<E>(&body[before_bytes..])?;
    if masks_end > body_bytes {
        return Err(Malformed::Bounds("entries of a batch").into());
    }
    body.resize(masks_end, 0);
    read_whole(stream, &mut body[heads_end..])?;
    run::decode_heads(&body[before_bytes..heads_end], &body[heads_end..], out)?;
    let end = masks_end + run::checksum_bytes(out);
    let left = body_bytes.checked_sub(end).ok_or(Malformed::Bounds("bytes of a batch"))?;
    body.resize(end, 0);
    read_whole(stream, &mut body[masks_end..])?;
    run::decode_checksums(&body[masks_end..], out)?;
    header.check_said(body)?;
    Ok(left)
}

pub(super) fn read_whole(stream: &mut Stream<'_>, body: &mut [u8]) -> Result<()> {
    if body.is_empty() || stream.read(body)? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unreachable, "the peer closed the connection within a frame"))
}
