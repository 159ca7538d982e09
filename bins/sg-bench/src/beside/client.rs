//! A co-tenant's client: requests at a fixed rate, whatever the answers do, each timed from the moment at which it
//! *was to be* sent. One that waits for an answer before it asks again would leave out just the requests that a
//! stall makes slow.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::service::{ANSWER_BYTES, REQUEST_BYTES};
use super::told::{Answers, go_first, now_ns, tell};

/// How long the service may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Between two lines of what was answered.
const TELL_EVERY_NS: u64 = 100_000_000;
/// Requests that wait for an answer: minutes of a cut link.
const WAITING_MAX: usize = 1 << 20;

/// Asks until it is killed, or nobody listens to what it prints.
pub fn run(to: SocketAddr, rate: u32) -> Result<()> {
    go_first();
    let mut stream = connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    // The kernel may be 50 us late else, on purpose.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let mut schedule = Schedule::new(now_ns(), rate);
    let (mut unsent_bytes, mut unread) = (0, 0);
    let mut tell_at_ns = now_ns() + TELL_EVERY_NS;
    loop {
        unsent_bytes += schedule.send(now_ns())? * REQUEST_BYTES;
        write(&mut stream, &mut unsent_bytes)?;
        for _ in 0..read(&mut stream, &mut unread)? {
            schedule.answered(now_ns())?;
        }
        let now = now_ns();
        if now >= tell_at_ns {
            tell_at_ns = now + TELL_EVERY_NS;
            if tell(&schedule.take(now)).is_err() {
                return Ok(());
            }
        }
        wait(&stream, schedule.next_ns.min(tell_at_ns).saturating_sub(now_ns()), unsent_bytes > 0)?;
    }
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let until = Instant::now() + START_LIMIT;
    loop {
        match TcpStream::connect_timeout(&to, START_LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > until => {
                return Err(error).with_context(|| format!("no co-tenant listens on {to}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// What was to be sent when, and what was answered.
struct Schedule {
    period_ns: u64,
    /// When the next request is to be sent.
    next_ns: u64,
    /// When each request was to be sent that is not answered: answers come in order.
    waiting: VecDeque<u64>,
    answered: Vec<(u64, u64)>,
}

impl Schedule {
    fn new(now_ns: u64, rate: u32) -> Self {
        let period_ns = 1_000_000_000 / u64::from(rate);
        Self { period_ns, next_ns: now_ns + period_ns, waiting: VecDeque::new(), answered: Vec::new() }
    }

    /// How many requests are due.
    fn send(&mut self, now_ns: u64) -> Result<usize> {
        let before = self.waiting.len();
        while self.next_ns <= now_ns {
            self.waiting.push_back(self.next_ns);
            self.next_ns += self.period_ns;
        }
        ensure!(self.waiting.len() <= WAITING_MAX, "the service has not answered for too long");
        Ok(self.waiting.len() - before)
    }

    fn answered(&mut self, now_ns: u64) -> Result<()> {
        let was_due_ns = self.waiting.pop_front().context("an answer to nothing")?;
        self.answered.push((was_due_ns, now_ns - was_due_ns));
        Ok(())
    }

    /// What was answered since the last time.
    fn take(&mut self, now_ns: u64) -> Answers {
        Answers {
            answered: std::mem::take(&mut self.answered),
            complete_until_ns: self.waiting.front().copied().unwrap_or(self.next_ns),
            at_ns: now_ns,
        }
    }
}

fn write(stream: &mut TcpStream, unsent_bytes: &mut usize) -> Result<()> {
    let requests = [0; 64 * REQUEST_BYTES];
    while *unsent_bytes > 0 {
        match stream.write(&requests[..requests.len().min(*unsent_bytes)]) {
            Ok(n) => *unsent_bytes -= n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("the co-tenant's service"),
        }
    }
    Ok(())
}

/// How many answers are whole now; `unread` is what has come of the next one.
fn read(stream: &mut TcpStream, unread: &mut usize) -> Result<usize> {
    let mut buffer = [0; 16 * ANSWER_BYTES];
    match stream.read(&mut buffer) {
        Ok(0) => bail!("the co-tenant's service hung up"),
        Ok(n) => {
            *unread += n;
            let whole = *unread / ANSWER_BYTES;
            *unread %= ANSWER_BYTES;
            Ok(whole)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error).context("the co-tenant's service"),
    }
}

fn wait(stream: &TcpStream, time_ns: u64, to_write: bool) -> Result<()> {
    let time = Timespec::try_from(Duration::from_nanos(time_ns))?;
    let what = if to_write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    match poll(&mut [PollFd::new(stream, what)], Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_a_stall_makes_late_is_asked_and_timed_from_when_it_was_due() {
        let mut schedule = Schedule::new(0, 1000);
        assert_eq!(schedule.send(1_000_000).expect("few"), 1);
        schedule.answered(1_100_000).expect("asked");
        // Nobody runs for 3.5 ms.
        assert_eq!(schedule.send(4_500_000).expect("few"), 3);
        schedule.answered(4_600_000).expect("asked");
        let told = schedule.take(4_600_000);
        assert_eq!(told.answered, [(1_000_000, 100_000), (2_000_000, 2_600_000)]);
        assert_eq!(told.complete_until_ns, 3_000_000);
        schedule.answered(5_000_000).expect("asked");
        schedule.answered(5_000_000).expect("asked");
        assert_eq!(schedule.take(5_000_000).complete_until_ns, 5_000_000, "the next one");
        assert!(schedule.answered(5_000_000).is_err());
    }
}
