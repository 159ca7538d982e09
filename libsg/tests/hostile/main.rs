//! The VMD server in one process with its clients: honest ones, and those that are not.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

mod access;
mod backend;
mod copiers;
mod heirs;
mod honest;
mod limits;
mod peers;
mod support;
