//! What the kernel knows of a connection (`TCP_INFO`), how fast it lets it send, and when it wakes who reads. The
//! only unsafe code of pacing: one `getsockopt` and one `setsockopt` that no library offers.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use socket2::SockRef;

use super::bucket::bytes_in;
use super::trickle::KERNEL_PACE_MIN;

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

/// A change of rate smaller than this share is not worth a system call.
const CHANGE_SHARE: f64 = 0.004;

/// How long a connection stays busy with what the kernel holds for it, should its thread be late.
const AHEAD_TIME: Duration = Duration::from_millis(12);

/// Least and most bytes that the kernel holds: one batch, and what a fast path takes in that time.
const AHEAD_BYTES: (u64, u64) = (128 << 10, 4 << 20);

/// The pace of one connection, kept by the kernel's timers: threads fill the socket ahead, the kernel
/// decides when each byte leaves (`SO_MAX_PACING_RATE`, Linux 4.13 for TCP without `fq`), and takes no more
/// than what leaves in the next milliseconds (`TCP_NOTSENT_LOWAT`).
#[derive(Debug, Default)]
pub struct KernelPace {
    rate: Option<u64>,
}

impl KernelPace {
    /// Paces `socket` at `rate` bytes of payload a second, and not below what the kernel can keep ([`Trickle`](super::Trickle));
    /// `None` lets it go.
    ///
    /// # Errors
    /// The socket is not TCP, or closed.
    pub fn set(&mut self, socket: impl AsFd, rate: Option<u64>) -> io::Result<()> {
        let rate = rate.map(|rate| rate.max(KERNEL_PACE_MIN));
        let near = |a: u64, b: u64| a.abs_diff(b) as f64 <= b as f64 * CHANGE_SHARE;
        if self.rate == rate || self.rate.zip(rate).is_some_and(|(old, new)| near(old, new)) {
            return Ok(());
        }
        let most: u64 = rate.unwrap_or(u64::MAX);
        set_option(socket.as_fd(), libc::SO_MAX_PACING_RATE, &most)?;
        let ahead = bytes_in(most.min(u64::from(u32::MAX)), AHEAD_TIME).clamp(AHEAD_BYTES.0, AHEAD_BYTES.1);
        SockRef::from(&socket).set_tcp_notsent_lowat(ahead as u32)?;
        self.rate = rate;
        Ok(())
    }
}

/// Has the kernel wake a reader only when so many bytes are there to be read, or the end of the stream
/// (`SO_RCVLOWAT`). They are acknowledged as they come all the same.
///
/// # Errors
/// The socket is closed.
pub fn wake_reader_at(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(socket.as_fd(), libc::SO_RCVLOWAT, &bytes)
}

/// Sets an option of sockets that is a plain number.
fn set_option<T: zerocopy::IntoBytes + Copy>(socket: BorrowedFd<'_>, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads the bytes of `value`, all of which have values, and which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
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

    /// At 1 KB/s the kernel would let the next piece go after a minute, whatever it is told by then.
    #[test]
    fn a_low_pace_for_a_moment_holds_nothing_up_after_it() {
        const BYTES: usize = 40 << 16;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The first segments of a connection are not paced.
        for _ in 0..40 {
            near.write_all(&[7; 1 << 16]).unwrap();
            far.read_exact(&mut [0; 1 << 16]).unwrap();
        }
        let mut pace = KernelPace::default();
        pace.set(&near, Some(1000)).unwrap();
        let writer = std::thread::spawn(move || {
            near.write_all(&vec![7; 1 << 17]).unwrap();
            pace.set(&near, Some(1 << 30)).unwrap();
            near.write_all(&vec![7; BYTES]).unwrap();
            near
        });
        far.read_exact(&mut vec![0; (1 << 17) + BYTES]).expect("it comes long before that");
        drop(writer.join().unwrap());
    }

    #[test]
    fn the_kernel_keeps_the_pace_and_holds_no_more_than_leaves_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _far = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut pace = KernelPace::default();
        pace.set(&near, Some(1_000_000)).unwrap();
        let mut held = 0;
        while let Ok(bytes) = near.write(&[0; 65536]) {
            held += bytes as u64;
        }
        assert!(held <= 4 * AHEAD_BYTES.0, "{held}");
        pace.set(&near, None).unwrap();
        assert!(KernelPace::default().set(std::fs::File::open("/dev/null").unwrap(), Some(1)).is_err());
    }

    #[test]
    fn a_reader_is_woken_when_enough_is_there() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let readable = |wait_ms: i64| {
            let timeout = Timespec { tv_sec: 0, tv_nsec: wait_ms * 1_000_000 };
            poll(&mut [PollFd::new(&far, PollFlags::IN)], Some(&timeout)).unwrap() > 0
        };
        wake_reader_at(&far, 8192).unwrap();
        near.write_all(&[7; 4096]).unwrap();
        assert!(!readable(20));
        near.write_all(&[7; 4096]).unwrap();
        assert!(readable(900));
        wake_reader_at(&far, 1 << 20).unwrap();
        assert!(!readable(0));
        drop(near);
        assert!(readable(900), "the end is always told");
    }

    #[test]
    fn no_sample_no_delay() {
        let fresh = TcpInfo { min_rtt_us: u32::MAX, ..TcpInfo::default() };
        assert_eq!(fresh.queue_delay(), None);
        let later = TcpInfo { rtt_us: 350, min_rtt_us: 50, ..fresh };
        assert_eq!(later.queue_delay(), Some(Duration::from_micros(300)));
    }
}
