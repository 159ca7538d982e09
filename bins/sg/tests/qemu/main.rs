//! `sg evict --qmp` and `sg gather --qmp`: the VM of a stock QEMU moves to another, by the commands of the README.

#[path = "../../../qemu/tests/machine/mod.rs"]
mod machine;
#[path = "../../../qemu/tests/process/mod.rs"]
mod process;

mod commands;
mod evict_resume;
mod given_back;
mod hosts;
mod moves;
mod resume;
mod soak;
