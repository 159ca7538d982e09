//! `sg-bench micro`: what the pieces of the page path cost on this machine, each in a second or less.

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libsg::limits::BATCH_PAGES;
use libsg::manifest::{Manifest, Region};
use libsg::memory::vectored::{self, IoPart};
use libsg::memory::{Backing, GuestMemory};
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::sink::PageSink as _;
use libsg::uffd::Uffd;

use crate::{interrupt, stats, stream};

/// Memory that one measurement goes over: beyond any cache.
const BYTES: u64 = 256 << 20;
const PAGES: u32 = (BYTES / PAGE_BYTES_U64) as u32;
/// Pages of a 64 KiB run.
const RUN_PAGES: u32 = 16;

/// Prints each.
pub fn run() -> Result<()> {
    let filled = filled_memory()?;
    let measurements: [(&str, &dyn Fn() -> Result<Duration>); 7] = [
        ("checksum, page by page", &|| each_page(|page| filled.checksum(page).map(drop))),
        ("zero check, filled pages", &|| each_page(|page| filled.is_zero(page).map(drop))),
        ("install, 4 KiB each", &|| install(1)),
        ("install, 64 KiB runs", &|| install(RUN_PAGES)),
        ("install, batches of 64 pages", &|| install(BATCH_PAGES as u32)),
        ("send from guest memory, a page each", &|| send(&filled, 1)),
        ("send from guest memory, 64 pages each", &|| send(&filled, BATCH_PAGES as u32)),
    ];
    for (name, measure) in measurements {
        interrupt::check()?;
        let time = measure()?;
        println!("{name:40} {:8.2} GB/s", BYTES as f64 / 1e9 / time.as_secs_f64());
    }
    println!(
        "{:40} {:8.2} GB/s",
        "plain stream into fresh memory",
        stream::into_fresh_memory_mbps(BYTES as usize)? / 8e3
    );
    println!("{:40} {:8.2} us", "one install of 4 KiB", install_us()?);
    Ok(())
}

/// The median time, in microseconds, that one page takes to be installed.
pub fn install_us() -> Result<f64> {
    const INSTALLS: u32 = 1000;
    let memory = memory(INSTALLS)?;
    let sink = Uffd::register(&memory)?;
    let page = [0xa5; PAGE_BYTES];
    let mut times_us = Vec::new();
    for number in 0..INSTALLS {
        let start = Instant::now();
        let outcome = sink.install(PageIndex(number), &page)?;
        times_us.push(start.elapsed().as_secs_f64() * 1e6);
        anyhow::ensure!(outcome.installed_pages() == 1, "a fresh page was there already");
    }
    stats::median(&times_us).context("no install")
}

fn memory(pages: u32) -> Result<GuestMemory> {
    let region = Region {
        name: "ram".into(),
        guest_address: None,
        length_bytes: u64::from(pages) * PAGE_BYTES_U64,
        unit: InstallUnit::Page,
    };
    let manifest = Manifest { vm: "micro".into(), regions: vec![region], vm_config: Vec::new() };
    Ok(GuestMemory::allocate(&manifest, Backing::Anon)?)
}

fn filled_memory() -> Result<GuestMemory> {
    let memory = memory(PAGES)?;
    // Zero but for the last byte: the longest way for the zero check.
    let mut page = [0; PAGE_BYTES];
    page[PAGE_BYTES - 1] = 1;
    for number in 0..PAGES {
        memory.copy_in(PageRange::new(PageIndex(number), 1), &page)?;
    }
    Ok(memory)
}

fn each_page(work: impl Fn(PageIndex) -> libsg::Result<()>) -> Result<Duration> {
    let start = Instant::now();
    for number in 0..PAGES {
        work(PageIndex(number))?;
    }
    Ok(start.elapsed())
}

/// All of fresh memory, so many pages a call.
fn install(at_once: u32) -> Result<Duration> {
    let memory = memory(PAGES)?;
    let sink = Uffd::register(&memory)?;
    let bytes = vec![0xa5; at_once as usize * PAGE_BYTES];
    let start = Instant::now();
    for first in (0..PAGES).step_by(at_once as usize) {
        anyhow::ensure!(sink.install(PageIndex(first), &bytes)?.retry().is_none(), "an install was not done");
    }
    Ok(start.elapsed())
}

/// All of `memory` over loopback, so many pages a call, received into warm memory.
fn send(memory: &GuestMemory, at_once: u32) -> Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || -> std::io::Result<()> {
            let mut buffer = vec![0xff; 1 << 20];
            while receiver.read(&mut buffer)? > 0 {}
            Ok(())
        });
        let start = Instant::now();
        for first in (0..PAGES).step_by(at_once as usize) {
            let run = memory.slice(PageRange::new(PageIndex(first), at_once))?;
            let mut parts: Vec<IoPart<'_>> = run.pages().map(IoPart::Guest).collect();
            let mut left = &mut parts[..];
            while !left.is_empty() {
                let bytes = vectored::send(&sender, left)?;
                left = IoPart::advance(left, bytes);
            }
        }
        drop(sender);
        receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        Ok(start.elapsed())
    })
}
