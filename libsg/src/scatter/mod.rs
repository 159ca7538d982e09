//! Scatter: the source's half.

pub mod batch;
pub mod planner;
pub mod table;
