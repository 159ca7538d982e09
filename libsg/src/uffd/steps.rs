//! How a run of pages gets into memory by requests that do a part, find a page there already, or can
//! do nothing now. Pure: the request is a closure.

use std::io;

use crate::page::PAGE_BYTES;
use crate::sink::InstallOutcome;

/// What one request did.
#[derive(Debug)]
pub(super) enum Step {
    /// The first so many bytes; more may be possible.
    Done(usize),
    /// Nothing: the first page is there already (`EEXIST`).
    Present,
    /// Nothing: the memory's layout is about to change, somebody waits for its event to be read
    /// (`EAGAIN`).
    Again,
    /// Nothing, and it will not get better.
    Failed(io::Error),
}

impl Step {
    pub(super) fn from_error(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EEXIST) => Self::Present,
            Some(libc::EAGAIN) => Self::Again,
            _ => Self::Failed(error),
        }
    }
}

/// How often in a row a request may come back with nothing done before the caller is told to read
/// the events. Between tries the processor is offered to whoever reads them.
pub(super) const TRIES: u32 = 64;

/// Goes through a run of pages in whole units. `request(at, pages)` is tried on the pages `at..` of
/// the run; `present(at, pages)` is called for runs of pages that were there already, whose waiters
/// nobody else may have woken.
pub(super) fn run(
    outcome: &mut InstallOutcome,
    unit_pages: u32,
    mut request: impl FnMut(u32, u32) -> Step,
    mut present: impl FnMut(u32, u32) -> io::Result<()>,
) -> io::Result<()> {
    let pages = outcome.range().pages;
    let (mut at, mut tries) = (0, 0);
    let mut there = 0..0;
    let failed = loop {
        if at >= pages {
            break None;
        }
        match request(at, pages - at) {
            Step::Done(bytes) if bytes >= PAGE_BYTES => {
                let done = ((bytes / PAGE_BYTES) as u32).min(pages - at);
                outcome.add_installed(done);
                at += done;
                tries = 0;
            }
            Step::Present => {
                let unit = unit_pages.min(pages - at);
                outcome.add_present(unit);
                if there.end == at {
                    there.end = at + unit;
                } else {
                    flush(&mut there, &mut present)?;
                    there = at..at + unit;
                }
                at += unit;
                tries = 0;
            }
            Step::Done(_) | Step::Again => {
                tries += 1;
                if tries >= TRIES {
                    break None;
                }
                std::thread::yield_now();
            }
            Step::Failed(error) => break Some(error),
        }
    };
    flush(&mut there, &mut present)?;
    failed.map_or(Ok(()), Err)
}

fn flush(
    there: &mut std::ops::Range<u32>,
    present: &mut impl FnMut(u32, u32) -> io::Result<()>,
) -> io::Result<()> {
    let run = std::mem::take(there);
    if run.is_empty() { Ok(()) } else { present(run.start, run.end - run.start) }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::page::{PageIndex, PageRange};
    use proptest::prelude::*;

    proptest! {
        /// A model kernel: some units are there, each request does at most so much, some say EAGAIN.
        #[test]
        fn every_page_is_dealt_with_once(
            there in prop::collection::vec(any::<bool>(), 1..64),
            unit_pages in prop::sample::select(vec![1_u32, 2, 8]),
            limits in prop::collection::vec(0_usize..9, 1..20),
        ) {
            let pages = there.len() as u32 * unit_pages;
            let mut memory = there.clone();
            let mut woken = vec![false; there.len()];
            let mut requests = 0;
            let mut outcome = InstallOutcome::new(PageRange::new(PageIndex(40), pages)).expect("fits");
            let request = |at: u32, left: u32| {
                assert_eq!(at % unit_pages, 0);
                assert_eq!(left, pages - at);
                let limit = limits[requests % limits.len()];
                requests += 1;
                let rest = &mut memory[(at / unit_pages) as usize..];
                let free = rest.iter().take_while(|there| !**there).count();
                match (rest[0], free.min(limit)) {
                    (true, _) => Step::Present,
                    (false, 0) if requests % 2 == 0 => Step::Again,
                    (false, some) => {
                        let done = some.max(1);
                        rest[..done].fill(true);
                        Step::Done(done * unit_pages as usize * PAGE_BYTES)
                    }
                }
            };
            run(&mut outcome, unit_pages, request, |at, pages| {
                woken[(at / unit_pages) as usize..((at + pages) / unit_pages) as usize].fill(true);
                Ok(())
            }).expect("no request fails");
            prop_assert_eq!(outcome.retry(), None);
            prop_assert!(memory.iter().all(|there| *there));
            prop_assert_eq!(&woken, &there);
            let before: Vec<_> = outcome.already_present().flat_map(PageRange::iter).collect();
            let want: Vec<_> = (0..pages)
                .filter(|page| there[(page / unit_pages) as usize]).map(|page| PageIndex(40 + page)).collect();
            prop_assert_eq!(before, want);
            let installed: u32 = outcome.installed().map(|run| run.pages).sum();
            prop_assert_eq!(installed, outcome.installed_pages());
            prop_assert_eq!(installed as usize, there.iter().filter(|there| !**there).count() * unit_pages as usize);
        }
    }

    #[test]
    fn nothing_for_long_is_a_retry_of_the_rest() {
        let mut outcome = InstallOutcome::new(PageRange::new(PageIndex(0), 8)).expect("fits");
        let mut calls = 0;
        let request = |at, _| {
            calls += 1;
            if at == 0 { Step::Done(3 * PAGE_BYTES) } else { Step::Again }
        };
        run(&mut outcome, 1, request, |_, _| Ok(())).expect("no request fails");
        assert_eq!(outcome.retry(), Some(PageRange::new(PageIndex(3), 5)));
        assert_eq!(calls, 1 + TRIES);
    }

    #[test]
    fn failure_still_wakes_who_waits_for_what_is_there() {
        let mut outcome = InstallOutcome::new(PageRange::new(PageIndex(0), 3)).expect("fits");
        let mut woken = Vec::new();
        let request = |at, _| {
            if at == 0 { Step::Present } else { Step::from_error(io::Error::from_raw_os_error(libc::ESRCH)) }
        };
        let failed = run(&mut outcome, 1, request, |at, pages| {
            woken.push((at, pages));
            Ok(())
        });
        assert_eq!(failed.expect_err("gone").raw_os_error(), Some(libc::ESRCH));
        assert_eq!(woken, [(0, 1)]);
    }
}
