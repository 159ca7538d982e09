//! What the processes beside a migration print, a line of JSON each, and what is made of it. Times are those of the
//! monotonic clock, which all processes of a machine share.

use std::io::Write as _;
use std::process::Command;
use std::time::Duration;

use libsg::report::Latencies;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::stats;

/// The monotonic clock.
pub fn now_ns() -> u64 {
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default();
    now.as_nanos() as u64
}

/// Has this process run before any other, with the threads that it starts from now on: real hosts have processors of
/// their own, and what is to be measured is the network that co-tenants share with a migration, not the turn-taking
/// of all hosts of an experiment on one machine. They need next to nothing.
pub fn go_first() {
    let pid = std::process::id().to_string();
    match Command::new("chrt").args(["--fifo", "--pid", "1", &pid]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            tracing::warn!("no priority for co-tenants: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Err(error) => tracing::warn!("no priority for co-tenants: chrt (util-linux): {error}"),
    }
}

/// Prints a line, at once.
pub fn tell<T: Serialize>(what: &T) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// What a co-tenant's client was answered since its last line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// When each request was to be sent, and how long after that its answer was there.
    pub answered: Vec<(u64, u64)>,
    /// Every request that was to be sent before is answered.
    pub complete_until_ns: u64,
    /// When this was told.
    pub at_ns: u64,
}

impl Answers {
    /// With what was told next.
    pub fn add(&mut self, next: Answers) {
        self.answered.extend(next.answered);
        (self.complete_until_ns, self.at_ns) = (next.complete_until_ns, next.at_ns);
    }

    /// Of the requests that were to be sent in a time. What is not answered has taken as long as it waits by now.
    pub fn latencies(&self, (from_ns, to_ns): (u64, u64), period_ns: u64) -> Latencies {
        // They are in order.
        let first = self.answered.partition_point(|(due, _)| *due < from_ns);
        let end = self.answered.partition_point(|(due, _)| *due < to_ns);
        let answered = self.answered.get(first..end).unwrap_or_default().iter().map(|(_, took)| *took);
        let waiting = (self.complete_until_ns..to_ns.min(self.at_ns)).step_by(period_ns.max(1) as usize);
        let waiting = waiting.filter(|due| *due >= from_ns).map(|due| self.at_ns - due);
        let mut took_us: Vec<f64> = answered.chain(waiting).map(|ns| ns as f64 / 1e3).collect();
        took_us.sort_by(f64::total_cmp);
        Latencies {
            count: Some(took_us.len() as u64),
            p50_us: stats::percentile(&took_us, 50.0),
            p95_us: stats::percentile(&took_us, 95.0),
            p99_us: stats::percentile(&took_us, 99.0),
            max_us: took_us.last().copied(),
        }
    }
}

/// A neighbour's pass over its graph.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pass {
    /// When it ended.
    pub end_ns: u64,
    /// How long it took.
    pub took_ns: u64,
}

/// Passes a second of work, of those that ended in a time.
pub fn passes_per_s(passes: &[Pass], (from_ns, to_ns): (u64, u64)) -> Option<f64> {
    let ended = passes.iter().filter(|pass| (from_ns..to_ns).contains(&pass.end_ns));
    let (count, took_ns) = ended.fold((0, 0), |(count, ns), pass| (count + 1, ns + pass.took_ns));
    (took_ns > 0).then(|| f64::from(count) / (took_ns as f64 / 1e9))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn requests_count_by_when_they_were_due_and_waiting_ones_too() {
        let mut answers = Answers::default();
        answers.add(Answers {
            answered: (1..=100).map(|n| (n * 1000, n * 1000)).collect(),
            complete_until_ns: 101_000,
            at_ns: 101_500,
        });
        let all = answers.latencies((0, 101_000), 1000);
        assert_eq!((all.count, all.p50_us, all.p95_us), (Some(100), Some(50.0), Some(95.0)));
        let some = answers.latencies((11_000, 21_000), 1000);
        assert_eq!((some.count, some.max_us), (Some(10), Some(20.0)));
        answers.add(Answers { answered: vec![(101_000, 5)], complete_until_ns: 102_000, at_ns: 1_102_000 });
        let stalled = answers.latencies((101_000, 105_000), 1000);
        assert_eq!((stalled.count, stalled.max_us), (Some(4), Some(1000.0)));
        assert_eq!(answers.latencies((0, 0), 1000), Latencies { count: Some(0), ..Latencies::default() });
    }

    #[test]
    fn passes_count_where_they_end() {
        let pass =
            |end_s: u64, took_s: u64| Pass { end_ns: end_s * 1_000_000_000, took_ns: took_s * 1_000_000_000 };
        let passes = [pass(1, 1), pass(4, 2), pass(8, 2)];
        assert_eq!(passes_per_s(&passes, (2_000_000_000, 9_000_000_000)), Some(0.5));
        assert_eq!(passes_per_s(&passes, (2_000_000_000, 3_000_000_000)), None);
    }
}
