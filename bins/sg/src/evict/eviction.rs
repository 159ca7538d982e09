//! The VMs of a host leave: wave by wave, each followed to its end, the link divided among them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use libsg::ErrorKind;
use libsg::report::{Failure, SourceReport, Status};
use vmms::{Divider, Leaving, Start};

use super::driven::Driven;
use super::show::{Row, Show};

/// How often it is looked: whoever waits for the host to be empty waits for the last look, too.
const LOOK: Duration = Duration::from_millis(10);

/// One VM that is to leave.
#[derive(Clone)]
pub struct Vm {
    /// Its VMM.
    pub driven: Driven,
    /// Its name.
    pub name: String,
    /// How it leaves, where that is known.
    pub how: Option<Start>,
    /// It leaves already, and need not be told.
    pub leaves: bool,
    /// How much it matters beside others.
    pub weight: Option<f64>,
}

/// What became of a VM.
#[derive(Clone, Debug, Default)]
pub struct Fate {
    /// What it told last.
    pub leaving: Leaving,
    /// When it was over, since the first was told to leave.
    pub over: Option<Duration>,
    /// Its source's report, or why there is none.
    pub report: SourceReport,
    /// Its place among those whom the link is divided among, once it was told to leave.
    seat: Option<usize>,
}

impl Fate {
    /// It never left, or not yet.
    fn fail(&mut self, kind: ErrorKind, message: String, at: Duration) {
        self.report.status = Status::Failed(Failure { kind, message, lost: Vec::new() });
        self.over = Some(at);
    }

    /// Whether nothing of it is left here that anybody needs.
    pub fn is_out(&self) -> bool {
        self.over.is_some() && self.report.status == Status::Ok
    }
}

/// The eviction of all of them.
pub struct Eviction<'a> {
    vms: &'a [Vm],
    fates: Vec<Fate>,
    waves: std::vec::IntoIter<Vec<usize>>,
    wave: Vec<usize>,
    divider: Divider,
    began: Instant,
    interrupted: Arc<AtomicBool>,
    called_off: bool,
}

impl<'a> Eviction<'a> {
    /// Nobody leaves yet. `interrupted` is set by ^C.
    pub fn new(vms: &'a [Vm], waves: Vec<Vec<usize>>, interrupted: Arc<AtomicBool>) -> Self {
        Self {
            vms,
            fates: vec![Fate::default(); vms.len()],
            waves: waves.into_iter(),
            wave: Vec::new(),
            divider: Divider::new(),
            began: Instant::now(),
            interrupted,
            called_off: false,
        }
    }

    /// To the end of all.
    ///
    /// # Errors
    /// Threads cannot be started. What becomes of VMs is no error, it is told.
    pub fn run(mut self, show: &mut Show) -> Result<Vec<Fate>> {
        loop {
            if self.interrupted.load(Ordering::Acquire) && !std::mem::replace(&mut self.called_off, true) {
                self.call_off(show);
            }
            if self.wave.iter().all(|at| self.fates[*at].over.is_some()) {
                match self.waves.next() {
                    Some(wave) => self.start(wave, show)?,
                    None => break,
                }
            }
            self.look(show);
            show.rows(&self.rows(), self.began.elapsed());
            std::thread::sleep(LOOK);
        }
        show.end();
        Ok(self.fates)
    }

    fn start(&mut self, wave: Vec<usize>, show: &mut Show) -> Result<()> {
        for &at in &wave {
            let (vm, fate) = (&self.vms[at], &mut self.fates[at]);
            if self.called_off {
                fate.fail(ErrorKind::Cancelled, "it was not told to leave".into(), self.began.elapsed());
                continue;
            }
            let how = vm.how.as_ref().filter(|_| !vm.leaves);
            let told = how.map(|how| vm.driven.vmm().start(how));
            if let Some(Err(error)) = told {
                show.say(&format!("{}: {error:#}", vm.name));
                fate.fail(ErrorKind::Vm, format!("{error:#}"), self.began.elapsed());
                continue;
            }
            // Not before: it may have left in vain before, and would say how that ended.
            fate.seat = Some(self.divider.add(vm.driven.vmm(), vm.weight)?);
        }
        self.wave = wave;
        Ok(())
    }

    fn look(&mut self, show: &mut Show) {
        let standings = self.divider.standings();
        for &at in &self.wave {
            let (vm, fate) = (&self.vms[at], &mut self.fates[at]);
            let Some(standing) = fate.seat.and_then(|seat| standings.get(seat)) else { continue };
            if fate.over.is_some() {
                continue;
            }
            fate.leaving = standing.leaving;
            if standing.leaving.over {
                let reported = vm.driven.vmm().report();
                match reported {
                    Ok((Some(report), _)) => (fate.report, fate.over) = (report, Some(self.began.elapsed())),
                    // It said so, and is gone: whoever hears "evicted" may end it.
                    _ if standing.leaving.evicted => fate.over = Some(self.began.elapsed()),
                    Ok((None, _)) => {
                        let message = "the VMM knows of no migration any more".into();
                        fate.fail(ErrorKind::Vm, message, self.began.elapsed());
                    }
                    Err(error) => {
                        fate.fail(ErrorKind::Unreachable, format!("{error:#}"), self.began.elapsed());
                    }
                }
            } else if let Some(why) = &standing.lost {
                let message = format!("the VMM ended before its VM was out: {why}");
                fate.fail(ErrorKind::Unreachable, message, self.began.elapsed());
            }
            match &fate.report.status {
                Status::Failed(failure) if fate.over.is_some() => {
                    show.say(&format!("{}: {}", vm.name, failure.message));
                }
                _ => {}
            }
        }
    }

    /// What is not committed runs on here; what is, is followed.
    fn call_off(&mut self, show: &mut Show) {
        let resumes =
            if self.vms.iter().any(|vm| vm.driven.qemu().is_some()) { ", QEMUs' for --resume" } else { "" };
        show.say(&format!(
            "interrupted: what is not committed is called off; again to leave the others alone{resumes}"
        ));
        for &at in &self.wave {
            let (vm, fate) = (&self.vms[at], &self.fates[at]);
            if fate.over.is_none() {
                let said = match vm.driven.vmm().cancel() {
                    Ok(()) => "called off".to_owned(),
                    Err(error) => format!("goes on: {error:#}"),
                };
                show.say(&format!("{}: {said}", vm.name));
            }
        }
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(vm, fate): (&Vm, &Fate)| {
            let leaving = &fate.leaving;
            let percent = leaving.safe_pages as f64 * 100.0 / leaving.total_pages.max(1) as f64;
            let percent = if fate.is_out() { 100.0 } else { percent };
            Row { name: vm.name.clone(), percent, bytes: leaving.sent_bytes, over: fate.over.is_some() }
        };
        self.vms.iter().zip(&self.fates).map(row).collect()
    }
}
