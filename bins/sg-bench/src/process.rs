//! Processes of an experiment: born on their host, remembered, logged, ended by pid only, always reaped.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libsg::usage;
use rustix::process::{Pid, Signal, kill_process};

use crate::interrupt;
use crate::lab::{Lab, Node};

/// One running process. Killed and reaped when dropped.
pub struct Process {
    /// What it is, for messages: `source`, `i1`, …
    pub name: String,
    child: Mutex<Child>,
    pid: Pid,
    log: PathBuf,
    reader: Option<JoinHandle<()>>,
}

/// What a process used, up to a moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User + system time.
    pub cpu_s: Option<f64>,
    /// Largest resident set.
    pub peak_rss_bytes: Option<u64>,
}

impl Process {
    /// Starts `program` (from the directory of this executable, so that all are of one build) on a host. Each line it
    /// prints goes to `on_line`, in a thread of its own; its standard error goes to a log.
    pub fn spawn(
        lab: &Lab,
        node: Node,
        name: &str,
        program: &str,
        args: &[String],
        on_line: impl Fn(&str) + Send + 'static,
    ) -> Result<Self> {
        let path = beside_this_executable(program)?;
        Self::spawn_at(lab, node, name, &path, args, on_line).context("cargo build --workspace builds it")
    }

    /// The same with a program at this path; a mere name is looked for in `PATH`.
    pub fn spawn_at(
        lab: &Lab,
        node: Node,
        name: &str,
        path: &Path,
        args: &[String],
        on_line: impl Fn(&str) + Send + 'static,
    ) -> Result<Self> {
        let log = lab.directory().join(format!("{name}.log"));
        let stderr = File::create(&log)?;
        let mut command = Command::new(path);
        // A group of its own: ^C on the terminal is for sg-bench, which ends the others in order.
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        tracing::debug!("{node}: {} {}", path.display(), args.join(" "));
        let child = lab.on(node, || command.spawn())?;
        let mut child = child.with_context(|| format!("cannot run {}", path.display()))?;
        lab.remember(child.id())?;
        let pid = Pid::from_child(&child);
        let reader = child.stdout.take().map(|stdout| read_lines(name, stdout, on_line)).transpose()?;
        Ok(Self { name: name.to_owned(), child: Mutex::new(child), pid, log, reader })
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal. One that is gone already is no error.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match kill_process(self.pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno).with_context(|| format!("cannot signal {}", self.name)),
        }
    }

    /// Fails, with the end of its log, when it has ended.
    pub fn check(&self) -> Result<()> {
        match self.child.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.try_wait()? {
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, self.log_tail()),
            None => Ok(()),
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.check().is_err()
    }

    /// Whether it has ended, and well.
    pub fn has_ended_well(&self) -> bool {
        let ended = self.child.lock().ok().and_then(|mut child| child.try_wait().ok().flatten());
        ended.is_some_and(|status| status.success())
    }

    /// Whether it has ended and everything that it ever printed was taken.
    pub fn is_silent(&self) -> bool {
        self.has_ended() && self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for it to end by itself; false when it has not by then.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let until = Instant::now() + limit;
        while !self.has_ended() {
            if Instant::now() > until {
                return Ok(false);
            }
            interrupt::sleep(Duration::from_millis(5))?;
        }
        Ok(true)
    }

    /// What it has used so far; nothing when it is gone.
    pub fn usage(&self) -> Usage {
        let pid = self.pid.as_raw_pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let cpu_s = usage::cpu_of(pid).map(|used| used.as_secs_f64());
        Usage { cpu_s, peak_rss_bytes: peak_rss_bytes(&status) }
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        const LINES: usize = 15;
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LINES)..];
        tail.iter().map(|line| format!("  {}: {line}\n", self.name)).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = match self.child.get_mut() {
            Ok(child) => child,
            Err(poisoned) => poisoned.into_inner(),
        };
        // Fails only when it has been reaped already.
        let _ = child.kill();
        let _ = child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read_lines(
    name: &str,
    stdout: ChildStdout,
    on_line: impl Fn(&str) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let read = move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            on_line(&line);
        }
    };
    Ok(std::thread::Builder::new().name(format!("events-{name}")).spawn(read)?)
}

/// A program of the same build.
///
/// # Errors
/// It is not there.
pub fn beside_this_executable(program: &str) -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let directory = this.parent().unwrap_or(Path::new("."));
    // Tests of this crate run from target/<profile>/deps.
    let candidates = [directory.join(program), directory.join("..").join(program)];
    candidates.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("no {program} beside {} (cargo build --workspace builds it)", this.display())
    })
}

fn peak_rss_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn usage_is_read_from_proc() {
        assert_eq!(peak_rss_bytes("Name:\tx\nVmHWM:\t    2048 kB\n"), Some(2 << 20));
    }
}
