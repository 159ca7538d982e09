//! A guest of Debian's kernel under a stock QEMU on a host of the lab, and when its heart was heard.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest::{Beat, Said, Work};
use libsg::page::PAGE_BYTES_U64;
use libsg::units::Size;
use parking_lot::Mutex;
use qemu::Qmp;

use crate::error::chained;
use crate::interrupt;
use crate::lab::{Lab, Node};
use crate::process::Process;

/// What QEMU is called, looked for in `PATH`.
const QEMU: &str = "qemu-system-x86_64";

/// Memory of the VM that the guest's program does not fill.
const REST_BYTES: u64 = 160 << 20;

/// How long a QEMU may take to answer, and a guest until its memory is filled.
const START_LIMIT: Duration = Duration::from_secs(20);
const FILL_LIMIT: Duration = Duration::from_secs(180);

/// What both ends are started with.
pub struct Machine {
    memory: Size,
    filled_mib: u32,
    arguments: Vec<String>,
}

impl Machine {
    /// A VM of so much memory, whose guest writes so many pages a second.
    pub fn new(lab: &Lab, memory: Size, writes_per_s: u32, checks_per_s: u32) -> Result<Self> {
        ensure!(memory.0 >= REST_BYTES * 2, "a guest needs at least 320M");
        let filled_mib = u32::try_from((memory.0 - REST_BYTES) >> 20)?;
        let work = Work { filled_mib, writes_per_s, checks_per_s, threads: 1 };
        Ok(Self { memory, filled_mib, arguments: work.arguments(lab.directory())? })
    }

    /// What the guest fills, and checks.
    pub fn filled_pages(&self) -> u64 {
        (u64::from(self.filled_mib) << 20) / PAGE_BYTES_U64
    }
}

/// Beats and complaints of a console, each beat with the time at which it came.
#[derive(Default)]
struct Heard {
    beats: Vec<(Beat, Instant)>,
    complaints: Vec<String>,
    /// The first line, and the last one: a VM that is paused in the middle of a line says the rest of it at the other end.
    first: Option<(String, Instant)>,
    last: String,
}

impl Heard {
    fn line(&mut self, line: &str, now: Instant) {
        let said = said(line);
        self.beats.extend(said.beats.into_iter().map(|beat| (beat, now)));
        self.complaints.extend(said.complaints);
        self.first.get_or_insert_with(|| (line.to_owned(), now));
        line.clone_into(&mut self.last);
    }

    /// The beats of a VM that was heard here, and then there.
    fn and_then(&self, there: &Self) -> Vec<(Beat, Instant)> {
        let beat = |line: &str| said(line).beats.pop();
        let broken = there.first.as_ref().filter(|_| beat(&self.last).is_none());
        let joined = broken.and_then(|(rest, at)| Some((beat(&format!("{}{rest}", self.last))?, *at)));
        self.beats.iter().copied().chain(joined).chain(there.beats.iter().copied()).collect()
    }
}

/// What a whole line of a console says.
fn said(line: &str) -> Said {
    Said::parse(format!("{line}\n").as_bytes())
}

/// One end.
pub struct Host {
    /// The QEMU.
    pub process: Process,
    /// Where it is asked and told.
    pub qmp: PathBuf,
    heard: Arc<Mutex<Heard>>,
}

impl Host {
    /// Starts one on a host; with `-incoming defer` among `more` it waits for the other's VM.
    pub fn start(lab: &Lab, node: Node, machine: &Machine, more: &[&str]) -> Result<Self> {
        let qmp = lab.directory().join(format!("{node}.qmp"));
        let mut arguments: Vec<String> =
            ["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-m"]
                .map(Into::into)
                .into();
        arguments.push((machine.memory.0 >> 20).to_string());
        arguments.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", qmp.display())]);
        // No input, which would be keys for QEMU itself.
        arguments.extend(
            ["-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console"].map(Into::into),
        );
        arguments.extend(machine.arguments.iter().cloned());
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        let heard = Arc::<Mutex<Heard>>::default();
        let hears = Arc::clone(&heard);
        let process =
            Process::spawn_at(lab, node, &node.to_string(), Path::new(QEMU), &arguments, move |line| {
                hears.lock().line(line, Instant::now());
            })
            .context(
                "a stock QEMU is needed: apt install qemu-system-x86, or put another in front of PATH",
            )?;
        let host = Self { process, qmp, heard };
        host.wait(START_LIMIT, "does not answer", || host.qmp.exists() && Qmp::connect(&host.qmp).is_ok())?;
        Ok(host)
    }

    /// A connection of its own; there may be one at a time.
    pub fn connect(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp).map_err(chained)
    }

    /// Until the guest has filled its memory, and looked at all of it.
    pub fn await_filled(&self) -> Result<()> {
        self.wait(FILL_LIMIT, "its guest does not start", || self.passes() >= 1)
    }

    /// Until the guest has looked at every page from now on, and found nothing wrong.
    pub fn verify(&self) -> Result<()> {
        let before = self.passes();
        self.wait(FILL_LIMIT, "its guest does not look at its memory", || self.passes() >= before + 2)?;
        let heard = self.heard.lock();
        let wrong = heard.beats.last().map_or(0, |(beat, _)| beat.wrong);
        ensure!(
            wrong == 0 && heard.complaints.is_empty(),
            "{wrong} pages are not what they must be: {:?}",
            heard.complaints
        );
        Ok(())
    }

    fn passes(&self) -> u64 {
        self.heard.lock().beats.last().map_or(0, |(beat, _)| beat.passes)
    }

    fn wait(&self, limit: Duration, what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        let until = Instant::now() + limit;
        while !ready() {
            self.process.check()?;
            ensure!(Instant::now() < until, "{} {what}:\n{}", self.process.name, self.process.log_tail());
            interrupt::sleep(Duration::from_millis(10))?;
        }
        Ok(())
    }
}

/// The longest time in which a guest that moved was not heard, from `since` on, and that none of its beats is missing.
pub fn longest_gap(from: Host, there: &Host, since: Instant) -> Result<Duration> {
    let Host { process, heard, .. } = from;
    // A line without its end is heard when it ends.
    drop(process);
    let beats = heard.lock().and_then(&there.heard.lock());
    longest(&beats, since)
}

fn longest(beats: &[(Beat, Instant)], since: Instant) -> Result<Duration> {
    for pair in beats.windows(2) {
        let [(before, _), (next, _)] = pair else { continue };
        ensure!(
            next.number == before.number + 1,
            "the guest's heart leapt from {} to {}",
            before.number,
            next.number
        );
    }
    let gaps = beats.windows(2).filter(|pair| pair[1].1 >= since);
    gaps.map(|pair| pair[1].1.saturating_duration_since(pair[0].1)).max().context("the guest was not heard")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_beat_that_was_half_said_is_heard_at_the_other_end() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let whole = ["beat 7 writes=5 passes=1 wrong=0", "beat 8 writes=61 passes=1 wrong=0"];
        let next = "beat 9 writes=70 passes=1 wrong=0";
        for split in 0..=whole[1].len() {
            let (mut from, mut there) = (Heard::default(), Heard::default());
            let (half, rest) = whole[1].split_at(split);
            from.line(whole[0], at(0));
            if !half.is_empty() {
                from.line(half, at(300));
            }
            for line in [rest, next] {
                there.line(line, at(400));
            }
            let beats = from.and_then(&there);
            let numbers: Vec<u64> = beats.iter().map(|(beat, _)| beat.number).collect();
            assert_eq!(numbers, [7, 8, 9], "{half:?}, {rest:?}");
            assert_eq!(beats[1].0.writes, 61);
        }
        let (mut from, mut there) = (Heard::default(), Heard::default());
        from.line(whole[0], at(0));
        there.line(next, at(1));
        assert_eq!(from.and_then(&there).len(), 2, "nothing is made up");
    }

    #[test]
    fn a_gap_is_between_two_beats_of_whichever_end() {
        let begun = Instant::now();
        let at =
            |number, ms| (Beat { number, writes: 0, passes: 0, wrong: 0 }, begun + Duration::from_millis(ms));
        let beats = [at(0, 0), at(1, 400), at(2, 450), at(3, 650), at(4, 700)];
        let gap = |since| longest(&beats, begun + Duration::from_millis(since)).expect("heard");
        assert_eq!(gap(0), Duration::from_millis(400));
        assert_eq!(gap(401), Duration::from_millis(200), "what was before is nobody's");
        assert!(longest(&beats[..1], begun).is_err());
        assert!(
            longest(&[at(0, 0), at(2, 50)], begun)
                .expect_err("one is missing")
                .to_string()
                .contains("0 to 2")
        );
    }
}
