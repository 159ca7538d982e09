//! What the VM needs of a vCPU, whoever runs it.

use libsg::Result;
use libsg::page::PAGE_BYTES_U64;
use serde::{Deserialize, Serialize};

use crate::config::Layout;
use crate::counters::SavedCounters;
use crate::director::DirectorState;
use crate::kvm::state::KvmVcpuState;
use crate::page_format::{COMMON_SEED, PageFormat};

/// One vCPU. It is run by a thread of its own, and saved and loaded while none runs it.
pub trait Vcpu: Send {
    /// Runs until the gate says stop. Comes back in a state that can be saved.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::Vm`] when the guest cannot go on.
    fn run(&mut self) -> Result<()>;

    /// Its whole state.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::Vm`] when it cannot be read.
    fn save(&self) -> Result<VcpuState>;

    /// Replaces its whole state.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::Vm`] when this is not a state of such a vCPU, or KVM refuses it.
    fn load(&mut self, state: &VcpuState) -> Result<()>;
}

/// A vCPU's whole state: what runs it, the order it is working on.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// What it has in registers.
    pub processor: ProcessorState,
    /// What it was told last.
    pub director: DirectorState,
}

/// The processor's part of a vCPU's state.
#[derive(Serialize, Deserialize)]
pub enum ProcessorState {
    /// Everything KVM knows about it.
    Kvm(Box<KvmVcpuState>),
    /// What a thread keeps.
    Thread(GuestRegisters),
}

/// What travels of one vCPU.
#[derive(Serialize, Deserialize)]
pub struct SavedVcpu {
    /// Its state.
    pub state: VcpuState,
    /// What it counted.
    pub counters: SavedCounters,
}

/// What the guest's code keeps in registers (see `guest/guest.S`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRegisters {
    /// Address of the shadow table.
    pub shadow: u64,
    /// Seed of this VM's pages.
    pub seed: u64,
    /// Seed of common pages.
    pub common_seed: u64,
    /// State of the random numbers: odd, multiplied for each one.
    pub random: u64,
    /// Position of sequential writing.
    pub sequential: u64,
    /// Address that is verified next.
    pub verify: u64,
    /// Bytes from one page of the vCPU to its next.
    pub stride: u64,
    /// Address of position 0.
    pub first: u64,
    /// Positions in the working set.
    pub working_set: u64,
}

impl GuestRegisters {
    /// What vCPU `vcpu` starts with.
    #[must_use]
    pub fn new(layout: &Layout, format: &PageFormat, vcpu: u64) -> Self {
        Self {
            shadow: layout.shadow_offset(0),
            seed: format.seed(),
            common_seed: COMMON_SEED,
            random: format.seed() ^ (vcpu + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            sequential: 0,
            verify: (layout.workload + vcpu) * PAGE_BYTES_U64,
            stride: layout.vcpus * PAGE_BYTES_U64,
            first: (layout.workload + vcpu) * PAGE_BYTES_U64,
            working_set: layout.owned(vcpu, layout.working_set),
        }
    }
}
