//! The VMD server.
mod bits;
pub mod index;
pub mod slots;
