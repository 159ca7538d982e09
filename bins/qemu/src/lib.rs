//! A stock QEMU under libsg's seams.
//!
//! [`Qmp`] is the socket that a QEMU is driven by. [`source`] and [`destination`] find what stands in the way while the VM still
//! runs, and [`Settings`] changes what must be changed, and back.

mod preflight;
mod qmp;
mod settings;

pub use preflight::{Disks, Found, destination, source};
pub use qmp::{Qmp, Version};
pub use settings::Settings;
