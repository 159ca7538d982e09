//! `sg evict` and `sg gather`: hosts that are emptied, with real processes over the loopback interface.
#![allow(clippy::unwrap_used, reason = "a test that fails shall say where")]

#[path = "../../../discovery-etcd/tests/process/mod.rs"]
mod process;

mod arbiter;
mod commands;
mod failures;
mod world;
