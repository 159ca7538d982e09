//! Which pages a VM of KVM writes, by KVM's own log: a bitmap, which is read, and then cleared for what was read.
//!
//! KVM logs what vCPUs write, what it writes for them (emulated instructions, accessed bits of page tables), and
//! nothing of what the VMM writes: [`Memory`](crate::memory::Memory) notes that itself, and it is added here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap,
};
use libsg::dirty::DirtyLog;
use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::uffd::WriteLog;
use libsg::{Error, ErrorKind, Result};

use super::{KvmVm, raw, refused};

/// Words of the bitmap that are cleared at once, 256 MiB of memory: as long as KVM holds vCPUs up that fault.
const WORDS_AT_ONCE: usize = 1024;

/// The log.
pub struct KvmDirtyLog {
    kvm: Arc<KvmVm>,
    running: Running,
}

enum Running {
    No,
    /// By KVM. `manual`: what was read has to be cleared; else reading does that, in one step that holds vCPUs up
    /// for longer.
    Kvm {
        manual: bool,
    },
    /// KVM refuses: by the page table of this process, through which KVM's writes go as well.
    Process(WriteLog),
}

impl KvmDirtyLog {
    /// One that is not started.
    #[must_use]
    pub fn new(kvm: Arc<KvmVm>) -> Self {
        Self { kvm, running: Running::No }
    }

    fn pages(&self) -> u64 {
        self.kvm.memory.bytes() / PAGE_BYTES_U64
    }

    /// Starts KVM's log. Whether what is read has to be cleared.
    fn start_kvm(&self) -> Result<bool> {
        let can = self.kvm.vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let options = u32::try_from(can).unwrap_or(0) & wanted;
        if options != 0 {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = options.into();
            self.kvm
                .vm
                .enable_cap(&cap)
                .map_err(refused("a log of written pages that is cleared by hand"))?;
        }
        self.set(true)?;
        if self.kvm.refuses_log.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Vm, "told to be refused"));
        }
        // All pages count as written then, and none was protected yet: that is done here, piece by piece, instead
        // of by KVM in one step that holds all vCPUs up. Left to the first collection, that would name the whole VM.
        if options & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
            let all = vec![u64::MAX; self.pages().div_ceil(64) as usize];
            self.clear(&all)?;
        }
        self.kvm.memory.take_own_writes(PageIndex(0), &mut vec![0; self.pages().div_ceil(64) as usize]);
        Ok(options != 0)
    }

    fn set(&self, log_writes: bool) -> Result<()> {
        raw::set_memory(&self.kvm.vm, &self.kvm.memory, log_writes)
            .map_err(refused("to log which pages are written"))
    }

    /// Has KVM protect the pages that are set.
    fn clear(&self, bitmap: &[u64]) -> Result<()> {
        let pages = self.pages();
        for (words, first) in bitmap.chunks(WORDS_AT_ONCE).zip((0..).step_by(WORDS_AT_ONCE * 64)) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let count = (words.len() as u64 * 64).min(pages - first);
            raw::clear_dirty_log(&self.kvm.vm, first, count as u32, words).map_err(|cause| {
                Error::new(ErrorKind::Vm, "KVM refuses: to clear its log of written pages").because(cause)
            })?;
        }
        Ok(())
    }

    fn collect_kvm(&self, manual: bool, out: &mut Vec<PageRange>) -> Result<()> {
        let bytes = self.kvm.memory.bytes() as usize;
        let mut bitmap =
            self.kvm.vm.get_dirty_log(raw::SLOT, bytes).map_err(refused("its log of written pages"))?;
        // What is written between the two is still set if it was not before, and else named now and read later.
        if manual {
            self.clear(&bitmap)?;
        }
        self.kvm.memory.take_own_writes(PageIndex(0), &mut bitmap);
        append_runs(&bitmap, self.pages(), out);
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&mut self) -> Result<()> {
        if !matches!(self.running, Running::No) {
            return Ok(());
        }
        self.running = match self.start_kvm() {
            Ok(manual) => Running::Kvm { manual },
            Err(error) => {
                tracing::warn!(
                    error = error.chain(),
                    "KVM does not log what the guest writes: the page table of this process does, which slows the guest more"
                );
                // It may log all the same, which costs, and nothing else.
                let _ = self.set(false);
                let mut log = WriteLog::new(self.kvm.memory.guest());
                log.start()?;
                Running::Process(log)
            }
        };
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        match &mut self.running {
            Running::Kvm { manual } => {
                let manual = *manual;
                self.collect_kvm(manual, out)
            }
            Running::Process(log) => log.collect(out),
            Running::No => Err(Error::new(ErrorKind::Input, "the log of written pages was not started")),
        }
    }

    fn stop(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.running, Running::No) {
            Running::Kvm { .. } => self.set(false),
            Running::Process(mut log) => log.stop(),
            Running::No => Ok(()),
        }
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(error = error.chain(), "the log of written pages did not end well");
        }
    }
}

/// Appends the runs of a bitmap's first `pages` bits.
fn append_runs(bitmap: &[u64], pages: u64, out: &mut Vec<PageRange>) {
    let since = out.len();
    for (word, first) in bitmap.iter().zip((0_u64..).step_by(64)) {
        let mut word = *word;
        let mut at = 0;
        while word != 0 {
            let gap = word.trailing_zeros();
            let ones = (word >> gap).trailing_ones();
            let start = first + u64::from(at + gap);
            let end = (start + u64::from(ones)).min(pages);
            append(out, since, start, end);
            at += gap + ones;
            word = word.checked_shr(gap + ones).unwrap_or(0);
        }
    }
}

fn append(out: &mut Vec<PageRange>, since: usize, start: u64, end: u64) {
    // A VM's pages are numbered by 32 bits; bits behind its end are nobody's.
    let Some(pages) = end.checked_sub(start).filter(|pages| *pages > 0) else { return };
    match out[since..].last_mut() {
        Some(last) if u64::from(last.first.0) + u64::from(last.pages) == start => last.pages += pages as u32,
        _ => out.push(PageRange::new(PageIndex(start as u32), pages as u32)),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bitmaps_become_the_fewest_runs() {
        let run = |first, pages| PageRange::new(PageIndex(first), pages);
        let before = run(3, 1);
        for (bitmap, pages, want) in [
            (vec![0, 0], 128, vec![]),
            (vec![u64::MAX, u64::MAX], 128, vec![run(0, 128)]),
            (vec![u64::MAX, u64::MAX], 100, vec![run(0, 100)]),
            (
                vec![1 << 63 | 0b1011_0000, 1 | 1 << 63],
                128,
                vec![run(4, 2), run(7, 1), run(63, 2), run(127, 1)],
            ),
            (vec![0b1000, 1 << 40], 100, vec![run(3, 1)]),
        ] {
            let mut out = vec![before];
            append_runs(&bitmap, pages, &mut out);
            assert_eq!(out.remove(0), before, "what was there stays a run of its own");
            assert_eq!(out, want);
        }
    }
}
