//! A stock QEMU under libsg's seams.
//!
//! ```text
//! source QEMU  <-- QMP, stream -->  Departure: LeavingQemu (OutgoingVm), Relay (PageSource)
//!                                      libsg: scatter, intermediaries, gather
//! destination QEMU  <-- QMP, stream -->  ArrivingQemu (IncomingVm), its feeder (PageSink)
//! ```
//!
//! [`Qmp`] is the socket that a QEMU is driven by. [`source`] and [`destination`] find what stands in the way while the VM still
//! runs, and [`Settings`] changes what must be changed, and back.

mod arriving;
mod calling_off;
mod departed;
mod feeder;
mod layout;
mod leaving;
mod machine;
mod preflight;
mod qmp;
mod record;
mod relay;
mod resident;
mod resuming;
mod settings;
mod steering;

pub use arriving::{ArrivingQemu, OnLost};
pub use departed::{Departed, DepartedFile, Standing, bring_back, finish, standing};
pub use leaving::{Departure, LeavingQemu};
pub use preflight::{Disks, Found, destination, source};
pub use qmp::{Qmp, Version, is_qemu, listener};
pub use record::{Record, StateFile};
pub use relay::Relay;
pub use resident::{Resident, Whereabouts};
pub use resuming::resumable;
pub use settings::Settings;
