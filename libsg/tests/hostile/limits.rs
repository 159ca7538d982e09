//! How connections share what the operator allows: counted in bytes.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libsg::ids::{Epoch, MemberSet};
use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::server::ServerHandle;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector as _, Request, TcpConnector};
use libsg::wire::GetEntry;

use super::support::{Client, MIB, PATIENCE, batch, eventually, secret, serve, wanted};

const CLIENTS: u64 = 6;
const UNDER_WAY: usize = 4;
const BATCH_PAGES: u32 = 64;
const BATCH_BYTES: u64 = BATCH_PAGES as u64 * PAGE_BYTES_U64;

/// Keeps some requests of so many bytes under way, for as long as `more` says that there shall be; the bytes of those
/// that were answered.
fn pump(client: &mut Client, request: Request<'_>, bytes: u64, more: impl Fn(u64) -> bool) -> u64 {
    let link = &mut *client.link;
    let (mut open, mut done) = (0, 0);
    loop {
        while open < UNDER_WAY {
            link.submit(request).unwrap();
            open += 1;
        }
        link.progress(usize::MAX).unwrap();
        while let Some(completion) = link.completion() {
            completion.result.unwrap();
            open -= 1;
            done += bytes;
            if !more(bytes) {
                return done;
            }
        }
        if open == UNDER_WAY {
            libsg::transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).unwrap();
        }
    }
}

/// What each of several clients has moved by the time that all together have moved so much. They begin together.
fn each_of(run: impl Fn(u64, &Barrier, &dyn Fn(u64) -> bool) -> u64 + Sync) -> Vec<u64> {
    let (total, moved) = (40 * MIB, AtomicU64::new(0));
    let begin = Barrier::new(CLIENTS as usize);
    let more = |bytes: u64| moved.fetch_add(bytes, Ordering::Relaxed) + bytes < total;
    std::thread::scope(|scope| {
        let (run, begin, more) = (&run, &begin, &more);
        let clients: Vec<_> =
            (1..=CLIENTS).map(|client| scope.spawn(move || run(client, begin, more))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

fn assert_fair(each: &[u64]) {
    let mean = each.iter().sum::<u64>() / CLIENTS;
    // What is under way is not counted, and a client that is not let run for a while has nothing under way.
    assert!(each.iter().all(|bytes| bytes.abs_diff(mean) <= mean / 2), "{each:?}");
}

#[test]
fn who_puts_pages_has_as_much_of_the_limit_as_any_other() {
    let server = serve(|config| {
        config.memory_bytes = 256 * MIB;
        config.limit_in_bytes_per_s = 25 * MIB;
    });
    let each = each_of(|volume, begin, more| {
        let mut client = Client::create(&server, volume.into(), 1000);
        let (entries, slices) = batch(client.volume, 0..BATCH_PAGES);
        let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        begin.wait();
        pump(&mut client, put, BATCH_BYTES, more)
    });
    assert_fair(&each);
}

/// A volume with pages, and what to ask for to have them.
fn filled(server: &ServerHandle, volume: u64) -> (Client, Vec<GetEntry>) {
    let mut client = Client::create(server, volume.into(), 1000);
    let placements = client.put(0..BATCH_PAGES).unwrap();
    (client, wanted(0..BATCH_PAGES, &placements))
}

#[test]
fn who_reads_pages_has_as_much_of_the_limit_as_any_other() {
    let server = serve(|config| config.limit_out_bytes_per_s = 25 * MIB);
    let each = each_of(|volume, begin, more| {
        let (mut client, wanted) = filled(&server, volume);
        begin.wait();
        pump(&mut client, Request::Get(&wanted), BATCH_BYTES, more)
    });
    assert_fair(&each);
}

#[test]
fn what_a_guest_waits_for_and_index_questions_go_before_bulk() {
    const QUESTIONS: u64 = 40;
    let server = serve(|config| config.limit_out_bytes_per_s = MIB);
    let (mut asks, pages) = filled(&server, 100);
    let urgent = TcpConnector::new(secret());
    let mut urgent =
        urgent.connect(server.address(), asks.volume, Epoch(1), Class::Urgent, PATIENCE).unwrap();
    let (ended, begun) = (AtomicBool::new(false), AtomicU64::new(0));
    let sent = || server.statistics().bytes_out;
    let bulk = std::thread::scope(|scope| {
        for volume in 1..=CLIENTS {
            let (server, ended, begun) = (&server, &ended, &begun);
            scope.spawn(move || {
                let (mut client, wanted) = filled(server, volume);
                begun.fetch_add(1, Ordering::Relaxed);
                let more = |_| !ended.load(Ordering::Relaxed);
                pump(&mut client, Request::Get(&wanted[..4]), 4 * PAGE_BYTES_U64, more);
            });
        }
        eventually("all are in line", || begun.load(Ordering::Relaxed) == CLIENTS && sent() > MIB / 4);
        let before = sent();
        for _ in 0..QUESTIONS / 2 {
            ask(&mut *urgent, Request::Get(&pages[..1]), PATIENCE, |_| Ok(())).unwrap();
            let range = PageRange::new(PageIndex(0), 8);
            ask(&mut *asks.link, Request::Locate(range), PATIENCE, |_| Ok(())).unwrap();
        }
        let after = sent();
        ended.store(true, Ordering::Relaxed);
        after - before
    });
    // Behind a slice of each other connection a question would cost 24 KiB of bulk.
    assert!(bulk < QUESTIONS * 14 * 1024, "{bulk} bytes went before {QUESTIONS} questions were answered");
}
