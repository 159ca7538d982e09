//! The direct path: pages that the source sends without being asked. One thread receives, checks, installs
//! and acknowledges them, and grants the credit that paces the source.
//!
//! Credit is the gather limit and the pace of this host's port, in the source's hands: it sends no
//! byte beyond what was granted. Credit is granted some time ahead, so that the source has enough however late
//! this thread wakes, and comes with the pace at which to use it, so that what has gathered does not come at
//! once. What is granted and not yet here is bounded by a window, so that a source that stops holds nothing
//! that prepaging could use.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::install::Installer;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::pace::{self, Acquire, Class, LinkId, LinkReading};
use crate::page::{PAGE_BYTES, PageIndex};
use crate::transport::{Channel, Inbox, Outbox, TcpPath, wait};
use crate::wire::entry::encode_table;
use crate::wire::run::decode_pages;
use crate::wire::{Credit, HEADER_BYTES, Header, Kind, PageEntry};

/// Most bytes granted and not yet here.
const WINDOW_BYTES_MAX: u64 = 8 << 20;

/// The same while the rate is not known: a queue in front of this port gets no longer by it.
const WINDOW_BYTES_UNPACED: u64 = 2 << 20;

/// Least: what keeps a slow port busy. A source sends batches that fit its credit, down to one page.
const WINDOW_BYTES_MIN: u64 = 96 << 10;

/// Credit is granted so long ahead: more than a thread on a busy host wakes late by.
const AHEAD: Duration = Duration::from_millis(16);

/// The window in time, where the rate is known: what is granted ahead, and as much as the source may be late.
const WINDOW_TIME: Duration = Duration::from_millis(24);

/// The source may use credit faster than the port's rate by one in so many, to catch up when it was late. The
/// rate leaves as much of the port free.
const CATCH_UP_PARTS: u64 = 64;

/// A pace that differs from the one told by more than one in so many is told at once; less goes with the next credit.
const PACE_PARTS: u64 = 8;

/// Credit of a connection that was just opened, granted at once.
const FIRST_CREDIT_BYTES: u64 = 128 << 10;

/// Credit is granted in pieces of so much time: each is a frame for both ends to send, take and act on. The source
/// spreads it by its own pace, so that a larger piece makes no longer queue.
const GRANT_TIME: Duration = Duration::from_millis(4);

/// What came before the window was full again is granted in pieces of at least this part of the window: the source
/// has the rest.
const WINDOW_PARTS: u64 = 4;

/// Largest piece of credit: one batch of 64 pages.
const GRANT_BYTES_MAX: u64 = 264 << 10;

/// Least piece: one page with its frame.
const GRANT_BYTES_MIN: u64 = (PAGE_BYTES + PageEntry::BYTES_MAX + HEADER_BYTES) as u64;

/// Bytes of acknowledgements and credit that may wait to be written: a source that does not read them is
/// stuck, and gets no more credit.
const OUTBOX_BYTES_MAX: usize = 256 << 10;

/// How long the thread sleeps at most.
const NAP: Duration = Duration::from_millis(100);

struct Line {
    channel: Channel,
    inbox: Inbox,
    outbox: Outbox,
    path: TcpPath,
    link: LinkId,
    /// Cumulative limit that the source was told.
    granted: u64,
    /// The pace that the source was told.
    pace: Option<u64>,
    /// Taken from the pacer, not yet told.
    saved: u64,
    /// As the source last told.
    delay: Option<Duration>,
    counted: u64,
}

/// The thread `sg-gather-direct`.
pub(crate) fn run(shared: &Shared) -> Result<()> {
    // Sleeps are then up to 50 µs late, and still right.
    let _ = pace::precise_timers();
    let mut line: Option<Line> = None;
    let mut work = Work::default();
    while !shared.is_stopping() {
        shared.wake_direct.drain();
        if let Some(channel) = shared.direct.lock().take() {
            end(shared, line.take());
            line = Some(open(shared, channel)?);
        }
        let mut again_at = host::now() + NAP;
        if let Some(open) = &mut line {
            match step(shared, open, &mut work) {
                Ok(at) => again_at = at.min(again_at),
                Err(error) if matches!(error.kind, ErrorKind::Unreachable | ErrorKind::Protocol) => {
                    tracing::info!(error = error.chain(), "the direct connection ended");
                    end(shared, line.take());
                    shared.wake_conductor();
                    continue;
                }
                Err(error) => return Err(error),
            }
        }
        let timeout = again_at.saturating_duration_since(host::now());
        let waker = (Some(shared.wake_direct.as_fd()), false);
        match &line {
            Some(line) => {
                wait(&[waker, (Some(line.channel.as_fd()), line.outbox.queued_bytes() > 0)], timeout)?
            }
            None => wait(&[waker], timeout)?,
        };
    }
    end(shared, line);
    Ok(())
}

fn open(shared: &Shared, channel: Channel) -> Result<Line> {
    let mut line = Line {
        channel,
        inbox: Inbox::new(),
        outbox: Outbox::new(),
        path: TcpPath::new(),
        link: shared.pacer.add_link(Class::Direct),
        granted: 0,
        pace: None,
        saved: FIRST_CREDIT_BYTES.max(frame_bytes(shared.unit_pages)),
        delay: None,
        counted: 0,
    };
    shared.pacer.charge(Class::Direct, line.saved, host::now());
    grant(shared, &mut line, host::now())?;
    Ok(line)
}

fn end(shared: &Shared, line: Option<Line>) {
    if let Some(line) = line {
        // Also where it broke off in the middle of a frame.
        shared.direct_idles(host::now());
        shared.pacer.remove_link(line.link);
        shared.pacer.give_back(Class::Direct, line.saved);
        line.channel.shut_down();
    }
}

/// Bytes of a frame with so many pages.
const fn frame_bytes(pages: u32) -> u64 {
    (HEADER_BYTES + pages as usize * (PAGE_BYTES + PageEntry::BYTES_MAX)) as u64
}

/// The buffers of the thread.
#[derive(Default)]
struct Work {
    entries: Vec<PageEntry>,
    installer: Installer,
    table: Vec<u8>,
}

/// Does what can be done without waiting; returns when to look again.
fn step(shared: &Shared, line: &mut Line, work: &mut Work) -> Result<Instant> {
    while let Some(frame) = line.inbox.poll(&line.channel)? {
        // Of the frame before, which is not to wait for this one. The last goes out with the credit.
        line.outbox.flush(&line.channel, usize::MAX)?;
        let header = frame.header;
        if header.kind != Kind::Pages || header.volume != shared.volume {
            let message = format!("a {:?} frame on the direct connection", header.kind);
            return Err(Error::new(ErrorKind::Protocol, message));
        }
        shared.direct_works();
        line.delay = header.delay_us.map(|us| Duration::from_micros(us.into())).or(line.delay);
        let bytes = decode_pages((&header, frame.body), &mut work.entries)?;
        work.installer.pages(shared, &work.entries, bytes, &mut || shared.let_events_be_read())?;
        shared.counters.direct.fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
        work.installer.bad.extend_from_slice(&work.installer.gone);
        shared.direct_idles(host::now());
        acknowledge(&mut line.outbox, &header, &work.installer.bad, &mut work.table)?;
        if line.outbox.queued_bytes() > OUTBOX_BYTES_MAX {
            break;
        }
    }
    // Between frames, too: at a slow port one takes as long as four readings.
    report(shared, line);
    let again_at = take_credit(shared, line)?;
    line.outbox.flush(&line.channel, usize::MAX)?;
    count(shared, line);
    Ok(again_at)
}

/// Queues the acknowledgement of a `Pages` frame; `bad` are the pages that were not installed.
pub(super) fn acknowledge(
    outbox: &mut Outbox,
    header: &Header,
    bad: &[PageIndex],
    table: &mut Vec<u8>,
) -> Result<()> {
    table.clear();
    encode_table(bad.iter().copied(), table);
    let ack = Header { count: bad.len() as u16, ..header.answer(Kind::PagesAck) };
    outbox.push_frame(ack, table, [])?;
    Ok(())
}

/// Grants what the pacer gives, up to the window; returns when to ask it again.
fn take_credit(shared: &Shared, line: &mut Line) -> Result<Instant> {
    let now = host::now();
    let rate = shared.pacer.rate();
    let piece = match rate {
        Some(rate) => {
            ((rate as f64 * GRANT_TIME.as_secs_f64()) as u64).clamp(GRANT_BYTES_MIN, GRANT_BYTES_MAX)
        }
        None => GRANT_BYTES_MAX,
    };
    // Told at once: a source with credit for a while yet must not fill the queue that is to be drained.
    if !pace::is_near(pace(shared, now), line.pace, PACE_PARTS) {
        tell_credit(shared, line, now)?;
    }
    let window = window_bytes(rate, line.path.info().base_rtt(), shared.unit_pages);
    loop {
        let open = (line.granted + line.saved).saturating_sub(line.inbox.received_bytes());
        if open + GRANT_BYTES_MIN > window || line.outbox.queued_bytes() > OUTBOX_BYTES_MAX {
            // Room comes with bytes. Little is not worth a frame, and the source has most of a window yet.
            if line.saved >= piece.min(window / WINDOW_PARTS) {
                grant(shared, line, now)?;
            }
            return Ok(now + NAP);
        }
        let wanted = piece.saturating_sub(line.saved).clamp(1, window - open);
        match shared.pacer.acquire_ahead(wanted, AHEAD, now) {
            Acquire::Grant(bytes) => line.saved += bytes,
            Acquire::WaitUntil(at) => return Ok(at),
        }
        if line.saved >= piece {
            grant(shared, line, now)?;
        }
    }
}

fn window_bytes(rate: Option<u64>, base_rtt: Option<Duration>, unit_pages: u32) -> u64 {
    let time = WINDOW_TIME + 2 * base_rtt.unwrap_or_default();
    let bytes = rate.map_or(WINDOW_BYTES_UNPACED, |rate| (rate as f64 * time.as_secs_f64()) as u64);
    // A frame is sent only when all of it is granted: a whole unit must fit, and the next be on its way.
    let least = if unit_pages > 1 { 2 * frame_bytes(unit_pages) } else { WINDOW_BYTES_MIN };
    bytes.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX).max(least)
}

/// The pace at which the source is to use its credit: what faults leave of this port. At the whole port's, credit that
/// gathered while faults filled it would come on top of the next ones, as a queue in front of them.
fn pace(shared: &Shared, now: Instant) -> Option<u64> {
    shared.pacer.pace_ahead(AHEAD, now).map(|rate| rate + rate / CATCH_UP_PARTS)
}

/// Tells what was taken.
fn grant(shared: &Shared, line: &mut Line, now: Instant) -> Result<()> {
    if line.saved > 0 {
        line.granted += std::mem::take(&mut line.saved);
        tell_credit(shared, line, now)?;
    }
    Ok(())
}

fn tell_credit(shared: &Shared, line: &mut Line, now: Instant) -> Result<()> {
    line.pace = pace(shared, now);
    let credit = Credit { limit: line.granted, pace: line.pace };
    line.outbox.push_frame(line.channel.header(Kind::Credit), &credit.encode(), [])?;
    Ok(())
}

fn report(shared: &Shared, line: &mut Line) {
    let now = host::now();
    let info = line.path.refresh(&line.channel, now);
    let reading = LinkReading {
        // As the kernel counts them: what this thread has read comes in lumps of a frame, 9 ms of a slow port.
        delivered: info.bytes_received.max(line.inbox.received_bytes()),
        queue_delay: line.delay,
        base_rtt: info.base_rtt().unwrap_or_default(),
        backlogged: false,
    };
    shared.pacer.observe(line.link, reading, now);
}

fn count(shared: &Shared, line: &mut Line) {
    let wire = line.inbox.received_bytes() + line.outbox.written_bytes();
    let fresh = wire - std::mem::replace(&mut line.counted, wire);
    shared.counters.wire.fetch_add(fresh, std::sync::atomic::Ordering::Relaxed);
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_whole_frame_always_fits_the_window() {
        for rate in [None, Some(1), Some(125_000), Some(32_000_000), Some(5_000_000_000)] {
            for rtt in [None, Some(Duration::from_millis(40))] {
                assert!(window_bytes(rate, rtt, 1) >= frame_bytes(16));
                assert!(window_bytes(rate, rtt, 1) <= WINDOW_BYTES_MAX);
                assert!(window_bytes(rate, rtt, 512) >= frame_bytes(512));
            }
        }
    }
}
