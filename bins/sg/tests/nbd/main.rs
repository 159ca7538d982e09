//! `sg nbd` as others use it: real intermediaries, real clients (libnbd, QEMU, fio), kills and stops.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that fails shall say where")]

mod disks;
mod failures;
mod views;
mod world;
