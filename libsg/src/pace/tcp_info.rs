//! What the kernel knows of a connection (`TCP_INFO`) and how fast it lets it send. The only unsafe code of
//! pacing: one `getsockopt` and one `setsockopt` that no library offers.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// The kernel's `struct tcp_info` up to `tcpi_sndbuf_limited` (Linux 4.10; libc's type ends earlier).
/// Later kernels only append.
#[repr(C)]
#[derive(Clone, Copy, Default, zerocopy::FromBytes)]
struct Raw {
    states: [u8; 8],
    rto: u32,
    ato: u32,
    snd_mss: u32,
    rcv_mss: u32,
    unacked: u32,
    sacked: u32,
    lost: u32,
    retrans: u32,
    fackets: u32,
    last_data_sent: u32,
    last_ack_sent: u32,
    last_data_recv: u32,
    last_ack_recv: u32,
    pmtu: u32,
    rcv_ssthresh: u32,
    rtt: u32,
    rttvar: u32,
    snd_ssthresh: u32,
    snd_cwnd: u32,
    advmss: u32,
    reordering: u32,
    rcv_rtt: u32,
    rcv_space: u32,
    total_retrans: u32,
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in: u32,
    data_segs_out: u32,
    delivery_rate: u64,
    busy_time: u64,
    rwnd_limited: u64,
    sndbuf_limited: u64,
}

const _: () = assert!(size_of::<Raw>() == 192);
const _: () = assert!(std::mem::offset_of!(Raw, rtt) == 68);
const _: () = assert!(std::mem::offset_of!(Raw, bytes_acked) == 120);
const _: () = assert!(std::mem::offset_of!(Raw, min_rtt) == 148);

/// What pacing needs of a connection's state. Times are as the kernel smooths them, bytes count since the
/// connection exists unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round trip in microseconds; 0 before the first sample.
    pub rtt_us: u32,
    /// Least round trip of the last minutes in microseconds; `u32::MAX` before the first sample.
    pub min_rtt_us: u32,
    /// Bytes acknowledged by the peer.
    pub bytes_acked: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Bytes in the send buffer that were never sent, now.
    pub notsent_bytes: u32,
    /// Delivery rate of the latest acknowledgements in bytes/s.
    pub delivery_rate: u64,
    /// Congestion window in segments, now.
    pub snd_cwnd: u32,
    /// Segments in flight, now.
    pub unacked: u32,
    /// Bytes in one full segment.
    pub snd_mss: u32,
    /// Segments sent again.
    pub total_retrans: u32,
    /// Microseconds in which the peer's window kept data from being sent.
    pub rwnd_limited_us: u64,
}

impl TcpInfo {
    /// Reads the state of a TCP socket. Fields that an older kernel lacks are 0.
    ///
    /// # Errors
    /// The socket is not TCP, or closed.
    pub fn read(socket: impl AsFd) -> io::Result<Self> {
        let mut raw = Raw::default();
        let mut length = size_of::<Raw>() as libc::socklen_t;
        // SAFETY: `raw` is a live, exclusively borrowed, plain-data value in which every bit pattern is
        // valid (`FromBytes`), `length` is its size, so the kernel writes inside it; `length` outlives the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut raw).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::from(&raw))
    }

    /// How much longer the round trip is now than at best: the queueing delay, as far as the sending side
    /// can see it. `None` before the first sample.
    #[must_use]
    pub fn queue_delay(&self) -> Option<Duration> {
        let base = self.base_rtt()?;
        Some(Duration::from_micros(self.rtt_us.into()).saturating_sub(base))
    }

    /// The least round trip. `None` before the first sample.
    #[must_use]
    pub fn base_rtt(&self) -> Option<Duration> {
        let known = self.rtt_us != 0 && self.min_rtt_us != u32::MAX;
        known.then(|| Duration::from_micros(self.min_rtt_us.into()))
    }
}

/// How much faster than the pacing rate the kernel may send what it was given: a thread that woke late
/// catches up, and its lump still leaves spread out.
const SMOOTH_SHARE: f64 = 1.2;

/// Lets the kernel spread each grant over time, for a pacing rate in bytes/s; `None` lets it go. Pacing in
/// user space decides how much leaves, which the kernel cannot share over sockets; the kernel's timers decide
/// when within a grant, whatever keeps a thread from running.
///
/// # Errors
/// The socket is closed, or the kernel is older than 4.20.
pub fn smooth(socket: impl AsFd, rate: Option<u64>) -> io::Result<()> {
    let most: u64 = rate.map_or(u64::MAX, |rate| (rate as f64 * SMOOTH_SHARE) as u64);
    // SAFETY: the kernel reads the 8 bytes of `most`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const most).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl From<&Raw> for TcpInfo {
    fn from(raw: &Raw) -> Self {
        Self {
            rtt_us: raw.rtt,
            min_rtt_us: raw.min_rtt,
            bytes_acked: raw.bytes_acked,
            bytes_received: raw.bytes_received,
            notsent_bytes: raw.notsent_bytes,
            delivery_rate: raw.delivery_rate,
            snd_cwnd: raw.snd_cwnd,
            unacked: raw.unacked,
            snd_mss: raw.snd_mss,
            total_retrans: raw.total_retrans,
            rwnd_limited_us: raw.rwnd_limited,
        }
    }
}

#[cfg(test)]
mod test {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn counts_what_a_connection_carried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        for _ in 0..4 {
            near.write_all(&[7; 4096]).unwrap();
            far.read_exact(&mut [0; 4096]).unwrap();
            far.write_all(&[1]).unwrap();
            near.read_exact(&mut [0; 1]).unwrap();
        }
        let info = TcpInfo::read(&near).unwrap();
        assert!(info.bytes_acked >= 4 * 4096 && info.bytes_acked < 5 * 4096, "{info:?}");
        assert_eq!(info.bytes_received, 4);
        assert!(info.rtt_us > 0 && info.min_rtt_us > 0 && info.min_rtt_us < 10_000_000, "{info:?}");
        assert!(info.queue_delay().is_some());
        assert!(TcpInfo::read(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn smoothing_sets_and_lifts_the_kernels_rate() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        smooth(&near, Some(1_000_000)).unwrap();
        smooth(&near, None).unwrap();
        assert!(smooth(std::fs::File::open("/dev/null").unwrap(), None).is_err());
    }

    #[test]
    fn no_sample_no_delay() {
        let fresh = TcpInfo { min_rtt_us: u32::MAX, ..TcpInfo::default() };
        assert_eq!(fresh.queue_delay(), None);
        let later = TcpInfo { rtt_us: 350, min_rtt_us: 50, ..fresh };
        assert_eq!(later.queue_delay(), Some(Duration::from_micros(300)));
    }
}
