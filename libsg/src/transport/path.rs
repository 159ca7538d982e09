//! What the kernel knows of a connection's path, asked not too often, and the pace that it keeps there.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::pace::{KernelPace, TcpInfo};
use crate::wire::Header;

/// How long a sample is good for: a round trip of a local network, many batches.
const SAMPLE_EVERY: Duration = Duration::from_millis(1);

/// The last sample of a connection's path.
#[derive(Debug, Default)]
pub struct TcpPath {
    info: TcpInfo,
    sampled: Option<Instant>,
    pace: KernelPace,
}

impl TcpPath {
    /// Without a sample yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the kernel, unless it was asked within the last millisecond. A socket that is broken
    /// keeps its last sample: reading or writing it tells.
    pub fn refresh(&mut self, socket: impl AsFd, now: Instant) -> &TcpInfo {
        if self.sampled.is_none_or(|sampled| now.saturating_duration_since(sampled) >= SAMPLE_EVERY) {
            self.sampled = Some(now);
            if let Ok(info) = TcpInfo::read(socket) {
                self.info = info;
            }
        }
        &self.info
    }

    /// Has the kernel send no more than so many bytes/s from now on; `None` lets it go.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn pace(&mut self, socket: impl AsFd, bytes_per_s: Option<u64>) -> Result<()> {
        Ok(self.pace.set(socket, bytes_per_s)?)
    }

    /// The last sample; all zero before the first.
    #[must_use]
    pub const fn info(&self) -> &TcpInfo {
        &self.info
    }

    /// How long what we send waits in queues, for [`crate::wire::Header::delay_us`].
    #[must_use]
    pub fn delay_us(&self) -> Option<u32> {
        self.info.queue_delay().map(Header::delay_us_of)
    }
}
