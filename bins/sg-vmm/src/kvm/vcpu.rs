//! A vCPU of KVM in 64-bit mode. Every port read of the guest is an operation done and the next
//! one asked for.

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use libsg::page::PAGE_BYTES_U64;
use libsg::{Error, ErrorKind, Result};

use super::state::KvmVcpuState;
use super::{KvmVm, refused};
use crate::config::{Layout, VmConfig};
use crate::director::Director;
use crate::guest::PHYSICAL_BASE;
use crate::serial::{LineBuffer, Serial};
use crate::vcpu::{GuestRegisters, ProcessorState, Vcpu, VcpuState};

const PORT_ORDER: u16 = 0xe0;
const PORT_MISMATCH: u16 = 0xe1;
const PORT_SERIAL: u16 = 0x3f8;

/// Protected mode, 387 present, errors native, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
/// Physical address extension, FXSAVE.
const CR4: u64 = 1 << 5 | 1 << 9;
/// Long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// The vCPU.
pub struct KvmVcpu {
    fd: VcpuFd,
    director: Director,
    serial: LineBuffer,
    /// Held so that the VM, and the memory it maps, outlives the vCPU.
    vm: Arc<KvmVm>,
}

/// What the guest wants, free of borrows of the vCPU.
enum Call {
    Nothing,
    Interrupted,
    Mismatch,
    Dead(String),
}

impl KvmVcpu {
    /// vCPU number `vcpu` of `vm`, at its start.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when KVM refuses it.
    pub fn new(
        vm: Arc<KvmVm>,
        config: &VmConfig,
        vcpu: u64,
        director: Director,
        serial: Serial,
    ) -> Result<Self> {
        let fd = vm.vm.create_vcpu(vcpu).map_err(refused("a vCPU"))?;
        fd.set_cpuid2(&vm.cpuid).map_err(refused("the guest's CPU features"))?;
        let layout = Layout::of(config);
        let mut sregs = fd.get_sregs().map_err(refused("reading system registers"))?;
        sregs.cr0 = CR0;
        sregs.cr3 = PHYSICAL_BASE + layout.tables * PAGE_BYTES_U64;
        sregs.cr4 = CR4;
        sregs.efer = EFER;
        sregs.cs = segment(true);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *data = segment(false);
        }
        fd.set_sregs(&sregs).map_err(refused("64-bit mode"))?;
        let start = GuestRegisters::new(&layout, &config.format(), vcpu);
        let regs = kvm_regs {
            rip: layout.code * PAGE_BYTES_U64,
            rflags: 2,
            rbx: u64::from(vcpu == 0),
            r8: start.shadow,
            r10: start.seed,
            r11: start.common_seed,
            r12: start.random,
            r13: start.sequential,
            r14: start.verify,
            r15: start.stride,
            rbp: start.first,
            rsp: start.working_set,
            ..Default::default()
        };
        fd.set_regs(&regs).map_err(refused("setting registers"))?;
        Ok(Self { fd, director, serial: LineBuffer::new(serial), vm })
    }

    /// Enters the guest once.
    fn enter(&mut self) -> Result<Call> {
        Ok(match self.fd.run() {
            Ok(VcpuExit::IoIn(PORT_ORDER, data)) => {
                let order = self.director.exchange().to_le_bytes();
                for (to, from) in data.iter_mut().zip(order) {
                    *to = from;
                }
                Call::Nothing
            }
            Ok(VcpuExit::IoOut(PORT_SERIAL, data)) => {
                self.serial.put(data);
                Call::Nothing
            }
            Ok(VcpuExit::IoOut(PORT_MISMATCH, _)) => Call::Mismatch,
            Ok(VcpuExit::Intr) => Call::Interrupted,
            Ok(exit) => Call::Dead(format!("{exit:?}")),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Call::Interrupted,
            Err(error) => return Err(refused("running the vCPU")(error)),
        })
    }

    /// Lets KVM finish the instruction that it left the guest with, and not begin another.
    fn complete_exit(&mut self) -> Result<()> {
        self.fd.set_kvm_immediate_exit(1);
        let result = match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(refused("completing the last exit")(error)),
            Ok(exit) => {
                Err(Error::new(ErrorKind::Vm, format!("KVM ran the vCPU when told not to: {exit:?}")))
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        result
    }

    fn registers(&self) -> Result<kvm_regs> {
        self.fd.get_regs().map_err(refused("reading registers"))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<()> {
        while !self.director.at_rest() {
            match self.enter()? {
                Call::Nothing => {}
                // In the middle of an operation that takes too long: that is no less exact.
                Call::Interrupted if self.director.stopped() => break,
                Call::Interrupted => {}
                Call::Mismatch => {
                    let regs = self.registers()?;
                    self.director.mismatch(regs.rdi, regs.rsi, regs.rcx);
                }
                Call::Dead(exit) => {
                    let regs = self.registers()?;
                    let what = format!("the guest is dead: {exit} at {:#x}, page {:#x}", regs.rip, regs.rdi);
                    return Err(Error::new(ErrorKind::Vm, what));
                }
            }
        }
        self.complete_exit()
    }

    fn save(&self) -> Result<VcpuState> {
        let state = KvmVcpuState::read(&self.fd, &self.vm.msrs)?;
        Ok(VcpuState { processor: ProcessorState::Kvm(Box::new(state)), director: self.director.save() })
    }

    fn load(&mut self, state: &VcpuState) -> Result<()> {
        let ProcessorState::Kvm(processor) = &state.processor else {
            let why =
                "this VM's vCPUs are KVM's, the state is one of threads: use --vcpu thread on both sides";
            return Err(Error::new(ErrorKind::Vm, why));
        };
        processor.write(&self.fd)?;
        self.director.load(state.director);
        Ok(())
    }
}

/// A flat segment of 64-bit mode.
fn segment(code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: if code { 0x08 } else { 0x10 },
        type_: if code { 0b1011 } else { 0b0011 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
