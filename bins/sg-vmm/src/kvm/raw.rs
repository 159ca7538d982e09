//! The calls that the compiler cannot check: giving KVM memory, having it protect what was written there, giving
//! it the extended state, and interrupting a thread.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::guest::PHYSICAL_BASE;
use crate::memory::Memory;

/// The one slot: all of the memory.
pub const SLOT: u32 = 0;

/// `_IOWR(0xae, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;

const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 0x18);

/// Makes all of `memory` the guest's, from [`PHYSICAL_BASE`] on, or changes whether KVM logs what is written there.
/// `memory` must outlive `vm`: the caller keeps both in one struct, the VM first.
pub fn set_memory(vm: &VmFd, memory: &Memory, log_writes: bool) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: SLOT,
        flags: if log_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: PHYSICAL_BASE,
        memory_size: memory.bytes(),
        userspace_addr: memory.host_address(),
    };
    // SAFETY: the range is a whole mapping of ours, which is reached through atomics only and which
    // `KvmVm` and its vCPUs hold alive for as long as the VM lives.
    unsafe { vm.set_user_memory_region(region) }
}

/// Has KVM forget those of the pages from `first` on, at most `pages`, that are set in `bitmap`, and log the next
/// write to them again. `first` is a multiple of 64, and `pages` too where it does not reach the slot's end.
pub fn clear_dirty_log(vm: &VmFd, first: u64, pages: u32, bitmap: &[u64]) -> std::io::Result<()> {
    assert!(bitmap.len() * 64 >= pages as usize, "a bitmap of {} words for {pages} pages", bitmap.len());
    let argument = kvm_clear_dirty_log {
        slot: SLOT,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads one bit for each page from the bitmap, which has as many, and writes to none of our memory.
    match unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const argument) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
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
