//! Strangers at a port: a thousand connections that come to nothing, and what they cost a process.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections at once.
const STRANGERS: usize = 1000;
/// Of these, that send a byte now and then.
const DRIPS: usize = 8;
/// How long they wait between two bytes.
const BETWEEN: Duration = Duration::from_millis(100);

/// Connections of strangers, until it is dropped. Most say nothing, some say what makes no sense, and a few send one
/// byte now and then, and come again when they were sent away.
pub struct Strangers<S> {
    _open: Vec<S>,
    stop: Arc<AtomicBool>,
    drips: Option<JoinHandle<()>>,
}

impl<S: Write + Send + 'static> Strangers<S> {
    /// A thousand. `opening` is what those begin with who send a byte now and then.
    ///
    /// # Panics
    /// Nobody listens there.
    pub fn come(opening: &'static [u8], connect: impl Fn() -> std::io::Result<S> + Send + 'static) -> Self {
        let open = (0..STRANGERS - DRIPS).map(|number| {
            let mut stream = connect().expect("somebody listens");
            // Whoever listens may have closed it already.
            let _ = match number % 8 {
                0 => stream.write_all(&[0xff; 300]),
                1 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n"),
                2 => stream.write_all(&[0; 1]),
                _ => Ok(()),
            };
            stream
        });
        let open = open.collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stop);
        let drips = std::thread::spawn(move || drip(opening, &connect, &stops));
        Self { _open: open, stop, drips: Some(drips) }
    }
}

impl<S> Drop for Strangers<S> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.drips.take().is_some_and(|drips| drips.join().is_err()) && !std::thread::panicking() {
            panic!("the strangers panicked");
        }
    }
}

fn drip<S: Write>(opening: &[u8], connect: &impl Fn() -> std::io::Result<S>, stop: &AtomicBool) {
    let mut drips: Vec<Option<(S, usize)>> = (0..DRIPS).map(|_| None).collect();
    while !stop.load(Ordering::Relaxed) {
        for drip in &mut drips {
            // Nobody may be there any more to connect to.
            let Some((stream, sent)) = drip.take().or_else(|| Some((connect().ok()?, 0))) else { continue };
            let (mut stream, byte) = (stream, opening.get(sent).copied().unwrap_or(0));
            *drip = stream.write_all(&[byte]).is_ok().then_some((stream, sent + 1));
        }
        std::thread::sleep(BETWEEN);
    }
}

/// Has this process open as many files as it may.
///
/// # Panics
/// The kernel does not let it.
pub fn raise_open_files() {
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).expect("up to its own maximum");
}

/// Memory that a process has.
///
/// # Panics
/// There is no such process.
#[must_use]
pub fn resident_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    let kib = line.trim().strip_suffix("kB").and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.expect("a number") << 10
}
