//! The three calls that the compiler cannot check: giving KVM memory, giving it the extended
//! state, and interrupting a thread.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::memory::Memory;

/// Makes all of `memory` the guest's, from guest address 0 on. `memory` must outlive `vm`: the
/// caller keeps both in one struct, the VM first.
pub fn set_memory(vm: &VmFd, memory: &Memory) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.bytes(),
        userspace_addr: memory.host_address(),
    };
    // SAFETY: the range is a whole mapping of ours, which is reached through atomics only and which
    // `KvmVm` and its vCPUs hold alive for as long as the VM lives.
    unsafe { vm.set_user_memory_region(region) }
}

/// Sets the extended state (FPU, vector registers).
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads as many bytes as the guest's features need; `KvmVcpu::new` refuses to start
    // where that is more than this struct has (dynamically enabled features).
    unsafe { vcpu.set_xsave(xsave) }
}

/// Sends the signal `number` to a thread of this process, which interrupts a call to KVM.
pub fn interrupt(thread: i32, number: i32) {
    // SAFETY: takes numbers only, and cannot touch memory; a thread that is gone gives ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number) };
}

/// The signal that [`interrupt`] is used with: it does nothing but end a system call.
pub fn kick_signal() -> std::io::Result<i32> {
    static ONCE: std::sync::OnceLock<i32> = std::sync::OnceLock::new();
    if let Some(number) = ONCE.get() {
        return Ok(*number);
    }
    let number = libc::SIGRTMIN();
    signal_hook::flag::register(number, std::sync::Arc::default())?;
    Ok(*ONCE.get_or_init(|| number))
}
