//! The same by `ib_write_bw` and its like, of Debian's package `perftest`: what a device does with nothing above it.

use std::io::Read as _;
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::ours::Messages;
use super::{Figure, Wait, What};
use crate::interrupt;

/// How long one of them may take: they wait for each other for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long it may take until the server listens.
const LISTENING: Duration = Duration::from_secs(20);

/// How they are called.
#[derive(Clone, Debug)]
pub struct Perftest {
    /// The intermediary's host.
    pub host: IpAddr,
    /// Where the server waits for the client.
    pub port: u16,
    /// What runs a command on that host; nothing where it is this one.
    pub shell: Vec<String>,
    /// `-d`, `-i` and `-x` here.
    pub device: Vec<String>,
    /// And there.
    pub peer_device: Vec<String>,
}

/// It measures the processor's clock anew each time; where that was disturbed its figures are 0 or inf.
const TRIES: u32 = 10;

/// A process that ends with this value.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It has ended already, or is to.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program that measures it.
pub const fn program(what: What, figure: Figure) -> &'static str {
    match (what, figure) {
        (What::Write, Figure::Bandwidth) => "ib_write_bw",
        (What::Read, Figure::Bandwidth) => "ib_read_bw",
        (What::Write, Figure::Latency) => "ib_write_lat",
        (What::Read, Figure::Latency) => "ib_read_lat",
    }
}

/// Whether it is here.
pub fn is_here() -> bool {
    Command::new("ib_write_bw").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

impl Perftest {
    /// Bytes a second, or microseconds.
    pub fn run(&self, of: (What, Figure), messages: Messages, wait: Wait) -> Result<f64> {
        for _ in 0..TRIES {
            let value = self.run_once(of, messages, wait)?;
            if value.is_finite() && value > 0.0 {
                return Ok(value);
            }
        }
        bail!("{} does not find out how fast this machine's clock is", program(of.0, of.1))
    }

    fn run_once(&self, (what, figure): (What, Figure), messages: Messages, wait: Wait) -> Result<f64> {
        let name = program(what, figure);
        let arguments = arguments((what, figure), messages, wait, self.port);
        let mut there = self.shell.iter().map(String::as_str).chain([name]);
        let mut server = Command::new(there.next().unwrap_or(name));
        server.args(there).args(&self.peer_device).args(&arguments);
        let server = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut server = Ending(server.with_context(|| format!("{name} does not start there"))?);
        let began = Instant::now();
        loop {
            let mut client = Command::new(name);
            client.args(&self.device).args(&arguments).arg(self.host.to_string());
            let (ended_well, said) = output(&mut client, began + PATIENCE)?;
            if ended_well {
                return parse(&said, figure).with_context(|| format!("{name} says nothing of it: {said}"));
            }
            let is_late = began.elapsed() > LISTENING;
            if is_late || !said.contains("connect") || server.0.try_wait()?.is_some() {
                bail!("{name} failed: {}", said.trim());
            }
            interrupt::sleep(Duration::from_millis(100))?;
        }
    }
}

fn arguments((what, figure): (What, Figure), messages: Messages, wait: Wait, port: u16) -> Vec<String> {
    let Messages { bytes, depth, count } = messages;
    let mut words = vec![format!("-s{bytes}"), format!("-n{count}"), format!("-p{port}"), "-F".into()];
    if figure == Figure::Bandwidth {
        words.push(format!("-t{depth}"));
    }
    // Those that write cannot.
    if wait == Wait::Events && what == What::Read {
        words.push("-e".into());
    }
    words
}

/// What a process says until it ends, and whether that is well.
fn output(command: &mut Command, deadline: Instant) -> Result<(bool, String)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = Ending(child.with_context(|| format!("{name} does not start"))?);
    loop {
        if let Some(status) = child.0.try_wait()? {
            // Less than a pipe holds.
            let mut said = String::new();
            child.0.stdout.take().context("a pipe")?.read_to_string(&mut said)?;
            child.0.stderr.take().context("a pipe")?.read_to_string(&mut said)?;
            return Ok((status.success(), said));
        }
        ensure!(Instant::now() < deadline, "{name} does not end");
        interrupt::sleep(Duration::from_millis(50))?;
    }
}

/// The figure in what it says: a head of columns, and under it numbers.
fn parse(said: &str, figure: Figure) -> Option<f64> {
    let mut lines = said.lines().skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let (name, column) = match figure {
        Figure::Bandwidth => ("BW average[MB/sec]", 3),
        Figure::Latency => ("t_typical[usec]", 4),
    };
    lines.next().filter(|head| head.contains(name))?;
    let value: f64 = lines.next()?.split_whitespace().nth(column)?.parse().ok()?;
    match figure {
        // Of 2^20 bytes, whatever it calls them.
        Figure::Bandwidth => Some(value * f64::from(1 << 20)),
        Figure::Latency => Some(value),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn figures_are_found_in_what_it_says() {
        let bandwidth = "
 local address: LID 0000 QPN 0x0011 PSN 0x9ac72d
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      256              15.95              15.90              0.000254
---------------------------------------------------------------------------------------
";
        assert_eq!(parse(bandwidth, Figure::Bandwidth), Some(15.90 * 1_048_576.0));
        let latency = "
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 4096    1000          890.11         3040.56      916.21              1001.43           110.15         1400.00                 3040.56
";
        assert_eq!(parse(latency, Figure::Latency), Some(916.21));
        assert_eq!(parse("Couldn't connect to 10.0.0.3:18515", Figure::Latency), None);
    }

    #[test]
    fn it_waits_as_it_is_told_where_it_can() {
        let messages = Messages { bytes: 65536, depth: 8, count: 256 };
        let words = |what, figure, wait| arguments((what, figure), messages, wait, 18515).join(" ");
        let plain = "-s65536 -n256 -p18515 -F";
        assert_eq!(words(What::Write, Figure::Bandwidth, Wait::Events), format!("{plain} -t8"));
        assert_eq!(words(What::Read, Figure::Latency, Wait::Events), format!("{plain} -e"));
        assert_eq!(words(What::Read, Figure::Latency, Wait::Poll), plain);
    }
}
