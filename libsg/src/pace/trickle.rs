//! A pace that is too low for the kernel to keep.
//!
//! A paced socket sends in pieces of up to 64 KiB. When the next one may go is worked out as one goes, and not again when the
//! pace is changed (`tcp_update_skb_after_send`, net/ipv4/tcp_output.c): at 5 KB/s for a moment nothing went for 13 s after
//! each piece, whatever was allowed by then. So the kernel is not told less than [`KERNEL_PACE_MIN`]; below it whoever
//! sends waits for tokens, which fill at the pace of the moment.

use std::time::{Duration, Instant};

use super::bucket::TokenBucket;

/// The least pace that the kernel is told, in bytes/s: a piece holds up those behind it for half a second. What bulk keeps of a
/// link of 1 Gb/s beside a destination that takes all is more.
pub(super) const KERNEL_PACE_MIN: u64 = 2 * (64 << 10);

/// What is written at once below that.
const PIECE_BYTES: u64 = 16 << 10;

/// How long the pace of the moment is believed.
const LOOK: Duration = Duration::from_millis(20);

/// What a sender whose kernel paces may write.
#[derive(Debug)]
pub struct Trickle(TokenBucket);

impl Trickle {
    /// Nothing is held back yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self(TokenBucket::new(now, None))
    }

    /// The pace in bytes/s from now on, which the kernel was told as well; `None` is none.
    pub fn set(&mut self, now: Instant, pace: Option<u64>) {
        self.0.set_rate(now, pace.filter(|pace| *pace < KERNEL_PACE_MIN));
    }

    /// Bytes that may be written now.
    ///
    /// # Errors
    /// When it is worth asking again.
    pub fn allows(&mut self, now: Instant) -> Result<u64, Instant> {
        if self.0.rate().is_none() {
            return Ok(u64::MAX);
        }
        match self.0.wait(now) {
            Duration::ZERO => Ok(PIECE_BYTES),
            wait => Err(now + wait.min(LOOK)),
        }
    }

    /// So many were.
    pub fn wrote(&mut self, now: Instant, bytes: usize) {
        self.0.charge(now, bytes as u64);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_the_kernel_keeps_is_left_to_it() {
        let now = Instant::now();
        let mut trickle = Trickle::new(now);
        for pace in [None, Some(KERNEL_PACE_MIN), Some(u64::MAX)] {
            trickle.set(now, pace);
            assert_eq!(trickle.allows(now), Ok(u64::MAX));
            trickle.wrote(now, 1 << 30);
            assert_eq!(trickle.allows(now), Ok(u64::MAX));
        }
    }

    #[test]
    fn a_low_pace_is_kept_and_forgotten_when_it_is_over() {
        const PACE: u64 = 20_000;
        let begin = Instant::now();
        let (mut trickle, mut now, mut sent) = (Trickle::new(begin), begin, 0);
        trickle.set(now, Some(PACE));
        while now < begin + Duration::from_secs(10) {
            match trickle.allows(now) {
                Ok(may) => {
                    trickle.wrote(now, may as usize);
                    sent += may;
                }
                Err(at) => {
                    assert!(at > now && at <= now + LOOK);
                    now = at;
                }
            }
        }
        assert!((9 * PACE..=11 * PACE + 2 * PIECE_BYTES).contains(&sent), "{sent}");
        // What a piece takes at 5 KB/s nobody knows any more.
        trickle.set(now, Some(5_000));
        while trickle.allows(now).is_ok() {
            trickle.wrote(now, 64 << 10);
        }
        trickle.set(now, Some(KERNEL_PACE_MIN - 1));
        assert!(trickle.allows(now + Duration::from_millis(101)).is_ok());
        trickle.set(now, None);
        assert_eq!(trickle.allows(now), Ok(u64::MAX));
    }
}
