//! Divides a host's link among the VMs that leave it: asks each how it stands, and grants it its share.
//!
//! One thread for each VM, so that one that is stopped, or slow to answer, holds up no other. When this process dies, its
//! word is over after [`VALID`], and each source looks for the rate alone again.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use libsg::pace::{LinkDivision, Part};
use parking_lot::Mutex;

use crate::vmm::{Leaving, Vmm};

/// How often a VM is asked: the rate finder sees a queue in a few of these.
const EVERY: Duration = Duration::from_millis(5);

/// How often one that does not leave yet, or leaves alone, is asked.
const WATCH: Duration = Duration::from_millis(20);

/// How soon one is asked again that did not answer.
const AGAIN: Duration = Duration::from_millis(100);

/// How long a share holds without another word: a busy host may keep this process from running for a while.
const VALID: Duration = Duration::from_secs(1);

/// A VM that does not answer for so long is dead, or as good as.
const SILENT: Duration = Duration::from_secs(10);

/// How one VM stands, as last heard.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// How far it is.
    pub leaving: Leaving,
    /// It answers no more: why.
    pub lost: Option<String>,
}

/// One VM of a [`Divider`].
struct Seat {
    standing: Arc<Mutex<Standing>>,
    thread: Option<JoinHandle<()>>,
}

/// Divides the link among VMs until it is dropped.
pub struct Divider {
    division: Arc<LinkDivision>,
    ended: Arc<AtomicBool>,
    /// More than one has a part. One alone finds the rate better by itself: its links tell it more often.
    divides: Arc<AtomicBool>,
    seats: Vec<Seat>,
}

impl Default for Divider {
    fn default() -> Self {
        Self::new()
    }
}

impl Divider {
    /// For no VM yet.
    #[must_use]
    pub fn new() -> Self {
        let division = Arc::new(LinkDivision::new(Instant::now()));
        Self { division, ended: Arc::default(), divides: Arc::default(), seats: Vec::new() }
    }

    /// Divides it with one more, which was told to leave; returns its place among them. All have a weight, or none has.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn add(&mut self, vmm: Box<dyn Vmm>, weight: Option<f64>) -> Result<usize> {
        self.divides.store(!self.seats.is_empty(), Ordering::Release);
        let standing = Arc::<Mutex<Standing>>::default();
        let seat = Talk {
            vmm,
            part: self.division.add(weight),
            division: Arc::clone(&self.division),
            ended: Arc::clone(&self.ended),
            divides: Arc::clone(&self.divides),
            standing: Arc::clone(&standing),
        };
        let thread = std::thread::Builder::new().name(format!("sg-divide-{}", self.seats.len()));
        self.seats.push(Seat { standing, thread: Some(thread.spawn(move || seat.keep())?) });
        Ok(self.seats.len() - 1)
    }

    /// How each stands, in the order in which they were added.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        self.seats.iter().map(|seat| seat.standing.lock().clone()).collect()
    }
}

impl Drop for Divider {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        for thread in self.seats.iter_mut().filter_map(|seat| seat.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("a thread that divides the link panicked");
            }
        }
    }
}

/// The conversation with one VM.
struct Talk {
    vmm: Box<dyn Vmm>,
    part: Part,
    division: Arc<LinkDivision>,
    ended: Arc<AtomicBool>,
    divides: Arc<AtomicBool>,
    standing: Arc<Mutex<Standing>>,
}

impl Talk {
    fn keep(mut self) {
        let (mut share, mut heard) = (None, Instant::now());
        while !self.ended.load(Ordering::Acquire) {
            let divides = self.divides.load(Ordering::Acquire);
            let valid = if divides { VALID } else { Duration::ZERO };
            let wait = match self.vmm.share(share, valid) {
                Ok(leaving) => {
                    heard = Instant::now();
                    match leaving.map(|leaving| self.take(leaving, heard)) {
                        None => WATCH,
                        Some(ControlFlow::Break(())) => break,
                        Some(ControlFlow::Continue(granted)) => {
                            share = granted;
                            if divides { EVERY } else { WATCH }
                        }
                    }
                }
                Err(error) if heard.elapsed() > SILENT || is_gone(&error) => {
                    self.standing.lock().lost = Some(format!("{error:#}"));
                    break;
                }
                Err(_) => AGAIN,
            };
            std::thread::sleep(wait);
        }
        self.division.remove(self.part);
    }

    /// Takes how it stands; its share, or that it is over.
    fn take(&self, leaving: Leaving, now: Instant) -> ControlFlow<(), Option<u64>> {
        self.standing.lock().leaving = leaving;
        if leaving.over {
            return ControlFlow::Break(());
        }
        let backlog = &leaving.backlog;
        ControlFlow::Continue(self.division.told(&self.part, &backlog.told, backlog.left_bytes, now))
    }
}

/// Whether nobody is there any more, rather than slow to answer.
fn is_gone(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind.is_some_and(|kind| {
        [BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof].contains(&kind)
    })
}

#[cfg(test)]
mod test {
    use std::sync::atomic::AtomicU64;

    use libsg::report::{DestinationReport, Sample, SourceReport};
    use libsg::units::Rate;

    use super::*;
    use crate::vmm::{Described, Start, Wanted};

    const LINK: u64 = 100_000_000;

    /// Sends what it is granted over a link of which every VM sees the queue.
    struct Fake {
        link: Arc<AtomicU64>,
        sent: u64,
        left: u64,
        last: Instant,
        mute: bool,
    }

    impl Vmm for Fake {
        fn share(&mut self, bytes_per_s: Option<u64>, _: Duration) -> Result<Option<Leaving>> {
            if self.mute {
                anyhow::bail!("it says nothing");
            }
            let elapsed = self.last.elapsed().as_secs_f64();
            self.last = Instant::now();
            let bytes = (bytes_per_s.unwrap_or(LINK).min(LINK) as f64 * elapsed) as u64;
            let bytes = bytes.min(self.left);
            self.sent += bytes;
            self.left -= bytes;
            self.link.fetch_add(bytes, Ordering::Relaxed);
            let mut leaving = Leaving { sent_bytes: self.sent, over: self.left == 0, ..Leaving::default() };
            leaving.evicted = leaving.over;
            let backlog = &mut leaving.backlog;
            backlog.left_bytes = self.left;
            backlog.told.paced.delivered = self.sent;
            backlog.told.paced.queue_delay = Some(Duration::from_micros(20));
            backlog.told.paced.backlogged = true;
            Ok(Some(leaving))
        }

        fn describe(&mut self) -> Result<Described> {
            anyhow::bail!("not asked")
        }

        fn start(&mut self, _: &Start) -> Result<()> {
            anyhow::bail!("not asked")
        }

        fn claim(&mut self, _: &Wanted) -> Result<()> {
            anyhow::bail!("not asked")
        }

        fn progress(&mut self) -> Result<Sample> {
            anyhow::bail!("not asked")
        }

        fn report(&mut self) -> Result<(Option<SourceReport>, Option<DestinationReport>)> {
            anyhow::bail!("not asked")
        }

        fn limit(&mut self, _: Option<Rate>, _: Option<Rate>) -> Result<()> {
            anyhow::bail!("not asked")
        }

        fn cancel(&mut self) -> Result<()> {
            anyhow::bail!("not asked")
        }
    }

    #[test]
    fn one_that_says_nothing_holds_up_nobody_and_whoever_is_out_is_asked_no_more() {
        let link = Arc::<AtomicU64>::default();
        let fake = |left, mute| {
            let (link, last) = (Arc::clone(&link), Instant::now());
            Box::new(Fake { link, sent: 0, left, last, mute })
        };
        let mut divider = Divider::new();
        for (left, mute) in [(5_000_000, false), (8_000_000, false), (1, true)] {
            divider.add(fake(left, mute), None).expect("a thread");
        }
        let began = Instant::now();
        while !divider.standings()[..2].iter().all(|standing| standing.leaving.over) {
            assert!(began.elapsed() < Duration::from_secs(30), "{:?}", divider.standings());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(link.load(Ordering::Relaxed), 13_000_000);
        let standings = divider.standings();
        assert!(standings.iter().all(|standing| standing.lost.is_none()), "not silent for long enough");
        assert_eq!((standings[1].leaving.sent_bytes, standings[2].leaving.sent_bytes), (8_000_000, 0));
    }

    #[test]
    fn whoever_hung_up_is_gone_and_whoever_is_late_is_not() {
        let error = |kind| anyhow::Error::from(std::io::Error::from(kind)).context("the VMM does not answer");
        assert!(is_gone(&error(std::io::ErrorKind::UnexpectedEof)));
        assert!(is_gone(&error(std::io::ErrorKind::ConnectionRefused)));
        assert!(!is_gone(&error(std::io::ErrorKind::WouldBlock)));
        assert!(!is_gone(&anyhow::anyhow!("share: no")));
    }
}
