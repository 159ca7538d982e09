//! Waiting for several descriptors at once, and waking who waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::host::{self, Known};

/// Descriptors that one [`wait`] can watch: the bits of its answer.
pub const WAIT_MAX: usize = 64;

/// Waits until one of the descriptors is readable, or writable where the flag beside it asks for
/// that, or broken, or `timeout` is over. Nanosecond resolution.
///
/// Bit n of the answer says that the n-th is ready. `None` is a descriptor that is always ready:
/// the call then only looks. An interruption by a signal counts as time over.
///
/// # Errors
/// [`ErrorKind::Input`] for more than [`WAIT_MAX`]; [`ErrorKind::System`] when the kernel refuses.
pub fn wait(on: &[(Option<BorrowedFd<'_>>, bool)], timeout: Duration) -> Result<u64> {
    if on.len() > WAIT_MAX {
        return Err(Error::new(ErrorKind::Input, format!("{} descriptors to wait for", on.len())));
    }
    let mut ready = 0;
    // Room for as many as there may be, on the stack: this is called before every sleep.
    let anyone = on.iter().find_map(|(fd, _)| *fd);
    let mut room: Option<[PollFd<'_>; WAIT_MAX]> =
        anyone.map(|fd| std::array::from_fn(|_| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    let room: &mut [PollFd<'_>] = room.as_mut().map_or(&mut [], |room| room);
    let mut polled = 0;
    for (at, (fd, wants_write)) in on.iter().enumerate() {
        match fd {
            None => ready |= 1 << at,
            Some(fd) => {
                let flags = if *wants_write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                room[polled] = PollFd::from_borrowed_fd(*fd, flags);
                polled += 1;
            }
        }
    }
    let polled = &mut room[..polled];
    let timeout = if ready == 0 { timeout } else { Duration::ZERO };
    let awaited = on.iter().filter_map(|(fd, wants_write)| Some(((*fd)?, true, *wants_write)));
    let known = match host::before_wait(awaited, timeout) {
        Known::Ready(bits) => bits,
        Known::Nothing => match rustix::event::poll(polled, Some(&timespec(timeout))) {
            Ok(_) => (0..).zip(&*polled).map(|(at, fd)| u64::from(!fd.revents().is_empty()) << at).sum(),
            Err(Errno::INTR) => return Ok(ready),
            Err(errno) => return Err(errno.into()),
        },
    };
    let fds = on.iter().enumerate().filter(|(_, (fd, _))| fd.is_some());
    for (nth, (at, _)) in fds.enumerate() {
        ready |= (known >> nth & 1) << at;
    }
    Ok(ready)
}

/// Waits until the descriptor takes bytes, or is broken, whatever there may be to read; at most `timeout`.
///
/// # Errors
/// [`ErrorKind::System`] when the kernel refuses.
pub fn wait_writable(fd: impl AsFd, timeout: Duration) -> Result<()> {
    if let Known::Ready(_) = host::before_wait([(fd.as_fd(), false, true)].into_iter(), timeout) {
        return Ok(());
    }
    let mut polled = [PollFd::new(&fd, PollFlags::OUT)];
    match rustix::event::poll(&mut polled, Some(&timespec(timeout))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn timespec(timeout: Duration) -> Timespec {
    // A day is longer than any timer of ours, and not more than the kernel can count.
    let timeout = timeout.min(Duration::from_secs(86_400));
    Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) }
}

/// Ends another thread's [`wait`]: readable from [`Self::wake`] until [`Self::drain`]. Clones are
/// the same. One thread waits and drains; only the first wake of each of its rounds costs a system call, and a round
/// in which nobody woke it costs none.
#[derive(Clone, Debug)]
pub struct Waker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    event: OwnedFd,
    /// Somebody has made it readable, or is about to.
    woken: AtomicBool,
}

impl Waker {
    /// One that nobody has woken yet.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no eventfd.
    pub fn new() -> Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { event, woken: AtomicBool::new(false) }) })
    }

    /// Makes it readable. May be called any number of times, from any thread.
    pub fn wake(&self) {
        // Who finds it woken need not do it again: it is unset before the other thread looks.
        if !self.shared.woken.swap(true, Ordering::SeqCst) {
            // The counter can only be full, and then it is readable already.
            let _ = rustix::io::write(&self.shared.event, &1_u64.to_ne_bytes());
        }
    }

    /// Makes it unreadable again. Call it before looking for what one was woken for.
    pub fn drain(&self) {
        if self.shared.woken.load(Ordering::SeqCst) {
            // Nothing to read: whoever woke it has not written yet. It stays woken until it can be read, or it
            // would stay readable.
            if rustix::io::read(&self.shared.event, &mut [0_u8; 8]).is_ok() {
                self.shared.woken.store(false, Ordering::SeqCst);
            }
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

#[cfg(test)]
mod test {
    use std::time::Instant;

    use super::*;

    #[test]
    fn wakes_and_times_out() {
        let (one, two) = (Waker::new().expect("eventfd"), Waker::new().expect("eventfd"));
        let on = [(Some(one.as_fd()), false), (Some(two.as_fd()), false)];
        let start = Instant::now();
        assert_eq!(wait(&on, Duration::from_millis(5)).expect("waits"), 0);
        assert!(start.elapsed() >= Duration::from_millis(5));
        let other = two.clone();
        let thread = std::thread::spawn(move || other.wake());
        assert_eq!(wait(&on, Duration::from_secs(10)).expect("waits"), 0b10);
        thread.join().expect("joined");
        two.drain();
        assert_eq!(wait(&on, Duration::ZERO).expect("waits"), 0);
    }

    #[test]
    fn no_wake_is_lost_however_they_meet() {
        const WAKES: usize = 20_000;
        let waker = Waker::new().expect("eventfd");
        let left = Arc::new(std::sync::atomic::AtomicUsize::new(2 * WAKES));
        let threads = [(); 2].map(|()| {
            let (waker, left) = (waker.clone(), left.clone());
            std::thread::spawn(move || {
                for _ in 0..WAKES {
                    left.fetch_sub(1, Ordering::Relaxed);
                    waker.wake();
                }
            })
        });
        loop {
            waker.drain();
            if left.load(Ordering::Relaxed) == 0 {
                break;
            }
            let ready = wait(&[(Some(waker.as_fd()), false)], Duration::from_secs(60)).expect("waits");
            assert_eq!(ready, 1, "{} wakes are left, and nobody was woken", left.load(Ordering::Relaxed));
        }
        for thread in threads {
            thread.join().expect("joined");
        }
        // At rest it does not stay readable.
        waker.drain();
        assert_eq!(wait(&[(Some(waker.as_fd()), false)], Duration::ZERO).expect("looks"), 0);
    }

    #[test]
    fn without_a_descriptor_it_does_not_wait() {
        let waker = Waker::new().expect("eventfd");
        let on = [(None, true), (Some(waker.as_fd()), true)];
        // An eventfd that is not full is writable.
        assert_eq!(wait(&on, Duration::from_secs(10)).expect("looks"), 0b11);
        assert!(wait(&[(None, false); WAIT_MAX + 1], Duration::ZERO).is_err());
    }
}
