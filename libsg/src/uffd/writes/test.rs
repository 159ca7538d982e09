//! Both ways of logging, over all three backings, with real writers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use test_support::skipped;

use super::super::Uffd;
use super::super::test::memory;
use super::*;
use crate::memory::Backing;
use crate::memory::vectored::{self, IoPartMut};
use crate::page::{PAGE_BYTES, PageIndex};

const BACKINGS: [Backing; 3] = [Backing::Anon, Backing::Memfd, Backing::Hugetlb2M];

/// With a log that is not started. Each case gets memory that was never touched.
fn every_way(test: impl Fn(&str, &GuestMemory, WriteLog)) {
    for backing in BACKINGS {
        for method in [WriteLogMethod::Scan, WriteLogMethod::Handler] {
            let Some(memory) = memory(backing) else { continue };
            if method == WriteLogMethod::Scan && Scanning::start(&memory).expect("no failure").is_none() {
                skipped(
                    &format!("{backing:?} by PAGEMAP_SCAN"),
                    "this kernel does not note writes (Linux 6.7 does)",
                );
                continue;
            }
            test(&format!("{backing:?} {method:?}"), &memory, WriteLog::by(&memory, method));
        }
    }
}

fn one(page: u32) -> PageRange {
    PageRange::new(PageIndex(page), 1)
}

fn write(memory: &GuestMemory, page: u32, byte: u8) {
    memory.copy_in(one(page), &[byte; PAGE_BYTES]).expect("written");
}

fn collected(log: &mut impl DirtyLog) -> Vec<PageRange> {
    // What is there before stays, and is no part of it.
    let mut out = vec![one(7)];
    log.collect(&mut out).expect("collected");
    assert_eq!(out.remove(0), one(7));
    for pair in out.windows(2) {
        assert!(pair[0].first.0 + pair[0].pages <= pair[1].first.0, "not ascending: {pair:?}");
    }
    out
}

/// The units of these pages, as a log names them.
fn units(memory: &GuestMemory, pages: &[u32]) -> Vec<PageRange> {
    let unit = |page: &u32| memory.unit(PageIndex(*page)).expect("a page").iter();
    let runs = PageRange::from_pages(pages.iter().flat_map(unit).collect());
    let cut = |run: PageRange| match memory.run(run.first, run.pages).expect("pages") {
        whole if whole == run => vec![run],
        part => vec![part, PageRange::new(PageIndex(part.first.0 + part.pages), run.pages - part.pages)],
    };
    runs.into_iter().flat_map(cut).collect()
}

#[test]
fn what_is_written_is_named_once_and_nothing_else() {
    every_way(|case, memory, mut log| {
        // The ends of both regions; some pages are there before, some never were.
        let before = [0, 5, 511, 512, 1030];
        before.iter().for_each(|page| write(memory, *page, 1));
        assert_eq!(log.collect(&mut Vec::new()).expect_err("not started").kind, ErrorKind::Input);
        log.start().expect("started");
        log.start().expect("twice is nothing");
        assert_eq!(collected(&mut log), [], "{case}");

        let written = [0, 5, 6, 511, 512, 1030, 1031, 2200, 2559];
        written.iter().for_each(|page| write(memory, *page, 2));
        assert_eq!(collected(&mut log), units(memory, &written), "{case}");
        assert_eq!(collected(&mut log), [], "{case}");

        // Named once does not mean named for good; reading is not writing.
        let mut bytes = [0; PAGE_BYTES];
        written.iter().for_each(|page| memory.copy_out(one(*page), &mut bytes).expect("read"));
        written[3..5].iter().for_each(|page| write(memory, *page, 3));
        assert_eq!(collected(&mut log), units(memory, &written[3..5]), "{case}");

        // A write by a system call.
        let (near, far) = std::os::unix::net::UnixStream::pair().expect("sockets");
        rustix::io::write(&near, &[9; 100]).expect("sent");
        let slot = memory.slot(one(1040)).expect("a page");
        vectored::recv(&far, &mut [IoPartMut::Slot(slot)]).expect("received");
        assert_eq!(collected(&mut log), units(memory, &[1040]), "{case}");

        log.stop().expect("stopped");
        log.stop().expect("twice is nothing");
        assert!(log.collect(&mut Vec::new()).is_err());
        write(memory, 1, 4);
        log.start().expect("again");
        assert_eq!(collected(&mut log), [], "{case}");
        write(memory, 2, 4);
        assert_eq!(collected(&mut log), units(memory, &[2]), "{case}");
        // Dropped while it runs: memory is ordinary again.
        write(memory, 3, 4);
        drop(log);
        write(memory, 4, 5);
        memory.copy_out(one(4), &mut bytes).expect("read");
        assert_eq!(bytes, [5; PAGE_BYTES]);
    });
}

#[test]
fn what_is_not_there_stays_so_while_it_is_logged() {
    every_way(|case, memory, mut log| {
        [3, 600].iter().for_each(|page| write(memory, *page, 1));
        let before = memory.presence().expect("told");
        log.start().expect("started");
        assert_eq!(memory.presence().expect("told"), before, "{case}");
        collected(&mut log);
        write(memory, 1600, 1);
        collected(&mut log);
        let mut after = before;
        after.insert(memory.unit(PageIndex(1600)).expect("unit"));
        assert_eq!(memory.presence().expect("told"), after, "{case}");
        log.stop().expect("stopped");
        assert_eq!(memory.presence().expect("told"), after, "{case}");
    });
}

/// More runs than one request of the kernel's takes, and more than it holds at once, written again all the time.
#[test]
fn many_runs_come_in_order() {
    every_way(|case, memory, mut log| {
        let end = AtomicBool::new(false);
        log.start().expect("started");
        let pages = || (0..memory.pages()).filter(|page| page % 2 == 1);
        pages().for_each(|page| write(memory, page, 1));
        assert_eq!(collected(&mut log), units(memory, &pages().collect::<Vec<_>>()), "{case}");
        thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    pages()
                        .for_each(|page| memory.slot(one(page)).expect("a page").take(8).copy_from(&[2; 8]));
                }
            });
            (0..20).for_each(|_| drop(collected(&mut log)));
            end.store(true, Ordering::Relaxed);
        });
    });
}

/// The kernel may take a page of a file out of the page table, and with it what was noted there; huge pages it
/// leaves where they are.
#[test]
fn a_page_that_is_unmapped_meanwhile_is_named() {
    every_way(|case, memory, mut log| {
        let mapping = memory.regions()[0].mapping();
        if mapping.file().is_none() || mapping.is_huge() {
            return;
        }
        let (written, quiet) = (520, 1600);
        [written, quiet].iter().for_each(|page| write(memory, *page, 1));
        log.start().expect("started");
        write(memory, written, 2);
        for page in [written, quiet] {
            let start = memory.host_address(PageIndex(page)).expect("mapped");
            #[allow(unsafe_code)]
            // SAFETY: of a file's memory this changes the page table, no byte.
            unsafe { rustix::mm::madvise(start.cast(), PAGE_BYTES, rustix::mm::Advice::LinuxDontNeed) }
                .expect("unmapped");
        }
        assert_eq!(collected(&mut log), units(memory, &[written]), "{case}");
        [written, quiet].iter().for_each(|page| write(memory, *page, 3));
        assert_eq!(collected(&mut log), units(memory, &[written, quiet]), "{case}");
    });
}

#[test]
fn memory_that_still_arrives_is_refused() {
    for method in [WriteLogMethod::Scan, WriteLogMethod::Handler] {
        let memory = memory(Backing::Memfd).expect("memory");
        let sink = Uffd::register(&memory).expect("registered");
        let mut log = WriteLog::by(&memory, method);
        assert!(log.start().expect_err("refused").message.contains("arriving"));
        assert_eq!(log.method(), None);
        crate::sink::PageSink::finish(&sink).expect("finished");
        drop(sink);
        log.start().expect("now it is there");
        assert_eq!(log.method(), Some(method));
    }
}

#[test]
fn the_best_way_is_chosen() {
    let memory = memory(Backing::Anon).expect("memory");
    let mut log = WriteLog::new(&memory);
    log.start().expect("started");
    let scan = Scanning::start(&super::super::test::memory(Backing::Anon).expect("memory"));
    let has = scan.expect("no failure").is_some();
    assert_eq!(log.method(), Some(if has { WriteLogMethod::Scan } else { WriteLogMethod::Handler }));
}

/// Writers at random, and a replica that is kept by what the log names, as a migration does it.
fn replicate(case: &str, memory: &GuestMemory, log: &mut WriteLog, seed: u64, rounds: u32, few: u32) {
    let pages = memory.pages();
    let mut replica = vec![[0; PAGE_BYTES]; pages as usize];
    // One page in eight is never written.
    let is_quiet = |page: u32| page % 8 == 5;
    let end = AtomicBool::new(false);
    log.start().expect("started");
    let take = |named: &[PageRange], replica: &mut Vec<[u8; PAGE_BYTES]>| {
        for page in named.iter().flat_map(|run| run.iter()) {
            memory.copy_out(PageRange::new(page, 1), &mut replica[page.as_usize()]).expect("read");
        }
    };
    thread::scope(|scope| {
        for writer in 0..2_u64 {
            let end = &end;
            scope.spawn(move || {
                let mut random = seed ^ (writer + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut version = 0_u64;
                while !end.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    version += 1;
                    // Far apart and close together.
                    let page = if random >> 63 == 0 {
                        (random >> 33) as u32 % pages
                    } else {
                        (random >> 33) as u32 % few
                    };
                    if !is_quiet(page) {
                        let word = (version << 8 | writer).to_ne_bytes();
                        let slot = memory.slot(one(page)).expect("a page");
                        slot.skip(writer as usize * 2048).take(8).copy_from(&word);
                    }
                }
            });
        }
        for _ in 0..rounds {
            let named = collected(log);
            let huge = memory.regions()[0].mapping().is_huge();
            let quiet = named.iter().flat_map(|run| run.iter()).find(|page| !huge && is_quiet(page.0));
            assert_eq!(quiet, None, "{case}: named, and never written");
            take(&named, &mut replica);
        }
        end.store(true, Ordering::Relaxed);
    });
    take(&collected(log), &mut replica);
    log.stop().expect("stopped");
    let mut bytes = [0; PAGE_BYTES];
    for (page, copy) in (0..pages).zip(&replica) {
        memory.copy_out(one(page), &mut bytes).expect("read");
        assert!(bytes == *copy, "{case}: page {page} was written and not named");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]
    /// No write is ever missed, whoever writes while it collects.
    #[test]
    fn a_replica_kept_by_the_log_is_the_memory(seed: u64, rounds in 1_u32..40, few in 1_u32..600) {
        every_way(|case, memory, mut log| {
            replicate(case, memory, &mut log, seed, rounds, few);
        });
    }
}
