//! What processes have used so far, as the kernel counts it.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::host;

/// User and system time of this process, up to a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Of all threads, those that have ended included.
    pub process: Duration,
    /// Of those that libsg started: what migrations cost. A VMM's vCPUs, and whatever else it does, are not in it.
    pub migration: Duration,
}

impl Cpu {
    /// Up to now.
    #[must_use]
    pub fn now() -> Self {
        Self { process: used(ClockId::ProcessCPUTime), migration: host::spent() }
    }

    /// What was used after an earlier moment.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            process: self.process.saturating_sub(earlier.process),
            migration: self.migration.saturating_sub(earlier.migration),
        }
    }
}

/// User and system time by one of the processor clocks of the caller: its process's, its thread's.
pub(crate) fn used(clock: ClockId) -> Duration {
    let used = clock_gettime(clock);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

/// User and system time of another process. `None` when it is gone.
#[must_use]
pub fn cpu_of(pid: i32) -> Option<Duration> {
    let process = format!("/proc/{pid}");
    let ticks = in_ticks(&fs::read_to_string(format!("{process}/stat")).ok()?);
    let threads = fs::read_dir(format!("{process}/task")).ok()?.flatten();
    let living = threads.filter_map(|task| of_task(task.path().to_str()?)).sum();
    // Neither is too much: ticks are rounded down, and threads that have ended are only in them.
    ticks.max(Some(living))
}

/// User and system time of a thread of this process, as of when the scheduler last looked at it.
pub(crate) fn cpu_of_thread(thread: i32) -> Option<Duration> {
    of_task(&format!("/proc/self/task/{thread}"))
}

fn of_task(task: &str) -> Option<Duration> {
    let text = |file| fs::read_to_string(format!("{task}/{file}")).ok();
    // sched-stats: nanoseconds on a processor come first. A kernel may be built without it.
    let exact = text("schedstat").and_then(|stat| stat.split_ascii_whitespace().next()?.parse().ok());
    exact.map(Duration::from_nanos).or_else(|| in_ticks(&text("stat")?))
}

/// User and system time in ticks, of a file `stat`.
fn in_ticks(stat: &str) -> Option<Duration> {
    // proc(5): the name in parentheses may hold anything; utime and stime are fields 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let seconds = (user + system) as f64 / rustix::param::clock_ticks_per_second() as f64;
    Some(Duration::from_secs_f64(seconds))
}

/// Largest resident set of this process, in bytes. `None` where the kernel does not tell.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod test {
    use super::*;

    /// Keeps the calling thread at work for so much of its own time.
    fn work(time: Duration) {
        let start = used(ClockId::ThreadCPUTime);
        while used(ClockId::ThreadCPUTime) - start < time {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn the_kernel_tells() {
        assert!(peak_rss_bytes().expect("told") > 100_000);
        let before = Cpu::now();
        work(Duration::from_millis(60));
        let used = Cpu::now().since(before).process;
        assert!(used >= Duration::from_millis(60), "{used:?}");
        let whole = cpu_of(rustix::process::getpid().as_raw_pid()).expect("told");
        assert!(whole >= Duration::from_millis(20), "{whole:?}");
        assert_eq!(cpu_of(i32::MAX), None);
        let hundred_ticks = "7 (a) b) S 1 7 7 0 -1 4 100 0 0 0 60 40 0 0 20 0 1 0 99 1 1";
        let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(in_ticks(hundred_ticks), Some(Duration::from_secs_f64(100.0 / ticks_per_s)));
    }

    #[test]
    fn libsg_s_threads_count_while_they_run_and_when_they_have_ended() {
        let time = Duration::from_millis(20);
        let before = Cpu::now();
        let (done, is_done) = std::sync::mpsc::channel();
        let (end, may_end) = std::sync::mpsc::channel::<()>();
        let body = move || {
            work(time);
            done.send(()).expect("somebody waits");
            let _ = may_end.recv();
        };
        let thread = host::thread::Builder::new().spawn(body).expect("a thread");
        is_done.recv().expect("it works");
        // It may not have gone to sleep yet, and is counted as of the latest tick.
        let running = Cpu::now().since(before).migration;
        assert!(running >= time / 2, "{running:?}");
        drop(end);
        thread.join().expect("it ends");
        let ended = Cpu::now().since(before).migration;
        assert!(ended >= time, "{ended:?}");
    }
}
