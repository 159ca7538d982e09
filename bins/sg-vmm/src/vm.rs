//! The VM: memory, vCPUs and their threads; paused, saved, loaded and run as a whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};
use libsg::dirty::DirtyLog;
use libsg::page::{PAGE_BYTES_U64, PageRange};
use libsg::uffd::WriteLog;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::clock::monotonic_ns;
use crate::config::{Layout, VcpuKind, VmConfig};
use crate::counters::{GuestStats, VcpuCounters};
use crate::director::{Director, Gate};
use crate::kvm::{KvmVm, dirty::KvmDirtyLog, raw, vcpu::KvmVcpu};
use crate::memory::Memory;
use crate::saved::{SavedVm, Window};
use crate::serial::Serial;
use crate::thread_vcpu::ThreadVcpu;
use crate::vcpu::{SavedVcpu, Vcpu};
use crate::{guest, verify};

/// A vCPU comes back by itself with its next operation. Only one that does not is interrupted, since
/// a signal makes a vCPU that waits for a page spin until it arrives.
const KICK_AFTER: Duration = Duration::from_millis(20);
/// How long a pause waits for a vCPU. One that waits for a page that is still to come cannot be
/// paused; at the source, where all memory is present, that does not happen.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The VM. Made paused.
pub struct Vm {
    config: VmConfig,
    memory: Arc<Memory>,
    /// `None` where the vCPUs are threads.
    kvm: Option<Arc<KvmVm>>,
    gate: Arc<Gate>,
    counters: Vec<Arc<VcpuCounters>>,
    engine: Mutex<Engine>,
    window: Mutex<Window>,
    failure: Arc<Mutex<Option<String>>>,
    kick_signal: i32,
    fill_pages: AtomicU64,
    host_mismatches: AtomicU64,
    retired: AtomicBool,
    lost: Mutex<Vec<PageRange>>,
    verifying: Mutex<()>,
    /// Pages of the last pass, if the VMM made it.
    verified_by_vmm: AtomicU64,
    passes: AtomicU64,
}

/// Who checks in a pass what changes of each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verifier {
    /// The guest itself, between its operations
    Guest,
    /// The VMM, from outside; faster where the guest's code is emulated
    Vmm,
}

/// Where the vCPUs are.
enum Engine {
    Parked(Vec<Box<dyn Vcpu>>),
    Running(Vec<RunningVcpu>),
    /// A vCPU's thread panicked.
    Lost,
}

/// A vCPU on its thread.
struct RunningVcpu {
    thread: JoinHandle<Box<dyn Vcpu>>,
    tid: Receiver<i32>,
    done: Receiver<()>,
}

impl Vm {
    /// Builds a VM over `memory`, which is as long as the configuration says. Nothing is written to
    /// memory: [`Self::fill`] does that for a VM that starts here.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a bad configuration, [`ErrorKind::Vm`] when KVM refuses something.
    pub fn new(config: VmConfig, memory: Arc<Memory>, serial: &Serial) -> Result<Self> {
        config.check()?;
        if memory.bytes() != config.memory_bytes {
            return Err(Error::new(ErrorKind::Input, "memory and configuration differ in length"));
        }
        let layout = Layout::of(&config);
        let gate = Arc::new(Gate::default());
        let kvm = match config.vcpu {
            VcpuKind::Kvm => Some(Arc::new(KvmVm::new(Arc::clone(&memory))?)),
            VcpuKind::Thread => None,
        };
        let (mut counters, mut vcpus) = (Vec::new(), Vec::new());
        for id in 0..u64::from(config.vcpus) {
            let counter = Arc::new(VcpuCounters::default());
            let owned = layout.owned(id, layout.workload_pages());
            let director = Director::new(&config, owned, Arc::clone(&gate), Arc::clone(&counter));
            let vcpu: Box<dyn Vcpu> = match &kvm {
                Some(kvm) => Box::new(KvmVcpu::new(Arc::clone(kvm), &config, id, director, serial.clone())?),
                None => Box::new(ThreadVcpu::new(&config, id, Arc::clone(&memory), director, serial.clone())),
            };
            counters.push(counter);
            vcpus.push(vcpu);
        }
        Ok(Self {
            config,
            memory,
            kvm,
            gate,
            counters,
            engine: Mutex::new(Engine::Parked(vcpus)),
            window: Mutex::new(Window::default()),
            failure: Arc::default(),
            kick_signal: raw::kick_signal()?,
            fill_pages: AtomicU64::new(0),
            host_mismatches: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            lost: Mutex::default(),
            verifying: Mutex::new(()),
            verified_by_vmm: AtomicU64::new(0),
            passes: AtomicU64::new(0),
        })
    }

    /// What it is made of.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Writes what the guest starts with. Call once, before the first [`Self::run`].
    pub fn fill(&self) {
        self.fill_pages.store(guest::fill(&self.config, &self.memory), Ordering::Relaxed);
    }

    /// Starts the vCPUs. Does nothing when they run.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] after [`Self::retire`] or when a vCPU was lost, [`ErrorKind::System`] when no
    /// thread can be started.
    pub fn run(&self) -> Result<()> {
        let mut engine = self.engine.lock();
        if self.retired.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Vm, "the VM has moved: it never runs here again"));
        }
        let vcpus = match std::mem::replace(&mut *engine, Engine::Lost) {
            Engine::Parked(vcpus) => vcpus,
            Engine::Running(running) => {
                *engine = Engine::Running(running);
                return Ok(());
            }
            Engine::Lost => return Err(lost()),
        };
        {
            let mut window = self.window.lock();
            if window.since_ns == 0 {
                window.since_ns = monotonic_ns();
            }
        }
        self.gate.set_stopped(false);
        let started: Result<Vec<_>> =
            vcpus.into_iter().enumerate().map(|(id, vcpu)| self.start(id, vcpu)).collect();
        *engine = Engine::Running(started?);
        Ok(())
    }

    fn start(&self, id: usize, mut vcpu: Box<dyn Vcpu>) -> Result<RunningVcpu> {
        let (tid_out, tid) = bounded(1);
        let (done_out, done) = bounded(1);
        let failure = Arc::clone(&self.failure);
        let body = move || {
            // Dropped at the end, by a panic too: that is what the other end waits for.
            let _done = done_out;
            let _ = tid_out.send(rustix::thread::gettid().as_raw_nonzero().get());
            if let Err(error) = vcpu.run() {
                tracing::error!(vcpu = id, error = error.chain(), "a vCPU stopped");
                *failure.lock() = Some(error.chain());
            }
            vcpu
        };
        let thread = std::thread::Builder::new().name(format!("sg-vcpu-{id}")).spawn(body)?;
        Ok(RunningVcpu { thread, tid, done })
    }

    /// Stops the vCPUs between two instructions; [`Self::run`] continues them. Does nothing when
    /// they are stopped.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when a vCPU does not stop because it waits for a page (the VM then runs
    /// on), or when one failed.
    pub fn stop(&self) -> Result<()> {
        let mut engine = self.engine.lock();
        let running = match std::mem::replace(&mut *engine, Engine::Lost) {
            Engine::Running(running) => running,
            Engine::Parked(vcpus) => {
                *engine = Engine::Parked(vcpus);
                return self.failed();
            }
            Engine::Lost => return Err(lost()),
        };
        self.gate.set_stopped(true);
        let began = Instant::now();
        if !running.iter().all(|vcpu| self.await_stop(vcpu, began)) {
            // Those that did stop begin again where they were.
            self.gate.set_stopped(false);
            *engine = Engine::Running(self.restart_stopped(running)?);
            let why = "a vCPU waits for a page that has not come: the VM cannot be paused before it is there";
            return Err(Error::new(ErrorKind::Vm, why));
        }
        let vcpus: Option<Vec<_>> = running.into_iter().map(|vcpu| vcpu.thread.join().ok()).collect();
        *engine = Engine::Parked(vcpus.ok_or_else(lost)?);
        self.failed()
    }

    /// Whether the vCPU's thread is done in time.
    fn await_stop(&self, vcpu: &RunningVcpu, began: Instant) -> bool {
        let tid = vcpu.tid.try_recv();
        loop {
            use crossbeam::channel::RecvTimeoutError::{Disconnected, Timeout};
            match vcpu.done.recv_timeout(KICK_AFTER) {
                Ok(()) | Err(Disconnected) => return true,
                Err(Timeout) if began.elapsed() > PAUSE_TIMEOUT => return false,
                Err(Timeout) => {
                    if let Ok(tid) = tid {
                        raw::interrupt(tid, self.kick_signal);
                    }
                }
            }
        }
    }

    fn restart_stopped(&self, running: Vec<RunningVcpu>) -> Result<Vec<RunningVcpu>> {
        let again = |(id, vcpu): (usize, RunningVcpu)| {
            if !vcpu.thread.is_finished() {
                return Ok(vcpu);
            }
            self.start(id, vcpu.thread.join().map_err(|_| lost())?)
        };
        running.into_iter().enumerate().map(again).collect()
    }

    fn failed(&self) -> Result<()> {
        match &*self.failure.lock() {
            Some(failure) => Err(Error::new(ErrorKind::Vm, failure.clone())),
            None => Ok(()),
        }
    }

    /// Stops the vCPUs and returns the VM's whole state beside its memory.
    ///
    /// # Errors
    /// As [`Self::stop`], and [`ErrorKind::Vm`] when the state cannot be read.
    pub fn pause(&self) -> Result<Vec<u8>> {
        self.stop()?;
        let Engine::Parked(vcpus) = &*self.engine.lock() else { return Err(lost()) };
        let vcpus: Result<Vec<_>> = vcpus
            .iter()
            .zip(&self.counters)
            .map(|(vcpu, counters)| Ok(SavedVcpu { state: vcpu.save()?, counters: counters.save() }))
            .collect();
        let host_mismatches = self.host_mismatches.load(Ordering::Relaxed);
        let fill_pages = self.fill_pages.load(Ordering::Relaxed);
        SavedVm::new(vcpus?, self.window.lock().clone(), fill_pages, host_mismatches).encode()
    }

    /// Takes over a state of a VM with the same configuration. Memory need not be present.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when the bytes are not such a state; the VM is then of no use.
    pub fn load(&self, state: &[u8]) -> Result<()> {
        let saved = SavedVm::decode(state)?;
        let mut engine = self.engine.lock();
        let Engine::Parked(vcpus) = &mut *engine else {
            return Err(Error::new(ErrorKind::Vm, "a state cannot be loaded while vCPUs run"));
        };
        if saved.vcpus.len() != vcpus.len() {
            let why = format!("the state has {} vCPUs, this VM {}", saved.vcpus.len(), vcpus.len());
            return Err(Error::new(ErrorKind::Vm, why));
        }
        for ((vcpu, counters), saved_vcpu) in vcpus.iter_mut().zip(&self.counters).zip(&saved.vcpus) {
            vcpu.load(&saved_vcpu.state)?;
            counters.load(&saved_vcpu.counters, |ns| saved.taken.translate(ns));
        }
        let since_ns = saved.taken.translate(saved.window.since_ns);
        *self.window.lock() = Window { since_ns, ..saved.window };
        self.fill_pages.store(saved.fill_pages, Ordering::Relaxed);
        self.host_mismatches.store(saved.host_mismatches, Ordering::Relaxed);
        Ok(())
    }

    /// Begins the window over which rate and longest pause are measured: at the start of a migration.
    pub fn begin_window(&self) {
        let ops = self.total(|c| &c.ops);
        *self.window.lock() = Window { since_ns: monotonic_ns(), ops };
        for counters in &self.counters {
            counters.longest_gap_ns.store(0, Ordering::Relaxed);
        }
    }

    /// Checks every page once more: the guest or the VMM what changes, the VMM in any case every
    /// byte that never does. Returns when all is done, or when `give_up` says so.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] when given up, [`ErrorKind::Vm`] when a vCPU failed.
    pub fn verify(&self, by: Verifier, give_up: impl Fn() -> bool) -> Result<GuestStats> {
        let _one_at_a_time = self.verifying.lock();
        self.failed()?;
        self.verified_by_vmm.store(0, Ordering::Relaxed);
        let pass = (by == Verifier::Guest).then(|| self.gate.want_pass());
        let stop = |page| {
            if by == Verifier::Vmm {
                self.verified_by_vmm.store(page, Ordering::Relaxed);
            }
            give_up()
        };
        let found = verify::look(&self.config, &self.memory, &self.lost(), by == Verifier::Vmm, stop);
        let wrong = found.wrong.len() + self.judge(found.suspects)?;
        self.host_mismatches.fetch_add(wrong as u64, Ordering::Relaxed);
        let waits = |c: &Arc<VcpuCounters>| pass.is_some_and(|pass| c.passes.load(Ordering::Acquire) < pass);
        while give_up() || self.counters.iter().any(waits) {
            self.failed()?;
            if give_up() {
                return Err(Error::new(ErrorKind::Cancelled, "the verification pass was given up"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if by == Verifier::Vmm {
            self.verified_by_vmm.store(Layout::of(&self.config).pages, Ordering::Relaxed);
        }
        self.passes.fetch_add(1, Ordering::Relaxed);
        Ok(self.stats())
    }

    /// How many of these pages are really wrong, found out with the vCPUs stopped for a moment.
    fn judge(&self, suspects: Vec<u64>) -> Result<usize> {
        if suspects.is_empty() {
            return Ok(0);
        }
        let running = self.is_running();
        self.stop()?;
        let wrong = verify::judge(&self.config, &self.memory, suspects);
        if running {
            self.run()?;
        }
        Ok(wrong.len())
    }

    /// With the vCPUs stopped: whether the versions in memory add up to the writes that the vCPUs
    /// counted. Finds memory that is old as a whole, its shadow table included.
    #[must_use]
    pub fn writes_add_up(&self) -> bool {
        let counted = self.total(|c| &c.writes);
        let open = self.total(|c| &c.open_writes);
        (counted..=counted + open).contains(&verify::writes_in_shadow(&self.config, &self.memory))
    }

    /// What logs which pages it writes, the VMM's own writes included; not started.
    #[must_use]
    pub fn dirty_log(&self) -> Box<dyn DirtyLog> {
        match &self.kvm {
            Some(kvm) => Box::new(KvmDirtyLog::new(Arc::clone(kvm))),
            // vCPUs that are threads write like the rest of this process.
            None => Box::new(WriteLog::new(self.memory.guest())),
        }
    }

    /// A canary: KVM does not log what this VM writes, as where it refuses to. Nothing else changes where the vCPUs are
    /// threads.
    pub fn refuse_kvm_log(&self) {
        if let Some(kvm) = &self.kvm {
            kvm.refuse_log();
        }
    }

    /// The VM has moved: nothing runs it here again. It is paused already.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Whether it has moved.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// These pages are lost for good: the VMM does not read them, a vCPU that does gets an error.
    pub fn lose(&self, pages: &[PageRange]) {
        tracing::error!(pages = ?pages, "pages are lost");
        self.lost.lock().extend_from_slice(pages);
    }

    /// The pages that are lost.
    #[must_use]
    pub fn lost(&self) -> Vec<PageRange> {
        self.lost.lock().clone()
    }

    /// A canary: makes one page of the workload wrong, between two operations of the guest. Exactly
    /// one mismatch must follow.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the workload has no such page; as [`Self::stop`].
    pub fn spoil(&self, page: u64) -> Result<()> {
        let layout = Layout::of(&self.config);
        if !(layout.workload..layout.pages).contains(&page) {
            let why = format!("page {page} is not one of {} to {}", layout.workload, layout.pages - 1);
            return Err(Error::new(ErrorKind::Input, why));
        }
        let running = self.is_running();
        self.stop()?;
        self.memory.flip(page * PAGE_BYTES_U64 + 8);
        if running { self.run() } else { Ok(()) }
    }

    /// Inverts one byte of guest memory: a canary that verification must find.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when there is no such byte.
    pub fn flip(&self, offset: u64) -> Result<()> {
        if offset >= self.memory.bytes() {
            return Err(Error::new(ErrorKind::Input, format!("guest memory has no byte {offset:#x}")));
        }
        self.memory.flip(offset);
        Ok(())
    }

    /// What the guest did so far.
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        let running = self.is_running();
        let window = self.window.lock().clone();
        let ops = self.total(|c| &c.ops);
        let elapsed_s = monotonic_ns().saturating_sub(window.since_ns) as f64 / 1e9;
        let gap = |c: &Arc<VcpuCounters>| {
            let open = if running { c.open_gap_ns() } else { 0 };
            let open = open.min(monotonic_ns().saturating_sub(window.since_ns));
            c.longest_gap_ns.load(Ordering::Relaxed).max(open)
        };
        let longest = self.counters.iter().map(gap).max().unwrap_or(0);
        let system = Layout::of(&self.config).workload;
        let verified_pages = match (self.verified_by_vmm.load(Ordering::Relaxed), self.total(|c| &c.verified))
        {
            (0, 0) => 0,
            (0, verified) => verified + system,
            (by_vmm, _) => by_vmm,
        };
        GuestStats {
            ops,
            writes: self.total(|c| &c.writes),
            ops_per_s: if window.since_ns == 0 {
                0.0
            } else {
                (ops - window.ops.min(ops)) as f64 / elapsed_s
            },
            longest_pause_ms: longest as f64 / 1e6,
            mismatches: self
                .total(|c| &c.mismatches)
                .saturating_add(self.host_mismatches.load(Ordering::Relaxed)),
            verified_pages,
            verify_passes: self.passes.load(Ordering::Relaxed),
            fill_pages: self.fill_pages.load(Ordering::Relaxed),
            pages: self.config.memory_bytes / PAGE_BYTES_U64,
            running,
            failure: self.failure.lock().clone(),
        }
    }

    fn is_running(&self) -> bool {
        matches!(&*self.engine.lock(), Engine::Running(_))
    }

    /// Of all vCPUs. They come with a state, from a peer: any number at all.
    fn total(&self, counter: impl Fn(&VcpuCounters) -> &AtomicU64) -> u64 {
        self.counters.iter().map(|c| counter(c).load(Ordering::Relaxed)).fold(0, u64::saturating_add)
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::Poisoned, "a vCPU's thread panicked: the VM cannot go on")
}

#[cfg(test)]
#[path = "vm_test.rs"]
mod test;
