//! A Linux guest for tests and experiments with QEMU: Debian's kernel, which `ci/guest` fetches, and one program of our own, which
//! fills memory, changes it, checks what is in it, and beats on the serial console (`src/init`).

mod console;
mod initramfs;
mod work;

pub use console::{Beat, Said};
pub use initramfs::Initramfs;
pub use work::{Work, kernel, redis};

/// The guest's program.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));
