//! What the link itself can do, measured in the run: plain TCP streams and plain request-responses.

use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libsg::limits::BATCH_PAGES;
use libsg::page::PAGE_BYTES;
use libsg::units::Size;

use crate::lab::{Lab, Node, Reserve};

/// Streams of which the best counts.
const STREAMS: u32 = 3;
/// How long one stream runs, and what of that is its start and does not count.
const STREAM_TIME: Duration = Duration::from_millis(400);
const WARM_UP: Duration = Duration::from_millis(100);

/// Megabits of payload a second, best of three plain TCP streams from one node to another:
/// 64 pages a `writev`, received into warm memory.
pub fn link_mbps(lab: &Lab, from: Node, to: Node) -> Result<f64> {
    let mut best: f64 = 0.0;
    for _ in 0..STREAMS {
        best = best.max(one_stream(lab, from, to)?);
    }
    Ok(best)
}

/// What a link measures of what it is set to: the rest is headers.
pub const BAND: RangeInclusive<f64> = 0.93..=0.97;

/// Megabits of payload a second of one plain TCP stream from the source to `to`; the best of several where one alone
/// is below what the link is set to.
pub fn in_band_mbps(lab: &Lab, to: Node, nominal_mbps: f64) -> Result<f64> {
    let mut best: f64 = 0.0;
    for _ in 0..STREAMS {
        best = best.max(one_stream(lab, Node::Source, to)?);
        if best / nominal_mbps >= *BAND.start() {
            break;
        }
    }
    Ok(best)
}

/// Megabits of payload a second of one plain TCP stream.
fn one_stream(lab: &Lab, from: Node, to: Node) -> Result<f64> {
    let (sender, receiver) = connect(lab, from, to)?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || receive_for_a_while(receiver));
        let pages = vec![0xa5; BATCH_PAGES * PAGE_BYTES];
        let batch: Vec<IoSlice> = pages.chunks(PAGE_BYTES).map(IoSlice::new).collect();
        let until = Instant::now() + STREAM_TIME;
        let mut sender = &sender;
        while Instant::now() < until {
            sender.write_vectored(&batch).context("plain stream")?;
        }
        sender.shutdown(Shutdown::Write)?;
        receiving.join().map_err(|_| anyhow::anyhow!("the plain stream's receiver panicked"))?
    })
}

/// The rate from the end of the warm-up to the end of the stream.
fn receive_for_a_while(mut stream: TcpStream) -> Result<f64> {
    let mut buffer = vec![0xff; 1 << 20];
    let start = Instant::now();
    let mut counted: Option<(Instant, u64)> = None;
    loop {
        let n = stream.read(&mut buffer).context("plain stream")?;
        let now = Instant::now();
        match &mut counted {
            Some((since, bytes)) if n == 0 => return Ok(mbps(*bytes, now - *since)),
            None if n == 0 => anyhow::bail!("the plain stream ended during its warm-up"),
            Some((_, bytes)) => *bytes += n as u64,
            None if now - start >= WARM_UP => counted = Some((now, 0)),
            None => {}
        }
    }
}

/// Bytes in a time as megabits a second.
pub fn mbps(bytes: u64, time: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / time.as_secs_f64()
}

/// Exchanges of a request of 64 bytes against a page: enough for a median, and how many medians.
const EXCHANGES: usize = 400;
const MEDIANS: usize = 3;

/// The time, in microseconds, in which `client` gets 4 KiB from `server` over the idle link: the best of three
/// medians, for whatever disturbs a machine makes none of them shorter.
pub fn idle_round_trip_us(lab: &Lab, client: Node, server: Node) -> Result<f64> {
    const REQUEST: usize = 64;
    let (mut asking, mut answering) = connect(lab, client, server)?;
    asking.set_nodelay(true)?;
    answering.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut request, page) = ([0; REQUEST], [0; PAGE_BYTES]);
            // Ends when the client hangs up.
            while answering.read_exact(&mut request).is_ok() && answering.write_all(&page).is_ok() {}
        });
        let mut page = [0; PAGE_BYTES];
        let mut best = f64::INFINITY;
        for _ in 0..MEDIANS {
            let mut times_us = Vec::with_capacity(EXCHANGES);
            for _ in 0..EXCHANGES {
                let start = Instant::now();
                asking.write_all(&[1; REQUEST])?;
                asking.read_exact(&mut page)?;
                times_us.push(start.elapsed().as_secs_f64() * 1e6);
            }
            best = best.min(crate::stats::median(&times_us).context("no exchange")?);
        }
        drop(asking);
        Ok(best)
    })
}

/// What a plain stream cost.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Cost {
    /// Its throughput.
    pub mbps: f64,
    /// User + system seconds a GiB at its sender.
    pub send_cpu_s_per_gib: f64,
    /// The same at its receiver.
    pub receive_cpu_s_per_gib: f64,
}

/// One plain TCP stream over loopback from memory that was written into memory that was never touched.
pub fn into_fresh_memory(bytes: usize) -> Result<Cost> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    let mut reserve = Reserve::fill(Size(bytes as u64 + bytes as u64 / 4))?;
    reserve.hand_out()?;
    fresh_stream(&sender, &receiver, bytes)
}

/// The same from one host to another, with the memory that is there.
pub fn into_fresh_memory_of(lab: &Lab, from: Node, to: Node, bytes: usize) -> Result<Cost> {
    let (sender, receiver) = connect(lab, from, to)?;
    fresh_stream(&sender, &receiver, bytes)
}

fn fresh_stream(sender: &TcpStream, receiver: &TcpStream, bytes: usize) -> Result<Cost> {
    let source = vec![0xa5; bytes];
    let per_gib = |cpu: Duration| cpu.as_secs_f64() * (1_u64 << 30) as f64 / bytes as f64;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || -> Result<(Duration, Duration)> {
            let mut fresh: Vec<u8> = Vec::with_capacity(bytes);
            let (start, cpu) = (Instant::now(), thread_cpu()?);
            while rustix::io::read(receiver, rustix::buffer::spare_capacity(&mut fresh))? != 0 {}
            anyhow::ensure!(fresh.len() == bytes, "the plain stream ended early");
            Ok((start.elapsed(), thread_cpu()?.saturating_sub(cpu)))
        });
        let (mut sending, cpu) = (sender, thread_cpu()?);
        for batch in source.chunks(BATCH_PAGES * PAGE_BYTES) {
            let mut pages: Vec<IoSlice> = batch.chunks(PAGE_BYTES).map(IoSlice::new).collect();
            let mut left = &mut pages[..];
            while !left.is_empty() {
                let n = sending.write_vectored(left)?;
                IoSlice::advance_slices(&mut left, n);
            }
        }
        sending.shutdown(Shutdown::Write)?;
        let sent_cpu = thread_cpu()?.saturating_sub(cpu);
        let (time, received_cpu) =
            receiving.join().map_err(|_| anyhow::anyhow!("the plain stream's receiver panicked"))??;
        Ok(Cost {
            mbps: mbps(bytes as u64, time),
            send_cpu_s_per_gib: per_gib(sent_cpu),
            receive_cpu_s_per_gib: per_gib(received_cpu),
        })
    })
}

/// User + system time of this thread so far.
fn thread_cpu() -> Result<Duration> {
    use rustix::time::{ClockId, clock_gettime};
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).context("the thread's clock")
}

/// A connection made by `from` to `to`: its two ends.
fn connect(lab: &Lab, from: Node, to: Node) -> Result<(TcpStream, TcpStream)> {
    let address = lab.address(to);
    let listener = lab.on(to, || TcpListener::bind((address, 0)))?.context("plain stream")?;
    let target = listener.local_addr()?;
    let client = lab
        .on(from, || TcpStream::connect_timeout(&target, Duration::from_secs(5)))?
        .with_context(|| format!("{from} cannot reach {to}"))?;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rates_are_bits_of_payload() {
        assert!((mbps(125_000, Duration::from_millis(1)) - 1000.0).abs() < 1e-9);
    }

    #[test]
    fn a_stream_into_fresh_memory_arrives_whole() {
        let cost = into_fresh_memory(4 << 20).expect("loopback");
        assert!(cost.mbps > 0.0 && cost.send_cpu_s_per_gib > 0.0 && cost.receive_cpu_s_per_gib > 0.0);
    }
}
