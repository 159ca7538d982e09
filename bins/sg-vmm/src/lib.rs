//! The reference VMM as a library: everything but the command `sg-vmm` itself, so that tests reach
//! each piece.
//!
//! The modules are listed in the order of the story: what a VM is, what its memory holds, who runs
//! and checks it, and how it is told what to do.

pub mod clock;
pub mod config;
pub mod page_format;
pub mod memory;
pub mod guest;
pub mod counters;
pub mod director;
pub mod serial;
pub mod vcpu;
pub mod kvm;
pub mod thread_vcpu;
pub mod saved;
pub mod verify;
pub mod vm;
pub mod canary;
pub mod migration;
pub mod pool;
pub mod moves;
pub mod control;
pub mod cli;
pub mod app;
