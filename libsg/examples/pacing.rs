//! Urgent pages beside paced bulk on one link, measured over real sockets.
//!
//! `pacing receive PORT` on one host, on the other
//! `pacing send ADDRESS:PORT plain|paced|idle CONNECTIONS SECONDS CONGESTION`. The receiver prints the latency of
//! its 4 KiB requests, the sender the rate and what the pacer found; both leave the first second out.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libsg::pace::{
    Class, KernelPace, LinkReading, SharedPacer, TcpInfo, mark_bulk, mark_urgent, precise_timers, quick_ack,
    set_congestion,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const PAGE: usize = 4096;
const WARM_UP: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["receive", port] => receive(&format!("0.0.0.0:{port}")),
        ["send", address, mode, connections, seconds, congestion] => {
            let seconds = Duration::from_secs(seconds.parse()?);
            send(address, mode, connections.parse()?, seconds, congestion)
        }
        _ => {
            Err("pacing receive PORT | send ADDRESS:PORT plain|paced|idle CONNECTIONS SECONDS CONGESTION"
                .into())
        }
    }
}

fn receive(address: &str) -> Result<()> {
    for stream in TcpListener::bind(address)?.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> Result<()> {
            let mut kind = [0];
            stream.read_exact(&mut kind)?;
            if kind == *b"u" { request_pages(stream) } else { swallow(stream) }
        });
    }
    Ok(())
}

fn swallow(mut stream: TcpStream) -> Result<()> {
    let acknowledge = std::env::var_os("NO_QUICK_ACK").is_none();
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer)? > 0 {
        if acknowledge {
            quick_ack(&stream)?;
        }
    }
    Ok(())
}

fn request_pages(mut stream: TcpStream) -> Result<()> {
    mark_urgent(&stream)?;
    precise_timers()?;
    let start = Instant::now();
    let mut latencies = Vec::new();
    let mut page = [0; PAGE];
    loop {
        let asked = Instant::now();
        if stream.write_all(&[1; 16]).and_then(|()| stream.read_exact(&mut page)).is_err() {
            break;
        }
        if start.elapsed() > WARM_UP {
            latencies.push(asked.elapsed());
        }
        thread::sleep(Duration::from_millis(1));
    }
    latencies.sort();
    let at =
        |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied().unwrap_or_default();
    println!("urgent p50 {:?} p90 {:?} p99 {:?} max {:?}", at(0.5), at(0.9), at(0.99), at(0.9999));
    Ok(())
}

fn send(address: &str, mode: &str, connections: usize, time: Duration, congestion: &str) -> Result<()> {
    let pacer = Arc::new(SharedPacer::new(Instant::now(), 0));
    let stop = Arc::new(AtomicBool::new(false));
    let urgent = TcpStream::connect(address)?;
    let answering = {
        let (pacer, urgent) = (pacer.clone(), urgent.try_clone()?);
        thread::spawn(move || answer_pages(urgent, &pacer))
    };
    let mut senders = Vec::new();
    for _ in 0..if mode == "idle" { 0 } else { connections } {
        let stream = TcpStream::connect(address)?;
        set_congestion(&stream, congestion)?;
        let (pacer, stop, paced) = (pacer.clone(), stop.clone(), mode == "paced");
        senders.push((stream.try_clone()?, thread::spawn(move || send_bulk(stream, &pacer, paced, &stop))));
    }
    thread::sleep(WARM_UP);
    let acked = || {
        let sockets = senders.iter().map(|(stream, _)| stream).chain([&urgent]);
        sockets.map(|socket| TcpInfo::read(socket).map(|info| info.bytes_acked)).sum::<std::io::Result<u64>>()
    };
    let (start, before) = (Instant::now(), acked()?);
    let mut rates = Vec::new();
    while start.elapsed() < time {
        thread::sleep(Duration::from_millis(250));
        rates.push(pacer.rate().map_or(0, |rate| rate / 125_000));
    }
    let carried = (acked()? - before) as f64 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    urgent.shutdown(std::net::Shutdown::Both)?;
    println!("bulk and urgent {:.1} Mb/s, rates {rates:?}", carried / 125_000.0);
    for (_, sender) in senders {
        sender.join().map_err(|_| "a sender panicked")??;
    }
    answering.join().map_err(|_| "the answering thread panicked")?.ok();
    Ok(())
}

fn answer_pages(mut stream: TcpStream, pacer: &SharedPacer) -> Result<()> {
    mark_urgent(&stream)?;
    stream.write_all(b"u")?;
    let mut request = [0; 16];
    let link = pacer.add_link(Class::Urgent);
    loop {
        stream.read_exact(&mut request)?;
        let now = Instant::now();
        // Part of the sum. Its round trip is known too seldom to say anything about now.
        let reading = LinkReading { queue_delay: None, ..LinkReading::from(&TcpInfo::read(&stream)?) };
        let _ = pacer.report(link, reading, now);
        stream.write_all(&[2; PAGE])?;
    }
}

fn send_bulk(mut stream: TcpStream, pacer: &SharedPacer, paced: bool, stop: &AtomicBool) -> Result<()> {
    mark_bulk(&stream)?;
    precise_timers()?;
    stream.write_all(b"b")?;
    let data = vec![3; 16 * PAGE];
    let link = pacer.add_link(Class::Bulk);
    let mut pace = KernelPace::default();
    let mut reported = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now - reported >= Duration::from_millis(2) {
            reported = now;
            let info = TcpInfo::read(&stream)?;
            if std::env::var_os("TRACE").is_some() {
                eprintln!("{now:?} {:?} {:?}", info.queue_delay(), pacer.rate().map(|r| r / 125_000));
            }
            let share = pacer.report(link, LinkReading::from(&info), now);
            if paced {
                pace.set(&stream, share)?;
            }
        }
        stream.write_all(&data)?;
    }
    pacer.remove_link(link);
    Ok(())
}
