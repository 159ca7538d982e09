//! Reading a frame's body, whole or part by part: nothing is made room for that was not bounded before.

use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::server::stream::Stream;
use crate::wire::run::{self, RunEntry};
use crate::wire::{Header, Malformed};

/// Reads the table of a batch, part by part, and says how many bytes follow it: `body_bytes` are left of the frame.
pub(super) fn read_table<E: RunEntry>(
    stream: &mut Stream<'_>,
    (header, body_bytes): (&Header, usize),
    body: &mut Vec<u8>,
    out: &mut Vec<E>,
) -> Result<usize> {
    let head_bytes = usize::from(header.count) * E::HEAD_BYTES;
    if usize::from(header.count) > limits::BATCH_PAGES_MAX || head_bytes > body_bytes {
        return Err(Malformed::Bounds("entries of a batch").into());
    }
    body.resize(head_bytes, 0);
    read_whole(stream, body)?;
    let mask_bytes = run::mask_bytes::<E>(body)?;
    if head_bytes + mask_bytes > body_bytes {
        return Err(Malformed::Bounds("entries of a batch").into());
    }
    body.resize(head_bytes + mask_bytes, 0);
    let (heads, masks) = body.split_at_mut(head_bytes);
    read_whole(stream, masks)?;
    run::decode_heads(heads, masks, out)?;
    let sum_bytes = run::checksum_bytes(out);
    let table_bytes = head_bytes + mask_bytes + sum_bytes;
    let left = body_bytes.checked_sub(table_bytes).ok_or(Malformed::Bounds("bytes of a batch"))?;
    body.resize(sum_bytes, 0);
    read_whole(stream, body)?;
    run::decode_checksums(body, out)?;
    Ok(left)
}

pub(super) fn read_whole(stream: &mut Stream<'_>, body: &mut [u8]) -> Result<()> {
    if body.is_empty() || stream.read(body)? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unreachable, "the peer closed the connection within a frame"))
}
