//! How a source QEMU is driven over QMP, beside its stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use rustix::process::{Pid, getpid};
use serde_json::json;

use crate::qmp::{PAUSED, Qmp, STEP, Version};
use crate::record::behind_name;
use crate::relay::{Steering, Stream};

/// Before this version a thread that hears what comes back may notice later than "postcopy-paused" is said that its connection
/// broke. It then closes the one that its QEMU was given since, and that hangs, or dies of it (migration.c,
/// `source_return_path_thread`; mended by "Move return path cleanup to main migration thread").
const KNOWS_WHO_HEARS: Version = Version { major: 8, minor: 2, micro: 0 };

/// Before this version a thread that sends waits for what another hears by a count of the words, not by what they say. A word that
/// comes before it waits is counted in its next wait: then it counts what is left of its memory before it was told what has come
/// (ram.c, `ram_dirty_bitmap_sync_all`; mended by "Fix possible race when checking page sync").
const KNOWS_WHAT_IT_HEARD: Version = KNOWS_WHO_HEARS;

/// It has noticed by then, unless its host has no processor for it. Where QEMU's threads can be looked at, they are waited for.
const HEARS: Duration = Duration::from_millis(200);

/// How long they are waited for: some have other things to do.
const RESTS: Duration = Duration::from_secs(10);

/// A source QEMU, driven over QMP.
pub(crate) struct ByQmp {
    qmp: Arc<Mutex<Qmp>>,
    /// Since when it has said that it recovers, while nothing came.
    recovers_since: Option<Instant>,
}

impl ByQmp {
    pub fn new(qmp: &Arc<Mutex<Qmp>>) -> Self {
        Self { qmp: Arc::clone(qmp), recovers_since: None }
    }
}

impl Steering for ByQmp {
    fn rate(&mut self, bytes_per_s: u64) -> Result<()> {
        set_rate(&mut self.qmp.lock(), "max-postcopy-bandwidth", bytes_per_s)
    }

    fn goes_on(&mut self) -> Result<()> {
        let status = match self.qmp.lock().migration() {
            Ok(status) => status,
            // Slow is not dead: behind COMMIT its VM is nowhere else.
            Err(error) if error.kind == ErrorKind::Timeout => return Ok(()),
            Err(error) => return Err(error),
        };
        match status.as_str() {
            "postcopy-device" | "postcopy-active" => self.recovers_since = None,
            "postcopy-recover" | "postcopy-recover-setup" => {
                let since = *self.recovers_since.get_or_insert_with(Instant::now);
                if since.elapsed() > STEP {
                    let message = format!(
                        "the source QEMU hangs: its migration has been \"{status}\" for {} s, and nothing comes",
                        STEP.as_secs()
                    );
                    return Err(Error::new(ErrorKind::Vm, message));
                }
            }
            _ => {
                let message = format!("the source QEMU's migration is \"{status}\" before all has come");
                return Err(Error::new(ErrorKind::Vm, message));
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<Stream> {
        self.recovers_since = None;
        let mut qmp = self.qmp.lock();
        // It notices that its stream broke when it writes the next time.
        qmp.await_migration(|status| status == PAUSED)?;
        if qmp.version() < KNOWS_WHO_HEARS {
            std::thread::sleep(HEARS);
            process_of(&qmp).into_iter().for_each(await_rest);
        }
        connect(&mut qmp, true)
    }

    fn listens(&mut self) {
        let qmp = self.qmp.lock();
        if qmp.version() >= KNOWS_WHAT_IT_HEARD {
            return;
        }
        match process_of(&qmp) {
            Some(qemu) => await_rest(qemu),
            None => std::thread::sleep(HEARS),
        }
    }
}

/// A QEMU's process, if it is another than this: one that is played is not.
fn process_of(qmp: &Qmp) -> Option<Pid> {
    qmp.process().filter(|qemu| *qemu != getpid())
}

/// Gives QEMU a connection to begin its migration over, or to go on with it.
pub(crate) fn connect(qmp: &mut Qmp, resume: bool) -> Result<Stream> {
    let begin = if resume { json!({ "resume": true }) } else { json!({}) };
    let (ours, theirs) = qmp.connect_by("migrate", begin)?;
    Ok(Stream { ours, theirs: Some(theirs), lives: Some(qmp.lives()?) })
}

/// How fast it may send before it has switched (`max-bandwidth`), or from then on (`max-postcopy-bandwidth`).
pub(crate) fn set_rate(qmp: &mut Qmp, which: &str, bytes_per_s: u64) -> Result<()> {
    qmp.execute("migrate-set-parameters", &json!({ which: bytes_per_s })).map(drop)
}

/// Waits until no thread of a QEMU has anything to do, whose VM is stopped; but for its first, which answers QMP. One that was
/// woken up and has no processor yet does not rest.
fn await_rest(process: Pid) {
    let deadline = Instant::now() + RESTS;
    while !rests(process).unwrap_or(true) {
        if Instant::now() > deadline {
            tracing::info!("the source QEMU's threads do not rest: it is resumed all the same");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// As proc_pid_stat(5) tells of each thread.
fn rests(process: Pid) -> std::io::Result<bool> {
    let first = process.as_raw_nonzero().to_string();
    for thread in std::fs::read_dir(format!("/proc/{first}/task"))? {
        let thread = thread?;
        // One that has ended meanwhile rests.
        let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { continue };
        if thread.file_name() != first.as_str() && state(&stat) == Some('R') {
            return Ok(false);
        }
    }
    Ok(true)
}

fn state(stat: &str) -> Option<char> {
    behind_name(stat)?.next()?.chars().next()
}

#[cfg(test)]
mod test {
    use std::sync::atomic::{AtomicBool, Ordering};

    use serde_json::Value;

    use super::*;
    use crate::leaving::test::{SHORT, source};

    /// How a QEMU goes on that says this of its migration, or nothing.
    fn said(status: Option<&'static str>) -> ByQmp {
        let (_directory, mut qmp, _) = source("none", move |command, _| match status {
            _ if command == "qmp_capabilities" => None,
            Some(status) => Some(json!({ "return": { "status": status } })),
            None => Some(Value::Null),
        });
        if status.is_none() {
            qmp.hurry(SHORT, SHORT);
        }
        ByQmp::new(&Arc::new(Mutex::new(qmp)))
    }

    /// Slow is not dead.
    #[test]
    fn one_that_does_not_answer_goes_on_and_one_that_is_gone_does_not() {
        for status in ["postcopy-device", "postcopy-active", "postcopy-recover", "postcopy-recover-setup"] {
            said(Some(status)).goes_on().expect(status);
        }
        said(None).goes_on().expect("it is slow");
        for status in [PAUSED, "failed"] {
            let error = said(Some(status)).goes_on().expect_err(status);
            assert!(error.message.contains(status), "{error}");
        }
        let (_directory, qmp, _) = source("none", |command, stream| {
            if command != "qmp_capabilities" {
                stream.shutdown(std::net::Shutdown::Both).expect("hangs up");
            }
            None
        });
        ByQmp::new(&Arc::new(Mutex::new(qmp))).goes_on().expect_err("it is gone");
    }

    #[test]
    fn one_that_recovers_for_ever_hangs() {
        let long_ago = Instant::now().checked_sub(STEP + SHORT);
        let mut recovers = said(Some("postcopy-recover"));
        recovers.recovers_since = long_ago;
        let error = recovers.goes_on().expect_err("nothing came for too long");
        assert!(error.message.contains("hangs"), "{error}");
        let mut goes_on = said(Some("postcopy-active"));
        goes_on.recovers_since = long_ago;
        goes_on.goes_on().expect("it did recover");
        assert_eq!(goes_on.recovers_since, None);
    }

    #[test]
    fn a_process_rests_whose_other_threads_wait() {
        let ours = getpid();
        let runs = Arc::new(AtomicBool::new(true));
        let busy = {
            let runs = Arc::clone(&runs);
            std::thread::spawn(move || while runs.load(Ordering::Relaxed) {})
        };
        // It may wait for the kernel as it begins.
        assert!((0..10_000).any(|_| !rests(ours).expect("looked at")), "a thread runs");
        runs.store(false, Ordering::Relaxed);
        busy.join().expect("ends");
        assert_eq!(state("7 (a) R (b)) S 1 7"), Some('S'));
        assert_eq!(state("7 (a) R"), Some('R'));
        assert_eq!(state(""), None);
    }
}
