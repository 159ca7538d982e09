//! Everything KVM knows about a vCPU: read out whole, and put back whole.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use libsg::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::{raw, refused};

/// MSRs that one call reads or writes at most.
const MSRS_AT_ONCE: usize = 64;
/// MSRs that a saved state may have.
const MSRS_MAX: usize = 1024;

/// A vCPU's state. There is no interrupt controller and no paravirtual clock, so none is saved.
#[derive(Serialize, Deserialize)]
pub struct KvmVcpuState {
    /// General registers.
    pub regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl KvmVcpuState {
    /// Reads it out. The vCPU does not run, and has completed its last exit.
    pub fn read(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self> {
        Ok(Self {
            mp_state: vcpu.get_mp_state().map_err(refused("reading whether the vCPU runs"))?,
            regs: vcpu.get_regs().map_err(refused("reading registers"))?,
            sregs: vcpu.get_sregs().map_err(refused("reading system registers"))?,
            xsave: vcpu.get_xsave().map_err(refused("reading extended state"))?,
            xcrs: vcpu.get_xcrs().map_err(refused("reading XCRs"))?,
            debug: vcpu.get_debug_regs().map_err(refused("reading debug registers"))?,
            events: vcpu.get_vcpu_events().map_err(refused("reading pending events"))?,
            msrs: read_msrs(vcpu, msrs)?,
        })
    }

    /// Puts it back.
    pub fn write(&self, vcpu: &VcpuFd) -> Result<()> {
        if self.mp_state.mp_state != KVM_MP_STATE_RUNNABLE {
            return Err(Error::new(ErrorKind::Vm, "the state's vCPU was not running"));
        }
        vcpu.set_mp_state(self.mp_state).map_err(refused("setting whether the vCPU runs"))?;
        vcpu.set_sregs(&self.sregs).map_err(refused("setting system registers"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_xcrs(&self.xcrs).map_err(refused("setting XCRs"))?;
        raw::set_xsave(vcpu, &self.xsave).map_err(refused("setting extended state"))?;
        vcpu.set_debug_regs(&self.debug).map_err(refused("setting debug registers"))?;
        vcpu.set_regs(&self.regs).map_err(refused("setting registers"))?;
        vcpu.set_vcpu_events(&self.events).map_err(refused("setting pending events"))
    }
}

fn entries(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| Error::new(ErrorKind::Vm, "too many MSRs"))
}

/// Reads those MSRs that can be read: KVM lists some that this CPU or this guest does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .take(MSRS_AT_ONCE)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let mut batch = entries(&wanted)?;
        let count = vcpu.get_msrs(&mut batch).map_err(refused("reading MSRs"))?.min(wanted.len());
        read.extend_from_slice(&batch.as_slice()[..count]);
        // KVM stops at the first that cannot be read: step over it.
        rest = &rest[(count + usize::from(count < wanted.len())).min(rest.len())..];
    }
    Ok(read)
}

/// Writes MSRs. One that cannot be written must hold the wanted value already.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    if msrs.len() > MSRS_MAX {
        return Err(Error::new(ErrorKind::Vm, "the state has too many MSRs"));
    }
    let mut rest = msrs;
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let count = vcpu.set_msrs(&entries(wanted)?).map_err(refused("setting MSRs"))?.min(wanted.len());
        if let Some(left_out) = wanted.get(count) {
            let now = read_msrs(vcpu, &[left_out.index])?;
            if now.first().is_none_or(|now| now.data != left_out.data) {
                return Err(Error::new(
                    ErrorKind::Vm,
                    format!("MSR {:#x} cannot be set to {:#x} here", left_out.index, left_out.data),
                ));
            }
        }
        rest = &rest[(count + usize::from(count < wanted.len())).min(rest.len())..];
    }
    Ok(())
}
