//! A disk of one intermediary's memory, served by `sg nbd`, beside one of `nbdkit memory`, served by `nbdkit nbd`: an
//! image is copied in and out by `nbdcopy`, in turn. Either way bytes take two hops: a Unix socket to the server in
//! front, TCP over loopback to the one that has the memory. Both are new for each round, their memory untouched, but ready
//! as [`Reserve`] has it.

use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libsg::units::Size;
use serde_json::Value;
use tempfile::TempDir;

use crate::interrupt;
use crate::lab::Reserve;
use crate::process::beside_this_executable;

/// How long a server may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Memory that a server takes beside the image.
const MORE_BYTES: u64 = 256 << 20;

/// Seconds that a copy took.
#[derive(Clone, Copy, Debug)]
pub struct Copies {
    /// In, and flushed.
    pub in_s: f64,
    /// Out.
    pub out_s: f64,
}

/// One round: both, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Through `sg nbd`.
    pub ours: Copies,
    /// Through `nbdkit nbd`.
    pub theirs: Copies,
}

/// Rounds with an image of so many bytes.
///
/// # Errors
/// A tool is missing, or did not do what it was asked for; interrupted.
pub fn compare(bytes: u64, rounds: u32) -> Result<Vec<Round>> {
    // The image is read from memory, not from a disk, where that can be had.
    let memory = Path::new("/dev/shm");
    let mut directory = tempfile::Builder::new();
    directory.prefix("sg-bench-");
    let directory = if memory.is_dir() { directory.tempdir_in(memory) } else { directory.tempdir() }?;
    let image = directory.path().join("image");
    fill(&image, bytes)?;
    let mut done = Vec::new();
    for _ in 0..rounds {
        let theirs = through_nbdkit(&directory, &image, bytes)?;
        let ours = through_sg(&directory, &image, bytes)?;
        done.push(Round { ours, theirs });
    }
    Ok(done)
}

/// Bytes of which no page is zero, or like another.
fn fill(path: &Path, bytes: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        file.write_all(&word.to_le_bytes())?;
    }
    file.flush()?;
    Ok(())
}

/// A server that is killed when it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only for one that ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Result<Server> {
    let program = command.get_program().to_owned();
    let what = || format!("cannot run {}: `ci/setup` installs what is missing", program.display());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    Ok(Server(child.with_context(what)?))
}

/// The line that a server of `sg` writes when it is ready.
fn ready(server: &mut Server) -> Result<Value> {
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().context("its output is read")?).read_line(&mut line)?;
    serde_json::from_str(&line).context("sg ended before it was ready")
}

fn through_sg(directory: &TempDir, image: &Path, bytes: u64) -> Result<Copies> {
    let sg = beside_this_executable("sg")?;
    // Slots come in chunks of 2 MiB, and some are under way.
    let memory = (bytes + (64 << 20)).to_string();
    let mut intermediary =
        start(Command::new(&sg).args(["serve", "--listen", "127.0.0.1:0", "--memory", &memory]))?;
    let listens = ready(&mut intermediary)?;
    let address = listens["address"].as_str().context("it says where it listens")?;
    let socket = directory.path().join("sg");
    let mut front = start(
        Command::new(&sg)
            .args(["nbd", "--create", "disk", "--size", &bytes.to_string(), "--intermediary", address])
            .arg("--socket")
            .arg(&socket),
    )?;
    let listens = ready(&mut front)?;
    copies(image, listens["uri"].as_str().context("it says where it listens")?)
}

fn through_nbdkit(directory: &TempDir, image: &Path, bytes: u64) -> Result<Copies> {
    // A port that was free just now.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port().to_string();
    let at = |name: &str| directory.path().join(name);
    let nbdkit = |pid: &Path| {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--pidfile"]).arg(pid);
        command
    };
    let (pid, size) = (at("memory.pid"), bytes.to_string());
    let _memory = start(nbdkit(&pid).args(["-i", "127.0.0.1", "-p", &port, "memory", &size]))?;
    appears(&pid)?;
    let (pid, socket) = (at("nbd.pid"), at("nbdkit"));
    let to = format!("port={port}");
    let _front = start(nbdkit(&pid).arg("-U").arg(&socket).args(["nbd", "hostname=127.0.0.1", &to]))?;
    appears(&pid)?;
    let done = copies(image, &format!("nbd+unix:///?socket={}", socket.display()));
    for left in [at("memory.pid"), at("nbd.pid"), socket] {
        // A server that was killed leaves its files.
        let _ = std::fs::remove_file(left);
    }
    done
}

/// Waits for a file: nbdkit writes its pid when it listens.
fn appears(path: &Path) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !path.exists() {
        ensure!(Instant::now() < until, "nbdkit does not begin to listen");
        interrupt::sleep(Duration::from_millis(5))?;
    }
    Ok(())
}

fn copies(image: &Path, uri: &str) -> Result<Copies> {
    let copy = |from: &str, to: &str| -> Result<f64> {
        interrupt::check()?;
        let begun = Instant::now();
        let done = Command::new("nbdcopy").args(["--flush", from, to]).output();
        let done = done.context("cannot run nbdcopy: `ci/setup` installs it")?;
        let took_s = begun.elapsed().as_secs_f64();
        ensure!(done.status.success(), "nbdcopy {from} {to}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(took_s)
    };
    let path = image.to_str().context("a path")?;
    let mut ready = Reserve::fill(Size(image.metadata()?.len() + MORE_BYTES))?;
    ready.hand_out()?;
    let (in_s, out_s) = (copy(path, uri)?, copy(uri, "null:")?);
    drop(ready);
    // Neither was fast because it lost something.
    let back = image.with_extension("back");
    copy(uri, back.to_str().context("a path")?)?;
    let same = same(image, &back)?;
    std::fs::remove_file(&back)?;
    ensure!(same, "what came out of {uri} is not what went in");
    Ok(Copies { in_s, out_s })
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (BufReader::new(File::open(one)?), BufReader::new(File::open(other)?));
    loop {
        let (a, b) = (one.fill_buf()?, other.fill_buf()?);
        let length = a.len().min(b.len());
        if a[..length] != b[..length] || (length == 0 && a.len() != b.len()) {
            return Ok(false);
        }
        if length == 0 {
            return Ok(true);
        }
        one.consume(length);
        other.consume(length);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn both_are_measured() {
        let rounds = compare(16 << 20, 2).expect("both are there");
        let times = rounds.iter().flat_map(|round| [round.ours, round.theirs]);
        assert!(rounds.len() == 2 && times.into_iter().all(|copies| copies.in_s > 0.0 && copies.out_s > 0.0));
    }

    #[test]
    fn files_are_compared() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, bytes).expect("written");
            path
        };
        let (one, two) = (at("one", &[1; 20_000]), at("two", &[1; 20_000]));
        assert!(same(&one, &two).expect("read"));
        assert!(!same(&one, &at("three", &[1; 20_001])).expect("read"));
        assert!(!same(&at("four", &[2; 20_000]), &two).expect("read"));
    }
}
