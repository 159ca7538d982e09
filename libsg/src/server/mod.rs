//! The VMD server.
mod bits;
pub mod arena;
pub mod index;
pub mod slots;
pub mod volumes;
