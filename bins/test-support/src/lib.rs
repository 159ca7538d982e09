//! What tests of several crates need. It knows nothing of any of them.

pub mod fuzz;
mod nowhere;
mod skipped;
mod strangers;

pub use nowhere::free_address;
pub use skipped::{free_huge_pages, skipped};
pub use strangers::{Strangers, raise_open_files, resident_bytes};
