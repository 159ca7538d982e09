//! The content store of an intermediary over loopback TCP, put and get at several batch sizes, beside a plain
//! `writev` and `read` stream that stores nothing. Each iteration moves 16 MiB with up to 1 MiB under way.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libsg::ids::{Epoch, Placement, Round, VolumeId};
use libsg::memory::vectored::{self, IoPart};
use libsg::memory::{GuestMemory, PageSlice};
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::{PoolSecret, wait};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector as _, Link, Reply, Request, TcpConnector};
use libsg::wire::message::VmdRequest;
use libsg::wire::{GetEntry, PageEntry};

const PAGES: u32 = 4 << 10;
const UNDER_WAY_PAGES: u32 = 256;
const BATCHES: [u32; 3] = [1, 16, 64];
const PATIENCE: Duration = Duration::from_secs(10);

/// A server, a volume on it, and a link to that.
struct Stage {
    link: Box<dyn Link>,
    _server: ServerHandle,
}

impl Stage {
    fn new() -> Self {
        let secret = PoolSecret::from_bytes(b"bench").expect("not empty");
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = Server::bind(Config::new(anywhere, "bench", 1 << 30, secret.clone())).expect("listens");
        let server = server.spawn().expect("serves");
        let volume = VolumeId::random().expect("random");
        let connector = TcpConnector::new(secret);
        let link = connector.connect(server.address(), volume, Epoch::FIRST, Class::Bulk, PATIENCE);
        let mut link = link.expect("a link");
        let members = vec![link.member().clone()];
        let create = VmdRequest::Create { manifest: sg_benches::manifest(PAGES), members };
        ask(&mut *link, Request::Control(&create), PATIENCE, |_| Ok(())).expect("a volume");
        Self { link, _server: server }
    }

    /// Submits a batch for each piece of the memory and sees to all answers.
    fn pipeline(
        &mut self,
        batch_pages: u32,
        submit: &mut dyn FnMut(&mut dyn Link, PageRange),
        take: &mut dyn FnMut(Reply<'_>),
    ) {
        let mut left: VecDeque<PageRange> = (0..PAGES)
            .step_by(batch_pages as usize)
            .map(|first| PageRange::new(PageIndex(first), batch_pages))
            .collect();
        let mut under_way = 0;
        while under_way > 0 || !left.is_empty() {
            while under_way + batch_pages <= UNDER_WAY_PAGES
                && let Some(range) = left.pop_front()
            {
                submit(&mut *self.link, range);
                under_way += batch_pages;
            }
            self.link.progress(usize::MAX).expect("moves");
            let before = under_way;
            while let Some(done) = self.link.completion() {
                take(done.result.expect("answered"));
                under_way -= batch_pages;
            }
            if under_way == before {
                wait(&[(self.link.poll_fd(), self.link.queued_bytes() > 0)], PATIENCE).expect("waits");
            }
        }
    }

    fn put(&mut self, memory: &GuestMemory, batch_pages: u32, placed: &mut Vec<Placement>) {
        placed.clear();
        let entry = |page| PageEntry::raw(page, Round(0), memory.checksum(page).expect("a page"));
        self.pipeline(
            batch_pages,
            &mut |link, range| {
                let entries: Vec<PageEntry> = range.iter().map(entry).collect();
                let slices = [PageSlice::guest(memory, range).expect("pages of it")];
                link.submit(Request::Put { entries: &entries, slices: &slices, copies: 1 }).expect("queued");
            },
            &mut |reply| match reply {
                Reply::Stored(at) => placed.extend(at.iter().map(|at| at.expect("room"))),
                other => panic!("{other:?}"),
            },
        );
    }

    fn get(&mut self, batch_pages: u32, placed: &[Placement]) {
        let mut came = 0;
        self.pipeline(
            batch_pages,
            &mut |link, range| {
                let entry = |page: PageIndex| GetEntry { page, placement: placed[page.as_usize()] };
                let wanted: Vec<GetEntry> = range.iter().map(entry).collect();
                link.submit(Request::Get(&wanted)).expect("queued");
            },
            &mut |reply| match reply {
                Reply::Pages { bytes, .. } => came += bytes.len(),
                other => panic!("{other:?}"),
            },
        );
        assert_eq!(came, PAGES as usize * PAGE_BYTES);
    }

    fn drop_all(&mut self, placed: &[Placement]) {
        let all: Vec<GetEntry> =
            (0..).zip(placed).map(|(page, at)| GetEntry { page: PageIndex(page), placement: *at }).collect();
        for some in all.chunks(512) {
            ask(&mut *self.link, Request::Drop(some), PATIENCE, |_| Ok(())).expect("dropped");
        }
    }
}

fn store(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES);
    let mut group = criterion.benchmark_group("store");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    for batch_pages in BATCHES {
        let (mut stage, mut placed) = (Stage::new(), Vec::new());
        group.bench_function(BenchmarkId::new("put and drop", batch_pages), |b| {
            b.iter(|| {
                stage.put(&memory, batch_pages, &mut placed);
                stage.drop_all(&placed);
            });
        });
        stage.put(&memory, batch_pages, &mut placed);
        group.bench_function(BenchmarkId::new("get", batch_pages), |b| {
            b.iter(|| stage.get(batch_pages, &placed));
        });
    }
    group.finish();
}

/// The same bytes by `writev`, answered with one byte at the end, received into one warm buffer.
fn plain(criterion: &mut Criterion) {
    let memory = sg_benches::filled(PAGES);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listens");
    let mut sender = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
    let (mut receiver, _) = listener.accept().expect("connected");
    let receiving = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        let mut left = PAGES as usize * PAGE_BYTES;
        while let Ok(bytes @ 1..) = receiver.read(&mut buffer) {
            left -= bytes;
            if left == 0 {
                left = PAGES as usize * PAGE_BYTES;
                receiver.write_all(&[1]).expect("answered");
            }
        }
    });
    let mut group = criterion.benchmark_group("plain stream");
    group.throughput(Throughput::Bytes(u64::from(PAGES) * PAGE_BYTES_U64));
    for batch_pages in BATCHES {
        group.bench_function(BenchmarkId::new("pages a writev", batch_pages), |b| {
            b.iter(|| {
                for first in (0..PAGES).step_by(batch_pages as usize) {
                    let run = memory.slice(PageRange::new(PageIndex(first), batch_pages)).expect("pages");
                    let mut parts: Vec<IoPart<'_>> = run.pages().map(IoPart::Guest).collect();
                    let mut left = &mut parts[..];
                    while !left.is_empty() {
                        let bytes = vectored::send(&sender, left).expect("sent");
                        left = IoPart::advance(left, bytes);
                    }
                }
                sender.read_exact(&mut [0]).expect("all came");
            });
        });
    }
    group.finish();
    drop(sender);
    receiving.join().expect("the receiver ends");
}

criterion_group!(name = benches; config = sg_benches::short(); targets = store, plain);
criterion_main!(benches);
