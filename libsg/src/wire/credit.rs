//! Credit of the direct path: how far the source may write, and how fast.

use super::Malformed;

/// The body of a `Credit` frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes that may be written on the connection in all. It only grows.
    pub limit: u64,
    /// Bytes/s that the destination's port carries: credit that has gathered is used no faster. `None` while
    /// that is not known.
    pub pace: Option<u64>,
}

impl Credit {
    /// Length on the wire.
    pub const BYTES: usize = 16;

    /// The wire form; no pace is 0.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.limit.to_le_bytes());
        bytes[8..].copy_from_slice(&self.pace.unwrap_or(0).to_le_bytes());
        bytes
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] for any other length.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (limit, pace) = bytes.split_at_checked(8).ok_or(Malformed::Truncated)?;
        let number =
            |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).map_err(|_| Malformed::Truncated);
        let pace = number(pace)?;
        Ok(Self { limit: number(limit)?, pace: (pace > 0).then_some(pace) })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for pace in [None, Some(1), Some(125_000_000), Some(u64::MAX)] {
            let credit = Credit { limit: 1 << 40, pace };
            assert_eq!(Credit::decode(&credit.encode()), Ok(credit));
        }
        for length in [0, 7, 8, 15, 17] {
            assert_eq!(Credit::decode(&vec![1; length]), Err(Malformed::Truncated), "{length}");
        }
    }
}
