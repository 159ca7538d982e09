//! Memory that the machine really has, handed out while an experiment runs.
//!
//! A virtual machine whose host takes free memory back (free page reporting, Linux 5.7) does not have its free
//! memory: whoever touches a page first waits until the host has found one. Measured: 16 µs a page, where it is
//! 2.3 µs, or 0.5 µs in huge pages, on memory that is there. No host that runs VMs for a living works like that,
//! and it hides what an experiment is about. So what a run will need is touched before, and given to the kernel's
//! free lists little by little as the run takes from them: free pages that were given back last are used first,
//! and what lies free for two seconds the host takes again.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use libsg::page::PAGE_BYTES;
use libsg::units::Size;
use memmap2::{Advice, MmapMut};

/// How much is touched, and given back, at once: some huge pages.
const PIECE_BYTES: usize = 8 << 20;

/// How much more than was taken is given back: what is taken between two looks.
const AHEAD_BYTES: u64 = 96 << 20;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// The kernel reports free blocks from this order on; there are none above 10, and then it reports nothing.
const REPORTING_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
const ORDER_MAX: u32 = 10;

/// Memory that was touched, and is handed out from [`Self::hand_out`] until it is dropped.
#[derive(Debug, Default)]
pub struct Reserve {
    pieces: Vec<MmapMut>,
    /// Free bytes that there are to be, which lives as long as they are handed out, and who does that.
    handing_out: Option<(Arc<AtomicU64>, JoinHandle<()>)>,
}

impl Reserve {
    /// Touches `size` of memory, but not more than half of what is free. Nothing where the machine keeps its
    /// free memory: it is ready as it is.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn fill(size: Size) -> Result<Self> {
        if !host_takes_free_memory() {
            return Ok(Self::default());
        }
        let bytes = size.0.min(rustix::system::sysinfo().freeram / 2);
        let pieces = usize::try_from(bytes)? / PIECE_BYTES;
        let half = |pieces: usize| (0..pieces).map(|_| touched()).collect::<Result<Vec<_>>>();
        // Two at once: it is the host that is waited for.
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(move || half(pieces / 2));
            let second = half(pieces - pieces / 2);
            (first.join(), second)
        });
        let mut pieces = first.map_err(|_| anyhow::anyhow!("touching memory panicked"))??;
        pieces.extend(second?);
        let reserve = Self { pieces, handing_out: None };
        tracing::info!(size = %reserve.size(), "free memory is ready");
        Ok(reserve)
    }

    /// How much is left to be handed out.
    fn size(&self) -> Size {
        Size((self.pieces.len() * PIECE_BYTES) as u64)
    }

    /// From now on gives back as much as is taken, and a little more.
    pub fn hand_out(&mut self) -> Result<()> {
        let mut pieces = std::mem::take(&mut self.pieces);
        if pieces.is_empty() {
            return Ok(());
        }
        let least = Arc::new(AtomicU64::new(a_little_more()));
        let wanted = Arc::downgrade(&least);
        let thread = std::thread::Builder::new().name("reserve".into()).spawn(move || {
            while let Some(least) = wanted.upgrade().filter(|_| !pieces.is_empty()) {
                let missing = least.load(Ordering::Relaxed).saturating_sub(rustix::system::sysinfo().freeram);
                drop(least);
                let back = missing.div_ceil(PIECE_BYTES as u64).min(pieces.len() as u64);
                pieces.truncate(pieces.len() - back as usize);
                std::thread::sleep(LOOK_EVERY);
            }
        })?;
        self.handing_out = Some((least, thread));
        Ok(())
    }

    /// Gives a little more back, and waits for that: what lay free before may be the host's again.
    pub fn renew(&self) {
        let Some((least, _)) = &self.handing_out else { return };
        least.store(a_little_more(), Ordering::Relaxed);
        std::thread::sleep(5 * LOOK_EVERY);
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        if let Some((least, thread)) = self.handing_out.take() {
            drop(least);
            // It does nothing that panics.
            let _ = thread.join();
        }
    }
}

/// Free bytes when a little is given back.
fn a_little_more() -> u64 {
    rustix::system::sysinfo().freeram + AHEAD_BYTES
}

/// Whether free memory goes to somebody else and has to be got back when it is touched.
fn host_takes_free_memory() -> bool {
    let order = fs::read_to_string(REPORTING_ORDER).ok();
    order.and_then(|order| order.trim().parse().ok()).is_some_and(|order: u32| order <= ORDER_MAX)
}

fn touched() -> Result<MmapMut> {
    let mut piece = MmapMut::map_anon(PIECE_BYTES).context("no memory to keep ready")?;
    // Where there are no huge pages it takes longer, that is all.
    let _ = piece.advise(Advice::HugePage);
    piece.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 1);
    Ok(piece)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_handed_out_is_no_more_than_there_is() {
        let mut reserve =
            Reserve { pieces: (0..3).map(|_| touched().expect("memory")).collect(), handing_out: None };
        assert_eq!(reserve.size(), Size(3 * PIECE_BYTES as u64));
        reserve.hand_out().expect("a thread");
        assert_eq!(reserve.size(), Size(0));
        drop(reserve);
        Reserve::default().hand_out().expect("nothing to hand out");
    }

    #[test]
    fn memory_is_kept_ready_where_the_host_takes_it() {
        let size = Reserve::fill(Size(64 << 20)).expect("memory").size();
        assert_eq!(size.0, if host_takes_free_memory() { 64 << 20 } else { 0 });
    }
}
