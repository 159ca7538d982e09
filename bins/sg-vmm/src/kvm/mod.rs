//! The VM as KVM has it: guest memory, and vCPUs in 64-bit mode. No interrupt controller: the guest
//! takes no interrupts.

pub mod dirty;
pub mod raw;
pub mod state;
pub mod vcpu;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use libsg::{Error, ErrorKind, Result};

use crate::memory::Memory;

/// A VM of KVM.
pub struct KvmVm {
    vm: VmFd,
    cpuid: CpuId,
    msrs: Vec<u32>,
    /// A canary: KVM's log is taken for refused.
    refuses_log: AtomicBool,
    /// Held so that it outlives `vm`.
    memory: Arc<Memory>,
}

/// A [`libsg::Error`] of what KVM refused.
fn refused(what: &str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    let what = format!("KVM refuses: {what}");
    move |errno| Error::new(ErrorKind::Vm, what).because(std::io::Error::from_raw_os_error(errno.errno()))
}

impl KvmVm {
    /// A VM with this memory and no vCPU yet.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when KVM cannot be used; the cause says why.
    pub fn new(memory: Arc<Memory>) -> Result<Self> {
        let kvm = Kvm::new().map_err(refused("opening /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(refused("a VM"))?;
        if kvm.check_extension_int(Cap::Xsave2) > size_of::<kvm_bindings::kvm_xsave>() as i32 {
            return Err(Error::new(ErrorKind::Vm, "this CPU has more extended state than is saved here"));
        }
        raw::set_memory(&vm, &memory, false).map_err(refused("the guest's memory"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("CPU features"))?;
        let msrs = kvm.get_msr_index_list().map_err(refused("the list of MSRs"))?.as_slice().to_vec();
        Ok(Self { vm, cpuid, msrs, refuses_log: AtomicBool::new(false), memory })
    }

    /// A canary: from now on KVM's log of written pages is taken for refused, when it is started.
    pub fn refuse_log(&self) {
        self.refuses_log.store(true, Ordering::Relaxed);
    }

    /// Whether KVM can be used here, and if not, why.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn probe() -> Result<()> {
        let vm = Kvm::new().map_err(refused("opening /dev/kvm"))?.create_vm().map_err(refused("a VM"))?;
        vm.create_vcpu(0).map_err(refused("a vCPU"))?;
        Ok(())
    }
}
