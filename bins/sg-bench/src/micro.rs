//! `sg-bench micro`: what the pieces of the page path cost on this machine, each in a second or so. The same pieces,
//! measured with more care: `cargo bench -p sg-benches`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libsg::limits::BATCH_PAGES;
use libsg::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::sink::PageSink as _;
use libsg::uffd::Uffd;
use sg_benches::plain::Plain;
use sg_benches::store::Store;

use crate::{interrupt, stats, stream};

/// Memory that one measurement goes over: beyond any cache.
const BYTES: u64 = 256 << 20;
const PAGES: u32 = (BYTES / PAGE_BYTES_U64) as u32;
/// Pages of a 64 KiB run.
const RUN_PAGES: u32 = 16;
/// Pages a message, or a `writev`.
const BATCHES: [u32; 3] = [1, RUN_PAGES, BATCH_PAGES as u32];
/// How often they are gone over.
const TIMES: usize = 3;

/// Prints each.
pub fn run() -> Result<()> {
    let filled = sg_benches::filled(PAGES)?;
    told("checksum, page by page", || each_page(|page| filled.checksum(page).map(drop)))?;
    told("zero check, filled pages", || each_page(|page| filled.is_zero(page).map(drop)))?;
    for at_once in BATCHES {
        told(&format!("install, pages at once: {at_once}"), || install(at_once))?;
    }
    let fresh_mbps = stream::into_fresh_memory(BYTES as usize)?.mbps;
    println!("{:40} {:8.2} GB/s", "plain stream into fresh memory", fresh_mbps / 8e3);
    // The connection and the slots are warm from the second time on.
    let mut plain = Plain::start(PAGES)?;
    let mut store = Store::start(PAGES)?;
    let mut placed = Vec::new();
    for batch in BATCHES {
        let timed = |work: &mut dyn FnMut() -> libsg::Result<()>| {
            work()?;
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        };
        told(&format!("plain stream, pages a writev: {batch}"), || {
            timed(&mut || plain.send(&filled, batch))
        })?;
        told(&format!("put over TCP, pages a batch: {batch}"), || {
            store.put(&filled, batch, &mut placed)?;
            store.drop_all(&placed)?;
            let start = Instant::now();
            store.put(&filled, batch, &mut placed)?;
            let time = start.elapsed();
            store.drop_all(&placed)?;
            Ok(time)
        })?;
        store.put(&filled, batch, &mut placed)?;
        told(&format!("get over TCP, pages a batch: {batch}"), || timed(&mut || store.get(batch, &placed)))?;
        store.drop_all(&placed)?;
    }
    println!("{:40} {:8.2} us", "one install of 4 KiB", install_us()?);
    Ok(())
}

/// The best of some times: whatever disturbs a machine makes none of them shorter.
fn told(name: &str, mut measure: impl FnMut() -> Result<Duration>) -> Result<()> {
    let mut best = Duration::MAX;
    for _ in 0..TIMES {
        interrupt::check()?;
        best = best.min(measure()?);
    }
    println!("{name:40} {:8.2} GB/s", BYTES as f64 / 1e9 / best.as_secs_f64());
    Ok(())
}

/// The median time, in microseconds, that one page takes to be installed.
pub fn install_us() -> Result<f64> {
    const INSTALLS: u32 = 1000;
    let memory = sg_benches::fresh(INSTALLS)?;
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

fn each_page(work: impl Fn(PageIndex) -> libsg::Result<()>) -> Result<Duration> {
    let start = Instant::now();
    for number in 0..PAGES {
        work(PageIndex(number))?;
    }
    Ok(start.elapsed())
}

/// All of fresh memory, so many pages a call.
fn install(at_once: u32) -> Result<Duration> {
    let memory = sg_benches::fresh(PAGES)?;
    let sink = Uffd::register(&memory)?;
    let bytes = vec![0xa5; at_once as usize * PAGE_BYTES];
    let start = Instant::now();
    for first in (0..PAGES).step_by(at_once as usize) {
        anyhow::ensure!(sink.install(PageIndex(first), &bytes)?.retry().is_none(), "an install was not done");
    }
    Ok(start.elapsed())
}
