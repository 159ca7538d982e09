//! Real faults by threads, over all three backings, and memory files by both ways into them.

use std::sync::atomic::AtomicU32;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use test_support::skipped;

use super::*;
use crate::manifest::{Manifest, Region};
use crate::memory::vectored::{self, IoPart};
use crate::memory::{Backing, BackingFile, test::on_huge_pages};

const UNITS: u32 = 5;

pub(super) fn memory(backing: Backing) -> Option<GuestMemory> {
    let unit = if backing == Backing::Hugetlb2M { InstallUnit::Huge2M } else { InstallUnit::Page };
    let region = |name: &str, units: u32| Region {
        name: name.into(),
        guest_address: None,
        length_bytes: u64::from(units) * InstallUnit::Huge2M.bytes() as u64,
        unit,
    };
    let regions = vec![region("low", 1), region("high", UNITS - 1)];
    let manifest = Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None };
    let allocate = || GuestMemory::allocate(&manifest, backing);
    if backing == Backing::Hugetlb2M { on_huge_pages(allocate) } else { Some(allocate().expect("memory")) }
}

fn every_backing(test: impl Fn(Backing, GuestMemory, Uffd)) {
    for backing in [Backing::Anon, Backing::Memfd, Backing::Hugetlb2M] {
        if let Some(memory) = memory(backing) {
            let uffd = Uffd::register_by(&memory, InstallBy::Copy).expect("registered");
            test(backing, memory, uffd);
        }
    }
    if let Some((memory, uffd)) = by_file() {
        test(Backing::Memfd, memory, uffd);
    }
}

/// Of a file in this directory, for a tmpfs with large folios.
fn in_file(directory: &std::path::Path) -> GuestMemory {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("memory-{}-{count}", std::process::id()));
    let like = memory(Backing::Memfd).expect("memory").manifest("vm", Vec::new());
    let map = |region: Region| {
        let file =
            std::fs::File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
        std::fs::remove_file(&path).expect("unlinked");
        file.set_len(region.length_bytes).expect("a length");
        let file = BackingFile { fd: file.into(), offset: 0 };
        let mapping = Mapping::shared(file, region.length_bytes as usize, false).expect("mapped");
        (region, mapping)
    };
    GuestMemory::from_mappings(like.regions.into_iter().map(map).collect()).expect("memory")
}

/// Memory into which pages go by its file, where the kernel can. `SG_MEMORY_DIR` says where the file is.
fn by_file() -> Option<(GuestMemory, Uffd)> {
    let memory = match std::env::var_os("SG_MEMORY_DIR") {
        Some(directory) => in_file(directory.as_ref()),
        None => memory(Backing::Memfd).expect("memory"),
    };
    let uffd = Uffd::register_by(&memory, InstallBy::File).expect("registered");
    if uffd.install_by() == InstallBy::File {
        return Some((memory, uffd));
    }
    skipped("install by file", "this kernel maps no pages of memory files by request");
    None
}

/// What is installed in these tests: every page has other bytes.
fn content(range: PageRange) -> Vec<u8> {
    range.iter().flat_map(|page| [(page.0 % 250 + 1) as u8; PAGE_BYTES]).collect()
}

fn page_byte(memory: &GuestMemory, page: PageIndex) -> u8 {
    let mut bytes = [0; PAGE_BYTES];
    memory.copy_out(PageRange::new(page, 1), &mut bytes).expect("a page");
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{page} is torn");
    bytes[0]
}

/// Waits for events and returns them.
fn wait(uffd: &Uffd) -> Vec<SinkEvent> {
    let mut out = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while out.is_empty() {
        assert!(Instant::now() < deadline, "no event came");
        let fd = uffd.event_fd().expect("there are events");
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&second)).expect("polled");
        uffd.events(&mut out).expect("read");
    }
    out
}

/// Installs pages though others are at some of them. Returns how many it were.
fn install_all(uffd: &Uffd, first: PageIndex, bytes: &[u8]) -> u32 {
    let (mut installed, mut at) = (0, Some(first));
    while let Some(page) = at {
        let skip = (page.0 - first.0) as usize * PAGE_BYTES;
        let done = uffd.install(page, &bytes[skip..]).expect("installed");
        installed += done.installed_pages();
        at = done.retry().map(|rest| rest.first);
    }
    installed
}

#[test]
fn faults_of_threads_are_answered() {
    every_backing(|backing, memory, uffd| {
        let pages = [5, 512, 1300, 2047].map(PageIndex);
        thread::scope(|scope| {
            let readers = pages.map(|page| {
                let memory = &memory;
                scope.spawn(move || page_byte(memory, page))
            });
            let mut answered = 0;
            while answered < pages.len() {
                for event in wait(&uffd) {
                    let SinkEvent::Fault { page, write, thread } = event else { panic!("{event:?}") };
                    let unit = memory.unit(page).expect("a page");
                    assert_eq!(unit.first, page, "{backing:?}: not the first of its unit");
                    assert!(!write && thread != 0);
                    let done = uffd.install(unit.first, &content(unit)).expect("installed");
                    assert_eq!(done.retry(), None);
                    answered += 1;
                }
            }
            for (reader, page) in readers.into_iter().zip(pages) {
                assert_eq!(reader.join().expect("reader"), (page.0 % 250 + 1) as u8);
            }
        });
        uffd.finish().expect("finished");
        // Never installed: ordinary memory now, which is zero.
        assert_eq!(page_byte(&memory, PageIndex(2048)), 0, "{backing:?}");
    });
}

#[test]
fn runs_of_pages_go_in_and_what_is_there_stays() {
    every_backing(|backing, memory, uffd| {
        let unit = memory.unit(PageIndex(600)).expect("unit").pages;
        let early = PageRange::new(PageIndex(512 + 10 * unit % 512), unit);
        assert_eq!(uffd.install_zero(early).expect("installed").installed_pages(), unit);
        let run = PageRange::new(PageIndex(512), 64.max(unit));
        let done = uffd.install(run.first, &content(run)).expect("installed");
        assert_eq!(done.retry(), None);
        assert_eq!(done.installed_pages(), run.pages - unit, "{backing:?}");
        assert_eq!(done.already_present().collect::<Vec<_>>(), [early]);
        for page in run.iter() {
            let there = early.positions().contains(&page.as_usize());
            let want = if there { 0 } else { (page.0 % 250 + 1) as u8 };
            assert_eq!(page_byte(&memory, page), want, "{page}");
        }
        let again = uffd.install_zero(run).expect("nothing to do");
        assert_eq!((again.installed_pages(), again.retry()), (0, None));
        uffd.finish().expect("finished");
    });
}

#[test]
fn what_was_there_before_is_dropped_or_kept() {
    every_backing(|backing, memory, uffd| {
        // Never finished: poisons all pages, which the next registration lifts.
        drop(uffd);
        let first = memory.unit(PageIndex(0)).expect("unit");
        let second = memory.unit(PageIndex(512)).expect("unit");
        let uffd = Uffd::register(&memory).expect("registered");
        assert_eq!(uffd.install(second.first, &content(second)).expect("installed").retry(), None);
        uffd.finish().expect("finished");
        drop(uffd);
        assert_eq!(page_byte(&memory, first.first), 0, "{backing:?}");

        let uffd = Uffd::register_over(&memory).expect("registered");
        assert_eq!(uffd.install_zero(first).expect("there").installed_pages(), 0, "{backing:?}");
        assert_eq!(page_byte(&memory, second.first), content(second)[0]);
        uffd.finish().expect("finished");
        drop(uffd);

        let uffd = Uffd::register(&memory).expect("registered");
        for unit in [first, second] {
            let done = uffd.install(unit.first, &vec![7; unit.pages as usize * PAGE_BYTES]);
            assert_eq!(done.expect("installed").installed_pages(), unit.pages, "{backing:?}");
            assert_eq!(page_byte(&memory, unit.first), 7);
        }
        uffd.finish().expect("finished");
    });
}

#[test]
fn two_installers_install_every_page_once() {
    every_backing(|backing, memory, uffd| {
        let installed = AtomicU32::new(0);
        let batch = if backing == Backing::Hugetlb2M { 512 } else { 64 };
        let batches = memory.pages() / batch;
        let installer = |mark: u8, order: &dyn Fn(u32) -> u32| {
            for at in 0..batches {
                let first = PageIndex(order(at) * batch);
                let bytes = vec![mark; batch as usize * PAGE_BYTES];
                installed.fetch_add(install_all(&uffd, first, &bytes), Ordering::Relaxed);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| installer(1, &|at| at));
            scope.spawn(|| installer(2, &|at| at));
            scope.spawn(|| installer(3, &|at| batches - 1 - at));
        });
        assert_eq!(installed.into_inner(), memory.pages(), "{backing:?}");
        for page in 0..memory.pages() {
            assert!((1..=3).contains(&page_byte(&memory, PageIndex(page))));
        }
        uffd.finish().expect("finished");
    });
}

#[test]
fn removed_pages_are_told_and_fault_again() {
    let memory = memory(Backing::Anon).expect("memory");
    let uffd = Uffd::register(&memory).expect("registered");
    let run = PageRange::new(PageIndex(512), 64);
    assert_eq!(uffd.install(run.first, &content(run)).expect("installed").installed_pages(), 64);
    let given_up = PageRange::new(PageIndex(520), 8);
    thread::scope(|scope| {
        // The kernel holds the balloon up until its event is read; installing gets nowhere then.
        let balloon = scope.spawn(|| memory.release(given_up).expect("released"));
        let deadline = Instant::now() + Duration::from_secs(60);
        let next = PageRange::new(PageIndex(1024), 1);
        while uffd.install(next.first, &content(next)).expect("no failure").retry().is_none() {
            assert!(Instant::now() < deadline, "the balloon never came");
        }
        assert_eq!(wait(&uffd), [SinkEvent::Removed(given_up)]);
        balloon.join().expect("balloon");
        assert_eq!(uffd.install(next.first, &content(next)).expect("goes on").retry(), None);

        let reader = scope.spawn(|| page_byte(&memory, PageIndex(523)));
        let events = wait(&uffd);
        assert!(matches!(events[..], [SinkEvent::Fault { page: PageIndex(523), write: false, .. }]));
        assert_eq!(uffd.install_zero(PageRange::new(PageIndex(523), 1)).expect("done").installed_pages(), 1);
        assert_eq!(reader.join().expect("reader"), 0);
    });
    assert_eq!(page_byte(&memory, PageIndex(519)), (519 % 250 + 1) as u8);
    uffd.finish().expect("finished");
}

/// Reads a page by a system call: a signal elsewhere is an error here.
fn read_by_kernel(memory: &GuestMemory, page: PageIndex) -> io::Result<usize> {
    let (near, _far) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let slice = memory.slice(PageRange::new(page, 1)).expect("a page");
    vectored::send(&near, &[IoPart::Guest(slice)])
}

fn lost_pages(how: impl Fn(&Uffd, PageRange), can: impl Fn(&Uffd) -> bool) {
    every_backing(|backing, memory, uffd| {
        if !can(&uffd) {
            return uffd.finish().expect("finished");
        }
        let there = memory.unit(PageIndex(512)).expect("unit");
        assert_eq!(uffd.install(there.first, &content(there)).expect("installed").retry(), None);
        let lost = PageRange::new(there.first, there.pages * 2);
        thread::scope(|scope| {
            let page = PageIndex(there.first.0 + there.pages);
            let waiter = scope.spawn({
                let memory = &memory;
                move || read_by_kernel(memory, page)
            });
            assert!(matches!(wait(&uffd)[..], [SinkEvent::Fault { .. }]));
            for part in
                (0..2).map(|part| PageRange::new(PageIndex(lost.first.0 + part * there.pages), there.pages))
            {
                how(&uffd, part);
            }
            let error = waiter.join().expect("waiter").expect_err("lost");
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{backing:?}");
        });
        assert_eq!(page_byte(&memory, there.first), content(there)[0], "{backing:?}");
        // The others wait as before.
        thread::scope(|scope| {
            let page = memory.unit(PageIndex(2000)).expect("unit").first;
            let reader = scope.spawn(|| page_byte(&memory, PageIndex(2000)));
            assert!(matches!(wait(&uffd)[..], [SinkEvent::Fault { page: waits, .. }] if waits == page));
            assert_eq!(uffd.install_zero(memory.unit(page).expect("unit")).expect("done").retry(), None);
            assert_eq!(reader.join().expect("reader"), 0);
        });
        drop(uffd);
        // Nobody finished it: what never came is an error, not zero.
        let error = read_by_kernel(&memory, PageIndex(100)).expect_err("never came");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{backing:?}");
    });
}

#[test]
fn lost_pages_are_an_error_to_their_waiters_only() {
    lost_pages(|uffd, range| uffd.poison(range).expect("poisoned"), |_| true);
}

#[test]
fn lost_pages_on_a_kernel_without_poison() {
    // By files none is installed there.
    let can = |uffd: &Uffd| uffd.install_by() == InstallBy::Copy;
    lost_pages(|uffd, range| uffd.forbid(range).expect("forbidden"), can);
}

#[test]
fn a_descriptor_that_was_handed_over_works() {
    every_backing(|backing, memory, own| {
        let windows = own.windows.clone();
        let uffd =
            Uffd::adopt(own.as_fd().try_clone_to_owned().expect("duplicated"), windows).expect("adopted");
        let unit = memory.unit(PageIndex(1024)).expect("unit");
        thread::scope(|scope| {
            let reader = scope.spawn(|| page_byte(&memory, unit.first));
            assert!(matches!(wait(&uffd)[..], [SinkEvent::Fault { .. }]));
            assert_eq!(uffd.install(unit.first, &content(unit)).expect("installed").retry(), None);
            assert_eq!(reader.join().expect("reader"), content(unit)[0], "{backing:?}");
        });
        uffd.finish().expect("finished");
        own.finish().expect("finished");
        let window = own.windows[0];
        for bad in [
            Window { pages: 0, ..window },
            Window { address: window.address + 1, ..window },
            Window { first: PageIndex(u32::MAX), ..window },
            Window { address: u64::MAX - 4095, ..window },
        ] {
            assert_eq!(check(&[bad]).expect_err("bad").kind, ErrorKind::Input);
        }
        assert!(check(&[window, Window { first: PageIndex(512), ..window }]).is_err(), "same addresses");
    });
}

#[test]
fn pages_that_there_are_not_are_refused() {
    every_backing(|backing, memory, uffd| {
        let input = |outcome: Result<InstallOutcome>| outcome.expect_err("refused").kind == ErrorKind::Input;
        assert!(input(uffd.install(PageIndex(memory.pages()), &[0; PAGE_BYTES])));
        assert!(input(uffd.install(PageIndex(0), &[0; PAGE_BYTES - 1])));
        assert!(input(uffd.install(PageIndex(0), &[])));
        assert!(input(uffd.install_zero(PageRange::new(PageIndex(500), 13))));
        assert!(input(uffd.install_zero(PageRange::new(PageIndex(0), 513))));
        if backing == Backing::Hugetlb2M {
            assert!(input(uffd.install(PageIndex(0), &[0; PAGE_BYTES])), "half a huge page");
        }
        uffd.finish().expect("finished");
    });
}

#[test]
fn pages_that_were_taken_out_are_waited_for_again() {
    every_backing(|backing, memory, uffd| {
        let unit = memory.unit(PageIndex(600)).expect("unit").pages;
        let all = PageRange::new(PageIndex(0), memory.pages());
        let install = |range: PageRange| {
            for first in range.iter().step_by(512.min(range.pages as usize)) {
                let some = PageRange::new(first, range.pages.min(512));
                assert_eq!(
                    uffd.install(first, &content(some)).expect("installed").installed_pages(),
                    some.pages
                );
            }
        };
        install(all);
        // Alone, beside each other over the border of a huge page and of a region, and a whole huge page and more.
        let few = [3, 5, 511, 512, 700, 1023, 1025].map(|first| PageRange::new(PageIndex(first), 1));
        let large = [PageRange::new(PageIndex(1100), 412), PageRange::new(PageIndex(1536), 512)];
        let units = [0, 512, 1536].map(|first| PageRange::new(PageIndex(first), 512));
        let runs: Vec<_> = if unit == 1 { few.into_iter().chain(large).collect() } else { units.to_vec() };
        uffd.withdraw(&runs).expect("taken out");
        let mut events = Vec::new();
        uffd.events(&mut events).expect("read");
        assert_eq!(events, [], "{backing:?}: nobody gave anything up");
        let is_out = |page: PageIndex| runs.iter().any(|run| run.positions().contains(&page.as_usize()));
        // The kernel splits a large folio for that, and unmaps it: pages that stay are mapped again, by who reads events.
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for page in all.iter().filter(|page| !is_out(*page)) {
                    let want = content(PageRange::new(page, 1))[0];
                    assert_eq!(page_byte(&memory, page), want, "{backing:?}: {page} stays");
                }
            });
            until_joined(&uffd, reader, |event| panic!("{backing:?}: {event:?}"));
        });
        for run in &runs {
            thread::scope(|scope| {
                let reader = scope.spawn(|| page_byte(&memory, run.first));
                let [SinkEvent::Fault { page, .. }] = wait(&uffd)[..] else { panic!("a fault") };
                assert_eq!(page, run.first, "{backing:?}");
                // What comes now is new.
                let bytes = vec![255; run.pages as usize * PAGE_BYTES];
                assert_eq!(uffd.install(run.first, &bytes).expect("installed").installed_pages(), run.pages);
                assert_eq!(reader.join().expect("reader"), 255);
            });
        }
        uffd.finish().expect("finished");
    });
}

/// Answers what comes until the thread has ended.
fn until_joined<T>(
    uffd: &Uffd,
    thread: thread::ScopedJoinHandle<'_, T>,
    mut each: impl FnMut(SinkEvent),
) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut events = Vec::new();
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "a thread waits");
        uffd.events(&mut events).expect("read");
        events.drain(..).for_each(&mut each);
        thread::yield_now();
    }
    thread.join().expect("a thread")
}

#[test]
fn what_a_guest_wrote_is_never_written_over() {
    every_backing(|backing, memory, uffd| {
        let batch = if backing == Backing::Hugetlb2M { 512 } else { 32 };
        let batches = memory.pages() / batch;
        let mark = vec![0xee; PAGE_BYTES];
        thread::scope(|scope| {
            for order in [0_u32, 1, 2] {
                let uffd = &uffd;
                scope.spawn(move || {
                    for at in 0..batches {
                        let at = if order == 1 { batches - 1 - at } else { at };
                        let first = PageIndex(at * batch);
                        let bytes = vec![order as u8 + 1; batch as usize * PAGE_BYTES];
                        install_all(uffd, first, &bytes);
                    }
                });
            }
            let guest = scope.spawn(|| {
                for page in (0..memory.pages()).map(PageIndex) {
                    assert!((1..=3).contains(&page_byte(&memory, page)), "{backing:?}: {page}");
                    memory.copy_in(PageRange::new(page, 1), &mark).expect("written");
                }
            });
            until_joined(&uffd, guest, |_| ());
        });
        for page in 0..memory.pages() {
            assert_eq!(page_byte(&memory, PageIndex(page)), 0xee, "{backing:?}: {page}");
        }
        uffd.finish().expect("finished");
    });
}

#[test]
fn what_lies_in_the_file_and_was_not_installed_is_not_seen() {
    let Some((memory, uffd)) = by_file() else { return };
    let beside = memory.again().expect("mapped").expect("a file");
    // As a large folio has pages beside those that came, and worse.
    let stray = PageRange::new(PageIndex(600), 8);
    beside.copy_in(stray, &[0xbb; 8 * PAGE_BYTES]).expect("written");
    let pages = [600, 602, 606].map(PageIndex);
    thread::scope(|scope| {
        let memory = &memory;
        let [bytes, zeros, lost] = pages.map(|page| {
            let one = PageRange::new(page, 1);
            let reader = scope.spawn(move || read_by_kernel(memory, page).map(|_| page_byte(memory, page)));
            assert!(matches!(wait(&uffd)[..], [SinkEvent::Fault { page: waits, .. }] if waits == page));
            thread::sleep(Duration::from_millis(5));
            assert!(!reader.is_finished(), "{page} was seen before it came");
            match page.0 {
                600 => assert_eq!(uffd.install(page, &content(one)).expect("done").installed_pages(), 1),
                602 => assert_eq!(uffd.install_zero(one).expect("done").installed_pages(), 1),
                _ => uffd.poison(one).expect("poisoned"),
            }
            reader.join().expect("reader")
        });
        assert_eq!(bytes.expect("read"), content(PageRange::new(pages[0], 1))[0]);
        assert_eq!(zeros.expect("read"), 0);
        assert_eq!(lost.expect_err("lost").raw_os_error(), Some(libc::EFAULT));
    });
    // A run over that: what is there stays.
    let run = PageRange::new(PageIndex(598), 8);
    let done = uffd.install(run.first, &content(run)).expect("installed");
    assert_eq!((done.retry(), done.installed_pages()), (None, 6));
    let there = [600, 602].map(|page| PageRange::new(PageIndex(page), 1));
    assert_eq!(done.already_present().collect::<Vec<_>>(), there);
    assert_eq!(page_byte(&memory, PageIndex(602)), 0);
    assert_eq!(page_byte(&memory, PageIndex(605)), content(PageRange::new(PageIndex(605), 1))[0]);
    drop(uffd);
    // Nobody finished it: what is in the file only is no page that came.
    assert!(read_by_kernel(&memory, PageIndex(700)).is_err());
}

#[test]
fn pages_that_a_guest_gave_up_are_zero_though_the_file_has_them() {
    let Some((memory, uffd)) = by_file() else { return };
    let run = PageRange::new(PageIndex(512), 64);
    assert_eq!(uffd.install(run.first, &content(run)).expect("installed").installed_pages(), 64);
    let given_up = PageRange::new(PageIndex(520), 8);
    let mapping = memory.regions()[1].mapping();
    thread::scope(|scope| {
        let balloon = scope.spawn(|| mapping.unmap_pages(8 * PAGE_BYTES, 8 * PAGE_BYTES));
        assert_eq!(wait(&uffd), [SinkEvent::Removed(given_up)]);
        balloon.join().expect("balloon");
        let reader = scope.spawn(|| page_byte(&memory, PageIndex(523)));
        assert!(matches!(wait(&uffd)[..], [SinkEvent::Fault { page: PageIndex(523), write: false, .. }]));
        assert_eq!(uffd.install_zero(given_up).expect("done").installed_pages(), 8);
        assert_eq!(reader.join().expect("reader"), 0);
    });
    assert_eq!(page_byte(&memory, PageIndex(519)), (519 % 250 + 1) as u8);
    uffd.finish().expect("finished");
}

#[test]
fn what_the_kernel_unmaps_is_mapped_again_and_asked_of_nobody() {
    let Some((memory, uffd)) = by_file() else { return };
    let run = PageRange::new(PageIndex(512), 64);
    assert_eq!(uffd.install(run.first, &content(run)).expect("installed").installed_pages(), 64);
    memory.regions()[1].mapping().page_out();
    thread::scope(|scope| {
        let reader = scope.spawn(|| run.iter().map(|page| page_byte(&memory, page)).collect::<Vec<_>>());
        let read = until_joined(&uffd, reader, |event| panic!("{event:?}"));
        assert_eq!(read, run.iter().map(|page| content(PageRange::new(page, 1))[0]).collect::<Vec<_>>());
    });
    uffd.finish().expect("finished");
}
