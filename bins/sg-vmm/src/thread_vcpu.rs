//! A vCPU without KVM: a host thread that does natively what the guest's code does, order by order,
//! on the same memory and with the same mistakes found.

use std::sync::Arc;

use libsg::page::PAGE_BYTES_U64;
use libsg::{Error, ErrorKind, Result};

use crate::config::{Layout, VmConfig};
use crate::director::{Director, order};
use crate::memory::Memory;
use crate::page_format::{CHECKSUM_WORD, SHADOW_COMMON, TAIL_WORD, VERSION_WORD, expected};
use crate::serial::Serial;
use crate::vcpu::{GuestRegisters, ProcessorState, Vcpu, VcpuState};

/// The words of a page that change, in the order of [`expected`].
const WORDS: [u64; 4] = [0, VERSION_WORD as u64, CHECKSUM_WORD as u64, TAIL_WORD as u64];

/// The vCPU.
pub struct ThreadVcpu {
    registers: GuestRegisters,
    memory: Arc<Memory>,
    bytes: u64,
    director: Director,
    serial: Serial,
    greet: bool,
}

impl ThreadVcpu {
    /// vCPU number `vcpu`, at its start.
    #[must_use]
    pub fn new(
        config: &VmConfig,
        vcpu: u64,
        memory: Arc<Memory>,
        director: Director,
        serial: Serial,
    ) -> Self {
        let layout = Layout::of(config);
        Self {
            registers: GuestRegisters::new(&layout, &config.format(), vcpu),
            memory,
            bytes: config.memory_bytes,
            director,
            serial,
            greet: vcpu == 0,
        }
    }

    /// Does what one order says.
    pub fn obey(&mut self, what: u32) {
        let registers = &mut self.registers;
        if what & order::VERIFY != 0 {
            if what & order::RESTART != 0 {
                registers.verify = registers.first;
            }
            for _ in 0..=what >> order::COUNT_SHIFT {
                let address = self.registers.verify;
                // A state that was loaded may have any cursor: past the end there is no page.
                if address >= self.bytes {
                    break;
                }
                self.registers.verify += self.registers.stride;
                self.operate(address, false);
            }
        } else if what & order::RANDOM != 0 {
            registers.random = registers.random.wrapping_mul(6_364_136_223_846_793_005);
            let position = (u128::from(registers.random) * u128::from(registers.working_set)) >> 64;
            self.operate(self.address(position as u64), what & order::WRITE != 0);
        } else if what & order::WRITE != 0 {
            let position = registers.sequential;
            registers.sequential = (position + 1) % registers.working_set.max(1);
            self.operate(self.address(position), true);
        }
    }

    fn address(&self, position: u64) -> u64 {
        self.registers.first + position * self.registers.stride
    }

    /// Checks the page at `address`, then writes it if told so.
    fn operate(&self, address: u64, write: bool) {
        let page = address / PAGE_BYTES_U64;
        let entry = self.registers.shadow + page * 4;
        let shadow = self.memory.load32(entry);
        let seed = if shadow & SHADOW_COMMON == 0 { self.registers.seed } else { self.registers.common_seed };
        let want = expected(page, shadow, seed);
        let found = WORDS.map(|word| self.memory.load(address + word * 8));
        if found != want {
            self.director.mismatch(page, want[1], found[1]);
            self.serial.line(&format!("sg-vmm guest: mismatch in page 0x{page:08x}\n"));
            self.put(address, want);
        }
        if write {
            let shadow = shadow.wrapping_add(1);
            self.memory.store32(entry, shadow);
            self.put(address, expected(page, shadow, seed));
        }
    }

    fn put(&self, address: u64, words: [u64; 4]) {
        for (word, value) in WORDS.into_iter().zip(words) {
            self.memory.store(address + word * 8, value);
        }
    }
}

impl Vcpu for ThreadVcpu {
    fn run(&mut self) -> Result<()> {
        if std::mem::take(&mut self.greet) {
            self.serial.line("sg-vmm guest (a thread): checking every page I touch\n");
        }
        while !self.director.at_rest() {
            let what = self.director.exchange();
            self.obey(what);
        }
        Ok(())
    }

    fn save(&self) -> Result<VcpuState> {
        Ok(VcpuState { processor: ProcessorState::Thread(self.registers), director: self.director.save() })
    }

    fn load(&mut self, state: &VcpuState) -> Result<()> {
        let refuse = |why: &str| Err(Error::new(ErrorKind::Vm, why));
        let ProcessorState::Thread(registers) = &state.processor else {
            return refuse(
                "this VM's vCPUs are threads, the state is one of KVM: use --vcpu kvm on both sides",
            );
        };
        let shape = |r: &GuestRegisters| (r.shadow, r.stride, r.first, r.working_set);
        if shape(&self.registers) != shape(registers)
            || registers.sequential >= registers.working_set
            || !registers.verify.wrapping_sub(registers.first).is_multiple_of(registers.stride)
        {
            return refuse("the state is one of a VM that is built differently");
        }
        self.registers = *registers;
        self.director.load(state.director);
        self.greet = false;
        Ok(())
    }
}
