//! What the kernel knows of a connection's path, asked not too often, and the pace that it keeps there.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::pace::{KernelPace, TcpInfo};
use crate::wire::Header;

/// How long a sample is good for: a round trip of a local network, many batches.
const SAMPLE_EVERY: Duration = Duration::from_millis(1);

/// The last sample of a connection's path.
#[derive(Debug, Default)]
pub struct TcpPath {
    info: TcpInfo,
    sampled: Option<Instant>,
    /// Something was written since the sample.
    wrote: bool,
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
            if host::has_tcp()
                && let Ok(info) = TcpInfo::read(socket)
            {
                (self.info, self.wrote) = (info, false);
            }
        }
        &self.info
    }

    /// Has the kernel send no more than so many bytes/s from now on; `None` lets it go.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn pace(&mut self, socket: impl AsFd, bytes_per_s: Option<u64>) -> Result<()> {
        if bytes_per_s.is_some() && !host::has_tcp() {
            return Err(Error::new(ErrorKind::System, "the connection is not TCP"));
        }
        Ok(self.pace.set(socket, bytes_per_s)?)
    }

    /// Bytes were written to the socket.
    pub const fn wrote(&mut self, bytes: usize) {
        self.wrote |= bytes > 0;
    }

    /// Whether something is on its way, or waits for it, as far as the last sample says.
    #[must_use]
    pub const fn is_carrying(&self) -> bool {
        self.wrote || self.info.notsent_bytes > 0 || self.info.unacked > 0
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

#[cfg(test)]
mod test {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_path_carries_until_the_kernel_says_that_nothing_is_left() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let _far = listener.accept().expect("accepted");
        let (mut path, mut now) = (TcpPath::new(), Instant::now());
        path.refresh(&near, now);
        path.wrote(0);
        assert!(!path.is_carrying());
        near.write_all(&[7; 4096]).expect("open");
        path.wrote(4096);
        path.refresh(&near, now);
        assert!(path.is_carrying(), "nobody has asked since");
        // Of loopback all is acknowledged soon.
        while path.is_carrying() {
            std::thread::sleep(Duration::from_millis(1));
            now += SAMPLE_EVERY;
            path.refresh(&near, now);
        }
        assert!(path.info().bytes_acked >= 4096, "{:?}", path.info());
    }
}
